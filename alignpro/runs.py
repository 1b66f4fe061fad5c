"""A run and the folder that it owns: who is at work there, which run's it is, and whether it can go on.

`own` holds a folder for as long as a verb, or a function that writes there, is at work; `here` gives what is
held to whatever writes; `Run.begin` compares with what the folder holds, and `claim` makes it the run's.
"""

import contextlib
import functools
import inspect
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alignpro import locks
from alignpro.errors import AlignProError
from alignpro.files import read_json, real, remove_parts, sync, writable_folder, write_json

P = ParamSpec("P")
R = TypeVar("R")

SETTINGS_FILE, DEMO_FILE, TASK_FILE = "settings.json", "run.json", "task.json"
"""Files that say which run a folder is of: all verbs' but those of the two demos."""
LEASE = "run"
"""The lease of whoever writes in a folder (`alignpro.locks`)."""
CONTENTS = "contents"
"""The setting that holds digests of what other settings name: prompts, weights, code."""
RESUMED = ("train", "sft", "reward-model", "demo")
"""Verbs that go on when told to, by --resume; the others do by themselves."""
_SHOWN = ("task", "model", "base", "prompter", "target", "judge", "reward", "arms", "lam", "seed")
_TRIES = 5  # of a lease that nobody holds, while another gives it back


@dataclass
class Run:
    """A run's folder while it is worked in.

    Args:
        verb: the verb, or what else writes there, in words.
        file: the file that says which run the folder is of.
        option: the flag, or argument, that named the folder: it begins what is told.
    """

    folder: Path
    verb: str
    file: str = SETTINGS_FILE
    option: str = "--out"
    record: dict[str, Any] | None = None
    """Settings of the run, as JSON values."""
    contents: dict[str, Callable[[], str | None]] = field(default_factory=dict)
    """Digests of what the settings name, each computed when it is needed; None where there is none yet, as of
    a model that was not downloaded."""
    claimed: bool = False
    """Whether the folder is this run's by now."""

    def __post_init__(self) -> None:
        self.home = real(self.folder)

    def before(self) -> dict[str, Any] | None:
        """The settings of the run that the folder holds; None where it holds none.

        Raises:
            AlignProError: it is a run of another verb, or its settings are damaged.
        """
        for file in (SETTINGS_FILE, DEMO_FILE, TASK_FILE):
            if (self.folder / file).exists():
                found = read_json(self.folder / file, dict)
                if not isinstance(found.get(CONTENTS) or {}, dict):
                    raise AlignProError(
                        f"{self.option} {self.folder}: {file} is damaged; choose another folder"
                    )
                if file != self.file or found.get("verb", self.verb) != self.verb:
                    raise AlignProError(
                        f"{self.option} {self.folder}: {self._holds(found, file)}, or choose another folder"
                    )
                return found
        return None

    def check(self, resume: bool | None = None, names: Sequence[str] = ()) -> dict[str, Any] | None:
        """Refuse a folder that this run cannot be in, whatever its settings; else give those that it holds.

        Args:
            resume: whether the run is to go on there; None where it does by itself.
            names: patterns of the files that a run makes: where they are and no settings, they are another's.

        Raises:
            AlignProError: so, in one line.
        """
        at = f"{self.option} {self.folder}"
        if (before := self.before()) is not None:
            if resume is False:
                raise AlignProError(f"{at}: {self._holds(before)}, or choose another folder")
            return before
        for name in names:
            found = sorted(path for path in self.folder.glob(name) if not path.name.startswith(f".{LEASE}-"))
            if name == "*":  # a start that was killed leaves folders with nothing in them
                found = [each for each in found if not each.is_dir() or any(each.iterdir())]
            if found and name == "*":
                raise AlignProError(f"{at}: it is not empty; name a new folder, or resume a run")
            if found:
                raise AlignProError(
                    f"{at}: holds {found[0].relative_to(self.folder)} and no {self.file} that says of which "
                    "run, so that nothing can go on there; name a new folder"
                )
        return None

    def begin(
        self,
        record: Mapping[str, Any],
        *,
        resume: bool | None = None,
        names: Sequence[str] = (),
        grows: Sequence[str] = (),
        option: str | None = None,
    ) -> None:
        """Take the folder for a run with these settings, which `claim` will write down. See `check`.

        Args:
            grows: settings, as `settings.iterations`, that may be larger than they were.
            option: the flag that a refusal of other settings begins with. Left out: --resume where that is
                what makes the run go on, else the folder's own.

        Raises:
            AlignProError: the folder holds another run, or one with other settings or contents.
        """
        before = self.check(resume, names)
        found = {name: digest() for name, digest in self.contents.items()}
        if before is not None:
            option = option or (self.option if resume is None else "--resume")
            known = {name: digest for name, digest in found.items() if digest is not None}
            refuse_other_settings(self.folder, before, {**record, CONTENTS: known}, option, grows)
            if self.contents and (odd := sorted({*(before.get(CONTENTS) or {})} - {*self.contents})):
                raise AlignProError(
                    f"{option} {self.folder}: {self.file} is damaged, as {CONTENTS} has {odd[0]!r}; choose "
                    "another folder"
                )
        self.record = {"verb": self.verb, **record}
        kept = dict((before or {}).get(CONTENTS) or {})
        self.record[CONTENTS] = kept | {name: digest for name, digest in found.items() if digest is not None}

    def claim(self) -> None:
        """Write the run's settings, the first time: from now on the folder is this run's."""
        if self.claimed or self.record is None:
            return
        self.claimed = True
        for name, digest in self.contents.items():
            if name not in self.record[CONTENTS] and (found := digest()) is not None:
                self.record[CONTENTS][name] = found
        self.write()

    def write(self, **more: Any) -> None:
        """Write the settings, with further ones, in the first of several processes."""
        self.record = {**(self.record or {}), **more}
        if _first():
            write_json(self.folder / self.file, self.record)
            sync(self.folder)

    def _holds(self, found: Mapping[str, Any], file: str = "") -> str:
        """Say which run the folder holds, and how that goes on."""
        file = file or self.file
        verb = found.get("verb") or ("demo" if file != SETTINGS_FILE else None)
        settings = found.get("settings")
        every = {**(settings if isinstance(settings, dict) else {}), **found}
        said = [f"{name} {_short(every[name])}" for name in _SHOWN if every.get(name) not in (None, "", [])]
        how = f"alignpro {verb} --out {self.folder}" if verb else "the command that began it"
        how += " --resume" if (verb or (file == self.file and self.verb)) in RESUMED else ""
        what = f"holds a run of {verb}" if verb else "holds a run"
        what += f" ({', '.join(said)})" if said else ""
        return f"{what}; continue it with {how}, and its settings"


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, Mapping | list) else str(value)
    return text if len(text) <= 40 else f"...{text[-37:]}"


def _first() -> bool:
    """Whether this is the first of several processes that train together, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


_HELD: ContextVar[tuple[Run, ...]] = ContextVar("_HELD", default=())


@contextlib.contextmanager
def own(
    folder: str | os.PathLike[str], verb: str, *, option: str = "--out", file: str = SETTINGS_FILE
) -> Iterator[Run]:
    """Hold a folder until the end of the block, alone of all processes; made if need be.

    Where this process holds it already, that is what comes. A start that leads to nothing leaves nothing: the
    folder goes again if it was made here and nothing is in it.

    Raises:
        AlignProError: nothing can be written there, or another process is at work there, which is named.
    """
    path = Path(folder)
    if (held := _held(path)) is not None:
        yield held
        return
    missing = [each for each in (path, *path.parents) if not each.exists()]
    run, began = Run(writable_folder(path, option), verb, file, option), {*os.listdir(path)}
    place = _place(path)
    try:
        with contextlib.ExitStack() as stack:
            if _first():
                _enter(stack, run)
                _tidy(run)
            token = _HELD.set((*_HELD.get(), run))
            try:
                yield run
            finally:
                _HELD.reset(token)
                if not run.claimed and _first():
                    _leave(run, began)
        if _place(path) != place:
            raise AlignProError(
                f"{option} {path}: was removed while {verb} was at work there; run again, and leave it "
                "in place"
            )
    finally:
        for made in missing:
            with contextlib.suppress(OSError):  # not empty
                made.rmdir()


def _place(folder: Path) -> tuple[int, int] | None:
    """Device and number of a folder, which another of its name has not; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _enter(stack: contextlib.ExitStack, run: Run) -> None:
    """Take the lease of a folder, or tell who has it."""
    for _ in range(_TRIES):
        try:
            lease = stack.enter_context(locks.lease(run.folder, LEASE, about=run.verb, leave=False))
        except OSError as error:
            raise AlignProError(
                f"{run.option} {run.folder}: cannot write there ({error.strerror}); free space, or choose "
                "another folder"
            ) from error
        if lease is not None:
            return
        if (other := locks.holder(run.folder, LEASE)) is not None:
            since = datetime.fromtimestamp(other.get("since", time.time())).isoformat(" ", "seconds")
            who = f"process {other.get('process')} on {other.get('host')}"
            about = other.get("about") or "another run"
            raise AlignProError(
                f"{run.option} {run.folder}: {about} is at work there since {since} ({who}); wait for it, or "
                "choose another folder"
            )
        time.sleep(locks.POLL_S)
    raise AlignProError(f"{run.option} {run.folder}: another process is at work there; wait for it")


def _tidy(run: Run) -> None:
    """Remove the half written files of a process that was killed, here and in the run's own folders."""
    remove_parts(run.folder)
    for folder in run.folder.iterdir():
        if folder.is_dir() and not folder.is_symlink() and not (folder / SETTINGS_FILE).exists():
            remove_parts(folder)  # with settings it is another run's, which may be at work


def _leave(run: Run, began: set[str]) -> None:
    """Take away what a start that led to nothing made: its settings, and folders that are empty."""
    there = os.listdir(run.folder) if run.folder.is_dir() else ()
    for name in {*there} - began:
        path = run.folder / name
        with contextlib.suppress(OSError):
            if name == run.file:
                path.unlink()
            elif path.is_dir() and not path.is_symlink():
                path.rmdir()


def _held(folder: Path) -> Run | None:
    home = real(folder)
    return next((run for run in reversed(_HELD.get()) if run.home == home), None)


def here(folder: str | os.PathLike[str], verb: str = "run") -> Run:
    """The run that holds `folder` in this process, or, where none does, one that is not held by a lease."""
    return _held(Path(folder)) or Run(Path(folder), verb)


def claim(path: str | os.PathLike[str]) -> None:
    """Make the held folders that `path` is in their runs' own: to be called at a finished piece of work."""
    waiting = [run for run in _HELD.get() if not run.claimed]
    if waiting:
        home = real(path)
        for run in waiting:
            if run.home == home or run.home in home.parents:
                run.claim()


def owning(
    verb: str, *, option: str = "--out", file: str = SETTINGS_FILE
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function, or a verb's `run`, that writes to its argument, or field, `out`: it runs in `own`.

    Nothing is held where `out` is None.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def held(*positional: P.args, **named: P.kwargs) -> R:
            given = signature.bind(*positional, **named)
            given.apply_defaults()
            out = given.arguments["out"] if "out" in given.arguments else given.arguments["self"].out
            if out is None:
                return function(*positional, **named)
            with own(out, verb, option=option, file=file):
                return function(*positional, **named)

        return held

    return decorate


def refuse_other_settings(
    folder: Path,
    before: Any,
    now: Mapping[str, Any],
    option: str = "--resume",
    grows: Sequence[str] = (),
) -> None:
    """Raise AlignProError, naming the first setting that differs, unless a run can be continued as asked.

    Digests of contents are compared where both have them: runs of an earlier version have none. A setting
    that an earlier version did not have was off. Those of `grows` may be larger than they were.
    """
    old_contents, contents = before.get(CONTENTS) or {}, now.get(CONTENTS) or {}
    for name in old_contents.keys() & contents.keys():
        if old_contents[name] != contents[name]:
            raise AlignProError(
                f"{option}: {folder} was started with another content of {name} ({old_contents[name]}, now "
                f"{contents[name]}); put that back or choose another folder"
            )

    def differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in new:
                if key not in old and not new[key]:
                    continue
                yield from differences(old.get(key), new[key], f"{name}.{key}" if name else key)
        elif old != new:
            yield name, old, new

    settings = {name: value for name, value in now.items() if name not in (CONTENTS, "verb")}
    for name, old, new in differences(before, settings, ""):
        if name in grows and isinstance(old, int) and old < new:
            continue
        raise AlignProError(
            f"{option}: {folder} was started with {name} = {old}, not {new}; "
            "repeat that setting or choose another folder"
        )


def environment() -> dict[str, Any]:
    """Machine and library versions, for the record: no user name, host name or path."""
    torch = sys.modules.get("torch")
    packages = ("alignpro", "torch", "transformers", "trl", "peft", "jax", "numpy")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }
