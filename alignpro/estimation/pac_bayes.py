"""Lower limits of what prompters earn that a sample of prompts chose among K: PAC-Bayes over prompts.

K prompters (instructions, arms) were asked on the same n prompts; q is a distribution over them, chosen by
looking at what they earned. With rewards scaled to [0, 1], Ĵ(q) its mean reward there, J(q) in truth, and b a
distribution fixed beforehand, with probability at least 1 − δ over prompts and answers, for all q at once,

    n kl(Ĵ(q)‖J(q)) ≤ KL(q‖b) + log(C/δ),    kl(p‖m) = p log(p/m) + (1 − p) log((1 − p)/(1 − m)),

C = ξ(n) = Σ_k (n choose k) (k/n)^k (1 − k/n)^(n−k) for an n fixed beforehand (Maurer, arXiv cs/0411099), and
C = τ(n) = √π Γ(n + 1)/Γ(n + ½) for all n at once, so for one that was chosen by looking; ξ(n) ≤ τ(n) ≤ 2√n at
every n ≥ 1. Turned round it is a lower limit of J(q), and the q of the greatest one is b tilted by e^{Ĵ_s/λ}:
the optimal prompter of equation (9), at the λ that so many prompts warrant. Proofs: docs/estimation.md.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from alignpro.errors import AlignProError
from alignpro.estimation.intervals import betting, check_level
from alignpro.estimation.means import shuffled

_STEEPEST = 50.0  # slope of kl beyond which a tilt is a point mass, or the limit is as good as 0
_STARTS, _STEPS = 64, 200


@dataclass(frozen=True)
class Mixture:
    """A distribution q over prompters, and what it earns at least."""

    weights: tuple[float, ...]
    """q, one weight for each prompter."""
    lam: float
    """λ of the tilt of b that it is, in reward units; 0 of a point mass."""
    kl: float
    """KL(q‖b), nats."""
    mean: float
    """Mean reward on the prompts seen, Ĵ(q); biased up, as q was chosen by it."""
    limit: float
    """Lower limit of its mean reward over all prompts, in reward units."""


@dataclass(frozen=True)
class PacBayes:
    """Lower limits for prompters chosen among K by the prompts that they were asked on, whatever these were.

    Each is wrong with probability at most 1 − `level`, at every number of prompts.
    """

    gibbs: Mixture
    """The mixture with the greatest limit: b tilted by the mean rewards seen."""
    best: Mixture
    """The prompter that is taken for the best, alone. Its limit is betting's, with its weight in b of the
    error 1 − level, so that those of all prompters are right at once."""
    n: int
    """Prompts."""
    level: float
    anytime: bool
    """Whether the limits are right also where n was chosen by looking."""


def constant(n: int, anytime: bool = False) -> float:
    """Compute log C: log ξ(n) for n prompts fixed beforehand, log τ(n) for all n at once."""
    if anytime:
        return 0.5 * math.log(math.pi) + math.lgamma(n + 1.0) - math.lgamma(n + 0.5)
    k = np.arange(1.0, n)
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, n + 1)))])  # log k!
    terms = log[n] - log[1:n] - log[n - 1 : 0 : -1] + k * np.log(k / n) + (n - k) * np.log1p(-k / n)
    return float(np.log(2.0 + np.exp(terms).sum()))


def below(mean: Float[np.ndarray, "*g"], most: Float[np.ndarray, "*g"]) -> Float[np.ndarray, "*g"]:
    """Find the least m ≤ `mean` with kl(mean‖m) ≤ `most`, in [0, 1], by bisection; never above it."""
    left, right = np.zeros(np.shape(mean)), np.array(mean, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(60):
            m = 0.5 * (left + right)
            one = np.where(mean > 0.0, mean * np.log(mean / m), 0.0)
            other = np.where(mean < 1.0, (1.0 - mean) * (np.log1p(-mean) - np.log1p(-m)), 0.0)
            far = one + other > most
            left, right = np.where(far, m, left), np.where(far, right, m)
    return left


def pac_bayes(
    table: Float[np.ndarray, "n K"],
    low: float,
    high: float,
    level: float = 0.95,
    *,
    prior: Float[np.ndarray, " K"] | None = None,
    best: int | None = None,
    anytime: bool = False,
) -> PacBayes:
    """Bound what the best of K prompters, and the best mixture of them, earn on prompts like those seen.

    Assumed are prompts that are independent draws, in the order of the rows where `anytime`; answers to
    a prompt may depend on each other in any way.

    Args:
        table: mean reward of each prompter's answers to each prompt.
        low, high: the range of the reward.
        level: how often a limit is right, between 0.5 and 1.
        prior: b, fixed before any of this was seen; it may sum to less than 1, where other prompters, which
            are not in the table, have the rest. Left out: uniform.
        best: which prompter to take for the best. Left out: that of the largest mean.
        anytime: whether n was chosen by looking, as by a rule when to stop.

    Raises:
        AlignProError: a reward outside [low, high], or no distribution for `prior`.
    """
    rest = 1.0 - check_level(level)
    table = np.asarray(table, float)
    width, unit = high - low, (table - low) / (high - low)
    if table.ndim != 2 or not table.size or not (np.abs(unit - 0.5) <= 0.5 + 1e-9).all():
        raise AlignProError(f"table: give rewards [prompts, prompters] from {low:g} to {high:g}")
    n, count = table.shape
    b = np.full(count, 1.0 / count) if prior is None else np.asarray(prior, float)
    if b.shape != (count,) or not (b > 0).all() or b.sum() > 1.0 + 1e-9:
        raise AlignProError(f"prior: give {count} positive weights of sum 1 at most")
    unit = np.clip(unit, 0.0, 1.0)  # means of equal rewards may exceed them by rounding
    means = unit.mean(0)
    allowed = constant(n, anytime) - math.log(rest)

    # Each of two steps is a maximum of the limit: the tilt given the slope of kl, the slope given the tilt.
    slope = np.geomspace(allowed / n, max(_STEEPEST, 2.0 * allowed / n), _STARTS)
    least, most = slope[0], slope[-1]
    for _ in range(_STEPS):
        q, divergence = _tilts(means, b, n * slope)
        p, tilted_by = q @ means, slope
        limit = below(p, (divergence + allowed) / n)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.log(p / limit) + np.log1p(-limit) - np.log1p(-p)
        slope = np.clip(np.nan_to_num(slope, nan=most), least, most)
        if np.allclose(slope, tilted_by, rtol=1e-10, atol=0.0):
            break
    at = int(np.argmax(limit))
    mean, lam = low + width * float(p[at]), width / (n * float(tilted_by[at]))
    gibbs = Mixture(tuple(q[at].tolist()), lam, float(divergence[at]), mean, low + width * float(limit[at]))

    first = int(np.argmax(means)) if best is None else best
    x = unit[:, first] if anytime else shuffled(unit[:, first])
    end = float(betting(x, 0.0, 1.0, 1.0 - 2.0 * rest * b[first], anytime=anytime)[0])
    alone = tuple(float(s == first) for s in range(count))
    mean = low + width * float(means[first])
    point = Mixture(alone, 0.0, -math.log(b[first]), mean, low + width * min(end, float(means[first])))
    return PacBayes(gibbs, point, n, level, anytime)


def _tilts(means: np.ndarray, b: np.ndarray, steepness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tilt b [K] by e^{c Ĵ_s} for each c of `steepness` [G]: q [G, K], and KL(q‖b) [G]."""
    energy = np.log(b) + steepness[:, None] * means
    top = energy.max(-1, keepdims=True)
    log_z = top[:, 0] + np.log(np.exp(energy - top).sum(-1))
    q = np.exp(energy - log_z[:, None])
    return q, np.maximum(steepness * (q @ means) - log_z, 0.0)
