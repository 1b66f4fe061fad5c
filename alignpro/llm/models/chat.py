"""Writes a chat down as a model reads it: a conversation becomes tokens, and tokens what was said.

Settled here, once for all: the date, a system message that the template refuses, control tokens that a prompt
spells, the token that ends a turn, and thoughts before an answer.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alignpro.errors import AlignProError
from alignpro.files import parse_json
from alignpro.llm.models import limits
from alignpro.llm.models.prompt import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = tuple[int, ...]

DATE = date(2024, 7, 26)
"""Today, to every chat template: one that asks the clock would change the model overnight. It is the day that
Llama 3.2's template names where it has no clock."""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""Marks around what a model thinks before it answers."""

_ATTRIBUTE = "_alignpro_chat"
_CALENDAR = "alignpro_calendar"
_TRIED: dict[tuple[str, str], str | None] = {}
"""Templates that were tried, with their options, and beyond which limit each went."""
# Of Unicode's private use: in no template, in no tokenizer.
_PRIVATE = ("\U000f0000", "\U000f0001", "\U000f0002")


@dataclass(frozen=True)
class Said:
    """The text that a continuation's tokens stand for."""

    text: str
    """Without special tokens and a leading thought; empty where the thought was cut off."""
    thought: bool = False
    """Whether there was a thought."""
    cut: bool = False
    """Whether the thought did not end."""


def without_thought(text: str) -> Said:
    """Take a leading thought off `text`; without its beginning, an end on a line of its own tells."""
    for begin, close in THOUGHTS:
        alone = rf"(?:(?!{re.escape(begin)}).)*?\n{re.escape(close)}[ \t]*(?:\n|\Z)"
        if text.lstrip().startswith(begin) or re.match(alone, text, re.S):
            return _after(text, close)
    return Said(text)


def _after(text: str, close: str) -> Said:
    _, found, after = text.partition(close)
    return Said(after.lstrip() if found else "", True, not found)


@dataclass(eq=False)
class Chat:
    """The chat format of a tokenizer; `options` are its template's, such as {"enable_thinking": False}."""

    tokenizer: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.template = self.tokenizer.chat_template

    # --- conversations to tokens ---

    def ids(self, messages: Sequence[Message], opening: str = "") -> Ids:
        """Token ids that the model continues: the conversation, the head of its turn, and `opening` words.

        What the messages say is encoded as text, whatever it spells. Where the template opens a thought,
        opening words follow an empty one.
        """
        messages = self._merged(messages)
        held, contents = [], []
        for message in messages:
            if self._spells(message["content"]):
                contents.append(message["content"].strip() if self._trims else message["content"])
                message = {**message, "content": f"{_PRIVATE[2]}{len(contents) - 1}{_PRIVATE[2]}"}
            held.append(message)
        text = self.render(held) + (self._closing if opening else "") + opening
        backend = self._protected if contents else None
        if backend is not None:
            text = self._control.sub(lambda match: self._alias[match[0]], text)
        for i, content in enumerate(contents):
            text = text.replace(f"{_PRIVATE[2]}{i}{_PRIVATE[2]}", self._as_text(content, backend))
        return self._encode(text, backend)

    def text_ids(self, text: str) -> Ids:
        """Token ids of `text` as text: a control token that it spells is not one."""
        backend = self._protected if self._spells(text) else None
        return self._encode(self._as_text(text, backend), backend)

    def _as_text(self, text: str, backend: "Tokenizer | None") -> str:
        """`text` for a renamed tokenizer; without one, control tokens are pulled apart, visibly."""
        if backend is None:
            return re.sub(f"(?=(?:{self._control.pattern}))(.)", r"\1 ", text, flags=re.S)
        return re.sub("|".join(_PRIVATE), "\ufffd", text)

    def _encode(self, text: str, backend: "Tokenizer | None") -> Ids:
        if backend is None:
            return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)
        return tuple(backend.encode(text, add_special_tokens=False).ids)

    def render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        """The conversation as the template writes it on the pinned date; `generate`: and the turn's head."""
        self._check_limits()
        try:
            return str(self._apply(self._merged(messages), generate))
        except Exception as error:  # a template raises what it likes
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise AlignProError(
                f"has a chat template that fails ({why}); mend chat_template.jinja"
            ) from error

    def _check_limits(self) -> None:
        """Refuse a template that took too much when it was tried, once, on a conversation of some length."""
        key = (str(self.template), repr(self.options))
        if key not in _TRIED:
            turns = [{"role": role, "content": "?" * 500} for role in ("user", "assistant") * 4][:-1]
            _TRIED[key] = limits.beyond(lambda: "".join(self._attempts(turns)))
        if _TRIED[key] is not None:
            raise AlignProError(f"has a chat template that {_TRIED[key]}; mend chat_template.jinja")

    def _attempts(self, turns: list[Message]) -> Iterator[str]:
        """Texts that the template makes of conversations, but of those that it refuses."""
        for messages in (turns, [{"role": "system", "content": "?" * 500}, *turns[:1]], turns[:2]):
            for generate in (True, False):
                try:
                    yield str(self._apply(messages, generate))
                except MemoryError:
                    raise
                except Exception:  # a template raises what it likes
                    continue

    def _apply(self, messages: Sequence[Message], generate: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self._dated,
            tokenize=False,
            add_generation_prompt=generate,
            **{_CALENDAR: self._calendar, **self.options},
        )

    @cached_property
    def _calendar(self) -> dict[str, str]:
        """The pinned date in each format that the template asks for."""
        formats = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", str(self.template))
        return {form: DATE.strftime(form) for _, form in formats}

    @cached_property
    def _dated(self) -> str | None:
        """The template, its clock replaced by the calendar; None where it asks none."""
        text = self.tokenizer.get_chat_template()
        if "strftime_now" not in text:
            return None
        return f"{{%- macro strftime_now(form) -%}}{{{{ {_CALENDAR}[form] }}}}{{%- endmacro -%}}" + text

    # --- what the template does ---

    @cached_property
    def end(self) -> int:
        """Id of the token with which the template ends a turn; the tokenizer's end where it writes none."""
        mark = _PRIVATE[2]
        try:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
            tail = self.render(turns, generate=False).rpartition(mark)[2]
        except AlignProError:
            tail = ""
        found = self._special.search(tail)
        if found is None and self.tokenizer.eos_token_id is None:
            raise AlignProError("has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        if found is None:
            return int(self.tokenizer.eos_token_id)
        return int(self.tokenizer.convert_tokens_to_ids(found[0]))

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message is written; Gemma's template refuses one."""
        messages = [{"role": "system", "content": _PRIVATE[2]}, {"role": "user", "content": "?"}]
        try:
            return _PRIVATE[2] in self._apply(messages, True)
        except Exception:
            return False

    @property
    def opens_thought(self) -> bool:
        """Whether the head of the model's turn ends inside a thought."""
        return bool(self._closing)

    @cached_property
    def _closing(self) -> str:
        head = self.render([{"role": "user", "content": "?"}]).rpartition("?")[2]
        for opened, closed in THOUGHTS:
            if head.rfind(opened) > head.rfind(closed):
                return ("" if head.endswith("\n") else "\n") + f"\n{closed}\n\n"
        return ""

    @cached_property
    def _trims(self) -> bool:
        mark = _PRIVATE[2]
        return f" {mark} " not in self.render([{"role": "user", "content": f" {mark} "}])

    @cached_property
    def _alternates(self) -> bool:
        """Whether a user's turn may not follow another's, as Gemma's template has it."""
        turn = {"role": "user", "content": "?"}
        try:
            self._apply([turn, turn], True)
        except Exception:
            return True
        return False

    def _merged(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation as the template can take it, with what it has no place for at a turn's head."""
        messages = list(messages)
        if len(messages) > 1 and messages[0]["role"] == "system" and not self.takes_system:
            messages[0] = {**messages[0], "role": "user"}
            if messages[1]["role"] == "user":
                messages[:2] = [_joined(*messages[:2])]
        if any(a["role"] == b["role"] for a, b in itertools.pairwise(messages)) and self._alternates:
            runs = itertools.groupby(messages, key=lambda turn: turn["role"])
            messages = [functools.reduce(_joined, run) for _, run in runs]
        return messages

    # --- control tokens ---

    @cached_property
    def control_tokens(self) -> tuple[str, ...]:
        """Tokens that steer a model: its special tokens, and added ones that its chat template mentions."""
        return self._tokens(str(self.template))

    def _tokens(self, text: str = "") -> tuple[str, ...]:
        """The special tokens, and added ones that occur in `text`, the longest first."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        found = {str(token) for token in added if token.special or str(token) in text}
        found |= {str(token) for token in self.tokenizer.all_special_tokens}
        return tuple(sorted(filter(str.strip, found), key=lambda t: (-len(t), t)))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.control_tokens)) or r"(?!)")

    @cached_property
    def _special(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._tokens())) or r"(?!)")

    def _spells(self, text: str) -> bool:
        return self._control.search(text) is not None

    @cached_property
    def _alias(self) -> dict[str, str]:
        return {t: f"{_PRIVATE[0]}{i}{_PRIVATE[1]}" for i, t in enumerate(self.control_tokens)}

    @cached_property
    def _protected(self) -> "Tokenizer | None":
        """The tokenizer with control tokens renamed to what no text can spell; None where it cannot be."""
        from tokenizers import Tokenizer

        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            return None
        data = json.loads(backend.to_str())
        alias, model = self._alias, data["model"]
        for token in data["added_tokens"]:
            token["content"] = alias.get(token["content"], token["content"])
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {alias.get(token, token): i for token, i in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[alias.get(token, token), *rest] for token, *rest in vocabulary]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
        data["post_processor"], data["truncation"], data["padding"] = None, None, None
        try:
            renamed = Tokenizer.from_str(json.dumps(data))
        except Exception:  # of the Rust library, without a class of its own
            return None
        known = self.tokenizer.get_vocab()
        same = all(renamed.token_to_id(a) == known[t] for t, a in alias.items() if t in known)
        return renamed if same else None

    # --- tokens to what was said ---

    def said(self, ids: Sequence[int], *, opened: bool | None = None, **options: Any) -> Said:
        """The text of a continuation, without special tokens and without a leading thought.

        Args:
            opened: whether it begins inside a thought; as the template has it if None.
            options: passed to the tokenizer's decode.
        """
        opened = self.opens_thought if opened is None else opened
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True, **options))
        if self._special_marks and self._special_marks & set(ids):  # would be left out
            kept = [i for i in ids if i not in self._special_ids or i in self._special_marks]
            text = str(self.tokenizer.decode(kept, skip_special_tokens=False, **options))
        for begin, close in THOUGHTS:
            starts = text.lstrip().startswith(begin)
            if starts or (opened and begin in self._closing.replace("/", "")):
                return _after(text, close)
        return Said(text)

    @cached_property
    def _special_marks(self) -> set[int]:
        """Ids of the marks around thoughts that are special tokens."""
        known = self.tokenizer.get_vocab()
        return {known[mark] for pair in THOUGHTS for mark in pair if mark in known} & self._special_ids

    @cached_property
    def _special_ids(self) -> set[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).items()
        return {int(i) for i, token in added if token.special} | {*map(int, self.tokenizer.all_special_ids)}

    def describe(self) -> dict[str, Any]:
        """The pinned date and the template's further arguments, as JSON values for a record."""
        return {"date": DATE.isoformat(), "options": dict(self.options)}

    def sample(self) -> str:
        """A short conversation as the model reads it: changes whenever the format does."""
        messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
        return self.render(messages)


def _joined(one: Message, other: Message) -> Message:
    return {**other, "content": f"{one['content']}\n\n{other['content']}"}


def chat_of(tokenizer: Any) -> Chat:
    """The tokenizer's chat format, as `configure` left it."""
    found = getattr(tokenizer, _ATTRIBUTE, None)
    if found is None or found.tokenizer is not tokenizer or found.template != tokenizer.chat_template:
        found = Chat(tokenizer, {} if found is None else found.options)
        setattr(tokenizer, _ATTRIBUTE, found)
    return found


def configure(tokenizer: Any, options: Mapping[str, Any] | None) -> Chat:
    """Set further arguments of the tokenizer's chat template; refuse them where it fails with them."""
    found = Chat(tokenizer, dict(options or {}))
    setattr(tokenizer, _ATTRIBUTE, found)
    found.sample()
    mark = _PRIVATE[2]
    if mark not in found.render([{"role": "user", "content": mark}]):
        raise AlignProError("has a chat template that leaves the prompt out; mend chat_template.jinja")
    return found


def parse_options(text: str | None) -> dict[str, Any]:
    """The arguments of a chat template from a JSON object, such as '{"enable_thinking": false}'."""
    if text is None or not text.strip():
        return {}
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise AlignProError(
            f"chat_template_kwargs {text[:80]!r}: is no JSON object; write one such as "
            "'{\"enable_thinking\": false}'"
        )
    return found
