"""Scores of an endpoint kept on file, so that none is paid for twice."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.endpoint import EndpointReward
from alignpro.llm.rewards.reward import Array, Reward, check_texts
from alignpro.llm.targets.http import Meter
from alignpro.llm.targets.ledger import Cached, Ledger
from alignpro.llm.targets.target import Answer, Known, OnAnswer

_ONCE = Sampling(temperature=0.0, max_tokens=1)


class CachedReward:
    """An endpoint's reward that asks only for the scores its folder does not hold.

    A raw score is on file as soon as it arrives, in the file of `ledger.Cached`: what killed a run, or
    changed the bounds, asks for no sample again.

    Args:
        reward: the endpoint; its bounds apply, and its `revision` and the texts are the key.
        folder: holds the file, in which an answer is a score in decimal; created if need be.

    Raises:
        AlignProError: the folder cannot be written to, or its file is damaged.
    """

    def __init__(self, reward: EndpointReward, folder: str | Path) -> None:
        self.reward = reward
        self.low, self.high = reward.low, reward.high
        self._cached = Cached(_AsTarget(reward), folder, note=None)

    @property
    def ledger(self) -> Ledger:
        """Count what this object has asked for; its `answers` are scores."""
        return self._cached.ledger

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response, from the file where it is there: [n] float64 in [low, high].

        Raises:
            Stopped: see `EndpointReward.score`; also where the disk is full. What arrived before is on file.
            AlignProError: prompts and responses differ in number or are no strings; a score on file is none.
        """
        check_texts(prompts, responses)
        asked = [json.dumps(sample) for sample in zip(prompts, responses, strict=True)]
        rows = self._cached.respond(asked, _ONCE)
        return self.reward.bounded(prompts, responses, [_number(row[0].text) for row in rows])

    def describe(self) -> dict[str, Any]:
        """Say what `EndpointReward.describe` says."""
        return self.reward.describe()

    def line(self) -> str:
        """Say in one line what was asked for."""
        spent = self.ledger
        return (
            f"{spent.answers} scores in {spent.calls} requests ({spent.retries} retries), {spent.hits} more "
            "from the file"
        )


def keep_scores(reward: Reward, folder: str | Path) -> Reward:
    """Put a reward whose scores are paid for behind a `CachedReward` in `folder`; others stay as they are."""
    return CachedReward(reward, folder) if isinstance(reward, EndpointReward) else reward


class _AsTarget:
    """An endpoint's reward as a `Target`: a question is a sample, as JSON, and its answer the raw score."""

    remote = True

    def __init__(self, reward: EndpointReward) -> None:
        self.reward = reward
        self.name = str(reward.describe()["name"])
        self.revision = reward.revision

    @property
    def calls(self) -> int:
        return self.reward.calls

    @property
    def retried(self) -> int:
        return self.reward.retried

    def respond(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
        known: Known = lambda *_: None,
        meter: Meter | None = None,
    ) -> list[list[Answer]]:
        found: list[list[Answer]] = [[] for _ in prompts]

        def keep(i: int, score: float) -> None:
            found[i] = [Answer(repr(score), "stop", 0, 0)]  # repr: to the bit
            if on_answer:
                on_answer(i, 0, found[i][0])

        pairs = [json.loads(prompt) for prompt in prompts]
        self.reward.raw([x for x, _ in pairs], [y for _, y in pairs], keep, meter)
        return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # of an edited file; told with its sample
