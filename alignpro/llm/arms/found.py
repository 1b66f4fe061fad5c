"""Findings of a training run: its rewrites over time, and its evaluations beside resampling."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from alignpro.llm.arms.resample import Proposals, star
from alignpro.llm.models.prompt import from_json
from alignpro.llm.training import rewrites
from alignpro.strategies import Strategy, strategy_of

if TYPE_CHECKING:
    from alignpro.llm.training.open_ended import TrainedPrompter

MOST_STRATEGIES = 8
MOST_BANDS = 8
EXAMPLES = 3
"""Prompts of a round whose first rewrite is shown."""


@dataclass(frozen=True)
class Example:
    """One rewrite that was sampled (of the oracle: an answer)."""

    round: int
    prompt: str
    rewrite: str | None
    """The rewrite; None of the oracle, which answers."""
    answer: str
    """First answer to it."""
    reward: float
    """Its mean reward."""


@dataclass(frozen=True)
class Used:
    """How often one strategy was used, and what it earned where it was."""

    text: str
    """Text that is added to the prompt, or the words that begin the rewrite."""
    added: bool
    """Whether `text` is added to the prompt."""
    draws: int
    """Rewrites with this strategy."""
    share: float
    """Share of all rewrites."""
    reward: float
    """Mean reward of those rewrites."""
    shares: tuple[float, ...]
    """Share of the rewrites of each band of rounds."""


@dataclass(frozen=True)
class Resampling:
    """Weighting the rewrites that ρ_sft was asked for before the first round to ρ*, without training.

    Each number is a mean over held-out prompts, and its standard error. Weights and rewards are by different
    answers, so that `reward` is what this prompter earns on average. `kl` is an upper bound of its KL from
    ρ_sft, at most the logarithm of `draws`, so that `objective` is on average no more than the best one.
    """

    draws: int
    """Rewrites of each prompt."""
    reward: tuple[float, float]
    """Mean reward."""
    kl: tuple[float, float]
    """KL to ρ_sft, in nats."""
    objective: tuple[float, float]
    """reward − λ kl."""

    @property
    def most_kl(self) -> float:
        """The largest KL that so many draws allow, in nats."""
        return math.log(self.draws)


@dataclass(frozen=True)
class Found:
    """A training run, with what its rewrites and its evaluations show."""

    trained: "TrainedPrompter"
    examples: tuple[Example, ...]
    """The first rewrite of the first prompts of the first, the middle and the last round."""
    bands: tuple[tuple[int, int], ...]
    """First and last round of each band of rounds."""
    strategies: tuple[Used, ...]
    """The strategies with the most rewrites, most first, of those that two prompts or more share; none of the
    oracle."""
    rest: Used | None
    """All other rewrites; None where there are none."""
    before_after: tuple[Example, ...]
    """Rewrites of the same held-out prompts before training and at the evaluation that was kept."""
    resampling: Resampling | None
    """None where nothing was evaluated, or ρ_sft was not asked for proposals."""


def found(trained: "TrainedPrompter") -> Found:
    """Read a run's rewrites and tell what they show."""
    lines = rewrites.read(Path(trained.folder) / rewrites.REWRITES_FILE)
    bands, strategies, rest = used(lines)
    lam = float(trained.record["settings"]["lam"])
    return Found(
        trained=trained,
        examples=examples(lines),
        bands=bands,
        strategies=strategies,
        rest=rest,
        before_after=before_after(trained.evaluations),
        resampling=resampling(trained.evaluations, lam),
    )


def examples(lines: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    """The first rewrite of the first prompts of the first, the middle and the last round on file."""
    rounds = sorted({line["round"] for line in lines})
    out = []
    for number in sorted({rounds[0], rounds[len(rounds) // 2], rounds[-1]}) if rounds else ():
        first: dict[str, Mapping[str, Any]] = {}
        for line in lines:
            if line["round"] == number:
                first.setdefault(from_json(line["prompt"]), line)
        out += [_example(number, line) for line in list(first.values())[:EXAMPLES]]
    return tuple(out)


def before_after(evaluations: Sequence[Mapping[str, Any]]) -> tuple[Example, ...]:
    """The examples of the evaluation before the first round and of the best one, prompt by prompt."""
    if not evaluations:
        return ()
    best = next(line for line in evaluations if line["round"] == evaluations[-1]["best"])
    chosen = [evaluations[0]] if best["round"] == 0 else [evaluations[0], best]
    rows = zip(*(line["examples"] for line in chosen), strict=True)
    return tuple(
        _example(line["round"], row) for each in rows for line, row in zip(chosen, each, strict=True)
    )


def _example(number: int, line: Mapping[str, Any]) -> Example:
    prompt = str(from_json(line["prompt"]))
    return Example(number, prompt, line["rewrite"], line["answer"], line["reward"])


def used(
    lines: Sequence[Mapping[str, Any]],
) -> tuple[tuple[tuple[int, int], ...], tuple[Used, ...], Used | None]:
    """Bands of rounds, the commonest strategies that prompts share with their shares of each band, and the
    rest."""
    rows = [line for line in lines if line["rewrite"] is not None]
    if not rows:
        return (), (), None
    rounds = sorted({row["round"] for row in rows})
    parts = [part.tolist() for part in np.array_split(rounds, min(MOST_BANDS, len(rounds)))]
    band = {number: i for i, part in enumerate(parts) for number in part}
    does = [strategy_of(from_json(row["prompt"]), row["rewrite"]) for row in rows]
    sizes = Counter(band[row["round"]] for row in rows)
    pairs = {(strategy, str(row["prompt"])) for strategy, row in zip(does, rows, strict=True)}
    prompts = Counter(strategy for strategy, _ in pairs)
    shared = Counter(strategy for strategy in does if prompts[strategy] > 1)
    top = sorted(shared.items(), key=lambda item: (-item[1], item[0]))[:MOST_STRATEGIES]

    def of(text: str, added: bool, mine: Sequence[Mapping[str, Any]]) -> Used:
        counts = Counter(band[row["round"]] for row in mine)
        return Used(
            text,
            added,
            len(mine),
            len(mine) / len(rows),
            fmean(row["reward"] for row in mine),
            tuple(counts[i] / sizes[i] for i in range(len(parts))),
        )

    by: dict[Strategy | None, list[Mapping[str, Any]]] = {}
    names = {strategy for strategy, _ in top}
    for row, strategy in zip(rows, does, strict=True):
        by.setdefault(strategy if strategy in names else None, []).append(row)
    rest = of("", False, by[None]) if None in by else None
    bands = tuple((part[0], part[-1]) for part in parts)
    return bands, tuple(of(s.text, s.added, by[s]) for s, _ in top), rest


def resampling(evaluations: Sequence[Mapping[str, Any]], lam: float) -> Resampling | None:
    """Self-normalised weights exp(R/λ) within each prompt over the proposals of the first evaluation.

    Of each rewrite there are two rewards, by different answers; each gives the weights for the other.
    """
    proposals = evaluations[0].get("proposals") if evaluations else None
    if proposals is None:
        return None
    each = []
    for one, other in zip(proposals["rewards"], proposals["again"], strict=True):
        folds = []
        for weighing, judging in ((one, other), (other, one)):
            tilted = star(Proposals("", ("",) * len(weighing), weighing), lam)
            reward = float(tilted.weights @ np.array(judging))
            folds.append((reward, tilted.kl, reward - lam * tilted.kl))
        each.append(np.mean(folds, 0))
    values = np.array(each)
    errors = values.std(0, ddof=1) / math.sqrt(len(values))
    terms = [*zip(values.mean(0).tolist(), errors.tolist(), strict=True)]
    return Resampling(len(proposals["rewards"][0]), *terms)
