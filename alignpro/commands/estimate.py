"""`alignpro estimate`: Theorem 1 checked on rollouts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from alignpro.commands.shared import SUM, ranges, read_rollouts, tell, with_sums
from alignpro.report.numbers import columns, interval, number, plain
from alignpro.report.page import Dots, Page, Table, dot, dots, some

if TYPE_CHECKING:
    from alignpro.estimation import Estimate as Number
    from alignpro.estimation import EstimateReport
    from alignpro.estimation.estimate import Split

BOOTSTRAP_SEED = {"seed": "the bootstrap's is fixed; those of the rollouts are in their file"}
"""The line about seeds in the settings of a page."""


_PARTS = "gap of | gap | prompting ceiling | KL regularisation | optimisation | sampling error"


def text(result: "EstimateReport") -> str:
    low, high = result.reward_range
    lines = [
        f"{result.n} rollouts of {result.n_prompts} prompts, beta {result.beta:g}, lambda {result.lam:g}; "
        f"{result.level:.0%} intervals over prompts",
        f"frozen {result.frozen}, reward {result.reward_model} in [{low:g}, {high:g}], {result.sampling}",
        "",
        "quantities",
        _lines(result.quantities),
    ]
    if result.parts:
        ends = ranges(result.part_ranges, *result.reward_range)
        of_parts = [(arm, part, interval(e), ends[part]) for arm, part, e in _parts(result)]
        lines += ["", "parts of the reward"]
        lines += [columns([("arm", "part", "mean", "declared range"), *of_parts])]
    if result.gaps:
        lines += ["", "gap J(pi*) - J(arm), and of a tuned policy's J", _lines(result.gaps)]
    rows: list[Sequence[str]] = [("bound", "about", "gap", "rhs", "slack (joint interval)", "verdict")]
    for bound in result.bounds:
        cells = ("" if e is None else interval(e) for e in (bound.gap, bound.rhs, bound.slack))
        rows.append((bound.name, bound.prompter, *cells, bound.finding))
    notes = [f"  {bound.name} of {bound.prompter}: {bound.why}" for bound in result.bounds if bound.why]
    lines += ["", "gap <= rhs", columns(rows), *dict.fromkeys(notes)]
    if any(bound.vacuous for bound in result.bounds):
        lines.append("  vacuous: rhs is at least the width of the reward, so true of any policies")
    if result.splits:
        head = tuple(f"the {_PARTS}".split(" | "))
        rows = [_split(arm, s, f"+-{s.sampling_error:.3g}") for arm, s in result.splits.items()]
        lines += ["", "where it comes from", columns([head, *rows])]
    if result.missing:
        lines += ["", "not to be had from these rollouts"]
        lines += [f"  {name}: {why}" for name, why in result.missing.items()]
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _parts(result: "EstimateReport") -> list[tuple[str, str, "Number"]]:
    return with_sums(result.parts, {arm: result.quantities[f"J({arm})"] for arm in result.parts})


def _split(arm: str, split: "Split", error: str) -> tuple[str, ...]:
    parts = (split.gap, split.prompting_ceiling, split.kl_regularisation, split.optimisation)
    return (arm, *map(interval, parts), error)


def _lines(found: Mapping[str, "Number"]) -> str:
    return columns([(name, interval(e), ", ".join(e.remarks)) for name, e in found.items()])


def page(result: "EstimateReport") -> Page:
    about, axis = result.theorem1, f"reward units, {result.level:.0%} intervals"
    keys = "beta lam level frozen reward_model reward_range sampling prompters"
    why = f"; {about.why}" if about.why else ""
    page = Page(
        "estimate",
        "Theorem 1 on rollouts",
        f"Theorem 1 about {about.prompter}: {about.finding}{why}.",
        some(plain(result), keys) | BOOTSTRAP_SEED,
    )
    page.key("Theorem 1", about.verdict, about.finding.partition(", ")[2])
    page.estimate(f"Gap of {about.prompter}", about.gap)
    page.estimate("Right side", about.rhs)
    page.key("Rollouts", number(result.n), f"of {result.n_prompts} prompts")

    rows, beside, terms = [], [], []
    for b in result.bounds:
        cells = (interval(e) for e in (b.gap, b.rhs, b.slack))
        rows.append((b.name, b.prompter, *cells, b.finding, b.why or "–"))
        label = f"{b.name}, {b.prompter}"
        beside += [dot(label, b.gap, "gap"), dot(label, b.rhs, "right side")]
        terms += [(b.name, b.prompter, term, interval(e)) for term, e in b.terms.items()]
    page.add(
        "Bounds on the gap",
        f"gap ≤ right side, with {result.level:.0%} intervals over prompts; the slacks' cover jointly. "
        f"Vacuous: the right side is at least the reward's width, {number(result.width)}.",
        Table("bound | about | gap | right side | slack | verdict | why", rows, "wwnnnww"),
        Dots("Each bound beside the gap", axis, beside, [(result.width, "vacuous from here")]),
    )
    page.add(
        "Their terms",
        "What the right sides are made of: each is the sum of its terms, which carry their signs.",
        Table("bound | about | term | value [interval]", terms, "wwwn"),
    )
    rewards = {name: e for name, e in result.quantities.items() if name.startswith("J(")}
    page.add(
        "Quantities",
        "What these rollouts give of the theory; J is an expected reward, TV a total variation, ESS an "
        "effective sample size.",
        shown_estimates(result.quantities, "quantity"),
        Dots("Expected rewards", axis, dots(rewards)),
    )
    if result.parts:
        add_parts(page, _parts(result), ranges(result.part_ranges, *result.reward_range), axis)
    page.add(
        "Gaps to the optimum",
        "J(π*) minus the J of each arm; “rlhf − …” has the tuned policy's J in J(π*)'s place.",
        shown_estimates(result.gaps, "gap of"),
        Dots("Gap of each arm", axis, dots(result.gaps), [(0.0, "no gap")]),
    )
    if splits := result.splits.items():
        rows = [_split(arm, split, f"± {number(split.sampling_error, '.3g')}") for arm, split in splits]
        page.add("Where it comes from", "Each gap is the sum of three parts.", Table(_PARTS, rows, "wnnnnn"))
    if result.missing:
        table = Table("what | why", list(result.missing.items()), "ww")
        page.add("Not to be had", "What these rollouts do not tell, and why.", table)
    add_warnings(page, result.warnings)
    return page


def shown_estimates(found: Mapping[Any, "Number"], first: str) -> Table:
    """A table of numbers with their intervals and remarks, headed `first`."""
    rows = [
        (str(name), interval(e), "; ".join(e.remarks) or "–", number(e.n), e.method)
        for name, e in found.items()
    ]
    return Table(f"{first} | value [interval] | remarks | rollouts | how", rows, "wnwnw")


def add_parts(page: Page, rows: Sequence[tuple[str, str, Any]], ends: Mapping[str, str], axis: str) -> None:
    """Add the section of the reward's parts, given as `with_sums` and `ranges` do, to `page`."""
    page.add(
        "Parts of the reward",
        "The mean of each part in each arm, in the part's declared range; they add up to the mean reward.",
        Table(
            "arm | part | mean [interval] | declared range",
            [(arm, part, interval(e), ends[part]) for arm, part, e in rows],
            "wwnw",
        ),
        Dots("Mean of each part", axis, [dot(arm, e, part) for arm, part, e in rows if part != SUM]),
    )


def add_warnings(page: Page, warnings: Sequence[str]) -> None:
    """Add the section of warnings to `page` where there are any."""
    if warnings:
        rows = [(str(i), warning) for i, warning in enumerate(warnings, 1)]
        page.add("Warnings", "What to keep in mind with these numbers.", Table(" | warning", rows, "ww"))


@dataclass(frozen=True)
class Estimate:
    """Check Theorem 1 on rollouts of real models: how large the gap between RLHF and prompt optimization is,
    what the bound allows, and whether it holds, each number with an interval.

    The gap is the expected reward of the best fine-tuned model minus that of the frozen model with the best
    prompter. Exit status 1 when a bound is violated.
    """

    file: tyro.conf.Positional[str]
    """Rollouts: the folder that alignpro rollout wrote, or the file in it, with at least the arms none (no
    prompter) and sft (the reference)."""
    beta: float
    """Weight of the KL divergence in RLHF (beta), positive, in reward units: smaller lets fine-tuning move
    further from the frozen model."""
    lam: float
    """Weight of the KL divergence in prompt optimization (lambda), positive, in reward units; give a trained
    arm's own."""
    level: float = 0.95
    """How often an interval covers the truth, between 0.5 and 1; those of the slacks cover jointly."""
    r_max: float | None = None
    """Theorem 1's r_max, in reward units, when it is known beforehand. Left out: the upper end of the
    declared range of the reward, or the width of that range where rewards can be negative."""
    guaranteed: bool = False
    """Give intervals that cover by a theorem at every number of prompts, also to the slacks, whatever answers
    and rewrites were not drawn; they are wider. A KL from log-probabilities has none, and says so."""
    json: bool = False
    """Print one JSON object, instead of tables."""
    out: str | None = None
    """Folder to keep estimate.json and report.html in. Left out: nothing is kept."""

    renamed: ClassVar = {"betting": "guaranteed"}
    examples = (
        (
            "Theorem 1 on a run's rollouts, as numbers and as a page",
            "alignpro estimate runs/rollouts --beta 0.1 --lam 0.05 --out runs/estimate",
        ),
        (
            "with intervals that hold at any number of prompts",
            "alignpro estimate runs/rollouts --beta 0.1 --lam 0.05 --guaranteed",
        ),
    )

    def run(self) -> int:
        from alignpro import estimation

        rollouts = read_rollouts(self.file, self.out)
        interval: Any = "guaranteed" if self.guaranteed else "bootstrap"
        result = estimation.estimate(
            rollouts, self.beta, self.lam, self.level, r_max=self.r_max, interval=interval
        )
        tell("estimate", plain(result), text(result), self.json, self.out, lambda: page(result))
        return int(result.violated)
