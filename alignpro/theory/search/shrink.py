"""The simplest instance that breaks a statement."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from alignpro.theory.families import Shape
from alignpro.theory.instance import KEYS, Instance
from alignpro.theory.search.found import TEMPERATURES, Found, Target, evaluate

# What loses which axis with a prompt, a rewrite, a response.
_PARTS = (
    {"p": 0, "prior": 0, "own": 0, "reward": 0, "prompter": 0},
    {"prior": 1, "frozen": 0, "prompter": 1},
    {"frozen": 1, "reward": 1},
)


def _again(found: Found, shape: Shape | None, beta: float, lam: float, **arrays: np.ndarray) -> Found | None:
    """The find with other arrays, whose policies are divided by their sums; None where one sums to 0."""
    for key in ("p", "prior", "frozen", "prompter"):
        total = arrays[key].sum(-1, keepdims=True)
        if not (total > 0).all():
            return None
        arrays[key] = arrays[key] / total
    prompter = arrays.pop("prompter")
    kept: Any = [arrays[key] for key in KEYS]
    return evaluate(found.target, Instance(*kept), beta, lam, prompter, shape)


def _parts(found: Found) -> dict[str, np.ndarray]:
    arrays = {key: np.asarray(getattr(found.instance, key)) for key in KEYS}
    return arrays | {"prompter": arrays["prior"] if found.prompter is None else found.prompter}


def _without(found: Found, axis: int, index: int, shape: Shape | None) -> Found | None:
    """The find without one prompt, rewrite (unless it is a prompt's own) or response."""
    arrays = _parts(found)
    if axis == 1:
        if (arrays["own"] == index).any():
            return None
        arrays["own"] = arrays["own"] - (arrays["own"] > index)
    for key, position in _PARTS[axis].items():
        arrays[key] = np.delete(arrays[key], index, position)
    return _again(found, shape, found.beta, found.lam, **arrays)


def _rounded(found: Found, digits: int, shape: Shape | None) -> Found | None:
    """The find in so many decimals, temperatures in so many digits."""
    arrays = {key: a if key == "own" else np.round(a, digits) for key, a in _parts(found).items()}
    beta, lam = (float(f"{t:.{digits - 1}e}") for t in (found.beta, found.lam))
    return _again(found, shape, beta, lam, **arrays)


def simplify(found: Found, shape: Shape | None = None) -> Found:
    """Reduce a find: drop the prompts, rewrites and responses it can do without, and digits.

    A counterexample stays one and keeps 99% of its excess; the ratio of a tight instance falls by no more
    than a tenth of its distance from 1 (1e-6 at least, 1e-3 at most).
    """
    least = found.tightness - max(1e-6, min(1e-3, 0.1 * abs(1.0 - found.tightness)))
    violated, excess = found.violated, 0.99 * found.excess

    def kept(again: Found | None) -> TypeGuard[Found]:
        if again is None or again.violated != violated:
            return False
        return again.excess >= excess if violated else again.tightness >= least

    found_less = True
    while found_less:
        found_less = False
        for axis, size in enumerate(found.instance.shape):
            for index in range(size if size > 1 else 0):
                again = _without(found, axis, index, shape)
                if kept(again):
                    found, found_less = again, True
                    break
    for digits in (1, 2, 3, 4):
        again = _rounded(found, digits, shape)
        if kept(again):
            return again
    return found


@dataclass(frozen=True)
class Smallest:
    """The outcome of the search for a small counterexample."""

    found: Found | None
    tried: int
    """How many instances were evaluated, those of the shrinking included."""
    interrupted: bool = False


class _OutOfTime(KeyboardInterrupt):
    """Leaves Hypothesis at once, as Ctrl-C does."""


def smallest(
    wanted: Target,
    shape: Shape = (2, 3, 3),
    *,
    seed: int = 0,
    tries: int = 2000,
    seconds: float | None = None,
    low: float = -1.0,
    progress: Callable[[int], object] = lambda tried: None,
) -> Smallest:
    """The simplest counterexample with at most `shape` prompts, rewrites and responses (`hypothesis.find`).

    Simplest: fewest sizes, then whole weights and short decimals near 0 (see `alignpro.theory.testing`). A
    counterexample is a violation beyond rounding, with both sides finite.

    Args:
        wanted: the statement.
        shape: largest sizes; one compilation serves all smaller ones.
        seed: determines the search.
        tries: how many random instances to try before giving up; a sixteenth of it for each smaller shape.
        seconds: give up, or keep the simplest so far, after this much time.
        low: least reward; the largest is 1.
        progress: called with how many were evaluated.
    """
    from alignpro.theory.testing import counterexample, problems

    began, tried = time.perf_counter(), 0
    simplest: Found | None = None

    def holds(case: tuple[Instance, float, float, np.ndarray]) -> bool:
        nonlocal tried, simplest
        if seconds is not None and time.perf_counter() - began > seconds:
            raise _OutOfTime
        found = evaluate(wanted, *case, shape=shape)
        tried += 1
        progress(tried)
        if found.violated:
            simplest = found  # what comes later is simpler
        return not found.violated

    def search(sizes: Shape, tries: int) -> Found | None:
        cases = problems(*sizes, low=low, temperature=TEMPERATURES)
        refuted = counterexample(holds, cases, seed=seed, tries=tries)
        if refuted is None:
            return None
        instance, beta, lam, rho = refuted[0]
        return evaluate(wanted, instance, beta, lam, rho, shape)

    try:
        least = again = search(shape, tries)
        while least is not None and again is not None:
            x, k, y = least.instance.shape
            # Shrinking can get stuck: look afresh with one prompt, rewrite or response less.
            fewer = [(x - 1, k, y), (x, k - 1, y), (x, k, y - 1)]
            found = (search(sizes, max(1, tries // 16)) for sizes in fewer if min(sizes) > 0)
            again = next((find for find in found if find is not None), None)
            least = again or least
    except KeyboardInterrupt as stop:
        return Smallest(simplest, tried, not isinstance(stop, _OutOfTime))
    return Smallest(least, tried)
