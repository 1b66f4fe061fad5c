"""The Gibbs tilt: one solver for both optima of the paper.

`p(k) ∝ base(k) exp(energy(k) / temperature)` is ρ* (Lemma 1: base ρ_sft, energy R, temperature λ) and
π* (equation 4: base π_F, energy r*, temperature β). It maximises E_p[energy] − temperature·KL(p‖base),
with optimal value temperature·log Z.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.divergences import Floats, expm1_psi, log1p_or, log_quotient, same_floats, scaled_kl
from alignpro.theory.instance import rectangular

# Above this the mass sits far from the base's mean, and centring at the maximum is the accurate choice.
_FAR = 8.0
# ψ is summed directly up to here; beyond, exp could overflow.
_HUGE, _HUGE_SINGLE = 500.0, 60.0

T = TypeVar("T")


class Tilted(NamedTuple):
    """A tilted distribution p and what the base loses to it, on the last axis [..., K].

    "Reward units" are those of `energy`. `lift = gain + cost`, and all three are ≥ 0 with relative
    accuracy (no cancellation), at every temperature.
    """

    probs: Float[Array, "... K"]
    """p (probabilities); 0 off the base's support."""
    log_probs: Float[Array, "... K"]
    """log p in nats; −∞ off the support. Meaningful where `probs` underflows."""
    log_ratio: Float[Array, "... K"]
    """log p/base in nats; 0 off the support."""
    log_z: Float[Array, "..."]
    """log Z in nats; overflows to ±∞ only where |energy|/temperature does. Then use `free_energy`."""
    free_energy: Float[Array, "..."]
    """temperature·log Z, the optimal value, in reward units."""
    lift: Float[Array, "..."]
    """E_p[energy] − E_base[energy] = temperature·Jeff(p, base), in reward units."""
    cost: Float[Array, "..."]
    """temperature·KL(p‖base), in reward units."""
    gain: Float[Array, "..."]
    """temperature·log Z − E_base[energy] = temperature·KL(base‖p), in reward units."""
    tv: Float[Array, "..."]
    """½ Σ|p − base| (probability)."""


def power_of_two(n: Int[Floats, "..."], dtype: DTypeLike = np.float64) -> Float[Array, "..."]:
    """2ⁿ exactly, where that is a normal number of the dtype (float64: −1022 ≤ n ≤ 1023)."""
    f = jnp.finfo(dtype)
    bits = (n.astype(f"int{f.bits}") + (1 - f.minexp)) << f.nmant
    return lax.bitcast_convert_type(bits, dtype)


def exponent(x: Float[Floats, "..."]) -> Int[Array, "..."]:
    """e with 2^(e−1) ≤ |x| < 2^e (0 for 0), held to ±480 (float32: ±40).

    Two scalings by such powers then leave any temperature from 1e-18 to 1e18 (float32: 1e-6 to 1e6) a
    normal number.
    """
    x = jnp.abs(lax.stop_gradient(x))
    f = jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, f"int{f.bits}")
    most = 480 if f.bits == 64 else 40
    return jnp.where(x > 0, jnp.clip((bits >> f.nmant) + f.minexp, -most, most), 0)


def positive(name: str, value: Any) -> Any:
    """β or λ, one or an array of them, checked by `check_temperature` where they are concrete.

    What JAX traces cannot be looked at, and passes.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    array = rectangular(name, value)
    if array.ndim == 0:
        return check_temperature(name, value)
    if array.dtype.kind not in "fiu":
        raise AlignProError(f"{name}: has dtype {array.dtype}; give real numbers")
    for extreme in (array.min(), array.max()) if array.size else ():
        check_temperature(name, float(extreme))
    return value


def tilt(
    base: Float[Floats, "... K"], energy: Float[Floats, "... K"], temperature: Float[Floats, "..."] | float
) -> Tilted:
    """The distribution `p ∝ base · exp(energy / temperature)`, in log space.

    Args:
        base: probability vectors; zeros are allowed and stay zero.
        energy: any finite values, in reward units; those off the base's support are ignored.
        temperature: positive, in reward units, broadcast against the leading axes.

    In float64, or in float32 when both arrays are float32. Pure, differentiable, and safe under jit and vmap.
    Nothing overflows for finite energies: they are divided by a power of two and measured from their maximum
    over the support; temperatures near 0 give the limit, all mass on the best. Where energies differ little
    beside the temperature, log Z is log1p(Σ base ψ(u)) about the base's mean, ψ(u) = eᵘ − 1 − u, which keeps
    the relative accuracy of `gain`, `cost` and `lift`.

    Raises:
        AlignProError: a temperature that is not positive and finite, where it is not traced.
    """
    return _tilt(base, energy, positive("temperature", temperature))


@jax.jit
def _tilt(base: Any, energy: Any, temperature: Any) -> Tilted:
    base, energy = jnp.broadcast_arrays(*same_floats(base, energy))
    dtype = base.dtype
    temperature = jnp.broadcast_to(jnp.asarray(temperature, dtype), base.shape[:-1])
    power = exponent(jnp.max(jnp.where(base > 0, jnp.abs(energy), 0.0), -1))
    shrink, unit = power_of_two(-power, dtype), power_of_two(power, dtype)
    scaled = tilt_scaled(base, energy * shrink[..., None], temperature * shrink)
    units = {name: getattr(scaled, name) * unit for name in ("free_energy", "lift", "cost", "gain")}
    return scaled._replace(**units)


def tilt_scaled(base: Array, energy: Array, t: Array) -> Tilted:
    """`tilt` of energies that are at most about 1 on the support of `base`: arrays of one dtype and shape."""
    dtype, support = base.dtype, base > 0
    huge, least = (_HUGE, -1e300) if dtype == np.float64 else (_HUGE_SINGLE, -1e36)
    pivot = jnp.max(jnp.where(support, energy, -jnp.inf), -1)
    d = jnp.where(support, energy - pivot[..., None], 0.0)
    tk, per_t = t[..., None], (1.0 / t)[..., None]

    mean = jnp.sum(base * d, -1)
    from_mean = d - mean[..., None]
    reach = -mean / t  # the largest (energy − mean)/temperature
    a = d * per_t
    # Half the exponent: its square is e^a, and the quotient e^a/Z below does not underflow before it must.
    half = jnp.exp(0.5 * a)
    exp_a = half * half
    z_max = jnp.sum(base * exp_a, -1)
    log_z_max = jnp.log(z_max)
    u = jnp.clip(from_mean * per_t, least, huge)
    exp_u = exp_a * jnp.exp(jnp.minimum(reach, huge))[..., None]
    growth_u, psi_u = expm1_psi(u, exp_u)
    log_z_mean = log1p_or(jnp.sum(base * psi_u, -1), log_z_max + reach)

    far, beyond = reach > _FAR, reach > huge
    far_k = far[..., None]
    ratio = jnp.where(support, jnp.where(far_k, a - log_z_max[..., None], u - log_z_mean[..., None]), 0.0)
    # temperature·ratio without the division, so that it survives where the ratio overflows.
    scaled_ratio = jnp.where(far_k, d - (t * log_z_max)[..., None], from_mean - (t * log_z_mean)[..., None])
    scaled_ratio = jnp.where(support, scaled_ratio, 0.0)
    root = half * lax.rsqrt(z_max)[..., None]
    quotient = root * root
    # p/base − 1 = (e^u − E e^u)/E e^u, relatively accurate however close p is to base.
    excess = jnp.sum(base * growth_u, -1)
    growth = jnp.where(
        beyond[..., None], quotient - 1.0, (growth_u - excess[..., None]) * (1.0 / (1.0 + excess))[..., None]
    )
    growth = jnp.where(support, growth, 0.0)
    probs = base * quotient
    value = jnp.where(far, t * log_z_max, mean + t * log_z_mean)
    log_base = jnp.where(support, jnp.log(jnp.where(support, base, 1.0)), -jnp.inf)
    return Tilted(
        probs=probs,
        log_probs=log_base + ratio,
        log_ratio=ratio,
        log_z=pivot / t + value / t,
        free_energy=pivot + value,
        lift=jnp.sum(base * growth * scaled_ratio, -1),
        cost=scaled_kl(tk, probs, base, ratio, scaled_ratio),
        gain=jnp.where(beyond, t * log_z_max - mean, t * log_z_mean),
        tv=jnp.minimum(0.5 * jnp.sum(base * jnp.abs(growth), -1), 1.0),
    )


def grid(function: Callable[[Array, Array], T], betas: Float[Floats, "B"], lams: Float[Floats, "L"]) -> T:
    """`function(beta, lam)` at every pair: each array of the result gains leading axes [B, L].

    One vmapped call: nothing that depends on β alone is computed again for every λ.
    """
    betas, lams = jnp.asarray(positive("betas", betas), float), jnp.asarray(positive("lams", lams), float)
    return jax.vmap(lambda beta: jax.vmap(lambda lam: function(beta, lam))(lams))(betas)


def policy_kl(policy, base, tilted: Tilted, scaled_log, temperature):
    """temperature·KL(policy‖tilted), temperature·KL(policy‖base), their common support, log policy/base."""
    t = jnp.broadcast_to(temperature, policy.shape)
    inside = (policy > 0) & (base > 0)
    log_base = jnp.where(inside, log_quotient(policy, base), 0.0)
    # Where the tilt underflows the divergence stays finite: its log is known. A floor keeps the support.
    probs = jnp.where(base > 0, jnp.maximum(tilted.probs, jnp.finfo(policy.dtype).tiny), 0.0)
    ratio = jnp.where(inside, log_base - tilted.log_ratio, 0.0)
    scaled_ratio = jnp.where(inside, temperature * log_base - scaled_log, 0.0)
    to_tilted = scaled_kl(t, policy, probs, ratio, scaled_ratio)
    return to_tilted, scaled_kl(t, policy, base, log_base, temperature * log_base), inside, log_base
