"""Posting JSON to a server that may fail: retries, rate limits, deadlines and budgets. Needs no torch."""

import asyncio
import contextlib
import json
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import urlsplit

from alignpro.llm.targets.keys import Secret
from alignpro.llm.targets.responses import (
    Unread,
    as_json,
    body_of,
    client_library,
    finish,
    headers_of,
    read_json,
    retry_after,
)
from alignpro.llm.targets.services import REFUSES, Complaint, complaint
from alignpro.llm.targets.settings import EndpointSettings

T = TypeVar("T")
J = TypeVar("J")

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_POLL_S = 0.02  # between two looks at a budget that calls under way may give back to


@dataclass(frozen=True)
class Problem:
    """The reason why one attempt gave nothing."""

    text: str
    transient: bool
    wait_s: float | None = None
    """Seconds that the server asks to wait."""
    unreachable: bool = False
    error: Any = None
    """JSON of an error that the server tells inside a response of status 200."""


@dataclass(frozen=True)
class Instead:
    """Calls to be made at once in the place of one that the server did not take: no failure of it."""

    calls: Sequence["Call"]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and what becomes of its response."""

    body: bytes
    """JSON."""
    read: Callable[[Any], tuple[T, int] | Problem]
    """Reads the JSON of a response of status 200: its value and the tokens it took, or what is wrong with it.
    Whatever it raises ends the run."""
    keep: Callable[[T], None]
    """Called with the value, as soon as it is there."""
    cost: int = 0
    """Tokens that it takes at most."""
    known: Callable[[], T | None] = lambda: None
    """Gives the value where another process has it by now: then nothing is sent."""
    settle: Callable[[Complaint], tuple[T, int] | Instead | None] = lambda _: None
    """Settles a call that the server will not serve: by a value and its tokens, by other calls, or, where it
    gives None, by an error that ends the run."""


class GiveUp(Exception):
    """Ends a `post` early: `reason` is max_calls, max_tokens (budgets), failed or stopped."""

    def __init__(self, text: str, reason: str = "failed") -> None:
        super().__init__(text)
        self.text, self.reason = text, reason


class Meter(NamedTuple):
    """Counts calls and their tokens against the budgets of `EndpointSettings`."""

    book: Callable[[EndpointSettings, int, bool], str | None]
    """Counts a call about to be sent, of so many tokens at most, and whether it repeats a failed one; None.
    Where it would overrun a budget nothing is counted: `max_calls`, `max_tokens`, or `wait` where calls under
    way may yet use fewer tokens than they booked."""
    settle: Callable[[int], None]
    """Gives back the tokens booked for a call that has ended, its value kept, and what it used counted."""


class Pace:
    """Starts spread evenly: `per_minute` of whatever is booked, all at once where that is None."""

    def __init__(self, per_minute: float | None) -> None:
        self.per_minute = math.inf if per_minute is None else per_minute
        self.free_at = 0.0

    def book(self, now: float, amount: float) -> float:
        """The time at which `amount` may start."""
        start = max(now, self.free_at)
        self.free_at = start + 60.0 * amount / self.per_minute
        return start

    def give_back(self, amount: float) -> None:
        """Make room for others again: `amount` was booked and is not used."""
        self.free_at -= 60.0 * amount / self.per_minute


@dataclass
class Transport:
    """Posts to one address. Failures that may pass (no connection, time out, 429, 5xx, malformed responses)
    are tried again with exponential backoff and jitter; others end the run at once. Redirects are not
    followed: they would take the key along. Rates hold over this object's life, and so do budgets where
    `post` is given no other meter.
    """

    url: str = field(repr=False)
    shown: str
    """The address in errors."""
    name: str
    """Name of what is asked, in errors."""
    words: Mapping[str, str] = field(repr=False)
    """The owner's names, for errors: of its `address`; what to check where nothing is `found` or where no
    `json` comes; what determines the `request`; and how to `omit` a field of it."""
    settings: EndpointSettings

    def __post_init__(self) -> None:
        self.calls = 0
        self.retried = 0
        self.tokens = 0
        self._answered = 0
        self._reserved = 0
        self._hold_until = 0.0
        self._lock = threading.Lock()
        self._requests = Pace(self.settings.requests_per_minute)
        self._token_pace = Pace(self.settings.tokens_per_minute)

    def post(
        self, jobs: Sequence[J], make: Callable[[J], Call], secret: Secret, meter: Meter | None = None
    ) -> GiveUp | None:
        """Make each job's call, counted by `meter` if there is one; None, or why not all were made.

        Requests in flight are let finish when one fails, and their values kept. Raises what `read` or `keep`
        raised, and AlignProError where the HTTP client is not installed.
        """
        client_library()
        if not jobs:
            return None
        with self._lock:
            run = _Run(self, make, secret, meter or Meter(self.book, self.settle))
            failure = finish(run.all(deque(jobs)), run.stop)
        if failure is not None and not isinstance(failure, GiveUp):
            raise failure  # the disk is full, for one
        return failure

    def book(self, settings: EndpointSettings, cost: int, again: bool) -> str | None:
        """See `Meter.book`; `_Run` counts the call itself."""
        if settings.max_calls is not None and self.calls >= settings.max_calls:
            return "max_calls"
        if settings.max_tokens is not None and self.tokens + self._reserved + cost > settings.max_tokens:
            return "wait" if self._reserved else "max_tokens"
        self._reserved += cost
        return None

    def settle(self, cost: int) -> None:
        """See `Meter.settle`."""
        self._reserved -= cost


class Counted:
    """Counts of the requests that `_http` sends."""

    _http: Transport

    @property
    def calls(self) -> int:
        """Requests so far, retries included."""
        return self._http.calls

    @property
    def retried(self) -> int:
        """Requests that repeated a failed one."""
        return self._http.retried

    @property
    def tokens(self) -> int:
        """Tokens of prompts and answers so far, where the server reports them."""
        return self._http.tokens


class _Abandoned(Exception):
    """Another request failed for good while this one waited."""


class _Run(Generic[J]):
    """One `post`: workers that take jobs from a queue on one event loop."""

    def __init__(self, transport: Transport, make: Callable[[J], Call], secret: Secret, meter: Meter) -> None:
        self.transport, self.make, self.secret, self.meter = transport, make, secret, meter
        self.failure: Exception | None = None
        self.loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """From any thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                asyncio.run_coroutine_threadsafe(self._halt(GiveUp("stopped", "stopped")), self.loop)

    async def _halt(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self.stopping.set()

    async def all(self, queue: deque[J]) -> Exception | None:
        """Make every call; None, or why not. What it raises otherwise is a bug or an interrupt."""
        httpx = client_library()
        to = self.transport
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()
        workers = min(to.settings.concurrency, len(queue))
        try:
            client = httpx.AsyncClient(
                headers=headers_of(self.secret),
                follow_redirects=False,
                timeout=None,  # one deadline for all of a request, in `_attempt`
                verify=urlsplit(to.url).scheme != "http",  # nothing to verify there: saves 50 ms
                limits=httpx.Limits(max_connections=workers, max_keepalive_connections=workers),
            )
        except Exception as error:  # its own errors, and those of what it reads from the environment
            return GiveUp(
                f"the HTTP client does not start ({type(error).__name__}); check the proxy settings"
            )
        async with client:
            await asyncio.gather(*(self._work(client, queue) for _ in range(workers)))
        return self.failure

    async def _work(self, client: Any, queue: deque[J]) -> None:
        while queue and not self.stopping.is_set():
            try:
                call = self.make(queue.popleft())
                if (value := call.known()) is not None:
                    call.keep(value)
                else:
                    await self._answer(client, call)
            except _Abandoned:
                return
            except Exception as error:
                await self._halt(error)
                return

    async def _answer(self, client: Any, call: Call) -> None:
        """Make the call until it has a value, and keep that."""
        to, settings = self.transport, self.transport.settings
        for attempt in range(settings.retries + 1):
            await self._admit(call.cost, attempt > 0)
            used = 0
            try:
                result = await self._attempt(client, call)
                if isinstance(result, tuple):
                    used = result[1]
                    to._answered += 1
                    call.keep(result[0])
                    return
            finally:
                to.tokens += used
                to._token_pace.give_back(call.cost - used)
                self.meter.settle(call.cost)
            if isinstance(result, Instead):
                for other in result.calls:
                    await self._answer(client, other)
                return
            # Nothing listens, and never did: not worth minutes of backoff.
            hopeless = result.unreachable and not to._answered and attempt >= 2
            if not result.transient or hopeless or attempt == settings.retries:
                tried = f" after {attempt + 1} attempts" if attempt else ""
                raise GiveUp(f"{to.name}{tried}: {result.text}")
            pause = settings.backoff_s * 2 ** min(attempt, 30) * random.uniform(0.5, 1.5)
            wait = min(settings.max_wait_s, pause)
            if result.wait_s is not None:
                wait = max(wait, result.wait_s)
                # All workers wait, or each would find out for itself.
                to._hold_until = max(to._hold_until, time.monotonic() + wait)
            await self._sleep(wait)

    async def _admit(self, cost: int, again: bool) -> None:
        """Wait for rate limits, a server that asked for a pause, and budget; then count the call."""
        to, settings = self.transport, self.transport.settings
        now = time.monotonic()
        start = max(to._requests.book(now, 1), to._token_pace.book(now, cost))
        await self._sleep(start - now)
        while (pause := to._hold_until - time.monotonic()) > 0:
            await self._sleep(pause)
        self._go_on()
        while (budget := self.meter.book(settings, cost, again)) is not None:
            if budget != "wait":
                raise GiveUp(
                    f"{budget} {getattr(settings, budget)}: the budget of {to.shown} is spent; raise it to "
                    "go on",
                    budget,
                )
            await self._sleep(_POLL_S)
        to.calls += 1
        to.retried += again

    def _go_on(self) -> None:
        if self.stopping.is_set():
            raise _Abandoned

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        self._go_on()

    async def _attempt(self, client: Any, call: Call[T]) -> tuple[T, int] | Instead | Problem:
        httpx = client_library()
        to, said = self.transport, self.secret.said
        address, timeout_s = to.words["address"], to.settings.timeout_s
        try:
            async with (
                asyncio.timeout(timeout_s),
                client.stream(
                    "POST", to.url, content=call.body, headers={"content-type": "application/json"}
                ) as response,
            ):
                received = await body_of(response)
        except Unread as error:
            passes = response.status_code in RETRIED or error.passes
            return Problem(f"{said(str(error))}; check {address}", passes)
        except TimeoutError:
            return Problem(
                f"no whole response within timeout_s {timeout_s}; raise it or check the server", True
            )
        except (httpx.ConnectError, httpx.UnsupportedProtocol) as error:
            return Problem(
                f"cannot connect ({said(str(error))}); check {address} and that the server runs",
                True,
                unreachable=True,
            )
        except httpx.InvalidURL as error:
            return Problem(f"{address} is no address ({said(str(error))}); mend it", False)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            return Problem(f"{type(error).__name__} ({said(str(error))}); check the server", True)
        if response.status_code != 200:
            return self._failed(call, response.status_code, received, response.headers)
        try:
            content = read_json(received)
        except (ValueError, RecursionError):
            shown = said(received.decode(errors="replace"))
            return Problem(f"response {shown!r} is not JSON; check {to.words['json']}", True)
        result = call.read(content)
        if not isinstance(result, Problem) or result.error is None:
            return result
        code = result.error.get("code") if isinstance(result.error, dict) else None
        status = code if isinstance(code, int) and 400 <= code < 600 else 200
        return self._failed(call, status, as_json(result.error).encode(), {})

    def _failed(
        self, call: Call[T], status: int, body: bytes, headers: Mapping[str, str]
    ) -> tuple[T, int] | Instead | Problem:
        """Settle a call whose response is an error; status 200 is one that names none."""
        to = self.transport
        key_env, most = to.settings.key_env, to.settings.max_wait_s
        said = self.secret.said(body.decode(errors="replace"))
        text = f"status {status} ({said or 'no text'})"
        if 300 <= status < 400:
            where = to.words["address"]
            return Problem(f"status {status}: it redirects; give the final address as {where}", False)
        if status in REFUSES:
            try:
                found = complaint(read_json(body), json.loads(call.body))
            except (ValueError, RecursionError):
                found = Complaint("", False, ())
            if (settled := call.settle(found)) is not None:
                return settled
            if found.fields:
                omit = f"{to.words['omit']} {' '.join(found.fields)}"
                return Problem(f"{text}; leave out what it does not take: {omit}", False)
        if status == 200:
            return Problem(f"the server answers with an error ({said}); try later", True)
        if status in (401, 403):
            remedy = f"check the key in {key_env}" if key_env else "name the key's variable in key_env"
            return Problem(f"{text}; {remedy}", False)
        if status == 404:
            return Problem(f"{text}; check {to.words['found']}", False)
        if status not in RETRIED:
            return Problem(f"{text}; change the request: {to.words['request']}", False)
        if b"insufficient_quota" in body:
            return Problem(f"{text}; top up the account", False)
        wait = retry_after(headers.get("retry-after"))
        if wait is None:
            return Problem(f"{text}; try later", True, 0.0 if status == 429 else None)
        if wait > most:
            asks = f"{text}; it asks to wait {wait:.0f} s: run again then, or raise max_wait_s"
            return Problem(asks, False)
        return Problem(f"{text}; lower the rate limits or raise retries", True, wait)
