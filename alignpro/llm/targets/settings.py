"""One record of how a server is asked, for frozen models, judges and rewards. Needs no torch, no NumPy."""

import dataclasses
import math
import re
from dataclasses import dataclass

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import is_int


def check_key_env(name: str | None) -> None:
    """Raise AlignProError unless `name` can be that of an environment variable; None is no key."""
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", str(name)):
        # Not repeated: people paste the key itself here.
        raise AlignProError("key_env: give the NAME of an environment variable, such as OPENAI_API_KEY")


@dataclass(frozen=True)
class EndpointSettings:
    """Settings of the requests to a server at an http(s) address, and limits on what they may cost.

    Raises:
        AlignProError: a value out of its range.
    """

    model: str | None = None
    """Name that the server knows the model by. A server of frozen models or judges needs it."""
    key_env: str | None = None
    """NAME of the environment variable that holds the key. Left out: no key is sent."""
    dialect: str | None = None
    """Form in which requests are written. Frozen models and judges: openai, vllm or transformers (the latter
    two take top-k). Rewards: rewards, score or classify. Left out: openai, or rewards."""
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
        check_key_env(self.key_env)
        for name, least in (("concurrency", 1), ("retries", 0), ("max_calls", 1), ("max_tokens", 1)):
            value = getattr(self, name)
            if not (value is None and name.startswith("max_")) and (not is_int(value) or value < least):
                raise AlignProError(f"{name} {value!r}: choose a whole number of at least {least}")
        for name in ("timeout_s", "backoff_s", "max_wait_s", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if (value is None and name.endswith("minute")) or (value == 0 and name == "backoff_s"):
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise AlignProError(f"{name} {value!r}: choose a positive number")

    def given(self) -> list[str]:
        """Names of the fields that are not at their defaults: a model in this process has none."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
