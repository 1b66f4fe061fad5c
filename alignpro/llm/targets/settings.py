"""How a server is asked, for frozen models, judges and rewards: settings and addresses.

Needs no torch, no NumPy.
"""

import dataclasses
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import digest, is_int

LIKE_A_KEY = re.compile(
    r"(?<=/)(?:(?:sk|pk|hf|key|token|gh[a-z]|xox[a-z])[-_][\w.~-]{8,}"
    r"|(?=[A-Za-z_~]*\d)(?=[\d_~]*[A-Za-z])[\w~]{20,})(?=/|$)"
)
"""A part of an address's path that is a key, as some services have it there."""


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and infinities are not JSON


def is_number(value: Any) -> bool:
    """Whether `value` is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class EndpointSettings:
    """Settings of the requests to a server at an http(s) address, and limits on what they may cost."""

    model: str | None = None
    """Name that the server knows the model by. A server of frozen models or judges needs it."""
    key_env: str | None = None
    """NAME of the environment variable that holds the key. Where NAME_HOST is set too, the key goes to the
    hosts in that alone. Left out: no key is sent, or, to a reward, the one in ALIGNPRO_REWARD_KEY where that
    is set."""
    dialect: str | None = None
    """Form in which requests are written. Frozen models and judges: openai, vllm or transformers (the latter
    two take top-k). Rewards: rewards, score or classify. Left out: vllm where the server says to be vLLM,
    else openai; or rewards."""
    omit: tuple[str, ...] = ()
    """Fields of a request not to send, such as seed, top_p or temperature, for a service that does not take
    them; it then goes by its own defaults."""
    extra_body: str | None = None
    """Further fields of each request, as a JSON object such as '{"reasoning_effort": "low"}'; no secrets.
    Left out: none."""
    max_calls: int | None = None
    """Budget of requests, retries included, after which the run stops; a larger one goes on. Left out: no
    limit."""
    max_tokens: int | None = None
    """Budget of prompt and answer tokens, after which the run stops; a larger one goes on. A request starts
    only where the longest answer it allows still fits. Left out: no limit."""
    concurrency: int = 8
    """Requests under way at once."""
    timeout_s: float = 120.0
    """Seconds for a whole request, from connecting to the last byte."""
    retries: int = 10
    """Further tries after a first one that failed in a way that may pass."""
    backoff_s: float = 0.5
    """Seconds before the first retry, give or take half; doubled each time. 0 does not wait."""
    max_wait_s: float = 60.0
    """Seconds to wait before one retry, at most. A server that asks for more ends the run."""
    requests_per_minute: float | None = None
    """Rate of requests, at most. Left out: no limit."""
    tokens_per_minute: float | None = None
    """Rate of prompt and answer tokens, at most. Left out: no limit."""

    def __post_init__(self) -> None:
        if self.model is not None and (not isinstance(self.model, str) or not self.model):
            raise AlignProError(f"model {self.model!r}: name the model that the endpoint serves")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", str(self.key_env)):
            # Not repeated: people paste the key itself here.
            raise AlignProError("key_env: give the NAME of an environment variable, such as OPENAI_API_KEY")
        if isinstance(self.omit, str) or not all(isinstance(name, str) and name for name in self.omit):
            raise AlignProError(f"omit {self.omit!r}: give names of fields, such as seed or top_p")
        object.__setattr__(self, "omit", tuple(self.omit))
        extra = self.extra
        if not isinstance(extra, dict):
            raise AlignProError(
                f"extra_body {str(self.extra_body)[:80]!r}: is no JSON object; write one such as "
                '\'{"reasoning_effort": "low"}\''
            )
        for name, least in (("concurrency", 1), ("retries", 0), ("max_calls", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if not (value is None and name.startswith("max_")) and (not is_int(value) or value < least):
                raise AlignProError(f"{name} {value!r}: choose a whole number of at least {least}")
        for name in ("timeout_s", "backoff_s", "max_wait_s", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if (value is None and name.endswith("minute")) or (value == 0 and name == "backoff_s"):
                continue
            if not is_number(value) or not 0 < value < math.inf:
                raise AlignProError(f"{name} {value!r}: choose a positive number")

    @property
    def extra(self) -> dict[str, Any]:
        """The fields in `extra_body`."""
        try:
            return {} if self.extra_body is None else json.loads(self.extra_body, parse_constant=_refuse)
        except (ValueError, TypeError, RecursionError):
            return cast(Any, None)

    def fields(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a request: `own` without those to omit, and the extra ones."""
        return {name: value for name, value in own.items() if name not in self.omit} | self.extra

    def mark(self) -> str:
        """A digest of what changes requests here, for revisions; empty where nothing does."""
        changes = bool(self.omit or self.extra)
        return digest(self.extra, *sorted(self.omit)).hex()[:12] if changes else ""

    def record(self, role: str) -> dict[str, Any]:
        """Say for a run's record what determines answers; None, which another run differs from, for none."""
        facts: dict[str, Any] = {"model": self.model, "dialect": self.dialect}
        facts |= {"omit": list(self.omit), "extra_body": self.extra}
        return {f"{role}_{name}": value or None for name, value in facts.items()}

    def check_fields(self, sent: Collection[str], own: Collection[str]) -> None:
        """Refuse to omit what is not `sent`, and to add what is the caller's `own`."""
        for name in self.omit:
            if name not in sent:
                raise AlignProError(f"omit {name!r}: is no field that is sent; choose from {', '.join(sent)}")
        for name in self.extra:
            if name in own and name not in self.omit:
                raise AlignProError(f"extra_body {name!r}: has its own setting; use that, or omit it too")

    def chosen(self, dialects: Iterable[str]) -> str:
        """The dialect: a row of `dialects`, whose first is the default."""
        dialects = list(dialects)
        if self.dialect and self.dialect not in dialects:
            raise AlignProError(f"dialect {self.dialect!r}: choose from {', '.join(dialects)}")
        return self.dialect or dialects[0]

    def given(self) -> list[str]:
        """Names of the fields that are not at their defaults: a model in this process has none."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]


def check_address(name: str, address: Any, example: str, query: bool = False) -> str:
    """`address` as it may be shown: without its query, and `<key>` for what looks like one in its path.

    Raises:
        AlignProError: names field `name`: no http(s) address, or one with a user name, or with a query where
            `query` allows none.
    """
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        good = good and (query or not (parts.query or parts.fragment))
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good or re.search(r"[\s\x00-\x20\x7f]", str(address)):
        # Not repeated: it may hold a secret.
        raise AlignProError(
            f"{name}: give an http(s) address such as {example}, without a user name"
            f"{'' if query else ', query'} or password; a key goes into the environment variable that "
            "key_env names"
        )
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}{port}{LIKE_A_KEY.sub('<key>', parts.path)}"
