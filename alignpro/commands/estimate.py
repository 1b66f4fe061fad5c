"""TODO."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.commands.shared import read_rollouts, tell
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import Dots, Json, Page, Table, dot, some


def _verdict(bound: Json) -> str:
    return bound["verdict"] + (", vacuous" if bound["vacuous"] else "")


def _shown_estimates(of: Mapping[Any, Json], first: str) -> Table:
    rows = []
    for name, e in of.items():
        said = ["degenerate weights: bounds"] * e["bracket"]
        said += [f"biased {e['bias']}"] * (e["bias"] in ("up", "down"))
        said += [] if e["ess"] is None else [f"effective sample size {e['ess']:.1f}"]
        rows.append((str(name), interval(e), "; ".join(said) or "–", number(e["n"]), e["method"]))
    return Table(f"{first} | value [interval] | remarks | rollouts | how", rows, "wnwnw")


def _add_notes(page: Page, of: Json) -> None:
    """What a result lacks and warns of."""
    if of.get("missing"):
        rows = list(of["missing"].items())
        page.add(
            "Not to be had", "What these rollouts do not tell, and why.", Table("what | why", rows, "ww")
        )
    if of["warnings"]:
        rows = [(str(i), text) for i, text in enumerate(of["warnings"], 1)]
        page.add("Warnings", "What to keep in mind with these numbers.", Table(" | warning", rows, "ww"))


_SEEDED = {"seed": "the bootstrap's is fixed; those of the rollouts are in their file"}


def report_of_estimate(result: Json) -> Page:
    """Of json."""
    low, high = result["reward_range"]
    bounds, axis = result["bounds"], f"reward units, {result['level']:.0%} intervals"
    first = next(b for b in bounds if b["name"] == "theorem1")
    keys = "beta lam level frozen reward_model reward_range sampling prompters"
    page = Page(
        "estimate",
        "Theorem 1 on rollouts",
        f"Theorem 1 about {first['prompter']}: {_verdict(first)}"
        + f"; {first['why']}" * bool(first["why"])
        + ".",
        some(result, keys) | _SEEDED,
    )
    page.key("Theorem 1", first["verdict"], "vacuous" if first["vacuous"] else "")
    for name, e in ((f"Gap of {first['prompter']}", first["gap"]), ("Right side", first["rhs"])):
        page.key(name, number(e and e["value"]), limits(e))
    page.key("Rollouts", number(result["n"]), f"of {result['n_prompts']} prompts")

    rows, dots, terms = [], [], []
    for b in bounds:
        name, about = b["name"], b["prompter"]
        cells = (interval(b[key]) for key in ("gap", "rhs", "slack"))
        rows.append((name, about, *cells, _verdict(b), b["why"] or "–"))
        for key, words in (("gap", "gap"), ("rhs", "right side")):
            dots.append(dot(f"{name}, {about}", b[key], words))
        terms += [(name, about, term, interval(e)) for term, e in b["terms"].items()]
    page.add(
        "Bounds on the gap",
        f"gap ≤ right side, with {result['level']:.0%} intervals over prompts; the slacks' cover jointly. "
        f"Vacuous: the right side is at least the reward's width, {number(high - low)}.",
        Table("bound | about | gap | right side | slack | verdict | why", rows, "wwnnnww"),
        Dots("Each bound beside the gap", axis, dots, [(high - low, "vacuous from here")]),
    )
    page.add(
        "Their terms",
        "What the right sides are made of; the prompter's KL and Jeffreys' divergence are subtracted.",
        Table("bound | about | term | value [interval]", terms, "wwwn"),
    )
    found, gaps = result["quantities"], result["gaps"]
    page.add(
        "Quantities",
        "What these rollouts give of the theory; J is an expected reward, TV a total variation.",
        _shown_estimates(found, "quantity"),
        Dots("Expected rewards", axis, [dot(name, e) for name, e in found.items() if name.startswith("J(")]),
    )
    page.add(
        "Gaps to the optimum",
        "J(π*) minus the J of each arm; “rlhf − …” has the tuned policy's J in J(π*)'s place.",
        _shown_estimates(gaps, "gap of"),
        Dots("Gap of each arm", axis, [dot(name, e) for name, e in gaps.items()], [(0.0, "no gap")]),
    )
    if result["splits"]:
        rows = []
        for arm, split in result["splits"].items():
            parts = ("gap", "prompting_ceiling", "kl_regularisation", "optimisation")
            error = f"± {number(split['sampling_error'], '.3g')}"
            rows.append((arm, *(interval(split[key]) for key in parts), error))
        head = "gap of | gap | prompting ceiling | KL regularisation | optimisation | sampling error"
        page.add("Where it comes from", "Each gap is the sum of three parts.", Table(head, rows, "wnnnnn"))
    _add_notes(page, result)
    return page


@dataclass(frozen=True)
class Estimate:
    """Check Theorem 1 on rollouts: every term, the gap, the bounds and their verdicts, with intervals.

    Exit status 1 when a bound is violated.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them: arms none and sft at least."""
    beta: float
    """RLHF tuning parameter, positive, in reward units."""
    lam: float
    """Prompt tuning parameter (lambda), positive, in reward units; that of training for a trained arm."""
    level: float = 0.95
    """Of the intervals; those of the slacks cover jointly."""
    r_max: float | None = None
    """Theorem 1's r_max, when it is known a priori. Default: from the declared range of the reward."""
    betting: bool = False
    """Intervals with guaranteed coverage for mean rewards and total variations; they are wider."""
    json: bool = False
    """One JSON object, instead of tables."""
    out: str | None = None
    """Folder for json and report.html."""

    def run(self) -> int:
        from alignpro import estimation
        from alignpro.commands import tables

        rollouts = read_rollouts(self.file, self.out)
        interval: Any = "betting" if self.betting else "bootstrap"
        report = estimation.estimate(
            rollouts, self.beta, self.lam, self.level, r_max=self.r_max, interval=interval
        )
        values = report.json()
        tell("estimate", values, tables.of_estimate(report), self.json, self.out)
        if self.out is not None:
            keep.keep(report_of_estimate(values), self.out)
        return int(any(bound.verdict == "violated" for bound in report.bounds))
