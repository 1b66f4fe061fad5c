"""A reward that is linear in its features and squashed: how eq. (1) fits one, and how it scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import optimize
from scipy.special import expit

from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json
from alignpro.llm.data.packaged import last_first
from alignpro.llm.rewards.features import TEXT_FEATURES, Embedder, features
from alignpro.llm.rewards.reward import Array, check_scores, check_texts


def bradley_terry_loss(
    weights: Array, differences: Array, pair_weights: Array, weight_decay: float
) -> tuple[float, Array]:
    """Evaluate eq. (1), `−E log σ(r(x,y_u) − r(x,y_v))`, at r = weights·features, plus ½ weight_decay ‖w‖².

    Args:
        weights: [D].
        differences: [N, D], features of the chosen answer minus those of the rejected one.
        pair_weights: [N], non-negative, summing to 1: the expectation over pairs.
        weight_decay: ≥ 0.

    Returns:
        The loss in nats and its gradient [D].
    """
    margins = differences @ weights
    loss = pair_weights @ np.logaddexp(0.0, -margins) + 0.5 * weight_decay * weights @ weights
    # d/dm −log σ(m) = −σ(−m), and expit of −m never overflows.
    slope = -pair_weights * expit(-margins)
    return float(loss), differences.T @ slope + weight_decay * weights


def fit_bradley_terry(differences: Array, pair_weights: Array, weight_decay: float) -> Array:
    """Find the minimiser [D] of `bradley_terry_loss`, unique for weight_decay > 0; else there may be none."""
    if not weight_decay > 0:
        raise AlignProError(f"weight_decay {weight_decay}: choose a positive number")
    if len(differences) == 0:
        raise AlignProError("no preference pairs to train on; give at least one")
    share = pair_weights / pair_weights.sum()
    result = optimize.minimize(
        bradley_terry_loss,
        np.zeros(differences.shape[1]),
        args=(differences, share, weight_decay),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "gtol": 1e-8, "ftol": 1e-14},
    )
    if not result.success or not np.isfinite(result.x).all():
        raise AlignProError(f"Bradley–Terry training did not converge ({result.message}); raise weight_decay")
    return result.x


@dataclass
class BradleyTerryReward:
    """The reward r(x, y) = σ((w·φ(x, y) − b·e(x) − centre) / scale) ∈ [0, 1].

    Eq. (1) determines a reward up to a function of x. The choice made here, `b·e(x)`, predicts the mean
    reward of the training answers to x, so that different answers to ONE prompt use the range. The logistic
    is fixed when the head is trained and recorded: the bound is true of every text, and the order of
    answers to a prompt is that of the Bradley–Terry head.

    Args:
        weights: [D] of the standardised features.
        mean, scale_by: [D] standardisation: φ = (features − mean) · scale_by.
        baseline: [385], of the prompt's embedding and a constant.
        centre, scale: of the squash, in units of the head.
        facts: what `describe` reports.
    """

    weights: Array
    mean: Array
    scale_by: Array
    baseline: Array
    centre: float
    scale: float
    facts: dict[str, Any]
    embedder: Embedder = field(default_factory=Embedder, repr=False)
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response to its prompt: [n] float64 in [0, 1]."""
        check_texts(prompts, responses)
        if not prompts:
            return np.zeros(0)
        remedy = "the head or encoder is damaged: delete its cache folder"
        raw = check_scores(prompts, responses, self.logits(prompts, responses), remedy=remedy)
        return expit(raw)

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score before the logistic: [n] float64."""
        prompts = [last_first(x) for x in prompts]
        phi = (features(prompts, responses, self.embedder) - self.mean) * self.scale_by
        ex = self.embedder.embed(prompts).astype(np.float64)
        return (phi @ self.weights - affine(ex) @ self.baseline - self.centre) / self.scale

    def describe(self) -> dict[str, Any]:
        """Data, counts, test accuracy with 95% intervals, length correlation and limits, as JSON values."""
        return json.loads(json.dumps(self.facts))

    def save(self, folder: str | Path) -> None:
        """Write `head.safetensors` and `reward.json` into `folder`, which is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "weights": self.weights,
                "mean": self.mean,
                "scale_by": self.scale_by,
                "baseline": self.baseline,
                "squash": np.array([self.centre, self.scale]),
            },
            folder / "head.safetensors",
        )
        write_json(folder / "reward.json", self.facts)

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder | None = None) -> "BradleyTerryReward":
        """Read the reward that `save` wrote."""
        folder = Path(folder)
        try:
            tensors = load_file(folder / "head.safetensors")
            facts = read_json(folder / "reward.json", dict)
            centre, scale = map(float, tensors.pop("squash"))
            size = Embedder.DIMENSION + len(TEXT_FEATURES)
            shapes = {name: array.shape for name, array in tensors.items()}
            expected = dict.fromkeys(("weights", "mean", "scale_by"), (size,))
            if shapes != expected | {"baseline": (Embedder.DIMENSION + 1,)}:
                raise ValueError(f"shapes {shapes}")
            arrays = [*tensors.values(), np.array([centre, scale])]
            if (
                not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays)
                or scale <= 0
            ):
                raise ValueError("a number is not finite")
        except Exception as error:
            raise AlignProError(
                f"cannot load a reward from {folder} ({type(error).__name__}); name a folder that "
                "BradleyTerryReward.save wrote"
            ) from error
        return cls(**tensors, centre=centre, scale=scale, facts=facts, embedder=embedder or Embedder())


def affine(ex: Array) -> Array:
    """[n, D + 1]: embeddings [n, D] with a constant 1 behind."""
    return np.column_stack([ex, np.ones(len(ex))])
