"""`alignpro train`: a prompter, or the RLHF oracle, on open-ended text."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.commands.options import EnvironmentSettings, PrompterOptions, PromptSettings, ReportedRun
from alignpro.commands.shared import with_reward
from alignpro.errors import AlignProError
from alignpro.files import writable_folder
from alignpro.llm.training.settings import PRESETS, TrainSettings, refuse_moved_optimum
from alignpro.report import keep
from alignpro.report.numbers import number
from alignpro.report.page import Curve, Curves, Page, Panel, Table

if TYPE_CHECKING:
    from alignpro.llm.targets.ledger import Cached
    from alignpro.llm.training.checkpoints import Trained


@dataclass(frozen=True, kw_only=True)
class Train(PrompterOptions, ReportedRun):
    """Train a prompter (or, with --task rlhf, the RLHF oracle) on open-ended text.

    The default settings are faithful: their optimum is the paper's closed form. A setting that moves it is
    refused, and named, unless --allow-moved-optimum is given. Interrupt at any time; --resume continues.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl, report.html, the answers paid for, and prompter/, the trained
    one."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    preset: str = "faithful"
    """Named settings that the others start from: faithful (the optimum is the paper's closed form) or paper
    (the authors' choices: learning rate 1.41e-5, batches of 128, a weight of the KL that adapts)."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    train_prompts: int | None = None
    """How many prompts of the data set's training split (or of the file) to learn from, from the first. Left
    out: all of them."""

    def run(self) -> int:
        from alignpro.commands.opening import World, trained_home, user_prompts
        from alignpro.llm.models import configure, packages
        from alignpro.llm.policies.prompter import check_prompter
        from alignpro.llm.training.settings import check_reporters

        if self.preset not in PRESETS:
            raise AlignProError(f"--preset {self.preset}: choose from {', '.join(PRESETS)}")
        settings, rlhf, prompter = self.settings, self.settings.task == "rlhf", trained_home(self.prompter)
        refuse_moved_optimum(settings)
        check_reporters(self.report_to)
        folder = writable_folder(self.out)
        if (folder / "settings.json").exists() and not self.resume:
            raise AlignProError(
                f"--out {folder}: holds a run already; continue it with --resume or choose another"
            )
        check_prompter(prompter, self.template)
        configure.check_dtype(settings.policy_dtype)
        environment, answers = self.environment, self.environment.sampling()
        # The oracle is its own target.
        world = World(replace(environment, target=prompter) if rlhf else environment)
        prompts = user_prompts(self.source, prompter, n=self.train_prompts, world=world)
        world.check_prompts(prompts)

        from alignpro.commands.opening import check_target_room, how_read
        from alignpro.llm.policies.prompter import Prompter
        from alignpro.llm.training.environment import Environment
        from alignpro.llm.training.open_ended import train

        rounds, each = settings.iterations, settings.prompts * settings.samples
        asked = 0 if rlhf else rounds * each * settings.responses
        line = f"{len(prompts)} prompts; {rounds} rounds of {settings.prompts} x {settings.samples} "
        line += "answers" if rlhf else f"rewrites, {asked} answers of at most {answers.max_tokens} tokens"
        line += f"; {rounds * settings.steps_per_round} {settings.algorithm} steps"
        packages.note(line + world.money(asked, answers.max_tokens, asked or rounds * each))

        judge = world.reward(folder)
        target: Cached | None = None
        read: dict[str, Any] = {}
        if not rlhf:
            frozen = world.target()
            check_target_room(frozen, prompts, answers.max_tokens)
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
        result = train(base, worth, prompts, settings, folder, **how)
        if target is not None:
            packages.note(target.ledger.line())
        if result.metrics:  # of several processes the first one tells
            world.told(judge, folder)
            print(text(result))
            keep.keep(with_reward(page(result), folder), folder)
        return 0


def text(result: "Trained") -> str:
    from alignpro.llm.training.checkpoints import PROMPTER_FOLDER

    first, last = result.metrics[0]["score"], result.metrics[-1]["score"]
    return (
        f"mean reward of a round: {first:.4f} at first, {last:.4f} at last\n"
        f"wrote {result.folder / PROMPTER_FOLDER}"
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
    "tokens of an answer": (("mean", "completions/mean_length"),),
}
"""By panel of the learning curves: the curves, and the keys of metrics.jsonl that hold them, where any do.
Those of the reward's parts, which add up to the reward, are known from the metrics."""
_PART = "reward/"
_TABLE_ROWS = 12


def page(result: "Trained") -> Page:
    """The learning curves, as a picture and as a table, with the settings."""
    metrics, record = result.metrics, result.record

    def of(key: str) -> list[float | None]:
        return [line.get(key) for line in metrics]

    panels: list[Panel] = []
    columns: dict[str, str] = {}
    keys = [key for key in dict.fromkeys(key for line in metrics for key in line) if key.startswith(_PART)]
    parts = {"parts, reward units": tuple((key.removeprefix(_PART), key) for key in keys)}
    for axis, curves in (_PANELS | parts).items():
        there = [(name, key) for name, key in curves if any(value is not None for value in of(key))]
        columns |= {key: name if axis.endswith("reward units") else axis for name, key in there}
        if there:
            bands = {key: [e and 2 * e for e in of(f"{key}_stderr")] for _, key in there}
            drawn = [Curve(name, of(key), bands[key]) for name, key in there]
            panels.append(Panel(axis, drawn, title=axis if axis in parts else ""))
    first, last = metrics[0], metrics[-1]
    task = record.get("settings", {}).get("task")
    start, end = number(first["score"]), number(last["score"])
    made = Page(
        "train",
        f"Training the {'RLHF oracle' if task == 'rlhf' else 'prompter'}",
        f"The mean reward of a round went from {start} to {end}, on the prompts that were trained on; "
        "alignpro rollout tells what it is on others.",
        record,
    )
    made.key("Mean reward of a round", end, f"at first {start}")
    for name, key in (("Objective", "ppo/objective"), ("KL, nats", "ppo/kl_k1"), ("KL, nats", "kl")):
        if key in columns:
            made.key(name, number(last.get(key)), f"at first {number(first.get(key))}")
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
    return made
