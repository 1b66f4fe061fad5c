"""Hypothesis strategies for prompt-optimization problems: test a conjecture of your own, or refute it.

Every strategy yields valid objects only, meets the awkward ones often (zeros, point masses, ties, extreme
probabilities and temperatures), and shrinks towards few prompts, rewrites and responses with numbers one can
read: probabilities are small whole weights over their sum, rewards short decimals, temperatures one digit and
a power of ten. Needs the extra: pip install 'alignpro[testing]'.
"""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from alignpro.errors import AlignProError
from alignpro.theory.instance import Instance
from alignpro.theory.instance import probabilities as _checked

try:
    from hypothesis import HealthCheck, find, settings
    from hypothesis import strategies as st
    from hypothesis.errors import NoSuchExample
    from hypothesis.strategies import SearchStrategy
except ModuleNotFoundError as error:
    raise AlignProError(
        f"alignpro.testing: the package {error.name} is missing; run pip install 'alignpro[testing]'"
    ) from error

__all__ = [
    "chains",
    "counterexample",
    "instances",
    "policies",
    "probabilities",
    "prompters",
    "rewards",
    "temperatures",
]

# Beside weights 1 to 9: probabilities within 1e-2 to 1e-12 of 0 and of 1.
_FAR = (10**2, 10**4, 10**8, 10**12)


def _weights(n: int, zeros: bool, extremes: bool) -> SearchStrategy[np.ndarray]:
    # One table, simplest first: what is drawn shrinks along it. Zeros are repeated to be drawn often.
    table = (0,) * (5 if zeros else 0) + tuple(range(1, 10)) + (_FAR if extremes else ())

    def rows(weights: list[int]) -> np.ndarray:
        if not any(weights):
            weights = [1, *weights[1:]]
        return np.array(weights) / sum(weights)

    return st.lists(st.sampled_from(table), min_size=n, max_size=n).map(rows)


def probabilities(n: int, *, zeros: bool = True, extremes: bool = True) -> SearchStrategy[np.ndarray]:
    """Probability vectors [n]: whole weights over their sum, which is 1 to rounding.

    Args:
        n: how many outcomes.
        zeros: let outcomes have probability exactly 0; shrinks to a point mass, else to the uniform one.
        extremes: let weights reach 1e12, so that probabilities come within 1e-12 of 0 and of 1.

    Raises:
        AlignProError: n < 1.
    """
    _at_least_one(n=n)
    return _weights(n, zeros, extremes)


def policies(rows: int, n: int, *, zeros: bool = True, extremes: bool = True) -> SearchStrategy[np.ndarray]:
    """Matrices [rows, n] whose rows are `probabilities`: prompters [X, K] or models [K, Y].

    Raises:
        AlignProError: rows < 1 or n < 1.
    """
    _at_least_one(rows=rows, n=n)
    return st.lists(_weights(n, zeros, extremes), min_size=rows, max_size=rows).map(np.stack)


def rewards(shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> SearchStrategy[np.ndarray]:
    """Reward arrays of `shape` in [low, high]: the ends, short decimals, any floats; ties are common.

    Shrinks towards 0, or towards the end nearer to it where 0 is outside.

    Raises:
        AlignProError: the ends are not finite, or low > high.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise AlignProError(f"low {low}, high {high}: give finite rewards with low <= high")
    zero = min(max(0.0, low), high)
    ends = list(dict.fromkeys([zero, *sorted((float(low), float(high)), key=abs)]))
    kinds: list[SearchStrategy[float]] = [st.sampled_from(ends)]
    if low < high:
        power = math.floor(math.log10(max(high - low, abs(low), abs(high)))) - 1
        digits = [int(float(f"{end:.17e}") / 10.0**power) for end in (low, high)]
        kinds += [
            # Text to float: the decimal itself, where multiplying would give 0.30000000000000004.
            st.integers(*digits).map(lambda i: float(f"{i}e{power}")).filter(lambda r: low <= r <= high),
            st.floats(low, high, allow_subnormal=False),
        ]
    count = math.prod(shape)
    return st.lists(st.one_of(kinds), min_size=count, max_size=count).map(
        lambda values: np.array(values, dtype=float).reshape(shape)
    )


def temperatures(low: float = 1e-6, high: float = 1e6) -> SearchStrategy[float]:
    """β or λ in [low, high], in reward units: a digit times a power of ten; shrinks towards 1.

    Raises:
        AlignProError: no such number, or not 0 < low <= high < ∞.
    """
    if not 0 < low <= high < math.inf:
        raise AlignProError(f"low {low}, high {high}: give positive finite temperatures with low <= high")
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    values = [float(f"{digit}e{power}") for power in powers for digit in range(1, 10)]
    within = sorted((v for v in values if low <= v <= high), key=lambda v: (abs(math.log10(v)), v))
    if not within:
        raise AlignProError(f"low {low}, high {high}: no digit times a power of ten between; widen the range")
    # By decade first: small steps about 1 would otherwise be most of what is drawn.
    decades: dict[int, list[float]] = {}
    for value in within:
        decades.setdefault(math.floor(math.log10(value)), []).append(value)
    return st.one_of([st.sampled_from(sorted(decade)) for decade in decades.values()])


@st.composite
def _instances(draw, sizes, low, high, zeros, extremes, own) -> Instance:
    x, y = draw(sizes[0]), draw(sizes[2])
    k = draw(sizes[1].filter(lambda k: k >= x) if own == "distinct" else sizes[1])
    kind = {"zeros": zeros, "extremes": extremes}
    if own == "distinct":
        rows = list(range(x))
    else:
        rows = draw(st.lists(st.integers(0, k - 1), min_size=x, max_size=x))
    return Instance(
        p=draw(probabilities(x, **kind)),
        prior=draw(policies(x, k, **kind)),
        frozen=draw(policies(k, y, **kind)),
        own=np.array(rows),
        reward=draw(rewards((x, y), low, high)),
    )


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
        own: "any" row of π_F for each prompt, shared ones too, or "distinct": row x for prompt x (K ≥ X).

    Raises:
        AlignProError: a size below 1, "distinct" with K < X, or as `rewards`.
    """
    most = shape or (max_x, max_k, max_y)
    _at_least_one(X=most[0], K=most[1], Y=most[2])
    if own not in ("any", "distinct"):
        raise AlignProError(f"own {own!r}: is unknown; give 'any' or 'distinct'")
    if own == "distinct" and most[1] < most[0]:
        raise AlignProError(f"own 'distinct' with X {most[0]} and K {most[1]}: give K of at least X")
    rewards((1,), low, high)  # complains now rather than in the first draw
    sizes = [st.just(n) if shape else st.integers(1, n) for n in most]
    return _instances(sizes, low, high, zeros, extremes, own)


def prompters(instance: Instance, *, zeros: bool = True, extremes: bool = True) -> SearchStrategy[np.ndarray]:
    """Any ρ(x′|x) [X, K] with no mass where ρ_sft has none; shrinks towards uniform on that support.

    Args:
        instance: the problem whose ρ_sft is the reference.
        zeros: let ρ leave out part of the support, as long as KL(ρ‖ρ_sft) stays finite.
        extremes: as in `probabilities`.
    """
    supports = [np.flatnonzero(row) for row in np.asarray(instance.prior)]

    def spread(rows: tuple[np.ndarray, ...]) -> np.ndarray:
        rho = np.zeros(np.shape(instance.prior))
        for row, support, values in zip(rho, supports, rows, strict=True):
            row[support] = values
        return _checked("prompter", rho, rho.shape)

    return st.tuples(*(_weights(len(support), zeros, extremes) for support in supports)).map(spread)


@st.composite
def _chains(draw, max_stages, max_k, ends, kind) -> tuple[tuple[np.ndarray, ...], Instance]:
    last = draw(ends)
    between = st.lists(st.integers(1, max_k), max_size=max_stages - 1)
    sizes = [last.shape[0], *draw(between), last.shape[1]]
    stages = tuple(draw(policies(rows, n, **kind)) for rows, n in itertools.pairwise(sizes))
    through = stages[0]
    for stage in stages[1:]:
        through = through @ stage
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
    """Prompters in sequence: `(stages, instance)`, each prompter rewriting what the one before it wrote.

    `stages` are the reference prompters, [X, K₁], [K₁, K₂], …, [Kₙ₋₁, K]; the instance's ρ_sft [X, K] is
    their product, what the reference chain does in one step. Shrinks towards one stage.

    Args:
        max_stages: most prompters in sequence.
        max_x, max_k, max_y, low, high, zeros, extremes: as in `instances`; `max_k` is for every stage.

    Raises:
        AlignProError: as `instances`.
    """
    _at_least_one(max_stages=max_stages)
    ends = instances(max_x, max_k, max_y, low=low, high=high, zeros=zeros, extremes=extremes)
    return _chains(max_stages, max_k, ends, {"zeros": zeros, "extremes": extremes})


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
                max_examples=tries, database=None, deadline=None, suppress_health_check=list(HealthCheck)
            ),
            random=random.Random(seed),
        )
    except NoSuchExample:
        return None


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise AlignProError(f"{name} {size}: give a size of at least 1")
