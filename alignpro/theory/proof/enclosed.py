"""A `Solution` in ball arithmetic: every quantity straight from its definition, enclosed."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.divergences import Floats
from alignpro.theory.instance import Instance, probabilities
from alignpro.theory.proof.balls import Ball, fmpq
from alignpro.theory.solution import Solution


def _rational(number: Any) -> "fmpq":
    return fmpq(*float(number).as_integer_ratio())


rationals = np.frompyfunc(_rational, 1, 1)
_balls = np.frompyfunc(Ball, 1, 1)
_where: Any = np.where  # of object arrays, which its annotations leave out


def rows(array: Any) -> np.ndarray:
    """Rows of probabilities as rationals, each divided by its exact sum."""
    weights = np.asarray(rationals(np.asarray(array)), dtype=object)
    return weights / weights.sum(-1, keepdims=True)


class _Tilt(NamedTuple):
    """p ∝ base·exp(energy/temperature) per row, as its definition has it; divergences times temperature."""

    probs: np.ndarray
    log_ratio: np.ndarray
    log_z: np.ndarray
    cost: np.ndarray
    gain: np.ndarray


def _tilt(base: np.ndarray, energy: np.ndarray, temperature: Ball) -> _Tilt:
    """Rows of balls `base` [X, n] tilted by rational rows `energy` [X, n]; 0 log 0 = 0 off the support.

    Energies are measured from their exact maximum over the support, which keeps a point mass exact.
    """
    support = base > 0
    top = _over(max, energy, support)
    a = _where(support, _balls(energy - top[:, None]) / temperature, Ball(0))
    weights = base * np.exp(a)
    z = weights.sum(-1)
    probs = weights / z[:, None]
    log_ratio = _where(support, a - np.log(z)[:, None], Ball(0))
    return _Tilt(
        probs=probs,
        log_ratio=log_ratio,
        log_z=_balls(top) / temperature + np.log(z),
        cost=temperature * (probs * log_ratio).sum(-1),
        gain=-temperature * (base * log_ratio).sum(-1),
    )


def parameter(name: str, value: Any) -> Ball:
    """β or λ exactly: a float is the rational it stores, "1/3" or "0.1" the rational it names."""
    number = value
    if isinstance(value, str):
        try:
            number = Fraction(value)
        except (ValueError, ZeroDivisionError) as error:
            raise AlignProError(f"{name} {value!r}: is no number; give one such as 0.5 or 1/3") from error
    if isinstance(number, Fraction):
        most = Fraction(10**300)  # what a float can hold
        check_temperature(name, float(sorted((-most, number, most))[1]))
    else:
        check_temperature(name, number)
    return Ball(number)


def solution_balls(
    instance: Instance,
    beta: float | Fraction | str,
    lam: float | Fraction | str,
    prompter: Float[Floats, "X K"] | None = None,
) -> Solution:
    """`solution` as object arrays of `Ball`, at flint's current precision: each contains its true value.

    Every quantity comes straight from its definition, on the rational instance whose rows are divided by
    their exact sums. What is rational (R, shift, span, TV between given rows, all about a point mass) is
    exact. A KL with an entry q = 0 < p is +∞. All error fields are 0. Supports, `is_star`, `supported` and
    `covered` are decided on the given numbers and are plain booleans. Arguments and errors as of `certify`.
    """
    b, t = parameter("beta", beta), parameter("lam", lam)
    has_p, has_prior, has_frozen = (np.asarray(a) > 0 for a in (instance.p, instance.prior, instance.frozen))
    own = np.asarray(instance.own)
    p, prior, frozen = (rows(a) for a in (instance.p, instance.prior, instance.frozen))
    reward = np.asarray(rationals(np.asarray(instance.reward)), dtype=object)
    if prompter is None:
        has_rho = has_prior
    else:
        prompter = probabilities("prompter", prompter, prior.shape)
        has_rho = prompter > 0
    has_own, has_induced = has_frozen[own], _reachable(has_rho, has_frozen)
    reach = has_own | has_induced | _reachable(has_prior, has_frozen)

    # Rational, and measured from the best reachable reward; `top` comes back where a level is asked for.
    top = _over(max, reward, reach)
    d = reward - top[:, None]
    r = d @ frozen.T
    own_r = r[np.arange(len(own)), own]
    own_frozen = frozen[own]
    tv_rows = np.array([np.abs(frozen - row).sum(-1) / 2 for row in own_frozen], dtype=object)
    variance = (own_frozen * (d - own_r[:, None]) ** 2).sum(-1)
    rise, best, low = _over(max, d, has_own) - own_r, _over(max, r, has_prior), _over(min, d, reach)
    own_span, fall = rise + own_r - _over(min, d, has_own), variance / _where(rise > 0, rise, fmpq(1))
    order = np.array([sorted(range(row.size), key=row.__getitem__) for row in d])
    steps: Any = _balls(np.diff(np.take_along_axis(d, order, -1), axis=-1))
    p, prior, frozen, own_frozen, top, d, own_r, tv_rows, own_span, rise, fall, best, low = (
        _balls(a)
        for a in (p, prior, frozen, own_frozen, top, d, own_r, tv_rows, own_span, rise, fall, best, low)
    )

    model, star, r = _tilt(own_frozen, reward, b), _tilt(prior, r, t), _balls(r)
    reference, optimum = (prior * r).sum(-1), (model.probs * d).sum(-1)
    log_star: Any = t * star.log_ratio
    log_model: Any = b * model.log_ratio
    zero = np.full(len(own), Ball(0), dtype=object)
    if prompter is None:
        rho = star.probs
        kl_to_star = kl_from_star = shortfall = zero
        kl_to_reference, kl_from_reference, kl_excess = star.cost, star.gain, -star.cost
    else:
        rho = _balls(rows(prompter))
        log_rho: Any = t * _log_quotient(rho, prior, has_rho & has_prior)
        outside, missed = has_rho & ~has_prior, has_prior & ~has_rho
        kl_to_star = _kl(rho, log_rho - log_star, outside)
        kl_from_star = _kl(star.probs, log_star - log_rho, missed)
        kl_to_reference = _kl(rho, log_rho, outside)
        kl_from_reference = _kl(prior, -log_rho, missed)
        kl_excess = -(rho * log_star).sum(-1)
        shortfall = ((star.probs * r).sum(-1) - star.cost) - ((rho * r).sum(-1) - kl_to_reference)
    achieved = (rho * r).sum(-1)
    barycentre, induced = prior @ frozen, rho @ frozen
    log_induced: Any = b * _log_quotient(induced, own_frozen, has_induced & has_own)
    uncovered = has_induced & ~has_own

    errors: dict[str, Any] = {name: zero for name in Solution._fields if name.endswith("_error")}
    fields: dict[str, Any] = {
        "p": p,
        "beta": _scalar(b),
        "lam": _scalar(t),
        "rewrite_reward": top[:, None] + r,
        "rho_star": star.probs,
        "pi_star": model.probs,
        "log_z": top / t + star.log_z,
        "log_z_star": model.log_z,
        "value": top + t * star.log_z,
        "optimum": top + optimum,
        "original": top + own_r,
        "reference": top + reference,
        "achieved": top + achieved,
        "gap": optimum - achieved,
        "delta1": optimum - own_r,
        "delta2": own_r - achieved,
        "shift": own_r - reference,
        "ceiling": optimum - best,
        "value_gap": optimum - t * star.log_z,
        "own_span": own_span,
        "own_rise": rise,
        "own_fall": fall,
        "tv_model": _tv(model.probs, own_frozen),
        "overlap_model": np.frompyfunc(Ball.min, 2, 1)(model.probs, own_frozen).sum(-1),
        "tv_shift": (prior * tv_rows).sum(-1),
        "tv_barycentre": _tv(own_frozen, barycentre),
        "tv_induced": _tv(model.probs, induced),
        "tv_prompter": _tv(rho, prior),
        "law_model": _wasserstein(model.probs - own_frozen, order, steps),
        "law_shift": _wasserstein(own_frozen - barycentre, order, steps),
        "law_induced": _wasserstein(model.probs - induced, order, steps),
        "model_kl": model.cost,
        "model_jeffreys": model.cost + model.gain,
        "prompter_kl": star.cost,
        "prompter_jeffreys": star.cost + star.gain,
        "prompter_gain": star.gain,
        "induced_to_star": _kl(induced, log_induced - log_model, uncovered),
        "induced_to_model": _kl(induced, log_induced, uncovered),
        "kl_to_star": kl_to_star,
        "kl_from_star": kl_from_star,
        "kl_to_reference": kl_to_reference,
        "kl_from_reference": kl_from_reference,
        "kl_excess": kl_excess,
        "shortfall": shortfall,
        "span": -low,
        "reward_max": _scalar(max(reward.flat)),
        "reward_min": _scalar(min(reward.flat)),
        "is_star": np.bool_(prompter is None),
        "supported": ~np.any(has_rho & ~has_prior),
        "covered": ~np.any(uncovered & has_p[:, None]),
        "eps": _scalar(0),
    }
    return Solution(**fields, **errors)


def _reachable(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The support of the product of two non-negative matrices with these supports."""
    return left.astype(int) @ right.astype(int) > 0


def _over(extreme: Callable[..., Any], values: np.ndarray, on: np.ndarray) -> np.ndarray:
    """The largest or least of the rationals `values` per row, where `on`."""
    return np.array([extreme(row[keep]) for row, keep in zip(values, on, strict=True)], dtype=object)


def _log_quotient(p: np.ndarray, q: np.ndarray, where: np.ndarray) -> np.ndarray:
    """log p/q `where` both are positive, 0 elsewhere."""
    return np.log(_where(where, p, Ball(1)) / _where(where, q, Ball(1)))


def _kl(p: np.ndarray, log_ratio: np.ndarray, infinite: np.ndarray) -> np.ndarray:
    """Σ p·log(p/q) per row, infinite where a row has an entry with q = 0 < p."""
    return _where(infinite.any(-1), Ball(math.inf), (p * log_ratio).sum(-1))


def _tv(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.abs(p - q).sum(-1) / 2


def _wasserstein(apart: np.ndarray, order: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Σ |running sum of `apart`| × step, rows [X, Y] of differences of laws taken in the `order` of
    rewards."""
    sums = np.add.accumulate(np.take_along_axis(apart, order, -1)[:, :-1], axis=-1)
    return (np.abs(sums) * steps).sum(-1) if steps.shape[-1] else np.full(len(order), Ball(0), dtype=object)


def _scalar(number: Any) -> np.ndarray:
    array = np.empty((), dtype=object)
    array[()] = Ball(number)
    return array
