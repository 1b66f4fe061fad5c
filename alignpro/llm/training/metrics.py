"""The metrics file of a training run: one JSON line for each thing that the trainer logs."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from alignpro.errors import AlignProError
from alignpro.files import read_json_lines, write_text

Line = dict[str, Any]


class Metrics(TrainerCallback):
    """Writes what the trainer logs, but for clocks: a resumed run goes on after its checkpoint's line.

    Each line is written atomically with all before it, by the first of several processes.

    Args:
        path: the file.
    """

    clocks = ("time", "runtime", "per_second", "num_tokens")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []

    def kept(self, logs: Line) -> Line:
        """The part of what the trainer logged that goes into the line."""
        return {k: v for k, v in logs.items() if not any(clock in k for clock in self.clocks)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero and state.global_step and self.path.exists():
            self.lines = [line for line in read_json_lines(self.path) if line["step"] <= state.global_step]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            self.add({"step": state.global_step, **self.kept(logs or {})})

    def add(self, line: Line) -> None:
        """Append a line to the file."""
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        """Write all lines."""
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


class PairMetrics(Metrics):
    """The metrics of training on pairs, which ends where the loss is lost."""

    names = (
        *("epoch", "loss", "accuracy", "margin", "mean_reward"),
        *("grad_norm", "learning_rate", "entropy", "mean_token_accuracy"),
    )

    def kept(self, logs: Line) -> Line:
        return {name: logs[name] for name in self.names if name in logs}

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **named: Any
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise AlignProError(
                f"training diverged at step {state.global_step}: the loss is {loss}; "
                f"lower learning_rate (it is {args.learning_rate:g})"
            )
        super().on_log(args, state, control, logs, **named)
