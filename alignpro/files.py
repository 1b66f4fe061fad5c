"""Writing files so that an interruption or a bad path never costs what is already there."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from alignpro.errors import AlignProError


def cache_folder() -> Path:
    """The cache: `ALIGNPRO_CACHE`, else `alignpro` under `XDG_CACHE_HOME`, else `~/.cache/alignpro`."""
    if chosen := os.environ.get("ALIGNPRO_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alignpro"


_PART = ".part"
_LEFT = re.compile(r"\..+\.[a-z0-9_]{8}\.part")


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of `atomic_write` in a folder, in which nobody writes now."""
    for path in folder.glob(f".*{_PART}"):
        if _LEFT.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` and move it over `path` only once the block succeeds.

    Args:
        private: whether it holds answers, which are for this user alone; one that is there keeps its mode.

    Raises AlignProError where the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(_PART, f".{path.name}.", path.parent)
    except OSError as error:
        raise AlignProError(f"cannot write {path}: {error.strerror}; choose another path") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
        if private:
            mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise AlignProError(
            f"cannot write {path}: {why(error, 'free space or choose another path')}"
        ) from error


def why(error: OSError, remedy: str) -> str:
    """Say why a file could not be written, and what helps: `remedy`, unless its folder has gone."""
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return "its folder was removed meanwhile; run again, and leave it in place"
    return f"{error.strerror}; {remedy}"


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: str | os.PathLike[str]) -> None:
    """Bring a file, or the names in a folder, to the disk, where the system can: a power cut keeps them."""
    with contextlib.suppress(OSError):  # Windows opens no folder
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


Listed = dict[str, dict[str, Any]]
"""Size in `bytes` and `sha256` of files, by their paths in a folder."""


def listed(folder: Path, names: Iterable[str] | None = None) -> Listed:
    """Sizes and hashes of files in a folder: of those named, or of all plain ones in it and below it."""
    if names is None:
        plain = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
        names = [path.relative_to(folder).as_posix() for path in plain]
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names
    }


def flaw(folder: Path, files: Mapping[str, Any]) -> str | None:
    """In what a folder differs from a list of its files, told of the first that does; None where it does not.

    Files that are not listed are left alone.
    """
    if not isinstance(files, Mapping):
        return f"the list of files of {folder} is damaged"
    for name, record in files.items():
        path = folder / name
        if not isinstance(record, Mapping) or not {"bytes", "sha256"} <= record.keys():
            return f"the list of files of {folder} is damaged"
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != record["bytes"]:
            return f"{path} has {size} bytes, expected {record['bytes']}"
        if (got := sha256(path)) != record["sha256"]:
            return f"{path} has sha256 {got}, expected {record['sha256']}"
    return None


def make_private(path: str | os.PathLike[str]) -> None:
    """Make an empty file for this user alone, to be appended to; one that is there stays as it is."""
    with contextlib.suppress(OSError):  # whoever opens it is told
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def write_text(path: str | os.PathLike[str], text: str, *, private: bool = False) -> None:
    """Write `text` atomically (see `atomic_write`), as `encoded` has it."""
    with atomic_write(path, private=private) as file:
        file.write(encoded(text))


def encoded(text: str) -> bytes:
    """`text` as UTF-8; half a character (a lone surrogate) as JSON's escape, such as \\ud800."""
    return text.encode("utf-8", "backslashreplace")


def write_json(path: str | os.PathLike[str], value: Any, *, private: bool = False) -> None:
    """`value` as strict, indented JSON, atomically. Raises ValueError on NaN or infinity."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text, private=private)


_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # where half a character may be: no other escape begins so
MOST_DIGITS = 308
"""Digits of a whole number that fits a float."""


_DEEPEST = 100
"""Levels of lists and objects within one another. What Python can read deeper, it cannot always write."""


def _deeper(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        within = (each.values() if isinstance(each, dict) else each for each in level)
        level = [each for some in within for each in some if isinstance(each, dict | list)]
    return bool(level)


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits")
    return int(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"a name is given twice in one object: {twice[:80]!r}")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return number


_DECODER = json.JSONDecoder(parse_int=_whole)
_ONCE = json.JSONDecoder(object_pairs_hook=_once, parse_int=_whole)
_STRICT = json.JSONDecoder(
    object_pairs_hook=_once, parse_int=_whole, parse_float=_finite, parse_constant=_finite
)


def parse_json(text: str | bytes, *, strict: bool = False, once: bool = False) -> Any:
    """The value of JSON text; of bytes as UTF-8, a mark of that before it left out.

    Args:
        once: refuse a name that is twice in one object; otherwise the last counts, and reading is
            a third faster.
        strict: refuse that, NaN and infinities.

    Raises:
        ValueError: it is none, is nested too deeply, or has what nothing could go on with: a whole number
            beyond floats, or half a character (a lone surrogate), which no UTF-8 can hold.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        value = (_STRICT if strict else _ONCE if once else _DECODER).decode(text)
        if text.count("[") + text.count("{") > _DEEPEST and _deeper(value):
            raise RecursionError
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None


def read_json(path: str | os.PathLike[str], kind: type = object) -> Any:
    """The JSON value in `path`, of that type. Raises AlignProError if it is missing, damaged or another."""
    try:
        value = parse_json(Path(path).read_bytes(), strict=True)
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except (OSError, ValueError) as error:
        raise AlignProError(f"{path}: missing or damaged; remove it or choose another folder") from error


def read_json_lines(path: str | os.PathLike[str], kind: type = object) -> list[Any]:
    """One JSON value of that type for each line of `path`. Raises AlignProError if it is missing, or names
    the bad line.

    Only a newline ends a line: U+2028 and its kind are text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AlignProError(f"{path}: missing or damaged; remove it or choose another folder") from error
    values = []
    for i, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            values.append(parse_json(line))
            if not isinstance(values[-1], kind):
                raise ValueError
        except ValueError as error:
            remedy = "remove that line or choose another file"
            raise AlignProError(f"{path}: line {i} is no JSON; {remedy}") from error
    return values


def byte_lines(path: str | os.PathLike[str]) -> list[bytes]:
    """The lines of a file, with their ends, as they lie there; none where there is no file.

    Raises AlignProError where it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.readlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise AlignProError(f"cannot read {path}: {error.strerror}; remove it or choose another") from None


def real(path: str | os.PathLike[str]) -> Path:
    """The path without links, as `Path.resolve` gives it, and of a loop of links, which stays."""
    return Path(os.path.realpath(path))


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
