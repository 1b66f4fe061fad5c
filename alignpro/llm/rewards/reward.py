"""The protocol of rewards, and the checks of texts and scores that all of them share."""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from alignpro.errors import AlignProError
from alignpro.llm.targets.target import check_paired, check_strings

Array = np.ndarray


class Reward(Protocol):
    """A bounded reward r(x, y) of a response y to the user's own prompt x, not to its rewrite.

    It may have more: `scores` and `ranges` (see `Scores`) where it has parts; `reads`, the `Columns` of the
    prompts' data that it needs; `check_prompts(prompts)`, which refuses prompts that it cannot judge before
    anything is asked; `line()`, what it has asked of services, in words.
    """

    low: float
    """Lower end of the range, finite: no score is below it, as Theorem 1 asks."""
    high: float
    """Upper end of the range, finite: no score is above it."""

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response to its prompt: [n] float64 in [low, high]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Say what the reward is, its measured quality and its limits, as JSON values."""
        ...


def check_texts(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Refuse anything but one response per prompt, all strings."""
    check_paired(prompts, responses)
    check_strings(prompts=prompts, responses=responses)


def check_scores(
    prompts: Sequence[str],
    responses: Sequence[str],
    scores: Any,
    low: float = -math.inf,
    high: float = math.inf,
    start: int = 0,
    remedy: str = "mend the reward on this sample",
) -> Array:
    """Turn what a reward returned into [n] float64, if it is one finite number in [low, high] per sample.

    Args:
        scores: a sequence, array or tensor of n numbers.
        start: number of the first sample, where the samples are part of a batch.
        remedy: what to do about a score that is not finite.

    Raises:
        AlignProError: it is not; shows the first bad sample, shortened and escaped.
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
        fault = None
        if not isinstance(score, numbers.Real | np.bool_):
            fault = f"is of type {type(score).__name__}: return a number"
        else:
            try:
                found[i] = float(score)
            except OverflowError:
                found[i] = math.inf  # an integer beyond all floats
            if not math.isfinite(found[i]):
                fault = f"is {found[i]}: every reward must be finite; {remedy}"
            elif not low <= found[i] <= high:
                fault = (
                    f"is {found[i]:g}, outside the declared [{low:g}, {high:g}]: declare a wider range, or "
                    "clip or squash"
                )
        if fault:
            raise AlignProError(f"the reward of {sample_shown(start + i, prompts[i], responses[i])} {fault}")
    return found


def sample_shown(i: int, prompt: str, response: str) -> str:
    """Name a sample by its number and its texts, for an error."""
    return f"sample {i} (prompt {shown(prompt)}, response {shown(response)})"


def shown(text: str, length: int = 80) -> str:
    """Shorten and escape `text`, so that it cannot drive a terminal or forge a log line."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


PLAIN = "Human: {prompt}\n\nAssistant: {response}"
"""The way a sample is written for a model whose tokenizer has no chat template."""


def lacking(found: Any) -> list[str]:
    """Names of what a `Reward` has and `found` has not."""
    return [name for name in ("score", "describe", "low", "high") if not hasattr(found, name)]


def at_least(least: int, **values: int) -> None:
    """Refuse settings below `least`, naming the first."""
    for name, value in values.items():
        if value < least:
            raise AlignProError(f"{name} {value}: give at least {least}")


def batches(n: int, size: int) -> list[range]:
    """Divide 0 to n − 1 into runs of at most `size`."""
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def check_template(template: str) -> None:
    """Refuse a template that is not `chat`, `pair` or a text with {prompt} and {response} once each."""
    once = template.count("{prompt}") == 1 == template.count("{response}")
    if template not in ("chat", "pair") and not once:
        raise AlignProError(
            f"template {shown(template)}: write {{prompt}} and {{response}} once each, or chat or pair"
        )


def fill(template: str, prompt: str, response: str) -> str:
    """Replace {prompt} and {response} in `template` literally.

    One pass, so a placeholder inside a text stays text; and no format language, which could reach attributes.
    """
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{(?:prompt|response)\}", lambda match: texts[match[0]], template)
