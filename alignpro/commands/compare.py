"""`alignpro compare`: arms compared by the reward, paired over prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.estimate import BOOTSTRAP_SEED, add_warnings
from alignpro.commands.shared import add_at_least, at_least, read_rollouts, tell, with_sums
from alignpro.report.numbers import columns, interval, plain
from alignpro.report.page import Dots, Page, Table, dot, dots

if TYPE_CHECKING:
    from alignpro import estimation


def _rows(result: "estimation.Comparison", none: str) -> list[Sequence[str]]:
    """Each arm's mean, variance, and differences from the baseline; `none` where it is the baseline."""
    rows: list[Sequence[str]] = []
    for name, mean in result.mean.items():
        against = result.against.get(name)
        differences = (against.mean, against.variance, against.win_rate) if against else ()
        cells = [interval(e) for e in differences] or [none] * 3
        rows.append((name, interval(mean), interval(result.variance[name]), *cells))
    return rows


def text(result: "estimation.Comparison") -> str:
    head = ("arm", "mean reward", "variance", f"mean - {result.baseline}", "variance -", "win rate")
    first = f"{result.n_prompts} prompts, paired; {result.level:.0%} intervals over prompts"
    lines = [first, columns([head, *_rows(result, "")])]
    if result.parts:
        of_parts = [("arm", "part", "mean", f"mean - {result.baseline}"), *_parts(result, "")]
        lines += ["", "parts of the reward", columns(of_parts)]
    lines += ["", at_least(result.guaranteed, list(result.mean))]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in result.warnings)])


def _parts(result: "estimation.Comparison", none: str) -> list[Sequence[str]]:
    """The means of the reward's parts, and their differences from the baseline; `none` where it is that."""
    gaps = with_sums(
        {n: a.parts for n, a in result.against.items()}, {n: a.mean for n, a in result.against.items()}
    )
    found = {(arm, part): interval(e) for arm, part, e in gaps}
    rows = with_sums(result.parts, result.mean)
    return [(arm, part, interval(e), found.get((arm, part), none)) for arm, part, e in rows]


def page(result: "estimation.Comparison") -> Page:
    base, level = result.baseline, f"{result.level:.0%} intervals"
    said = [f"{name} {a.finding} {base}, {interval(a.mean)}" for name, a in result.against.items()]
    settings = {"level": result.level, "arms": result.prompters, "prompts": result.n_prompts}
    page = Page("compare", f"Arms compared with {base}", "; ".join(said) + ".", settings | BOOTSTRAP_SEED)
    for name, e in list(result.mean.items())[:4]:
        page.estimate(f"Mean reward, {name}", e)
    head = ["arm", "mean reward", "variance", f"mean − {base}", f"variance − {base}", "win rate"]
    page.add(
        "Arms",
        f"{result.n_prompts} prompts, paired, with {level} over prompts; those of the differences cover "
        "jointly over the arms. Win rate: how often an answer earns more than the baseline's, ties a half.",
        Table(head, _rows(result, "-"), "wnnnnn"),
        Dots("Mean reward of each arm", f"reward units, {level}", dots(result.mean)),
    )
    if result.parts:
        page.add(
            "Parts of the reward",
            f"Their means add up to the mean reward; {level} over prompts, those of the differences cover "
            "jointly over arms and parts.",
            Table(["arm", "part", "mean", f"mean − {base}"], _parts(result, "-"), "wwnn"),
            Dots(
                f"Mean of each part minus that of {base}",
                f"reward units, {level}",
                [dot(name, e, part) for name, a in result.against.items() for part, e in a.parts.items()],
                [(0.0, "no difference")],
            ),
        )
    page.add(
        f"Differences from {base}",
        "Of mean rewards, paired over prompts: right of 0 the arm earns more.",
        figure=Dots(
            f"Mean reward minus that of {base}",
            f"reward units, {level}",
            dots({name: a.mean for name, a in result.against.items()}),
            [(0.0, "no difference")],
        ),
    )
    page.add(
        f"Win rates against {base}",
        "By the reward, not by a judge.",
        figure=Dots(
            f"Win rate against {base}",
            f"share of pairs, ties a half, {level}",
            dots({name: a.win_rate for name, a in result.against.items()}),
            [(0.5, "even")],
        ),
    )
    about = f"The mean reward of {len(result.mean)} arms over all prompts like these {result.n_prompts}."
    add_at_least(page, result.guaranteed, list(result.mean), about)
    add_warnings(page, result.warnings)
    return page


@dataclass(frozen=True)
class Compare:
    """Compare arms by mean reward, variance of the reward and win rate, prompt by prompt."""

    file: tyro.conf.Positional[str]
    """Rollouts: the folder that alignpro rollout wrote, or the file in it."""
    arms: tuple[str, ...]
    """The baseline, then the arms to compare with it."""
    level: float = 0.95
    """How often an interval covers the truth, between 0.5 and 1; differences cover jointly over the arms."""
    json: bool = False
    """Print one JSON object, instead of a table."""
    out: str | None = None
    """Folder to keep compare.json and report.html in. Left out: nothing is kept."""

    examples = (
        ("the reference prompter against none", "alignpro compare runs/rollouts --arms none sft"),
        (
            "a trained prompter against both, as a page",
            "alignpro compare runs/rollouts --arms none sft trained --out runs/compare",
        ),
    )

    def run(self) -> int:
        from alignpro import estimation

        result = estimation.compare(read_rollouts(self.file, self.out), self.arms, self.level)
        tell("compare", plain(result), text(result), self.json, self.out, lambda: page(result))
        return 0
