"""When are the results on calls, on wrong rewards and on few rewrites informative? And the demo's calls.

    python experiments/when_informative.py [--instances 20000] [--seed 0]
    python experiments/when_informative.py --instance runs/demo/instance.npz --eps 0.05

The first prints a Markdown table by family, lambda and beta from 1e-2 to 1e1 of the rewards' range: medians
of exact over bound (1: sharp), and shares of prompts. The second says how many calls resampling needs on an
enumerated instance, exactly and from simulated rollouts as `alignpro headroom --eps` does.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from alignpro.commands.headroom import text_of_calls
from alignpro.estimation import headroom
from alignpro.estimation.simulate import Size, simulate
from alignpro.theory import FAMILIES, load, results

SHAPE = (2, 6, 5)
FAMILY = ("independent", "peaked", "sparse", "low_rank", "lm_like", "shared_rewrites")
DRAWS, ANSWERS, DELTA = 16, 4, 0.2
LAMS = (0.1, 0.2, 0.5)


@jax.jit
@jax.vmap
def evaluate(instance, beta, lam):
    drawn = results.resampled(instance, lam, DRAWS)
    noisy = results.answered(instance, lam, ANSWERS)
    sure = results.floor(instance, lam, DELTA)
    few = results.few_rewrites(instance, beta, 8)
    reward = instance.reward @ instance.frozen.T
    reference = (instance.prior * reward).sum(-1)
    inside = instance.prior > 0
    span = jnp.where(inside, reward, -jnp.inf).max(-1) - jnp.where(inside, reward, jnp.inf).min(-1)
    return {
        "span": span,
        "lift": drawn.reward_loss,
        "KL": drawn.kl / drawn.kl_bound,
        "KL, chi2": drawn.kl / drawn.kl_chi2,
        "reward": drawn.reward_loss / drawn.reward_bound,
        "reward, worst": drawn.reward_loss / drawn.reward_worst,
        "Pinsker": drawn.tv_bound < jnp.sqrt(drawn.kl_bound / 2),
        "noise": noisy.prompter.loss / noisy.loss_bound,
        "value": sure.by_value > sure.by_tv,
        "pays": jnp.maximum(sure.by_value, sure.by_tv) > reference,
        "floor pays": sure.floor > reference,
        "price": few.price,
        "spread": few.spread,
        "three": few.loss[:, 2] - few.mixture <= 0.1 * (few.single - few.mixture),
    }


def by_family(name: str, count: int, rng: np.random.Generator) -> list[str]:
    """The row of one family, over prompts whose rewrites differ in worth."""
    batch = FAMILIES[name](rng, count, SHAPE)
    found = evaluate(batch, *(10.0 ** rng.uniform(-2, 1, count) for _ in range(2)))
    found = {key: np.asarray(value) for key, value in found.items()}
    live = found["span"] > 1e-6
    priced = live & (found["price"] > 0.01 * found["span"])

    def median(key: str) -> str:
        return f"{np.nanmedian(found[key][live]):.3f}"

    def share(key: str, of: np.ndarray = live) -> str:
        return f"{100 * np.mean(found[key][of]):.0f}%" if of.any() else "-"

    return [
        name,
        *map(median, ("KL", "KL, chi2", "reward", "reward, worst")),
        share("Pinsker"),
        median("noise"),
        *map(share, ("value", "pays", "floor pays")),
        f"{100 * priced.sum() / live.sum():.0f}%",
        f"{np.median(found['spread'][priced]):.2f}" if priced.any() else "-",
        share("three", priced),
    ]


def table(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    head = [
        "family",
        f"KL / sharper, n = {DRAWS}",
        "KL / chi2",
        "reward / bound",
        "reward / worst",
        "TV below Pinsker's",
        f"noise / bound, A = {ANSWERS}",
        f"by_value beats by_tv, delta = {DELTA}",
        "a bound above rho_sft",
        "the floor above rho_sft",
        "one prompt costs 1%",
        "C there",
        "3 rewrites close 90% there",
    ]
    print(f"{count} instances a family, shape {SHAPE}, seed {seed}\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in FAMILY:
        print("| " + " | ".join(by_family(name, count, rng)) + " |")


def example(path: str, eps: float, seed: int) -> None:
    """Calls that resampling needs on an enumerated instance: exactly, and from rollouts."""
    instance = load(path)
    size = Size(prompts=60, answers=16, draws=16, answers_per_draw=8)
    rollouts = simulate(instance, np.random.default_rng(seed), size, reward_range=(0.0, 1.0))
    found = headroom(rollouts, LAMS, eps=eps)
    print("\n".join(text_of_calls(found.calls))[1:])
    print("exactly, of the instance:")
    for lam in LAMS:
        plan = results.calls_needed(instance, lam, eps)
        if plan is None:
            continue
        drawn = results.resampled(instance, lam, plan.draws)
        lost = float(np.asarray(instance.p) @ np.asarray(drawn.reward_loss))
        print(
            f"  lambda {lam:g}: {plan.draws} x {plan.answers} = {plan.calls} calls lose at most "
            f"{plan.loss:.4f}, {plan.noise:.4f} by noise; as many draws with exact rewards lose {lost:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=20_000, help="per family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--instance", help="an enumerated instance (.npz): print its calls, and no table")
    parser.add_argument("--eps", type=float, default=0.05, help="reward units")
    options = parser.parse_args()
    if options.instance:
        example(options.instance, options.eps, options.seed)
    else:
        table(options.instances, options.seed)


if __name__ == "__main__":
    main()
