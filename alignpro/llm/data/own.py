"""Prompts, chats and pairs in files of the user's own: text, JSON, JSON lines, CSV or Parquet."""

import contextlib
import csv
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import parse_json
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.rows import Reading, Row, conversation, read_rows
from alignpro.llm.data.split import split_of
from alignpro.llm.models import packages
from alignpro.llm.models.prompt import from_json


@dataclass(frozen=True)
class Rewrite:
    """A user's prompt x and the prompt x′ to learn to ask in its place."""

    prompt: str
    rewrite: str


def read_prompts(path: str | Path, column: str | None = None, reading: Reading | None = None) -> list[str]:
    """Read prompts from one column of a file in `FORMATS`, else one from each line of a text.

    Equal prompts count once, and their order is kept. Only a newline ends a line. The column may hold
    conversations: their last user's turns are the prompts, which keep what was said before
    (`alignpro.llm.models.prompt.Prompt`).

    Args:
        column: name of the column; see `Reading.column`. A text file has none.
        reading: all of it: the column, a system message, and columns to keep.

    Raises:
        AlignProError: no prompt can be read, or a row is damaged or has no text there, by its number.
    """
    path = Path(path).expanduser()
    reading, used = reading or Reading(column), dict[str, None]()
    found = list(dict.fromkeys(file_prompts(path, reading, used)))
    note(len(found), used, path.name)
    return found


def note(count: int, used: dict[str, None], name: str) -> None:
    """Say what was read as prompts, from which columns (none of a text) of the data of that name."""
    where = f"column {', '.join(used)}" if used else "the lines"
    packages.note(f"{count} prompts from {where} of {name}")


def file_prompts(path: Path, reading: Reading, used: dict[str, None]) -> list[str]:
    """The prompts of a file, repeats included; see `read_prompts` and, for `used`, `read_rows`."""
    kind = path.suffix.lower()
    read = FORMATS.get(kind)
    if kind in UNREAD:
        raise AlignProError(
            f"prompts_file {path}: {kind} files cannot be read; save it as one of {', '.join(FORMATS)}"
        )
    if read is None and (asked := reading.keep or (reading.column and [reading.column])):
        field = "reward" if reading.keep else "prompt_column"
        raise AlignProError(
            f"{field} {', '.join(asked)}: {path.name} is read as text, without columns; leave it out, or "
            f"give a file in {', '.join(FORMATS)}"
        )
    with _reading("prompts_file", path, "text" if read is None else kind[1:].upper()):
        if read is None:
            found = [reading.made(line.strip()) for _, line in _lines(path)]
        else:
            found = list(read_rows(read(path, reading), reading, path.name, used))
    if not found:
        each = "one on each line" if read is None else "one in each row"
        raise AlignProError(f"prompts_file {path}: holds no prompts; put {each}")
    return found


def folder_prompts(folder: Path, reading: Reading, used: dict[str, None]) -> Iterator[str]:
    """The prompts of all files in `FORMATS` in a folder and those within it, in the order of their names."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in FORMATS
        and path.is_file()
        and path.name not in _METADATA
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise AlignProError(f"dataset {folder}: holds no file in {', '.join(FORMATS)}; put one there")
    for path in files:
        yield from file_prompts(path, reading, used)


def all_rows(path: Path, option: str) -> list[tuple[str, Row]]:
    """Read the rows of a file with all they hold, each after the words that name it; errors name `option`."""
    read = {kind: found for kind, found in FORMATS.items() if kind != ".parquet"}.get(path.suffix.lower())
    if read is None:
        raise AlignProError(f"{option} {path}: give a file in .jsonl, .json, .csv or .tsv")
    with _reading(option, path, path.suffix[1:].upper()):
        return list(read(path, Reading()))


def read_pairs(path: str | Path) -> list[PreferencePair]:
    """Read preference pairs from JSON lines with the strings "prompt", "chosen" and "rejected".

    Raises:
        AlignProError: no pair can be read, or a line is none, by its number.
    """
    path = Path(path).expanduser()
    pairs = []
    with _reading("pairs", path, "JSONL"):
        for number, line in _lines(path):
            row = _parsed(line)
            said = [row.get(x) for x in ("prompt", "chosen", "rejected")] if isinstance(row, dict) else []
            texts = [text for text in said if isinstance(text, str) and text.strip()]
            if len(texts) < 3:
                raise AlignProError(
                    f"{path.name}, line {number}: need a JSON object with the non-empty strings "
                    "prompt, chosen and rejected"
                )
            prompt, chosen, rejected = texts
            if chosen == rejected:
                raise AlignProError(f"{path.name}, line {number}: chosen equals rejected; remove the line")
            pairs.append(PreferencePair(prompt, chosen, rejected, path.stem, split_of(prompt)))
    if not pairs:
        raise AlignProError(f"pairs {path}: it is empty; give JSON lines with prompt, chosen and rejected")
    return pairs


def read_rewrites(
    path: str | Path, *, prompt: str | None = None, rewrite: str | None = None
) -> list[Rewrite]:
    """Read pairs from JSON lines, or from one JSON list, of objects with a prompt and its rewrite.

    Args:
        prompt: name of the prompt's field, which may hold a conversation. None: as in `Reading.column`, or
            `x` (with its `context`) as the verbs write it.
        rewrite: name of the rewrite's field. None: `rewrite`, or `optimized_prompt` as in BPO's data.

    Raises:
        AlignProError: the file cannot be read, has no pair, or one that lacks a field, by its number.
    """
    path = Path(path).expanduser()
    pairs = []
    with _reading("rewrites", path, "JSONL"):
        listed = next((line for _, line in _lines(path)), "").lstrip().startswith("[")
        reading, parts = Reading(prompt), None
        for where, row in (_json if listed else _jsonl)(path, reading):
            if rewrite is None:
                rewrite = next((name for name in ("rewrite", "optimized_prompt") if name in row), "rewrite")
            try:
                if prompt is None and "prompt" not in row and isinstance(row.get("x"), str):
                    x = from_json({"text": row["x"].strip(), "context": row.get("context") or ()})
                else:
                    parts = parts or reading.parts([*row], "rewrites")
                    x = reading.prompt(row, parts)
                said = row.get(rewrite)
                if not x or not isinstance(said, str) or not said.strip():
                    raise AlignProError(
                        f"field {rewrite if x else '+'.join(parts or ('x',))!r} is missing or no text"
                    )
            except AlignProError as error:
                raise AlignProError(
                    f"{path.name}, {where}: {error}; mend it, or name the right field (it has "
                    f"{', '.join(map(repr, row)) or 'none'})"
                ) from None
            pairs.append(Rewrite(x, said.strip()))
    if not pairs:
        raise AlignProError(f"rewrites {path}: it is empty; give a JSON object for each pair")
    return pairs


class _NoList(Exception):
    pass


@contextlib.contextmanager
def _reading(field: str, path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except AlignProError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise AlignProError(f"{field} {path}: cannot read it ({reason}); name a {kind} file") from None
    except (ValueError, _NoList) as error:
        raise AlignProError(
            f"{field} {path}: no JSON list of objects ({error}); mend it, or use JSONL"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    # `str.splitlines` would end a line at U+2028, U+0085 and their kind too, which are text.
    for number, line in enumerate(path.read_bytes().decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            yield number, line


def _parsed(text: str) -> Any:
    try:
        return parse_json(text, once=True)
    except ValueError as error:
        return error


def _objects(path: Path, said: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Row]]:
    for where, row in said:
        if not isinstance(row, dict):
            why = f" ({row})" if isinstance(row, ValueError) else ""
            raise AlignProError(f"{path.name}, {where}: is no JSON object{why}; mend or remove it")
        yield where, row


def _jsonl(path: Path, _: Reading) -> Iterator[tuple[str, Row]]:
    return _objects(path, ((f"line {number}", _parsed(line)) for number, line in _lines(path)))


def _json(path: Path, _: Reading) -> Iterator[tuple[str, Row]]:
    rows = parse_json(path.read_bytes(), once=True)
    if conversation(rows) is not None:  # a file with one chat
        rows = [{"messages": rows}]
    elif isinstance(rows, dict) and any(conversation(value) is not None for value in rows.values()):
        rows = [rows]
    if not isinstance(rows, list):
        raise _NoList(f"it is of type {type(rows).__name__}")
    return _objects(path, ((f"item {number}", row) for number, row in enumerate(rows, 1)))


def _csv(path: Path, _: Reading) -> Iterator[tuple[str, Row]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for row in rows:
                if None in row:
                    raise AlignProError(
                        f"{path.name}, line {rows.line_num}: more fields than the header names; put texts "
                        "with a separator in quotes"
                    )
                yield f"line {rows.line_num}", row
        except csv.Error as error:
            raise AlignProError(
                f"{path.name}, line {rows.reader.line_num}: cannot be read ({error}); mend it, or use JSONL"
            ) from None


def _parquet(path: Path, reading: Reading) -> Iterator[tuple[str, Row]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            parts = reading.parts(file.schema_arrow.names, path.name)
            only = list(dict.fromkeys((*parts, *reading.kept(file.schema_arrow.names, parts))))
            rows = (row for batch in file.iter_batches(columns=only) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except arrow.ArrowInvalid as error:
        raise AlignProError(
            f"prompts_file {path}: is no Parquet file ({' '.join(str(error).split())}); write it again"
        ) from None


FORMATS: dict[str, Callable[[Path, Reading], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
"""Readers of rows by a file's suffix: functions of a path and of what is wanted of a row."""

UNREAD = frozenset(
    {
        ".xlsx",
        ".xls",
        ".xlsm",
        ".ods",
        ".arrow",
        ".feather",
        ".avro",
        ".orc",
        ".db",
        ".sqlite",
        ".pkl",
        ".pickle",
    }
    | {".npy", ".npz", ".pt", ".safetensors", ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".7z"}
    | {".pdf", ".docx", ".doc", ".odt", ".rtf", ".html", ".xml", ".yaml", ".yml", ".toml"}
)
"""Suffixes of files that are no text with a prompt on each line, and are refused."""
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
