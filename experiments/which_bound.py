"""Which bound is the sharpest, and where: shares of random instances, by beta and lambda.

    python experiments/which_bound.py [--instances 20000] [--seed 0]

Prints Markdown tables, the second by family. Upper bounds are compared at rho*; lower bounds at prompters on
the way from rho_sft to rho* and as far again beyond it (rho proportional to rho_sft^(1-s) rho*^s, s uniform
over 0 to 2).
"""

import argparse
from itertools import pairwise

import jax
import numpy as np

from alignpro.theory import BOUNDS, FAMILIES, LOWER_BOUNDS, solution
from alignpro.theory.statements.upper import two_point_lift

SHAPE = (3, 6, 8)
EDGES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)


FAMILY = ("independent", "peaked", "sparse", "low_rank", "lm_like", "shared_rewrites")


@jax.jit
@jax.vmap
def evaluate(instance, beta, lam, step):
    star = solution(instance, beta, lam)
    between = instance.prior ** (1 - step) * star.rho_star**step
    between = jax.numpy.where(instance.prior > 0, between, 0.0)
    other = solution(instance, beta, lam, between / between.sum(-1, keepdims=True))
    upper = {name: BOUNDS[name](star).rhs for name in BOUNDS if not name.startswith("trained")}
    lower = {name: LOWER_BOUNDS[name](other) for name in ("ceiling", "kl_ceiling", "drift")}
    mean = star.average
    model = {
        "delta1": mean(star.delta1),
        "span times TV": mean(star.span * star.tv_model),
        "own span times TV": mean(star.own_span * star.tv_model),
        "two points": mean(two_point_lift(star).value),
        "M": mean(star.own_rise),
        "span": mean(star.span),
        # The bound that two_point replaced.
        "variance": mean(
            jax.numpy.minimum(
                star.own_fall * jax.numpy.expm1(jax.numpy.minimum(star.own_rise / beta, 600.0)), star.span
            )
        ),
        "span of x": mean(star.own_span < star.span),
        "TV of texts": mean(star.span * star.tv_barycentre),
        "W1 of rewards": mean(star.law_shift),
    }
    reach = {
        n: jax.numpy.where(s.assumptions[next(iter(s.assumptions))], s.lhs, -np.inf) for n, s in lower.items()
    }
    return upper, reach, model


def by_family(name: str, model: dict[str, np.ndarray], upper: dict[str, np.ndarray]) -> list[str]:
    """How often, and by how much in the median, each sharper term beats what it is an alternative to."""
    m = model
    live = (m["delta1"] > 1e-9 * m["span"]) & (m["span"] > 0)
    before = np.minimum(m["span times TV"], m["variance"])
    now = np.minimum(m["own span times TV"], m["two points"])

    def median(values: np.ndarray) -> str:
        return f"{np.median(values[live]):.3f}"

    def share(holds: np.ndarray) -> str:
        return f"{100 * np.mean(holds[live]):.0f}%"

    return [
        name,
        share(m["two points"] < m["own span times TV"] * (1 - 1e-9)),
        median(m["delta1"] / np.where(live, m["two points"], 1.0)),
        median(m["delta1"] / np.where(live, before, 1.0)),
        median(m["delta1"] / np.where(live, now, 1.0)),
        share(m["span of x"] > 0),
        share(m["W1 of rewards"] < 0.5 * m["TV of texts"]),
        median(m["W1 of rewards"] / np.maximum(m["TV of texts"], 1e-300)),
        share((upper["combined"] >= m["span"]) & (upper["law"] < m["span"])),
        median(upper["combined"] - upper["law"]),
    ]


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
    uppers, lowers, betas, lams, rows = [], [], [], [], []
    for name in FAMILY:
        batch = FAMILIES[name](rng, options.instances, SHAPE)
        beta, lam = 10.0 ** rng.uniform(-3, 2, (2, options.instances))
        found = evaluate(batch, beta, lam, rng.uniform(0, 2, options.instances))
        upper, lower, model = jax.tree.map(np.asarray, found)
        rows.append(by_family(name, model, upper))
        uppers.append(upper)
        lowers.append(lower)
        betas.append(beta)
        lams.append(lam)
    beta, lam = np.concatenate(betas), np.concatenate(lams)
    upper = {k: np.concatenate([u[k] for u in uppers]) for k in uppers[0]}
    lower = {k: np.concatenate([u[k] for u in lowers]) for k in lowers[0]}

    def table(title: str, head: list[str], rows: list[list[str]]) -> None:
        print(f"\n{title}\n\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for row in rows:
            print("| " + " | ".join(row) + " |")

    model = {k: upper[k] for k in ("barycentre", "two_point")}
    print(f"{6 * options.instances} instances of six families, shape {SHAPE}, seed {options.seed}")
    table("Sharper of the two, by beta", ["beta", *model], shares(model, np.min, beta))
    head = [
        "family",
        "two_point below span times TV",
        "Delta1 / two_point",
        "Delta1 / least before",
        "Delta1 / least now",
        "a smaller span on x's support",
        "W1 below half of span times TV",
        "W1 / (span times TV)",
        "combined vacuous, law not",
        "combined - law",
    ]
    table("By family: shares of instances, and medians", head, rows)
    rivals = {k: upper[k] for k in ("combined", "induced")}
    table("Sharper of the two, by lambda", ["lambda", *rivals], shares(rivals, np.min, lam))
    table("Sharpest lower bound, by lambda", ["lambda", *lower], shares(lower, np.max, lam))
    looseness = {k: np.median(v - upper["combined"]) for k, v in upper.items()}
    print("\nMedian right side minus that of `combined` (rewards in [0, 1]):")
    print(", ".join(f"{k} {v:+.3f}" for k, v in looseness.items()))


if __name__ == "__main__":
    main()
