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
    from alignpro.calls import Plan
    from alignpro.estimation import Estimate as Number
    from alignpro.estimation.calls import Calls


def _basis(result: "estimation.Headroom", best: "Mapping[str, Number]") -> "dict[str, Number]":
    """Estimates that the gains rest on, by name; those of the best of n have the names in `best`."""
    found = {f"J({name})": e for name, e in result.means.items()}
    found |= {"variance within rewrites": result.within, "variance between rewrites": result.between, **best}
    return found if result.ceiling is None else found | {"best rewrite drawn, over none": result.ceiling}


def _shared(pooled: "estimation.Pooled") -> "dict[str, Number]":
    """Estimates of strategies that prompts share, by name."""
    found = {"pooled prompter, over sft": pooled.over_reference, "its KL from sft, nats": pooled.kl}
    if pooled.over_none is not None:
        found = {"pooled prompter, over none": pooled.over_none} | found
    if pooled.components is not None:
        found |= {
            "variance between prompts": pooled.components.prompts,
            "variance between strategies": pooled.components.strategies,
            "variance of the interaction": pooled.components.interaction,
        }
    return found


def _drawn(pooled: "estimation.Pooled") -> str:
    """Say how many strategies there are, how far prompts share them, and which are favoured."""
    said = f"{number(pooled.strategies)} strategies, {pooled.shared:.0%} of draws with one that others drew"
    if pooled.favoured:
        best = ", ".join(f"{text or 'the prompt itself'!r} ({gain:+.3g})" for text, gain in pooled.favoured)
        said += f"; favoured, chosen for it: {best}"
    return said


def _prices(pooled: "estimation.Pooled", name: str = "{}") -> list[tuple[str, ...]]:
    """The value of one instruction and of reading the prompt, a row for each lambda."""
    return [(name.format(number(at.lam)), *map(interval, (at.one, at.read, at.price))) for at in pooled.at]


def _tuned_head(result: "estimation.Headroom") -> tuple[str, ...]:
    return () if result.beta is None else (f"fine-tuning (beta {result.beta:g}) beyond it",)


_PRICES = ("one instruction, net", "reading the prompt, net", "price of not reading")


_CALLS = ("as estimated", "at {}, whatever was not drawn", "whatever the rewards", "out of reach with")


def _plan(plan: "Plan | None") -> str:
    """Show draws times answers, and their product."""
    if plan is None:
        return "-"
    return f"{number(plan.draws)} x {number(plan.answers)} = {number(plan.calls)}"


def _calls(calls: "Calls", name: str = "{}") -> list[tuple[str, ...]]:
    """The calls that resampling needs, a row for each lambda."""
    return [
        (
            name.format(number(at.lam)),
            *map(_plan, (at.estimated, at.limited, at.sure)),
            f"{number(at.out_of_reach)} or fewer" if at.out_of_reach else "-",
        )
        for at in calls.at
    ]


def _calls_head(calls: "Calls") -> list[str]:
    return [head.format(f"{calls.level:.0%}") for head in _CALLS]


def text(result: "estimation.Headroom") -> str:
    found = _basis(result, {f"best of {n} rewrites, over sft": e for n, e in result.best_of.items()})
    rows = [("lambda", "over sft", "net of lambda KL", "over none", *_tuned_head(result), "")]
    for at in result.at:
        none = "" if at.over_none is None else interval(at.over_none)
        tuned = () if at.tuned is None else (interval(at.tuned),)
        remarks = dict.fromkeys(said for e in (at.over_reference, at.tuned) if e for said in e.remarks)
        gains = interval(at.over_reference), interval(at.net), none, *tuned
        rows.append((f"{at.lam:g}", *gains, ", ".join(remarks)))
    lines = [
        f"{result.n} rollouts of {result.n_prompts} prompts; {result.level:.0%} intervals over prompts",
        columns([(name, interval(e)) for name, e in found.items()]),
        "",
        "the optimal prompter's gain",
        columns(rows),
        *_text_of_shared(result.pooled),
        *((result.tuning,) if result.tuning else ()),
        *text_of_calls(result.calls),
        *(f"warning: {warning}" for warning in result.warnings),
        "",
        result.answer,
    ]
    return "\n".join(lines)


def _text_of_shared(pooled: "estimation.Pooled | None") -> list[str]:
    if pooled is None:
        return []
    lines = ["", f"shared among prompts: {_drawn(pooled)}"]
    lines.append(columns([(name, interval(e)) for name, e in _shared(pooled).items()]))
    if pooled.at:
        lines += ["", "over sft, were effects normal", columns([("lambda", *_PRICES), *_prices(pooled)])]
    return [*lines, pooled.finding, ""]


def text_of_calls(calls: "Calls | None") -> list[str]:
    """Lines that say how many calls resampling needs; none where it was not asked."""
    if calls is None:
        return []
    rows = [("lambda", *_calls_head(calls)), *_calls(calls)]
    return [
        "",
        "draws x answers = calls per prompt, to resample within "
        f"{number(calls.eps)} of the optimal prompter's mean reward",
        columns(rows),
    ]


def page(result: "estimation.Headroom") -> Page:
    axis = f"reward units, {result.level:.0%} intervals"
    settings = {"level": result.level, "lambda": [at.lam for at in result.at]} | BOOTSTRAP_SEED
    settings |= {} if result.beta is None else {"beta": result.beta}
    page = Page("headroom", "What prompting could gain", result.answer, settings)
    page.key("Train at all?", result.decision)
    for name, e in result.means.items():
        page.estimate(f"J({name})", e)
    if (tuned := result.at[0].tuned) is not None:
        page.estimate("Fine-tuning beyond ρ*", tuned)
    page.key("Rollouts", number(result.n), f"of {result.n_prompts} prompts")

    beyond = () if result.beta is None else (f"fine-tuning (β = {number(result.beta)}) beyond ρ*",)
    groups = ("over ρ_sft", "net of λ KL", "over no prompter", *beyond)
    rows, gained = [], []
    for at in result.at:
        gains = (at.over_reference, at.net, at.over_none, at.tuned)[: len(groups)]
        name = f"λ = {number(at.lam)}"
        rows.append((name, *map(interval, gains)))
        gained += [dot(name, e, group) for e, group in zip(gains, groups, strict=True) if e is not None]
    page.add(
        "The optimal prompter's gain",
        f"What ρ* would earn at each λ, in reward units, with {result.level:.0%} intervals over prompts. "
        + result.tuning,
        Table(["", *groups], rows, "w" + "n" * len(groups)),
        Dots("Gain at each λ", axis, gained, [(0.0, "no gain")]),
    )
    if result.pooled is not None:
        _add_shared(page, result.pooled, axis)
    if (calls := result.calls) is not None:
        page.add(
            "How many calls",
            "Draws × answers = calls per prompt with which resampling comes within "
            f"{number(calls.eps)} of ρ* in mean reward. As estimated: were the rewrites drawn all there are. "
            "Out of reach: with so few calls every method loses more on some prompts with rewards in this "
            "range.",
            Table(["", *_calls_head(calls)], _calls(calls, "λ = {}"), "wnnnn"),
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


def _add_shared(page: Page, pooled: "estimation.Pooled", axis: str) -> None:
    """Add the sections of strategies that prompts share."""
    page.key("Supported", pooled.supports)
    gains = {"over no prompter": pooled.over_none, "over ρ_sft": pooled.over_reference}
    page.add(
        "Strategies that prompts share",
        f"{pooled.finding} It pools over prompts what the rewrites add to them, is learned from some prompts "
        f"and judged on others: the best prompter earns no less than the lower limits. {_drawn(pooled)}.",
        shown_estimates(_shared(pooled), "quantity"),
        Dots("Gain of the pooled prompter", axis, dots({k: e for k, e in gains.items() if e is not None}),
             [(0.0, "no gain")]),
    )  # fmt: skip
    if pooled.at:
        page.add(
            "One instruction, or a prompter that reads",
            "Objectives J − λ KL over that of ρ_sft, of the best prompter that ignores the prompt and of the "
            "best that reads it, were the effects of strategies normal with the variances above.",
            Table(["", *_PRICES], _prices(pooled, "at λ = {}"), "wnnn"),
        )


@dataclass(frozen=True)
class Headroom:
    """Should one train at all? Estimates, before any training, what the best prompter could gain.

    Where rewrites add the same few instructions to many prompts, what each brings is learned over prompts:
    whether one instruction for all would do, and what reading the prompt would add.

    Needs arm sft (rewrites by the reference prompter) with at least two draws per prompt and two answers per
    draw; arm none for the comparison with no prompter.
    """

    file: tyro.conf.Positional[str]
    """Rollouts: the folder that alignpro rollout wrote, or the file in it."""
    lam: tuple[float, ...] = ()
    """Weights of the KL divergence in prompt optimization (lambda) to try, in reward units: a smaller one
    lets the prompter move further from the reference. Left out: 2%, 5%, 10%, 20% and 50% of the reward's
    range."""
    level: float = 0.95
    """How often an interval covers the truth, between 0.5 and 1; those behind the answer cover jointly."""
    beta: float | None = None
    """Weight of the KL divergence in RLHF (beta), positive, in reward units: also say what fine-tuning the
    frozen model at it would earn beyond the optimal prompter. Left out: not asked."""
    eps: float | None = None
    """Also say how many draws and answers bring resampling (alignpro resample) this close to the optimal
    prompter in mean reward, in reward units, and what fewer calls cannot do. Left out: not asked."""
    json: bool = False
    """Print one JSON object, instead of tables."""
    out: str | None = None
    """Folder to keep headroom.json and report.html in. Left out: nothing is kept."""

    examples = (
        ("what the best prompter could gain", "alignpro headroom runs/rollouts"),
        (
            "at one lambda, what fine-tuning would add, and how many calls resampling needs",
            "alignpro headroom runs/rollouts --lam 0.05 --beta 0.1 --eps 0.01 --out runs/headroom",
        ),
    )

    def run(self) -> int:
        from alignpro import estimation

        rollouts = read_rollouts(self.file, self.out)
        result = estimation.headroom(rollouts, self.lam, self.level, self.eps, self.beta)
        tell("headroom", plain(result), text(result), self.json, self.out, lambda: page(result))
        return 0
