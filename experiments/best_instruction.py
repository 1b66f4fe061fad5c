"""Does `alignpro instruct` find the best instruction, and does its held-out interval cover?

    python experiments/best_instruction.py                       # 500 simulated races of each population
    python experiments/best_instruction.py --table runs/table    # the bank on SmolLM2, against all answers

Simulated, the truth is known: how often the winner is within 0.02 of the best candidate, beside asking every
candidate on as many prompts as three times the budget allows; how often the best is ruled out; how often the
95% interval of the gain covers. With `--table` every instruction of the bank is asked on every prompt once
(the answers are kept, so that the same command continues), and races on that table, in an order of prompts
that each seed draws, are compared with the table's own best.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy import stats

from alignpro.estimation.race import Pull, gain_over, race

ARMS, PROMPTS, BUDGET, LEVEL = 103, 400, 40 * 103, 0.95
Cells = Callable[[np.ndarray, int, int, np.random.Generator], np.ndarray]
"""Rewards [arms, prompts, answers] of arms, for so many new prompts and answers: drawn, or looked up."""


def continuous(rng: np.random.Generator, arms: float, cell: float) -> tuple[Cells, np.ndarray]:
    """Rewards clipped to [0, 1], their means normal over arms: `arms` and `cell` are standard deviations."""
    means = 0.45 + arms * rng.standard_normal(ARMS)
    prompt, answer = 0.12, 0.2

    def draw(of: np.ndarray, n: int, answers: int, shared: np.random.Generator) -> np.ndarray:
        x = means[of, None] + prompt * shared.standard_normal(n) + cell * shared.standard_normal((len(of), n))
        return np.clip(x[..., None] + answer * shared.standard_normal((len(of), n, answers)), 0.0, 1.0)

    sd = math.sqrt(prompt**2 + cell**2 + answer**2)
    low, high = stats.norm(means, sd).cdf(0.0), stats.norm(means, sd).cdf(1.0)
    inner = stats.norm(means, sd).pdf(0.0) - stats.norm(means, sd).pdf(1.0)
    return draw, means * (high - low) + sd**2 * inner + (1.0 - high)


def rare(rng: np.random.Generator) -> tuple[Cells, np.ndarray]:
    """Rewards 0 and 1, mostly 0: the rate is an arm's times a prompt's."""
    rates = rng.beta(0.6, 12.0, ARMS)

    def draw(of: np.ndarray, n: int, answers: int, shared: np.random.Generator) -> np.ndarray:
        rate = rates[of, None] * shared.gamma(2.0, 0.5, n)
        return (shared.random((len(of), n, answers)) < -np.expm1(-rate)[..., None]).astype(float)

    return draw, 1.0 - (1.0 + 0.5 * rates) ** -2


POPULATIONS = {
    "reading ease": lambda rng: continuous(rng, 0.10, 0.04),
    "little to find": lambda rng: continuous(rng, 0.02, 0.04),
    "rare rewards": rare,
}


def _drawn(draw: Cells, rng: np.random.Generator, arms: Sequence[int], at: range, answers: int) -> np.ndarray:
    return draw(np.array(arms), len(at), answers, rng)


def simulate(name: str, repetitions: int, seed: int) -> dict[str, float]:
    """Race in a population that is drawn anew each time."""
    rows = []
    for i in range(repetitions):
        rng = np.random.default_rng([seed, i])
        draw, true = POPULATIONS[name](rng)
        pull: Pull = partial(_drawn, draw, rng)
        done = race(pull, ARMS, PROMPTS, 0.0, 1.0, budget=BUDGET, level=LEVEL)
        best, winner = int(true.argmax()), done.ranked[0].arm
        everything = draw(np.arange(ARMS), 3 * BUDGET // ARMS, 1, rng).mean((1, 2)).argmax()
        mine, none = draw(np.array([winner, 0]), 100, 2, rng)
        gain = gain_over(mine, none, 0.0, 1.0, LEVEL).gain
        rows.append(
            {
                "within 0.02 of the best": true[best] - true[winner] <= 0.02,
                "so is the best of three times the answers": true[best] - true[everything] <= 0.02,
                "falls short by": true[best] - true[winner],
                "answers": done.calls,
                "best ruled out": next(r.ruled_out for r in done.ranked if r.arm == best),
                "not ruled out": done.contenders,
                "interval covers": gain.lo <= true[winner] - true[0] <= gain.hi,
                "its width": gain.hi - gain.lo,
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def table(folder: str, prompts: int, tokens: int, rewards: list[str], seeds: int) -> None:
    """Race on the answers of SmolLM2 to every instruction of the bank, by several rewards."""
    from alignpro.llm.arms.instruct import read_instructions
    from alignpro.llm.data import public
    from alignpro.llm.models.prompt import with_instruction
    from alignpro.llm.models.sampling import Sampling
    from alignpro.llm.rewards.opening import load_reward
    from alignpro.llm.targets.ledger import Cached
    from alignpro.llm.targets.local import LocalTarget

    candidates, xs = read_instructions(None), public.prompts("instructions", "train")[:prompts]
    target = Cached(LocalTarget("smollm2-135m-instruct", batch_size=len(candidates)), folder)
    sampling = Sampling(max_tokens=tokens)
    answers = []
    for i, x in enumerate(xs):
        answered = target.respond([with_instruction(x, text) for text in candidates], sampling)
        answers.append([answer.text for (answer,) in answered])
        print(f"{i + 1} of {len(xs)} prompts", end="\r", flush=True)
    for name in rewards:
        reward = load_reward(name)
        flat = [text for row in answers for text in row]
        scores = reward.score([x for x in xs for _ in candidates], flat).reshape(len(xs), len(candidates)).T
        on_table(name, candidates, scores, reward.low, reward.high, seeds)


def _found(scores: np.ndarray, arms: Sequence[int], at: range, answers: int) -> np.ndarray:
    # One answer to each prompt is what there is: asked again, it is the same.
    return np.repeat(scores[np.ix_(arms, at)][..., None], answers, 2)


def on_table(
    name: str, candidates: tuple[str, ...], scores: np.ndarray, low: float, high: float, seeds: int
) -> None:
    """Race on a table of rewards [candidates, prompts], at a third of its size, once for each seed."""
    means, rows = scores.mean(1), []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(scores.shape[1])

        pull: Pull = partial(_found, scores[:, order])
        arms, prompts = scores.shape
        done = race(pull, arms, prompts, low, high, budget=scores.size // 3, level=LEVEL, fresh=False)
        rows.append((means.max() - means[done.ranked[0].arm], done.calls, done.contenders))
    short, calls, contenders = np.array(rows).T
    print(
        f"\n{name}: none {means[0]:.3f}, best {means.max():.3f} {candidates[int(means.argmax())]!r}; the "
        f"winner is within 0.02 in {(short <= 0.02).sum()} of {seeds}, short by {short.mean():.4f} (at most "
        f"{short.max():.4f}), after {calls.mean():,.0f} of {scores.size:,} answers, {contenders.mean():.0f} "
        "not ruled out"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", help="folder of the answers of SmolLM2 to the whole bank")
    parser.add_argument("--prompts", type=int, default=120, help="prompts of the table")
    parser.add_argument("--answer-tokens", type=int, default=40)
    parser.add_argument("--reward", nargs="+", default=["ease", "brevity", "sentiment", "minilm-bt"])
    parser.add_argument("--seeds", type=int, default=20, help="races on the table")
    options = parser.parse_args()
    if options.table is not None:
        table(options.table, options.prompts, options.answer_tokens, options.reward, options.seeds)
        return
    found = {name: simulate(name, options.repetitions, options.seed) for name in POPULATIONS}
    print(f"| {options.repetitions} races of {ARMS} candidates, at most {BUDGET:,} answers |", end="")
    print(f" {' | '.join(found)} |\n|---{'|---' * len(found)}|")
    for key in found["reading ease"]:
        print(f"| {key} | {' | '.join(f'{row[key]:,.4g}' for row in found.values())} |")


if __name__ == "__main__":
    main()
