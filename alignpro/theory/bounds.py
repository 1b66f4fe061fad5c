"""Theorem 1 and its sharper forms, as numbers one can check.

A *statement* is a function of a `Solution`: `lhs ≤ rhs`, with the assumptions it needs and a bound on the
rounding error of `rhs − lhs`. `BOUNDS`, `IDENTITIES` and `WRONG_BOUNDS` are plain dicts of
statements; a new one is one function and one row. `check` turns a statement into a `BoundReport`.

All logarithms are natural; TV is half the L1 distance. "Reward units" are those of the rewards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignpro.errors import AlignProError
from alignpro.theory.divergences import Floats
from alignpro.theory.elementwise import (
    arctanh,
    expm1,
    exprel,
    is_ball,
    maximum,
    minimum,
    ones_like,
    sqrt,
    tanh,
)
from alignpro.theory.gibbs import check_temperature
from alignpro.theory.instance import Instance, probabilities
from alignpro.theory.solution import Solution, solution

Verdict = Literal["holds", "violated", "inconclusive", "inapplicable"]


class Statement(NamedTuple):
    """`lhs ≤ rhs` (or `lhs = rhs` for an identity), averaged over P, as arrays.

    `error` bounds the rounding of `rhs − lhs`. `ceiling` is the trivial bound E_x span(x): a right side at
    or above it says nothing.
    """

    lhs: Float[Array, ""]
    rhs: Float[Array, ""]
    error: Float[Array, ""]
    ceiling: Float[Array, ""]
    terms: dict[str, Float[Floats, ""]]
    """Named parts of `rhs`, each ≥ 0."""
    assumptions: dict[str, Array]
    """What must be true for the statement to apply (bool)."""


def paper_r_max(s: Solution) -> Any:
    """Theorem 1's r_max: the largest reward when none is negative, as in the paper.

    With negative rewards everything is shifted by the minimum first, which changes neither side but makes
    r_max = max r − min r.
    """
    return s.reward_max - minimum(0.0, s.reward_min)


def _tiny(like: Array) -> float:
    return float(jnp.finfo(like.dtype).tiny)


def _statement(s: Solution, lhs, rhs, terms, error, assumptions, magnitude, ceiling=None) -> Statement:
    """E_x of both sides; `magnitude` [X] is what was summed, for the error of the average itself."""
    average = s.average
    summed = average(magnitude)
    # Below the smallest normal number compiled code flushes to 0, errors included. Balls carry their own.
    flushed = summed * 0 if is_ball(summed) else jnp.where(summed > 0, 16.0 * _tiny(summed), 0.0)
    return Statement(
        lhs=average(lhs),
        rhs=average(rhs),
        error=average(error) + 2.0 * (s.p.shape[-1] + 8) * s.eps * summed + flushed,
        ceiling=average(s.span if ceiling is None else ceiling),
        terms={name: average(term) for name, term in terms.items()},
        assumptions=assumptions,
    )


def _optimal(s: Solution) -> dict[str, Any]:
    return {"prompter is optimal": s.is_star}


def _supported(s: Solution) -> dict[str, Any]:
    return {"prompter has the support of its reference": s.supported}


def _covered(s: Solution) -> dict[str, Any]:
    return {"rewrites induce no response the frozen model cannot give": s.covered}


def _upper(s: Solution, added: dict, subtracted: dict, error, assumptions) -> Statement:
    """gap ≤ Σ added − Σ subtracted."""
    positive, negative = sum(added.values()), sum(subtracted.values(), start=s.span * 0)
    size = abs(s.gap) + positive + negative
    rhs, terms = positive - negative, added | subtracted
    return _statement(s, s.gap, rhs, terms, s.gap_error + error, assumptions, size)


def _lower(s: Solution, added: dict, subtracted: dict, error, assumptions) -> Statement:
    """gap ≥ Σ added − Σ subtracted, as `lhs ≤ rhs` with the gap on the right."""
    nothing = s.span * 0
    positive, negative = sum(added.values(), start=nothing), sum(subtracted.values(), start=nothing)
    return _statement(
        s,
        positive - negative,
        s.gap,
        added | subtracted,
        s.gap_error + error,
        assumptions,
        abs(s.gap) + abs(positive) + negative,
    )


def _three_terms(s: Solution, width: Floats, third: Floats, assumptions: dict[str, Any]) -> Statement:
    """gap ≤ width·TV(π*,π_F) + width·E TV(π_F(·|x), π_F(·|x′)) − third, per prompt, then averaged."""
    return _upper(
        s,
        {"model": width * s.tv_model, "prompt_shift": width * s.tv_shift},
        {"prompter_kl": third},
        s.prompter_error + width * (s.tv_model_error + s.tv_shift_error),
        assumptions,
    )


def theorem1(s: Solution, r_max: Float[Floats, ""] | float | None = None) -> Statement:
    """Theorem 1 (equation 11): gap ≤ r_max E TV(π*,π_F) + r_max E TV(π_F(·|x),π_F(·|x′)) − λ E KL(ρ*‖ρ_sft).

    `r_max` is `paper_r_max` unless given; a given one must enclose every reward in [0, r_max].

    Proof: Δ1 ≤ r_max TV, as r* has span at most r_max. Optimality of ρ* against ρ_sft in (9) gives
    E_ρ* R − λ KL(ρ*‖ρ_sft) ≥ E_ρsft R, so Δ2 ≤ R(x,x) − E_ρsft R − λ KL ≤ r_max E TV − λ KL.

    What a slip in a constant does to it: TV without its ½ only loosens the right side, and KL reversed
    leaves it TRUE, since E_ρ* R − E_ρsft R = λ Jeff(ρ*, ρ_sft) is at least λ KL in either direction.
    See `WRONG_BOUNDS` for where those slips are false.
    """
    width = paper_r_max(s) if r_max is None else r_max
    enclosed = jnp.asarray(True) if r_max is None else (s.reward_min >= 0) & (s.reward_max <= width)
    return _three_terms(
        s, width * ones_like(s.span), s.prompter_kl, {"rewards in [0, r_max]": enclosed} | _optimal(s)
    )


def span(s: Solution) -> Statement:
    """Theorem 1 with span(x) = max − min of r*(x,·) over the responses reachable from x in r_max's place.

    Reachable: positive probability under π_F(·|x) or under π_F(·|x′) for some x′ in the support of ρ_sft.
    Proof: as for Theorem 1; both TV steps only involve distributions on reachable responses, and
    |E_p r − E_q r| ≤ span·TV(p,q) there. Never looser than `theorem1`.
    """
    return _three_terms(s, s.span, s.prompter_kl, _optimal(s))


def tight(s: Solution) -> Statement:
    """The span form with λ Jeff(ρ*,ρ_sft) in λ KL's place: valid, and never looser than `span`.

    Proof: log(ρ*/ρ_sft) = R/λ − log Z, so λ Jeff(ρ*,ρ_sft) = E_ρ* R − E_ρsft R exactly (cf. 2605.07105),
    where Theorem 1 used an inequality. An equality when r* is an indicator aligned with both TV steps.
    """
    return _three_terms(s, s.span, s.prompter_jeffreys, _optimal(s))


def _model_and_barycentre(s: Solution, model: Floats, error: Floats) -> Statement:
    return _upper(
        s,
        {"model": model, "prompt_shift": s.span * s.tv_barycentre},
        {"prompter_kl": s.prompter_jeffreys},
        s.prompter_error + error + s.span * s.tv_shift_error,
        _optimal(s),
    )


def barycentre(s: Solution) -> Statement:
    """`tight` with TV(π_F(·|x), π_ρsft(·|x)) in E_ρsft TV's place: never looser, and without pairwise terms.

    Proof: R(x,x) − E_ρsft R = E_πF(·|x) r* − E_π_ρsft r* is at most span·TV of the two policies, and TV is
    convex, so that is at most the average of TV over ρ_sft. Far smaller where rewrites err in different ways.
    """
    return _model_and_barycentre(s, s.span * s.tv_model, s.span * s.tv_model_error)


def beta_only(s: Solution) -> Statement:
    """`barycentre` with span²/(4β) (at most span) for the model's term: no policy π* is needed.

    Proof: with π_s ∝ π_F e^{s r}, d/ds E_π_s r = Var_π_s(r) ≤ span²/4 (Popoviciu); integrate s over [0, 1/β].
    """
    share = minimum(s.span / (4.0 * s.beta), ones_like(s.span))
    return _model_and_barycentre(s, s.span * share, 8 * s.eps * s.span * share)


def beta_tanh(s: Solution) -> Statement:
    """`barycentre` with span·tanh(span/(4β)) for the model's term: sharper than `beta_only` at every β.

    Proof: on A = {r* > β log Z*}, TV = π*(A) − π_F(A), and the odds of A under π* are at most e^{span/β}
    times those under π_F (π*/π_F = e^{r/β}/Z*). Two probabilities whose log-odds differ by a differ by at
    most tanh(a/4). So TV(π*,π_F) ≤ tanh(span/(4β)), attained by two points; then Δ1 ≤ span·TV.
    """
    share = tanh(s.span / (4.0 * s.beta))
    return _model_and_barycentre(s, s.span * share, 8 * s.eps * s.span * share)


def _variance_term(s: Solution) -> tuple[Floats, Floats]:
    """min(span, Var(r*)/β · (e^{M/β} − 1)/(M/β)), M = max r* − E r* under π_F(·|x), and its rounding."""
    growth = exprel(s.own_rise / s.beta)
    term = minimum((s.own_sd / s.beta) * s.own_sd * growth, s.span)
    if is_ball(term[0]):
        return term, term * 0
    relative = jnp.minimum(2.0 * s.own_error / s.beta + (64 + 2 * s.own_rise / s.beta) * s.eps, 1.0)
    error = 2.0 * relative * term + 4.0 * (s.own_sd / s.beta) * growth * s.own_error
    return term, jnp.minimum(error, s.span)


def variance(s: Solution) -> Statement:
    """`barycentre` with Var(r*)/β·(e^{M/β} − 1)/(M/β) (at most span) for the model's term.

    Variance and M = max r* − E r* are those of π_F(·|x): rewards of the frozen model's own samples suffice.
    Proof: with u = r* − E_πF r*, Δ1 = E[u e^{u/β}]/E[e^{u/β}]; the denominator is ≥ 1 (Jensen), and E u = 0
    makes the numerator E[u (e^{u/β} − 1)] = E[u²/β · (e^{u/β} − 1)/(u/β)]; its last factor grows with u ≤ M.
    Beats span·TV for large β, where Δ1 → Var/β while span·TV → span·E|u|/(2β).
    """
    return _model_and_barycentre(s, *_variance_term(s))


def kl_only(s: Solution) -> Statement:
    """`barycentre` with span·min(√(KL/2), √(1 − e^{−KL})), KL = KL(π*‖π_F), for the model's term.

    Pinsker's and Bretagnolle–Huber's bounds on TV. Never tighter than `barycentre`; for use when KL is known.
    """
    kl, noise = s.model_kl / s.beta, s.model_error / s.beta
    root, huber = sqrt(kl / 2.0), sqrt(-expm1(-kl))
    term = s.span * minimum(root, huber)
    if is_ball(kl[0]):
        return _model_and_barycentre(s, term, term * 0)
    error = jnp.minimum(jnp.sqrt((kl + noise) / 2.0) - root, 1.0) + 8 * s.eps * jnp.minimum(root, 1.0)
    return _model_and_barycentre(s, term, 2.0 * s.span * error)


def combined(s: Solution) -> Statement:
    """The lesser of the model's terms of `barycentre` and `variance`, prompt by prompt: no looser than they.

    `beta_only`, `beta_tanh` and `kl_only` need no place in it, being bounds on TV.
    """
    by_variance, error = _variance_term(s)
    model = minimum(s.span * s.tv_model, by_variance)
    return _model_and_barycentre(s, model, error + s.span * s.tv_model_error)


def trained(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ span·TV1 + span·TV2 + λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft).

    Proof: F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) (`suboptimality`), so E_ρ R = F(ρ*) − λ KL(ρ‖ρ*) + λ KL(ρ‖ρ_sft), and
    F(ρ*) ≥ F(ρ_sft) = E_ρsft R. An optimisation shortfall is thus a term, never read as a violation.
    """
    return _trained(s, s.kl_to_star, s.kl_to_reference, s.kl_excess, s.excess_error)


def _trained(s: Solution, shortfall: Floats, prompter_kl: Floats, excess: Floats, error: Floats) -> Statement:
    return _for_any(s, s.tv_shift, {"shortfall": shortfall, "prompter_kl": prompter_kl}, excess, error)


def _for_any(s: Solution, tv_shift: Floats, kls: dict, excess: Any, error: Any) -> Statement:
    """gap ≤ span·TV1 + span·`tv_shift` + `excess`, the difference of `kls` without its cancellation."""
    model, prompt_shift = s.span * s.tv_model, s.span * tv_shift
    return _statement(
        s,
        s.gap,
        model + prompt_shift + excess,
        {"model": model, "prompt_shift": prompt_shift} | kls,
        s.gap_error + error + s.span * (s.tv_model_error + s.tv_shift_error),
        _supported(s),
        abs(s.gap) + model + prompt_shift + abs(excess),
    )


def trained_tight(s: Solution) -> Statement:
    """For ANY ρ: `trained` with TV to the barycentre and − λ KL(ρ_sft‖ρ*): never looser.

    Proof: F(ρ*) = E_ρsft R + λ KL(ρ_sft‖ρ*) exactly (suboptimality of ρ_sft), where `trained` uses
    F(ρ*) ≥ E_ρsft R. At ρ = ρ* it is `barycentre`.
    """
    kls = {"shortfall": s.kl_to_star, "prompter_kl": s.kl_to_reference, "reference_kl": s.prompter_gain}
    excess, error = s.kl_excess - s.prompter_gain, s.excess_error + s.prompter_error
    return _for_any(s, s.tv_barycentre, kls, excess, error)


def induced(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ span·TV(π*, π_ρ), of the two policies that are compared.

    Proof: the gap is E_π* r* − E_π_ρ r*. Needs π_ρ itself (equation 3); beats every bound above when
    rewriting brings the answers near π*; loses where π_ρ and π* differ in responses of equal reward.
    """
    return _upper(s, {"policies": s.span * s.tv_induced}, {}, s.span * s.tv_rho_error, {})


BOUNDS: dict[str, Callable[[Solution], Statement]] = {
    "theorem1": theorem1,
    "span": span,
    "tight": tight,
    "barycentre": barycentre,
    "combined": combined,
    "variance": variance,
    "beta_tanh": beta_tanh,
    "beta_only": beta_only,
    "kl_only": kl_only,
    "trained": trained,
    "trained_tight": trained_tight,
    "induced": induced,
}
"""Upper bounds on the gap J(π*) − J(π_ρ)."""


def ceiling(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≥ E_π* r* − max R(x,·) over the support of ρ_sft, the prompting ceiling.

    Proof: E_ρ R is an average of R over that support. Reached as λ → 0 by ρ*. Positive: no prompter there, at
    whatever λ, matches π*. `limits.prompting_ceiling` has it over all rewrites too.
    """
    error = s.model_error + s.shift_error
    return _lower(s, {"ceiling": s.ceiling}, {}, error, _supported(s))


def kl_ceiling(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≥ E_π* r* − λ log Z − λ KL(ρ‖ρ_sft): what a KL of that size can reach at most.

    Proof: E_ρ R − λ KL(ρ‖ρ_sft) = F(ρ) ≤ F(ρ*) = λ log Z (Donsker–Varadhan). An equality at ρ = ρ*. Beats
    `ceiling` for prompters near ρ_sft.
    """
    return _lower(
        s,
        {"optimal_value": s.value_gap},
        {"prompter_kl": s.kl_to_reference},
        s.model_error + s.prompter_error + s.rho_error,
        _supported(s),
    )


def drift(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≥ β KL(π*‖π_F) − β KL(π_ρ‖π_F).

    Proof: `regularised` without its term β KL(π_ρ‖π*) ≥ 0. So a prompter outperforms π* only if its answers
    move further from π_F(·|x), in KL, than π* does: a necessary condition for the paper's question Q2.
    """
    return _lower(
        s,
        {"model_kl": s.model_kl},
        {"induced_kl": s.induced_to_model},
        s.model_error + s.induced_error,
        _covered(s),
    )


def mirror(s: Solution) -> Statement:
    """gap ≥ β Jeff(π*,π_F) − span·TV(π_F(·|x), π_ρsft(·|x)) − λ Jeff(ρ*,ρ_sft): `barycentre` from below.

    Proof: the exact gap with R(x,x) − E_ρsft R ≥ −span·TV. Beats `ceiling` where λ keeps ρ* near ρ_sft.
    """
    return _lower(
        s,
        {"model": s.model_jeffreys},
        {"prompt_shift": s.span * s.tv_barycentre, "prompter_kl": s.prompter_jeffreys},
        s.model_error + s.prompter_error + s.span * s.tv_shift_error,
        _optimal(s),
    )


LOWER_BOUNDS: dict[str, Callable[[Solution], Statement]] = {
    "ceiling": ceiling,
    "kl_ceiling": kl_ceiling,
    "drift": drift,
    "mirror": mirror,
}
"""Lower bounds on the gap: `lhs` is the bound, `rhs` the gap. The paper left them open."""


def _identity(s: Solution, lhs, rhs, error, assumptions, magnitude) -> Statement:
    """`lhs = rhs`; its `ceiling` is the size of what is summed, which its rounding is relative to."""
    return _statement(s, lhs, rhs, {}, error, assumptions, magnitude, maximum(s.span, magnitude))


def exact_gap(s: Solution) -> Statement:
    """gap = β Jeff(π*,π_F) + [R(x,x) − E_ρsft R] − λ Jeff(ρ*,ρ_sft), exactly.

    Proof: the Jeffreys identity of the tilt (see `tight`) on both sides of Δ1 + Δ2.
    """
    return _identity(
        s,
        s.gap,
        s.model_jeffreys + s.shift - s.prompter_jeffreys,
        s.gap_error + s.model_error + s.prompter_error + s.shift_error,
        _optimal(s),
        abs(s.gap) + s.model_jeffreys + abs(s.shift) + s.prompter_jeffreys,
    )


def suboptimality(s: Solution) -> Statement:
    """F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) for ANY ρ, with F(ρ) = E_ρ R − λ KL(ρ‖ρ_sft).

    Proof: log ρ* = log ρ_sft + R/λ − log Z, so λ KL(ρ‖ρ*) = λ KL(ρ‖ρ_sft) − E_ρ R + λ log Z.
    """
    return _identity(
        s,
        s.shortfall,
        s.kl_to_star,
        s.rho_error + s.prompter_error,
        _supported(s),
        abs(s.shortfall) + s.kl_to_star + s.kl_to_reference + s.prompter_kl,
    )


def any_gap(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) = E_π* r* − λ log Z + λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft), exactly.

    Proof: `suboptimality`, with E_ρ R = F(ρ) + λ KL(ρ‖ρ_sft) and F(ρ*) = λ log Z.
    """
    return _identity(
        s,
        s.gap,
        s.value_gap + s.kl_excess,
        s.gap_error + s.model_error + s.prompter_error + s.excess_error,
        _supported(s),
        abs(s.gap) + abs(s.value_gap) + abs(s.kl_excess),
    )


def regularised(s: Solution) -> Statement:
    """For ANY ρ: G(π*) − G(π_ρ) = β KL(π_ρ‖π*) with G(π) = E_π r* − β KL(π‖π_F), written for the gap.

    gap(ρ) = β KL(π_ρ‖π*) + β KL(π*‖π_F) − β KL(π_ρ‖π_F). Proof: `suboptimality` on the RLHF side, at π_ρ. So
    the prompter best in that sense projects π* on the rewrites' hull (`limits.information_projection`).
    """
    return _identity(
        s,
        s.gap,
        s.induced_to_star + s.model_kl - s.induced_to_model,
        s.gap_error + s.model_error + 2.0 * s.induced_error,
        _covered(s),
        abs(s.gap) + s.induced_to_star + s.model_kl + s.induced_to_model,
    )


IDENTITIES: dict[str, Callable[[Solution], Statement]] = {
    "exact_gap": exact_gap,
    "suboptimality": suboptimality,
    "any_gap": any_gap,
    "regularised": regularised,
}
"""Equalities: `lhs` = `rhs`."""


def pinsker(s: Solution) -> Statement:
    """Pinsker's inequality, E_x d_TV(π*,π_F) ≤ E_x √(KL(π*‖π_F)/2), with TV half the L1 distance."""
    return _pinsker(s, 1.0)


def _pinsker(s: Solution, times: float) -> Statement:
    half_kl = s.model_kl / (2.0 * s.beta)
    noise = s.model_error / (2.0 * s.beta)
    return _statement(
        s,
        times * s.tv_model,
        sqrt(half_kl),
        {},
        times * s.tv_model_error + sqrt(half_kl + noise) - sqrt(half_kl),
        {},
        times * s.tv_model + sqrt(half_kl),
        ones_like(half_kl),  # a total variation is at most 1, in probability rather than reward units
    )


def tanh_tv(s: Solution) -> Statement:
    """E_x d_TV(π*,π_F) ≤ E_x tanh(span/(4β)), attained by two points of equal weight; see `beta_tanh`."""
    rhs = tanh(s.span / (4.0 * s.beta))
    return _statement(
        s, s.tv_model, rhs, {}, s.tv_model_error + 8 * s.eps * rhs, {}, s.tv_model + rhs, ones_like(rhs)
    )


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
        overlap = jnp.maximum(s.overlap_model, _tiny(tv))
        half = jnp.arctanh(jnp.minimum(tv, 0.5))
        angle = jnp.where(tv < 0.5, half, 0.5 * jnp.log((1.0 + tv) / overlap))
        lhs = 4.0 * s.beta * tv * angle
        error = 4.0 * s.beta * apart * (angle + 2.0) + 16 * s.eps * lhs
        error = jnp.where(s.overlap_model > 2 * _tiny(tv), error, s.span)
    return _statement(s, lhs, s.model_jeffreys, {}, error + s.model_error, {}, lhs + s.model_jeffreys)


def theorem1_l1(s: Solution) -> Statement:
    """Theorem 1 misread with L1 in TV's place: still TRUE, only looser, as L1 = 2 TV ≥ TV."""
    return theorem1(s._replace(tv_model=2 * s.tv_model, tv_shift=2 * s.tv_shift))


def theorem1_kl_reversed(s: Solution) -> Statement:
    """Theorem 1 misread with λ KL(ρ_sft‖ρ*): still TRUE.

    E_ρ* R − E_ρsft R = λ Jeff(ρ*, ρ_sft) = λ KL(ρ*‖ρ_sft) + λ KL(ρ_sft‖ρ*) is at least either of the two.
    """
    return theorem1(s._replace(prompter_kl=s.prompter_gain))


LEMMAS: dict[str, Callable[[Solution], Statement]] = {
    "pinsker": pinsker,
    "tanh_tv": tanh_tv,
    "jeffreys_tv": jeffreys_tv,
    "theorem1_l1": theorem1_l1,
    "theorem1_kl_reversed": theorem1_kl_reversed,
}
"""True statements beside the bounds on the gap: inequalities, and two misreadings that do no harm."""


def signed_max_abs(s: Solution) -> Statement:
    """FALSE: Theorem 1 with r_max = max |r| when rewards are signed.

    Rewards in {−1, 1} have span 2, so Δ1 = 2 TV(π*,π_F) where the misreading allows 1 TV.
    """
    largest = maximum(abs(s.reward_max), abs(s.reward_min))
    return _three_terms(s, largest * ones_like(s.span), s.prompter_kl, _optimal(s))


def quarter_l1(s: Solution) -> Statement:
    """FALSE: Theorem 1 with ¼ L1 in TV's place, a constant half what it must be.

    For an indicator reward, Δ1 = r_max TV(π*,π_F) exactly; with ρ_sft on x itself nothing else is left.
    """
    return theorem1(s._replace(tv_model=0.5 * s.tv_model, tv_shift=0.5 * s.tv_shift))


def beta_eighth(s: Solution) -> Statement:
    """FALSE: `beta_only` with Hoeffding's span²/(8β).

    That bounds β log Z* − E_πF r*, which leaves out β KL(π*‖π_F), as large again when β is large.
    """
    share = minimum(s.span / (8.0 * s.beta), ones_like(s.span))
    return _model_and_barycentre(s, s.span * share, 8 * s.eps * s.span * share)


def never_outperforms(s: Solution) -> Statement:
    """FALSE: gap ≥ 0, as if no prompter could outperform π* (the paper's question Q2).

    π* pays for its KL to π_F(·|x); a rewrite can steer the frozen model to better answers at once.
    """
    return _lower(s, {}, {}, s.span * 0, {})


def pinsker_l1(s: Solution) -> Statement:
    """FALSE: Pinsker's inequality with L1 in TV's place, the ½ forgotten.

    As KL → 0 about a fair coin, TV/√(KL/2) → 1, so L1/√(KL/2) → 2.
    """
    return _pinsker(s, 2.0)


def l1_at_most_one(s: Solution) -> Statement:
    """FALSE: d_TV(π*,π_F) ≤ 1 with the ½ forgotten; distributions with little in common have L1 near 2."""
    one = ones_like(s.tv_model)
    return _statement(s, 2 * s.tv_model, one, {}, 2 * s.tv_model_error, {}, one, one)


def suboptimality_reversed(s: Solution) -> Statement:
    """FALSE: F(ρ*) − F(ρ) ≤ λ KL(ρ*‖ρ), the suboptimality identity with its KL reversed.

    The left side is λ KL(ρ‖ρ*), and neither direction of KL bounds the other.
    """
    return suboptimality(s._replace(kl_to_star=s.kl_from_star))


def trained_reversed(s: Solution) -> Statement:
    """FALSE: the trained form with both KLs reversed, + λ KL(ρ*‖ρ) − λ KL(ρ_sft‖ρ).

    A ρ that leaves out much of ρ_sft makes the last term large while its reward loss stays bounded.
    """
    excess = s.kl_from_star - s.kl_from_reference
    return _trained(s, s.kl_from_star, s.kl_from_reference, excess, s.rho_error + s.eps * abs(excess))


WRONG_BOUNDS: dict[str, Callable[[Solution], Statement]] = {
    "signed_max_abs": signed_max_abs,
    "quarter_l1": quarter_l1,
    "beta_eighth": beta_eighth,
    "never_outperforms": never_outperforms,
    "pinsker_l1": pinsker_l1,
    "l1_at_most_one": l1_at_most_one,
    "suboptimality_reversed": suboptimality_reversed,
    "trained_reversed": trained_reversed,
}
"""Known-wrong readings, to test the tester: each must be refuted by random search.

Forgetting the ½ of TV, or reversing the KL, inside Theorem 1's own right side is not among them: that
leaves it true (`theorem1_l1`, `theorem1_kl_reversed`). They are refuted where they are false.
"""

SAID_FROM_BELOW = frozenset({*LOWER_BOUNDS, "never_outperforms"})
"""Statements with the gap on the right."""

STATEMENTS: dict[str, Callable[[Solution], Statement]] = {
    **BOUNDS,
    **LOWER_BOUNDS,
    **IDENTITIES,
    **LEMMAS,
    **WRONG_BOUNDS,
}
"""All of them, by name."""

ANY_PROMPTER = frozenset(
    {"trained", "trained_tight", "induced", "ceiling", "kl_ceiling", "drift"}
    | {"suboptimality", "any_gap", "regularised", "suboptimality_reversed", "trained_reversed"}
)
"""Statements about any prompter ρ, so to be checked on others than ρ*."""


@dataclass(frozen=True)
class BoundReport:
    """The outcome of one statement on one instance, in reward units, with all it rests on."""

    name: str
    gap: float
    """J(π*) − J(π_ρ), or what a lemma or identity has on its left."""
    rhs: float
    """The bound: gap ≤ rhs, or gap ≥ rhs where `relation` says so."""
    slack: float
    """rhs − gap, for a lower bound gap − rhs: ≥ 0 where it holds."""
    terms: Mapping[str, float]
    """Named parts of the bound, in reward units."""
    assumptions: Mapping[str, bool]
    verdict: Verdict
    """holds | violated | inconclusive (|slack| within rounding) | inapplicable (an assumption fails)."""
    vacuous: bool
    """It would hold whatever the policies: an upper bound no smaller than the reward span, or a lower bound
    no larger than minus it."""
    error: float
    """Bound on the rounding of `slack`."""
    relation: Literal["<=", ">=", "="] = "<="


def judge(slack: float, error: float, applicable: bool = True, equality: bool = False) -> Verdict:
    """The verdict of `slack` known to ± `error`. An error of exactly 0 with slack ≥ 0 holds.

    An identity holds while |slack| ≤ error. NaN (an overflow of both sides) is inconclusive.
    """
    if not applicable:
        return "inapplicable"
    if np.isnan(slack) or np.isnan(error):
        return "inconclusive"
    if equality:
        return "holds" if abs(slack) <= error else "violated"
    if error == 0:
        return "holds" if slack >= 0 else "violated"
    if abs(slack) <= error:
        return "inconclusive"
    return "holds" if slack > 0 else "violated"


def report(name: str, statement: Statement) -> BoundReport:
    """The host-side report of one (unbatched) statement, `name` being its key in `STATEMENTS`."""
    lhs, rhs, error, ceiling = (float(v) for v in statement[:4])
    assumptions = {key: bool(value) for key, value in statement.assumptions.items()}
    slack, lower, equality = rhs - lhs, name in SAID_FROM_BELOW, name in IDENTITIES
    return BoundReport(
        name=name,
        gap=rhs if lower else lhs,
        rhs=lhs if lower else rhs,
        slack=slack,
        terms={key: float(value) for key, value in statement.terms.items()},
        assumptions=assumptions,
        verdict=judge(slack, error, all(assumptions.values()), equality),
        vacuous=lhs <= -ceiling if lower else rhs >= ceiling,
        error=error,
        relation=">=" if lower else "=" if equality else "<=",
    )


def check(
    instance: Instance,
    beta: float,
    lam: float,
    bound: str = "theorem1",
    *,
    prompter: Float[Floats, "X K"] | None = None,
    r_max: float | None = None,
) -> BoundReport:
    """One bound on one instance.

    Args:
        instance: the problem.
        beta: β > 0, in reward units.
        lam: λ > 0, in reward units.
        bound: a key of `STATEMENTS`.
        prompter: a trained ρ(x′|x) [X, K]; ρ* when None. Only those in `ANY_PROMPTER` apply to any but ρ*.
        r_max: override of Theorem 1's r_max; "inapplicable" when rewards leave [0, r_max].

    Raises:
        AlignProError: β or λ is not positive and finite, the bound is unknown, or the prompter is no
            matrix of probabilities of the shape of `instance.prior`.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    if bound not in STATEMENTS:
        raise AlignProError(f"bound {bound!r} is unknown; give one of {', '.join(STATEMENTS)}")
    if prompter is not None:
        prompter = probabilities("prompter", prompter, np.shape(instance.prior))
    s = solution(instance, beta, lam, prompter)
    if r_max is not None and bound == "theorem1":
        return report(bound, theorem1(s, r_max))
    return report(bound, STATEMENTS[bound](s))
