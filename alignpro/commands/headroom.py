"""TODO."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.shared import read_rollouts, tell
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from alignpro.commands.estimate import _SEEDED, _add_notes, _shown_estimates
from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import Dots, Json, Page, Table, dot


def report_of_headroom(result: Json) -> Page:
    """Of json."""
    axis = f"reward units, {result['level']:.0%} intervals"
    settings = {"level": result["level"], "lambda": [at["lam"] for at in result["at"]]} | _SEEDED
    page = Page("headroom", "What prompting could gain", result["answer"], settings)
    page.key("Train at all?", re.split(r"\W", result["answer"])[0].lower())
    for name, e in result["means"].items():
        page.key(f"J({name})", number(e["value"]), limits(e))
    page.key("Rollouts", number(result["n"]), f"of {result['n_prompts']} prompts")

    groups = {"over_reference": "over ρ_sft", "net": "net of λ KL", "over_none": "over no prompter"}
    rows, dots = [], []
    for at in result["at"]:
        rows.append((f"λ = {number(at['lam'])}", *(interval(at[key]) for key in groups)))
        dots += [dot(rows[-1][0], at[key], words) for key, words in groups.items() if at[key]]
    page.add(
        "The optimal prompter's gain",
        f"What ρ* would earn at each λ, in reward units, with {result['level']:.0%} intervals over prompts.",
        Table(["", *groups.values()], rows, "wnnn"),
        Dots("Gain at each λ", axis, dots, [(0.0, "no gain")]),
    )
    best = {f"best of {n}": e for n, e in result["best_of"].items()}
    found = {f"J({name})": e for name, e in result["means"].items()}
    found |= {"variance within rewrites": result["within"], "variance between rewrites": result["between"]}
    found |= best | ({"best rewrite drawn, over none": result["ceiling"]} if result["ceiling"] else {})
    page.add(
        "What it rests on",
        "Mean rewards, where their variance is, and what picking the best of n rewrites gains over ρ_sft.",
        _shown_estimates(found, "quantity"),
        Dots(
            "Gain of the best of n over ρ_sft",
            axis,
            [dot(*item) for item in best.items()],
            [(0.0, "no gain")],
        ),
    )
    _add_notes(page, result)
    return page


@dataclass(frozen=True)
class Headroom:
    """Should one train at all? What an optimal prompter could gain at each lambda, before any training.

    Needs arm sft with at least two draws per prompt and two answers per draw; arm none for the comparison
    with no prompter.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    lam: tuple[float, ...] = ()
    """Prompt tuning parameters (lambda), in reward units. Default: 2% to 50% of the reward's range."""
    level: float = 0.95
    """Of the intervals; those behind the answer cover jointly."""
    json: bool = False
    """One JSON object, instead of tables."""
    out: str | None = None
    """Folder for json and report.html."""

    def run(self) -> int:
        from alignpro import estimation
        from alignpro.commands import tables

        report = estimation.headroom(read_rollouts(self.file, self.out), self.lam, self.level)
        values = report.json()
        tell("headroom", values, tables.of_headroom(report), self.json, self.out)
        if self.out is not None:
            keep.keep(report_of_headroom(values), self.out)
        return 0
