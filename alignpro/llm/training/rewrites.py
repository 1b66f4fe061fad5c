"""The rewrites of a training run on file: one line for each that was sampled, round by round."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import TrainerCallback

from alignpro.errors import AlignProError

REWRITES_FILE = "rewrites.jsonl"


class RewriteLog(TrainerCallback):
    """Appends a round's rewrites to a file; a resumed run goes on after its checkpoint's round.

    Args:
        steps: optimizer steps of a round.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            cut(self.path, state.global_step // self.steps)

    def add(self, trainer: Any, lines: Sequence[dict[str, Any]]) -> None:
        """Append what this process sampled, after the processes before it: called by all at once."""
        rows = list(lines)
        if trainer.accelerator.num_processes > 1:
            rows = gather_object(rows)
        if not trainer.state.is_world_process_zero:
            return
        done = trainer.state.global_step // self.steps + 1
        text = "".join(json.dumps({"round": done, **row}, ensure_ascii=False) + "\n" for row in rows)
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode(errors="replace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise AlignProError(
                f"cannot write {self.path} ({error.strerror}); free space and resume: the checkpoints before "
                "it are whole"
            ) from error


def cut(path: Path, rounds: int) -> None:
    """Leave the lines of the first `rounds` rounds in a file; one that is cut short goes with the rest."""
    if not path.exists():
        return
    whole = 0
    with open(path, "r+b") as file:
        for raw in file:
            try:
                if not raw.endswith(b"\n") or json.loads(raw)["round"] > rounds:
                    break
            except (ValueError, KeyError, TypeError):
                break
            whole += len(raw)
        file.truncate(whole)
