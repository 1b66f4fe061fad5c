"""Terms of the theory as per-prompt values, taken from rollouts, and their arithmetic.

A `Term` holds one number per prompt whose mean over prompts estimates a quantity. Sums and differences of
terms stay paired, prompt by prompt, so that the interval of a gap or of a slack is that of one mean.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from alignpro.errors import AlignProError
from alignpro.estimation import samples
from alignpro.estimation.intervals import Bias, Estimate, betting, studentise
from alignpro.rollouts import Rollouts

LEAST_ESS = 8.0
"""Below this median, importance weights are degenerate: docs/estimation.md has the coverage either side."""
MOST_NOISE = 0.5
"""Above it (in the variance of log-weights) R̂ is too coarse for ρ*, …"""
MOST_NOISE_UNCORRECTED = 0.05
"""… and with fewer than 4 answers to a draw, too few for the jackknife over them, above this."""
Interval = Literal["bootstrap", "betting"]


class Absent(Exception):
    """Why a term cannot be had from these rollouts, and the remedy."""


@dataclass(frozen=True, eq=False)
class Term:
    """Per-prompt values [n] whose mean estimates a quantity, with what its interval needs."""

    values: np.ndarray
    low: float
    """The quantity's range a priori."""
    high: float
    arms: frozenset[str]
    bias: Bias
    method: str
    lower: np.ndarray | None = None
    """[n] Where `values` cannot be trusted: values whose mean is biased down, …"""
    upper: np.ndarray | None = None
    """… and up."""
    ess: float | None = None
    bounded: bool = False
    """Whether each of `values` is unbiased and within [low, high]: betting then applies."""

    @property
    def weak(self) -> bool:
        """Whether the interval is a bracket by `lower` and `upper`."""
        return self.lower is not None

    def __add__(self, other: "Term") -> "Term":
        return _combine(self, other, 1.0)

    def __sub__(self, other: "Term") -> "Term":
        return _combine(self, other, -1.0)

    def __rmul__(self, factor: float) -> "Term":
        """`factor` > 0 times the term."""
        return replace(
            self,
            values=factor * self.values,
            low=factor * self.low,
            high=factor * self.high,
            lower=None if self.lower is None else factor * self.lower,
            upper=None if self.upper is None else factor * self.upper,
        )


_FLIP: dict[Bias, Bias] = {"none": "none", "up": "down", "down": "up", "unknown": "unknown"}


def _combine(a: Term, b: Term, sign: float) -> Term:
    flip = sign < 0
    other: Bias = _FLIP[b.bias] if flip else b.bias
    bias: Bias = a.bias if other in ("none", a.bias) else other if a.bias == "none" else "unknown"
    lower = upper = None
    if a.weak or b.weak:
        of_a = [a.values if v is None else v for v in (a.lower, a.upper)]
        of_b = [b.values if v is None else v for v in (b.lower, b.upper)]
        lower = of_a[0] + sign * of_b[1 if flip else 0]
        upper = of_a[1] + sign * of_b[0 if flip else 1]
    ess = [t.ess for t in (a, b) if t.ess is not None]
    return Term(
        values=a.values + sign * b.values,
        low=a.low + sign * (b.high if flip else b.low),
        high=a.high + sign * (b.low if flip else b.high),
        arms=a.arms | b.arms,
        bias=bias,
        method=a.method if a.method == b.method else "per-prompt values, combined prompt by prompt",
        lower=lower,
        upper=upper,
        ess=min(ess) if ess else None,
    )


def estimates(
    terms: Mapping[str, Term],
    rollouts: Rollouts,
    level: float,
    *,
    interval: Interval = "bootstrap",
    simultaneous: bool = False,
) -> dict[str, Estimate]:
    """Every term with its interval, all prompts resampled together.

    Args:
        terms: by name.
        rollouts: where they come from, for counts.
        level: of each interval, or of all at once when `simultaneous`.
        interval: betting has guaranteed coverage, for the terms that are unbiased and bounded.
        simultaneous: one factor for all rows, from the bootstrap of the largest |t|.
    """
    if not terms:
        return {}
    rows: list[np.ndarray] = []
    at: dict[str, int] = {}
    for name, term in terms.items():
        sides = [term.values]
        if term.lower is not None and term.upper is not None:
            sides += [term.lower, term.upper]
        at[name] = len(rows)
        rows += sides
    found = studentise(np.stack(rows))
    lo, hi = found.simultaneous(level) if simultaneous else found.interval(level)
    out = {}
    for name, term in terms.items():
        i = at[name]
        value, low, high = float(found.mean[i]), float(lo[i]), float(hi[i])
        how = "percentile-t bootstrap over prompts"
        if simultaneous:
            how = "joint " + how
        if term.weak:
            low, high = max(float(lo[i + 1]), term.low), min(float(hi[i + 2]), term.high)
            value, how = min(max(value, low), high), how + " of a lower and an upper bound"
        elif term.bounded and interval == "betting" and not simultaneous:
            ends = betting(term.values, term.low, term.high, level)
            low, high, how = float(ends[0]), float(ends[1]), "betting (hedged capital)"
        # What lies outside the quantity's range covers nothing. A bootstrap of few prompts may know no end.
        low, high = max(low, term.low, -1e308), min(high, term.high, 1e308)
        low, high = min(low, value), max(high, value)  # an unbiased estimate may lie outside
        out[name] = Estimate(
            value=value,
            lo=low,
            hi=high,
            level=level,
            n=int(sum(rollouts.rows(arm).sum() for arm in term.arms)),
            n_clusters=len(term.values),
            method=f"{term.method}; {how}",
            bias=term.bias,
            bracket=term.weak,
            ess=term.ess,
        )
    return out


class Arm:
    """One arm's rows as draws and prompts. Answers to x itself (arm none, a tuned policy) are draws each."""

    def __init__(self, rollouts: Rollouts, name: str) -> None:
        if name not in rollouts.arms:
            raise Absent(f"arm {name} is absent; roll it out")
        self.rollouts, self.name = rollouts, name
        self.index = index = np.flatnonzero(rollouts.rows(name))
        prompt = rollouts.prompt[index]
        keys = (prompt, rollouts.seed[index], rollouts.draw[index])
        new = np.ones(len(index), bool)
        if name != "none" and name not in rollouts.direct:
            new[1:] = np.any([np.diff(key) != 0 for key in keys], axis=0)
        self.starts = np.flatnonzero(new)
        self.answers = np.diff(np.append(self.starts, len(index)))
        n = len(rollouts.prompt_ids)
        self.draws = np.bincount(prompt[self.starts], minlength=n)
        if not self.draws.all():
            missing = rollouts.prompt_ids[int(np.argmin(self.draws))]
            raise AlignProError(
                f"arm {name}: has no rows for prompt_id {missing!r}, which other arms have; finish its "
                "rollout, or remove the prompt"
            )
        self.first = np.concatenate([[0], np.cumsum(self.draws)[:-1]])

    def mean(self, values: np.ndarray) -> np.ndarray:
        """[n]: `values` [rows of the arm] averaged within draws, then over draws."""
        by_draw = np.add.reduceat(values, self.starts) / self.answers
        return np.add.reduceat(by_draw, self.first) / self.draws

    def logp(self, name: str) -> np.ndarray:
        """[rows of the arm] nats. Raises Absent where any row has none."""
        values = self.rollouts.logps[name][self.index]
        missing = int(np.isnan(values).sum())
        if missing:
            raise Absent(
                f"{name} is missing in {missing} of {len(values)} rows of arm {self.name}; roll it out with "
                "a backend that gives log-probabilities"
            )
        return values

    @cached_property
    def reward(self) -> np.ndarray:
        return self.rollouts.reward[self.index]

    def least(self, draws: int, answers: int) -> None:
        """Raises Absent unless every prompt has `draws` draws, and every draw `answers` answers."""
        if self.draws.min() < draws:
            raise Absent(
                f"arm {self.name} has a prompt with {self.draws.min()} draw; give every prompt at least "
                f"{draws}"
            )
        if self.answers.min() < answers:
            raise Absent(
                f"arm {self.name} has a draw with {self.answers.min()} answer; give every rewrite at least "
                f"{answers}"
            )

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Prompts with equally many draws K: their positions [g], rewards [g, K, A]. A is the arm's least
        number of answers; of a draw with more the first A are taken."""
        answers = int(self.answers.min())
        cube = self.reward[self.starts[:, None] + np.arange(answers)]
        for size in np.unique(self.draws):
            at = np.flatnonzero(self.draws == size)
            yield at, cube[self.first[at][:, None] + np.arange(size)]

    def per_prompt(self, statistic: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[S, n]: `statistic` of the blocks, [S, g] each, put in the order of the prompts."""
        out: Any = None
        for at, block in self.blocks():
            found = np.asarray(statistic(block))
            out = np.empty((len(found), len(self.draws))) if out is None else out
            out[:, at] = found
        return out


class Terms:
    """Everything the statements need from one set of rollouts, computed once and on demand.

    Methods raise Absent, with the remedy, where the rollouts cannot give a term.
    """

    def __init__(self, rollouts: Rollouts, beta: float, lam: float) -> None:
        self.rollouts, self.beta, self.lam = rollouts, beta, lam
        self.low, self.high = rollouts.low, rollouts.high
        self.width = self.high - self.low
        self.warnings: dict[str, str] = {}
        self._arms: dict[str, Arm] = {}
        self._cache: dict[Any, Any] = {}

    def arm(self, name: str) -> Arm:
        if name not in self._arms:
            self._arms[name] = Arm(self.rollouts, name)
        return self._arms[name]

    def prompters(self) -> tuple[str, ...]:
        """Arms with rewrites by a prompter other than ρ_sft and ρ*."""
        known = ("none", "sft", "star")
        return tuple(a for a in self.rollouts.arms if a not in known and a not in self.rollouts.direct)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def j(self, name: str) -> Term:
        """J of an arm: the mean reward, unbiased."""
        arm = self.arm(name)
        values = self._once(("j", name), lambda: arm.mean(arm.reward))
        return Term(
            values, self.low, self.high, frozenset({name}), "none", "mean reward of each prompt", bounded=True
        )

    # π*, from the frozen model's own answers ----------------------------------------------------------

    def _model(self) -> tuple[np.ndarray, samples.Tilt, float]:
        def make() -> tuple[np.ndarray, samples.Tilt, float]:
            arm = self.arm("none")
            arm.least(2, 1)
            values = arm.per_prompt(lambda r: samples.model_tilt(r[..., 0], self.beta))
            plain = samples.Tilt(*arm.per_prompt(lambda r: np.stack(samples.tilt(r[..., 0], self.beta))))
            ess = float(np.median(plain.ess))
            if ess < LEAST_ESS:
                self.warnings["model weights"] = (
                    f"the weights of pi* are degenerate: {ess:.1f} effective answers per prompt at beta "
                    f"{self.beta:g}; draw more answers in arm none, or raise beta"
                )
            return values, plain, ess

        return self._once("model", make)

    def _weighted(self, values, low, high, lower, upper, ess: float, weak: bool, arms, method) -> Term:
        n = len(values)
        return Term(
            values,
            low,
            high,
            frozenset(arms),
            "unknown",
            method,
            lower=np.broadcast_to(lower, n) if weak else None,
            upper=np.broadcast_to(upper, n) if weak else None,
            ess=ess,
        )

    def _model_term(self, values, low, high, lower, upper) -> Term:
        ess = self._model()[2]
        method = "self-normalised weights e^{r/beta}, jackknifed"
        return self._weighted(values, low, high, lower, upper, ess, ess < LEAST_ESS, {"none"}, method)

    def j_pi(self) -> Term:
        """J(π*)."""
        values, plain, _ = self._model()
        return self._model_term(values[1], self.low, self.high, plain.mean, self.high)

    def tv_model(self) -> Term:
        """TV(π*, π_F). Where weights are degenerate: at least (E_π* r − E_πF r)/width, at most
        tanh(width/(4β))."""
        values, plain, _ = self._model()
        least = (plain.mean - self.j("none").values) / self.width
        return self._model_term(values[2], 0.0, 1.0, least, np.tanh(self.width / (4.0 * self.beta)))

    def model_kl(self) -> Term:
        """β KL(π*‖π_F) = J(π*) − β log Z*."""
        values = self._model()[0]
        return self._model_term(values[1] - values[0], 0.0, self.width, 0.0, self.width)

    def value_model(self) -> Term:
        """β log Z*, the optimal value of the RLHF objective."""
        values, plain, _ = self._model()
        return self._model_term(values[0], self.low, self.high, plain.value, self.high)

    def model_slack(self, width: float) -> Term:
        """width·TV(π*, π_F) − (E_π* r − E_πF r) ≥ 0: what the theorem gives away in its first term."""
        values = self._model()[0]
        slack = width * values[2] - (values[1] - self.j("none").values)
        return self._model_term(slack, -self.width, width, 0.0, width)

    # ρ*, from draws of ρ_sft --------------------------------------------------------------------------

    def _star(self, lam: float) -> samples.PrompterTilt:
        def make() -> samples.PrompterTilt:
            arm = self.arm("sft")
            arm.least(2, 2)
            return samples.PrompterTilt(*arm.per_prompt(lambda r: np.stack(samples.prompter_tilt(r, lam))))

        return self._once(("star", lam), make)

    def _star_state(self, lam: float) -> tuple[float, float, bool]:
        """Effective draws, noise, and whether either makes the weights useless (then a warning is kept)."""
        star = self._star(lam)
        ess, noise = float(np.median(star.ess)), float(np.mean(star.noise))
        given = int(self.arm("sft").answers.min())
        most = MOST_NOISE if given >= 4 else MOST_NOISE_UNCORRECTED
        if noise > most:
            answers = max(4, int(np.ceil(noise / MOST_NOISE * (given - 1))) + 1)
            self.warnings[f"noise {lam:g}"] = (
                f"R is known too coarsely for rho* at lambda {lam:g}: answers add {noise:.1f} to the "
                f"variance of log-weights; about {answers} answers per rewrite would do, or a larger lambda"
            )
        elif ess < LEAST_ESS:
            self.warnings[f"weights {lam:g}"] = (
                f"the weights of rho* are degenerate: {ess:.1f} effective rewrites per prompt at lambda "
                f"{lam:g}; draw more rewrites in arm sft, or raise lambda"
            )
        return ess, noise, noise > most or ess < LEAST_ESS

    def _upper_value(self, lam: float) -> np.ndarray | None:
        """Values biased up for λ log Z, or None where the draws are too few to say."""
        value, ess = self.arm("sft").per_prompt(lambda r: samples.noisy_value(r, lam))
        return value if float(np.median(ess)) >= LEAST_ESS else None

    def _star_term(self, values, low, high, lower, upper, lam: float, method: str) -> Term:
        ess, _, weak = self._star_state(lam)
        return self._weighted(values, low, high, lower, upper, ess, weak, {"sft"}, method)

    def value(self, lam: float | None = None) -> Term:
        """λ log Z = F(ρ*)."""
        lam = self.lam if lam is None else lam
        star = self._star(lam)
        upper = self._upper_value(lam) if self._star_state(lam)[2] else None
        method = "weights e^{R/lambda} along 0..1/lambda, cross-fitted over answers, jackknifed over draws"
        return self._star_term(
            star.value, self.low, self.high, star.lower, self.high if upper is None else upper, lam, method
        )

    def j_rho(self, lam: float | None = None) -> Term:
        """E_ρ* R by reweighting ρ_sft. Where that is useless: at least λ log Z, and at most 2V(λ/2) − V(λ),
        V(λ) = λ log Z, since log Z is convex in 1/λ with slope E_ρ* R."""
        lam = self.lam if lam is None else lam
        star = self._star(lam)
        half = self._upper_value(lam / 2.0) if self._star_state(lam)[2] else None
        upper = self.high if half is None else 2.0 * half - star.lower
        method = "weights e^{R/lambda}, cross-fitted over answers, jackknifed over draws"
        return self._star_term(star.mean, self.low, self.high, star.lower, upper, lam, method)

    def j_star(self) -> Term:
        """J(π_ρ*): of arm star where there is one, else by reweighting ρ_sft."""
        return self.j("star") if "star" in self.rollouts.arms else self.j_rho()

    def star_kl(self) -> Term:
        """λ KL(ρ*‖ρ_sft): from arm star's log-probabilities where it has them, else by reweighting."""
        if "star" in self.rollouts.arms:
            try:
                return self.kl_reference("star")
            except Absent:
                pass
        difference = self.j_rho() - self.value()
        n = len(difference.values)
        ends = (np.zeros(n), np.full(n, self.width)) if difference.weak else (None, None)
        return replace(difference, low=0.0, high=self.width, lower=ends[0], upper=ends[1])

    def prompter_slack(self) -> Term:
        """F(ρ*) − E_ρsft R ≥ 0, what the theorem gives away in its last step; of arm star, J − λKL of it."""
        if "star" in self.rollouts.arms:
            return self.j("star") - self.star_kl() - self.j("sft")
        return self.value() - self.j("sft")

    def best(self) -> Term:
        """E R of the best of a prompt's draws of ρ_sft, chosen by all answers but one, valued by that one."""

        def make() -> np.ndarray:
            arm = self.arm("sft")
            arm.least(2, 2)
            return arm.per_prompt(lambda r: samples.best_of(r, r.shape[-2])[None])[0]

        method = "best of a prompt's draws, cross-fitted over answers"
        return Term(self._once("best", make), self.low, self.high, frozenset({"sft"}), "down", method)

    # With log-probabilities ---------------------------------------------------------------------------

    def tv_shift(self) -> Term:
        """E_{x′~ρ_sft} TV(π_F(·|x), π_F(·|x′)), from y ~ π_F(·|x′): unbiased."""

        def make() -> np.ndarray:
            arm = self.arm("sft")
            ratio = samples.shortfall_of_ratio(arm.logp("logp_frozen_rewrite"), arm.logp("logp_frozen_x"))
            return arm.mean(ratio)

        method = "mean of max(0, 1 - pi_F(y|x)/pi_F(y|x')) over y ~ pi_F(.|x')"
        return Term(self._once("tv_shift", make), 0.0, 1.0, frozenset({"sft"}), "none", method, bounded=True)

    def shift_slack(self, width: float) -> Term:
        """width·E TV(π_F(·|x), π_F(·|x′)) − (R(x,x) − E_ρsft R) ≥ 0: given away in the second term."""
        return width * self.tv_shift() - (self.j("none") - self.j("sft"))

    def kl_reference(self, name: str) -> Term:
        """λ KL(ρ‖ρ_sft) of an arm's prompter, from the summed log-ratios of its rewrites. Unbiased."""
        arm = self.arm(name)
        ratio = arm.logp("logp_prompter") - arm.logp("logp_reference")
        if not np.isfinite(ratio).all():
            raise Absent(
                f"arm {name} has rewrites that its reference, or itself, cannot give: KL(rho||rho_sft) is "
                "infinite; score both with the sampler that was used"
            )
        method = "mean of log rho(x'|x) - log rho_sft(x'|x)"
        return Term(self.lam * arm.mean(ratio), -np.inf, np.inf, frozenset({name}), "none", method)

    def kl_policy(self, name: str) -> Term:
        """β KL(π_θ‖π_F) of a tuned policy, likewise."""
        arm = self.arm(name)
        ratio = arm.logp("logp_policy") - arm.logp("logp_frozen_x")
        if not (finite := np.isfinite(ratio)).all():
            raise Absent(
                f"arm {name}: the frozen model's decoding never gives {(~finite).sum()} of its {finite.size} "
                "answers, so that KL(pi||pi_F) is infinite; a policy keeps within top-p and top-k only if "
                "it was trained with them: roll out with --answer-temperature 1 --answer-top-p 1 "
                "--answer-top-k 0"
            )
        method = "mean of log pi_theta(y|x) - log pi_F(y|x)"
        return Term(self.beta * arm.mean(ratio), -np.inf, np.inf, frozenset({name}), "none", method)

    # Combinations ---------------------------------------------------------------------------------------

    def gap(self, name: str | None) -> Term:
        """J(π*) − J of an arm; of ρ* by reweighting when None."""
        return self.j_pi() - (self.j_rho() if name is None else self.j(name))

    def difference(self, one: str, other: str) -> Term:
        """J of one arm − J of another."""
        return self.j(one) - self.j(other)

    def shortfall(self, name: str) -> Term:
        """λ KL(ρ‖ρ*) = F(ρ*) − F(ρ) of an arm's prompter: what optimisation left of its objective."""
        return self.value() - self.j(name) + self.kl_reference(name)

    def policy_shortfall(self, name: str) -> Term:
        """β KL(π_θ‖π*) of a tuned policy, likewise."""
        return self.value_model() - self.j(name) + self.kl_policy(name)
