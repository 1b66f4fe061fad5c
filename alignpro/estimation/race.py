"""A race for the arm of largest mean reward, under a budget of answers, on the same prompts for all arms.

By halves (sequential halving, Karnin, Koren and Somekh, ICML 2013): all arms are asked on the same few
prompts, the lower half drops out, the others go on with new prompts, until one is left; every round costs
about the same. Besides, an arm leaves as soon as it is certainly not the best, and what that saves goes to
the rest.

Certainly: against "arm i is a best one" one bets, prompt by prompt, that whichever arm led before that prompt
earns more on it than i. If i is a best arm no such difference has a positive mean, however the leader was
chosen from the past, so the capital Π(1 + λ d_t) is a nonnegative supermartingale, also averaged over λ. It
exceeds 1/α at any time with probability at most α (Ville). One best arm is enough for the statement, so that
nothing is lost to the number of arms: with probability at least 1 − α it is never ruled out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.errors import AlignProError
from alignpro.estimation.intervals import Estimate, betting, check_level
from alignpro.estimation.means import WAYS, in_doubt, limits
from alignpro.estimation.pac_bayes import PacBayes, pac_bayes

Pull = Callable[[Sequence[int], range, int], np.ndarray]
"""Asks arms on prompts, by their numbers, for so many answers each: rewards [arms, prompts, answers]."""

BLOCK = 256
"""Answers that are asked for at once, at most, unless one prompt takes more."""
_BETS = np.array([0.03, 0.06, 0.12, 0.25, 0.5, 0.9])
"""Bets λ on a difference in [−1, 1], between which the capital is divided."""


@dataclass(frozen=True)
class Raced:
    """One arm after the race."""

    arm: int
    """Its number."""
    mean: Estimate
    """Mean reward over the prompts that it was asked on. The intervals of all arms cover jointly, whenever
    the race ended; the mean of an arm that did well is biased up, as far as it was chosen for it."""
    behind: float
    """How much less it earned than the winner on the same prompts, in reward units."""
    ruled_out: bool
    """Whether it is certainly not the best."""
    left: int | None
    """Answers that the race had taken when it dropped out; None for the winner."""


@dataclass(frozen=True)
class Moment:
    """The race after some of its answers."""

    calls: int
    """Answers so far."""
    means: Mapping[int, float]
    """Mean reward so far of each arm that was still in the race, by its number."""


@dataclass(frozen=True)
class Race:
    """The outcome of a race of arms."""

    ranked: tuple[Raced, ...]
    """All arms: the winner, then the others, the last to leave first."""
    track: tuple[Moment, ...]
    calls: int
    """Answers that were asked for."""
    budget: int
    """The most there could have been."""
    prompts: int
    """How many prompts were used."""
    level: float
    """How often the best arm is not ruled out."""
    guaranteed: PacBayes
    """Lower limits of the winner's mean reward, and of that of a mixture of the arms that were asked on all
    prompts, the first ones of `ranked`. They are right although the race chose both, and when to end."""

    @property
    def contenders(self) -> int:
        """How many arms are not ruled out; the best one is among them."""
        return sum(not raced.ruled_out for raced in self.ranked)

    @property
    def separated(self) -> bool:
        """Whether the winner is certainly the best."""
        return self.contenders == 1


def least_budget(arms: int, answers: int = 1) -> int:
    """Count the answers that a race takes at least: one prompt for each round, at the cost of the first."""
    return arms * answers * max(1, math.ceil(math.log2(arms)))


def _share(arms: int, answers: int, budget: int, prompts: int, fresh: bool = True) -> tuple[int, int]:
    """Plan the next round of `arms`: its prompts, and the answers to each.

    Rounds to come share the budget equally. Where that takes more prompts than there are, the later rounds,
    which have fewer arms, get more answers to each prompt instead; or, where another answer would not be
    `fresh`, the earlier rounds get what the later ones cannot use.
    """
    sizes = [arms]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    if not fresh:
        each = _each(sizes, budget / answers, prompts)
        return max(1, min(math.floor(each / arms), prompts)), answers
    wants = [budget / (len(sizes) * size * answers) for size in sizes]
    most = wants[-1]
    if sum(wants) > prompts:
        left, most = float(prompts), wants[0]
        for i, want in enumerate(wants):  # ascending: each takes what it wants, or an equal part of the rest
            most = left / (len(wants) - i)
            if want >= most:
                break
            left -= want
    n = max(1, min(math.floor(min(wants[0], most)), prompts))
    return n, answers * max(1, math.floor(wants[0] / n))


def _each(sizes: Sequence[int], budget: float, prompts: int) -> float:
    """Answers of each round of so many arms, one to a prompt, at which all together spend the budget: a round
    whose arms run out of prompts spends less than the others."""

    def spent(each: float) -> float:
        used = total = 0.0
        for size in sizes:
            new = min(each / size, prompts - used)
            used, total = used + new, total + new * size
        return total

    low, high = 0.0, float(sizes[0] * prompts)
    for _ in range(60):  # down to the rounding of floats
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return low


class _Track:
    """The rewards of a race so far, and the capital that bets against each arm have made."""

    def __init__(self, arms: int, low: float, high: float, level: float) -> None:
        self.low, self.width = low, high - low
        self.threshold = -math.log(1.0 - level)
        self.values: list[list[float]] = [[] for _ in range(arms)]
        """Mean reward of each prompt that an arm was asked on."""
        self.sums, self.counts = np.zeros(arms), np.zeros(arms)
        """Rewards of all answers of an arm, and their number."""
        self.capital = np.zeros((arms, len(_BETS)))
        """Logarithms."""
        self.ruled_out: dict[int, int] = {}
        """Arms that are certainly not the best, and the calls when that was known."""

    def mean(self, arm: int) -> float:
        return float(self.sums[arm] / self.counts[arm])

    def leader(self, among: Sequence[int]) -> int:
        """The arm of the largest mean so far; of several the first."""
        return max(among, key=lambda arm: (self.mean(arm), -arm))

    def add(self, arms: Sequence[int], rewards: np.ndarray, calls: int) -> None:
        """Take in rewards [arms, prompts, answers], betting before each prompt."""
        answers, index = rewards.shape[2], np.asarray(arms)
        means = rewards.mean(2)
        for column, earned in zip(means.T, rewards.sum(2).T, strict=True):
            inside = [k for k, arm in enumerate(arms) if arm not in self.ruled_out]
            if self.counts[arms[0]] and len(inside) > 1:
                at = {arms[k]: k for k in inside}
                first = self.leader([*at])
                second = self.leader([arm for arm in at if arm != first])
                best = np.full(len(arms), column[at[first]])
                best[at[first]] = column[at[second]]
                gain = (best - column) / self.width
                self.capital[index] += np.log1p(_BETS * gain[:, None])
                worth = np.logaddexp.reduce(self.capital[index], 1) - math.log(len(_BETS))
                out = [k for k in inside if worth[k] >= self.threshold]
                if len(out) == len(inside):  # one has to win
                    out.remove(at[first])
                self.ruled_out |= {arms[k]: calls for k in out}
            self.sums[index] += earned
            self.counts[index] += answers
        for k, arm in enumerate(arms):
            self.values[arm] += means[k].tolist()

    def behind(self, arm: int, winner: int) -> float:
        mine = self.values[arm]
        return float(np.mean(self.values[winner][: len(mine)]) - np.mean(mine))

    def estimates(self, arms: Sequence[int], level: float) -> dict[int, Estimate]:
        """Mean rewards of arms; their intervals cover jointly, at any time."""
        found, high, each = {}, self.low + self.width, 1.0 - (1.0 - level) / len(self.values)
        for n in {len(self.values[arm]) for arm in arms}:
            same = [arm for arm in arms if len(self.values[arm]) == n]
            ends = betting(np.array([self.values[arm] for arm in same]), self.low, high, each, anytime=True)
            for arm, lo, hi in zip(same, *ends, strict=True):
                mean, size = self.mean(arm), int(self.counts[arm])
                how = "mean over the race's answers; betting, at any time, all arms at once"
                limits = min(float(lo), mean), max(float(hi), mean)
                found[arm] = Estimate(mean, *limits, level, size, n, how, "unknown", guaranteed=True)
        return found


def race(
    pull: Pull,
    arms: int,
    prompts: int,
    low: float,
    high: float,
    *,
    budget: int,
    answers: int = 1,
    level: float = 0.95,
    fresh: bool = True,
) -> Race:
    """Find the arm of largest mean reward over prompts.

    Args:
        pull: asks; called with arms still in the race, in order, and prompts 0, 1, … that are new each time.
        arms: how many there are.
        prompts: how many there are, in random order; each is used at most once.
        low, high: the range of rewards.
        budget: the most answers to ask for.
        answers: answers of each arm to each prompt, at least; more where prompts run out.
        level: how often the best arm is to stay in, if not dropped for trailing.
        fresh: whether another answer to the same prompt tells anything new; not at temperature 0, or from a
            table with one answer to each.

    Raises:
        AlignProError: too few arms, too small a budget, or rewards outside their range.
    """
    check_level(level)
    if arms < 2:
        raise AlignProError(f"arms {arms}: a race takes at least 2")
    if answers < 1 or prompts < 1:
        raise AlignProError(f"answers {answers}, prompts {prompts}: give at least 1 of each")
    if budget < least_budget(arms, answers):
        raise AlignProError(
            f"budget {budget}: is too small for {arms} arms; give at least {least_budget(arms, answers)}"
        )
    track, moments = _Track(arms, low, high, level), list[Moment]()
    alive, left = list(range(arms)), dict[int, int]()
    calls = used = 0
    while len(alive) > 1 and used < prompts and budget - calls >= len(alive) * answers:
        n, each = _share(len(alive), answers, budget - calls, prompts - used, fresh)
        end = used + n
        entered = len(alive)
        while used < end and len(alive) > 1:
            step = min(end - used, max(1, BLOCK // (len(alive) * each)))
            rewards = np.asarray(pull(alive, range(used, used + step), each), float)
            if rewards.shape != (len(alive), step, each) or not ((rewards >= low) & (rewards <= high)).all():
                raise AlignProError(
                    f"pull: give rewards [{len(alive)}, {step}, {each}] from {low:g} to {high:g}"
                )
            calls += rewards.size
            used += step
            track.add(alive, rewards, calls)
            moments.append(Moment(calls, {arm: track.mean(arm) for arm in alive}))
            left |= {arm: calls for arm in alive if arm in track.ruled_out}
            alive = [arm for arm in alive if arm not in left]
        best = sorted(alive, key=lambda arm: (-track.mean(arm), arm))
        kept = best[: max(1, math.ceil(entered / 2))]
        left |= {arm: calls for arm in alive if arm not in kept}
        alive = sorted(kept)
    winner = track.leader(alive)
    order = sorted(range(arms), key=lambda a: (a != winner, -left.get(a, calls), -track.mean(a), a))
    means = track.estimates(order, level)
    ranked = tuple(
        Raced(
            arm,
            means[arm],
            track.behind(arm, winner),
            arm in track.ruled_out,
            None if arm == winner else left.get(arm, calls),
        )
        for arm in order
    )
    # b is uniform over all arms: who was still asked at the end was chosen by looking.
    last = [arm for arm in order if len(track.values[arm]) == used]
    table, b = np.array([track.values[arm] for arm in last]).T, np.full(len(last), 1.0 / arms)
    sure = pac_bayes(table, low, high, level, prior=b, best=0, anytime=True)
    return Race(ranked, tuple(moments), calls, budget, used, level, sure)


@dataclass(frozen=True)
class Gain:
    """An arm against another on the same prompts, in reward units."""

    gain: Estimate
    """The difference of their means."""
    mean: Estimate
    base: Estimate
    """Mean reward of the other arm."""
    answers: int
    """Answers of each arm to each prompt."""


def gain_over(rewards: np.ndarray, base: np.ndarray, low: float, high: float, level: float = 0.95) -> Gain:
    """Compare two arms on prompts by which neither was chosen.

    Args:
        rewards, base: [prompts, answers] of the arm and of the other, paired by prompt.
        low, high: the range of rewards.
        level: how often an interval covers the truth, each by itself.
    """
    rows = np.stack([rewards.mean(1) - base.mean(1), rewards.mean(1), base.mean(1)])
    width = high - low
    least, most = np.array([-width, low, low]), np.array([width, high, high])
    # The noise of an arm that looks well may hide that percentile-t cannot be trusted with the other.
    one, other = in_doubt(rows[1:], least[1:], most[1:], level)
    _, lo, hi, way = limits(rows, least, most, level, sure=np.array([one != other, False, False]))

    def of(i: int, least: float, most: float, each: int) -> Estimate:
        value = float(rows[i].mean())
        ends = min(max(float(lo[i]), least), value), max(min(float(hi[i]), most), value)
        return Estimate(value, *ends, level, each * rewards.size, rows.shape[1], WAYS[way[i]], "none")

    found = of(0, -width, width, 2), of(1, low, high, 1), of(2, low, high, 1)
    return Gain(*found, rewards.shape[1])
