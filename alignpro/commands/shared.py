"""Parts of several verbs that need no model: the protocol of a verb, reading rollouts, telling a result.

A verb's module has `text` and `page` beside its options: its result for the terminal, and as a page.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from alignpro.errors import AlignProError
from alignpro.report.keep import keep
from alignpro.report.numbers import number, plain
from alignpro.report.page import Curve, Curves, Json, Page


def check_least(least: int, **given: int | None) -> None:
    """Refuse an option --NAME whose number is below `least`; one that was left out is None."""
    for name, value in given.items():
        if value is not None and value < least:
            raise AlignProError(f"--{name.replace('_', '-')} {value}: give at least {least}")


class Verb(Protocol):
    """A subcommand: parsed arguments, and what they do."""

    def run(self) -> int:
        """Do it; the exit status: 0, or 1 for a finding such as a violated bound."""
        ...


def read_rollouts(file: str, out: str | None) -> Any:
    """The rollouts of `file`, once it is known that results can be written to the folder `out`."""
    from alignpro import rollouts
    from alignpro.files import writable_folder

    if out is not None:
        writable_folder(out)
    return rollouts.read(file)


def tell(
    name: str,
    values: dict[str, Any],
    text: str,
    as_json: bool,
    out: str | None,
    page: Callable[[], Page] | None = None,
) -> None:
    """Print a result, as text or JSON, and keep it as `name`.json in the folder `out`, with its page."""
    from alignpro.files import write_json

    if out is not None:
        write_json(os.path.join(out, f"{name}.json"), values)
    print(json.dumps(values, ensure_ascii=False, allow_nan=False) if as_json else text)
    if out is not None and page is not None:
        keep(page(), out)


def save(result: Any, verb: str, page: Page, folder: Path) -> None:
    """Write VERB.json, report.html and the instances of a result of the theory into `folder`."""
    from alignpro.files import write_json

    result.save_instances(folder)
    write_json(folder / f"{verb}.json", plain(result.json()))
    print(f"wrote {folder / f'{verb}.json'}")
    keep(page, folder)


def fell(metrics: Sequence[Json], unit: str, panels: Mapping[str, str]) -> tuple[str, Curves]:
    """How a loss fell: a sentence, and a curve for each key of `metrics` that `panels` names by its axis."""
    there = [(axis, key) for axis, key in panels.items() if any(key in line for line in metrics)]
    curves = [(axis, [Curve(key, [line.get(key) for line in metrics])]) for axis, key in there]
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    said = f"On the batches learned from, the loss went from {number(first)} to {number(last)} {unit}."
    return said, Curves([line["step"] for line in metrics], "optimizer steps", curves)
