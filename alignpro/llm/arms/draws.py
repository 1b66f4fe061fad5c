"""The arms of an experiment, and how each draws its rewrites: one row of `ARMS` an arm."""

import gc
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from alignpro.errors import AlignProError
from alignpro.llm.arms.resample import appraise, best_of_n, choose, star
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.llm.models.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards.reward import Reward
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.target import Target
from alignpro.llm.training.environment import Environment

T = TypeVar("T")
Array = np.ndarray
Scorer = Callable[..., Array]
"""Log-probabilities of answers, as `LocalTarget.log_probs` gives them."""


@dataclass(frozen=True)
class Arm:
    """One arm and seed of an experiment."""

    name: str
    """A row of `ARMS`, rlhf, or another: of a trained prompter, an instruction or a file of rewrites."""
    seed: int = 0
    """Determines its draws and answers."""
    folder: str = ""
    """Folder of the trained prompter or policy."""
    text: str = ""
    """The fixed instruction that it adds to every prompt."""
    file: str = ""
    """File of the rewrites that another system made."""

    def __str__(self) -> str:
        return f"{self.name} (seed {self.seed})"


@dataclass(frozen=True)
class Draw:
    """One x′, and its log-probabilities in nats under the arm's prompter and ρ_sft, where they are known."""

    rewrite: str | None
    prompter: float | None = None
    reference: float | None = None


_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WANTS = {
    "trained": "; name its folder in trained",
    "rlhf": "; name its folder in rlhf",
    "instruction": "; give NAME=… in instruction",
    "rewrites": "; give NAME=… in rewrites_file",
}


def arms_of(settings: RolloutSettings) -> list[Arm]:
    """The arms that the settings name, in order; refuses an unknown one, one named twice, and none."""
    named = list(settings.arms)
    for name in named:
        if name not in ARMS:
            raise AlignProError(f"arms {name!r}: choose from {', '.join(ARMS)}{_WANTS.get(name, '')}")
    if len(set(named)) != len(named):
        raise AlignProError(f"arms {' '.join(named)}: name each once")
    found = [Arm(name, settings.seed) for name in named]
    for given in settings.trained:
        name, _, folder = given.rpartition("=") if not Path(given).expanduser().exists() else ("", "", given)
        if name in ARMS or name == "rlhf":
            raise AlignProError(f"trained {given!r}: {name} is an arm of its own; choose another name")
        name = name or "trained"
        found.append(Arm(name, settings.seed + sum(arm.name == name for arm in found), folder))
    found += [Arm("rlhf", settings.seed + i, folder) for i, folder in enumerate(settings.rlhf)]
    for option, what in (("instruction", "text"), ("rewrites", "file")):
        for given in getattr(settings, option):
            name, equals, value = given.partition("=")
            if not equals or not _NAME.fullmatch(name) or not value.strip():
                raise AlignProError(
                    f"{option} {given!r}: give NAME={what.upper()}, the name of letters, digits, _ and -"
                )
            if name in (*ARMS, "trained", "rlhf") or name in [arm.name for arm in found]:
                raise AlignProError(f"{option} {given!r}: {name} is an arm of its own; choose another name")
            found.append(Arm(name, settings.seed, **{what: value}))
    if not found:
        raise AlignProError(
            f"arms: none given; choose from {', '.join(ARMS)}, or give trained, rlhf, instruction or "
            "rewrites_file"
        )
    return found


@dataclass
class Work:
    """Models, reward and settings that rollouts need; the models are opened when they are first used."""

    settings: RolloutSettings
    reward: Reward
    target: Target
    """π_F, behind a cache."""
    scorer: Scorer | None
    """Log-probabilities by π_F, where it has them."""
    sampling: Sampling
    """How π_F, and a tuned policy in its place, decode."""
    open_prompter: Callable[[str], Prompter]
    """Opens a trained prompter by its folder, ρ_sft by ""."""
    open_policy: Callable[[str], tuple[Target, Scorer]]
    """Opens an rlhf policy by its folder: the policy behind a cache, and its scorer."""
    batch_size: int = 64
    refusals: Refusals = field(default_factory=Refusals)
    """Reward of refused answers, and their count."""
    given: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    """Rewrites from files by arm and prompt, at least one each."""

    def __post_init__(self) -> None:
        self.prompter = _keeping_last(self._trained)
        self.policy = _keeping_last(self.open_policy)

    @cached_property
    def reference(self) -> Prompter:
        """ρ_sft."""
        return self._open("")

    def _trained(self, folder: str) -> Prompter:
        found = self._open(folder)
        if found.template != self.reference.template:
            raise AlignProError(
                f"trained {folder}: its template is not that of ρ_sft; name the prompter it was trained from"
            )
        return found

    def _open(self, folder: str) -> Prompter:
        opened, tokens = self.open_prompter(folder), self.settings.rewrite_tokens
        return opened if tokens is None else replace(opened, max_tokens=tokens)


def _keeping_last(open_one: Callable[[str], T]) -> Callable[[str], T]:
    """Keep what was opened last, and free it before the next."""
    kept: dict[str, T] = {}

    def get(name: str) -> T:
        if name not in kept:
            kept.clear()
            gc.collect()
            kept[name] = open_one(name)
        return kept[name]

    return get


Rewrites = list[list[tuple[tuple[int, ...], float]]]


def _sample(work: Work, prompter: Prompter, prompts: Sequence[str], kind: str, seed: int, n: int) -> Rewrites:
    """[prompts][n] token ids x′ ~ ρ(·|x) and log ρ(x′|x), kept from sampling."""
    keys = [[sample_key(kind, seed, x, i) for i in range(n)] for x in prompts]
    ids = prompter.prompt_ids(prompts)
    sampling = Sampling(max_tokens=prompter.max_tokens)
    pad = prompter.tokenizer.pad_token_id
    drawn = sample_and_score(prompter.model, pad, ids, keys, sampling, batch_size=work.batch_size)
    return [[(tuple(said), math.fsum(values)) for said, values in row] for row in drawn]


def _text(prompter: Prompter, x: str, ids: tuple[int, ...]) -> str:
    return prompter.template.rewrite(prompter.tokenizer, x, ids)


def _none(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """Take x itself."""
    return [[Draw(str(x))] * work.settings.draws for x in prompts]


def _sft(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """Draw x′ ~ ρ_sft."""
    rows = _sample(work, work.reference, prompts, "rollout", arm.seed, work.settings.draws)
    return [
        [Draw(_text(work.reference, x, ids), value, value) for ids, value in row]
        for x, row in zip(prompts, rows, strict=True)
    ]


def _trained(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """Draw x′ ~ ρ_θ, and score it by ρ_sft too."""
    prompter, reference = work.prompter(arm.folder), work.reference
    rows = _sample(work, prompter, prompts, "rollout", arm.seed, work.settings.draws)
    given = reference.prompt_ids(prompts)
    pairs = [(start, ids) for start, row in zip(given, rows, strict=True) for ids, _ in row]
    with torch.inference_mode():
        scores = log_probs(reference.model, [start for start, _ in pairs], [ids for _, ids in pairs])
    values = iter(scores.log_probs.double().sum(1).tolist())
    return [
        [Draw(_text(prompter, x, ids), value, next(values)) for ids, value in row]
        for x, row in zip(prompts, rows, strict=True)
    ]


def _resampled(weigh: Callable[..., Array]) -> Callable[..., list[list[Draw]]]:
    """An arm that draws by weights over proposals from ρ_sft, whose answers are asked for again.

    Its density is known up to the error of R̂ only, so none is given.
    """

    def arm_draws(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
        settings, reference = work.settings, work.reference
        rows = _sample(work, reference, prompts, "proposals", arm.seed, settings.proposals)
        texts = [[_text(reference, x, ids) for ids, _ in row] for x, row in zip(prompts, rows, strict=True)]
        environment = Environment(
            work.reward,
            work.target,
            work.sampling,
            seed=stream("proposals", arm.seed),
            refusals=work.refusals,
        )
        found = appraise(environment, prompts, texts, responses=settings.proposal_answers)
        out = []
        for p, row in zip(found, rows, strict=True):
            chosen = choose(weigh(settings, p), settings.draws, "rollout", arm.name, arm.seed, p.prompt)
            out.append([Draw(p.rewrites[i], None, row[i][1]) for i in chosen])
        return out

    return arm_draws


def _instructed(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """Add the arm's text to x."""
    return [[Draw(with_instruction(x, arm.text))] * work.settings.draws for x in prompts]


def _given(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """Take the rewrites of x in the arm's file in turn, the first of them again after the last."""
    rows = [work.given[arm.name][x] for x in prompts]
    return [[Draw(row[i % len(row)]) for i in range(work.settings.draws)] for row in rows]


ARMS: dict[str, Callable[[Work, Arm, Sequence[str]], list[list[Draw]]]] = {
    "none": _none,
    "sft": _sft,
    "star": _resampled(lambda s, p: star(p, s.lam).weights),
    "best_of_n": _resampled(lambda s, p: best_of_n(p, s.best_of).weights),
}
"""Arms without training: the draws [prompts][draws] of each."""
RESAMPLED = ("star", "best_of_n")
"""Those that choose among proposals of ρ_sft, by answers that are asked for beside those of the rollouts."""


def draws_of(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """[prompts][draws] rewrites of an arm: none of rlhf, of a row of `ARMS`, or of what the arm names."""
    if arm.name == "rlhf":
        return [[Draw(None)] * work.settings.draws for _ in prompts]
    other = _instructed if arm.text else _given if arm.file else _trained
    return ARMS.get(arm.name, other)(work, arm, prompts)


def stream(kind: str, seed: int) -> int:
    """Seed of π_F's answers. Training's own seeds are small: what was trained on is not met again."""
    return int.from_bytes(digest("rollout", kind, seed)[:7])
