"""The claims about the gap that rollouts can check: Theorem 1 and its relatives, as per-prompt terms."""

from typing import NamedTuple

from alignpro.claims import Claim
from alignpro.estimation.paired import Term
from alignpro.estimation.terms import Terms


class Statement(NamedTuple):
    """A claim about one prompter, gap ≤ right side, in per-prompt terms and reward units."""

    gap: Term
    terms: dict[str, Term]
    """Signed parts of the right side, by name: it is their sum."""
    slack: Term
    """Right side − gap, so arranged that what is on both sides is not estimated."""
    assumptions: dict[str, bool]

    @property
    def rhs(self) -> Term:
        return self.slack + self.gap


def _three(terms: Terms, width: float, third: dict[str, Term], prompter: Term) -> Statement:
    """width·TV1 + width·TV2 + third, about ρ* of mean reward `prompter`."""
    slack = terms.model_slack(width) + terms.shift_slack(width) + terms.prompter_slack()
    variations = {"model": width * terms.tv_model(), "prompt_shift": width * terms.tv_shift()}
    return Statement(terms.j_pi() - prompter, variations | third, slack, {})


def theorem1(terms: Terms, r_max: float | None = None) -> Statement:
    """Theorem 1 (equation 11): gap(ρ*) ≤ r_max TV(π*,π_F) + r_max TV(π_F(·|x),π_F(·|x′)) − λ KL(ρ*‖ρ_sft).

    r_max is the declared upper end of the reward where the lower is at least 0; otherwise their distance.

    Its slack is the sum of what its proof gives away in three steps: `Terms.model_slack`, `shift_slack` and
    `prompter_slack`. J(π_ρ*) cancels where arm star is absent: −λKL + J(π_ρ*) is λ log Z.
    """
    width = r_max if r_max is not None else terms.high if terms.low >= 0 else terms.width
    enclosed = r_max is None or (terms.low >= 0 and terms.high <= r_max)
    statement = _three(terms, width, {"prompter_kl": -terms.star_kl()}, terms.j_star())
    return statement._replace(assumptions={"rewards in [0, r_max]": enclosed})


def span(terms: Terms) -> Statement:
    """Theorem 1 with the declared width of the reward for r_max: no looser, and true for any sign."""
    return _three(terms, terms.width, {"prompter_kl": -terms.star_kl()}, terms.j_star())


def tight(terms: Terms) -> Statement:
    """The span form with λ Jeff(ρ*,ρ_sft) = E_ρ* R − E_ρ_sft R in λ KL's place (cf. arXiv 2605.07105).

    J(π_ρ*) cancels from the slack: it is that of width·(TV1 + TV2) + E_ρ_sft R − E_π* r*, without λ.
    """
    jeffreys = terms.j_star() - terms.j("sft")
    statement = _three(terms, terms.width, {"prompter_jeffreys": -jeffreys}, terms.j_star())
    return statement._replace(slack=terms.model_slack(terms.width) + terms.shift_slack(terms.width))


def rewards_only(terms: Terms) -> Statement:
    """The span form with R(x,x) − E_ρ_sft R in width·TV2's place: sharper, and needs no log-probabilities.

    Proof: Theorem 1's own, which bounds that difference by width·TV2 only in its last step.
    """
    shift, kl = terms.j("none") - terms.j("sft"), terms.star_kl()
    return Statement(
        terms.j_pi() - terms.j_star(),
        {"model": terms.width * terms.tv_model(), "reward_shift": shift, "prompter_kl": -kl},
        terms.model_slack(terms.width) + terms.prompter_slack(),
        {},
    )


def law(terms: Terms) -> Statement:
    """gap(ρ*) ≤ Δ1 + W1(laws of r under π_F(·|x), under π_ρ_sft(·|x)) − λ Jeff(ρ*,ρ_sft): of rewards alone.

    Proof: that of `alignpro.theory`'s `law`. Its slack is W1 − (R(x,x) − E_ρ_sft R), without weights; as W1
    is estimated from above, and never below that difference, it says how large the bound is and is no test
    of it.
    """
    return Statement(
        terms.j_pi() - terms.j_star(),
        {
            "model": terms.j_pi() - terms.j("none"),
            "law_shift": terms.law_shift(),
            "prompter_jeffreys": terms.j("sft") - terms.j_star(),
        },
        terms.law_slack(),
        {},
    )


def _of_any(terms: Terms, arm: str, shift: dict[str, Term], shift_slack: Term | None) -> Statement:
    """width·TV1 + shift + λKL(ρ‖ρ*) − λKL(ρ‖ρ_sft), about the prompter of `arm`."""
    model = terms.model_slack(terms.width)
    return Statement(
        terms.j_pi() - terms.j(arm),
        {"model": terms.width * terms.tv_model(), **shift, "kl_difference": terms.value() - terms.j(arm)},
        (model if shift_slack is None else model + shift_slack) + terms.tilt_slack(),
        {},
    )


def trained(terms: Terms, arm: str) -> Statement:
    """The bound of ANY ρ: gap(ρ) ≤ width·TV1 + width·TV2 + λKL(ρ‖ρ*) − λKL(ρ‖ρ_sft).

    The last two terms are λ log Z − E_ρ R (F(ρ*) − F(ρ) = λKL(ρ‖ρ*)): rewards give them, without any
    log-probabilities, and E_ρ R cancels from the slack.
    """
    return _of_any(
        terms, arm, {"prompt_shift": terms.width * terms.tv_shift()}, terms.shift_slack(terms.width)
    )


def trained_rewards_only(terms: Terms, arm: str) -> Statement:
    """`trained` with R(x,x) − E_ρ_sft R in width·TV2's place, as in `rewards_only`."""
    return _of_any(terms, arm, {"reward_shift": terms.j("none") - terms.j("sft")}, None)


CLAIMS: dict[str, Claim] = {
    "theorem1": Claim(theorem1, "upper bound"),
    "span": Claim(span, "upper bound"),
    "tight": Claim(tight, "upper bound"),
    "rewards_only": Claim(rewards_only, "upper bound"),
    "law": Claim(law, "upper bound"),
    "trained": Claim(trained, "upper bound", any_prompter=True),
    "trained_rewards_only": Claim(trained_rewards_only, "upper bound", any_prompter=True),
}
"""The claims by name. Each is a function of `Terms`; one about any prompter takes the prompter's arm too."""
