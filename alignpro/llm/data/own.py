"""Reads a user's own prompts, from text, JSON, JSON lines, CSV or Parquet."""

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data.public import Row


def read_prompts(path: str | Path, column: str | None = None) -> list[str]:
    """Prompts from a file: one column of .jsonl, .json, .csv, .tsv or .parquet, else one prompt per line.

    Equal prompts count once, and their order is kept. A file is taken whole: what it is for is its owner's
    to say, and `data.split_of` splits it as everything else.

    Args:
        column: that of the prompts, "prompt" by default; a text file has none.

    Raises:
        AlignProError: the file cannot be read or holds no prompt; a row is damaged, lacks the column or has
            no text there, by its number.
    """
    path = Path(path).expanduser()
    read = FORMATS.get(path.suffix.lower())
    if read is None and column is not None:
        raise AlignProError(
            f"prompt_column {column}: {path.name} is read as text, without columns; leave it out, or give a "
            f"file in {', '.join(FORMATS)}"
        )
    kind = "text" if read is None else path.suffix[1:].upper()
    try:
        if read is None:
            found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        else:
            name = column or "prompt"
            found = [_text(path, where, row, name) for where, row in read(path, name)]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise AlignProError(f"prompts_file {path}: cannot read it ({reason}); name a {kind} file") from None
    kept = [text for text in dict.fromkeys(found) if text]
    if not kept:
        each = "one on each line" if read is None else "one in each row"
        raise AlignProError(f"prompts_file {path}: holds no prompts; put {each}")
    return kept


def _text(path: Path, where: str, row: Row, column: str) -> str:
    if column not in row:
        has = ", ".join(str(name) for name in row) or "none"
        raise AlignProError(
            f"{path.name}, {where}: no column {column!r}; name one with --prompt-column (it has {has})"
        )
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise AlignProError(f"{path.name}, {where}: no text in column {column!r}; mend or remove the row")
    return text.strip()


def _jsonl(path: Path, _column: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        yield f"line {number}", _object(path, f"line {number}", said)


def _json(path: Path, _column: str) -> Iterator[tuple[str, Row]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AlignProError(f"prompts_file {path}: no JSON ({error}); mend it, or use JSONL") from None
    if not isinstance(rows, list):
        raise AlignProError(f"prompts_file {path}: no JSON list of objects; make it one, or use JSONL")
    for number, row in enumerate(rows, 1):
        yield f"item {number}", _object(path, f"item {number}", row)


def _object(path: Path, where: str, said: Any) -> Row:
    if not isinstance(said, dict):
        raise AlignProError(f"{path.name}, {where}: is no JSON object; mend or remove it")
    return said


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
