"""Scores of answers with the parts they consist of; a refused answer is worth what `Refusals` says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.rewards.reward import Array, Reward, check_scores
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.target import Answer
from alignpro.rollouts import PARTS_ROUNDING


@dataclass(frozen=True)
class Scores:
    """Rewards of n samples. A reward with parts returns them from a method `scores` with `score`'s arguments,
    and has their declared ranges, (low, high) by name, in an attribute `ranges`."""

    total: Array
    """Reward of each sample, [n] float64."""
    parts: Mapping[str, Array] = field(default_factory=dict)
    """Contributions to the total by name, each [n], which add up to it; none of a plain reward."""
    spread: Array | None = None
    """Standard deviation between the members of an ensemble, [n], in reward units; None without one."""

    def each(self, change: Callable[[Array], Array]) -> "Scores":
        """The scores with every array changed alike."""
        parts = {name: change(values) for name, values in self.parts.items()}
        return Scores(change(self.total), parts, None if self.spread is None else change(self.spread))


def ranges_of(reward: Reward) -> dict[str, tuple[float, float]]:
    """The declared range of each part of a reward by name; they add up to its own. None of a plain reward."""
    return dict(getattr(reward, "ranges", {}))


def scored(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> Scores:
    """Score each response to its prompt, with the reward's parts.

    Raises:
        AlignProError: a score is no finite number in the reward's range (`check_scores`); its parts are not
            those declared, leave their ranges, or do not add up.
    """
    with_parts = getattr(reward, "scores", None)
    found = Scores(reward.score(prompts, responses)) if with_parts is None else with_parts(prompts, responses)
    found = replace(found, total=check_scores(prompts, responses, found.total, reward.low, reward.high))
    _check_parts(found, ranges_of(reward))
    return found


def _check_parts(found: Scores, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse parts that a file of rollouts could not hold (`alignpro.rollouts`), before more is paid for."""
    if found.parts.keys() != ranges.keys():
        raise AlignProError(
            f"reward: its parts are {', '.join(found.parts) or 'none'}, and it declares ranges of "
            f"{', '.join(ranges) or 'none'}; return those from scores"
        )
    rounding = PARTS_ROUNDING * sum(max(abs(low), abs(high)) for low, high in ranges.values())
    for name, (low, high) in ranges.items():
        if not ((found.parts[name] >= low - rounding) & (found.parts[name] <= high + rounding)).all():
            raise AlignProError(f"reward: its part {name} leaves the declared [{low:g}, {high:g}]; mend it")
    if ranges and not (abs(sum(found.parts.values()) - found.total) <= rounding).all():
        raise AlignProError("reward: its parts do not add up to it; return contributions, weights included")


def judged(
    reward: Reward, prompts: Sequence[str], answers: Sequence[Answer], refusals: Refusals | None = None
) -> Scores:
    """Score each answer to its prompt; a refused one is worth what `refusals` says, and is not scored.

    Args:
        refusals: counts the answers; without it a refused one is worth the lower end of the range.
    """
    refusals = refusals or Refusals(most=1.0)
    refusals.count(answers)
    worth, n = refusals.worth(reward), len(answers)
    given = [i for i, answer in enumerate(answers) if answer.finish != "refused"]
    found = scored(reward, [prompts[i] for i in given], [answers[i].text for i in given])
    if len(given) == n:
        return found

    def filled(values: Array, missing: float) -> Array:
        out = np.full(n, missing)
        out[given] = values
        return out

    share = (worth - reward.low) / (reward.high - reward.low)
    ends = ranges_of(reward)
    # A refused answer's parts lie where it lies in the whole range, so that they add up.
    parts = {
        name: filled(values, ends[name][0] + share * (ends[name][1] - ends[name][0]))
        for name, values in found.parts.items()
    }
    spread = None if found.spread is None else filled(found.spread, 0.0)
    return Scores(filled(found.total, worth), parts, spread)
