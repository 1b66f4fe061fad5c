"""Knows what services send beside a plain answer: refusals, ends, thoughts, and fields that they do not take.

One table for frozen models, judges and rewards. The wordings are those of OpenAI, Azure, OpenRouter,
Anthropic, DeepSeek, Moonshot, DashScope, MiniMax, xAI, Gemini, Bedrock, vLLM, SGLang, llama.cpp, TGI and
gateways to them.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from alignpro.llm.models.chat import without_thought

End = Literal["stop", "length", "refused", "failed"]
_ENDS: dict[End, str] = {
    "stop": "stop eos eos_token end_turn stop_sequence complete",
    "length": "length max_tokens model_length model_context_window_exceeded",
    "refused": "content_filter content_filtered safety refusal recitation prohibited_content blocklist spii "
    "sensitive guardrail_intervened error_toxic",
    "failed": "error network_error insufficient_system_resource abort",
}
FINISHES: dict[str, End] = {name: end for end, names in _ENDS.items() for name in names.split()}
"""The meaning of a `finish_reason`, in small letters. `failed` may pass when it is asked again."""

REFUSES = {200, 400, 403, 413, 422, 451, 500}
"""Statuses under which services refuse what was asked."""
_FILTERED = (
    r"content.?filter|content.?policy|responsible.?ai|content management policy|safety system"
    r"|violat\w+ (?:our )?(?:usage|content)|content violates|requires moderation|\w+ (?:was|has been) flagged"
    r"|inappropriate content|data.?inspection|content exists risk|considered high risk"
    r"|sensitive.?content|new_sensitive|guardrail_intervened|(?:blocked by|violated)\b.{0,40}guardrail"
    r"|prompt injection|prohibited.content|safety.?check"
)
_TOO_LONG = (
    r"context.?(?:length|window|size)(?:.has been)?.?exceeded"
    r"|exceed\w*.(?:the )?(?:available |maximum )?context"
    r"|maximum (?:context|prompt|input|model) length|maximum context limit"
    r"|longer than the model.{0,10} length|too long to fit"
    r"|(?:prompt|input) is too long|too large for model with|string too long"
    r"|tokens \+ `max_new_tokens` must be|exceeds? the (?:maximum number|configured limit)"
    r"|reduce the length of the|exceeded model token limit|max_tokens must be at least 1, got -"
    r"|current length is .{0,40} while limit is"
)
_REFUSAL = re.compile(f"{_FILTERED}|{_TOO_LONG}", re.I)
# Of an account, not of what was asked.
_ACCOUNT = re.compile(r"account|api.?key|billing|quota|credits", re.I)
_UNTAKEN = re.compile(
    r"un(?:support|recogni[sz]|know|expect)|not.(?:support|permit|allow|accept)|extra.(?:inputs|forbidden|fields)"
    r"|cannot both|only the default|only \S+ is allowed|deprecated|no longer",
    re.I,
)
_ECHOES = {
    "input",
    "inputs",
    "flagged_input",
    "messages",
}  # keys below which a service repeats what it was sent
_NEEDED = {"messages", "prompts", "responses", "input", "text_1", "text_2"}


@dataclass(frozen=True)
class Complaint:
    """A service's reason to give no value."""

    text: str
    """In its words."""
    refused: bool
    """Whether it refuses what was asked, by a filter or for its length: asked again it refuses again."""
    fields: tuple[str, ...]
    """Fields of the request that it does not take, or not with these values."""


def complaint(error: Any, sent: Collection[str]) -> Complaint:
    """Read the JSON of an error.

    Args:
        error: the response, or the error in it.
        sent: names of the fields that the request had.
    """
    words = list(_words(error))
    text = "\n".join(words)
    refused = _REFUSAL.search(text) is not None and not _ACCOUNT.search(text)
    fields: tuple[str, ...] = ()
    if not refused and _UNTAKEN.search(text):
        named = _found(error, "param") or ""
        names = {named} if named in sent else set(sent)
        fields = tuple(
            sorted(n for n in names - _NEEDED if re.search(rf"(?<![\w-]){re.escape(n)}(?![\w-])", text))
        )
    return Complaint(str(_found(error, "message") or " ".join(words)), refused, fields)


def _words(value: Any, depth: int = 0) -> Iterator[str]:
    """The strings in JSON, but for what the service repeats."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth < 8:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in _ECHOES:
                yield from _words(part, depth + 1)


def _found(error: Any, name: str) -> str | None:
    """The first text under that name, at most a few levels down."""
    for _ in range(3):
        if not isinstance(error, dict):
            break
        if isinstance(error.get(name), str):
            return str(error[name])
        error = error.get("error", error.get("message"))
    return None


@dataclass(frozen=True)
class Content:
    """The content of a chat completion's message."""

    text: str | None
    """Without a thought; None where there is none, and where a thought was cut off."""
    thought: bool
    """Whether the model thought first, in the text or apart from it."""
    refusal: str | None
    """Words with which it refuses instead."""


def content(message: dict[str, Any]) -> Content:
    """Read a message whose content is a text, null, or a list of parts."""
    said, refusal = message.get("content"), message.get("refusal")
    thought = any(message.get(name) for name in ("reasoning_content", "reasoning"))
    if isinstance(said, list):
        parts = [part for part in said if isinstance(part, dict)]
        thought = thought or any(part.get("type") in ("thinking", "reasoning") for part in parts)
        refusal = next((part["refusal"] for part in parts if part.get("refusal")), refusal)
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        said = "".join(texts) if texts else None
    if isinstance(said, str):
        found = without_thought(said)
        said, thought = None if found.cut else found.text, thought or found.thought
    return Content(
        said if isinstance(said, str) else None,
        thought,
        refusal if refusal and isinstance(refusal, str) and not said else None,
    )
