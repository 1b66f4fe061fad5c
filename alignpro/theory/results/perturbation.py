"""A Gibbs policy built from wrong energies, judged by the true ones: its loss exactly and at worst.

The policy p ∝ base·exp(e/t) is optimal for the true energies e, and p̂ ∝ base·exp(ê/t) was built from
ê = e + δ; s = span(δ) over the base's support. Proofs: `docs/robustness.md`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from alignpro.theory.divergences import Floats, log1p, psi, scaled_kl, tv
from alignpro.theory.gibbs import Tilted, tilt

# Up to this span(δ)/t the tilt of p by δ is exact to rounding; beyond, what underflows in p counts.
_FAR = 500.0


class Perturbation(NamedTuple):
    """The loss of p̂, built from ê = e + δ, against the optimal p; reward units unless said otherwise.

    F(q) = E_q e − t KL(q‖base). The assumption behind each bound is a number here (`error`, `span_error`).
    """

    probs: Float[Array, "... K"]
    """p̂ (probabilities)."""
    error: Float[Array, "..."]
    """ε = max |δ| over the support."""
    span_error: Float[Array, "..."]
    """s = max δ − min δ over the support; at most twice `error`."""
    loss: Float[Array, "..."]
    """F(p) − F(p̂) = t KL(p̂‖p), exactly."""
    loss_sup: Float[Array, "..."]
    """ε²/(2t) ≥ `loss_span`, ε being `error`."""
    loss_span: Float[Array, "..."]
    """s²/(8t) ≥ `loss_sharp`, s being `span_error`."""
    loss_sharp: Float[Array, "..."]
    """`worst_loss(s, t)` ≥ `loss`: the least bound that knows only s and t."""
    loss_lower: Float[Array, "..."]
    """t ψ(−s/t) Var_p̂(δ)/s² ≤ `loss`, with ψ(u) = eᵘ − 1 − u ≈ u²/2."""
    loss_upper: Float[Array, "..."]
    """t ψ(s/t) Var_p̂(δ)/s² ≥ `loss`, from the variance of the error under the policy at hand."""
    reward_loss: Float[Array, "..."]
    """E_p e − E_p̂ e, of either sign: the reward-hacking gap."""
    reward_bound: Float[Array, "..."]
    """span(e)·tanh(s/4t) ≥ |`reward_loss`|."""
    illusion: Float[Array, "..."]
    """t Jeff(p, p̂) = E_p̂ δ − E_p δ ≥ 0: by how much ê overstates what p̂ gained over p."""
    illusion_bound: Float[Array, "..."]
    """s·tanh(s/4t) ≥ `illusion`."""
    reverse: Float[Array, "..."]
    """t KL(p‖p̂) = `illusion` − `loss`."""
    tv: Float[Array, "..."]
    """d_TV(p, p̂) (probability)."""
    tv_bound: Float[Array, "..."]
    """tanh(s/4t) ≥ `tv` (probability)."""


Numbers = Float[Floats, "..."] | float


def worst_tv(width: Numbers, temperature: Numbers) -> Float[Array, "..."]:
    """tanh(s/4t): the largest total variation between two Gibbs policies whose energies differ by span s.

    Attained by two outcomes.
    """
    return jnp.tanh(jnp.asarray(width, float) / (4.0 * jnp.asarray(temperature, float)))


def worst_loss(width: Numbers, temperature: Numbers) -> Float[Array, "..."]:
    """t (κ − 1 − log κ), κ = (s/t)/(1 − e^{−s/t}): the largest t KL(p̂‖p) at span(δ) = s. In reward units.

    At most s²/(8t) (approached for s ≪ t) and at most s (for s ≫ t); attained by two outcomes.
    """
    width, temperature = jnp.asarray(width, float), jnp.asarray(temperature, float)
    z = jnp.clip(width / (2.0 * temperature), 0.0, 1e300)
    # log κ = z − log(sinh z / z) with z = s/2t.
    small = z < 0.5
    near = jnp.where(small, z, 0.0)
    square = near * near
    tail = jnp.ones_like(near)
    for n in range(8, 1, -1):
        tail = 1.0 + square / ((2 * n) * (2 * n + 1)) * tail
    far = jnp.where(small, 1.0, z)
    log_kappa = jnp.where(
        small, near - log1p(square / 6.0 * tail), jnp.log(2.0 * far) - log1p(-jnp.exp(-2.0 * far))
    )
    return jnp.where(z < 1e300, jnp.minimum(temperature * psi(log_kappa), width), width)


def _scaled_psi(width: Array, temperature: Array, sign: float) -> Array:
    """t ψ(±s/t) in reward units; s²/(2t) for s ≪ t."""
    u = jnp.clip(width / temperature, 0.0, 1e300)
    return jnp.where(u < 1e-8, width * (0.5 * u * (1.0 + sign * u / 3.0)), temperature * psi(sign * u))


def extent(values: Float[Array, "... K"], support: Bool[Array, "... K"]) -> tuple[Array, Array]:
    """The least and the largest value on the support."""
    return (
        jnp.min(jnp.where(support, values, jnp.inf), -1),
        jnp.max(jnp.where(support, values, -jnp.inf), -1),
    )


def halves(both: Any) -> tuple[Any, Any]:
    """The two elements of a leading axis of length 2, of every array of a record."""
    return jax.tree.map(lambda leaf: leaf[0], both), jax.tree.map(lambda leaf: leaf[1], both)


def tilt_both(base: Array, other: Array, energy: Array, estimate: Array, t: Array) -> tuple[Tilted, Tilted]:
    """Two tilts of energies at one temperature in one call: half the compiling."""
    return halves(tilt(jnp.stack([base, other]), jnp.stack([energy, estimate]), jnp.stack([t, t])))


def perturbation(
    base: Float[Floats, "... K"],
    energy: Float[Floats, "... K"],
    estimate: Float[Floats, "... K"],
    temperature: Float[Floats, "..."] | float,
    delta: Float[Floats, "... K"] | None = None,
) -> Perturbation:
    """The Gibbs policy of `estimate` judged by the true `energy`, exactly, and its bounds.

    Args:
        base: probability vectors (ρ_sft or π_F), zeros allowed; what lies off the support is ignored.
        energy: true finite energies (R or r*), in reward units.
        estimate: the energies p̂ was built from.
        temperature: λ or β > 0, broadcast against the leading axes.
        delta: `estimate − energy`, where it is known better than by subtraction.

    Pure: use it under jit, vmap and grad. Never NaN for energies below 1e300; a bound too large for a float
    is inf.
    """
    base, energy, estimate = jnp.broadcast_arrays(*(jnp.asarray(a, float) for a in (base, energy, estimate)))
    delta = estimate - energy if delta is None else jnp.broadcast_to(jnp.asarray(delta, float), base.shape)
    t = jnp.broadcast_to(jnp.asarray(temperature, float), base.shape[:-1])
    tk = jnp.broadcast_to(t[..., None], base.shape)
    support = base > 0
    (low, high), (e_low, e_high) = extent(delta, support), extent(energy, support)
    error, s = jnp.maximum(jnp.abs(low), jnp.abs(high)), high - low
    e = jnp.where(support, energy - e_high[..., None], 0.0)
    e_hat = jnp.where(support, estimate - extent(estimate, support)[1][..., None], 0.0)
    d = jnp.where(support, delta - high[..., None], 0.0)
    star, hat = tilt_both(base, base, e, e_hat, t)

    step = tilt(star.probs, d, t)
    near = s <= _FAR * t
    near_k = near[..., None]
    scaled_ratio = jnp.where(
        support, (e_hat - hat.free_energy[..., None]) - (e - star.free_energy[..., None]), 0.0
    )
    # Far apart, p may underflow where p̂ lives; its logarithm is known. A floor keeps the support.
    floor = jnp.where(support, jnp.finfo(float).tiny, 0.0)
    far_ratio = jnp.clip(scaled_ratio / tk, -1e300, 1e300)
    far_loss = scaled_kl(tk, hat.probs, jnp.maximum(star.probs, floor), far_ratio, scaled_ratio)
    far_reverse = scaled_kl(tk, star.probs, jnp.maximum(hat.probs, floor), -far_ratio, -scaled_ratio)
    loss, reverse = jnp.where(near, step.cost, far_loss), jnp.where(near, step.gain, far_reverse)
    moved = jnp.where(near_k, star.probs * jnp.expm1(step.log_ratio), hat.probs - star.probs)

    mean = jnp.sum(hat.probs * d, -1, keepdims=True)
    scale = jnp.where(s > 0, s, 1.0)[..., None]
    spread = jnp.sum(hat.probs * jnp.where(support, (d - mean) / scale, 0.0) ** 2, -1)  # Var_p̂(δ)/s²
    distance = worst_tv(s, t)
    e_mean = jnp.sum(star.probs * e, -1, keepdims=True)
    return Perturbation(
        probs=hat.probs,
        error=error,
        span_error=s,
        loss=loss,
        loss_sup=error * (error / (2.0 * t)),
        loss_span=s * (s / (8.0 * t)),
        loss_sharp=worst_loss(s, t),
        loss_lower=spread * _scaled_psi(s, t, -1.0),
        # Where ψ overflows the variance may have underflowed: no bound.
        loss_upper=jnp.where(near, spread * _scaled_psi(jnp.where(near, s, 0.0), t, 1.0), jnp.inf),
        reward_loss=-jnp.sum(moved * jnp.where(support, e - e_mean, 0.0), -1),
        reward_bound=(e_high - e_low) * distance,
        illusion=jnp.where(near, step.lift, far_loss + far_reverse),
        illusion_bound=s * distance,
        reverse=reverse,
        tv=jnp.where(near, step.tv, tv(hat.probs, star.probs)),
        tv_bound=distance,
    )


class Ensemble(NamedTuple):
    """M estimates against their average, in reward units."""

    members: Perturbation
    """The perturbation by each estimate, with a leading axis [M]."""
    average: Perturbation
    """The perturbation by the mean estimate."""
    ambiguity: Float[Array, "..."]
    """A = −t log Σ_k Π_m p̂_m(k)^{1/M} ≥ 0: the disagreement of the members."""


def ensemble(
    base: Float[Floats, "... K"],
    energy: Float[Floats, "... K"],
    estimates: Float[Floats, "M ... K"],
    temperature: Float[Floats, "..."] | float,
) -> Ensemble:
    """Averaging M estimates: t KL(p‖p̄) = mean_m t KL(p‖p̂_m) − A, exactly, with A ≥ 0 the `ambiguity`.

    The loss t KL(p̂‖p) itself has no such guarantee away from small errors: it can be larger than the mean of
    the members' losses. Bases, energies and temperatures as in `perturbation`; safe under jit and vmap.
    """
    estimates = jnp.asarray(estimates, float)
    count = estimates.shape[0]
    base, energy = (jnp.broadcast_to(jnp.asarray(a, float), estimates.shape[1:]) for a in (base, energy))
    t = jnp.broadcast_to(jnp.asarray(temperature, float), base.shape[:-1])
    delta = estimates - energy[None]
    average = jnp.mean(delta, 0)
    center = energy + average
    # A = mean_m t KL(p̄‖p̂_m): the convexity of t log Z, as a sum of non-negative terms.
    energies = jnp.concatenate([jnp.stack([energy] * (count + 1)), jnp.stack([center] * count)])
    targets = jnp.concatenate([estimates, center[None], estimates])
    errors = jnp.concatenate([delta, average[None], delta - average[None]])
    every = jax.vmap(lambda e, estimate, d: perturbation(base, e, estimate, t, d))(energies, targets, errors)
    members, mean = (
        jax.tree.map(lambda leaf, part=part: leaf[part], every) for part in (slice(count), count)
    )
    return Ensemble(members, mean, jnp.mean(every.reverse[count + 1 :], 0))
