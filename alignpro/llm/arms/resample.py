"""The training-free prompter: rewrites drawn from ρ_sft, reweighted to ρ* (eq. 10) or cut to the best of n.

The winner's curse: a reward R̂ that chose a rewrite is optimistic for it, since luck was chosen too. The
values of `star` and `best_of_n` are too high where R̂ is noisy; report those of `evaluate`. Needs no torch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.estimation.intervals import LEAST_PROMPTS
from alignpro.estimation.means import limits
from alignpro.files import read_json_lines, write_text
from alignpro.llm.models.prompt import as_json, from_json, said_in
from alignpro.llm.models.sampling import digest, is_int
from alignpro.llm.rewards.scores import judged
from alignpro.shown import Shown

if TYPE_CHECKING:
    from alignpro.llm.policies.prompter import Prompter
    from alignpro.llm.training.environment import Environment


Array = np.ndarray


@dataclass(frozen=True)
class Proposals:
    """Rewrites of one prompt and what they are worth. Its fields are JSON values."""

    prompt: str
    """The user's prompt x."""
    rewrites: tuple[str, ...]
    """Draws from ρ_sft(·|x), n of them, repeats included."""
    rewards: tuple[float, ...]
    """Estimate R̂ of each: the mean reward over `responses` answers; equal rewrites share their answers."""
    responses: int = 1
    """Answers to each distinct rewrite, the first that π_F gives."""
    calls: int = 0
    """Answers asked of π_F for all rewrites, those that a cache served included."""
    original: float | None = None
    """R̂ of x itself as its own rewrite, where it was asked for."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewrites", tuple(self.rewrites))
        object.__setattr__(self, "rewards", tuple(map(float, self.rewards)))
        n, numbers = len(self.rewrites), [*self.rewards, self.original or 0.0]
        if not n or len(self.rewards) != n or not np.isfinite(numbers).all():
            raise AlignProError(f"rewards of {self.prompt!r}: give a finite one for each of its {n} rewrites")
        check_counts(1, responses=self.responses)
        check_counts(0, calls=self.calls)


def propose(
    prompter: "Prompter",
    environment: "Environment",
    prompts: Sequence[str],
    n: int,
    *,
    responses: int | None = None,
    include_original: bool = False,
    seed: int = 0,
) -> list[Proposals]:
    """n rewrites of each of some distinct prompts from ρ_sft, and their estimated rewards R̂.

    Args:
        prompter: ρ_sft, as it is (one with an adapter proposes from ρ_θ).
        environment: what rewrites are worth; its seed determines the answers.
        responses: answers to each distinct rewrite; the environment's if None.
        include_original: estimate R̂(x, x) too.
        seed: of the rewrites.
    """
    responses = environment.responses if responses is None else responses
    check_counts(1, n=n, responses=responses)
    _distinct(prompts)
    drawn = prompter.rewrites(prompts, n, seed=seed)
    return appraise(environment, prompts, drawn, responses=responses, include_original=include_original)


def appraise(
    environment: "Environment",
    prompts: Sequence[str],
    rewrites: Sequence[Sequence[str]],
    *,
    responses: int,
    include_original: bool = False,
) -> list[Proposals]:
    """R̂ of rewrites that were drawn from ρ_sft(·|x) elsewhere; the arguments are those of `propose`."""
    originals = [[str(x)] * include_original for x in prompts]
    asked = [dict.fromkeys([*row, *x]) for x, row in zip(originals, rewrites, strict=True)]
    pairs = [(x, rewrite) for x, row in zip(prompts, asked, strict=True) for rewrite in row]
    xs, said = [x for x, _ in pairs], [rewrite for _, rewrite in pairs]
    scores = replace(environment, responses=responses).score(xs, said, [0] * len(pairs))
    worth = dict(zip(pairs, map(float, scores), strict=True))
    asks = environment.target is not None
    return [
        Proposals(
            x,
            tuple(row),
            tuple(worth[x, rewrite] for rewrite in row),
            responses,
            calls=len(distinct) * responses * asks,
            original=worth[x, str(x)] if include_original else None,
        )
        for x, row, distinct in zip(prompts, rewrites, asked, strict=True)
    ]


def answers(environment: "Environment", prompts: Sequence[str], n: int) -> list[Proposals]:
    """n answers of π_F to each prompt itself and their rewards: the oracle π* of eq. (4), without training.

    π* ∝ π_F exp(r/β) is ρ* with answers in the place of rewrites, so `star(p, beta)` of what comes back
    estimates J(π*) (`value`), β log Z* (`free_energy`) and KL(π*‖π_F) (`kl`), and `resample` draws from π*.
    β log Z* bounds the objective J − β·KL of every policy, and one falls short of it by β·KL(π‖π*): what a
    trained policy is checked by. r is exact, so `value` and `free_energy` are biased down only. The answers
    are samples 0 … n−1 of π_F by the environment's seed, to distinct prompts.
    """
    check_counts(1, n=n)
    _distinct(prompts)
    if environment.target is None:
        raise AlignProError("environment: has no target; give the frozen model that answers")
    said = [said_in(x, x) for x in prompts]
    rows = environment.target.respond(said, environment.sampling, samples=n, seed=environment.seed)
    # What stands for a refused answer is the service's reason, which is none.
    texts = [["" if answer.finish == "refused" else answer.text for answer in row] for row in rows]
    flat = [answer for row in rows for answer in row]
    xs = [x for x in prompts for _ in range(n)]
    scores_ = judged(environment.reward, xs, flat, environment.refusals).total
    return [
        Proposals(x, tuple(row), tuple(scores), calls=n)
        for x, row, scores in zip(prompts, texts, scores_.reshape(-1, n), strict=True)
    ]


def save_proposals(path: str | Path, proposals: Sequence[Proposals]) -> None:
    """Write one JSON line for each prompt, atomically."""
    rows = [asdict(p) | {"prompt": as_json(p.prompt)} for p in proposals]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text, private=True)


def load_proposals(path: str | Path) -> list[Proposals]:
    """Read what `save_proposals` wrote."""
    found = []
    for number, row in enumerate(read_json_lines(path, dict), 1):
        try:
            found.append(typed.made(Proposals, row | {"prompt": from_json(row.get("prompt"))}, "proposals"))
        except AlignProError as error:
            raise AlignProError(
                f"proposals {path}, line {number}: not what save_proposals wrote ({error}); propose again"
            ) from None
    return found


@dataclass(frozen=True)
class Star:
    """ρ* on n draws of ρ_sft: w ∝ exp(R̂/λ). All converge as n and `responses` grow.

    With exact rewards `value` and `free_energy` are biased down, for every n. Noise of variance s² in R̂
    biases value, free_energy and kl up, by s²/λ, s²/(2λ) and s²/(2λ²) to leading order in 1/λ.
    """

    weights: Array
    """Weight of each of the n draws, summing to 1; equal rewrites have one for each time drawn."""
    ess: float
    """Effective sample size (Σw)²/Σw², from 1 to n."""
    value: float
    """Mean reward under ρ*, Ĵ = Σ w R̂, in reward units."""
    free_energy: float
    """λ log Ẑ, Ẑ the mean of exp(R̂/λ): the optimal objective (eq. 9), reward units."""
    kl: float
    """KL(ρ*‖ρ_sft) in nats, = (value − free_energy)/λ. Biased down for mild tilts (by about itself/n) and
    where it nears log n, its most; up where ρ* sits on ties of small mass. Unknown in general."""
    prior_value: float
    """Mean R̂ under ρ_sft, unbiased."""
    warning: str
    """Sentence that says so where `ess` is below the stated share of n; else empty."""


def star(proposals: Proposals, lam: float, *, share: float = 0.1) -> Star:
    """ρ* of eq. (10) over one prompt's draws, in log space: λ from 1e-6 to 1e6 of the rewards' unit is safe.

    An effective sample size below `share` of n is warned of. `original` is no draw, and plays no part.
    """
    if not (math.isfinite(lam) and lam > 0):
        raise AlignProError(f"lam {lam}: give a positive, finite number")
    r = np.array(proposals.rewards)
    n, top = len(r), r.max()
    d = r - top
    mean = d.mean()
    a = d / lam
    w = np.exp(a)
    z, w = w.mean(), w / w.sum()
    if a.min() > -1.0:
        # Mild: about the mean, whose first-order terms cancel, or KL would be all rounding.
        u = (d - mean) / lam
        growth = np.expm1(u)
        log_z = math.log1p(growth.mean())  # of exp((R̂ − mean)/λ)
        lift = np.mean(u * growth) / (1 + growth.mean())
        kl, value, free = lift - log_z, mean + lam * lift, mean + lam * log_z
    else:
        kl, value, free = w @ a - math.log(z), w @ d, lam * math.log(z)
    ess = min(float(n), 1.0 / float(w @ w))
    warning = f"effective sample size {ess:.1f} of {n} at lam {lam:g} for {proposals.prompt[:40]!r}: "
    warning = warning + "few rewrites decide; draw more or raise lam" if ess < share * n else ""
    return Star(
        w, ess, float(top + value), float(top + free), max(0.0, float(kl)), float(top + mean), warning
    )


@dataclass(frozen=True)
class Mean:
    """A mean over prompts, and the 95% interval around it; None for its ends where prompts are too few."""

    value: float
    lo: float | None = None
    hi: float | None = None


@dataclass(frozen=True)
class Tilted:
    """Effect of reweighting the proposals to ρ* at one λ, by R̂: means over prompts."""

    lam: float
    """λ, in reward units."""
    gain: Mean
    """Mean reward beyond that of ρ_sft, in reward units."""
    kl: float
    """KL(ρ*‖ρ_sft) in nats."""
    ess: float
    """Effective sample size, out of the rewrites of one prompt."""
    few: int
    """Prompts whose effective sample size is too small; see `Star.warning`."""


@dataclass(frozen=True)
class Kept:
    """Effect of keeping the best of n proposals, by R̂: means over prompts."""

    n: int
    gain: Mean
    """Mean reward beyond that of ρ_sft, in reward units."""
    kl_bound: float
    """Upper bound of the KL to ρ_sft, in nats; see `Best.kl_bound`."""


@dataclass(frozen=True)
class BestRewrite:
    """The rewrite of one prompt that has the largest R̂."""

    prompt: str
    rewrite: str
    reward: float
    """R̂ of the rewrite, in reward units."""
    mean: float
    """Mean R̂ of all rewrites of the prompt."""


@dataclass(frozen=True, repr=False)
class Resampled(Shown):
    """Gains of the training-free prompter over ρ_sft. R̂ chose, so they are optimistic."""

    n: int
    """Rewrites of each prompt."""
    prior: float
    """Mean R̂ of ρ_sft, in reward units."""
    tilted: tuple[Tilted, ...]
    """Reweighting to ρ*, by λ."""
    best: tuple[Kept, ...]
    """Best of n: the powers of two, and all."""
    rewrites: tuple[BestRewrite, ...]
    """The best rewrite of each prompt."""


def resampled(proposals: Sequence[Proposals], lams: Sequence[float], width: float = math.inf) -> Resampled:
    """Weigh resampling at each λ, and best-of-n, against ρ_sft.

    Args:
        width: of the reward's range, in which each prompt's gain lies, as no choice by R̂ lowers R̂. Left out:
            not known, so that limits may have to assume that no gain lies further out than those seen.
    """
    n = min(len(p.rewrites) for p in proposals)
    prior = np.array([np.mean(p.rewards) for p in proposals])

    def gain(values: Any) -> Mean:
        each = np.array(values) - prior
        if len(each) < LEAST_PROMPTS:
            return Mean(float(each.mean()))
        found = limits(each[None], np.zeros(1), np.array([width]), 0.95)
        return Mean(float(each.mean()), float(found.lo[0]), float(found.hi[0]))

    tilted = []
    for lam in lams:
        stars = [star(p, lam) for p in proposals]
        kl, ess = fmean(s.kl for s in stars), fmean(s.ess for s in stars)
        few = sum(bool(s.warning) for s in stars)
        tilted.append(Tilted(lam, gain([s.value for s in stars]), kl, ess, few))
    values = np.array([best_of_n(p, n).values for p in proposals])
    sizes = sorted({2**i for i in range(1, n.bit_length())} | {n})
    best = [Kept(size, gain(values[:, size - 1]), _kl_bound(size)) for size in sizes]
    rewrites = []
    for p, mean in zip(proposals, prior.tolist(), strict=True):
        top = max(range(len(p.rewrites)), key=p.rewards.__getitem__)
        rewrites.append(BestRewrite(p.prompt, p.rewrites[top], p.rewards[top], mean))
    return Resampled(n, float(prior.mean()), tuple(tilted), tuple(best), tuple(rewrites))


def resample(proposals: Proposals, lam: float, draws: int = 1, *, seed: int = 0) -> list[str]:
    """[draws] rewrites from ρ* up to sampling error, with replacement; equal arguments, equal rewrites."""
    check_counts(1, draws=draws)
    chosen = choose(star(proposals, lam).weights, draws, "resample", seed, proposals.prompt)
    return [proposals.rewrites[i] for i in chosen]


@dataclass(frozen=True)
class Best:
    """The best of n of the N draws by R̂: draw n, keep one of the largest R̂."""

    weights: Array
    """Chance of each of the N draws to be kept, over all choices of n among them; ties share."""
    value: float
    """Mean R̂ of what is kept, Σ weights·R̂, in reward units."""
    values: Array
    """Mean of the largest R̂ of 1 to n draws, [n]: unbiased for E max R̂ over independent draws. For the mean
    reward of what is kept it is biased up (the winner's curse) unless R̂ is exact."""
    kl_bound: float
    """Upper bound log n − (n−1)/n of KL(best of n‖ρ_sft) in nats (arXiv 2401.01879)."""


def best_of_n(proposals: Proposals, n: int | None = None) -> Best:
    """The best of n by R̂, and its expected R̂ for every n' ≤ n, by order statistics.

    Of n' draws without replacement from N the k-th smallest is the largest with chance C(k−1, n'−1)/C(N, n').
    """
    r = np.array(proposals.rewards)
    size = len(r)
    n = size if n is None else n
    if not is_int(n) or not 1 <= n <= size:
        raise AlignProError(f"n {n!r}: choose a whole number from 1 to the {size} rewrites drawn")
    order, rank = np.argsort(r, kind="stable"), np.arange(1, size + 1)
    chance, values = np.full(size, 1 / size), []
    for m in range(1, n + 1):
        if m > 1:  # C(k−1, m−1)/C(N, m) from C(k−1, m−2)/C(N, m−1)
            chance = chance * np.maximum(rank - m + 1, 0) / (m - 1) * m / (size - m + 1)
        values.append(float(chance @ r[order]))
    # Ties share: which of them came last in the order means nothing.
    _, tie, count = np.unique(r[order], return_inverse=True, return_counts=True)
    weights = np.zeros(size)
    weights[order] = (np.bincount(tie, chance) / count)[tie]
    return Best(weights, values[-1], np.array(values), _kl_bound(n))


def _kl_bound(n: int) -> float:
    return math.log(n) - (n - 1) / n


def choose(weights: Array, draws: int, *key: str | int) -> Array:
    """[draws] indices of weights [n], with replacement, determined by `key`. Weight 0 is never drawn."""
    rng = np.random.default_rng(int.from_bytes(digest(*key)[:16]))
    total = np.cumsum(weights)
    return np.searchsorted(total, rng.random(draws) * total[-1] * (1 - 2.0**-40), side="right")


def _distinct(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or len(set(prompts)) != len(prompts) or not prompts:
        raise AlignProError("prompts: give a list of distinct strings, at least one")


def check_counts(least: int, **values: int) -> None:
    for name, value in values.items():
        if not is_int(value) or value < least:
            raise AlignProError(f"{name} {value!r}: choose a whole number of at least {least}")


@dataclass(frozen=True)
class Evaluation:
    """A choice's rewards on answers that had no part in it."""

    values: Array
    """Mean reward of each prompt's choice, [X]; unbiased given the proposals."""
    value: float
    """Mean reward over prompts, Ĵ."""
    standard_error: float
    """Standard error of `value` over prompts, whose draws are no independent evidence; nan with one."""
    calls: int
    """Answers asked of π_F."""


def evaluate(
    proposals: Sequence[Proposals],
    choices: Sequence[Array],
    environment: "Environment",
    draws: int = 1,
    *,
    seed: int = 0,
) -> Evaluation:
    """J of chosen rewrites on fresh answers: x′ ~ choice, y ~ π_F(·|x′), `draws` times for each prompt.

    Free of the winner's curse: the answers are samples of π_F beyond those that R̂ was made of, also where the
    environment is the one that proposed. `choices` are, for each prompt, the `weights` of `star` or
    `best_of_n`, or others that sum to 1; `seed` is that of the draws from them.
    """
    check_counts(1, draws=draws)
    if not proposals or len(choices) != len(proposals):
        raise AlignProError(f"choices: {len(choices)} for {len(proposals)} prompts; give one for each")
    rewrites: list[str] = []
    for p, choice in zip(proposals, choices, strict=True):
        w = np.asarray(choice, float)
        if w.shape != (len(p.rewrites),) or not (w >= 0).all() or not abs(w.sum() - 1) < 1e-6:
            raise AlignProError(
                f"choices: that of {p.prompt!r} must be {len(p.rewrites)} weights of sum 1; take a `weights`"
            )
        rewrites += [p.rewrites[i] for i in choose(w, draws, "evaluate", seed, p.prompt)]
    asked = [p.prompt for p in proposals for _ in range(draws)]
    places = [p.responses + i for p in proposals for i in range(draws)]
    scores = replace(environment, responses=1).score(asked, rewrites, places)
    values = np.asarray(scores, float).reshape(len(proposals), draws).mean(1)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    calls = 0 if environment.target is None else len(rewrites)
    return Evaluation(values, float(values.mean()), error, calls)
