"""How many draws and answers bring the resampled prompter near ρ* in mean reward, from rollouts of ρ_sft."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.calls import (
    MOST,
    Plan,
    calls_out_of_reach,
    calls_sure,
    cheapest,
    check_eps,
    fewest,
    noise_share,
    worst_share,
)
from alignpro.estimation.means import limits
from alignpro.estimation.paired import Arm
from alignpro.estimation.unseen import ceiling


@dataclass(frozen=True)
class CallsAt:
    """Calls of the frozen model, for each prompt, that resampling needs at one λ."""

    lam: float
    estimated: Plan | None
    """The fewest, were the draws and answers in the rollouts all there are: rarer rewrites are not
    counted, and noise in their rewards makes it too many rather than too few. None where no number of
    answers is enough."""
    limited: Plan | None
    """Calls that suffice with probability `level` at least, at the number of answers in the rollouts,
    whatever was not drawn; draws are a power of 2. None where that many answers leave too much noise."""
    sure: Plan | None
    """Calls that suffice whatever the rewards within their declared range are; None where beyond 10¹⁵."""
    out_of_reach: int
    """The largest number of calls with which every method loses more than eps on some prompts, with
    rewards in the declared range; 0 where none is shown to."""


@dataclass(frozen=True)
class Calls:
    """How many calls bring the resampled prompter within `eps` of ρ* in mean reward, over prompts."""

    eps: float
    """Reward units."""
    level: float
    """At which `limited` holds, for each λ."""
    at: tuple[CallsAt, ...]


def calls(arm: Arm, lams: Sequence[float], eps: float, level: float, low: float, high: float) -> Calls:
    """Find the calls needed at each λ, from the draws and answers of arm sft.

    Args:
        arm: two draws per prompt and two answers per draw at least.
        lams: λ > 0, reward units.
        eps: how far the mean reward may stay below that of ρ*, reward units.
        level: of the limit.
        low: the reward's declared low end.
        high: the reward's declared high end.

    Raises:
        AlignProError: eps is not positive and finite.
    """
    eps = check_eps(eps)
    return Calls(eps, level, tuple(_at(arm, lam, eps, level, low, high) for lam in lams))


def _at(arm: Arm, lam: float, eps: float, level: float, low: float, high: float) -> CallsAt:
    return CallsAt(
        lam,
        _estimated(arm, lam, eps),
        _limited(arm, lam, eps, level, low, high),
        calls_sure(high - low, lam, eps),
        calls_out_of_reach(high - low, lam, eps),
    )


def sampling_loss(rewards: np.ndarray, lam: float, n: int) -> np.ndarray:
    """E_ρ*[(R − min R)(w − 1)/(w + n − 1)], w = ρ*/ρ_sft, were draws [..., K, A] all rewrites; [...]."""
    means = rewards.mean(-1)
    above = means - means.min(-1, keepdims=True)
    w = np.exp((above - above.max(-1, keepdims=True)) / lam)
    w = w / w.mean(-1, keepdims=True)
    kept = w / (w + n - 1.0) if n > 1 else np.ones_like(w)
    return (kept * above * (w - 1.0)).mean(-1)


def noise_loss(rewards: np.ndarray, lam: float, answers: int) -> np.ndarray:
    """|E_ρ* R − E_ρA R|, were draws [..., K, A] and the answers to each all there are; [...].

    R_A − R is scaled by A/(A − 1): answers vary less about their own mean than about the true one.
    """
    means, seen, t = rewards.mean(-1), rewards.shape[-1], answers * lam
    top = rewards.max(-1)
    rise = top - means + t * np.log(np.exp((rewards - top[..., None]) / t).mean(-1))
    rise = rise * seen / (seen - 1.0)

    def mean(energy: np.ndarray) -> np.ndarray:
        g = np.exp((energy - energy.max(-1, keepdims=True)) / lam)
        return (g * means).sum(-1) / g.sum(-1)

    return np.abs(mean(means) - mean(means + rise))


def _estimated(arm: Arm, lam: float, eps: float) -> Plan | None:
    @functools.cache
    def noise(answers: int) -> float:
        return float(arm.per_prompt(lambda r: noise_loss(r, lam, answers)[None]).mean())

    @functools.cache
    def sampling(draws: int) -> float:
        return float(arm.per_prompt(lambda r: sampling_loss(r, lam, draws)[None]).mean())

    return cheapest(eps, noise, lambda _, n: sampling(n), most=2**16)


def _limited(arm: Arm, lam: float, eps: float, level: float, low: float, high: float) -> Plan | None:
    """Test draws from many to few, each at the full level, until one is not shown to suffice.

    With g = E e^{(R̂ − high)/λ} no weight exceeds 1/g, so TV(ρ_A, ρ_n) ≤ h(g) = (1 − g)/(1 + (n − 1) g),
    which is convex in g: its mean at unbiased estimates of g is no less. A fixed sequence of tests, each
    at level α and done only while all before succeeded, errs with probability α at most.
    """
    answers, width = int(arm.answers.min()), high - low
    noise = width * noise_share(width, lam, answers)
    if noise >= eps:
        return None
    (g,) = arm.per_prompt(lambda r: ceiling(r.mean(-1), lam, high)[None])
    enough = fewest(lambda n: width * worst_share(width, lam, n), eps - noise)  # whatever the rewards
    best, n = None, MOST if enough is None else 2 ** (math.ceil(math.log2(enough)) + 4)
    least = math.exp(-width / lam)  # of g
    while n >= 1:
        rows, end = ((1.0 - v) / (1.0 + (n - 1.0) * v) for v in (g, np.full(1, least)))
        most = limits(rows[None], np.zeros(1), end, 2.0 * level - 1.0, sure=True).hi[0]
        loss = noise + width * float(most)
        if loss > eps:
            break
        best, n = Plan(n, answers, n * answers, loss, noise), n // 2
    return best
