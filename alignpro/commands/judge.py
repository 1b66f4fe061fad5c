"""`alignpro judge`: win rates by a judge model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from alignpro.commands.flags import Prefixed
from alignpro.commands.options import RunOptions
from alignpro.commands.shared import ROLLOUTS_FILE, found_file, tell
from alignpro.files import read_json
from alignpro.llm.arms.settings import JudgeSettings
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.report.numbers import columns, interval, number, plain
from alignpro.report.page import Dots, Page, Table, dots
from alignpro.runs import owning

if TYPE_CHECKING:
    from alignpro.estimation.intervals import Estimate
    from alignpro.estimation.winrate import WinRates


def _rates(result: "WinRates") -> "dict[str, Estimate | None]":
    return {
        "win rate, ties a half": result.win_rate,
        "at equal lengths": result.length_controlled,
        "orders agree": result.agreement,
        "first shown preferred": result.first_shown,
    }


def _contradictions(result: "WinRates") -> str:
    """Say in a sentence that the judge goes by position, where it does."""
    if not result.contradictory or result.agreement is None:
        return ""
    return (
        f"With the order turned the judge says another thing in {1.0 - result.agreement.value:.0%} of the "
        "pairs, so these rates tell little of the answers: ask a stronger judge."
    )


def text(result: "WinRates", replies: Sequence[str] = ()) -> str:
    ours, theirs = result.arms
    won, lost = (f"{p:.0f}" for p in result.percentages) if result.percentages else ("-", "-")
    identical = f" ({result.identical} identical)" if result.identical else ""
    over = f"over {result.judged} of {result.pairs} pairs"
    if result.failed:
        over += "; {:.3f} to {:.3f} were every failed verdict lost, or won".format(*result.bounds)
    lengths = "mean length {:.0f} against {:.0f} characters".format(*result.mean_lengths)
    kappa = "" if result.kappa is None else f"Cohen's kappa {result.kappa:.2f}"
    notes = (over, lengths, kappa, "0.5 where position does not matter")
    rows = [
        (
            f"{ours} : {theirs}",
            f"{won} : {lost}",
            f"won {result.wins}, lost {result.losses}, tied {result.ties}{identical}, failed {result.failed}",
        ),
        *(
            (name, "not to be had" if e is None else interval(e, ".3f"), note)
            for (name, e), note in zip(_rates(result).items(), notes, strict=True)
        ),
    ]
    lines = [
        f"{result.pairs} pairs of {result.prompts} prompts, each judged in both orders by {result.judge}"
        + (f"; {result.level:.0%} intervals over prompts" if result.level else ""),
        columns(rows),
    ]
    if doubt := _contradictions(result):
        lines.append(doubt)
    if result.failures:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result.failures.items())
        lines.append(f"verdicts that failed: {kinds}")
    return "\n".join([*lines, *(f"  {reply}" for reply in replies)])


def page(result: "WinRates", settings: Mapping[str, Any]) -> Page:
    """The page of `judge`: the win rate, what the judge is worth, and counts; `settings` as settings.json."""
    ours, theirs = result.arms
    rate, rates = result.win_rate, _rates(result)
    page = Page(
        "judge",
        f"{ours} against {theirs}, judged",
        "No pair got a verdict."
        if rate is None
        else f"{ours} wins {interval(rate)} of the pairs, ties a half. {_contradictions(result)}".strip(),
        {**settings, "judge": result.judge},
    )
    page.estimate("Win rate", rate)
    tied = f"tied {result.ties}, failed {result.failed}"
    page.key("Won : lost", f"{result.wins} : {result.losses}", tied)
    page.estimate("Orders agree", result.agreement)
    page.key("Pairs", number(result.pairs), f"of {result.prompts} prompts")

    level = f"{result.level:.0%} intervals" if result.level else "no intervals"
    rows: list[Sequence[str]] = [
        (name, interval(e), number(e.n if e else None), e.method if e else "–") for name, e in rates.items()
    ]
    given = dots({name: e for name, e in rates.items() if e is not None})
    page.add(
        "Rates",
        f"{ours} against {theirs}, each pair judged in both orders, with {level} over prompts. A judge that "
        "is blind to position prefers the answer shown first in half of them.",
        Table("rate | value [interval] | pairs | how", rows, "wnnw"),
        Dots("Rates", f"share of pairs, {level}", given, [(0.5, "even")]),
    )
    low, high = map(number, result.bounds)
    lengths = " and ".join(number(length, ".1f") for length in result.mean_lengths)
    counts = ("pairs", "prompts", "wins", "ties", "losses", "failed", "identical")
    rows = [(name, number(getattr(result, name))) for name in counts]
    rows += [(f"orders that failed: {kind}", number(count)) for kind, count in result.failures.items()]
    page.add(
        "Counts",
        f"The win rate would be {low} or {high} were every missing verdict one against, or one for, {ours}. "
        f"The answers have {lengths} characters on average; Cohen's κ of both orders is "
        f"{number(result.kappa)}.",
        Table("of pairs | number", rows, "wn"),
    )
    return page


@dataclass(frozen=True, kw_only=True)
class Judge(RunOptions):
    """Win rates by a judge model: pairs of answers compared in both orders, by the paper's seven criteria.

    Prints calls, tokens and cost before anything is asked. Interrupt at any time; the same command continues,
    and further prompts can be added.
    """

    file: tyro.conf.Positional[str]
    """Rollouts: the folder that alignpro rollout wrote, or the file in it."""
    arms: tuple[str, str]
    """The arm of interest (A in the paper's Table 1), then the one it is compared with (B)."""
    out: str
    """Folder for judgements.jsonl, winrate.json, report.html and the replies paid for."""
    settings: tyro.conf.OmitArgPrefixes[JudgeSettings]
    endpoint: Annotated[EndpointSettings, Prefixed("judge")] = field(default_factory=EndpointSettings)
    level: float = 0.95
    """How often an interval covers the truth, between 0.5 and 1."""
    json: bool = False
    """Print one JSON object, instead of a table."""

    common = (
        "out arms judge judge-model judge-key-env prompts per-prompt judge-prices judge-max-calls "
        "reply-tokens forced level json seed config"
    )
    examples = (
        (
            "a small model on this machine",
            "alignpro judge runs/rollouts --arms trained none --judge smollm2-135m-instruct --forced "
            "--out runs/judge",
        ),
        (
            "a model behind an endpoint, which is paid for",
            "alignpro judge runs/rollouts --arms trained none --judge https://api.openai.com/v1 "
            "--judge-model gpt-4o-mini --judge-key-env OPENAI_API_KEY --judge-max-calls 500 --out runs/judge",
        ),
    )

    @owning("judge")
    def run(self) -> int:
        from alignpro.estimation import winrate
        from alignpro.estimation.intervals import check_level
        from alignpro.llm.arms import judge

        check_level(self.level)
        file = found_file(self.file, ROLLOUTS_FILE)
        rows = judge.judge_file(file, self.arms, self.settings, self.endpoint, self.out)
        result = winrate.win_rates(winrate.collect(rows), self.level)
        tell(
            "winrate",
            plain(result),
            text(result, judge.failed_replies(rows)),
            self.json,
            self.out,
            lambda: page(result, read_json(os.path.join(self.out, judge.SETTINGS_FILE))),
        )
        return 0
