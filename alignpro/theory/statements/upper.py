"""Upper bounds on the gap J(π*) − J(π_ρ): Theorem 1 and its sharper forms."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from alignpro.claims import Claim
from alignpro.theory.divergences import Floats
from alignpro.theory.elementwise import expm1, exprel, is_ball, minimum, ones_like, sqrt, tanh
from alignpro.theory.solution import Solution
from alignpro.theory.statements.statement import Statement, averaged, optimal, paper_r_max, supported, upper


def three_terms(s: Solution, width: Floats, third: Floats, assumptions: dict[str, Any]) -> Statement:
    """gap ≤ width·TV(π*,π_F) + width·E TV(π_F(·|x), π_F(·|x′)) − third, per prompt, then averaged."""
    return upper(
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
    return three_terms(
        s, width * ones_like(s.span), s.prompter_kl, {"rewards in [0, r_max]": enclosed} | optimal(s)
    )


def span(s: Solution) -> Statement:
    """Theorem 1 with span(x) = max − min of r*(x,·) over the responses reachable from x in r_max's place.

    Reachable: positive probability under π_F(·|x) or under π_F(·|x′) for some x′ in the support of ρ_sft.
    Proof: as for Theorem 1; both TV steps only involve distributions on reachable responses, and
    |E_p r − E_q r| ≤ span·TV(p,q) there. Never looser than `theorem1`.
    """
    return three_terms(s, s.span, s.prompter_kl, optimal(s))


def tight(s: Solution) -> Statement:
    """The span form with λ Jeff(ρ*,ρ_sft) in λ KL's place: valid, and never looser than `span`.

    Proof: log(ρ*/ρ_sft) = R/λ − log Z, so λ Jeff(ρ*,ρ_sft) = E_ρ* R − E_ρsft R exactly (cf. 2605.07105),
    where Theorem 1 used an inequality. An equality when r* is an indicator aligned with both TV steps.
    """
    return three_terms(s, s.span, s.prompter_jeffreys, optimal(s))


def model_and_barycentre(s: Solution, model: Floats, error: Floats) -> Statement:
    """gap ≤ `model` + span·TV(π_F(·|x), π_ρsft(·|x)) − λ Jeff(ρ*,ρ_sft), `error` bounding `model`'s rounding.

    Needs Δ1 ≤ `model`; the rest is `barycentre`'s proof.
    """
    return upper(
        s,
        {"model": model, "prompt_shift": s.span * s.tv_barycentre},
        {"prompter_kl": s.prompter_jeffreys},
        s.prompter_error + error + s.span * s.tv_shift_error,
        optimal(s),
    )


def barycentre(s: Solution) -> Statement:
    """`tight` with TV(π_F(·|x), π_ρsft(·|x)) in E_ρsft TV's place: never looser, and without pairwise terms.

    Proof: R(x,x) − E_ρsft R = E_πF(·|x) r* − E_π_ρsft r* is at most span·TV of the two policies, and TV is
    convex, so that is at most the average of TV over ρ_sft. Far smaller where rewrites err in different ways.
    """
    return model_and_barycentre(s, s.span * s.tv_model, s.span * s.tv_model_error)


def beta_only(s: Solution) -> Statement:
    """`barycentre` with span²/(4β) (at most span) for the model's term: no policy π* is needed.

    Proof: with π_s ∝ π_F e^{s r}, d/ds E_π_s r = Var_π_s(r) ≤ span²/4 (Popoviciu); integrate s over [0, 1/β].
    """
    share = minimum(s.span / (4.0 * s.beta), ones_like(s.span))
    return model_and_barycentre(s, s.span * share, 8 * s.eps * s.span * share)


def beta_tanh(s: Solution) -> Statement:
    """`barycentre` with span·tanh(span/(4β)) for the model's term: sharper than `beta_only` at every β.

    Proof: on A = {r* > β log Z*}, TV = π*(A) − π_F(A), and the odds of A under π* are at most e^{span/β}
    times those under π_F (π*/π_F = e^{r/β}/Z*). Two probabilities whose log-odds differ by a differ by at
    most tanh(a/4). So TV(π*,π_F) ≤ tanh(span/(4β)), attained by two points; then Δ1 ≤ span·TV.
    """
    share = tanh(s.span / (4.0 * s.beta))
    return model_and_barycentre(s, s.span * share, 8 * s.eps * s.span * share)


def _variance_term(s: Solution) -> tuple[Floats, Floats]:
    """min(span, Var(r*)/β · (e^{M/β} − 1)/(M/β)), M = max r* − E r* under π_F(·|x), and its rounding."""
    growth = exprel(s.own_rise / s.beta)
    term = minimum((s.own_sd / s.beta) * s.own_sd * growth, s.span)
    if is_ball(term[0]):
        return term, term * 0
    relative = jnp.minimum(2.0 * s.own_error / s.beta + 64 * s.eps, 1.0)
    error = 2.0 * relative * term + 4.0 * (s.own_sd / s.beta) * growth * s.own_error
    return term, jnp.minimum(error, s.span)


def variance(s: Solution) -> Statement:
    """`barycentre` with Var(r*)/β·(e^{M/β} − 1)/(M/β) (at most span) for the model's term.

    Variance and M = max r* − E r* are those of π_F(·|x): rewards of the frozen model's own samples suffice.
    Proof: with u = r* − E_πF r*, Δ1 = E[u e^{u/β}]/E[e^{u/β}]; the denominator is ≥ 1 (Jensen), and E u = 0
    makes the numerator E[u (e^{u/β} − 1)] = E[u²/β · (e^{u/β} − 1)/(u/β)]; its last factor grows with u ≤ M.
    Beats span·TV for large β, where Δ1 → Var/β while span·TV → span·E|u|/(2β).
    """
    return model_and_barycentre(s, *_variance_term(s))


def kl_only(s: Solution) -> Statement:
    """`barycentre` with span·min(√(KL/2), √(1 − e^{−KL})), KL = KL(π*‖π_F), for the model's term.

    Pinsker's and Bretagnolle–Huber's bounds on TV. Never tighter than `barycentre`; for use when KL is known.
    """
    kl, noise = s.model_kl / s.beta, s.model_error / s.beta
    root, huber = sqrt(kl / 2.0), sqrt(-expm1(-kl))
    term = s.span * minimum(root, huber)
    if is_ball(kl[0]):
        return model_and_barycentre(s, term, term * 0)
    error = jnp.minimum(jnp.sqrt((kl + noise) / 2.0) - root, 1.0) + 8 * s.eps * jnp.minimum(root, 1.0)
    return model_and_barycentre(s, term, 2.0 * s.span * error)


def combined(s: Solution) -> Statement:
    """The lesser of the model's terms of `barycentre` and `variance`, prompt by prompt: no looser than they.

    `beta_only`, `beta_tanh` and `kl_only` need no place in it, being bounds on TV.
    """
    by_variance, error = _variance_term(s)
    model = minimum(s.span * s.tv_model, by_variance)
    return model_and_barycentre(s, model, error + s.span * s.tv_model_error)


def trained(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ span·TV1 + span·TV2 + λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft).

    Proof: F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) (`suboptimality`), so E_ρ R = F(ρ*) − λ KL(ρ‖ρ*) + λ KL(ρ‖ρ_sft), and
    F(ρ*) ≥ F(ρ_sft) = E_ρsft R. An optimisation shortfall is thus a term, never read as a violation.
    """
    taken = {"prompter_kl": s.kl_to_reference}
    return with_any_prompter(s, s.tv_shift, s.kl_to_star, taken, s.kl_excess, s.excess_error)


def with_any_prompter(
    s: Solution, tv_shift: Floats, shortfall: Floats, subtracted: dict, excess: Any, error: Any
) -> Statement:
    """gap ≤ span·TV1 + span·`tv_shift` + shortfall − Σ `subtracted`, for any ρ.

    `excess` is `shortfall` − Σ `subtracted` without its cancellation, known to ± `error`.
    """
    model, prompt_shift = s.span * s.tv_model, s.span * tv_shift
    return averaged(
        s,
        s.gap,
        model + prompt_shift + excess,
        s.gap_error + error + s.span * (s.tv_model_error + s.tv_shift_error),
        supported(s),
        abs(s.gap) + model + prompt_shift + abs(excess),
        {"model": model, "prompt_shift": prompt_shift, "shortfall": shortfall},
        subtracted,
    )


def trained_tight(s: Solution) -> Statement:
    """For ANY ρ: `trained` with TV to the barycentre and − λ KL(ρ_sft‖ρ*): never looser.

    Proof: F(ρ*) = E_ρsft R + λ KL(ρ_sft‖ρ*) exactly (suboptimality of ρ_sft), where `trained` uses
    F(ρ*) ≥ E_ρsft R. At ρ = ρ* it is `barycentre`.
    """
    taken = {"prompter_kl": s.kl_to_reference, "reference_kl": s.prompter_gain}
    excess, error = s.kl_excess - s.prompter_gain, s.excess_error + s.prompter_error
    return with_any_prompter(s, s.tv_barycentre, s.kl_to_star, taken, excess, error)


def induced(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ span·TV(π*, π_ρ), of the two policies that are compared.

    Proof: the gap is E_π* r* − E_π_ρ r*. Needs π_ρ itself (equation 3); beats every bound above when
    rewriting brings the answers near π*; loses where π_ρ and π* differ in responses of equal reward.
    """
    return upper(s, {"policies": s.span * s.tv_induced}, {}, s.span * s.tv_rho_error, {})


CLAIMS: dict[str, Claim] = {
    "theorem1": Claim(theorem1, "upper bound"),
    "span": Claim(span, "upper bound"),
    "tight": Claim(tight, "upper bound"),
    "barycentre": Claim(barycentre, "upper bound"),
    "combined": Claim(combined, "upper bound"),
    "variance": Claim(variance, "upper bound"),
    "beta_tanh": Claim(beta_tanh, "upper bound"),
    "beta_only": Claim(beta_only, "upper bound"),
    "kl_only": Claim(kl_only, "upper bound"),
    "trained": Claim(trained, "upper bound", any_prompter=True),
    "trained_tight": Claim(trained_tight, "upper bound", any_prompter=True),
    "induced": Claim(induced, "upper bound", any_prompter=True),
}
