"""The cost of a wrong reward, a wrong frozen model or a wrong λ, exactly and at worst.

Each is a `perturbation`: the policy built from the wrong energies, judged by the true ones. Proofs:
`docs/robustness.md`. Nats, probabilities and reward units as everywhere.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.bounds import paper_r_max
from alignpro.theory.divergences import Floats, log_quotient, scaled_kl, tv
from alignpro.theory.instance import Instance, bare, probabilities, replaced
from alignpro.theory.results.perturbation import (
    Ensemble,
    Perturbation,
    ensemble,
    extent,
    halves,
    perturbation,
    tilt_both,
    worst_loss,
    worst_tv,
)
from alignpro.theory.results.rewards import reachable
from alignpro.theory.solution import Solution, solution


def _solutions(instance: Instance, noisy: Instance, beta: Array, lam: Array) -> tuple[Solution, Solution]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), instance, noisy)
    return halves(jax.vmap(lambda one: solution(one, beta, lam))(stacked))


class Sides(NamedTuple):
    """Distance of the sides of Theorem 1 on the noisy instance from the true ones, in reward units."""

    gap_change: Float[Array, " X"]
    """|noisy gap − true gap|, of each instance's own ρ* against its own π*."""
    gap_bound: Float[Array, " X"]
    """Bound on `gap_change`."""
    rhs_change: Float[Array, " X"]
    """|noisy − true right side| of the span form of Theorem 1."""
    rhs_bound: Float[Array, " X"]
    """Bound on `rhs_change`."""
    theorem1_change: Float[Array, " X"]
    """|noisy − true right side| of Theorem 1, its r_max taken from each instance (`bounds.paper_r_max`)."""
    theorem1_bound: Float[Array, " X"]
    """Bound on `theorem1_change`."""


def _sides(true: Solution, noisy: Solution, prompter: Perturbation, gap: Array, tvs: Array) -> Sides:
    """Compare both sides; `gap` bounds the gap's change and `tvs` the change of TV1 + TV2.

    ŵ T̂ − w T = (ŵ − w) T̂ + w (T̂ − T); λ KL(ρ*‖ρ_sft) rises by exactly `loss` − `reward_loss`.
    """
    third = prompter.loss_sharp + prompter.reward_bound

    def compare(width: Array, noisy_width: Array) -> tuple[Array, Array]:
        moved, total = jnp.abs(noisy_width - width), noisy.tv_model + noisy.tv_shift
        rhs = width * (true.tv_model + true.tv_shift) - true.prompter_kl
        return jnp.abs(noisy_width * total - noisy.prompter_kl - rhs), moved * total + width * tvs + third

    ones = jnp.ones_like(true.span)
    return Sides(
        jnp.abs(noisy.gap - true.gap),
        gap,
        *compare(true.span, noisy.span),
        *compare(paper_r_max(true) * ones, paper_r_max(noisy) * ones),
    )


class RewardNoise(NamedTuple):
    """The cost of deciding by r̂ in place of r*, per prompt [X], in reward units."""

    reward_error: Float[Array, " X"]
    """ε(x) = max |r̂ − r*| over the reachable responses."""
    reward_span_error: Float[Array, " X"]
    """max − min of r̂ − r* over the reachable responses; 0 for a shift of a prompt's rewards."""
    contraction: Float[Array, " X"]
    """max TV(π_F(·|x′), π_F(·|x″)) over rewrites x′, x″ in the support of ρ_sft (probability)."""
    prompter: Perturbation
    """ρ̂ built from R̂ against ρ*, with λ. Its `span_error` ≤ `contraction`·`reward_span_error`."""
    model: Perturbation
    """π̂ built from r̂ against π*, with β: RLHF on the wrong reward. `reward_loss` = E_π* r* − E_π̂ r*."""
    sides: Sides
    """Distance of the sides of Theorem 1 from the true ones."""


def reward_noise(instance: Instance, estimate: Float[Floats, "X Y"], beta: float, lam: float) -> RewardNoise:
    """Reward noise: |r̂ − r*| ≤ ε ⇒ |R̂ − R| ≤ ε, and ρ̂ built from r̂ loses at most ε²/(2λ) in F.

    Sharper: the frozen model hands on only the share `contraction` of the noise. `instance.reward` is the
    true r*, `estimate` is r̂ [X, Y].

    Raises:
        AlignProError: β or λ is not positive and finite, or r̂ has another shape or is not finite.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    try:
        noisy = dataclasses.replace(instance, reward=estimate, names=None)
    except AlignProError as error:
        raise AlignProError(f"estimate: {error}") from error
    return _reward_noise(bare(instance), jnp.asarray(noisy.reward), beta, lam)


@jax.jit
def _reward_noise(instance: Instance, estimate: Array, beta: Array, lam: Array) -> RewardNoise:
    prior, frozen = jnp.asarray(instance.prior, float), jnp.asarray(instance.frozen, float)
    reward, own_frozen = jnp.asarray(instance.reward, float), frozen[instance.own]
    reach = reachable(instance)
    # Out of reach nothing counts, and what is common to a prompt's rewards costs digits.
    top = jnp.max(jnp.where(reach, reward, -jnp.inf), -1, keepdims=True)
    delta = jnp.where(reach, estimate - reward, 0.0)
    r = jnp.where(reach, reward - top, 0.0)
    low, high = extent(delta, reach)
    prompter = perturbation(prior, r @ frozen.T, (r + delta) @ frozen.T, lam, delta @ frozen.T)
    model = perturbation(own_frozen, r, r + delta, beta, delta)
    true, noisy = _solutions(instance, replaced(instance, reward=estimate), beta, lam)
    # tanh(span(δ)/4β) with δ on the own row's support, as everything about π* is.
    gap = (high - low) + model.reward_bound + prompter.reward_bound
    return RewardNoise(
        reward_error=jnp.maximum(jnp.abs(low), jnp.abs(high)),
        reward_span_error=high - low,
        contraction=_contraction(prior, frozen),
        prompter=prompter,
        model=model,
        sides=_sides(true, noisy, prompter, gap, model.tv_bound),
    )


def _contraction(prior: Float[Array, "X K"], frozen: Float[Array, "K Y"]) -> Float[Array, " X"]:
    support = prior > 0

    def from_row(k: Array) -> Array:
        distances = 0.5 * jnp.sum(jnp.abs(frozen - frozen[k][None, :]), -1)
        farthest = jnp.max(jnp.where(support, distances[None, :], 0.0), -1)
        return jnp.where(support[:, k], farthest, 0.0)

    return jnp.max(lax.map(from_row, jnp.arange(frozen.shape[0])), 0)


class FrozenNoise(NamedTuple):
    """The cost of deciding by π̃_F in place of π_F, per prompt [X], in reward units unless said otherwise."""

    tv_rows: Float[Array, " K"]
    """d_TV(π_F(·|x′), π̃_F(·|x′)) per rewrite (probability)."""
    tv: Float[Array, " X"]
    """δ(x): the largest of `tv_rows` over the support of ρ_sft and x itself (probability)."""
    span: Float[Array, " X"]
    """max − min of r* over responses reachable under either model."""
    prompter: Perturbation
    """ρ̃ built from R̃ against ρ*, with λ. Its `error` ≤ span·δ."""
    loss_tv: Float[Array, " X"]
    """(span·δ)²/(2λ) ≥ `prompter.loss`."""
    loss_tv_sharp: Float[Array, " X"]
    """`worst_loss(2 span·δ, λ)` ≥ `prompter.loss`; never larger than `loss_tv`."""
    model_tv: Float[Array, " X"]
    """d_TV(π*, π̃*), π̃* ∝ π̃_F(·|x) exp(r*/β) (probability)."""
    model_tv_bound: Float[Array, " X"]
    """min(1, τ exp((max r* − max(V, Ṽ))/β)), τ the own row's TV and V = β log Z* (probability)."""
    model_loss: Float[Array, " X"]
    """G(π*) − G(π̃*) = β KL(π̃*‖π*), G(π) = E_π r* − β KL(π‖π_F); inf where π̃_F has mass and π_F none."""
    model_reward_loss: Float[Array, " X"]
    """E_π* r* − E_π̃* r*, of either sign."""
    model_reward_bound: Float[Array, " X"]
    """span·`model_tv_bound` ≥ |`model_reward_loss`|, the span over the responses of the own rows."""
    sides: Sides
    """Distance of the sides of Theorem 1 from the true ones."""


def frozen_noise(instance: Instance, estimate: Float[Floats, "K Y"], beta: float, lam: float) -> FrozenNoise:
    """Frozen-model noise: TV(π_F(·|x′), π̃_F(·|x′)) ≤ δ ⇒ |R̃ − R| ≤ span·δ, then as for reward noise.

    `instance.frozen` is the true π_F, `estimate` is π̃_F [K, Y], rows of probabilities.

    Raises:
        AlignProError: β or λ is not positive and finite, or π̃_F is no matrix of probabilities of that shape.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    checked = probabilities("estimate", estimate, np.shape(instance.frozen))
    return _frozen_noise(bare(instance), jnp.asarray(checked), beta, lam)


@jax.jit
def _frozen_noise(instance: Instance, estimate: Array, beta: Array, lam: Array) -> FrozenNoise:
    prior, frozen = jnp.asarray(instance.prior, float), jnp.asarray(instance.frozen, float)
    reward, own = jnp.asarray(instance.reward, float), jnp.asarray(instance.own)
    noisy_instance = replaced(instance, frozen=estimate)
    reach = reachable(instance) | reachable(noisy_instance)
    lowest, highest = extent(reward, reach)
    width = highest - lowest
    r = jnp.where(reach, reward - highest[:, None], 0.0)
    rows = tv(frozen, estimate)
    own_tv = rows[own]
    worst = jnp.maximum(jnp.max(jnp.where(prior > 0, rows[None, :], 0.0), -1), own_tv)
    prompter = perturbation(prior, r @ frozen.T, r @ estimate.T, lam, r @ (estimate - frozen).T)

    a, b = frozen[own], estimate[own]
    own_low, own_high = extent(r, (a > 0) | (b > 0))
    d = jnp.where((a > 0) | (b > 0), r - own_high[:, None], 0.0)
    star, hat = tilt_both(a, b, d, d, beta * jnp.ones_like(width))
    bound = jnp.minimum(
        1.0,
        jnp.where(own_tv > 0, own_tv * jnp.exp(-jnp.maximum(star.free_energy, hat.free_energy) / beta), 0.0),
    )
    log_base = log_quotient(b, a)
    scaled_ratio = beta * log_base - (hat.free_energy - star.free_energy)[:, None]
    floored = jnp.where(a > 0, jnp.maximum(star.probs, jnp.finfo(float).tiny), 0.0)
    beta_y = jnp.broadcast_to(jnp.asarray(beta, float), floored.shape)
    model_loss = scaled_kl(
        beta_y, hat.probs, floored, jnp.clip(scaled_ratio / beta, -1e300, 1e300), scaled_ratio
    )
    reward_bound = (own_high - own_low) * bound
    true, noisy = _solutions(instance, noisy_instance, beta, lam)
    gap, tvs = reward_bound + prompter.error + prompter.reward_bound, jnp.sum(prior * rows[None, :], -1)
    return FrozenNoise(
        tv_rows=rows,
        tv=worst,
        span=width,
        prompter=prompter,
        loss_tv=width * worst * (width * worst / (2.0 * lam)),
        loss_tv_sharp=worst_loss(2.0 * width * worst, lam * jnp.ones_like(width)),
        model_tv=tv(star.probs, hat.probs),
        model_tv_bound=bound,
        model_loss=model_loss,
        model_reward_loss=jnp.sum((star.probs - hat.probs) * d, -1),
        model_reward_bound=reward_bound,
        sides=_sides(true, noisy, prompter, gap, bound + 2.0 * own_tv + tvs),
    )


def misspecified_lam(instance: Instance, lam: float, used: float) -> Perturbation:
    """The prompter ρ*_λ′ of another λ′ (`used`), judged by F_λ: loses λ KL(ρ*_λ′‖ρ*_λ), per prompt [X].

    At most span(R)² (λ/λ′ − 1)²/(8λ). Its `reward_loss` has the sign of λ′ − λ.
    """
    lam, used = check_temperature("lam", lam), check_temperature("used", used)
    return _misspecified(bare(instance), lam, used)


@jax.jit
def _misspecified(instance: Instance, lam: Array, used: Array) -> Perturbation:
    reach = reachable(instance)
    reward = jnp.asarray(instance.reward, float)
    r = jnp.where(reach, reward - jnp.max(jnp.where(reach, reward, -jnp.inf), -1, keepdims=True), 0.0)
    energy = r @ jnp.asarray(instance.frozen, float).T
    return perturbation(instance.prior, energy, energy * (lam / used), lam, energy * ((lam - used) / used))


__all__ = [
    "Ensemble",
    "FrozenNoise",
    "Perturbation",
    "RewardNoise",
    "Sides",
    "ensemble",
    "frozen_noise",
    "misspecified_lam",
    "perturbation",
    "reachable",
    "reward_noise",
    "worst_loss",
    "worst_tv",
]
