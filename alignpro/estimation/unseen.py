"""Limits that hold whatever samples were not drawn, and when a tilt cannot be told without these.

A tilt by e^{r/t} may live on answers (or rewrites) so rare that none was drawn, and then its weights look
their best: all alike. With g = e^{(r − high)/t}, in [0, 1], two limits hold however rare these are:

    t log E e^{r/t} = high + t log E g, and, by Jensen, E_x t log E[e^{r/t}|x] ≤ high + t log E g;
    the tilt's mean is at most 2 V(t/2) − V(t), V(t) = t log E e^{r/t}.

Proof of the second: A(s) = log E e^{sr} is convex, and A′(s) is the mean under the tilt by s. So
s A′(s) ≤ A(2s) − A(s), and dividing by s = 1/t gives A′(1/t) ≤ t A(2/t) − t A(1/t) = 2 V(t/2) − V(t). ∎
"""

from typing import NamedTuple

import numpy as np

from alignpro.estimation.means import limits
from alignpro.estimation.samples import tilt

FEW = 3.0
"""Effective samples of a prompt below which one or two of them are all that its tilt is known by."""
APART = 2.5
"""Temperatures by which these one or two then exceed the next best: a weight 12 times as large."""
SHARE = 0.01
"""Share of the prompts, or of the range of the reward, from which on they count."""
RARE = 10.0
"""Samples of a kind that are expected where its share is as large as is asked about: none is then seen with
probability e⁻¹⁰, and three are with 1 in 300."""


class Side(NamedTuple):
    """One value per prompt, [n], whose mean bounds a quantity, and the range that each lies in."""

    values: np.ndarray
    low: float
    high: float


def ceiling(rewards: np.ndarray, temperature: float, high: float) -> np.ndarray:
    """g, the mean of e^{(r − high)/temperature} over a prompt's samples [..., m]: [...] in [0, 1]."""
    return np.exp((rewards - high) / temperature).mean(-1)


def value_above(g: np.ndarray, temperature: float, high: float, error: float | None = None) -> Side:
    """Bound E_x t log E[e^{r/t}|x] from above, by values that are linear in `g` [n] (see `ceiling`).

    log is concave, so log E g ≤ log c − 1 + E g/c for any c > 0, with equality at c = E g: c is the upper
    betting limit of E g, at which high + t log c is the limit that comes out, valid at every n.

    Args:
        error: gives that limit itself, which is wrong with at most this probability. Sums of the values with
            others have no such guarantee, since c looks at all prompts.
    """
    c = float(_betting(g, 0.0, 1.0, 0.025 if error is None else error)[1])
    if error is not None:
        return constant(high + temperature * np.log(c), len(g))
    least = high + temperature * (np.log(c) - 1.0)
    return Side(least + temperature * g / c, least, least + temperature / c)


def mean_above(half: Side, value: np.ndarray, low: float, high: float, error: float | None = None) -> Side:
    """Bound the tilt's mean from above by 2 V(t/2) − V(t), or by `high` where that says no more.

    `half` bounds V(t/2) from above; the mean of `value` [n], in [low, high], bounds V(t) from below. With
    `error` as in `value_above` it is one number, by one for V(t/2) and one for V(t).
    """
    if error is not None:
        least = float(_betting(value, low, high, error)[0])
        return constant(min(2.0 * half.high - least, high), len(value))
    bound = Side(2.0 * half.values - value, 2.0 * half.low - high, 2.0 * half.high - low)
    most = limits(bound.values[None], np.array([bound.low]), np.array([bound.high]), 0.95).hi[0]
    return bound if most < high else constant(high, len(value))


def constant(number: float, n: int) -> Side:
    """The side of a bound that is a number, for n prompts."""
    return Side(np.full(n, number), number, number)


def _betting(values: np.ndarray, low: float, high: float, error: float) -> np.ndarray:
    """Lower and upper betting limits of a mean, each wrong with at most the probability `error`."""
    found = limits(values[None], np.array([low]), np.array([high]), 1.0 - 2.0 * error, sure=True)
    return np.array([found.lo[0], found.hi[0]])


def hidden(rewards: np.ndarray, temperature: float, high: float, share: float) -> np.ndarray:
    """Shares of the tilt that unseen samples of reward `high` would take, were they `share` of all.

    `rewards` [..., m] are those seen. With V = t log mean e^{r/t}: s/(1 + s), s = share·e^{(high − V)/t}.
    """
    with np.errstate(over="ignore"):
        s = share * np.exp((high - tilt(rewards, temperature).value) / temperature)
    return 1.0 - 1.0 / (1.0 + s)


def unresolved(rewards: np.ndarray, temperature: float, low: float, high: float, total: int) -> np.ndarray:
    """How much of each prompt's tilt is not settled by its rewards [..., m], in [0, 1], of `total` in all.

    1 where fewer than `FEW` effective samples carry it, which stand apart (`APART`) from the others: more of
    those may have been missed. Where all rewards are alike and below `high`, weights show nothing: then the
    share of the range that the tilt's mean would rise by if `RARE` in `total` had reward `high`, unseen.
    """
    top = rewards.max(-1)
    alike = (top - rewards.min(-1) <= 1e-9 * (high - low)) & (top < high)
    rise = hidden(rewards, temperature, high, min(RARE / total, 1.0)) * (high - top) / (high - low)
    best = -np.sort(-rewards, axis=-1)[..., :3]
    apart = (best[..., :-1] - best[..., 1:]).max(-1) > APART * temperature
    return np.where(alike, rise, np.where(apart & (tilt(rewards, temperature).ess < FEW), 1.0, 0.0))
