"""Rollouts, one JSON object per line: validated as a whole, then kept as columns of numbers without texts."""

import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from alignpro.errors import AlignProError
from alignpro.files import parse_json
from alignpro.strategies import strategy_of

LOGPS = ("logp_frozen_x", "logp_frozen_rewrite", "logp_prompter", "logp_reference", "logp_policy")
"""The log-probabilities of a row, in nats, of whole texts with their end, under the sampler that was used."""
SHARED = ("frozen", "reward_model", "sampling", "reward_low", "reward_high")
"""The fields that all rows of a file have in common; so are names and ranges of the reward's parts."""
_MOST, _ROUNDING = 1e150, 1e-3  # of squares that are summed; of log-probabilities in low precision, nats
PARTS_ROUNDING = 1e-6
"""How far a reward may be from the sum of its parts, as a share of the greatest magnitudes of all parts."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer y to one rewrite x′ of a prompt x; (arm, seed, prompt_id, draw, answer) is unique."""

    prompt_id: str
    x: str
    """The user's prompt; one for every prompt_id."""
    arm: str
    """Who rewrote the prompt: none (x itself), sft (x′ ~ ρ_sft), star (ρ*), trained (ρ_θ), best_of_n, rlhf (a
    tuned policy), or any other name."""
    seed: int
    """Seed of the training run, or of the draw; all seeds of a prompt are one cluster."""
    draw: int
    """Number of the rewrite, among those of this prompt, arm and seed."""
    answer: int
    rewrite: str | None
    """The rewrite x′; x itself in arm none; None where a policy answers x directly (arm rlhf)."""
    response: str | None
    """The answer y; None where the service refused to give one, whose reward is a declared stand-in."""
    reward: float
    """r(x, y), within [reward_low, reward_high]."""
    logp_frozen_x: float | None
    """log π_F(y|x); −inf where the sampler cannot give y."""
    logp_frozen_rewrite: float | None
    """log π_F(y|x′)."""
    logp_prompter: float | None
    """log ρ(x′|x) of the arm's own prompter."""
    logp_reference: float | None
    """log ρ_sft(x′|x)."""
    logp_policy: float | None
    """log π_θ(y|x) of the tuned policy."""
    frozen: str
    prompter: str
    """Name of the prompter or policy; one for every arm and seed."""
    reward_model: str
    sampling: str
    """How the frozen model decodes, in words or JSON."""
    reward_low: float
    """Declared lower end of the reward: a bound that holds a priori, not the least seen."""
    reward_high: float
    context: list[dict[str, str]] | None = None
    """The messages before x, where it is the last turn of a conversation: role and content."""
    columns: dict[str, Any] | None = None
    """Further columns of the prompt's data that the reward asks for, by name."""
    reward_parts: dict[str, list[float]] | None = None
    """Parts of the reward that add up to it, by name: [contribution, its lowest, its highest]."""
    reward_spread: float | None = None
    """Standard deviation between the members of a reward that is an ensemble, in reward units."""

    def line(self) -> str:
        """The row as one line of JSON, its newline included; −inf as Python's `-Infinity`."""
        row = asdict(self)
        return (
            json.dumps(
                {k: v for k, v in row.items() if k not in OPTIONAL or v is not None}, ensure_ascii=False
            )
            + "\n"
        )


OPTIONAL = ("context", "columns", "reward_parts", "reward_spread")
"""Fields that rows may lack."""
FIELDS = tuple(each.name for each in fields(Rollout) if each.name not in OPTIONAL)
_TEXTS = ("prompt_id", "x", "arm", "frozen", "prompter", "reward_model", "sampling")
_WHOLE = ("seed", "draw", "answer")
_NUMBERS = ("reward", "reward_low", "reward_high")


@dataclass(frozen=True, eq=False)
class Rollouts:
    """N validated rollouts as columns, sorted by (prompt, arm, seed, draw, answer)."""

    prompt_ids: tuple[str, ...]
    arms: tuple[str, ...]
    prompt: np.ndarray
    """[N] integers: the row's prompt, as a position in `prompt_ids`."""
    arm: np.ndarray
    """[N] integers: the row's arm, as a position in `arms`."""
    seed: np.ndarray
    """[N] integers like `draw` and `answer`, as in `Rollout`."""
    draw: np.ndarray
    answer: np.ndarray
    reward: np.ndarray
    refused: np.ndarray
    """[N] truth values: whether the service refused to answer, so that `reward` is a declared stand-in."""
    logps: dict[str, np.ndarray]
    """Log-probabilities [N] in nats, by the names in `LOGPS`; NaN where a row has none."""
    prompters: dict[tuple[str, int], str]
    """Names of the prompters, by arm and seed."""
    direct: frozenset[str]
    """Arms without rewrites, whose policy answers x itself."""
    frozen: str
    reward_model: str
    sampling: str
    low: float
    high: float
    parts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Contributions [N] to the reward by name, which add up to it; none of a reward without parts."""
    part_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """The declared range of each part; they add up to [low, high]."""
    spread: np.ndarray | None = None
    """Standard deviations [N] between the members of a reward that is an ensemble, in reward units; NaN where
    a row has none, and None where no row has one."""
    strategy: np.ndarray | None = None
    """[N] integers: equal where rewrites add the same text to their prompts, or, of rewrites that do not
    contain the prompt, where they open with the same three words; -1 without a rewrite. None: not known."""
    added: np.ndarray | None = None
    """[N] truth values: whether `strategy` is the text added, which with the prompt gives the rewrite."""
    strategies: Mapping[int, str] = field(default_factory=dict)
    """Texts of the strategies that rewrites of two prompts or more have, by their number in `strategy`."""
    texts: np.ndarray | None = None
    """[N, 2] integers: equal in column 0 where responses are, and their length in characters, -1 refused."""

    def __len__(self) -> int:
        return len(self.reward)

    def rows(self, arm: str) -> np.ndarray:
        """Which rows are of `arm`: [N] truth values, all False where it has none."""
        return self.arm == (self.arms.index(arm) if arm in self.arms else -1)

    def prompter(self, arm: str) -> str:
        """Names of an arm's prompters, those of several seeds separated by commas."""
        return ", ".join(dict.fromkeys(name for (of, _), name in self.prompters.items() if of == arm))

    def refusals(self) -> str:
        """Say how many answers were refused in which arms, and what that means; empty where none was."""
        counts = {
            arm: (int(self.refused[self.rows(arm)].sum()), int(self.rows(arm).sum())) for arm in self.arms
        }
        said = ", ".join(f"{n} of {of} in arm {arm}" for arm, (n, of) in counts.items() if n)
        return said and f"answers were refused, {said}: each counts with the reward declared for a refusal"


def read(path: str | os.PathLike[str]) -> Rollouts:
    """Read a rollout file and validate it as a whole. Fields beyond those of `Rollout` are ignored.

    Raises:
        AlignProError: the file cannot be read, a line is no valid `Rollout`, or lines repeat or contradict
            one another. It names the line.
    """
    path = Path(path)
    columns = _Columns()
    lines = array("q")
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.isspace():
                    continue
                lines.append(number)
                try:
                    columns.add(_values(raw))
                except _Wrong as wrong:
                    raise AlignProError(f"{path} line {number}: {wrong}") from None
    except OSError as error:
        raise AlignProError(f"{path}: cannot read it ({error.strerror}); name a rollout file") from None
    if not lines:
        raise AlignProError(f"{path}: holds no rollouts; name a file that alignpro rollout wrote")
    return columns.finish(lambda i: f"{path} line {lines[i]}")


def _values(raw: bytes) -> list[Any]:
    """The values of one line of a file, in the order of `FIELDS` and `OPTIONAL`."""
    try:
        row = parse_json(raw)
    except ValueError as error:
        torn = "is cut short; remove this last line, or let the rollout finish"
        _fail(f"is not JSON ({error}); write one object per line" if raw.endswith(b"\n") else torn)
    if type(row) is not dict:
        _fail("is not a JSON object; write one per line")
    try:
        return [row[name] for name in FIELDS] + [row.get(name) for name in OPTIONAL]
    except KeyError as error:
        _fail(
            f"lacks the field {error.args[0]!r}; give it, null where the backend has no such log-probability"
        )


def collect(rollouts: Iterable[Rollout]) -> Rollouts:
    """Take rollouts from memory, validated as `read` does; messages name the row, counted from 0."""
    columns = _Columns()
    for i, rollout in enumerate(rollouts):
        try:
            columns.add([getattr(rollout, name) for name in FIELDS + OPTIONAL])
        except _Wrong as wrong:
            raise AlignProError(f"rollout {i}: {wrong}") from None
    if not columns.reward:
        raise AlignProError("rollouts: there are none; give at least one")
    return columns.finish(lambda i: f"rollout {i}")


class _Wrong(Exception):
    """A fault of one row, with the remedy."""


def _fail(text: str) -> NoReturn:
    raise _Wrong(text)


_TEXT_AT, _WHOLE_AT, _NUMBER_AT, _LOGP_AT = (
    tuple((name, FIELDS.index(name)) for name in names) for names in (_TEXTS, _WHOLE, _NUMBERS, LOGPS)
)
_NUMBER = (float, int)
_ASKED = ("x", "context", "columns")
_TOTALS = ("reward", "reward_low", "reward_high")


def _type_error(name: str, value: Any, wanted: str) -> NoReturn:
    shown = repr(value)
    _fail(f"{name} {shown if len(shown) <= 40 else shown[:37] + '...'} must be {wanted}; correct it")


def _check_asked(context: Any, columns: Any) -> None:
    """Check what a prompt comes with beside its text."""
    turns = context if type(context) is list else [None]
    if context is not None and not all(
        type(turn) is dict and type(turn.get("role")) is str and type(turn.get("content")) is str
        for turn in turns
    ):
        _type_error("context", context, "a list of messages with role and content, or null")
    if columns is not None and type(columns) is not dict:
        _type_error("columns", columns, "an object of values by column name, or null")


class _Columns:
    """Rows as they come in, each checked by itself and against the first that it must agree with."""

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}
        self.arms: dict[str, int] = {}
        self.asked: list[tuple[Any, ...]] = []
        self.ranges: dict[str, tuple[float, float]] | None = None
        self.shared: tuple[Any, ...] | None = None
        self.prompters: dict[tuple[str, int], str] = {}
        self.direct: dict[str, bool] = {}
        self.drawn: dict[tuple[int, int, int, int], int] = {}
        self.whole = {name: array("q") for name in ("prompt", "arm", *_WHOLE)}
        self.reward = array("d")
        self.text, self.length = array("q"), array("q")
        self.parts: dict[str, array[float]] = {}
        self.spread = array("d")
        self.logps = {name: array("d") for name in LOGPS}
        self.strategy, self.added = array("q"), array("b")
        self.strategies: dict[int, tuple[int, int]] = {}
        self.strategy_texts: dict[int, str] = {}

    def add(self, row: Sequence[Any]) -> None:
        for name, at in _TEXT_AT:
            if type(row[at]) is not str:
                _type_error(name, row[at], "a string")
        for name, at in _WHOLE_AT:
            if type(row[at]) is not int or not -(2**63) <= row[at] < 2**63:
                _type_error(name, row[at], "a whole number")
        for name, at in _NUMBER_AT:
            if type(row[at]) not in _NUMBER or not abs(row[at]) < _MOST:
                _type_error(name, row[at], f"a finite number, below {_MOST:g} in size")
        (prompt_id, x, arm, seed, draw, answer, rewrite, response, reward, *logps) = row[:14]
        if response is not None and type(response) is not str:
            _type_error("response", response, "a string, or null where it was refused")
        frozen, prompter, reward_model, sampling, low, high, context, columns, parts, spread = row[14:]
        if not low < high:
            _fail(f"reward_low {low} must be below reward_high {high}; declare the reward's range")
        if not low <= reward <= high:
            _fail(
                f"reward {reward} is outside its declared range [{low}, {high}]; declare the range that the "
                "reward has by construction"
            )
        shared = (frozen, reward_model, sampling, low, high)
        if self.shared is None:
            self.shared = shared
        elif shared != self.shared:
            for name, mine, first in zip(SHARED, shared, self.shared, strict=True):
                if mine != first:
                    _fail(f"{name} {mine!r} differs from {first!r} before it; estimate one setting at a time")
        before = self.prompters.setdefault((arm, seed), prompter)
        if before != prompter:
            _fail(
                f"prompter {prompter!r} differs from {before!r} of the same arm {arm!r} and seed {seed}; "
                "give each its own arm or seed"
            )
        p = self.prompts.setdefault(prompt_id, len(self.prompts))
        asked = (x, context, columns)
        if p == len(self.asked):
            _check_asked(context, columns)
            self.asked.append(asked)
        elif self.asked[p] != asked:
            name = next(n for n, a, b in zip(_ASKED, asked, self.asked[p], strict=True) if a != b)
            _fail(
                f"{name} differs from that of prompt_id {prompt_id!r} before it; give each prompt its own id"
            )
        self._check_rewrite(arm, x, rewrite)
        a = self.arms.setdefault(arm, len(self.arms))
        if self.direct.setdefault(arm, rewrite is None) != (rewrite is None):
            _fail(f"rewrite is null in some rows of arm {arm!r} only; give it in all, or name two arms")
        text = hash(rewrite)
        if self.drawn.setdefault((p, a, seed, draw), text) != text:
            _fail(
                f"rewrite differs between answers of draw {draw} (prompt_id {prompt_id!r}, arm {arm!r}, seed "
                f"{seed}); give each rewrite its own draw"
            )
        for name, at in _LOGP_AT:
            value = row[at]
            if value is None:
                value = math.nan
            elif type(value) not in _NUMBER or not (-_MOST < value <= _ROUNDING or value == -math.inf):
                _type_error(name, value, "a log-probability (nats, at most 0) or null")
            self.logps[name].append(value)
        given_x, given_rewrite = logps[0], logps[1]
        if rewrite is not None and given_rewrite == -math.inf:
            _fail("logp_frozen_rewrite is -Infinity for a response drawn from it; score with its own sampler")
        if rewrite == x and given_x is not None and given_rewrite is not None:
            apart = abs(given_x - given_rewrite)
            if not apart <= 0.05 * (1.0 + abs(given_x)):
                _fail(
                    f"logp_frozen_x {given_x} and logp_frozen_rewrite {given_rewrite} differ though the "
                    "rewrite is x itself; score both with the same model"
                )
        for name, value in (("prompt", p), ("arm", a), ("seed", seed), ("draw", draw), ("answer", answer)):
            self.whole[name].append(value)
        self.reward.append(reward)
        self.text.append(hash(response))
        self.length.append(-1 if response is None else len(response))
        self._add_strategy(p, x, rewrite)
        self._add_parts(parts, reward, low, high)
        if spread is not None and not (type(spread) in _NUMBER and 0 <= spread < _MOST):
            _type_error("reward_spread", spread, "a finite number of at least 0, or null")
        self.spread.append(math.nan if spread is None else spread)

    def _add_strategy(self, p: int, x: str, rewrite: str | None) -> None:
        """Number what the rewrite does to x, and keep its text once a second prompt's rewrite does it."""
        if rewrite is None:
            self.added.append(False)
            self.strategy.append(-1)
            return
        does = strategy_of(x, rewrite)
        self.added.append(does.added)
        number, first = self.strategies.setdefault(hash(does), (len(self.strategies), p))
        self.strategy.append(number)
        if first != p and number not in self.strategy_texts:
            self.strategy_texts[number] = does.text

    def _add_parts(self, parts: Any, reward: float, low: float, high: float) -> None:
        """Check the parts of one row against its reward and against the first row's, and keep them."""
        given = {} if parts is None else parts
        if type(given) is not dict or not all(
            type(part) in (list, tuple)
            and len(part) == 3
            and all(type(v) in _NUMBER and abs(v) < _MOST for v in part)
            for part in given.values()
        ):
            _type_error("reward_parts", parts, "an object of [value, low, high] by name, or null")
        ranges = {name: (float(part[1]), float(part[2])) for name, part in given.items()}
        if self.ranges is None:
            self.ranges, self.parts = ranges, {name: array("d") for name in ranges}
        elif ranges != self.ranges:
            name = next(n for n in {**ranges, **self.ranges} if ranges.get(n) != self.ranges.get(n))
            now, before = (of.get(name, "absent") for of in (ranges, self.ranges))
            _fail(
                f"reward_parts: the range of {name!r} is {now}, not {before} as before it; estimate one "
                "reward at a time"
            )
        if not ranges:
            return
        rounding = PARTS_ROUNDING * sum(max(abs(a), abs(b)) for a, b in ranges.values())
        for name, (value, a, b) in given.items():
            if not a - rounding <= value <= b + rounding:
                _fail(
                    f"reward_parts: {name} {value} is outside its range [{a}, {b}]; declare the range it has"
                )
            self.parts[name].append(value)
        sums = [math.fsum(column) for column in zip(*given.values(), strict=True)]
        for name, total, declared in zip(_TOTALS, sums, (reward, low, high), strict=True):
            if abs(total - declared) > rounding:
                _fail(f"reward_parts add up to {total}, and {name} is {declared}; give all parts, weighted")

    @staticmethod
    def _check_rewrite(arm: str, x: str, rewrite: Any) -> None:
        if rewrite is not None and type(rewrite) is not str:
            _type_error("rewrite", rewrite, "a string or null")
        if arm == "none" and rewrite != x:
            _fail("rewrite must be x itself in arm 'none'; name the arm otherwise")
        if arm == "rlhf" and rewrite is not None:
            _fail("rewrite must be null in arm 'rlhf', whose policy answers x; name the arm otherwise")
        if arm in ("sft", "star", "trained", "best_of_n") and rewrite is None:
            _fail(f"rewrite must not be null in arm {arm!r}; give x'")

    def finish(self, where: Callable[[int], str]) -> Rollouts:
        assert self.shared is not None
        whole = {name: np.array(values, dtype=np.int64) for name, values in self.whole.items()}
        keys = [whole[name] for name in ("prompt", "arm", "seed", "draw", "answer")]
        order = np.lexsort(keys[::-1])  # stable: of equal keys the earlier row comes first
        same = np.ones(max(len(order) - 1, 0), dtype=bool)
        for key in keys:
            same &= np.diff(key[order]) == 0
        if same.any():
            at = np.flatnonzero(same)
            first, second = order[at], order[at + 1]
            i = int(np.argmin(second))
            raise AlignProError(
                f"{where(int(second[i]))}: repeats (arm, seed, prompt_id, draw, answer) of "
                f"{where(int(first[i]))}; number draws and answers"
            )
        frozen, reward_model, sampling, low, high = self.shared
        return Rollouts(
            prompt_ids=tuple(self.prompts),
            arms=tuple(self.arms),
            **{name: values[order] for name, values in whole.items()},
            reward=np.array(self.reward)[order],
            refused=np.array(self.length)[order] < 0,
            texts=np.stack([np.array(self.text), np.array(self.length)], 1)[order],
            logps={name: np.array(values)[order] for name, values in self.logps.items()},
            prompters=self.prompters,
            direct=frozenset(arm for arm, direct in self.direct.items() if direct),
            frozen=frozen,
            reward_model=reward_model,
            sampling=sampling,
            low=float(low),
            high=float(high),
            parts={name: np.array(values)[order] for name, values in self.parts.items()},
            part_ranges=self.ranges or {},
            spread=None if np.isnan(self.spread).all() else np.array(self.spread)[order],
            strategy=np.array(self.strategy, dtype=np.int64)[order],
            added=np.array(self.added, dtype=bool)[order],
            strategies=self.strategy_texts,
        )
