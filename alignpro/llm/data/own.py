"""Prompts and pairs in files of the user's own: text, JSON, JSON lines, CSV or Parquet."""

import contextlib
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.split import split_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rewrite:
    """A user's prompt x and the prompt x′ to learn to ask in its place."""

    prompt: str
    rewrite: str


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """Read prompts from one column of a .jsonl, .json, .csv, .tsv or .parquet file, else one from each line.

    Equal prompts count once, and their order is kept. Only a newline ends a line.

    Args:
        column: name of the column, "prompt" if left out; a text file has none.

    Raises:
        AlignProError: no prompt can be read, or a row is damaged or has no text there, by its number.
    """
    path = Path(path).expanduser()
    read = FORMATS.get(path.suffix.lower())
    if read is None and column is not None:
        raise AlignProError(
            f"prompt_column {column}: {path.name} is read as text, without columns; leave it out, or give a "
            f"file in {', '.join(FORMATS)}"
        )
    with _reading("prompts_file", path, "text" if read is None else path.suffix[1:].upper()):
        if read is None:
            found = [line.strip() for _, line in _lines(path)]
        else:
            name = column or "prompt"
            found = [_text(path, where, row, name) for where, row in read(path, name)]
    if not found:
        each = "one on each line" if read is None else "one in each row"
        raise AlignProError(f"prompts_file {path}: holds no prompts; put {each}")
    return list(dict.fromkeys(found))


def all_rows(path: Path, option: str) -> list[tuple[str, Row]]:
    """Read the rows of a file with all they hold, each after the words that name it; errors name `option`."""
    read = {kind: found for kind, found in FORMATS.items() if kind != ".parquet"}.get(path.suffix.lower())
    if read is None:
        raise AlignProError(f"{option} {path}: give a file in .jsonl, .json, .csv or .tsv")
    with _reading(option, path, path.suffix[1:].upper()):
        return list(read(path, ""))


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


def read_rewrites(path: str | Path, *, prompt: str = "prompt", rewrite: str = "rewrite") -> list[Rewrite]:
    """Read pairs from JSON lines, or from one JSON list, of objects with two non-empty strings.

    Args:
        prompt, rewrite: the fields' names; the second is "optimized_prompt" in BPO's data.

    Raises:
        AlignProError: the file cannot be read, has no pair, or one that lacks a field, by its number.
    """
    path = Path(path).expanduser()
    pairs = []
    with _reading("rewrites", path, "JSONL"):
        listed = next((line for _, line in _lines(path)), "").lstrip().startswith("[")
        for where, row in (_json if listed else _jsonl)(path, prompt):
            for name in (prompt, rewrite):
                if not isinstance(row.get(name), str) or not row[name].strip():
                    raise AlignProError(
                        f"{path.name}, {where}: field {name!r} is missing or no text; mend it, or name "
                        f"the right field (it has {', '.join(map(repr, row)) or 'none'})"
                    )
            pairs.append(Rewrite(row[prompt], row[rewrite].strip()))
    if not pairs:
        raise AlignProError(f"rewrites {path}: it is empty; give a JSON object for each pair")
    return pairs


class _NoList(Exception):
    pass


@contextlib.contextmanager
def _reading(field: str, path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise AlignProError(f"{field} {path}: cannot read it ({reason}); name a {kind} file") from None
    except (json.JSONDecodeError, RecursionError, _NoList) as error:
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
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(path: Path, where: str, row: Row, column: str) -> str:
    if column not in row:
        has = ", ".join(map(str, row)) or "none"
        raise AlignProError(
            f"{path.name}, {where}: no column {column!r}; name one with --prompt-column (it has {has})"
        )
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise AlignProError(f"{path.name}, {where}: no text in column {column!r}; mend or remove the row")
    return text.strip()


def _objects(path: Path, said: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Row]]:
    for where, row in said:
        if not isinstance(row, dict):
            raise AlignProError(f"{path.name}, {where}: is no JSON object; mend or remove it")
        yield where, row


def _jsonl(path: Path, _column: str) -> Iterator[tuple[str, Row]]:
    return _objects(path, ((f"line {number}", _parsed(line)) for number, line in _lines(path)))


def _json(path: Path, _column: str) -> Iterator[tuple[str, Row]]:
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(rows, list):
        raise _NoList(f"it is of type {type(rows).__name__}")
    return _objects(path, ((f"item {number}", row) for number, row in enumerate(rows, 1)))


def _csv(path: Path, _column: str) -> Iterator[tuple[str, Row]]:
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


def _parquet(path: Path, column: str) -> Iterator[tuple[str, Row]]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            only = [column] if column in file.schema_arrow.names else None
            rows = (row for batch in file.iter_batches(columns=only) for row in batch.to_pylist())
            yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    except arrow.ArrowInvalid as error:
        raise AlignProError(
            f"prompts_file {path}: is no Parquet file ({' '.join(str(error).split())}); write it again"
        ) from None


FORMATS: dict[str, Callable[[Path, str], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
"""Readers of rows by a file's suffix: functions of a path and the column that is wanted."""
