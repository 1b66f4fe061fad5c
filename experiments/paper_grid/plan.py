"""From a preset, a YAML file, to cells and jobs.

A cell is one bar of the paper's Figure 2: a prompter, a frozen model, a data set and a configuration. A job
is one verb of `alignpro` with one file of options, which anyone can run by hand: `alignpro train --config
<job>/config.yaml`. Cells share jobs: the RLHF policy of a frozen model serves every prompter's cell.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from alignpro import typed
from alignpro.commands import main, trusted
from alignpro.commands.flags import renamed_in
from alignpro.commands.main import VERBS
from alignpro.errors import AlignProError
from alignpro.files import write_json, write_text
from alignpro.llm.data import public, subset
from alignpro.llm.data.split import SPLITS, split_of
from alignpro.llm.training.settings import PRESETS as TRAINING_PRESETS
from alignpro.llm.training.settings import TrainSettings

PRESETS = Path(__file__).parent / "presets"
CONFIGURATIONS = {
    "no-fine-tuning": "the frozen model answers the prompt as it is",
    "align-pro": "a prompter trained by PPO stands before the frozen model",
    "rlhf": "the frozen model itself is trained by PPO: the oracle",
}
"""The paper's three."""
CONFIG = "config.yaml"
HELD_OUT = "held_out.jsonl"
TRAINING = "training.jsonl"

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A grid. Every field is a key of the YAML file; options are those of the verbs' --help."""

    name: str
    prompters: Mapping[str, Options]
    """By name: prompter and template, options of train."""
    frozen: Mapping[str, str | Options]
    """By name: the frozen model, an option target, or several options of it: target, target_model, …. One at
    an address has no oracle, since its weights are out of reach."""
    datasets: Mapping[str, Mapping[str, str]]
    """By name: dataset, and data_folder where the hub is out of reach."""
    environment: Options
    """Of all: the reward, how the frozen model answers, dtype and batch size."""
    align_pro: Options
    """Of train, for the prompter."""
    rlhf: Options
    """Of train, for the oracle, where they differ from those of align_pro."""
    rollout: Options
    """Of rollout: draws, answers."""
    unseen: Mapping[str, str | Options] = field(default_factory=dict)
    """Targets that no prompter was trained with, by name; a frozen model of the grid is unseen by the
    prompters of the others."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of training."""
    baseline_seeds: tuple[int, ...] = (0,)
    """Of RLOO, at the same calls of the frozen model."""
    training_prompts: int | None = None
    """Of each data set, at most. Default: all."""
    held_out_prompts: int = 100
    """Of each data set, which never meet training."""
    held_out_splits: tuple[str, ...] = ("test",)
    """Where they are taken from."""
    longest_prompt: int = 1000
    """Characters."""
    judge: Options | None = None
    """Of judge; without it there are no win rates."""
    machine: str = "cpu-core"
    """A row of `cost.MACHINES`."""

    def __post_init__(self) -> None:
        for name in ("prompters", "frozen", "datasets"):
            if not getattr(self, name):
                raise AlignProError(f"preset {self.name}: {name} is empty; name at least one")
        for name in ("held_out_prompts", "longest_prompt", "training_prompts"):
            if (most := getattr(self, name)) is not None and most < 1:
                raise AlignProError(f"preset {self.name}: {name} {most}: give at least 1")
        needed: list[tuple[str, Options, tuple[str, ...]]] = [
            ("environment", self.environment, ("reward", "answer_tokens", "batch_size")),
            *((f"prompters {name}", said, ("prompter",)) for name, said in self.prompters.items()),
            *((f"datasets {name}", said, ("dataset",)) for name, said in self.datasets.items()),
            *((f"targets {n}", target(m), ("target",)) for n, m in {**self.frozen, **self.unseen}.items()),
            ("align_pro", self.align_pro, ("lam", "iterations", "prompts", "samples", "max_tokens")),
            ("judge", self.judge or {"judge": ""}, ("judge",)),
        ]
        for part, options, names in needed:
            for name in names:
                if name not in options or options[name] is None:
                    raise AlignProError(f"preset {self.name}: {part} lacks {name}; give it")
        settings_of(self.align_pro, f"preset {self.name}: align_pro")
        if not self.seeds:
            raise AlignProError(f"preset {self.name}: seeds is empty; give at least one")
        for split in self.held_out_splits:
            if split not in SPLITS or split == "train":
                raise AlignProError(f"held_out_splits {split!r}: choose from validation, test")
        names = [*self.prompters, *self.frozen, *self.datasets, *self.unseen]
        if clash := [n for n in set(map(slug, names)) if n in ("", "rlhf")]:
            raise AlignProError(f"preset {self.name}: {clash[0]!r} is no name; choose another")


def settings_of(options: Options, where: str) -> TrainSettings:
    """The settings of a training with these options, those of its preset behind them.

    Raises:
        AlignProError: they are none; it begins with `where`.
    """
    name = options.get("preset", "faithful")
    if not isinstance(name, str) or name not in TRAINING_PRESETS:
        raise AlignProError(f"{where} preset {name!r}: choose from {', '.join(TRAINING_PRESETS)}")
    chosen = {**TRAINING_PRESETS[name], **options}
    known = {each.name for each in fields(TrainSettings)}
    return typed.made(TrainSettings, {n: value for n, value in chosen.items() if n in known}, where)


def load(name: str) -> Preset:
    """A preset by name or file.

    Raises:
        AlignProError: there is none, or its file is no preset.
    """
    known = {path.stem: path for path in PRESETS.glob("*.yaml")}
    path = known.get(name, Path(name))
    if not path.exists():
        raise AlignProError(f"--preset {name}: choose from {', '.join(known)}, or name a YAML file")
    said = typed.read_yaml(path, "--preset")
    # Here as in `TrainSettings`, by which costs are reckoned; jobs are written with their flags' names.
    own = {flag: name for name, flag in TrainSettings.flags.items()}
    for part in {"align_pro", "rlhf"} & set(said):
        if isinstance(said[part], dict):
            said[part] = {own.get(name, name): value for name, value in said[part].items()}
    if isinstance(said.get("environment"), dict):  # jobs are given the reward outright, and do not check it
        own = {str(name).replace("_", "-"): value for name, value in said["environment"].items()}
        found = trusted.checked(str(path), own, ())
        said["environment"] = {name: found[str(name).replace("_", "-")] for name in said["environment"]}
    return typed.made(Preset, {"name": path.stem, **said}, f"--preset {name}")


def target(model: str | Options) -> dict[str, Any]:
    """The options of a frozen or unseen model."""
    return {"target": model} if isinstance(model, str) else dict(model)


def at_address(model: str | Options) -> bool:
    """Whether it is asked over HTTP, and is loaded by no worker."""
    return str(target(model)["target"]).startswith(("http://", "https://"))


def slug(name: str) -> str:
    """`name` for a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


@dataclass(frozen=True)
class Cell:
    """One bar of the paper's Figure 2."""

    prompter: str
    frozen: str
    dataset: str
    configuration: str

    def __str__(self) -> str:
        return "/".join(map(slug, (self.prompter, self.frozen, self.dataset, self.configuration)))


@dataclass(frozen=True)
class Job:
    """One verb with its options, relative to the grid's folder.

    Attributes:
        name: its folder there.
        verb: train, rollout or judge, say; prompts is of the grid itself.
        options: what its config.yaml holds.
        needs: names of the jobs whose results it takes.
        argument: judge's file.
    """

    name: str
    verb: str
    options: Options
    needs: tuple[str, ...] = ()
    argument: str = ""

    def resolved(self, out: Path) -> dict[str, Any]:
        """Its options with names and paths as the verb takes them."""
        at = {"prompts_file", "trained", "rlhf", "answers_folder"}

        def place(value: str) -> str:
            name, equals, path = value.rpartition("=")
            return f"{name}{equals}{out / path}"

        found: dict[str, Any] = {"out": str(out / self.name)}
        for name, value in self.options.items():
            if name in at:
                value = [place(v) for v in value] if isinstance(value, list) else place(value)
            found[name] = value
        return as_flags(self.verb, found)

    def act(self, out: Path) -> bool:
        """Do what no verb of `alignpro` does; False, and nothing is done, where a verb does this job."""
        if self.verb == "prompts":
            select_prompts(self, out)
        return self.verb == "prompts"


def as_flags(verb: str, options: Options) -> dict[str, Any]:
    """Options by their names on the command line, where some have those of Python's settings, or old ones."""
    names = renamed_in(VERBS[verb]) if verb in VERBS else {}
    return {names.get(n.replace("_", "-"), n).replace("-", "_"): value for n, value in options.items()}


def check(jobs: Sequence[Job]) -> None:
    """Refuse jobs whose options their verbs would refuse.

    Raises:
        AlignProError: so; it names the first.
    """
    seen: set[str] = set()
    for job in jobs:
        # Jobs of one kind differ in names, of models, data and folders, and in seeds.
        like = {name: value for name, value in job.options.items() if name not in _NAMES}
        kind = json.dumps([job.verb, sorted(job.options), like], sort_keys=True)
        if job.verb != "prompts" and kind not in seen:
            seen.add(kind)
            _check(job.verb, json.dumps(job.resolved(Path("out"))), job.argument, f"job {job.name}")


_NAMES = ("prompts_file", "trained", "seed", "prompter", "target", "rlhf")


@functools.lru_cache(maxsize=128)
def _check(verb: str, options: str, argument: str, where: str) -> None:
    main.check(verb, json.loads(options), where, *filter(None, [argument]))


def cells(preset: Preset) -> list[Cell]:
    """In the paper's order: architectures, then data sets, then configurations."""
    return [
        Cell(p, f, d, c)
        for f in preset.frozen
        for p in preset.prompters
        for d in preset.datasets
        for c in CONFIGURATIONS
        if not (c == "rlhf" and at_address(preset.frozen[f]))
    ]


def combination(prompter: str, frozen: str, dataset: str) -> str:
    """The part of a job's name that an architecture and a data set share."""
    return "/".join(map(slug, (frozen, dataset, prompter)))


def jobs(preset: Preset) -> list[Job]:
    """All of them, so that each comes after what it needs."""
    return list({job.name: job for job in _jobs(preset)}.values())


def chosen(jobs: list[Job], only: str) -> list[Job]:
    """The jobs whose name holds `only`, and those that they need.

    Raises:
        AlignProError: there is none.
    """
    by_name = {job.name: job for job in jobs}
    wanted = {name for name in by_name if only in name}
    if not wanted:
        raise AlignProError(f"--only {only}: no job's name holds it; --dry-run lists them")
    while more := {need for name in wanted for need in by_name[name].needs} - wanted:
        wanted |= more
    return [job for job in jobs if job.name in wanted]


def _jobs(preset: Preset) -> Iterator[Job]:
    for d, options in preset.datasets.items():
        yield Job(f"prompts/{slug(d)}", "prompts", {**options, **_selection(preset)})
    for d in preset.datasets:
        for f in preset.frozen:
            for p in preset.prompters:
                yield from _of_combination(preset, p, f, d)


def _selection(preset: Preset) -> dict[str, Any]:
    names = ("training_prompts", "held_out_prompts", "held_out_splits", "longest_prompt")
    return {name: plain(getattr(preset, name)) for name in names}


def plain(value: Any) -> Any:
    """`value` as YAML reads it back."""
    return list(value) if isinstance(value, tuple) else value


def _of_combination(preset: Preset, p: str, f: str, d: str) -> Iterator[Job]:
    data, here = f"prompts/{slug(d)}", combination(p, f, d)
    environment = {**preset.environment, **target(preset.frozen[f])}
    training = {**environment, "prompts_file": f"{data}/{TRAINING}", "resume": True}
    rewriting = {**training, **preset.prompters[p], **preset.align_pro}
    trained, rloo, policies = [], [], []
    for seed in preset.seeds:
        name = f"{here}/align-pro-{seed}"
        yield Job(name, "train", {**rewriting, "seed": seed}, (data,))
        trained.append(name)
    for seed in () if at_address(preset.frozen[f]) else preset.seeds:
        name = f"{slug(f)}/{slug(d)}/rlhf-{seed}"
        oracle = {**training, **preset.align_pro, **preset.rlhf, "task": "rlhf"}
        oracle["prompter"] = environment["target"]
        yield Job(name, "train", {**oracle, "seed": seed}, (data,))
        policies.append(name)
    for seed in preset.baseline_seeds:
        name = f"{here}/rloo-{seed}"
        settings = {k: v for k, v in rewriting.items() if k not in _PPO_ONLY and k != "preset"}
        if settings["samples"] < 2:  # RLOO compares rewrites of one prompt
            settings |= {"samples": 4, "prompts": settings["prompts"] // 4}
        yield Job(name, "train", {**settings, "algorithm": "rloo", "seed": seed}, (data,))
        rloo.append(name)

    calls = preset.align_pro["iterations"] * preset.align_pro["prompts"] * preset.align_pro["samples"]
    drawn: dict[str, Any] = {**preset.rollout, "prompts_file": f"{data}/{HELD_OUT}"}
    drawn["rewrite_tokens"] = preset.align_pro["max_tokens"]
    yield Job(
        f"{here}/rollout",
        "rollout",
        {
            **environment,
            **drawn,
            "arms": ["none", "sft", "star", "best_of_n"],
            "trained": [*trained, *(f"rloo={name}" for name in rloo)],
            **({"rlhf": policies} if policies else {}),
            "lam": preset.align_pro["lam"],
            # As many answers as one training asked for, spread over the held-out prompts.
            "proposals": max(1, round(calls / preset.held_out_prompts)),
        },
        (data, *trained, *rloo, *policies),
    )
    others = {name: model for name, model in preset.frozen.items() if name != f} | dict(preset.unseen)
    for name, model in others.items():
        options = {**preset.environment, **target(model), **drawn}
        options |= {"arms": ["none", "sft"], "trained": trained}
        yield Job(f"{here}/transfer/{slug(name)}", "rollout", options, (data, *trained))
    if preset.judge is not None:
        options = {**preset.judge, "arms": ["trained", "none"]}
        file = f"{here}/rollout/rollouts.jsonl"
        yield Job(f"{here}/judge", "judge", options, (f"{here}/rollout",), file)


_PPO_ONLY = (
    "critic_learning_rate",
    "gae_lambda",
    "value_clip_range",
    "vf_coef",
    "whiten_advantages",
    "gamma",
    "kl_estimator",
    "whiten_rewards",
    "target_kl",
    "kl_horizon",
)


def jobs_of(preset: Preset, cell: Cell) -> list[Job]:
    """Those that a cell's numbers come from."""
    here = combination(cell.prompter, cell.frozen, cell.dataset)
    training = {
        "no-fine-tuning": "",
        "align-pro": f"{here}/align-pro-",
        "rlhf": f"{slug(cell.frozen)}/{slug(cell.dataset)}/rlhf-",
    }[cell.configuration]
    wanted = {f"prompts/{slug(cell.dataset)}", f"{here}/rollout"}
    if cell.configuration == "align-pro":
        wanted.add(f"{here}/judge")
    return [job for job in jobs(preset) if job.name in wanted or (training and job.name.startswith(training))]


def write_config(job: Job, out: Path) -> Path:
    """The job's config.yaml."""
    folder = out / job.name
    folder.mkdir(parents=True, exist_ok=True)
    head = f"# alignpro {job.verb} --config {CONFIG}" if job.verb in VERBS else f"# {job.verb}"
    text = yaml.safe_dump(json.loads(json.dumps(job.resolved(out))), sort_keys=False, allow_unicode=True)
    write_text(folder / CONFIG, f"{head}\n{text}")
    return folder / CONFIG


def select_prompts(job: Job, out: Path) -> None:
    """Do a job of kind prompts: the two files of a data set, which share no prompt.

    Raises:
        AlignProError: the data set cannot be had, or has too few.
    """
    o = job.options
    short = subset.shorter(characters=o["longest_prompt"])

    def of(splits: tuple[str, ...]) -> list[str]:
        def fits(x: str) -> bool:
            return split_of(x) in splits and short(x)

        return public.prompts(o["dataset"], folder=o.get("data_folder"), fits=fits)

    training, held_out = of(("train",)), of(tuple(o["held_out_splits"]))
    if len(held_out) < o["held_out_prompts"]:
        raise AlignProError(
            f"held_out_prompts {o['held_out_prompts']}: dataset {o['dataset']} has {len(held_out)} of at "
            f"most {o['longest_prompt']} characters; ask for no more, or allow longer ones"
        )
    training = training[: o["training_prompts"]]
    held_out = held_out[: o["held_out_prompts"]]
    for name, texts in ((TRAINING, training), (HELD_OUT, held_out)):
        lines = (json.dumps({"prompt": x}, ensure_ascii=False) + "\n" for x in texts)
        write_text(out / job.name / name, "".join(lines))
    write_json(out / job.name / "counts.json", {"training": len(training), "held_out": len(held_out)})
