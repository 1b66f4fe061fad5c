"""Identities, and true inequalities that do not bound the gap."""

import jax.numpy as jnp

from alignpro.claims import Claim
from alignpro.theory.elementwise import arctanh, is_ball, ones_like, sqrt, tanh
from alignpro.theory.solution import Solution
from alignpro.theory.statements.statement import (
    Statement,
    averaged,
    covered,
    identity,
    optimal,
    supported,
    tiny,
)
from alignpro.theory.statements.upper import theorem1


def exact_gap(s: Solution) -> Statement:
    """gap = β Jeff(π*,π_F) + [R(x,x) − E_ρ_sft R] − λ Jeff(ρ*,ρ_sft), exactly.

    Proof: the Jeffreys identity of the tilt (see `tight`) on both sides of Δ1 + Δ2.
    """
    return identity(
        s,
        s.gap,
        s.model_jeffreys + s.shift - s.prompter_jeffreys,
        s.gap_error + s.model_error + s.prompter_error + s.shift_error,
        optimal(s),
        abs(s.gap) + s.model_jeffreys + abs(s.shift) + s.prompter_jeffreys,
    )


def suboptimality(s: Solution) -> Statement:
    """F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) for ANY ρ, with F(ρ) = E_ρ R − λ KL(ρ‖ρ_sft).

    Proof: log ρ* = log ρ_sft + R/λ − log Z, so λ KL(ρ‖ρ*) = λ KL(ρ‖ρ_sft) − E_ρ R + λ log Z.
    """
    # At ρ* itself both sides are 0 by construction, not by rounding.
    other = 1 - s.is_star
    return identity(
        s,
        s.shortfall,
        s.kl_to_star,
        2.0 * s.rho_error * other,
        supported(s),
        (abs(s.shortfall) + s.kl_to_star + s.kl_to_reference + s.prompter_kl) * other,
    )


def any_gap(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) = E_π* r* − λ log Z + λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft), exactly.

    Proof: `suboptimality`, with E_ρ R = F(ρ) + λ KL(ρ‖ρ_sft) and F(ρ*) = λ log Z.
    """
    return identity(
        s,
        s.gap,
        s.value_gap + s.kl_excess,
        s.gap_error + s.model_error + s.prompter_error + s.excess_error,
        supported(s),
        abs(s.gap) + abs(s.value_gap) + abs(s.kl_excess),
    )


def regularised(s: Solution) -> Statement:
    """For ANY ρ: G(π*) − G(π_ρ) = β KL(π_ρ‖π*) with G(π) = E_π r* − β KL(π‖π_F), written for the gap.

    gap(ρ) = β KL(π_ρ‖π*) + β KL(π*‖π_F) − β KL(π_ρ‖π_F). Proof: `suboptimality` on the RLHF side, at π_ρ. So
    the prompter best in that sense projects π* on the rewrites' hull (`limits.information_projection`).
    """
    return identity(
        s,
        s.gap,
        s.induced_to_star + s.model_kl - s.induced_to_model,
        s.gap_error + s.model_error + 2.0 * s.induced_error,
        covered(s),
        abs(s.gap) + s.induced_to_star + s.model_kl + s.induced_to_model,
    )


def pinsker(s: Solution) -> Statement:
    """Pinsker's inequality, E_x d_TV(π*,π_F) ≤ E_x √(KL(π*‖π_F)/2), with TV half the L1 distance."""
    return pinsker_with(s, 1.0)


def pinsker_with(s: Solution, times: float) -> Statement:
    """`times` TV(π*,π_F) ≤ √(KL(π*‖π_F)/2), in probabilities, so that the trivial bound is 1."""
    half_kl = s.model_kl / (2.0 * s.beta)
    noise = s.model_error / (2.0 * s.beta)
    root = sqrt(half_kl)
    error = times * s.tv_model_error + sqrt(half_kl + noise) - root
    tv = times * s.tv_model
    return averaged(s, tv, root, error, {}, tv + root, ceiling=ones_like(half_kl))


def tanh_tv(s: Solution) -> Statement:
    """E_x d_TV(π*,π_F) ≤ E_x tanh(span/(4β)), span that of r* on the support of π_F(·|x); see `beta_tanh`.

    Attained by two rewards whose odds under π_F, the better to the other, are e^{−span/(2β)}.
    """
    rhs = tanh(s.own_span / (4.0 * s.beta))
    error = s.tv_model_error + 8 * s.eps * rhs
    return averaged(s, s.tv_model, rhs, error, {}, s.tv_model + rhs, ceiling=ones_like(rhs))


def jeffreys_tv(s: Solution) -> Statement:
    """4β·TV·artanh(TV) ≤ Δ1 with TV = TV(π*,π_F): Δ1 is at least quadratic in TV.

    Proof: Δ1 = β Jeff(π*,π_F), and Jeff ≥ 2V log((1+V)/(1−V)), its least value at TV = V, taken by two points
    (data processing onto {π* > π_F}, then joint convexity on swapping them: (½ ± V/2)).
    """
    tv, apart = s.tv_model, s.tv_model_error
    if is_ball(tv):
        lhs = 4.0 * s.beta * tv * arctanh(tv)
        error = lhs * 0
    else:
        # Near 1 the overlap has the accuracy that 1 − TV has lost; where it underflows nothing is known.
        overlap = jnp.maximum(s.overlap_model, tiny(tv))
        half = jnp.arctanh(jnp.minimum(tv, 0.5))
        angle = jnp.where(tv < 0.5, half, 0.5 * jnp.log((1.0 + tv) / overlap))
        lhs = 4.0 * s.beta * tv * angle
        error = 4.0 * s.beta * apart * (angle + 2.0) + 16 * s.eps * lhs
        error = jnp.where(s.overlap_model > 2 * tiny(tv), error, s.span)
    return averaged(s, lhs, s.model_jeffreys, error + s.model_error, {}, lhs + s.model_jeffreys)


def model_law(s: Solution) -> Statement:
    """W1(laws of r* under π*, under π_F(·|x)) = Δ1: between laws of the reward, RLHF moves just what it
    gains.

    Proof: π*/π_F = e^{r/β}/Z* rises in r, so π*(r* > t) ≥ π_F(r* > t) for every t, and the area between two
    distribution functions that do not cross is the difference of their means.
    """
    return identity(s, s.law_model, s.delta1, s.law_error + s.model_error, {}, abs(s.law_model) + s.delta1)


def theorem1_l1(s: Solution) -> Statement:
    """Theorem 1 misread with L1 in TV's place: still TRUE, only looser, as L1 = 2 TV ≥ TV."""
    doubled = ("tv_model", "tv_shift", "tv_model_error", "tv_shift_error")
    return theorem1(s._replace(**{name: 2 * getattr(s, name) for name in doubled}))


def theorem1_kl_reversed(s: Solution) -> Statement:
    """Theorem 1 misread with λ KL(ρ_sft‖ρ*): still TRUE.

    E_ρ* R − E_ρ_sft R = λ Jeff(ρ*, ρ_sft) = λ KL(ρ*‖ρ_sft) + λ KL(ρ_sft‖ρ*) is at least either of the two.
    """
    return theorem1(s._replace(prompter_kl=s.prompter_gain))


CLAIMS: dict[str, Claim] = {
    "exact_gap": Claim(exact_gap, "identity", "="),
    "suboptimality": Claim(suboptimality, "identity", "=", any_prompter=True),
    "any_gap": Claim(any_gap, "identity", "=", any_prompter=True),
    "regularised": Claim(regularised, "identity", "=", any_prompter=True),
    "model_law": Claim(model_law, "identity", "="),
    "pinsker": Claim(pinsker, "lemma"),
    "tanh_tv": Claim(tanh_tv, "lemma"),
    "jeffreys_tv": Claim(jeffreys_tv, "lemma"),
    "theorem1_l1": Claim(theorem1_l1, "lemma"),
    "theorem1_kl_reversed": Claim(theorem1_kl_reversed, "lemma"),
}
