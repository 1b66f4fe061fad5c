"""Parts of several verbs that need no model: the protocol of a verb, reading rollouts, telling a result.

A verb's module has `text` and `page` beside its options: its result for the terminal, and as a page.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from alignpro.errors import AlignProError
from alignpro.report.keep import keep
from alignpro.report.numbers import number, plain
from alignpro.report.page import Curve, Curves, Json, Page, Table
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.estimation.pac_bayes import Mixture, PacBayes

REWARD_FILE = "reward.json"
"""The reward of a run as it describes itself, with what scoring the run's answers did."""


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


ROLLOUTS_FILE = "rollouts.jsonl"
"""The rollouts in the folder of the run that made them."""


def found_files(name: str, pattern: str) -> list[str]:
    """The file that `name` is; where it is a folder, those by `pattern` in it, or else one level down.

    Raises:
        AlignProError: the folder holds none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return [name]
    found = sorted(folder.glob(pattern)) or sorted(folder.glob(f"*/{pattern}"))
    if not found:
        raise AlignProError(f"{name}: is a folder without {pattern}; name a file, or the folder of a run")
    return [str(path) for path in found]


def found_file(name: str, pattern: str) -> str:
    """The one file of `found_files`; AlignProError where there are several."""
    found = found_files(name, pattern)
    if len(found) > 1:
        some = ", ".join(found[:4]) + ", …" * (len(found) > 4)
        raise AlignProError(f"{name}: is a folder with {len(found)} files {pattern}; name one of {some}")
    return found[0]


def read_rollouts(file: str, out: str | None) -> Any:
    """The rollouts of a file or folder, once it is known that results can be written to the folder `out`."""
    from alignpro import rollouts
    from alignpro.files import writable_folder

    file = found_file(file, ROLLOUTS_FILE)
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
    from alignpro import locks
    from alignpro.files import write_json

    say(json.dumps(values, ensure_ascii=False, allow_nan=False) if as_json else text)
    if out is not None:
        # A result and its page are of one process: another that has the same folder waits.
        with locks.waited(Path(out), name, leave=False):
            write_json(os.path.join(out, f"{name}.json"), values)
            if page is not None:
                keep(page(), out)


def with_reward(page: Page, folder: str | os.PathLike[str]) -> Page:
    """The page, with what the reward of the run in `folder` says of itself, where that is on file."""
    from alignpro.files import read_json

    file = os.path.join(folder, REWARD_FILE)
    if os.path.exists(file):
        said = "The reward, as it describes itself."
        page.add("The reward", said, facts=read_json(file, dict), folded=True)
    return page


def save(result: Any, verb: str, page: Page, folder: Path) -> None:
    """Write VERB.json, report.html and the instances of a result of the theory into `folder`.

    Instances that only an earlier VERB.json names go: they would pass for this result's.
    """
    from alignpro.files import read_json, write_json

    path, values = folder / f"{verb}.json", plain(result.json())
    before = _instances(read_json(path)) if path.exists() else set()
    result.save_instances(folder)
    write_json(path, values)
    for name in before - _instances(values):
        (folder / name).unlink(missing_ok=True)
    say(f"wrote {folder / f'{verb}.json'}")
    keep(page, folder)


def _instances(found: Any) -> set[str]:
    """The files of instances that a result names."""
    if isinstance(found, list):
        return set().union(*map(_instances, found))
    if not isinstance(found, dict):
        return set()
    name = found.get("instance")
    own = {name} if isinstance(name, str) and re.fullmatch(r"[\w-]+\.npz", name) else set()
    return own.union(*map(_instances, found.values()))


def fell(metrics: Sequence[Json], unit: str, panels: Mapping[str, str]) -> tuple[str, Curves]:
    """How a loss fell: a sentence, and a curve for each key of `metrics` that `panels` names by its axis."""
    there = [(axis, key) for axis, key in panels.items() if any(key in line for line in metrics)]
    curves = [(axis, [Curve(key, [line.get(key) for line in metrics])]) for axis, key in there]
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    said = f"On the batches learned from, the loss went from {number(first)} to {number(last)} {unit}."
    return said, Curves([line["step"] for line in metrics], "optimizer steps", curves)


SUM = "reward, their sum"
"""The row of an arm's reward below those of its parts."""


def with_sums(parts: Mapping[str, Mapping[str, Any]], sums: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Estimates of the reward's parts as rows of (arm, part, estimate), each arm's own after its parts."""
    return [(arm, part, e) for arm, of in parts.items() for part, e in [*of.items(), (SUM, sums[arm])]]


def instruction_name(instruction: str) -> str:
    """An instruction as a person reads it, where the empty one is none."""
    return instruction or "(no instruction)"


def ranges(of: Mapping[str, tuple[float, float]], low: float, high: float) -> dict[str, str]:
    """The declared range of each part of a reward, and its own at `SUM`, in words."""
    return {part: f"{number(a)} to {number(b)}" for part, (a, b) in [*of.items(), (SUM, (low, high))]}


def at_least(found: "PacBayes", names: Sequence[str]) -> str:
    """Say in a sentence what the best of some prompters, and a mixture of them, earn at least."""
    best, mixed = found.best, found.gibbs
    return (
        f"Guaranteed ({found.level:.0%}, at any number of prompts, although chosen by these): "
        f"{_shares(best, names)} earns at least {number(best.limit)}; at random with shares "
        f"{_shares(mixed, names)} (equation 9 at lambda {number(mixed.lam)}) it is at least "
        f"{number(mixed.limit)}."
    )


def add_at_least(page: Page, found: "PacBayes", names: Sequence[str], about: str) -> None:
    """Add the section of what is guaranteed to `page`; `about` says which prompts it is from."""
    rows = [
        (kind, _shares(of, names), number(of.mean), number(of.limit), number(of.lam), number(of.kl))
        for kind, of in (("the best", found.best), ("the mixture", found.gibbs))
    ]
    page.add(
        "What is guaranteed",
        f"{about} Each limit is wrong with probability {1.0 - found.level:.2g} at most, at any number of "
        "prompts and although both were chosen by what they earned there. The mixture is the one with the "
        "greatest limit (PAC-Bayes): a uniform choice tilted by rewards, as in equation 9, at the λ that so "
        "many prompts warrant.",
        Table("what | is | mean reward seen | at least | λ | KL, nats", rows, "wwnnnn"),
    )


def _shares(of: "Mixture", names: Sequence[str]) -> str:
    """The prompters of a mixture with their shares, the largest first; of many the first five."""
    order = sorted((-weight, i) for i, weight in enumerate(of.weights) if weight > 0)
    shown = [f"{-minus:.0%} " * (of.lam > 0) + f'"{names[i]}"' for minus, i in order[:5]]
    return ", ".join([*shown, *["…"] * (len(order) > 5)])
