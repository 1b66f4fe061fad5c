"""Divergences between distributions on the last axis, in nats, without cancellation or NaN.

Each is a sum of terms that are non-negative one by one, so nearby distributions keep their relative
accuracy: KL(p‖q) = Σ q φ(log p/q) with φ(d) = d eᵈ − eᵈ + 1 ≥ 0, since Σ p = Σ q = 1. In float64, or in
float32 when every array given is float32.
"""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Floats = Array | np.ndarray
Scalar = float | Fraction | Float[Floats, ""]
"""A number, or an array of one."""

# Probabilities below the smallest normal float64 count as zero: XLA flushes them anyway.
TINY = 2.2250738585072014e-308


def same_floats(*values: Any) -> tuple[Array, ...]:
    """The values as arrays of one dtype: float32 if each is a float32 array, and float64 otherwise."""
    single = all(getattr(value, "dtype", None) == np.float32 for value in values)
    return tuple(jnp.asarray(value, np.float32 if single else np.float64) for value in values)


@jax.custom_jvp
def log1p(x: Any) -> Any:
    """log(1 + x), relatively accurate everywhere: XLA's own loses 100 ulp just above its series' range.

    Kahan's correction is no help here, since compiled code rewrites (1 + x) − 1 as x.
    """
    return log1p_or(x, jnp.log(jnp.where(jnp.abs(x) < 0.5, 1.0, 1.0 + x)))


@log1p.defjvp
def _log1p_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return log1p(x), dx / (1.0 + x)


def log1p_or(x: Any, large: Any) -> Any:
    """log(1 + x) by its series where |x| < ½, and `large`, which is log(1 + x) found otherwise, elsewhere."""
    small = jnp.abs(x) < 0.5
    z = jnp.where(small, x, 0.0)
    z = z / (2.0 + z)  # log(1 + x) = 2 artanh(x / (2 + x)), |z| ≤ 1/3
    square = z * z
    series = jnp.zeros_like(z)
    for n in range(33, 0, -2):
        series = series * square + 1.0 / n
    return jnp.where(small, 2.0 * z * series, large)


def _half_square_series(v: Any) -> Any:
    """(eᵛ − 1 − v)/v² for |v| < ½."""
    series = jnp.full_like(v, 1.0 / math.factorial(15))
    for n in range(14, 1, -1):
        series = series * v + 1.0 / math.factorial(n)
    return series


def expm1_psi(u: Any, exp_u: Any) -> tuple[Any, Any]:
    """eᵘ − 1 and ψ(u) = eᵘ − 1 − u where eᵘ is known (to within the rounding of a product or two)."""
    small = jnp.abs(u) < 0.5
    v = jnp.where(small, u, 0.0)
    series = v * v * _half_square_series(v)
    return jnp.where(small, v + series, exp_u - 1.0), jnp.where(small, series, (exp_u - 1.0) - u)


@jax.custom_jvp
def psi(u: Any) -> Any:
    """ψ(u) = eᵘ − 1 − u ≥ 0, relatively accurate everywhere."""
    return expm1_psi(u, jnp.exp(u))[1]


@psi.defjvp
def _psi_jvp(primals, tangents):
    (u,), (du,) = primals, tangents
    return psi(u), jnp.expm1(u) * du


def phi(d: Float[Floats, "..."]) -> Float[Array, "..."]:
    """φ(d) = d eᵈ − eᵈ + 1 = eᵈ ψ(−d) ≥ 0."""
    return jnp.exp(d) * psi(-d)


def log_quotient(p: Float[Floats, "..."], q: Float[Floats, "..."]) -> Float[Array, "..."]:
    """log p/q where both are positive (0 elsewhere); accurate where p is close to q."""
    both = (p > 0) & (q > 0)
    p, q = jnp.where(both, p, 1.0), jnp.where(both, q, 1.0)
    near = (p > 0.5 * q) & (p < 2.0 * q)
    return jnp.where(near, log1p(jnp.where(near, p - q, 0.0) / q), jnp.log(p) - jnp.log(q))


def scaled_kl(
    t: Float[Floats, "..."],
    p: Float[Floats, "..."],
    q: Float[Floats, "..."],
    ratio: Float[Floats, "..."],
    scaled_ratio: Float[Floats, "..."],
) -> Float[Array, "..."]:
    """t·KL(p‖q) on the last axis, from ratio = log p/q and scaled_ratio = t·log p/q.

    Both are asked for because the second stays finite where the first overflows (t near 0), and the
    first is what the series needs where the second is rounded (t large). `t` has the last axis too.
    """
    # Where p = 0 the ratio says nothing and the term is t·q.
    small = (jnp.abs(ratio) < 0.5) & (p > 0)
    d = jnp.where(small, ratio, 0.0)
    # φ(d) = d² − (1 − d) ψ(d): no exponential, and a third of d² at most is lost to the difference.
    series = t * q * (d * d * (1.0 - (1.0 - d) * _half_square_series(d)))
    # p · (±∞) with p = 0 is 0.
    plain = jnp.where(p > 0, p * jnp.where(p > 0, scaled_ratio, 0.0), 0.0) + t * (q - p)
    terms = jnp.maximum(jnp.where(small, series, plain), 0.0)
    return jnp.sum(jnp.where((p > 0) & (q <= 0), jnp.inf, jnp.where(q > 0, terms, 0.0)), -1)


def kl(p: Float[Floats, "... n"], q: Float[Floats, "... n"]) -> Float[Array, "..."]:
    """D_KL(p‖q) = Σ p log p/q in nats, of probability vectors on the last axis.

    0 log 0 = 0; infinite where q = 0 < p. Never negative: 0 exactly when p == q.
    """
    p, q = jnp.broadcast_arrays(*same_floats(p, q))
    ratio = log_quotient(p, q)
    return scaled_kl(jnp.ones_like(p), p, q, ratio, ratio)


def tv(p: Float[Floats, "... n"], q: Float[Floats, "... n"]) -> Float[Array, "..."]:
    """Total variation ½ Σ|p − q| in [0, 1], of probability vectors on the last axis."""
    p, q = same_floats(p, q)
    return 0.5 * jnp.sum(jnp.abs(p - q), -1)


def tv_above(p: Float[Floats, "... n"], q: Float[Floats, "... n"]) -> Float[Array, "..."]:
    """Total variation in [0, 1] from above: the larger of Σ max(p − q, 0) and Σ max(q − p, 0).

    Both are the total variation of rows that sum to 1. Rows that do to rounding only, as (1e-17, 1) does, are
    meant divided by their sums; then TV is at most the larger (to first order in rounding, relative to
    itself), while ½ Σ|p − q| can be half of TV. Proof: with P ≥ Q the sums, Σ max(p/P − q/Q, 0) ≤
    Σ max(p − q, 0)/P, as q/Q ≥ q/P.
    """
    p, q = same_floats(p, q)
    more, less = jnp.sum(jnp.maximum(p - q, 0.0), -1), jnp.sum(jnp.maximum(q - p, 0.0), -1)
    return jnp.minimum(jnp.maximum(more, less), 1.0)


def jeffreys(p: Float[Floats, "... n"], q: Float[Floats, "... n"]) -> Float[Array, "..."]:
    """KL(p‖q) + KL(q‖p) = Σ (p − q) log p/q in nats; infinite where exactly one of them is 0."""
    p, q = jnp.broadcast_arrays(*same_floats(p, q))
    terms = jnp.where((p > 0) != (q > 0), jnp.inf, (p - q) * log_quotient(p, q))
    return jnp.sum(terms, -1)


_SORTED = 48  # values, above which sorting them is cheaper than comparing each with each


def wasserstein(
    values: Float[Floats, "X n"], p: Float[Floats, "X n"], q: Float[Floats, "X n"]
) -> Float[Array, " X"]:
    """W1 of the laws of `values` under p and q: ∫ |F_p(t) − F_q(t)| dt, in units of the values."""
    apart = p - q
    if values.shape[-1] > _SORTED:
        order = jnp.argsort(values, -1)
        steps = jnp.diff(jnp.take_along_axis(values, order, -1), axis=-1)
        return jnp.sum(jnp.abs(jnp.cumsum(jnp.take_along_axis(apart, order, -1), -1)[:, :-1]) * steps, -1)
    # Few values: each against each, which needs no sort. Of tied values the first stands for all.
    v, other = values[:, :, None], values[:, None, :]
    lead = jnp.sum(jnp.where(other <= v, apart[:, None, :], 0.0), -1)
    step = jnp.min(jnp.where(other > v, other - v, jnp.inf), -1)
    tied = jnp.any((other == v) & np.tri(values.shape[-1], k=-1, dtype=bool)[None], -1)
    return jnp.sum(jnp.abs(lead) * jnp.where(tied | (step == jnp.inf), 0.0, step), -1)
