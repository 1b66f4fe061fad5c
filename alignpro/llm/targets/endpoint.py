"""A frozen target behind an OpenAI-compatible address: writes requests, reads answers. Needs no torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import messages_of
from alignpro.llm.models.sampling import Sampling, digest, is_int, stream_key
from alignpro.llm.targets import http
from alignpro.llm.targets.settings import EndpointSettings, Secret, check_address, read_key
from alignpro.llm.targets.target import Answer, Answers, Known, OnAnswer, Stopped, arrange, jobs


def _vllm(sampling: Sampling) -> dict[str, Any]:
    # Without these vLLM applies what the model's generation_config ships.
    return {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}


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

_OWN_FIELDS = ("model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream", "n")
_WORDS = {
    "address": "base_url",
    "found": "base_url (it ends in /v1) and the model's name",
    "json": "that base_url is an OpenAI-compatible one",
    "request": "model, dialect, extra_body or sampling",
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
    """Settings of its requests. The model is needed; the dialect is a row of `DIALECTS`."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON fields of each request, such as {"top_k": 20}; no secrets."""
    weights: str = ""
    """Whatever identifies the weights served; the address where empty. Part of `revision`."""
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_address("base_url", self.base_url, "http://127.0.0.1:8000/v1")
        if self.settings.model is None:
            raise AlignProError(f"model: name the model that {self.base_url} serves")
        self.dialect = self.settings.chosen(DIALECTS)
        try:
            json.dumps(dict(self.extra_body), allow_nan=False)
        except (TypeError, ValueError):
            raise AlignProError("extra_body: give a dict of JSON values") from None
        for name in self.extra_body:
            if name in _OWN_FIELDS:
                raise AlignProError(f"extra_body {name!r}: set it in Sampling or in the Endpoint instead")
        self.name = self.settings.model
        self.base_url = self.base_url.rstrip("/")
        self._http = http.Transport(
            url=f"{self.base_url}/chat/completions",
            shown=self.base_url,
            name=f"endpoint {self.base_url}, model {self.name!r}",
            words=_WORDS,
            settings=self.settings,
        )

    @property
    def revision(self) -> str:
        """See `Target.revision`: what is served, and what else is sent."""
        extra = f" {digest(dict(self.extra_body)).hex()[:12]}" if self.extra_body else ""
        return f"{self.weights or self.base_url} {self.dialect}{extra}"

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
        if sampling.top_k and self.dialect == "openai" and "top_k" not in self.extra_body:
            raise AlignProError(
                f"top_k {sampling.top_k}: the openai dialect has no top_k; use dialect='vllm' or "
                "'transformers', put it in extra_body, or choose top_k 0"
            )
        http.client_library()
        secret = read_key(self.settings.key_env)
        answers: Answers = {}

        def call(job: tuple[int, int]) -> http.Call[Answer]:
            position, index = job
            prompt = prompts[position]

            def keep(answer: Answer) -> None:
                answers[job] = answer
                if on_answer:
                    on_answer(position, index, answer)

            return http.Call(
                self._body(prompt, index, sampling, seed),
                lambda content: self.read(content, secret),
                keep,
                sampling.max_tokens + len(prompt.encode(errors="replace")) // 4 + 8,
                lambda: known(position, index),
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

    def read(self, content: Any, secret: Secret) -> tuple[Answer, int] | http.Problem:
        """The answer in a chat completion and its tokens, or what is wrong with it."""
        return _parse(content, secret)

    def _body(self, prompt: str, index: int, sampling: Sampling, seed: int) -> bytes:
        return json.dumps(
            {
                **DIALECTS[self.dialect](sampling),
                **self.extra_body,
                "model": self.name,
                "messages": messages_of(prompt),
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                # Every server takes 31 bits.
                "seed": stream_key(seed, sampling, prompt, index) % 2**31,
            }
        ).encode()


def _parse(value: Any, secret: Secret) -> tuple[Answer, int] | http.Problem:
    """The answer in a chat completion and its tokens, or what is wrong: field, value, remedy."""
    said = secret.said

    def wrong(name: str, got: Any, want: str, transient: bool = True) -> http.Problem:
        return http.Problem(f"response field {name} is {said(json.dumps(got))}, not {want}", transient)

    if not isinstance(value, dict):
        return wrong("(whole)", value, "an object; check the server")
    choices = value.get("choices")
    if not choices and value.get("error"):
        return http.Problem(
            f"the server answers with an error ({said(json.dumps(value['error']))}); try later", True
        )
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return wrong("choices", choices, "a list of objects; check the server")
    usage = value.get("usage")
    if not isinstance(usage, dict):
        return wrong("usage", usage, "an object; use a server that reports its tokens")
    counts = []
    for name in ("prompt_tokens", "completion_tokens"):
        count = usage.get(name)
        if not is_int(count) or count < 0:  # type: ignore[operator]
            return wrong(f"usage.{name}", count, "a whole number; use a server that reports its tokens")
        counts.append(int(count))  # type: ignore[arg-type]
    message, finish = choices[0].get("message"), choices[0].get("finish_reason")
    if not isinstance(message, dict):
        return wrong("choices[0].message", message, "an object; check the server")
    if finish not in ("stop", "length"):
        want = "stop or length; leave this prompt out or use another model"
        return wrong("choices[0].finish_reason", finish, want, not isinstance(finish, str))
    text = message.get("content")
    if not isinstance(text, str):
        want = "a string; a reasoning model needs more max_tokens, or its reasoning off"
        return wrong("choices[0].message.content", text, want, text is not None)
    # An empty text is an answer: the model ended at once. A server that echoes what it was sent must not
    # carry the key into a cache.
    return Answer(secret.scrub(text), finish, counts[0], counts[1]), sum(counts)
