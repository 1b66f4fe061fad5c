"""Lower bounds on the gap J(π*) − J(π_ρ), which the paper left open."""

from alignpro.claims import Claim
from alignpro.theory.solution import Solution
from alignpro.theory.statements.statement import Statement, covered, lower, optimal, supported


def ceiling(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≥ E_π* r* − max R(x,·) over the support of ρ_sft, the prompting ceiling.

    Proof: E_ρ R is an average of R over that support. Reached as λ → 0 by ρ*. Positive: no prompter there, at
    whatever λ, matches π*. `limits.prompting_ceiling` has it over all rewrites too.
    """
    error = s.model_error + s.shift_error
    return lower(s, {"ceiling": s.ceiling}, {}, error, supported(s))


def kl_ceiling(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≥ E_π* r* − λ log Z − λ KL(ρ‖ρ_sft): what a KL of that size can reach at most.

    Proof: E_ρ R − λ KL(ρ‖ρ_sft) = F(ρ) ≤ F(ρ*) = λ log Z (Donsker–Varadhan). An equality at ρ = ρ*. Beats
    `ceiling` for prompters near ρ_sft.
    """
    return lower(
        s,
        {"optimal_value": s.value_gap},
        {"prompter_kl": s.kl_to_reference},
        s.model_error + s.prompter_error + s.rho_error,
        supported(s),
    )


def drift(s: Solution) -> Statement:
    """For ANY ρ: gap(ρ) ≥ β KL(π*‖π_F) − β KL(π_ρ‖π_F).

    Proof: `regularised` without its term β KL(π_ρ‖π*) ≥ 0. So a prompter outperforms π* only if its answers
    move further from π_F(·|x), in KL, than π* does: a necessary condition for the paper's question Q2.
    """
    return lower(
        s,
        {"model_kl": s.model_kl},
        {"induced_kl": s.induced_to_model},
        s.model_error + s.induced_error,
        covered(s),
    )


def mirror(s: Solution) -> Statement:
    """gap ≥ β Jeff(π*,π_F) − span·TV(π_F(·|x), π_ρ_sft(·|x)) − λ Jeff(ρ*,ρ_sft): `barycentre` from below.

    Proof: the exact gap with R(x,x) − E_ρ_sft R ≥ −span·TV. Beats `ceiling` where λ keeps ρ* near ρ_sft.
    """
    return lower(
        s,
        {"model": s.model_jeffreys},
        {"prompt_shift": s.span * s.tv_barycentre, "prompter_kl": s.prompter_jeffreys},
        s.model_error + s.prompter_error + s.span * s.tv_shift_error,
        optimal(s),
    )


CLAIMS: dict[str, Claim] = {
    "ceiling": Claim(ceiling, "lower bound", ">=", any_prompter=True),
    "kl_ceiling": Claim(kl_ceiling, "lower bound", ">=", any_prompter=True),
    "drift": Claim(drift, "lower bound", ">=", any_prompter=True),
    "mirror": Claim(mirror, "lower bound", ">="),
}
