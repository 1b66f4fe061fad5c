"""A frozen target behind an OpenAI-compatible address: writes requests, reads answers. Needs no torch."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import messages_of, transcript
from alignpro.llm.models.sampling import Sampling, is_int, stream_key
from alignpro.llm.targets import http
from alignpro.llm.targets.keys import Secret, read_key
from alignpro.llm.targets.responses import as_json
from alignpro.llm.targets.served import serving
from alignpro.llm.targets.services import FINISHES, Complaint, content
from alignpro.llm.targets.settings import EndpointSettings, check_address
from alignpro.llm.targets.target import Answer, Answers, Known, OnAnswer, Stopped, arrange, jobs
from alignpro.llm.targets.vllm import NEUTRAL


def _vllm(sampling: Sampling) -> dict[str, Any]:
    return {"top_k": sampling.top_k or -1, **NEUTRAL}


def _transformers(sampling: Sampling) -> dict[str, Any]:
    # `transformers serve` refuses a field top_k, and samples only where a generation_config says so.
    config = {"do_sample": sampling.temperature > 0, "top_k": sampling.top_k, "repetition_penalty": 1.0}
    return {"generation_config": json.dumps({**config, "max_new_tokens": sampling.max_tokens})}


DIALECTS: dict[str, Callable[[Sampling], dict[str, Any]]] = {
    "openai": lambda _: {},
    "vllm": _vllm,
    "transformers": _transformers,
}
"""Fields of a request beyond the common ones; `openai` has no top_k."""

ROLES = {"target": "--answer-tokens", "judge": "--reply-tokens", "reward": "--reward-reply-tokens"}
"""Prefixes of the flags of an endpoint, and the flag that limits its answers: for errors."""

_REASON = 400  # characters of a refusal that are kept

_SAMPLED = ("model", "temperature", "top_p", "max_tokens", "seed")
_OWN_FIELDS = (*_SAMPLED, "messages", "stream", "n")
_WORDS = {
    "address": "base_url",
    "found": "base_url (it ends in /v1) and the model's name",
    "json": "that base_url is an OpenAI-compatible one",
    "request": "model, dialect, omit, extra_body or sampling",
}


@dataclass
class Endpoint(http.Counted):
    """A model behind an OpenAI-compatible chat-completions address (vLLM, `transformers serve`, hosted ones).

    Requests are posted as `http.Transport` says. Budgets hold over this object's life; behind
    `ledger.Cached`, over all runs and processes that share its folder. What a failed request may have cost is
    not known. A bad field raises AlignProError before any request.
    """

    base_url: str
    """The address, up to and with `/v1`; no key in it."""
    settings: EndpointSettings
    """Settings of its requests. The model is needed; the dialect is a row of `DIALECTS`. Left out: vllm where
    the server says to be vLLM, openai elsewhere."""
    weights: str = ""
    """Whatever identifies the weights served; the address where empty. Part of `revision`."""
    role: str = "target"
    """A row of `ROLES`: whose flags errors name."""
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_address("base_url", self.base_url, "http://127.0.0.1:8000/v1")
        if self.settings.model is None:
            raise AlignProError(f"model: name the model that {self.base_url} serves")
        self.settings.chosen(DIALECTS)
        self._dialect = self.settings.dialect
        self._guessed = False
        sent = dict.fromkeys([*_SAMPLED, *DIALECTS[self._dialect or "vllm"](Sampling())])
        self.settings.check_fields(sent, _OWN_FIELDS)
        self._untaken: set[str] = set()
        self.name = self.settings.model
        self.base_url = self.base_url.rstrip("/")
        self._http = http.Transport(
            url=f"{self.base_url}/chat/completions",
            shown=self.base_url,
            name=f"endpoint {self.base_url}, model {self.name!r}",
            words={**_WORDS, "omit": f"--{self.role}-omit"},
            settings=self.settings,
        )

    @property
    def dialect(self) -> str:
        """The form of its requests; the server is asked once, and taken for an `openai` one where it cannot
        be reached."""
        if self._dialect is None:
            found = serving(self.base_url, self.settings)
            self._guessed = found is None
            self._dialect = "vllm" if found is not None and found.vllm else "openai"
        return self._dialect

    def _check_guess(self) -> None:
        """Refuse to ask a vLLM server as an `openai` one, since it could not be reached before."""
        if self.dialect == "openai" and self._guessed:
            found = serving(self.base_url, self.settings)
            if found is not None and found.vllm:
                raise AlignProError(
                    f"dialect: {self.base_url} could not be reached when it was first asked, and is vLLM; "
                    "run again"
                )
            self._guessed = found is None

    @property
    def revision(self) -> str:
        """See `Target.revision`: what is served, and what else is sent."""
        return f"{self.weights or self.base_url} {self.dialect} {self.settings.mark()}".rstrip()

    def respond(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
        known: Known = lambda *_: None,
        meter: http.Meter | None = None,
    ) -> list[list[Answer]]:
        """See `Target.respond`. Requests in flight are let finish when one fails, and their answers kept.

        Args:
            known: asked just before each request for an answer that another process has by now; it is taken.
            meter: counts calls and tokens instead of this object.

        Raises:
            AlignProError: also for top_k where the dialect has none, or a key that is not set.
        """
        asked = jobs(prompts, first, samples, seed)
        self._check_guess()
        if sampling.top_k and self.dialect == "openai" and "top_k" not in self.settings.extra:
            raise AlignProError(
                f"top_k {sampling.top_k}: the openai dialect has no top_k; use dialect='vllm' or "
                "'transformers', put it in extra_body, or choose top_k 0"
            )
        http.client_library()
        secret = read_key(self.settings.key_env, self.base_url)
        answers: Answers = {}

        def call(job: tuple[int, int]) -> http.Call[Answer]:
            position, index = job
            prompt = prompts[position]

            def keep(answer: Answer) -> None:
                answers[job] = answer
                if on_answer:
                    on_answer(position, index, answer)

            def settle(found: Complaint) -> tuple[Answer, int] | http.Instead | None:
                if found.refused:
                    return Answer(secret.said(found.text, _REASON), "refused", 0, 0), 0
                return http.Instead([call(job)]) if self._does_without(found.fields, sampling) else None

            return http.Call(
                self._body(prompt, index, sampling, seed),
                lambda content: self._parse(content, secret, sampling),
                keep,
                sampling.max_tokens + len(transcript(prompt).encode(errors="replace")) // 4 + 8,
                lambda: known(position, index),
                settle,
            )

        failure = self._http.post(asked, call, secret, meter)
        if failure is None:
            return arrange(asked, answers, len(prompts))
        raise Stopped(
            f"{failure.text} ({len(answers)} of {len(asked)} answered, {self.calls} calls and {self.tokens} "
            "tokens spent)",
            failure.reason,
            answers,
        )

    def _body(self, prompt: str, index: int, sampling: Sampling, seed: int) -> bytes:
        limit = "max_completion_tokens" if "max_tokens" in self._untaken else "max_tokens"
        own = {
            **DIALECTS[self.dialect](sampling),
            "model": self.name,
            "messages": messages_of(prompt),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Every server takes 31 bits.
            "seed": stream_key(seed, sampling, prompt, index) % 2**31,
        }
        own = {name: value for name, value in own.items() if name not in self._untaken}
        own |= {} if "max_tokens" in self.settings.omit else {limit: sampling.max_tokens}
        return json.dumps(self.settings.fields(own)).encode()

    def _does_without(self, fields: Sequence[str], sampling: Sampling) -> bool:
        """Learn that the service does not take one of these fields, if the answers are distributed as before:
        the limit has another name, and a neutral value is what remains where none can be set.

        A neutral value is sent where it is taken, since the defaults of many servers are not neutral.
        """
        neutral = {"top_p": sampling.top_p == 1, "temperature": sampling.temperature == 1}
        for name in ("max_tokens", *(n for n in neutral if neutral[n] and self.dialect == "openai")):
            if name in fields:
                self._untaken.add(name)
                return True
        return False

    def _parse(self, value: Any, secret: Secret, sampling: Sampling) -> tuple[Answer, int] | http.Problem:
        """The answer in a chat completion and its tokens, or what is wrong: field, value, remedy."""
        said = secret.said

        def wrong(name: str, got: Any, want: str, transient: bool = True) -> http.Problem:
            return http.Problem(f"response field {name} is {said(as_json(got))}, not {want}", transient)

        if not isinstance(value, dict):
            return wrong("(whole)", value, "an object; check the server")
        choices = value.get("choices")
        if not choices and value.get("error"):
            return http.Problem("error", True, error=value["error"])
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return wrong("choices", choices, "a list of objects; check the server")
        choice = choices[0]
        message, finish = choice.get("message"), choice.get("finish_reason")
        end = FINISHES.get(finish.lower()) if isinstance(finish, str) else None
        if end == "failed" or choice.get("error"):
            return http.Problem("error", True, error=choice.get("error") or {"finish_reason": finish})
        if not isinstance(message, dict):
            return wrong("choices[0].message", message, "an object; check the server")
        found = content(message)
        reason, tokens = found.refusal, spent_tokens(value.get("usage"))
        if end == "refused" and not reason:
            reason = f"finish_reason {finish}" + (f" after {found.text!r}" if found.text else "")
        if isinstance(tokens, tuple) and reason is None:
            return wrong(*tokens)
        asked, answered, thinking = (0, 0, 0) if isinstance(tokens, tuple) else tokens
        thought = found.thought or thinking > 0
        if reason is None and not found.text and message.get("tool_calls"):
            want = "null; turn its tools off"
            return wrong("choices[0].message.tool_calls", message["tool_calls"], want, False)
        if reason is None and end is None:
            want = f"one of {', '.join(FINISHES)}; leave this prompt out or use another model"
            return wrong("choices[0].finish_reason", finish, want, not isinstance(finish, str))
        if reason is None and end == "length" and not found.text and (thought or found.text is None):
            reason = (
                f"its thought took all {sampling.max_tokens} tokens: raise {ROLES[self.role]}, or turn it "
                f"off by --{self.role}-extra-body"
            )
        if reason is not None:
            refused = Answer(said(reason, _REASON), "refused", asked, answered, thought=thought)
            return refused, asked + answered
        if found.text is None and message.get("content") is not None and not thought:
            return wrong("choices[0].message.content", message["content"], "a text; check the server")
        # Null, as an empty text, is an answer: the model ended at once, or after a thought. A server that
        # echoes what it was sent must not carry the key into a cache.
        text = secret.scrub(found.text or "")
        return Answer(text, cast(Any, end), asked, answered, thought=thought), asked + answered


def spent_tokens(usage: Any) -> list[int] | tuple[str, Any, str]:
    """Tokens of what was asked, of the answer, and of the thought in it; or a field, its value, and what is
    wanted."""
    if not isinstance(usage, dict):
        return "usage", usage, "an object; use a server that reports its tokens"
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        count: Any = usage.get(name)
        if not is_int(count) or count < 0:
            return f"usage.{name}", count, "a whole number; use a server that reports its tokens"
        counts.append(int(count))
    details = usage.get("completion_tokens_details")
    thinking: Any = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    return [*counts, int(thinking) if is_int(thinking) else 0]
