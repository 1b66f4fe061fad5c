"""A statement: two sides, signed terms, assumptions, a bound on rounding; and how each kind is put together.

Each file of this folder holds functions from a `Solution` to a `Statement`, with their proofs, and a row in
its `CLAIMS` for each.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from alignpro.theory.divergences import Floats
from alignpro.theory.elementwise import is_ball, maximum, minimum
from alignpro.theory.solution import Solution


class Statement(NamedTuple):
    """`lhs ≤ rhs` (or `lhs = rhs` for an identity), averaged over P, as arrays in reward units.

    A lower bound on the gap has the gap on its right. Lemmas about total variation are in probabilities.
    """

    lhs: Float[Array, ""]
    """Left side: the gap, or a lower bound on it."""
    rhs: Float[Array, ""]
    """Right side: an upper bound on the gap, or the gap."""
    error: Float[Array, ""]
    """Bound on the rounding of `rhs − lhs`."""
    ceiling: Float[Array, ""]
    """The trivial bound E_x span(x): a bound of this size or more says nothing. For an identity, the size of
    what is summed, which its rounding is relative to."""
    terms: dict[str, Float[Floats, ""]]
    """Named, signed parts of a bound on the gap, whose sum is the bound: `rhs`, or `lhs` of a lower bound.
    Empty for identities and for lemmas of other quantities."""
    assumptions: dict[str, Array]
    """Whether each thing the statement needs is true (bool), by a phrase for the reader."""


def paper_r_max(s: Solution) -> Any:
    """Theorem 1's r_max: the largest reward when none is negative, as in the paper.

    With negative rewards everything is shifted by the minimum first, which changes neither side but makes
    r_max = max r − min r.
    """
    return s.reward_max - minimum(0.0, s.reward_min)


def tiny(like: Array) -> float:
    """The smallest normal number of the array's floats."""
    return float(jnp.finfo(like.dtype).tiny)


def optimal(s: Solution) -> dict[str, Any]:
    """The assumption that ρ is ρ*."""
    return {"prompter is optimal": s.is_star}


def supported(s: Solution) -> dict[str, Any]:
    """The assumption that ρ gives no rewrite that ρ_sft cannot give: KL(ρ‖ρ_sft) is finite."""
    return {"prompter has the support of its reference": s.supported}


def covered(s: Solution) -> dict[str, Any]:
    """The assumption that π_ρ gives no response that π_F(·|x) cannot give: KL(π_ρ‖π_F) is finite."""
    return {"rewrites induce no response the frozen model cannot give": s.covered}


def averaged(
    s: Solution, lhs, rhs, error, assumptions, magnitude, added=None, subtracted=None, ceiling=None
) -> Statement:
    """The statement whose sides, terms and error are the means over P of these, per prompt [X].

    `magnitude` [X] is the size of what was summed, for the rounding of the mean itself. The terms are those
    `added` and, with a minus, those `subtracted`. `ceiling` is the span unless given.
    """
    average = s.average
    summed = average(magnitude)
    # Below the smallest normal number compiled code flushes to 0, errors included. Balls carry their own.
    flushed = summed * 0 if is_ball(summed) else jnp.where(summed > 0, 16.0 * tiny(summed), 0.0)
    taken = {
        name: 0 - average(term) for name, term in (subtracted or {}).items()
    }  # 0, where −0 would be read
    return Statement(
        lhs=average(lhs),
        rhs=average(rhs),
        error=average(error) + 2.0 * (s.p.shape[-1] + 8) * s.eps * summed + flushed,
        ceiling=average(s.span if ceiling is None else ceiling),
        terms={name: average(term) for name, term in (added or {}).items()} | taken,
        assumptions=assumptions,
    )


def upper(s: Solution, added: dict, subtracted: dict, error, assumptions) -> Statement:
    """gap ≤ Σ `added` − Σ `subtracted`; `error` bounds the rounding of that difference."""
    plus, minus = sum(added.values()), sum(subtracted.values(), start=s.span * 0)
    size, error = abs(s.gap) + plus + minus, s.gap_error + error
    return averaged(s, s.gap, plus - minus, error, assumptions, size, added, subtracted)


def lower(s: Solution, added: dict, subtracted: dict, error, assumptions) -> Statement:
    """gap ≥ Σ `added` − Σ `subtracted`, as `lhs ≤ rhs` with the gap on the right; `added` may be negative."""
    nothing = s.span * 0
    plus, minus = sum(added.values(), start=nothing), sum(subtracted.values(), start=nothing)
    size, error = abs(s.gap) + abs(plus) + minus, s.gap_error + error
    return averaged(s, plus - minus, s.gap, error, assumptions, size, added, subtracted)


def identity(s: Solution, lhs, rhs, error, assumptions, magnitude) -> Statement:
    """`lhs = rhs`; its `ceiling` is the size of what is summed, which its rounding is relative to."""
    return averaged(s, lhs, rhs, error, assumptions, magnitude, ceiling=maximum(s.span, magnitude))
