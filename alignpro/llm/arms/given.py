"""Rewrites that another system made, or people, read from a file: the draws of an arm, at a recorded cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data.own import all_rows
from alignpro.llm.data.rows import Reading
from alignpro.llm.data.split import normalised
from alignpro.llm.models.prompt import Prompt, context_of, said_in

PROMPT_FIELDS = ("prompt", "x", "messages", "final_input", "instruction", "text")
"""Names under which a row may have its prompt, the first of them that it has; final_input is BPO's."""
REWRITE_FIELDS = ("rewrite", "optimized_prompt", "rewritten", "rewrites")
"""Names under which a row may have its rewrite, or a list of them."""
COSTS = {"calls": "{:,.10g} calls", "tokens": "{:,.10g} tokens", "cost": "a cost of {:,.10g}"}
"""Numbers of a row that say what making its rewrites took, in words; they are summed over the file."""


@dataclass(frozen=True)
class Given:
    """The rewrites of a file."""

    of: Mapping[str, tuple[str, ...]]
    """Rewrites by prompt, in the file's order; at least one each."""
    cost: Mapping[str, float]
    """Sums over the file of what making its rewrites took, by those names of `COSTS` that it has."""

    def costs(self) -> str:
        """The cost in words, to go after the file's name; empty where the file has none."""
        said = ", ".join(COSTS[name].format(value) for name, value in self.cost.items())
        return said and f" (made with {said}, it says)"


def read_given(path: str | Path, prompts: Sequence[str]) -> Given:
    """Read the rewrites of `prompts` from a .jsonl, .json, .csv or .tsv file.

    A row is of the prompt with the same text (and the same turns before it, where the row has a conversation
    or a list of them in `context`); failing that, of a prompt that differs in case, punctuation and white
    space only. A prompt may have several rows.

    Raises:
        AlignProError: the file cannot be read, a row lacks a prompt or a rewrite, or a prompt has no row.
    """
    path = Path(path).expanduser()
    found: dict[str, list[str]] = {}
    costs: dict[str, list[float]] = {}
    for where, row in all_rows(path, "rewrites"):
        texts = _rewrites(path, where, row)
        for key in _keys(path, where, row):
            found.setdefault(key, []).extend(texts)
        for name in COSTS:
            if row.get(name) not in (None, ""):
                costs.setdefault(name, []).append(_number(path, where, name, row[name]))
    of = {x: next((found[key] for key in _searched(x) if key in found), []) for x in prompts}
    lacking = [x for x, texts in of.items() if not texts]
    if lacking:
        raise AlignProError(
            f"rewrites {path}: has none for {len(lacking)} of {len(of)} prompts, first for "
            f"{lacking[0][:60]!r}; add them, or take prompts that have one (--prompts-file, --prompts)"
        )
    return Given({x: tuple(texts) for x, texts in of.items()}, {k: math.fsum(v) for k, v in costs.items()})


def _searched(x: str) -> tuple[str, str, str]:
    """Keys of a prompt: with the turns before it, its text, and what is left of that (after a newline)."""
    return said_in(x, x), str(x), "\n" + (normalised(x) or x)


def _keys(path: Path, where: str, row: Mapping[str, Any]) -> list[str]:
    """Keys under which the prompts of a row are searched for."""
    name, context = next((name for name in PROMPT_FIELDS if name in row), None), row.get("context")
    # What an instruction is about stands beside it in Dolly's rows, and in BPO's.
    parts = ("instruction", "context") if name == "instruction" and isinstance(context, str) else (name,)
    try:
        x = "" if name is None else Reading().prompt(row, [part for part in parts if part])
        x = Prompt(x, context) if isinstance(context, list) and context and not context_of(x) else x
    except AlignProError as error:
        raise AlignProError(f"{path.name}, {where}: {error}; mend or remove the row") from None
    if not x.strip():
        raise AlignProError(
            f"{path.name}, {where}: no text in {' or '.join(PROMPT_FIELDS)}; add its prompt (the row has "
            f"{', '.join(map(str, row)) or 'nothing'})"
        )
    return [x] if context_of(x) else list(_searched(x)[1:])


def _rewrites(path: Path, where: str, row: Mapping[str, Any]) -> list[str]:
    value = next((row[name] for name in REWRITE_FIELDS if row.get(name) is not None), None)
    every = value if isinstance(value, list) else [value]
    texts = [text.strip() for text in every if isinstance(text, str) and text.strip()]
    if not texts or len(texts) < len(every):
        raise AlignProError(
            f"{path.name}, {where}: no text, or list of texts, in {' or '.join(REWRITE_FIELDS)}; add its "
            f"rewrite (the row has {', '.join(map(str, row)) or 'nothing'})"
        )
    return texts


def _number(path: Path, where: str, name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise AlignProError(f"{path.name}, {where}: {name} {value!r} is no number of at least 0; mend it")
    return number
