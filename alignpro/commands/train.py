"""`alignpro train`: a prompter, or the RLHF oracle, on open-ended text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from alignpro.commands.options import EnvironmentSettings, PrompterOptions, PromptSettings, ReportedRun
from alignpro.commands.shared import with_reward
from alignpro.errors import AlignProError
from alignpro.llm.training.settings import OWN, EvaluationSettings, TrainSettings, refuse_moved_optimum
from alignpro.report import keep
from alignpro.report.numbers import number
from alignpro.report.page import Curve, Curves, Json, Page, Panel, Table
from alignpro.report.text import shorten
from alignpro.runs import here, owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.llm.arms.found import Example, Found, Used
    from alignpro.llm.targets.ledger import Cached
    from alignpro.llm.training.open_ended import TrainedPrompter


@dataclass(frozen=True, kw_only=True)
class Train(PrompterOptions, ReportedRun):
    """Train a prompter (or, with --policy rlhf, the RLHF oracle) on open-ended text.

    The default settings are faithful: their optimum is the paper's closed form. A setting that moves it is
    refused, and named, unless --allow-moved-optimum is given. Interrupt at any time; --resume continues.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl, rewrites.jsonl, report.html, the answers paid for, and
    prompter/, the trained one."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    preset: Literal["faithful", "paper"] = "faithful"
    """Settings that the others start from: those whose optimum is the paper's closed form, or the authors'.

    The authors' have a learning rate of 1.41e-5, batches of 128, and a weight of the KL that adapts."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    train_prompts: int | None = None
    """How many prompts to learn from, from the first of the data set's training split, or of the file. Left
    out: all."""
    evaluation: tyro.conf.OmitArgPrefixes[EvaluationSettings] = field(default_factory=EvaluationSettings)

    common = (
        "out prompter reward target dataset prompts-file train-prompts lam algorithm iterations "
        "prompts-per-round draws answers rewrite-tokens answer-tokens eval-every preset policy seed config "
        "resume"
    )
    examples = (
        (
            "shorter sentences: a packaged prompter learns by PPO on packaged prompts",
            "alignpro train --out runs/ease --prompter instructions-sft --reward ease",
        ),
        (
            "your own prompts and reward, the best of the evaluations on prompts held out",
            "alignpro train --out runs/mine --prompts-file mine.csv --reward rewards:score@0,1 "
            "--eval-every 8",
        ),
    )

    @owning("train")
    def run(self) -> int:
        from alignpro.commands.opening import World, divided_prompts, trained_home, user_prompts
        from alignpro.llm.models import devices, packages
        from alignpro.llm.policies.prompter import check_prompter
        from alignpro.llm.training.settings import check_reporters

        settings, rlhf, prompter = self.settings, self.settings.task == "rlhf", trained_home(self.prompter)
        refuse_moved_optimum(settings)
        check_reporters(self.report_to)
        run, folder = here(self.out), Path(self.out)
        run.check(self.resume, OWN)
        check_prompter(prompter, self.template)
        devices.check_dtype(settings.policy_dtype)
        settings = settings.here()
        environment, answers = self.environment, self.environment.sampling()
        # The oracle is its own target.
        world = World(replace(environment, target=prompter) if rlhf else environment)
        evaluation, held_out = self.evaluation, list[str]()
        try:
            if evaluation.eval_every is None:
                prompts = user_prompts(self.source, prompter, n=self.train_prompts, world=world)
            else:
                some = (self.train_prompts, evaluation.eval_prompts, world)
                prompts, held_out = divided_prompts(self.source, prompter, *some)
        except AlignProError as error:  # `prompts` is what other verbs call their number
            raise AlignProError(re.sub(r"^prompts (?=-?\d)", "train_prompts ", str(error))) from None
        world.check_prompts([*prompts, *held_out])
        if (distinct := len(set(prompts))) < settings.prompts:
            packages.note(f"each round takes all {distinct} prompts, as there are not {settings.prompts}")
            settings = replace(settings, prompts=distinct)

        from alignpro.commands.opening import check_target_room, how_read
        from alignpro.llm.arms.found import found
        from alignpro.llm.policies.prompter import Prompter
        from alignpro.llm.training.algorithms import check_processes
        from alignpro.llm.training.environment import Environment
        from alignpro.llm.training.evaluation import check_held_out
        from alignpro.llm.training.open_ended import train

        check_processes(settings)
        rounds, each = settings.iterations, settings.prompts * settings.samples
        asked = 0 if rlhf else rounds * each * settings.responses
        line = f"{len(prompts)} prompts; {rounds} rounds of {settings.prompts} x {settings.samples} "
        line += "answers" if rlhf else f"rewrites, {asked} answers of at most {answers.max_tokens} tokens"
        line += f"; {rounds * settings.steps_per_round} {settings.algorithm} steps"
        scored = asked or rounds * each
        if evaluation.eval_every is not None:
            check_held_out(held_out, prompts)
            scored += (more := evaluation.answers(len(held_out), rounds, settings.responses, rlhf))
            line += f"; {len(evaluation.rounds(rounds))} evaluations on {len(held_out)} held-out prompts, "
            line += f"{more} {'' if rlhf else 'more '}answers at most"
            asked += 0 if rlhf else more
        packages.note(line + world.money(asked, answers.max_tokens, scored))

        run.contents |= world.contents(prompter=prompter)
        judge = world.reward(folder)
        target: Cached | None = None
        read: dict[str, Any] = {}
        if not rlhf:
            frozen = world.target()
            check_target_room(frozen, [*prompts, *held_out], answers.max_tokens)
            read, target = how_read(frozen), world.kept(frozen, folder)
        facts = {
            "prompter": prompter,
            "target_read": read,
            "template": self.template,
            **environment.record(world.reward_name),
        }
        facts["answers"] = facts.pop("sampling")
        base = Prompter.from_pretrained(
            prompter,
            template=self.template,
            dtype=settings.policy_dtype,
            chat_template_kwargs=environment.chat_options(),
            merged=True,
        )
        worth = Environment(judge, target, answers, settings.responses, settings.seed, world.refusals)
        how: dict[str, Any] = {"resume": self.resume, "report_to": self.report_to, "facts": facts}
        how |= {"held_out": held_out, "evaluation": evaluation}
        result = train(base, worth, prompts, settings, folder, **how)
        if target is not None:
            packages.note(target.ledger.line())
        if result.metrics:  # of several processes the first one tells
            world.told(judge, folder)
            say(text(result))
            keep.keep(with_reward(page(found(result)), folder), folder)
        return 0


def text(result: "TrainedPrompter") -> str:
    from alignpro.llm.training.checkpoints import PROMPTER_FOLDER

    first, last = result.metrics[0]["score"], result.metrics[-1]["score"]
    lines = [f"mean reward of a round: {first:.4f} at first, {last:.4f} at last"]
    if result.evaluations:
        kept = _kept(result)
        lines.append(
            f"objective on held-out prompts: {kept['objective']:.4f} {_after(kept['round'])}, the highest of "
            f"{len(result.evaluations)} evaluations (and so too high on average); before training "
            f"{result.evaluations[0]['objective']:.4f}, at last {result.evaluations[-1]['objective']:.4f}"
        )
        lines.append(f"{_stopped(result)}the prompter that is kept is that {_after(kept['round'])}")
    return "\n".join([*lines, f"wrote {result.folder / PROMPTER_FOLDER}"])


def _kept(result: "TrainedPrompter") -> Json:
    """The evaluation whose prompter was kept."""
    best = result.record["kept"]["round"]
    return next(line for line in result.evaluations if line["round"] == best)


def _after(rounds: int) -> str:
    return f"after round {rounds}" if rounds else "before the first round"


def _stopped(result: "TrainedPrompter") -> str:
    """A clause on an early stop, to begin a sentence with; empty where there was none."""
    kept = result.record["kept"]
    if (after := kept.get("stopped_after")) is None:
        return ""
    patience = result.record["evaluation"]["patience"]
    return (
        f"stopped after round {after} of {kept['rounds']}: {patience} evaluations in a row were no better "
        f"than that {_after(kept['round'])}, so training is finished; "
    )


_PANELS: dict[str, tuple[tuple[str, str], ...]] = {
    "reward units": (("reward", "score"), ("objective, reward − λ KL", "ppo/objective")),
    "parts, reward units": (),
    "spread between members": (("standard deviation", "reward_spread"),),
    "share of answers refused": (("refused", "refused_share"),),
    "KL to ρ_sft, nats": (("sampled", "ppo/kl_k1"), ("sampled", "kl")),
    "explained variance": (("critic", "ppo/explained_variance"),),
    "entropy, nats a token": (("policy", "entropy"),),
    "share clipped": (("ratios", "ppo/clip_fraction"), ("ratios", "clip_ratio/region_mean")),
    "tokens of a rewrite": (("mean", "completions/mean_length"),),
}
"""By panel of the learning curves: the curves, and the keys of metrics.jsonl that hold them, where any do.
Those of the reward's parts, which add up to the reward, are known from the metrics; the oracle's rewrites are
answers."""
_PART = "reward/"
_TABLE_ROWS = 12


def page(found: "Found") -> Page:
    """The learning curves, the evaluations and what was found, as pictures and tables, with the settings."""
    result = found.trained
    metrics, record = result.metrics, result.record
    oracle = record.get("settings", {}).get("task") == "rlhf"

    def of(key: str) -> list[float | None]:
        return [line.get(key) for line in metrics]

    panels: list[Panel] = []
    columns: dict[str, str] = {}
    keys = [key for key in dict.fromkeys(key for line in metrics for key in line) if key.startswith(_PART)]
    parts = {"parts, reward units": tuple((key.removeprefix(_PART), key) for key in keys)}
    for axis, curves in (_PANELS | parts).items():
        axis = axis.replace("a rewrite", "an answer") if oracle else axis
        there = [(name, key) for name, key in curves if any(value is not None for value in of(key))]
        columns |= {key: name if axis.endswith("reward units") else axis for name, key in there}
        if there:
            bands = {key: [e and 2 * e for e in of(f"{key}_stderr")] for _, key in there}
            drawn = [Curve(name, of(key), bands[key]) for name, key in there]
            panels.append(Panel(axis, drawn, title=axis if axis in parts else ""))
    first, last = metrics[0], metrics[-1]
    start, end = number(first["score"]), number(last["score"])
    made = Page(
        "train",
        f"Training the {'RLHF oracle' if oracle else 'prompter'}",
        f"The mean reward of a round went from {start} to {end}, on the prompts that were trained on; "
        "alignpro rollout tells what it is on others.",
        record,
    )
    made.key("Mean reward of a round", end, f"at first {start}")
    kl, sampled = (
        f"KL to {'π_F' if oracle else 'ρ_sft'}, nats",
        "; from samples, so that it may come out below 0",
    )
    for name, key in (("Objective", "ppo/objective"), (kl, "ppo/kl_k1"), (kl, "kl")):
        if key in columns:
            note = f"at first {number(first.get(key))}" + (sampled if name == kl else "")
            made.key(name, number(last.get(key)), note)
    made.key("Optimizer steps", number(last["step"]), f"{len(metrics)} rounds")

    every = -(-len(metrics) // _TABLE_ROWS)
    kept = [line for i, line in enumerate(metrics) if i % every == 0 or line is last]
    rows = [(number(line["step"]), *(number(line.get(key)) for key in columns)) for line in kept]
    left_out = f" The table has one in {every}." if every > 1 else ""
    made.add(
        "Learning curves",
        f"One point for each of {len(metrics)} rounds; bands are ± 2 standard errors. A round's samples are "
        f"few, so that single points mean little.{left_out}",
        Table(["step", *columns.values()], rows, "w" + "n" * len(columns)),
        Curves([line["step"] for line in metrics], "optimizer steps", panels),
    )
    if result.evaluations:
        _add_evaluations(made, found)
    if found.examples:
        _add_examples(made, found)
    if found.bands:
        _add_strategies(made, found)
    return made


_MOST_CURVES = 6
_TERMS = {"objective": "objective, reward − λ KL", "reward": "mean reward", "kl": "KL to ρ_sft, nats"}


def _add_evaluations(made: Page, found: "Found") -> None:
    """Results of training on held-out prompts, beside ρ_sft and resampling."""
    result, lines, beside = found.trained, found.trained.evaluations, found.resampling
    kept, first = _kept(result), lines[0]
    made.key("Kept", _after(kept["round"]), f"of {result.record['kept']['rounds']} rounds")
    made.key("Held-out objective", number(kept["objective"]), f"before training {number(first['objective'])}")

    def cells(of: Json) -> list[str]:
        return [f"{number(of[name])} ± {number(of[f'{name}_stderr'], '.2g')}" for name in _TERMS]

    rows = [
        (
            "ρ_sft, before the first round" if line is first else f"trained, round {line['round']}",
            *cells(line),
            "" if line is first else f"{number(line['gain'], '+.3g')} ± {number(line['gain_stderr'], '.2g')}",
        )
        for line in lines
    ]
    marks: dict[str, list[tuple[float, str]]] = {name: [(first[name], "ρ_sft")] for name in _TERMS}
    said = ""
    if beside is not None:
        numbers = [getattr(beside, name) for name in _TERMS]
        shown = [f"{number(value)} ± {number(error, '.2g')}" for value, error in numbers]
        rows.append((f"ρ* by resampling {beside.draws} draws", *shown, ""))
        for name, (value, _) in zip(_TERMS, numbers, strict=True):
            marks[name].append((value, "ρ* by resampling"))
        said = (
            f"\n\nρ* by resampling takes {beside.draws} rewrites of ρ_sft of each prompt and chooses among "
            "them with weights exp(R/λ), without training; other answers judge it than gave the weights. "
            f"Its KL, an upper bound, is at most log {beside.draws} = {beside.most_kl:.2f} nats, which "
            "training may exceed: its objective is on average a lower bound of what the best prompter "
            "attains."
        )
    at = next(i for i, line in enumerate(lines) if line is kept)
    steps = [line["round"] for line in lines]
    panels = []
    for name, axis in _TERMS.items():
        bands = [2 * line[f"{name}_stderr"] for line in lines]
        panels.append(Panel(axis, [Curve("trained", [e[name] for e in lines], bands)], marks[name]))
    stopped = _stopped(result)
    made.add(
        "Held-out prompts",
        f"{stopped[:1].upper()}{stopped[1:]}{'t' if stopped else 'T'}he prompter that was kept is that "
        f"{_after(kept['round'])}: of {len(lines)} evaluations on {len(first['objectives'])} prompts that "
        "were never learned from, the one with the highest objective. A later one replaced the best before "
        "it where its mean gain on the same prompts and draws, the last column, was positive; λ is the fixed "
        "one of the settings. ± is one standard error over prompts.\n\nThe number of the chosen evaluation "
        "is too high on average, since it was chosen for being high; alignpro rollout on test prompts tells "
        "what the prompter is worth."
        f"{said}",
        Table(["", *_TERMS.values(), "gain over the best before"], rows, "wnnnn", best={(at, 0)}),
        Curves(steps, "rounds", panels),
    )
    made.add(
        "The same held-out prompts, before and after",
        f"The first draw of the first {len(first['examples'])} held-out prompts, by the same random numbers, "
        "before the first round and at the round that was kept.",
        _examples(found.before_after),
    )


def _examples(examples: "Sequence[Example]") -> Table:
    oracle = all(e.rewrite is None for e in examples)
    rows = [
        (number(e.round), e.prompt, *([] if oracle else [e.rewrite or "–"]), e.answer, number(e.reward))
        for e in examples
    ]
    names = ["round", "prompt", *([] if oracle else ["rewrite"]), "first answer", "reward"]
    return Table(names, rows, "nttn" if oracle else "ntttn")


def _add_examples(made: Page, found: "Found") -> None:
    rounds = list(dict.fromkeys(e.round for e in found.examples))
    made.add(
        "What it found",
        "The first draw of the first prompts of the first, the middle and the last round, on training "
        f"prompts, good or bad (rounds {', '.join(map(str, rounds))}). All draws are in rewrites.jsonl.",
        _examples(found.examples),
    )


def _add_strategies(made: Page, found: "Found") -> None:
    """The commonest strategies by their shares over time."""
    heading = "What it adds, over time"
    if not found.strategies:
        made.add(heading, "Nothing that rewrites of two prompts have in common.")
        return

    def name(used: "Used") -> str:
        said = used.text or "(nothing)"
        return said if used.added else f"rewritten: {said}"

    bands = [f"round {a}" if a == b else f"rounds {a}–{b}" for a, b in found.bands]
    rows = [
        (
            "all others" if used is found.rest else name(used),
            number(used.reward),
            f"{used.share:.1%}",
            *(f"{share:.0%}" for share in used.shares),
        )
        for used in [*found.strategies, *([found.rest] if found.rest else [])]
    ]
    drawn = found.strategies[:_MOST_CURVES]
    curves = [Curve(shorten(name(used), 28), [100 * share for share in used.shares]) for used in drawn]
    made.add(
        heading,
        f"The {len(found.strategies)} commonest of what rewrites of two prompts or more add to them (or, of "
        "rewrites that do not contain the prompt, of the three words they begin with), with their mean "
        "reward where they were drawn, their share of all draws, and their share of the draws of each band "
        "of rounds. Prompts and luck are in these means: a high one is no proof that the words did it.",
        Table(
            ["what is added", "mean reward", "of all draws", *bands],
            rows,
            "t" + "n" * (2 + len(bands)),
        ),
        Curves(
            [b for _, b in found.bands],
            "rounds",
            [Panel("share, %", curves, title="Shares of a band's draws")],
        ),
    )
