"""Is pooling right? How often `headroom` says yes, and how often its limits cover, on simulated populations.

    python experiments/pooled.py [--repetitions 500] [--seed 0] [--only NAME ...] [--out FILE.json]

Prompts share instructions that a reference adds. Prints a Markdown table; writes
experiments/results/pooled.json.
"""

import argparse
import datetime
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignpro.estimation import headroom
from alignpro.estimation.components import normal_value
from alignpro.estimation.simulate import Instructions, simulate_instructions
from alignpro.files import write_json
from alignpro.rollouts import Rollouts

GAIN = Instructions(best=0.25)
FLAT = Instructions(effect=0.0, own=0.0)
POPULATIONS = {
    "a gain of 0.25": GAIN,
    "its effects normal, sd 0.1": GAIN._replace(best=None),
    "rho_sft(s|x) uneven, Dirichlet 3": GAIN._replace(concentration=3.0),
    "no densities": GAIN._replace(density=False),
    "8 draws": GAIN._replace(draws=8),
    "200 prompts": GAIN._replace(prompts=200),
    "interaction sd 0.12, effects sd 0.05": GAIN._replace(
        best=None, effect=0.05, interaction=0.12, prompts=200
    ),
    "flat": FLAT,
    "flat, interaction sd 0.1": FLAT._replace(interaction=0.1),
    "flat, 2 instructions": FLAT._replace(instructions=2),
    "flat, 20 prompts": FLAT._replace(prompts=20),
    "flat, 10 prompts, 5 instructions": FLAT._replace(prompts=10, instructions=5),
    "flat, 8 draws": FLAT._replace(draws=8),
    "flat, rho_sft(s|x) uneven, Dirichlet 1": FLAT._replace(instructions=10, concentration=1.0),
    "flat, no densities": FLAT._replace(density=False),
    "worse than no prompter by 0.02": FLAT._replace(own=0.02),
}
FEW = FLAT._replace(prompts=20)
RARE = {
    "rewards of 1, 2 in 100": (0.02, FLAT),
    "rewards of 1, 2 in 100, 20 prompts": (0.02, FEW),
    "rewards of 1, 1 in 5, 20 prompts": (0.2, FEW),
    "rewards of 1, 98 in 100": (0.98, FLAT),
}
"""Rewards of 0 and 1 that nothing changes the rate of."""
LAM = 0.05


def drawn(name: str, rng: np.random.Generator) -> tuple[Instructions, Rollouts]:
    if name in POPULATIONS:
        return POPULATIONS[name], simulate_instructions(rng, POPULATIONS[name])
    rate, size = RARE[name]
    found = simulate_instructions(rng, size)
    return size, replace(found, reward=(rng.random(len(found)) < rate).astype(float))


def measure(name: str, repetitions: int, seed: int) -> dict[str, float]:
    rows = []
    for i in range(repetitions):
        size, rollouts = drawn(name, np.random.default_rng([seed, i]))
        found = headroom(rollouts, (LAM,))
        pooled = found.pooled
        assert pooled is not None
        assert pooled.over_none is not None
        row = {
            "yes": found.decision == "yes",
            "yes by the pooled prompter": pooled.deciding.lo > 0,
            "yes without pooling": headroom(replace(rollouts, strategy=None), (LAM,)).decision == "yes",
            "gain over none": pooled.over_none.value,
            "lower limit": pooled.over_none.lo,
            "kl": pooled.kl.value,
            "reads": pooled.supports == "a prompter that reads",
        }
        if pooled.components is not None and name in POPULATIONS:
            c, true = pooled.components, size.interaction**2
            row["interaction covered"] = c.interaction.lo <= true <= c.interaction.hi
            if size.best is None:
                v = size.effect**2 * (1 - 1 / size.instructions)
                shares = np.full(size.instructions, 1 / size.instructions)
                one, read = normal_value((v, v + true), shares, LAM)
                row["price"] = pooled.at[0].price.value
                row["price, true"] = read - one
                row["price covered"] = pooled.at[0].price.lo <= read - one <= pooled.at[0].price.hi
        rows.append(row)
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "pooled.json"))
    options = parser.parse_args()
    shown = (
        *("yes", "yes by the pooled prompter", "yes without pooling", "gain over none", "lower limit", "kl"),
        *("reads", "interaction covered", "price", "price, true", "price covered"),
    )
    print("| population | " + " | ".join(shown) + " |\n|" + "---|" * (len(shown) + 1))
    results = {}
    for name in options.only or [*POPULATIONS, *RARE]:
        start = time.perf_counter()
        results[name] = found = measure(name, options.repetitions, options.seed)
        found["seconds"] = time.perf_counter() - start
        cells = ["" if np.isnan(found.get(key, np.nan)) else f"{found[key]:.3f}" for key in shown]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    given = f"--repetitions {options.repetitions} --seed {options.seed}"
    write_json(
        options.out,
        {
            "command": f"python experiments/pooled.py {given}",
            "date": datetime.date.today().isoformat(),
            "level": 0.95,
            "lam": LAM,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
