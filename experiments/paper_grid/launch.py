"""Starts workers on this machine, under Slurm or under Ray, starts others for those that died, and tells how
far they are.

A worker is the grid's own command, which takes jobs that nobody holds (`work`): a launcher keeps as many of
them running as there are jobs to do, and knows nothing else.
"""

import argparse
import contextlib
import getpass
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from alignpro import locks
from alignpro.errors import AlignProError
from alignpro.files import write_text
from alignpro.llm.models import packages
from paper_grid import work
from paper_grid.plan import Job

WAIT_S = {"local": 2.0, "slurm": 30.0, "ray": 2.0}
"""Seconds between two looks at the workers, by launcher."""
PATIENCE_S = 180
"""Seconds after which a worker that finds nothing to do ends, and leaves its GPU to others: longer than the
lease of one that died lasts (`locks.STALE_S`)."""
QUICK_S = 120.0
"""Workers that end sooner, with no job settled, may all be failing for one reason."""


class Pool(Protocol):
    """Where workers run."""

    def alive(self) -> int:
        """How many run, or wait for their turn."""
        ...

    def start(self, count: int) -> None:
        """Start so many more."""
        ...


def ended(program: str, act: Callable[[], int]) -> int:
    """Do an experiment's work and give its exit status; a mistake, or Ctrl-C, is one line."""
    try:
        return act()
    except AlignProError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command goes on", file=sys.stderr)
        return 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every grid's command has."""
    parser.add_argument(
        "--processes",
        type=int,
        help="workers: on this machine, or of the launcher; each has a GPU of its own",
    )
    parser.add_argument(
        "--launch",
        choices=list(LAUNCHERS),
        help="start the workers here (local: as many as GPUs, sharing the cores), as a Slurm job array, or "
        "on a Ray cluster, and others in the place of those that die; without it one process does all",
    )
    parser.add_argument(
        "--sbatch",
        default="",
        metavar="OPTIONS",
        help="further options of Slurm's sbatch, as --sbatch='--partition=gpu --time=12:00:00'",
    )
    parser.add_argument("--status", action="store_true", help="say how far the workers are, and what failed")


def check(args: argparse.Namespace) -> None:
    """Refuse options of `add_arguments` that make no sense. Raises AlignProError."""
    if args.processes is not None and args.processes < 1:
        raise AlignProError(f"--processes {args.processes}: give at least 1")
    if args.sbatch and args.launch != "slurm":
        raise AlignProError("--sbatch: is for --launch slurm")


def do_all(args: argparse.Namespace, command: Sequence[str], jobs: Sequence[Job], out: Path) -> bool:
    """Do all jobs, in this process or by workers that each run `command`. Whether that is done: a worker
    leaves what comes after to its launcher, and a job script that is only written does nothing yet.

    Raises:
        AlignProError: jobs could not be done, or workers end without doing any.
    """
    check(args)
    worker = work.WORKER in os.environ
    if not worker:
        work.again(jobs, out)
    if worker or (args.launch is None and args.processes in (None, 1)):
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's: as Ctrl-C
        try:
            work.work(jobs, out)
        finally:
            signal.signal(signal.SIGTERM, before)
        return not worker
    name = args.launch or "local"
    with LAUNCHERS[name](command, out, args) as pool:
        workers = args.processes or (max(1, len(devices())) if name == "local" else 8)
        if pool is not None:
            keep_running(pool, workers, jobs, out, WAIT_S[name])
    if pool is None:
        return False
    work.check_failures(jobs, out)
    return True


def keep_running(pool: Pool, workers: int, jobs: Sequence[Job], out: Path, wait_s: float) -> None:
    """Keep as many workers as there are jobs for, until there is none.

    Raises:
        AlignProError: they end again and again without settling a job.
    """
    started, begun, over_then = 0, time.monotonic(), -1
    with tqdm(total=len(jobs), unit="job", disable=None) as bar:
        while True:
            over = len(work.settled(jobs, out))
            bar.update(over - bar.n)
            todo, alive = len(work.ready(jobs, out)), pool.alive()
            if not todo and not alive:
                return
            if (more := min(workers, todo) - alive) > 0:
                if over > over_then or time.monotonic() - begun > QUICK_S:
                    started = 0
                if started > 2 * workers:
                    raise AlignProError(f"workers end without doing a job; see worker-*.log in {out}")
                begun, over_then, started = time.monotonic(), over, started + more
                pool.start(more)
            time.sleep(wait_s)


def devices() -> list[str]:
    """Names of the CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class _Local:
    """Processes on this machine: each has its share of the cores, and a GPU of its own where there are
    enough. Their output goes to worker-<i>.log."""

    def __init__(self, command: Sequence[str], out: Path, processes: int) -> None:
        self.command, self.out = command, out
        linux = hasattr(os, "sched_setaffinity")
        self.cores = sorted(os.sched_getaffinity(0)) if linux else list(range(os.cpu_count() or 1))
        self.threads = max(1, len(self.cores) // processes)
        self.pinned = linux and processes <= len(self.cores)  # two that meet on one core crawl
        self.gpus = devices()
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def alive(self) -> int:
        self.children = {i: child for i, child in self.children.items() if child.poll() is None}
        return len(self.children)

    def start(self, count: int) -> None:
        free = (i for i in range(len(self.children) + count) if i not in self.children)
        for i in list(free)[:count]:
            told = {work.WORKER: str(PATIENCE_S), "OMP_NUM_THREADS": str(self.threads)}
            if self.gpus:  # one to each worker, in turn
                told["CUDA_VISIBLE_DEVICES"] = self.gpus[i % len(self.gpus)]
            with open(self.out / f"worker-{i}.log", "ab") as log:
                child = subprocess.Popen(
                    [sys.executable, *self.command], env=os.environ | told, stdout=log, stderr=log
                )
            if self.pinned:
                os.sched_setaffinity(child.pid, self.cores[i * self.threads : (i + 1) * self.threads])
            self.children[i] = child

    def end(self) -> None:
        for child in self.children.values():
            child.terminate()
        for child in self.children.values():
            child.wait()


@contextlib.contextmanager
def local(command: Sequence[str], out: Path, args: argparse.Namespace) -> Iterator[Pool | None]:
    """Workers on this machine, for whom it waits."""
    pool = _Local(command, out, args.processes or max(1, len(devices())))
    try:
        yield pool
    finally:
        pool.end()


class _Slurm:
    """Tasks of job arrays that share a name."""

    def __init__(self, script: Path, name: str) -> None:
        self.script, self.name, self.last = script, name, 0

    def alive(self) -> int:
        asked = ["squeue", "--noheader", "--array", "--format=%T", f"--name={self.name}"]
        found = _said([*asked, f"--user={getpass.getuser()}"])
        if found is not None:  # otherwise its controller does not answer for a while
            self.last = len(found.split())
        return self.last

    def start(self, count: int) -> None:
        said = _said(["sbatch", "--parsable", f"--array=0-{count - 1}", str(self.script)], needed=True)
        packages.note(f"Slurm job {str(said).strip()}: {count} workers; scancel --name {self.name} ends them")
        self.last += count


def _said(command: Sequence[str], needed: bool = False) -> str | None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and needed:
        raise AlignProError(f"{shlex.join(command)}: {done.stderr.strip() or 'failed'}; mend --sbatch")
    return None if done.returncode else done.stdout


def job_script(command: Sequence[str], out: Path, name: str, options: str) -> str:
    """The text of a Slurm job whose every array task is a worker with one GPU.

    Args:
        options: further ones of sbatch; with one of --gpus…, --gres or --no-gpu among them none is asked for
            besides.
    """
    own = shlex.split(options)
    given = any(o.startswith(("--gpu", "--gres", "-G")) for o in own)
    lines = [f"--job-name={name}", f"--output={out}/worker-%A_%a.log", "--open-mode=append", "--requeue"]
    lines += [] if given or "--no-gpu" in own else ["--gres=gpu:1"]
    lines += [o for o in own if o != "--no-gpu"]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            f"cd {shlex.quote(os.getcwd())}",
            f"export {work.WORKER}={PATIENCE_S}",
            "# One GPU for each worker: where Slurm does not set this itself it says which are the job's.",
            'if [ -n "$SLURM_JOB_GPUS" ]; then',
            '  export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-${SLURM_JOB_GPUS%%,*}}"',
            "fi",
            f"exec {shlex.join([sys.executable, *command])}",
            "",
        ]
    )


@contextlib.contextmanager
def slurm(command: Sequence[str], out: Path, args: argparse.Namespace) -> Iterator[Pool | None]:
    """Workers as Slurm job arrays; None where there is no Slurm here, and the script alone is written. They
    go on when this process is interrupted."""
    name = f"{Path(command[0]).stem}-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]}"
    script = out / "worker.sh"
    write_text(script, job_script(command, out.resolve(), name, args.sbatch))
    if shutil.which("sbatch") is None:
        array = f"sbatch --array=0-{(args.processes or 8) - 1} {script}"
        print(f"wrote {script}; there is no sbatch here. Where there is: {array}")
        yield None
        return
    try:
        yield _Slurm(script, name)
    except KeyboardInterrupt:
        packages.note(f"the workers go on; the same command watches them, scancel --name {name} ends them")
        raise


class _Ray:
    """Tasks of a Ray cluster, each of which runs one worker as a process."""

    def __init__(self, ray: Any, command: Sequence[str], out: Path) -> None:
        self.ray, self.count, self.tasks = ray, 0, list[Any]()
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
        program, told = [sys.executable, *command], {work.WORKER: str(PATIENCE_S)}
        folder = os.getcwd()

        def worker(i: int) -> int:
            # Ray has set CUDA_VISIBLE_DEVICES to the task's GPU.
            with open(out / f"worker-ray-{i}.log", "ab") as log:
                run = subprocess.run(program, cwd=folder, env=os.environ | told, stdout=log, stderr=log)
            return run.returncode

        self.worker = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(worker)

    def alive(self) -> int:
        if self.tasks:
            _, self.tasks = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0)
        return len(self.tasks)

    def start(self, count: int) -> None:
        self.tasks += [self.worker.remote(self.count + i) for i in range(count)]
        self.count += count


@contextlib.contextmanager
def on_ray(command: Sequence[str], out: Path, args: argparse.Namespace) -> Iterator[Pool | None]:
    """Workers on the Ray cluster of RAY_ADDRESS, or on one of this machine alone."""
    try:
        import ray
    except ImportError:
        raise AlignProError("--launch ray: the package ray is missing; run pip install ray") from None
    ray.init(log_to_driver=False)
    try:
        yield _Ray(ray, command, out.resolve())
    finally:
        ray.shutdown()


LAUNCHERS: dict[str, Callable[..., contextlib.AbstractContextManager[Pool | None]]] = {
    "local": local,
    "slurm": slurm,
    "ray": on_ray,
}


def status(
    jobs: Sequence[Job],
    out: Path,
    seconds: Callable[[Job], float] = lambda _: 1.0,
    cells: Mapping[str, Sequence[Job]] | None = None,
) -> str:
    """What is done, running and failed, and the hours left, as text.

    Args:
        seconds: what a job is thought to take; those that are finished say by how much it is wrong.
        cells: jobs by what is counted besides them.
    """
    over, took = work.settled(jobs, out), work.times(jobs, out)
    holders = {
        job.name: held
        for job in jobs
        if job.name not in over and (held := locks.holder(out / job.name, work.CLAIM))
    }
    state = {job.name: over.get(job.name, "running" if job.name in holders else "waiting") for job in jobs}
    lines = []
    if cells is not None:
        kinds = [_cell({state[job.name] for job in of if job.name in state}) for of in cells.values()]
        lines.append(f"cells: {_counts(kinds)}")
    lines.append(f"jobs: {_counts(list(state.values()))}")
    for name, held in holders.items():
        hours = (time.time() - held.get("since", time.time())) / 3600
        deaths = f", after {held['deaths']} that died" if held.get("deaths") else ""
        lines.append(f"running: {name} on {held.get('host', '?')} for {hours:.1f} hours{deaths}")
    lines += [f"failed: {job.name}: {work.failure(job, out)}" for job in jobs if state[job.name] == "failed"]
    thought = sum(seconds(job) for job in jobs if job.name in took)
    spent = sum(row["seconds"] for row in took.values())
    rate = spent / thought if thought else 1.0
    hours = rate * sum(seconds(job) for job in jobs if state[job.name] in ("running", "waiting")) / 3600
    on = f"judged by the {len(took)} jobs that are done" if thought else "as estimated: none is done"
    share = f", {hours / len(holders):.1f} with the {len(holders)} that run" if holders else ""
    lines.append(f"hours left: {hours:.1f} of one worker{share} ({on})")
    return "\n".join(lines)


def _counts(kinds: Sequence[str]) -> str:
    words = {"done": "done", "running": "running", "failed": "failed", "waiting": "waiting"}
    words |= {"needs": "waiting for one that failed"}
    found = [f"{kinds.count(kind)} {said}" for kind, said in words.items() if kind in kinds]
    return f"{', '.join(found)}; {len(kinds)} in all"


def _cell(states: set[str]) -> str:
    for kind in ("failed", "needs", "running"):
        if kind in states:
            return kind
    return "done" if states <= {"done"} else "waiting"
