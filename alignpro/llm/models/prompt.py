"""A user's prompt that comes with more than its text: turns before it, or further columns of its data."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignpro.errors import AlignProError

Message = dict[str, str]
ROLES = ("system", "user", "assistant")


class Prompt(str):
    """A user's last turn x, as a string, with the conversation before it and further columns of its data row.

    Two are equal where text, conversation and columns are; one with neither equals its text. Whatever makes
    another string of it (`strip`, formatting) gives a plain one: what is to stay in the conversation goes
    through `said_in`.

    Args:
        text: x, which a prompter rewrites and an answer is judged by.
        context: the messages before x, oldest first: {"role": system, user or assistant, "content": text}.
        columns: JSON values by column name, which a reward may ask for; no model reads them.

    Raises:
        AlignProError: a message or a column of another form.
    """

    context: tuple[Message, ...]
    columns: dict[str, Any]

    def __new__(
        cls, text: str, context: Sequence[Mapping[str, str]] = (), columns: Mapping[str, Any] | None = None
    ) -> "Prompt":
        made = super().__new__(cls, text)
        made.context = tuple(_checked(message) for message in context)
        try:
            made.columns = json.loads(json.dumps(dict(columns or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise AlignProError(f"columns: give JSON values ({error})") from None
        return made

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        return as_json(self) == as_json(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        value = as_json(self)
        return hash(value if isinstance(value, str) else json.dumps(value, sort_keys=True))

    def __reduce__(self) -> tuple[Any, ...]:
        return Prompt, (str(self), self.context, self.columns)


def _checked(message: Any) -> Message:
    role, content = (
        (message.get(name) for name in ("role", "content")) if isinstance(message, Mapping) else (0, 0)
    )
    if role not in ROLES or not isinstance(content, str):
        raise AlignProError(
            f'context {message!r:.80}: give messages {{"role": {", ".join(ROLES)}, "content": text}}'
        )
    return {"role": role, "content": content}


def context_of(x: str) -> tuple[Message, ...]:
    """The messages before the prompt x; none of a plain string."""
    return x.context if isinstance(x, Prompt) else ()


def columns_of(x: str) -> dict[str, Any]:
    """The further columns of the prompt x by name; none of a plain string."""
    return x.columns if isinstance(x, Prompt) else {}


def messages_of(x: str) -> list[Message]:
    """The conversation that ends with the user's turn x, as a model is to answer it."""
    return [*context_of(x), {"role": "user", "content": str(x)}]


def said_in(x: str, text: str) -> str:
    """`text` in the place of x in its conversation, as a frozen model is asked it: without columns."""
    return Prompt(text, context_of(x)) if context_of(x) else str(text)


def with_instruction(x: str, text: str) -> str:
    """The text of x, then `text` after a space, or directly where it begins with white space of its own."""
    space = "" if not text or text[0].isspace() else " "
    return f"{x}{space}{text}"


def transcript(x: str) -> str:
    """The conversation that ends with x as one text, for a reader of plain text; x itself where it is all."""
    if not context_of(x):
        return str(x)
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in messages_of(x))


def said(x: str) -> dict[str, Any]:
    """x as the fields of a line in a file: `x`, and `context` where there is any."""
    return {"x": str(x), **({"context": list(context_of(x))} if context_of(x) else {})}


def as_json(x: str) -> Any:
    """x as a JSON value that tells it from every other prompt: its text, or an object (see `from_json`)."""
    if not isinstance(x, Prompt) or not (x.context or x.columns):
        return str(x)
    return {"text": str(x), "context": list(x.context), "columns": x.columns}


def from_json(value: Any) -> str:
    """The prompt that `as_json` wrote. Raises AlignProError where it is none."""
    if isinstance(value, str):
        return value
    try:
        if not isinstance(value["text"], str):
            raise TypeError
        return Prompt(value["text"], value.get("context", ()), value.get("columns"))
    except (KeyError, TypeError, AttributeError):
        raise AlignProError(
            f"prompt {value!r:.80}: give a text, or an object with text and context"
        ) from None
