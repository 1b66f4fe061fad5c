"""How near PPO, RLOO, GRPO and a k3 mutant come to ρ* on the tiny problem that the tests guard, over seeds.

python experiments/tiny_optimum.py
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from alignpro.llm.models.configure import tiny_model
from alignpro.llm.policies.tree import PrefixTree, TreeTask, leaf_probabilities
from alignpro.llm.training import ppo
from alignpro.llm.training.settings import ALGORITHM_NAMES, TreeSettings
from alignpro.llm.training.tree import TrainedTree, train

END, LAM = 1, 0.35
PROMPTS = ("ab", "cd")
FAST = TreeSettings(lam=LAM, iterations=40, samples=256, learning_rate=3e-3, lora_layers=1.0)

Evaluate = Callable[[Sequence[np.ndarray]], Mapping[str, float]]


def problem() -> tuple[Any, Any, TreeTask, Evaluate]:
    """20 rewrites of one or two tokens for each of two prompts; rewards in [0, 1.5] that depend on both.

    Returns:
        model, tokenizer, task, and a function that says of a policy how far it is from ρ*.
    """
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    one = [(a, END) for a in range(3, 7)]
    two = list(itertools.product(range(3, 7), repeat=2))
    tree = PrefixTree((*one, *two))
    ids = tuple(tuple(tokenizer(p).input_ids) for p in PROMPTS)
    rewards = np.random.default_rng(0).uniform(0, 1.5, (2, len(tree.sequences)))
    task = TreeTask(PROMPTS, ids, (tree, tree), lambda x, leaves: rewards[x, list(leaves)].tolist())
    reference = leaf_probabilities(model, ids, [tree, tree])
    star = [p * np.exp(r / LAM) for p, r in zip(reference, rewards, strict=True)]
    star = [s / s.sum() for s in star]

    def evaluate(policy: Sequence[np.ndarray]) -> dict[str, float]:
        kl = [float((p * np.log(p / s)).sum()) for p, s in zip(policy, star, strict=True)]
        objective = [
            float((p * (r - LAM * np.log(p / q))).sum())
            for p, q, r in zip(policy, reference, rewards, strict=True)
        ]
        return {"kl_to_star": sum(kl) / 2, "objective": sum(objective) / 2}

    return model, tokenizer, task, evaluate


def fit(folder: str | Path, settings: TreeSettings = FAST, **options: Any) -> TrainedTree:
    """Train on the problem."""
    model, tokenizer, task, evaluate = problem()
    return train(model, tokenizer, task, settings, folder, evaluate=evaluate, **options)


@dataclass(frozen=True)
class Experiment:
    """KL(ρ_θ‖ρ*) in nats at the end of training, by algorithm."""

    seeds: int = 5
    """How many seeds, from 0."""
    iterations: int = FAST.iterations
    """Rounds of training."""


def distances(algorithm: str, experiment: Experiment) -> np.ndarray:
    """KL(ρ_θ‖ρ*) in nats at the end of training, one per seed."""
    out = []
    for seed in range(experiment.seeds):
        with tempfile.TemporaryDirectory() as folder:
            settings = replace(FAST, algorithm=algorithm, seed=seed, iterations=experiment.iterations)
            curve = fit(folder, settings).metrics
        out.append(curve[-1]["exact"]["kl_to_star"])
    print(f"start: {curve[0]['exact']['kl_to_star']:.4f}", end="  ")
    return np.array(out)


def run(experiment: Experiment) -> None:
    torch.set_num_threads(1)
    right = ppo.shaped_rewards
    for name in (*ALGORITHM_NAMES, "ppo with k3 in the reward"):
        if "k3" in name:  # as a policy gradient must not use it
            ppo.shaped_rewards = lambda *arguments: right(*arguments[:5], "k3")
        values = distances(name.split()[0], experiment)
        spread = values.std(ddof=1) if len(values) > 1 else float("nan")
        print(f"{name}: mean {values.mean():.5f}, sd {spread:.5f}, largest {values.max():.5f}", flush=True)
    ppo.shaped_rewards = right


if __name__ == "__main__":
    run(tyro.cli(Experiment))
