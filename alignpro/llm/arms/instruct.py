"""The best of a list of instructions, found in a race (`estimation.race`) and measured on other prompts.

An instruction is added to the end of every prompt; none at all is a candidate too. Each reward is on file as
soon as it is known, so the same call after an interruption goes on from there.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.estimation.intervals import LEAST_PROMPTS, Estimate
from alignpro.estimation.pac_bayes import PacBayes
from alignpro.estimation.race import BLOCK, Gain, gain_over, least_budget, race
from alignpro.files import atomic_write, byte_lines, encoded, parse_json, writable_folder
from alignpro.llm.arms.draws import stream
from alignpro.llm.arms.rollout import append, prompt_id
from alignpro.llm.arms.settings import InstructSettings, RouteSettings
from alignpro.llm.data.bank import INSTRUCTIONS
from alignpro.llm.data.rows import first_turn
from alignpro.llm.data.split import split_of
from alignpro.llm.models.prompt import said_in, with_instruction
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.reward import Reward
from alignpro.llm.rewards.scores import judged
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.target import Target
from alignpro.runs import claim
from alignpro.shown import Shown

FILE = "cells.jsonl"
"""Rewards by instruction, prompt and answer, a line for each block that was asked for."""
CALLS_EACH = 40
"""The budget for each candidate where none is given."""


def read_instructions(path: str | None) -> tuple[str, ...]:
    """The candidates: the distinct lines of a file, or the packaged bank, after "", which is none at all."""
    if path is None:
        return ("", *INSTRUCTIONS)
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise AlignProError(f"instructions {path}: cannot read it ({why}); name a text file") from None
    found = tuple(dict.fromkeys(text for line in lines if (text := line.strip())))
    if not found:
        raise AlignProError(f"instructions {path}: holds none; write one on each line")
    return ("", *found)


def budget_of(settings: InstructSettings, candidates: Sequence[str]) -> int:
    """The most answers that the race may ask for. Raises AlignProError where they are too few."""
    given, least = settings.budget, least_budget(len(candidates), settings.answers)
    if given is not None and given < least:
        raise AlignProError(f"budget {given}: {len(candidates)} candidates take at least {least} answers")
    return max(least, CALLS_EACH * len(candidates) * settings.answers) if given is None else given


def divided(
    training: Sequence[str], others: Sequence[str], settings: InstructSettings | RouteSettings
) -> tuple[list[str], list[str]]:
    """The prompts on which candidates are tried, in an order of the seed's, and those held out from that.

    A prompt is held out by its text (`split_of`), so that none of one text is on both sides.
    """
    raced = [x for x in dict.fromkeys(training) if split_of(first_turn(x)) == "train"]
    held = [x for x in dict.fromkeys(others) if split_of(first_turn(x)) != "train"]
    if not raced:
        raise AlignProError("prompts: none are for training; give more prompts")
    if len(held) < LEAST_PROMPTS:
        raise AlignProError(
            f"held_out: {len(held)} prompts are not for training, and an interval takes at least "
            f"{LEAST_PROMPTS}; give more prompts"
        )
    order = np.random.default_rng([settings.seed, 1]).permutation(len(raced))
    return [raced[i] for i in order[: settings.prompts]], held[: settings.held_out]


@dataclass(frozen=True)
class Cell:
    """A block of answers that was asked for at once, as a line of `FILE`."""

    kind: str
    """The stream of the answers."""
    candidates: list[str]
    prompts: list[str]
    """Ids of the prompts."""
    answers: int
    """Answers to each candidate on each prompt."""
    rewards: list[list[list[float]]]
    """By candidate, prompt and answer, in reward units."""
    refused: int
    """Answers that the service would not give."""


@dataclass
class Cells:
    """Asks instructions on prompts, and keeps the rewards of the answers in a folder."""

    folder: Path
    candidates: Sequence[str]
    reward: Reward
    sampling: Sampling
    seed: int
    open_target: Callable[[], Target]
    """Opens π_F, behind a cache; not called where every reward is on file."""
    refusals: Refusals
    """Reward of refused answers, and their count."""
    on_answer: Callable[[int], Any] = lambda n: None
    """Called with the number of answers that are done."""

    def __post_init__(self) -> None:
        self.path = writable_folder(self.folder) / FILE
        self.kept: dict[str, Cell] = {}
        self.refused = 0
        """Answers that were refused, those of earlier runs included."""
        lines = byte_lines(self.path)
        whole = [line for line in lines if line.endswith(b"\n") and self._keep(line)]
        if len(whole) < len(lines):  # the last was cut short
            with atomic_write(self.path, private=True) as file:
                file.writelines(whole)

    def _keep(self, line: bytes) -> bool:
        try:
            row = typed.made(Cell, parse_json(line), self.path.name)
            shape = len(row.candidates), len(row.prompts), row.answers
            if np.shape(row.rewards) != shape or not np.isfinite(row.rewards).all():
                raise ValueError
        except ValueError:
            return False
        self.kept[self._key(row.kind, row.candidates, row.prompts, row.answers)] = row
        return True

    @staticmethod
    def _key(kind: str, candidates: Sequence[str], prompts: Sequence[str], answers: int) -> str:
        return json.dumps([kind, list(candidates), list(prompts), answers])

    @cached_property
    def target(self) -> Target:
        return self.open_target()

    def ask(self, kind: str, arms: Sequence[int], prompts: Sequence[str], answers: int) -> np.ndarray:
        """Rewards [arms, prompts, answers]; `kind` names the stream of answers."""
        names, ids = [self.candidates[arm] for arm in arms], [prompt_id(x) for x in prompts]
        size = len(arms) * len(prompts) * answers
        row = self.kept.get(self._key(kind, names, ids, answers))
        if row is None:
            xs = [x for _ in arms for x in prompts]
            texts = [with_instruction(x, name) for name in names for x in prompts]
            answered = self.target.respond(
                [said_in(x, text) for x, text in zip(xs, texts, strict=True)],
                self.sampling,
                samples=answers,
                seed=stream(f"instruct {kind}", self.seed),
                on_answer=lambda *_: self.on_answer(1),
            )
            flat = [answer for of in answered for answer in of]
            found = judged(self.reward, [x for x in xs for _ in range(answers)], flat, self.refusals)
            rewards = found.total.reshape(len(arms), len(prompts), answers)
            refused = sum(answer.finish == "refused" for answer in flat)
            row = Cell(kind, names, ids, answers, rewards.tolist(), refused)
            claim(self.path)
            append(self.path, encoded(json.dumps(vars(row), ensure_ascii=False) + "\n"))
        else:
            self.on_answer(size)
        self.refused += row.refused
        return np.array(row.rewards, float)


@dataclass(frozen=True)
class Candidate:
    """An instruction after the race."""

    instruction: str
    """Its text; empty for none at all."""
    mean: Estimate
    """Mean reward on the prompts of the race that it was asked on; see `race.Raced`."""
    behind: float
    """How much less it earned than the winner on the same prompts, in reward units."""
    ruled_out: bool
    """Whether it is certainly not the best."""
    left: int | None
    """Answers that the race had taken when it dropped out; None for the winner."""


@dataclass(frozen=True, repr=False)
class Instructed(Shown):
    """The best instruction that was found, the race, and what the instruction is worth."""

    winner: str
    """Empty where asking without any instruction won."""
    held_out: Gain | None
    """The winner against no instruction, on prompts that the race did not use; None where none won."""
    candidates: tuple[Candidate, ...]
    """The winner, then the others, the last to leave first."""
    track: tuple[tuple[int, Mapping[int, float]], ...]
    """Answers so far, and mean rewards so far by place in `candidates`, of those still in the race."""
    calls: int
    """Answers that the race asked for."""
    budget: int
    """The most it might have asked for."""
    exhaustive: int
    """Answers that asking every candidate on as many prompts as the winner, as often, would have taken."""
    prompts: int
    """How many prompts the race used."""
    contenders: int
    """Candidates that are not ruled out; the best one is among them."""
    level: float
    """How often an interval covers the truth, and how often the best candidate is not ruled out."""
    refused: int
    """Answers that the service would not give; each counts with its declared reward."""
    low: float
    """Declared range of the reward."""
    high: float
    guaranteed: PacBayes
    """Lower limits from the race's own prompts, of the winner and of a mixture of the first of `candidates`;
    see `race.Race`."""


def find(
    cells: Cells,
    raced: Sequence[str],
    held: Sequence[str],
    settings: InstructSettings,
    *,
    progress: bool = True,
) -> Instructed:
    """Race the candidates on the prompts `raced`, and measure the winner on the prompts `held`."""
    reward, names = cells.reward, cells.candidates
    budget = budget_of(settings, names)
    with tqdm(total=budget, unit="answer", desc="race", disable=None if progress else True) as bar:
        cells.on_answer = bar.update
        done = race(
            lambda arms, at, answers: cells.ask("race", arms, [raced[i] for i in at], answers),
            len(names),
            len(raced),
            reward.low,
            reward.high,
            budget=budget,
            answers=settings.answers,
            level=settings.level,
            fresh=cells.sampling.temperature > 0,
        )
    winner, found = done.ranked[0], None
    if names[winner.arm]:
        size, each = 2 * len(held) * settings.held_out_answers, settings.held_out_answers
        step = max(1, math.floor(BLOCK / (2 * each)))
        with tqdm(total=size, unit="answer", desc="held out", disable=None if progress else True) as bar:
            cells.on_answer = bar.update
            arms = [winner.arm, names.index("")]
            parts = [cells.ask("held out", arms, held[i : i + step], each) for i in range(0, len(held), step)]
        rewards, base = np.concatenate(parts, 1)
        found = gain_over(rewards, base, reward.low, reward.high, settings.level)
    place = {raced.arm: i for i, raced in enumerate(done.ranked)}
    return Instructed(
        names[winner.arm],
        found,
        tuple(Candidate(names[r.arm], r.mean, r.behind, r.ruled_out, r.left) for r in done.ranked),
        tuple((m.calls, {place[arm]: mean for arm, mean in m.means.items()}) for m in done.track),
        done.calls,
        budget,
        winner.mean.n * len(names),
        done.prompts,
        done.contenders,
        settings.level,
        cells.refused,
        reward.low,
        reward.high,
        done.guaranteed,
    )
