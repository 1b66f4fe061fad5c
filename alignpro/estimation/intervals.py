"""Intervals for a mean over prompts, and the verdicts that follow from them.

Arguments named `values` are [..., n]: n prompts, which are the clusters, and any leading batch.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from alignpro.claims import Verdict
from alignpro.errors import AlignProError
from alignpro.shown import Shown

Bias = Literal["none", "up", "down", "unknown"]

RESAMPLES = 2000
LEAST_PROMPTS = 5
"""Prompts that an interval needs. With 4, one bootstrap resample in 64 repeats a single prompt."""
NEGLIGIBLE = 0.01
"""Share of the reward's range below which a gain counts as none."""
_MANY_PROMPTS = 2000  # beyond it the central limit theorem has set in and resampling only costs
_BLOCK = 2**22  # numbers at once
_CUT = 0.75  # of the largest bet that cannot lose all; with 0.5 few prompts without a spread say a third less


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """A number and how far to trust it."""

    value: float
    lo: float
    hi: float
    level: float
    """How often such intervals cover the truth, in (0, 1)."""
    n: int
    n_clusters: int
    """Prompts, the independent units."""
    method: str
    """How the number and its interval were computed, in words."""
    bias: Bias
    """none: exactly unbiased. up, down: proved. unknown: of second order, its direction not known."""
    bracket: bool = False
    """Whether weights are degenerate and [lo, hi] reaches from a bound below to a bound above."""
    ess: float | None = None
    """Median over prompts of the effective number of importance-weighted samples of one prompt."""
    guaranteed: bool | None = None
    """Whether the interval covers by a theorem at every number of prompts; None where that was not asked
    for, and it does as n grows."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks for a reader of the number: its guarantee, degenerate weights, known bias, and ESS."""
        return (
            *([] if self.guaranteed is None else ["guaranteed" if self.guaranteed else "not guaranteed"]),
            *["bounds" if self.guaranteed else "degenerate weights: bounds"] * self.bracket,
            *[f"biased {self.bias}"] * (self.bias in ("up", "down")),
            *([] if self.ess is None else [f"ESS {self.ess:.1f}"]),
        )


def check_level(level: float) -> float:
    """Give `level` as a float. Raises AlignProError unless it lies strictly between 0.5 and 1."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0.5 < level < 1:
        raise AlignProError(f"level {level!r}: must lie between 0.5 and 1; give 0.95, say")
    return float(level)


@lru_cache(maxsize=4)
def _counts(n: int, resamples: int) -> np.ndarray:
    """Draw how often each prompt is in each resample: [n, resamples]."""
    rng = np.random.default_rng([0, n])
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).T.astype(float)


class Studentised(NamedTuple):
    """Means of S rows over n prompts, and how their studentised errors are distributed, jointly."""

    mean: np.ndarray
    error: np.ndarray
    draws: np.ndarray
    """[..., S, B] bootstrap draws of (mean − truth)/error; infinite where a resample has no spread."""

    def interval(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """Equal-tailed percentile-t limits of each row by itself, [..., S] each."""
        tail = (1.0 - level) / 2.0
        low, high = np.quantile(self.draws, (tail, 1.0 - tail), axis=-1, method="nearest")
        return self.between(low, high)

    def simultaneous(
        self, level: float | np.ndarray, of: np.ndarray | bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Limits that cover all rows `of` [..., S] at once: mean ± quantile of their max |t| · error.

        `level` is a number, or one for each of the batch [...]. Other rows get limits as wide, for nothing.
        """
        chosen = np.broadcast_to(of, self.mean.shape)[..., None]
        largest = np.sort(np.where(chosen, np.abs(self.draws), 0.0).max(-2), axis=-1)
        at = np.rint(np.multiply(level, largest.shape[-1] - 1)).astype(int)
        width = np.take_along_axis(largest, np.broadcast_to(at, largest.shape[:-1])[..., None], -1)
        return self.between(-width, width)

    def between(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Limits mean − high·error and mean − low·error, [..., S] each; the mean of a row without spread."""
        spread = self.error > 0
        safe = np.where(spread, self.error, 0.0)
        with np.errstate(invalid="ignore"):
            lo = np.where(spread, self.mean - high * safe, self.mean)
            hi = np.where(spread, self.mean - low * safe, self.mean)
        return lo, hi


def studentise(values: np.ndarray, resamples: int = RESAMPLES) -> Studentised:
    """Bootstrap the prompts of all rows together, [..., S, n], so that rows stay paired.

    Beyond 2,000 prompts the draws are those of the central limit theorem, with the rows' own correlation.
    """
    n = values.shape[-1]
    if n < LEAST_PROMPTS:
        raise AlignProError(f"prompts: {n} are too few for an interval; give at least {LEAST_PROMPTS}")
    mean = values.mean(-1)
    centred = values - mean[..., None]
    # A spread at the level of rounding is none: it would be studentised into noise.
    rounding = 8.0 * np.finfo(float).eps * np.abs(values).max(-1)
    sd = centred.std(-1, ddof=1)
    sd = np.where(sd > rounding, sd, 0.0)
    unit = centred / np.where(sd > 0, sd, 1.0)[..., None]
    if n > _MANY_PROMPTS:
        rng = np.random.default_rng([0, n])
        white = rng.standard_normal((values.shape[-2], resamples))
        left, size, _ = np.linalg.svd(unit / np.sqrt(n - 1), full_matrices=False)
        return Studentised(mean, sd / np.sqrt(n), (left * size[..., None, :]) @ white[: size.shape[-1]])
    draws = np.empty((*values.shape[:-1], resamples))
    counts = _counts(n, resamples)
    rows = unit.reshape(-1, n)
    flat = draws.reshape(-1, resamples)
    step = max(1, _BLOCK // resamples)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        first = block @ counts / n
        second = np.square(block) @ counts / n
        spread = np.sqrt(np.maximum(second - np.square(first), 0.0) / (n - 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(spread > 1e-9, first / spread, np.copysign(np.inf, first))
        flat[start : start + step] = np.where(np.any(block != 0, -1, keepdims=True), t, 0.0)
    return Studentised(mean, sd / np.sqrt(n), draws)


def bootstrap_t(
    values: np.ndarray, level: float, resamples: int = RESAMPLES
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile-t limits of the mean of `values` [..., n], lower and upper, [...] each."""
    lo, hi = studentise(values[..., None, :], resamples).interval(level)
    return lo[..., 0], hi[..., 0]


def empirical_bernstein(
    values: np.ndarray, low: float, high: float, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Maurer–Pontil limits (arXiv 0907.3740) of the mean of independent `values` [..., n] in [low, high].

    |mean − E| ≤ √(2 V log(4/α)/n) + 7 (high − low) log(4/α)/(3(n − 1)), V the sample variance, with
    probability at least 1 − α, two-sided (Theorem 4 with both tails). Clipped to [low, high].
    """
    n = values.shape[-1]
    if n < 2:
        return np.full(values.shape[:-1], low), np.full(values.shape[:-1], high)
    log = np.log(4.0 / (1.0 - level))
    mean = values.mean(-1)
    half = np.sqrt(2.0 * values.var(-1, ddof=1) * log / n) + 7.0 * (high - low) * log / (3.0 * (n - 1))
    return np.maximum(mean - half, low), np.minimum(mean + half, high)


def betting(
    values: np.ndarray, low: float, high: float, level: float, *, anytime: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Hedged-capital limits (arXiv 2010.09686) of the mean of independent `values` [..., n] in [low, high].

    Against a mean m one bets λ_t = √(2 log(2/α)/(n σ̂²_{t−1})), cut to ¾/m (from the other side to
    ¾/(1 − m)), where σ̂² is predictable. If m is the mean, the capital Π(1 ± λ_t (x_t − m)) is a nonnegative
    martingale, so it exceeds 2/α at any time with probability at most α/2 (Ville). The limits are where it
    just does; it is monotone in m, so bisection finds them. Valid at every n; depends on the values' order.

    Args:
        anytime: valid also where n was chosen by looking at the values, as by a rule when to stop: bets then
            know no n, and have t log(1 + t) in its place.
    """
    x = (values - low) / (high - low)
    n = x.shape[-1]
    alpha = 1.0 - level
    steps = np.arange(1, n + 1)
    mean = (0.5 + np.cumsum(x, -1)) / (steps + 1)
    variance = (0.25 + np.cumsum(np.square(x - mean), -1)) / (steps + 1)
    before = np.concatenate([np.full((*x.shape[:-1], 1), 0.25), variance[..., :-1]], -1)
    horizon = steps * np.log1p(steps) if anytime else n
    bets = np.sqrt(2.0 * np.log(2.0 / alpha) / (horizon * before))
    threshold = np.log(2.0 / alpha)

    def lower(x: np.ndarray) -> np.ndarray:
        left, right = np.zeros(x.shape[:-1]), x.mean(-1)
        for _ in range(30):
            m = 0.5 * (left + right)
            at = m[..., None]
            bet = np.minimum(bets, _CUT / np.maximum(at, 1e-12))
            capital = np.cumsum(np.log1p(bet * (x - at)), -1).max(-1)
            rejected = capital >= threshold
            left, right = np.where(rejected, m, left), np.where(rejected, right, m)
        return left

    return low + (high - low) * lower(x), high - (high - low) * lower(1.0 - x)


def verdict_of(lo: float, hi: float, applicable: bool = True) -> Verdict:
    """The verdict on a claim whose slack lies in [lo, hi]: above 0 it holds, below 0 it is violated."""
    if not applicable:
        return "inapplicable"
    return "holds" if lo > 0 else "violated" if hi < 0 else "inconclusive"


def prompts_to_settle(slack: Estimate) -> int | None:
    """Count the further prompts, like these, that would bring the nearer limit of `slack` to 0.

    Limits shrink as 1/√n, so n·(distance/|value|)² are needed in all; None stands for over a billion.
    """
    distance = slack.value - slack.lo if slack.value > 0 else slack.hi - slack.value
    if abs(slack.value) * 1e4 <= distance:  # at 0 as well, when it is known to be 0
        return None
    needed = np.ceil(slack.n_clusters * (distance / abs(slack.value)) ** 2)
    return int(needed) - slack.n_clusters + 1 if needed < 1e9 else None
