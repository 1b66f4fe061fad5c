"""TODO."""

from collections.abc import Sequence

import numpy as np

from alignpro.llm.data import packaged
from alignpro.llm.rewards.bradley_terry import (
    BradleyTerryReward,
)
from alignpro.llm.rewards.minilm import wilson_interval
from alignpro.llm.rewards.reward import Array


def accuracy(reward: BradleyTerryReward, pairs: Sequence[packaged.PreferencePair]) -> dict[str, float]:
    """How often the chosen answer scores higher (ties count half), averaged within prompts first.

    The interval is Wilson's at 95% with n = prompts: pairs of one prompt share an answer, so counting them as
    independent would make it too narrow.
    """
    prompts = [p.prompt for p in pairs]
    margin = reward.logits(prompts, [p.chosen for p in pairs]) - reward.logits(
        prompts, [p.rejected for p in pairs]
    )
    return _clustered(prompts, (margin > 0) + 0.5 * (margin == 0))


def longer_wins(pairs: Sequence[packaged.PreferencePair]) -> dict[str, float]:
    """The accuracy of preferring the answer with more words: what length alone would achieve."""
    margin = np.array([len(p.chosen.split()) - len(p.rejected.split()) for p in pairs])
    return _clustered([p.prompt for p in pairs], (margin > 0) + 0.5 * (margin == 0))


def _clustered(prompts: Sequence[str], hits: Array) -> dict[str, float]:
    by_prompt: dict[str, list[float]] = {}
    for prompt, hit in zip(prompts, hits, strict=True):
        by_prompt.setdefault(prompt, []).append(float(hit))
    n = len(by_prompt)
    value = float(np.mean([np.mean(row) for row in by_prompt.values()]))
    lo, hi = wilson_interval(value * n, n)
    return {"value": value, "lo": lo, "hi": hi, "prompts": n, "pairs": len(prompts)}
