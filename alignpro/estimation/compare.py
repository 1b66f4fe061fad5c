"""`compare`: the mean reward, variance and win rate of two or more arms, paired over prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.estimation.intervals import Estimate, check_level
from alignpro.estimation.pac_bayes import PacBayes, pac_bayes
from alignpro.estimation.paired import Arm, Term, by_arm, estimates
from alignpro.estimation.samples import win_rate
from alignpro.estimation.terms import Terms
from alignpro.rollouts import Rollouts
from alignpro.shown import Shown


@dataclass(frozen=True)
class Against:
    """One arm against the baseline, all prompts paired."""

    mean: Estimate
    """Difference of mean rewards, reward units."""
    variance: Estimate
    """Difference of variances of the reward, over prompts and samples; reward units squared."""
    win_rate: Estimate
    """Probability that its answer earns more than the baseline's to the same prompt, ties a half."""
    parts: Mapping[str, Estimate]
    """Differences of the means of the reward's parts by name, which add up to `mean`."""

    @property
    def finding(self) -> str:
        """How its mean reward stands to the baseline's, as a verb: earns more than, say."""
        lo, hi = self.mean.lo, self.mean.hi
        return "earns more than" if lo > 0 else "earns less than" if hi < 0 else "cannot be told from"


@dataclass(frozen=True, repr=False)
class Comparison(Shown):
    """Arms beside a baseline, the first arm named."""

    level: float
    n_prompts: int
    baseline: str
    mean: Mapping[str, Estimate]
    """J, the mean reward, of every arm."""
    variance: Mapping[str, Estimate]
    """Var(r) of every arm, over prompts and samples; reward units squared."""
    parts: Mapping[str, Mapping[str, Estimate]]
    """By arm, the mean of each part of the reward by name, which add up to `mean`; empty without parts."""
    against: Mapping[str, Against]
    """Every other arm against the baseline. Each of the kinds covers jointly over the arms (and parts)."""
    prompters: Mapping[str, str]
    """Names of the prompters, by arm; several seeds' separated by commas."""
    guaranteed: PacBayes
    """Lower limits of the mean reward of the arm that looks best, and of a mixture of arms, with weights in
    the order of `mean`. They are right at every number of prompts, although both were chosen by looking."""
    warnings: tuple[str, ...]


def compare(rollouts: Rollouts, arms: Sequence[str], level: float = 0.95) -> Comparison:
    """Compare mean reward, variance and win rate of `arms[1:]` with those of `arms[0]`, paired by prompt."""
    level = check_level(level)
    for i, name in enumerate(arms):
        if name not in rollouts.arms:
            raise AlignProError(f"--arms {name}: is no arm here; give some of {', '.join(rollouts.arms)}")
        if name in arms[:i]:
            raise AlignProError(f"--arms {name}: is named twice; name each arm once")
    if len(arms) < 2:
        raise AlignProError(f"--arms {' '.join(arms)}: compare at least two of {', '.join(rollouts.arms)}")
    terms = Terms(rollouts, 1.0, 1.0)
    square = 0.25 * terms.width**2

    def variance(name: str) -> Term:
        values = _variances(terms.j(name).values, terms.arm(name).mean(np.square(terms.arm(name).reward)))
        method = "total variance, jackknifed over prompts"
        # A pseudo-value is, to order 1/n, the mean of (r - E r)² over the prompt's answers.
        reach = 0.0, terms.width**2
        return Term(values, 0.0, square, frozenset({name}), "none", method, reach=reach)

    baseline, *others = arms

    def wins(name: str) -> Term:
        method = "share of pairs won, ties a half"
        values = _wins(terms.arm(name), terms.arm(baseline))
        return Term(values, 0.0, 1.0, frozenset({name, baseline}), "none", method, bounded=True)

    parts = terms.parts(arms)
    kinds: dict[str, dict[Any, tuple[Term, Term]]] = {
        "mean": {name: (terms.j(name), terms.j(baseline)) for name in others},
        "variance": {name: (variance(name), variance(baseline)) for name in others},
        "parts": {key: (of, parts[baseline, key[1]]) for key, of in parts.items() if key[0] != baseline},
    }

    def differences(kind: str) -> dict[Any, Estimate]:
        sides = kinds[kind]
        rows = {key: ours - theirs for key, (ours, theirs) in sides.items()}
        joint = len(others) > 1 or kind == "parts"
        return estimates(rows, rollouts, level, simultaneous=joint, sides=sides)

    means, variances, of_parts = differences("mean"), differences("variance"), by_arm(differences("parts"))
    won = {name: wins(name) for name in others}
    win_rates = estimates(won, rollouts, level, simultaneous=len(others) > 1)
    return Comparison(
        level=level,
        n_prompts=len(rollouts.prompt_ids),
        baseline=baseline,
        mean=estimates({name: terms.j(name) for name in arms}, rollouts, level),
        variance=estimates({name: variance(name) for name in arms}, rollouts, level),
        parts=by_arm(estimates(parts, rollouts, level)),
        against={
            name: Against(means[name], variances[name], win_rates[name], of_parts.get(name, {}))
            for name in others
        },
        prompters={name: rollouts.prompter(name) for name in arms},
        guaranteed=pac_bayes(
            np.stack([terms.j(name).values for name in arms], 1), terms.low, terms.high, level
        ),
        warnings=tuple(terms.warnings.values()),
    )


def _variances(mean: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Pseudo-values [n] of V = E r² − (E r)², whose mean is unbiased for it.

    With q_i, m_i a prompt's means of r² and r: V = q̄ − m̄² is biased by −Var(m̄) alone, of order 1/n, which
    the jackknife removes exactly; pseudo-values n V − (n − 1) V₍₋ᵢ₎ take the interval of a mean.
    """
    n = len(mean)
    if n < 2:
        return square - np.square(mean)
    whole = square.mean() - mean.mean() ** 2
    without = (square.sum() - square) / (n - 1) - np.square((mean.sum() - mean) / (n - 1))
    return n * whole - (n - 1) * without


def _wins(ours: Arm, theirs: Arm) -> np.ndarray:
    def by_prompt(arm: Arm) -> list[np.ndarray]:
        prompt = arm.rollouts.prompt[arm.index]
        return np.split(arm.reward, np.flatnonzero(np.diff(prompt)) + 1)

    pairs = zip(by_prompt(ours), by_prompt(theirs), strict=True)
    return np.array([win_rate(mine, other) for mine, other in pairs])
