"""Exact theory on finite spaces, in float64 JAX. Imports nothing heavy beside JAX.

Importing this package switches JAX to 64-bit floats: in float32, which `solution` accepts too, few identities
and near-tight bounds can be told from rounding.
"""

import jax

jax.config.update("jax_enable_x64", True)

from alignpro.theory import results  # noqa: E402
from alignpro.theory.bounds import (  # noqa: E402
    BOUNDS,
    IDENTITIES,
    LEMMAS,
    LOWER_BOUNDS,
    STATEMENTS,
    WRONG_BOUNDS,
    BoundReport,
    Statement,
    check,
)
from alignpro.theory.divergences import jeffreys, kl, tv  # noqa: E402
from alignpro.theory.families import FAMILIES  # noqa: E402
from alignpro.theory.gibbs import Tilted, grid, tilt  # noqa: E402
from alignpro.theory.instance import Instance, Names, load  # noqa: E402
from alignpro.theory.results import chains, preferences, robustness  # noqa: E402
from alignpro.theory.solution import Solution, solution  # noqa: E402

__all__ = [
    "BOUNDS",
    "FAMILIES",
    "IDENTITIES",
    "LEMMAS",
    "LOWER_BOUNDS",
    "STATEMENTS",
    "WRONG_BOUNDS",
    "BoundReport",
    "Instance",
    "Names",
    "Solution",
    "Statement",
    "Tilted",
    "chains",
    "check",
    "grid",
    "jeffreys",
    "kl",
    "load",
    "preferences",
    "results",
    "robustness",
    "solution",
    "tilt",
    "tv",
]
