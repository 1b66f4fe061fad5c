"""Who does the jobs: any number of processes on any number of machines that share the grid's folder.

Each process goes through the jobs and takes the first that nobody holds and whose needs are done. A job is
held by a lock on a file in its folder, which the kernel drops when its holder dies, so nothing is left
behind to clean up. What a job had done when it was killed is its verb's to resume. A job is done when
`finished.json` is in its folder.
"""

import contextlib
import fcntl
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from tqdm import tqdm

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json
from alignpro.llm.models import packages
from paper_grid import plan
from paper_grid.plan import Job

FINISHED = "finished.json"
_LOCK = ".lock"
_WAIT_S = 2.0


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether the job in `folder` is this process's until the end of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def finished(job: Job, out: Path) -> bool:
    return (out / job.name / FINISHED).is_file()


def check_settings(jobs: Sequence[Job], out: Path) -> None:
    """Refuse to go on with a folder whose finished jobs had other options.

    Raises:
        AlignProError: so, naming the first that differs.
    """
    for job in jobs:
        path = out / job.name / plan.CONFIG
        if not (finished(job, out) and path.is_file()):
            continue
        before, now = yaml.safe_load(path.read_text(encoding="utf-8")), job.resolved(out)
        for name in {**before, **now}:
            if name != "out" and before.get(name) != plan.plain(now.get(name)):
                raise AlignProError(
                    f"--out {out}: {job.name} was done with {name} = {before.get(name)}, not "
                    f"{now.get(name)}; repeat that or choose another folder"
                )


def do(job: Job, out: Path) -> None:
    """One job, from wherever it was left.

    Raises:
        AlignProError: it cannot be done; its verb has said why.
        KeyboardInterrupt: as it says.
    """
    path = plan.write_config(job, out)
    wall, cpu = time.monotonic(), time.process_time()
    if job.verb == "prompts":
        plan.select_prompts(job, out)
    else:
        argument = [str(out / job.argument)] if job.argument else []
        status = main.main([job.verb, *argument, "--config", str(path)])
        if status == 130:
            raise KeyboardInterrupt
        if status:
            raise AlignProError(f"{job.name}: did not finish; run the same command again once that is mended")
        gc.collect()  # models hold references in circles
    spent = {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    write_json(out / job.name / FINISHED, {name: round(value, 1) for name, value in spent.items()})


def work(jobs: Sequence[Job], out: Path) -> None:
    """Do what can be done until all is: by this process, or by others at the same time."""
    known = {job.name for job in jobs}
    while True:
        waiting = False
        for job in jobs:
            if finished(job, out):
                continue
            if not all((out / need / FINISHED).is_file() for need in job.needs if need in known):
                waiting = True
                continue
            with claim(out / job.name) as mine:
                if not mine:
                    waiting = True
                    continue
                if finished(job, out):  # by another, a moment ago
                    continue
                done = sum(finished(j, out) for j in jobs)
                packages.note(f"[{done + 1}/{len(jobs)}] {job.name}")
                do(job, out)
            break  # from the first again: what was waiting may be ready
        else:
            if not waiting:
                return
            time.sleep(_WAIT_S)


def devices() -> list[str]:
    """Names of the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def fan_out(command: Sequence[str], processes: int, jobs: Sequence[Job], out: Path) -> int:
    """The same command in so many processes; the worst exit status.

    Each has its share of the cores, and a GPU of its own where there are enough.

    Their output goes to worker-<i>.log, this process tells how far they are with the jobs.
    """
    linux = hasattr(os, "sched_setaffinity")
    cores = sorted(os.sched_getaffinity(0)) if linux else list(range(os.cpu_count() or 1))
    threads = max(1, len(cores) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    gpus = devices()
    children = []
    with contextlib.ExitStack() as stack:
        for i in range(processes):
            log = stack.enter_context(open(out / f"worker-{i}.log", "ab"))
            if gpus:  # one to each worker, in turn
                environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
            child = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=log)
            if linux and processes <= len(cores):  # each keeps its own: two that meet on one core crawl
                os.sched_setaffinity(child.pid, cores[i * threads : (i + 1) * threads])
            children.append(child)
        bar = stack.enter_context(tqdm(total=len(jobs), unit="job", disable=None))
        try:
            while any(child.poll() is None for child in children):
                bar.update(sum(finished(job, out) for job in jobs) - bar.n)
                time.sleep(_WAIT_S)
            bar.update(sum(finished(job, out) for job in jobs) - bar.n)
        except BaseException:
            for child in children:
                child.terminate()
            for child in children:
                child.wait()
            raise
    return max(abs(child.returncode) for child in children)


def do_all(command: Sequence[str], processes: int, jobs: Sequence[Job], out: Path) -> None:
    """Do all jobs in this process, or in so many that each runs `command` with --processes 1.

    Raises:
        AlignProError: a job cannot be done, or one of the processes stopped.
    """
    if processes < 1:
        raise AlignProError(f"--processes {processes}: give at least 1")
    if processes == 1:
        work(jobs, out)
    elif status := fan_out([*command, "--processes", "1"], processes, jobs, out):
        raise AlignProError(f"a worker stopped (exit status {status}); see worker-*.log in {out}")


def times(jobs: Sequence[Job], out: Path) -> dict[str, dict[str, float]]:
    """What each finished job took, its last run alone: clocks, which no two runs share."""
    return {job.name: read_json(out / job.name / FINISHED) for job in jobs if finished(job, out)}
