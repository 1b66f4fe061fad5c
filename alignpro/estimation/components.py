"""Two-way variance components of R(x, s), and what they say of reading x or not."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.estimation.intervals import LEAST_PROMPTS, Estimate
from alignpro.estimation.means import limits
from alignpro.estimation.paired import Arm
from alignpro.rollouts import Rollouts

_GROUPS = 60
_NUMBERS = 2**18


@dataclass(frozen=True)
class Components:
    """Variance of R(x, s), x ~ P and s ~ ρ_sft, answers' noise taken out; reward units squared, unbiased."""

    prompts: Estimate
    """Var E[R|x]: what no choice of a strategy changes."""
    strategies: Estimate
    """Var E[R|s]: what one strategy for all prompts acts on."""
    interaction: Estimate
    """The rest: what only a prompter that reads x acts on."""


@dataclass(frozen=True)
class PooledAt:
    """Optimal objectives F = J − λ KL less E_ρ_sft R at one λ, in reward units, were effects normal."""

    lam: float
    one: Estimate
    """F(q*) of the best prompter that ignores x."""
    read: Estimate
    """F(ρ*) of the best prompter that reads x."""
    price: Estimate
    """F(ρ*) − F(q*), the price of not reading x."""


class _Cells:
    """Draws [D] of shared strategies, with sums of their answers about the grand mean."""

    def __init__(self, rollouts: Rollouts, sft: Arm, shared: np.ndarray) -> None:
        assert rollouts.strategy is not None
        strategy = rollouts.strategy[sft.index[sft.starts]]
        prompt = np.repeat(np.arange(len(sft.draws)), sft.draws)
        keep = np.isin(strategy, shared)
        keep = keep & (np.bincount(prompt[keep], minlength=len(sft.draws)) > 1)[prompt]
        r = sft.reward - sft.reward.mean()
        total, square = (np.add.reduceat(v, sft.starts)[keep] for v in (r, r * r))
        answers = sft.answers[keep]
        self.mean = total / answers
        self.pair = (total**2 - square) / (answers * (answers - 1))  # unbiased for R²
        _, self.prompt = np.unique(prompt[keep], return_inverse=True)
        _, self.strategy = np.unique(strategy[keep], return_inverse=True)
        self.n = int(self.prompt.max(initial=-1)) + 1
        cells = np.stack([self.strategy, self.prompt])
        (self.of, _), self.cell = np.unique(cells, axis=1, return_inverse=True)
        self.cell = self.cell.ravel()
        self.shares = np.bincount(self.strategy) / max(len(self.strategy), 1)

    def moments(self, used: np.ndarray) -> np.ndarray:
        """Var E[R|x], Var E[R|s] and the interaction, from the prompts `used` [n] (truth values)."""
        d = used[self.prompt]
        at = self.prompt[d]
        draws = np.bincount(at, minlength=self.n)
        w = 1.0 / draws[at]
        y, k = self.mean[d], draws[used]
        by = np.bincount(at, y, minlength=self.n)[used]
        squares = np.bincount(at, y * y, minlength=self.n)[used]
        n = len(k)
        whole = (w * self.pair[d]).sum() / n  # E R²: two answers to one draw
        prompts = ((by**2 - squares) / (k * (k - 1.0))).mean()  # E (E[R|x])²: two draws of one prompt
        level = by / k
        mean = (level.sum() ** 2 - (level**2).sum()) / (n * (n - 1.0))  # (E R)²: two prompts
        cell, size = self.cell[d], len(self.of)
        sums, sizes = (np.bincount(cell, v, minlength=size) for v in (w * y, w))
        total, total_size = (np.bincount(self.of, v) for v in (sums, sizes))
        crossed, pairs = (
            np.square(a) - np.bincount(self.of, b * b)
            for a, b in ((total, sums), (total_size, sizes))
        )  # fmt: skip
        met = pairs > 1e-12
        strategies = (total_size[met] * crossed[met] / pairs[met]).sum() / total_size[met].sum()
        return np.array([prompts - mean, strategies - mean, whole - prompts - strategies + mean])


def normal_value(variances: Sequence[float], shares: np.ndarray, lam: float) -> np.ndarray:
    """E λ log Σ_s ρ(s) e^{√v g_s/λ} of independent standard normal g, for each variance v; reward units.

    It is the value of tilting strategies with normal effects of variance v, that have the shares `shares`
    under ρ_sft: v/(2λ) for large λ, √v times the mean of the largest effect for small. Monte Carlo with the
    same effects for all v, a fixed seed, and each effect with both signs.
    """
    shares = np.sort(shares[shares > 0])[::-1]
    g = np.random.default_rng(0).standard_normal((max(16, _NUMBERS // (2 * len(shares))), len(shares)))
    out = []
    for v in variances:
        if v <= 0:
            out.append(0.0)  # where a sum of shares would leave its rounding
            continue
        energy = np.sqrt(v) / lam * np.concatenate([g, -g])
        top = energy.max(-1, keepdims=True)
        out.append(lam * float((np.log(np.exp(energy - top) @ shares) + top[:, 0]).mean()))
    return np.array(out)


def components(
    rollouts: Rollouts, sft: Arm, shared: np.ndarray, lams: Sequence[float], level: float
) -> tuple[Components | None, tuple[PooledAt, ...]]:
    """Split the variance of R over draws of the strategies `shared`, and value strategies at each λ.

    Intervals are those of a mean (`means.limits`) of jackknife pseudo-values of groups of prompts; those of
    values are the range over limits that cover both variances jointly.
    """
    cells = _Cells(rollouts, sft, shared)
    if cells.n < LEAST_PROMPTS:
        return None, ()
    group = np.random.default_rng([0, cells.n]).permutation(cells.n) % min(cells.n, _GROUPS)
    count = int(group.max()) + 1
    whole = cells.moments(np.ones(cells.n, bool))
    left = np.stack([cells.moments(group != g) for g in range(count)], -1)
    values, free = count * whole[:, None] - (count - 1) * left, np.full(3, np.inf)
    _, lo, hi, _ = limits(values, -free, free, level)
    square = 0.25 * (rollouts.high - rollouts.low) ** 2
    n = len(sft.index)

    def told(value: float, low: float, high: float, method: str, bias: str) -> Estimate:
        ends = min(low, value), max(high, value)
        return Estimate(value, *ends, level, n, cells.n, method, bias)  # type: ignore[arg-type]

    ways = "pairs of answers, of draws and of prompts; limits over jackknifed groups of prompts"
    split = Components(
        *(
            told(float(v), max(float(a), -square), min(float(b), square), ways, "none")
            for v, a, b in zip(whole, lo, hi, strict=True)
        )
    )
    joint = limits(values[1:], -free[1:], free[1:], level, joint=True)
    (b_lo, i_lo), (b_hi, i_hi) = (np.clip(end, 0.0, square) for end in (joint.lo, joint.hi))
    b, i = np.clip(whole[1:], 0.0, square)
    way = "normal effects of the estimated variances; range over their joint limits"
    at = []
    for lam in lams:
        f = normal_value((b, b_lo, b_hi, b + i, b_lo + i_lo, b_hi + i_hi, b_lo + i_hi, b_hi + i_lo),
                         cells.shares, lam)  # fmt: skip
        at.append(
            PooledAt(
                lam,
                told(f[0], f[1], f[2], way, "unknown"),
                told(f[3], f[4], f[5], way, "unknown"),
                told(f[3] - f[0], f[7] - f[2], f[6] - f[1], way, "unknown"),
            )
        )
    return split, tuple(at)
