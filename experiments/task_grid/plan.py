"""The jobs of the tasks: each is one verb of `alignpro` with one file of options.

Everything that is drawn for all tasks is drawn once: the reference rollouts are the same texts whatever
rewards them, and all runs keep their answers in one folder (`--answers-folder`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from paper_grid.plan import Job

from alignpro.files import read_json, read_json_lines, write_text
from alignpro.llm.arms import instruct, route
from alignpro.llm.arms.rollout import prompt_id
from alignpro.llm.data import public
from alignpro.llm.data.packaged import instructions
from alignpro.llm.data.split import split_of
from alignpro.llm.training.checkpoints import PROMPTER_FOLDER
from task_grid import kinds

BY_KIND = "task_grid.kinds:"
"""Begins the names of rewards by the kind of requests."""
TASKS: Mapping[str, str] = {
    "reading ease": "ease",
    "sentiment": "sentiment",
    "brevity": "brevity",
    "format": "list",
    "preference": "minilm-bt",
    "brief or plain": f"{BY_KIND}brief_or_plain",
    "list or plain": f"{BY_KIND}list_or_plain",
    "brief, plain for a child": f"{BY_KIND}child_or_brief",
    "list, plain for a child": f"{BY_KIND}child_or_list",
}
"""By name: the reward. The format is verifiable: 1 for an answer that is a list of two items or more. The
last four want another answer of one kind of requests than of the others (`kinds`)."""
BY_WHO = ("brief, plain for a child", "list, plain for a child")
"""Tasks whose requests say who asks."""
ASKED = "asked.jsonl"
"""The file, in the folder of all jobs, of the requests that do."""
PROMPTERS: Mapping[str, Mapping[str, Any]] = {
    "instructions-sft": {"prompter": "instructions-sft"},
    "append": {"prompter": "smollm2-135m-instruct", "template": "append", "rewrite_tokens": 16},
}
"""Reference prompters that foresight is tried with. The first one is trained on."""
READING = ("brevity", "preference", *BY_WHO)
"""Tasks of the preset `reading`: two where one instruction does for all prompts, two where reading pays."""
FIXED, ROUTER, TOLD = "fixed", "router", "told"
"""The arms of the best fixed instruction, of the one that a router picks for the prompt, and of the best for
the prompt's kind, which is told."""
PAIRS = "pairs.jsonl"
"""Prompts with what a router picks for them."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    iterations: int = 20
    prompts: int = 16
    samples: int = 2
    rlhf_iterations: int = 10
    rlhf_learning_rate: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    lam: float = 0.02
    held_out: int = 60
    draws: int = 2
    foreseen_draws: int = 8
    """Rewrites of each training prompt from which it is foreseen what training earns."""
    answers: int = 2
    """Answers to each rewrite, where foresight and the choice of an instruction rest on them."""
    arm_answers: int = 2
    """Answers to each rewrite of the arms that are compared."""
    reference_draws: int = 4
    """Rewrites of each held-out prompt from which ρ* is resampled at any λ; 0 for no such thing."""
    answer_tokens: int = 40
    rewrite_tokens: int = 16
    target: str = "smollm2-135m-instruct"
    prompters: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: PROMPTERS)
    tasks: Mapping[str, str] = field(default_factory=lambda: TASKS)
    source: Mapping[str, Any] = field(default_factory=lambda: {"dataset": "instructions"})
    """Of the prompts of all tasks but those in `BY_WHO`."""
    training: Mapping[str, Any] = field(
        default_factory=lambda: {
            "epochs": 2,
            "minibatches": 1,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "lora_layers": 0.34,
            "policy_dtype": "auto",
        }
    )
    """Further options of train."""
    race_calls: int = 1280
    """Answers of a race of instructions: the bank, each of whose candidates is tried, takes 721 at least."""
    race: Mapping[str, Any] = field(default_factory=dict)
    """Further options of instruct."""
    table_prompts: int = 46
    """Training prompts from which a router learns, each asked once with every one of its candidates."""
    route: Mapping[str, Any] = field(default_factory=dict)
    """Further options of route."""
    rloo: bool = True
    """Whether RLOO trains, too."""
    taught: tuple[str, ...] = ()
    """Tasks whose router also teaches a prompter, from which PPO begins anew."""
    teaching: Mapping[str, Any] = field(
        default_factory=lambda: {"epochs": 4, "learning_rate": 1e-3, "lora_layers": 1.0}
    )
    """Further options of sft on a router's picks. An adapter on the upper layers alone learns how often each
    instruction is picked, and not for which prompts."""
    keeping: Mapping[str, Any] = field(
        default_factory=lambda: {
            "learning_rate": 5e-4,
            "lora_layers": 1.0,
            "group_baseline": True,
            "iterations": 10,
        }
    )
    """Options of train from there, which keep what was read: those of `training` forget it, and so do more
    rounds."""

    @property
    def calls(self) -> int:
        """Answers of the frozen model that one training asks for, and so each of its rivals."""
        return self.iterations * self.prompts * self.samples

    @property
    def proposals(self) -> int:
        """Rewrites of each held-out prompt to choose among: as many answers as one training asks for."""
        return max(1, round(self.calls / self.held_out))


def presets() -> dict[str, Size]:
    """Sizes by name."""
    whole = Size()
    first = next(iter(PROMPTERS))
    return {
        "all": whole,
        "reading": replace(
            whole,
            tasks={task: TASKS[task] for task in READING},
            taught=BY_WHO,
            prompters={first: PROMPTERS[first]},
            rloo=False,
            prompts=8,
            samples=4,
            reference_draws=0,
            race_calls=1024,
            training={**whole.training, "learning_rate": 2e-3},
            table_prompts=96,
        ),
    }


@dataclass(frozen=True)
class Late(Job):
    """A job some of whose options are others' results."""

    def resolved(self, out: Path) -> dict[str, Any]:
        """Its options, with the best instruction that was found (none, where none won), the router's, and
        the prompter that was taught by that."""
        found = super().resolved(out)
        if "taught" in found:
            found["prompter"] = str(out / found.pop("taught") / PROMPTER_FOLDER)
        given = ((ROUTER, "routed"), (TOLD, "told"))
        files = [f"{arm}={out / found.pop(name) / route.REWRITES}" for arm, name in given if name in found]
        if files:
            found["rewrites_file"] = files
        if "instructed" in found:
            winner = read_json(out / found.pop("instructed") / "instruct.json")["winner"]
            found |= {"instruction": [f"{FIXED}={winner}"]} if winner else {}
        return found


@dataclass(frozen=True)
class Picks(Job):
    """What a router picks for every prompt but those of the split `test`, as pairs to learn from."""

    def act(self, out: Path) -> bool:
        """Write them."""
        o = self.options
        prompts = public.prompts(
            o["dataset"], folder=o.get("data_folder"), fits=lambda x: split_of(x) != "test"
        )
        rewrites = route.load(out / o["router"]).rewrites(prompts)
        pairs = zip(prompts, rewrites, strict=True)
        lines = (json.dumps({"prompt": x, "rewrite": y}, ensure_ascii=False) + "\n" for x, y in pairs)
        write_text(out / self.name / PAIRS, "".join(lines))
        return True


@dataclass(frozen=True)
class Told(Job):
    """Each held-out prompt with the instruction that earned most on its kind in the router's table: what a
    router could learn there that read the kinds without fail."""

    def act(self, out: Path) -> bool:
        """Write them."""
        o = self.options
        table = [row for row in read_json_lines(out / o["router"] / instruct.FILE) if row["kind"] == "table"]
        names = table[0]["candidates"]
        values = np.concatenate([np.mean(row["rewards"], 2) for row in table], 1)
        texts = {prompt_id(x): x for x in public.prompts(o["dataset"], folder=o.get("data_folder"))}
        asked = [texts[name] for row in table for name in row["prompts"]]
        held = [row["x"] for row in read_json_lines(out / o["router"] / route.REWRITES)]
        kind = getattr(kinds, o["reward"].removeprefix(BY_KIND)).kind
        known, wanted = kind.of(asked), kind.of(held)
        best = {k: names[values[:, known == k].mean(1).argmax()] for k in np.unique(known)}
        route.write_rewrites(out / self.name / route.REWRITES, held, [best[k] for k in wanted])
        return True


def slug(name: str) -> str:
    """`name` for a folder."""
    return name.replace(",", "").replace(" ", "-")


def place(task: str) -> str:
    """The folder, in those of the reference rollouts, of the ones with a task's prompts."""
    return "who" if task in BY_WHO else ""


def write_asked(size: Size, out: Path) -> None:
    """Write the requests that say who asks, where a task needs them."""
    if any(map(place, size.tasks)):
        said = kinds.asked(instructions())
        write_text(out / ASKED, "".join(json.dumps({"prompt": x}) + "\n" for x in said))


def jobs(size: Size, out: Path) -> list[Job]:
    """All of them, so that each comes after what it needs."""
    return list(_jobs(size, out))


def _jobs(size: Size, out: Path) -> Iterator[Job]:
    shared = {
        "target": size.target,
        "answer_tokens": size.answer_tokens,
        "answers_folder": str(out / "answers"),
        "dtype": "auto",
    }
    sources = {"": size.source, "who": {"dataset": str(out / ASKED)}}
    # Whatever rewards them, the texts are the same; `results.rewarded` scores them for every task.
    first = {place(task): reward for task, reward in reversed(size.tasks.items())}
    for where, reward in sorted(first.items()):
        drawn = {**sources[where], **shared, "reward": reward, "arms": ["none", "sft"]}
        drawn |= {"answers": size.answers, "prompts": size.held_out}
        # Requests that say who asks are for the prompter alone that is trained.
        for name, prompter in list(size.prompters.items())[: 1 if where else None]:
            options = {**drawn, **prompter}
            before, after = (str(Path(kind, where, name)) for kind in ("foreseen", "resampled"))
            yield Job(before, "rollout", {**options, "split": "train", "draws": size.foreseen_draws})
            if size.reference_draws:
                yield Job(after, "rollout", {**options, "split": "test", "draws": size.reference_draws})
    start = next(iter(size.prompters.values()))
    for task, reward in size.tasks.items():
        here, world = slug(task), {**sources[place(task)], **shared, "reward": reward}
        race = {**world, "budget": size.race_calls, "held_out": size.held_out}
        race |= {"held_out_answers": size.answers, **size.race}
        yield Job(f"{here}/instruct", "instruct", race)
        # The same prompts with the same candidates for every task: the answers are asked for once.
        taught = {**world, "prompts": size.table_prompts, "held_out": size.held_out}
        taught |= {"held_out_answers": size.answers, **size.route}
        yield Job(f"{here}/route", "route", taught)
        shape = {"iterations": size.iterations, "prompts": size.prompts, "samples": size.samples}
        training = {**world, **_kept(start), **shape, "lam": size.lam, "resume": True}
        training |= {"max_tokens": size.rewrite_tokens, **size.training}
        trained = [f"{here}/ppo-{seed}" for seed in size.seeds]
        for name, seed in zip(trained, size.seeds, strict=True):
            yield Job(name, "train", {**training, "seed": seed})
        others = [f"{here}/rloo-0"] if size.rloo else []
        for name in others:
            yield Job(name, "train", {**training, "algorithm": "rloo", "seed": 0})
        oracle = {k: v for k, v in training.items() if k not in ("prompter", "template", "answers_folder")}
        oracle |= {"task": "rlhf", "prompter": size.target, "max_tokens": size.answer_tokens}
        oracle |= {"iterations": size.rlhf_iterations, "learning_rate": size.rlhf_learning_rate, "seed": 0}
        yield Job(f"{here}/rlhf-0", "train", oracle)
        measured = {
            **world,
            "prompter": start["prompter"],  # trained prompters have its template
            "split": "test",
            "prompts": size.held_out,
            "draws": size.draws,
            "answers": size.arm_answers,
            "rewrite_tokens": size.rewrite_tokens,
            "arms": ["none", "sft", "star", "best_of_n"],
            "trained": [*trained, *(f"rloo={name}" for name in others)],
            "rlhf": [f"{here}/rlhf-0"],
            "lam": size.lam,
            "proposals": size.proposals,
            "instructed": f"{here}/instruct",
            "routed": f"{here}/route",
        }
        found: tuple[str, ...] = (f"{here}/instruct", f"{here}/route")
        if reward.startswith(BY_KIND):
            measured["told"] = f"{here}/told"
            told = {**sources[place(task)], "reward": reward, "router": found[1]}
            yield Told(measured["told"], "told", told, found[1:])
            found += (measured["told"],)
        yield Late(f"{here}/rollout", "rollout", measured, (*found, *trained, *others, f"{here}/rlhf-0"))
        if task not in size.taught:
            continue
        # What the router reads, a prompter learns by imitation; PPO goes on from there.
        picks, teaching, learner = (f"{here}/{name}" for name in ("picks", "teach", "sft"))
        yield Picks(picks, "picks", {**sources[place(task)], "router": found[1]}, found[1:2])
        learned = {**_kept(start), **size.teaching, "rewrite_tokens": size.rewrite_tokens}
        # `sft` wants a folder in which nothing is, not even a job's options.
        learned |= {"pairs": str(out / picks / PAIRS), "out": str(out / learner), "resume": True}
        yield Job(teaching, "sft", learned, (picks,))
        again = [f"{here}/taught-{seed}" for seed in size.seeds]
        begun = {name: v for name, v in training.items() if name not in ("prompter", "template")}
        for name, seed in zip(again, size.seeds, strict=True):
            yield Late(name, "train", {**begun, **size.keeping, "taught": learner, "seed": seed}, (teaching,))
        same = {name: v for name, v in measured.items() if name not in ("rlhf", "proposals", "prompter")}
        same |= {"taught": learner, "trained": again, "arms": ["none", "sft"]}
        yield Late(f"{here}/rollout-taught", "rollout", same, (*found, teaching, *again))


def _kept(prompter: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in prompter.items() if name != "rewrite_tokens"}


def asks(job: Job) -> int:
    """Answers that a job asks for at most, those on file included."""
    o = job.options
    if job.verb in ("picks", "told", "sft"):
        return 0
    if job.verb == "route":
        table = o["prompts"] * len(route.candidates_of(o.get("instructions"))) * o.get("answers", 1)
        return table + 3 * o["held_out"] * o["held_out_answers"]
    if job.verb == "instruct":
        return o["budget"] + 2 * o["held_out"] * o["held_out_answers"]
    if job.verb == "train":
        return o["iterations"] * o["prompts"] * o["samples"]
    each = o["draws"] * o["answers"]
    arms = sum(len(o.get(name, ())) for name in ("arms", "trained", "rlhf", "instruction"))
    arms += sum(name in o for name in ("instructed", "routed", "told"))
    return o["prompts"] * (arms * each + o.get("proposals", 0))


def words(job: Job) -> str:
    """A job on a line."""
    return f"{job.name:<28} {job.verb:<9} {asks(job):>6,} answers"


def recorded(size: Size) -> dict[str, Any]:
    """The sizes as JSON values."""
    return json.loads(json.dumps(vars(size)))
