"""Bounds of a score that has none of its own: declared, clipped or squashed into an interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy.special import expit

from alignpro.errors import AlignProError
from alignpro.llm.rewards.reward import Array, check_scores, shown


@dataclass(frozen=True)
class _Interval:
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            name = "bounds" + " clip" * isinstance(self, Clip)
            raise AlignProError(f"{name} {self.low},{self.high}: give two finite numbers, the lower first")

    def describe(self) -> dict[str, Any]:
        return {"kind": type(self).__name__.lower(), "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return "clip:" * isinstance(self, Clip) + f"{self.low!r},{self.high!r}"


class Declared(_Interval):
    """Bounds that the reward keeps by construction: a score outside [low, high] is an error."""

    def apply(self, raw: Array) -> Array:
        """Return `raw` [n] as it is; `check_scores` has been told the range."""
        return raw


class Clip(_Interval):
    """Bounds to whose nearer end a score beyond them is moved."""

    def apply(self, raw: Array) -> Array:
        """Clip `raw` [n] into [low, high]."""
        return np.clip(raw, self.low, self.high)


@dataclass(frozen=True)
class Squash:
    """Logistic bounds, σ((score − centre) / scale) ∈ [0, 1]: they keep the order of answers.

    Args:
        centre: the score that becomes ½.
        scale: > 0, in units of the score; centre ± scale become 0.27 and 0.73.
    """

    centre: float
    scale: float
    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.scale) and self.scale > 0):
            raise AlignProError(
                f"bounds squash:{self.centre},{self.scale}: give a finite centre and a positive scale"
            )

    def apply(self, raw: Array) -> Array:
        """Squash `raw` [n] into [0, 1]."""
        return expit((raw - self.centre) / self.scale)

    def describe(self) -> dict[str, Any]:
        return {"kind": "squash", "centre": self.centre, "scale": self.scale, "low": 0.0, "high": 1.0}

    def __str__(self) -> str:
        return f"squash:{self.centre!r},{self.scale!r}"


Bounds = Declared | Clip | Squash
_KINDS: dict[str, Callable[[float, float], Bounds]] = {"": Declared, "clip": Clip, "squash": Squash}
SYNTAX = "LOW,HIGH (declared), clip:LOW,HIGH or squash:CENTRE,SCALE"


def parse_bounds(bounds: "Bounds | str | None") -> Bounds:
    """Read the bounds that a user wrote: `0,1`, `clip:-5,5` or `squash:0,2`; bounds already made pass."""
    if isinstance(bounds, Declared | Clip | Squash):
        return bounds
    if bounds is None or not str(bounds).strip():
        raise AlignProError(f"bounds: Theorem 1 needs a bounded reward; give {SYNTAX}")
    kind, _, pair = str(bounds).strip().rpartition(":")
    try:
        first, second = (float(number) for number in pair.split(","))
        make = _KINDS[kind]
    except (ValueError, KeyError):
        raise AlignProError(f"bounds {shown(str(bounds))}: give {SYNTAX}") from None
    return make(first, second)


@dataclass
class Bounded:
    """Bounds at work: checks raw scores, bounds them, and keeps count of what that did.

    A score that is not finite is refused with its sample before it is bounded: clipping would make a number
    of it.
    """

    bounds: Bounds
    scored: int = 0
    clipped: int = 0
    least: float = math.inf
    greatest: float = -math.inf

    def check(self, prompts: Sequence[str], responses: Sequence[str], raw: Any, start: int = 0) -> Array:
        """Check what a reward returned (`check_scores`): [n] float64, finite and within a declared range."""
        b = self.bounds
        limits = (b.low, b.high) if isinstance(b, Declared) else (-math.inf, math.inf)
        return check_scores(prompts, responses, raw, *limits, start=start)

    def apply(self, checked: Array) -> Array:
        """Bound and count raw scores that `check` returned: [n] float64 in [low, high]."""
        b = self.bounds
        if len(checked):
            self.scored += len(checked)
            self.least = min(self.least, float(checked.min()))
            self.greatest = max(self.greatest, float(checked.max()))
            if isinstance(b, Clip):
                self.clipped += int(((checked < b.low) | (checked > b.high)).sum())
        return b.apply(checked)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], raw: Any) -> Array:
        """Check, then bound: [n] float64 in [low, high]."""
        return self.apply(self.check(prompts, responses, raw))

    def describe(self) -> dict[str, Any]:
        """Say what the bounds are, how many scores they saw, between which, and the share clipped."""
        facts = {**self.bounds.describe(), "scored": self.scored}
        if self.scored:
            facts |= {"raw_least": self.least, "raw_greatest": self.greatest}
        if isinstance(self.bounds, Clip):
            facts |= {"clipped": self.clipped, "clipped_share": self.clipped / max(1, self.scored)}
        return facts
