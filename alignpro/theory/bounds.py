"""Theorem 1 and its sharper forms, as numbers one can check.

A *statement* is a function of a `Solution`: `lhs ≤ rhs`, with the assumptions it needs and a bound on the
rounding error of `rhs − lhs`. `BOUNDS`, `IDENTITIES` and `WRONG_BOUNDS` are plain dicts of
statements; a new one is one function and one row. `check` turns a statement into a `BoundReport`.

All logarithms are natural; TV is half the L1 distance. "Reward units" are those of the rewards.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignpro.errors import AlignProError
from alignpro.theory.divergences import TINY, Floats
from alignpro.theory.gibbs import check_temperature
from alignpro.theory.instance import KEYS, Instance, probabilities, unchecked
from alignpro.theory.solution import EPS, Solution, solution

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


def paper_r_max(s: Solution) -> Float[Array, ""]:
    """Theorem 1's r_max: the largest reward when none is negative, as in the paper.

    With negative rewards everything is shifted by the minimum first, which changes neither side but makes
    r_max = max r − min r.
    """
    return s.reward_max - jnp.minimum(0.0, s.reward_min)


def _averaged(s: Solution, lhs, terms, rhs, error, assumptions, magnitude, ceiling=None) -> Statement:
    """E_x of both sides; `magnitude` [X] is what was summed, for the error of the average itself."""
    n = s.p.shape[-1]
    average = s.average
    summed = average(magnitude)
    # Below the smallest normal number compiled code flushes to 0, errors included.
    flushed = jnp.where(summed > 0, 16.0 * TINY, 0.0)
    return Statement(
        lhs=average(lhs),
        rhs=average(rhs),
        error=average(error) + 2.0 * (n + 8) * EPS * summed + flushed,
        ceiling=average(s.span if ceiling is None else ceiling),
        terms={name: average(term) for name, term in terms.items()},
        assumptions=assumptions,
    )


def _three_terms(s: Solution, width: Array, third: Array, assumptions: dict[str, Array]) -> Statement:
    """gap ≤ width·TV(π*,π_F) + width·E TV(π_F(·|x), π_F(·|x′)) − third, per prompt, then averaged."""
    model, prompt_shift = width * s.tv_model, width * s.tv_shift
    return _averaged(
        s,
        s.gap,
        {"model": model, "prompt_shift": prompt_shift, "prompter_kl": third},
        model + prompt_shift - third,
        s.gap_error + s.prompter_error + width * (s.tv_model_error + s.tv_shift_error),
        assumptions,
        jnp.abs(s.gap) + model + prompt_shift + third,
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
    width = paper_r_max(s) if r_max is None else jnp.asarray(r_max, float)
    enclosed = jnp.asarray(True) if r_max is None else (s.reward_min >= 0) & (s.reward_max <= width)
    return _three_terms(
        s,
        width * jnp.ones_like(s.span),
        s.prompter_kl,
        {"rewards in [0, r_max]": enclosed, "prompter is optimal": s.is_star},
    )


def span(s: Solution) -> Statement:
    """Theorem 1 with span(x) = max − min of r*(x,·) over the responses reachable from x in r_max's place.

    Reachable: positive probability under π_F(·|x) or under π_F(·|x′) for some x′ in the support of ρ_sft.
    Proof: as for Theorem 1; both TV steps only involve distributions on reachable responses, and
    |E_p r − E_q r| ≤ span·TV(p,q) there.
    """
    return _three_terms(s, s.span, s.prompter_kl, {"prompter is optimal": s.is_star})


def tight(s: Solution) -> Statement:
    """The span form with λ Jeff(ρ*,ρ_sft) in λ KL's place: valid, and never looser.

    Proof: log(ρ*/ρ_sft) = R/λ − log Z, so λ Jeff(ρ*,ρ_sft) = E_ρ* R − E_ρsft R exactly, where Theorem 1 used
    an inequality. It is an equality when r* is an indicator aligned with both TV steps.
    """
    return _three_terms(s, s.span, s.prompter_jeffreys, {"prompter is optimal": s.is_star})


def trained(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ span·TV1 + span·TV2 + λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft).

    Proof: F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) (`suboptimality`), so E_ρ R = F(ρ*) − λ KL(ρ‖ρ*) + λ KL(ρ‖ρ_sft), and
    F(ρ*) ≥ F(ρ_sft) = E_ρsft R. An optimisation shortfall is thus a term, never read as a violation.
    """
    return _trained(s, s.kl_to_star, s.kl_to_reference, s.kl_excess, s.excess_error)


def _trained(s: Solution, shortfall: Array, prompter_kl: Array, excess: Array, error: Array) -> Statement:
    model, prompt_shift = s.span * s.tv_model, s.span * s.tv_shift
    return _averaged(
        s,
        s.gap,
        {"model": model, "prompt_shift": prompt_shift, "shortfall": shortfall, "prompter_kl": prompter_kl},
        model + prompt_shift + excess,
        s.gap_error + error + s.span * (s.tv_model_error + s.tv_shift_error),
        {"prompter has the support of its reference": s.supported},
        jnp.abs(s.gap) + model + prompt_shift + jnp.abs(excess),
    )


def exact_gap(s: Solution) -> Statement:
    """gap = β Jeff(π*,π_F) + [R(x,x) − E_ρsft R] − λ Jeff(ρ*,ρ_sft), exactly.

    Proof: the Jeffreys identity of the tilt (see `tight`) on both sides of Δ1 + Δ2.
    """
    return _averaged(
        s,
        s.gap,
        {},
        s.model_jeffreys + s.shift - s.prompter_jeffreys,
        s.gap_error + s.model_error + s.prompter_error + s.shift_error,
        {"prompter is optimal": s.is_star},
        jnp.abs(s.gap) + s.model_jeffreys + jnp.abs(s.shift) + s.prompter_jeffreys,
    )


def suboptimality(s: Solution) -> Statement:
    """F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) for ANY ρ, with F(ρ) = E_ρ R − λ KL(ρ‖ρ_sft).

    Proof: log ρ* = log ρ_sft + R/λ − log Z, so λ KL(ρ‖ρ*) = λ KL(ρ‖ρ_sft) − E_ρ R + λ log Z.
    """
    return _averaged(
        s,
        s.shortfall,
        {},
        s.kl_to_star,
        s.rho_error + s.prompter_error,
        {"prompter has the support of its reference": s.supported},
        jnp.abs(s.shortfall) + s.kl_to_star + s.kl_to_reference + s.prompter_kl,
    )


BOUNDS: dict[str, Callable[[Solution], Statement]] = {
    "theorem1": theorem1,
    "span": span,
    "tight": tight,
    "trained": trained,
}
IDENTITIES: dict[str, Callable[[Solution], Statement]] = {
    "exact_gap": exact_gap,
    "suboptimality": suboptimality,
}


def pinsker(s: Solution) -> Statement:
    """Pinsker's inequality, E_x d_TV(π*,π_F) ≤ E_x √(KL(π*‖π_F)/2), with TV half the L1 distance."""
    return _pinsker(s, 1.0)


def _pinsker(s: Solution, times: float) -> Statement:
    half_kl = s.model_kl / (2 * s.beta)
    noise = s.model_error / (2 * s.beta)
    return _averaged(
        s,
        times * s.tv_model,
        {},
        jnp.sqrt(half_kl),
        times * s.tv_model_error + jnp.sqrt(half_kl + noise) - jnp.sqrt(half_kl),
        {},
        times * s.tv_model + jnp.sqrt(half_kl),
        jnp.ones_like(half_kl),  # a total variation is at most 1, in probability rather than reward units
    )


def theorem1_l1(s: Solution) -> Statement:
    """Theorem 1 misread with L1 in TV's place: still TRUE, only looser, as L1 = 2 TV ≥ TV."""
    return theorem1(s._replace(tv_model=2 * s.tv_model, tv_shift=2 * s.tv_shift))


def theorem1_kl_reversed(s: Solution) -> Statement:
    """Theorem 1 misread with λ KL(ρ_sft‖ρ*): still TRUE.

    E_ρ* R − E_ρsft R = λ Jeff(ρ*, ρ_sft) = λ KL(ρ*‖ρ_sft) + λ KL(ρ_sft‖ρ*) is at least either of the two.
    """
    return theorem1(s._replace(prompter_kl=s.prompter_jeffreys - s.prompter_kl))


LEMMAS: dict[str, Callable[[Solution], Statement]] = {
    "pinsker": pinsker,
    "theorem1_l1": theorem1_l1,
    "theorem1_kl_reversed": theorem1_kl_reversed,
}
"""True statements beside the bounds on the gap: an inequality, and two misreadings that do no harm."""


def signed_max_abs(s: Solution) -> Statement:
    """FALSE: Theorem 1 with r_max = max |r| when rewards are signed.

    Rewards in {−1, 1} have span 2, so Δ1 = 2 TV(π*,π_F) where the misreading allows 1 TV.
    """
    largest = jnp.maximum(jnp.abs(s.reward_max), jnp.abs(s.reward_min))
    return _three_terms(s, largest * jnp.ones_like(s.span), s.prompter_kl, {"prompter is optimal": s.is_star})


def quarter_l1(s: Solution) -> Statement:
    """FALSE: Theorem 1 with ¼ L1 in TV's place, a constant half what it must be.

    For an indicator reward, Δ1 = r_max TV(π*,π_F) exactly; with ρ_sft on x itself nothing else is left.
    """
    return theorem1(s._replace(tv_model=0.5 * s.tv_model, tv_shift=0.5 * s.tv_shift))


def pinsker_l1(s: Solution) -> Statement:
    """FALSE: Pinsker's inequality with L1 in TV's place, the ½ forgotten.

    As KL → 0 about a fair coin, TV/√(KL/2) → 1, so L1/√(KL/2) → 2.
    """
    return _pinsker(s, 2.0)


def l1_at_most_one(s: Solution) -> Statement:
    """FALSE: d_TV(π*,π_F) ≤ 1 with the ½ forgotten; distributions with little in common have L1 near 2."""
    one = jnp.ones_like(s.tv_model)
    return _averaged(s, 2 * s.tv_model, {}, one, 2 * s.tv_model_error, {}, one, one)


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
    return _trained(s, s.kl_from_star, s.kl_from_reference, excess, s.rho_error + EPS * jnp.abs(excess))


WRONG_BOUNDS: dict[str, Callable[[Solution], Statement]] = {
    "signed_max_abs": signed_max_abs,
    "quarter_l1": quarter_l1,
    "pinsker_l1": pinsker_l1,
    "l1_at_most_one": l1_at_most_one,
    "suboptimality_reversed": suboptimality_reversed,
    "trained_reversed": trained_reversed,
}
"""Known-wrong readings, to test the tester: each must be refuted by random search.

Forgetting the ½ of TV, or reversing the KL, inside Theorem 1's own right side is not among them: that
leaves it true (`theorem1_l1`, `theorem1_kl_reversed`). They are refuted where they are false.
"""

ANY_PROMPTER = frozenset({"trained", "suboptimality", "suboptimality_reversed", "trained_reversed"})
"""Statements about any prompter ρ, so to be checked on others than ρ*."""


@dataclass(frozen=True)
class BoundReport:
    """The outcome of one statement on one instance, in reward units, with all it rests on."""

    name: str
    gap: float
    """J(π*) − J(π_ρ)."""
    rhs: float
    slack: float
    """rhs − gap."""
    terms: Mapping[str, float]
    """Named parts of the right side, each ≥ 0."""
    assumptions: Mapping[str, bool]
    verdict: Verdict
    """holds | violated | inconclusive (|slack| within rounding) | inapplicable (an assumption fails)."""
    vacuous: bool
    """The right side is no smaller than the reward span, so it would hold whatever the policies."""
    error: float
    """Bound on the rounding of `slack`."""


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


def report(name: str, statement: Statement, equality: bool = False) -> BoundReport:
    """The host-side report of one (unbatched) statement."""
    lhs, rhs, error, ceiling = (float(v) for v in statement[:4])
    assumptions = {key: bool(value) for key, value in statement.assumptions.items()}
    slack = rhs - lhs
    return BoundReport(
        name=name,
        gap=lhs,
        rhs=rhs,
        slack=slack,
        terms={key: float(value) for key, value in statement.terms.items()},
        assumptions=assumptions,
        verdict=judge(slack, error, all(assumptions.values()), equality),
        vacuous=rhs >= ceiling,
        error=error,
    )


_jitted = jax.jit(solution)


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
        bound: a key of `BOUNDS`.
        prompter: a trained ρ(x′|x) [X, K]; ρ* when None. Only `trained` applies to any but ρ*.
        r_max: override of Theorem 1's r_max; "inapplicable" when rewards leave [0, r_max].

    Raises:
        AlignProError: β or λ is not positive and finite, the bound is unknown, or the prompter is no
            matrix of probabilities of the shape of `instance.prior`.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    if bound not in BOUNDS:
        raise AlignProError(f"bound {bound!r} is unknown; give one of {', '.join(BOUNDS)}")
    if prompter is not None:
        prompter = probabilities("prompter", prompter, np.shape(instance.prior))
    arrays = unchecked(*(getattr(instance, key) for key in KEYS))  # names would force a new compilation
    s = _jitted(arrays, beta, lam, prompter)
    if r_max is not None and bound == "theorem1":
        return report(bound, theorem1(s, r_max))
    return report(bound, BOUNDS[bound](s))
