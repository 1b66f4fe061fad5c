"""`alignpro reward-model`."""

import math
import shlex
from pathlib import Path

from alignpro.commands import pages
from alignpro.files import read_json_lines
from alignpro.llm.models import packages
from alignpro.llm.training.reward import METRICS_FILE, read_pairs, split_pairs, train_reward
from alignpro.llm.training.settings import RewardSettings
from alignpro.report import keep, numbers


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
    reward = train_reward(read, base, out, settings, template=template, device=device, resume=resume)
    facts = reward.facts
    keep.keep(pages.report_of_reward_model(read_json_lines(Path(out) / METRICS_FILE), facts), out)

    for part in ("validation", "test"):
        if found := facts.get(f"{part}_accuracy"):
            print(
                f"{part}: accuracy {numbers.interval(found, '.3f')} (95%, {found['prompts']} prompts), loss "
                f"{facts[f'{part}_loss']:.4f} nats (of a coin: {math.log(2):.4f})"
            )
    length = numbers.interval(facts["test_accuracy_of_longer_wins"], ".3f")
    print(f"test, by length alone: accuracy {length}")
    print(f"wrote {out}: train with --reward {shlex.quote(out)} (bounds {facts['bounds']}, so in [0, 1])")
