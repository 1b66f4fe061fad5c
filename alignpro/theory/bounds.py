"""Every claim about the gap by name, and the check of one on an instance.

A claim is one function and one row in `upper`, `lower`, `lemmas` or `wrong` of `alignpro.theory.statements`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from alignpro.claims import Claim, Relation, Verdict, of_kind
from alignpro.errors import AlignProError, check_number, check_temperature
from alignpro.shown import Shown
from alignpro.theory.divergences import Floats, Scalar
from alignpro.theory.instance import Instance, probabilities
from alignpro.theory.solution import solution
from alignpro.theory.statements import lemmas, lower, upper, wrong
from alignpro.theory.statements.statement import Statement, paper_r_max  # noqa: F401
from alignpro.theory.statements.upper import span, theorem1, tight, trained  # noqa: F401

STATEMENTS: dict[str, Claim] = {**upper.CLAIMS, **lower.CLAIMS, **lemmas.CLAIMS, **wrong.CLAIMS}
"""All claims, by name."""

BOUNDS = of_kind(STATEMENTS, "upper bound")
"""Upper bounds on the gap J(π*) − J(π_ρ)."""
LOWER_BOUNDS = of_kind(STATEMENTS, "lower bound")
"""Lower bounds on the gap: `lhs` is the bound, `rhs` the gap."""
IDENTITIES = of_kind(STATEMENTS, "identity")
"""Equalities: `lhs` = `rhs`."""
LEMMAS = of_kind(STATEMENTS, "lemma")
"""True inequalities beside the bounds on the gap, among them two misreadings that do no harm."""
WRONG_BOUNDS = of_kind(STATEMENTS, "known wrong")
"""Known-wrong readings, to test the tester: random search must refute each."""


@dataclass(frozen=True, repr=False)
class BoundReport(Shown):
    """The outcome of one claim on one instance, in reward units, with all it rests on."""

    name: str
    """Key of the claim in `STATEMENTS`."""
    gap: float
    """J(π*) − J(π_ρ); for a lemma or an identity, its left side."""
    rhs: float
    """The bound: the gap is ≤, ≥ or = this, as `relation` says."""
    slack: float
    """rhs − gap, for a lower bound gap − rhs: ≥ 0 where it holds."""
    terms: Mapping[str, float]
    """Named, signed parts of a bound on the gap, whose sum is `rhs`; empty for other claims."""
    assumptions: Mapping[str, bool]
    """Whether each assumption is met, by a phrase that says it."""
    verdict: Verdict
    """holds | violated | inconclusive (|slack| within rounding, or both sides of an identity) | inapplicable
    (an assumption fails)."""
    vacuous: bool
    """Whether it would hold whatever the policies: an upper bound no smaller than the reward span, or a lower
    bound no larger than minus it."""
    error: float
    """Bound on the rounding of `slack`."""
    relation: Relation = "<="
    """How `gap` stands to `rhs`."""


def judge(
    slack: float, error: float, applicable: bool = True, equality: bool = False, size: float = math.inf
) -> Verdict:
    """The verdict of a slack known to ± `error`. An error of exactly 0 with slack ≥ 0 holds.

    With `equality`, it holds while |slack| ≤ error < `size`, the larger of both sides' magnitudes: of sides
    that are lost in their error nothing is known. NaN (an overflow of both sides) is inconclusive.
    """
    if not applicable:
        return "inapplicable"
    if np.isnan(slack) or np.isnan(error):
        return "inconclusive"
    if equality:
        if abs(slack) > error:
            return "violated"
        return "inconclusive" if error > 0 and size <= error else "holds"
    if error == 0:
        return "holds" if slack >= 0 else "violated"
    if abs(slack) <= error:
        return "inconclusive"
    return "holds" if slack > 0 else "violated"


def report(name: str, statement: Statement) -> BoundReport:
    """The host-side report of one (unbatched) statement, `name` being its key in `STATEMENTS`."""
    relation = STATEMENTS[name].relation
    lhs, rhs, error, ceiling = (float(v) for v in statement[:4])
    assumptions = {key: bool(value) for key, value in statement.assumptions.items()}
    slack, lower = rhs - lhs, relation == ">="
    return BoundReport(
        name=name,
        gap=rhs if lower else lhs,
        rhs=lhs if lower else rhs,
        slack=slack,
        terms={key: float(value) for key, value in statement.terms.items()},
        assumptions=assumptions,
        verdict=judge(slack, error, all(assumptions.values()), relation == "=", max(abs(lhs), abs(rhs))),
        vacuous=lhs <= -ceiling if lower else rhs >= ceiling,
        error=error,
        relation=relation,
    )


def check(
    instance: Instance,
    beta: Scalar,
    lam: Scalar,
    bound: str = "theorem1",
    *,
    prompter: Float[Floats, "X K"] | None = None,
    r_max: Scalar | None = None,
) -> BoundReport:
    """The report of one claim on one instance.

    Args:
        instance: the problem.
        beta: β > 0, in reward units.
        lam: λ > 0, in reward units.
        bound: a key of `STATEMENTS`.
        prompter: a trained ρ(x′|x) [X, K]; ρ* when None. Only claims about any prompter apply to one.
        r_max: override of Theorem 1's r_max; "inapplicable" when rewards leave [0, r_max].

    Raises:
        AlignProError: a bad β, λ or r_max, an unknown bound, or a prompter that is no matrix of
            probabilities.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    if not isinstance(bound, str) or bound not in STATEMENTS:
        raise AlignProError(f"bound {bound!r} is unknown; give one of {', '.join(STATEMENTS)}")
    if r_max is not None:
        r_max = check_number("r_max", r_max, 0)
    if prompter is not None:
        prompter = probabilities("prompter", prompter, np.shape(instance.prior))
    s = solution(instance, beta, lam, prompter)
    if r_max is not None and bound == "theorem1":
        return report(bound, theorem1(s, r_max))
    return report(bound, STATEMENTS[bound](s))
