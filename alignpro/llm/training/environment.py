"""The world that a prompter is trained in: a frozen model that answers, and a reward that judges."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import said_in
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.reward import Reward, lacking
from alignpro.llm.rewards.scores import Scores, judged, scored
from alignpro.llm.targets.refusals import Refusals
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
    refusals: Refusals = field(default_factory=Refusals)
    """Reward of refused answers, and their count over this object's life and that of its copies."""

    def __post_init__(self) -> None:
        if missing := lacking(self.reward):
            kind = type(self.reward).__name__
            remedy = "give a Reward, such as load_reward(name)"
            if callable(self.reward):
                remedy = "give it a range, as in CallableReward(reward, '0,1')"
            raise AlignProError(f"reward: {kind} has no {missing[0]}; {remedy}")

    def scores(self, prompts: Sequence[str], actions: Sequence[str], draws: Sequence[int]) -> Scores:
        """Mean rewards of actions as rewrites of (or answers to) the prompts, [n], with their parts.

        `draws` says which draw of π_F each action gets: equal draws of equal rewrites are the same answers.
        """
        return self.answered(prompts, actions, draws)[0]

    def answered(
        self, prompts: Sequence[str], actions: Sequence[str], draws: Sequence[int]
    ) -> tuple[Scores, list[str]]:
        """`scores`, and the first answer to each action: the action itself in rlhf, none where refused."""
        if self.target is None:
            return scored(self.reward, prompts, actions), list(actions)
        # Something is asked, even where the rewrite is empty.
        asked = [said_in(x, a if a.strip() else " ") for x, a in zip(prompts, actions, strict=True)]
        answers = self.target.respond(
            asked,
            self.sampling,
            first=[d * self.responses for d in draws],
            samples=self.responses,
            seed=self.seed,
        )
        flat = [answer for row in answers for answer in row]
        found = judged(self.reward, [x for x in prompts for _ in range(self.responses)], flat, self.refusals)
        # What stands for a refused answer is the service's reason, which is none.
        first = ["" if row[0].finish == "refused" else row[0].text for row in answers]
        return found.each(lambda values: values.reshape(len(prompts), self.responses).mean(1)), first

    def score(self, prompts: Sequence[str], actions: Sequence[str], draws: Sequence[int]) -> np.ndarray:
        """[n] mean rewards; see `scores`."""
        return self.scores(prompts, actions, draws).total
