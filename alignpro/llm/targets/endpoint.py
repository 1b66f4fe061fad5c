"""A frozen target behind an OpenAI-compatible address: what is sent, and what is made of the answers.

`http` sends it: retries, rate limits, deadlines, budgets, and the key that is shown nowhere.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import Sampling, digest, is_int, stream_key
from alignpro.llm.targets import http
from alignpro.llm.targets.target import Answer, Answers, OnAnswer, Stopped, arrange, jobs


def _openai(sampling: Sampling) -> dict[str, Any]:
    return {}


def _vllm(sampling: Sampling) -> dict[str, Any]:
    # Without these vLLM applies what the model's generation_config ships.
    return {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}


def _transformers(sampling: Sampling) -> dict[str, Any]:
    # `transformers serve` refuses a field top_k, and samples only where a generation_config says so.
    config = {"do_sample": sampling.temperature > 0, "top_k": sampling.top_k, "repetition_penalty": 1.0}
    return {"generation_config": json.dumps({**config, "max_new_tokens": sampling.max_tokens})}


DIALECTS: dict[str, Callable[[Sampling], dict[str, Any]]] = {
    "openai": _openai,
    "vllm": _vllm,
    "transformers": _transformers,
}
"""Fields of a request beyond the common ones; `openai` has no top_k."""

_OWN_FIELDS = ("model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream", "n")
_WORDS = {
    "address": "base_url",
    "timeout": "timeout_s",
    "found": "base_url (it ends in /v1) and the model's name",
    "request": "model, dialect, extra_body or sampling",
}


@dataclass
class Endpoint:
    """A model behind an OpenAI-compatible chat-completions address (vLLM, `transformers serve`, hosted ones).

    Failures that may pass (no connection, time out, 429, 5xx, malformed answers) are tried again with
    exponential backoff and jitter; others end the run at once. Budgets hold over this object's life.

    Raises:
        AlignProError: a bad field, before any request.
    """

    model: str
    base_url: str
    """Up to and with `/v1`; no key in it."""
    key_env: str | None = None
    """Name of the environment variable that holds the key; None sends none."""
    dialect: str = "openai"
    """A row of `DIALECTS`; `vllm` and `transformers` take top_k."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further JSON fields of each request, such as {"top_k": 20}; no secrets."""
    weights: str = ""
    """Whatever identifies the weights served; the address where empty. Part of `revision`."""
    concurrency: int = 8
    timeout_s: float = 120.0
    """For a whole request, from connecting to the last byte."""
    retries: int = 10
    """After a first attempt, per answer."""
    backoff_s: float = 0.5
    """Before the first retry; doubles each time."""
    max_wait_s: float = 60.0
    """Longest wait before one retry. A server that asks for more ends the run."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_calls: int | None = None
    """Budget: requests, retries included."""
    max_tokens: int | None = None
    """Budget: prompt and answer tokens. A request starts only where its own `Sampling.max_tokens` and its
    estimated prompt still fit. What a failed request may have cost is not known."""
    remote: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._check()
        self.name = self.model
        self.base_url = self.base_url.rstrip("/")
        self._http = http.Transport(
            url=f"{self.base_url}/chat/completions",
            shown=self.base_url,
            name=f"endpoint {self.base_url}, model {self.model!r}",
            words=_WORDS,
            key_env=self.key_env,
            concurrency=self.concurrency,
            timeout_s=self.timeout_s,
            retries=self.retries,
            backoff_s=self.backoff_s,
            max_wait_s=self.max_wait_s,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            max_calls=self.max_calls,
            max_tokens=self.max_tokens,
        )

    def _check(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise AlignProError(f"model {self.model!r}: name the model that the endpoint serves")
        http.check_address("base_url", self.base_url, "http://127.0.0.1:8000/v1")
        http.check_key_env(self.key_env)
        if self.dialect not in DIALECTS:
            raise AlignProError(f"dialect {self.dialect!r}: choose from {', '.join(DIALECTS)}")
        try:
            json.dumps(dict(self.extra_body), allow_nan=False)
        except (TypeError, ValueError):
            raise AlignProError("extra_body: give a dict of JSON values") from None
        for name in self.extra_body:
            if name in _OWN_FIELDS:
                raise AlignProError(f"extra_body {name!r}: set it in Sampling or in the Endpoint instead")
        for name, least in (("concurrency", 1), ("retries", 0), ("max_calls", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < least):
                raise AlignProError(f"{name} {value!r}: choose a whole number of at least {least}")
        for name in ("timeout_s", "backoff_s", "max_wait_s", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            optional = name.endswith("minute") and value is None
            if not optional and not (
                isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
            ):
                raise AlignProError(f"{name} {value!r}: choose a positive number")

    @property
    def calls(self) -> int:
        """See `Target.calls`."""
        return self._http.calls

    @property
    def retried(self) -> int:
        """See `Target.retried`."""
        return self._http.retried

    @property
    def tokens(self) -> int:
        """Of prompts and answers so far."""
        return self._http.tokens

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
    ) -> list[list[Answer]]:
        """See `Target.respond`. Requests in flight are let finish when one fails, and their answers kept.

        Raises:
            AlignProError: also for top_k where the dialect has none, or a key that is not set.
            Stopped: a budget is spent, or a request failed for good.
        """
        asked = jobs(prompts, first, samples, seed)
        if sampling.top_k and self.dialect == "openai" and "top_k" not in self.extra_body:
            raise AlignProError(
                f"top_k {sampling.top_k}: the openai dialect has no top_k; use dialect='vllm' or "
                "'transformers', put it in extra_body, or choose top_k 0"
            )
        http.client_library()
        secret = http.read_key(self.key_env)
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
                lambda body: _parse(body, secret),
                keep,
                sampling.max_tokens + len(prompt.encode(errors="replace")) // 4 + 8,
            )

        failure = self._http.post(asked, call, secret)
        if failure is None:
            return arrange(asked, answers, len(prompts))
        raise Stopped(
            f"{failure.text} ({len(answers)} of {len(asked)} answered, {self.calls} calls and {self.tokens} "
            "tokens spent)",
            failure.reason,
            answers,
        )

    def stop(self) -> None:
        """See `Target.stop`; requests in flight are let finish, and their answers kept."""
        self._http.stop()

    def _body(self, prompt: str, index: int, sampling: Sampling, seed: int) -> bytes:
        return json.dumps(
            {
                **DIALECTS[self.dialect](sampling),
                **self.extra_body,
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                # Every server takes 31 bits.
                "seed": stream_key(seed, sampling, prompt, index) % 2**31,
            }
        ).encode()


def _parse(body: bytes, secret: http.Secret) -> tuple[Answer, int] | http.Problem:
    """The answer in a chat completion's JSON and its tokens, or what is wrong: field, value, remedy."""
    said = secret.said
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        shown = said(body.decode(errors="replace"))
        return http.Problem(
            f"response {shown!r} is not JSON; check that base_url is an OpenAI-compatible one", True
        )

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
