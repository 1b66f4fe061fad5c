"""Reward learning, eq. (1): a reward model from preference pairs, by TRL's RewardTrainer."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from trl import RewardConfig, RewardTrainer

from alignpro.errors import AlignProError
from alignpro.files import flaw, listed, read_json_lines, write_json
from alignpro.llm.data.own import read_pairs
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.split import SPLITS, Split, normalised
from alignpro.llm.models import catalogue, configure, contents, devices, libraries, resolve
from alignpro.llm.models.forward import text_config
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.load import loading, read_tokenizer, read_weights
from alignpro.llm.rewards.accuracy import accuracy, longer_wins
from alignpro.llm.rewards.bounds import Bounded, Squash
from alignpro.llm.rewards.classifier import REWARD_FILE, SequenceReward, longest, public_name
from alignpro.llm.rewards.reward import check_scores, check_template, shown
from alignpro.llm.training.checkpoints import (
    METRICS_FILE,
    PairMetrics,
    Trained,
    WholeCheckpoints,
    check_begun,
    last_checkpoint,
    pair_arguments,
    remove_all,
    trainer_of,
)
from alignpro.llm.training.pair_settings import RewardSettings
from alignpro.runs import SETTINGS_FILE, here, owning

Array = np.ndarray

CHECKPOINTS = "checkpoints"
"""Folder within a run's own that is removed at its end: optimizer states are no part of a reward."""

_SQUASH_PAIRS = 1000  # training pairs from which the squash is chosen; more would not move it


@dataclass(frozen=True, repr=False)
class TrainedReward(Trained):
    """Result of reward learning."""

    reward: SequenceReward
    """The reward; its `facts` say how good it is, as reward.json does."""


@owning("reward-model", option="out")
def train_reward(
    pairs: Sequence[PreferencePair] | str | Path,
    model: str | Path,
    out: str | Path,
    settings: RewardSettings | None = None,
    *,
    template: str | None = None,
    device: str = "auto",
    resume: bool = False,
) -> TrainedReward:
    """Learn r(x, y) by eq. (1), −E log σ(r(x, y_u) − r(x, y_v)), with TRL's RewardTrainer; save it.

    Pairs of the split `train` are learned from; `validation` (tune on it) and `test` are only measured.
    Training and scoring write a sample in the same way. The reward that comes back is squashed so that the
    training scores use the range: centre at their median, scale their standard deviation.

    Args:
        pairs: or a file for `read_pairs`.
        model: a causal language model (see `models.resolve`) or a reward model with one output.
        out: a new or empty folder, for safetensors, tokenizer and reward.json (see `SequenceReward.load`);
            besides them settings.json, metrics.jsonl and, until it is finished, checkpoints.
        template: see `SequenceReward`; not `pair`.
        device: `auto`, `cpu` or `cuda`.
        resume: continue from the last checkpoint in `out`, if there is one; on a CPU to the bit.
    """
    settings = settings or RewardSettings()
    pairs = read_pairs(pairs) if isinstance(pairs, str | Path) else list(pairs)
    split = split_pairs(pairs)
    if template is not None:
        check_template(template)
        if template == "pair":
            raise AlignProError(
                "template pair: TRL's trainer has no segments; give a text with {prompt} and {response}"
            )
    where = devices.device_of(device)
    catalogue.check_name(model)
    out = Path(out)
    texts = json.dumps([[p.prompt, p.chosen, p.rejected, p.split] for p in pairs])
    counts = Counter((p.source, p.split) for p in pairs)
    record = {
        "settings": asdict(settings),
        "base": public_name(model),
        "template": template,
        "pairs": {f"{source} {part}": n for (source, part), n in sorted(counts.items())},
        "pairs_sha256": hashlib.sha256(texts.encode()).hexdigest(),
    }
    here(out).contents["base"] = lambda: contents.of_model(model)
    check_begun(out, record, resume)
    if (out / REWARD_FILE).exists():
        _check_whole(out)
        remove_all(out / CHECKPOINTS)
        lines = read_json_lines(out / METRICS_FILE)
        return TrainedReward(out, record, lines, SequenceReward.load(out, device=device))
    with torch.random.fork_rng():  # TRL seeds the process
        base, tokenizer = _base(model, settings.seed)
        most, name = min(settings.max_tokens, longest(base, tokenizer)), public_name(out)
        reward = SequenceReward(
            base, tokenizer, Squash(0.0, 1.0), name=name, template=template, max_tokens=most
        )
        metrics = PairMetrics(out / METRICS_FILE)
        reward.model = _fit(reward, split["train"], settings, where, out, metrics)
    reward.model.eval()
    train = split["train"]
    some = np.random.default_rng(settings.seed).permutation(len(train))[:_SQUASH_PAIRS]
    seen = [train[i] for i in sorted(some)]
    raw = np.concatenate(_pair_logits(reward, seen))
    scale = float(raw.std())
    bounds = Squash(float(np.median(raw)), scale if scale > 0 else 1.0)
    measured = {part: found for part, found in (split | {"train": seen}).items() if found}
    reward.facts = {
        **record,
        "loss": "Bradley–Terry, eq. (1), by TRL's RewardTrainer; plus centre · (r(x,y_u) + r(x,y_v))²",
        "prompts": {part: len({p.prompt for p in found}) for part, found in split.items()},
        "truncated": dict(reward.counts),
        "optimizer_loss": float(np.mean([line["loss"] for line in metrics.lines])),
        **{f"{part}_loss": _loss(reward, found) for part, found in measured.items()},
        **{f"{part}_accuracy": accuracy(cast(Any, reward), found) for part, found in measured.items()},
        "test_accuracy_of_longer_wins": longer_wins(split["test"]),
        "bounds": str(bounds),
        "template": reward.template,
        "max_tokens": reward.max_tokens,
    }
    reward.bounded = Bounded(bounds)
    reward.counts = dict.fromkeys(reward.counts, 0)
    try:
        with quiet():
            reward.model.save_pretrained(out)
            reward.tokenizer.save_pretrained(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
        raise AlignProError(
            f"cannot write {out} ({libraries.one_line(error)}); free space and resume: what "
            "was trained is kept"
        ) from error
    write_json(out / REWARD_FILE, reward.facts)  # last: without it the folder is not taken for a reward
    here(out).write(files=listed(out, _files(out)))
    remove_all(out / CHECKPOINTS)
    return TrainedReward(out, record, metrics.lines, reward)


def _files(out: Path) -> list[str]:
    """Names of the files of a finished reward model, which are as it left them or damaged."""
    others = (SETTINGS_FILE, "report.html", "README.md")
    names = (path.name for path in out.iterdir() if path.is_file())
    return sorted(name for name in names if not name.startswith(".") and name not in others)


def _check_whole(out: Path) -> None:
    """Refuse a finished reward model with a file that is not as it was written: its checkpoints are gone."""
    run = here(out)
    files = (run.before() or {}).get("files")
    # Earlier versions listed none, nor did one that was killed at its end.
    if files is not None and (wrong := flaw(out, files)) is not None:
        raise AlignProError(f"--out {out}: {wrong}; put that back, or train again in a new folder")
    run.write(files=files if files is not None else listed(out, _files(out)))


def split_pairs(pairs: Sequence[PreferencePair]) -> dict[Split, list[PreferencePair]]:
    """The pairs of each split; refuses a prompt in two, and an empty `train` or `test`."""
    home: dict[str, str] = {}
    for pair in pairs:
        if home.setdefault(normalised(pair.prompt), pair.split) != pair.split:
            raise AlignProError(
                f"pairs: prompt {shown(pair.prompt)} is in the split {pair.split} and in another; "
                f"give each prompt one, such as data.split_of(prompt)"
            )
    split: dict[Split, list[PreferencePair]] = {
        part: [pair for pair in pairs if pair.split == part] for part in SPLITS
    }
    for part in ("train", "test"):
        if not split[part]:
            raise AlignProError(
                f"pairs: none of {len(pairs)} is in the split {part}; give pairs of more prompts"
            )
    return split


def _base(model: str | Path, seed: int) -> tuple[Any, Any]:
    """A sequence classifier with one output and the tokenizer; the head is new if `model` has none."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = resolve.resolve(model)
    torch.manual_seed(seed)
    what = f"model {str(model)!r}"
    with loading(what, folder, "language model"):
        tokenizer = read_tokenizer(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    auto, cpu = AutoModelForSequenceClassification, torch.device("cpu")
    if type(config) not in auto._model_mapping:
        raise AlignProError(
            f"{what}: transformers has no classifier of its architecture; choose another base"
        )
    base, lacking = read_weights(auto, folder, what, torch.float32, cpu, "language model", num_labels=1)
    if body := [key for key in lacking if key.startswith(f"{base.base_model_prefix}.")]:
        raise AlignProError(f"{what} has no weights for {body[0]}; give a complete model")
    configure.forget_quantizer(base)
    if lacking:
        text_config(base).pad_token_id = None  # a new head may choose one that ends nothing
    return base, tokenizer


class _Trainer(WholeCheckpoints, RewardTrainer):  # type: ignore[misc]
    pass


def _fit(
    reward: SequenceReward,
    pairs: Sequence[PreferencePair],
    settings: RewardSettings,
    where: torch.device,
    out: Path,
    metrics: PairMetrics,
) -> Any:
    """Train from the last checkpoint on; the model, its adapter merged."""
    # Written and cut as for scoring, so TRL is left nothing to tokenize or to drop.
    with quiet():
        columns = {
            f"{kind}_ids": [reward.encode(p.prompt, getattr(p, kind))["input_ids"] for p in pairs]
            for kind in ("chosen", "rejected")
        }
    adapter = None
    if settings.lora_rank:
        rank, kind = settings.lora_rank, "SEQ_CLS"  # which trains the head besides
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=kind)
    cuda, folder = where.type == "cuda", out / CHECKPOINTS
    with quiet():
        config = RewardConfig(
            **pair_arguments(settings, folder, not cuda),
            center_rewards_coefficient=settings.centre or None,
            bf16=cuda and torch.cuda.is_bf16_supported(),
            report_to="none",
        )
        named = {"model": reward.model, "processing_class": reward.tokenizer, "peft_config": adapter}
        trainer = trainer_of(_Trainer, columns, metrics, args=config, **named)
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        model = trainer.accelerator.unwrap_model(trainer.model)
        return model.merge_and_unload() if adapter else model


def _pair_logits(reward: SequenceReward, pairs: Sequence[PreferencePair]) -> tuple[Array, Array]:
    """The unbounded scores of the chosen and of the rejected answers, [n] each, all finite."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    scored = (check_scores(prompts, texts, reward.logits(prompts, texts)) for texts in (chosen, rejected))
    return next(scored), next(scored)


def _loss(reward: SequenceReward, pairs: Sequence[PreferencePair]) -> float:
    """The loss of eq. (1), averaged over the pairs, in nats; a constant reward has log 2."""
    chosen, rejected = _pair_logits(reward, pairs)
    return float(np.mean(np.logaddexp(0.0, rejected - chosen)))
