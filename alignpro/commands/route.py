"""`alignpro route`: an instruction for each prompt, picked by a router that reads it."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.options import DEFAULT_PROMPTER, EnvironmentSettings, PromptSettings, RunOptions
from alignpro.commands.shared import instruction_name, with_reward
from alignpro.files import write_json
from alignpro.llm.arms.settings import RouteSettings
from alignpro.report import keep
from alignpro.report.numbers import columns, interval, number, plain
from alignpro.report.page import Dots, Json, Page, Table, dot
from alignpro.runs import here, owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.estimation.intervals import Estimate
    from alignpro.llm.arms.route import Routed

SHOWN = 10
"""Instructions in the table of picks."""


@dataclass(frozen=True, kw_only=True)
class Route(RunOptions):
    """Teach a router to pick an instruction for each prompt, and measure what reading the prompt gains.

    Asks some prompts with every candidate, learns from the rewards which kind of prompt wants which, and
    measures the router, the best single instruction and none at all on prompts it did not learn from. What
    it makes, rewrite uses: alignpro rewrite FOLDER. Interrupt at any time; the same command continues.
    """

    out: str
    """Folder for the router, route.json, report.html, rewrites.jsonl (the held-out prompts, for rollout
    --rewrites-file), cells.jsonl (every reward) and the answers paid for."""
    settings: tyro.conf.OmitArgPrefixes[RouteSettings] = field(default_factory=RouteSettings)
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)

    common = (
        "out instructions-file reward target dataset prompts-file train-prompts eval-prompts answers "
        "answer-tokens single reader seed config"
    )
    examples = (
        (
            "some of the packaged instructions, for a reward of your own",
            "alignpro route --out runs/route --reward ./mine.py:score@0,1",
        ),
        (
            "your own instructions, on your own prompts",
            "alignpro route --out runs/mine --instructions-file asks.txt --prompts-file mine.csv "
            "--reward ease",
        ),
    )

    @owning("route")
    def run(self) -> int:
        from alignpro.commands.opening import (
            World,
            for_candidates,
            is_address,
            on_vllm,
            prompts_digest,
            prompts_of_candidates,
        )
        from alignpro.llm.arms import route
        from alignpro.llm.arms.instruct import FILE, Cells
        from alignpro.llm.models import catalogue, packages
        from alignpro.llm.models.devices import dtype_of
        from alignpro.llm.models.libraries import quiet

        settings, environment = self.settings, self.environment
        folder, sampling = Path(self.out), environment.sampling()
        candidates = route.candidates_of(settings.instructions, settings.single)
        world = World(environment)
        away = is_address(environment.target) or on_vllm(environment.target)
        reader = settings.reader or (DEFAULT_PROMPTER if away else environment.target)
        catalogue.check_name(reader)
        if (place := Path(reader).expanduser()).exists():  # to be found from another working folder, too
            reader = str(place.resolve())
        every = replace(settings, prompts=None)
        prompts, held = prompts_of_candidates(self.source, environment.target, every, world)
        table = prompts[: settings.prompts]
        route.check_sizes(table)

        # A larger table asks for what is not on file; all else makes other answers.
        record = {
            "candidates": prompts_digest(candidates),
            "prompts": prompts_digest(prompts),
            "seed": settings.seed,
            **environment.record(world.reward_name),
        }
        here(folder).contents |= world.contents()
        here(folder).begin(record, names=(FILE,))
        calls = len(candidates) * len(table) * settings.answers
        after = 3 * len(held) * settings.held_out_answers
        packages.note(
            f"{len(candidates)} candidates on {len(table)} prompts: {calls:,} answers of at most "
            f"{sampling.max_tokens} tokens, and at most {after:,} on {len(held)} others"
            + world.money(calls + after, sampling.max_tokens)
        )
        opened: list = []
        judge = world.reward(folder)
        open_target = for_candidates(world, candidates, [*table, *held], folder, opened)
        cells = Cells(folder, candidates, judge, sampling, settings.seed, open_target, world.refusals)
        by = route.Reader(reader, dtype_of(environment.dtype), dict(environment.chat_options() or {}))
        # A frozen model that is loaded reads, too.
        read = by.read(lambda: opened[0].target if opened else None)
        with quiet():
            result, saved, picks = route.find(cells, table, held, settings, by, read)
        for target in opened:
            packages.note(target.ledger.line())
        world.told(judge, folder)
        saved.save(folder)
        route.write_rewrites(folder / route.REWRITES, held, picks)
        say(text(result))
        write_json(folder / "route.json", plain(result))
        keep.keep(with_reward(page(result, {**record, **plain(settings)}), folder), folder)
        say(f"wrote {folder / 'route.json'}; for new prompts: alignpro rewrite {folder}")
        return 0


def finding(result: "Routed") -> str:
    """Say what to do, in a sentence."""
    from alignpro.estimation.intervals import NEGLIGIBLE

    single = instruction_name(result.single)
    if result.over_single is None:
        return (
            f"One for all: the router picks {single!r} for every held-out prompt. Reading the prompt added "
            "nothing that the table could show."
        )
    gain = result.over_single.gain
    said = f"earns {interval(gain)} over {single!r} for all, on {gain.n_clusters} held-out prompts"
    if gain.lo > 0:
        return f"Read the prompt: the router {said}."
    if gain.hi < NEGLIGIBLE * (result.high - result.low):
        return f"One for all: the router {said}; reading the prompt is not worth it."
    return f"Not decided: the router {said}; more of them (--eval-prompts), or a larger table, would tell."


def _means(result: "Routed") -> "dict[str, Estimate]":
    """Mean rewards on held-out prompts, of whatever was asked there."""
    found: dict[str, Estimate] = {}
    if (none := result.over_none or result.single_over_none) is not None:
        found["no instruction"] = none.base
    if result.single and (one := result.single_over_none) is not None:
        found[f"for all: {result.single}"] = one.mean
    if (router := result.over_single or result.over_none) is not None:
        found["the router"] = router.mean
    return found


def _gains(result: "Routed") -> "dict[str, Estimate]":
    found = {
        "the router over one for all": result.over_single,
        "the router over none": result.over_none,
        "one for all over none": result.single_over_none,
    }
    return {name: gain.gain for name, gain in found.items() if gain is not None}


def _table(result: "Routed") -> str:
    """Say what the table shows by itself, in a sentence."""
    return (
        f"{result.calls:,} answers: {result.prompts} prompts with each of {len(result.instructions)} "
        "candidates. There, by what was learned without the prompt that is judged, the router earns "
        f"{interval(result.foreseen.gain)} over one for all."
    )


def text(result: "Routed") -> str:
    rows = [("", "mean reward"), *((name, interval(e)) for name, e in _means(result).items())]
    gains = [("", "gain"), *((name, interval(e)) for name, e in _gains(result).items())]
    picks = ", ".join(f"{instruction_name(name)!r} ({n})" for name, n in result.picks[:SHOWN])
    more = f" and {len(result.picks) - SHOWN} more" if len(result.picks) > SHOWN else ""
    refused = f"\n{result.refused:,} answers were refused" if result.refused else ""
    return "\n".join(
        [
            columns(rows, "wn"),
            *([columns(gains, "wn")] if len(gains) > 1 else []),
            f"the router picks {picks}{more}",
            f"{_table(result)}{refused}",
            "",
            finding(result),
        ]
    )


def page(result: "Routed", record: Json) -> Page:
    """The router's gains and picks; `record` is how it was made."""
    made = Page("route", "An instruction for each prompt", finding(result), record)
    gains, means = _gains(result), _means(result)
    if result.over_single is not None:
        made.estimate("Gain of reading the prompt", result.over_single.gain)
    made.key("Answers of the table", number(result.calls), f"{result.prompts} prompts")
    axis = f"reward units, {result.level:.0%} intervals"
    rows = [(name, interval(e)) for name, e in [*means.items(), *gains.items()]]
    dots = [dot(name, e) for name, e in [*means.items(), *gains.items()]]
    about = f"{result.held_out} prompts that the router did not learn from, with fresh answers: "
    about += "that it was taught does not flatter it here."
    if rows:
        drawn = Dots("On held-out prompts", axis, dots, [(0.0, "no gain")])
        made.add("What it earns", about, Table(" | reward", rows, "wn"), drawn)
    best = "one instruction for all"
    if result.ridge is not None:
        best = f"a ridge of {number(result.ridge)} and rank {result.rank}"
    made.add(
        "What it learned from",
        f"{_table(result)} It reads a prompt by the middle layer of {result.reader}; of regressions, {best} "
        "did best on prompts left out.",
    )
    made.add(
        "What it picks",
        f"For {result.held_out} held-out prompts; rewrites.jsonl has each.",
        Table(
            ["instruction", "prompts"],
            [(instruction_name(name), number(n)) for name, n in result.picks[:SHOWN]],
            "tn",
        ),
    )
    return made
