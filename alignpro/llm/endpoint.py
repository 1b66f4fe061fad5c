"""A frozen target behind an OpenAI-compatible address: retries, rate limits, deadlines and budgets.

The key is read from the environment when it is needed, goes into one request header, to `base_url` and
nowhere else, and is removed from whatever a server sends back.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, TypeVar
from urllib.parse import quote, urlsplit

from alignpro.errors import AlignProError
from alignpro.llm.frozen import (
    Answer,
    Answers,
    OnAnswer,
    Sampling,
    Stopped,
    arrange,
    digest,
    is_int,
    jobs,
    stream_key,
)

T = TypeVar("T")


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
_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_LARGEST = 16 * 2**20  # bytes of a response


class _Secret:
    """A key that no traceback, log or repr shows."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<key>"

    def scrub(self, text: str) -> str:
        # Placeholders such as EMPTY are no secrets, and are words besides.
        if len(self.value) < 8:
            return text
        for form in {self.value, quote(self.value, safe=""), json.dumps(self.value)[1:-1]}:
            text = text.replace(form, "<key>")
        return text


@dataclass(frozen=True)
class _Problem:
    """Why one attempt gave no answer."""

    text: str
    transient: bool
    wait_s: float | None = None
    """What the server asks to wait."""
    unreachable: bool = False


class _Pace:
    """Starts spread evenly: `per_minute` of whatever is booked."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = per_minute
        self.free_at = 0.0

    def book(self, now: float, amount: float) -> float:
        """The time at which `amount` may start."""
        if self.per_minute is None:
            return now
        start = max(now, self.free_at)
        self.free_at = start + 60.0 * amount / self.per_minute
        return start

    def give_back(self, amount: float) -> None:
        if self.per_minute is not None:
            self.free_at -= 60.0 * amount / self.per_minute


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
        self.calls = 0
        self.retried = 0
        self.tokens = 0
        self._answered = 0
        self._lock = threading.Lock()
        self._running: _Run | None = None
        self._reserved = 0
        self._hold_until = 0.0
        self._requests = _Pace(self.requests_per_minute)
        self._token_pace = _Pace(self.tokens_per_minute)

    def _check(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise AlignProError(f"model {self.model!r}: name the model that the endpoint serves")
        try:
            parts = urlsplit(self.base_url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname)
            bare = not (parts.username or parts.password or parts.query or parts.fragment)
            _ = parts.port
        except (ValueError, AttributeError):
            good = bare = False
        if not good or re.search(r"\s", str(self.base_url)):
            # Not echoed: a malformed address may hold a key.
            raise AlignProError("base_url: give an http(s) address such as http://127.0.0.1:8000/v1")
        if not bare:
            raise AlignProError(
                "base_url: leave out user, password, query and fragment; the key goes in key_env"
            )
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", str(self.key_env)):
            # Not echoed: people paste the key itself here.
            raise AlignProError("key_env: give the NAME of an environment variable, such as OPENAI_API_KEY")
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
        _httpx()
        secret = self._key()
        answers: Answers = {}
        if not asked:
            return arrange(asked, answers, len(prompts))
        with self._lock:
            run = _Run(self, prompts, sampling, seed, secret, answers, on_answer)
            self._running = run
            try:
                failure = _finish(run.all(deque(asked)), run.stop)
            finally:
                self._running = None
        if failure is None:
            return arrange(asked, answers, len(prompts))
        if not isinstance(failure, _GiveUp):
            raise failure  # from on_answer: the disk is full, for one
        raise Stopped(
            f"{failure.text} ({len(answers)} of {len(asked)} answered, {self.calls} calls and {self.tokens} "
            "tokens spent)",
            failure.reason,
            answers,
        )

    def stop(self) -> None:
        """See `Target.stop`; requests in flight are let finish, and their answers kept."""
        if (run := self._running) is not None:
            run.stop()

    def _key(self) -> _Secret:
        if self.key_env is None:
            return _Secret("")
        secret = _Secret(os.environ.get(self.key_env, "").strip())
        if not secret.value:
            raise AlignProError(f"key_env {self.key_env}: that environment variable is not set; export it")
        if not secret.value.isascii() or not secret.value.isprintable() or " " in secret.value:
            raise AlignProError(f"key_env {self.key_env}: its value has characters no key has; copy it again")
        return secret

    def _admits(self, cost: int) -> str | None:
        """The budget that one more call of at most `cost` tokens would overrun, if any."""
        if self.max_calls is not None and self.calls >= self.max_calls:
            return "max_calls"
        if self.max_tokens is not None and self.tokens + self._reserved + cost > self.max_tokens:
            return "max_tokens"
        return None


class _GiveUp(Exception):
    def __init__(self, text: str, reason: str = "failed") -> None:
        super().__init__(text)
        self.text, self.reason = text, reason


class _Abandoned(Exception):
    """Another request failed for good while this one waited."""


class _Run:
    """One `respond` of an endpoint: workers that take jobs from a queue on one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        prompts: Sequence[str],
        sampling: Sampling,
        seed: int,
        secret: _Secret,
        answers: Answers,
        on_answer: OnAnswer | None,
    ) -> None:
        self.endpoint, self.prompts, self.sampling, self.seed = endpoint, prompts, sampling, seed
        self.secret, self.answers, self.on_answer = secret, answers, on_answer
        self.failure: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """From any thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                asyncio.run_coroutine_threadsafe(self._halt(_GiveUp("stopped", "stopped")), self.loop)

    async def _halt(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self.stopping.set()
        async with self.released:
            self.released.notify_all()

    async def all(self, queue: deque[tuple[int, int]]) -> Exception | None:
        """Answer every job; None, or why not. What it raises otherwise is a bug or an interrupt."""
        httpx = _httpx()
        end = self.endpoint
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        self.released = asyncio.Condition()
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if self.secret.value:
            headers["authorization"] = f"Bearer {self.secret.value}"
        workers = min(end.concurrency, len(queue))
        try:
            client = httpx.AsyncClient(
                headers=httpx.Headers(headers),  # whose repr hides the key
                follow_redirects=False,  # the key goes to base_url and nowhere else
                timeout=None,  # one deadline for all of a request, in `_attempt`
                verify=urlsplit(end.base_url).scheme != "http",  # nothing to verify there: saves 50 ms
                limits=httpx.Limits(max_connections=workers, max_keepalive_connections=workers),
            )
        except Exception as error:  # its own errors, and those of what it reads from the environment
            return _GiveUp(
                f"the HTTP client does not start ({type(error).__name__}); check the proxy settings"
            )
        finally:
            del headers
        async with client:
            await asyncio.gather(*(self._work(client, queue) for _ in range(workers)))
        return self.failure

    async def _work(self, client: Any, queue: deque[tuple[int, int]]) -> None:
        while queue and not self.stopping.is_set():
            position, index = queue.popleft()
            try:
                answer = await self._answer(client, position, index)
                self.answers[position, index] = answer
                if self.on_answer:
                    self.on_answer(position, index, answer)
            except _Abandoned:
                return
            except Exception as error:
                await self._halt(error)
                return

    async def _answer(self, client: Any, position: int, index: int) -> Answer:
        end, prompt = self.endpoint, self.prompts[position]
        body = self._body(prompt, index)
        cost = self.sampling.max_tokens + len(prompt.encode(errors="replace")) // 4 + 8
        for attempt in range(end.retries + 1):
            await self._admit(cost)
            end.retried += attempt > 0
            result: Answer | _Problem | None = None
            try:
                result = await self._attempt(client, body)
            finally:
                used = result.prompt_tokens + result.tokens if isinstance(result, Answer) else 0
                end.tokens += used
                end._reserved -= cost
                end._token_pace.give_back(cost - used)
                async with self.released:
                    self.released.notify_all()
            if isinstance(result, Answer):
                end._answered += 1
                return result
            # Nothing listens, and never did: not worth minutes of backoff.
            hopeless = result.unreachable and not end._answered and attempt >= 2
            if not result.transient or hopeless or attempt == end.retries:
                tried = f" after {attempt + 1} attempts" if attempt else ""
                raise _GiveUp(f"endpoint {end.base_url}, model {end.model!r}{tried}: {result.text}")
            wait = min(end.max_wait_s, end.backoff_s * 2 ** min(attempt, 30) * random.uniform(0.5, 1.5))
            if result.wait_s is not None:
                wait = max(wait, result.wait_s)
                # All workers wait, or each would find out for itself.
                end._hold_until = max(end._hold_until, time.monotonic() + wait)
            await self._sleep(wait)
        raise AssertionError

    def _body(self, prompt: str, index: int) -> bytes:
        end, sampling = self.endpoint, self.sampling
        return json.dumps(
            {
                **DIALECTS[end.dialect](sampling),
                **end.extra_body,
                "model": end.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": sampling.max_tokens,
                # Every server takes 31 bits.
                "seed": stream_key(self.seed, sampling, prompt, index) % 2**31,
            }
        ).encode()

    async def _admit(self, cost: int) -> None:
        """Wait for budget, rate limits and a server that asked for a pause; then count the call."""
        end = self.endpoint
        async with self.released:
            while (budget := end._admits(cost)) is not None:
                if budget == "max_calls" or not end._reserved:
                    limit = getattr(end, budget)
                    raise _GiveUp(
                        f"{budget} {limit}: the budget of {end.base_url} is spent; raise it to go on",
                        budget,
                    )
                await self.released.wait()  # requests in flight may use less than they reserved
                self._go_on()
            end.calls += 1
            end._reserved += cost
        try:
            now = time.monotonic()
            start = max(end._requests.book(now, 1), end._token_pace.book(now, cost))
            await self._sleep(start - now)
            while (pause := end._hold_until - time.monotonic()) > 0:
                await self._sleep(pause)
            self._go_on()
        except BaseException:
            end.calls -= 1
            end._reserved -= cost
            raise

    def _go_on(self) -> None:
        if self.stopping.is_set():
            raise _Abandoned

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        self._go_on()

    async def _attempt(self, client: Any, body: bytes) -> Answer | _Problem:
        httpx = _httpx()
        end, received = self.endpoint, bytearray()
        try:
            async with (
                asyncio.timeout(end.timeout_s),
                client.stream(
                    "POST",
                    f"{end.base_url}/chat/completions",
                    content=body,
                    headers={"content-type": "application/json"},
                ) as response,
            ):
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if len(received) > _LARGEST:
                        return _Problem(f"response above {_LARGEST} bytes; check base_url", True)
        except TimeoutError:
            return _Problem(
                f"no whole response within timeout_s {end.timeout_s}; raise it or check the server", True
            )
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            return _Problem(
                f"cannot connect ({self._said(str(error))}); check base_url and that the server runs",
                True,
                unreachable=True,
            )
        except httpx.InvalidURL as error:
            return _Problem(f"base_url is no address ({self._said(str(error))}); mend it", False)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            return _Problem(f"{type(error).__name__} ({self._said(str(error))}); check the server", True)
        if response.status_code != 200:
            return self._refusal(response, bytes(received))
        return _parse(bytes(received), self.secret, self._said)

    def _refusal(self, response: Any, body: bytes) -> _Problem:
        status = response.status_code
        said = self._said(body.decode(errors="replace"))
        text = f"status {status} ({said or 'no text'})"
        if 300 <= status < 400:
            return _Problem(f"status {status}: it redirects; give the final address as base_url", False)
        if status in (401, 403):
            name = self.endpoint.key_env
            remedy = f"check the key in {name}" if name else "name the key's variable in key_env"
            return _Problem(f"{text}; {remedy}", False)
        if status == 404:
            return _Problem(f"{text}; check base_url (it ends in /v1) and the model's name", False)
        if status not in _RETRIED:
            return _Problem(f"{text}; change the request: model, dialect, extra_body or sampling", False)
        if b"insufficient_quota" in body:
            return _Problem(f"{text}; top up the account", False)
        wait = _retry_after(response.headers.get("retry-after"))
        if wait is None:
            return _Problem(f"{text}; try later", True, 0.0 if status == 429 else None)
        if wait > self.endpoint.max_wait_s:
            asks = f"{text}; it asks to wait {wait:.0f} s: run again then, or raise max_wait_s"
            return _Problem(asks, False)
        return _Problem(f"{text}; lower the rate limits or raise retries", True, wait)

    def _said(self, text: str, most: int = 200) -> str:
        """Foreign text made safe to print: one line, no key (removed before cutting), no control codes."""
        line = " ".join(self.secret.scrub(text).split())
        line = "".join(c if c.isprintable() else "?" for c in line)
        return line if len(line) <= most else line[: most - 3] + "..."


def _parse(body: bytes, secret: _Secret, said: Callable[[str], str]) -> Answer | _Problem:
    """The answer in a chat completion's JSON, or what is wrong with it: field, value, remedy."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        shown = said(body.decode(errors="replace"))
        return _Problem(
            f"response {shown!r} is not JSON; check that base_url is an OpenAI-compatible one", True
        )

    def wrong(name: str, got: Any, want: str, transient: bool = True) -> _Problem:
        return _Problem(f"response field {name} is {said(json.dumps(got))}, not {want}", transient)

    if not isinstance(value, dict):
        return wrong("(whole)", value, "an object; check the server")
    choices = value.get("choices")
    if not choices and value.get("error"):
        return _Problem(
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
    return Answer(secret.scrub(text), finish, *counts)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _finish(work: Coroutine[Any, Any, T], stop: Callable[[], None]) -> T:
    """Run a coroutine to its end, also below a running event loop (a notebook's); `stop` on an interrupt."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, work)
        try:
            return future.result()
        except BaseException:
            stop()
            raise


def _httpx() -> Any:
    try:
        import httpx2
    except ImportError:
        raise AlignProError("endpoints need an HTTP client: pip install 'alignpro[http]'") from None
    return httpx2
