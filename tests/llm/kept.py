"""Answers on file as JSON lines, in the way that docs/howto/endpoint.md shows."""

import contextlib
import sqlite3
from pathlib import Path

from alignpro.llm.targets.store import FILE


def lines(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / FILE)) as file:
        return [line for (line,) in file.execute("SELECT line FROM answers ORDER BY id")]
