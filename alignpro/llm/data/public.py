"""User prompts and preference pairs of a data set: a named one, any of the hub, or the user's own.

A public one comes through the `datasets` library, from the hub or from a folder with the files of the hub's
repository. Prompts that differ only in case, punctuation or white space are one. The split is `split_of`, the
publishers' being joined before, so that no prompt is in two, and a conversation goes where its first turn
does; the order is a hash of the seed and the normalised prompt, so that n are a random sample.
"""

import contextlib
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from alignpro.errors import AlignProError
from alignpro.files import real
from alignpro.llm.data import own, packaged
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.rows import Reading, Row, first_turn, identity
from alignpro.llm.data.split import SPLITS, Split, split_of
from alignpro.llm.data.subset import rank_of, sample
from alignpro.llm.data.verifiable import verifiable
from alignpro.llm.models import packages
from alignpro.llm.models.catalogue import HUB_ID
from alignpro.llm.models.prompt import columns_of, context_of


@dataclass(frozen=True)
class Source:
    """A published data set: where it is, and what its columns mean."""

    repository: str
    """Hub id, owner/name; of a data set that is on no hub, the page with its file."""
    licence: str
    """Licence that its card declares."""
    prompt: str | None
    """Column of the user's prompt; None to look for it (see `Reading.column`)."""
    splits: tuple[str, ...] = ("train",)
    """Splits of the publisher, which are read one after the other; none to read all."""
    answers: tuple[str, ...] = ()
    """Columns that `grades` reads."""
    grades: Callable[[Row], Iterable[tuple[float | None, str]]] | None = None
    """Function that makes of a row its answers, each with a grade: of two answers to a prompt, that with the
    higher grade is preferred, and equal grades say nothing. None where a data set has prompts only."""
    pooled: bool = False
    """Whether the answers to a prompt are in several rows, and comparable."""
    revision: str | None = None
    """Commit to read, where a later one must not be taken."""
    config: str | None = None
    """Configuration, where the repository has several."""
    file: str = ""
    """Name of its file in a folder, * for any letters, where that holds others too."""
    test: bool = False
    """Whether it is a published test set: all of it is measured on, and none learned from."""

    @property
    def hub(self) -> bool:
        """Whether the hub has it."""
        return not self.repository.startswith("https://")


_BPO = "https://github.com/thu-coai/BPO/tree/main/data/testset"

# Columns, splits and licences are those of the cards; docs/data.md has the sources.
DATASETS: dict[str, Callable[..., list[str]] | Source] = {
    "instructions": packaged.instructions,
    "mt-bench": packaged.mt_bench,
    # Prompts of the pairs that the packaged reward learned from: a run must keep to prompts of other splits
    # than training where it measures, as `split_of` has it.
    "dpo-demo": partial(packaged.preference_prompts, "dpo-demo"),
    "healthbench": partial(packaged.preference_prompts, "healthbench"),
    "verifiable": verifiable,
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
    # The four test sets of BPO (arXiv 2311.04155), joined as its evaluation joins them.
    "bpo-test": Source(
        "THUDM/BPO", "Apache-2.0", prompt="prompt", splits=("test",), file="bpo_test.json*", test=True
    ),
    "dolly-eval": Source(
        _BPO, "CC-BY-SA-3.0", prompt="instruction+context", file="dolly_eval.json*", test=True
    ),
    "self-instruct-eval": Source(
        _BPO, "Apache-2.0", prompt="instruction+context", file="self_instruct_eval.json*", test=True
    ),
    "vicuna-eval": Source(_BPO, "Apache-2.0", prompt="text", file="vicuna_eval.json*", test=True),
}
"""The data sets by name: a function returns the prompts of a package, a `Source` describes a public one."""


def source_of(name: str) -> Callable[..., list[str]] | Source | Path:
    """Find what `--dataset` names: a row of `DATASETS`, a file or folder here, or owner/name[:config] of the
    hub."""
    if name in DATASETS:
        return DATASETS[name]
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    repository, colon, config = name.partition(":")
    if HUB_ID.fullmatch(repository) and (config or not colon):
        return Source(repository, "see its card", None, (), config=config or None)
    raise AlignProError(
        f"dataset {name!r}: choose from {', '.join(DATASETS)}; or name one of the hub, owner/name, or a file "
        "or folder that is here"
    )


def check_split(split: str | None) -> None:
    """Refuse an unknown split."""
    if split is not None and split not in SPLITS:
        raise AlignProError(f"split {split!r}: choose from {', '.join(SPLITS)}")


def check_dataset(name: str, folder: str | Path | None = None, split: str | None = None) -> None:
    """Refuse what cannot be read, before any reading: an unknown data set or split, or a wrong folder."""
    source = source_of(name)
    check_split(split)
    if isinstance(source, Source) and source.test and split == "train":
        raise AlignProError(f"dataset {name}: is a test set, to be measured on; learn from another")
    if folder is not None and not isinstance(source, Source):
        why = "is read from here" if isinstance(source, Path) else "comes in a package"
        raise AlignProError(f"data_folder {folder}: dataset {name} {why}; leave data_folder out")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise AlignProError(f"data_folder {folder}: no such folder; name the one with the files of {name}")
    if folder is None and isinstance(source, Source) and not source.hub:
        raise AlignProError(_elsewhere(name, source))


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
    reading: Reading | None = None,
    fewer: bool = False,
) -> list[str]:
    """Read the distinct prompts of a data set, in an order fixed by `seed` alone.

    Args:
        name: see `source_of`.
        split: keeps the prompts of this split (`split_of`); all if None.
        n: how many; all if None. Memory grows with n, not with the data set.
        folder: holds the files of the hub's repository, where the hub cannot be reached.
        fits: says of a prompt whether to keep it, such as `shorter(...)`.
        reading: what of a row makes its prompt; its column is that of the row of `DATASETS` if None.
        fewer: whether fewer than n will do, where there are no more.

    Raises:
        AlignProError: an unknown name or split, too few prompts, a package or hub out of reach, a licence to
            accept first, or files of another schema.
    """
    check_dataset(name, folder, split)
    if n is not None and n < 1:
        raise AlignProError(f"prompts {n}: give at least 1")
    source, reading, used = source_of(name), reading or Reading(), dict[str, None]()
    if isinstance(source, Source) and source.test:
        split = None

    def wanted(x: str) -> bool:
        return (split is None or split_of(first_turn(x)) == split) and (fits is None or fits(x))

    if isinstance(source, Path):
        given = own.folder_prompts if source.is_dir() else own.file_prompts
        found = sample(given(source, reading, used), n, seed, wanted)
    elif isinstance(source, Source):
        reading = replace(reading, column=reading.column or source.prompt)
        rows = _rows(name, source, reading, (), folder, used)
        found = sample((prompt for _, prompt, _ in rows), n, seed, wanted)
    else:
        found = _packaged(name, source, reading, seed, wanted)
    if not found:
        where = f" in split {split}" if split else ""
        raise AlignProError(
            f"dataset {name}: no prompts are left{where}; choose another, allow longer ones, or read a file "
            "whole with --prompts-file"
        )
    if n is not None and n > len(found) and not fewer:
        raise AlignProError(f"prompts {n}: choose from 1 to the {len(found)} there are in dataset {name}")
    if used:
        own.note(len(found[:n]), used, f"{name}, split {split}" if split else name)
    return found[:n]


def _packaged(
    name: str,
    read: Callable[..., list[str]],
    reading: Reading,
    seed: int,
    wanted: Callable[[str], bool],
) -> list[str]:
    """The prompts of a package, which has no columns but those that it gives with each."""
    if reading.column is not None:
        raise AlignProError(
            f"prompt_column {reading.column}: dataset {name} has prompts and no columns; leave it out"
        )
    found = []
    for x in read(seed=seed):
        has = columns_of(x)
        if absent := [column for column in reading.keep if column not in has]:
            raise AlignProError(
                f"dataset {name}: has no column {absent[0]!r}, which the reward asks for; choose a data set "
                "with that column, or another reward"
            )
        x = reading.made(str(x), context_of(x), {column: has[column] for column in reading.kept(has, ())})
        if wanted(x):
            found.append(x)
    return found


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
    source = source_of(name)
    if not isinstance(source, Source) or source.grades is None:
        named = [n for n, row in DATASETS.items() if isinstance(row, Source) and row.grades]
        raise AlignProError(f"dataset {name}: it has no preference pairs; choose from {', '.join(named)}")
    groups: dict[str | int, tuple[str, Split, list[tuple[float, str]]]] = {}
    for number, prompt, row in _rows(name, source, Reading(source.prompt), source.answers, folder, {}):
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
    return sorted(found, key=lambda pair: rank_of(identity(pair.prompt), seed))


def _rows(
    name: str,
    source: Source,
    reading: Reading,
    columns: tuple[str, ...],
    folder: str | Path | None,
    used: dict[str, None],
) -> Iterator[tuple[int, str, Row]]:
    """Read every row that has a prompt: its number, the prompt, and the named columns.

    `used` gets the columns of the prompt, as they are to be shown.
    """
    try:
        import datasets as library
    except ModuleNotFoundError:
        missing = f"dataset {name}: the package datasets is missing; run pip install 'alignpro[llm]'"
        raise AlignProError(missing) from None
    packages.note(f"reading {source.repository} ({source.licence}) from {folder or 'the hub or its cache'}")
    folder = None if folder is None else real(Path(folder).expanduser())
    if folder is not None and source.file:
        for path in sorted(folder.glob(source.file)):
            _check_inside([str(path)], folder)
            yield from ((i, x, {}) for i, x in enumerate(own.file_prompts(path, reading, used), 1))
            return
        if not source.hub:
            raise AlignProError(f"data_folder {folder}: no {source.file} in it; {_elsewhere(name, source)}")
    try:
        if folder is None:
            loaded = library.load_dataset(source.repository, source.config, revision=source.revision)
        else:  # streamed, since a copy in the library's cache would help nobody
            builder = library.load_dataset_builder(str(folder), source.config)
            for files in (builder.config.data_files or {}).values():
                _check_inside(files, folder)
            loaded = builder.as_streaming_dataset()
        # Files without their card have the splits that the library reads off their names.
        parts = [loaded[split] for split in source.splits if split in loaded] or list(loaded.values())
        number = 0
        for part in parts:
            has = part.column_names or list(next(iter(part), {}))
            chosen = reading.parts(has, f"dataset {name}")
            if absent := [column for column in columns if column not in has]:
                raise _other_schema(name, f"no column {absent[0]!r} among {', '.join(has)}")
            used["+".join(chosen)] = None
            needed = list(dict.fromkeys((*chosen, *reading.kept(has, chosen), *columns)))
            for batch in part.select_columns(needed).iter(batch_size=256):
                for values in zip(*(batch[column] for column in needed), strict=True):
                    number += 1
                    row = dict(zip(needed, values, strict=True))
                    try:
                        prompt = reading.prompt(row, chosen)
                    except AlignProError as error:
                        raise _other_schema(name, f"row {number}: {error}") from None
                    if prompt:
                        yield number, prompt, row
    except AlignProError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx and pyarrow, without a common class
        raise _refused(name, source, folder, error) from error


def _check_inside(files: Iterable[str], folder: Path) -> None:
    """Refuse files that lie outside a folder: its card, or a link, may name any of this or other machines.

    A snapshot in the hub's cache is of links to files beside it.
    """
    home = folder.parents[1] if folder.parent.name == "snapshots" else folder
    for file in map(str, files):
        if "://" in file or home not in real(file).parents:
            raise AlignProError(
                f"data_folder {folder}: its card, or a link in it, names {file}, which is outside; put that "
                "file there, or name it with --prompts-file"
            )


def _elsewhere(name: str, source: Source) -> str:
    """Say where to get a data set that is on no hub."""
    where = f"of {source.repository} in a folder, and give --data-folder DIR"
    return f"dataset {name}: is on no hub; put {source.file} {where}"


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
    if configs := re.search(r"(?:available configs|Available): (\[[^\]]*\])", str(error)):
        listed = re.sub(r"[\[\]']", "", configs[1])
        what = (
            "has several configurations" if source.config is None else f"has no configuration {source.config}"
        )
        return AlignProError(f"dataset {name}: {what}; name one as {place}:CONFIG, of {listed}")
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
    here = "" if name in DATASETS else "no file or folder here has that name, and "
    return AlignProError(f"dataset {name}: {here}{why} {elsewhere}")
