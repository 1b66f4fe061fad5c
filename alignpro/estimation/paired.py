"""Per-prompt values, whose sums and differences stay paired by prompt, and intervals of their means."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from alignpro.estimation.intervals import Bias, Estimate, betting, studentise
from alignpro.rollouts import Rollouts

Interval = Literal["bootstrap", "betting"]
"""Which intervals means get: percentile-t over prompts, or guaranteed limits where they are to be had."""
Key = TypeVar("Key", bound=Hashable)
_FLIP: dict[Bias, Bias] = {"none": "none", "up": "down", "down": "up", "unknown": "unknown"}


@dataclass(frozen=True, eq=False)
class Term:
    """Per-prompt `values` [n] whose mean estimates a quantity in [low, high], taken from `arms`."""

    values: np.ndarray
    low: float
    high: float
    arms: frozenset[str]
    bias: Bias
    """How the mean of `values` errs, as `Estimate.bias` says."""
    method: str
    lower: np.ndarray | None = None
    """[n] values whose mean is biased down; given where `values` cannot be trusted."""
    upper: np.ndarray | None = None
    """[n] values whose mean is biased up; given where `values` cannot be trusted."""
    ess: float | None = None
    """Effective number of importance-weighted samples of a prompt; None where nothing is weighted."""
    bounded: bool = False
    """Whether each of `values` is unbiased and within [low, high]: betting then applies."""

    @property
    def weak(self) -> bool:
        """Whether the interval is a bracket by `lower` and `upper`."""
        return self.lower is not None

    def __add__(self, other: "Term") -> "Term":
        if other.bias in ("none", self.bias):
            bias = self.bias
        else:
            bias = other.bias if self.bias == "none" else "unknown"
        lower = upper = None
        if self.weak or other.weak:
            lower, upper = (
                (self.values if mine is None else mine) + (other.values if theirs is None else theirs)
                for mine, theirs in ((self.lower, other.lower), (self.upper, other.upper))
            )
        return Term(
            values=self.values + other.values,
            low=self.low + other.low,
            high=self.high + other.high,
            arms=self.arms | other.arms,
            bias=bias,
            method=self.method
            if self.method == other.method
            else "per-prompt values, combined prompt by prompt",
            lower=lower,
            upper=upper,
            ess=min((t.ess for t in (self, other) if t.ess is not None), default=None),
        )

    def __neg__(self) -> "Term":
        return replace(
            self,
            values=-self.values,
            low=-self.high,
            high=-self.low,
            bias=_FLIP[self.bias],
            lower=None if self.upper is None else -self.upper,
            upper=None if self.lower is None else -self.lower,
        )

    def __sub__(self, other: "Term") -> "Term":
        return self + -other

    def __rmul__(self, factor: float) -> "Term":
        """`factor` > 0 times the term."""
        return replace(
            self,
            values=factor * self.values,
            low=factor * self.low,
            high=factor * self.high,
            lower=None if self.lower is None else factor * self.lower,
            upper=None if self.upper is None else factor * self.upper,
        )


def estimates(
    terms: Mapping[Key, Term],
    rollouts: Rollouts,
    level: float,
    *,
    interval: Interval = "bootstrap",
    simultaneous: bool = False,
) -> dict[Key, Estimate]:
    """Estimate every term with its interval, all prompts resampled together.

    Intervals cover at `level` each, or all at once when `simultaneous` (by the bootstrap of the largest |t|);
    betting has guaranteed coverage, for the terms that are unbiased and bounded.
    """
    if not terms:
        return {}
    rows: list[np.ndarray] = []
    at: dict[Key, int] = {}
    for name, term in terms.items():
        sides = [term.values]
        if term.lower is not None and term.upper is not None:
            sides += [term.lower, term.upper]
        at[name] = len(rows)
        rows += sides
    found = studentise(np.stack(rows))
    lo, hi = found.simultaneous(level) if simultaneous else found.interval(level)
    out = {}
    for name, term in terms.items():
        i = at[name]
        value, low, high = float(found.mean[i]), float(lo[i]), float(hi[i])
        how = "percentile-t bootstrap over prompts"
        if simultaneous:
            how = "joint " + how
        if term.weak:
            low, high = max(float(lo[i + 1]), term.low), min(float(hi[i + 2]), term.high)
            value, how = min(max(value, low), high), how + " of a lower and an upper bound"
        elif term.bounded and interval == "betting" and not simultaneous:
            ends = betting(term.values, term.low, term.high, level)
            low, high, how = float(ends[0]), float(ends[1]), "betting (hedged capital)"
        # What lies outside the quantity's range covers nothing. A bootstrap of few prompts may know no end.
        low, high = max(low, term.low, -1e308), min(high, term.high, 1e308)
        low, high = min(low, value), max(high, value)  # an unbiased estimate may lie outside
        out[name] = Estimate(
            value=value,
            lo=low,
            hi=high,
            level=level,
            n=int(sum(rollouts.rows(arm).sum() for arm in term.arms)),
            n_clusters=len(term.values),
            method=f"{term.method}; {how}",
            bias=term.bias,
            bracket=term.weak,
            ess=term.ess,
        )
    return out
