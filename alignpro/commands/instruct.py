"""`alignpro instruct`: the best of a list of instructions, and what it is worth."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.options import EnvironmentSettings, PromptSettings, RunOptions
from alignpro.commands.shared import add_at_least, at_least, instruction_name, with_reward
from alignpro.files import write_json
from alignpro.llm.arms.settings import InstructSettings
from alignpro.report import keep
from alignpro.report.numbers import columns, interval, number, plain
from alignpro.report.page import Curve, Curves, Dots, Json, Page, Panel, Table, dot
from alignpro.runs import here, owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.llm.arms.instruct import Candidate, Instructed

HEAD = ("mean reward", "behind the winner", "prompts", "left the race (answers so far)")
"""Columns of a candidate, after its text."""
SHOWN = 10
"""Candidates in the tables."""
_CURVES, _DOTS = 5, 25
"""Candidates whose course is drawn, and whose mean is."""


@dataclass(frozen=True, kw_only=True)
class Instruct(RunOptions):
    """Find the best of a list of instructions for all prompts, and measure what it gains.

    Races the candidates on the same prompts: the worse half drops out again and again, and whatever is
    certainly not the best leaves at once. Then asks the winner, and no instruction, on prompts that the race
    did not use. Interrupt at any time; the same command continues.
    """

    out: str
    """Folder for instruct.json, report.html, cells.jsonl (every reward) and the answers paid for."""
    settings: tyro.conf.OmitArgPrefixes[InstructSettings] = field(default_factory=InstructSettings)
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)

    common = (
        "out instructions-file reward target dataset prompts-file train-prompts eval-prompts budget answers "
        "answer-tokens level seed config"
    )
    examples = (
        (
            "the packaged instructions, for a packaged reward",
            "alignpro instruct --out runs/instruct --reward ease --budget 2000",
        ),
        (
            "your own, on your own prompts",
            "alignpro instruct --out runs/mine --instructions-file asks.txt --prompts-file mine.csv "
            "--reward ease",
        ),
    )

    @owning("instruct")
    def run(self) -> int:
        from alignpro.commands.opening import World, for_candidates, prompts_digest, prompts_of_candidates
        from alignpro.llm.arms import instruct
        from alignpro.llm.models import packages
        from alignpro.llm.models.libraries import quiet

        settings, environment, source = self.settings, self.environment, self.source
        folder, sampling = Path(self.out), environment.sampling()
        candidates = instruct.read_instructions(settings.instructions)
        budget = instruct.budget_of(settings, candidates)
        world = World(environment)
        raced, held = prompts_of_candidates(source, environment.target, settings, world)

        # Another budget or level asks for what is not on file; all else makes other answers.
        record = {
            "candidates": prompts_digest(candidates),
            "prompts": prompts_digest(raced),
            "seed": settings.seed,
            **environment.record(world.reward_name),
        }
        here(folder).contents |= world.contents()
        here(folder).begin(record, names=(instruct.FILE,))
        after = 2 * len(held) * settings.held_out_answers
        packages.note(
            f"{len(candidates)} candidates on up to {len(raced)} prompts: at most {budget:,} answers of at "
            f"most {sampling.max_tokens} tokens, and {after:,} to the winner on {len(held)} others"
            + world.money(budget + after, sampling.max_tokens)
        )

        opened: list = []
        judge = world.reward(folder)
        open_target = for_candidates(world, candidates, [*raced, *held], folder, opened)
        cells = instruct.Cells(
            folder, candidates, judge, sampling, settings.seed, open_target, world.refusals
        )
        with quiet():
            result = instruct.find(cells, raced, held, settings)
        for target in opened:
            packages.note(target.ledger.line())
        world.told(judge, folder)
        say(text(result))
        write_json(folder / "instruct.json", plain(result))
        made = page(result, {**record, **plain(settings), "budget": budget})
        keep.keep(with_reward(made, folder), folder)
        say(f"wrote {folder / 'instruct.json'}")
        return 0


def _names(result: "Instructed") -> list[str]:
    return [instruction_name(candidate.instruction) for candidate in result.candidates]


def _fate(candidate: "Candidate") -> str:
    """How a candidate left the race."""
    if candidate.left is None:
        return "won"
    return f"{'not the best, for certain' if candidate.ruled_out else 'trailing'}, after {candidate.left:,}"


def _row(candidate: "Candidate") -> tuple[str, str, str, str, str]:
    mean, behind = interval(candidate.mean), number(candidate.behind)
    prompts = number(candidate.mean.n_clusters)
    return instruction_name(candidate.instruction), mean, behind, prompts, _fate(candidate)


def _certainty(result: "Instructed") -> str:
    """How sure the race is of its winner, in a sentence."""
    n, every, sure = result.contenders, len(result.candidates), f"{result.level:.0%}"
    if n == 1:
        return f"It is certainly ({sure}) the best of the {every}."
    return (
        f"Certainly ({sure}) not the best: {every - n} of the {every}. The other {n - 1} dropped out because "
        "they trailed, which is no proof; a larger --budget proves more."
    )


def _worth(result: "Instructed") -> str:
    """The gain of the winner, in a sentence."""
    found = result.held_out
    if found is None:
        return "No instruction at all did best: leave the prompts as they are."
    return (
        f"On {found.gain.n_clusters} other prompts it earns {number(found.mean.value)}, against "
        f"{number(found.base.value)} without: a gain of {interval(found.gain)} at {result.level:.0%}."
    )


def _effort(result: "Instructed") -> str:
    return (
        f"{result.calls:,} answers on {result.prompts} prompts; every candidate on as many prompts as the "
        f"winner would have taken {result.exhaustive:,}."
    )


def text(result: "Instructed") -> str:
    rows = [("", *HEAD), *map(_row, result.candidates[:SHOWN])]
    refused = f"\n{result.refused:,} answers were refused" if result.refused else ""
    return "\n".join(
        [
            columns(rows, "wwnnw"),
            f"{_effort(result)}{refused}",
            "",
            f"best: {instruction_name(result.winner)}",
            _certainty(result),
            _worth(result),
            at_least(result.guaranteed, _names(result)),
        ]
    )


def page(result: "Instructed", record: Json) -> Page:
    """The race, its best candidates, and what the winner gains; `record` is how it was run."""
    made = Page("instruct", "The best instruction", f"{_worth(result)} {_certainty(result)}", record)
    axis = f"reward units, {result.level:.0%} intervals"
    if (found := result.held_out) is not None:
        made.estimate("Gain on other prompts", found.gain)
    made.key("Answers of the race", number(result.calls), f"of at most {result.budget:,}")
    made.key("Not ruled out", number(result.contenders), f"of {len(result.candidates)} candidates")
    made.add(
        "The instruction", "To be added to the end of every prompt:", quoted=instruction_name(result.winner)
    )
    if found is not None:
        rows = {"with the instruction": found.mean, "without": found.base, "gain": found.gain}
        made.add(
            "What it gains",
            f"{found.answers} fresh answers to each of {found.gain.n_clusters} prompts that the race did not "
            "use, with and without the instruction: that it was chosen does not flatter it here.",
            Table(" | mean reward", [(name, interval(e)) for name, e in rows.items()], "wn"),
            Dots("On held-out prompts", axis, [dot(name, e) for name, e in rows.items()], [(0.0, "no gain")]),
        )
    about = f"The mean reward over all prompts like the {result.prompts} of the race, from these alone."
    add_at_least(made, result.guaranteed, _names(result), about)
    steps = [calls for calls, _ in result.track]
    drawn = [*range(min(_CURVES, len(result.candidates)))]
    drawn += [i for i, c in enumerate(result.candidates) if not c.instruction and i not in drawn]
    courses = [
        Curve(instruction_name(result.candidates[i].instruction), [means.get(i) for _, means in result.track])
        for i in drawn
    ]
    still = Curve("in the race", [len(means) for _, means in result.track])
    made.add(
        "The race",
        f"{_effort(result)} All that are in the race at a time were asked on the same prompts; a line ends "
        "where its candidate dropped out.",
        figure=Curves(
            steps,
            "answers so far",
            [
                Panel("mean reward so far", courses, title="The last to leave"),
                Panel("candidates", [still], title="Candidates in the race"),
            ],
        ),
    )
    best = result.candidates[:SHOWN]
    some = result.candidates[:_DOTS]
    made.add(
        "The candidates",
        f"The last {len(best)} in the race, and in the figure {len(some)} of {len(result.candidates)}, with "
        f"the mean rewards that the race saw; intervals cover jointly at {result.level:.0%}, whenever the "
        "race ended. How far a candidate is behind the winner is on the same prompts, and flatters the "
        "winner somewhat, since it was chosen by that.",
        Table(["instruction", *HEAD], [_row(c) for c in best], "tnnnw"),
        Dots("Mean reward in the race", axis, [dot(instruction_name(c.instruction), c.mean) for c in some]),
    )
    return made
