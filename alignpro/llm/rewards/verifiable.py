"""A reward for following instructions that code can check, which come with the prompt."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import columns_of
from alignpro.llm.rewards.columns import Columns
from alignpro.llm.rewards.instructions import CHECKERS
from alignpro.llm.rewards.reward import Array, check_texts, shown

IDS, ARGUMENTS = "instruction_id_list", "kwargs"
"""The columns, in IFEval's own schema: names of `CHECKERS`, and an object of arguments for each."""


class Verifiable:
    """The share of a prompt's instructions that the answer follows, as it is; an empty one follows none."""

    low: float = 0.0
    high: float = 1.0
    reads = Columns((IDS, ARGUMENTS))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts without the columns, with instructions that are not known, or with other arguments.

        Raises:
            AlignProError: names the instruction and the prompt.
        """
        self.reads.check(prompts, "verifiable")
        for x in prompts:
            for name, arguments in instructions_of(x):
                try:
                    CHECKERS[name]("Any answer.", **arguments)
                except AlignProError:
                    raise
                except Exception as error:
                    raise AlignProError(
                        f"{ARGUMENTS} {shown(repr(arguments))}: do not fit instruction {name} of the prompt "
                        f"{shown(x)} ({shown(str(error), 120)})"
                    ) from None

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Check each response: [n] float64 in [0, 1]."""
        check_texts(prompts, responses)
        self.reads.check(prompts, "verifiable")
        return np.array([np.mean(followed(x, y)) for x, y in zip(prompts, responses, strict=True)])

    def describe(self) -> dict[str, Any]:
        """Say what it measures and how it is gamed."""
        return {
            "name": "verifiable",
            "kind": "text",
            "measures": "the share of a prompt's instructions that the answer follows, as IFEval checks them",
            "gamed": "form alone counts: an answer may say nothing, or nothing to the point",
        }


def followed(x: str, answer: str) -> list[bool]:
    """Whether the answer follows each instruction that comes with the prompt x."""
    return [
        bool(answer.strip()) and bool(CHECKERS[name](answer, **arguments))
        for name, arguments in instructions_of(x)
    ]


def instructions_of(x: str) -> list[tuple[str, dict[str, Any]]]:
    """The instructions that come with the prompt x: names of `CHECKERS`, with their arguments.

    Arguments that are null are left out, since tables have a column for every argument.

    Raises:
        AlignProError: the columns have another form, or an instruction is unknown.
    """
    names, arguments = columns_of(x).get(IDS), columns_of(x).get(ARGUMENTS)
    if not isinstance(names, list) or not isinstance(arguments, list) or not 0 < len(names) == len(arguments):
        raise AlignProError(
            f"{IDS}, {ARGUMENTS}: give the prompt {shown(x)} lists of names and of objects, one for each"
        )
    for name in names:
        if not isinstance(name, str) or name not in CHECKERS:
            raise AlignProError(f"{IDS} {name!r}: is not known; choose from {', '.join(CHECKERS)}")
    return [
        (name, {key: value for key, value in (row or {}).items() if value is not None})
        for name, row in zip(names, arguments, strict=True)
    ]
