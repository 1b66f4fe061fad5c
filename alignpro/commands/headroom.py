"""`alignpro headroom`: the gain that prompt optimization could reach, before any training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.estimate import BOOTSTRAP_SEED, add_warnings, shown_estimates
from alignpro.commands.shared import read_rollouts, tell
from alignpro.report.numbers import columns, interval, number, plain
from alignpro.report.page import Dots, Page, Table, dot, dots

if TYPE_CHECKING:
    from alignpro import estimation
    from alignpro.estimation import Estimate as Number


def _basis(result: "estimation.Headroom", best: "Mapping[str, Number]") -> "dict[str, Number]":
    """Estimates that the gains rest on, by name; those of the best of n have the names in `best`."""
    found = {f"J({name})": e for name, e in result.means.items()}
    found |= {"variance within rewrites": result.within, "variance between rewrites": result.between, **best}
    return found if result.ceiling is None else found | {"best rewrite drawn, over none": result.ceiling}


def text(result: "estimation.Headroom") -> str:
    found = _basis(result, {f"best of {n} rewrites, over sft": e for n, e in result.best_of.items()})
    rows = [("lambda", "over sft", "net of lambda KL", "over none", "")]
    for at in result.at:
        none = "" if at.over_none is None else interval(at.over_none)
        remarks = ", ".join(at.over_reference.remarks)
        rows.append((f"{at.lam:g}", interval(at.over_reference), interval(at.net), none, remarks))
    lines = [
        f"{result.n} rollouts of {result.n_prompts} prompts; {result.level:.0%} intervals over prompts",
        columns([(name, interval(e)) for name, e in found.items()]),
        "",
        "the optimal prompter's gain",
        columns(rows),
        *(f"warning: {warning}" for warning in result.warnings),
        "",
        result.answer,
    ]
    return "\n".join(lines)


def page(result: "estimation.Headroom") -> Page:
    axis = f"reward units, {result.level:.0%} intervals"
    settings = {"level": result.level, "lambda": [at.lam for at in result.at]} | BOOTSTRAP_SEED
    page = Page("headroom", "What prompting could gain", result.answer, settings)
    page.key("Train at all?", result.decision)
    for name, e in result.means.items():
        page.estimate(f"J({name})", e)
    page.key("Rollouts", number(result.n), f"of {result.n_prompts} prompts")

    groups = ("over ρ_sft", "net of λ KL", "over no prompter")
    rows, gained = [], []
    for at in result.at:
        name, gains = f"λ = {number(at.lam)}", (at.over_reference, at.net, at.over_none)
        rows.append((name, *map(interval, gains)))
        gained += [dot(name, e, group) for e, group in zip(gains, groups, strict=True) if e is not None]
    page.add(
        "The optimal prompter's gain",
        f"What ρ* would earn at each λ, in reward units, with {result.level:.0%} intervals over prompts.",
        Table(["", *groups], rows, "wnnn"),
        Dots("Gain at each λ", axis, gained, [(0.0, "no gain")]),
    )
    best = {f"best of {n}": e for n, e in result.best_of.items()}
    page.add(
        "What it rests on",
        "Mean rewards, where their variance is, and what picking the best of n rewrites gains over ρ_sft.",
        shown_estimates(_basis(result, best), "quantity"),
        Dots("Gain of the best of n over ρ_sft", axis, dots(best), [(0.0, "no gain")]),
    )
    add_warnings(page, result.warnings)
    return page


@dataclass(frozen=True)
class Headroom:
    """Should one train at all? Estimates, before any training, what the best prompter could gain.

    Needs arm sft (rewrites by the reference prompter) with at least two draws per prompt and two answers per
    draw; arm none for the comparison with no prompter.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    lam: tuple[float, ...] = ()
    """Weights of the KL divergence in prompt optimization (lambda) to try, in reward units: a smaller one
    lets the prompter move further from the reference. Left out: 2%, 5%, 10%, 20% and 50% of the reward's
    range."""
    level: float = 0.95
    """How often an interval covers the truth, between 0.5 and 1; those behind the answer cover jointly."""
    json: bool = False
    """Print one JSON object, instead of tables."""
    out: str | None = None
    """Folder to keep headroom.json and report.html in. Left out: nothing is kept."""

    def run(self) -> int:
        from alignpro import estimation

        result = estimation.headroom(read_rollouts(self.file, self.out), self.lam, self.level)
        tell("headroom", plain(result), text(result), self.json, self.out, lambda: page(result))
        return 0
