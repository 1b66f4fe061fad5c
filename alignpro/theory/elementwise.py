"""Elementary functions for JAX arrays and for arrays of balls alike.

A statement of `bounds` is written once, with these, and evaluated either in floating point (JAX arrays) or
in ball arithmetic (NumPy object arrays of `flint.arb`, see `certify`).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np


def is_ball(x: Any) -> bool:
    """Whether `x` is a ball (known by its method `atanh`), or an object array of balls."""
    return getattr(x, "dtype", None) == np.dtype(object) or hasattr(type(x), "atanh")


def _apply(name: str, *args: Any, method: str | None = None) -> Any:
    if not any(is_ball(a) for a in args):
        return getattr(jnp, name)(*args)

    def one(*values: Any) -> Any:
        ball = type(next(v for v in values if is_ball(v)))
        first, *rest = (v if is_ball(v) else ball(v) for v in values)
        return getattr(first, method or name)(*rest)

    return np.frompyfunc(one, len(args), 1)(*args)


sqrt, exp, expm1, tanh = (partial(_apply, name) for name in ("sqrt", "exp", "expm1", "tanh"))
arctanh = partial(_apply, "arctanh", method="atanh")
# Of balls, a ball that encloses the lesser or the greater.
minimum, maximum = partial(_apply, "minimum", method="min"), partial(_apply, "maximum", method="max")


def ones_like(x: Any) -> Any:
    """Ones of the same shape and kind."""
    return x * 0 + 1 if is_ball(x) else jnp.ones_like(x)


def average(p: Any, values: Any) -> Any:
    """Σ_x p(x) values(x) on the last axis; a prompt of probability 0 does not count, whatever its value."""
    if is_ball(p):
        return sum((w * v for w, v in zip(p, values, strict=True) if w != 0), start=p[0] * 0)
    return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, values, 0.0), 0.0), -1)
