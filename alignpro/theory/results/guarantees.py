"""The reward that a prompter made from wrong rewards is sure to earn, and the λ that makes it most."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from alignpro.errors import AlignProError, as_number
from alignpro.theory.divergences import Floats
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import Instance, bare
from alignpro.theory.results.rewards import Temperature, as_temperature, rewards_of
from alignpro.theory.results.robustness import extent, worst_loss, worst_tv

Bound = Literal["floor", "by_tv", "by_value"]


class Floor(NamedTuple):
    """Lower bounds on E_ρ̃ R, for ρ̃ ∝ ρ_sft e^{R̃/λ} of any R̃ with max(R̃ − R) − min(R̃ − R) ≤ δ·span(R)."""

    reward: Float[Array, " X"]
    """E_ρ* R, which ρ̃ would earn were R̃ = R; reward units, as all."""
    floor: Float[Array, " X"]
    """The least E_ρ̃ R of all such R̃, attained: no larger lower bound is true."""
    by_tv: Float[Array, " X"]
    """`reward` − span(R) tanh(δ span(R)/(4λ)) ≤ `floor`."""
    by_value: Float[Array, " X"]
    """λ log Z − `worst_loss(δ span(R), λ)` ≤ `floor`; tends to max R − δ span(R) as λ → 0."""


def floor(instance: Instance, lam: Temperature, delta: Float[Floats, ""] | float) -> Floor:
    """Bound from below what ρ* of an estimate of R earns, the estimate's error no wider than δ·span(R).

    The width is of R̃ − R over ρ_sft's support, per prompt: a shift of all rewards of a prompt is no error.
    The worst error lifts by δ·span(R) exactly the rewrites whose R is at most some level.

    Raises:
        AlignProError: λ is not positive and finite, or δ is negative or not finite.
    """
    if not isinstance(delta, jax.core.Tracer) and not 0 <= as_number("delta", delta) < np.inf:
        raise AlignProError(f"delta {delta}: must be at least 0 and finite; give the error's width in spans")
    return _floor(bare(instance), as_temperature("lam", lam), jnp.asarray(delta, float))


@jax.jit
def _floor(instance: Instance, lam: Array, delta: Array) -> Floor:
    """`floor` at one λ, or at one for each prompt [X]."""
    r = rewards_of(instance)
    support = r.prior > 0
    low, high = extent(r.rewrite, support)
    span = high - low
    width, t = delta * span, jnp.broadcast_to(lam, span.shape)
    e = jnp.where(support, r.rewrite - high[:, None], 0.0)
    star = tilt(r.prior, e, t)

    def lifted(k: Array) -> Array:
        """E_ρ̃ R, less max R, where rewrites worth no more than k are overrated."""
        wrong = e + jnp.where(e <= e[:, k][:, None], width[:, None], 0.0)
        return jnp.sum(tilt(r.prior, wrong, t).probs * e, -1)

    mean = jnp.sum(star.probs * e, -1)
    least = jnp.minimum(jnp.min(lax.map(lifted, jnp.arange(e.shape[-1])), 0), mean)
    top = r.top + high
    return Floor(
        reward=top + mean,
        floor=top + least,
        by_tv=top + mean - span * worst_tv(width, t),
        by_value=top + star.free_energy - worst_loss(width, t),
    )


_floors = jax.jit(jax.vmap(_floor, (None, 0, None)))
"""`_floor` at many λ, [points] or, one for each prompt, [points, X]."""


class RobustLam(NamedTuple):
    """The λ that makes a lower bound on E_ρ̃ R largest, on a grid that is refined; reward units."""

    lam: Float[Array, "..."]
    """λ: one for all prompts, or [X]. The bound holds at every λ, so also where a better one was missed."""
    value: Float[Array, "..."]
    """The bound at this λ: its mean over P, or [X]."""
    reward: Float[Array, "..."]
    """E_ρ* R at this λ: what is earned if there is no error; its mean over P, or [X]."""


def robust_lam(
    instance: Instance, delta: float, *, per_prompt: bool = False, bound: Bound = "floor", points: int = 241
) -> RobustLam:
    """Find the λ of the largest lower bound, `floor`'s field `bound`, from 1e-4 to 1e4 times the span of R.

    The maximum need not be unique or interior: where nothing is gained by reading R̃ the bound grows to
    E_ρ_sft R as λ → ∞, and where the error is small it may be largest at the least λ. Two rounds of `points`
    values in log λ; no better λ between them is excluded.

    Raises:
        AlignProError: δ is negative, or all rewrites of every prompt are worth the same.
    """
    r = rewards_of(instance)
    low, high = extent(r.rewrite, r.prior > 0)
    span = np.asarray(high - low)
    p = np.asarray(instance.p)
    if not (p @ span) > 0:
        raise AlignProError("instance: all rewrites of every prompt are worth the same; any lam does")
    floor(instance, 1.0, delta)  # refuses a bad δ
    unit = np.where(span > 0, span, span.max()) if per_prompt else np.full(len(p), span.max())
    lead, best, reach = np.zeros(len(p)), None, 4.0 * np.log(10.0)
    for _ in range(2):
        steps = lead[None, :] + np.linspace(-reach, reach, points)[:, None]
        lams = np.exp(steps) * unit
        found = _floors(bare(instance), jnp.asarray(lams), jnp.asarray(delta, float))
        value, reward = np.asarray(getattr(found, bound)), np.asarray(found.reward)
        if not per_prompt:
            value, reward = (np.repeat((v @ p)[:, None], len(p), 1) for v in (value, reward))
        at, x = value.argmax(0), np.arange(len(p))
        now = RobustLam(lams[at, x], value[at, x], reward[at, x])
        best = now if best is None else RobustLam(*np.where(now.value > best.value, now, best))
        lead, reach = steps[at, x], 2.0 * reach / (points - 1)
    assert best is not None
    return best if per_prompt else RobustLam(*(v[0] for v in best))
