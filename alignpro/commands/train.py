"""`alignpro train`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.commands.options import EnvironmentSettings, PromptSettings
from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.training.settings import PRESETS, TrainSettings
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from dataclasses import replace

from alignpro.commands.shared_llm import (
    _home,
    _how_read,
    _kept,
    _money,
    check_environment,
    check_prompter,
    is_address,
    open_target,
    user_prompts,
)
from alignpro.files import writable_folder
from alignpro.llm.models import configure, packages
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards import opening
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.training.checkpoints import check_reporters
from alignpro.llm.training.settings import (
    refuse_moved_optimum,
)
from alignpro.report.numbers import number
from alignpro.report.page import Curve, Curves, Json, Page, Table


def run_train(
    out: str,
    settings: TrainSettings,
    world: EnvironmentSettings,
    *,
    prompter: str,
    template: str | None = None,
    source: PromptSettings,
    train_prompts: int | None = None,
    report_to: Sequence[str],
    resume: bool,
) -> None:
    """Everything is checked before anything is loaded."""
    prompter = _home(prompter)
    refuse_moved_optimum(settings)
    check_reporters(report_to)
    folder = writable_folder(out)
    started = (folder / "settings.json").exists()
    if started and not resume:
        raise AlignProError(
            f"--out {folder}: holds a run already; continue it with --resume or choose another"
        )
    check_prompter(prompter, template)
    configure.check_dtype(settings.policy_dtype)
    answers, rlhf = world.sampling(), settings.task == "rlhf"
    # The oracle is its own target.
    opened, cost = check_environment(replace(world, target=prompter) if rlhf else world)
    prompts = user_prompts(source, prompter, n=train_prompts)

    from alignpro.llm.rewards.cached import CachedReward, keep_scores
    from alignpro.llm.training.open_ended import Environment, train

    rounds, each = settings.iterations, settings.prompts * settings.samples
    asked = 0 if rlhf else rounds * each * settings.responses
    line = f"{len(prompts)} prompts; {rounds} rounds of {settings.prompts} x {settings.samples} "
    line += "answers" if rlhf else f"rewrites, {asked} answers of at most {answers.max_tokens} tokens"
    line += f"; {rounds * settings.steps_per_round} {settings.algorithm} steps"
    if is_address(world.reward):
        line += f"; {asked or rounds * each} scores from an endpoint"
    packages.note(line + _money(cost, asked, answers.max_tokens))

    judge = keep_scores(opening.load_reward(world.reward), folder / "scores")
    target: Cached | None = None
    read: dict[str, Any] = {}
    if not rlhf:
        frozen = opened or open_target(world)
        read = _how_read(frozen)
        target = _kept(frozen, folder / "answers", cost)
    facts = {
        "prompter": prompter,
        "target_read": read,
        "chat_template_kwargs": world.chat_options() or {},
        "template": template,
        "target": world.target,
        "reward": opening.read_spec(world.reward).shown,
        "answers": asdict(answers),
    }
    base = Prompter.from_pretrained(
        prompter,
        template=template,
        dtype=settings.policy_dtype,
        chat_template_kwargs=world.chat_options(),
        merged=True,
    )
    environment = Environment(judge, target, answers, settings.responses, settings.seed)
    trained = train(
        base, environment, prompts, settings, folder, resume=resume, report_to=report_to, facts=facts
    )
    if target is not None:
        packages.note(target.ledger.line())
    if isinstance(judge, CachedReward):
        packages.note(judge.line())
    if not trained.metrics:  # of several processes the first one tells
        return
    first, last = trained.metrics[0], trained.metrics[-1]
    print(f"mean reward of a round: {first['score']:.4f} at first, {last['score']:.4f} at last")
    print(f"wrote {folder / 'prompter'}")
    keep.keep(report_of_train(trained.metrics, read_json(folder / "settings.json")), folder)


_PANELS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "reward units": (("reward", "score"), ("objective, reward − λ KL", "ppo/objective")),
    "KL to ρ_sft, nats": (("sampled", "ppo/kl_k1"), ("sampled", "kl")),
    "explained variance": (("critic", "ppo/explained_variance"),),
    "entropy, nats a token": (("policy", "entropy"),),
    "share clipped": (("ratios", "ppo/clip_fraction"), ("ratios", "clip_ratio/region_mean")),
    "tokens of an answer": (("mean", "completions/mean_length"),),
}
"""By panel of the learning curves: the curves, and the keys of metrics.jsonl that hold them, where any do."""
_TABLE_ROWS = 12


def report_of_train(metrics: Sequence[Json], record: Json) -> Page:
    """Of metrics.jsonl and settings.json."""

    def of(key: str) -> list[float | None]:
        return [line.get(key) for line in metrics]

    panels: list[tuple[str, list[Curve]]] = []
    columns: dict[str, str] = {}
    for axis, curves in _PANELS.items():
        there = [(name, key) for name, key in curves if any(value is not None for value in of(key))]
        columns |= {key: name if axis == "reward units" else axis for name, key in there}
        if there:
            bands = [[e and 2 * e for e in of(f"{key}_stderr")] for _, key in there]
            panels.append(
                (axis, [Curve(*c, b) for c, b in zip([(n, of(k)) for n, k in there], bands, strict=True)])
            )
    first, last = metrics[0], metrics[-1]
    task = record.get("settings", {}).get("task")
    start, end = number(first["score"]), number(last["score"])
    page = Page(
        "train",
        f"Training the {'RLHF oracle' if task == 'rlhf' else 'prompter'}",
        f"The mean reward of a round went from {start} to {end}, on the prompts that were trained on; "
        "alignpro rollout tells what it is on others.",
        record,
    )
    page.key("Mean reward of a round", end, f"at first {start}")
    for name, key in (("Objective", "ppo/objective"), ("KL, nats", "ppo/kl_k1"), ("KL, nats", "kl")):
        if key in columns:
            page.key(name, number(last.get(key)), f"at first {number(first.get(key))}")
    page.key("Optimizer steps", number(last["step"]), f"{len(metrics)} rounds")

    every = -(-len(metrics) // _TABLE_ROWS)
    kept = [line for i, line in enumerate(metrics) if i % every == 0 or line is last]
    rows = [(number(line["step"]), *(number(line.get(key)) for key in columns)) for line in kept]
    left_out = f" The table has one in {every}." if every > 1 else ""
    page.add(
        "Learning curves",
        f"One point for each of {len(metrics)} rounds; bands are ± 2 standard errors. A round's samples are "
        f"few, so that single points mean little.{left_out}",
        Table(["step", *columns.values()], rows, "w" + "n" * len(columns)),
        Curves([line["step"] for line in metrics], "optimizer steps", panels),
    )
    return page


def _fitting(metrics: Sequence[Json], unit: str, panels: Mapping[str, str]) -> tuple[str, Curves]:
    """How a loss fell: a sentence, and a curve for each key of metrics.jsonl."""
    there = [(axis, key) for axis, key in panels.items() if any(key in line for line in metrics)]
    curves = [(axis, [Curve(key, [line.get(key) for line in metrics])]) for axis, key in there]
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    said = f"On the batches learned from, the loss went from {number(first)} to {number(last)} {unit}."
    return said, Curves([line["step"] for line in metrics], "optimizer steps", curves)


@dataclass(frozen=True)
class Train:
    """Train a prompter (or, with --task rlhf, the RLHF oracle) on open-ended text.

    The default settings are faithful: their optimum is the paper's closed form. A setting that moves it is
    refused, and named, unless --allow-moved-optimum is given. Interrupt at any time; --resume continues.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl, report.html, the answers paid for, and prompter/, the trained
    one."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    preset: str = "faithful"
    """Named settings that the options start from: faithful, or paper (lr 1.41e-5, batch 128, adaptive KL)."""
    prompter: str = "smollm2-135m-instruct"
    """rho_sft: a packaged name, a local folder, a hub id, or a fine-tuned prompter's folder."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A fine-tuned
    prompter has its own. Default: rewrite."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    train_prompts: int | None = None
    """How many prompts of the data set's training split (or of the file), from the first. Default: all."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb, trackio."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        if self.preset not in PRESETS:
            raise AlignProError(f"--preset {self.preset}: choose from {', '.join(PRESETS)}")
        run_train(
            self.out,
            self.settings,
            self.environment,
            prompter=self.prompter,
            template=self.template,
            source=self.source,
            train_prompts=self.train_prompts,
            report_to=self.report_to,
            resume=self.resume,
        )
        return 0
