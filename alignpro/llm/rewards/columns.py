"""Further columns of the prompts' data that a reward reads, and what it is told where they are missing."""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import columns_of
from alignpro.llm.rewards.reward import shown

ALL = "*"
"""Stands among optional columns for every other one there is."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that a reward reads from the prompts (`Prompt.columns`)."""

    needed: tuple[str, ...] = ()
    """Columns that every prompt must have."""
    optional: tuple[str, ...] = ()
    """Columns that are read where every prompt of a call has them; `ALL` stands for all others."""
    taken: tuple[str, ...] = ()
    """Names of columns that are not among all others."""

    def check(self, prompts: Sequence[str], reward: str) -> None:
        """Refuse prompts without a needed column, naming both and the `reward`."""
        for x in prompts if self.needed else ():
            if missing := [name for name in self.needed if name not in columns_of(x)]:
                raise AlignProError(
                    f"column {missing[0]}: reward {reward} needs it, and the prompt {shown(x)} has none; "
                    "choose data that has such a column (--prompts-file or --dataset)"
                )

    def of(self, prompts: Sequence[str]) -> dict[str, list[Any]]:
        """Values of each column, one for each prompt, of columns that all of these have."""
        rows = [columns_of(x) for x in prompts]
        others = [name for name in rows[0] if name not in self.taken] if ALL in self.optional and rows else []
        names = (*self.needed, *self.optional, *others)
        found = dict.fromkeys(name for name in names if all(name in row for row in rows))
        return {name: [row[name] for row in rows] for name in found}


def columns_of_all(rewards: Iterable[Any]) -> Columns:
    """The columns that any of these read, as their attribute `reads` says; without one they read none."""
    found = [getattr(reward, "reads", Columns()) for reward in rewards]
    needed = dict.fromkeys(name for columns in found for name in columns.needed)
    optional = dict.fromkeys(name for columns in found for name in columns.optional if name not in needed)
    return Columns(tuple(needed), tuple(optional))


def columns_read_by(function: Callable[..., Any], given: Collection[str] = ()) -> Columns:
    """Read off a function's signature the columns that it takes: its parameters after the first two.

    Args:
        given: parameters that get their values elsewhere.
    """
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):  # of builtins, which say nothing
        return Columns()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in parameters[2:] if p.kind in by_name and p.name not in given]
    optional = [p.name for p in named if p.default is not p.empty]
    optional += [ALL for p in parameters if p.kind is p.VAR_KEYWORD]
    needed = tuple(p.name for p in named if p.default is p.empty)
    return Columns(needed, tuple(optional), tuple(p.name for p in parameters[:2]))
