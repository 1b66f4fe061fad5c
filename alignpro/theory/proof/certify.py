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
from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.bounds import STATEMENTS, Statement
from alignpro.theory.divergences import Floats
from alignpro.theory.instance import Instance, probabilities
from alignpro.theory.proof.balls import Ball, Undecided, arb, carry_forms, ctx, fmpq
from alignpro.theory.solution import Solution


def _rational(number: Any) -> "fmpq":
    return fmpq(*float(number).as_integer_ratio())


rationals = np.frompyfunc(_rational, 1, 1)
_balls = np.frompyfunc(Ball, 1, 1)
_where: Any = np.where  # of object arrays, which its annotations leave out


def rows(array: Any) -> np.ndarray:
    """Rows of probabilities as rationals, each divided by its exact sum."""
    weights = np.asarray(rationals(np.asarray(array)), dtype=object)
    return weights / weights.sum(-1, keepdims=True)


class _Tilt(NamedTuple):
    """p ∝ base·exp(energy/temperature) per row, as its definition has it; divergences times temperature."""

    probs: np.ndarray
    log_ratio: np.ndarray
    log_z: np.ndarray
    cost: np.ndarray
    gain: np.ndarray


def _tilt(base: np.ndarray, energy: np.ndarray, temperature: Ball) -> _Tilt:
    """Rows of balls `base` [X, n] tilted by rational rows `energy` [X, n]; 0 log 0 = 0 off the support.

    Energies are measured from their exact maximum over the support, which keeps a point mass exact.
    """
    support = base > 0
    top = _over(max, energy, support)
    a = _where(support, _balls(energy - top[:, None]) / temperature, Ball(0))
    weights = base * np.exp(a)
    z = weights.sum(-1)
    probs = weights / z[:, None]
    log_ratio = _where(support, a - np.log(z)[:, None], Ball(0))
    return _Tilt(
        probs=probs,
        log_ratio=log_ratio,
        log_z=_balls(top) / temperature + np.log(z),
        cost=temperature * (probs * log_ratio).sum(-1),
        gain=-temperature * (base * log_ratio).sum(-1),
    )


def parameter(name: str, value: Any) -> Ball:
    """β or λ exactly: a float is the rational it stores, "1/3" or "0.1" the rational it names."""
    number = value
    if isinstance(value, str):
        try:
            number = Fraction(value)
        except (ValueError, ZeroDivisionError) as error:
            raise AlignProError(f"{name} {value!r}: is no number; give one such as 0.5 or 1/3") from error
    if isinstance(number, Fraction):
        most = Fraction(10**300)  # what a float can hold
        check_temperature(name, float(sorted((-most, number, most))[1]))
    else:
        check_temperature(name, number)
    return Ball(number)


def solution_balls(
    instance: Instance,
    beta: float | Fraction | str,
    lam: float | Fraction | str,
    prompter: Float[Floats, "X K"] | None = None,
) -> Solution:
    """`solution` as object arrays of `Ball`, at flint's current precision: each contains its true value.

    Every quantity comes straight from its definition, on the rational instance whose rows are divided by
    their exact sums. What is rational (R, shift, span, TV between given rows, all about a point mass) is
    exact. A KL with an entry q = 0 < p is +∞. All error fields are 0. Supports, `is_star`, `supported` and
    `covered` are decided on the given numbers and are plain booleans. Arguments and errors as of `certify`.
    """
    b, t = parameter("beta", beta), parameter("lam", lam)
    has_p, has_prior, has_frozen = (np.asarray(a) > 0 for a in (instance.p, instance.prior, instance.frozen))
    own = np.asarray(instance.own)
    p, prior, frozen = (rows(a) for a in (instance.p, instance.prior, instance.frozen))
    reward = np.asarray(rationals(np.asarray(instance.reward)), dtype=object)
    if prompter is None:
        has_rho = has_prior
    else:
        prompter = probabilities("prompter", prompter, prior.shape)
        has_rho = prompter > 0
    has_own, has_induced = has_frozen[own], _reachable(has_rho, has_frozen)
    reach = has_own | has_induced | _reachable(has_prior, has_frozen)

    # Rational, and measured from the best reachable reward; `top` comes back where a level is asked for.
    top = _over(max, reward, reach)
    d = reward - top[:, None]
    r = d @ frozen.T
    own_r = r[np.arange(len(own)), own]
    own_frozen = frozen[own]
    tv_rows = np.array([np.abs(frozen - row).sum(-1) / 2 for row in own_frozen], dtype=object)
    variance = (own_frozen * (d - own_r[:, None]) ** 2).sum(-1)
    rise, best, low = _over(max, d, has_own) - own_r, _over(max, r, has_prior), _over(min, d, reach)
    p, prior, frozen, own_frozen, top, d, own_r, tv_rows, variance, rise, best, low = (
        _balls(a) for a in (p, prior, frozen, own_frozen, top, d, own_r, tv_rows, variance, rise, best, low)
    )

    model, star, r = _tilt(own_frozen, reward, b), _tilt(prior, r, t), _balls(r)
    reference, optimum = (prior * r).sum(-1), (model.probs * d).sum(-1)
    log_star: Any = t * star.log_ratio
    log_model: Any = b * model.log_ratio
    zero = np.full(len(own), Ball(0), dtype=object)
    if prompter is None:
        rho = star.probs
        kl_to_star = kl_from_star = shortfall = zero
        kl_to_reference, kl_from_reference, kl_excess = star.cost, star.gain, -star.cost
    else:
        rho = _balls(rows(prompter))
        log_rho: Any = t * _log_quotient(rho, prior, has_rho & has_prior)
        outside, missed = has_rho & ~has_prior, has_prior & ~has_rho
        kl_to_star = _kl(rho, log_rho - log_star, outside)
        kl_from_star = _kl(star.probs, log_star - log_rho, missed)
        kl_to_reference = _kl(rho, log_rho, outside)
        kl_from_reference = _kl(prior, -log_rho, missed)
        kl_excess = -(rho * log_star).sum(-1)
        shortfall = ((star.probs * r).sum(-1) - star.cost) - ((rho * r).sum(-1) - kl_to_reference)
    achieved = (rho * r).sum(-1)
    induced = rho @ frozen
    log_induced: Any = b * _log_quotient(induced, own_frozen, has_induced & has_own)
    uncovered = has_induced & ~has_own

    errors: dict[str, Any] = {name: zero for name in Solution._fields if name.endswith("_error")}
    fields: dict[str, Any] = {
        "p": p,
        "beta": _scalar(b),
        "lam": _scalar(t),
        "rewrite_reward": top[:, None] + r,
        "rho_star": star.probs,
        "pi_star": model.probs,
        "log_z": top / t + star.log_z,
        "log_z_star": model.log_z,
        "value": top + t * star.log_z,
        "optimum": top + optimum,
        "original": top + own_r,
        "reference": top + reference,
        "achieved": top + achieved,
        "gap": optimum - achieved,
        "delta1": optimum - own_r,
        "delta2": own_r - achieved,
        "shift": own_r - reference,
        "ceiling": optimum - best,
        "value_gap": optimum - t * star.log_z,
        "own_sd": np.sqrt(variance),
        "own_rise": rise,
        "tv_model": _tv(model.probs, own_frozen),
        "overlap_model": np.frompyfunc(Ball.min, 2, 1)(model.probs, own_frozen).sum(-1),
        "tv_shift": (prior * tv_rows).sum(-1),
        "tv_barycentre": _tv(own_frozen, prior @ frozen),
        "tv_induced": _tv(model.probs, induced),
        "tv_prompter": _tv(rho, prior),
        "model_kl": model.cost,
        "model_jeffreys": model.cost + model.gain,
        "prompter_kl": star.cost,
        "prompter_jeffreys": star.cost + star.gain,
        "prompter_gain": star.gain,
        "induced_to_star": _kl(induced, log_induced - log_model, uncovered),
        "induced_to_model": _kl(induced, log_induced, uncovered),
        "kl_to_star": kl_to_star,
        "kl_from_star": kl_from_star,
        "kl_to_reference": kl_to_reference,
        "kl_from_reference": kl_from_reference,
        "kl_excess": kl_excess,
        "shortfall": shortfall,
        "span": -low,
        "reward_max": _scalar(max(reward.flat)),
        "reward_min": _scalar(min(reward.flat)),
        "is_star": np.bool_(prompter is None),
        "supported": ~np.any(has_rho & ~has_prior),
        "covered": ~np.any(uncovered & has_p[:, None]),
        "eps": _scalar(0),
    }
    return Solution(**fields, **errors)


def _reachable(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The support of the product of two non-negative matrices with these supports."""
    return left.astype(int) @ right.astype(int) > 0


def _over(extreme: Callable[..., Any], values: np.ndarray, on: np.ndarray) -> np.ndarray:
    """The largest or least of the rationals `values` per row, where `on`."""
    return np.array([extreme(row[keep]) for row, keep in zip(values, on, strict=True)], dtype=object)


def _log_quotient(p: np.ndarray, q: np.ndarray, where: np.ndarray) -> np.ndarray:
    """log p/q `where` both are positive, 0 elsewhere."""
    return np.log(_where(where, p, Ball(1)) / _where(where, q, Ball(1)))


def _kl(p: np.ndarray, log_ratio: np.ndarray, infinite: np.ndarray) -> np.ndarray:
    """Σ p·log(p/q) per row, infinite where a row has an entry with q = 0 < p."""
    return _where(infinite.any(-1), Ball(math.inf), (p * log_ratio).sum(-1))


def _tv(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(-1) / 2


def _scalar(number: Any) -> np.ndarray:
    array = np.empty((), dtype=object)
    array[()] = Ball(number)
    return array


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
    bar = tqdm(list(cases), unit="certificate", disable=quiet, leave=False)
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
