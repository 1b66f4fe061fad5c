"""Counts answers that services refuse to give, and says what stands for them. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from alignpro.errors import AlignProError
from alignpro.llm.targets.target import Answer


class Bounded(Protocol):
    """Whatever has a range: a reward."""

    low: float
    high: float


@dataclass
class Refusals:
    """Answers that a service would not give, counted; what they are worth, and how many are too many."""

    reward: float | None = None
    """Reward of a refused answer, in the reward's range. None: its lower end."""
    most: float = 0.2
    """Share of refused answers beyond which `count` raises: above chance, by three standard deviations."""
    asked: int = 0
    refused: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 1:
            raise AlignProError(f"refused_most {self.most}: give a share from 0 to 1")
        if self.reward is not None and not math.isfinite(self.reward):
            raise AlignProError(f"refused_reward {self.reward}: give a finite number in the reward's range")

    def worth(self, reward: Bounded) -> float:
        """The reward of a refused answer. Raises AlignProError where it is outside the reward's range."""
        value = reward.low if self.reward is None else self.reward
        if not reward.low <= value <= reward.high:
            raise AlignProError(
                f"refused_reward {value:g}: is outside the reward's range [{reward.low:g}, {reward.high:g}]"
            )
        return value

    def count(self, answers: Sequence[Answer]) -> None:
        """Count answers, and raise AlignProError where too many of all so far were refused."""
        refused = [answer for answer in answers if answer.finish == "refused"]
        self.asked += len(answers)
        self.refused += len(refused)
        chance = 3 * math.sqrt(self.most * (1 - self.most) * self.asked)
        if refused and self.refused > self.most * self.asked + chance:
            raise AlignProError(
                f"refused_most {self.most:g}: {self.refused} of {self.asked} answers were refused, the last "
                f"with {refused[-1].text[:120]!r}; choose other prompts or another model, or raise it"
            )
