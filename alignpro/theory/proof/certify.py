"""Certified verdicts: a statement evaluated in ball arithmetic, so that rounding can forge no verdict.

`certify` evaluates the very functions of `bounds` on a `Solution` made of `Ball`s that provably contain the
true numbers; where a slack's ball does not decide, terms are cancelled symbolically and the precision is
doubled. What is proved, about which instance, and what it rests on: docs/certify.md. Needs the extra
`certify` (python-flint); without it, importing this module is one `AlignProError`.
"""

import bisect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from alignpro.claims import Claim, Verdict
from alignpro.errors import AlignProError
from alignpro.theory.bounds import STATEMENTS, Statement
from alignpro.theory.divergences import Floats
from alignpro.theory.instance import Instance
from alignpro.theory.proof.balls import Ball, Undecided, arb, carry_forms, ctx
from alignpro.theory.proof.enclosed import solution_balls
from alignpro.theory.solution import Solution

PRECISION, MAX_PRECISION = 128, 4096
"""Bits of the first attempt and of the last."""


@dataclass(frozen=True)
class Certificate:
    """The proof, or its failure, of one statement on one rational instance; reward units."""

    name: str
    """Key of the claim, or the name of the function that was certified."""
    verdict: Verdict
    """holds: slack ≥ 0 is proved (of an identity, slack = 0). violated: slack < 0 is proved (slack ≠ 0).
    inapplicable: an assumption fails. inconclusive: none of these, up to `precision` bits."""
    slack_lower: float
    """Proved lower end of the slack, rounded outward."""
    slack_upper: float
    """Proved upper end of the slack, rounded outward."""
    slack: str
    """rhs − lhs, averaged over P: a short rational as it is, any other as a decimal ball that contains it."""
    lhs: str
    """The left side, written as `slack` is."""
    rhs: str
    """The right side, written as `slack` is."""
    within: float
    """|slack| is proved to be at most this times the largest of |lhs|, |rhs| and the mean reward span (for a
    lemma in probabilities, 1): how nearly the two sides are equal."""
    precision: int
    """Bits of the arithmetic that gave the verdict."""
    assumptions: Mapping[str, bool]
    """Whether each assumption is met, decided exactly on the given numbers."""

    def __str__(self) -> str:
        line = f"{self.name}: {self.verdict} at {self.precision} bits; slack {self.slack}"
        if self.verdict == "inapplicable":
            line += f"; not met: {', '.join(key for key, met in self.assumptions.items() if not met)}"
        elif self.verdict == "inconclusive":
            line += f"; sides proved equal to within {self.within:.2g}"
        return line


class Case(NamedTuple):
    """One thing to certify; the arguments of `certify`."""

    instance: Instance
    beta: float | Fraction | str
    lam: float | Fraction | str
    statement: str | Callable[[Solution], Statement]
    prompter: Any = None


def certify(
    instance: Instance,
    beta: float | Fraction | str,
    lam: float | Fraction | str,
    statement: str | Callable[[Solution], Statement],
    prompter: Float[Floats, "X K"] | None = None,
    *,
    precision: int = PRECISION,
    max_precision: int = MAX_PRECISION,
    equality: bool | None = None,
) -> Certificate:
    """Prove a statement, or its violation, on one instance.

    Evaluates the statement on `solution_balls`, doubling the precision until the ball of its slack (and of
    every comparison on the way) decides, or `max_precision` has been tried.

    Args:
        instance: the problem; its float64 numbers are taken as the rationals they are.
        beta: β > 0, in reward units; a float exactly as stored, a fraction, or text such as "1/3".
        lam: λ > 0, given as `beta` is.
        statement: a key of `bounds.STATEMENTS`, or any function of a `Solution` written with `elementwise`.
        prompter: any ρ(x′|x) [X, K]; ρ* when None.
        precision: bits of the first attempt.
        max_precision: bits never exceeded.
        equality: whether lhs = rhs is claimed rather than lhs ≤ rhs; None: as the claim's relation says, and
            not for a function of your own.

    Raises:
        AlignProError: an unknown statement, a bad β, λ or prompter, a batch of instances, or a precision
            below 2 bits or above `max_precision`.
    """
    if not callable(statement) and not (isinstance(statement, str) and statement in STATEMENTS):
        raise AlignProError(f"statement {statement!r} is unknown; give one of {', '.join(STATEMENTS)}")
    function = STATEMENTS[statement] if isinstance(statement, str) else statement
    name = statement if isinstance(statement, str) else getattr(function, "__name__", type(function).__name__)
    if equality is None:
        equality = isinstance(function, Claim) and function.relation == "="
    if not 2 <= precision <= max_precision:
        raise AlignProError(
            f"precision {precision}: must lie between 2 and max_precision {max_precision} bits"
        )
    if np.ndim(instance.p) != 1:
        raise AlignProError(
            f"instance: p has shape {np.shape(instance.p)}; certify one instance, without batch axes"
        )
    ties = equality
    while True:
        token = carry_forms.set(ties)
        try:
            with ctx.workprec(precision):
                certificate = _attempt(name, function, equality, instance, beta, lam, prompter, precision)
        finally:
            carry_forms.reset(token)
        if certificate.verdict != "inconclusive" or (ties and precision == max_precision):
            return certificate
        ties, precision = True, min(2 * precision, max_precision) if ties else precision


def _attempt(name, function, equality, instance, beta, lam, prompter, precision) -> Certificate:
    """The certificate that this precision (bits) gives."""
    nothing = Ball(math.nan)
    try:
        found = function(solution_balls(instance, beta, lam, prompter))
        assumptions = {key: bool(value) for key, value in found.assumptions.items()}
        lhs, rhs, ceiling = (Ball(value) for value in (found.lhs, found.rhs, found.ceiling))
    except Undecided:
        assumptions, lhs, rhs, ceiling = {}, nothing, nothing, nothing
    return certificate(name, lhs, rhs, ceiling, equality, assumptions, precision)


def certificate(
    name: str,
    lhs: Ball,
    rhs: Ball,
    ceiling: Ball,
    equality: bool = False,
    assumptions: Mapping[str, bool] | None = None,
    precision: int = PRECISION,
) -> Certificate:
    """The certificate of lhs ≤ rhs (or =) that these balls give; `ceiling` is a size to compare with."""
    slack = rhs - lhs
    size = max(abs(arb(v.value)).lower() for v in (lhs, rhs, ceiling))
    within = Ball(0) if slack.exact and slack == 0 else abs(slack) / Ball(size)
    verdict: Verdict = "inconclusive"
    if assumptions and not all(assumptions.values()):
        verdict = "inapplicable"
    elif slack.value < 0 or (equality and slack.value > 0):
        verdict = "violated"
    elif slack.value == 0 if equality else slack.value >= 0:
        verdict = "holds"
    return Certificate(
        name=name,
        verdict=verdict,
        slack_lower=slack.lower,
        slack_upper=slack.upper,
        slack=repr(slack),
        lhs=repr(lhs),
        rhs=repr(rhs),
        within=within.upper,
        precision=precision,
        assumptions=assumptions or {},
    )


def certify_many(
    cases: Iterable[Case],
    *,
    precision: int = PRECISION,
    max_precision: int = MAX_PRECISION,
    quiet: bool = False,
) -> list[Certificate]:
    """`certify` for each case, in order, with a progress bar on stderr unless `quiet`."""
    bar = tqdm(list(cases), unit="certificate", disable=quiet or None, leave=False)
    return [certify(*case, precision=precision, max_precision=max_precision) for case in bar]


EXAMINED = 64
"""Most cases called violated by floating point that `Doubtful` keeps."""


class Doubtful:
    """Collector of the cases worth certifying from a stream judged in floating point, in bounded memory.

    `kept` holds the `keep` cases of least slack beside its rounding error bound, and of those that floating
    point calls violated (a score below −1) up to `EXAMINED`, as (score, case) in ascending order.
    """

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.kept: list[tuple[float, Any]] = []

    def add(
        self,
        slack: Float[np.ndarray, " n"],
        error: Float[np.ndarray, " n"],
        case: Callable[[int], Any],
        equality: bool = False,
    ) -> None:
        """Look at n cases with slacks known to ± error; NaN where floating point tells nothing.

        A slack of +∞ marks what is not worth a look. `case` makes the case of an index.
        """
        slack = -np.abs(slack) if equality else slack
        with np.errstate(divide="ignore", invalid="ignore"):
            # Exact zeros are settled. NaN is as doubtful as a slack of nothing but rounding.
            scores = np.where((error == 0) & (slack == 0), 0.0 if equality else np.inf, slack / error)
        scores = np.where(np.isnan(scores), 0.0, scores)
        for index in np.argsort(scores, kind="stable")[: max(self.keep, EXAMINED)]:
            score = float(scores[index])
            if score == math.inf or (len(self.kept) >= self._room(score) and score >= self.kept[-1][0]):
                return
            bisect.insort(self.kept, (score, case(int(index))), key=operator.itemgetter(0))
            del self.kept[self._room() :]

    def _room(self, score: float = math.inf) -> int:
        """Number of cases that may be kept, with one of this score among them."""
        claimed = sum(known < -1 for known, _ in self.kept) + (score < -1)
        return max(self.keep, min(claimed, EXAMINED))

    @property
    def claimed(self) -> int:
        """Number of kept cases that floating point calls violated."""
        return sum(score < -1 for score, _ in self.kept)
