"""How near PPO, RLOO and a k3 mutant come to ρ* on the tiny problem that the tests guard, over five seeds.

python experiments/tiny_optimum.py
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "llm"))

from test_train import FAST, fit

from alignpro.llm.training import ppo
from alignpro.llm.training.tree import TrainSettings


def distances(algorithm: str) -> np.ndarray:
    """KL(ρ_θ‖ρ*) in nats at the end of training, one per seed."""
    out = []
    for seed in range(5):
        with tempfile.TemporaryDirectory() as folder:
            settings = TrainSettings(**(vars(FAST) | {"algorithm": algorithm, "seed": seed}))
            curve = fit(folder, settings).curve
        out.append(curve[-1]["exact"]["kl_to_star"])
    print(f"start: {curve[0]['exact']['kl_to_star']:.4f}", end="  ")
    return np.array(out)


def with_k3(score, logp, ref, mask, kl_coef):
    """The k3 estimate of the KL in the reward, as a policy gradient must not use it."""
    k3 = ((ref - logp).exp() - (ref - logp) - 1) * mask
    return (-kl_coef * k3).scatter_add(1, mask.sum(1).long()[:, None] - 1, score[:, None])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("ppo", "rloo", "ppo with k3 in the reward"):
        if "k3" in name:
            ppo.shaped_rewards = with_k3
        values = distances(name.split()[0])
        print(
            f"{name}: mean {values.mean():.5f}, sd {values.std(ddof=1):.5f}, largest {values.max():.5f}",
            flush=True,
        )
