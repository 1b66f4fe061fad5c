"""Keeps what frozen targets answered and what it cost, so that nothing is paid for twice.

Cache and ledger are one file (`store`): an answer is kept in one piece with the calls, retries, seconds and
money spent on it, so that the sum is what was spent, whenever a run was killed. The first answer to a key is
the one that counts.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import writable_folder
from alignpro.llm.models import packages
from alignpro.llm.models.prompt import as_json, transcript
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.targets.settings import is_number
from alignpro.llm.targets.store import FILE, OLD_FILE, Store, owner_of
from alignpro.llm.targets.target import Answer, OnAnswer, Stopped, Target, arrange, jobs


@dataclass(frozen=True)
class Prices:
    """Money per million tokens, in whatever currency; 0 or more."""

    prompt: float
    answer: float

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < float("inf"):
                raise AlignProError(f"prices.{name} {value!r}: give money per million tokens, 0 or more")

    def cost(self, prompt_tokens: float, tokens: float) -> float:
        """Money for so many tokens."""
        return (self.prompt * prompt_tokens + self.answer * tokens) / 1e6


@dataclass
class Ledger:
    """Sums of what was spent. Tokens are those of answers: how many a failed call took is not known."""

    calls: int = 0
    """Requests sent or sequences generated, repeated ones included."""
    retries: int = 0
    """Calls that repeated a failed one."""
    answers: int = 0
    """Answers that were asked for and came."""
    hits: int = 0
    """Answers served from the cache."""
    prompt_tokens: int = 0
    """Tokens of what was asked."""
    tokens: int = 0
    """Tokens of the answers."""
    thoughts: int = 0
    """Answers that began with a thought, which was taken off."""
    refused: int = 0
    """Answers that the service refused to give; the others count them too."""
    seconds: float = 0.0
    """Time of waiting for the target, not of computing elsewhere."""
    cost: float | None = None
    """Money; None where no prices are known."""

    def add(self, spent: "Ledger") -> None:
        """Add another's numbers, in place."""
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
        thoughts += f", {self.refused} refused" if self.refused else ""
        return (
            f"{self.answers} answers in {self.calls} calls ({self.retries} retries), {self.hits} more from "
            f"the cache, {self.prompt_tokens}+{self.tokens} tokens, {self.seconds:.1f} s{thoughts}{money}"
        )


@dataclass(frozen=True)
class Estimate:
    """Forecast of what a `respond` will ask for, before it starts."""

    calls: int
    """Answers to be asked for."""
    hits: int
    """Answers on file."""
    prompt_tokens: int
    """Tokens of what is asked: counted where the target has a tokenizer here, otherwise a quarter of the
    bytes."""
    tokens: int
    """Tokens of the answers, at most: `max_tokens` for each call."""
    cost: float | None
    """Money, at most (retries apart); None without prices."""
    seconds: float | None
    """Time at the rate of this target's answers on file; None where there are none."""

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

    Several processes, and several targets, may share a folder. One that comes to an answer which another has
    on file takes that; where two ask at the same time both pay, and both get the one written first. The
    budgets of a remote target hold over all of them, and over all runs before. A process may fork, and both
    sides go on with the same object.

    Args:
        target: any `Target`.
        folder: created if need be; holds `answers.sqlite`. An `answers.jsonl` of an earlier version is read
            once.
        prices: of tokens, for the ledger's cost; None leaves it out.
        note: called with the estimate's line before anything is asked; None keeps silent.
        whole: ask for all that a call names unless all of it is on file; what is on file is still what
            counts. In low precision an answer depends on its batch, and with this no batch depends on where
            an earlier call was interrupted.
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
        """Spending of this object; `total` is that of the file."""
        self.name = target.name
        self.remote = target.remote
        self._folder = writable_folder(folder, "folder")
        if any((self._folder / name).exists() for name in (FILE, OLD_FILE)):
            _ = self._store  # a file that cannot be used is told of before any work

    @cached_property
    def _store(self) -> Store:
        """The file. Where there is none it is made when it is first asked: a run that fails before leaves
        none."""
        store = Store(self._folder)
        if store.damaged and self.note:
            self.note(
                f"{self._folder / OLD_FILE}: {store.damaged} damaged lines; their answers are asked again"
            )
        return store

    @property
    def revision(self) -> str:
        return self.target.revision

    @property
    def calls(self) -> int:
        return self.target.calls

    @property
    def retried(self) -> int:
        return self.target.retried

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

        A full disk raises `Stopped`; its `answers` include the cached ones and any that were not written.
        """
        asked = jobs(prompts, first, samples, seed)
        name, revision = self.name, self.revision
        keys = {job: cache_key(name, revision, sampling, seed, prompts[job[0]], job[1]) for job in asked}
        on_file = self._store.get(dict.fromkeys(keys.values()))
        answers = {job: on_file[key] for job, key in keys.items() if key in on_file}
        missing = [job for job in keys if job not in answers]
        if missing and self.whole:
            answers, missing = {}, list(keys)
        if missing and self.note:
            self.note(f"{self.name}: {self._estimate(prompts, sampling, missing, len(answers)).line()}")
        self.ledger.hits += len(answers)
        if on_answer:
            for (position, index), answer in answers.items():
                on_answer(position, index, answer)
        if not missing:
            return arrange(asked, answers, len(prompts))
        # The same prompt twice is asked once.
        places: dict[str, list[tuple[int, int]]] = {}
        for job in missing:
            places.setdefault(keys[job], []).append(job)
        todo = [jobs_[0] for jobs_ in places.values()]
        owner = owner_of(name, revision)
        spending = _Spending(self.target)

        def known(row: int, _index: int) -> Answer | None:
            key = keys[todo[row]]
            found = self._store.get([key])
            on_file.update(found)
            self.ledger.hits += len(found)
            return found.get(key)

        def keep(row: int, _index: int, answer: Answer) -> None:
            position, index = todo[row]
            key = keys[position, index]
            if (kept := on_file.get(key)) is None:
                answers.update(dict.fromkeys(places[key], answer))  # kept even where it cannot be written
                spent = spending.since()
                spent.answers, spent.prompt_tokens, spent.tokens = 1, answer.prompt_tokens, answer.tokens
                spent.thoughts, spent.refused = int(answer.thought), int(answer.finish == "refused")
                if self.prices:
                    spent.cost = self.prices.cost(answer.prompt_tokens, answer.tokens)
                self.ledger.add(spent)
                line = {
                    "key": key,
                    "model": name,
                    "revision": revision,
                    "sampling": asdict(sampling),
                    "seed": int(seed),
                    "prompt": as_json(prompts[position]),
                    "sample": int(index),
                    "answer": asdict(answer),
                    "calls": spent.calls,
                    "retries": spent.retries,
                    "seconds": round(spent.seconds, 6),
                    **({} if spent.cost is None else {"cost": spent.cost}),
                }
                kept = self._store.add(owner, self._unbooked(spent), line) or answer
            # Otherwise it was asked again; what that cost is in the rest.
            answers.update(dict.fromkeys(places[key], kept))
            if on_answer:
                for place in places[key]:
                    on_answer(*place, kept)

        shared: dict[str, Any] = {}
        if self.remote:
            shared = {"known": known, "meter": self._store.meter(owner)}
        failure: AlignProError | None = None
        try:
            self.target.respond(
                [prompts[p] for p, _ in todo],
                sampling,
                first=[i for _, i in todo],
                seed=seed,
                on_answer=keep,
                **shared,
            )
        except AlignProError as error:
            failure = error
        finally:
            rest = spending.since()  # spent on what was never answered
            rest.seconds = rest.seconds if rest.calls or rest.retries else 0.0
            self.ledger.add(rest)
            try:
                self._store.add(owner, self._unbooked(rest), lasting=True)
            except AlignProError as error:
                failure = error
        if failure is None:
            return arrange(asked, answers, len(prompts))
        reason = failure.reason if isinstance(failure, Stopped) else "failed"
        raise Stopped(str(failure), reason, answers) from None

    def scorer(self) -> Callable[..., Any] | None:
        """The target's `log_probs`, if it has one; calls to a remote one count as those for answers do."""
        score = getattr(self.target, "log_probs", None)
        return self._scored if self.remote and score is not None else score

    def _scored(self, *positional: Any, **named: Any) -> Any:
        target: Any = self.target
        owner = owner_of(self.name, self.revision)
        spending, before = _Spending(target), target.tokens
        try:
            return target.log_probs(*positional, **named, meter=self._store.meter(owner))
        finally:
            spent = spending.since()
            spent.prompt_tokens = target.tokens - before
            if self.prices:
                spent.cost = self.prices.cost(spent.prompt_tokens, 0)
            self.ledger.add(spent)
            self._store.add(owner, self._unbooked(spent), lasting=True)

    def _unbooked(self, spent: Ledger) -> dict[str, Any]:
        """Counts to be added on file: the calls of a remote target were counted as each was sent."""
        return asdict(spent) | ({"calls": 0, "retries": 0} if self.remote else {})

    def total(self) -> Ledger:
        """Cost of this target's answers on file, over all processes and runs."""
        return Ledger(**self._store.spent().get(owner_of(self.name, self.revision), {}))

    def _estimate(
        self, prompts: Sequence[str], sampling: Sampling, missing: Sequence[tuple[int, int]], hits: int
    ) -> Estimate:
        distinct = list({(prompts[p], i): prompts[p] for p, i in missing}.values())
        count = getattr(self.target, "count_tokens", None) or (
            lambda x: len(transcript(x).encode(errors="replace")) // 4 + 8
        )
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
    """Cost of a folder's answers, by model, over all runs. Refuses a folder that holds none."""
    if not any((Path(folder) / name).exists() for name in (FILE, OLD_FILE)):
        raise AlignProError(f"folder {folder}: it has no {FILE}; name the folder of a run")
    out: dict[str, Ledger] = {}
    for owner, counts in Store(Path(folder)).spent().items():
        out.setdefault(json.loads(owner)[0], Ledger()).add(Ledger(**counts))
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
