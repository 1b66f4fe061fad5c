"""`alignpro reward-model`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import tyro

from alignpro.llm.training.settings import (
    RewardSettings,
)
from alignpro.report import keep

if TYPE_CHECKING:
    pass

import shlex
from pathlib import Path

from alignpro.commands.train import _fitting
from alignpro.files import read_json_lines
from alignpro.llm.data.own import read_pairs
from alignpro.llm.models import packages
from alignpro.llm.training.reward import METRICS_FILE, split_pairs, train_reward
from alignpro.report import numbers
from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import Dots, Json, Page, Table, dot, some


def run_reward_model(
    base: str,
    pairs: str,
    out: str,
    settings: RewardSettings,
    *,
    template: str | None,
    device: str,
    resume: bool,
) -> None:
    """`alignpro reward-model`: says what it will do, trains, prints how good the reward is and its name."""
    read = read_pairs(pairs)
    split = split_pairs(read)
    steps = math.ceil(settings.epochs * math.ceil(len(split["train"]) / settings.batch_size))
    sizes = ", ".join(f"{len(found)} {part}" for part, found in split.items())
    how = f"adapter of rank {settings.lora_rank}" if settings.lora_rank else "all weights"
    packages.note(
        f"{len(read)} pairs of {len({p.prompt for p in read})} prompts ({sizes}); {steps} steps of "
        f"{settings.batch_size} pairs, {how}, samples of at most {settings.max_tokens} tokens"
    )
    trained = train_reward(read, base, out, settings, template=template, device=device, resume=resume)
    facts = trained.reward.facts
    keep.keep(report_of_reward_model(read_json_lines(Path(out) / METRICS_FILE), facts), out)

    for part in ("validation", "test"):
        if found := facts.get(f"{part}_accuracy"):
            print(
                f"{part}: accuracy {numbers.interval(found, '.3f')} (95%, {found['prompts']} prompts), loss "
                f"{facts[f'{part}_loss']:.4f} nats (of a coin: {math.log(2):.4f})"
            )
    length = numbers.interval(facts["test_accuracy_of_longer_wins"], ".3f")
    print(f"test, by length alone: accuracy {length}")
    print(f"wrote {out}: train with --reward {shlex.quote(out)} (bounds {facts['bounds']}, so in [0, 1])")


def report_of_reward_model(metrics: Sequence[Json], found: Json) -> Page:
    """Of metrics.jsonl and reward.json."""
    parts = [part for part in ("train", "validation", "test") if f"{part}_accuracy" in found]
    test, longer = found["test_accuracy"], found["test_accuracy_of_longer_wins"]
    page = Page(
        "reward-model",
        "A reward learned from preferences",
        f"On pairs never seen it prefers the chosen answer in a share of {interval(test, '.3f')}; preferring "
        f"the longer one, in {interval(longer, '.3f')}.",
        some(found, "settings base template max_tokens pairs prompts truncated bounds loss"),
    )
    page.key("Accuracy, test", number(test["value"], ".3f"), f"{limits(test)}; {test['prompts']} prompts")
    page.key("By length alone", number(longer["value"], ".3f"), limits(longer))
    page.key("Loss, test", number(found["test_loss"], ".3f"), f"nats; of a coin {math.log(2):.3f}")
    learned = sum(n for name, n in found["pairs"].items() if name.endswith(" train"))
    page.key("Pairs learned from", number(learned), f"{metrics[-1]['step']} optimizer steps")
    rows = [
        (part, interval(e, ".3f"), number(e["prompts"]), number(found[f"{part}_loss"], ".4f"))
        for part, e in ((part, found[f"{part}_accuracy"]) for part in parts)
    ]
    rows.append(("test, by length", interval(longer, ".3f"), number(longer["prompts"]), "–"))
    dots = [dot(part, found[f"{part}_accuracy"], "the reward") for part in parts]
    dots.append(dot("test", longer, "the longer answer"))
    page.add(
        "How good it is",
        "The share of pairs in which the chosen answer has the larger reward, averaged within prompts first; "
        "95% intervals over prompts. Pairs of train were learned from.",
        Table("split | accuracy | prompts | loss, nats", rows, "wnnn"),
        Dots("Pairwise accuracy", "share of pairs, 95% intervals", dots, [(0.5, "a coin")]),
    )
    panels = {"nats": "loss", "share of pairs": "accuracy", "r(x, chosen) − r(x, rejected), raw": "margin"}
    said, curves = _fitting(metrics, "nats", panels)
    page.add("Learning", said, None, curves)
    return page


@dataclass(frozen=True)
class RewardModel:
    """Train a reward model on preference pairs by eq. (1), Bradley-Terry, and say how good it is.

    The pairs are split by prompt: 70% to learn from, 15% to tune on, 15% to measure on. Interrupt at any
    time; --resume continues. The result's folder goes to train --reward, as it is.
    """

    out: str
    """Folder for the reward model (safetensors), reward.json and metrics.jsonl."""
    pairs: str
    """JSON lines, objects with the strings prompt, chosen and rejected."""
    settings: tyro.conf.OmitArgPrefixes[RewardSettings] = field(default_factory=RewardSettings)
    base: str = "smollm2-135m-instruct"
    """What is trained: a packaged name, a local folder or a hub id of a language model or reward model."""
    template: str | None = None
    """How a sample is written: a text with {prompt} and {response}. Default: the model's chat template."""
    device: str = "auto"
    """auto, cpu or cuda."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        run_reward_model(
            self.base,
            self.pairs,
            self.out,
            self.settings,
            template=self.template,
            device=self.device,
            resume=self.resume,
        )
        return 0
