"""`alignpro reward-model`: a reward learned from preferences."""

import math
import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import tyro

from alignpro.commands.options import ResumedRun
from alignpro.commands.shared import fell
from alignpro.llm.training.pair_settings import RewardSettings
from alignpro.report import keep
from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import Dots, Page, Table, dot, some
from alignpro.runs import owning

if TYPE_CHECKING:
    from alignpro.llm.training.reward import TrainedReward

_COIN = math.log(2)
"""The loss of a coin, in nats."""


@dataclass(frozen=True, kw_only=True)
class RewardModel(ResumedRun):
    """Train a reward model on preference pairs by eq. (1), Bradley-Terry, and say how good it is.

    The pairs are split by prompt: 70% to learn from, 15% to tune on, 15% to measure on. Interrupt at any
    time; --resume continues. The result's folder goes to train --reward, as it is.
    """

    out: str
    """Folder for the reward model (safetensors), reward.json, metrics.jsonl and report.html."""
    pairs: str
    """File of preferences: JSON lines, objects with the strings prompt, chosen and rejected."""
    settings: tyro.conf.OmitArgPrefixes[RewardSettings] = field(default_factory=RewardSettings)
    base: str = "smollm2-135m-instruct"
    """Model that is trained: a packaged model's name, or a local folder or Hugging Face hub id of a language
    model or reward model."""
    sample_template: str | None = None
    """How a prompt and an answer are written as one text: a text with {prompt} and {response} in it. Left
    out: the model's chat template."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on: cuda is a GPU, and auto one where there is one."""

    renamed: ClassVar = {"template": "sample-template"}
    common = (
        "out pairs base epochs learning-rate pairs-per-step sample-tokens lora-rank device seed config resume"
    )
    examples = (
        ("from preferences of your own", "alignpro reward-model --pairs pairs.jsonl --out runs/reward"),
        (
            "all weights of a small model",
            "alignpro reward-model --pairs pairs.jsonl --lora-rank 0 --learning-rate 1e-5 --out runs/whole",
        ),
    )

    @owning("reward-model")
    def run(self) -> int:
        from alignpro.llm.data.own import read_pairs
        from alignpro.llm.models import packages
        from alignpro.llm.training.reward import split_pairs, train_reward

        settings, read = self.settings, read_pairs(self.pairs)
        split = split_pairs(read)
        steps = math.ceil(settings.epochs * math.ceil(len(split["train"]) / settings.batch_size))
        sizes = ", ".join(f"{len(found)} {part}" for part, found in split.items())
        how = f"adapter of rank {settings.lora_rank}" if settings.lora_rank else "all weights"
        packages.note(
            f"{len(read)} pairs of {len({p.prompt for p in read})} prompts ({sizes}); {steps} steps of "
            f"{settings.batch_size} pairs, {how}, samples of at most {settings.max_tokens} tokens"
        )
        given: dict[str, Any] = {
            "template": self.sample_template,
            "device": self.device,
            "resume": self.resume,
        }
        result = train_reward(read, self.base, self.out, settings, **given)
        keep.keep(page(result), self.out)
        print(text(result, self.out))
        return 0


def text(result: "TrainedReward", out: str) -> str:
    """How often the reward prefers the chosen answer, and its name: the folder `out`."""
    found, lines = result.reward.facts, []
    for part in ("validation", "test"):
        if e := found.get(f"{part}_accuracy"):
            lines.append(
                f"{part}: accuracy {interval(e, '.3f')} (95%, {e['prompts']} prompts), loss "
                f"{found[f'{part}_loss']:.4f} nats (of a coin: {_COIN:.4f})"
            )
    lines.append(f"test, by length alone: accuracy {interval(found['test_accuracy_of_longer_wins'], '.3f')}")
    lines.append(
        f"wrote {out}: train with --reward {shlex.quote(out)} (bounds {found['bounds']}, so in [0, 1])"
    )
    return "\n".join(lines)


def page(result: "TrainedReward") -> Page:
    found, metrics = result.reward.facts, result.metrics
    parts = [part for part in ("train", "validation", "test") if f"{part}_accuracy" in found]
    test, longer = found["test_accuracy"], found["test_accuracy_of_longer_wins"]
    made = Page(
        "reward-model",
        "A reward learned from preferences",
        f"On pairs never seen it prefers the chosen answer in a share of {interval(test, '.3f')}; preferring "
        f"the longer one, in {interval(longer, '.3f')}.",
        some(found, "settings base template max_tokens pairs prompts truncated bounds loss"),
    )
    made.key("Accuracy, test", number(test["value"], ".3f"), f"{limits(test)}; {test['prompts']} prompts")
    made.key("By length alone", number(longer["value"], ".3f"), limits(longer))
    made.key("Loss, test", number(found["test_loss"], ".3f"), f"nats; of a coin {_COIN:.3f}")
    learned = sum(n for name, n in found["pairs"].items() if name.endswith(" train"))
    made.key("Pairs learned from", number(learned), f"{metrics[-1]['step']} optimizer steps")
    rows, dots = [], []
    for part in parts:
        e, loss = found[f"{part}_accuracy"], found[f"{part}_loss"]
        rows.append((part, interval(e, ".3f"), number(e["prompts"]), number(loss, ".4f")))
        dots.append(dot(part, e, "the reward"))
    rows.append(("test, by length", interval(longer, ".3f"), number(longer["prompts"]), "–"))
    dots.append(dot("test", longer, "the longer answer"))
    made.add(
        "How good it is",
        "The share of pairs in which the chosen answer has the larger reward, averaged within prompts first; "
        "95% intervals over prompts. Pairs of train were learned from.",
        Table("split | accuracy | prompts | loss, nats", rows, "wnnn"),
        Dots("Pairwise accuracy", "share of pairs, 95% intervals", dots, [(0.5, "a coin")]),
    )
    panels = {"nats": "loss", "share of pairs": "accuracy", "r(x, chosen) − r(x, rejected), raw": "margin"}
    said, curves = fell(metrics, "nats", panels)
    made.add("Learning", said, None, curves)
    return made
