"""Pairs that are made, not shipped: a packaged prompt, and the same followed by a plain instruction."""

from collections.abc import Callable

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.data import packaged
from alignpro.llm.data.bank import INSTRUCTIONS
from alignpro.llm.data.own import Rewrite
from alignpro.llm.data.split import SPLITS, split_of
from alignpro.llm.models.prompt import with_instruction


def instruction_pairs(
    n: int | None = None, each: int = 8, held_out: int = 1, alone: float = 0.03, seed: int = 0
) -> list[Rewrite]:
    """Make pairs of a prompt x of the data set `instructions` and x followed by an instruction of the bank.

    In each split every instruction occurs about equally often. Some prompts are paired with themselves, so
    that a prompter that learns from the pairs can leave x as it is.

    Args:
        n: how many prompts; all of them if None.
        each: pairs of a prompt of the split `train`.
        held_out: pairs of a prompt of the other splits, by which it is measured what was learned.
        alone: share of the pairs in which x stands alone.
        seed: determines which prompts get which instructions.
    """
    if each < 1 or held_out < 1:
        raise AlignProError(f"each {each}, held_out {held_out}: give at least 1")
    if not 0 <= alone <= 1:
        raise AlignProError(f"alone {alone}: give a share from 0 to 1")
    rng = np.random.default_rng(seed)
    prompts = packaged.instructions(n)
    found = []
    for part in SPLITS:
        times = each if part == "train" else held_out
        rows = [x for x in prompts if split_of(x) == part for _ in range(times)]
        decks = range(-(-len(rows) // len(INSTRUCTIONS)))
        dealt = [int(i) for _ in decks for i in rng.permutation(len(INSTRUCTIONS))]
        silent = rng.random(len(rows)) < alone
        for x, i, nothing in zip(rows, dealt, silent, strict=False):
            found.append(Rewrite(x, x if nothing else with_instruction(x, INSTRUCTIONS[i])))
    return found


PAIRS: dict[str, Callable[..., list[Rewrite]]] = {"instructions": instruction_pairs}
"""Pairs that need no file, by name."""
