"""What frozen targets answered and what it cost: one append-only file that survives kills and full disks.

`answers.jsonl` holds a line per answer, written as it arrives: the SHA-256 of what determines it, the answer,
and the calls, retries, seconds and money spent since the line before. So cache and ledger are one: the sum
over lines is what was spent, whenever the run was killed. The first line of a key is the one that counts.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import writable_folder
from alignpro.llm.models import packages
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.targets.target import Answer, Answers, OnAnswer, Stopped, Target, arrange, jobs

FILE = "answers.jsonl"
_SYNC_S = 1.0


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency.

    Raises:
        AlignProError: a negative price, or none.
    """

    prompt: float
    answer: float

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                raise AlignProError(f"prices.{name} {value!r}: give money per million tokens, 0 or more")

    def cost(self, prompt_tokens: float, tokens: float) -> float:
        return (self.prompt * prompt_tokens + self.answer * tokens) / 1e6


@dataclass
class Ledger:
    """What was spent. Tokens are those of answers; a failed call's are not known."""

    calls: int = 0
    """Requests sent or sequences generated, repeated ones included."""
    retries: int = 0
    answers: int = 0
    hits: int = 0
    """Answers served from the cache."""
    prompt_tokens: int = 0
    tokens: int = 0
    thoughts: int = 0
    """Answers that began with a thought, which was taken off."""
    seconds: float = 0.0
    """Of waiting for the target, not of computing elsewhere."""
    cost: float | None = None
    """None where no prices are known."""

    def add(self, spent: "Ledger") -> None:
        """Add another's numbers to this one, in place."""
        for name, value in asdict(spent).items():
            if value is not None:
                setattr(self, name, (getattr(self, name) or 0) + value)

    def summary(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self)

    def line(self) -> str:
        """One line of text."""
        money = "" if self.cost is None else f", cost {self.cost:.4f}"
        thoughts = f", {self.thoughts} thoughts taken off" if self.thoughts else ""
        return (
            f"{self.answers} answers in {self.calls} calls ({self.retries} retries), {self.hits} more from "
            f"the cache, {self.prompt_tokens}+{self.tokens} tokens, {self.seconds:.1f} s{thoughts}{money}"
        )


@dataclass(frozen=True)
class Estimate:
    """What a `respond` would ask for, before it starts."""

    calls: int
    hits: int
    prompt_tokens: int
    """Counted where the target has a tokenizer here, otherwise a quarter of the bytes."""
    tokens: int
    """At most: `max_tokens` for each call."""
    cost: float | None
    """At most (retries apart); None without prices."""
    seconds: float | None
    """At the rate of this target's answers on file; None where there are none."""

    def line(self) -> str:
        """One line of text."""
        money = "" if self.cost is None else f", costing at most {self.cost:.4f}"
        took = "" if self.seconds is None else f", about {self.seconds:.0f} s"
        return (
            f"{self.calls} calls ({self.hits} cached), about {self.prompt_tokens} prompt tokens and at most "
            f"{self.tokens} answer tokens{money}{took}"
        )


def cache_key(name: str, revision: str, sampling: Sampling, seed: int, prompt: str, index: int) -> str:
    """SHA-256, hexadecimal, of all that determines an answer. Every sample index has a key of its own."""
    return digest("answer", name, revision, asdict(sampling), int(seed), prompt, int(index)).hex()


class Cached:
    """A target that asks only for what its folder does not hold, with the target's own interface.

    Several processes, and several targets, may share a folder. Where two ask for the same answer at the same
    time both pay, and both get the one written first.

    Args:
        target: any `Target`.
        folder: created if need be; holds `answers.jsonl`.
        prices: for the ledger's cost.
        note: called with the estimate's line before anything is asked; None keeps silent.
        whole: ask for all that a call names unless all of it is on file; what is on file is still what
            counts. In low precision an answer depends on its batch, and with this no batch depends on where
            an earlier call was interrupted.

    Raises:
        AlignProError: the folder cannot be written to, or its file not read.
    """

    def __init__(
        self,
        target: Target,
        folder: str | Path,
        *,
        prices: Prices | None = None,
        note: Callable[[str], None] | None = packages.note,
        whole: bool = False,
    ) -> None:
        self.target = target
        self.whole = whole
        self.prices = prices
        self.note = note
        self.ledger = Ledger(cost=None if prices is None else 0.0)
        """Of this object; `total` is that of the file."""
        self.name = target.name
        self.remote = target.remote
        self._file = _File(writable_folder(folder, "folder") / FILE)
        self._file.refresh()
        if self._file.damaged and note:
            note(f"{self._file.path}: {self._file.damaged} damaged lines; their answers are asked again")

    @property
    def revision(self) -> str:
        return self.target.revision

    @property
    def calls(self) -> int:
        return self.target.calls

    @property
    def retried(self) -> int:
        return self.target.retried

    def stop(self) -> None:
        """See `Target.stop`."""
        self.target.stop()

    def respond(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
    ) -> list[list[Answer]]:
        """See `Target.respond`. Each answer is on file before `on_answer` sees it; cached ones come first.

        Raises:
            Stopped: also where the disk is full. Its `answers` include the cached ones, and any that could
                not be written.
        """
        asked = jobs(prompts, first, samples, seed)
        keys, answers, missing = self._look_up(prompts, sampling, asked, seed)
        if missing and self.whole:
            answers, missing = {}, list(keys)
        if missing and self.note:
            self.note(f"{self.name}: {self._estimate(prompts, sampling, missing, len(answers)).line()}")
        self.ledger.hits += len(answers)
        if on_answer:
            for (position, index), answer in answers.items():
                on_answer(position, index, answer)
        # The same prompt twice is asked once.
        places: dict[str, list[tuple[int, int]]] = {}
        for job in missing:
            places.setdefault(keys[job], []).append(job)
        todo = [jobs_[0] for jobs_ in places.values()]
        spending = _Spending(self.target)

        def store(row: int, _index: int, answer: Answer) -> None:
            position, index = todo[row]
            key = keys[position, index]
            if (kept := self._file.index.get(key)) is not None:  # asked again; what it cost is in `left`
                answers.update(dict.fromkeys(places[key], kept))
                if on_answer:
                    for place in places[key]:
                        on_answer(*place, kept)
                return
            answers.update(dict.fromkeys(places[key], answer))  # kept even where it cannot be written
            spent = spending.since()
            spent.answers, spent.prompt_tokens, spent.tokens = 1, answer.prompt_tokens, answer.tokens
            spent.thoughts = int(answer.thought)
            if self.prices:
                spent.cost = self.prices.cost(answer.prompt_tokens, answer.tokens)
            self.ledger.add(spent)
            kept = self._file.append(
                {
                    "key": key,
                    "model": self.name,
                    "revision": self.revision,
                    "sampling": asdict(sampling),
                    "seed": int(seed),
                    "prompt": prompts[position],
                    "sample": int(index),
                    "answer": asdict(answer),
                    **_spent_fields(spent),
                }
            )
            answers.update(dict.fromkeys(places[key], kept))
            if on_answer:
                for place in places[key]:
                    on_answer(*place, kept)

        failure: AlignProError | None = None
        try:
            if todo:
                self.target.respond(
                    [prompts[p] for p, _ in todo],
                    sampling,
                    first=[i for _, i in todo],
                    seed=seed,
                    on_answer=store,
                )
        except AlignProError as error:
            failure = error
        finally:
            left = spending.since()
            if todo and (left.calls or left.retries):  # spent on what was never answered
                self.ledger.add(left)
                failure = self._write_rest(left) or failure
            failure = self._file.sync() or failure
        if failure is None:
            return arrange(asked, answers, len(prompts))
        reason = failure.reason if isinstance(failure, Stopped) else "failed"
        raise Stopped(str(failure), reason, answers) from None

    def _write_rest(self, left: Ledger) -> AlignProError | None:
        try:
            self._file.append({"model": self.name, "revision": self.revision, **_spent_fields(left)})
        except AlignProError as error:
            return error
        return None

    def estimate(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
    ) -> Estimate:
        """What the same `respond` would ask for; asks nothing itself."""
        asked = jobs(prompts, first, samples, seed)
        _, answers, missing = self._look_up(prompts, sampling, asked, seed)
        return self._estimate(prompts, sampling, missing, len(answers))

    def total(self) -> Ledger:
        """What this target's answers on file have cost, over all processes and runs."""
        self._file.refresh()
        return replace(self._file.spent.get((self.name, self.revision), Ledger()))

    def _look_up(
        self, prompts: Sequence[str], sampling: Sampling, asked: Sequence[tuple[int, int]], seed: int
    ) -> tuple[dict[tuple[int, int], str], Answers, list[tuple[int, int]]]:
        self._file.refresh()
        name, revision = self.name, self.revision
        keys = {job: cache_key(name, revision, sampling, seed, prompts[job[0]], job[1]) for job in asked}
        answers = {job: self._file.index[key] for job, key in keys.items() if key in self._file.index}
        return keys, answers, [job for job in keys if job not in answers]

    def _estimate(
        self, prompts: Sequence[str], sampling: Sampling, missing: Sequence[tuple[int, int]], hits: int
    ) -> Estimate:
        distinct = list({(prompts[p], i): prompts[p] for p, i in missing}.values())
        count = getattr(self.target, "count_tokens", lambda text: len(text.encode(errors="replace")) // 4 + 8)
        sizes = {prompt: count(prompt) for prompt in set(distinct)}
        prompt_tokens = sum(sizes[prompt] for prompt in distinct)
        tokens = len(distinct) * sampling.max_tokens
        past = self.total()
        return Estimate(
            calls=len(distinct),
            hits=hits,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            cost=self.prices.cost(prompt_tokens, tokens) if self.prices else None,
            seconds=past.seconds / past.answers * len(distinct) if past.answers else None,
        )


def spent(folder: str | Path) -> dict[str, Ledger]:
    """What the folder's answers have cost, by model.

    Raises:
        AlignProError: no such file, or it cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise AlignProError(f"folder {folder}: it has no {FILE}; name the folder of a run")
    file = _File(path)
    file.refresh()
    out: dict[str, Ledger] = {}
    for (name, _), ledger in file.spent.items():
        out.setdefault(name, Ledger()).add(ledger)
    return out


class _Spending:
    """Calls, retries and seconds of a target since last asked."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.calls, self.retried, self.at = target.calls, target.retried, time.monotonic()

    def since(self) -> Ledger:
        calls, retried, at = self.target.calls, self.target.retried, time.monotonic()
        out = Ledger(calls - self.calls, retried - self.retried, seconds=at - self.at)
        self.calls, self.retried, self.at = calls, retried, at
        return out


def _spent_fields(spent: Ledger) -> dict[str, Any]:
    out = {"calls": spent.calls, "retries": spent.retries, "seconds": round(spent.seconds, 6)}
    return out if spent.cost is None else {**out, "cost": spent.cost}


class _File:
    """The append-only file and what its lines say, read up to `offset`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, Answer] = {}
        self.spent: dict[tuple[str, str], Ledger] = {}
        self.damaged = 0
        """Lines that say nothing: torn by a kill and written over since, or edited."""
        self.offset = 0
        self._synced = time.monotonic()
        self._dirty = False

    def refresh(self) -> None:
        """Read what any process appended since. A last line without its end is left for later."""
        try:
            with open(self.path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # no line is half written, or about to be taken back
                file.seek(self.offset)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise AlignProError(f"cannot read {self.path}: {error.strerror}; check its permissions") from None
        end = data.rfind(b"\n") + 1
        for line in data[:end].split(b"\n"):
            self._take(line)
        self.offset += end

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            owner = str(row["model"]), str(row["revision"])
            spent = Ledger(int(row["calls"]), int(row["retries"]), seconds=float(row["seconds"]))
            spent.cost = float(row["cost"]) if "cost" in row else None
            if "answer" in row:
                key, answer = str(row["key"]), Answer(**row["answer"])
                if not isinstance(answer.text, str) or answer.finish not in ("stop", "length"):
                    raise ValueError
                spent.answers, spent.prompt_tokens, spent.tokens = 1, answer.prompt_tokens, answer.tokens
                spent.thoughts = int(answer.thought)
                self.index.setdefault(key, answer)
        except (ValueError, KeyError, TypeError, RecursionError):
            self.damaged += bool(line.strip())
            return
        self.spent.setdefault(owner, Ledger()).add(spent)

    def append(self, row: Mapping[str, Any]) -> Any:
        """Add a line; the answer on file for its key, which is another's where another was first.

        Raises:
            AlignProError: the disk is full, or the file cannot be written; the file is as before.
        """
        # ASCII: a lone surrogate from a server could not be written otherwise.
        data = json.dumps(row, separators=(",", ":")).encode() + b"\n"
        try:
            with self._locked() as handle:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    data = b"\n" + data  # a line torn by a kill stays a line of its own
                try:
                    written = 0
                    while written < len(data):
                        written += os.write(handle, data[written:])
                except OSError:
                    os.ftruncate(handle, size)
                    raise
                self._dirty = True
                if time.monotonic() - self._synced > _SYNC_S:
                    self._sync(handle)
        except OSError as error:
            raise AlignProError(
                f"cannot write {self.path}: {error.strerror}; free space and run again: what it holds is kept"
            ) from None
        self.refresh()
        return self.index.get(str(row.get("key")))

    def sync(self) -> AlignProError | None:
        """To the disk. A kill loses nothing without it, a power cut up to a second."""
        if not self._dirty:
            return None
        try:
            with self._locked() as handle:
                self._sync(handle)
        except OSError as error:
            return AlignProError(f"cannot write {self.path}: {error.strerror}; free space, then run again")
        return None

    def _sync(self, handle: int) -> None:
        os.fsync(handle)
        self._synced, self._dirty = time.monotonic(), False

    @contextmanager
    def _locked(self) -> Iterator[int]:
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)  # which unlocks
