"""The price of one prompter for all prompts in ball arithmetic: proved ends, and its bounds proved or refuted."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Float

from alignpro.claims import Verdict
from alignpro.errors import AlignProError
from alignpro.theory.divergences import Floats
from alignpro.theory.proof.balls import Ball, Undecided, ctx
from alignpro.theory.proof.certify import MAX_PRECISION, PRECISION
from alignpro.theory.proof.solution import _parameter, _rationals, _rows, _where


@dataclass(frozen=True)
class CertifiedPrice:
    """F(ρ*) − F(q*) of `results.universal` on rational numbers, proved; reward units."""

    price: str
    """A decimal ball that contains the price."""
    price_lower: float
    """Proved lower end of the price, rounded outward."""
    price_upper: float
    """Proved upper end of the price, rounded outward."""
    at_least_lower: Verdict
    """Whether the price is at least its bound `Universal.lower`: holds, violated or inconclusive."""
    at_most_upper: Verdict
    """Whether the price is at most its bound `Universal.upper`: holds, violated or inconclusive."""
    precision: int
    """Bits of the arithmetic that gave the verdicts."""


def certified_price(
    reward: Float[Floats, "X S"],
    lam: float | Fraction | str,
    prior: Float[Floats, "X S"],
    p: Float[Floats, " X"],
    max_precision: int = MAX_PRECISION,
) -> CertifiedPrice:
    """Enclose the price of not reading x, straight from the definitions of F(ρ*) and F(q*).

    Args:
        reward: R(x, s), every float the rational it stores.
        lam: λ > 0, reward units; "1/3" is the rational it names.
        prior: ρ_sft(s|x), all positive; rows are divided by their exact sums.
        p: P(x), all positive, divided by its exact sum.
        max_precision: bits at which an undecided comparison is given up.

    Raises:
        AlignProError: a probability that is not positive (leave that prompt or strategy out), or a bad λ.
    """
    if not (np.asarray(prior) > 0).all() or not (np.asarray(p) > 0).all():
        raise AlignProError("prior and p: certified prices need positive numbers; leave out what is 0")
    bits, before = PRECISION, ctx.prec
    try:
        while True:
            ctx.prec = bits
            found = _attempt(reward, lam, prior, p, bits)
            if "inconclusive" not in (found.at_least_lower, found.at_most_upper) or 2 * bits > max_precision:
                return found
            bits *= 2
    finally:
        ctx.prec = before


def _attempt(reward: object, lam: object, prior: object, p: object, bits: int) -> CertifiedPrice:
    t, weights, base = _parameter("lam", lam), _rows(p), _rows(prior)
    values = np.asarray(_rationals(np.asarray(reward)), dtype=object)
    ball = np.frompyfunc(Ball, 1, 1)
    values = values - values.max(1)[:, None]  # moves F of every prompter alike
    energy = np.log(ball(base)) + ball(values) / t
    mean = (ball(weights)[:, None] * energy).sum(0)

    def log_sum(row: np.ndarray) -> tuple[Ball, np.ndarray]:
        top = row[int(np.argmax([float(v.value.mid() if hasattr(v.value, "mid") else v.value) for v in row]))]
        parts = np.exp(row - top)
        total = parts.sum()
        return top + total.log(), parts / total

    log_all, q = log_sum(mean)
    read = sum((w * log_sum(row)[0] for w, row in zip(weights, energy, strict=True)), start=Ball(0))
    price = t * (read - log_all)
    bounds = {-1: Ball(0), 1: Ball(0)}
    apart = energy - mean
    order = apart - (q * apart).sum(1)[:, None]
    for w, row in zip(weights, order, strict=True):
        variance = (q * row * row).sum()
        for sign in bounds:
            m = row[0]
            for v in row[1:]:
                m = m.max(v) if sign > 0 else m.min(v)
            bounds[sign] = bounds[sign] + w * t * _two_point(variance, m)

    def verdict(slack: Ball) -> Verdict:
        try:
            return "holds" if slack >= 0 else "violated"
        except Undecided:
            return "inconclusive"

    ends = price.ends()
    return CertifiedPrice(str(price), *ends, verdict(price - bounds[-1]), verdict(bounds[1] - price), bits)


def _two_point(variance: Ball, m: Ball) -> Ball:
    """log E e^u of the law on {m, −variance/m} with mean 0 and that variance."""
    if variance.exact and variance == 0:
        return Ball(0)
    other = -(variance / m)
    return ((variance * m.exp() + m * m * other.exp()) / (m * m + variance)).log()
