"""`alignpro demo --task`: a prompter trained on a task on which asking matters, before and after."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from alignpro.commands import compare
from alignpro.commands.options import EnvironmentSettings, MeasuredPrompts, PromptSettings
from alignpro.commands.rollout import Rollout
from alignpro.commands.train import Train
from alignpro.files import read_json_lines, write_json
from alignpro.report import keep
from alignpro.report.numbers import interval, number, plain
from alignpro.report.page import Curve, Curves, Page, Panel, Table
from alignpro.runs import TASK_FILE, here, owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.llm.arms.task import Task, TaskResult

RESULT = "report.json"
TRAINING, ROLLED = "training", "rollouts"
_MOST_ADDED, _DIGITS = 12, ".3f"


@owning("demo", file=TASK_FILE)
def run(name: str, out: str, *, quick: bool, resume: bool, seed: int, model: str | None) -> int:
    """Train, roll out, compare, and write the page into `out`, with a folder for each of the two runs."""
    from alignpro.llm.arms import task as tasks
    from alignpro.llm.models import catalogue, packages, recipes

    task = tasks.task_of(name, quick)
    task = replace(task, training=replace(task.training, seed=seed), rollout=replace(task.rollout, seed=seed))
    frozen = model or catalogue.RECIPES[task.prompter].base
    catalogue.check_name(frozen)
    folder, held = Path(out), here(out)
    record = plain({"task": name, "model": frozen, **asdict(task)})
    record.pop("minutes")
    held.begin(record, resume=resume, names=(RESULT, f"{TRAINING}/settings.json", f"{ROLLED}/settings.json"))
    packages.note(cost(name, task, not recipes.cached(task.prompter)))

    environment = EnvironmentSettings(
        target=frozen, reward=(task.reward,), answer_tokens=task.answer_tokens, dtype="float32"
    )
    training, rolled = folder / TRAINING, folder / ROLLED
    Train(
        out=str(training),
        resume=True,
        prompter=task.prompter,
        settings=task.training,
        environment=environment,
        source=PromptSettings(dataset=task.dataset),
    ).run()
    Rollout(
        out=str(rolled),
        settings=replace(task.rollout, trained=(str(training),)),
        environment=environment,
        source=MeasuredPrompts(dataset=task.dataset, prompts=task.held_out),
    ).run()
    lines = read_json_lines(training / "metrics.jsonl")
    result = tasks.result(name, task, rolled / "rollouts.jsonl", lines)
    write_json(folder / RESULT, plain(result))
    keep.keep(page(result, record), folder)
    say(text(result))
    return 0


def cost(name: str, task: "Task", untrained: bool) -> str:
    """Say what is asked for, before it is."""
    training, rollout, answers = task.training, task.rollout, task.answer_tokens
    asked = training.iterations * training.prompts * training.samples
    more = task.held_out * rollout.draws * rollout.answers * (len(rollout.arms) + 1)
    said = (
        f"{name}: {training.iterations} rounds of {training.prompts} x {training.samples} rewrites, {asked} "
        f"answers of at most {answers} tokens; then {more} answers at most to {task.held_out} held-out "
        f"prompts; about {task.minutes} minutes on two cores"
    )
    return f"{said}; {task.prompter} is trained first" if untrained else said


def text(result: "TaskResult") -> str:
    """The arms, what the prompter adds most, and the prompts before and after."""
    lines = [compare.text(result.comparison), ""]
    lines += [
        f"{a.after:.0%} add {a.text or 'nothing'!r} (before training, {a.before:.0%})"
        for a in result.added[:3]
    ]
    for e in result.examples:
        lines += ["", e.x, f"  {number(e.reward, _DIGITS)}  {_one(e.answer)}", e.rewrite]
        lines += [f"  {number(e.reward_after, _DIGITS)}  {_one(e.answer_after)}"]
    return "\n".join(lines)


def _one(text: str) -> str:
    return " ".join(text.split())


def page(result: "TaskResult", record: dict) -> Page:
    """Before and after; then what the prompter adds, how it learned, and the arms as compare has them."""
    task, found = result.task, result.comparison
    trained, base = found.against["trained"], found.baseline
    made = Page(
        "demo",
        f"A prompter trained on {result.name.replace('-', ' ')}",
        f"A frozen language model, {record['model']}, answers requests; the reward is the {task.measures}. A "
        "prompter may add a few words to each request, and was trained by PPO to earn more; the model itself "
        f"did not change. On {found.n_prompts} prompts that were not trained on, the trained prompter "
        f"{trained.finding} no prompter: {interval(found.mean['trained'], _DIGITS)} against "
        f"{interval(found.mean[base], _DIGITS)}, a gain of {interval(trained.mean, _DIGITS)}.",
        record,
    )
    made.estimate("Gain over no prompter", trained.mean, _DIGITS)
    made.estimate("Gain over the prompter it started from", result.over_start.mean, _DIGITS)
    made.estimate("Win rate against no prompter", trained.win_rate, _DIGITS)
    made.estimate("Change of the reward's variance", trained.variance, _DIGITS)
    rows = []
    for e in result.examples:
        rows.append(("before", e.x, e.answer, number(e.reward, _DIGITS)))
        rows.append(("after", e.rewrite, e.answer_after, number(e.reward_after, _DIGITS)))
    made.add(
        "Before and after",
        f"The first {len(result.examples)} held-out prompts, not the best: the model's first answer to "
        "the prompt itself, and its first answer to the trained prompter's first rewrite, with the reward of "
        f"each. Answers end after {task.answer_tokens} tokens.",
        Table("| asked | answer | reward", rows, "wttn"),
    )
    shown = result.added[:_MOST_ADDED]
    made.add(
        "What the prompter adds",
        f"Share of its rewrites of the held-out prompts that end in these words, before and after training: "
        f"the {len(shown)} most frequent of {len(result.added)}.",
        Table(
            "added | before | after",
            [(a.text or "(nothing)", f"{a.before:.1%}", f"{a.after:.1%}") for a in shown],
            "tnn",
        ),
    )
    steps = [line["step"] for line in result.metrics]
    panels = []
    for axis, key in (("reward units", "score"), ("KL to ρ_sft, nats", "ppo/kl_k1")):
        panels.append(Panel(axis, [Curve("a round's mean", [line.get(key) for line in result.metrics])]))
    made.add(
        "How it learned",
        f"One point for each of {len(steps)} rounds, on the prompts that were trained on.",
        figure=Curves(steps, "optimizer steps", panels),
    )
    made.sections += compare.page(found).sections
    return made
