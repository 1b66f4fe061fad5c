"""How often a reward agrees with preference pairs, with intervals over prompts."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from alignpro.estimation.winrate import wilson
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.rewards.reward import Array


class Ranks(Protocol):
    """A reward that says what it bounds: `logits` orders answers even where bounded scores are equal."""

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64: the unbounded score of each response to its prompt."""
        ...


def accuracy(reward: Ranks, pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """Measure how often the chosen answer scores higher (ties count half), averaged within prompts first.

    The interval is Wilson's at 95% with n = prompts: pairs of one prompt share an answer, so counting them as
    independent would make it too narrow.
    """
    prompts = [p.prompt for p in pairs]
    chosen = reward.logits(prompts, [p.chosen for p in pairs])
    rejected = reward.logits(prompts, [p.rejected for p in pairs])
    return share_won(prompts, chosen - rejected)


def longer_wins(pairs: Sequence[PreferencePair]) -> dict[str, float]:
    """Measure the accuracy of preferring the answer with more words: what length alone would achieve."""
    margin = np.array([len(p.chosen.split()) - len(p.rejected.split()) for p in pairs])
    return share_won([p.prompt for p in pairs], margin)


def share_won(prompts: Sequence[str], margin: Array) -> dict[str, float]:
    """Average `margin` > 0, and half of `margin` = 0, within each prompt and then over prompts."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, hit in zip(prompts, (margin > 0) + 0.5 * (margin == 0), strict=True):
        by_prompt.setdefault(prompt, []).append(float(hit))
    n = len(by_prompt)
    value = float(np.mean([np.mean(row) for row in by_prompt.values()]))
    lo, hi = wilson(value, n)
    return {"value": value, "lo": lo, "hi": hi, "prompts": n, "pairs": len(prompts)}
