"""How many calls the resampled prompter needs, and what is out of reach with fewer: closed forms of both.

n rewrites are drawn from ρ_sft, A answers to each give a mean reward R̂, and one rewrite is kept with
chances in proportion to e^{R̂/λ}: n·A calls of the frozen model for each prompt. Proofs:
`docs/limits.md`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from alignpro.errors import AlignProError, as_number, check_temperature

MOST = 2**50
"""Calls beyond which a number is not looked for."""


@dataclass(frozen=True)
class Plan:
    """Numbers of draws and answers that suffice, for each prompt."""

    draws: int
    """n, rewrites drawn from ρ_sft."""
    answers: int
    """A, answers of the frozen model to each."""
    calls: int
    """n·A."""
    loss: float
    """Bound on what the prompter so made stays below ρ* in mean reward, reward units."""
    noise: float
    """The part of `loss` that A answers cost however many draws, reward units."""


def check_eps(eps: object) -> float:
    """Give `eps` as a float, or raise AlignProError where it is not positive and finite."""
    if not 0 < (number := as_number("eps", eps)) < math.inf:
        raise AlignProError(
            f"eps {eps}: must be a positive finite number of reward units; give one such as 0.05"
        )
    return number


def fewest(falling: Callable[[int], float], target: float) -> int | None:
    """Find the least whole n ≥ 1 at which a falling function is at most `target`; None beyond `MOST`."""
    if falling(MOST) > target:
        return None
    high = 1
    while falling(high) > target:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if falling(middle) <= target else (middle, high)
    return high


def cheapest(
    eps: float, noise: Callable[[int], float], sampling: Callable[[int, int], float], most: int = 2**20
) -> Plan | None:
    """Find the plan of fewest calls with noise(A) + sampling(A, n) ≤ eps, over A = 1, 2, 4, … `most`.

    `sampling` falls in n. None where no such A is enough.
    """
    best: Plan | None = None
    a = 1
    while a <= most and (best is None or a < best.calls):
        lost = noise(a)
        n = fewest(lambda n, a=a: sampling(a, n), eps - lost) if lost < eps else None  # type: ignore[misc]
        if n is not None and (best is None or n * a < best.calls):
            best = Plan(n, a, n * a, lost + sampling(a, n), lost)
        a *= 2
    return best


def worst_share(width: float, lam: float, n: float) -> float:
    """tanh(¼ log(1 + (e^{width/λ} − 1)/n)) ≥ TV(ρ*, ρ_n), whatever rewards of that width are."""
    z = width / lam
    grown = math.log1p(math.expm1(z) / n) if z < 30 else z + math.log1p((n - 1) * math.exp(-z)) - math.log(n)
    return math.tanh(0.25 * grown)


def worst_rise(width: float, temperature: float) -> float:
    """t(κ − 1 − log κ), κ = u/(1 − e^{−u}), u = width/t: at most width²/(8t), and at most the width.

    The most that t log E e^{r/t} exceeds E r for rewards of that width, and the most F that an error of
    that width in the rewards of a tilt at t costs. For u < 0.02 the first bound is given, which exceeds
    it by 10⁻⁵.
    """
    u = width / temperature
    if u < 0.02:
        return width * u / 8.0
    log_kappa = math.log(u) - math.log(-math.expm1(-u))
    return min(temperature * (math.expm1(log_kappa) - log_kappa), width)


def noise_share(width: float, lam: float, answers: int) -> float:
    """tanh(worst_rise(width, Aλ)/(4λ)) ≥ TV(ρ*, ρ_A), ρ_A the tilt by mean rewards of A answers."""
    return math.tanh(worst_rise(width, answers * lam) / (4.0 * lam))


def calls_sure(width: float, lam: float, eps: float) -> Plan | None:
    """Find calls that bring mean reward within eps of ρ*, whatever the rewards of that width are.

    width·[`noise_share` + `worst_share`] ≤ eps. None beyond `MOST` draws. Raises AlignProError for a bad
    λ or eps.
    """
    lam, eps = check_temperature("lam", lam), check_eps(eps)
    return cheapest(
        eps,
        lambda a: width * noise_share(width, lam, a),
        lambda _, n: width * worst_share(width, lam, n),
        most=2**40,
    )


def calls_to_tell(mass: float, miss: float, false_alarm: float = 0.0) -> float:
    """N = log((1 − a)/b)/(−log(1 − m)): with fewer draws no test tells a good rewrite of mass m from none.

    A test that says "there is one" where there is none with probability at most a (`false_alarm`), and
    fails to say it where there is with at most b (`miss`), exists exactly for N draws or more. To first
    order in m, with a = 0, it is log(1/b)/m.

    Raises:
        AlignProError: a mass or a miss that is not between 0 and 1, or a false alarm that is not in [0, 1).
    """
    for name, value in (("mass", mass), ("miss", miss)):
        if not 0 < as_number(name, value) < 1:
            raise AlignProError(f"{name} {value}: must be between 0 and 1")
    if not 0 <= as_number("false_alarm", false_alarm) < 1:
        raise AlignProError(f"false_alarm {false_alarm}: must be at least 0 and below 1")
    return max(math.log((1.0 - false_alarm) / miss), 0.0) / -math.log1p(-mass)


def unreachable_loss(width: float, lam: float, calls: float) -> float:
    """Mean reward, against ρ*, that no method with N calls is sure of losing less of; reward units.

    sup over m of width·(1 − m)[(1 − m)^N − 1/(1 + m(e^{width/λ} − 1))]: a share m of very many rewrites
    is worth `width` more than the others, and nothing but a call tells which. At N = 0 it is
    width·tanh(width/4λ).
    """
    z = width / lam
    m = np.exp(np.linspace(-min(z, 700.0) - 10.0, 0.0, 4001)[:-1])
    # 1/(1 + m(e^z − 1)) with both sides times e^{−z}
    short = math.exp(-z) / (math.exp(-z) + m * -math.expm1(-z))
    found = (1.0 - m) * (np.exp(calls * np.log1p(-m)) - short)
    return max(width * float(found.max()), 0.0)


def calls_out_of_reach(width: float, lam: float, eps: float) -> int:
    """Find the largest N at which `unreachable_loss` exceeds eps: every method then loses more somewhere.

    0 where no number of calls is shown to be too few.
    """
    eps = check_eps(eps)
    if unreachable_loss(width, lam, 1) <= eps:
        return 0
    least = fewest(lambda n: unreachable_loss(width, lam, n), eps)
    return MOST if least is None else least - 1
