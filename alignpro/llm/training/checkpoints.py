"""Whole checkpoints, resuming from them, metrics and the result: shared by every run on TRL's trainers."""

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback

from alignpro.errors import AlignProError
from alignpro.files import flaw, listed, read_json, read_json_lines, sync, write_text
from alignpro.llm.models import packages
from alignpro.llm.training.pair_settings import PairSettings
from alignpro.runs import SETTINGS_FILE as SETTINGS_FILE
from alignpro.runs import claim, here
from alignpro.shown import Shown

METRICS_FILE = "metrics.jsonl"
PROMPTER_FOLDER = "prompter"
COMPLETE = "complete"
"""The last file of a checkpoint, a list of the others: one without it was cut short while being written."""
KEPT = 2
"""Checkpoints that a run keeps, so that it can fall back."""
SYNC_S = 5.0
"""Seconds after which the next checkpoint is brought to the disk: each one, where rounds take longer. Of
quick rounds a power cut loses no more than that, since the latest one on the disk is kept."""
_NAME = re.compile(r"checkpoint-(\d+)")


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
        "per_device_train_batch_size": settings.batch_size // processes // settings.microbatches,
        "gradient_accumulation_steps": settings.microbatches,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "seed": settings.seed,
        "save_steps": settings.save_every,
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other kind needs trained inputs
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": not sys.stderr.isatty(),
    }


def trainer_of(kind: Any, columns: Mapping[str, Any], metrics: "Metrics", **named: Any) -> Any:
    """One of TRL's trainers on these columns, which tells its numbers to `metrics` and prints none."""
    trainer = kind(train_dataset=Dataset.from_dict(dict(columns)), callbacks=[metrics], **named)
    trainer.remove_callback(PrinterCallback)
    return trainer


class Kept(TrainerCallback):
    """A callback whose state is kept in checkpoints, and whose file is made from it when a run goes on."""

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what `load` needs; called in the first of several processes."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote; called in every process."""


class WholeCheckpoints:
    """Mixin for TRL's trainers: a checkpoint is whole or does not count, and TRL writes no model card."""

    args: Any
    state: Any
    accelerator: Any
    callback_handler: Any
    _synced: float
    _lasting: Path | None = None
    """The latest checkpoint that was brought to the disk."""

    def train(self, *positional: Any, **named: Any) -> Any:
        self._synced = time.monotonic()
        return super().train(*positional, **named)  # type: ignore[misc]

    def save_more(self, folder: Path) -> None:
        """Write into a checkpoint what the trainer does not know of, for `load_more`."""

    def load_more(self, folder: Path) -> None:
        """Read what `save_more` wrote."""

    def _kept(self) -> list[Kept]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, Kept)]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        home, writes = Path(self.args.output_dir), self.args.should_save
        folder = home / f"checkpoint-{self.state.global_step}"
        with completing(folder):
            if writes:
                claim(folder)
                if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                    raise FileExistsError(f"something else is at {folder}")
                for name in (COMPLETE, "README.md"):  # of one that was passed over; PEFT would read its card
                    (folder / name).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            if writes:
                self.save_more(folder)
                for callback in self._kept():
                    callback.save(folder)
                (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
            self.accelerator.wait_for_everyone()  # each process writes its own random state
            if writes:
                lasting = time.monotonic() - self._synced > SYNC_S
                complete(folder, lasting)
                if lasting:
                    self._synced, self._lasting = time.monotonic(), folder
                whole = [path for path in checkpoints(home) if (path / COMPLETE).is_file()]
                for old in whole[whole.index(folder) + KEPT :]:
                    if old != self._lasting:
                        remove(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        folder = Path(resume_from_checkpoint)
        self.load_more(folder)
        for callback in self._kept():
            callback.load(folder)

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


def checkpoints(folder: Path) -> list[Path]:
    """The folders in `folder` that are named as checkpoints are, whole or not, the latest first."""
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if (name := _NAME.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            found[int(name[1])] = path
    return [found[step] for step in sorted(found, reverse=True)]


def complete(folder: Path, lasting: bool = True) -> None:
    """Write the list of a checkpoint's files; if `lasting`, the files are brought to the disk before it, and
    the names of all after it."""
    files = listed(folder)
    for name in files if lasting else ():
        sync(folder / name)
    (folder / COMPLETE).write_text(json.dumps(files, indent=1))
    if lasting:
        for path in (folder / COMPLETE, folder, folder.parent):
            sync(path)


def last_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint in `folder` that is as it was written; one that is not is told of.

    Nothing is removed: what an interruption cut short is written anew when its step comes.
    """
    passed = ""
    for path in checkpoints(folder):
        if not (path / COMPLETE).is_file():
            continue
        if (wrong := _wrong(path)) is None:
            _note(passed and f"{passed}; going on from {path.name} instead")
            return str(path)
        _note(passed)
        passed = f"{wrong}, so that {path.name} is passed over"
    _note(passed and f"{passed}; no other is there, so training begins anew")
    return None


def _note(text: str) -> None:
    if text and int(os.environ.get("RANK", "0")) == 0:
        packages.note(text)


def _wrong(path: Path) -> str | None:
    """In what a checkpoint differs from what was written."""
    if not (path / COMPLETE).stat().st_size:  # of a version that kept no list
        empty = (file for file in sorted(path.iterdir()) if file.name != COMPLETE and not file.stat().st_size)
        return next((f"{file} is empty" for file in empty), None)
    try:
        return flaw(path, read_json(path / COMPLETE))
    except (AlignProError, TypeError, KeyError, AttributeError):
        return f"{path / COMPLETE} is damaged"


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint's own files, and its folder if nothing else is in there."""
    try:
        files = read_json(checkpoint / COMPLETE)
        own = [checkpoint / name for name in files]
    except (AlignProError, TypeError):  # of a version that kept no list
        own = [path for path in checkpoint.iterdir() if path.is_file()]
    with contextlib.suppress(OSError):
        for path in own:
            path.unlink(missing_ok=True)
        (checkpoint / COMPLETE).unlink(missing_ok=True)
        for path in sorted((p for p in checkpoint.rglob("*") if p.is_dir()), reverse=True):
            path.rmdir()
        checkpoint.rmdir()


def remove_all(folder: Path) -> None:
    """Remove the checkpoints in `folder` and the folder, if nothing else is in there."""
    for path in checkpoints(folder):
        remove(path)
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_begun(out: Path, record: dict[str, Any], resume: bool) -> None:
    """Raise AlignProError unless `out` is empty, or holds a run with that record which is to be resumed."""
    here(out).begin(record, resume=resume, names=("*",))


Line = dict[str, Any]


class Metrics(Kept):
    """Writes what the trainer logs, but for clocks: a resumed run goes on after its checkpoint's line.

    Each line is written atomically with all before it, by the first of several processes. Checkpoints hold
    the lines before them, so that the file can be made again.
    """

    left_out = ("time", "runtime", "per_second", "num_tokens", "epoch")
    """Parts of names: of clocks, and of the share of all planned rounds, which may become more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._loaded = False

    def kept(self, logs: Line) -> Line:
        return {k: v for k, v in logs.items() if not any(part in k for part in self.left_out)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and state.global_step:
            self.go_on(state.global_step)

    def go_on(self, step: int) -> None:
        """Take up the lines up to that optimizer step: the checkpoint's, or the file's where it has none, as
        one of an earlier version."""
        if self._loaded:
            self.write()
        elif self.path.exists():
            self.lines = [line for line in read_json_lines(self.path) if line["step"] <= step]

    def save(self, folder: Path) -> None:
        (folder / self.path.name).write_text(self._text())

    def load(self, folder: Path) -> None:
        if (folder / self.path.name).exists():
            self.lines, self._loaded = read_json_lines(folder / self.path.name), True

    def on_log(self, args: Any, state: Any, control: Any, logs: Line | None = None, **_: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            self.add({"step": state.global_step, **self.kept(logs or {})})

    def add(self, line: Line) -> None:
        """Append a line to the file."""
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        claim(self.path)
        write_text(self.path, self._text())

    def _text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.lines)


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
