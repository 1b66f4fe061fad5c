"""The file behind `ledger`: answers and what they cost, in SQLite, for several processes at once.

Every answer is a transaction, together with what was spent on it: a kill loses nothing that was told as kept.
To the disk it goes within a second, and whenever `Store.add` is told to: a power cut loses no more than that.
On a file system that several machines share every answer goes to the disk, since a write-ahead log needs
memory that processes share; where nothing locks records, SQLite locks by a folder beside the file.

SQLite's locks do not survive a fork: a copy of a process would hold none, and could lose what others write.
So whatever forks closes every file first, and each side opens it again when it next uses it.
"""

import json
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from alignpro import locks, typed
from alignpro.errors import AlignProError
from alignpro.files import make_private
from alignpro.llm.targets.http import Meter
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Answer

FILE = "answers.sqlite"
OLD_FILE = "answers.jsonl"
"""Answers as JSON lines, the way they were kept before; read once, where they are found, and left alone."""
BUSY_S = 60.0
"""Seconds that a transaction waits for others."""
_SYNC_S = 1.0
_SPARE_S = 10.0  # beyond a request's deadline, after which the call's process counts as killed
_AT_ONCE = 500  # keys of a query
_VERSION = 2

_COUNTS = ("calls", "retries", "answers", "prompt_tokens", "tokens", "thoughts", "refused", "seconds", "cost")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, line TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS spent (owner TEXT PRIMARY KEY, calls INTEGER NOT NULL, retries INTEGER NOT NULL,
    answers INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, tokens INTEGER NOT NULL,
    thoughts INTEGER NOT NULL, seconds REAL NOT NULL, cost REAL, refused INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS under_way (owner TEXT, process TEXT, tokens INTEGER NOT NULL, until REAL NOT NULL,
    PRIMARY KEY (owner, process));
CREATE TABLE IF NOT EXISTS imported (file TEXT PRIMARY KEY);
"""
_FROM_1 = "ALTER TABLE spent ADD COLUMN refused INTEGER NOT NULL DEFAULT 0"
_ADD = f"""
INSERT INTO spent (owner, {", ".join(_COUNTS)}) VALUES (:owner, {", ".join(f":{name}" for name in _COUNTS)})
ON CONFLICT (owner) DO UPDATE SET {", ".join(f"{name} = {name} + :{name}" for name in _COUNTS[:-1])},
cost = coalesce(cost + :cost, cost, :cost)
"""
_KEEP = "INSERT OR IGNORE INTO answers (key, line) VALUES (?, ?)"


class Store:
    """Answers by key, and spending by owner (the name and revision of a target), in a folder's `FILE`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.damaged = 0
        """Lines of an `OLD_FILE` that say nothing: torn by a kill and written over since, or edited."""
        self._lock = threading.Lock()
        self._process = uuid.uuid4().hex
        self._synced = time.monotonic()
        # Whoever goes on with a file locks it in the way of those who have it.
        by_folder = folder / f"{FILE}-locks-by-folder"
        if not by_folder.exists() and not locks.record_locks(folder):
            by_folder.touch()
        self._folder_lock = folder / f"{FILE}.lock" if by_folder.exists() else None
        self._connection: sqlite3.Connection | None = None
        self._wal = False
        _STORES.add(self)
        make_private(self.path)  # and what SQLite puts beside it is as this is
        with self._lock, self._told():
            version = self._one("PRAGMA user_version")[0]
        if version > _VERSION:
            raise AlignProError(f"{self.path}: was written by a newer alignpro; update this one")
        if version < _VERSION:
            with self._transaction(lasting=True):
                # Another process may have been first.
                version = self._one("PRAGMA user_version")[0]
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                if version == 1:
                    self._db.execute(_FROM_1)
                self._db.execute(f"PRAGMA user_version = {_VERSION}")
        if (old := folder / OLD_FILE).is_file():
            self._import(old)

    @property
    def _db(self) -> sqlite3.Connection:
        """One connection, guarded by the lock: an event loop may run in a thread of its own."""
        if self._connection is None:
            file = Path(os.path.realpath(self.path)).as_uri()
            self._connection = sqlite3.connect(
                file + ("?vfs=unix-dotfile" if self._folder_lock else ""),
                uri=True,
                timeout=BUSY_S,
                isolation_level=None,
                check_same_thread=False,
            )
            self._close = weakref.finalize(self, self._connection.close)
            self._wal = self._write_ahead(self.path.parent)
        return self._connection

    def before_fork(self) -> None:
        """Wait for a transaction under way, and close the file until `after_fork`."""
        self._lock.acquire()
        try:
            if self._connection is not None:
                self._connection = None
                self._close()
        except BaseException:  # Python tells of an interrupt here, and forks all the same
            self._lock.release()
            raise

    def after_fork(self, copy: bool) -> None:
        """In the process that forked, and in its copy, which books its calls as its own."""
        if copy:
            self._process = uuid.uuid4().hex
        self._lock.release()

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """The answers on file for these keys (`ledger.cache_key`)."""
        wanted, found = [bytes.fromhex(key) for key in keys], {}
        with self._lock, self._told():
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                query = f"SELECT key, line FROM answers WHERE key IN ({', '.join('?' * len(some))})"
                for key, line in self._run(query, some):
                    found[key.hex()] = self._answer(line)
        return found

    def add(
        self,
        owner: str,
        spent: Mapping[str, Any],
        line: Mapping[str, Any] | None = None,
        lasting: bool = False,
    ) -> Answer | None:
        """Add to what was spent, and an answer with it; the answer on file for its key, which is another's
        where another was first. Where the file cannot be written it is as before.

        Args:
            spent: fields of `ledger.Ledger`.
            line: `key`, `answer`, and what else is to be read beside them.
            lasting: to the disk, with all that was added before.
        """
        due = lasting or time.monotonic() - self._synced > _SYNC_S
        with self._transaction(due):
            self._spend(owner, spent)
            if line is not None:
                key = bytes.fromhex(line["key"])
                # ASCII: a lone surrogate from a server could not be written otherwise.
                text = json.dumps(line, separators=(",", ":"))
                if not self._db.execute(_KEEP, (key, text)).rowcount:
                    query = "SELECT line FROM answers WHERE key = ?"
                    return self._answer(self._db.execute(query, (key,)).fetchone()[0])
        return None if line is None else Answer(**line["answer"])

    def spent(self) -> dict[str, dict[str, Any]]:
        """Sums of what was spent, by owner: fields of `ledger.Ledger`."""
        with self._lock, self._told():
            rows = self._run(f"SELECT owner, {', '.join(_COUNTS)} FROM spent").fetchall()
        return {owner: dict(zip(_COUNTS, row, strict=True)) for owner, *row in rows}

    def meter(self, owner: str) -> Meter:
        """One that counts the owner's calls over all processes, and all runs before."""
        return Meter(partial(self._book, owner), partial(self._settle, owner))

    def _book(self, owner: str, settings: EndpointSettings, cost: int, again: bool) -> str | None:
        with self._transaction():
            query = "SELECT calls, prompt_tokens + tokens FROM spent WHERE owner = ?"
            calls, tokens = self._db.execute(query, (owner,)).fetchone() or (0, 0)
            if settings.max_calls is not None and calls >= settings.max_calls:
                return "max_calls"
            if settings.max_tokens is not None:
                # Those of a process that was killed stay: the service may have given what they asked for.
                query = (
                    "SELECT coalesce(sum(tokens), 0), max(until) FROM under_way WHERE owner = ? AND tokens"
                )
                booked, until = self._db.execute(query, (owner,)).fetchone()
                if tokens + booked + cost > settings.max_tokens:
                    return "wait" if booked and until > time.time() else "max_tokens"
            self._spend(owner, {"calls": 1, "retries": int(again)})
            if cost:
                self._db.execute(
                    "INSERT INTO under_way VALUES (?, ?, ?, ?) ON CONFLICT (owner, process) "
                    "DO UPDATE SET tokens = tokens + excluded.tokens, until = excluded.until",
                    (owner, self._process, cost, time.time() + settings.timeout_s + _SPARE_S),
                )
        return None

    def _settle(self, owner: str, cost: int) -> None:
        if cost:
            # What cannot be written now counts as if the process had been killed.
            with suppress(AlignProError), self._transaction():
                self._db.execute(
                    "UPDATE under_way SET tokens = tokens - ? WHERE owner = ? AND process = ?",
                    (cost, owner, self._process),
                )

    def _spend(self, owner: str, spent: Mapping[str, Any]) -> None:
        row = {name: spent.get(name, None if name == "cost" else 0) for name in _COUNTS}
        self._db.execute(_ADD, {"owner": owner, **row})

    def _answer(self, line: str) -> Answer:
        try:
            return read_line(json.loads(line))[2]  # may hold half a character, which `Answer` mends
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise AlignProError(self._damage("one of its answers cannot be read")) from None

    def _import(self, old: Path) -> None:
        """Take over what an earlier version kept, once."""
        with self._transaction(lasting=True):
            if self._db.execute("SELECT 1 FROM imported WHERE file = ?", (OLD_FILE,)).fetchone():
                return
            try:
                with open(old, "rb") as file:
                    for line in file:
                        self._take(line)
            except OSError as error:
                raise AlignProError(f"cannot read {old}: {error.strerror}; check its permissions") from None
            self._db.execute("INSERT INTO imported VALUES (?)", (OLD_FILE,))

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            owner, spent, answer = read_line(row)
            key = b"" if answer is None else bytes.fromhex(row["key"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self.damaged += bool(line.strip())
            return
        self._spend(owner, spent)
        if answer is not None:
            self._db.execute(_KEEP, (key, json.dumps(row, separators=(",", ":"))))

    def _write_ahead(self, folder: Path) -> bool:
        """A write-ahead log where the file system can have one; else a journal that is rolled back."""
        shared = bool(self._folder_lock) or locks.several_machines(folder)
        try:
            (mode,) = self._one(f"PRAGMA journal_mode = {'TRUNCATE' if shared else 'WAL'}")
            self._one("SELECT count(*) FROM sqlite_master")  # a log needs shared memory
            return mode == "wal"
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                self._one("PRAGMA journal_mode = DELETE")
        return False

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        """Begin to read or write. Where a folder locks, one left by a kill amid a transaction is removed."""
        for _ in range(2):
            try:
                return self._db.execute(statement, *values)
            except sqlite3.OperationalError as error:
                if not (self._folder_lock and error.sqlite_errorname.startswith("SQLITE_BUSY")):
                    raise
            with locks.lease(self.path.parent, "unlocking") as mine, suppress(OSError):
                # A second look, as the only one who may remove it: another may have, and a third locked.
                if mine and locks.age(self._folder_lock) > 2 * BUSY_S:
                    self._folder_lock.rmdir()
        return self._db.execute(statement, *values)

    def _one(self, statement: str, *values: Any) -> Any:
        return self._run(statement, *values).fetchone()

    @contextmanager
    def _transaction(self, lasting: bool = False) -> Iterator[None]:
        with self._lock, self._told():
            if self._wal:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if lasting else 'NORMAL'}")
            self._run("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite may have rolled back itself
                    self._db.execute("ROLLBACK")
                raise
            if lasting:
                self._synced = time.monotonic()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in one line that says what helps."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite quotes what is damaged, as it is
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or isinstance(error, ValueError):
                text = self._damage(str(error))
            elif name.startswith("SQLITE_CANTOPEN"):
                text = f"cannot read {self.path}: {error}; check its permissions"
            elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")):
                text = f"{self.path}: another process has it for more than {BUSY_S:g} s; run again after that"
            elif name.startswith("SQLITE_READONLY"):
                text = f"cannot write {self.path}: {error}; check its permissions"
            else:
                text = f"cannot write {self.path}: {error}; free space and run again: what it holds is kept"
            raise AlignProError(text) from None

    def _damage(self, how: str) -> str:
        return (
            f"{self.path}: damaged ({how}); move it away to ask for its answers again, or save them with "
            f"sqlite3 {FILE} .recover"
        )


_STORES: weakref.WeakSet[Store] = weakref.WeakSet()
_CLOSED: list[Store] = []
_FORKING = threading.Lock()


def _before_fork() -> None:
    _FORKING.acquire()  # threads that fork at a time would wait for each other's files
    for store in list(_STORES):
        store.before_fork()
        _CLOSED.append(store)


def _after_fork(copy: bool) -> None:
    while _CLOSED:
        _CLOSED.pop().after_fork(copy)
    _FORKING.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=partial(_after_fork, False),
        after_in_child=partial(_after_fork, True),
    )


def owner_of(name: str, revision: str) -> str:
    """The owner of what one target spends: spending of one owner is counted together."""
    return json.dumps([name, revision])


def read_line(row: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Owner, what was spent and answer (None where there was none) of a line as `Store.add` is given it.
    Raises ValueError, KeyError or TypeError where it is none."""
    spent: dict[str, Any] = {name: typed.made(int, row[name], name) for name in ("calls", "retries")}
    spent["seconds"] = typed.made(float, row["seconds"], "seconds")
    spent["cost"] = typed.made(float, row["cost"], "cost") if "cost" in row else None
    answer = None
    if "answer" in row:
        answer = typed.made(Answer, row["answer"], "answer")
        spent |= {"answers": 1, "prompt_tokens": answer.prompt_tokens, "tokens": answer.tokens}
        spent |= {"thoughts": int(answer.thought), "refused": int(answer.finish == "refused")}
    model, revision = (typed.made(str, row[name], name) for name in ("model", "revision"))
    return owner_of(model, revision), spent, answer
