"""Many processes on one folder: the grid's cells, the ledger, one budget, answers a second; one training.

    python benchmarks/scale.py grid --workers 64 --cells 1000 --dying 0.05
    python benchmarks/scale.py ledger --answers 1000000 --writers 8
    python benchmarks/scale.py budget --workers 4 --calls 400
    python benchmarks/scale.py rollouts --workers 1 2 4
    python benchmarks/scale.py training --processes 1 2

No models, but for `training`: a cell is a sleep, and the frozen model a server that answers after a while.
Workers are processes all the same, some of them killed amid what they do, and what holds them together is
what holds real ones together: leases, launcher, ledger and HTTP client. Each part checks what it measures.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import ledger
from paper_grid import launch, work
from paper_grid.plan import Job

from alignpro import locks
from alignpro.llm.models import packages
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.targets import http
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.ledger import Cached, spent
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Stopped

FORK = multiprocessing.get_context("fork")
SAMPLING = Sampling(max_tokens=16)


# --- the grid ---


class Forks:
    """Workers as forks of this process, for `launch.keep_running`."""

    def __init__(self, jobs: list[Job], out: Path, act: Any) -> None:
        self.jobs, self.out, self.act = jobs, out, act
        self.children: list[Any] = []
        self.started = 0

    def alive(self) -> int:
        self.children = [child for child in self.children if child.is_alive()]
        return len(self.children)

    def start(self, count: int) -> None:
        for _ in range(count):
            child = FORK.Process(target=work.work, args=(self.jobs, self.out, self.act))
            child.start()
            self.children.append(child)
        self.started += count


def lives(process: str) -> bool:
    """Whether a process runs, and is not only waited for."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def grid(workers: int, cells: int, seconds: float, dying: float, seed: int = 0) -> dict[str, Any]:
    """Run a grid of sleeps, at a share of whose cells the worker is killed; the launcher starts others.

    Args:
        seconds: mean length of a cell; each has its own, from half to one and a half of that.

    Returns:
        `cells` done; `twice`, those done again or by two at once; deaths; `makespan` and `ideal` in seconds:
        all that was slept, what was lost with the dead too, divided by the workers.
    """
    rng = random.Random(seed)
    jobs = [Job(f"cell-{i:04}", "prompts", {}) for i in range(cells)]
    length = {job.name: seconds * rng.uniform(0.5, 1.5) for job in jobs}
    dies = {job.name: rng.random() * length[job.name] for job in jobs if rng.random() < dying}
    packages.note, noted = (lambda _: None), packages.note
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        log = os.open(out / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

        def cell(job: Job, out: Path) -> None:
            begun, inside = out / job.name / "begun", out / job.name / "inside"
            with contextlib.suppress(FileNotFoundError):  # nobody, or somebody who left just now
                if lives(inside.read_text()):
                    os.write(log, f"two {job.name}\n".encode())
            inside.write_text(str(os.getpid()))
            if job.name in dies and not begun.exists():
                begun.touch()
                time.sleep(dies[job.name])
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(length[job.name])
            inside.unlink(missing_ok=True)
            os.write(log, f"did {job.name}\n".encode())

        pool, start = Forks(jobs, out, cell), time.monotonic()
        work.WAIT_S, waited = min(work.WAIT_S, seconds / 10), work.WAIT_S
        launch.keep_running(pool, workers, jobs, out, wait_s=min(0.05, seconds / 10))
        work.WAIT_S = waited
        makespan = time.monotonic() - start
        work.check_failures(jobs, out)
        os.close(log)
        lines = (out / "log").read_text().split("\n")[:-1]
    packages.note = noted
    did = [line.split()[1] for line in lines if line.startswith("did")]
    slept = sum(length.values()) + sum(dies.values())
    return {
        "cells": len(set(did)),
        "twice": len(did) - len(set(did)) + sum(line.startswith("two") for line in lines),
        "deaths": len(dies),
        "started": pool.started,
        "makespan": makespan,
        "ideal": slept / workers,
    }


# --- a server, and those who ask it ---


async def _serve(delay_s: float, ready: Any, asked: Any) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get "):  # whoever asks which server this is
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                    await writer.drain()
                    continue
                length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                with asked.get_lock():
                    asked.value += 1
                await asyncio.sleep(delay_s)
                text = f"answer {body['seed']}"
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                usage = {"prompt_tokens": 8, "completion_tokens": 4}
                said = json.dumps({"choices": [choice], "usage": usage}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
                writer.write(b"content-length: %d\r\n\r\n%s" % (len(said), said))
                await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1000)
    ready.put(server.sockets[0].getsockname()[1])
    await server.serve_forever()


@contextlib.contextmanager
def stub(delay_s: float) -> Iterator[tuple[str, Any]]:
    """A chat-completions server that answers after `delay_s` seconds: its address, and the count of requests
    that it received."""
    ready, asked = FORK.Queue(), FORK.Value("q", 0)
    process = FORK.Process(
        target=lambda: asyncio.run(_serve(delay_s, ready, asked)),
        daemon=True,
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{ready.get(timeout=60)}/v1", asked
    finally:
        process.kill()
        process.join()


def ask(url: str, folder: Path, name: str, answers: int, ready: Any, **settings: Any) -> None:
    """Ask for answers that are kept in `folder`, as a worker that rolls out does."""
    http.client_library()
    target = Cached(Endpoint(url, EndpointSettings("m", **settings)), folder, note=None)
    ready.wait()
    with contextlib.suppress(Stopped):
        target.respond([f"{name} {i}" for i in range(answers)], SAMPLING)


def rollouts(workers: int, answers: int, delay_s: float = 0.05, concurrency: int = 8) -> dict[str, float]:
    """Answers a second that so many workers get, each into the one ledger, `answers` in all.

    Returns:
        `per_second`, and `ideal`: what the delay and the requests under way allow; `cpu_ms` of an answer, of
        the workers, by which a machine's cores are the limit.
    """
    with tempfile.TemporaryDirectory() as name, stub(delay_s) as (url, asked):
        ready, each = FORK.Barrier(workers + 1), answers // workers
        options = {"concurrency": concurrency}
        asking = [
            FORK.Process(target=ask, args=(url, Path(name), f"w{i}", each, ready), kwargs=options)
            for i in range(workers)
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for process in asking:
            process.start()
        ready.wait()
        start = time.monotonic()
        for process in asking:
            process.join()
        took, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        assert asked.value == each * workers
        assert spent(name)["m"].answers == each * workers
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "per_second": each * workers / took,
        "ideal": workers * concurrency / delay_s,
        "cpu_ms": 1e3 * cpu / (each * workers),
    }


def budget(workers: int, calls: int, killed: int = 0, delay_s: float = 0.01) -> dict[str, int]:
    """Requests that a server receives of workers who may make `calls` together, some of them killed.

    Returns:
        `received` by the server, `counted` in the ledger; the latter is `calls` where enough was asked for.
    """
    with tempfile.TemporaryDirectory() as name, stub(delay_s) as (url, asked):
        ready = FORK.Barrier(workers + 1)
        asking = [
            FORK.Process(
                target=ask,
                args=(url, Path(name), f"w{i}", calls, ready),
                kwargs={"max_calls": calls, "concurrency": 4},
            )
            for i in range(workers)
        ]
        for process in asking:
            process.start()
        ready.wait()
        for i, process in enumerate(asking[:killed]):
            while asked.value < calls * (i + 1) // (killed + 2):
                time.sleep(0.001)
            process.kill()
        for process in asking:
            process.join()
        return {"received": asked.value, "counted": spent(name)["m"].calls}


def training(processes: int, rounds: int, options: list[str]) -> dict[str, float]:
    """One training over so many processes, one thread each; its rounds are the same however many share them.

    Returns:
        `round_s`, of a round after the first; `rewrites_per_second`, each with its answer, its reward and its
        part in the update.
    """
    prompts, draws = 8, 4
    command = [sys.executable, "-m", "alignpro", "train"]
    if processes > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m"]
    command += ["--dataset", "instructions", "--prompts-per-round", str(prompts), "--draws", str(draws)]
    command += [
        "--iterations",
        str(rounds),
        "--epochs",
        "1",
        "--minibatches",
        "1",
        "--reward",
        "ease",
        *options,
    ]
    told: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        started = subprocess.Popen(
            [*command, "--out", str(Path(folder) / "out")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert started.stdout is not None
        said = []
        for line in started.stdout:
            said.append(line)
            if found := re.search(r"round (\d+) of", line):
                told.setdefault(int(found[1]), time.monotonic())
        if started.wait():
            raise SystemExit("".join(said[-20:]))
    round_s = (told[rounds] - told[1]) / (rounds - 1)
    return {"round_s": round_s, "rewrites_per_second": prompts * draws / round_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    of_grid = parts.add_parser("grid")
    of_grid.add_argument("--workers", type=int, default=64)
    of_grid.add_argument("--cells", type=int, default=1000)
    of_grid.add_argument("--seconds", type=float, default=2.0)
    of_grid.add_argument("--dying", type=float, default=0.05)
    of_grid.add_argument("--no-flock", action="store_true", help="as on a file system that does not lock")
    of_ledger = parts.add_parser("ledger")
    of_ledger.add_argument("--answers", type=int, default=1_000_000)
    of_ledger.add_argument("--writers", type=int, default=8)
    of_budget = parts.add_parser("budget")
    of_budget.add_argument("--workers", type=int, default=4)
    of_budget.add_argument("--calls", type=int, default=400)
    of_budget.add_argument("--killed", type=int, default=2)
    of_rollouts = parts.add_parser("rollouts")
    of_rollouts.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    of_rollouts.add_argument("--answers", type=int, default=1000)
    of_rollouts.add_argument("--concurrency", type=int, default=8, help="requests under way, of a worker")
    of_training = parts.add_parser("training", help="further options are those of train")
    of_training.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    of_training.add_argument("--rounds", type=int, default=4)
    options, more = parser.parse_known_args()
    if more and options.part != "training":
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if options.part == "grid":
        if options.no_flock:
            locks._lock = lambda *_, **__: None
            locks.BEAT_S, locks.STALE_S = 0.5, 5.0
        found = grid(options.workers, options.cells, options.seconds, options.dying)
        print(json.dumps(found), f"makespan / ideal = {found['makespan'] / found['ideal']:.2f}")
        assert (found["cells"], found["twice"]) == (options.cells, 0)
    elif options.part == "ledger":
        print(ledger.measure("sqlite", options.answers, options.writers))
    elif options.part == "budget":
        found = budget(options.workers, options.calls, options.killed)
        print(json.dumps(found))
        assert found["received"] <= found["counted"] == options.calls
    elif options.part == "training":
        for processes in options.processes:
            found = training(processes, options.rounds, more)
            print(processes, "processes:", json.dumps(found), flush=True)
    else:
        for workers in options.workers:
            found = rollouts(workers, options.answers, 0.05, options.concurrency)
            print(workers, "workers:", json.dumps(found))


if __name__ == "__main__":
    main()
