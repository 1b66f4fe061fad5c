"""The rows of one arm, seen as prompts, draws of a rewrite, and answers to each."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.rollouts import Rollouts


class Absent(Exception):
    """Why a term cannot be had from these rollouts, and the remedy."""


class Arm:
    """The rows of one arm. Each answer to the prompt itself (arm none, a tuned policy) counts as a draw.

    `index` has its rows' positions; `starts`, where in it each draw begins; `first` [n], each prompt's first
    draw; `answers` and `draws` [n] count those of a draw and of a prompt.
    """

    def __init__(self, rollouts: Rollouts, name: str) -> None:
        if name not in rollouts.arms:
            raise Absent(f"arm {name} is absent; roll it out")
        self.rollouts, self.name = rollouts, name
        self.index = index = np.flatnonzero(rollouts.rows(name))
        prompt = rollouts.prompt[index]
        keys = (prompt, rollouts.seed[index], rollouts.draw[index])
        new = np.ones(len(index), bool)
        if name != "none" and name not in rollouts.direct:
            new[1:] = np.any([np.diff(key) != 0 for key in keys], axis=0)
        self.starts = np.flatnonzero(new)
        self.answers = np.diff(np.append(self.starts, len(index)))
        n = len(rollouts.prompt_ids)
        self.draws = np.bincount(prompt[self.starts], minlength=n)
        if not self.draws.all():
            missing = rollouts.prompt_ids[int(np.argmin(self.draws))]
            raise AlignProError(
                f"arm {name}: has no rows for prompt_id {missing!r}, which other arms have; finish its "
                "rollout, or remove the prompt"
            )
        self.first = np.concatenate([[0], np.cumsum(self.draws)[:-1]])

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Average `values` [rows of the arm] within draws, then over the draws of each prompt: [n]."""
        by_draw = np.add.reduceat(values, self.starts) / self.answers
        return np.add.reduceat(by_draw, self.first) / self.draws

    def logp(self, name: str) -> np.ndarray:
        """A log-probability of `LOGPS`, [rows of the arm], in nats. Raises Absent where a row has none."""
        values = self.rollouts.logps[name][self.index]
        missing = int(np.isnan(values).sum())
        if missing:
            raise Absent(
                f"{name} is missing in {missing} of {len(values)} rows of arm {self.name}; roll it out with "
                "a backend that gives log-probabilities"
            )
        return values

    @cached_property
    def reward(self) -> np.ndarray:
        return self.rollouts.reward[self.index]

    def least(self, draws: int, answers: int) -> None:
        """Raise Absent unless every prompt has `draws` draws, and every draw `answers` answers."""
        if self.draws.min() < draws:
            raise Absent(
                f"arm {self.name} has a prompt with {self.draws.min()} draw; give every prompt at least "
                f"{draws}"
            )
        if self.answers.min() < answers:
            raise Absent(
                f"arm {self.name} has a draw with {self.answers.min()} answer; give every rewrite at least "
                f"{answers}"
            )

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Group prompts with equally many draws K: positions [g] of the prompts, and rewards [g, K, A].

        A is the arm's least number of answers; the first A are taken of a draw with more.
        """
        answers = int(self.answers.min())
        cube = self.reward[self.starts[:, None] + np.arange(answers)]
        for size in np.unique(self.draws):
            at = np.flatnonzero(self.draws == size)
            yield at, cube[self.first[at][:, None] + np.arange(size)]

    def per_prompt(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Apply `statistic` ([g, K, A] to [S, g]) to each block; [S, n], in the order of the prompts."""
        out: Any = None
        for at, block in self.blocks():
            found = np.asarray(statistic(block))
            out = np.empty((len(found), len(self.draws))) if out is None else out
            out[:, at] = found
        return out
