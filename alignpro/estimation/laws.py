"""Laws of the reward: how far those of two samples are apart, at every number of prompts."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from alignpro.estimation.intervals import betting, check_level
from alignpro.estimation.paired import Arm


def distance(ours: Float[np.ndarray, "*g m"], theirs: Float[np.ndarray, "*g n"]) -> Float[np.ndarray, "*g"]:
    """W1 of the empirical laws of two samples, ∫ |F_m(t) − G_n(t)| dt; reward units.

    Biased up for W1 of the laws they were drawn from, which is a supremum of differences of means (over
    1-Lipschitz functions), hence convex in the pair of laws (Jensen).
    """
    both = np.concatenate([ours, theirs], -1)
    weights = np.concatenate(
        [np.full(ours.shape, 1 / ours.shape[-1]), np.full(theirs.shape, -1 / theirs.shape[-1])], -1
    )
    order = np.argsort(both, -1, kind="stable")
    apart = np.abs(np.cumsum(np.take_along_axis(weights, order, -1), -1)[..., :-1])
    return (apart * np.diff(np.take_along_axis(both, order, -1), axis=-1)).sum(-1)


def radius(n: int, width: float, level: float, answers: int = 1) -> float:
    """Most that W1 of a law and of its empirical law from n draws may be, with probability `level`.

    width √(log(2 `answers`/(1 − level))/(2n)): W1 is at most width times the largest difference of
    distribution functions, which Dvoretzky, Kiefer and Wolfowitz bound (with Massart's constant). With
    several answers to each of n independent prompts the empirical law is the mean of as many, each of n
    independent draws.
    """
    return float(width * np.sqrt(np.log(2 * answers / (1 - check_level(level))) / (2 * n)))


def by_prompt(arm: Arm) -> list[np.ndarray]:
    """The rewards of an arm, one array a prompt, with the same number of answers from each draw."""
    cube = arm.reward[arm.starts[:, None] + np.arange(arm.answers.min())]
    return [cube[start : start + count].ravel() for start, count in zip(arm.first, arm.draws, strict=True)]


def shift(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Float[np.ndarray, " n"]:
    """`distance` of two samples of each prompt's rewards."""
    return np.array([distance(a, b) for a, b in zip(ours, theirs, strict=True)])


def shift_limits(
    ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], width: float, level: float
) -> tuple[float, float]:
    """Limits to E_x W1 of two laws of the reward given x, true with probability `level` at every n.

    Prompts are independent; answers to a prompt may depend on each other in any way. Each `distance` is in
    [0, width] and biased up, so that betting's upper limit to their mean is one. From below: W1 of the laws
    over prompts and answers together, at most E_x W1 (convexity), less a `radius` for each sample.

    Args:
        ours: rewards of each prompt's answers, one array a prompt.
        theirs: the same of the other law.
        width: of the reward's range.
        level: probability that both limits are right.
    """
    rest = 1 - check_level(level)
    upper = float(np.max(betting(shift(ours, theirs), 0.0, width, level)[1]))
    even = [np.stack([r[: min(map(len, rows))] for r in rows]) for rows in (ours, theirs)]
    off = sum(radius(len(rows), width, 1 - rest / 4, rows.shape[1]) for rows in even)
    return max(float(distance(*(rows.ravel() for rows in even))) - off, 0.0), upper
