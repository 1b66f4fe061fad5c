"""The price of one prompter for all prompts, and its bounds, proved in ball arithmetic."""

from fractions import Fraction

import numpy as np
from jaxtyping import Float

from alignpro.errors import AlignProError
from alignpro.theory.divergences import Floats
from alignpro.theory.proof.balls import Ball, ctx
from alignpro.theory.proof.certify import (
    MAX_PRECISION,
    PRECISION,
    Certificate,
    certificate,
)
from alignpro.theory.proof.enclosed import parameter, rationals, rows


def certified_price(
    reward: Float[Floats, "X S"],
    lam: float | Fraction | str,
    prior: Float[Floats, "X S"],
    p: Float[Floats, " X"],
    max_precision: int = MAX_PRECISION,
) -> tuple[Certificate, Certificate]:
    """Prove lower ≤ price ≤ upper of `results.universal`, each straight from its definition.

    Args:
        reward: R(x, s), every float the rational it stores.
        lam: λ > 0, reward units; "1/3" is the rational it names.
        prior: ρ_sft(s|x), all positive; rows are divided by their exact sums.
        p: P(x), all positive, divided by its exact sum.
        max_precision: bits at which an undecided comparison is given up, as where two strategies make a
            bound an equality.

    Returns:
        The certificates of `price_lower`, whose right side is the price, and of `price_upper`, whose left
        side it is.

    Raises:
        AlignProError: a probability that is not positive (leave that prompt or strategy out), or a bad λ.
    """
    if not (np.asarray(prior) > 0).all() or not (np.asarray(p) > 0).all():
        raise AlignProError("prior and p: certified prices need positive numbers; leave out what is 0")
    bits, before = PRECISION, ctx.prec
    try:
        while True:
            ctx.prec = bits
            found = _attempt(np.asarray(reward), lam, np.asarray(prior), np.asarray(p), bits)
            if all(c.verdict != "inconclusive" for c in found) or 2 * bits > max_precision:
                return found
            bits *= 2
    finally:
        ctx.prec = before


def _attempt(
    reward: np.ndarray, lam: float | Fraction | str, prior: np.ndarray, p: np.ndarray, bits: int
) -> tuple[Certificate, Certificate]:
    t, weights = parameter("lam", lam), np.array([Ball(w) for w in rows(p)], dtype=object)
    values = np.asarray(rationals(reward), dtype=object)
    top = values.max(1)
    ball = np.frompyfunc(Ball, 1, 1)
    # About each prompt's best reward, which moves F of every prompter alike.
    energy = np.log(ball(rows(prior))) + ball(values - top[:, None]) / t
    mean = (weights[:, None] * energy).sum(0)
    log_all, q = _log_sum(mean)
    price = t * ((weights * [_log_sum(row)[0] for row in energy]).sum() - log_all)
    apart = energy - mean
    order = apart - (q * apart).sum(1)[:, None]
    lower = t * (weights * [_two_point(q, row, "min") for row in order]).sum()
    upper = t * (weights * [_two_point(q, row, "max") for row in order]).sum()
    size = Ball(max(abs(values.min()), abs(values.max())))
    return (
        certificate("price_lower", lower, price, size, precision=bits),
        certificate("price_upper", price, upper, size, precision=bits),
    )


def _log_sum(row: np.ndarray) -> tuple[Ball, np.ndarray]:
    """log Σ e^row, and e^row divided by its sum."""
    middle = max(row, key=float)
    parts = np.exp(row - middle)
    return middle + parts.sum().log(), parts / parts.sum()


def _two_point(q: np.ndarray, u: np.ndarray, end: str) -> Ball:
    """log E e^v of the law on {m, −Var u/m}, with the mean 0 and the variance of u; m is an end of u."""
    variance, m = (q * u * u).sum(), u[0]
    for value in u[1:]:
        m = getattr(m, end)(value)
    if variance.exact and variance == 0:
        return Ball(0)
    other = -variance / m
    return ((variance * m.exp() + m * m * other.exp()) / (m * m + variance)).log()
