"""Populations on which intervals for means are hard to get right, each with its truth.

`GAINS` are rewards of an arm and of another on the same prompts, as `gain_over` takes them. `ROLLOUTS` are
small problems from which `simulate` draws rollouts; `truth` computes what `estimate`, `compare` and
`headroom` estimate of them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from alignpro.estimation.simulate import Size, simulate
from alignpro.rollouts import Rollouts

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


class Gains(NamedTuple):
    """Rewards in [0, 1] of one answer a prompt: `draw` gives [n]; the other arm's are 0.5 ± 0.1, normal."""

    draw: Draw
    mean: float
    ordinary: bool = False
    """Whether percentile-t covers there already: then widths are not to grow."""


def _lognormal(scale: float, shift: float) -> Draw:
    return lambda rng, size: (
        shift + (1.0 - shift) * np.minimum(np.exp(1.5 * rng.standard_normal(size)) / scale, 1.0)
    )


def _normal(rng: np.random.Generator, size: tuple[int, ...], sd: float = 0.1) -> np.ndarray:
    return np.clip(0.5 + sd * rng.standard_normal(size), 0.0, 1.0)


def _rare_step(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    return np.where(rng.random(size) < 0.05, 1.0, np.clip(0.3 + 0.05 * rng.standard_normal(size), 0, 1))


def _mean(draw: Draw) -> float:
    return float(draw(np.random.default_rng(99), (4_000_000,)).mean())


def gains() -> dict[str, Gains]:
    """The populations of single rewards; four means are those of 4 million draws (error below 1e-4)."""
    drawn: dict[str, Draw] = {
        "lognormal(1.5)/50": _lognormal(50.0, 0.0),
        "lognormal(1.5)/200": _lognormal(200.0, 0.0),
        "1 - lognormal(1.5)/50": lambda rng, size: 1.0 - _lognormal(50.0, 0.0)(rng, size),
        "0.05 at 1, others 0.3 +- 0.05": _rare_step,
    }
    exact: dict[str, tuple[Draw, float]] = {
        "Bernoulli(0.01)": (lambda rng, size: (rng.random(size) < 0.01).astype(float), 0.01),
        "Bernoulli(0.05)": (lambda rng, size: (rng.random(size) < 0.05).astype(float), 0.05),
        "Bernoulli(0.2)": (lambda rng, size: (rng.random(size) < 0.2).astype(float), 0.2),
        "Beta(0.05, 0.95)": (lambda rng, size: rng.beta(0.05, 0.95, size), 0.05),
        "uniform on 10%, others 0": (lambda rng, size: (rng.random(size) < 0.1) * rng.random(size), 0.05),
    }
    ordinary: dict[str, tuple[Draw, float]] = {
        "uniform": (lambda rng, size: rng.random(size), 0.5),
        "normal, sd 0.1": (_normal, 0.5),
        "Beta(0.5, 2)": (lambda rng, size: rng.beta(0.5, 2.0, size), 0.2),
    }
    return {
        **{name: Gains(draw, _mean(draw)) for name, draw in drawn.items()},
        **{name: Gains(draw, mean) for name, (draw, mean) in exact.items()},
        **{name: Gains(draw, mean, True) for name, (draw, mean) in ordinary.items()},
    }


class Problem(NamedTuple):
    """A problem on finite spaces, with the five arrays of `alignpro.theory.Instance`, and what is drawn."""

    p: np.ndarray
    prior: np.ndarray
    frozen: np.ndarray
    own: np.ndarray
    reward: np.ndarray
    beta: float = 0.1
    lam: float = 0.2
    size: Size = Size(60, 16, 8, 2)
    copied: bool = False
    """Whether all answers of a draw are the first one's text, as from a cache."""

    def halfway(self) -> np.ndarray:
        """The mean of ρ_sft and ρ*, as training might leave a prompter."""
        rho = self.prior * np.exp((self.reward @ self.frozen.T - self.reward.max()) / self.lam)
        return 0.5 * self.prior + 0.5 * rho / rho.sum(-1, keepdims=True)


def _alike(rewards: list[list[float]], chance: list[list[float]], **options) -> Problem:
    """Prompts of equal weight with `rewards` [X, Y], all given the same K rewrites with answers `chance`."""
    reward, frozen = np.array(rewards), np.array(chance)
    x, k = len(reward), len(frozen)
    return Problem(np.full(x, 1 / x), np.full((x, k), 1 / k), frozen, np.zeros(x, int), reward, **options)


def problems() -> dict[str, Problem]:
    """The populations of rollouts."""
    rng = np.random.default_rng(5)
    smooth = np.clip(0.5 + 0.1 * rng.standard_normal((20, 40)), 0.0, 1.0)
    spread = rng.dirichlet(np.ones(40), 6)
    carrying = np.zeros((10, 4))
    carrying[0] = (0.0, 0.3, 0.7, 1.0)
    mixed = rng.dirichlet(np.ones(4), 5)
    jackpot = smooth.copy()
    jackpot[:, 0] = 1.0
    rare = 0.99 * spread / spread[:, 1:].sum(-1, keepdims=True)
    rare[:, 0] = 0.01
    perfect = Problem(
        np.ones(1), np.array([[0.98, 0.02]]), np.eye(2), np.zeros(1, int), np.array([[0.0, 1.0]]),
        size=Size(8, 16, 8, 2),
    )  # fmt: skip
    even = _alike([[0.0, 1.0]], [[0.5, 0.5]] * 4, lam=0.1, size=Size(60, 16, 16, 4))
    return {
        "rewards of 1 in 1% of answers": _alike([[0.0, 1.0]], [[0.99, 0.01]] * 2),
        "the same in a quarter of the prompts": _alike([[0.0, 1.0]] + [[0.0, 0.0]] * 3, [[0.99, 0.01]] * 2),
        "10% of the prompts carry the reward": _alike(carrying.tolist(), mixed.tolist(), beta=0.3),
        "2% of the rewrites are perfect": perfect,
        "answers copied within a draw": even._replace(copied=True),
        "1% of the answers earn 1, others 0.5 +- 0.1": _alike(jackpot.tolist(), rare.tolist()),
        "one prompt in 20 is always solved": _alike([[1.0, 1.0]] + [[0.0, 0.0]] * 19, [[0.5, 0.5]] * 2),
        "rewards 0.5 +- 0.1": _alike(smooth.tolist(), spread.tolist(), beta=0.3, lam=0.3),
    }


def draw(problem: Problem, prompts: int, rng: np.random.Generator) -> Rollouts:
    """Rollouts of arms none, sft and trained (half-way to ρ*) for `prompts` prompts."""
    found = simulate(
        problem, rng, problem.size._replace(prompts=prompts), prompters={"trained": problem.halfway()},
        reward_range=(0.0, 1.0),
    )  # fmt: skip
    if not problem.copied:
        return found
    first = np.maximum.accumulate(np.where(found.answer == 0, np.arange(len(found)), 0))
    texts = np.stack([first, np.full(len(found), 400)], 1)
    none = dict.fromkeys(found.logps, np.full(len(found), np.nan))
    return replace(found, reward=found.reward[first], texts=texts, logps=none)


def truth(problem: Problem) -> dict[str, float]:
    """Exact values, by the names of `EstimateReport.quantities` and of what else is covered."""
    beta, lam, (p, prior, frozen, own, r) = problem.beta, problem.lam, problem[:5]
    width = 1.0
    mine = problem.halfway()
    means = r @ frozen.T
    f = frozen[own]
    star = prior * np.exp((means - 1.0) / lam)
    z = star.sum(-1)
    star = star / z[:, None]
    pi = f * np.exp((r - 1.0) / beta)
    z_star = pi.sum(-1)
    pi = pi / z_star[:, None]

    def e(values: np.ndarray) -> float:
        return float(p @ values)

    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a > 0, a * np.log(a / b), 0.0).sum(-1)

    tv = 0.5 * np.abs(pi - f).sum(-1)
    shift = (prior * 0.5 * np.abs(frozen - f[:, None]).sum(-1)).sum(-1)
    value, j_rho = e(1.0 + lam * np.log(z)), e((star * means).sum(-1))
    j_pi, j_none, j_sft = e((pi * r).sum(-1)), e((f * r).sum(-1)), e((prior * means).sum(-1))
    j_mine = e((mine * means).sum(-1))
    laws = (mine @ frozen, j_mine), (f, j_none)
    variances = [e((law * r**2).sum(-1)) - mean**2 for law, mean in laws]
    out = {
        "J(none)": j_none,
        "J(sft)": j_sft,
        "J(trained)": j_mine,
        "J(pi*)": j_pi,
        "beta log Z*": e(1.0 + beta * np.log(z_star)),
        "TV(pi*, pi_F)": e(tv),
        "beta KL(pi*||pi_F)": beta * e(kl(pi, f)),
        "TV(pi_F(.|x), pi_F(.|x'))": e(shift),
        "J(rho*)": j_rho,
        "lambda log Z": value,
        "lambda KL(rho*||rho_sft)": lam * e(kl(star, prior)),
        "lambda KL(trained||rho_sft)": lam * e(kl(mine, prior)),
        "lambda KL(trained||rho*)": lam * e(kl(mine, star)),
        "gap rho*": j_pi - j_rho,
        "gap trained": j_pi - j_mine,
        "difference": j_mine - j_none,
        "win rate": 0.5 + 0.5 * e(_ahead(mine @ frozen, f, r)),
        "variance trained": variances[0],
        "difference of variances": variances[0] - variances[1],
        "gain over sft": j_rho - j_sft,
        "gain over none": j_rho - j_none,
    }
    common = width * e(tv) - (j_pi - j_none) + value - j_sft
    slacks = {"span": width * e(shift) - (j_none - j_sft), "rewards_only": 0.0}
    return out | {f"slack {name}": common + more for name, more in slacks.items()}


def _ahead(ours: np.ndarray, theirs: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """P(r > r′) − P(r < r′) of answers from `ours` and `theirs` [X, Y], for each prompt."""
    sign = np.sign(reward[:, :, None] - reward[:, None, :])
    return np.einsum("xy,xyz,xz->x", ours, sign, theirs)
