"""Checkpoints that are whole or passed over, and runs that go on only as they began."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from alignpro.errors import AlignProError

COMPLETE = "complete"
"""The last file of a checkpoint: one without it was cut short while being written."""


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


def refuse_other_settings(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    """Raise AlignProError, naming the first setting that differs, unless a run can be continued as asked."""

    def differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in new:
                yield from differences(old.get(key), new[key], f"{name}.{key}" if name else key)
        elif old != new:
            yield name, old, new

    for name, old, new in differences(before, now, ""):
        raise AlignProError(
            f"--resume: {folder} was started with {name} = {old}, not {new}; "
            "repeat that setting or choose another folder"
        )
