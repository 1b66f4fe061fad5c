"""Writing files so that an interruption or a bad path never costs what is already there."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from alignpro.errors import AlignProError


def cache_folder() -> Path:
    """The cache: `ALIGNPRO_CACHE`, else `alignpro` under `XDG_CACHE_HOME`, else `~/.cache/alignpro`."""
    if chosen := os.environ.get("ALIGNPRO_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alignpro"


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and move it over `path` only once the block succeeds.

    Raises AlignProError where the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise AlignProError(f"cannot write {path}: {error.strerror}; choose another path") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        remedy = "free space or choose another path"
        raise AlignProError(f"cannot write {path}: {error.strerror}; {remedy}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """`text` as UTF-8, atomically (see `atomic_write`)."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`value` as strict, indented JSON, atomically. Raises ValueError on NaN or infinity."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value in `path`. Raises AlignProError if it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AlignProError(f"{path}: missing or damaged; remove it or choose another folder") from error


def read_json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """One JSON value for each line of `path`. Raises AlignProError if it is missing, or names the bad line.

    Only a newline ends a line: U+2028 and its kind are text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AlignProError(f"{path}: missing or damaged; remove it or choose another folder") from error
    values = []
    for i, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            remedy = "remove that line or choose another file"
            raise AlignProError(f"{path}: line {i} is no JSON; {remedy}") from error
    return values


def writable_folder(path: str | os.PathLike[str], field: str = "--out") -> Path:
    """Create `path` if need be. Raises AlignProError, before any long work, where no file can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        why = "a file is in the way" if in_the_way else error.strerror
        remedy = "name a folder you can write to"
        raise AlignProError(f"{field} {folder}: cannot write there ({why}); {remedy}") from error
    return folder
