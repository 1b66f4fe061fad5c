"""From a row of data to a user's prompt: its text or conversation, and the columns that go with it."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import parse_json
from alignpro.llm.data.split import normalised
from alignpro.llm.models.prompt import (
    ROLES,
    Message,
    Prompt,
    columns_of,
    context_of,
    messages_of,
    transcript,
)

Row = Mapping[str, Any]

COMMON = (
    "instruction",
    "question",
    "messages",
    "conversation",
    "conversations",
    "query",
    "input",
    "context",
    "text",
)
"""Columns that hold prompts, or parts of them, in most data sets without a column `prompt`."""
_PAIRS = ({"instruction", "input"}, {"instruction", "context"})  # Alpaca's and Dolly's
_ROLES = {"developer": "system", "human": "user", "prompter": "user"}
_ROLES |= dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
_ROLES |= {role: role for role in ROLES}
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")


@dataclass(frozen=True)
class Reading:
    """The columns of a row that make its prompt, and those that go with it."""

    column: str | None = None
    """Column of the prompt, a text or a conversation; several texts, a line each, as `instruction+input`.
    None: `prompt`, else the only one of `COMMON`, or an instruction and its input."""
    keep: tuple[str, ...] = ()
    """Columns that go with the prompt, since the reward asks for them."""
    optional: tuple[str, ...] = ()
    """Columns that go with it where the data have them; `*` for all but the prompt's."""
    system: str | None = None
    """System message of prompts that have none."""

    def parts(self, has: Sequence[str], where: str) -> tuple[str, ...]:
        """Choose the columns of the prompt among those that the data have.

        Raises:
            AlignProError: there is none, or more than one; or one that the reward asks for is missing.
        """
        listed = ", ".join(map(str, has)) or "none"
        for name in self.keep:
            if name not in has:
                raise AlignProError(
                    f"{where}: no column {name!r}, which the reward asks for, among {listed}; add it, or "
                    "choose another reward"
                )
        if self.column is not None:
            chosen = (self.column,) if self.column in has else tuple(self.column.split("+"))
            if absent := [name for name in chosen if name not in has]:
                raise AlignProError(
                    f"{where}: no column {absent[0]!r} among {listed}; name one with --prompt-column"
                )
            return chosen
        found = tuple(name for name in COMMON if name in has)
        if "prompt" in has:
            return ("prompt",)
        if len(found) == 1 or set(found) in _PAIRS:
            return found
        what = f"{', '.join(found)} may each be it" if found else f"it has {listed}"
        raise AlignProError(
            f"{where}: no column 'prompt'; name one with --prompt-column, or several to be joined as "
            f"instruction+input ({what})"
        )

    def kept(self, has: Iterable[str], parts: Sequence[str]) -> list[str]:
        """Choose, among the columns that the data have, those that go with the prompt."""
        more = [name for name in has if name in self.optional or ("*" in self.optional and name not in parts)]
        return list(dict.fromkeys((*self.keep, *more)))

    def prompt(self, row: Row, parts: Sequence[str]) -> str:
        """The prompt of a row; empty where its text is blank. Errors say what is wrong, and not where."""
        for name in (*parts, *self.keep):
            if name not in row:
                raise AlignProError(f"no column {name!r} (it has {', '.join(map(str, row)) or 'none'})")
        shown, messages = "+".join(parts), None
        if len(parts) == 1:
            messages = conversation(row[parts[0]])
        if messages is not None:
            text, context = _divided(messages)
        else:
            texts = ["" if row[name] is None else row[name] for name in parts]
            if not all(isinstance(text, str) for text in texts):
                raise AlignProError(f"no text or conversation in column {shown!r}")
            text, context = "\n".join(texts).strip(), []
        return self.made(text, context, {name: row[name] for name in self.kept(row, parts)})

    def made(self, text: str, context: Sequence[Message] = (), columns: Row | None = None) -> str:
        """The prompt of these, after the system message if it has none."""
        context = list(context)
        if text and self.system is not None and not any(turn["role"] == "system" for turn in context):
            context.insert(0, {"role": "system", "content": self.system})
        return Prompt(text, context, columns) if text and (context or columns) else text


def conversation(value: Any) -> list[Row] | None:
    """The messages of a conversation, in a list or the JSON of one; None of anything else."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return None
        try:
            value = parse_json(value)
        except ValueError:
            return None
    elif isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        return None
    turns = all(
        isinstance(turn, Mapping) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))
        for turn in value
    )
    return value if turns else None


def _divided(messages: Sequence[Row]) -> tuple[str, list[Message]]:
    """The last user's turn, and what was said before it; answers after it are left out."""
    said = [_message(i, turn) for i, turn in enumerate(messages, 1)]
    while said and said[-1]["role"] == "assistant":
        said.pop()
    if not said or said[-1]["role"] != "user":
        raise AlignProError("its conversation has no user's turn to answer")
    if not said[-1]["content"].strip():
        raise AlignProError("the last user's turn of its conversation is empty")
    return said[-1]["content"].strip(), said[:-1]


def _message(number: int, turn: Row) -> Message:
    role, content = (
        next((turn[name] for name in names if turn.get(name) is not None), None)
        for names in (("role", "from"), ("content", "value"))
    )
    if role in _TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise AlignProError(f"message {number} uses tools, which cannot be replayed")
    if not isinstance(role, str) or role not in _ROLES:
        raise AlignProError(f"message {number} is of role {role!r:.40}; known are {', '.join(ROLES)}")
    if isinstance(content, list):
        texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise AlignProError(f"message {number} has a part that is no text, which cannot be read")
        content = "\n".join(texts)
    if not isinstance(content, str):
        raise AlignProError(f"message {number} has no text")
    return {"role": _ROLES[role], "content": content}


def read_rows(
    rows: Iterable[tuple[str, Row]], reading: Reading, name: str, used: dict[str, None] | None = None
) -> Iterator[str]:
    """The prompts of the rows of one table, whose columns are those of its first row.

    Args:
        rows: each with its place, which an error names behind `name`.
        used: gets the columns of the prompt, as they are to be shown.

    Raises:
        AlignProError: a row is damaged or has no text.
    """
    parts = None
    for where, row in rows:
        if parts is None:
            parts = reading.parts([*row], f"{name}, {where}")
            if used is not None:
                used["+".join(parts)] = None
        try:
            prompt = reading.prompt(row, parts)
        except AlignProError as error:
            raise AlignProError(f"{name}, {where}: {error}; mend or remove the row") from None
        if not prompt:
            raise AlignProError(
                f"{name}, {where}: no text in column {'+'.join(parts)!r}; mend or remove the row"
            )
        yield prompt


def first_turn(x: str) -> str:
    """The first user's turn of x's conversation, by which it is split: with what it continues."""
    return next(turn["content"] for turn in messages_of(x) if turn["role"] == "user")


def identity(x: str) -> str:
    """Reduce x to what tells it from others but for typography, its conversation and columns included."""
    plain = normalised(transcript(x)) if context_of(x) else normalised(x)
    return f"{plain}\n{json.dumps(columns_of(x), sort_keys=True)}" if plain and columns_of(x) else plain
