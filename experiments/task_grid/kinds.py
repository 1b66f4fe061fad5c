"""Tasks with requests of two kinds, for each of which another answer is wanted.

The kind is said by the request's own words, so that a prompter, or a person, can read it: what it asks for,
or, where `asked` has put that before it, who asks. Each reward here is given by its name: `--reward
task_grid.kinds:NAME`, with experiments/ on PYTHONPATH.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignpro.llm.rewards.reward import Reward, check_texts
from alignpro.llm.rewards.texts import a_list, brevity, ease


@dataclass(frozen=True)
class Kind:
    """A kind of requests."""

    name: str
    """In words, as what such a request does."""
    holds: Callable[[str], object]
    """Of a request, whether it is of this kind."""

    def of(self, prompts: Sequence[str]) -> np.ndarray:
        """1 for each prompt of this kind, 0 for the others: integers [n]."""
        return np.array([int(bool(self.holds(x))) for x in prompts], dtype=np.int64)


SEVERAL = Kind(
    "asks for several things",
    re.compile(
        r"\b(lists?|two|three|four|five|six|seven|eight|nine|ten|some|several|ways|tips|reasons|benefits"
        r"|(dis)?advantages|steps|ideas|examples|features|pros and cons)\b",
        re.IGNORECASE,
    ).search,
)
_MAKING = ("compose", "create", "design", "draft", "generate", "imagine", "invent", "make", "write")
MAKING = Kind("asks to make something", lambda x: x.split()[:1] and x.split()[0].lower() in _MAKING)
"""By the first word."""
KINDS = (SEVERAL, MAKING)
WHO = ("A child asks: ", "A colleague asks: ")
"""Who asks, in the words that `asked` puts before a request."""
FROM_A_CHILD = Kind("is from a child", lambda x: x.startswith(WHO[0]))


def asked(prompts: Sequence[str]) -> list[str]:
    """Each request as a child's or a colleague's, by turns."""
    return [WHO[i % len(WHO)] + x for i, x in enumerate(prompts)]


@dataclass(frozen=True)
class ByKind:
    """r(x, y) by the kind of x: the reward `one` where it is `kind`, else `other`. Both lie in [0, 1]."""

    kind: Kind
    one: Reward
    other: Reward
    low: float = 0.0
    high: float = 1.0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Score each response by the reward of its prompt's kind: [n] float64."""
        check_texts(prompts, responses)
        scores = np.empty(len(prompts))
        kinds = self.kind.of(prompts)
        for value, reward in ((1, self.one), (0, self.other)):
            at = np.flatnonzero(kinds == value)
            scores[at] = reward.score([prompts[i] for i in at], [responses[i] for i in at])
        return scores

    def describe(self) -> dict[str, Any]:
        """Say which reward is whose."""
        one, other = self.one.describe(), self.other.describe()
        return {"name": f"{one['name']} where it {self.kind.name}, else {other['name']}", "one": one,
                "other": other}  # fmt: skip


plain_or_brief = ByKind(MAKING, ease(), brevity())
brief_or_plain = ByKind(MAKING, brevity(), ease())
list_or_plain = ByKind(SEVERAL, a_list(), ease())
child_or_brief = ByKind(FROM_A_CHILD, ease(), brevity())
child_or_list = ByKind(FROM_A_CHILD, ease(), a_list())
