"""Derivatives in β and λ, limits of small and large ones, and temperatures at which the gap changes sign."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from alignpro.errors import LEAST, MOST
from alignpro.theory.divergences import Floats, log1p
from alignpro.theory.elementwise import average
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import Instance
from alignpro.theory.pairwise import pairwise_tv
from alignpro.theory.results.rewards import (
    Temperature,
    as_prompter,
    as_temperature,
    extremes,
    rewards_of,
    root_of,
    variance,
)
from alignpro.theory.two_points import lift, points


class Sensitivity(NamedTuple):
    """Derivatives in λ and β per prompt; those of KL in nats per reward unit, the others without unit."""

    achieved_lam: Float[Array, " X"]
    """d E_ρ* R/dλ = −Var_ρ*(R)/λ²."""
    value_lam: Float[Array, " X"]
    """d F(ρ*)/dλ = −KL(ρ*‖ρ_sft)."""
    kl_lam: Float[Array, " X"]
    """d KL(ρ*‖ρ_sft)/dλ = −Var_ρ*(R)/λ³."""
    gap_lam: Float[Array, " X"]
    """d gap/dλ = Var_ρ*(R)/λ² ≥ 0."""
    optimum_beta: Float[Array, " X"]
    """d E_π* r*/dβ = −Var_π*(r*)/β²."""
    value_beta: Float[Array, " X"]
    """d (β log Z*)/dβ = −KL(π*‖π_F)."""
    kl_beta: Float[Array, " X"]
    """d KL(π*‖π_F)/dβ = −Var_π*(r*)/β³."""
    gap_beta: Float[Array, " X"]
    """d gap/dβ = −Var_π*(r*)/β² ≤ 0."""


def sensitivity(instance: Instance, beta: Temperature, lam: Temperature) -> Sensitivity:
    """Every derivative in λ and β in closed form, each a sum of terms of one sign: no cancellation.

    The gap rises in λ and falls in β, strictly unless R (r*) is constant on the support.
    """
    beta, lam, r = as_temperature("beta", beta), as_temperature("lam", lam), rewards_of(instance)

    def slopes(base, energy, t):
        tilted = tilt(base, energy, t)
        edge = extremes(base, energy, jnp.zeros_like(energy[..., 0]))
        width = jnp.where(edge.span > 0, edge.span, 1.0)
        # From the best, which is exactly 0 however XLA fuses this: next to a point mass all else underflows.
        below = jnp.where(base > 0, energy - edge.maximum[:, None], 0.0)
        spread = variance(tilted.probs, below / width[:, None])
        first = spread * (width / t) * (width / t)  # Var/t² with no square of rewards
        return -first, -tilted.cost / t, -first / t, first

    achieved, value, spent, gap = slopes(r.prior, r.rewrite, lam)
    optimum, value_beta, spent_beta, _ = slopes(r.own, r.response, beta)
    return Sensitivity(achieved, value, spent, gap, optimum, value_beta, spent_beta, optimum)


class Headroom(NamedTuple):
    """The gain of ρ* over ρ_sft, from ρ_sft alone; reward units, per prompt."""

    lift: Float[Array, " X"]
    """E_ρ* R − E_ρ_sft R = λ Jeff(ρ*, ρ_sft)."""
    covariance: Float[Array, " X"]
    """Cov_ρ_sft(R, e^{R/λ})/E_ρ_sft e^{R/λ}, the same number."""
    first_order: Float[Array, " X"]
    """Var_ρ_sft(R)/λ, its limit as λ → ∞."""
    lower: Float[Array, " X"]
    """The lift of the law on {−m, Var/m}, m = E_ρ_sft R − min R on the support: ≤ lift."""
    upper: Float[Array, " X"]
    """The lift of the law on {−Var/M, M}, M = max R − E_ρ_sft R on the support: ≥ lift."""


def headroom(instance: Instance, lam: Temperature) -> Headroom:
    """E_ρ* R − E_ρ_sft R = Cov_ρ_sft(R, e^{R/λ})/E_ρ_sft e^{R/λ}: between the lifts of laws of two values.

    Both have the mean and the variance of R, the upper its largest value and the lower its least
    (`two_points.lift`, with the proof); with two rewrites, or two values of R, both are equalities.
    """
    lam, r = as_temperature("lam", lam), rewards_of(instance)
    star = tilt(r.prior, r.rewrite, lam)
    mean = jnp.sum(r.prior * r.rewrite, -1)
    centred = jnp.where(r.prior > 0, r.rewrite - mean[:, None], 0.0)
    growth = jnp.expm1(star.log_ratio)  # e^{R/λ}/E e^{R/λ} − 1
    _, most, below = points(r.prior, r.rewrite)
    _, least, above = points(r.prior, -r.rewrite)
    return Headroom(
        lift=star.lift,
        covariance=jnp.sum(jnp.where(r.prior > 0, r.prior * centred * growth, 0.0), -1),
        first_order=most * (below / lam),  # Var = M (Var/M), with no square of rewards
        lower=lift(above, least, lam).value,
        upper=lift(most, below, lam).value,
    )


class VarianceSplit(NamedTuple):
    """Var(r) of one prompter's responses, per prompt; squared reward units."""

    total: Float[Array, " X"]
    """Var_π_ρ(r*(x,·)), from the policy itself."""
    within: Float[Array, " X"]
    """E_ρ Var(r|x′)."""
    between: Float[Array, " X"]
    """Var_ρ(R): all that a choice among rewrites can act on."""


def variance_split(instance: Instance, prompter: Float[Floats, "X K"]) -> VarianceSplit:
    """Var(r) = E[Var(r|x′)] + Var(E[r|x′]); the share between/total is prompting's.

    Tilting ρ at a large λ gains between/λ, tilting the responses of π_ρ at the same temperature total/λ, to
    first order (`headroom`). A prompter that is no matrix of probabilities is an `AlignProError`.
    """
    r, rho = rewards_of(instance), as_prompter(instance, prompter)
    conditional = lax.map(lambda d: variance(r.frozen, d[None, :]), r.response)
    return VarianceSplit(
        total=variance(rho @ r.frozen, r.response),
        within=jnp.sum(rho * conditional, -1),
        between=variance(rho, r.rewrite),
    )


class LimitReadings(NamedTuple):
    """The paper's readings of Theorem 1's limits, as numbers per prompt."""

    tv_model: Float[Array, " X"]
    """d_TV(π*, π_F): the first term over r_max."""
    tv_model_bound: Float[Array, " X"]
    """tanh(span_r/(4β)) ≥ tv_model."""
    reward_constant: Bool[Array, " X"]
    """Whether r*(x,·) is constant on the support of π_F(·|x): exactly then the first term is 0."""
    tv_shift: Float[Array, " X"]
    """E_ρ_sft d_TV(π_F(·|x), π_F(·|x′)): the second term over r_max."""
    reference_is_own: Bool[Array, " X"]
    """Whether all rewrites in the support of ρ_sft have the own row's probabilities: exactly then the second
    term is 0."""
    tv_prompter: Float[Array, " X"]
    """d_TV(ρ*, ρ_sft), which tends to 0 as λ → ∞."""
    tv_prompter_bound: Float[Array, " X"]
    """tanh(span_R/(4λ)) ≥ tv_prompter."""
    separation: Float[Array, " X"]
    """Δ: the best R less the next (∞ if there is none), reward units."""
    off_best: Float[Array, " X"]
    """ρ*(off argmax R) = d_TV(ρ*, ρ_0), which tends to 0 as λ → 0."""
    off_best_bound: Float[Array, " X"]
    """q/(1 + q) ≥ off_best with q = (1−m)/m·e^{−Δ/λ}, m = ρ_sft(argmax R); itself at most q."""
    greedy: Float[Array, "X K"]
    """ρ_0 = ρ_sft given argmax R (probabilities): the limit of ρ* as λ → 0."""
    greedy_kl: Float[Array, " X"]
    """KL(ρ_0‖ρ_sft) = −log ρ_sft(argmax R), the supremum of KL(ρ*‖ρ_sft), nats."""
    shortfall: Float[Array, " X"]
    """max R − E_ρ* R, reward units."""
    shortfall_bound: Float[Array, " X"]
    """λ(greedy_kl − KL(ρ*‖ρ_sft)) ≥ shortfall, reward units."""


def limit_readings(instance: Instance, beta: Temperature, lam: Temperature) -> LimitReadings:
    """Each term as λ, β → 0 or ∞, with rates; maxima of R are over the support of ρ_sft.

    Values of R equal to rounding count as tied. Informative: the bounds by tanh for temperatures above the
    span, that of `off_best` for λ below Δ, that of `shortfall` in between.
    """
    beta, lam, r = as_temperature("beta", beta), as_temperature("lam", lam), rewards_of(instance)
    star, model = tilt(r.prior, r.rewrite, lam), tilt(r.own, r.response, beta)
    edge, response = extremes(r.prior, r.rewrite, r.tie), extremes(r.own, r.response, jnp.zeros_like(r.top))
    rest = jnp.sum(jnp.where(edge.best, 0.0, r.prior), -1)
    odds = rest / edge.mass * jnp.exp(-edge.separation / lam)
    distance = pairwise_tv(r.own, r.frozen)
    greedy_kl = jnp.where(edge.mass < 0.5, -jnp.log(edge.mass), -log1p(-jnp.minimum(rest, 0.5)))
    return LimitReadings(
        tv_model=model.tv,
        tv_model_bound=jnp.tanh(response.span / (4 * beta)),
        reward_constant=response.span == 0,
        tv_shift=jnp.sum(r.prior * distance, -1),
        reference_is_own=jnp.all((r.prior <= 0) | (distance == 0), -1),
        tv_prompter=star.tv,
        tv_prompter_bound=jnp.tanh(edge.span / (4 * lam)),
        separation=edge.separation,
        off_best=jnp.sum(jnp.where(edge.best, 0.0, star.probs), -1),
        off_best_bound=jnp.where(rest > 0, odds / (1.0 + odds), 0.0),
        greedy=jnp.where(edge.best, r.prior, 0.0) / edge.mass[:, None],
        greedy_kl=greedy_kl,
        shortfall=jnp.sum(jnp.where(r.prior > 0, star.probs * (edge.maximum[:, None] - r.rewrite), 0.0), -1),
        shortfall_bound=lam * greedy_kl - star.cost,
    )


class Critical(NamedTuple):
    """The temperature at which the gap changes sign, with a closed-form enclosure; reward units."""

    value: Float[Array, "..."]
    """The critical temperature; 0 or ∞ where the sign is the same for all."""
    lower: Float[Array, "..."]
    """Closed-form bound of `value` from below."""
    upper: Float[Array, "..."]
    """Closed-form bound of `value` from above."""


@jax.jit
def _critical(
    base: Array, energy: Array, target: Array, tie: Array, noise: Array, p: Array | None
) -> Critical:
    """The temperature at which E_tilt[energy] falls to `target`. A difference within `noise` has no sign."""
    edge = extremes(base, energy, tie)
    combine: Callable[[Array], Array] = (lambda v: v) if p is None else (lambda v: average(p, v)[None])
    target = combine(target)
    head = combine(edge.maximum) - target
    tail = target - combine(jnp.sum(base * energy, -1))
    price, width, square = combine(-jnp.log(edge.mass)), combine(edge.span), combine(edge.span**2)
    widest = edge.span if p is None else jnp.max(jnp.where(p > 0, edge.span, 0.0))[None]
    least = combine(noise)
    inside = (head > least) & (tail > least)

    def excess(t):
        tilted = tilt(base, energy, jnp.broadcast_to(t, base.shape[:-1]))
        mean = combine(jnp.sum(tilted.probs * energy, -1))
        return target - mean, combine(variance(tilted.probs, energy) / t)

    lower = jnp.where(inside, head / jnp.where(price > 0, price, 1.0), 0.0)
    # The share of the span that is to be gained, less its rounding: artanh grows without bound.
    share = jnp.where(inside, (tail - least) / jnp.where(inside, width, 1.0) * (1 - 1e-12), 0.5)
    upper = jnp.minimum(square / (4 * jnp.where(inside, tail, 1.0)), widest / (4 * jnp.arctanh(share)))
    upper = jnp.where(inside, upper, jnp.inf)
    start = jnp.where(inside, jnp.clip(lower * (1 - 1e-9), LEAST, MOST), 1.0)
    end = jnp.where(inside, jnp.clip(upper * (1 + 1e-9), LEAST, MOST), 1.0)
    root = jnp.where(
        inside, root_of(excess, start, jnp.maximum(start, end)), jnp.where(head > least, jnp.inf, 0.0)
    )
    lower, upper = jnp.where(inside, lower, root), jnp.where(inside, upper, root)
    return Critical(root, lower, upper) if p is None else Critical(root[0], lower[0], upper[0])


def critical_lam(instance: Instance, beta: Temperature, *, per_prompt: bool = False) -> Critical:
    """λ_c: ρ* outperforms π* (gap < 0) exactly for λ < λ_c. Answers Q2.

    Some λ makes the gap negative iff max_{support} R > E_π* r* (in the mean over P, or per prompt with
    `per_prompt`); 0: never, ∞: ρ_sft itself outperforms π*. Differences of R within its rounding count as
    none. `upper` is span/(4 artanh(τ/span)) per prompt, τ = E_π* r* − E_ρ_sft R; in the mean the lesser of
    E span²/(4 E τ) and max span/(4 artanh(E τ/E span)).
    """
    r = rewards_of(instance)
    model = tilt(r.own, r.response, as_temperature("beta", beta))
    target = jnp.sum(model.probs * r.response, -1)
    p = None if per_prompt else jnp.asarray(instance.p, float)
    return _critical(r.prior, r.rewrite, target, r.tie, r.tie, p)


def critical_beta(instance: Instance, lam: Temperature, *, per_prompt: bool = False) -> Critical:
    """β_c: ρ* outperforms π* (gap < 0) exactly for β > β_c. The mirror image of `critical_lam`.

    Some β does so iff E_ρ* R > R(x,x). 0: every β, as E_ρ* R exceeds what π_F can reach at all.
    """
    r = rewards_of(instance)
    star = tilt(r.prior, r.rewrite, as_temperature("lam", lam))
    target = jnp.sum(star.probs * r.rewrite, -1)
    p = None if per_prompt else jnp.asarray(instance.p, float)
    return _critical(r.own, r.response, target, jnp.zeros_like(r.top), r.tie, p)
