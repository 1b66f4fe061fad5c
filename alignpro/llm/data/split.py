"""Tells which prompts are one, and which split each is in, by their text alone."""

import hashlib
import re
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Shares of the hash space. A prompt's split depends on its text alone, so adding data moves no other prompt.
_SHARES = (0.7, 0.15, 0.15)


def split_of(prompt: str) -> Split:
    """Find the split of a prompt: 70% train, 15% validation, 15% test, by the SHA-256 of its normalised text.

    Prompts that differ only in case, punctuation or white space are kept together.
    """
    position = int.from_bytes(hashlib.sha256(normalised(prompt).encode()).digest()[:8]) / 2**64
    if position < _SHARES[0]:
        return "train"
    return "validation" if position < _SHARES[0] + _SHARES[1] else "test"


def normalised(text: str) -> str:
    """Reduce a prompt to what tells it from others: letters, digits and single spaces, case-folded."""
    return re.sub(r"\W+", " ", text.casefold()).strip()
