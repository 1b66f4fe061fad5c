"""`alignpro judge`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.commands.shared import tell
from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.arms.judge import JudgeSettings
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from collections.abc import Callable
from typing import TYPE_CHECKING

from alignpro.files import writable_folder, write_json, write_text
from alignpro.llm.models.chat import parse_options
from alignpro.llm.targets.target import Target
from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import Dots, Json, Page, Table, dot

if TYPE_CHECKING:
    pass

from alignpro.llm.arms.judge import FILE, SETTINGS_FILE, ForcedChoice, judge, pairs


def open_judge(settings: JudgeSettings) -> Callable[[], Target]:
    """Opens the judge; an endpoint's settings are checked now, a model in this process loaded then.

    Raises:
        AlignProError: an endpoint without the name of its model or forced to choose, a model with an
            endpoint's settings, or a name that is no model's.
    """
    given, options = settings.endpoint(), parse_options(settings.chat_template_kwargs)
    if settings.judge.startswith(("http://", "https://")):
        if settings.forced:
            raise AlignProError(
                "forced: an endpoint does not score given replies; leave out --forced, or give --judge a "
                "model that runs in this process"
            )
        if "model" not in given:
            raise AlignProError(f"judge_model: name the model that {settings.judge} serves")
        from alignpro.llm.targets.endpoint import Endpoint
        from alignpro.llm.targets.settings import EndpointSettings

        opened = Endpoint(settings.judge, EndpointSettings(**given))
        return lambda: opened
    if given:
        raise AlignProError(
            f"judge_{next(iter(given))}: is for an endpoint, and {settings.judge!r} is no http(s) address"
        )
    from alignpro.llm.models import catalogue, configure

    catalogue.check_name(settings.judge)
    configure.check_dtype(settings.dtype)

    def load() -> Target:
        from alignpro.llm.targets.local import LocalTarget

        target = LocalTarget(
            settings.judge,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            chat_template_kwargs=options,
        )
        return ForcedChoice(target) if settings.forced else target

    return load


def run_judge(file: str, arms: Sequence[str], settings: JudgeSettings, out: str) -> list[dict[str, Any]]:
    """Judge a rollout file into `out`: settings.json, answers/ (replies paid for), judgements.jsonl.

    Everything is checked before the judge is loaded; what is to be asked is estimated before it is asked. The
    same call goes on after an interruption, and further prompts can be added.

    Returns:
        The rows of judgements.jsonl, for `alignpro.estimation.winrate.collect`.

    Raises:
        AlignProError: bad settings or files, another comparison in `out`, or the judge's own errors.
    """
    from tqdm import tqdm

    from alignpro.llm.models import packages
    from alignpro.llm.targets.ledger import Cached, Prices

    prices = None if settings.prices is None else Prices(*settings.prices)
    opened = open_judge(settings)
    compared = pairs(file, arms, settings.per_prompt, settings.prompts)
    folder = writable_folder(out)
    record = {
        "arms": list(arms),
        "judge": settings.judge,
        "judge_model": settings.judge_model,
        "temperature": settings.temperature,
        "reply_tokens": settings.reply_tokens,
        "seed": settings.seed,
        **({"forced": True} if settings.forced else {}),
    }
    begun = folder / SETTINGS_FILE
    before = read_json(begun) if begun.exists() else record
    if not isinstance(before, dict) or before.keys() != record.keys():
        raise AlignProError(f"--out {folder}: holds another run; choose another folder")
    for name, value in record.items():
        if before[name] != value:
            raise AlignProError(
                f"--out {folder}: was begun with {name} {before[name]!r}, not {value!r}; repeat that or "
                "choose another folder"
            )
    write_json(begun, record)
    identical = sum(pair.answers[0] == pair.answers[1] for pair in compared)
    same = f" ({identical} identical, not asked)" if identical else ""
    packages.note(f"{len(compared)} pairs of {arms[0]} and {arms[1]}{same}, both orders")
    target = Cached(opened(), folder / "answers", prices=prices)
    with tqdm(total=2 * (len(compared) - identical), unit="reply", disable=None) as bar:
        judged = judge(target, compared, settings.sampling(), seed=settings.seed, on_reply=bar.update)
    packages.note(target.ledger.line())
    rows = [judgement.row((arms[0], arms[1]), target.name) for judgement in judged]
    # ASCII: a reply may hold what UTF-8 cannot.
    write_text(folder / FILE, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _end(text: str) -> str:
    return text if len(text) <= 120 else "..." + text[-117:]  # where the verdict should be


def failed_replies(rows: Sequence[dict[str, Any]], most: int = 3) -> list[str]:
    """One line for each of the first `most` replies without a verdict, cut and escaped for a terminal."""
    found = [
        (row["prompt_id"], kind, text)
        for row in rows
        for kind, text in zip(row["failures"], row["replies"], strict=True)
        if kind is not None
    ]
    return [f"{kind}, prompt {name}: {_end(text)!a}" for name, kind, text in found[:most]]


def report_of_judge(result: Json, record: Json) -> Page:
    """Of winrate.json, and of settings.json beside it."""
    ours, theirs = result["arms"]
    rate, agreement = result["win_rate"], result["agreement"]
    page = Page(
        "judge",
        f"{ours} against {theirs}, judged",
        "No pair got a verdict."
        if rate is None
        else f"{ours} wins {interval(rate)} of the pairs, ties a half.",
        {**record, "judge": result["judge"]},
    )
    page.key("Win rate", number(rate and rate["value"]), limits(rate))
    tied = f"tied {result['ties']}, failed {result['failed']}"
    page.key("Won : lost", f"{result['wins']} : {result['losses']}", tied)
    page.key("Orders agree", number(agreement and agreement["value"]), limits(agreement))
    page.key("Pairs", number(result["pairs"]), f"of {result['prompts']} prompts")

    rates = {
        "win rate, ties a half": rate,
        "at equal lengths": result["length_controlled"],
        "orders agree": agreement,
        "first shown preferred": result["first_shown"],
    }
    known = {name: e for name, e in rates.items() if e is not None}
    level = next((f"{e['level']:.0%} intervals" for e in known.values()), "no intervals")
    rows: list[Sequence[str]] = [
        (name, interval(e), number(e and e["n"]), e["method"] if e else "–") for name, e in rates.items()
    ]
    page.add(
        "Rates",
        f"{ours} against {theirs}, each pair judged in both orders, with {level} over prompts. A judge that "
        "is blind to position prefers the answer shown first in half of them.",
        Table("rate | value [interval] | pairs | how", rows, "wnnw"),
        Dots("Rates", f"share of pairs, {level}", [dot(*item) for item in known.items()], [(0.5, "even")]),
    )
    low, high = map(number, result["bounds"])
    lengths = " and ".join(number(length, ".1f") for length in result["mean_lengths"])
    counts = ("pairs", "prompts", "wins", "ties", "losses", "failed", "identical")
    rows = [(name, number(result[name])) for name in counts]
    rows += [(f"orders that failed: {kind}", number(count)) for kind, count in result["failures"].items()]
    page.add(
        "Counts",
        f"The win rate would be {low} or {high} were every missing verdict one against, or one for, {ours}. "
        f"The answers have {lengths} characters on average; Cohen's κ of both orders is "
        f"{number(result['kappa'])}.",
        Table("of pairs | number", rows, "wn"),
    )
    return page


@dataclass(frozen=True)
class Judge:
    """Win rates by a judge model: pairs of answers compared in both orders, by the paper's seven criteria.

    Prints calls, tokens and cost before anything is asked. Interrupt at any time; the same command continues,
    and further prompts can be added.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    arms: tuple[str, str]
    """The arm of interest (A in the paper's Table 1), then what it is compared with (B)."""
    out: str
    """Folder for judgements.jsonl, winrate.json, report.html and the replies paid for."""
    settings: tyro.conf.OmitArgPrefixes[JudgeSettings]
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    level: float = 0.95
    """Of the intervals."""
    json: bool = False
    """One JSON object, instead of a table."""

    def run(self) -> int:
        from alignpro.estimation import winrate
        from alignpro.estimation.intervals import check_level
        from alignpro.llm.arms import judge as judge_judge

        check_level(self.level)
        rows = run_judge(self.file, self.arms, self.settings, self.out)
        found = winrate.win_rates(winrate.collect(rows), self.level)
        text = "\n".join([winrate.table(found), *(f"  {line}" for line in failed_replies(rows))])
        values = found.json()
        tell("winrate", values, text, self.json, self.out)
        keep.keep(
            report_of_judge(values, read_json(os.path.join(self.out, judge_judge.SETTINGS_FILE))),
            self.out,
        )
        return 0
