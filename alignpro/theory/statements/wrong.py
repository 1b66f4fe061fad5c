"""Known-wrong readings, to test the tester: random search must refute each.

Forgetting the ½ of TV, or reversing the KL, inside Theorem 1's own right side is not among them: that
leaves it true (`lemmas.theorem1_l1`, `lemmas.theorem1_kl_reversed`). They are refuted where they are false.
"""

from alignpro.claims import Claim
from alignpro.theory.elementwise import maximum, minimum, ones_like
from alignpro.theory.solution import Solution
from alignpro.theory.statements.lemmas import pinsker_with, suboptimality
from alignpro.theory.statements.statement import Statement, averaged, lower, optimal
from alignpro.theory.statements.upper import (
    law,
    model_and_barycentre,
    theorem1,
    three_terms,
    with_any_prompter,
)
from alignpro.theory.two_points import lift


def signed_max_abs(s: Solution) -> Statement:
    """FALSE: Theorem 1 with r_max = max |r| when rewards are signed.

    Rewards in {−1, 1} have span 2, so Δ1 = 2 TV(π*,π_F) where the misreading allows 1 TV.
    """
    largest = maximum(abs(s.reward_max), abs(s.reward_min))
    return three_terms(s, largest * ones_like(s.span), s.prompter_kl, optimal(s))


def quarter_l1(s: Solution) -> Statement:
    """FALSE: Theorem 1 with ¼ L1 in TV's place, a constant half what it must be.

    For an indicator reward, Δ1 = r_max TV(π*,π_F) exactly; with ρ_sft on x itself nothing else is left.
    """
    return theorem1(s._replace(tv_model=0.5 * s.tv_model, tv_shift=0.5 * s.tv_shift))


def beta_eighth(s: Solution) -> Statement:
    """FALSE: `beta_only` with Hoeffding's span²/(8β).

    That bounds β log Z* − E_π_F r*, which leaves out β KL(π*‖π_F), as large again when β is large.
    """
    share = minimum(s.own_span / (8.0 * s.beta), ones_like(s.own_span))
    return model_and_barycentre(s, s.own_span * share, 8 * s.eps * s.own_span * share)


def two_point_swapped(s: Solution) -> Statement:
    """FALSE: `two_point` with its points exchanged, −M and σ²/M for −σ²/M and M.

    For two rewards the true one is an equality, and the other has the better answer as likely as the worse.
    """
    found = lift(s.own_fall, s.own_rise, s.beta)
    return model_and_barycentre(s, found.value, 64 * s.eps * found.value)


def law_half(s: Solution) -> Statement:
    """FALSE: `law` with half of W1, as if it had the ½ of TV.

    Where the answers to x have larger rewards at every level than those to rewrites, the whole is needed.
    """
    return law(s._replace(law_shift=s.law_shift / 2))


def never_outperforms(s: Solution) -> Statement:
    """FALSE: gap ≥ 0, as if no prompter could outperform π* (the paper's question Q2).

    π* pays for its KL to π_F(·|x); a rewrite can steer the frozen model to better answers at once.
    """
    return lower(s, {}, {}, s.span * 0, {})


def pinsker_l1(s: Solution) -> Statement:
    """FALSE: Pinsker's inequality with L1 in TV's place, the ½ forgotten.

    As KL → 0 about a fair coin, TV/√(KL/2) → 1, so L1/√(KL/2) → 2.
    """
    return pinsker_with(s, 2.0)


def l1_at_most_one(s: Solution) -> Statement:
    """FALSE: d_TV(π*,π_F) ≤ 1 with the ½ forgotten; distributions with little in common have L1 near 2."""
    one = ones_like(s.tv_model)
    return averaged(s, 2 * s.tv_model, one, 2 * s.tv_model_error, {}, one, ceiling=one)


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
    taken, error = {"prompter_kl": s.kl_from_reference}, s.rho_error + s.eps * abs(excess)
    return with_any_prompter(s, s.tv_shift, s.kl_from_star, taken, excess, error)


CLAIMS: dict[str, Claim] = {
    "signed_max_abs": Claim(signed_max_abs, "known wrong"),
    "quarter_l1": Claim(quarter_l1, "known wrong"),
    "beta_eighth": Claim(beta_eighth, "known wrong"),
    "two_point_swapped": Claim(two_point_swapped, "known wrong"),
    "law_half": Claim(law_half, "known wrong"),
    "never_outperforms": Claim(never_outperforms, "known wrong", ">="),
    "pinsker_l1": Claim(pinsker_l1, "known wrong"),
    "l1_at_most_one": Claim(l1_at_most_one, "known wrong"),
    "suboptimality_reversed": Claim(suboptimality_reversed, "known wrong", any_prompter=True),
    "trained_reversed": Claim(trained_reversed, "known wrong", any_prompter=True),
}
