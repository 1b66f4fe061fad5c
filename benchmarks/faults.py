"""Damages every kind of file that the package reads, and counts what comes of it.

    python benchmarks/faults.py                       # every kind, 300 cases each, seed 0
    python benchmarks/faults.py rollouts --cases 5000 # one kind, more of them
    python benchmarks/faults.py --heavy               # those that load models, too

A case is a whole file with one fault. It must be refused in one line (`AlignProError`) or read; what is read
may differ from what the whole file says only for a reason that stands in `REASONS`. A traceback, a hang of
more than 10 seconds, and a difference without a reason are findings: each is printed, and the exit status is
1. Not part of the test suite, which takes a small share of it (tests/test_faults.py).
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "experiments")]
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that a fault made is not to be asked for

from alignpro.errors import AlignProError  # noqa: E402

HANG_S = 10
SEED = 0


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a whole one is made, and what is read from it."""

    file: str
    """The file that is damaged, in a folder of its own."""
    make: Callable[[Path], Any]
    """Writes it, and what goes with it, into a folder."""
    read: Callable[[Path], Any]
    """Reads the folder: numbers and texts, which are compared by their `repr`."""
    heavy: bool = False
    """Whether a model is loaded in each case."""


class Hang(BaseException):
    """A case that takes too long."""


# --- faults ---

WRONG: dict[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "fraction": "0.5",
    "many": "3000",
    "large number": "1000000000",
    "huge number": "9" * 400,
    "infinite": "1e999",
    "nan": "NaN",
    "empty text": '""',
    "text": '"x"',
    "surrogate": '"a\\ud800b"',
    "control": '"\\u001b[31m\\u202e\\u0000"',
    "list": "[]",
    "nested list": "[[[1]]]",
    "object": "{}",
    "deep": "[" * 2000 + "]" * 2000,
}
"""Values, as JSON, that are put in the place of another."""

OTHER = "another "
"""Before the name of a value that is of the type of the one before it."""
Fault = tuple[str, str, bytes]
"""The name of a fault, where in the file, and the file with it."""


def raw(data: bytes, rng: random.Random) -> Iterator[Fault]:
    """Faults of any file: cut, flipped, emptied, in another encoding, doubled."""
    yield "empty", "", b""
    yield "zeros", "", bytes(len(data))
    yield "doubled file", "", data + data
    yield "doubled lines", "", b"".join(line * 2 for line in data.splitlines(keepends=True))
    yield "bom", "", b"\xef\xbb\xbf" + data
    yield "null bytes", "", data + bytes(3)
    yield "not utf-8", "", data.replace(b"e", b"\xff", 1)
    yield "crlf", "", data.replace(b"\n", b"\r\n")
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode()
        yield "utf-16", "", text.encode("utf-16")
        yield "deep", "", b"[" * 100_000
        yield "deep", "closed", b"[" * 100_000 + b"]" * 100_000
        yield "deep", "objects", b'{"a":' * 100_000
        yield "another value", "", rng.choice([b"null", b"0", b'""', b"[]", b"{}", b"9" * 5000, b"[{}]"])
    for _ in range(max(8, min(200, len(data) // 4))):
        at = rng.randrange(max(1, len(data)))
        yield "cut", "", data[:at]
        at, bit = rng.randrange(max(1, len(data))), 1 << rng.randrange(8)
        yield "flipped bit", "", data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :] if data else data
    for _ in range(8):
        lines = data.splitlines(keepends=True)
        if len(lines) > 1:
            at = rng.randrange(len(lines))
            yield "line gone", "", b"".join(lines[:at] + lines[at + 1 :])
            yield "line twice", "", b"".join([*lines[: at + 1], *lines[at:]])


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value."""
    yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from paths(each, (*here, key))


def _mark(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = _mark(value[path[0]], path[1:], new)
    return copy


_GONE = object()


def _without(value: Any, path: tuple[Any, ...]) -> Any:
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = _without(value[path[0]], path[1:])
    return copy


def _like(name: str, old: Any) -> bool:
    """Whether a wrong value is of the type of the one in whose place it is put."""
    new = json.loads(WRONG[name]) if name != "deep" else []
    if isinstance(old, float) and not isinstance(new, bool):
        return isinstance(new, int | float) and abs(new) < 1e300  # type: ignore[operator]
    return type(new) is type(old)


def in_json(value: Any, dump: Callable[[Any], str] = json.dumps) -> Iterator[tuple[str, str, str]]:
    """Faults of a JSON value: a wrong one in each place, each key gone, renamed or twice."""
    for path in paths(value):
        where = ".".join("*" if isinstance(part, int) else str(part) for part in path)
        marked, old = dump(_mark(value, path, "@@@")), value
        for part in path:
            old = old[part]
        for name, new in WRONG.items():
            yield OTHER * _like(name, old) + name, where, marked.replace('"@@@"', new)
        if path:
            yield "key gone", where, dump(_without(value, path))
        if path and isinstance(path[-1], str):
            parent = value
            for part in path[:-1]:
                parent = parent[part]
            other = {("renamed" if key == path[-1] else key): each for key, each in parent.items()}
            yield "key renamed", where, dump(_mark(value, path[:-1], other))
            twin = dump(_mark(value, path[:-1], {"@@@": 0, **parent}))
            yield "key twice", where, twin.replace('"@@@"', json.dumps(path[-1]))


def structured(file: str, data: bytes) -> Iterator[Fault]:
    """Faults of what a file of this kind holds."""
    suffix = Path(file).suffix
    if suffix == ".json":
        for name, where, text in in_json(json.loads(data), lambda v: json.dumps(v, indent=1)):
            yield name, where, text.encode()
    elif suffix == ".jsonl":
        lines = data.decode().splitlines()
        for i in dict.fromkeys((0, len(lines) - 1)):
            for name, where, text in in_json(json.loads(lines[i])):
                yield name, where, "\n".join([*lines[:i], text, *lines[i + 1 :], ""]).encode()
    elif suffix in (".yaml", ".yml"):
        import yaml

        # JSON is YAML, but for what its writer makes of keys: every path of it is tried as that.
        for name, where, text in in_json(yaml.safe_load(data), lambda v: json.dumps(v, indent=1)):
            yield name, where, text.encode()
    elif suffix == ".safetensors":
        yield from _tensors(data)
    elif suffix == ".npz":
        yield from _arrays(data)
    elif suffix == ".jinja":
        for text in (
            "null",
            "{{ messages }}",
            "{% for m in messages %}",
            "{{ 1/0 }}",
            "{{ x.y.z }}",
            "U S ?",
        ):
            yield "another value", text, text.encode()


def _tensors(data: bytes) -> Iterator[Fault]:
    import numpy as np
    from safetensors.numpy import load, save

    whole = load(data)
    for name, array in whole.items():
        rest = {key: value for key, value in whole.items() if key != name}
        yield "key gone", name, save(rest)
        yield "key renamed", name, save(rest | {f"{name}x": array})
        yield "another prefix", name, save(rest | {f"other.{name}": array})
        yield "one more", name, save(whole | {f"{name}.more": array})
        yield "transposed", name, save(rest | {name: np.ascontiguousarray(array.T)})
        yield "flattened", name, save(rest | {name: array.reshape(-1)})
        yield "one row less", name, save(rest | {name: array[:-1].copy()})
        yield "no rows", name, save(rest | {name: array[:0].copy()})
        yield "integers", name, save(rest | {name: array.astype(np.int32)})
        for word, value in (("nan", np.nan), ("infinite", np.inf)):
            damaged = array.copy()
            damaged.reshape(-1)[-1:] = value
            yield word, name, save(rest | {name: damaged})
    yield "no tensors", "", save({})
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    for word, where, text in itertools.islice(in_json(header), 4000):
        yield word, where, len(text.encode()).to_bytes(8, "little") + text.encode() + body


def _arrays(data: bytes) -> Iterator[Fault]:
    import numpy as np

    whole = dict(np.load(io.BytesIO(data)))

    def packed(arrays: Mapping[str, Any], save: Callable[..., Any] = np.savez) -> bytes:
        file = io.BytesIO()
        save(file, **arrays)
        return file.getvalue()

    yield "compressed", "", packed(whole, np.savez_compressed)
    for name, array in whole.items():
        rest = {key: value for key, value in whole.items() if key != name}
        yield "key gone", name, packed(rest)
        yield "key renamed", name, packed(rest | {f"{name}x": array})
        yield "one more", name, packed(whole | {f"{name}x": array})
        yield "pickled", name, packed(rest | {name: np.array([object], dtype=object)})
        for word, other in (
            ("transposed", array.T),
            ("flattened", array.reshape(-1)),
            ("no rows", array[:0] if array.ndim else array),
            ("text", array.astype(str)),
            ("one number", np.array(0.5)),
        ):
            yield word, name, packed(rest | {name: other})
        if array.dtype.kind in "fi":
            for word, value in (("nan", np.nan), ("infinite", np.inf), ("negative", -1), ("huge", 1e308)):
                damaged = array.astype(float)
                damaged.reshape(-1)[-1] = value
                yield word, name, packed(rest | {name: damaged})


def place(path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Other things in a file's place."""
    yield "no file", path.unlink
    yield "a folder", lambda: (path.unlink(), path.mkdir())
    yield "a loop of links", lambda: (path.unlink(), path.symlink_to(path))
    yield "a link to nothing", lambda: (path.unlink(), path.symlink_to("nothing"))
    yield "a link to a folder", lambda: (path.unlink(), path.symlink_to("."))


# --- a case ---


@dataclass
class Outcome:
    """What came of a case: `refused`, `same`, `differs`, `traceback`, `hangs`, or `lines` (of an error)."""

    what: str
    said: str = ""


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raise Hang in the block after so many seconds."""

    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: Kind, folder: Path, whole: str) -> Outcome:
    """Read a folder and say what came of it."""
    try:
        with patience(HANG_S), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = repr(kind.read(folder))
    except AlignProError as error:
        return Outcome("refused" if "\n" not in str(error) and str(error) else "lines", str(error))
    except Hang:
        return Outcome("hangs")
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/alignpro/" in f.filename]
        frames += [f for f in traceback.extract_tb(error.__traceback__) if "/experiments/" in f.filename]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return Outcome("traceback", f"{at} {type(error).__name__}: {str(error)[:120]}")
    return Outcome("same" if found == whole else "differs", found)


def run(
    name: str, kind: Kind, cases: int, seed: int = SEED, *, places: bool = True
) -> Iterator[tuple[str, str, Outcome]]:
    """Cases of one kind: the name of each fault, where it is, and what came of it; with `places`, those of
    other things in the file's place, too."""
    rng = random.Random(f"{seed} {name}")
    home = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        folder, other = home / "whole", home / "damaged"
        folder.mkdir()
        kind.make(folder)
        data = (folder / kind.file).read_bytes()
        with contextlib.redirect_stderr(io.StringIO()):
            whole, again = repr(kind.read(folder)), repr(kind.read(folder))
        if whole != again:
            raise RuntimeError(f"{name}: two readings of a whole file differ")
        shutil.copytree(folder, other)
        path = other / kind.file
        faults = [*raw(data, rng), *structured(kind.file, data)]
        if len(faults) > cases:
            faults = rng.sample(faults, cases)
        for fault, where, damaged in faults:
            path.write_bytes(damaged)
            yield fault, where, outcome(kind, other, whole)
        for fault, put in place(path) if places else ():
            shutil.rmtree(other)
            shutil.copytree(folder, other)
            put()
            yield fault, "", outcome(kind, other, whole)
    finally:
        shutil.rmtree(home)


# --- kinds ---

KINDS: dict[str, Kind] = {}


def kind(name: str, file: str, read: Callable[[Path], Any], heavy: bool = False) -> Callable[[Any], Any]:
    """Add a kind whose files the decorated function makes."""

    def add(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
        KINDS[name] = Kind(file, make, read, heavy)
        return make

    return add


ASKED = (
    "How do plants grow?",
    "Name a painter of é and 🌻.",
    "Tips for sleeping better",
    "Say why",
    "Is it?",
)


def jsonl(path: Path, rows: Any) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _prompts(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from alignpro.llm.data.own import read_prompts
        from alignpro.llm.data.rows import Reading
        from alignpro.llm.models.prompt import as_json

        reading = Reading() if name.endswith("txt") else Reading(optional=("*",))
        return [as_json(x) for x in read_prompts(folder / name, reading=reading)]

    return read


@kind("prompts as text", "prompts.txt", _prompts("prompts.txt"))
def _(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(ASKED) + "\n", encoding="utf-8")


@kind("prompts as JSON lines", "prompts.jsonl", _prompts("prompts.jsonl"))
def _(folder: Path) -> None:
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = [{"prompt": x, "level": i, "more": {"a": [1, "b"]}} for i, x in enumerate(ASKED)]
    rows[0]["prompt"] = [*turns, {"role": "user", "content": ASKED[0]}]
    jsonl(folder / "prompts.jsonl", rows)


@kind("prompts as JSON", "prompts.json", _prompts("prompts.json"))
def _(folder: Path) -> None:
    rows = [{"instruction": x, "input": f"of {i}"} for i, x in enumerate(ASKED)]
    (folder / "prompts.json").write_text(json.dumps(rows), encoding="utf-8")


@kind("prompts as CSV", "prompts.csv", _prompts("prompts.csv"))
def _(folder: Path) -> None:
    lines = ["prompt,answer", *(f'"{x}",{i}' for i, x in enumerate(ASKED))]
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@kind("prompts as Parquet", "prompts.parquet", _prompts("prompts.parquet"))
def _(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"prompt": list(ASKED)}), folder / "prompts.parquet")


def _pairs(folder: Path) -> Any:
    from alignpro.llm.data.own import read_pairs

    return read_pairs(folder / "pairs.jsonl")


@kind("preference pairs", "pairs.jsonl", _pairs)
def _(folder: Path) -> None:
    jsonl(folder / "pairs.jsonl", [{"prompt": x, "chosen": "yes " + x, "rejected": "no"} for x in ASKED])


def _rewrites(folder: Path) -> Any:
    from alignpro.llm.arms.given import read_given
    from alignpro.llm.data.own import read_rewrites

    read = read_rewrites(folder / "rewrites.jsonl")
    given = read_given(folder / "rewrites.jsonl", ASKED)
    return read, given


@kind("rewrites", "rewrites.jsonl", _rewrites)
def _(folder: Path) -> None:
    jsonl(
        folder / "rewrites.jsonl",
        [{"prompt": x, "rewrite": f"{x} Briefly.", "calls": 2, "cost": 0.25} for x in ASKED],
    )


def _instructions(folder: Path) -> Any:
    from alignpro.llm.arms.instruct import read_instructions

    return read_instructions(str(folder / "instructions.txt"))


@kind("instructions", "instructions.txt", _instructions)
def _(folder: Path) -> None:
    (folder / "instructions.txt").write_text("Answer briefly.\nGive an example.\n", encoding="utf-8")


def _rubric(folder: Path) -> Any:
    from alignpro.llm.rewards.rubric import JudgeRewardSettings

    return JudgeRewardSettings(judge="x", rubric=str(folder / "rubric.txt")).text()


@kind("a rubric", "rubric.txt", _rubric)
def _(folder: Path) -> None:
    (folder / "rubric.txt").write_text("A good answer is short.\nIt says why.\n", encoding="utf-8")


def _rollouts(folder: Path) -> Any:
    from alignpro import rollouts
    from alignpro.commands.explore import Reader
    from alignpro.llm.arms import judge, rollout

    path = folder / "rollouts.jsonl"
    found = rollouts.read(path)
    summary = rollout.summarise(path, texts=1)
    seen = Reader(str(path))
    pages = [seen.prompt(i) for i in range(len(seen.rows))], seen.find("plants")
    pairs = judge.pairs(path, ("sft", "none")) if {"sft", "none"} <= set(found.arms) else ()
    names = ("reward", "prompt", "arm", "seed", "draw", "answer", "refused", "spread")
    columns = [getattr(found, name) for name in names]
    columns += [*found.logps.values(), *found.parts.values()]
    return found.arms, found.frozen, found.prompters, found.low, columns, summary.texts, pages, pairs


@kind("rollouts", "rollouts.jsonl", _rollouts)
def _(folder: Path) -> None:
    from alignpro.rollouts import Rollout

    rng, rows = random.Random(0), []
    for i, x in enumerate(ASKED):
        for arm, draw, answer in itertools.product(("none", "sft"), range(2), range(2)):
            reward, rewrite = rng.random(), x if arm == "none" else f"{x} {draw}"
            logps = (-3.0, -3.0 if rewrite == x else -2.5, None if arm == "none" else -1.0, -1.5, None)
            shared = ("frozen", arm, "reward", '{"temperature": 1}', 0.0, 1.0)
            rows.append(
                Rollout(
                    *(f"p{i}", x, arm, 0, draw, answer, rewrite, f"{answer} because", reward),
                    *logps,
                    *shared,
                    context=[{"role": "user", "content": "Hello"}] if i == 0 else None,
                    columns={"level": [i, {"a": "b"}]},
                    reward_parts={"a": [reward, 0.0, 1.0]},
                    reward_spread=0.1,
                )
            )
    (folder / "rollouts.jsonl").write_text("".join(row.line() for row in rows), encoding="utf-8")


def _resumed(folder: Path) -> Any:
    from alignpro.llm.arms import rollout
    from alignpro.llm.arms.settings import RolloutSettings

    record = {"prompts": "d", "draws": 2, "arms": {"none": {}, "sft": {}}, "frozen": "frozen"}
    settings = RolloutSettings(arms=("none", "sft"), draws=2, answers=2)
    found = rollout.plan(folder, ASKED, settings, record)
    return len(found.kept), len(found.todo), found.run.record


@kind("a rollout's settings", "settings.json", _resumed)
def _(folder: Path) -> None:
    KINDS["rollouts"].make(folder)
    record = {"prompts": "d", "draws": 2, "arms": {"none": {}, "sft": {"lam": 1}}, "frozen": "frozen"}
    text = json.dumps({"verb": "rollout", **record, "contents": {"frozen": "0123"}}, indent=1)
    (folder / "settings.json").write_text(text)


@kind("rollouts to go on with", "rollouts.partial.jsonl", _resumed)
def _(folder: Path) -> None:
    KINDS["a rollout's settings"].make(folder)
    (folder / "rollouts.jsonl").rename(folder / "rollouts.partial.jsonl")


def _demo(folder: Path) -> Any:
    from alignpro.runs import Run

    run = Run(folder, "demo", "run.json", contents={"prompts": lambda: "0123"})
    run.begin({"settings": {"lam": 0.1, "model": "m"}, "seed": 0}, resume=True)
    return run.record


@kind("a demo's settings", "run.json", _demo)
def _(folder: Path) -> None:
    record = {"verb": "demo", "settings": {"lam": 0.1, "model": "m"}, "seed": 0}
    (folder / "run.json").write_text(json.dumps({**record, "contents": {"prompts": "0123"}}))


def _judgements(folder: Path) -> Any:
    from alignpro.estimation import winrate

    found = winrate.read(folder / "judgements.jsonl")
    return found, winrate.win_rates(found) if len(set(found.prompt.tolist())) >= 5 else None


@kind("judgements", "judgements.jsonl", _judgements)
def _(folder: Path) -> None:
    from alignpro.llm.arms.judge import Judgement, Pair
    from alignpro.llm.arms.question import Reading

    verdicts = (Reading("A", None, "A"), Reading(None, "no verdict", "?"))
    rows = [
        Judgement(Pair(f"p{i}", x, ("a", "bb")), (verdicts[i % 2], verdicts[0])).row(("sft", "none"), "judge")
        for i, x in enumerate(ASKED)
    ]
    jsonl(folder / "judgements.jsonl", rows)


def _proposals(folder: Path) -> Any:
    from alignpro.llm.arms.resample import load_proposals

    return load_proposals(folder / "proposals.jsonl")


@kind("proposals", "proposals.jsonl", _proposals)
def _(folder: Path) -> None:
    from alignpro.llm.arms.resample import Proposals, save_proposals

    save_proposals(
        folder / "proposals.jsonl", [Proposals(x, (x, "y"), (0.5, 0.25), 2, 4, 0.5) for x in ASKED]
    )


def _cells(folder: Path) -> Any:
    from alignpro.llm.arms.instruct import Cells

    with tempfile.TemporaryDirectory() as home:  # what is torn is mended there
        copy = Path(home) / "copy"
        shutil.copytree(folder, copy, symlinks=True)
        cells: Any = Cells(copy, ("", "Briefly."), *[None] * 5)  # type: ignore[arg-type]
        return sorted(cells.kept.items())


@kind("an instruction's rewards", "cells.jsonl", _cells)
def _(folder: Path) -> None:
    row = {"kind": "race", "candidates": ["", "Briefly."], "prompts": ["p0"], "answers": 2}
    rewards = [[[0.5, 1.0]], [[0.25, 0.0]]]
    jsonl(
        folder / "cells.jsonl",
        [{**row, "prompts": [f"p{i}"], "rewards": rewards, "refused": 0} for i in (0, 1)],
    )


def _router(folder: Path) -> Any:
    from alignpro.llm.arms.route import load

    found = load(folder)
    router = [getattr(found.router, name).tolist() for name in ("mean", "centre", "scale", "weights")]
    return router, found.router.ridge, found.instructions, vars(found.reader)


def _routes(folder: Path) -> None:
    import numpy as np

    from alignpro.estimation.routing import taught
    from alignpro.llm.arms.route import Reader, Saved

    router = taught(np.arange(8.0).reshape(4, 2) % 3, np.arange(12.0).reshape(4, 3) % 5, 1.0)
    Saved(router, ("", "Briefly.", "In full."), Reader("smollm2-135m-instruct"), np.array).save(folder)


for _file in ("router.json", "router.safetensors"):
    KINDS[f"a router's {_file}"] = Kind(_file, _routes, _router)


def _enumeration(folder: Path) -> Any:
    from alignpro.llm.arms.enumerate import Enumeration

    found = Enumeration.load(folder)
    return vars(found) | {"instance": [getattr(found.instance, key) for key in ("p", "prior", "reward")]}


def _enumerated(folder: Path) -> None:
    import numpy as np

    from alignpro.llm.arms.enumerate import Enumeration
    from alignpro.theory.instance import Instance, Names

    blocks, even = np.kron(np.eye(2), np.full((1, 2), 0.5)), np.kron(np.eye(2), np.full((2, 2), 0.5))
    names = Names(("a", "b"), ("a", "b", "b", "a"), ("v", "w", "y", "z"))
    reward = np.arange(8.0).reshape(2, 4)
    instance = Instance(np.array([0.5, 0.5]), blocks, even, np.array([0, 3]), reward, names)
    ids = (((1, 2), (3,)), ((1,), (2, 3)))
    texts = (("a", "b"), ("b", "a"))
    Enumeration(
        prompts=("a", "b"),
        prompt_ids=((1,), (2,)),
        rewrite_ids=ids,
        response_ids=ids,
        rewrites=texts,
        responses=texts,
        instance=instance,
    ).save(folder)


KINDS["an enumeration's texts"] = Kind("texts.json", _enumerated, _enumeration)
KINDS["an instance"] = Kind("instance.npz", _enumerated, _enumeration)


def _answers(folder: Path) -> Any:
    from alignpro.llm.targets.store import Store

    with tempfile.TemporaryDirectory() as home:  # opening it may write
        copy = Path(home) / "copy"
        shutil.copytree(folder, copy, symlinks=True)
        store = Store(copy)
        try:
            return store.get([f"{i:064x}" for i in range(3)]), store.spent(), store.damaged
        finally:
            store._db.close()


def _lines_of_answers() -> list[dict[str, Any]]:
    from alignpro.llm.targets.target import Answer

    shared = {"model": "m", "revision": "r", "calls": 1, "retries": 0, "seconds": 0.5, "cost": 0.1}
    answer = vars(Answer("because é", "stop", 3, 2, (1, 2), False, -1.5))
    return [{"key": f"{i:064x}", "answer": answer, **shared} for i in range(3)]


@kind("answers", "answers.sqlite", _answers)
def _(folder: Path) -> None:
    from alignpro.llm.targets.store import Store

    store = Store(folder)
    for line in _lines_of_answers():
        store.add("o", {"calls": 1, "answers": 1, "tokens": 2}, line, lasting=True)
    store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._db.close()


@kind("answers as they were kept before", "answers.jsonl", _answers)
def _(folder: Path) -> None:
    jsonl(folder / "answers.jsonl", _lines_of_answers())


def _config(folder: Path) -> Any:
    from alignpro.commands import main

    return main._parse(["train", "--out", "d", "--config", str(folder / "c.yaml")])


@kind("options of a verb", "c.yaml", _config)
def _(folder: Path) -> None:
    lines = ["prompter: m", "target: t", "reward: words@0,1", "lam: 0.05", "seed: 3", "resume: true"]
    lines += ["target-extra-body: '{}'", "iterations: 4", "algorithm: rloo", "prompts-file: p.txt"]
    (folder / "c.yaml").write_text("\n".join(lines) + "\n")


def _preset(folder: Path) -> Any:
    from paper_grid import cost, plan

    preset = plan.load(str(folder / "mine.yaml"))
    cost.machine_of(preset)
    jobs = plan.jobs(preset)
    plan.check(jobs)
    sizes = [cost.of_job(job, preset).seconds for job in jobs if "smollm2" in str(job.options)]
    return preset, plan.cells(preset), [job.resolved(Path("out")) for job in jobs], sizes


@kind("a preset of the grid", "mine.yaml", _preset)
def _(folder: Path) -> None:
    from paper_grid import plan

    (folder / "mine.yaml").write_text((plan.PRESETS / "small.yaml").read_text())


def _job(folder: Path) -> Any:
    from paper_grid import plan, work

    job = plan.Job("train", "train", {"prompter": "m", "seed": 3, "lam": 0.05, "resume": True})
    work.check_settings([job], folder)
    return work.settled([job], folder), work.times([job], folder)


def _done(folder: Path) -> None:
    from paper_grid import plan

    plan.write_config(
        plan.Job("train", "train", {"prompter": "m", "seed": 3, "lam": 0.05, "resume": True}), folder
    )
    (folder / "train" / "finished.json").write_text('{"seconds": 1.5, "cpu_seconds": 1.0}')


KINDS["a job of the grid"] = Kind("train/config.yaml", _done, _job)
KINDS["a job's end"] = Kind("train/finished.json", _done, _job)


@kind("a job's failure", "train/failed.json", _job)
def _(folder: Path) -> None:
    _done(folder)
    (folder / "train/finished.json").unlink()
    (folder / "train/failed.json").write_text('{"reason": "no", "again": false, "deaths": 0}')


def _head(folder: Path) -> Any:
    from alignpro.llm.rewards.bradley_terry import BradleyTerryReward

    found = BradleyTerryReward.load(folder, embedder=object())  # type: ignore[arg-type]
    return found.describe(), found.weights.sum(), found.mean, found.baseline, found.centre, found.scale


def _trained_head(folder: Path) -> None:
    import numpy as np

    from alignpro.llm.rewards.bradley_terry import BradleyTerryReward
    from alignpro.llm.rewards.features import TEXT_FEATURES, Embedder

    rng, size = np.random.default_rng(0), Embedder.DIMENSION + len(TEXT_FEATURES)
    arrays = {name: rng.normal(size=size) for name in ("weights", "mean", "scale_by")}
    facts = {"accuracy": [0.7, 0.6, 0.8], "pairs": {"train": 10}, "limits": "none"}
    BradleyTerryReward(
        **arrays,
        baseline=rng.normal(size=Embedder.DIMENSION + 1),
        centre=0.0,
        scale=1.0,
        facts=facts,
        embedder=object(),  # type: ignore[arg-type]
    ).save(folder)


KINDS["a trained head"] = Kind("head.safetensors", _trained_head, _head)
KINDS["a trained head's facts"] = Kind("reward.json", _trained_head, _head)


# --- kinds that load models ---


def _model(folder: Path) -> Any:
    import torch

    from alignpro.llm.models import load, policy

    model, tokenizer = load.load_model(folder / "model", device="cpu")
    ids = tokenizer.encode("abcb")
    with torch.inference_mode():
        scores = policy.log_probs(model, [tuple(ids)], [(4, 5, 1)]).log_probs
    return ids, scores.tolist(), model.generation_config.eos_token_id


def _tiny(folder: Path) -> None:
    from alignpro.llm.models.configure import tiny_model

    model, tokenizer = tiny_model(0, hidden=8)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


for _file in (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
):
    KINDS[f"a model's {_file}"] = Kind(f"model/{_file}", _tiny, _model, heavy=True)


def _prompter(folder: Path) -> Any:
    from alignpro.llm.policies.prompter import Prompter

    found = Prompter.from_pretrained(folder / "prompter", device="cpu")
    return found.template, found.max_tokens, found.facts, found.log_probs(["abc"], ["cab"]).tolist()


def _adapted(folder: Path) -> None:
    import torch
    from peft import get_peft_model

    from alignpro.llm.models import adapters, load
    from alignpro.llm.policies.prompter import Prompter

    _tiny(folder)
    model, tokenizer = load.load_model(folder / "model", device="cpu")
    adapted: Any = get_peft_model(model, adapters.adapter_config(model, 2, 0.5))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    prompter = Prompter(adapted, tokenizer, base="../model", facts={"settings": {"lam": 0.1}})
    prompter.save(folder / "prompter")


for _file in ("prompter.json", "adapter_config.json", "adapter_model.safetensors"):
    KINDS[f"a prompter's {_file}"] = Kind(f"prompter/{_file}", _adapted, _prompter, heavy=True)


def _classifier(folder: Path) -> Any:
    from alignpro.llm.rewards.classifier import SequenceReward

    reward = SequenceReward.load(folder / "model", device="cpu")
    return reward.low, reward.high, reward.score(["abc"], ["cab"]).tolist(), reward.facts


def _classifies(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from alignpro.llm.models.configure import tiny_model

    _, tokenizer = tiny_model(0, hidden=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            pad_token_id=0,
        )
        LlamaForSequenceClassification(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    facts = {"bounds": "clip:-1,1", "template": "{prompt}{response}", "max_tokens": 64, "accuracy": 0.7}
    (folder / "model" / "reward.json").write_text(json.dumps(facts))


for _file in ("config.json", "tokenizer.json", "model.safetensors", "reward.json"):
    KINDS[f"a classifier's {_file}"] = Kind(f"model/{_file}", _classifies, _classifier, heavy=True)


def _trained(folder: Path, rounds: int) -> Any:
    """Train in `folder` until so many rounds are done; what the run says, and what it learned."""
    import numpy as np

    from alignpro.llm.arms.train import train
    from alignpro.llm.models.configure import tiny_model
    from alignpro.llm.models.sampling import Sampling
    from alignpro.llm.policies.prompter import Prompter
    from alignpro.llm.rewards.function import CallableReward
    from alignpro.llm.targets.local import LocalTarget

    model, tokenizer = tiny_model(0, hidden=8)
    reward = CallableReward(lambda x, y: [float("a" in text) for text in y], "0,1", name="has an a")
    found = train(
        ["abc", "cab", "bca"],
        reward=reward,
        target=LocalTarget((tiny_model(1, hidden=8)[0], tokenizer)),
        prompter=Prompter(model, tokenizer, base="tiny"),
        out=folder,
        answers=Sampling(max_tokens=2),
        held_out=["ab", "ba"],
        eval_every=1,
        resume=True,
        progress=False,
        iterations=rounds,
        prompts_per_round=2,
        draws=2,
        epochs=1,
        rewrite_tokens=2,
        schedule="constant",
    )
    weights = {
        name: float(np.abs(w.detach().numpy()).sum())
        for name, w in found.prompter.model.named_parameters()
        if "lora_" in name
    }
    return found.record, found.metrics, found.evaluations, weights


def _gone_on(folder: Path) -> Any:
    copy = folder.parent / "gone on"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, symlinks=True)
    return _trained(copy, 3)


for _file in (
    "settings.json",
    "metrics.jsonl",
    "evaluations.jsonl",
    "rewrites.jsonl",
    "checkpoint-2/complete",
    "checkpoint-2/trainer_state.json",
    "checkpoint-2/adapter_model.safetensors",
    "checkpoint-2/optimizer.pt",
):
    KINDS[f"a training's {_file}"] = Kind(_file, lambda folder: _trained(folder, 2), _gone_on, heavy=True)


# --- what is right though the numbers differ ---

_NONE = "no file|a folder|a loop of links|a link to .*"
REASONS: tuple[tuple[str, str, str, str], ...] = (
    (".*", "another .*", ".*", "a value of the field's own type: it is what the file says"),
    (
        ".*",
        "flipped bit|not utf-8",
        ".*",
        "another letter, digit, name or line end, and no check sum that tells",
    ),
    (".*", "line gone|line twice|doubled .*", ".*", "rows are a file's to have, once or twice"),
    (".*", "cut|empty", "", "a file that ends where a row does is a shorter one"),
    (
        ".*",
        "crlf|bom|null bytes|compressed",
        ".*",
        "how a text begins, or ends its lines, is not what it says",
    ),
    ("prompts as text|instructions|a rubric", ".*", ".*", "whatever has letters is a text"),
    ("prompts as .*", ".*", "level.*|more.*|answer", "a further column may hold anything, or be missing"),
    (
        "prompts as .*",
        "text|control|key gone|null",
        ".*",
        "a prompt is a text or a chat, and may be in parts",
    ),
    ("prompts as .*", "list", ".*content", "what a chat says may be in parts"),
    ("prompts as .*", "key renamed", ".*", "a prompt is in the first column whose name is known"),
    ("rollouts", "null", "response", "a service refused to answer"),
    (
        "rewrites",
        ".*",
        "calls|cost",
        "what a rewrite took is told where it is known, as numbers or their texts",
    ),
    (
        "rollouts",
        ".*",
        "(context|columns|reward_parts|reward_spread|logp_.*).*",
        "a field may be null, or missing",
    ),
    ("rollouts", ".*", "columns.*", "a further column may hold anything"),
    ("rollouts to go on with", ".*", ".*", "a line that is none is drawn again"),
    (
        "a .*settings",
        ".*",
        "(contents|arms).*",
        "what was not recorded, as in earlier versions, is not compared",
    ),
    (
        "judgements",
        ".*",
        "rollouts.*|replies.*|failures.*|lengths.*|prompt_id|identical|judge|arms.*",
        "is shown",
    ),
    ("judgements", "null", "verdicts.*", "a reply without a verdict"),
    ("proposals", ".*", "responses|calls|original", "a field that has a default, or may be null"),
    ("an instruction's rewards", ".*", ".*", "a block that is none is asked for again"),
    ("an enumeration's texts", "key gone", ".*_ids.*", "another sequence of tokens, which nothing names"),
    ("an instance", "negative|huge", "reward", "any finite reward"),
    ("an instance", "key gone|key renamed", "names", "labels may be missing"),
    ("answers as they .*", ".*", ".*", "a line that is none is counted, and its answer asked for again"),
    ("answers", _NONE, ".*", "no answers are kept yet"),
    (
        "options of a verb",
        "key gone|null|zero|.*number|many|fraction|negative|true|infinite|nan",
        ".*",
        "as typed",
    ),
    ("options of a verb", "list", "reward", "a reward may be several"),
    ("a preset of the grid", "key gone|null", ".*", "a field that has a default"),
    (
        "a preset of the grid",
        "key renamed",
        r"\w+\.[^.]+",
        "prompters, models and data sets have names of its own",
    ),
    (
        "a preset of the grid",
        ".*number|many|zero|fraction|negative|infinite|nan|true",
        ".*",
        "a number is a name, too, where a name is asked for",
    ),
    ("a job's (end|failure)", _NONE, ".*", "a job without the file is to be done"),
    ("a job's end", "key gone|key renamed", ".*", "times are told"),
    ("a trained head's facts", ".*", ".*", "facts are shown, and nothing is computed from them"),
    ("a classifier's reward.json", ".*", "accuracy.*", "facts are shown, and nothing is computed from them"),
    ("a prompter's prompter.json", ".*", "facts.*", "facts are shown, and nothing is computed from them"),
    ("a prompter's prompter.json", "no file", "", "a folder without it is an adapter that PEFT saved"),
    (
        "a prompter's prompter.json",
        "key gone",
        "template.*",
        "a field, or an example, that need not be there",
    ),
    (".*tokenizer.*", ".*", ".*", "another tokenizer: what its tokens are is its own to say"),
    (
        ".*config.json",
        "key gone|null|key renamed",
        ".*",
        "a field that has a default, of what the weights fit",
    ),
    (
        ".*config.json",
        "true|zero|negative|fraction|many|.*number",
        "(.*[.])?(rms_norm_eps|rope_theta|lora_alpha|r)",
        "a number that fits the weights as any does, and makes another model",
    ),
    (".*safetensors", "transposed", ".*", "a square of numbers, whose sides are alike"),
)
"""Patterns of a kind, a fault and its place, and why a file with it may say something else."""


def reason(kind_name: str, fault: str, where: str) -> str:
    """Why a file with this fault may be read as another; empty where nothing says so."""
    said = (kind_name, fault, where)
    found = (row[3] for row in REASONS if all(map(re.fullmatch, row[:3], said)))
    return next(found, "")


def main(arguments: list[str] | None = None) -> int:
    """Damage the kinds that are asked for, print what came of it, and give the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help="words of the kinds' names; all that load no model if none")
    parser.add_argument("--cases", type=int, default=300, help="most cases of a kind")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--heavy", action="store_true", help="those that load models, too")
    parser.add_argument("--differs", action="store_true", help="list what is read as another file")
    args = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    chosen = {
        name: each
        for name, each in KINDS.items()
        if (any(word in name for word in args.kinds) if args.kinds else args.heavy or not each.heavy)
    }
    total: collections.Counter[str] = collections.Counter()
    findings: collections.Counter[str] = collections.Counter()
    others: collections.Counter[str] = collections.Counter()
    print(
        f"{'kind':<36}{'cases':>7}{'refused':>9}{'same':>7}{'differs':>9}{'traceback':>11}{'hangs':>7}{'s':>7}"
    )
    for name, each in chosen.items():
        counts: collections.Counter[str] = collections.Counter()
        start = time.monotonic()
        for fault, where, came in run(name, each, args.cases, args.seed):
            counts[came.what] += 1
            if came.what in ("traceback", "hangs", "lines"):
                findings[f"{came.what}: {name}: {came.said.split(chr(10))[0] or fault + ' ' + where}"] += 1
            elif came.what == "differs":
                why = reason(name, fault, where)
                others[f"{name}: {fault} {where}: {why or 'NO REASON'}"] += 1
                if not why:
                    findings[f"no reason: {name}: {fault} {where}"] += 1
        bad = counts["traceback"] + counts["lines"]
        total.update(counts)
        print(
            f"{name:<36}{counts.total():>7}{counts['refused']:>9}{counts['same']:>7}{counts['differs']:>9}"
            f"{bad:>11}{counts['hangs']:>7}{time.monotonic() - start:>7.1f}",
            flush=True,
        )
    print(", ".join(f"{n} {what}" for what, n in [("cases", total.total()), *sorted(total.items())]))
    for said, n in sorted((others if args.differs else {}).items()):
        print(f"  {n:>5}  {said}")
    for said, n in findings.most_common():
        print(f"{n:>5}  {said!a}")
    return int(bool(findings))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
