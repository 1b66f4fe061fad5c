"""A random sample of texts, chosen and ordered by a hash of each, and a limit of their length."""

import hashlib
import heapq
from collections.abc import Callable, Iterable
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data.rows import identity
from alignpro.llm.models.prompt import Prompt, transcript


def sample(
    texts: Iterable[str], n: int | None = None, seed: int = 0, fits: Callable[[str], bool] | None = None
) -> list[str]:
    """Take the n texts (or all) whose hash with the seed is smallest, in the order of that hash.

    Of texts that differ only in case, punctuation or white space the first that fits counts, and those
    without a letter or digit not at all; prompts with other conversations or columns differ. One pass, memory
    for n texts; there may be fewer than n.
    """
    kept: dict[int, str] = {}
    largest: list[int] = []  # a heap of the negated hashes of `kept`, while n bounds it
    for text in texts:
        normal = identity(text)
        rank = rank_of(normal, seed)
        full = n is not None and len(largest) == n
        # Its hash first: few texts ever get as far as `fits`, which may have to count tokens.
        if rank in kept or (full and rank > -largest[0]):
            continue
        if not normal or (fits is not None and not fits(text)):
            continue
        kept[rank] = text if isinstance(text, Prompt) else text.strip()
        if full:
            del kept[-heapq.heappushpop(largest, -rank)]
        elif n is not None:
            heapq.heappush(largest, -rank)
    return [kept[rank] for rank in sorted(kept)]


def shorter(
    *, characters: int | None = None, tokens: int | None = None, tokenizer: Any = None
) -> Callable[[str], bool]:
    """Make a function that says whether a text, or a conversation, has at most so many characters and tokens.

    Args:
        characters, tokens: limits; none if None.
        tokenizer: one of transformers, which counts; its special tokens are not counted.
    """
    for field, limit in (("characters", characters), ("tokens", tokens)):
        if limit is not None and limit < 1:
            raise AlignProError(f"{field} {limit}: give at least 1, or leave it out")
    if tokens is not None and tokenizer is None:
        raise AlignProError(f"tokens {tokens}: give the tokenizer that counts them")

    def fits(x: str) -> bool:
        text = transcript(x)
        if characters is not None and len(text) > characters:
            return False
        if tokens is None:
            return True
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) <= tokens

    return fits


def rank_of(normal: str, seed: int) -> int:
    # Not the hash of `split_of`: within a split, that one is not spread evenly.
    return int.from_bytes(hashlib.sha256(f"{seed}\n{normal}".encode()).digest()[:16])
