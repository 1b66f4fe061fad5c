"""What every run on TRL's trainers shares: whole checkpoints, resuming as it began, where metrics go."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignpro.errors import AlignProError

COMPLETE = "complete"
"""The last file of a checkpoint: one without it was cut short while being written."""


ROLLOUT_ARGUMENTS: dict[str, Any] = {
    "save_total_limit": 2,
    "bf16": False,
    "gradient_checkpointing": False,  # TRL's default recomputes
    "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other kind needs trained inputs
    "disable_tqdm": True,
    "shuffle_dataset": False,  # the order is given; a fixed one makes resuming bit-exact
    "remove_unused_columns": False,
    "disable_dropout": True,
    "log_completions": False,
}
"""Of TRL's configurations for training by rollouts, where ours differ from its defaults in every run."""


@contextlib.contextmanager
def completing(trainer: Any) -> Iterator[None]:
    """Around the writing of a trainer's checkpoint: marks it as whole, or says in one sentence why it is not.

    Raises:
        AlignProError: it could not be written; earlier checkpoints are as they were.
    """
    folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    try:
        yield
        if trainer.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing here reads
            (folder / COMPLETE).touch()
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
"""Where a trainer can report to; each is the package that it takes."""


def check_reporters(report_to: Sequence[str]) -> None:
    """Raise AlignProError for a name that is not in `REPORTERS`, or whose package is not installed."""
    for name in report_to:
        if name not in REPORTERS:
            raise AlignProError(f"report_to {name}: choose from {', '.join(REPORTERS)}")
        if find_spec(name) is None:
            raise AlignProError(f"report_to {name}: the package is missing; run pip install {name}")
