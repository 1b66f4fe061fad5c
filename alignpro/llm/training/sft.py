"""Supervised fine-tuning of the prompter into ρ_sft, from pairs of prompt and rewrite, by TRL's SFTTrainer.

The loss is −Σ log ρ(x′|x) over the rewrite's tokens and the end of its turn, as `Prompter.log_probs` has it.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl import SFTConfig, SFTTrainer

from alignpro.errors import AlignProError
from alignpro.files import writable_folder, write_json
from alignpro.llm.data import split as data
from alignpro.llm.data.own import Rewrite
from alignpro.llm.data.rows import first_turn
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.forward import how_of, room
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.policy import log_probs
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training.checkpoints import (
    METRICS_FILE,
    PROMPTER_FOLDER,
    SETTINGS_FILE,
    PairMetrics,
    Trained,
    WholeCheckpoints,
    check_begun,
    last_checkpoint,
    pair_arguments,
    trainer_of,
)
from alignpro.llm.training.pair_settings import SFTSettings
from alignpro.llm.training.settings import check_reporters

Encoded = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt behind the template, and of its rewrite with the end token."""


@dataclass(frozen=True)
class HeldOut:
    """Cost of rewrites that were not learned from, in nats per token, end tokens included."""

    pairs: int
    before: float
    """Before fine-tuning."""
    after: float
    """After it."""


@dataclass(frozen=True, repr=False)
class Tuned(Trained):
    """Result of fine-tuning a prompter."""

    prompter: Prompter
    held_out: dict[str, HeldOut]
    """By split, `validation` and `test`, where there are pairs in it."""


def nats_per_token(prompter: Prompter, pairs: Sequence[Encoded]) -> float:
    """Mean cost of the rewrites: −Σ log ρ(x′|x) over pairs, divided by their tokens, end tokens included."""
    with torch.no_grad():
        scores = log_probs(prompter.model, [p for p, _ in pairs], [said for _, said in pairs])
    return -float(scores.log_probs.double().sum()) / sum(len(said) for _, said in pairs)


def sft(
    prompter: Prompter,
    pairs: Sequence[Rewrite],
    settings: SFTSettings,
    out: str | Path,
    *,
    resume: bool = False,
    merge: bool = True,
    report_to: Sequence[str] = (),
) -> Tuned:
    """Fine-tune a copy of the prompter, which itself stays as it is, on the pairs of the split `train`.

    A prompt's split is `data.split_of`. The nats per token of `validation` and `test`, before and after, are
    in the result and in the prompter's `facts["sft"]`. Into `out` go settings.json, metrics.jsonl,
    checkpoints, and prompter/, which `Prompter.from_pretrained` opens.

    Args:
        prompter: a language model without an adapter.
        out: a new or empty folder.
        resume: continue from the last checkpoint in `out`, if there is one; on a CPU to the bit.
        merge: merge the adapter into the language model, so that the result can be the reference ρ_sft of
            `train`; otherwise the folder holds the adapter alone.
        report_to: tensorboard, wandb, trackio.
    """
    check_reporters(report_to)
    if hasattr(prompter.model, "peft_config"):
        raise AlignProError("prompter: it has an adapter already; merge it into its model first")
    most = room(prompter.model) or math.inf
    split: dict[str, list[Encoded]] = {part: [] for part in data.SPLITS}
    for pair in pairs:
        ids = encode(prompter, pair)
        if len(ids[1]) <= settings.max_tokens and len(ids[0]) + len(ids[1]) <= most:
            split[data.split_of(first_turn(pair.prompt))].append(ids)
    held = {part: found for part, found in split.items() if part != "train" and found}
    if not split["train"] or not held:
        raise AlignProError(
            f"pairs: of {len(pairs)}, {len(split['train'])} fit to learn from and "
            f"{sum(map(len, held.values()))} to measure on; give more prompts, or raise max_tokens"
        )
    out = writable_folder(out, "out")
    record = {
        "settings": asdict(settings),
        "base": prompter.base,
        "chat": chat_of(prompter.tokenizer).describe(),
        "read": how_of(prompter.model).describe(),
        "pairs": {part: len(found) for part, found in split.items()},
        "left_out": len(pairs) - sum(map(len, split.values())),
        "tokens_sha256": hashlib.sha256(json.dumps(split).encode()).hexdigest(),
    }
    check_begun(out, record, resume)
    before = {part: nats_per_token(prompter, found) for part, found in held.items()}
    with quiet(), torch.random.fork_rng():  # TRL seeds the process
        metrics = PairMetrics(out / METRICS_FILE)
        trainer = _trainer(prompter, split["train"], settings, out, report_to, metrics)
        if trainer.args.should_save:
            write_json(out / SETTINGS_FILE, record)
        trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
        model = trainer.accelerator.unwrap_model(trainer.model)
        vars(model.get_base_model()).pop("forward", None)  # TRL's; one copied would call the original
        tuned = replace(prompter, model=(model.merge_and_unload() if merge else model).eval())
        tuned.max_tokens = settings.max_tokens
        held_out = {
            part: HeldOut(len(found), before[part], nats_per_token(tuned, found))
            for part, found in held.items()
        }
        measured = {part: {"before": e.before, "after": e.after} for part, e in held_out.items()}
        tuned.facts = {**prompter.facts, "sft": {**record, "nats_per_token": measured}}
        folder = out / PROMPTER_FOLDER
        if trainer.args.should_save:
            tuned.save(folder, whole=merge)
        trainer.accelerator.wait_for_everyone()
    if merge:
        # From its folder, as any later user has it: trainers find the reference by the model's path.
        kind, device = str(model.dtype).removeprefix("torch."), str(model.device)
        tuned = Prompter.from_pretrained(folder, dtype=kind, device=device)
    return Tuned(out, record, metrics.lines, tuned, held_out)


def encode(prompter: Prompter, pair: Rewrite) -> Encoded:
    """Encode a pair exactly as the prompter reads and says them."""
    template, tokenizer = prompter.template, prompter.tokenizer
    said = template.rewrite_ids(tokenizer, pair.prompt, pair.rewrite)
    return template.prompt_ids(tokenizer, pair.prompt), said


def gathered(pairs: Sequence[Encoded], seed: int) -> list[Encoded]:
    """The pairs in another order, in which those of one prompt follow each other."""
    by_prompt: dict[tuple[int, ...], list[Encoded]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair[0], []).append(pair)
    groups = [*by_prompt.values()]
    return [pair for i in np.random.default_rng([seed, 2]).permutation(len(groups)) for pair in groups[i]]


def columns(pairs: Sequence[Encoded]) -> dict[str, list[list[int]]]:
    """The columns that TRL's trainer reads; `labels` is −100 where a token is no part of the loss."""
    return {
        "input_ids": [[*prompt, *said] for prompt, said in pairs],
        "labels": [[*[-100] * len(prompt), *said] for prompt, said in pairs],
    }


def uncolumned(input_ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> list[Encoded]:
    """The pairs that a collated batch of `columns` holds, without pads."""
    pairs = []
    for ids, wanted, kept in zip(input_ids.tolist(), labels.tolist(), mask.tolist(), strict=True):
        row = [(token, label) for token, label, there in zip(ids, wanted, kept, strict=True) if there]
        prompt = tuple(token for token, label in row if label == -100)
        pairs.append((prompt, tuple(token for token, label in row if label != -100)))
    return pairs


class _Trainer(WholeCheckpoints, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, with its loss from a pass that reads the template once and not in every row.

    The loss is −Σ log ρ(x′|x) over a batch divided by the batch's tokens. The entropy is logged beside it;
    TRL's accuracy is not, which would need the logits once more."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        pairs = uncolumned(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
        scores = log_probs(model, [prompt for prompt, _ in pairs], [said for _, said in pairs])
        here = torch.tensor(sum(len(said) for _, said in pairs), device=scores.log_probs.device)
        every = self.accelerator.gather_for_metrics
        entropy = every(scores.entropies.sum()).sum() / every(here).sum()
        self._metrics["train"]["entropy"].append(entropy.item())
        # Over the tokens of all processes, whose gradients are then averaged: as TRL has it.
        tokens = here if num_items_in_batch is None else num_items_in_batch
        loss = -scores.log_probs.sum() / tokens
        return loss if num_items_in_batch is None else loss * self.accelerator.num_processes


def _trainer(
    prompter: Prompter,
    pairs: Sequence[Encoded],
    settings: SFTSettings,
    out: Path,
    report_to: Sequence[str],
    metrics: PairMetrics,
) -> Any:
    """TRL's trainer of an adapter on a copy of the prompter's model."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % (world * settings.microbatches):
        raise AlignProError(
            f"batch_size {settings.batch_size}: {world} processes x {settings.microbatches} microbatches "
            "do not divide it"
        )
    model = copy.deepcopy(prompter.model)
    vars(model).pop("forward", None)  # one that a trainer of TRL has put there calls the original
    if settings.together:
        pairs = gathered(pairs, settings.seed)
    config = SFTConfig(
        train_sampling_strategy="sequential" if settings.together else "random",
        **pair_arguments(settings, out, model.device.type == "cpu", world),
        packing=False,
        bf16=False,
        report_to=list(report_to),
    )
    adapter = adapter_config(model, settings.lora_rank, settings.lora_layers)
    named = {"model": model, "args": config, "processing_class": prompter.tokenizer, "peft_config": adapter}
    return trainer_of(_Trainer, columns(pairs), metrics, **named)
