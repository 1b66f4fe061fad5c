"""Kills every verb that writes, starts it twice at once, damages each file that it left: nothing may be lost.

    python benchmarks/interruptions.py                        # all verbs: some 40 minutes on two cores
    python benchmarks/interruptions.py train rollout --kills 5
    python benchmarks/interruptions.py --json result.json

Of each verb, on tiny models, an undisturbed run is the reference. Then, each time with the same command:

- killed: `kill -9` at so many random moments of its run, each time continued, and at last left to finish;
- at once: two processes with the same settings, started together; one may be told that the other is at work;
- two settings: two processes with different seeds; one of them at most may have the folder;
- damaged: each file of the folder of a run that was killed half way is removed, emptied or has a bit flipped.

Afterwards the folder must hold the reference's results. An outcome is `same`; `told` (exit status 2 and one
line: nothing is lost that cannot be put back); `noted` (a line names the file whose loss nothing makes good,
a log for people, and the run goes on); `trusted` (another result, because a file of one's own answers or
rewards was edited, as docs/howto/resume.md says); or a finding, which is printed and makes the exit status 1:
`different` without a word, a `traceback`, a `hang`, or a `crash`.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
HANG_S = 120.0
STATUS = "status"
WORLD = (
    "--prompter ../model --target ../model --prompts-file ../prompts.txt --reward letters:score@0,1 "
    "--dtype float32 --answer-tokens 4 --rewrite-tokens 4"
)
VERBS = {
    "train": f"train --out OUT --resume {WORLD} --template append --iterations 6 --prompts-per-round 2 "
    "--draws 4 --epochs 1 --eval-every 2 --eval-proposals 2 --seed SEED",
    "sft": "sft --out OUT --resume --prompter ../model --pairs ../rewrites.jsonl --epochs 2 "
    "--pairs-per-step 4 --save-every 2 --seed SEED",
    "reward-model": "reward-model --out OUT --resume --base ../model --pairs ../pairs.jsonl --epochs 2 "
    "--pairs-per-step 4 --save-every 2 --seed SEED",
    "rollout": f"rollout --out OUT {WORLD} --draws 2 --answers 2 --seed SEED",
    "resample": f"resample --out OUT {WORLD} --proposals 6 --lam 0.1 --seed SEED",
    "instruct": "instruct --out OUT --target ../model --prompts-file ../prompts.txt "
    "--reward letters:score@0,1 --dtype float32 --answer-tokens 4 "
    "--instructions-file ../instructions.txt --budget 120 --seed SEED",
    "route": "route --out OUT --target ../model --prompts-file ../prompts.txt "
    "--reward letters:score@0,1 --dtype float32 --answer-tokens 4 "
    "--instructions-file ../instructions.txt --train-prompts 8 --seed SEED",
    "judge": "judge ../rollouts.jsonl --out OUT --arms trained none --judge ../model --forced --seed SEED",
    "estimate": "estimate ../rollouts.jsonl --beta 0.5 --lam 0.3 --out OUT",
    "headroom": "headroom ../rollouts.jsonl --lam 0.1 0.3 --out OUT",
    "compare": "compare ../rollouts.jsonl --arms none sft trained --out OUT",
    "verify": "verify --instances 400 --family signed --bounds theorem1 --seed SEED --out OUT",
    "solve": "solve ../0.npz --beta 0.5 --lam 0.25 --bounds all --out OUT",
}
"""The command of each verb, in a folder beside the inputs."""
PASSING = ("report.html", "README.md", ".run-", "answers.sqlite-", "stderr")
"""Parts of names of files that say when and how they were made, or are there only for a while."""
CLOCKS = re.compile(
    r"seconds|created|time|runtime|per_second|date|_cost$|calls|tokens_paid|retried|since|epoch"
)
LEASE = re.compile(r"(^|/)\.[\w-]+-\d+$")
"""Files that say who is at work: without what they say, the next waits for half a minute."""
OF_A_PROCESS = re.compile(r"^(scored|raw_least|raw_greatest|clipped|clipped_share|unscored)$")
"""Fields of reward.json that say what the process counted which ended the run."""
OWN = (
    *("answers", "scores", "reward.json", "proposals.jsonl"),
    *("rollouts.partial.jsonl", "cells.jsonl", "judgements.jsonl"),
)
"""What is trusted: answers and rewards that are one's own to edit."""


def inputs(home: Path) -> None:
    """A tiny model, prompts, pairs, instances, rollouts and a reward."""
    import numpy as np

    from alignpro.estimation.simulate import Size, simulated_rows
    from alignpro.llm.models.configure import tiny_model
    from alignpro.theory.families import draw

    model, tokenizer = tiny_model(seed=1)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    texts = ["".join(letters) for letters in itertools.product("abcd", repeat=3)]
    (home / "prompts.txt").write_text("\n".join(texts))
    (home / "instructions.txt").write_text("\n".join(("abc", "def", "gab", "hhc", "e")))
    rewrites = [{"prompt": x, "rewrite": x[::-1]} for x in texts]
    pairs = [{"prompt": x, "chosen": "aab", "rejected": "dcdc"} for x in texts]
    for name, rows in (("rewrites", rewrites), ("pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "letters.py").write_text(
        "def score(prompts, responses):\n    return [y.count('e') / max(1, len(y)) for y in responses]\n"
    )
    instance = draw("signed", 0, (2, 3, 4), 1)[0]
    instance.save(home / "0.npz")
    rng = np.random.default_rng(0)
    prior, frozen = rng.dirichlet(np.ones(6), 8), rng.dirichlet(np.ones(12), 6)
    small = SimpleNamespace(
        p=np.full(8, 1 / 8),
        prior=prior,
        frozen=frozen,
        own=rng.integers(6, size=8),
        reward=rng.uniform(size=(8, 12)),
    )
    rows = simulated_rows(
        small, rng, Size(12, 8, 6, 2), prompters={"trained": prior[:, ::-1]}, reward_range=(0.0, 1.0)
    )
    (home / "rollouts.jsonl").write_text("".join(row.line() for row in rows))


# --- processes: forks of this one, which has imported what they need ---


def start(verb: str, folder: Path, seed: int = 5) -> int:
    """Start a verb's command; its standard error goes into a file beside the folder."""
    words = VERBS[verb].replace("OUT", folder.name).replace("SEED", str(seed)).split()
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 70
    try:
        os.chdir(folder.parent)
        sys.path.insert(0, str(folder.parents[1]))
        log = os.open(
            folder.parent / f"{folder.name}.{os.getpid()}.stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        )
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        from alignpro.commands.main import main

        status = main(words)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError  # never here


def ended(pid: int, folder: Path, kill_after: float | None = None) -> tuple[int | None, str]:
    """The exit status of a process, None where it was killed (or hung), and what it said."""
    since = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        spent = time.monotonic() - since
        if spent > (HANG_S if kill_after is None else kill_after):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None, "hang" if kill_after is None else ""
        time.sleep(0.002)
    log = folder.parent / f"{folder.name}.{pid}.stderr"
    said = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status), said


# --- what a folder holds ---


def without_clocks(value: Any) -> Any:
    """A JSON value without what differs from run to run, or from process to process, and without names whose
    value is null, which say no more than a name that is missing."""
    if isinstance(value, dict):
        names = (k for k, v in value.items() if v is not None)
        return {
            k: without_clocks(value[k]) for k in names if not (CLOCKS.search(k) or OF_A_PROCESS.search(k))
        }
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, Any]:
    """By name: the content of each file that the same command makes the same each time."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or "checkpoint" in name or any(part in name for part in PASSING):
            continue
        if name.endswith(".sqlite"):
            continue  # answers on file come in the order of their asking
        data = path.read_bytes()
        if name.endswith((".json", ".jsonl")):
            with contextlib.suppress(ValueError):
                lines = data.decode().splitlines() if name.endswith(".jsonl") else [data.decode()]
                found[name] = [without_clocks(json.loads(line)) for line in lines]
                continue
        found[name] = data
    return found


def compared(reference: dict[str, Any], folder: Path) -> str:
    """Empty where the folder holds the reference's results, else what differs."""
    now = results(folder)
    wrong = [name for name in sorted(reference.keys() | now.keys()) if reference.get(name) != now.get(name)]
    return ", ".join(f"{name} ({_apart(reference.get(name), now.get(name))})" for name in wrong[:4])


def _apart(a: Any, b: Any) -> str:
    """Where two contents first differ."""
    if isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{len(a)} lines, now {len(b)}"
        a, b = next((x, y) for x, y in zip(a, b, strict=True) if x != y)
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(k for k in [*a, *b] if (k in a, a.get(k)) != (k in b, b.get(k)))
        return f"{key}: {a.get(key)!r}, now {b.get(key)!r}"[:200]
    return "gone" if b is None else "new" if a is None else "other bytes"


def outcome(
    status: int | None, said: str, difference: str, trusted: bool = False, damaged: str | None = None
) -> str:
    """The outcome of a run in a word; `damaged` is the file that was, where one was."""
    if said == "hang":
        return "hang"
    if "Traceback (most recent call last)" in said or status == 70:
        return "traceback"
    if status is not None and status < 0:
        return "crash"
    if status not in (0, None):
        return "told"
    if not difference:
        return "same"
    alone = difference.startswith(f"{damaged} (") and "), " not in difference
    if alone and damaged is not None and damaged in said:
        return "noted"
    return "trusted" if trusted else "different"


# --- what is done to a verb ---


class Verb:
    """A verb's reference run, and how long it took."""

    def __init__(self, name: str, home: Path, files: str = "") -> None:
        self.name, self.home, self.number, self.files = name, home, itertools.count(), files
        folder = self.folder()
        since = time.monotonic()
        status, said = ended(start(name, folder), folder)
        self.seconds = time.monotonic() - since
        if status:
            raise SystemExit(f"{name}: the reference run ended with {status}: {said[-1500:]}")
        self.reference, self.whole = results(folder), folder

    def folder(self) -> Path:
        """A new name for a folder."""
        path = self.home / self.name / f"run-{next(self.number)}"
        path.parent.mkdir(exist_ok=True)
        return path

    def killed(self, kills: int, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Killed so many times, then left to finish. What finishes before a kill begins anew elsewhere."""
        folder, left = self.folder(), kills
        while left:
            pid = start(self.name, folder)
            status, said = ended(pid, folder, rng.uniform(0, self.seconds))
            if status is None:
                left -= 1
                continue
            difference = compared(self.reference, folder)
            where = f"{left} kills to go, status {status}: {difference or said[-300:]}"
            yield outcome(status, said, difference), where
            folder = self.folder()
        status, said = ended(start(self.name, folder), folder)
        difference = compared(self.reference, folder)
        yield outcome(status, said, difference), f"after {kills} kills: {difference or said[-300:]}"

    def at_once(self) -> Iterator[tuple[str, str]]:
        """Two with the same settings, and the command once more at the end."""
        folder = self.folder()
        both = [start(self.name, folder) for _ in range(2)]
        for pid in both:
            status, said = ended(pid, folder)
            if outcome(status, said, "") in ("traceback", "hang"):
                yield outcome(status, said, ""), said[-600:]
        status, said = ended(start(self.name, folder), folder)
        difference = compared(self.reference, folder)
        yield outcome(status, said, difference), f"afterwards: {difference or said[-300:]}"

    def two_settings(self) -> Iterator[tuple[str, str]]:
        """Two with different seeds: what is there afterwards is of one of them, whole."""
        if "SEED" not in VERBS[self.name]:
            return
        folder, other = self.folder(), self.folder()
        status, said = ended(start(self.name, other, 6), other)
        second = results(other)
        both = [start(self.name, folder), start(self.name, folder, 6)]
        ends = [ended(pid, folder) for pid in both]
        for status, said in ends:
            if outcome(status, said, "") in ("traceback", "hang"):
                yield outcome(status, said, ""), said[-600:]
        first, difference = compared(self.reference, folder), compared(second, folder)
        good = not first or not difference or all(status not in (0,) for status, _ in ends)
        yield "same" if good else "different", f"two seeds: {first}; {difference}"

    def damaged(self, rng: random.Random) -> Iterator[tuple[str, str]]:
        """Each file of a run that was killed half way removed, emptied, or with a bit of it flipped."""
        half = self.folder()
        for share in (0.7, 0.5, 0.85, 0.6):
            shutil.rmtree(half, ignore_errors=True)
            status, _ = ended(start(self.name, half), half, share * self.seconds)
            if status is None and half.exists() and any(path.is_file() for path in half.rglob("*")):
                break
        for base in (half, self.whole):
            if not base.exists():
                continue
            for path in sorted(path for path in base.rglob("*") if path.is_file()):
                name = str(path.relative_to(base))
                if LEASE.search(name) or name.endswith(("-wal", "-shm")) or self.files not in name:
                    continue
                for fault in ("removed", "emptied", "flipped"):
                    folder = self.folder()
                    shutil.copytree(base, folder)
                    target = folder / name
                    data = target.read_bytes()
                    if fault == "removed":
                        target.unlink()
                    elif fault == "emptied":
                        target.write_bytes(b"")
                    elif data:
                        at = rng.randrange(len(data))
                        target.write_bytes(
                            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
                        )
                    status, said = ended(start(self.name, folder), folder)
                    difference = compared(self.reference, folder)
                    own = any(part in name for part in OWN)
                    where = "half way" if base == half else "finished"
                    yield (
                        outcome(status, said, difference, own, name),
                        f"{where}, {name} {fault}: {difference or said[-300:]}",
                    )
                    shutil.rmtree(folder, ignore_errors=True)


WHAT: dict[str, Callable[[Verb, argparse.Namespace, random.Random], Iterator[tuple[str, str]]]] = {
    "killed": lambda verb, args, rng: verb.killed(args.kills, rng),
    "at once": lambda verb, args, rng: verb.at_once(),
    "two settings": lambda verb, args, rng: verb.two_settings(),
    "damaged": lambda verb, args, rng: verb.damaged(rng),
}
IMPORTED = (
    *("estimation", "report.figures", "theory.families"),
    *(f"llm.arms.{name}" for name in ("rollout", "resample", "instruct", "route", "judge")),
    *(f"llm.training.{name}" for name in ("open_ended", "sft", "reward")),
)
FINDINGS = ("different", "traceback", "hang", "crash")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verbs", nargs="*", help=f"any of {', '.join(VERBS)}; left out: all")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--what", nargs="*", default=[*WHAT], choices=WHAT)
    parser.add_argument("--files", default="", metavar="PART", help="damage those whose names hold this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if unknown := [verb for verb in args.verbs if verb not in VERBS]:
        parser.error(f"verb {unknown[0]}: choose from {', '.join(VERBS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    for module in IMPORTED:
        __import__(f"alignpro.{module}")
    table: dict[str, dict[str, collections.Counter[str]]] = {}
    findings = 0
    with tempfile.TemporaryDirectory(prefix="alignpro-interruptions-") as name:
        home = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            if not (pid := os.fork()):  # JAX starts threads, which a fork would not have
                inputs(home)
                os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise SystemExit("the inputs could not be made")
        for chosen in args.verbs or VERBS:
            verb = Verb(chosen, home, args.files)
            table[chosen] = {}
            for what in args.what:
                counts = table[chosen][what] = collections.Counter()
                for found, where in WHAT[what](verb, args, random.Random(args.seed)):
                    counts[found] += 1
                    if found in FINDINGS:
                        findings += 1
                        print(f"{chosen}, {what}: {found}: {where}", flush=True)
                said = ", ".join(f"{count} {found}" for found, count in sorted(counts.items())) or "–"
                print(f"{chosen:<14}{what:<14}{said}", flush=True)
            shutil.rmtree(home / chosen, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps({"seed": args.seed, "kills": args.kills, "verbs": table}, indent=1))
    print(f"{findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
