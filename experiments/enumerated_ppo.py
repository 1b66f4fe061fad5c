"""How much of F(ρ*) − F(ρ_sft) does training close on a real, enumerated language model?

    python experiments/enumerated_ppo.py --out runs/enumerated_ppo

One enumeration (SmolLM2-135M-Instruct, 8 prompts × 16 rewrites × 32 responses), then one training run per
seed. Interrupt it at any time; the same command continues. Writes results.json and curves.png into `out`.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from alignpro.files import writable_folder, write_json
from alignpro.llm.arms.demo import DemoSettings, Measures, enumerated, fit, user_prompts
from alignpro.llm.models.load import load_model
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.training.settings import TreeSettings
from alignpro.runs import environment


@dataclass(frozen=True)
class Experiment:
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the training; the enumeration is the same for all."""
    settings: DemoSettings = field(default_factory=lambda: DemoSettings(training=TreeSettings(iterations=32)))


def run(experiment: Experiment) -> dict[str, Any]:
    out, settings = writable_folder(experiment.out), experiment.settings
    prompts = user_prompts(settings)
    reward = load_reward(settings.reward)
    model, tokenizer = load_model(settings.model)
    enumeration, _ = enumerated(out, settings, prompts, model, tokenizer, reward)
    measures = Measures(enumeration.instance, settings.beta, settings.training.lam)
    curves = {}
    for seed in experiment.seeds:
        training = replace(settings.training, seed=seed)
        folder = out / f"{training.algorithm}-seed{seed}"
        model, tokenizer = load_model(settings.model)  # training wraps the model in place
        curves[seed] = fit(
            enumeration,
            measures,
            training,
            model,
            tokenizer,
            folder,
            exact_rewards=settings.exact_rewards,
            resume=True,  # a finished run ends at once
        ).metrics

    last = {seed: curve[-1]["exact"] for seed, curve in curves.items()}
    closed = np.array([exact["closed"] for exact in last.values()])
    results = {
        "settings": asdict(settings),
        "environment": environment(),
        "reward_model": reward.describe()["test_accuracy"],
        "optimal_objective": measures.reference["objective"] + measures.reference["shortfall"],
        "reference": measures.reference,
        "last": last,
        "closed": {
            "mean": closed.mean(),
            "sd": closed.std(ddof=1) if len(closed) > 1 else None,
            "least": closed.min(),
        },
        "seconds": {seed: curve[-1]["seconds"] for seed, curve in curves.items()},
        "threads": torch.get_num_threads(),
        "curves": {
            seed: [
                {
                    "step": c["step"],
                    **{k: c["exact"][k] for k in ("closed", "kl_to_star", "kl_to_sft", "reward")},
                }
                for c in curve
            ]
            for seed, curve in curves.items()
        },
    }
    write_json(out / "results.json", results)
    draw(results, out / "curves.png")
    each = ", ".join(f"{c:.1%}" for c in closed)
    print(f"closed {closed.mean():.1%} of F(ρ*) − F(ρ_sft) on average (each: {each})")
    return results


def draw(results: dict[str, Any], path: Path) -> None:
    """One line per seed: the share closed, and KL(ρ_θ‖ρ*)."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for seed, curve in results["curves"].items():
        steps = [c["step"] for c in curve]
        left.plot(steps, [100 * c["closed"] for c in curve], label=f"seed {seed}")
        right.plot(steps, [c["kl_to_star"] for c in curve], label=f"seed {seed}")
    left.axhline(90, color="gray", linestyle="--", linewidth=1)
    left.set(xlabel="optimizer steps", ylabel="closed share of F(ρ*) − F(ρ_sft), %", ylim=(0, 100))
    right.set(xlabel="optimizer steps", ylabel="KL(ρ_θ‖ρ*), nats", yscale="log")
    left.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    run(tyro.cli(Experiment, config=(tyro.conf.FlagCreatePairsOff,)))
