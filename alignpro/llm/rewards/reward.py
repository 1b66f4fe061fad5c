"""Defines what a reward is, and checks texts and scores for all of them."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from alignpro.errors import AlignProError

Array = np.ndarray


class Reward(Protocol):
    """What every reward offers; `low` and `high` bound every score, as Theorem 1 asks."""

    low: float
    high: float

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64: r(prompts[i], responses[i]) in [low, high]."""
        ...

    def describe(self) -> dict[str, Any]:
        """What the reward is, its measured quality and its limits, as JSON values."""
        ...


def check_texts(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Raise AlignProError unless there is one response per prompt, all strings."""
    if len(prompts) != len(responses):
        raise AlignProError(
            f"{len(prompts)} prompts and {len(responses)} responses: give one response per prompt"
        )
    for kind, texts in (("prompts", prompts), ("responses", responses)):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise AlignProError(f"{kind}[{i}] is {type(text).__name__}: give a string")


def check_scores(
    prompts: Sequence[str],
    responses: Sequence[str],
    scores: Any,
    low: float = -math.inf,
    high: float = math.inf,
    start: int = 0,
    remedy: str = "mend the reward on this sample",
) -> Array:
    """`scores` as [n] float64: one finite number in [low, high] per sample, or an error that shows the first
    sample without.

    Args:
        scores: a sequence, array or tensor of n numbers.
        start: number of the first sample, where the samples are part of a batch.
        remedy: of a score that is not finite.

    Raises:
        AlignProError: so; the sample is shortened and escaped.
    """
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().float().cpu().numpy()
    if (
        isinstance(scores, str | bytes | Mapping)
        or not hasattr(scores, "__len__")
        or getattr(scores, "shape", 1) == ()
    ):
        raise AlignProError(
            f"the reward returned {type(scores).__name__} for {len(prompts)} samples: "
            "return a sequence of one number per sample"
        )
    if len(scores) != len(prompts):
        raise AlignProError(
            f"the reward returned {len(scores)} scores for {len(prompts)} samples: return one per sample"
        )
    found = np.zeros(len(prompts))
    for i, score in enumerate(scores):
        if not isinstance(score, numbers.Real | np.bool_):
            where = sample_shown(start + i, prompts[i], responses[i])
            raise AlignProError(f"the reward of {where} is of type {type(score).__name__}: return a number")
        try:
            found[i] = float(score)
        except OverflowError:
            found[i] = math.inf  # an integer beyond all floats
        if not math.isfinite(found[i]):
            where = sample_shown(start + i, prompts[i], responses[i])
            raise AlignProError(f"the reward of {where} is {found[i]}: every reward must be finite; {remedy}")
        if not low <= found[i] <= high:
            where = sample_shown(start + i, prompts[i], responses[i])
            raise AlignProError(
                f"the reward of {where} is {found[i]:g}, outside the declared [{low:g}, {high:g}]: "
                "declare a wider range, or clip or squash"
            )
    return found


def sample_shown(i: int, prompt: str, response: str) -> str:
    """A sample named by its number and its texts, for an error."""
    return f"sample {i} (prompt {shown(prompt)}, response {shown(response)})"


def shown(text: str, length: int = 80) -> str:
    """One line of `text`: shortened, and escaped so that it cannot drive a terminal or forge a log line."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


PLAIN = "Human: {prompt}\n\nAssistant: {response}"
"""How a sample is written for a model whose tokenizer has no chat template."""


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise AlignProError(f"{name} {value}: give at least {least}")


def _parts(n: int, size: int) -> list[range]:
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def check_template(template: str) -> None:
    """Refuse a template that is neither `chat` nor `pair` nor a text with {prompt} and {response}.

    Raises:
        AlignProError: so.
    """
    if template in ("chat", "pair"):
        return
    if template.count("{prompt}") != 1 or template.count("{response}") != 1:
        raise AlignProError(
            f"template {shown(template)}: write {{prompt}} and {{response}} once each, or chat or pair"
        )


def fill(template: str, prompt: str, response: str) -> str:
    """`template` with {prompt} and {response} replaced literally.

    One pass, so a placeholder inside a text stays text; and no format language, which could reach attributes.
    """
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{(?:prompt|response)\}", lambda match: texts[match[0]], template)
