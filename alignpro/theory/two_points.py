"""Laws of two values, which are extremal: of all laws with their mean, variance and largest (or least) value
no tilt lifts the mean more (or less)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from alignpro.theory.divergences import Floats
from alignpro.theory.elementwise import is_ball


class Lift(NamedTuple):
    """The mean of a tilted law of mean 0 on two values, and what it is sensitive to; any shape."""

    value: Any
    """a M (1 − e^{−z})/(M e^{−z} + a), z = (M + a)/t: in units of the values, between 0 and M."""
    error: Any
    """Bound on its rounding, and on what the errors of M and a do to it; 0 of balls."""


def lift(rise: Any, fall: Any, t: Any, rise_error: Any = 0.0, fall_error: Any = 0.0, eps: Any = 0.0) -> Lift:
    """E[u e^{u/t}]/E[e^{u/t}] of the law of mean 0 (so of variance a M) on u ∈ {−a, M}.

    Args:
        rise: M ≥ 0.
        fall: a ≥ 0.
        t: the temperature, > 0, in the units of M and a.
        rise_error: how far M may be off.
        fall_error: how far a may be off.
        eps: the unit of rounding of these numbers.

    Proof of its use. Let E u = 0, u ≤ M, Var u = σ² and a = σ²/M; c the value here, h(u) = (u − c) e^{u/t},
    and q the quadratic that meets h at M and touches it at −a. On {−a, M} the law of that mean and variance
    has E q = E h = 0, so h(M) = −h(−a) M/a, and q's leading coefficient is A = e^{−a/t} [c/a + (a + c)/t]/(M
    + a) > 0. d = q − h has d‴ = −e^{u/t} (u − c + 3t)/t³, with one root; so d has at most four, with
    multiplicity. It tends to +∞ as u → −∞ and to −∞ as u → ∞, so that it changes sign an odd number of times:
    of its roots −a (twice) and M a fourth would make that even, whether apart or on one of them. So d ≥ 0 on
    (−∞, M], and E h(u) ≤ E q(u) = 0 for the law at hand, which is E[u e^{u/t}] ≤ c E[e^{u/t}]. As A > 0 less
    variance keeps it. With u ≥ −m in place of u ≤ M, b = σ²/m, and q meeting h at −m and touching it at b,
    the same count gives d ≤ 0 on [−m, ∞): the law on {−m, b} is lifted least, and more variance keeps that.
    """
    if is_ball(rise):
        value = np.frompyfunc(_of_balls, 3, 1)(rise, fall, t)
        return Lift(value, value * 0)
    total = rise + fall
    some = jnp.where(total > 0, total, 1.0)
    low, high = rise / some, fall / some  # the probabilities of −a and of M
    z = jnp.minimum(total / t, 1e30)
    grown = jnp.exp(-z)
    weight = high + low * grown
    safe = jnp.where(weight > 0, weight, 1.0)
    upper, lower = high / safe, low * grown / safe  # the tilted probabilities
    part = -jnp.expm1(-z)
    value = rise * upper * part
    steep = upper * lower * z
    by_fall = jnp.where(lower > 0, low * fall_error / safe, 0.0) * lower * part + steep * fall_error
    by_rise = (upper * upper * part + steep) * rise_error
    return Lift(value, by_fall + by_rise + eps * (16.0 * value + 4.0 * steep * total))


def _of_balls(rise: Any, fall: Any, t: Any) -> Any:
    """By probabilities, so that it is the same polynomial as the tilt of an instance with two rewards."""
    total = rise + fall
    if total == 0:
        return total
    high, grown = fall / total, (-(total / t)).exp()
    return rise * (high - high * grown) / (high + (1 - high) * grown)


def points(base: Floats, values: Floats) -> tuple[Array, Array, Array]:
    """max − min, M = max − mean and variance/M (0 where M is) of values [X, n] on the support of rows [X, n].

    Measured from the best there, each difference is rounded once and sums have one sign: all are relatively
    accurate, the last but for the square of M's rounding.
    """
    inside = base > 0
    below = jnp.where(inside, values - jnp.max(jnp.where(inside, values, -jnp.inf), -1, keepdims=True), 0.0)
    rise = -jnp.sum(base * below, -1)
    some = jnp.where(rise > 0, rise, 1.0)
    away = jnp.where(inside, below + rise[:, None], 0.0)
    fall = jnp.sum(base * away * (away / some[:, None]), -1)
    width = -jnp.min(below, -1)
    return width, rise, jnp.where(rise > 0, jnp.minimum(fall, width), 0.0)
