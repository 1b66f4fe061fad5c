"""The world that a prompter is trained in: a frozen model that answers, and a reward that judges."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.reward import Reward, check_scores
from alignpro.llm.targets.target import Target


@dataclass
class Environment:
    """Judges rewrites (or, without a frozen model, answers) by the reward of the answers that they get."""

    reward: Reward
    target: Target | None
    """π_F; None where the action is the answer itself (rlhf)."""
    sampling: Sampling = field(default_factory=Sampling)
    responses: int = 1
    """Answers to each rewrite."""
    seed: int = 0
    """Determines the samples of π_F."""

    def score(self, prompts: Sequence[str], actions: Sequence[str], draws: Sequence[int]) -> np.ndarray:
        """[n] mean rewards of actions as rewrites of (or answers to) the prompts.

        `draws` says which draw of π_F each action gets: equal draws of equal rewrites are the same answers.
        """
        if self.target is None:
            return self._checked(prompts, actions)
        asked = [action if action.strip() else " " for action in actions]  # something, even where it is empty
        answers = self.target.respond(
            asked,
            self.sampling,
            first=[d * self.responses for d in draws],
            samples=self.responses,
            seed=self.seed,
        )
        texts = [answer.text for row in answers for answer in row]
        scores = self._checked([x for x in prompts for _ in range(self.responses)], texts)
        return scores.reshape(len(prompts), self.responses).mean(1)

    def _checked(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        scores = self.reward.score(prompts, responses)
        return check_scores(prompts, responses, scores, self.reward.low, self.reward.high)
