"""Whole checkpoints, resuming from them, metrics and the result: shared by every run on TRL's trainers."""

import contextlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback

from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines, write_json, write_text
from alignpro.llm.training.settings import PairSettings
from alignpro.runs import refuse_other_settings
from alignpro.shown import Shown

SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.jsonl"
PROMPTER_FOLDER = "prompter"
COMPLETE = "complete"
"""The last file of a checkpoint: one without it was cut short while being written."""


@dataclass(frozen=True, repr=False)
class Trained(Shown):
    """Result of a training run, as its folder holds it."""

    folder: Path
    record: dict[str, Any]
    """Settings and whatever else determined the run, as in settings.json."""
    metrics: list[dict[str, Any]]
    """The lines of its metrics file, in order of their `step`."""


def pair_arguments(settings: PairSettings, folder: Path, on_cpu: bool, processes: int = 1) -> dict[str, Any]:
    """Arguments of TRL's configurations for training on pairs, into `folder`."""
    return {
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "output_dir": str(folder),
        "per_device_train_batch_size": settings.batch_size // processes,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "save_steps": settings.save_every,
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "disable_tqdm": not sys.stderr.isatty(),
    }


def trainer_of(kind: Any, columns: Mapping[str, Any], metrics: "Metrics", **named: Any) -> Any:
    """One of TRL's trainers on these columns, which tells its numbers to `metrics` and prints none."""
    trainer = kind(train_dataset=Dataset.from_dict(dict(columns)), callbacks=[metrics], **named)
    trainer.remove_callback(PrinterCallback)
    return trainer


class WholeCheckpoints:
    """Mixin for TRL's trainers: a checkpoint is whole or does not count, and TRL writes no model card."""

    args: Any
    state: Any

    def save_more(self, folder: Path) -> None:
        """Write into a checkpoint what the trainer does not know of, for `load_more`."""

    def load_more(self, folder: Path) -> None:
        """Read what `save_more` wrote."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with completing(folder):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if self.args.should_save:
                self.save_more(folder)
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
                (folder / COMPLETE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self.load_more(Path(resume_from_checkpoint))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write none: TRL's card would credit another method, and what is trained here has one of its own."""


@contextlib.contextmanager
def completing(folder: Path) -> Iterator[None]:
    """Raise AlignProError, in one sentence, where a checkpoint's folder could not be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # of Python, torch and safetensors
        reason = str(error).split("\n")[0]
        raise AlignProError(
            f"cannot write {folder} ({reason}); free space and resume: the checkpoints before it are whole"
        ) from error


def last_checkpoint(folder: Path) -> str | None:
    """The latest complete checkpoint in `folder`; those cut short by an interruption are removed."""
    found: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            found[int(path.name.split("-")[1])] = path
        else:
            shutil.rmtree(path)
    return str(found[max(found)]) if found else None


def begin(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Write settings.json, by the first of several processes; refuse to resume a run of another record."""
    if resume and (out / SETTINGS_FILE).exists():
        refuse_other_settings(out, read_json(out / SETTINGS_FILE), record)
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(out / SETTINGS_FILE, record)


def check_begun(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Raise AlignProError unless `out` is empty, or holds a run with that record which is to be resumed."""
    if resume and (out / SETTINGS_FILE).exists():
        refuse_other_settings(out, read_json(out / SETTINGS_FILE), record)
    elif any(out.iterdir()):
        raise AlignProError(f"out {out}: it is not empty; name a new folder, or resume")


Line = dict[str, Any]


class Metrics(TrainerCallback):
    """Writes what the trainer logs, but for clocks: a resumed run goes on after its checkpoint's line.

    Each line is written atomically with all before it, by the first of several processes.
    """

    clocks = ("time", "runtime", "per_second", "num_tokens")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []

    def kept(self, logs: Line) -> Line:
        return {k: v for k, v in logs.items() if not any(clock in k for clock in self.clocks)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and state.global_step:
            self.go_on(state.global_step)

    def go_on(self, step: int) -> None:
        """Take up the lines of the file up to that optimizer step."""
        if self.path.exists():
            self.lines = [line for line in read_json_lines(self.path) if line["step"] <= step]

    def on_log(self, args: Any, state: Any, control: Any, logs: Line | None = None, **_: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            self.add({"step": state.global_step, **self.kept(logs or {})})

    def add(self, line: Line) -> None:
        """Append a line to the file."""
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


class PairMetrics(Metrics):
    """The metrics of training on pairs, which ends where the loss is lost."""

    names = (
        *("epoch", "loss", "accuracy", "margin", "mean_reward"),
        *("grad_norm", "learning_rate", "entropy", "mean_token_accuracy"),
    )

    def kept(self, logs: Line) -> Line:
        return {name: logs[name] for name in self.names if name in logs}

    def on_log(self, args: Any, state: Any, control: Any, logs: Line | None = None, **named: Any) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise AlignProError(
                f"training diverged at step {state.global_step}: the loss is {loss}; "
                f"lower learning_rate (it is {args.learning_rate:g})"
            )
        super().on_log(args, state, control, logs, **named)
