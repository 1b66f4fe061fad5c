"""One response of a server that is not trusted: how much of it is read, for how long, and as what."""

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from alignpro.errors import AlignProError
from alignpro.llm.targets.keys import Secret

T = TypeVar("T")

LARGEST = 16 * 2**20
"""Bytes of a response, at most."""


class Unread(Exception):
    """A response that is not read, and whether another may be."""

    def __init__(self, text: str, passes: bool) -> None:
        super().__init__(text)
        self.passes = passes


def headers_of(secret: Secret) -> Any:
    """Headers of a request, whose repr hides the key. A response is to come as it is: what is compressed may
    be a thousand times larger than what was sent."""
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    if secret.value:
        headers["Authorization"] = f"Bearer {secret.value}"
    return client_library().Headers(headers)


async def body_of(response: Any) -> bytes:
    """The bytes of a response, as they were sent; raises Unread where they are too many, or compressed."""
    coded = response.headers.get("content-encoding", "").strip()
    if coded.lower() not in ("", "identity"):
        raise Unread(f"response is compressed ({coded[:40]}), which was not asked for", False)
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        if len(received) > LARGEST:
            raise Unread(f"response above {LARGEST} bytes", True)
    return bytes(received)


def get(url: str, secret: Secret, timeout_s: float) -> Any:
    """The JSON at an address; None where it does not come within so many seconds, whatever the reason."""
    httpx = client_library()

    async def ask() -> Any:
        async with (
            asyncio.timeout(timeout_s),
            httpx.AsyncClient(
                headers=headers_of(secret), timeout=None, verify=urlsplit(url).scheme != "http"
            ) as client,
            client.stream("GET", url) as response,
        ):
            return await body_of(response)

    try:
        received = finish(ask())
    except Exception:  # its own errors, and those of what it reads from the environment
        return None
    try:
        return read_json(received)
    except (ValueError, RecursionError):
        return {}


def read_json(data: bytes) -> Any:
    """The JSON that a server sent. Whole numbers of more than 15 digits come as floats, infinite ones too: no
    count is so large, and not every sum of such fits where it is kept.

    Raises:
        ValueError, RecursionError: it is none, or nested too deep.
    """
    return json.loads(data, parse_int=lambda digits: int(digits) if len(digits) <= 15 else float(digits))


def as_json(value: Any) -> str:
    """Write a server's value as JSON to be shown, also one that is nested as deep as can be read."""
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):
        return "(nested too deep to be shown)"


def retry_after(value: str | None) -> float | None:
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


def finish(work: Coroutine[Any, Any, T], stop: Callable[[], None] = lambda: None) -> T:
    """Run a coroutine to its end, also below a running event loop (a notebook's); `stop` on an interrupt."""
    try:
        below = asyncio.get_running_loop() is not None
    except RuntimeError:
        below = False
    if not below:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, work)
        try:
            return future.result()
        except BaseException:
            stop()
            raise


def _without_queries(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(a.copy_with(query=None) if hasattr(a, "copy_with") else a for a in record.args)
    return True


def client_library() -> Any:
    """httpx2, told to log no query: there may be a key in it.

    Raises:
        AlignProError: it is not installed.
    """
    try:
        import httpx2
    except ImportError:
        raise AlignProError("an endpoint needs an HTTP client: pip install 'alignpro[http]'") from None
    logging.getLogger("httpx2").addFilter(_without_queries)  # once, however often it is asked
    return httpx2
