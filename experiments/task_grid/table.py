"""Rewards of prompts with each of some instructions: what one is worth, and what there is to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import rollouts
from alignpro.estimation import headroom
from alignpro.estimation.pooled import Pooled
from alignpro.files import read_json_lines
from alignpro.llm.data.bank import BANK
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.rewards.opening import load_reward
from alignpro.rollouts import Rollout, Rollouts


def strategies(each: int) -> tuple[str, ...]:
    """No instruction, and the first ones of every group of the bank."""
    return ("", *(text for group in BANK.values() for text in group[:each]))


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


def arms(texts: Sequence[str]) -> list[str]:
    """The instructions as `rollout --instruction` takes them; none is the arm "none"."""
    return [f"{_arm(i, text)}={text}" for i, text in enumerate(texts) if text]


def _arm(place: int, text: str) -> str:
    return f"s{place:03}" if text else "none"


def read(file: Path, texts: Sequence[str], name: str) -> Table:
    """The table that a rollout of `arms(texts)` and none wrote, as the reward `name` has it."""
    rows, reward = read_json_lines(file), load_reward(name)
    values = reward.score([row["x"] for row in rows], [row["response"] or "" for row in rows])
    cells: dict[tuple[str, str], list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        cells.setdefault((row["x"], row["arm"]), []).append(float(value))
    prompts = list(dict.fromkeys(row["x"] for row in rows))
    named = [_arm(i, text) for i, text in enumerate(texts)]
    return Table(prompts, texts, np.array([[cells[x, arm] for arm in named] for x in prompts]), name)


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
