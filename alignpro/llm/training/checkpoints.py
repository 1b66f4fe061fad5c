"""Whole checkpoints, resuming from them, and the result: shared by every run on TRL's trainers."""

import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignpro.errors import AlignProError

SETTINGS_FILE = "settings.json"
METRICS_FILE = "metrics.jsonl"
PROMPTER_FOLDER = "prompter"
COMPLETE = "complete"
"""The last file of a checkpoint: one without it was cut short while being written."""


@dataclass(frozen=True)
class Trained:
    """Result of a training run, as its folder holds it."""

    folder: Path
    record: dict[str, Any]
    """Settings and whatever else determined the run, as in settings.json."""
    metrics: list[dict[str, Any]]
    """The lines of its metrics file, in order of their `step`."""


ROLLOUT_ARGUMENTS: dict[str, Any] = {
    "save_total_limit": 2,
    "bf16": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other kind needs trained inputs
    "disable_tqdm": True,
    "shuffle_dataset": False,  # the order is given; a fixed one makes resuming bit-exact
    "remove_unused_columns": False,
    "disable_dropout": True,
    "log_completions": False,
}
"""Arguments of TRL's configurations for training by rollouts that differ from its defaults in every run."""


def pair_arguments() -> dict[str, Any]:
    """Arguments of TRL's configurations for training on pairs that differ from its defaults in every run."""
    return {
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        "disable_tqdm": not sys.stderr.isatty(),
    }


class WholeCheckpoints:
    """Mixin for TRL's trainers: a checkpoint is whole or does not count, and TRL writes no model card."""

    args: Any
    state: Any

    def save_more(self, folder: Path) -> None:
        """Write into a checkpoint what the trainer does not know of."""

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
    """Say in one sentence why a checkpoint's folder could not be written, where that is so.

    Raises:
        AlignProError: it could not be written; earlier checkpoints are as they were.
    """
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


REPORTERS = ("tensorboard", "wandb", "trackio")
"""Services that a trainer can report to; each is the package that it takes."""


def check_reporters(report_to: Sequence[str]) -> None:
    """Raise AlignProError for a name that is not in `REPORTERS`, or whose package is not installed."""
    for name in report_to:
        if name not in REPORTERS:
            raise AlignProError(f"report_to {name}: choose from {', '.join(REPORTERS)}")
        if find_spec(name) is None:
            raise AlignProError(f"report_to {name}: the package is missing; run pip install {name}")
