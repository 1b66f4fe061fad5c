"""`estimate`: Theorem 1 and its relatives, checked on rollouts of models that cannot be enumerated.

The shape is that of `alignpro.theory.bounds.BoundReport`, with an `Estimate` for every number; that module is
not imported, since estimating should not wait for JAX.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from alignpro.errors import AlignProError
from alignpro.estimation.intervals import Estimate, Verdict, check_level, judge, prompts_to_settle
from alignpro.estimation.terms import Absent, Interval, Term, Terms, estimates
from alignpro.rollouts import Rollouts


class Statement(NamedTuple):
    """gap ≤ rhs, in per-prompt terms."""

    gap: Term
    terms: dict[str, tuple[int, Term]]
    """Named parts of rhs with their signs, in reward units."""
    slack: Term
    """rhs − gap, so arranged that what is on both sides is not estimated."""
    assumptions: dict[str, bool]


@dataclass(frozen=True)
class BoundEstimate:
    """One statement about one prompter, in reward units. Numbers are None where they cannot be had."""

    name: str
    prompter: str
    """The arm it is about; "rho*" when ρ* is reached by reweighting ρ_sft."""
    gap: Estimate | None
    """J(π*) − J(π_ρ)."""
    rhs: Estimate | None
    slack: Estimate | None
    """rhs − gap; its interval covers jointly with those of the other statements of the report."""
    terms: Mapping[str, Estimate]
    assumptions: Mapping[str, bool]
    verdict: Verdict
    """holds | violated (the slack's whole interval is positive | negative) | inconclusive | inapplicable."""
    vacuous: bool | None
    """Whether rhs is at least the declared width of the reward, so true of any policies."""
    more_prompts: int | None
    """Of an inconclusive verdict: how many prompts more, sampled like these, would settle it."""
    why: str
    """Of a verdict inapplicable, or inconclusive: what is missing. Empty otherwise."""
    relation: Literal["<="] = "<="


@dataclass(frozen=True)
class Split:
    """gap = prompting_ceiling + kl_regularisation + optimisation, exactly; all in reward units."""

    gap: Estimate
    """J(π*) − J(π_ρ) of this arm."""
    prompting_ceiling: Estimate
    """J(π*) − E R(best of the rewrites drawn): biased up, as better rewrites exist than those drawn."""
    kl_regularisation: Estimate
    """E R(best of the rewrites drawn) − J(π_ρ*), the price of λ."""
    optimisation: Estimate
    """J(π_ρ*) − J(π_ρ): what training left. 0 for ρ* itself."""
    sampling_error: float
    """Half the width of the gap's interval."""


@dataclass(frozen=True)
class EstimateReport:
    """What rollouts say about the theory, at β and λ."""

    beta: float
    lam: float
    level: float
    n: int
    n_prompts: int
    frozen: str
    reward_model: str
    sampling: str
    reward_range: tuple[float, float]
    prompters: Mapping[str, str]
    """By arm; several seeds' separated by commas."""
    quantities: Mapping[str, Estimate]
    """By name: J of each arm, of π* and of ρ*, optimal values, λ and β KLs, in reward units; TVs."""
    gaps: Mapping[str, Estimate]
    """J(π*) − J(π_arm), by arm; "rlhf - …": the tuned policy's J in J(π*)'s place."""
    bounds: tuple[BoundEstimate, ...]
    splits: Mapping[str, Split]
    missing: Mapping[str, str]
    """Quantities that these rollouts cannot give, and why."""
    warnings: tuple[str, ...]

    def json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _three(terms: Terms, width: float, third: tuple[str, Term], prompter: Term) -> Statement:
    """width·TV1 + width·TV2 − third, about ρ* of mean reward `prompter`."""
    slack = terms.model_slack(width) + terms.shift_slack(width) + terms.prompter_slack()
    return Statement(
        terms.j_pi() - prompter,
        {
            "model": (1, width * terms.tv_model()),
            "prompt_shift": (1, width * terms.tv_shift()),
            third[0]: (-1, third[1]),
        },
        slack,
        {},
    )


def theorem1(terms: Terms, r_max: float | None = None) -> Statement:
    """Theorem 1 (equation 11): gap(ρ*) ≤ r_max TV(π*,π_F) + r_max TV(π_F(·|x),π_F(·|x′)) − λ KL(ρ*‖ρ_sft).

    r_max is the declared upper end of the reward where the lower is at least 0; otherwise their distance.

    Its slack is the sum of what its proof gives away in three steps: `Terms.model_slack`, `shift_slack` and
    `prompter_slack`. J(π_ρ*) cancels where arm star is absent: −λKL + J(π_ρ*) is λ log Z.
    """
    width = r_max if r_max is not None else terms.high if terms.low >= 0 else terms.width
    enclosed = r_max is None or (terms.low >= 0 and terms.high <= r_max)
    statement = _three(terms, width, ("prompter_kl", terms.star_kl()), terms.j_star())
    return statement._replace(assumptions={"rewards in [0, r_max]": enclosed})


def span(terms: Terms) -> Statement:
    """Theorem 1 with the declared width of the reward for r_max: no looser, and true for any sign."""
    return _three(terms, terms.width, ("prompter_kl", terms.star_kl()), terms.j_star())


def tight(terms: Terms) -> Statement:
    """The span form with λ Jeff(ρ*,ρ_sft) = E_ρ* R − E_ρsft R in λ KL's place (cf. arXiv 2605.07105).

    J(π_ρ*) cancels from the slack: it is that of width·(TV1 + TV2) + E_ρsft R − E_π* r*, without λ.
    """
    jeffreys = terms.j_star() - terms.j("sft")
    statement = _three(terms, terms.width, ("prompter_jeffreys", jeffreys), terms.j_star())
    return statement._replace(slack=terms.model_slack(terms.width) + terms.shift_slack(terms.width))


def rewards_only(terms: Terms) -> Statement:
    """The span form with R(x,x) − E_ρsft R in width·TV2's place: sharper, and needs no log-probabilities.

    Proof: Theorem 1's own, which bounds that difference by width·TV2 only in its last step.
    """
    shift, kl = terms.j("none") - terms.j("sft"), terms.star_kl()
    return Statement(
        terms.j_pi() - terms.j_star(),
        {"model": (1, terms.width * terms.tv_model()), "reward_shift": (1, shift), "prompter_kl": (-1, kl)},
        terms.model_slack(terms.width) + terms.prompter_slack(),
        {},
    )


BOUNDS: dict[str, Callable[[Terms], Statement]] = {
    "theorem1": theorem1,
    "span": span,
    "tight": tight,
    "rewards_only": rewards_only,
}
"""Upper bounds on the gap of ρ*."""


def trained(terms: Terms, arm: str) -> Statement:
    """For ANY ρ: gap(ρ) ≤ width·TV1 + width·TV2 + λKL(ρ‖ρ*) − λKL(ρ‖ρ_sft).

    The last two terms are λ log Z − E_ρ R (F(ρ*) − F(ρ) = λKL(ρ‖ρ*)): rewards give them, without any
    log-probabilities, and E_ρ R cancels from the slack.
    """
    width = terms.width
    return Statement(
        terms.j_pi() - terms.j(arm),
        {
            "model": (1, width * terms.tv_model()),
            "prompt_shift": (1, width * terms.tv_shift()),
            "kl_difference": (1, terms.value() - terms.j(arm)),
        },
        terms.model_slack(width) + terms.shift_slack(width) + (terms.value() - terms.j("sft")),
        {},
    )


def trained_rewards_only(terms: Terms, arm: str) -> Statement:
    """`trained` with R(x,x) − E_ρsft R in width·TV2's place, as in `rewards_only`."""
    return Statement(
        terms.j_pi() - terms.j(arm),
        {
            "model": (1, terms.width * terms.tv_model()),
            "reward_shift": (1, terms.j("none") - terms.j("sft")),
            "kl_difference": (1, terms.value() - terms.j(arm)),
        },
        terms.model_slack(terms.width) + (terms.value() - terms.j("sft")),
        {},
    )


ANY_BOUNDS: dict[str, Callable[[Terms, str], Statement]] = {
    "trained": trained,
    "trained_rewards_only": trained_rewards_only,
}
"""Upper bounds on the gap of any prompter, an arm."""


def check_temperature(name: str, value: float) -> float:
    """β or λ as a float. Raises AlignProError unless it is positive and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise AlignProError(f"{name} {value!r}: must be a positive finite number, in reward units")
    return float(value)


def estimate(
    rollouts: Rollouts,
    beta: float,
    lam: float,
    level: float = 0.95,
    *,
    r_max: float | None = None,
    interval: Interval = "bootstrap",
) -> EstimateReport:
    """Theorem 1 and its relatives on rollouts, each number with its interval.

    Args:
        rollouts: `alignpro.rollouts.read(path)`.
        beta: β > 0, in reward units, of the RLHF optimum compared with.
        lam: λ > 0, in reward units; that of training, where there is a trained arm.
        level: of every interval by itself; the slacks' cover jointly.
        r_max: override of Theorem 1's r_max; "inapplicable" when the declared range leaves [0, r_max].
        interval: "betting" gives guaranteed limits to means of rewards and to E TV(π_F(·|x), π_F(·|x′)).

    Raises:
        AlignProError: β, λ, level, r_max or interval is out of range, there are fewer than 5 prompts, or an
            arm lacks a prompt.
    """
    beta, lam, level = check_temperature("beta", beta), check_temperature("lam", lam), check_level(level)
    if interval not in ("bootstrap", "betting"):
        raise AlignProError(f"interval {interval!r}: choose bootstrap or betting")
    if r_max is not None:
        r_max = check_temperature("r_max", r_max)
    terms = Terms(rollouts, beta, lam)
    for name in rollouts.arms:
        terms.arm(name)  # complains of prompts that an arm lacks
    found, missing = _quantities(terms)
    statements, lacking = _statements(terms, r_max)

    numbers = estimates(found, rollouts, level, interval=interval)
    parts = {
        (key, name): term
        for key, statement in statements.items()
        for name, term in [
            ("gap", statement.gap),
            ("rhs", statement.slack + statement.gap),
            *((name, term) for name, (_, term) in statement.terms.items()),
        ]
    }
    by_part = estimates({str(key): term for key, term in parts.items()}, rollouts, level)
    slacks = estimates(
        {str(key): statement.slack for key, statement in statements.items()},
        rollouts,
        level,
        simultaneous=True,
    )
    bounds = []
    for key in [*statements, *lacking]:
        if key in lacking:
            bounds.append(_inapplicable(*key, lacking[key]))
            continue
        statement = statements[key]
        numbers_of = {name: by_part[str((k, name))] for k, name in parts if k == key}
        gap, rhs = numbers_of.pop("gap"), numbers_of.pop("rhs")
        bounds.append(_bound(*key, gap, rhs, slacks[str(key)], numbers_of, statement, terms))
    gaps, splits = _gaps(terms, rollouts, level)
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
        prompters=_prompters(rollouts),
        quantities=numbers,
        gaps=gaps,
        bounds=tuple(bounds),
        splits=splits,
        missing=missing,
        warnings=tuple(terms.warnings.values()),
    )


def _prompters(rollouts: Rollouts) -> dict[str, str]:
    names: dict[str, list[str]] = {}
    for (arm, _), prompter in rollouts.prompters.items():
        if prompter not in names.setdefault(arm, []):
            names[arm].append(prompter)
    return {arm: ", ".join(of) for arm, of in names.items()}


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
    return _attempt(wanted)


Key = tuple[str, str]


def _statements(terms: Terms, r_max: float | None) -> tuple[dict[Key, Statement], dict[Key, str]]:
    star = "star" if "star" in terms.rollouts.arms else "rho*"
    wanted: dict[Key, Callable[[], Statement]] = {
        (name, star): partial(bound, terms) for name, bound in BOUNDS.items()
    }
    if r_max is not None:
        wanted["theorem1", star] = partial(theorem1, terms, r_max)
    for arm in terms.prompters():
        for name, any_bound in ANY_BOUNDS.items():
            wanted[name, arm] = partial(any_bound, terms, arm)
    return _attempt(wanted)


def _inapplicable(name: str, prompter: str, why: str) -> BoundEstimate:
    return BoundEstimate(name, prompter, None, None, None, {}, {}, "inapplicable", None, None, why)


def _bound(name, prompter, gap, rhs, slack, parts, statement: Statement, terms: Terms) -> BoundEstimate:
    applies = all(statement.assumptions.values())
    verdict = judge(slack.lo, slack.hi, applies)
    more, why = None, ""
    if not applies:
        why = "not so: " + "; ".join(key for key, true in statement.assumptions.items() if not true)
    elif verdict == "inconclusive" and statement.slack.weak:
        why = "importance weights are degenerate; see the warnings"
    elif verdict == "inconclusive":
        more = prompts_to_settle(slack)
        why = (
            "no realistic number of prompts would settle it"
            if more is None
            else f"about {more} more prompts, sampled like these, would settle it"
        )
    return BoundEstimate(
        name,
        prompter,
        gap,
        rhs,
        slack,
        parts,
        statement.assumptions,
        verdict,
        rhs.value >= terms.width,
        more,
        why,
    )


def _gaps(terms: Terms, rollouts: Rollouts, level: float) -> tuple[dict[str, Estimate], dict[str, Split]]:
    others = [arm for arm in rollouts.arms if arm not in rollouts.direct]
    wanted: dict[Any, Callable[[], Term]] = {arm: partial(terms.gap, arm) for arm in others}
    if "star" not in rollouts.arms:
        wanted["rho*"] = partial(terms.gap, None)
    for policy in sorted(rollouts.direct):
        wanted[policy] = partial(terms.gap, policy)
        for arm in others:
            wanted[f"{policy} - {arm}"] = partial(terms.difference, policy, arm)
    gaps = estimates(_attempt(wanted)[0], rollouts, level)

    splits = {}
    for arm in (*terms.prompters(), "star" if "star" in rollouts.arms else "rho*"):
        try:
            reached = terms.j_star() if arm == "rho*" else terms.j(arm)
            found = estimates(
                {
                    "gap": terms.j_pi() - reached,
                    "prompting_ceiling": terms.j_pi() - terms.best(),
                    "kl_regularisation": terms.best() - terms.j_star(),
                    "optimisation": terms.j_star() - reached,
                },
                rollouts,
                level,
            )
        except Absent:
            continue
        splits[arm] = Split(**found, sampling_error=0.5 * (found["gap"].hi - found["gap"].lo))
    return gaps, splits
