"""Derivatives of the theory in β and λ, and the headroom and variance that follow."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from alignpro.theory.divergences import Floats
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import Instance
from alignpro.theory.results.rewards import (
    Temperature,
    as_prompter,
    as_temperature,
    extremes,
    rewards_of,
    variance,
)


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
        first = variance(tilted.probs, energy) / t / t
        return -first, -tilted.cost / t, -first / t, first

    achieved, value, spent, gap = slopes(r.prior, r.rewrite, lam)
    optimum, value_beta, spent_beta, _ = slopes(r.own, r.response, beta)
    return Sensitivity(achieved, value, spent, gap, optimum, value_beta, spent_beta, optimum)


class Headroom(NamedTuple):
    """The gain of ρ* over ρ_sft, from ρ_sft alone; reward units, per prompt."""

    lift: Float[Array, " X"]
    """E_ρ* R − E_ρsft R = λ Jeff(ρ*, ρ_sft)."""
    covariance: Float[Array, " X"]
    """Cov_ρsft(R, e^{R/λ})/E_ρsft e^{R/λ}, the same number."""
    first_order: Float[Array, " X"]
    """Var_ρsft(R)/λ, its limit as λ → ∞."""
    lower: Float[Array, " X"]
    """first_order·(1 − e^{−a})/a ≤ lift, a = span_R/λ."""
    upper: Float[Array, " X"]
    """min{first_order·(eᵃ − 1)/a, span_R tanh(a/4), max R − E_ρsft R} ≥ lift."""


def headroom(instance: Instance, lam: Temperature) -> Headroom:
    """E_ρ* R − E_ρsft R = Cov_ρsft(R, e^{R/λ})/E_ρsft e^{R/λ}, bracketed by its first-order term.

    Informative: `first_order` when λ ≥ span_R (it is right to a factor e there); below, max R − E_ρsft R.
    """
    lam, r = as_temperature("lam", lam), rewards_of(instance)
    star, edge = tilt(r.prior, r.rewrite, lam), extremes(r.prior, r.rewrite, r.tie)
    mean = jnp.sum(r.prior * r.rewrite, -1)
    centred = jnp.where(r.prior > 0, r.rewrite - mean[:, None], 0.0)
    growth = jnp.expm1(star.log_ratio)  # e^{R/λ}/E e^{R/λ} − 1
    first = variance(r.prior, r.rewrite) / lam
    a = edge.span / lam
    some = jnp.where(a > 0, a, 1.0)
    upper = jnp.where(a > 0, first * jnp.expm1(jnp.minimum(a, 600.0)) / some, 0.0)
    most = jnp.minimum(edge.span * jnp.tanh(a / 4), edge.maximum - mean)
    return Headroom(
        lift=star.lift,
        covariance=jnp.sum(jnp.where(r.prior > 0, r.prior * centred * growth, 0.0), -1),
        first_order=first,
        lower=jnp.where(a > 0, -first * jnp.expm1(-a) / some, 0.0),
        upper=jnp.where(a < 600.0, jnp.minimum(upper, most), most),
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
