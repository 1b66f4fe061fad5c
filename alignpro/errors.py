"""The one exception users see, and the checks that several rooms share: of β and λ, and of choices."""

import functools
import math
import numbers
import types
from collections.abc import Hashable
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

LEAST, MOST = 1e-18, 1e18
"""The least and the largest β or λ, in reward units."""


class AlignProError(ValueError):
    """A mistake the user can mend: names the field, the value and the remedy in one line.

    The command line prints it after `alignpro: error:` and exits with status 2; no traceback.
    """


def as_number(name: str, value: object) -> float:
    """A real number, or an array of one without axes (NumPy's or JAX's), as a float; ±∞ beyond floats."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    elif shape := getattr(value, "shape", None):
        raise AlignProError(f"{name}: is an array of shape {tuple(shape)}; give one number")
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise AlignProError(
            f"{name} {value!r}: is no number but of type {type(value).__name__}; give a number"
        )
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value <= 0 else math.inf


def check_number(name: str, value: object, least: float = -math.inf) -> float:
    """Give `value` as a finite float of at least `least`, or raise AlignProError; `name` heads it."""
    number = as_number(name, value)
    if not least <= number < math.inf or number == -math.inf:
        most = "" if least == -math.inf else f" of at least {least:g}"
        raise AlignProError(f"{name} {value}: must be a finite number{most}; give one")
    return number


def check_temperature(name: str, value: object) -> float:
    """Give `value` as a float usable as β or λ, or raise AlignProError; `name` (a flag, say) heads it."""
    number = as_number(name, value)
    if not 0 < number < math.inf:
        raise AlignProError(
            f"{name} {value}: must be a positive finite number; give one such as {name} 0.5 "
            "(use a small positive value for the greedy limit)"
        )
    if not LEAST <= number <= MOST:
        remedy = "divide rewards, beta and lam by a common factor"
        raise AlignProError(f"{name} {value}: is outside 1e-18 to 1e18; {remedy}")
    return number


def _values(kind: Any) -> tuple[Any, ...]:
    """The values of a Literal in a type: itself, one that may be None, or a tuple of such."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) in (tuple, Annotated, Union, types.UnionType):
        return next(filter(None, map(_values, get_args(kind))), ())
    return ()


@functools.cache
def _choices(record: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(record)
    return {name: values for name, kind in hints.items() if (values := _values(kind))}


def check_choices(record: Any) -> None:
    """Refuse a value that is none of those which the Literal in its field's type names; None is left alone.

    Raises:
        AlignProError: names the field, the value and the choices.
    """
    for name, choices in _choices(cast(Hashable, type(record))).items():
        value = getattr(record, name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if one is not None and one not in choices:
                raise AlignProError(f"{name} {one!r}: choose from {', '.join(map(str, choices))}")
