"""Several rewards as one: a weighted sum, or the mean of an ensemble with the spread between its members."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.rewards.columns import Columns, columns_of_all
from alignpro.llm.rewards.reward import Array, Reward
from alignpro.llm.rewards.scores import Scores, scored


class Sum:
    """A weighted sum of rewards, whose range follows from theirs.

    The contributions of `scores`, weight times reward, add up to the total, and their `ranges` to its range.
    A part may be a sum or a mean itself, and then counts as one part.

    Args:
        rewards: at least one.
        weights: finite numbers other than 0, one for each; 1 each if None.
        names: what the parts are called, without repetition; by `describe` if None.
    """

    kind = "sum"

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        weights = [1.0] * len(rewards) if weights is None else weights
        names = [str(reward.describe()["name"]) for reward in rewards] if names is None else names
        check_parts(names, weights)
        if not len(rewards) == len(weights) == len(names):
            raise AlignProError(
                f"rewards: {len(rewards)}, with {len(weights)} weights and {len(names)} names"
            )
        self.rewards, self.weights = list(rewards), [float(weight) for weight in weights]
        self.names = tuple(names)
        self.ranges: dict[str, tuple[float, float]] = {}
        for name, weight, reward in zip(names, self.weights, rewards, strict=True):
            low, high = sorted((weight * reward.low, weight * reward.high))
            self.ranges[name] = (low + 0.0, high + 0.0)  # no -0
        # Added as contributions are, in that order: so no rounding takes a total out of the range. Python's
        # own floats would not be, whose sum is a compensated one from 3.12 on.
        low, high = sum(map(np.array, self.ranges.values()), np.zeros(2))
        self.low, self.high = float(low), float(high)

    @property
    def reads(self) -> Columns:
        """The columns of the prompts' data that the parts read."""
        return columns_of_all(self.rewards)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that a part cannot judge."""
        for reward in self.rewards:
            check_prompts(reward, prompts)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Add up the contributions to each sample: [n] float64 in [low, high]."""
        return self.scores(prompts, responses).total

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
        """Score each sample by every part: the contributions, and their sum."""
        found = [scored(reward, prompts, responses) for reward in self.rewards]
        parts = {
            name: weight * part.total
            for name, weight, part in zip(self.names, self.weights, found, strict=True)
        }
        return Scores(sum(parts.values(), np.zeros(len(prompts))), parts, self._spread(found))

    def _spread(self, found: Sequence[Scores]) -> Array | None:
        """Combine the spreads of parts that are ensembles, which are taken to be independent."""
        pairs = zip(self.weights, found, strict=True)
        spreads = [weight * part.spread for weight, part in pairs if part.spread is not None]
        return np.sqrt(sum(spread**2 for spread in spreads)) if spreads else None

    def describe(self) -> dict[str, Any]:
        """Say what the parts are, with their weights."""
        rows = zip(self.names, self.weights, self.rewards, strict=True)
        parts = {name: {"weight": weight, **reward.describe()} for name, weight, reward in rows}
        return {"name": said(self.kind, self.names, self.weights), "kind": self.kind, "parts": parts}

    def line(self) -> str:
        """Say what was asked of services, in a line for each part that asks one; else nothing."""
        rows = zip(self.names, self.rewards, strict=True)
        lines = [f"{name}: {told}" for name, reward in rows if (told := line_of(reward))]
        return "\n".join(lines)


class Mean(Sum):
    """The mean of rewards, as an ensemble: `scores` says how far its members are apart on each sample.

    The spread is their standard deviation (with divisor members − 1), in reward units.

    Args:
        rewards: at least two, on one scale.
        names: what the members are called, without repetition; by `describe` if None.
    """

    kind = "mean"

    def __init__(self, rewards: Sequence[Reward], names: Sequence[str] | None = None) -> None:
        if len(rewards) < 2:
            raise AlignProError(f"mean: has {len(rewards)} rewards; give at least two")
        super().__init__(rewards, [1 / len(rewards)] * len(rewards), names)

    def _spread(self, found: Sequence[Scores]) -> Array:
        return np.std([part.total for part in found], axis=0, ddof=1)


def check_parts(names: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse no parts, two of one name, and weights that are 0 or not finite."""
    if not names:
        raise AlignProError("reward: give at least one")
    for i, (name, weight) in enumerate(zip(names, weights, strict=False)):
        if name in names[:i]:
            raise AlignProError(f"reward {name}: is there twice; give it once, with one weight")
        if not (math.isfinite(weight) and weight):
            raise AlignProError(f"reward {name}: its weight is {weight}; give a finite number other than 0")


def said(kind: str, names: Sequence[str], weights: Sequence[float]) -> str:
    """Write a sum or mean in one line, as `0.7*minilm-bt + 0.3*ease` or `mean(A, B)`."""
    if kind == "mean":
        return f"mean({', '.join(names)})"
    rows = zip(names, weights, strict=True)
    terms = [name if weight == 1 else f"{weight!r}*{name}" for name, weight in rows]
    return " + ".join(terms).replace(" + -", " - ")


def check_prompts(reward: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that a reward cannot judge, where it says so (in a method of that name)."""
    check = getattr(reward, "check_prompts", None)
    if check is not None:
        check(prompts)


def line_of(reward: Any) -> str:
    """Say what a reward has asked of services; nothing of one that asks none."""
    line = getattr(reward, "line", None)
    return line() if line is not None else ""
