"""User prompts and preference pairs by the name of a data set, from packages or from the hub.

A public one comes through the `datasets` library, from the hub or from a folder with the files of the hub's
repository. A prompt is what its user wrote, without system prompts. Prompts that differ only in case,
punctuation or white space are one. The split is `split_of`, the publishers' being joined before, so that no
prompt is in two; the order is a hash of the seed and the normalised prompt, so that n are a random sample.
"""

import contextlib
import hashlib
import heapq
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data import packaged
from alignpro.llm.data.own import Row
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.split import SPLITS, Split, normalised, split_of
from alignpro.llm.models import packages


@dataclass(frozen=True)
class Source:
    """A data set of the Hugging Face hub: where it is, and what its columns mean."""

    repository: str
    """Hub id, owner/name."""
    licence: str
    """Licence that its card declares."""
    prompt: str
    """Column of the user's prompt."""
    splits: tuple[str, ...] = ("train",)
    """Splits of the publisher, which are read one after the other."""
    answers: tuple[str, ...] = ()
    """Columns that `grades` reads."""
    grades: Callable[[Row], Iterable[tuple[float | None, str]]] | None = None
    """Function that makes of a row its answers, each with a grade: of two answers to a prompt, that with the
    higher grade is preferred, and equal grades say nothing. None where a data set has prompts only."""
    pooled: bool = False
    """Whether the answers to a prompt are in several rows, and comparable."""
    revision: str | None = None
    """Commit to read, where a later one must not be taken."""


# Columns, splits and licences are those of the cards; docs/data.md has the sources.
DATASETS: dict[str, Callable[..., list[str]] | Source] = {
    "instructions": packaged.instructions,
    "mt-bench": packaged.mt_bench,
    # Prompts of the pairs that the packaged reward learned from: a run must keep to prompts of other splits
    # than training where it measures, as `split_of` has it.
    "dpo-demo": partial(packaged.preference_prompts, "dpo-demo"),
    "healthbench": partial(packaged.preference_prompts, "healthbench"),
    # Six .jsonl files, one split. The commit is that with the repaired overall_score (2,628 completions
    # had been given 10, many of them for a 1), from which ultrafeedback_binarized was made too.
    "ultrafeedback": Source(
        "openbmb/UltraFeedback",
        "MIT",
        prompt="instruction",
        answers=("completions",),
        grades=lambda row: [(c["overall_score"], c["response"]) for c in row["completions"]],
        revision="40b436560ca83a8dba36114c22ab3c66e43f6d5e",
    ),
    # `chosen` and `rejected` are conversations of a user's and an assistant's turn. The sft and gen splits
    # repeat prompts of the prefs splits.
    "ultrafeedback-binarized": Source(
        "HuggingFaceH4/ultrafeedback_binarized",
        "MIT",
        prompt="prompt",
        splits=("train_prefs", "test_prefs"),
        answers=("chosen", "rejected", "score_chosen", "score_rejected"),
        grades=lambda row: [(row[f"score_{x}"], row[x][-1]["content"]) for x in ("chosen", "rejected")],
    ),
    # A row is one answer; up to four of them answer the same prompt. Attributes are whole numbers, 0 to 4.
    "helpsteer": Source(
        "nvidia/HelpSteer",
        "CC-BY-4.0",
        prompt="prompt",
        splits=("train", "validation"),
        answers=("response", "helpfulness"),
        grades=lambda row: [(row["helpfulness"], row["response"])],
        pooled=True,
    ),
    "orca-dpo-pairs": Source(
        "Intel/orca_dpo_pairs",
        "Apache-2.0",
        prompt="question",
        answers=("chosen", "rejected"),
        grades=lambda row: [(1.0, row["chosen"]), (0.0, row["rejected"])],
    ),
    "openorca": Source("Open-Orca/OpenOrca", "MIT", prompt="question"),
}
"""The data sets by name: a function returns the prompts of a package, a `Source` describes a public one."""


def check_dataset(name: str, folder: str | Path | None = None, split: str | None = None) -> None:
    """Refuse what cannot be read, before any reading: an unknown data set or split, or a wrong folder."""
    if name not in DATASETS:
        raise AlignProError(f"dataset {name!r}: choose from {', '.join(DATASETS)}, or give prompts_file")
    if split is not None and split not in SPLITS:
        raise AlignProError(f"split {split!r}: choose from {', '.join(SPLITS)}")
    if folder is None:
        return
    if not isinstance(DATASETS[name], Source):
        raise AlignProError(f"data_folder {folder}: dataset {name} comes in a package; leave data_folder out")
    if not Path(folder).expanduser().is_dir():
        raise AlignProError(f"data_folder {folder}: no such folder; name the one with the files of {name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the logs of retries and damaged files: one sentence at the end tells of them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@_quiet()
def prompts(
    name: str,
    split: str | None = None,
    n: int | None = None,
    seed: int = 0,
    *,
    folder: str | Path | None = None,
    fits: Callable[[str], bool] | None = None,
) -> list[str]:
    """Read the distinct prompts of a row of `DATASETS`, in an order fixed by `seed` alone.

    Args:
        split: keeps the prompts of this split (`split_of`); all if None.
        n: how many; all if None. Memory grows with n, not with the data set.
        folder: holds the files of the hub's repository, where the hub cannot be reached.
        fits: says of a prompt whether to keep it, such as `shorter(...)`.

    Raises:
        AlignProError: an unknown name or split, too few prompts, a package or hub out of reach, a licence to
            accept first, or files of another schema.
    """
    check_dataset(name, folder, split)
    if n is not None and n < 1:
        raise AlignProError(f"prompts {n}: give at least 1")

    def wanted(text: str) -> bool:
        return (split is None or split_of(text) == split) and (fits is None or fits(text))

    source = DATASETS[name]
    if isinstance(source, Source):
        found = sample((prompt for _, prompt, _ in _rows(name, source, (), folder)), n, seed, wanted)
    else:
        found = [text for text in source(seed=seed) if wanted(text)]
    if not found:
        raise AlignProError(f"dataset {name}: no prompts are left; choose another, or allow longer ones")
    if n is not None and n > len(found):
        raise AlignProError(f"prompts {n}: choose from 1 to the {len(found)} there are in dataset {name}")
    return found[:n]


@_quiet()
def pairs(
    name: str, split: str | None = None, seed: int = 0, *, folder: str | Path | None = None
) -> list[PreferencePair]:
    """Read the preference pairs of a row of `DATASETS`: every two answers to a prompt with different grades.

    Their order follows that of `prompts`, so the first pairs are those of a random sample of prompts.

    Raises:
        AlignProError: a data set without graded answers, or without any of different grades; see `prompts`.
    """
    check_dataset(name, folder, split)
    source = DATASETS[name]
    if not isinstance(source, Source) or source.grades is None:
        named = [n for n, row in DATASETS.items() if isinstance(row, Source) and row.grades]
        raise AlignProError(f"dataset {name}: it has no preference pairs; choose from {', '.join(named)}")
    groups: dict[str | int, tuple[str, Split, list[tuple[float, str]]]] = {}
    for number, prompt, row in _rows(name, source, source.answers, folder):
        part = split_of(prompt)
        if split not in (None, part):
            continue
        try:
            graded = [(grade, text.strip()) for grade, text in source.grades(row) if grade is not None]
            kept = [(grade, text) for grade, text in graded if text and math.isfinite(grade)]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise _other_schema(name, f"row {number} has {error!r} in {', '.join(source.answers)}") from None
        groups.setdefault(prompt if source.pooled else number, (prompt, part, []))[2].extend(kept)
    found = {
        PreferencePair(prompt, better, worse, name, part): None
        for prompt, part, graded in groups.values()
        for (high, better), (low, worse) in itertools.permutations(graded, 2)
        if high > low and better != worse
    }
    if not found:
        raise AlignProError(f"dataset {name}: no two answers to a prompt differ in grade; choose other data")
    return sorted(found, key=lambda pair: _rank(normalised(pair.prompt), seed))


def sample(
    texts: Iterable[str], n: int | None = None, seed: int = 0, fits: Callable[[str], bool] | None = None
) -> list[str]:
    """Take the n texts (or all) whose hash with the seed is smallest, in the order of that hash.

    Of texts that differ only in case, punctuation or white space the first that fits counts, and those
    without a letter or digit not at all. One pass, memory for n texts; there may be fewer than n.
    """
    kept: dict[int, str] = {}
    largest: list[int] = []  # a heap of the negated hashes of `kept`, while n bounds it
    for text in texts:
        normal = normalised(text)
        rank = _rank(normal, seed)
        full = n is not None and len(largest) == n
        # Its hash first: few texts ever get as far as `fits`, which may have to count tokens.
        if rank in kept or (full and rank > -largest[0]):
            continue
        if not normal or (fits is not None and not fits(text)):
            continue
        kept[rank] = text.strip()
        if full:
            del kept[-heapq.heappushpop(largest, -rank)]
        elif n is not None:
            heapq.heappush(largest, -rank)
    return [kept[rank] for rank in sorted(kept)]


def shorter(
    *, characters: int | None = None, tokens: int | None = None, tokenizer: Any = None
) -> Callable[[str], bool]:
    """Make a function that says whether a text has at most so many characters and tokens.

    Args:
        characters, tokens: limits; none if None.
        tokenizer: one of transformers, which counts; its special tokens are not counted.
    """
    for field, limit in (("characters", characters), ("tokens", tokens)):
        if limit is not None and limit < 1:
            raise AlignProError(f"{field} {limit}: give at least 1, or leave it out")
    if tokens is not None and tokenizer is None:
        raise AlignProError(f"tokens {tokens}: give the tokenizer that counts them")

    def fits(text: str) -> bool:
        if characters is not None and len(text) > characters:
            return False
        if tokens is None:
            return True
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) <= tokens

    return fits


def _rank(normal: str, seed: int) -> int:
    # Not the hash of `split_of`: within a split, that one is not spread evenly.
    return int.from_bytes(hashlib.sha256(f"{seed}\n{normal}".encode()).digest()[:16])


def _rows(
    name: str, source: Source, columns: tuple[str, ...], folder: str | Path | None
) -> Iterator[tuple[int, str, Row]]:
    """Read every row that has a prompt: its number, the prompt, and the named columns."""
    try:
        import datasets as library
    except ModuleNotFoundError:
        missing = f"dataset {name}: the package datasets is missing; run pip install 'alignpro[llm]'"
        raise AlignProError(missing) from None
    needed = tuple(dict.fromkeys((source.prompt, *columns)))
    packages.note(f"reading {source.repository} ({source.licence}) from {folder or 'the hub or its cache'}")
    try:
        if folder is None:
            loaded = library.load_dataset(source.repository, revision=source.revision)
        else:  # streamed, since a copy in the library's cache would help nobody
            loaded = library.load_dataset(str(Path(folder).expanduser().resolve()), streaming=True)
        # Files without their card have the splits that the library reads off their names.
        parts = [loaded[split] for split in source.splits if split in loaded] or list(loaded.values())
        number = 0
        for part in parts:
            has = part.column_names or list(next(iter(part), {}))
            if absent := [column for column in needed if column not in has]:
                raise _other_schema(name, f"no column {absent[0]!r} among {', '.join(has) or 'none'}")
            for batch in part.select_columns(list(needed)).iter(batch_size=256):
                for values in zip(*(batch[column] for column in needed), strict=True):
                    number += 1
                    prompt = values[0]
                    if not isinstance(prompt, str):
                        raise _other_schema(name, f"row {number} has no text in {source.prompt!r}")
                    if prompt.strip():
                        yield number, prompt.strip(), dict(zip(needed, values, strict=True))
    except AlignProError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx and pyarrow, without a common class
        raise _refused(name, source, folder, error) from error


def _other_schema(name: str, what: str) -> AlignProError:
    return AlignProError(f"dataset {name}: {what}; check that these are the files of that data set")


def _refused(name: str, source: Source, folder: str | Path | None, error: Exception) -> AlignProError:
    """Say what went wrong in reading, and what to do about it."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    told = error.__cause__ if isinstance(error.__cause__, Exception) else error
    said = packages.scrub(" ".join(str(told).split())[:200]) or type(told).__name__
    place = source.repository
    command = f"hf download {place} --repo-type dataset --local-dir DIR"
    if source.revision is not None:
        command += f" --revision {source.revision}"
    elsewhere = f"download it elsewhere ({command}) and give --data-folder DIR"
    if folder is not None:
        return AlignProError(f"data_folder {folder}: cannot read it as {name} ({said}); {elsewhere}")
    if isinstance(error, GatedRepoError) or "gated" in str(error):
        why = f"the hub asks for a login; accept the terms of {place} there and run `hf auth login`, or"
    elif isinstance(error, DatasetNotFoundError):
        why = f"the hub has no {place} any more;"
    elif isinstance(error, OSError):
        why = f"the hub cannot be reached and no copy of {place} is cached;"
    else:
        why = f"cannot read {place} ({said});"
    return AlignProError(f"dataset {name}: {why} {elsewhere}")
