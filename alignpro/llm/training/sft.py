"""Supervised fine-tuning of the prompter into ρ_sft, from pairs of prompt and rewrite, by TRL's SFTTrainer.

The loss is −Σ log ρ(x′|x) over the rewrite's tokens and the end of its turn, nothing of the prompt: the very
quantity that `Prompter.log_probs` reports, on the very tokens from which the prompter samples.
"""

import copy
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from alignpro.errors import AlignProError
from alignpro.files import read_json, writable_folder, write_json, write_text
from alignpro.llm.data import split as data
from alignpro.llm.data.own import Rewrite
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.forward import how_of, room
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.policy import log_probs
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training.checkpoints import check_reporters, completing, last_checkpoint
from alignpro.llm.training.settings import SFTSettings
from alignpro.runs import refuse_other_settings

METRICS_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"
PROMPTER_FOLDER = "prompter"

Encoded = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt behind the template, and of its rewrite with the end token."""


def nats_per_token(prompter: Prompter, pairs: Sequence[Encoded]) -> float:
    """−Σ log ρ(x′|x) over pairs, divided by their rewrites' tokens, end tokens included."""
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
) -> Prompter:
    """Fine-tune a copy of the prompter, which itself stays as it is, on the pairs of the split `train`.

    A prompt's split is `data.split_of`. Of `validation` and `test` the nats per token before and after are in
    the result's `facts["sft"]`. Into `out` go settings.json, metrics.jsonl, checkpoints, and prompter/, which
    `Prompter.from_pretrained` opens.

    Args:
        prompter: a language model without an adapter.
        out: a new or empty folder.
        resume: continue from the last checkpoint in `out`, if there is one. On a CPU the result is that of an
            uninterrupted run to the bit.
        merge: merge the adapter into the language model, so that the result can be the reference ρ_sft of
            `train`; otherwise the folder holds the adapter alone.
        report_to: tensorboard, wandb, trackio.

    Raises:
        AlignProError: an adapter, no pairs to learn from or to measure on, a folder in use, a checkpoint made
            with other settings or pairs; training that diverges.
    """
    check_reporters(report_to)
    if hasattr(prompter.model, "peft_config"):
        raise AlignProError("prompter: it has an adapter already; merge it into its model first")
    most = room(prompter.model) or math.inf
    split: dict[str, list[Encoded]] = {part: [] for part in data.SPLITS}
    for pair in pairs:
        ids = encode(prompter, pair)
        if len(ids[1]) <= settings.max_tokens and len(ids[0]) + len(ids[1]) <= most:
            split[data.split_of(pair.prompt)].append(ids)
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
    if resume and (out / SETTINGS_FILE).exists():
        refuse_other_settings(out, read_json(out / SETTINGS_FILE), record)
    elif any(out.iterdir()):
        raise AlignProError(f"out {out}: it is not empty; name a new folder, or resume")
    before = {part: nats_per_token(prompter, found) for part, found in held.items()}
    with quiet(), torch.random.fork_rng():  # TRL seeds the process
        trainer = _trainer(prompter, split["train"], settings, out, report_to)
        if trainer.args.should_save:
            write_json(out / SETTINGS_FILE, record)
        trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
        model = trainer.accelerator.unwrap_model(trainer.model)
        vars(model.get_base_model()).pop("forward", None)  # TRL's; one copied would call the original
        tuned = replace(prompter, model=(model.merge_and_unload() if merge else model).eval())
        tuned.max_tokens = settings.max_tokens
        after = {part: nats_per_token(tuned, found) for part, found in held.items()}
        measured = {part: {"before": before[part], "after": after[part]} for part in held}
        tuned.facts = {**prompter.facts, "sft": {**record, "nats_per_token": measured}}
        folder = out / PROMPTER_FOLDER
        if trainer.args.should_save:
            tuned.save(folder, whole=merge)
        trainer.accelerator.wait_for_everyone()
    if not merge:
        return tuned
    # From its folder, as any later user has it: trainers find the reference by the model's path.
    kind, device = str(model.dtype).removeprefix("torch."), str(model.device)
    return Prompter.from_pretrained(folder, dtype=kind, device=device)


def encode(prompter: Prompter, pair: Rewrite) -> Encoded:
    """The tokens of a pair exactly as the prompter reads and says them."""
    template, tokenizer = prompter.template, prompter.tokenizer
    said = template.rewrite_ids(tokenizer, pair.prompt, pair.rewrite)
    return template.prompt_ids(tokenizer, pair.prompt), said


def columns(pairs: Sequence[Encoded]) -> dict[str, list[list[int]]]:
    """TRL's columns: `labels` is −100 where a token is no part of the loss."""
    return {
        "input_ids": [[*prompt, *said] for prompt, said in pairs],
        "labels": [[*[-100] * len(prompt), *said] for prompt, said in pairs],
    }


class _Trainer(SFTTrainer):
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with completing(self):
            super()._save_checkpoint(model, trial)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: `Prompter.save` writes one."""


class _Metrics(TrainerCallback):
    """metrics.jsonl: what the trainer logged, without clocks; and an end where the loss is lost."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            raise AlignProError(
                f"training diverged at step {state.global_step}: the loss is {logs['loss']}; "
                f"lower learning_rate (it is {args.learning_rate:g})"
            )
        names = ("step", "epoch", "loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy")
        kept = [{k: line[k] for k in names if k in line} for line in state.log_history if "loss" in line]
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / METRICS_FILE, "".join(json.dumps(k) + "\n" for k in kept))


def _trainer(
    prompter: Prompter, pairs: Sequence[Encoded], settings: SFTSettings, out: Path, report_to: Sequence[str]
) -> _Trainer:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % world:
        raise AlignProError(f"batch_size {settings.batch_size}: {world} processes do not divide it")
    model = copy.deepcopy(prompter.model)
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=settings.batch_size // world,
        gradient_accumulation_steps=1,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        max_length=None,
        packing=False,
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        use_cpu=model.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=model.device.type != "cpu",
        report_to=list(report_to),
        disable_tqdm=not sys.stderr.isatty(),
    )
    trainer = _Trainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(columns(pairs)),
        processing_class=prompter.tokenizer,
        peft_config=adapter_config(model, settings.lora_rank, settings.lora_layers),
        callbacks=[_Metrics()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
