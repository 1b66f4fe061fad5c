"""Rewards of prompts with each of some instructions: what one is worth, and what there is to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignpro import rollouts
from alignpro.estimation import headroom
from alignpro.estimation.pooled import Pooled
from alignpro.llm.models.prompt import with_instruction
from alignpro.rollouts import Rollout, Rollouts


@dataclass(frozen=True)
class Table:
    """Rewards, in [0, 1], of answers to prompts with instructions."""

    prompts: Sequence[str]
    texts: Sequence[str]
    """The instructions, "" for none, which is among them."""
    rewards: np.ndarray
    """[prompts, instructions, answers]."""
    name: str
    """Of the reward."""


def as_rollouts(table: Table) -> Rollouts:
    """The table as rollouts of a reference prompter that adds each instruction equally often."""
    shared: dict[str, Any] = {
        "seed": 0,
        "response": None,
        **dict.fromkeys(rollouts.LOGPS),
        "frozen": "",
        "prompter": "each instruction once",
        "reward_model": table.name,
        "sampling": "",
        "reward_low": 0.0,
        "reward_high": 1.0,
    }
    shared["logp_prompter"] = shared["logp_reference"] = -float(np.log(len(table.texts)))
    rows = []
    for i, x in enumerate(table.prompts):
        for s, text in enumerate(table.texts):
            for a, value in enumerate(table.rewards[i, s]):
                own = {"prompt_id": f"{i:04}", "x": x, "answer": a, "reward": float(value)}
                rewrite = with_instruction(x, text)
                rows.append(Rollout(arm="sft", draw=s, rewrite=rewrite, **own, **shared))
                if not text:
                    rows.append(Rollout(arm="none", draw=0, rewrite=x, **own, **shared))
    return rollouts.collect(rows)


def pooled(table: Table, lam: float, level: float) -> Pooled | None:
    """What strategies that prompts share are worth, and the price of not reading the prompt, by the table.

    The price is of a reference that adds each instruction equally often; None where there is too little.
    """
    return headroom(as_rollouts(table), (lam,), level).pooled
