"""The cost of a wrong reward, a wrong frozen model or a wrong λ, exactly and at worst.

Each is a `perturbation`: the policy p̂ ∝ base·exp(ê/t) built from wrong energies ê = e + δ, judged by the
true ones e, for which p ∝ base·exp(e/t) is optimal; s = span(δ) over the base's support. Nats, probabilities
and reward units as everywhere. Proofs: `docs/robustness.md`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.bounds import paper_r_max
from alignpro.theory.divergences import Floats, log1p, log_quotient, psi, scaled_kl, tv, tv_above
from alignpro.theory.gibbs import Tilted, positive, tilt
from alignpro.theory.instance import Instance, bare, probabilities, replaced
from alignpro.theory.results.rewards import reachable, rewards_of
from alignpro.theory.solution import Solution, solution

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
    temperature = jnp.asarray(positive("temperature", temperature), float)
    return jnp.tanh(jnp.asarray(width, float) / (4.0 * temperature))


def worst_loss(width: Numbers, temperature: Numbers) -> Float[Array, "..."]:
    """t (κ − 1 − log κ), κ = (s/t)/(1 − e^{−s/t}): the largest t KL(p̂‖p) at span(δ) = s. In reward units.

    At most s²/(8t) (approached for s ≪ t) and at most s (for s ≫ t); attained by two outcomes.
    """
    width = jnp.asarray(width, float)
    temperature = jnp.asarray(positive("temperature", temperature), float)
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
    t = jnp.broadcast_to(jnp.asarray(positive("temperature", temperature), float), base.shape[:-1])
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
    r, reach = rewards_of(instance), reachable(instance)
    # Out of reach nothing counts.
    delta = jnp.where(reach, estimate - jnp.asarray(instance.reward, float), 0.0)
    low, high = extent(delta, reach)
    noisy_response = r.response + delta
    prompter = perturbation(r.prior, r.rewrite, noisy_response @ r.frozen.T, lam, delta @ r.frozen.T)
    model = perturbation(r.own, r.response, noisy_response, beta, delta)
    true, noisy = _solutions(instance, replaced(instance, reward=estimate), beta, lam)
    # tanh(span(δ)/4β) with δ on the own row's support, as everything about π* is.
    gap = (high - low) + model.reward_bound + prompter.reward_bound
    return RewardNoise(
        reward_error=jnp.maximum(jnp.abs(low), jnp.abs(high)),
        reward_span_error=high - low,
        contraction=_contraction(r.prior, r.frozen),
        prompter=prompter,
        model=model,
        sides=_sides(true, noisy, prompter, gap, model.tv_bound),
    )


def _contraction(prior: Float[Array, "X K"], frozen: Float[Array, "K Y"]) -> Float[Array, " X"]:
    support = prior > 0

    def from_row(k: Array) -> Array:
        distances = tv_above(frozen, jnp.broadcast_to(frozen[k], frozen.shape))
        farthest = jnp.max(jnp.where(support, distances[None, :], 0.0), -1)
        return jnp.where(support[:, k], farthest, 0.0)

    return jnp.max(lax.map(from_row, jnp.arange(frozen.shape[0])), 0)


class FrozenNoise(NamedTuple):
    """The cost of deciding by π̃_F in place of π_F, per prompt [X], in reward units unless said otherwise."""

    tv_rows: Float[Array, " K"]
    """d_TV(π_F(·|x′), π̃_F(·|x′)) per rewrite (probability), from above (`tv_above`)."""
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
    rows = tv_above(frozen, estimate)
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
    r = rewards_of(instance)
    return perturbation(r.prior, r.rewrite, r.rewrite * (lam / used), lam, r.rewrite * ((lam - used) / used))
