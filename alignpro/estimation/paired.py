"""Rollouts of an arm as per-prompt values, whose sums and differences stay paired, and their intervals."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np

from alignpro.errors import AlignProError
from alignpro.estimation.copies import copies
from alignpro.estimation.intervals import Bias, Estimate
from alignpro.estimation.means import WAYS, Limits, in_doubt, limits
from alignpro.rollouts import Rollouts

Interval = Literal["bootstrap", "guaranteed"]
"""Which intervals means get: percentile-t over prompts where it can be trusted (`means.doubtful`), or
guaranteed limits wherever they are to be had."""
ROWS = 0.75
"""Share of the error 1 − level that rows of values have, where intervals are guaranteed; the numbers of
`Terms` that bound what was not drawn have the rest."""
Range = tuple[float, float]
Key = TypeVar("Key", bound=Hashable)
COMBINED = "per-prompt values, combined prompt by prompt"
"""The method of a sum of terms that come by different ones."""
_FLIP: dict[Bias, Bias] = {"none": "none", "up": "down", "down": "up", "unknown": "unknown"}


class Absent(Exception):
    """Why a term cannot be had from these rollouts, and the remedy."""


class Arm:
    """The rows of one arm. Each answer to the prompt itself (arm none, a tuned policy) counts as a draw.

    `index` has its rows' positions; `starts`, where in it each draw begins; `first` [n], each prompt's first
    draw; `answers` and `draws` [n] count those of a draw and of a prompt.
    """

    def __init__(self, rollouts: Rollouts, name: str) -> None:
        if name not in rollouts.arms:
            raise Absent(f"arm {name} is absent; roll it out")
        self.rollouts, self.name = rollouts, name
        self.index = index = np.flatnonzero(rollouts.rows(name))
        prompt = rollouts.prompt[index]
        keys = (prompt, rollouts.seed[index], rollouts.draw[index])
        new = np.ones(len(index), bool)
        if name != "none" and name not in rollouts.direct:
            new[1:] = np.any([np.diff(key) != 0 for key in keys], axis=0)
        self.starts = np.flatnonzero(new)
        self.answers = np.diff(np.append(self.starts, len(index)))
        n = len(rollouts.prompt_ids)
        self.draws = np.bincount(prompt[self.starts], minlength=n)
        if not self.draws.all():
            missing = rollouts.prompt_ids[int(np.argmin(self.draws))]
            raise AlignProError(
                f"arm {name}: has no rows for prompt_id {missing!r}, which other arms have; finish its "
                "rollout, or remove the prompt"
            )
        self.first = np.cumsum(self.draws) - self.draws
        self.copies = copies(rollouts, name, index)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Average `values` [rows of the arm] within draws, then over the draws of each prompt: [n]."""
        by_draw = np.add.reduceat(values, self.starts) / self.answers
        return np.add.reduceat(by_draw, self.first) / self.draws

    def logp(self, name: str) -> np.ndarray:
        """A log-probability of `LOGPS`, [rows of the arm], in nats. Raises Absent where a row has none."""
        values = self.rollouts.logps[name][self.index]
        missing = int(np.isnan(values).sum())
        if missing == len(values) and name == "logp_prompter":
            raise Absent(f"arm {self.name} has rewrites without a density ({name} is null)")
        if missing and self.rollouts.refused[self.index][np.isnan(values)].all():
            raise Absent(
                f"{name} is not known of the {missing} refused answers of arm {self.name}; leave their "
                "prompts out, or choose a model that answers them"
            )
        if missing:
            raise Absent(
                f"{name} is missing in {missing} of {len(values)} rows of arm {self.name}; roll it out with "
                "a backend that gives log-probabilities"
            )
        return values

    @cached_property
    def reward(self) -> np.ndarray:
        return self.rollouts.reward[self.index]

    def least(self, draws: int, answers: int) -> None:
        """Raise Absent unless every prompt has `draws` draws, and every draw `answers` answers."""
        if alike := self._copied(answers):
            raise Absent(alike)
        for what, given, need, each in (
            ("prompt with {} draw", self.draws.min(), draws, "prompt"),
            ("draw with {} answer", self.answers.min(), answers, "rewrite"),
        ):
            if given < need:
                raise Absent(f"arm {self.name} has a {what.format(given)}; give every {each} at least {need}")

    def _copied(self, answers: int) -> str:
        """Say that most draws (prompts, with one answer to a draw) have one answer in effect, or ""."""
        if not self.copies.certain or self.rollouts.texts is None:
            return ""
        starts = self.starts if answers > 1 else self.starts[self.first]
        text = self.rollouts.texts[self.index, 0]
        single = np.maximum.reduceat(text, starts) == np.minimum.reduceat(text, starts)
        if single.mean() <= 0.5:
            return ""
        return (
            f"all answers to {'a rewrite' if answers > 1 else 'the prompt'} are one text in {single.sum()} "
            f"of {len(single)} cases of arm {self.name}, more often than chance allows: they are copies, and "
            "count as one answer; turn off the server's cache, or give each answer a seed of its own (where "
            "the model answers deterministically, give its log-probabilities)"
        )

    def per_prompt(self, statistic: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Apply `statistic` ([g, K, A] to [S, g]) to prompts of equally many draws K; [S, n], in their order.

        A is the arm's least number of answers; the first A are taken of a draw with more.
        """
        cube = self.reward[self.starts[:, None] + np.arange(self.answers.min())]
        groups = [np.flatnonzero(self.draws == size) for size in np.unique(self.draws)]
        found = [statistic(cube[self.first[at][:, None] + np.arange(self.draws[at[0]])]) for at in groups]
        return np.concatenate(found, axis=1)[:, np.argsort(np.concatenate(groups))]


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
    """Whether each of `values` is unbiased and within `reach`, or, of a bracket, each of `lower` and `upper`
    errs on its side and is within its own: betting then has guaranteed coverage."""
    reach: Range | None = None
    """Within which each of `values` lies; left out: [low, high]."""
    lower_reach: Range | None = None
    upper_reach: Range | None = None
    """Within which each of `lower` and `upper` lies; one number twice where they are constant and known."""

    @property
    def weak(self) -> bool:
        """Whether the interval is a bracket by `lower` and `upper`."""
        return self.lower is not None

    @property
    def rows(self) -> list[tuple[np.ndarray, Range]]:
        """The values that limits are made of, with their ranges: of a bracket the lower, then the upper."""
        own = self.reach or (self.low, self.high)
        if self.lower is None or self.upper is None:
            return [(self.values, own)]
        sides = ((self.lower, self.lower_reach), (self.upper, self.upper_reach))
        return [(side, reach or (self.low, self.high)) for side, reach in sides]

    def __add__(self, other: "Term") -> "Term":
        if other.bias in ("none", self.bias):
            bias = self.bias
        else:
            bias = other.bias if self.bias == "none" else "unknown"
        lower = upper = lower_reach = upper_reach = None
        if self.weak or other.weak:
            (lower, lower_reach), (upper, upper_reach) = (
                (mine + theirs, (a[0] + b[0], a[1] + b[1]))
                for (mine, a), (theirs, b) in (
                    (self.rows[0], other.rows[0]),
                    (self.rows[-1], other.rows[-1]),
                )
            )
        a, b = (of.reach or (of.low, of.high) for of in (self, other))
        return Term(
            values=self.values + other.values,
            low=self.low + other.low,
            high=self.high + other.high,
            arms=self.arms | other.arms,
            bias=bias,
            method=self.method if self.method == other.method else COMBINED,
            lower=lower,
            upper=upper,
            ess=min((t.ess for t in (self, other) if t.ess is not None), default=None),
            bounded=self.bounded and other.bounded,
            reach=(a[0] + b[0], a[1] + b[1]),
            lower_reach=lower_reach,
            upper_reach=upper_reach,
        )

    def __neg__(self) -> "Term":
        return -1.0 * self

    def __sub__(self, other: "Term") -> "Term":
        return self + -other

    def __rmul__(self, factor: float) -> "Term":
        def scaled(ends: Range | None) -> Range | None:
            return None if ends is None else (min(at := (factor * ends[0], factor * ends[1])), max(at))

        low, high = scaled((self.low, self.high)) or (0.0, 0.0)
        lower, upper = (None if end is None else factor * end for end in (self.lower, self.upper))
        found = replace(
            self,
            values=factor * self.values,
            low=low,
            high=high,
            lower=lower,
            upper=upper,
            reach=scaled(self.reach),
            lower_reach=scaled(self.lower_reach),
            upper_reach=scaled(self.upper_reach),
        )
        if factor > 0:
            return found
        return replace(
            found,
            bias=_FLIP[self.bias],
            lower=upper,
            upper=lower,
            lower_reach=found.upper_reach,
            upper_reach=found.lower_reach,
        )


def by_arm(found: Mapping[tuple[str, str], Estimate]) -> dict[str, dict[str, Estimate]]:
    """Estimates by arm and part, as a dictionary for each arm."""
    out: dict[str, dict[str, Estimate]] = {}
    for (arm, part), e in found.items():
        out.setdefault(arm, {})[part] = e
    return out


def estimates(
    terms: Mapping[Key, Term],
    rollouts: Rollouts,
    level: float,
    *,
    interval: Interval = "bootstrap",
    simultaneous: bool = False,
    sides: Mapping[Key, tuple[Term, Term]] | None = None,
) -> dict[Key, Estimate]:
    """Estimate every term with its interval, all prompts resampled together.

    Intervals cover at `level` each, or all at once when `simultaneous`. By `means.limits`: percentile-t where
    the values' shape lets it be trusted, betting elsewhere; with `interval` "guaranteed", betting for all
    terms whose values are bounded and err on no side, or on a known one, with `ROWS` of the error.

    Args:
        sides: the two that a term is the difference of. Where percentile-t cannot be trusted with one of
            them alone it cannot with the term: the noise of the one that looks well may hide the other.
    """
    if not terms:
        return {}
    sure = interval == "guaranteed"
    hidden = {key: _one_in_doubt(both, level) for key, both in (sides or {}).items()}
    # Values may reach further than what they estimate, near whose ends the normal law fails.
    wider = {key: t for key, t in terms.items() if not t.weak and t.reach not in (None, (t.low, t.high))}
    hidden |= {key: True for key, term in wider.items() if _in_doubt((term,), level)[0]}
    rows = [(row, *reach, key, term) for key, term in terms.items() for row, reach in term.rows]
    found = limits(
        np.stack([row for row, *_ in rows]),
        np.array([low for _, low, *_ in rows]),
        np.array([high for _, _, high, *_ in rows]),
        1.0 - ROWS * (1.0 - level) if sure else level,
        joint=simultaneous,
        sure=np.array([hidden.get(key, False) or (sure and term.bounded) for *_, key, term in rows]),
    )
    out, i = {}, 0
    for name, term in terms.items():
        first, last = i, i + len(term.rows) - 1
        i = last + 1
        value, low, high = float(term.values.mean()), float(found.lo[first]), float(found.hi[last])
        if term.weak:
            low, high = max(low, term.low), min(high, term.high)
            value = min(max(value, low), high)
        # What lies outside the quantity's range covers nothing. Some limits know no end.
        low, high = max(low, term.low, -1e308), min(high, term.high, 1e308)
        low, high = min(low, value), max(high, value)  # an unbiased estimate may lie outside
        out[name] = Estimate(
            value=value,
            lo=low,
            hi=high,
            level=level,
            n=int(sum(rollouts.rows(arm).sum() for arm in term.arms)),
            n_clusters=len(term.values),
            method=f"{term.method}; {_how(term, found, first, last, simultaneous)}",
            bias=term.bias,
            bracket=term.weak,
            ess=term.ess,
            guaranteed=term.bounded if sure else None,
        )
    return out


def _in_doubt(terms: Sequence[Term], level: float) -> list[bool]:
    """Whether percentile-t cannot be trusted with each of some terms, in their range; none is weak."""
    low, high = np.array([(term.low, term.high) for term in terms]).T
    return in_doubt(np.stack([term.values for term in terms]), low, high, level).tolist()


def _one_in_doubt(sides: tuple[Term, Term], level: float) -> bool:
    """Whether percentile-t can be trusted with one of two terms and not with the other."""
    one, other = _in_doubt(sides, level)
    return one != other


def _how(term: Term, found: Limits, first: int, last: int, joint: bool) -> str:
    """Say how the limits of one term were computed, in words."""
    ways = list(dict.fromkeys(WAYS[found.way[at]] for at in (first, last)))
    said = "; ".join(("joint " if joint and way != WAYS["exact"] else "") + way for way in ways)
    return said + " of a lower and an upper bound" * term.weak
