"""Tasks on which it matters how a model is asked: their settings, and what came of training on one.

Training and rolling out are the verbs'; this module chooses how, and reads what they wrote.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignpro import rollouts
from alignpro.errors import AlignProError
from alignpro.estimation.compare import Against, Comparison, compare
from alignpro.files import read_json_lines
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.llm.training.settings import TrainSettings
from alignpro.strategies import strategy_of


@dataclass(frozen=True)
class Task:
    """A reward that depends on how a model is asked, and how a prompter is trained and measured on it."""

    reward: str
    """A row of `alignpro.llm.rewards.opening.REWARDS`."""
    measures: str
    """The reward's meaning, in words."""
    training: TrainSettings
    rollout: RolloutSettings
    held_out: int = 60
    """How many prompts of the test split to measure on."""
    prompter: str = "instructions-sft"
    """The prompter to start from."""
    dataset: str = "instructions"
    answer_tokens: int = 40
    minutes: int = 15
    """How long it takes on two cores, about."""

    def quick(self) -> "Task":
        """The task with a shorter training and fewer prompts to measure on."""
        training = replace(self.training, iterations=self.training.iterations // 3)
        return replace(self, training=training, held_out=self.held_out // 3, minutes=self.minutes // 3)


TASKS: dict[str, Task] = {
    "plain-language": Task(
        reward="ease",
        measures="reading ease of the answer (Flesch's score in hundredths, from 0 to 1)",
        training=TrainSettings(
            lam=0.02,
            iterations=40,
            prompts=8,
            samples=4,
            epochs=2,
            learning_rate=1e-3,
            schedule="constant",
            lora_layers=0.34,
            max_tokens=24,
        ),
        rollout=RolloutSettings(arms=("none", "sft"), draws=2, answers=2),
    ),
}
"""The tasks by name."""


def task_of(name: str, quick: bool = False) -> Task:
    """The row of `TASKS`, made smaller if `quick`. Raises AlignProError where there is none."""
    if name not in TASKS:
        raise AlignProError(f"--task {name}: choose from {', '.join(TASKS)}")
    return TASKS[name].quick() if quick else TASKS[name]


@dataclass(frozen=True)
class Example:
    """One held-out prompt before and after: the first draw of each, and its first answer."""

    x: str
    answer: str
    """Answer of the frozen model to x itself."""
    reward: float
    rewrite: str
    """The trained prompter's x′."""
    answer_after: str
    """Answer of the frozen model to x′."""
    reward_after: float


@dataclass(frozen=True)
class Added:
    """Something that prompters did to held-out prompts."""

    text: str
    """Words that are added, none where x was left as it is (see `alignpro.strategies.Strategy.text`)."""
    before: float
    """Share of the rewrites of the prompter that training started from."""
    after: float
    """Share of the trained prompter's."""


@dataclass(frozen=True)
class TaskResult:
    """A prompter trained on a task, measured on held-out prompts."""

    name: str
    task: Task
    comparison: Comparison
    """Arms none, sft and trained; the baseline is none, the frozen model asked x itself."""
    over_start: Against
    """The trained prompter against the one it started from, alone."""
    examples: tuple[Example, ...]
    """The first held-out prompts, in the order of the data set, whatever came of them."""
    added: tuple[Added, ...]
    """The most frequent after training first."""
    metrics: tuple[dict[str, Any], ...]
    """The lines of metrics.jsonl, one for each round."""


def result(
    name: str, task: Task, rolled: Path, metrics: Sequence[dict[str, Any]], examples: int = 3
) -> TaskResult:
    """Read what training and rolling out wrote.

    Args:
        rolled: the file of the rollouts.
        examples: how many prompts to show.
    """
    found = rollouts.read(rolled)
    first: dict[str, dict[str, Any]] = {}
    words: dict[str, Counter[str]] = {"sft": Counter(), "trained": Counter()}
    for row in read_json_lines(rolled):
        if row["answer"]:
            continue
        if row["arm"] in words:
            words[row["arm"]][strategy_of(row["x"], row["rewrite"]).text] += 1
        if not row["draw"]:
            first.setdefault(row["x"], {})[row["arm"]] = row
    of = {arm: {text: n / count.total() for text, n in count.items()} for arm, count in words.items()}
    texts = {
        text: (of["trained"].get(text, 0.0), of["sft"].get(text, 0.0))
        for text in (*of["trained"], *of["sft"])
    }
    order = sorted(texts, key=lambda text: texts[text], reverse=True)
    shown = [
        Example(x, a["response"], a["reward"], b["rewrite"], b["response"], b["reward"])
        for x, arms in list(first.items())[:examples]
        for a, b in [(arms["none"], arms["trained"])]
    ]
    return TaskResult(
        name,
        task,
        compare(found, ["none", "sft", "trained"]),
        compare(found, ["sft", "trained"]).against["trained"],
        tuple(shown),
        tuple(Added(text, texts[text][1], texts[text][0]) for text in order),
        tuple(metrics),
    )
