"""The ledger with several writers, and the append-only JSON-lines file under a kernel lock that it replaced.

    python benchmarks/ledger.py --answers 100000 --writers 8

Every writer is a process that keeps its share of the answers. Told are the answers kept a second by all
together, and the time and the memory that it then takes to open the file and find 1,000 of them.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignpro.llm.models.sampling import Sampling
from alignpro.llm.targets.ledger import cache_key
from alignpro.llm.targets.store import Store, owner_of
from alignpro.llm.targets.target import Answer

SAMPLING, OWNER = Sampling(), owner_of("model", "1")


def key(i: int) -> str:
    return cache_key("model", "1", SAMPLING, 0, f"prompt {i}", 0)


def line(i: int) -> dict[str, Any]:
    answer = Answer(f"answer {i} " * 20, "stop", 60, 60)
    return {
        "key": key(i),
        "model": "model",
        "revision": "1",
        "sampling": asdict(SAMPLING),
        "seed": 0,
        "prompt": f"prompt {i}",
        "sample": 0,
        "answer": asdict(answer),
        "calls": 1,
        "retries": 0,
        "seconds": 0.5,
    }


class Lines:
    """The rival: as the ledger was, without its checks."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.jsonl"
        self.path.touch()
        self.index: dict[str, Answer] = {}
        self.offset, self.synced = 0, time.monotonic()
        self.refresh()

    def refresh(self) -> None:
        import fcntl

        with open(self.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(self.offset)
            data = file.read()
        for row in map(json.loads, data.splitlines()):
            self.index.setdefault(row["key"], Answer(**row["answer"]))
        self.offset += len(data)

    def add(self, row: dict[str, Any]) -> None:
        import fcntl
        import os

        with open(self.path, "ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row, separators=(",", ":")).encode() + b"\n")
            if time.monotonic() - self.synced > 1.0:
                os.fsync(file.fileno())
                self.synced = time.monotonic()
        self.refresh()

    def get(self, keys: list[str]) -> dict[str, Answer]:
        return {k: self.index[k] for k in keys}


def store(folder: Path) -> tuple[Callable[[dict[str, Any]], Any], Callable[[list[str]], dict[str, Answer]]]:
    kept = Store(folder)
    return lambda row: kept.add(OWNER, {"calls": 1, "answers": 1, "seconds": 0.5}, row), kept.get


def lines(folder: Path) -> tuple[Callable[[dict[str, Any]], Any], Callable[[list[str]], dict[str, Answer]]]:
    kept = Lines(folder)
    return kept.add, kept.get


KINDS = {"sqlite": store, "lines": lines}


def write(kind: str, folder: Path, first: int, last: int, ready: Any) -> None:
    add, _ = KINDS[kind](folder)
    ready.wait()
    for i in range(first, last):
        add(line(i))


def read(kind: str, folder: Path, answers: int, out: Any) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    _, get = KINDS[kind](folder)
    found = get([key(i) for i in range(0, answers, max(1, answers // 1000))])
    assert all(answer.tokens == 60 for answer in found.values())
    out.put(
        (time.perf_counter() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    )


def measure(kind: str, answers: int, writers: int) -> str:
    """What so many writers do together, and a reader after them, in one line."""
    context = multiprocessing.get_context("fork")
    each = answers // writers
    with tempfile.TemporaryDirectory() as name:
        folder, ready, out = Path(name), context.Barrier(writers + 1), context.Queue()
        processes = [
            context.Process(target=write, args=(kind, folder, k * each, (k + 1) * each, ready))
            for k in range(writers)
        ]
        for process in processes:
            process.start()
        ready.wait()
        start = time.perf_counter()
        for process in processes:
            process.join()
        took = time.perf_counter() - start
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        reader = context.Process(target=read, args=(kind, folder, each * writers, out))
        reader.start()
        opened, memory = out.get()
        reader.join()
        size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return (
        f"{kind}: {each * writers} answers by {writers} writers, {each * writers / took:.0f} a second, the "
        f"largest of {largest:.0f} MiB; {size:.0f} MiB on file; opened, and 1,000 found, in {opened:.3f} s "
        f"with {memory:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    for kind in options.kinds:
        print(measure(kind, options.answers, options.writers))


if __name__ == "__main__":
    main()
