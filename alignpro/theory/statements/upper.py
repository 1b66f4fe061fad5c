"""Upper bounds on the gap J(π*) − J(π_ρ): Theorem 1 and its sharper forms."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Float

from alignpro.claims import Claim
from alignpro.theory.divergences import Floats
from alignpro.theory.elementwise import expm1, is_ball, minimum, ones_like, sqrt, tanh
from alignpro.theory.solution import Solution
from alignpro.theory.statements.statement import Statement, averaged, optimal, paper_r_max, supported, upper
from alignpro.theory.two_points import Lift, lift


def three_terms(
    s: Solution, width: Floats, third: Floats, assumptions: dict[str, Any], own: Floats | None = None
) -> Statement:
    """gap ≤ own·TV(π*,π_F) + width·E TV(π_F(·|x), π_F(·|x′)) − third, per prompt, then averaged.

    `own` is `width` unless given.
    """
    own = width if own is None else own
    return upper(
        s,
        {"model": own * s.tv_model, "prompt_shift": width * s.tv_shift},
        {"prompter_kl": third},
        s.prompter_error + own * s.tv_model_error + width * s.tv_shift_error,
        assumptions,
    )


def theorem1(s: Solution, r_max: Float[Floats, ""] | float | None = None) -> Statement:
    """Theorem 1 (equation 11): gap ≤ r_max E TV(π*,π_F) + r_max E TV(π_F(·|x),π_F(·|x′)) − λ E KL(ρ*‖ρ_sft).

    `r_max` is `paper_r_max` unless given; a given one must enclose every reward in [0, r_max].

    Proof: Δ1 ≤ r_max TV, as r* has span at most r_max. Optimality of ρ* against ρ_sft in (9) gives
    E_ρ* R − λ KL(ρ*‖ρ_sft) ≥ E_ρ_sft R, so Δ2 ≤ R(x,x) − E_ρ_sft R − λ KL ≤ r_max E TV − λ KL.

    What a slip in a constant does to it: TV without its ½ only loosens the right side, and KL reversed
    leaves it TRUE, since E_ρ* R − E_ρ_sft R = λ Jeff(ρ*, ρ_sft) is at least λ KL in either direction.
    See `WRONG_BOUNDS` for where those slips are false.
    """
    width = paper_r_max(s) if r_max is None else r_max
    enclosed = jnp.asarray(True) if r_max is None else (s.reward_min >= 0) & (s.reward_max <= width)
    return three_terms(
        s, width * ones_like(s.span), s.prompter_kl, {"rewards in [0, r_max]": enclosed} | optimal(s)
    )


def span(s: Solution) -> Statement:
    """Theorem 1 with the spans max − min of r*(x,·) over reachable responses in r_max's place.

    Reachable: positive probability under π_F(·|x), which is all that the model's term needs, or under
    π_F(·|x′) for some x′ in the support of ρ_sft. Proof: as for Theorem 1, as |E_p r − E_q r| ≤ span·TV(p,q)
    for the span over the support of p and q; π* has that of π_F(·|x). Never looser than `theorem1`.
    """
    return three_terms(s, s.span, s.prompter_kl, optimal(s), s.own_span)


def tight(s: Solution) -> Statement:
    """The span form with λ Jeff(ρ*,ρ_sft) in λ KL's place: valid, and never looser than `span`.

    Proof: log(ρ*/ρ_sft) = R/λ − log Z, so λ Jeff(ρ*,ρ_sft) = E_ρ* R − E_ρ_sft R exactly (cf. 2605.07105),
    where Theorem 1 used an inequality. An equality when r* is an indicator aligned with both TV steps.
    """
    return three_terms(s, s.span, s.prompter_jeffreys, optimal(s), s.own_span)


def model_and_barycentre(s: Solution, model: Floats, error: Floats) -> Statement:
    """gap ≤ `model` + span·TV(π_F(·|x), π_ρ_sft(·|x)) − λ Jeff(ρ*,ρ_sft), `error` bounds `model`'s rounding.

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
    """`tight` with TV(π_F(·|x), π_ρ_sft(·|x)) in E_ρ_sft TV's place: never looser, without pairwise terms.

    Proof: R(x,x) − E_ρ_sft R = E_π_F(·|x) r* − E_π_ρ_sft r* is at most span·TV of the two policies, and TV is
    convex, so that is at most the average of TV over ρ_sft. Far smaller where rewrites err in different ways.
    """
    return model_and_barycentre(s, s.own_span * s.tv_model, s.own_span * s.tv_model_error)


def beta_only(s: Solution) -> Statement:
    """`barycentre` with span²/(4β) (at most span), that of π_F(·|x)'s support, for the model's term: without
    π*.

    Proof: with π_s ∝ π_F e^{s r}, d/ds E_π_s r = Var_π_s(r) ≤ span²/4 (Popoviciu); integrate s over [0, 1/β].
    """
    share = minimum(s.own_span / (4.0 * s.beta), ones_like(s.own_span))
    return model_and_barycentre(s, s.own_span * share, 8 * s.eps * s.own_span * share)


def beta_tanh(s: Solution) -> Statement:
    """`barycentre` with span·tanh(span/(4β)), of π_F(·|x)'s support, for the model's term: beats `beta_only`.

    Proof: on A = {r* > β log Z*}, TV = π*(A) − π_F(A), and the odds of A under π* are at most e^{span/β}
    times those under π_F (π*/π_F = e^{r/β}/Z*). Two probabilities whose log-odds differ by a differ by at
    most tanh(a/4). So TV(π*,π_F) ≤ tanh(span/(4β)), attained by two points; then Δ1 ≤ span·TV.
    """
    share = tanh(s.own_span / (4.0 * s.beta))
    return model_and_barycentre(s, s.own_span * share, 8 * s.eps * s.own_span * share)


def two_point_lift(s: Solution) -> Lift:
    """The two-point bound on Δ1, from M and Var(r*)/M of π_F(·|x), and its rounding."""
    return lift(s.own_rise, s.own_fall, s.beta, s.rise_error, s.fall_error, s.eps)


def two_point(s: Solution) -> Statement:
    """`barycentre` with the two-point bound σ²(e^z − 1)/(M + (σ²/M) e^z), z = (M + σ²/M)/β, for the model's
    term.

    σ² is the variance of r* under π_F(·|x) and M = max r* − E r* there: rewards of the frozen model's own
    samples suffice. Proof: `two_points.lift`, with u = r* − E r* and Δ1 = E[u e^{u/β}]/E[e^{u/β}]. An
    equality for two rewards, so that it is the least bound in M, σ² and β. Never above M, `beta_tanh`'s term
    (M + σ²/M ≤ span, as σ² ≤ M·(E r* − min r*)), or σ²/β·(e^{M/β} − 1)/(M/β), each of which bounds Δ1 of the
    two-point law too.
    """
    return model_and_barycentre(s, *two_point_lift(s))


def kl_only(s: Solution) -> Statement:
    """`barycentre` with span·min(√(KL/2), √(1 − e^{−KL})), KL = KL(π*‖π_F), for the model's term.

    Pinsker's and Bretagnolle–Huber's bounds on TV. Never tighter than `barycentre`; for use when KL is known.
    """
    kl, noise = s.model_kl / s.beta, s.model_error / s.beta
    root, huber = sqrt(kl / 2.0), sqrt(-expm1(-kl))
    term = s.own_span * minimum(root, huber)
    if is_ball(kl[0]):
        return model_and_barycentre(s, term, term * 0)
    error = jnp.minimum(jnp.sqrt((kl + noise) / 2.0) - root, 1.0) + 8 * s.eps * jnp.minimum(root, 1.0)
    return model_and_barycentre(s, term, 2.0 * s.own_span * error)


def combined(s: Solution) -> Statement:
    """The lesser of the model's terms of `barycentre` and `two_point`, prompt by prompt: no looser than they.

    M, `beta_only`, `beta_tanh` and `kl_only` need no place in it: the first three are above `two_point`'s
    term, the last is above `barycentre`'s.
    """
    by_rewards = two_point_lift(s)
    model = minimum(s.own_span * s.tv_model, by_rewards.value)
    return model_and_barycentre(s, model, by_rewards.error + s.own_span * s.tv_model_error)


def law(s: Solution) -> Statement:
    """gap ≤ Δ1 + W1(laws of r* under π_F(·|x), under π_ρ_sft(·|x)) − λ Jeff(ρ*,ρ_sft): of rewards, not of
    texts.

    W1 is the area between two distribution functions, here of the number r*(x, y). Proof: the exact gap, with
    R(x,x) − E_ρ_sft R ≤ W1, as r ↦ r is 1-Lipschitz. Never looser than `combined`: W1 ≤ span·TV. An equality
    where answers to x have the larger rewards at every level. Δ1 itself is W1(laws under π*, under π_F):
    `model_law`. So the first two terms bound E_π* f(r*) − E_π_ρ_sft f(r*) for every 1-Lipschitz f at once;
    with the third it is about f(r) = r alone.
    """
    return upper(
        s,
        {"model": s.model_jeffreys, "prompt_shift": s.law_shift},
        {"prompter_kl": s.prompter_jeffreys},
        s.model_error + s.prompter_error + s.law_error,
        optimal(s),
    )


def trained(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ span·TV1 + span·TV2 + λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft), the spans as in `span`.

    Proof: F(ρ*) − F(ρ) = λ KL(ρ‖ρ*) (`suboptimality`), so E_ρ R = F(ρ*) − λ KL(ρ‖ρ*) + λ KL(ρ‖ρ_sft), and
    F(ρ*) ≥ F(ρ_sft) = E_ρ_sft R. An optimisation shortfall is thus a term, never read as a violation.
    """
    taken = {"prompter_kl": s.kl_to_reference}
    return with_any_prompter(s, s.tv_shift, s.kl_to_star, taken, s.kl_excess, s.excess_error)


def with_any_prompter(
    s: Solution, tv_shift: Floats, shortfall: Floats, subtracted: dict, excess: Any, error: Any
) -> Statement:
    """gap ≤ span·TV1 + span·`tv_shift` + shortfall − Σ `subtracted`, for any ρ.

    `excess` is `shortfall` − Σ `subtracted` without its cancellation, known to ± `error`.
    """
    model, prompt_shift = s.own_span * s.tv_model, s.span * tv_shift
    return averaged(
        s,
        s.gap,
        model + prompt_shift + excess,
        s.gap_error + error + s.own_span * s.tv_model_error + s.span * s.tv_shift_error,
        supported(s),
        abs(s.gap) + model + prompt_shift + abs(excess),
        {"model": model, "prompt_shift": prompt_shift, "shortfall": shortfall},
        subtracted,
    )


def trained_tight(s: Solution) -> Statement:
    """For ANY ρ: `trained` with TV to the barycentre and − λ KL(ρ_sft‖ρ*): never looser.

    Proof: F(ρ*) = E_ρ_sft R + λ KL(ρ_sft‖ρ*) exactly (suboptimality of ρ_sft), where `trained` uses
    F(ρ*) ≥ E_ρ_sft R. At ρ = ρ* it is `barycentre`.
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


def induced_law(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≤ W1(laws of r* under π*, under π_ρ); the same for E f(r*) with any 1-Lipschitz f at
    once.

    Proof: the gap is E_π* r* − E_π_ρ r*. Never looser than `induced`, as W1 ≤ span·TV of the laws, which is
    at most that of the policies: responses of equal reward do not count. An equality where π* has the larger
    rewards at every level.
    """
    return upper(s, {"policies": s.law_induced}, {}, s.law_error, {})


CLAIMS: dict[str, Claim] = {
    "theorem1": Claim(theorem1, "upper bound"),
    "span": Claim(span, "upper bound"),
    "tight": Claim(tight, "upper bound"),
    "barycentre": Claim(barycentre, "upper bound"),
    "combined": Claim(combined, "upper bound"),
    "two_point": Claim(two_point, "upper bound"),
    "law": Claim(law, "upper bound"),
    "beta_tanh": Claim(beta_tanh, "upper bound"),
    "beta_only": Claim(beta_only, "upper bound"),
    "kl_only": Claim(kl_only, "upper bound"),
    "trained": Claim(trained, "upper bound", any_prompter=True),
    "trained_tight": Claim(trained_tight, "upper bound", any_prompter=True),
    "induced": Claim(induced, "upper bound", any_prompter=True),
    "induced_law": Claim(induced_law, "upper bound", any_prompter=True),
}
