"""Which bound is the sharpest, and where: shares of random instances, by beta and lambda.

    python experiments/which_bound.py [--instances 20000] [--seed 0]

Prints Markdown tables. Upper bounds are compared at rho*; lower bounds at prompters on the way from rho_sft
to rho* and as far again beyond it (rho proportional to rho_sft^(1-s) rho*^s, s uniform over 0 to 2).
"""

import argparse
from itertools import pairwise

import jax
import numpy as np

from alignpro.theory import BOUNDS, FAMILIES, LOWER_BOUNDS, solution

SHAPE = (3, 6, 8)
EDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


@jax.jit
@jax.vmap
def evaluate(instance, beta, lam, step):
    star = solution(instance, beta, lam)
    between = instance.prior ** (1 - step) * star.rho_star**step
    between = jax.numpy.where(instance.prior > 0, between, 0.0)
    other = solution(instance, beta, lam, between / between.sum(-1, keepdims=True))
    upper = {name: BOUNDS[name](star).rhs for name in BOUNDS if not name.startswith("trained")}
    lower = {name: LOWER_BOUNDS[name](other) for name in ("ceiling", "kl_ceiling", "drift")}
    return upper, {
        n: jax.numpy.where(s.assumptions[next(iter(s.assumptions))], s.lhs, -np.inf) for n, s in lower.items()
    }


def shares(values: dict[str, np.ndarray], best, key: np.ndarray) -> list[list[str]]:
    """Per bin of `key`, the share of instances where each is the best, ties counted for each."""
    stacked = np.stack(list(values.values()))
    top = best(stacked, axis=0)
    wins = np.abs(stacked - top) <= 1e-9 * (np.abs(top) + 1e-300)
    rows = []
    for low, high in pairwise(EDGES):
        inside = (key >= low) & (key < high)
        rows.append([f"{low:g} to {high:g}", *(f"{100 * w[inside].mean():.0f}%" for w in wins)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=20_000, help="per family")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    uppers, lowers, betas, lams = [], [], [], []
    for name in ("independent", "peaked", "sparse", "low_rank", "lm_like", "shared_rewrites"):
        batch = FAMILIES[name](rng, options.instances, SHAPE)
        beta, lam = 10.0 ** rng.uniform(-3, 2, (2, options.instances))
        upper, lower = evaluate(batch, beta, lam, rng.uniform(0, 2, options.instances))
        uppers.append(jax.tree.map(np.asarray, upper))
        lowers.append(jax.tree.map(np.asarray, lower))
        betas.append(beta)
        lams.append(lam)
    beta, lam = np.concatenate(betas), np.concatenate(lams)
    upper = {k: np.concatenate([u[k] for u in uppers]) for k in uppers[0]}
    lower = {k: np.concatenate([u[k] for u in lowers]) for k in lowers[0]}

    def table(title: str, head: list[str], rows: list[list[str]]) -> None:
        print(f"\n{title}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for row in rows:
            print("| " + " | ".join(row) + " |")

    model = {k: upper[k] for k in ("barycentre", "variance")}
    print(f"{6 * options.instances} instances of six families, shape {SHAPE}, seed {options.seed}")
    table("Sharper of the two, by beta", ["beta", *model], shares(model, np.min, beta))
    rivals = {k: upper[k] for k in ("combined", "induced")}
    table("Sharper of the two, by lambda", ["lambda", *rivals], shares(rivals, np.min, lam))
    table("Sharpest lower bound, by lambda", ["lambda", *lower], shares(lower, np.max, lam))
    looseness = {k: np.median(v - upper["combined"]) for k, v in upper.items()}
    print("\nMedian right side minus that of `combined` (rewards in [0, 1]):")
    print(", ".join(f"{k} {v:+.3f}" for k, v in looseness.items()))


if __name__ == "__main__":
    main()
