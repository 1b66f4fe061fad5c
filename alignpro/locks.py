"""Leases between processes that share a folder, whether or not its file system can lock.

A lease is a numbered file: whoever creates the next number has it, and creating a file that must not exist is
atomic on every file system that machines share. Its holder touches it every `BEAT_S` seconds, and locks it
where the file system can. It passes on once it was given back, or its holder is known to be dead: its lock
was dropped on the machine that it was taken on, or it has not been touched for `STALE_S` seconds. Ages are
told by the clock of the file server alone.
"""

import contextlib
import functools
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from alignpro.files import parse_json, real

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEAT_S = 10.0
"""Seconds between two signs of life."""
STALE_S = 120.0
"""Seconds without a sign of life after which a holder on another machine, or where nothing locks, counts as
dead. Longer than any stall of the file system."""
UNSAID_S = 30.0
"""Seconds without a sign of life after which a holder whose file says nothing counts as dead: it died as it
wrote that, or the file is damaged."""
POLL_S = 0.2
"""Seconds between two looks at a lease that is waited for."""
SHARED = re.compile(
    "nfs|lustre|gpfs|beegfs|ceph|cifs|smb|afs|glusterfs|9p|virtiofs|pvfs|orangefs|panfs|weka|gfs|ocfs|fuse"
)
"""Beginnings of the names of file systems that several machines may have mounted."""


@functools.cache
def _machine() -> str:
    """The kernel that a lock on a file of one machine is kept by: it changes when that is booted."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


@dataclass
class Lease:
    """A lease of this process."""

    path: Path
    number: int
    """How often it was taken, this time included."""
    deaths: int
    """How many of those who had it died, or were killed, before they gave it back."""

    def lost(self) -> bool:
        """Whether another process has it, after this one gave no sign of life for long."""
        name = self.path.name[1:].rpartition("-")[0]
        return taken(self.path.parent, name) > self.number


@contextlib.contextmanager
def lease(folder: Path, name: str, *, about: str = "", leave: bool = True) -> Iterator[Lease | None]:
    """Hold the lease `name` of a folder until the end of the block; None where another process has it.

    Args:
        about: what `holder` tells beside the process.
        leave: whether the lease's file stays after the block, and with it how often it was taken.

    Raises:
        OSError: nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (got := _take(folder, name, about)) is None:
        yield None
        return
    file, held = got
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(file.fileno() if os.utime in os.supports_fd else held.path)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        yield held
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(OSError), file:
            if leave:
                _write(file, {"free": True, "deaths": held.deaths})
            elif os.fstat(file.fileno()).st_ino == held.path.stat().st_ino:
                held.path.unlink()  # before the lock is dropped: whoever gets that sees that the file is gone


@contextlib.contextmanager
def waited(folder: Path, name: str, *, leave: bool = True) -> Iterator[Lease]:
    """Hold the lease `name` of a folder, as soon as nobody else does. See `lease`."""
    while True:
        with lease(folder, name, leave=leave) as held:
            if held is not None:
                yield held
                return
        time.sleep(POLL_S)


def holder(folder: Path, name: str) -> dict[str, Any] | None:
    """Who has the lease now: `host`, `process`, `since` (a Unix time of its clock), `about` and `number`; or
    None."""
    if not (number := taken(folder, name)):
        return None
    path = _path(folder, name, number)
    free, said = _look(path)
    return None if free else {**said, "number": number}


def taken(folder: Path, name: str) -> int:
    """How often the lease was taken."""
    return max(_numbers(folder, name), default=0)


def record_locks(folder: Path) -> bool:
    """Whether the file system locks records of files: SQLite needs that."""
    if fcntl is None:
        return True  # Windows has locks of its own kind
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        for _ in range(3):  # a lock server may be out of locks for a moment
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                time.sleep(0.05)
    return False


def several_machines(folder: Path, mounts: str = "/proc/self/mountinfo") -> bool:
    """Whether other machines may have this folder mounted too, by the kind of its file system. False where
    the system does not tell (macOS, Windows)."""
    place, found, kind = real(folder), -1, ""
    try:
        lines = Path(mounts).read_text(errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        mount, _, after = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        if (place == point or point in place.parents) and len(point.parts) >= found:
            found, kind = len(point.parts), after.split()[0]
    return SHARED.match(kind) is not None


def age(path: Path) -> float:
    """Seconds since `path` was touched, by the clock of the server that has it."""
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime


def _path(folder: Path, name: str, number: int) -> Path:
    return folder / f".{name}-{number}"


def _numbers(folder: Path, name: str) -> list[int]:
    start = f".{name}-"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [int(n[len(start) :]) for n in names if n.startswith(start) and n[len(start) :].isdigit()]


def _take(folder: Path, name: str, about: str) -> tuple[IO[bytes], Lease] | None:
    seen = _numbers(folder, name)
    last = max(seen, default=0)
    free, before = _look(_path(folder, name, last)) if last else (True, {"free": True})
    if not free:
        return None
    path = _path(folder, name, last + 1)
    try:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), "r+b", buffering=0)
    except FileExistsError:  # by another, a moment ago
        return None
    # Whoever looks meanwhile finds it empty, and does not take it for a dead one's.
    _lock(file, exclusive=True)
    numbers = _numbers(folder, name)
    if set(numbers) - {*seen, last + 1}:
        # The listing was old: another took a later number, or gave back the last and a third began anew.
        with file, contextlib.suppress(OSError):
            path.unlink()
        return None
    deaths = before.get("deaths", 0) + (not before.get("free", False))
    said = {"machine": _machine(), "host": socket.gethostname(), "process": os.getpid(), "about": about}
    _write(file, {**said, "since": time.time(), "deaths": deaths})
    for number in numbers:
        if number <= last:
            with contextlib.suppress(OSError):
                _path(folder, name, number).unlink()
    return file, Lease(path, last + 1, deaths)


def _write(file: IO[bytes], said: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(said).encode())


def _look(path: Path) -> tuple[bool, dict[str, Any]]:
    """Whether a lease is to be had, given back or its holder dead, and what its file says."""
    said: dict[str, Any] = {}
    try:
        with open(path, "rb") as file:  # opening asks a server for the newest
            unlocked = _lock(file, exclusive=False)
            text = file.read()
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # another's by now
                return False, {}
        said = _said(text)
        # The machine that a lock was taken on always knows of it; others need not.
        here = said.get("machine") == _machine()
        if unlocked is False or said.get("free") or (unlocked and here):
            return unlocked is not False, said
        return age(path) > (STALE_S if said else UNSAID_S), said
    except FileNotFoundError:  # there is a later one
        return False, said


def _said(text: bytes) -> dict[str, Any]:
    """Read a lease's file: nothing where it is empty, damaged or half written."""
    try:
        said = parse_json(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _lock(file: IO[bytes], exclusive: bool) -> bool | None:
    """Lock an open file, waiting where it is to be `exclusive`. Whether it is ours now; None where the file
    system does not lock."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: no locks here
        return None
