"""Who does the jobs: any number of processes on any number of machines that share the grid's folder.

Each process goes through the jobs and takes the first that nobody holds and whose needs are done. A job is
held by a lease in its folder (`alignpro.locks`), which passes on when its holder dies. What a job had done
when it was killed is its verb's to resume. A job is done when `finished.json` is in its folder; `failed.json`
says why it could not be done, and workers leave it alone until the grid's command is given again.
"""

import contextlib
import gc
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignpro import locks, typed
from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json
from alignpro.llm.models import packages
from paper_grid import plan
from paper_grid.plan import Job

FINISHED = "finished.json"
FAILED = "failed.json"
CLAIM = "claim"
WORKER = "ALIGNPRO_WORKER"
"""Environment variable of processes that a launcher started: seconds without a job that is ready, after which
one ends."""
DEATHS = 3
"""Deaths of workers at one job, without a word (killed for memory, for one), after which it failed."""
WAIT_S = 2.0


def claim(folder: Path) -> AbstractContextManager[locks.Lease | None]:
    """The job in `folder` is this process's until the end of the block; None where it is another's."""
    return locks.lease(folder, CLAIM)


def finished(job: Job, out: Path) -> bool:
    return (out / job.name / FINISHED).is_file()


def failure(job: Job, out: Path) -> str | None:
    """Why the job could not be done; None where it was not tried, or is to be tried again."""
    record = _failed(job, out)
    return record["reason"] if record and not record["again"] else None


def _failed(job: Job, out: Path) -> dict[str, Any] | None:
    path = out / job.name / FAILED
    if not path.is_file():
        return None
    return vars(typed.made(_Failure, read_json(path), f"--out {path}"))


@dataclass
class _Failure:
    """The content of `FAILED`."""

    reason: str
    again: bool
    """Whether it may be tried anew."""
    deaths: int
    """Deaths of workers at the job by then."""


def again(jobs: Sequence[Job], out: Path) -> None:
    """Let workers try failed jobs anew."""
    for job in jobs:
        if (record := _failed(job, out)) and not record["again"]:
            write_json(out / job.name / FAILED, record | {"again": True})


def settled(jobs: Sequence[Job], out: Path) -> dict[str, str]:
    """Jobs that nobody will do now: `done`, `failed`, or `needs` for those that need one that failed."""
    found: dict[str, str] = {}
    for job in jobs:
        if finished(job, out):
            found[job.name] = "done"
        elif failure(job, out) is not None:
            found[job.name] = "failed"
        elif any(found.get(need) in ("failed", "needs") for need in job.needs):
            found[job.name] = "needs"
    return found


def ready(jobs: Sequence[Job], out: Path) -> list[Job]:
    """Jobs that are to be done and can be, those under way among them."""
    known, over = {job.name for job in jobs}, settled(jobs, out)
    return [
        job
        for job in jobs
        if job.name not in over and all(over.get(need) == "done" for need in job.needs if need in known)
    ]


def check_failures(jobs: Sequence[Job], out: Path) -> None:
    """Refuse to go on where jobs failed.

    Raises:
        AlignProError: so, with the first that did and its reason.
    """
    bad = [(job.name, reason) for job in jobs if (reason := failure(job, out)) is not None]
    if bad:
        first = f"{bad[0][0]}: {bad[0][1]}"
        more = f" (and {len(bad) - 1} more; --status lists them)" if len(bad) > 1 else ""
        raise AlignProError(f"{first}{more}; run the same command again once that is mended")


def check_settings(jobs: Sequence[Job], out: Path) -> None:
    """Refuse to go on with a folder whose finished jobs had other options.

    Raises:
        AlignProError: so, naming the first that differs.
    """
    for job in jobs:
        path = out / job.name / plan.CONFIG
        if not (finished(job, out) and path.is_file()):
            continue
        before, now = typed.read_yaml(path, "--out"), job.resolved(out)
        before = plan.as_flags(job.verb, before)  # a grid that was begun when they had other names
        for name in {**before, **now}:
            if name != "out" and before.get(name) != plan.plain(now.get(name)):
                raise AlignProError(
                    f"--out {out}: {job.name} was done with {name} = {before.get(name)}, not "
                    f"{now.get(name)}; repeat that or choose another folder"
                )


class _Heard:
    """Standard error, whose last words are kept."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.words = stream, deque[str](maxlen=50)

    def write(self, text: str) -> Any:
        self.words.append(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def line(self) -> str:
        """The last line, without what says that it is an error."""
        lines = [line for line in "".join(self.words).splitlines() if line.strip()]
        return lines[-1].removeprefix("alignpro: error: ") if lines else "it did not say why"


def do(job: Job, out: Path) -> None:
    """One job, from wherever it was left.

    Raises:
        AlignProError: it cannot be done; as its verb has said.
        KeyboardInterrupt: as it says.
    """
    path = plan.write_config(job, out)
    if job.act(out):
        return
    argument = [str(out / job.argument)] if job.argument else []
    named = job.options.get("reward", [])
    # Outright: from its config.yaml no function is taken, since none lies beside that.
    reward = ["--reward", *(named if isinstance(named, list) else [named])] if named else []
    heard = _Heard(sys.stderr)
    with contextlib.redirect_stderr(heard):  # type: ignore[type-var]
        status = main.main([job.verb, *argument, "--config", str(path), *reward])
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise AlignProError(heard.line())
    gc.collect()  # models hold references in circles


def work(jobs: Sequence[Job], out: Path, act: Callable[[Job, Path], None] = do) -> None:
    """Do what can be done until all is: by this process, or by others at the same time.

    Args:
        act: does one job.

    Raises:
        AlignProError: some could not be done; the others are.
    """
    known, done = {job.name for job in jobs}, set[str]()
    patience, idle = float(os.environ.get(WORKER, "inf")), time.monotonic()
    while True:
        waiting, lost = False, set[str]()
        for job in jobs:
            if job.name in done or finished(job, out):
                done.add(job.name)
                continue
            if failure(job, out) is not None or not lost.isdisjoint(job.needs):
                lost.add(job.name)
                continue
            waiting = True
            if all(n in done or (out / n / FINISHED).is_file() for n in job.needs if n in known):
                with claim(out / job.name) as held:
                    if held is None:
                        continue
                    # By another, a moment ago?
                    if not finished(job, out) and failure(job, out) is None:
                        packages.note(f"[{len(done) + 1}/{len(jobs)}] {job.name}")
                        _try(job, out, held, act)
                idle = time.monotonic()
                break  # from the first again: what was waiting may be ready
        else:
            if not waiting or time.monotonic() - idle > patience:
                check_failures(jobs, out)
                return
            time.sleep(WAIT_S)


def _try(job: Job, out: Path, held: locks.Lease, act: Callable[[Job, Path], None]) -> None:
    """Do a job, and keep how long it took or why it failed."""

    def failed(reason: str) -> None:
        write_json(out / job.name / FAILED, {"reason": reason, "again": False, "deaths": held.deaths})

    before = _failed(job, out) or {"deaths": 0}
    if WORKER in os.environ and held.deaths - before["deaths"] >= DEATHS:  # or they would be started for ever
        failed(f"{DEATHS} workers died at it without a word, for want of memory maybe; see their logs")
        return
    wall, cpu = time.monotonic(), time.process_time()
    try:
        act(job, out)
    except AlignProError as error:
        failed(str(error))
        return
    except Exception as error:
        failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    if held.lost():
        packages.note(f"{job.name}: another worker has it, since this one stood still for long")
        return
    spent = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    write_json(out / job.name / FINISHED, {name: round(value, 1) for name, value in spent.items()})


def times(jobs: Sequence[Job], out: Path) -> dict[str, dict[str, float]]:
    """What each finished job took, its last run alone: clocks, which no two runs share."""
    paths = {job.name: out / job.name / FINISHED for job in jobs if finished(job, out)}
    return {n: typed.made(dict[str, float], read_json(path), f"--out {path}") for n, path in paths.items()}
