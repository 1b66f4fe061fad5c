"""The packaged reward `minilm-bt`: sentence embeddings under a linear Bradley–Terry head, trained by eq. (1).

It is small, weak and real, and honest about itself: `describe()` carries its measured accuracy and its
correlation with length.
"""

import hashlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np
from scipy import stats

from alignpro.llm.data import packaged
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.split import split_of
from alignpro.llm.models import catalogue, packages
from alignpro.llm.rewards.accuracy import accuracy, longer_wins
from alignpro.llm.rewards.bradley_terry import (
    BradleyTerryReward,
    affine,
    bradley_terry_loss,
    fit_bradley_terry,
)
from alignpro.llm.rewards.features import TEXT_FEATURES, Embedder, features
from alignpro.llm.rewards.reward import Array

MADE_BY = (
    "alignpro.llm.data.packaged",
    "alignpro.llm.data.split",
    "alignpro.llm.rewards.accuracy",
    "alignpro.llm.rewards.bradley_terry",
    "alignpro.llm.rewards.features",
    "alignpro.llm.rewards.minilm",
)
"""The modules whose code makes and measures the head. A test follows a training and finds no other."""

# One number each, so the ridge shrinks them less than the 384 coordinates of an embedding.
_EXPRESS = 3.0


@dataclass(frozen=True)
class TrainingConfig:
    """Choices about the head; part of its cache key.

    Args:
        sources: rows of `alignpro.llm.data.packaged.PREFERENCES`.
        weight_decays: tried in turn; the one with the least validation loss is kept.
        short_words: every pair is also seen cut to this many words, the length that small models answer with.
        constructed: weight of each kind of pair whose preference is true by construction (see
            `constructed_pairs`), as a share of the judged pairs' weight.
        constructed_prompts: how many prompts those are built from.
        slope: width of the squash, in standard deviations of the training answers about their prompt's mean.
            1.5 keeps nearly all of a small model's answers off the flat ends.
        seed: of the constructed pairs; the fit itself has a unique answer.
    """

    sources: tuple[str, ...] = ("dpo-demo", "healthbench")
    weight_decays: tuple[float, ...] = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03)
    short_words: int = 40
    constructed: tuple[tuple[str, float], ...] = (
        ("other answer", 0.1),
        ("echo", 0.02),
        ("loop", 0.02),
        ("silence", 0.01),
    )
    constructed_prompts: int = 500
    slope: float = 1.5
    seed: int = 0


def train_bradley_terry(
    config: TrainingConfig | None = None, embedder: Embedder | None = None
) -> BradleyTerryReward:
    """Train the head on the training split, choose its weight decay on validation, measure it on test.

    Pairs weigh 1 / (pairs of their prompt), so that HealthBench's four per prompt do not dominate. Besides
    people's and models' judgements the head sees pairs that are true by construction, from prompts with a
    reference answer: the answer beats one to another prompt, an echo of the prompt, a loop, and silence.
    Without them relevance is learned so weakly that a policy would be free to change the subject.

    Deterministic for a config, up to rounding.
    """
    config = config or TrainingConfig()
    embedder = embedder or Embedder()
    judged = packaged.preference_pairs(config.sources)
    judged += [_shortened(pair, config.short_words) for pair in judged]
    n_judged = len(judged)
    built = constructed_pairs(config)
    pairs = judged + built
    chosen = features([p.prompt for p in pairs], [p.chosen for p in pairs], embedder)
    rejected = features([p.prompt for p in pairs], [p.rejected for p in pairs], embedder)
    split = np.array([p.split for p in pairs])
    weight = _pair_weights(pairs, n_judged, dict(config.constructed))
    train, validation = split == "train", split == "validation"

    both = np.concatenate([chosen[train], rejected[train]])
    mean, deviation = both.mean(0), both.std(0)
    emphasis = np.r_[np.ones(Embedder.DIMENSION), np.full(len(TEXT_FEATURES), _EXPRESS)]
    scale_by = np.where(deviation > 1e-9, emphasis / np.maximum(deviation, 1e-9), 0.0)
    differences = (chosen - rejected) * scale_by

    losses = {}
    for decay in config.weight_decays:
        fitted = fit_bradley_terry(differences[train], weight[train], decay)
        share = weight[validation] / weight[validation].sum()
        losses[decay] = bradley_terry_loss(fitted, differences[validation], share, 0.0)[0]
    decay = min(losses, key=lambda d: losses[d])
    weights = fit_bradley_terry(differences[train], weight[train], decay)

    raw_chosen, raw_rejected = ((f - mean) * scale_by @ weights for f in (chosen, rejected))
    # Echoes, loops and silence are no sample of answers to x, so they have no part in the squash.
    kind = np.array([p.source for p in pairs])
    fit = train & ((np.arange(len(pairs)) < n_judged) | (kind == "other answer"))
    ex = embedder.embed([p.prompt for p, used in zip(pairs, fit, strict=True) if used]).astype(np.float64)
    squash = _squash(raw_chosen[fit], raw_rejected[fit], affine(ex), weight[fit], config.slope)

    reward = BradleyTerryReward(weights, mean, scale_by, *squash, {}, embedder)
    reward.facts = _facts(reward, config, judged, built, decay, losses)
    return reward


def constructed_pairs(config: TrainingConfig) -> list[PreferencePair]:
    """Build pairs whose preference is true by construction, from instructions with a reference answer."""
    answers = packaged.reference_answers()
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(answers))[: config.constructed_prompts]
    pairs = []
    for place, i in enumerate(order):
        prompt, full = answers[i]
        answer = _cut(full, config.short_words)
        other = _cut(answers[order[place - 1]][1], config.short_words)
        opening = " ".join(answer.split()[:6])
        bad = {
            "other answer": other,
            "echo": prompt,
            "loop": " ".join([opening] * max(2, len(answer.split()) // 6)),
            "silence": "",
        }
        for kind, rejected in bad.items():
            if rejected != answer:
                pairs.append(PreferencePair(prompt, answer, rejected, kind, split_of(prompt)))
    return pairs


def minilm_bt(config: TrainingConfig | None = None) -> BradleyTerryReward:
    """Load the default reward, which is fetched and trained at first use (about a minute on 2 cores)."""
    config = config or TrainingConfig()
    key = cache_key(config)
    folder = packages.cache_folder() / "rewards" / f"minilm-bt-{key}"
    if (folder / packages.MANIFEST).is_file():
        packages.verify_folder(folder)
        return BradleyTerryReward.load(folder)
    packages.note(f"training the reward model minilm-bt into {folder} (once, about a minute)")
    reward = train_bradley_terry(config)
    with packages.staging(folder) as partial:
        content = partial / "content"
        reward.save(content)
        packages.write_manifest(content, source="minilm-bt", key=key)
        packages.publish(content, folder)
    return reward


def cache_key(config: TrainingConfig) -> str:
    """Name what a training with `config` makes: its configuration, the data and encoder by their checksums,
    and the code, so that what is in the cache is what this code would make, up to rounding."""
    needed = ("minilm", "llamafactory", "eval-framework")
    facts = {
        "config": asdict(config),
        "packages": {name: catalogue.PACKAGES[name].sha256 for name in needed},
        "code": {name: packages.code_digest(inspect.getsource(import_module(name))) for name in MADE_BY},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _facts(
    reward: BradleyTerryReward,
    config: TrainingConfig,
    judged: list[PreferencePair],
    built: list[PreferencePair],
    decay: float,
    losses: dict[float, float],
) -> dict[str, Any]:
    """Say what is known of the head: counts, accuracy on the test split, and what not to use it for."""
    half = len(judged) // 2
    full_test, short_test, built_test = (
        [p for p in pairs if p.split == "test"] for pairs in (judged[:half], judged[half:], built)
    )
    answers = list(dict.fromkeys((p.prompt, y) for p in full_test for y in (p.chosen, p.rejected)))
    scores = reward.score([x for x, _ in answers], [y for _, y in answers])
    lengths = [len(y.split()) for _, y in answers]
    counts = Counter((p.source, str(p.split)) for p in judged[:half])
    return {
        "name": "minilm-bt",
        "encoder": "all-MiniLM-L6-v2, mean pooled, normalised, first 128 tokens",
        "features": ["answer embedding", *TEXT_FEATURES],
        "loss": "Bradley–Terry, eq. (1), with weight decay chosen on validation",
        "config": asdict(config),
        "pairs": {f"{source} {part}": n for (source, part), n in sorted(counts.items())},
        "weight_decay": decay,
        "validation_loss": {str(d): loss for d, loss in losses.items()},
        "test_accuracy": accuracy(reward, full_test),
        "test_accuracy_by_source": {
            s: accuracy(reward, [p for p in full_test if p.source == s]) for s in config.sources
        },
        f"test_accuracy_first_{config.short_words}_words": accuracy(reward, short_test),
        "test_accuracy_constructed": {
            kind: accuracy(reward, [p for p in built_test if p.source == kind])
            for kind in dict.fromkeys(p.source for p in built_test)
        },
        "test_accuracy_of_longer_wins": longer_wins(full_test),
        # Spearman's, over the full test answers of all prompts.
        "length_correlation": float(stats.spearmanr(scores, lengths).statistic),
        "squash": {"centre": reward.centre, "scale": reward.scale},
        "limits": [
            "Weak: barely better than chance on general preferences; use it to study optimization, not to "
            "judge models.",
            "English, single answers of up to 128 tokens; facts and arithmetic are invisible to it.",
            "Comparable between answers to one prompt; eq. (1) fixes no scale between prompts.",
            "Trained on HealthBench pairs: do not use it to select models that HealthBench then evaluates.",
        ],
    }


def _pair_weights(pairs: Sequence[PreferencePair], n_judged: int, constructed: Mapping[str, float]) -> Array:
    """Weigh [N] pairs: in each split the judged prompts weigh the same and 1 in all, each kind its share."""
    group = ["judged" if i < n_judged else p.source for i, p in enumerate(pairs)]
    count = Counter(zip(group, (p.prompt for p in pairs), strict=True))
    weight = np.array([1 / count[g, p.prompt] for g, p in zip(group, pairs, strict=True)])
    keys = [(g, p.split) for g, p in zip(group, pairs, strict=True)]
    total: Counter[tuple[str, str]] = Counter()
    for key, w in zip(keys, weight, strict=True):
        total[key] += w
    share = {"judged": 1.0, **constructed}
    return weight * np.array([share[kind] / total[kind, part] for kind, part in keys])


def _shortened(pair: PreferencePair, words: int) -> PreferencePair:
    return PreferencePair(
        pair.prompt, _cut(pair.chosen, words), _cut(pair.rejected, words), pair.source, pair.split
    )


def _cut(text: str, words: int) -> str:
    """Take the first `words` words, with the white space between them (lists stay lists)."""
    match = re.match(rf"\s*(?:\S+\s+){{0,{words - 1}}}\S+", text)
    return match[0].strip() if match else ""


def _squash(
    chosen: Array, rejected: Array, inputs: Array, weights: Array, slope: float
) -> tuple[Array, float, float]:
    """Choose baseline, centre and scale, by which the scores [N] of both answers use the range.

    The baseline is the free function of x: a ridge regression of the pairs' mean scores on the prompts'
    `inputs` [N, D + 1]. Centre is the median score about it, scale `slope` times the deviation of two answers
    about their mean.
    """
    baseline = _ridge(inputs, (chosen + rejected) / 2, weights)
    expected = inputs @ baseline
    within = np.sqrt(np.average(((chosen - rejected) / 2) ** 2, weights=weights))
    return baseline, float(np.median(np.r_[chosen - expected, rejected - expected])), float(slope * within)


def _ridge(inputs: Array, targets: Array, weights: Array, penalty: float = 0.03) -> Array:
    """Regress on inputs [N, D + 1], embeddings and a constant, which is not penalised.

    An embedding's coordinates have mean square 1/384; the slope of a direction with `penalty` times that is
    halved.
    """
    weights = weights / weights.sum()
    gram = inputs.T @ (inputs * weights[:, None])
    ridge = np.full(len(gram), penalty / Embedder.DIMENSION)
    ridge[-1] = 0.0
    return np.linalg.solve(gram + np.diag(ridge), inputs.T @ (weights * targets))
