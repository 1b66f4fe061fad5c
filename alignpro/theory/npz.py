"""Arrays of an .npz file, whose headers are read and checked before anything is inflated."""

import io
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignpro.errors import AlignProError

_REMEDY = "write it with alignpro's Instance.save or numpy.savez"
_DAMAGED = f"is not an .npz file, or is cut short or damaged; {_REMEDY}"


class Header(NamedTuple):
    """The shape and dtype that a stored array declares."""

    shape: tuple[int, ...]
    dtype: np.dtype


def read(
    path: str | os.PathLike[str],
    keys: Sequence[str],
    optional: Sequence[str],
    check: Callable[[Mapping[str, Header]], object],
    content: bytes | None = None,
    most: int | None = None,
) -> dict[str, np.ndarray]:
    """Read the arrays `keys`, and those of `optional` that are there; nothing is unpickled.

    Args:
        path: the file.
        keys: names of arrays that it must hold.
        optional: names of further arrays that it may hold.
        check: raises AlignProError for shapes or dtypes that will not do, before the arrays are inflated.
        content: the file's bytes, where it is not on this disk; `path` only names it then.
        most: bytes that all its arrays may take together once inflated; any number when None.

    Raises:
        AlignProError: no such file, a damaged, pickled or too large one, other keys, or what `check` raises;
            one line that begins with the path.
    """
    try:
        with open(path, "rb") if content is None else io.BytesIO(content) as file:
            if file.read(6) == b"\x93NUMPY":
                raise AlignProError(f"{path}: is a single .npy array, not an .npz; {_REMEDY}")
        with zipfile.ZipFile(Path(path) if content is None else io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
            if most is not None and size > most:
                raise AlignProError(f"{path}: its arrays take {size:,} bytes; keep them to {most:,}")
            members = {name.removesuffix(".npy"): name for name in archive.namelist()}
            _check_keys(path, members, keys, optional)
            headers = {}
            for key, name in members.items():
                headers[key] = _header(archive, name)
                if headers[key].dtype.hasobject:
                    raise AlignProError(
                        f"{path}: {key} holds pickled Python objects, which are never read; "
                        "save plain numeric arrays"
                    )
            try:
                check(headers)
            except AlignProError as error:
                raise AlignProError(f"{path}: {error}") from error
            return {key: _array(archive, name) for key, name in members.items()}
    except AlignProError:
        raise
    except IsADirectoryError as error:
        raise AlignProError(f"{path}: is a folder; name an .npz file") from error
    except FileNotFoundError as error:
        raise AlignProError(f"{path}: no such file; name an .npz file that exists") from error
    except OSError as error:
        raise AlignProError(f"{path}: cannot be read ({error.strerror or error}); {_REMEDY}") from error
    except MemoryError as error:
        raise AlignProError(f"{path}: is too large for this machine's memory; name a smaller one") from error
    except Exception as error:  # a dozen kinds, by what is damaged and how the archive is compressed
        raise AlignProError(f"{path}: {_DAMAGED}") from error


def _check_keys(
    path: str | os.PathLike[str], found: Mapping[str, str], keys: Sequence[str], optional: Sequence[str]
) -> None:
    missing = [key for key in keys if key not in found]
    if missing:
        raise AlignProError(
            f"{path}: lacks the key {missing[0]!r}; an instance has the keys {', '.join(keys)}"
        )
    extra = sorted(set(found) - {*keys, *optional})
    if extra:
        raise AlignProError(
            f"{path}: has the unknown key {extra[0]!r}; keep only {', '.join(keys)} and {', '.join(optional)}"
        )


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    """The header of a member; ValueError where it is none, or declares another size than the member has."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        reader = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        try:
            shape, _, dtype = reader(file)
        except Exception as error:  # NumPy parses it as Python, and passes on whatever that raises
            raise ValueError(f"{name}: malformed header") from error
        content = archive.getinfo(name).file_size - file.tell()
    if min(shape, default=0) < 0 or (not dtype.hasobject and math.prod(shape) * dtype.itemsize != content):
        raise ValueError(f"{name}: its header declares another size than it has")
    return Header(shape, dtype)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)
