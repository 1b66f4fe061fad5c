"""`headroom`: what prompt optimization could gain, from samples of the reference, before any training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError, check_temperature
from alignpro.estimation import samples
from alignpro.estimation.calls import Calls, calls
from alignpro.estimation.intervals import NEGLIGIBLE, Estimate, check_level, prompts_to_settle
from alignpro.estimation.paired import Absent, Term, estimates
from alignpro.estimation.pooled import Pooled, pooled
from alignpro.estimation.terms import Terms
from alignpro.rollouts import Rollouts
from alignpro.shown import Shown

POOLED = 0.9
"""Share of the answer's error that the pooled estimate may take, where strategies are shared."""
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""The λ that are tried where none is given, as shares of the declared width of the reward."""


@dataclass(frozen=True)
class HeadroomAt:
    """ρ* at one λ against the reference and against no prompter, in reward units."""

    lam: float
    over_reference: Estimate
    """E_ρ* R − E_ρ_sft R = Cov_ρ_sft(R, e^{R/λ})/E_ρ_sft e^{R/λ}: what training can add to ρ_sft."""
    net: Estimate
    """λ log Z − E_ρ_sft R: the gain over ρ_sft, less λ KL(ρ*‖ρ_sft)."""
    over_none: Estimate | None
    """E_ρ* R − J(no prompter); None without arm none."""
    tuned: Estimate | None
    """J(π*) − E_ρ* R at β, the gap of Theorem 1: what fine-tuning adds to ρ*. None where β is not given."""


@dataclass(frozen=True, repr=False)
class Headroom(Shown):
    """The gain that could be had from prompt optimization, and whether to try."""

    level: float
    n: int
    n_prompts: int
    means: Mapping[str, Estimate]
    within: Estimate
    """E Var(r|x′), mean over prompts: the frozen model's own variation, which no prompter changes the mean
    of. Reward units squared."""
    between: Estimate
    """Var E(r|x′), mean over prompts: the variation that rewriting acts on. Reward units squared."""
    at: tuple[HeadroomAt, ...]
    best_of: Mapping[int, Estimate]
    """E R(best of n rewrites) − E_ρ_sft R, chosen by all answers but one: no training, n times the cost."""
    ceiling: Estimate | None
    """E R(best of all rewrites drawn) − J(no prompter); None without arm none."""
    pooled: Pooled | None
    """The gain that strategies shared among prompts would bring; None where too few draws share one."""
    beta: float | None
    """Weight of the KL divergence of π*, in reward units; None where it is not compared."""
    tuning: str
    """Whether fine-tuning adds to the optimal prompter, in a sentence; empty where it is not compared."""
    calls: Calls | None
    """How many calls resampling needs at each λ; None where it was not asked."""
    answer: str
    """Whether one should train at all, in a sentence that begins with Yes, No or Undecided."""
    warnings: tuple[str, ...]

    @property
    def decision(self) -> str:
        """The answer in one word: yes, no or undecided."""
        return self.answer.partition(":")[0].lower()


def headroom(
    rollouts: Rollouts,
    lams: Sequence[float] = (),
    level: float = 0.95,
    eps: float | None = None,
    beta: float | None = None,
) -> Headroom:
    """Estimate the gain that prompt optimization could reach at each λ, from arm sft (and none).

    With `eps`, also how many calls bring resampling (`alignpro resample`) within it of ρ* in mean reward.
    With `beta`, also what the policy fine-tuned at β would earn beyond ρ*, the gap of Theorem 1, from arm
    none: four answers a prompt at least, and as many as its weights e^{r/β} ask for.

    Arm sft needs two draws per prompt with two answers each. `lams` left out are `SHARES` of the declared
    width of the reward. Intervals cover at `level` by themselves; the answer's cover jointly over λ, and it
    rests on the pooled estimate too: a wrong yes of either has probability (1 − level)/2 at most.
    """
    level = check_level(level)
    lams = tuple(check_temperature("lam", lam) for lam in lams)
    lams = tuple(sorted(set(lams))) or tuple(s * (rollouts.high - rollouts.low) for s in SHARES)
    beta = None if beta is None else check_temperature("beta", beta)
    terms = Terms(rollouts, 1.0 if beta is None else beta, lams[0])
    try:
        arm = terms.arm("sft")
        arm.least(2, 2)
    except Absent as absent:
        raise AlignProError(f"headroom: {absent}") from None
    none = "none" in rollouts.arms
    if none:
        terms.arm("none")
    sft = terms.j("sft")

    within, between = arm.per_prompt(samples.variance_split)
    square = 0.25 * terms.width**2
    draws = int(arm.draws.min())
    counts = [n for n in (2, 4, 8, 16, 32, 64) if n < draws] + [draws]
    split = "unbiased analysis of variance"
    rows: dict[Any, Term] = {
        # Of two values the variance is at most twice what it can be of many, and noise is subtracted.
        "within": Term(within, 0.0, square, sft.arms, "none", split, reach=(0.0, 2.0 * square)),
        "between": Term(between, 0.0, square, sft.arms, "none", split, reach=(-square, 2.0 * square)),
        **{("J", name): terms.j(name) for name in ("none", "sft") if name in rollouts.arms},
        **{("best", n): terms.best(n) - sft for n in counts},
    }
    decisive: dict[Any, Term] = {}
    for lam in lams:
        rows["over", lam] = terms.j_rho(lam) - sft
        rows["net", lam] = terms.value(lam) - sft
        if none:
            rows["none", lam] = decisive["none", lam] = terms.j_rho(lam) - terms.j("none")
        decisive["over", lam] = rows["over", lam]
    if none:
        rows["ceiling"] = terms.best() - terms.j("none")
    if beta is not None:
        try:
            rows |= {("tuned", lam): terms.j_pi() - terms.j_rho(lam) for lam in lams}
        except Absent as absent:
            raise AlignProError(f"headroom at beta {beta:g}: {absent}") from None
    found = estimates(rows, rollouts, level)
    joint = estimates(decisive, rollouts, level, simultaneous=True)
    error = 1.0 - level
    shared = pooled(rollouts, arm, terms.arm("none") if none else None, lams, level, 1.0 - POOLED * error)
    sure = joint
    if shared is not None:
        sure = estimates(decisive, rollouts, 1.0 - (1.0 - POOLED) * error, simultaneous=True)
    return Headroom(
        level=level,
        n=len(rollouts),
        n_prompts=len(rollouts.prompt_ids),
        means={name: found["J", name] for name in ("none", "sft") if name in rollouts.arms},
        within=found["within"],
        between=found["between"],
        at=tuple(
            HeadroomAt(
                lam,
                found["over", lam],
                found["net", lam],
                found.get(("none", lam)),
                found.get(("tuned", lam)),
            )
            for lam in lams
        ),
        best_of={n: found["best", n] for n in counts},
        ceiling=found.get("ceiling"),
        pooled=shared,
        beta=beta,
        tuning="" if beta is None else _tuning(beta, lams[0], found["tuned", lams[0]], terms.width),
        calls=None if eps is None else calls(arm, lams, eps, level, rollouts.low, rollouts.high),
        answer=_answer(terms, lams, joint, sure, shared, none, level),
        warnings=tuple(terms.warnings.values()),
    )


def _tuning(beta: float, lam: float, gap: Estimate, width: float) -> str:
    """Say whether fine-tuning at β adds to the optimal prompter at the smallest λ."""
    said, smallest = f"{gap.value:+.3g} [{gap.lo:+.3g}, {gap.hi:+.3g}]", NEGLIGIBLE * width
    what = f"at beta {beta:g} fine-tuning earns {said} more than the optimal prompter at lambda {lam:g}"
    if gap.lo > smallest:
        return f"Fine-tuning adds to prompting: {what}."
    if gap.hi < smallest:
        return f"Fine-tuning adds nothing to prompting: {what}, less than 1% of the reward's range."
    return f"Whether fine-tuning adds to prompting is open: {what}; {_remedy(gap)}."


def _remedy(gain: Estimate) -> str:
    """Say what would tell whether it is a gain."""
    if gain.bracket:
        return "more answers and rewrites per prompt would tell (see the warnings)"
    more = prompts_to_settle(gain)
    if more is None:
        return "no realistic number of prompts would tell"
    return f"about {more} more prompts would tell"


def _answer(
    terms: Terms,
    lams: Sequence[float],
    joint: dict[Any, Estimate],
    sure: dict[Any, Estimate],
    shared: Pooled | None,
    none: bool,
    level: float,
) -> str:
    """Say in one sentence whether to train: a yes by the limits `sure`, a no by `joint`, both over all λ.

    N rewrites say nothing of a share of them below log(1/α)/N, α = (1 − level)/2: with probability α none of
    those is drawn. A no is said only where such a share could not earn more than it says.
    """
    width = terms.width
    rival = "no prompter" if none else "the reference prompter"
    gains, wins = ({lam: of["none" if none else "over", lam] for lam in lams} for of in (joint, sure))

    def said(gain: Estimate) -> str:
        return f"{gain.value:+.3g} [{gain.lo:+.3g}, {gain.hi:+.3g}]"

    smallest = NEGLIGIBLE * width
    lam, gain = max(wins.items(), key=lambda item: item[1].lo)
    if shared is not None and shared.deciding.lo > max(gain.lo, 0.0):
        return (
            f"Yes: a prompter that pools strategies over prompts, learned from some and judged on others, "
            f"earns {said(shared.deciding)} over {rival}, and the best one at least that lower limit."
        )
    if gain.lo > 0:
        return f"Yes: at lambda {lam:g} the optimal prompter earns {said(gain)} over {rival}."
    if all(gain.hi < smallest for gain in gains.values()):
        lam, gain = max(gains.items(), key=lambda item: item[1].hi)
        rare = math.log(2.0 / (1.0 - level)) / int(terms.arm("sft").draws.sum())
        most, at = max(
            (max(of.hi, 0.0) + terms.hidden(lam, min(rare, 1.0)), lam) for lam, of in gains.items()
        )
        if most >= smallest:
            return (
                f"Undecided: nothing drawn earns more than {max(gain.hi, 0.0):.3g} over {rival}, but "
                f"rewrites that are one in {1.0 / rare:.0f} or rarer, which may have been missed, could earn "
                f"up to {most:.3g} at lambda {at:g}; more rewrites would tell."
            )
        return (
            f"No: at none of these lambdas does the optimal prompter earn more than {most:.3g} "
            f"over {rival}, less than 1% of the reward's range ({smallest:.3g})."
        )
    lam, gain = max(gains.items(), key=lambda item: item[1].value)
    who = f"at lambda {lam:g} the optimal prompter"
    if shared is not None and shared.deciding.value > 0:  # it is biased down: below 0 it says nothing
        who, gain = "a prompter that pools strategies over prompts", shared.deciding
    return f"Undecided: {who} earns {said(gain)} over {rival}; {_remedy(gain)}."
