"""The one exception users see, and the check of β and λ that the theory and its estimation share."""

import contextlib
import math
import numbers

LEAST, MOST = 1e-18, 1e18
"""The least and the largest β or λ, in reward units."""


class AlignProError(ValueError):
    """A mistake the user can mend: names the field, the value and the remedy in one line.

    The command line prints it after `alignpro: error:` and exits with status 2; no traceback.
    """


def check_temperature(name: str, value: object) -> float:
    """Give `value` as a float usable as β or λ, or raise AlignProError; `name` (a flag, say) heads it."""
    number = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
    if not 0 < number < math.inf:
        raise AlignProError(
            f"{name} {value}: must be a positive finite number; give one such as {name} 0.5 "
            "(use a small positive value for the greedy limit)"
        )
    if not LEAST <= number <= MOST:
        remedy = "divide rewards, beta and lam by a common factor"
        raise AlignProError(f"{name} {value}: is outside 1e-18 to 1e18; {remedy}")
    return number
