"""`alignpro solve`: the exact optima, the gap and its bounds for saved instances."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from alignpro.commands.shared import found_files
from alignpro.report.keep import keep
from alignpro.report.numbers import columns, number, plain
from alignpro.report.page import Dot, Dots, Page, Table
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.theory.bounds import BoundReport
    from alignpro.theory.scale.instances import Solutions

SECTIONS = 12
"""Files that get a section of their own on the page, at most."""


def _verdict(bound: "BoundReport") -> str:
    return bound.verdict + ", vacuous" * bound.vacuous


def _assumptions(bound: "BoundReport") -> str:
    said = [key if met else f"NOT SO: {key}" for key, met in bound.assumptions.items()]
    return "; ".join(said) or "nothing"


def _show(value: float) -> str:
    return number(value, ".6g")


def _bounds(bounds: "Sequence[BoundReport]") -> list[str]:
    rows = [("bound on the gap", "", "rhs", "slack", "verdict", "rests on", "terms")]
    for bound in bounds:
        terms = ", ".join(f"{key} {_show(value)}" for key, value in bound.terms.items())
        sides = (bound.relation, _show(bound.rhs), _show(bound.slack))
        rows.append((bound.name, *sides, _verdict(bound), _assumptions(bound), terms))
    vacuous = "  vacuous: at or beyond plus or minus the reward span, so true of any policies"
    return [columns(rows), *[vacuous] * any(bound.vacuous for bound in bounds)]


def text_of_bound(bound: "BoundReport") -> str:
    """A claim on one instance, with its left side: the gap."""
    return "\n".join([f"gap {_show(bound.gap)}", *_bounds([bound])])


def text(result: "Solutions") -> str:
    show, blocks = _show, []
    for one in result.files:
        lines = [
            f"{one.file}  (beta {one.beta:g}, lam {one.lam:g})",
            f"  J(pi*) {show(one.j_star)}   J(pi_rho*) {show(one.j_rho)}   "
            f"gap {show(one.gap)}   exact identity {show(one.exact_gap)}",
            f"  Delta1 {show(one.delta1)}   Delta2 {show(one.delta2)}   "
            f"r_max {show(one.r_max)} ({one.r_max_convention})",
            *_bounds(list(one.bounds.values())),
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def page(result: "Solutions") -> Page:
    first, checks = result.files[0], len(result.checks)
    settings = {"beta": first.beta, "lam": first.lam, "bounds": list(first.bounds)}
    settings["seed"] = "none: nothing is random"
    page = Page("solve", "Exact optima, gap and bounds", result.finding, settings)
    page.key("Instances", number(len(result.files)))
    page.key("Largest gap", number(result.largest_gap), "reward units")
    page.key("Bounds that hold", number(result.count("holds")), f"of {checks}")
    page.key("Vacuous", number(result.vacuous), "true of any policies")

    optima = ("j_star", "j_rho", "gap", "delta1", "delta2", "r_max")
    rows = [(one.file, *(number(getattr(one, name)) for name in optima)) for one in result.files]
    page.add(
        "Optima",
        "The exact RLHF and prompting optima, and the gap between them, in reward units.",
        Table("instance | J(π*) | J(ρ*) | gap | Δ1 | Δ2 | r_max", rows, "w" + "n" * 6),
    )
    for one in result.files[:SECTIONS]:
        rows, dots = [], []
        for name, b in one.bounds.items():
            upper = b.relation == "<="
            terms = ", ".join(f"{key} {number(value)}" for key, value in b.terms.items())
            cells = ("≤" if upper else "≥", number(b.rhs), number(b.slack), _verdict(b))
            rows.append((name, *cells, terms or "–", _assumptions(b)))
            dots.append(Dot(name, b.rhs, group="upper bound" if upper else "lower bound"))
        gap = [(one.gap, f"gap {number(one.gap)}")]
        page.add(
            one.file,
            f"The bounds on its gap; r_max is {one.r_max_convention}.",
            Table("bound | gap is | right side | slack | verdict | terms | rests on", rows, "wwnnwww"),
            Dots("Each bound beside the gap", "reward units", dots, gap if math.isfinite(one.gap) else []),
        )
    if len(result.files) > SECTIONS:
        page.add(f"{len(result.files) - SECTIONS} more files", "Their bounds are in what the verb prints.")
    return page


@dataclass(frozen=True)
class Solve:
    """Print the exact optima, the gap and its bounds for saved instances.

    Every file is validated before anything is computed.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """Instances: .npz files with the arrays p (probabilities of the prompts), prior (of rewrites), frozen (of
    answers), own (each prompt's row of frozen) and reward; or folders, for all such files in them."""
    beta: float
    """Weight of the KL divergence in RLHF (beta), positive, in reward units: smaller lets fine-tuning move
    further from the frozen model."""
    lam: float
    """Weight of the KL divergence in prompt optimization (lambda), positive, in reward units: smaller lets
    the prompter move further from its reference."""
    bounds: tuple[str, ...] = ("theorem1",)
    """Upper and lower bounds on the gap by name (theorem1, span, tight, barycentre, trained, ceiling, ...; an
    unknown name lists them), or all."""
    r_max: float | None = None
    """Theorem 1's r_max, in reward units, where rewards are known to lie in [0, r_max]. Left out: the largest
    reward, measured from the least one if that is negative."""
    json: bool = False
    """Print one JSON object per file and line, instead of a table."""
    out: str | None = None
    """Folder to keep solve.json and report.html in. Left out: nothing is kept."""

    renamed: ClassVar = {"report": "out"}
    examples = (
        ("the instance of a demo", "alignpro solve runs/quick --beta 0.1 --lam 0.05"),
        (
            "every bound on what a search has found, as a page",
            "alignpro solve runs/hunt --beta 0.1 --lam 0.05 --bounds all --out runs/solve",
        ),
    )

    def run(self) -> int:
        from tqdm import tqdm

        from alignpro.files import writable_folder, write_json
        from alignpro.theory.scale.instances import solve_files

        out = None if self.out is None else Path(self.out)
        as_page = out is not None and out.suffix == ".html" and not out.is_dir()  # as --report had it
        if out is not None:
            writable_folder(out.parent if as_page else out)
        files = [file for name in self.files for file in found_files(name, "*.npz")]
        with tqdm(total=len(files), unit="file", disable=len(files) < 100 or None, leave=False) as bar:
            result = solve_files(files, self.beta, self.lam, self.bounds, self.r_max, progress=bar.update)
        values = [plain(one.json()) for one in result.files]
        if self.json:
            for one in values:
                say(json.dumps(one, ensure_ascii=False, allow_nan=False))
        else:
            say(text(result))
        if out is not None:
            if not as_page:
                write_json(out / "solve.json", values)
            keep(page(result), out)
        return 0
