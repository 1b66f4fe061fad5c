"""Real numbers as exact rationals or as Arb's balls, with terms that cancel symbolically."""

import math
import operator
from collections.abc import Callable
from contextvars import ContextVar
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np

from alignpro.errors import AlignProError

try:
    from flint import arb, ctx, fmpq
except ModuleNotFoundError as missing:
    raise AlignProError(
        "certify: the package python-flint is missing; run pip install 'alignpro[certify]'"
    ) from missing

__all__ = ["Ball", "Undecided", "arb", "carry_forms", "ctx", "fmpq"]

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


carry_forms: ContextVar[bool] = ContextVar("carry_forms", default=False)
"""Whether new numbers carry forms (polynomials that cancel): two to four times the cost of balls alone."""

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
        form = self.form if carry_forms.get() else None
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

    NumPy's `sqrt`, `exp`, `log`, `tanh`, … find the methods of the same names in an object array. A
    comparison is True or False only if that is proved, otherwise it raises `Undecided`. Beside the ball may
    go a form: the number as a polynomial in what functions and quotients returned; where its terms cancel to
    a rational the number becomes that rational, so that sides which are equal term by term are proved equal.
    """

    __slots__ = ("_form", "value")
    dtype = np.dtype(object)
    """The dtype of an array of balls, by which `elementwise` knows one."""

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
        if isinstance(result, fmpq) or not carry_forms.get():
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
        """The root; a ball that reaches below 0 is taken for a number that does not.

        What roots are taken of (a variance, a KL, 1 − e^{−KL}) is never negative: [0, √upper] holds the root.
        """
        if isinstance(self.value, arb) and self.value.contains(0) and not self.value.is_exact():
            half = arb(self.value.upper()).sqrt() / 2
            return Ball(half.union(arb(0)).union(2 * half))
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
