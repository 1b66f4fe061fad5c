"""Win rates from pairwise judgements: raw and length-controlled, with what the judge itself is worth.

A pair is judged in both orders: won or lost where they agree or one calls a tie, tied where they disagree.
An order without a verdict fails its pair, which then is in no rate. Prompts are the independent units.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy.special import expit, logit, stdtrit

from alignpro.errors import AlignProError
from alignpro.estimation.intervals import LEAST_PROMPTS, Estimate, betting, check_level
from alignpro.estimation.means import WAYS, limits, shuffled
from alignpro.files import read_json_lines
from alignpro.shown import Shown

VERDICTS = {"win": 1.0, "tie": 0.0, "loss": -1.0, None: math.nan}
"""The first arm's outcome in one order as a number; None is an order that failed."""
RIDGE = 0.25
"""Penalty on the length effect φ: a prior N(0, 2²) in log-odds, so that φ stays finite where length decides
all."""


@dataclass(frozen=True, eq=False)
class Judgements:
    """N judged pairs as columns."""

    arms: tuple[str, str]
    """The arm of interest, then the one it is compared with."""
    judge: str
    prompt: np.ndarray
    """[N] integers: the pair's prompt."""
    verdicts: np.ndarray
    """[N, 2]: 1, 0, −1 for a win, tie, loss of `arms[0]`, shown first in column 0 and second in column 1; NaN
    where the order failed."""
    asked: np.ndarray
    """[N] truth values: False where both answers are the same text, a tie that no judge is needed for."""
    lengths: np.ndarray
    """[N, 2] characters of the two answers, in the arms' order; NaN of one that was refused."""
    failures: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.prompt)


def outcomes(verdicts: np.ndarray) -> np.ndarray:
    """Combine both orders of `verdicts` [N, 2]: [N], 1, 0, −1, or NaN where one failed."""
    return np.sign(verdicts.sum(1))


def collect(rows: Iterable[Mapping[str, Any]], where: str = "judgement") -> Judgements:
    """Make columns of rows as `alignpro.llm.arms.judge` writes them; `where` names one in messages."""
    prompts: dict[str, int] = {}
    prompt, verdicts, asked, lengths = [], [], [], []
    failures: Counter[str] = Counter()
    shared: list[Any] = []
    for number, row in enumerate(rows, 1):
        try:
            said = [VERDICTS[verdict] for verdict in row["verdicts"]]
            size = [math.nan if length is None else int(length) for length in row["lengths"]]
            names = [*map(str, row["arms"]), str(row["judge"])]
            if (len(said), len(size), len(names)) != (2, 2, 3) or min(size) < 0:
                raise ValueError
            failures.update(str(kind) for kind in row["failures"] if kind is not None)
            prompt.append(prompts.setdefault(str(row["prompt_id"]), len(prompts)))
            asked.append(not row["identical"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise AlignProError(f"{where} {number}: is no judgement; judge the rollouts again") from None
        shared = shared or names
        if names != shared:
            raise AlignProError(
                f"{where} {number}: is of {names}, those before it of {shared}; keep one comparison a file"
            )
        verdicts.append(said)
        lengths.append(size)
    if not prompt:
        raise AlignProError(f"{where}s: there are none; judge some rollouts")
    return Judgements(
        arms=(shared[0], shared[1]),
        judge=shared[2],
        prompt=np.array(prompt),
        verdicts=np.array(verdicts),
        asked=np.array(asked),
        lengths=np.array(lengths, dtype=float),
        failures=dict(sorted(failures.items())),
    )


def read(path: str | os.PathLike[str]) -> Judgements:
    """Read the judgements in a file that `alignpro judge` wrote."""
    return collect(read_json_lines(path), f"{path} line")


def wilson(rate: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score limits (JASA 22, 1927) of a proportion `rate` over n independent units.

    They solve (rate − p)² = z² p (1 − p)/n. Where a unit can also score between 0 and 1 (a tie) its variance
    is below p(1 − p), and the limits are wider than they need be.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    shrink = 1.0 + z * z / n

    def lower(p: float) -> float:
        """The lesser root, from the product of both, p²/shrink: without cancellation, and exactly 0 at 0."""
        upper = (p + z * z / (2 * n) + z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / shrink
        return p * p / (shrink * upper)

    return lower(rate), 1.0 - lower(1.0 - rate)


def _by_prompt(prompt: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum `values` [N] or [N, D] over the pairs of each of the C prompts: [C] or [C, D]."""
    of = np.unique(prompt, return_inverse=True)[1]
    out = np.zeros((of.max() + 1, *values.shape[1:]))
    np.add.at(out, of, values)
    return out


def rate(scores: np.ndarray, prompt: np.ndarray, level: float) -> Estimate | None:
    """Mean of `scores` [N] in [0, 1] with an interval over prompts; None where there are no scores.

    By `means.limits` of each prompt's share in the ratio Σ scores/Σ counts made linear; betting with fewer
    than 5 prompts; Wilson's where prompts have one score each and the shape of the scores lets him.
    """
    if not len(scores):
        return None
    value = float(scores.mean())
    counts = _by_prompt(prompt, np.ones(len(scores)))
    each = value + _by_prompt(prompt, scores - value) / counts.mean()
    n, most = len(counts), float(counts.max() / counts.mean())
    low, high = value - value * most, value + (1.0 - value) * most
    if n < LEAST_PROMPTS:
        ends = betting(np.clip(shuffled(each), low, high), low, high, level)
        lo, hi, way = float(ends[0]), float(ends[1]), WAYS["betting"]
    else:
        found = limits(each[None], np.array([low]), np.array([high]), level)
        lo, hi, way = float(found.lo[0]), float(found.hi[0]), WAYS[found.way[0]]
        if counts.max() == 1 and found.way[0] == "percentile-t":
            (lo, hi), way = wilson(value, n, level), "Wilson score, prompts as units"
    lo, hi = max(0.0, lo), min(1.0, hi)
    return Estimate(value, min(lo, value), max(hi, value), level, len(scores), n, way, "none")


def length_regression(scores: np.ndarray, lengths: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Maximise Σ y log p + (1 − y) log(1 − p) − ½ RIDGE φ², p = σ(θ + φ t), over θ and φ.

    t = tanh(d/sd(d)), d the first answer's length minus the second's: the length term of arXiv 2404.04475,
    eq. (1). σ(θ) is the win rate at equal lengths. φ alone is penalised, so that Σ(y − p) = 0, and σ(θ) is
    the mean of y exactly where lengths are equal throughout.

    `scores` y [N] are 1, ½, 0 for a win, tie, loss, neither all 1 nor all 0; `lengths` are [N, 2].
    Gives θ and φ in log-odds, and t [N].
    """
    d = lengths[:, 0] - lengths[:, 1]
    spread = d.std()  # of whole numbers: exactly 0 where all are alike
    # Without a spread there is a constant, which cannot be told from θ: nothing to control for.
    t = np.tanh(d / spread) if spread > 0 else np.zeros(len(d))
    at = np.array([logit(scores.mean()), 0.0])

    def objective(at: np.ndarray) -> float:
        eta = at[0] + at[1] * t
        return float(scores @ eta - np.logaddexp(0.0, eta).sum() - 0.5 * RIDGE * at[1] ** 2)

    value = objective(at)
    for _ in range(100):  # Newton, halving steps that overshoot; strictly concave, so few suffice
        gradient, information = _derivatives(scores, t, at)
        step = np.linalg.solve(information, gradient.sum(0) - [0.0, RIDGE * at[1]])
        while (new := objective(at + step)) < value - 1e-12 * len(t) and np.abs(step).max() > 1e-9:
            step /= 2
        at, value = at + step, new
        if np.abs(step).max() <= 1e-9:
            break
    return float(at[0]), float(at[1]), t


def _derivatives(scores: np.ndarray, t: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the log-likelihood, pair by pair, [N, 2], and the penalised information, [2, 2]."""
    design = np.stack([np.ones_like(t), t], 1)
    p = expit(design @ at)
    information = design.T @ (design * (p * (1 - p))[:, None])
    return design * (scores - p)[:, None], information + np.diag([0.0, RIDGE])


def length_controlled(
    scores: np.ndarray, lengths: np.ndarray, prompt: np.ndarray, level: float
) -> tuple[Estimate | None, float]:
    """The win rate at equal lengths, σ(θ), and the length effect φ (see `length_regression`).

    The interval is Wald's for θ with the sandwich variance over prompts and Student's t, through σ.
    All won or all lost, and all lengths alike, leave nothing to control for: then it is the raw rate.
    """
    raw = rate(scores, prompt, level)
    if raw is None or raw.n_clusters < LEAST_PROMPTS:
        return None, 0.0
    if raw.value in (0.0, 1.0):
        return raw, 0.0
    theta, phi, t = length_regression(scores, lengths)
    if not t.any():
        return raw, 0.0
    gradients, information = _derivatives(scores, t, np.array([theta, phi]))
    meat = _by_prompt(prompt, gradients)
    n = len(meat)
    left = np.linalg.solve(information, meat.T)
    error = math.sqrt(n / (n - 1) * float(left[0] @ left[0]))
    width = float(stdtrit(n - 1, 0.5 + level / 2)) * error
    value, lo, hi = map(float, expit([theta, theta - width, theta + width]))
    method = "logistic regression on length, sandwich variance over prompts"
    return Estimate(value, lo, hi, level, raw.n, n, method, "unknown"), phi


@dataclass(frozen=True, repr=False)
class WinRates(Shown):
    """`arms[0]` against `arms[1]`, by one judge. Counts are of pairs, rates in [0, 1]."""

    arms: tuple[str, str]
    """The arm of interest, then the one it is compared with."""
    judge: str
    pairs: int
    prompts: int
    wins: int
    ties: int
    losses: int
    failed: int
    """Pairs with an order that gave no verdict; they are in no rate."""
    identical: int
    """Ties whose answers are one text, which the judge was not asked about."""
    failures: Mapping[str, int]
    win_rate: Estimate | None
    """Share of the pairs that did not fail which `arms[0]` won, ties a half; None where all failed."""
    bounds: tuple[float, float]
    """The win rate over all pairs, were every missing verdict one against, or one for, `arms[0]`."""
    length_controlled: Estimate | None
    """The win rate at equal lengths; None with fewer than 5 prompts."""
    length_effect: float
    """Effect φ of length, in log-odds per unit of tanh(standardised length difference); positive where longer
    answers win."""
    mean_lengths: tuple[float, float]
    agreement: Estimate | None
    """How often both orders say the same, over pairs that were asked and did not fail."""
    kappa: float | None
    """Cohen's κ of the two orders: 1 agreement, 0 none beyond chance; None where chance alone agrees."""
    first_shown: Estimate | None
    """How often the answer shown first is preferred, ties a half; 0.5 from a judge blind to position."""

    @property
    def judged(self) -> int:
        return self.pairs - self.failed

    @property
    def percentages(self) -> tuple[float, float] | None:
        """Percent of the pairs judged that were won and lost, ties the rest; None where all failed."""
        return (100 * self.wins / self.judged, 100 * self.losses / self.judged) if self.judged else None

    @property
    def contradictory(self) -> bool:
        """Whether the judge says another thing in most pairs once their order is turned."""
        return self.agreement is not None and self.agreement.value < 0.5

    @property
    def level(self) -> float | None:
        """How often the intervals cover, in (0, 1); None where there are none."""
        return next((e.level for e in (self.win_rate, self.agreement) if e is not None), None)


def win_rates(judgements: Judgements, level: float = 0.95) -> WinRates:
    """Draw up everything that the judgements say, with intervals over prompts at `level`."""
    level = check_level(level)
    verdicts, prompt = judgements.verdicts, judgements.prompt
    outcome = outcomes(verdicts)
    good = ~np.isnan(outcome)
    scores = 0.5 + 0.5 * outcome[good]
    against, for_ = (
        float(np.mean(0.5 + 0.5 * outcomes(np.where(np.isnan(verdicts), v, verdicts)))) for v in (-1.0, 1.0)
    )
    both = good & judgements.asked
    first, second = verdicts[both].T
    controlled, effect = length_controlled(scores, judgements.lengths[good], prompt[good], level)
    lengths = [column[~np.isnan(column)] for column in judgements.lengths.T]
    mean = [column.mean() if len(column) else math.nan for column in lengths]
    return WinRates(
        arms=judgements.arms,
        judge=judgements.judge,
        pairs=len(judgements),
        prompts=len(np.unique(prompt)),
        wins=int((outcome == 1).sum()),
        ties=int((outcome == 0).sum()),
        losses=int((outcome == -1).sum()),
        failed=int((~good).sum()),
        identical=int((~judgements.asked).sum()),
        failures=judgements.failures,
        win_rate=rate(scores, prompt[good], level),
        bounds=(against, for_),
        length_controlled=controlled,
        length_effect=effect,
        mean_lengths=(float(mean[0]), float(mean[1])),
        agreement=rate((first == second).astype(float), prompt[both], level),
        kappa=cohen_kappa(first, second),
        first_shown=rate(0.5 + (first - second) / 4, prompt[both], level),
    )


def cohen_kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cohen's κ, (p_o − p_e)/(1 − p_e), of two ratings [N] in {−1, 0, 1}; None where N is 0 or p_e is 1."""
    if not len(first):
        return None
    shares = np.array([[np.mean(r == v) for v in (-1, 0, 1)] for r in (first, second)])
    chance = float(shares[0] @ shares[1])
    return None if chance == 1.0 else (float(np.mean(first == second)) - chance) / (1.0 - chance)
