"""Rewards of an instance measured from the best reachable one; variances, extremes and roots."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from alignpro.theory.divergences import Floats
from alignpro.theory.gibbs import positive
from alignpro.theory.instance import Instance, bare, probabilities
from alignpro.theory.solution import EPS

Temperature = Float[Floats, ""] | float


def given(prompter: Float[Floats, "X K"], frozen: Float[Floats, "K Y"]) -> Bool[Array, "X Y"]:
    """Whether a prompter's rewrites can give the response: by supports, as products may underflow."""
    return (jnp.asarray(prompter) > 0).astype(float) @ (jnp.asarray(frozen) > 0).astype(float) > 0


def reachable(instance: Instance) -> Bool[Array, "X Y"]:
    """Whether π_F(·|x), or π_F(·|x′) for some x′ in the support of ρ_sft(·|x), can give the response."""
    own = jnp.asarray(instance.frozen)[jnp.asarray(instance.own)]
    return given(instance.prior, instance.frozen) | (own > 0)


class Rewards(NamedTuple):
    """Rewards of one instance, measured from `top`; reward units."""

    top: Float[Array, " X"]
    """The best reward of a response reachable from x by its own row or by the support of ρ_sft."""
    response: Float[Array, "X Y"]
    """r*(x,y) − top; 0 where no row reaches y, > 0 only where only rows off the support do."""
    rewrite: Float[Array, "X K"]
    """R(x,x′) − top."""
    tie: Float[Array, " X"]
    """Differences of R up to this are rounding."""
    prior: Float[Array, "X K"]
    """ρ_sft (probabilities)."""
    frozen: Float[Array, "K Y"]
    """π_F (probabilities)."""
    own: Float[Array, "X Y"]
    """π_F(·|x) (probabilities)."""


def rewards_of(instance: Instance) -> Rewards:
    """Measure the rewards of an instance from its best reachable response, prompt by prompt."""
    return _compiled_rewards(bare(instance))


@jax.jit
def _compiled_rewards(instance: Instance) -> Rewards:
    prior, frozen = jnp.asarray(instance.prior, float), jnp.asarray(instance.frozen, float)
    reward, own = jnp.asarray(instance.reward, float), frozen[jnp.asarray(instance.own)]
    reach = reachable(instance)
    top = jnp.max(jnp.where(reach, reward, -jnp.inf), -1)
    anywhere = jnp.any(frozen > 0, 0)
    response = jnp.where(anywhere[None, :], reward - top[:, None], 0.0)
    span = -jnp.min(jnp.where(reach, response, 0.0), -1)
    return Rewards(
        top=top,
        response=response,
        rewrite=response @ frozen.T,
        tie=(2 * frozen.shape[-1] + 6) * EPS * span,
        prior=prior,
        frozen=frozen,
        own=own,
    )


def as_temperature(name: str, value: Temperature) -> Array:
    """Convert β or λ to an array; check it where it is concrete (a traced one cannot be)."""
    return jnp.asarray(positive(name, value), float)


def as_prompter(instance: Instance, prompter: Float[Floats, "X K"]) -> Array:
    """Convert ρ [X, K] to an array; check it where it is concrete (a traced one cannot be)."""
    if not isinstance(prompter, jax.core.Tracer):
        prompter = probabilities("prompter", prompter, np.shape(instance.prior))
    return jnp.asarray(prompter, float)


@jax.jit
def variance(probs: Float[Floats, "... n"], values: Float[Floats, "... n"]) -> Float[Array, "..."]:
    """Var_p(values), measured from the most probable value: accurate next to a point mass."""
    probs, values = jnp.broadcast_arrays(probs, values)
    mode = jnp.argmax(probs, -1)[..., None]
    d = jnp.where(probs > 0, values - jnp.take_along_axis(values, mode, -1), 0.0)
    return jnp.sum(probs * (d - jnp.sum(probs * d, -1, keepdims=True)) ** 2, -1)


class Extremes(NamedTuple):
    """An energy on the support of a base, on the last axis."""

    best: Float[Array, "... n"]
    """Whether the energy is maximal on the support, to within `tie` (bool)."""
    mass: Float[Array, "..."]
    """Mass of the maximisers under the base (probability)."""
    separation: Float[Array, "..."]
    """Least energy of a maximiser less the best of the others; ∞ where there are no others."""
    maximum: Float[Array, "..."]
    """Largest energy."""
    span: Float[Array, "..."]
    """Largest less least energy."""


@jax.jit
def extremes(base: Array, energy: Array, tie: Array) -> Extremes:
    """Find the extremes of `energy` where `base` > 0; energies within `tie` of the largest are maximal."""
    inside = base > 0
    maximum = jnp.max(jnp.where(inside, energy, -jnp.inf), -1)
    best = inside & (energy >= (maximum - tie)[..., None])
    least = jnp.min(jnp.where(best, energy, jnp.inf), -1)
    second = jnp.max(jnp.where(inside & ~best, energy, -jnp.inf), -1)
    return Extremes(
        best=best,
        mass=jnp.minimum(jnp.sum(jnp.where(best, base, 0.0), -1), 1.0),
        separation=least - second,
        maximum=maximum,
        span=maximum - jnp.min(jnp.where(inside, energy, jnp.inf), -1),
    )


def root_of(function: Callable[[Array], tuple[Array, Array]], low: Array, high: Array) -> Array:
    """t in [low, high] (> 0) where each entry of an increasing function changes sign.

    `function(t)` gives the value and its derivative in log t. Newton steps in log t, with a bisection
    every third round and wherever a step would leave the bracket.
    """

    def go_on(state):
        _, _, _, done, rounds = state
        return (rounds < 240) & ~jnp.all(done)

    def step(state):
        low, high, t, done, rounds = state
        value, slope = function(t)
        low, high = jnp.where(value < 0, t, low), jnp.where(value < 0, high, t)
        newton = t * jnp.exp(jnp.clip(-value / slope, -700.0, 700.0))
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        inside = (newton >= low) & (newton <= high)
        good = inside & ((rounds % 3 < 2) | (jnp.abs(newton - t) <= 1e-6 * t))
        new = jnp.where(good, newton, middle)
        finished = (inside & (jnp.abs(newton - t) <= 4 * EPS * t)) | (high <= low * (1 + 4 * EPS))
        return low, high, jnp.where(done, t, new), done | finished, rounds + 1

    start = jnp.sqrt(low) * jnp.sqrt(high)
    return lax.while_loop(go_on, step, (low, high, start, high <= low, 0))[2]
