"""The rewrites of a training run on file: one line for each that was sampled, round by round."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas  # which datasets needs
from accelerate.utils import gather_object

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.files import make_private, parse_json, read_json, why
from alignpro.llm.models import packages
from alignpro.llm.models.prompt import from_json
from alignpro.llm.training.checkpoints import Kept
from alignpro.runs import claim

REWRITES_FILE = "rewrites.jsonl"
TABLES = ("wandb", "trackio")
"""Reporters that show a table: theirs has the round's rewrites with answers and rewards."""
LOG_FILE = "rewrites.json"
"""Hash of the rewrites so far, in a checkpoint: they are too many to be kept in each."""


class RewriteLog(Kept):
    """Appends a round's rewrites to a file; a resumed run goes on after its checkpoint's round, and says so
    where the file is not what was written.

    Args:
        steps: optimizer steps of a round.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self._hash = hashlib.sha256()
        self._wanted: str | None = None

    def save(self, folder: Path) -> None:
        (folder / LOG_FILE).write_text(json.dumps({"sha256": self._hash.hexdigest()}))

    def load(self, folder: Path) -> None:
        if (folder / LOG_FILE).exists():
            self._wanted = read_json(folder / LOG_FILE)["sha256"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            cut(self.path, state.global_step // self.steps)
            if state.global_step and self.path.exists():
                with open(self.path, "rb") as file:
                    self._hash = hashlib.file_digest(file, "sha256")  # type: ignore[assignment]
            if self._wanted not in (None, self._hash.hexdigest()):
                packages.note(
                    f"{self.path}: is not what was written of earlier rounds; training loses nothing"
                )

    def add(self, trainer: Any, lines: Sequence[dict[str, Any]]) -> None:
        """Append what this process sampled, after the processes before it: called by all at once."""
        rows = list(lines)
        if trainer.accelerator.num_processes > 1:
            rows = gather_object(rows)
        if not trainer.state.is_world_process_zero:
            return
        done = trainer.state.global_step // self.steps + 1
        text = (json.dumps({"round": done, **row}, ensure_ascii=False) + "\n" for row in rows)
        data = "".join(text).encode(errors="replace")
        claim(self.path)
        make_private(self.path)
        for name in set(TABLES) & set(trainer.args.report_to):
            reporter, frame = import_module(name), pandas.DataFrame({"round": done, **row} for row in rows)
            reporter.log({"rewrites": reporter.Table(dataframe=frame)})
        try:
            with open(self.path, "ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._hash.update(data)
        except OSError as error:
            said = why(error, "free space and resume: the checkpoints before it are whole")
            raise AlignProError(f"cannot write {self.path}: {said}") from error


@dataclass(frozen=True)
class _Line:
    """A line of the file, as far as it is read."""

    round: int
    prompt: str | dict[str, Any]
    rewrite: str | None
    answer: str | None
    reward: float


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's rewrites; those that are damaged, which nothing rests on, are left out."""
    found: list[dict[str, Any]] = []
    names = [field.name for field in dataclasses.fields(_Line)]
    for raw in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, AlignProError):
            line = parse_json(raw)
            typed.made(_Line, {name: line[name] for name in names if name in line}, "line")
            from_json(line["prompt"])
            found.append(line)
    return found


def cut(path: Path, rounds: int) -> None:
    """Leave the lines of the first `rounds` rounds in a file, and damaged ones among them.

    Raises AlignProError where the file cannot be changed.
    """
    if not path.exists():
        return
    whole = place = 0
    try:
        with open(path, "r+b") as file:
            for raw in file:
                place += len(raw)
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if raw.endswith(b"\n") and parse_json(raw)["round"] <= rounds:
                        whole = place
            file.truncate(whole)
    except OSError as error:
        raise AlignProError(f"{path}: {error.strerror}; move what is there elsewhere, and resume") from error
