"""Hypothesis strategies for prompt-optimization problems: test a conjecture of your own, or refute it.

Every strategy yields valid objects only, meets the awkward ones often (zeros, point masses, ties, extreme
probabilities and temperatures), and shrinks towards few prompts, rewrites and responses with numbers one can
read. A size below 1, an empty range or an unknown option is an `AlignProError`. Needs the extra: pip install
'alignpro[testing]'.
"""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from alignpro.errors import AlignProError
from alignpro.theory.instance import Instance

try:
    from hypothesis import HealthCheck, Phase, find, settings
    from hypothesis import strategies as st
    from hypothesis.errors import NoSuchExample
    from hypothesis.strategies import SearchStrategy
except ModuleNotFoundError as error:
    raise AlignProError(
        f"alignpro.theory.testing: the package {error.name} is missing; run pip install 'alignpro[testing]'"
    ) from error

# Beside weights 1 to 9: probabilities within 1e-2 to 1e-12 of 0 and of 1.
_FAR = (10**2, 10**4, 10**8, 10**12)


def _entries(table: Sequence[float], *shape: int) -> SearchStrategy[np.ndarray]:
    """Arrays of entries of a table that has the simplest first, which is what they shrink towards.

    One byte each: drawn at once, hundreds of times faster than one by one, and shrunk one by one.
    """
    count, values = math.prod(shape), np.array(table)

    def array(code: bytes) -> np.ndarray:
        return values[np.frombuffer(code, np.uint8).astype(int) * len(values) // 256].reshape(shape)

    return st.binary(min_size=count, max_size=count).map(array)


def _weights(zeros: bool, extremes: bool) -> tuple[int, ...]:
    # Zeros are repeated so as to be drawn often.
    return (0,) * (5 if zeros else 0) + tuple(range(1, 10)) + (_FAR if extremes else ())


def _rows(weights: np.ndarray, support: np.ndarray | None = None) -> np.ndarray:
    """Whole weights over their sum; where none is left, all on the first of the support."""
    allowed = np.ones(weights.shape, dtype=bool) if support is None else support
    weights = np.where(allowed, weights, 0)
    first = np.arange(weights.shape[-1]) == np.argmax(allowed, -1)[..., None]
    weights = np.where((weights.sum(-1, keepdims=True) == 0) & first, 1, weights)
    return weights / weights.sum(-1, keepdims=True)


def probabilities(n: int, *, zeros: bool = True, extremes: bool = True) -> SearchStrategy[np.ndarray]:
    """Probability vectors [n]: whole weights over their sum, so that they sum to 1 to rounding.

    Args:
        n: how many outcomes.
        zeros: let outcomes have probability exactly 0. Shrinks to a point mass, without zeros to 1/n each.
        extremes: let weights reach 1e12, so that probabilities come within 1e-12 of 0 and of 1.
    """
    _at_least_one(n=n)
    return _entries(_weights(zeros, extremes), n).map(_rows)


def policies(rows: int, n: int, *, zeros: bool = True, extremes: bool = True) -> SearchStrategy[np.ndarray]:
    """Matrices [rows, n] whose rows are as `probabilities`: prompters [X, K] or models [K, Y]."""
    _at_least_one(rows=rows, n=n)
    return _entries(_weights(zeros, extremes), rows, n).map(_rows)


def rewards(shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> SearchStrategy[np.ndarray]:
    """Reward arrays of `shape` in [low, high]: both ends and short decimals, with many ties, and values
    within 1e-3 to 1e-12 of the ends, relative to the width.

    Shrinks towards 0, or towards the end nearer to it where 0 is outside.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise AlignProError(f"low {low}, high {high}: give finite rewards with low <= high")
    zero = min(max(0.0, low), high)
    ends = [zero, *sorted({float(low), float(high)} - {zero}, key=abs)]
    table = [end for end in ends for _ in range(8)]
    if low < high:
        power = math.floor(math.log10(high - low)) - 1
        first, last = math.ceil(low / 10.0**power), math.floor(high / 10.0**power)
        # Text to float: the decimal itself, where multiplying would give 0.30000000000000004.
        table += sorted((float(f"{i}e{power}") for i in range(first, last + 1)), key=lambda r: abs(r - zero))
        table += [
            end + sign * (high - low) * 10.0**-n for n in (3, 6, 9, 12) for end in ends for sign in (1, -1)
        ]
    return _entries([r for r in table if low <= r <= high], *shape)


def temperatures(low: float = 1e-6, high: float = 1e6) -> SearchStrategy[float]:
    """β or λ in [low, high], in reward units: one digit times a power of ten, uniform over the decades.

    Shrinks towards 1.
    """
    if not 0 < low <= high < math.inf:
        raise AlignProError(f"low {low}, high {high}: give positive finite temperatures with low <= high")
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    simplest = sorted((digit > 1, abs(power), digit, power) for power in powers for digit in range(1, 10))
    table = [float(f"{digit}e{power}") for _, _, digit, power in simplest]
    within = [t for t in table if low <= t <= high]
    if not within:
        raise AlignProError(f"low {low}, high {high}: no digit times a power of ten between; widen the range")
    return st.sampled_from(within)


def instances(
    max_x: int = 3,
    max_k: int = 3,
    max_y: int = 3,
    *,
    shape: tuple[int, int, int] | None = None,
    low: float = 0.0,
    high: float = 1.0,
    zeros: bool = True,
    extremes: bool = True,
    own: Literal["any", "distinct"] = "any",
) -> SearchStrategy[Instance]:
    """Validated instances; shrinks to 1×1×1, point masses and rewards of 0.

    Args:
        max_x: most user prompts X; each size from 1 up is drawn, independently of the others.
        max_k: most rewrites K.
        max_y: most responses Y.
        shape: exactly this (X, K, Y) instead, so that compiled code is compiled once.
        low: least reward.
        high: largest reward.
        zeros: let P, ρ_sft and π_F have entries of exactly 0.
        extremes: let probabilities come within 1e-12 of 0 and of 1.
        own: "any" row of π_F for each prompt, shared ones too, or "distinct": no two share one (K ≥ X).
    """
    most = shape or (max_x, max_k, max_y)
    _at_least_one(X=most[0], K=most[1], Y=most[2])
    if own not in ("any", "distinct"):
        raise AlignProError(f"own {own!r}: is unknown; give 'any' or 'distinct'")
    if own == "distinct" and most[1] < most[0]:
        raise AlignProError(f"own 'distinct' with X {most[0]} and K {most[1]}: give K of at least X")
    return _with_kept(most, shape is not None, low, high, _weights(zeros, extremes), own).map(lambda d: d[0])


def _with_kept(
    most, fixed, low, high, table, own="any"
) -> SearchStrategy[tuple[Instance, np.ndarray, np.ndarray]]:
    """Instances, with which of the largest number of prompts [X] and of rewrites [K] they keep (bool)."""
    x, k, y = most

    def assemble(drawn: tuple) -> tuple[Instance, np.ndarray, np.ndarray]:
        *keep, p, prior, frozen, rows, reward = drawn
        on_x, on_k, on_y = (mask if mask.any() else np.arange(len(mask)) == 0 for mask in keep)
        if own == "distinct":
            on_k = on_k | np.isin(np.arange(k), np.flatnonzero(on_x))
        place = np.where(on_k, np.cumsum(on_k) - 1, 0)
        instance = Instance(
            _rows(p[on_x]),
            _rows(prior[on_x][:, on_k]),
            _rows(frozen[on_k][:, on_y]),
            place[rows[on_x]],
            reward[on_x][:, on_y],
        )
        return instance, on_x, on_k

    # Arrays of the largest size, and what of each axis is kept: shrinking can leave out any one prompt,
    # rewrite or response without shifting the rest.
    return st.tuples(
        *(_entries((True,) if fixed else (False, True, True), n) for n in most),
        *(_entries(table, *size) for size in ((x,), (x, k), (k, y))),
        _entries(range(k), x) if own == "any" else st.just(np.arange(x)),
        rewards((x, y), low, high),
    ).map(assemble)


def prompters(instance: Instance, *, zeros: bool = True, extremes: bool = True) -> SearchStrategy[np.ndarray]:
    """Any ρ(x′|x) [X, K] with no mass where ρ_sft has none.

    `zeros` lets ρ leave out part of that support: KL(ρ‖ρ_sft) stays finite, KL(ρ_sft‖ρ) does not.
    """
    support = np.asarray(instance.prior) > 0
    return _entries(_weights(zeros, extremes), *support.shape).map(lambda weights: _rows(weights, support))


def problems(
    max_x: int = 3,
    max_k: int = 3,
    max_y: int = 3,
    *,
    low: float = 0.0,
    high: float = 1.0,
    zeros: bool = True,
    extremes: bool = True,
    temperature: tuple[float, float] = (1e-6, 1e6),
) -> SearchStrategy[tuple[Instance, float, float, np.ndarray]]:
    """`(instance, beta, lam, prompter)`: all that a statement is about, β and λ between both `temperature`.

    As `instances`, `temperatures` and `prompters`, but quicker than a `flatmap` of them.
    """
    _at_least_one(X=max_x, K=max_k, Y=max_y)
    heat, table = temperatures(*temperature), _weights(zeros, extremes)

    def assemble(drawn: tuple) -> tuple[Instance, float, float, np.ndarray]:
        (instance, on_x, on_k), beta, lam, weights = drawn
        return instance, beta, lam, _rows(weights[on_x][:, on_k], np.asarray(instance.prior) > 0)

    kept = _with_kept((max_x, max_k, max_y), False, low, high, table)
    return st.tuples(kept, heat, heat, _entries(table, max_x, max_k)).map(assemble)


@st.composite
def _chains(draw, max_stages, max_k, ends, table) -> tuple[tuple[np.ndarray, ...], Instance]:
    between = draw(st.lists(st.integers(1, max_k), max_size=max_stages - 1))
    last = draw(ends)
    stages = tuple(
        _rows(draw(_entries(table, rows, n)))
        for rows, n in itertools.pairwise([last.shape[0], *between, last.shape[1]])
    )
    through = functools.reduce(np.matmul, stages)
    return stages, Instance(last.p, through, last.frozen, last.own, last.reward)


def chains(
    max_stages: int = 3,
    max_x: int = 3,
    max_k: int = 3,
    max_y: int = 3,
    *,
    low: float = 0.0,
    high: float = 1.0,
    zeros: bool = True,
    extremes: bool = True,
) -> SearchStrategy[tuple[tuple[np.ndarray, ...], Instance]]:
    """Prompters in sequence: `(stages, instance)`, each rewriting what the one before it wrote.

    `stages` are the reference prompters, [X, K₁], [K₁, K₂], …, [Kₙ₋₁, K]; the instance's ρ_sft [X, K] is
    their product, what the reference chain does in one step. The arguments of `theory.chains.Chain` are
    these stages and the instance's other arrays. Shrinks towards one stage; `max_k` is for every stage.
    """
    _at_least_one(max_stages=max_stages)
    ends = instances(max_x, max_k, max_y, low=low, high=high, zeros=zeros, extremes=extremes)
    return _chains(max_stages, max_k, ends, _weights(zeros, extremes))


def counterexample(
    conjecture: Callable[..., Any], *strategies: SearchStrategy, seed: int = 0, tries: int = 2000
) -> tuple | None:
    """The simplest arguments for which `conjecture(*arguments)` is false; None if `tries` draws find none.

    `hypothesis.find` with a seed, and without a deadline or a database of earlier failures.
    """
    try:
        return find(
            st.tuples(*strategies),
            lambda arguments: not conjecture(*arguments),
            settings=settings(
                max_examples=tries,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=(Phase.generate, Phase.shrink),  # explaining takes longer than all the rest
            ),
            random=random.Random(seed),
        )
    except NoSuchExample:
        return None


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise AlignProError(f"{name} {size}: give a size of at least 1")
