"""Exact theory on finite spaces, in float64 JAX. Imports nothing heavy beside JAX.

Importing this package switches JAX to 64-bit floats: in float32, which `solution` accepts too, few identities
and near-tight bounds can be told from rounding. What JAX compiles is kept from run to run (`compiled`). All
logarithms are natural; TV is half the L1 distance; "reward units" are those of the rewards. β and λ lie in
1e-18 to 1e18; any other is an `AlignProError`.
"""

# ruff: noqa: E402, F401
import jax

jax.config.update("jax_enable_x64", True)

from alignpro.theory import compiled

compiled.keep()

from alignpro.theory import results
from alignpro.theory.bounds import (
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
from alignpro.theory.divergences import jeffreys, kl, tv
from alignpro.theory.families import FAMILIES
from alignpro.theory.gibbs import Tilted, grid, tilt
from alignpro.theory.instance import Instance, Names, load
from alignpro.theory.results import chains, preferences, robustness
from alignpro.theory.solution import Solution, solution
