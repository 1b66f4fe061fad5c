"""The gain of strategies that prompts share: prompters learned from some prompts, judged on others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from alignpro.estimation.components import Components, PooledAt, components
from alignpro.estimation.intervals import NEGLIGIBLE, Bias, Estimate
from alignpro.estimation.means import limits
from alignpro.estimation.paired import Arm
from alignpro.rollouts import Rollouts

LEAST_SHARED = 0.2
"""Share of the reference's draws whose strategy other prompts drew too, below which nothing is pooled."""
BLOCKS = 20
"""How often the prompter is learned anew, with all prompts before."""
BURN = 0.15
"""Share of the prompts that only teach."""
_SLOPES = np.array([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0])
_MOST = 4.0  # times the greatest ratio of the learned prompter's shares to the reference's


@dataclass(frozen=True)
class Pooled:
    """Strategies shared among prompts, and the gain of prompters that pool them over prompts.

    The prompter that is judged tilts ρ_sft by the pooled value of each strategy, learned from the prompts
    before the one it is judged on. It is a prompter that can be had: its gain limits that of the best one
    from below.
    """

    strategies: int
    """Different strategies among the draws of arm sft."""
    shared: float
    """Share of those draws whose strategy was drawn for other prompts too."""
    weights: str
    """How ρ_sft is tilted, in words."""
    over_reference: Estimate
    """Gain of the learned prompters over ρ_sft, in reward units; their mean over what they learned from."""
    over_none: Estimate | None
    """Gain over no prompter; None without arm none."""
    kl: Estimate
    """Their KL from ρ_sft (nats), or a bound on it."""
    favoured: tuple[tuple[str, float], ...]
    """The best strategies that several prompts share, with how much more than the mean of ρ_sft each earns
    (reward units, shrunk; not an interval: they were chosen for it)."""
    components: Components | None
    """The parts of the variance of R(x, s); None where prompts have too few draws of shared strategies."""
    at: tuple[PooledAt, ...]
    """The value of one instruction for all and of reading x, at each λ; empty without `components`."""
    finding: str
    """Which of leaving it, one instruction and a prompter that reads is supported, in a sentence."""
    deciding: Estimate
    """The gain over no prompter (over ρ_sft without arm none), at the level that the answer rests on."""

    @property
    def supports(self) -> str:
        """The finding in a few words: leave it, one instruction, a prompter that reads, or not decided."""
        return self.finding.partition(":")[0].lower()


class _Draws:
    """The draws of arm sft as columns [D], prompt by prompt in the order in which these are judged."""

    def __init__(self, rollouts: Rollouts, sft: Arm, none: Arm | None) -> None:
        assert rollouts.strategy is not None
        assert rollouts.added is not None
        self.n = n = len(sft.draws)
        # The order is drawn once, without looking at rewards: files may be sorted.
        self.order = np.random.default_rng([0, n]).permutation(n)
        self.draws = sft.draws[self.order]
        self.first = np.cumsum(self.draws) - self.draws
        self.prompt = np.repeat(np.arange(n), self.draws)
        take = np.arange(len(self.prompt)) - self.first[self.prompt] + sft.first[self.order][self.prompt]
        rows = sft.index[sft.starts][take]
        self.names, self.strategy = np.unique(rollouts.strategy[rows], return_inverse=True)
        pairs = np.unique(np.stack([self.strategy, self.prompt]), axis=1)[0]
        self.shared = (np.bincount(pairs) > 1)[self.strategy]
        """[D] whether other prompts drew the strategy too."""
        total, answers = np.add.reduceat(sft.reward, sft.starts)[take], sft.answers[take]
        self.mean = total / answers
        sums, given = self.sum(total), self.sum(answers).astype(float)
        if none is not None:
            sums = sums + np.add.reduceat(none.reward, none.first)[self.order]
            given = given + np.diff(np.append(none.first, len(none.index)))[self.order]
        others = (sums[self.prompt] - total) / np.maximum(given[self.prompt] - answers, 1.0)
        self.contrast = self.mean - others
        """[D] the draw's mean reward less that of all the prompt's other answers."""
        self.logp = rollouts.logps["logp_reference"][rows]
        self.exact = bool(rollouts.added[rows].all() and not np.isnan(self.logp).any())

    def sum(self, values: np.ndarray, prompts: slice = slice(None)) -> np.ndarray:
        """Sum `values` [..., draws of `prompts`] over the draws of each, [..., prompts]."""
        first = self.first[prompts]
        return np.add.reduceat(values, first - first[0], axis=-1)

    def average(self, values: np.ndarray, prompts: slice = slice(None)) -> np.ndarray:
        """Average `values` [..., draws of `prompts`] over the draws of each, [..., prompts]."""
        return self.sum(values, prompts) / self.draws[prompts]

    def of(self, prompts: slice) -> slice:
        """The draws of `prompts`, which follow one another."""
        return slice(
            *(int(at) for at in np.append(self.first, len(self.prompt))[[prompts.start, prompts.stop]])
        )


@dataclass(frozen=True)
class _Learned:
    """Pooled values of strategies from some draws, by a random-effects model of one variance."""

    value: np.ndarray
    """[S] shrunken gain of each strategy over the mean of ρ_sft, in reward units; 0 where never drawn."""
    share: np.ndarray
    """[S] shares of the draws."""
    noise: float
    """Variance of a draw's contrast around its strategy's value."""
    scale: float
    """Standard deviation of the values, never far below the noise."""


def _learn(d: _Draws, seen: slice) -> _Learned | None:
    """Learn from the draws `seen`; None where they cannot tell strategies from noise."""
    s, y = d.strategy[seen], d.contrast[seen]
    n = np.bincount(s, minlength=len(d.names)).astype(float)
    k, size = int((n > 0).sum()), len(y)
    if size - k < 2 or k < 2:
        return None
    y = y - y.mean()
    total = np.bincount(s, y, minlength=len(d.names))
    mean = total / np.maximum(n, 1.0)
    noise = float(np.square(y - mean[s]).sum() / (size - k))
    each = (size - np.square(n).sum() / size) / (k - 1)
    between = max((float((n * mean**2).sum()) / (k - 1) - noise) / each, 0.05 * noise)
    if not between > 0:
        return None
    value = total / np.maximum(n + noise / between, 1e-300)  # without noise, 0 of a strategy never drawn
    share = n / size
    return _Learned(value - float(share @ value), share, noise, float(np.sqrt(between)))


def _weights(d: _Draws, exact: bool, learned: _Learned, slopes: np.ndarray, prompts: slice) -> np.ndarray:
    """Weights of the draws of `prompts` that tilt ρ_sft by e^{slope·value/scale}, [slopes, draws].

    `exact`, by densities: min(q(s)/ρ_sft(s|x), a constant), q the tilted shares. Their mean over ρ_sft(·|x)
    is at most 1, and what lacks is played by others (see `judge`). Otherwise: K·softmax among the prompt's
    own K draws.
    """
    at = d.of(prompts)
    tilt = slopes[:, None] * learned.value / learned.scale
    g = np.exp(tilt - tilt.max(-1, keepdims=True))
    s = d.strategy[at]
    if exact:
        g = g / (g @ learned.share)[:, None]
        most = _MOST * g[:, learned.share > 0].max(-1, keepdims=True)
        with np.errstate(over="ignore"):
            return np.minimum((g * learned.share)[:, s] * np.exp(-d.logp[at]), most)
    own = g[:, s]
    scale = d.draws[prompts] / np.maximum(d.sum(own, prompts), 1e-300)
    return own * scale[:, d.prompt[at] - prompts.start]


def judge(
    d: _Draws, exact: bool, base: np.ndarray, rival: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain over ρ_sft and KL (nats) of the prompters learned on the way, and their weights; [n] each.

    `base` [n] are gains of ρ_sft itself over the rival, and `rival` [n] rows that vary as they do: the tilt
    with the greatest foreseen gain, in standard errors, is played.

    A row is the mean over the prompt's draws of (w − 1)(r − b), where w depends on the draw's strategy and
    on earlier prompts alone, and b is the mean of the prompt's other answers. Its expectation given the
    earlier prompts is the gain over ρ_sft of a prompter: that of density w ρ_sft, which with probability
    1 − E w ≥ 0 does as the other answers did. Without densities b is left out: the weights of a prompt add
    up to K, and the prompter draws K rewrites, of which it plays one.
    """
    edges = np.unique(np.linspace(BURN * d.n, d.n, BLOCKS + 1).astype(int))
    gain, kl, trust = np.zeros(d.n), np.zeros(d.n), np.zeros(d.n)
    for start, stop in pairwise(edges.tolist()):
        before, now = slice(0, start), slice(start, stop)
        trust[now] = np.sqrt(start / d.n)
        learned = None if start == 0 else _learn(d, d.of(before))
        if learned is None:
            continue
        lift = _weights(d, exact, learned, _SLOPES, before) - 1.0
        foreseen = d.average(lift * learned.value[d.strategy[d.of(before)]], before)
        noise = learned.noise * d.average(lift**2, before) / d.draws[before]
        variance = foreseen.var(-1) + noise.mean(-1)
        least = max(float(base[before].mean()), 0.0) + foreseen.mean(-1)
        error = np.sqrt(np.maximum(rival[before].var() + variance / (1.0 - BURN), 1e-300))
        best = int(np.argmax(least / error))
        (w,) = _weights(d, exact, learned, _SLOPES[best : best + 1], now)
        gain[now] = d.average((w - 1.0) * (d.contrast if exact else d.mean)[d.of(now)], now)
        kl[now] = d.average(w * np.log(np.where(w > 0, w, 1.0)) - w + 1.0, now)
    return gain, kl, trust


def estimate_of(
    rows: np.ndarray, level: float, n: int, low: float, high: float, method: str, bias: Bias = "down"
) -> Estimate:
    """Estimate the mean of `rows` [n], with the wider of Student's limits and `means.limits` on each side.

    Betting takes rows in their order, in which they are martingale differences about their expectations.
    """
    from scipy.special import stdtrit  # here, since importing it takes longer than most estimates

    free = np.full(1, np.inf)
    found = limits(rows[None], -free, free, level, ordered=True)
    value, lo, hi = (float(end[0]) for end in found[:3])
    error = float(rows.std(ddof=1)) / np.sqrt(len(rows))
    half = float(stdtrit(len(rows) - 1, 0.5 + level / 2.0)) * error
    lo, hi = max(min(lo, value - half), low), min(max(hi, value + half), high)
    how = "the wider of Student's limits and percentile-t's over prompts, or betting's where it is in doubt"
    return Estimate(value, min(lo, value), max(hi, value), level, n, len(rows), f"{method}; {how}", bias)


def pooled(
    rollouts: Rollouts,
    sft: Arm,
    none: Arm | None,
    lams: Sequence[float],
    level: float,
    deciding: float,
) -> Pooled | None:
    """Estimate what shared strategies could bring, or None where too few draws share one.

    `deciding` is the level of the limits that an answer is to rest on; λ are in ascending order.
    """
    if rollouts.strategy is None or rollouts.added is None or sft.draws.min() < 2:
        return None
    d = _Draws(rollouts, sft, none)
    share = float(d.average(d.shared.astype(float)).mean())
    if share < LEAST_SHARED or len(d.names) < 2:
        return None
    width = rollouts.high - rollouts.low
    reference = d.average(d.mean)
    base = np.zeros(d.n) if none is None else reference - none.mean(none.reward)[d.order]
    # With densities two prompters are to be had, and a half of each: their errors differ.
    rival = reference if none is None else base
    ways = [judge(d, exact, base, rival) for exact in (False, True)[: 1 + d.exact]]
    gain, kl, trust = (np.mean(of, 0) for of in zip(*ways, strict=True))
    # The first prompts only teach: ρ_sft itself is played on them.
    weighted = trust / max(float(trust.mean()), 1e-300)
    method = "prompters learned from earlier prompts, judged on later ones"
    counted = len(sft.index)
    both = counted + (0 if none is None else len(none.index))

    def over_rival(level: float) -> Estimate:
        return estimate_of(base + gain * weighted, level, both, -width, width, method)

    over_reference = estimate_of(gain * weighted, level, counted, -width, width, method)
    spent = estimate_of(kl * weighted, level, counted, 0.0, np.inf, method, "up")
    split, at = components(rollouts, sft, d.names[np.unique(d.strategy[d.shared])], lams, level)
    started = None if none is None else estimate_of(base, level, both, -width, width, "paired means", "none")
    gain_over = over_rival(deciding)
    return Pooled(
        strategies=len(d.names),
        shared=share,
        weights=(
            "half among each prompt's own draws, half by the reference's densities"
            if d.exact
            else "among each prompt's own draws"
        ),
        over_reference=over_reference,
        over_none=None if none is None else over_rival(level),
        kl=spent,
        favoured=_favoured(d, rollouts.strategies),
        components=split,
        at=at,
        finding=_finding(gain_over, at, started, none is not None, width),
        deciding=gain_over,
    )


def _favoured(d: _Draws, texts: Mapping[int, str]) -> tuple[tuple[str, float], ...]:
    """The best three shared strategies by pooled value, of those that earn more than the mean."""
    learned = _learn(d, slice(None))
    if learned is None:
        return ()
    named = [(texts[int(d.names[s])], float(learned.value[s])) for s in np.argsort(-learned.value)
             if int(d.names[s]) in texts and learned.value[s] > 0]  # fmt: skip
    return tuple(named[:3])


def _finding(gain: Estimate, at: Sequence[PooledAt], base: Estimate | None, none: bool, width: float) -> str:
    """Say what the evidence supports, at the smallest λ."""
    rival, smallest = ("no prompter" if none else "the reference prompter"), NEGLIGIBLE * width
    said = f"{gain.value:+.3g} [{gain.lo:+.3g}, {gain.hi:+.3g}] over {rival}"
    one = f"a prompter that pools strategies over prompts earns {said}"
    if not at:
        read = "too few prompts have two draws of shared strategies to say what reading the prompt adds"
        return f"One instruction: {one}; {read}." if gain.lo > 0 else f"Not decided: {one}; {read}."
    first = at[0]
    price = f"{first.price.value:+.3g} [{first.price.lo:+.3g}, {first.price.hi:+.3g}] at lambda {first.lam:g}"
    least, most = first.read.lo, first.read.hi
    if base is not None:
        least, most = least + base.lo, most + base.hi
    if gain.lo <= 0 and most < smallest:
        return (
            f"Leave it: no prompter that uses these strategies earns more than {max(most, 0.0):.3g} over "
            f"{rival}, less than 1% of the reward's range ({smallest:.3g})."
        )
    if gain.lo > 0 and first.price.hi < smallest:
        return f"One instruction: {one}, and reading the prompt adds no more than {first.price.hi:.3g}."
    if first.price.lo > smallest and max(gain.lo, least) > 0:
        return f"A prompter that reads: reading the prompt adds {price}; {one}."
    if gain.lo > 0:
        return f"One instruction, at least: {one}; whether reading the prompt adds to it is open, {price}."
    return f"Not decided: {one}, and reading the prompt adds {price}."
