"""Statistics of one prompt's samples, for many prompts at once: arrays [..., m] or [..., K, A] in, [...] out.

K counts draws of a rewrite, A answers to each, m answers to the prompt itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray]
_GROUPS = 16


class Tilt(NamedTuple):
    """Self-normalised reweighting of m samples by w_j = e^{r_j/t}/mean(e^{r/t}): π* from π_F, ρ* from ρ_sft.

    With exact rewards, as functions of m independent samples:

    value is biased down: E log(mean g) ≤ log E g (Jensen, g = e^{r/t}).
    mean is biased down: E[Σ g r/Σ g] = E_tilt[r h(g)] with h(g) = E[m E(g)/(g + the m − 1 other g)], by
    exchangeability. h falls in g, hence in r, and E_tilt h = 1 since weights sum to 1; so the bias is
    Cov_tilt(r, h) ≤ 0 (Chebyshev's association inequality).
    tv may err either way.
    """

    value: np.ndarray
    """t log mean e^{r/t}, in reward units."""
    mean: np.ndarray
    """Mean reward under the tilted samples."""
    tv: np.ndarray
    """TV(tilt, base) = mean max(0, 1 − w)."""
    ess: np.ndarray
    """Effective number of samples (Σw)²/Σw², from 1 to m."""


def tilt(rewards: np.ndarray, temperature: float) -> Tilt:
    """Reweight `rewards` [..., m] as they are, without reducing the bias."""
    top = rewards.max(-1, keepdims=True)
    below = rewards - top
    g = np.exp(below / temperature)
    mean = g.mean(-1)
    w = g / mean[..., None]
    return Tilt(
        value=top[..., 0] + temperature * np.log(mean),
        mean=top[..., 0] + (w * below).mean(-1),
        tv=np.maximum(0.0, 1.0 - w).mean(-1),
        ess=rewards.shape[-1] / np.square(w).mean(-1),
    )


def jackknife(statistic: Statistic, samples: np.ndarray, axis: int = -1, spent: int = 0) -> np.ndarray:
    """Free `statistic(samples)` of its bias of order 1/m, m the size of `axis`, by leaving groups out.

    With bias c/m + O(1/m²), (1 + a) T − a · mean over groups of T without them has bias O(1/m²) when
    (1 + a)/m = a · mean 1/(m − size of the group). Up to 16 groups; the classic jackknife where m ≤ 16.
    `spent` samples are set aside by the statistic, so that its bias is c/(m − spent).
    """
    m = samples.shape[axis]
    if m < 2 + spent:
        raise ValueError("the jackknife needs two samples")
    groups = np.array_split(np.arange(m), min(m, _GROUPS))
    left = [statistic(np.delete(samples, group, axis)) for group in groups]
    whole = 1.0 / (m - spent)
    a = whole / (np.mean([1.0 / (m - spent - len(group)) for group in groups]) - whole)
    return (1.0 + a) * statistic(samples) - a * np.mean(left, axis=0)


def model_tilt(rewards: np.ndarray, beta: float) -> np.ndarray:
    """Value, mean and tv of `Tilt`, [3, ...], for answers y ~ π_F(·|x) [..., m], jackknifed.

    The bias that is left is of second order in 1/m, of either sign.
    """
    return jackknife(lambda r: np.stack(tilt(r, beta)[:3]), rewards)


class PrompterTilt(NamedTuple):
    """ρ* ∝ ρ_sft e^{R/λ}, seen through A ≥ 2 answers to each of K ≥ 2 draws of ρ_sft; [...] each."""

    value: np.ndarray
    """λ log Z(x) = λ ∫₀^{1/λ} E_ρ*(s) R ds, ρ*(s) ∝ ρ_sft e^{sR}: `mean`, along the way from s = 0."""
    mean: np.ndarray
    """E_ρ* R(x,·), the expected reward of ρ*."""
    lower: np.ndarray
    """Biased down for λ log Z (so for E_ρ* R too), whatever the noise and however few the draws."""
    gain: np.ndarray
    """`lower` less the mean of the answers that it values: biased down for λ log Z − E_ρ_sft R."""
    ess: np.ndarray
    """Effective number of draws behind `mean`, from 1 to K."""
    noise: np.ndarray
    """Variance of the log-weights that is noise of answers, E Var(r|x′)/((A − 1) λ²)."""


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(6)
_NODES, _WEIGHTS = (_NODES + 1.0) / 2.0, _WEIGHTS / 2.0


def _softmax(energy: np.ndarray) -> np.ndarray:
    # Not SciPy's: importing it takes longer than most estimates.
    g = np.exp(energy - energy.max(-1, keepdims=True))
    return g / g.sum(-1, keepdims=True)


def _others(rewards: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean of a draw's other answers, and of its own, for each answer (or fold of 16); [..., K] both."""
    total, answers = rewards.sum(-1), rewards.shape[-1]
    out = []
    for fold in np.array_split(np.arange(answers), min(answers, _GROUPS)):
        own = rewards[..., fold].sum(-1)
        out.append(((total - own) / (answers - len(fold)), own / len(fold)))
    return out


def prompter_tilt(rewards: np.ndarray, lam: float, factor: float | None = None) -> PrompterTilt:
    """Value ρ* by cross-fitting over answers: `rewards` [..., n, K, A], n prompts, A and K ≥ 2.

    Weights come from all answers of a draw but one, the value from that one, so that a lucky answer cannot
    both raise its weight and be counted. Noise alike for all rewrites cancels from the weights, as then
    E[e^{R̂/λ}|x′] ∝ e^{R/λ}; unlike noise leaves an error of the order of `noise`, which falls as 1/(A − 1).
    `value` and `mean` are jackknifed over draws and, with 3 answers or more, over answers.

    About `lower`: with weights w that depend on the other answers alone, E[Σ w_k r_k − λ KL(w‖uniform)] is at
    most E λ log mean_k e^{R_k/λ} (the answers are unbiased for R given the draws; Gibbs' variational
    principle), and that at most λ log Z (Jensen). The best such w tilts by the mean of R given what was seen,
    which is taken as R̂ shrunk towards the prompt's mean, by a factor from the other prompts, or by `factor`.
    """
    draws, answers = rewards.shape[-2:]

    def crossed(r: np.ndarray) -> np.ndarray:
        value, mean = np.zeros(r.shape[:-2]), np.zeros(r.shape[:-2])
        folds = _others(r)
        for seen, own in folds:
            mean += (_softmax(seen / lam) * own).sum(-1)
            for node, weight in zip(_NODES, _WEIGHTS, strict=True):
                value += weight * (_softmax(seen * (node / lam)) * own).sum(-1)
        return np.stack([value, mean]) / len(folds)

    def over_draws(r: np.ndarray) -> np.ndarray:
        return jackknife(crossed, r, axis=-2)

    spent = int(answers <= _GROUPS)  # by cross-fitting; folds of a sixteenth keep the order 1/A
    value, mean = over_draws(rewards) if answers < 3 else jackknife(over_draws, rewards, spent=spent)
    within, between = variance_split(rewards)
    elsewhere = [v.sum(-1, keepdims=True) - v for v in (within / (answers - 1), between)]
    signal = np.maximum(elsewhere[1], 0.0)
    shrink = signal / np.maximum(signal + elsewhere[0], np.finfo(float).tiny)
    if factor is not None:
        shrink = np.full(shrink.shape, factor)
    lower, gain, ess = (np.zeros(value.shape) for _ in range(3))
    folds = _others(rewards)
    for seen, own in folds:
        w = _softmax(shrink[..., None] * seen / lam)
        entropy = -(w * np.log(np.where(w > 0, w, 1.0))).sum(-1)
        price = lam * (np.log(draws) - entropy)
        lower += (w * own).sum(-1) - price
        gain += ((w - 1.0 / draws) * own).sum(-1) - price
        ess += 1.0 / np.square(_softmax(seen / lam)).sum(-1)
    return PrompterTilt(
        value=value,
        mean=mean,
        lower=lower / len(folds),
        gain=gain / len(folds),
        ess=ess / len(folds),
        noise=within / ((answers - 1) * lam**2),
    )


def noisy_value(rewards: np.ndarray, lam: float) -> np.ndarray:
    """λ log Z with R̂ in R's place, jackknifed over draws, and its effective draws; [..., K, A] to [2, ...].

    It is biased up, to second order in 1/K: E[e^{R̂/λ}|x′] ≥ e^{R/λ} (Jensen), so λ log E e^{R̂/λ} ≥ λ log Z.
    """
    means = rewards.mean(-1)
    return np.stack([jackknife(lambda r: tilt(r, lam).value, means), tilt(means, lam).ess])


def best_of(rewards: np.ndarray, n: int) -> np.ndarray:
    """E R(best of n draws), best by all answers but one and valued by that one; rewards [..., K, A], n ≤ K.

    A U-statistic over all n-subsets of the K draws: unbiased for choosing by A − 1 answers, so biased down
    for choosing by R itself, which no other choice can beat. Tied draws share their chances.
    """
    draws, answers = rewards.shape[-2:]
    rank = np.arange(draws)
    # C(i, n − 1)/C(K, n): the chance that the draw of rank i from below is the best of n.
    log = np.cumsum(np.log(np.maximum(np.concatenate([[1.0], rank[1:]]), 1.0)))  # log i!

    def choose(top: np.ndarray, below: int) -> np.ndarray:
        fits = top >= below
        safe = np.where(fits, top, below)
        return np.where(fits, np.exp(log[safe] - log[below] - log[safe - below]), 0.0)

    chance = choose(rank, n - 1)
    chance = chance / chance.sum()
    total = rewards.sum(-1)
    out = np.zeros(rewards.shape[:-2])
    for a in range(answers):
        by = total - rewards[..., a]
        order = np.argsort(by, -1, kind="stable")
        sorted_by = np.take_along_axis(by, order, -1)
        value = np.take_along_axis(rewards[..., a], order, -1)
        out += (_shared(chance, sorted_by) * value).sum(-1)
    return out / answers


def _shared(chance: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Average `chance` [K], by rank, within runs of equal (to rounding) sorted `keys` [..., K]."""
    gap = np.abs(np.diff(keys, axis=-1)) > 1e-12 * (1.0 + np.abs(keys[..., 1:]))
    run = np.concatenate([np.zeros((*keys.shape[:-1], 1), int), np.cumsum(gap, -1)], -1)
    flat = run.reshape(-1, run.shape[-1]) + run.shape[-1] * np.arange(run[..., 0].size)[:, None]
    size = flat.size
    total = np.bincount(flat.ravel(), np.broadcast_to(chance, flat.shape).ravel(), size)
    count = np.bincount(flat.ravel(), minlength=size)
    return (total / np.maximum(count, 1))[flat].reshape(run.shape)


def variance_split(rewards: np.ndarray) -> np.ndarray:
    """E Var(r|x′) and Var E(r|x′), unbiased, from answers to draws [..., K, A], K and A ≥ 2; [2, ...].

    The variance of the K means overstates Var(R) by E Var(r|x′)/A, which is subtracted (so the second may
    come out negative).
    """
    within = rewards.var(-1, ddof=1).mean(-1)
    between = rewards.mean(-1).var(-1, ddof=1) - within / rewards.shape[-1]
    return np.stack([within, between])


def shortfall_of_ratio(logp: np.ndarray, logq: np.ndarray) -> np.ndarray:
    """Compute max(0, 1 − q(y)/p(y)), elementwise, in [0, 1]: its mean over y ~ p is d_TV(p, q), exactly.

    E_p (1 − q/p)⁺ = Σ (p − q)⁺ = d_TV(p, q). Log-probabilities in nats; q may be −inf where p is not.
    """
    return -np.expm1(np.minimum(logq - logp, 0.0))


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of all pairs (ours [a], theirs [b]) in which ours is the greater, ties a half. Unbiased."""
    theirs = np.sort(theirs)
    below = np.searchsorted(theirs, ours, "left") + np.searchsorted(theirs, ours, "right")
    return float(below.mean() / (2 * len(theirs)))
