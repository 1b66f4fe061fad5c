"""Settings of sampling, and the keys that make each draw one of its own. Needs neither torch nor NumPy."""

import hashlib
import json
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import Prompt, as_json

Dtype = Literal["auto", "float32", "bfloat16", "float16", "4bit"]
"""`auto` and the rows of `devices.DTYPES`, said here because that table needs torch."""


def is_int(value: Any) -> bool:
    """Whether `value` is a whole number, NumPy's included, and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """Settings by which the frozen model decodes. The default is its own distribution, that of the theory."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Share of the probability that is kept, in (0, 1]: the nucleus."""
    top_k: int = 0
    """Number of likeliest tokens that are kept; 0 keeps all."""
    max_tokens: int = 128
    """Tokens of an answer, at most, its end token included."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 0), ("max_tokens", 1)):
            value = getattr(self, name)
            if not is_int(value) or value < least:
                raise AlignProError(f"{name} {value!r}: choose a whole number of at least {least}")
        for name, fits, range_ in (
            ("temperature", lambda v: 0 <= v < math.inf, "a finite number of at least 0"),
            ("top_p", lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
                raise AlignProError(f"{name} {value!r}: choose {range_}")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are one setting, and one cache key

    @property
    def natural(self) -> bool:
        """Whether it leaves the model's distribution as it is."""
        return (self.temperature, self.top_p, self.top_k) == (1.0, 1.0, 0)


EVALUATION = Sampling(temperature=1.5, top_p=0.6, top_k=20)
"""The Align-Pro paper's decoding of the frozen model."""


def digest(*parts: Any) -> bytes:
    """SHA-256 of JSON values, and of prompts with what comes with them; parts cannot run into each other."""
    values = [as_json(part) if isinstance(part, Prompt) else part for part in parts]
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).digest()


def stream_key(seed: int, sampling: Sampling, prompt: str, index: int) -> int:
    """128 bits that determine a sample. Without `max_tokens`: a longer limit continues the same answer."""
    shape = [sampling.temperature, sampling.top_p, sampling.top_k]
    return int.from_bytes(digest("sample", int(seed), shape, prompt, int(index))[:16])
