"""The value of chosen rewrites on fresh answers, free of the winner's curse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.arms.resample import Array, Proposals, check_counts, choose
from alignpro.llm.training.environment import Environment


@dataclass(frozen=True)
class Evaluation:
    """A choice's rewards on answers that had no part in it."""

    values: Array
    """Mean reward of each prompt's choice, [X]; unbiased given the proposals."""
    value: float
    """Mean reward over prompts, Ĵ."""
    standard_error: float
    """Standard error of `value` over prompts, whose draws are no independent evidence; nan with one."""
    calls: int
    """Answers asked of π_F."""


def evaluate(
    proposals: Sequence[Proposals],
    choices: Sequence[Array],
    environment: Environment,
    draws: int = 1,
    *,
    seed: int = 0,
) -> Evaluation:
    """J of chosen rewrites on fresh answers: x′ ~ choice, y ~ π_F(·|x′), `draws` times for each prompt.

    Free of the winner's curse: the answers are samples of π_F beyond those that R̂ was made of, also where the
    environment is the one that proposed.

    Args:
        choices: for each prompt, the `weights` of `star` or `best_of_n`, or others that sum to 1.
        draws: of each prompt.
        seed: of the draws from the choices.

    Raises:
        AlignProError: choices that do not fit; or from π_F or the reward.
    """
    check_counts(1, draws=draws)
    if not proposals or len(choices) != len(proposals):
        raise AlignProError(f"choices: {len(choices)} for {len(proposals)} prompts; give one for each")
    rewrites: list[str] = []
    for p, choice in zip(proposals, choices, strict=True):
        w = np.asarray(choice, float)
        if w.shape != (len(p.rewrites),) or not (w >= 0).all() or not abs(w.sum() - 1) < 1e-6:
            raise AlignProError(
                f"choices: that of {p.prompt!r} must be {len(p.rewrites)} weights of sum 1; take a `weights`"
            )
        rewrites += [p.rewrites[i] for i in choose(w, draws, "evaluate", seed, p.prompt)]
    scores = replace(environment, responses=1).score(
        [p.prompt for p in proposals for _ in range(draws)],
        rewrites,
        [p.responses + i for p in proposals for i in range(draws)],
    )
    values = np.asarray(scores, float).reshape(len(proposals), draws).mean(1)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    calls = 0 if environment.target is None else len(rewrites)
    return Evaluation(values, float(values.mean()), error, calls)
