"""Certified verdicts: a statement evaluated in ball arithmetic, so that rounding can forge no verdict.

`certify` evaluates the very functions of `bounds` on a `Solution` made of `Ball`s: exact rationals wherever
the arithmetic is rational, otherwise real balls of Arb (through python-flint) that provably contain the true
number. A slack whose ball excludes the wrong sign is a proof; where it does not, terms are cancelled
symbolically and the precision is doubled. What is proved rests on Arb, on the lines below and on the
statement's own code: see docs/certify.md.

The numbers given are taken as they are: every float64 is a rational, and a row of probabilities is divided by
its exact rational sum. The rational instance so defined is the one a certificate is about.

Needs the extra `certify` (python-flint); without it, importing this module is one `AlignProError`.
"""

import bisect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.theory import bounds
from alignpro.theory.bounds import Statement, Verdict
from alignpro.theory.divergences import Floats
from alignpro.theory.gibbs import check_temperature
from alignpro.theory.instance import Instance, probabilities
from alignpro.theory.solution import Solution

try:
    from flint import arb, ctx, fmpq
except ModuleNotFoundError as missing:
    raise AlignProError(
        "certify: the package python-flint is missing; run pip install 'alignpro[certify]'"
    ) from missing

PRECISION, MAX_PRECISION = 128, 4096
"""Bits of the first attempt and of the last."""

# Longer rationals become balls, longer forms are dropped: exactness is for ties, which are simple.
_HEIGHT, _TERMS = 1 << 15, 1 << 12
_DIGITS = 30


class Undecided(ArithmeticError):
    """A comparison that the balls at hand do not decide; more precision may."""


def _value(number: Any) -> "fmpq | arb | None":
    """`number` exactly, or None for what is no real number (an array, say)."""
    if isinstance(number, Ball):
        return number.value
    if isinstance(number, fmpq | arb):
        return number
    if isinstance(number, np.generic) or (hasattr(number, "item") and np.ndim(number) == 0):
        number = number.item()
    if isinstance(number, Integral):
        return fmpq(int(number))
    if isinstance(number, Fraction):
        return fmpq(number.numerator, number.denominator)
    if isinstance(number, Real):
        number = float(number)
        return fmpq(*number.as_integer_ratio()) if math.isfinite(number) else arb(str(number))
    return None


class _Atom:
    """A real number known by how it was made, `key`; one factor of a monomial."""

    __slots__ = ("hash", "key")

    def __init__(self, *key: Any) -> None:
        self.key, self.hash = key, hash(key)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (self.hash == other.hash and self.key == other.key)


_ties: ContextVar[bool] = ContextVar("ties", default=False)
"""Whether new numbers carry forms; two to four times the cost of balls alone."""

# A polynomial in atoms with rational coefficients, none of them 0: {monomial: coefficient}, a monomial being
# a sorted tuple of atoms. Two numbers with the same form are equal, whatever the atoms are.
_Form = dict[tuple[_Atom, ...], Any]
_by_hash = operator.attrgetter("hash")


def _sum(f: _Form, g: _Form, sign: int = 1) -> _Form:
    total = dict(f)
    for monomial, c in g.items():
        new = total.get(monomial, 0) + sign * c
        if new == 0:
            del total[monomial]
        else:
            total[monomial] = new
    return total


def _product(f: _Form, g: _Form) -> _Form | None:
    if len(f) * len(g) > _TERMS:
        return None
    total: _Form = {}
    for m, c in f.items():
        for n, e in g.items():
            key = tuple(sorted(m + n, key=_by_hash)) if m and n else m + n
            new = total.pop(key, 0) + c * e
            if new != 0:
                total[key] = new
    return total


def _quotient(f: _Form, g: _Form) -> _Form | None:
    """Σ f_m·(m/g) over the monomials m of f, for g ≠ 0, every m/g being an atom.

    One of them is eliminated by Σ g_m·(m/g) = 1, so that shares of a whole are seen to sum to 1.
    """
    if len(f) * len(g) > _TERMS:
        return None
    if g.keys() == {()}:
        return _product(f, {(): 1 / g[()]})
    whole = frozenset(g.items())
    last = () if () in g else min(g, key=hash)
    total: _Form = {}
    for m, c in f.items():
        if m == last:
            rest = {(_Atom("share", n, whole),): -e * c / g[m] for n, e in g.items() if n != m}
            total = _sum(total, rest | {(): c / g[m]})
        else:
            total = _sum(total, {(_Atom("share", m, whole),): c})
    return total


def _function(name: str, point: int, image: int) -> Callable[["Ball"], "Ball"]:
    def method(self: "Ball") -> "Ball":
        if self.exact and self.value == point:
            return Ball(fmpq(image))
        form = self.form if _ties.get() else None
        named: _Form | None = None if form is None else {(_Atom(name, frozenset(form.items())),): fmpq(1)}
        return Ball(getattr(arb(self.value), name)(), named)

    return method


def _extreme(name: str, sign: int) -> Callable[["Ball", Any], "Ball"]:
    def method(self: "Ball", other: Any) -> "Ball":
        other = Ball(other)
        ahead = sign * (self - other).value
        if ahead >= 0:
            return self
        if ahead <= 0:
            return other
        return Ball(getattr(arb(self.value), name)(arb(other.value)))

    return method


def _comparison(
    operation: Callable[[Any, Any], bool], refutations: tuple[Callable[[Any, Any], bool], ...]
) -> Callable[["Ball", Any], bool]:
    """True or False as proved; where balls overlap there is no answer, and a guess would be none."""

    def method(self: "Ball", other: Any) -> bool:
        if _value(other) is None:
            return NotImplemented
        difference = (self - other).value
        if operation(difference, 0):
            return True
        if any(refuted(difference, 0) for refuted in refutations):
            return False
        raise Undecided(f"{self} and {other} overlap")

    return method


class Ball:
    """A real number: an exact rational (`fmpq`) where that is known, else a ball (`arb`) that contains it.

    Operators take balls, integers, floats (exactly) and fractions; NumPy's `sqrt`, `exp`, `log`, `tanh`, …
    find the methods of the same names in an object array. `min` and `max` enclose. A comparison is True or
    False only if that is proved, otherwise it raises `Undecided`: on overlapping balls no side of a branch
    can be taken.

    Beside the ball may go a form: the number as a polynomial in what functions and quotients returned. Where
    terms cancel to a rational the number becomes that rational, so that sides which are equal term by term
    are proved equal, which no ball of positive radius could do.
    """

    __slots__ = ("_form", "value")
    dtype = np.dtype(object)
    """As of an array of balls: so `elementwise` knows one."""

    def __init__(self, number: Any, form: _Form | None = None) -> None:
        if isinstance(number, np.ndarray) and number.ndim == 0:
            number = number.item()
        value = _value(number)
        if value is None:
            raise TypeError(f"{number!r} is no real number")
        if isinstance(number, Ball):
            form = number.form
        if isinstance(value, arb) and not value.is_finite():
            form = None  # no real number that could cancel
        elif form is not None and form.keys() <= {()}:
            found, value = value, form.get((), fmpq(0))
            if not arb(found).overlaps(arb(value)):
                raise RuntimeError(f"the form {value} is outside its ball {found}")
        if isinstance(value, fmpq):
            form = None
            if value.height_bits() > _HEIGHT:
                value = arb(value)
        elif value.is_zero():
            value, form = fmpq(0), None
        self.value: fmpq | arb = value
        self._form = form

    @property
    def exact(self) -> bool:
        """Whether the number is known exactly, as a rational."""
        return isinstance(self.value, fmpq)

    @property
    def form(self) -> _Form | None:
        """The number as a polynomial; None where that is not known, or too long."""
        if isinstance(self.value, fmpq):
            return {(): self.value} if self.value != 0 else {}
        return self._form

    def _with(self, other: Any, operation: Callable[[Any, Any], Any], combine: Callable[..., Any]) -> "Ball":
        right = _value(other)
        if right is None:
            return NotImplemented
        if not isinstance(other, Ball):
            other = Ball(right)
        result = operation(self.value, other.value)
        if isinstance(result, fmpq) or not _ties.get():
            return Ball(result)
        f, g = self.form, other.form
        return Ball(result, None if f is None or g is None else combine(f, g))

    def __add__(self, other: Any) -> "Ball":
        return self._with(other, operator.add, _sum)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Ball":
        return self._with(other, operator.sub, lambda f, g: _sum(f, g, -1))

    def __rsub__(self, other: Any) -> "Ball":
        return -self + other

    def __mul__(self, other: Any) -> "Ball":
        return self._with(other, operator.mul, _product)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Ball":
        divisor = _value(other)
        if divisor is None:
            return NotImplemented
        if divisor == 0:
            return Ball(math.nan)
        nonzero = divisor > 0 or divisor < 0
        return self._with(other, operator.truediv, _quotient if nonzero else lambda f, g: None)

    def __rtruediv__(self, other: Any) -> "Ball":
        return NotImplemented if _value(other) is None else Ball(other) / self

    def __pow__(self, power: int) -> "Ball":
        return 1 / self**-power if power < 0 else math.prod([self] * power, start=Ball(1))

    def __neg__(self) -> "Ball":
        return self * -1

    def __pos__(self) -> "Ball":
        return self

    def __abs__(self) -> "Ball":
        if self.value >= 0:
            return self
        return -self if self.value <= 0 else Ball(abs(self.value))

    __lt__ = _comparison(operator.lt, (operator.ge,))
    __le__ = _comparison(operator.le, (operator.gt,))
    __gt__ = _comparison(operator.gt, (operator.le,))
    __ge__ = _comparison(operator.ge, (operator.lt,))
    __eq__ = _comparison(operator.eq, (operator.lt, operator.gt))  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    exp, expm1 = _function("exp", 0, 1), _function("expm1", 0, 0)
    log, log1p = _function("log", 1, 0), _function("log1p", 0, 0)
    sinh, cosh, tanh = _function("sinh", 0, 0), _function("cosh", 0, 1), _function("tanh", 0, 0)
    atanh = _function("atanh", 0, 0)
    min, max = _extreme("min", -1), _extreme("max", 1)
    _root = _function("sqrt", 0, 0)

    def sqrt(self) -> "Ball":
        if isinstance(self.value, fmpq) and self.value >= 0:
            root = fmpq(*(math.isqrt(int(n)) for n in (self.value.p, self.value.q)))
            if root**2 == self.value:
                return Ball(root)
        return self._root()

    def __bool__(self) -> bool:
        return self != 0

    def __float__(self) -> float:
        return float(arb(self.value))

    def __repr__(self) -> str:
        return _text(self.value)

    @property
    def lower(self) -> float:
        """A float64 proved to be at most the number (−∞ where nothing is known)."""
        return _outward(arb(self.value).lower(), -math.inf)

    @property
    def upper(self) -> float:
        """A float64 proved to be at least the number (∞ where nothing is known)."""
        return _outward(arb(self.value).upper(), math.inf)


def _outward(end: "arb", direction: float) -> float:
    if end.is_nan():
        return direction
    number = float(end)
    while not (end >= arb(number) if direction < 0 else end <= arb(number)):
        number = float(np.nextafter(number, direction))
    return number


def _text(value: "fmpq | arb") -> str:
    """A rational as it is while short; otherwise a decimal enclosure, rounded outward."""
    if isinstance(value, arb) and not value.is_finite():
        return "inf" if value > 0 else "-inf" if value < 0 else "[-inf, inf]"
    if isinstance(value, fmpq) and value.height_bits() <= 64:
        return str(value)
    return str(arb(value).str(_DIGITS))


def _rational(number: Any) -> "fmpq":
    return fmpq(*float(number).as_integer_ratio())


_rationals = np.frompyfunc(_rational, 1, 1)
_balls = np.frompyfunc(Ball, 1, 1)
_where: Any = np.where  # of object arrays, which its annotations leave out


def _rows(array: Any) -> np.ndarray:
    """Rows of probabilities as rationals, each divided by its exact sum."""
    weights = np.asarray(_rationals(np.asarray(array)), dtype=object)
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

    log p/base = energy/temperature − log Z, the logarithm of the definition. Energies are measured from their
    exact maximum over the support, which changes nothing in p, keeps a point mass exact, and is added again
    to log Z.
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


def _parameter(name: str, value: Any) -> Ball:
    """β or λ exactly: a float is the rational it stores, "1/3" or "0.1" the rational it names.

    Raises:
        AlignProError: it names no positive number between 1e-18 and 1e18.
    """
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
    `covered` are decided on the given numbers and are plain booleans.

    Args:
        instance: one problem, without batch axes.
        beta: β > 0, in reward units; a float exactly as stored, a fraction, or text such as "1/3".
        lam: λ > 0, likewise.
        prompter: any ρ(x′|x) [X, K]; ρ* when None.

    Raises:
        AlignProError: β or λ is not positive and finite, or the prompter is no matrix of probabilities.
    """
    b, t = _parameter("beta", beta), _parameter("lam", lam)
    return Solution(**_fields(instance, b, t, prompter))


def _fields(instance: Instance, b: Ball, t: Ball, prompter: Any) -> dict[str, Any]:
    has_p, has_prior, has_frozen = (np.asarray(a) > 0 for a in (instance.p, instance.prior, instance.frozen))
    own = np.asarray(instance.own)
    p, prior, frozen = (_rows(a) for a in (instance.p, instance.prior, instance.frozen))
    reward = np.asarray(_rationals(np.asarray(instance.reward)), dtype=object)
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
        achieved = (rho * r).sum(-1)
    else:
        rho = _balls(_rows(prompter))
        log_rho: Any = t * _log_quotient(rho, prior, has_rho & has_prior)
        outside, missed = has_rho & ~has_prior, has_prior & ~has_rho
        kl_to_star = _kl(rho, log_rho - log_star, outside)
        kl_from_star = _kl(star.probs, log_star - log_rho, missed)
        kl_to_reference = _kl(rho, log_rho, outside)
        kl_from_reference = _kl(prior, -log_rho, missed)
        kl_excess = -(rho * log_star).sum(-1)
        achieved = (rho * r).sum(-1)
        shortfall = ((star.probs * r).sum(-1) - star.cost) - (achieved - kl_to_reference)
    induced = rho @ frozen
    log_induced: Any = b * _log_quotient(induced, own_frozen, has_induced & has_own)
    uncovered = has_induced & ~has_own

    return {name: zero for name in Solution._fields if name.endswith("_error")} | {
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


def _reachable(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Where the product of two non-negative matrices with these supports is positive."""
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


@dataclass(frozen=True)
class Certificate:
    """What is proved of one statement on one rational instance, `slack` being rhs − lhs, averaged over P."""

    name: str
    verdict: Verdict
    """holds: slack ≥ 0 is proved (of an identity, slack = 0). violated: slack < 0 is proved (slack ≠ 0).
    inapplicable: an assumption fails. inconclusive: none of these, up to `precision` bits."""
    slack_lower: float
    slack_upper: float
    """slack_lower ≤ slack ≤ slack_upper, rounded outward."""
    slack: str
    lhs: str
    rhs: str
    """The numbers themselves: short rationals as they are, others as decimal balls that contain them."""
    within: float
    """|slack| is proved to be at most this times the largest of |lhs|, |rhs| and the mean reward span (for a
    lemma in probabilities, 1): how nearly the two sides are equal."""
    precision: int
    """Bits of the arithmetic that gave the verdict."""
    assumptions: Mapping[str, bool]
    """Decided exactly, on the given numbers."""

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
    every comparison on the way) decides, or `max_precision` has been tried. Where the first precision does
    not decide, numbers carry forms too, and ties that cancel term by term are proved: see `Ball`.

    Args:
        instance: the problem; its float64 numbers are taken as the rationals they are.
        beta: β > 0, in reward units; a float exactly as stored, a fraction, or text such as "1/3".
        lam: λ > 0, likewise.
        statement: a key of `bounds.STATEMENTS`, or any function of a `Solution` written with `elementwise`.
        prompter: any ρ(x′|x) [X, K]; ρ* when None.
        precision: bits of the first attempt.
        max_precision: bits never exceeded.
        equality: whether lhs = rhs is claimed rather than lhs ≤ rhs; None: it is for a key of `IDENTITIES`.

    Raises:
        AlignProError: an unknown statement, a bad β, λ or prompter, a batch of instances, or a precision
            below 2 bits or above `max_precision`.
    """
    name, function = _named(statement)
    if equality is None:
        equality = name in bounds.IDENTITIES
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
        token = _ties.set(ties)
        try:
            with ctx.workprec(precision):
                certificate = _attempt(name, function, equality, instance, beta, lam, prompter, precision)
        finally:
            _ties.reset(token)
        if certificate.verdict != "inconclusive" or (ties and precision == max_precision):
            return certificate
        ties, precision = True, min(2 * precision, max_precision) if ties else precision


def _named(statement: str | Callable[[Solution], Statement]) -> tuple[str, Callable[[Solution], Statement]]:
    if callable(statement):
        return getattr(statement, "__name__", type(statement).__name__), statement
    if statement not in bounds.STATEMENTS:
        raise AlignProError(f"statement {statement!r} is unknown; give one of {', '.join(bounds.STATEMENTS)}")
    return statement, bounds.STATEMENTS[statement]


def _attempt(name, function, equality, instance, beta, lam, prompter, precision) -> Certificate:
    """What this precision proves."""
    nothing = Ball(math.nan)
    try:
        found = function(solution_balls(instance, beta, lam, prompter))
        assumptions = {key: bool(value) for key, value in found.assumptions.items()}
        lhs, rhs, ceiling = (Ball(value) for value in (found.lhs, found.rhs, found.ceiling))
    except Undecided:
        assumptions, lhs, rhs, ceiling = {}, nothing, nothing, nothing
    slack = rhs - lhs
    size = max(abs(arb(v.value)).lower() for v in (lhs, rhs, ceiling))
    within = Ball(0) if slack.exact and slack == 0 else abs(slack) / Ball(size)
    verdict: Verdict = "inconclusive"
    if not all(assumptions.values()):
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
        assumptions=assumptions,
    )


def certify_many(
    cases: Iterable[Case],
    *,
    precision: int = PRECISION,
    max_precision: int = MAX_PRECISION,
    quiet: bool = False,
) -> list[Certificate]:
    """`certify` for each case, in order, with a progress bar on stderr unless `quiet`.

    Raises:
        AlignProError: as `certify`.
    """
    bar = tqdm(list(cases), unit="certificate", disable=quiet, leave=False)
    return [certify(*case, precision=precision, max_precision=max_precision) for case in bar]


EXAMINED = 64
"""How many of the cases that floating point calls violated `Doubtful` keeps at most."""


class Doubtful:
    """Of a stream of cases judged in floating point, those worth certifying, in bounded memory.

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
        """How many cases may be kept, with one of this score among them."""
        claimed = sum(known < -1 for known, _ in self.kept) + (score < -1)
        return max(self.keep, min(claimed, EXAMINED))

    @property
    def claimed(self) -> int:
        """How many of those kept floating point calls violated."""
        return sum(score < -1 for score, _ in self.kept)
