"""Settings of `alignpro rollout`: which arms, how many draws and answers."""

import math
from dataclasses import dataclass

from alignpro.errors import AlignProError
from alignpro.llm.training.settings import check_whole


@dataclass(frozen=True)
class RolloutSettings:
    """How prompters are rolled out: which arms, and how often."""

    arms: tuple[str, ...] = ("none", "sft")
    """Arms without training: none (the prompt itself), sft (rho_sft), star (rho* by resampling), best_of_n."""
    trained: tuple[str, ...] = ()
    """Folders of trained prompters, a seed each: the arm trained; NAME=FOLDER makes an arm NAME."""
    rlhf: tuple[str, ...] = ()
    """Folders that train --task rlhf wrote, a seed each: the arm rlhf, whose policy answers the prompt."""
    draws: int = 4
    """Rewrites of each prompt in each arm and seed."""
    answers: int = 2
    """Answers of the frozen model to each rewrite."""
    rewrite_tokens: int | None = None
    """Longest rewrite, in tokens. Left out: as the trained prompters were trained, or rho_sft's own."""
    lam: float = 0.05
    """star: lambda, the weight of the KL to rho_sft, in units of the reward."""
    proposals: int = 16
    """star, best_of_n: rewrites of each prompt drawn from rho_sft, to choose from."""
    proposal_answers: int = 1
    """star, best_of_n: answers that judge each distinct proposal; those rolled out are fresh."""
    best_of: int | None = None
    """best_of_n: number n of proposals of which the best is kept. Left out: all."""
    seed: int = 0
    """Determines rewrites and answers. Arms that are given by folder count their seeds from here."""

    def __post_init__(self) -> None:
        check_whole(self, {"draws": 1, "answers": 1, "proposals": 1, "proposal_answers": 1, "seed": 0})
        if self.rewrite_tokens is not None and self.rewrite_tokens < 1:
            raise AlignProError(f"rewrite_tokens {self.rewrite_tokens}: give at least 1, or leave it out")
        if not (math.isfinite(self.lam) and self.lam > 0):
            raise AlignProError(f"lam {self.lam}: give a positive, finite number")
        if self.best_of is not None and not 1 <= self.best_of <= self.proposals:
            raise AlignProError(f"best_of {self.best_of}: choose from 1 to the {self.proposals} proposals")
