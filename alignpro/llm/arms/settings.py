"""Settings of `alignpro rollout`: which arms, how many draws and answers."""

import math
from dataclasses import dataclass

from alignpro.errors import AlignProError
from alignpro.llm.training.settings import check_whole


@dataclass(frozen=True)
class RolloutSettings:
    """What is rolled out: which arms, and how often."""

    arms: tuple[str, ...] = ("none", "sft")
    """Any of none (the prompt itself), sft (drawn from rho_sft), star (rho* by resampling) and best_of_n."""
    trained: tuple[str, ...] = ()
    """Folders of trained prompters: one arm, trained, with a seed for each; NAME=FOLDER makes an arm NAME."""
    rlhf: tuple[str, ...] = ()
    """Folders that train --task rlhf wrote: the arm rlhf, where the policy answers the prompt itself."""
    draws: int = 4
    """Rewrites of each prompt in each arm and seed."""
    answers: int = 2
    """Answers to each of them."""
    rewrite_tokens: int | None = None
    """Tokens of a rewrite, at most. Default: as the trained prompters were trained, or rho_sft's own."""
    lam: float = 0.05
    """star: lambda, positive, in units of the reward."""
    proposals: int = 16
    """star, best_of_n: rewrites drawn from rho_sft, from which each resamples."""
    proposal_answers: int = 1
    """star, best_of_n: answers that judge each distinct proposal; those to what is resampled are fresh."""
    best_of: int | None = None
    """best_of_n: n, at most the proposals. Default: all of them."""
    seed: int = 0
    """Determines rewrites and answers. Trained arms count their seeds from here."""

    def __post_init__(self) -> None:
        check_whole(self, {"draws": 1, "answers": 1, "proposals": 1, "proposal_answers": 1, "seed": 0})
        if self.rewrite_tokens is not None and self.rewrite_tokens < 1:
            raise AlignProError(f"rewrite_tokens {self.rewrite_tokens}: give at least 1, or leave it out")
        if not (math.isfinite(self.lam) and self.lam > 0):
            raise AlignProError(f"lam {self.lam}: give a positive, finite number")
        if self.best_of is not None and not 1 <= self.best_of <= self.proposals:
            raise AlignProError(f"best_of {self.best_of}: choose from 1 to the {self.proposals} proposals")
