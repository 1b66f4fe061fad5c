"""Limits of means over prompts: percentile-t where its assumptions can be seen to hold, betting elsewhere.

The choice looks at the shape of a row (its ties, its skew, how near it lies to an end of its range), never at
which limits are the narrower.
"""

from typing import Literal, NamedTuple

import numpy as np

from alignpro.estimation.intervals import RESAMPLES, Studentised, betting, studentise

Way = Literal["percentile-t", "betting", "assumed", "none", "exact"]

WAYS: dict[Way, str] = {
    "percentile-t": "percentile-t bootstrap over prompts",
    "betting": "betting over prompts (hedged capital)",
    "assumed": "betting over prompts, if none lies further out than the range of those seen",
    "none": "no limit can be given: all prompts agree, and nothing bounds them",
    "exact": "known exactly",
}
"""How limits were computed, in words."""
NEAR = 3.0, 8.0
"""Standard errors of the mean from an end of the range, within which the normal law fails there: the first
number, and the second over the number of prompts more, for the error of a standard error from few."""
_LARGE = 100.0  # |t| of a resample that has as good as no spread
_TIED = 0.1  # share of the error 1 − level that such resamples may have


class Limits(NamedTuple):
    """Means of S rows with their limits, [..., S] each."""

    mean: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    way: np.ndarray
    """Which of `WAYS` each row's limits come by."""


def doubtful(
    found: Studentised, values: np.ndarray, low: np.ndarray, high: np.ndarray, level: float
) -> np.ndarray:
    """Whether percentile-t cannot be trusted with the mean of each row of `values` [..., S, n]; [..., S].

    It cannot where all values agree, or more than a tenth of 1 − level of the resamples have next to no
    spread; where an end of the range [low, high] is within `NEAR` standard errors; and where the sample's
    skewness is above √n/4, the size at which the first term that normal limits neglect is of the order of
    their error, and above what normal values often have (2.2 of its standard deviations).
    """
    n = values.shape[-1]
    tied = (found.error == 0) | (np.mean(np.abs(found.draws) > _LARGE, axis=-1) > _TIED * (1.0 - level))
    margin = (NEAR[0] + NEAR[1] / n) * found.error
    near = np.minimum(found.mean - low, high - found.mean) < margin
    centred = values - found.mean[..., None]
    second = np.square(centred).mean(-1)
    skewness = (centred**3).mean(-1) / np.maximum(second**1.5, np.finfo(float).tiny)
    usual = np.sqrt(6.0 * (n - 2) / ((n + 1.0) * (n + 3.0)))
    return tied | near | (np.abs(skewness) > max(2.2 * usual, 0.25 * np.sqrt(n)))


def in_doubt(values: np.ndarray, low: np.ndarray, high: np.ndarray, level: float) -> np.ndarray:
    """Whether percentile-t cannot be trusted with the mean of each row of `values` [..., S, n]; [..., S]."""
    return doubtful(studentise(values), values, low, high, level)


def shuffled(values: np.ndarray) -> np.ndarray:
    """Put `values` [..., n] into an order drawn once, without looking at them."""
    n = values.shape[-1]
    return values[..., np.random.default_rng([0, n]).permutation(n)]


def limits(
    values: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    level: float,
    *,
    joint: bool = False,
    sure: np.ndarray | bool = False,
    ordered: bool = False,
    resamples: int = RESAMPLES,
) -> Limits:
    """Limits of the mean of each row of `values` [..., S, n], prompts that are independent draws.

    Percentile-t, unless the row is `doubtful`: then betting within [low, high] ([S] each), which covers at
    every n; values outside (of estimators that are not bounded by what they estimate) are cut off. Without a
    range, betting assumes that no prompt lies further out than the range of those seen; where these agree no
    limit can be given, and they are infinite. A row with low = high is a constant and known.

    Args:
        joint: limits cover all rows at once. Of the error 1 − level each of k doubtful rows takes 1/S, and
            the others, by the bootstrap of the largest |t|, what is left.
        sure: rows that get betting limits whatever their shape.
        ordered: bets take the prompts in the order given, in which each value's mean may depend on those
            before it. Otherwise in an order drawn once: files may be sorted.
    """
    found = studentise(values, resamples)
    mean, count = found.mean, values.shape[-2]
    low, high = (np.broadcast_to(end, mean.shape) for end in (low, high))
    constant = low == high
    bet = (doubtful(found, values, low, high, level) | sure) & ~constant
    way = np.where(bet, "betting", np.where(constant, "exact", "percentile-t"))
    error = 1.0 - level
    if joint:
        lo, hi = found.simultaneous(1.0 - error * (1.0 - bet.mean(-1)), ~(bet | constant))
        error = error / count
    else:
        lo, hi = found.interval(level)
    lo, hi = np.where(constant, low, lo), np.where(constant, high, hi)
    if bet.any():
        x, a, b = values[bet] if ordered else shuffled(values[bet]), low[bet], high[bet]
        least, most = x.min(-1), x.max(-1)
        reach = most - least
        free = ~np.isfinite(b - a)
        a, b = np.where(free, least - reach, a), np.where(free, most + reach, b)
        empty = free & (found.error[bet] == 0)  # alike, up to rounding
        width = np.where(empty, 1.0, b - a)
        unit = np.clip((x - a[:, None]) / width[:, None], 0.0, 1.0)
        below, above = betting(unit, 0.0, 1.0, 1.0 - error)
        lo[bet] = np.where(empty, -np.inf, a + width * below)
        hi[bet] = np.where(empty, np.inf, b - width * (1.0 - above))
        way[bet] = np.where(empty, "none", np.where(free, "assumed", "betting"))
    return Limits(mean, lo, hi, way)
