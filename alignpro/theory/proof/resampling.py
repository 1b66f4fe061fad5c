"""Bounds on what few draws, or a wrong reward, cost the optimal prompter: proved in ball arithmetic."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import Float

from alignpro.errors import AlignProError, as_number
from alignpro.theory.divergences import Floats
from alignpro.theory.proof.balls import Ball, ctx
from alignpro.theory.proof.certify import MAX_PRECISION, PRECISION, Certificate, certificate
from alignpro.theory.proof.enclosed import parameter, rationals, rows

MOST_CASES = 20_000
"""Ways in which n draws can fall on K rewrites that are enumerated."""


def certified_resampling(
    prior: Float[Floats, " K"],
    reward: Float[Floats, " K"],
    lam: float | Fraction | str,
    n: int,
    max_precision: int = MAX_PRECISION,
) -> tuple[Certificate, ...]:
    """Prove `results.resample_law`'s bounds for one prompt, its law enumerated from the definition.

    Args:
        prior: ρ_sft of one prompt, all positive, divided by its exact sum.
        reward: R of each rewrite, every float the rational it stores.
        lam: λ > 0, reward units; "1/3" is the rational it names.
        n: draws; at most `MOST_CASES` ways in which they can fall.
        max_precision: bits at which an undecided comparison is given up.

    Returns:
        Certificates of KL(ρ*‖ρ_n) ≤ `kl_bound` ≤ `kl_chi2`, of `tv` ≤ `tv_bound`, of `reward_loss` ≤
        `reward_bound` ≤ `reward_worst`, and of `loss` ≤ `reward_loss`.

    Raises:
        AlignProError: a probability that is not positive, a bad λ or n, or too many ways to enumerate.
    """
    _positive(prior)
    if not ((draws := as_number("n", n)) >= 1 and draws.is_integer()):
        raise AlignProError(f"n {n}: must be an integer of at least 1; give the number of draws")
    if (ways := math.comb(int(n) + np.size(prior) - 1, int(n))) > MOST_CASES:
        raise AlignProError(
            f"n {n}: {ways} ways to draw are too many to enumerate; give fewer draws or rewrites"
        )
    return _proved(
        lambda bits: _resampling(np.asarray(prior), np.asarray(reward), lam, int(n), bits), max_precision
    )


def certified_floor(
    prior: Float[Floats, " K"],
    reward: Float[Floats, " K"],
    lam: float | Fraction | str,
    delta: float | Fraction | str,
    max_precision: int = MAX_PRECISION,
) -> tuple[Certificate, ...]:
    """Prove `by_tv` ≤ floor and `by_value` ≤ floor of `results.floor` for one prompt, from their definitions.

    Arguments and errors as of `certified_resampling`; `delta` > 0 is the error's width in spans of R.
    The floor is the least over all levels, so that its own certificate is its definition.
    """
    _positive(prior)
    return _proved(
        lambda bits: _floors(np.asarray(prior), np.asarray(reward), lam, delta, bits), max_precision
    )


def _positive(prior: Float[Floats, " K"]) -> None:
    if not (np.asarray(prior) > 0).all():
        raise AlignProError("prior: certificates need positive numbers; leave out what is 0")


def _proved(attempt: Callable[[int], tuple[Certificate, ...]], max_precision: int) -> tuple[Certificate, ...]:
    bits, before = PRECISION, ctx.prec
    try:
        while True:
            ctx.prec = bits
            found = attempt(bits)
            if all(c.verdict != "inconclusive" for c in found) or 2 * bits > max_precision:
                return found
            bits *= 2
    finally:
        ctx.prec = before


_ball = np.frompyfunc(Ball, 1, 1)


def _numbers(prior: np.ndarray, reward: np.ndarray, lam: float | Fraction | str) -> tuple[Any, ...]:
    """λ, ρ_sft, R from its largest, and e^{R/λ}, as balls."""
    t, b = parameter("lam", lam), _ball(rows(prior[None]))[0]
    values = np.asarray(rationals(reward), dtype=object)
    e = _ball(values - values.max())
    return t, b, e, np.exp(e / t)


def _falls(n: int, kinds: int) -> Iterator[tuple[int, ...]]:
    """Ways in which n draws fall on `kinds` rewrites."""
    if kinds == 1:
        yield (n,)
        return
    for first in range(n + 1):
        for rest in _falls(n - first, kinds - 1):
            yield (first, *rest)


def _resampling(
    prior: np.ndarray, reward: np.ndarray, lam: float | Fraction | str, n: int, bits: int
) -> tuple[Certificate, ...]:
    t, b, e, g = _numbers(prior, reward, lam)
    size = len(b)
    law = np.array([Ball(0)] * size, dtype=object)
    for counts in _falls(n, size):
        chance = Ball(Fraction(math.factorial(n), math.prod(map(math.factorial, counts))))
        for p, count in zip(b, counts, strict=True):
            for _ in range(count):
                chance = chance * p
        pull = np.array([Ball(count) * v for count, v in zip(counts, g, strict=True)], dtype=object)
        law = law + chance * pull / pull.sum()
    star = b * g / (b * g).sum()
    w = star / b
    more = w - 1
    kl = (star * np.log(star / law)).sum()
    chi2 = (star * w).sum() - 1
    above = e - min(e, key=float)
    width = max(above, key=float)
    nearer = star * more / (w + (n - 1))
    zero = Ball(0)
    positive = sum((v.max(zero) for v in nearer), zero)
    tv = sum((abs(v) for v in star - law), zero) / 2
    loss = ((star - law) * above).sum()
    grown = ((width / t).exp() - 1) / n + 1
    root = grown.sqrt()  # tanh(¼ log g) = (√g − 1)/(√g + 1)
    worst = width * (root - 1) / (root + 1)
    return tuple(
        certificate(name, lhs, rhs, size_, precision=bits)
        for name, lhs, rhs, size_ in (
            ("kl_bound", kl, (star * np.log(more / n + 1)).sum(), kl),
            ("kl_chi2", (star * np.log(more / n + 1)).sum(), (chi2 / n + 1).log(), kl),
            ("tv_bound", tv, positive, tv),
            ("reward_bound", loss, (nearer * above).sum(), width),
            ("reward_worst", (nearer * above).sum(), worst, width),
            ("loss", t * (law * np.log(law / star)).sum(), loss, width),
        )
    )


def _floors(
    prior: np.ndarray,
    reward: np.ndarray,
    lam: float | Fraction | str,
    delta: float | Fraction | str,
    bits: int,
) -> tuple[Certificate, ...]:
    t, b, e, g = _numbers(prior, reward, lam)
    span = -min(e, key=float)
    width = parameter("delta", delta) * span
    lift = (width / t).exp()
    total = (b * g).sum()
    star = b * g / total
    mean = (star * e).sum()
    least = mean
    order = np.argsort(np.asarray(reward), kind="stable")
    for last in range(1, len(order)):
        wrong = star.copy()
        wrong[order[:last]] = star[order[:last]] * lift
        least = least.min((wrong * e).sum() / wrong.sum())
    u = width / t
    half = (u / 4).tanh()
    kappa = u / (1 - (-u).exp())
    by_value = t * total.log() - t * (kappa - 1 - kappa.log())
    return (
        certificate("by_tv", mean - span * half, least, span, precision=bits),
        certificate("by_value", by_value, least, span, precision=bits),
    )
