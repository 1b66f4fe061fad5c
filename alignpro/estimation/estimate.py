"""`estimate`: Theorem 1 and its relatives, checked on rollouts of models that cannot be enumerated."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from alignpro.claims import Relation, Verdict
from alignpro.errors import AlignProError, check_temperature
from alignpro.estimation.intervals import Estimate, check_level, prompts_to_settle, verdict_of
from alignpro.estimation.paired import Absent, Interval, Term, by_arm, estimates
from alignpro.estimation.statements import CLAIMS, Statement, theorem1
from alignpro.estimation.terms import Terms
from alignpro.rollouts import Rollouts
from alignpro.shown import Shown


@dataclass(frozen=True)
class BoundEstimate:
    """One claim about one prompter, in reward units. Numbers are None where they cannot be had."""

    name: str
    prompter: str
    """The arm it is about; "rho*" when ρ* is reached by reweighting ρ_sft."""
    gap: Estimate | None = None
    rhs: Estimate | None = None
    slack: Estimate | None = None
    """rhs − gap; its interval covers jointly with those of the other statements of the report."""
    terms: Mapping[str, Estimate] = field(default_factory=dict)
    """Signed parts of the right side, by name: it is their sum."""
    assumptions: Mapping[str, bool] = field(default_factory=dict)
    verdict: Verdict = "inapplicable"
    """holds | violated (the slack's whole interval is positive | negative) | inconclusive | inapplicable."""
    vacuous: bool | None = None
    """Whether rhs is at least the declared width of the reward, so true of any policies."""
    more_prompts: int | None = None
    """How many prompts more, sampled like these, would settle an inconclusive verdict; None otherwise."""
    why: str = ""
    """The reason of a verdict inapplicable or inconclusive, or why "holds" tests nothing; empty otherwise."""
    relation: Relation = "<="

    @property
    def guaranteed(self) -> bool | None:
        """Whether the slack's interval is; None where that was not asked for."""
        return None if self.slack is None else self.slack.guaranteed

    @property
    def sureness(self) -> str:
        """The guarantee of a verdict from the slack, in words; empty where none was asked for, or none is."""
        if self.guaranteed is None or self.verdict not in ("holds", "violated"):
            return ""
        return "guaranteed at every number of prompts" if self.guaranteed else "not guaranteed"

    @property
    def finding(self) -> str:
        """The verdict, how sure it is, and whether the bound is vacuous."""
        return ", ".join(filter(None, [self.verdict, self.sureness, "vacuous" if self.vacuous else ""]))


@dataclass(frozen=True)
class Split:
    """gap = prompting_ceiling + kl_regularisation + optimisation, exactly; all in reward units."""

    gap: Estimate
    prompting_ceiling: Estimate
    """J(π*) − E R(best of the rewrites drawn): biased up, as better rewrites exist than those drawn."""
    kl_regularisation: Estimate
    """E R(best of the rewrites drawn) − J(π_ρ*), the price of λ."""
    optimisation: Estimate
    """J(π_ρ*) − J(π_ρ): what training left. 0 for ρ* itself."""
    sampling_error: float
    """Half the width of the gap's interval, in reward units."""


@dataclass(frozen=True, repr=False)
class EstimateReport(Shown):
    """Everything that rollouts say about the theory, at β and λ."""

    beta: float
    lam: float
    level: float
    n: int
    n_prompts: int
    """Prompts, the independent units."""
    frozen: str
    reward_model: str
    sampling: str
    reward_range: tuple[float, float]
    prompters: Mapping[str, str]
    """Names of the prompters, by arm; several seeds' separated by commas."""
    quantities: Mapping[str, Estimate]
    """J of each arm, of π* and of ρ*, optimal values, λ and β KLs, in reward units; TVs. By name."""
    parts: Mapping[str, Mapping[str, Estimate]]
    """By arm, the mean of each part of the reward by name, in reward units; they add up to the arm's J. Empty
    for a reward without parts."""
    part_ranges: Mapping[str, tuple[float, float]]
    gaps: Mapping[str, Estimate]
    """J(π*) − J(π_arm), by arm; "rlhf - ARM" has the tuned policy's J in J(π*)'s place."""
    bounds: tuple[BoundEstimate, ...]
    """Every claim about every prompter that it can be made of."""
    splits: Mapping[str, Split]
    missing: Mapping[str, str]
    """Quantities that these rollouts cannot give, and why."""
    warnings: tuple[str, ...]

    @property
    def width(self) -> float:
        return self.reward_range[1] - self.reward_range[0]

    @property
    def theorem1(self) -> BoundEstimate:
        return next(bound for bound in self.bounds if bound.name == "theorem1")

    @property
    def violated(self) -> bool:
        return any(bound.verdict == "violated" for bound in self.bounds)


def estimate(
    rollouts: Rollouts,
    beta: float,
    lam: float,
    level: float = 0.95,
    *,
    r_max: float | None = None,
    interval: Interval = "bootstrap",
) -> EstimateReport:
    """Check Theorem 1 and its relatives on rollouts at β and λ, in reward units, with intervals at `level`.

    Args:
        r_max: Theorem 1's, in reward units. Left out: taken from the declared range of the reward; where that
            leaves [0, r_max] the verdict is "inapplicable".
        interval: "guaranteed" gives limits that cover by a theorem at every number of prompts: to mean
            rewards and E TV(π_F(·|x), π_F(·|x′)), and, by bounds that hold whatever was not drawn, to π*, ρ*
            and the slacks. Each `Estimate` says whether its own does: KLs from log-probabilities have no
            bound, and no guarantee.

    Raises:
        AlignProError: a bad argument, fewer than 5 prompts, or an arm that lacks a prompt.
    """
    beta, lam, level = check_temperature("beta", beta), check_temperature("lam", lam), check_level(level)
    if interval not in ("bootstrap", "guaranteed"):
        raise AlignProError(f"interval {interval!r}: choose bootstrap or guaranteed")
    if r_max is not None and not 0 < r_max < math.inf:
        raise AlignProError(f"r_max {r_max!r}: must be a positive finite number, in reward units")
    terms = Terms(rollouts, beta, lam, sure=level if interval == "guaranteed" else None)
    for name in rollouts.arms:
        terms.arm(name)  # complains of prompts that an arm lacks
    found, missing = _quantities(terms)
    statements, lacking = _statements(terms, r_max)

    numbers = estimates(found, rollouts, level, interval=interval)
    parts = {
        (key, name): term
        for key, s in statements.items()
        for name, term in {"gap": s.gap, "rhs": s.rhs, **s.terms}.items()
    }
    by_part = estimates(parts, rollouts, level, interval=interval)
    claims = {key: s.slack for key, s in statements.items()}
    slacks = estimates(claims, rollouts, level, interval=interval, simultaneous=True)
    bounds = []
    for key, statement in statements.items():
        mine = {name: e for (of, name), e in by_part.items() if of == key}
        bounds.append(_bound(*key, mine.pop("gap"), mine.pop("rhs"), slacks[key], mine, statement, terms))
    bounds += [BoundEstimate(*key, why=why, relation=CLAIMS[key[0]].relation) for key, why in lacking.items()]
    gaps, splits = _gaps(terms, partial(estimates, rollouts=rollouts, level=level, interval=interval))
    return EstimateReport(
        beta=beta,
        lam=lam,
        level=level,
        n=len(rollouts),
        n_prompts=len(rollouts.prompt_ids),
        frozen=rollouts.frozen,
        reward_model=rollouts.reward_model,
        sampling=rollouts.sampling,
        reward_range=(rollouts.low, rollouts.high),
        prompters={arm: rollouts.prompter(arm) for arm in rollouts.arms},
        quantities=numbers,
        parts=by_arm(estimates(terms.parts(rollouts.arms), rollouts, level, interval=interval)),
        part_ranges=rollouts.part_ranges,
        gaps=gaps,
        bounds=tuple(bounds),
        splits=splits,
        missing=missing,
        warnings=tuple(terms.warnings.values()),
    )


def _attempt(wanted: Mapping[Any, Callable[[], Any]]) -> tuple[dict[Any, Any], dict[Any, str]]:
    found, missing = {}, {}
    for key, make in wanted.items():
        try:
            found[key] = make()
        except Absent as absent:
            missing[key] = str(absent)
    return found, missing


def _quantities(terms: Terms) -> tuple[dict[str, Term], dict[str, str]]:
    wanted: dict[str, Callable[[], Term]] = {
        **{f"J({arm})": partial(terms.j, arm) for arm in terms.rollouts.arms},
        "J(pi*)": terms.j_pi,
        "beta log Z*": terms.value_model,
        "TV(pi*, pi_F)": terms.tv_model,
        "beta KL(pi*||pi_F)": terms.model_kl,
        "TV(pi_F(.|x), pi_F(.|x'))": terms.tv_shift,
        "J(rho*)": terms.j_rho,
        "lambda log Z": terms.value,
        "lambda KL(rho*||rho_sft)": terms.star_kl,
        "J(best rewrite drawn)": terms.best,
    }
    for arm in (*terms.prompters(), *(["star"] if "star" in terms.rollouts.arms else [])):
        wanted[f"lambda KL({arm}||rho_sft)"] = partial(terms.kl_reference, arm)
        wanted[f"lambda KL({arm}||rho*)"] = partial(terms.shortfall, arm)
    for arm in sorted(terms.rollouts.direct):
        wanted[f"beta KL({arm}||pi_F)"] = partial(terms.kl_policy, arm)
        wanted[f"beta KL({arm}||pi*)"] = partial(terms.policy_shortfall, arm)
    if terms.rollouts.refused.any():
        wanted |= {f"refused({arm})": partial(terms.refused, arm) for arm in terms.rollouts.arms}
    return _attempt(wanted)


Key = tuple[str, str]


def _statements(terms: Terms, r_max: float | None) -> tuple[dict[Key, Statement], dict[Key, str]]:
    star = "star" if "star" in terms.rollouts.arms else "rho*"
    wanted: dict[Key, Callable[[], Statement]] = {
        (name, star): partial(claim, terms) for name, claim in CLAIMS.items() if not claim.any_prompter
    }
    wanted["theorem1", star] = partial(theorem1, terms, r_max)
    anyone = {name: claim for name, claim in CLAIMS.items() if claim.any_prompter}
    wanted |= {(name, arm): partial(anyone[name], terms, arm) for arm in terms.prompters() for name in anyone}
    return _attempt(wanted)


def _bound(name, prompter, gap, rhs, slack, parts, statement: Statement, terms: Terms) -> BoundEstimate:
    assumed = statement.assumptions
    sure = statement.slack.low >= 0.0
    verdict = verdict_of(slack.lo, slack.hi, all(assumed.values()))
    more, why = None, ""
    if verdict == "inapplicable":
        why = "not so: " + "; ".join(key for key, true in assumed.items() if not true)
    elif sure:
        verdict = "holds"
        why = "its slack cannot come out below 0: it says how large the bound is, and tests nothing"
    elif verdict == "inconclusive" and statement.slack.weak and not terms.sure:
        why = "importance weights cannot be trusted; see the warnings"
    elif verdict == "inconclusive":
        more = prompts_to_settle(slack)
        why = "no realistic number of prompts would settle it"
        if more is not None:
            why = f"about {more} more prompts, sampled like these, would settle it"
    vacuous, relation = rhs.value >= terms.width, CLAIMS[name].relation
    return BoundEstimate(
        name, prompter, gap, rhs, slack, parts, assumed, verdict, vacuous, more, why, relation
    )


def _gaps(
    terms: Terms, estimated: Callable[..., dict[str, Estimate]]
) -> tuple[dict[str, Estimate], dict[str, Split]]:
    rollouts = terms.rollouts
    others = [arm for arm in rollouts.arms if arm not in rollouts.direct]
    wanted: dict[Any, Callable[[], Term]] = {arm: partial(terms.gap, arm) for arm in others}
    if "star" not in rollouts.arms:
        wanted["rho*"] = partial(terms.gap, None)
    for policy in sorted(rollouts.direct):
        wanted[policy] = partial(terms.gap, policy)
        for arm in others:
            wanted[f"{policy} - {arm}"] = partial(terms.difference, policy, arm)
    gaps = estimated(_attempt(wanted)[0])

    splits = {}
    for arm in (*terms.prompters(), "star" if "star" in rollouts.arms else "rho*"):
        try:
            reached = terms.j_star() if arm == "rho*" else terms.j(arm)
            found = estimated(
                {
                    "gap": terms.j_pi() - reached,
                    "prompting_ceiling": terms.j_pi() - terms.best(),
                    "kl_regularisation": terms.best() - terms.j_star(),
                    "optimisation": terms.j_star() - reached,
                }
            )
        except Absent:
            continue
        splits[arm] = Split(**found, sampling_error=0.5 * (found["gap"].hi - found["gap"].lo))
    return gaps, splits
