"""What a wrong reward, a wrong frozen model or a wrong λ costs, exactly and at worst.

Every case is one comparison: the Gibbs policy p ∝ base·exp(e/t) that is optimal for the true energies e, and
the p̂ ∝ base·exp(ê/t) that was built from ê = e + δ. Then p̂ ∝ p·exp(δ/t), so p̂ is itself a tilt of p, by
the error. All results follow from that one line; `docs/robustness.md` has the whole proofs.

Nats, probabilities and reward units as everywhere; s = span(δ) = max δ − min δ over the base's support,
which a shift of δ per prompt does not change.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from alignpro.errors import AlignProError
from alignpro.theory.bounds import paper_r_max
from alignpro.theory.divergences import Floats, log1p, log_quotient, psi, scaled_kl, tv
from alignpro.theory.gibbs import Tilted, check_temperature, tilt
from alignpro.theory.instance import KEYS, Instance, bare, probabilities, unchecked
from alignpro.theory.solution import Solution, solution

# Up to this span(δ)/t the tilt of p by δ is exact to rounding; beyond, what underflows in p counts.
_FAR = 500.0


class Perturbation(NamedTuple):
    """What p̂, built from ê = e + δ, loses to the optimal p; reward units unless said otherwise.

    F(q) = E_q e − t KL(q‖base). The assumption behind each bound is a number here (`error`, `span_error`), to
    be looked at rather than believed.
    """

    probs: Float[Array, "... K"]
    """p̂ (probabilities)."""
    error: Float[Array, "..."]
    """ε = max |δ| over the support."""
    span_error: Float[Array, "..."]
    """s = max δ − min δ over the support; at most 2ε."""
    loss: Float[Array, "..."]
    """F(p) − F(p̂) = t KL(p̂‖p), exactly."""
    loss_sup: Float[Array, "..."]
    """ε²/(2t) ≥ `loss_span`."""
    loss_span: Float[Array, "..."]
    """s²/(8t) ≥ `loss_sharp`."""
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


def worst_tv(
    width: Float[Floats, "..."] | float, temperature: Float[Floats, "..."] | float
) -> Float[Array, "..."]:
    """tanh(s/4t): the largest total variation between two Gibbs policies whose energies differ by span s.

    Proof: the log-ratio of p̂ to p has span s/t, so for any event the odds change by a factor of at most
    e^{s/t}; the largest change of a probability a at that odds ratio is at a = 1/(1 + e^{s/2t}), and is
    tanh(s/4t). Attained there, by two outcomes.
    """
    return jnp.tanh(jnp.asarray(width, float) / (4.0 * jnp.asarray(temperature, float)))


def worst_loss(
    width: Float[Floats, "..."] | float, temperature: Float[Floats, "..."] | float
) -> Float[Array, "..."]:
    """t (κ − 1 − log κ), κ = (s/t)/(1 − e^{−s/t}): the largest t KL(p̂‖p) at span(δ) = s. In reward units.

    Proof: let w = e^{(δ − min δ)/t} ∈ [1, e^{s/t}] and m = E_p w, so KL(p̂‖p) = E_p[w log w]/m − log m. Given
    m, E_p[w log w] is largest with w at its two ends, as w log w is convex. What is left is a function of m
    alone, largest at m = κ. Always ≤ s²/(8t) (which it approaches for s ≪ t) and ≤ s (for s ≫ t); attained
    by two outcomes.
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


def _range(values: Float[Array, "... K"], support: Bool[Array, "... K"]) -> tuple[Array, Array]:
    """(minimum, maximum) over the support."""
    return (
        jnp.min(jnp.where(support, values, jnp.inf), -1),
        jnp.max(jnp.where(support, values, -jnp.inf), -1),
    )


def _halves(both: Any) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[0], both), jax.tree.map(lambda leaf: leaf[1], both)


def _pair(base: Array, other: Array, energy: Array, estimate: Array, t: Array) -> tuple[Tilted, Tilted]:
    """Two tilts in one call: half the compiling."""
    return _halves(tilt(jnp.stack([base, other]), jnp.stack([energy, estimate]), jnp.stack([t, t])))


def _solutions(instance: Instance, noisy: Instance, beta: Array, lam: Array) -> tuple[Solution, Solution]:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), instance, noisy)
    return _halves(jax.vmap(lambda one: solution(one, beta, lam))(stacked))


def perturbation(
    base: Float[Floats, "... K"],
    energy: Float[Floats, "... K"],
    estimate: Float[Floats, "... K"],
    temperature: Float[Floats, "..."] | float,
    delta: Float[Floats, "... K"] | None = None,
) -> Perturbation:
    """The Gibbs policy of `estimate` judged by the true `energy`, exactly, and its bounds.

    Proof of the losses: `bounds.suboptimality` is the first. p_u ∝ p·exp(uδ/t) leads from p to p̂, with
    KL(p̂‖p) = ∫₀¹ u Var_{p_u}(δ/t) du, and a variable of span s has variance at most s²/4: hence s²/(8t).
    Var_{p_u} changes by a factor of at most e^{|u−v| s/t} from u to v, since its derivative is a third
    central moment of δ/t; integrated from v = 1: the two variance forms. E_p e − E_p̂ e ≤ span(e)·TV(p, p̂),
    then `worst_tv`.

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
    (low, high), (e_low, e_high) = _range(delta, support), _range(energy, support)
    error, s = jnp.maximum(jnp.abs(low), jnp.abs(high)), high - low
    e = jnp.where(support, energy - e_high[..., None], 0.0)
    e_hat = jnp.where(support, estimate - _range(estimate, support)[1][..., None], 0.0)
    d = jnp.where(support, delta - high[..., None], 0.0)
    star, hat = _pair(base, base, e, e_hat, t)

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


class Sides(NamedTuple):
    """How far the sides of Theorem 1, computed on the noisy instance, are from the true ones, per prompt."""

    gap_change: Float[Array, " X"]
    """|noisy gap − true gap|, of each instance's own ρ* against its own π*."""
    gap_bound: Float[Array, " X"]
    rhs_change: Float[Array, " X"]
    """The same of the right side of the span form …"""
    rhs_bound: Float[Array, " X"]
    theorem1_change: Float[Array, " X"]
    """… and of Theorem 1's, its r_max taken from each instance (`bounds.paper_r_max`)."""
    theorem1_bound: Float[Array, " X"]


def _sides(true: Solution, noisy: Solution, prompter: Perturbation, gap: Array, tvs: Array) -> Sides:
    """`gap` bounds the gap's change and `tvs` the change of TV1 + TV2.

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


def reachable(instance: Instance) -> Bool[Array, "X Y"]:
    """Whether π_F(·|x), or π_F(·|x′) for some x′ in the support of ρ_sft(·|x), can give the response."""
    frozen = jnp.asarray(instance.frozen) > 0
    through = (jnp.asarray(instance.prior) > 0).astype(float) @ frozen.astype(float)
    return (through > 0) | frozen[jnp.asarray(instance.own)]


class RewardNoise(NamedTuple):
    """What deciding by r̂ in place of r* costs, per prompt [X], in reward units."""

    reward_error: Float[Array, " X"]
    """ε(x) = max |r̂ − r*| over the reachable responses."""
    reward_span_error: Float[Array, " X"]
    """max − min of r̂ − r* over them; 0 for a shift of a prompt's rewards."""
    contraction: Float[Array, " X"]
    """max TV(π_F(·|x′), π_F(·|x″)) over rewrites x′, x″ in the support of ρ_sft (probability)."""
    prompter: Perturbation
    """ρ̂ built from R̂ against ρ*, with λ. Its `span_error` ≤ `contraction`·`reward_span_error`."""
    model: Perturbation
    """π̂ built from r̂ against π*, with β: RLHF on the wrong reward. `reward_loss` = E_π* r* − E_π̂ r*."""
    sides: Sides


def reward_noise(instance: Instance, estimate: Float[Floats, "X Y"], beta: float, lam: float) -> RewardNoise:
    """Reward noise: |r̂ − r*| ≤ ε ⇒ |R̂ − R| ≤ ε, and ρ̂ built from r̂ loses at most ε²/(2λ) in F.

    Proof: R averages r* over responses, so ε carries over; `perturbation` with base ρ_sft, energy R and
    temperature λ does the rest, and with base π_F(·|x), energy r* and temperature β for RLHF. Sharper:
    R̂(x,x′) − R(x,x′) − R̂(x,x″) + R(x,x″) = E_π_F(·|x′) δ − E_π_F(·|x″) δ ≤ span(δ)·TV, so the frozen model
    hands on only the share `contraction` of the noise. The gap computed from r̂ is off by at most
    span(δ) + span(r*) tanh(span(δ)/4β) + span(R) tanh(span(R̂−R)/4λ).

    Args:
        instance: the problem, its `reward` the true r*.
        estimate: r̂ [X, Y].
        beta: β > 0.
        lam: λ > 0.

    Raises:
        AlignProError: β or λ is not positive and finite, or r̂ has another shape or is not finite.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    try:
        noisy = dataclasses.replace(instance, reward=estimate, names=None)
    except AlignProError as error:
        raise AlignProError(f"estimate: {error}") from error
    return _reward_noise(bare(instance), jnp.asarray(noisy.reward), beta, lam)


def _replaced(instance: Instance, **fields: Any) -> Instance:
    return unchecked(*(fields.get(key, getattr(instance, key)) for key in KEYS))


@jax.jit
def _reward_noise(instance: Instance, estimate: Array, beta: Array, lam: Array) -> RewardNoise:
    prior, frozen = jnp.asarray(instance.prior, float), jnp.asarray(instance.frozen, float)
    reward, own_frozen = jnp.asarray(instance.reward, float), frozen[instance.own]
    reach = reachable(instance)
    # Out of reach nothing counts, and what is common to a prompt's rewards costs digits.
    top = jnp.max(jnp.where(reach, reward, -jnp.inf), -1, keepdims=True)
    delta = jnp.where(reach, estimate - reward, 0.0)
    r = jnp.where(reach, reward - top, 0.0)
    low, high = _range(delta, reach)
    prompter = perturbation(prior, r @ frozen.T, (r + delta) @ frozen.T, lam, delta @ frozen.T)
    model = perturbation(own_frozen, r, r + delta, beta, delta)
    true, noisy = _solutions(instance, _replaced(instance, reward=estimate), beta, lam)
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
    """What deciding by π̃_F in place of π_F costs, per prompt [X], in reward units unless said otherwise."""

    tv_rows: Float[Array, " K"]
    """d_TV(π_F(·|x′), π̃_F(·|x′)) per rewrite (probability)."""
    tv: Float[Array, " X"]
    """δ(x): the largest of them over the support of ρ_sft and x itself (probability)."""
    span: Float[Array, " X"]
    """max − min of r* over responses reachable under either model."""
    prompter: Perturbation
    """ρ̃ built from R̃ against ρ*, with λ. Its `error` ≤ span·δ."""
    loss_tv: Float[Array, " X"]
    """(span·δ)²/(2λ) ≥ `prompter.loss` …"""
    loss_tv_sharp: Float[Array, " X"]
    """… and `worst_loss(2 span·δ, λ)`, never larger."""
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


def frozen_noise(instance: Instance, estimate: Float[Floats, "K Y"], beta: float, lam: float) -> FrozenNoise:
    """Frozen-model noise: TV(π_F(·|x′), π̃_F(·|x′)) ≤ δ ⇒ |R̃ − R| ≤ span·δ, then as for reward noise.

    Proof: |E_p r − E_q r| ≤ span·TV(p, q). For π*: with w = e^{(r* − max r*)/β} ≤ 1 and, say, Z ≥ Z̃,
    TV(π*, π̃*) = Σ (π_F w/Z − π̃_F w/Z̃)₊ ≤ Σ w (π_F − π̃_F)₊ / Z ≤ τ/Z; likewise if Z̃ ≥ Z. The gap computed from
    π̃_F is off by at most span·TV(π*,π̃*) + max |R̃ − R| + span(R) tanh(span(R̃−R)/4λ).

    Args:
        instance: the problem, its `frozen` the true π_F.
        estimate: π̃_F [K, Y], rows of probabilities.
        beta: β > 0.
        lam: λ > 0.

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
    noisy_instance = _replaced(instance, frozen=estimate)
    reach = reachable(instance) | reachable(noisy_instance)
    lowest, highest = _range(reward, reach)
    width = highest - lowest
    r = jnp.where(reach, reward - highest[:, None], 0.0)
    rows = tv(frozen, estimate)
    own_tv = rows[own]
    worst = jnp.maximum(jnp.max(jnp.where(prior > 0, rows[None, :], 0.0), -1), own_tv)
    prompter = perturbation(prior, r @ frozen.T, r @ estimate.T, lam, r @ (estimate - frozen).T)

    a, b = frozen[own], estimate[own]
    own_low, own_high = _range(r, (a > 0) | (b > 0))
    d = jnp.where((a > 0) | (b > 0), r - own_high[:, None], 0.0)
    star, hat = _pair(a, b, d, d, beta * jnp.ones_like(width))
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
        sides=_sides(
            true,
            noisy,
            prompter,
            reward_bound + prompter.error + prompter.reward_bound,
            bound + 2.0 * own_tv + jnp.sum(prior * rows[None, :], -1),
        ),
    )


def misspecified_lam(instance: Instance, lam: float, used: float) -> Perturbation:
    """The prompter ρ*_λ′ of another λ′ (`used`), judged by F_λ: loses λ KL(ρ*_λ′‖ρ*_λ), per prompt [X].

    Proof: ρ*_λ′ is the Gibbs policy at temperature λ of the energies R λ/λ′, so δ = R (λ − λ′)/λ′ and
    span(δ) = span(R)·|λ/λ′ − 1|: at most span(R)² (λ/λ′ − 1)²/(8λ), in the span form. Its `reward_loss`
    has the sign of λ′ − λ, since E_ρ*_λ R falls with λ.

    Raises:
        AlignProError: λ or λ′ is not positive and finite.
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


class Ensemble(NamedTuple):
    """M estimates against their average, in reward units."""

    members: Perturbation
    """Each estimate's, with a leading axis [M]."""
    average: Perturbation
    """That of the mean estimate."""
    ambiguity: Float[Array, "..."]
    """A = −t log Σ_k Π_m p̂_m(k)^{1/M} ≥ 0: how much the members disagree."""


def ensemble(
    base: Float[Floats, "... K"],
    energy: Float[Floats, "... K"],
    estimates: Float[Floats, "M ... K"],
    temperature: Float[Floats, "..."] | float,
) -> Ensemble:
    """Averaging M estimates: t KL(p‖p̄) = mean_m t KL(p‖p̂_m) − A, exactly, with A ≥ 0 the `ambiguity`.

    Proof: p̄ ∝ Π p̂_m^{1/M}, so log p̄ = mean log p̂_m + A/t; take E_p. A ≥ 0 as geometric means are at most
    arithmetic ones. Also span(δ̄) ≤ mean span(δ_m), so s̄²/(8t) is at most the members' mean. The loss
    t KL(p̂‖p) itself has no such guarantee away from small errors: it can be larger than the mean of the
    members' losses (`docs/robustness.md` has an instance). To second order it is Var_p(δ)/(2t), where
    independent errors of equal variance lose a factor M.

    Pure: use it under jit and vmap. Bases, energies and temperatures as in `perturbation`.
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
