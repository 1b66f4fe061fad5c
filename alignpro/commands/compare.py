"""TODO."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.shared import read_rollouts, tell
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from alignpro.commands.estimate import _SEEDED
from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import Dots, Json, Page, Table, dot


def report_of_compare(result: Json) -> Page:
    """Of json."""
    base, against = result["baseline"], result["against"]
    level = f"{result['level']:.0%} intervals"
    said = []
    for name, a in against.items():
        lo, hi = a["mean"]["lo"], a["mean"]["hi"]
        verb = "earns more than" if lo > 0 else "earns less than" if hi < 0 else "cannot be told from"
        said.append(f"{name} {verb} {base}, {interval(a['mean'])}")
    settings = {"level": result["level"], "arms": list(result["mean"]), "prompts": result["n_prompts"]}
    page = Page("compare", f"Arms compared with {base}", "; ".join(said) + ".", settings | _SEEDED)
    for name, e in list(result["mean"].items())[:4]:
        page.key(f"Mean reward, {name}", number(e["value"]), limits(e))

    rows = []
    for name, e in result["mean"].items():
        differences = (interval(against.get(name, {}).get(key)) for key in ("mean", "variance", "win_rate"))
        rows.append((name, interval(e), interval(result["variance"][name]), *differences))
    head = ["arm", "mean reward", "variance", f"mean − {base}", f"variance − {base}", "win rate"]
    page.add(
        "Arms",
        f"{result['n_prompts']} prompts, paired, with {level} over prompts; those of the differences cover "
        "jointly over the arms. Win rate: how often an answer earns more than the baseline's, ties a half.",
        Table(head, rows, "wnnnnn"),
        Dots(
            "Mean reward of each arm",
            f"reward units, {level}",
            [dot(*item) for item in result["mean"].items()],
        ),
    )
    page.add(
        f"Differences from {base}",
        "Of mean rewards, paired over prompts: right of 0 the arm earns more.",
        figure=Dots(
            f"Mean reward minus that of {base}",
            f"reward units, {level}",
            [dot(name, a["mean"]) for name, a in against.items()],
            [(0.0, "no difference")],
        ),
    )
    page.add(
        f"Win rates against {base}",
        "By the reward, not by a judge.",
        figure=Dots(
            f"Win rate against {base}",
            f"share of pairs, ties a half, {level}",
            [dot(name, a["win_rate"]) for name, a in against.items()],
            [(0.5, "even")],
        ),
    )
    return page


@dataclass(frozen=True)
class Compare:
    """Compare arms by mean reward, variance and win rate, paired over prompts."""

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    arms: tuple[str, ...]
    """The baseline, then what is compared with it."""
    level: float = 0.95
    """Of the intervals; differences cover jointly over the arms."""
    json: bool = False
    """One JSON object, instead of a table."""
    out: str | None = None
    """Folder for json and report.html."""

    def run(self) -> int:
        from alignpro import estimation
        from alignpro.commands import tables

        report = estimation.compare(read_rollouts(self.file, self.out), self.arms, self.level)
        values = report.json()
        tell("compare", values, tables.of_comparison(report), self.json, self.out)
        if self.out is not None:
            keep.keep(report_of_compare(values), self.out)
        return 0
