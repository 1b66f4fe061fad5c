"""The quantities of the theory, taken from rollouts as per-prompt values (`Term`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from alignpro.estimation import laws, samples, unseen
from alignpro.estimation.paired import COMBINED, ROWS, Absent, Arm, Term
from alignpro.estimation.unseen import Side
from alignpro.rollouts import Rollouts

LEAST_ESS = 8.0
"""Effective samples per prompt, in the median, below which importance weights are degenerate."""
MOST_NOISE = 0.5
"""Variance that the noise of answers may add to the log-weights of ρ*; above it they are too coarse."""
MOST_NOISE_UNCORRECTED = 0.05
"""Such noise with fewer than 4 answers to a draw, too few for the jackknife over answers."""


SURE_SHRINK = 0.5
"""Factor that rewrites' means are shrunk by where limits are to be sure: fixed, not taken from the sample."""
_BY_BETA = "self-normalised weights e^{r/beta}, jackknifed"


class Weights(NamedTuple):
    """Importance weights of an arm's samples."""

    arm: str
    ess: float
    """Effective samples of a prompt, in the median."""
    weak: bool
    """Whether they cannot be trusted, so that what they give is bracketed by bounds."""
    sound: bool = False
    """Whether these bounds hold at every n: each is a mean of bounded values that err on its side."""

    def term(self, values, low, high, lower, upper, method: str) -> Term:
        """A term by these weights; `lower` and `upper`, known numbers or a `Side`, hold if they are weak."""
        found = Term(values, low, high, frozenset({self.arm}), "unknown", method, ess=self.ess)
        if not self.weak:
            return found
        count = len(values)
        lower, upper = (end if isinstance(end, Side) else _constant(end, count) for end in (lower, upper))
        return _between(found, lower, upper, self.sound)


def _constant(value: float, count: int) -> Side:
    return Side(np.full(count, float(value)), float(value), float(value))


def _between(term: Term, lower: Side, upper: Side, bounded: bool) -> Term:
    """A term with a bracket; `bounded` if each side errs on its own, so that limits hold at every n."""
    return replace(
        term,
        lower=lower.values,
        upper=upper.values,
        lower_reach=(lower.low, lower.high),
        upper_reach=(upper.low, upper.high),
        bounded=bounded,
    )


class Terms:
    """Everything the statements need from rollouts at β and λ, in reward units, computed once and on demand.

    Methods raise Absent, with the remedy, where the rollouts cannot give a term; `warnings` are of the terms
    computed so far, by kind.
    """

    def __init__(self, rollouts: Rollouts, beta: float, lam: float, sure: float | None = None) -> None:
        """Take rollouts at β and λ.

        Args:
            sure: brackets what rests on weights, by limits that hold at every n. Six are numbers (`_above` at
                β, β/2, λ and λ/2, and from below at β and λ), which share 1 − `ROWS` of the error 1 − sure.
        """
        self.rollouts, self.beta, self.lam, self.sure = rollouts, beta, lam, sure is not None
        self._error = None if sure is None else (1.0 - ROWS) * (1.0 - sure) / 6.0
        self.low, self.high = rollouts.low, rollouts.high
        self.width = self.high - self.low
        self.warnings: dict[str, str] = {"refused": said} if (said := rollouts.refusals()) else {}
        self._arms: dict[str, Arm] = {}
        self._cache: dict[Any, Any] = {}

    def arm(self, name: str) -> Arm:
        if name not in self._arms:
            self._arms[name] = found = Arm(self.rollouts, name)
            if found.copies.certain:
                self.warnings[f"copies {name}"] = found.copies.warning(name)
        return self._arms[name]

    def prompters(self) -> tuple[str, ...]:
        """Names of the arms with rewrites by a prompter other than ρ_sft and ρ*."""
        known = ("none", "sft", "star")
        return tuple(a for a in self.rollouts.arms if a not in known and a not in self.rollouts.direct)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def j(self, name: str) -> Term:
        """J(π_ρ) of an arm, its mean reward: unbiased."""
        arm = self.arm(name)
        values = self._once(("j", name), lambda: arm.mean(arm.reward))
        return Term(
            values, self.low, self.high, frozenset({name}), "none", "mean reward of each prompt", bounded=True
        )

    def part(self, name: str, part: str) -> Term:
        """The mean of one part of the reward in an arm, unbiased; an arm's parts add up to its `j`."""
        arm, ends = self.arm(name), self.rollouts.part_ranges[part]
        values = arm.mean(self.rollouts.parts[part][arm.index])
        return Term(values, *ends, frozenset({name}), "none", "mean of each prompt", bounded=True)

    def parts(self, names: Sequence[str]) -> dict[tuple[str, str], Term]:
        """The terms of all parts of the reward in some arms, by arm and part."""
        return {(name, part): self.part(name, part) for name in names for part in self.rollouts.parts}

    def refused(self, name: str) -> Term:
        """The share of an arm's answers that were refused: unbiased."""
        arm = self.arm(name)
        values = arm.mean(self.rollouts.refused[arm.index].astype(float))
        return Term(values, 0.0, 1.0, frozenset({name}), "none", "share of each prompt", bounded=True)

    def _doubt(self, rewards: np.ndarray, temperature: float, total: int) -> np.ndarray:
        return unseen.unresolved(rewards, temperature, self.low, self.high, total)

    def _unsettled(self, doubt: np.ndarray) -> str:
        """Say how many prompts what was not drawn could decide, where that counts; otherwise nothing."""
        some = np.mean(doubt) > unseen.SHARE
        return f"in {int((doubt > 0).sum())} of {len(doubt)} prompts" if some else ""

    @cached_property
    def _model(self) -> tuple[np.ndarray, samples.Tilt, Weights]:
        """π* by the answers of arm none: value, mean and TV freed of their bias, [3, n]; and as they are."""
        arm = self.arm("none")
        arm.least(2, 1)
        values = arm.per_prompt(lambda r: samples.model_tilt(r[..., 0], self.beta))
        plain = samples.Tilt(*arm.per_prompt(lambda r: samples.tilt(r[..., 0], self.beta)))
        total = int(arm.draws.sum())
        (doubt,) = arm.per_prompt(lambda r: self._doubt(r[..., 0], self.beta, total)[None])
        ess = float(np.median(plain.ess))
        if ess < LEAST_ESS:
            self.warnings["model weights"] = (
                f"the weights of pi* are degenerate: {ess:.1f} effective answers per prompt at beta "
                f"{self.beta:g}; draw more answers in arm none, or raise beta"
            )
        elif unsettled := self._unsettled(doubt):
            self.warnings["model weights"] = (
                f"answers too rare to be drawn could decide what pi* earns {unsettled}, where all rewards "
                f"are alike or one or two answers carry the weight at beta {self.beta:g}; draw more answers "
                "in arm none, or raise beta"
            )
        return values, plain, Weights("none", ess, self.sure or "model weights" in self.warnings, True)

    def _above(self, arm: str, temperature: float) -> Side:
        """Bound t log E e^{r/t} (arm none) or λ log Z (arm sft) from above, whatever was not drawn.

        e^{R/λ} is at most the mean of e^{R̂/λ} over answers (Jensen), R̂ a draw's mean reward.
        """

        def make() -> Side:
            (g,) = self.arm(arm).per_prompt(
                lambda r: unseen.ceiling(r.mean(-1), temperature, self.high)[None]
            )
            return unseen.value_above(g, temperature, self.high, self._error)

        return self._once(("above", arm, temperature), make)

    def _mean_above(self) -> Side:
        """Bound J(π*) from above, whatever was not drawn."""
        plain = self._model[1]
        half = self._above("none", self.beta / 2.0)
        return self._once(
            "mean above", lambda: unseen.mean_above(half, plain.value, self.low, self.high, self._error)
        )

    def _side(self, values: np.ndarray) -> Side:
        return Side(values, self.low, self.high)

    def j_pi(self) -> Term:
        """J(π*), the expected reward of the RLHF optimum, by reweighting the answers of arm none."""
        values, plain, weights = self._model
        upper = self._mean_above() if weights.weak else self.high
        return weights.term(values[1], self.low, self.high, self._side(plain.mean), upper, _BY_BETA)

    def tv_model(self) -> Term:
        """TV(π*, π_F), the total variation between the RLHF optimum and the frozen model.

        Where weights are degenerate: at least (E_π* r − E_π_F r)/width, at most tanh(width/(4β)).
        """
        values, plain, weights = self._model
        least = Side((plain.mean - self.j("none").values) / self.width, -1.0, 1.0)
        return weights.term(values[2], 0.0, 1.0, least, np.tanh(self.width / (4.0 * self.beta)), _BY_BETA)

    def model_kl(self) -> Term:
        """β KL(π*‖π_F) = J(π*) − β log Z*, in reward units."""
        values, plain, weights = self._model
        upper = Side(self.high - plain.value, 0.0, self.width)
        return weights.term(values[1] - values[0], 0.0, self.width, 0.0, upper, _BY_BETA)

    def value_model(self) -> Term:
        """β log Z*, the optimal value of the RLHF objective."""
        values, plain, weights = self._model
        upper = self._above("none", self.beta) if weights.weak else self.high
        return weights.term(values[0], self.low, self.high, self._side(plain.value), upper, _BY_BETA)

    def model_slack(self, width: float) -> Term:
        """Slack of Theorem 1's first term: width·TV(π*, π_F) − (E_π* r − E_π_F r) ≥ 0."""
        values, _, weights = self._model
        slack = width * values[2] - (values[1] - self.j("none").values)
        return weights.term(slack, -self.width, width, 0.0, width, _BY_BETA)

    def _star(self, lam: float) -> tuple[samples.PrompterTilt, Weights]:
        """ρ* by the draws of arm sft; a warning where noise, or few effective draws, make that useless."""

        def make() -> tuple[samples.PrompterTilt, Weights]:
            arm = self.arm("sft")
            arm.least(2, 2)
            # A factor from other prompts makes a prompt's lower bound depend on theirs.
            shrink = SURE_SHRINK if self.sure else None
            star = samples.PrompterTilt(*arm.per_prompt(lambda r: samples.prompter_tilt(r, lam, shrink)))
            ess, noise, given = float(np.median(star.ess)), float(np.mean(star.noise)), int(arm.answers.min())
            most = MOST_NOISE if given >= 4 else MOST_NOISE_UNCORRECTED
            if noise > most:
                answers = max(4, int(np.ceil(noise / MOST_NOISE * (given - 1))) + 1)
                self.warnings[f"noise {lam:g}"] = (
                    f"R is known too coarsely for rho* at lambda {lam:g}: answers add {noise:.1f} to the "
                    f"variance of log-weights; about {answers} answers per rewrite would do, or a larger "
                    "lambda"
                )
            elif ess < LEAST_ESS:
                self.warnings[f"weights {lam:g}"] = (
                    f"the weights of rho* are degenerate: {ess:.1f} effective rewrites per prompt at lambda "
                    f"{lam:g}; draw more rewrites in arm sft, or raise lambda"
                )
            elif unsettled := self._unsettled(self._star_doubt(lam)):
                self.warnings[f"weights {lam:g}"] = (
                    f"rewrites too rare to be drawn could decide what rho* earns {unsettled}, where all are "
                    f"worth the same or one or two carry the weight at lambda {lam:g}; draw more rewrites in "
                    "arm sft, or raise lambda"
                )
            known = noise <= most and f"weights {lam:g}" not in self.warnings
            return star, Weights("sft", ess, self.sure or not known, self.sure)

        return self._once(("star", lam), make)

    def _star_doubt(self, lam: float) -> np.ndarray:
        """How much of each prompt's ρ* is not settled by the rewrites drawn, [n] in [0, 1]."""
        arm = self.arm("sft")
        total = int(arm.draws.sum())
        return arm.per_prompt(lambda r: self._doubt(r.mean(-1), lam, total)[None])[0]

    def hidden(self, lam: float, share: float) -> float:
        """Bound how much more ρ* could earn if `share` of the rewrites, none of them drawn, were perfect.

        On average over prompts; concave in each prompt's own share, so that an even one is the worst.
        """
        (rise,) = self.arm("sft").per_prompt(
            lambda r: (
                unseen.hidden(r.mean(-1), lam, self.high, share)
                * (self.high - samples.tilt(r.mean(-1), lam).mean)
            )[None]
        )
        return float(rise.mean())

    def _upper_value(self, lam: float) -> Side:
        """Values that are biased up for λ log Z; where draws are too few, limits for the unseen."""
        arm = self.arm("sft")
        value, ess = arm.per_prompt(lambda r: samples.noisy_value(r, lam))
        settled = float(np.median(ess)) >= LEAST_ESS and not self._unsettled(self._star_doubt(lam))
        return self._above("sft", lam) if self.sure or not settled else self._side(value)

    def _star_lower(self, lam: float, star: samples.PrompterTilt) -> Side:
        """Values that are biased down for λ log Z, at least low − `_price`."""
        return Side(star.lower, self.low - self._price(lam), self.high)

    def _price(self, lam: float) -> float:
        """Bound λ KL of a prompt's draws that are tilted: at most λ log(draws).

        Where the tilt is by s = `SURE_SHRINK`/λ, also λ (s width)²/8: KL grows in s by s times a variance.
        """
        most = lam * float(np.log(self.arm("sft").draws.max()))
        return min(most, 0.125 * (SURE_SHRINK * self.width) ** 2 / lam) if self.sure else most

    def value(self, lam: float | None = None) -> Term:
        """λ log Z = F(ρ*), the optimal value of the prompter's objective, in reward units."""
        lam = self.lam if lam is None else lam
        star, weights = self._star(lam)
        upper = self._upper_value(lam) if weights.weak else self.high
        method = "weights e^{R/lambda} along 0..1/lambda, cross-fitted over answers, jackknifed over draws"
        lower = self._star_lower(lam, star)
        return weights.term(star.value, self.low, self.high, lower, upper, method)

    def _rho_above(self, lam: float) -> Side:
        """Bound E_ρ* R from above by 2V(λ/2) − V(λ), V(λ) = λ log Z, or by the reward's upper end."""

        def make() -> Side:
            lower = self._star_lower(lam, self._star(lam)[0])
            half = self._upper_value(lam / 2.0)
            return unseen.mean_above(half, lower.values, lower.low, self.high, self._error)

        return self._once(("rho above", lam), make)

    def j_rho(self, lam: float | None = None) -> Term:
        """E_ρ* R, the expected reward of the optimal prompter, by reweighting ρ_sft.

        Where that is useless: at least λ log Z, and at most 2V(λ/2) − V(λ), V(λ) = λ log Z, since log Z is
        convex in 1/λ with slope E_ρ* R.
        """
        lam = self.lam if lam is None else lam
        star, weights = self._star(lam)
        upper = self._rho_above(lam) if weights.weak else self.high
        method = "weights e^{R/lambda}, cross-fitted over answers, jackknifed over draws"
        return weights.term(star.mean, self.low, self.high, self._star_lower(lam, star), upper, method)

    def j_star(self) -> Term:
        """J(π_ρ*), from arm star where there is one, else by reweighting ρ_sft."""
        return self.j("star") if "star" in self.rollouts.arms else self.j_rho()

    def star_kl(self) -> Term:
        """λ KL(ρ*‖ρ_sft), from arm star's log-probabilities where it has them, else by reweighting."""
        if "star" in self.rollouts.arms:
            try:
                return self.kl_reference("star")
            except Absent:
                pass
        star, weights = self._star(self.lam)
        lower = self._star_lower(self.lam, star)
        upper = Side(self.high - lower.values, 0.0, self.high - lower.low)
        return weights.term(star.mean - star.value, 0.0, self.width, 0.0, upper, COMBINED)

    def prompter_slack(self) -> Term:
        """Slack of Theorem 1's last step: F(ρ*) − E_ρ_sft R ≥ 0, F(ρ*) of arm star where there is one."""
        if "star" in self.rollouts.arms:
            return self.j("star") - self.star_kl() - self.j("sft")
        return self.tilt_slack()

    def tilt_slack(self) -> Term:
        """λ log Z − E_ρ_sft R ≥ 0, by reweighting ρ_sft."""
        found = self.value() - self.j("sft")
        if not self.sure:
            return found
        # Paired answer by answer: a tilt by s moves means by width·TV, and TV ≤ tanh(s width/4).
        most = float(self.width * np.tanh(0.25 * SURE_SHRINK * self.width / self.lam))
        gain = self._star(self.lam)[0].gain
        return replace(found, lower=gain, lower_reach=(-most - self._price(self.lam), most))

    def best(self, n: int | None = None) -> Term:
        """E R of the best of n draws of ρ_sft (left out: of all that a prompt has), by `samples.best_of`."""

        def make() -> np.ndarray:
            arm = self.arm("sft")
            arm.least(2, 2)
            return arm.per_prompt(lambda r: samples.best_of(r, n or r.shape[-2])[None])[0]

        method = "best of a prompt's draws, cross-fitted over answers"
        return Term(self._once(("best", n), make), self.low, self.high, frozenset({"sft"}), "down", method)

    def tv_shift(self) -> Term:
        """E_{x′~ρ_sft} TV(π_F(·|x), π_F(·|x′)), how far rewriting moves the answers: unbiased."""

        def make() -> np.ndarray:
            arm = self.arm("sft")
            ratio = samples.shortfall_of_ratio(arm.logp("logp_frozen_rewrite"), arm.logp("logp_frozen_x"))
            return arm.mean(ratio)

        method = "mean of max(0, 1 - pi_F(y|x)/pi_F(y|x')) over y ~ pi_F(.|x')"
        return Term(self._once("tv_shift", make), 0.0, 1.0, frozenset({"sft"}), "none", method, bounded=True)

    def shift_slack(self, width: float) -> Term:
        """Slack of Theorem 1's second term: width·E TV − (R(x,x) − E_ρ_sft R) ≥ 0."""
        return width * self.tv_shift() - (self.j("none") - self.j("sft"))

    def law_shift(self) -> Term:
        """E_x W1 of the laws of r under π_F(·|x) and under π_ρ_sft(·|x), from rewards alone: biased up."""
        none, sft = self.arm("none"), self.arm("sft")
        values = self._once("law_shift", lambda: laws.shift(laws.by_prompt(none), laws.by_prompt(sft)))
        method = "area between the distribution functions of rewards of arms none and sft"
        found = Term(values, 0.0, self.width, frozenset({"none", "sft"}), "up", method)
        if not self.sure:
            return found
        means = self.j("none").values - self.j("sft").values  # at most W1, and unbiased
        return _between(found, Side(means, -self.width, self.width), Side(values, 0.0, self.width), True)

    def law_slack(self) -> Term:
        """Slack of `law`: W1 − (R(x,x) − E_ρ_sft R) ≥ 0, in samples too: W1 bounds differences of means."""
        found = self.law_shift() - (self.j("none") - self.j("sft"))
        found = replace(found, low=0.0)
        if not self.sure:
            return found
        upper = Side(found.values, 0.0, 2.0 * self.width)
        return _between(found, _constant(0.0, len(found.values)), upper, True)

    def kl_reference(self, name: str) -> Term:
        """λ KL(ρ‖ρ_sft) of an arm's prompter, from the summed log-ratios of its rewrites: unbiased."""
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
        """β KL(π_θ‖π_F) of a tuned policy, from the summed log-ratios of its answers: unbiased."""
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

    def gap(self, name: str | None) -> Term:
        """J(π*) − J(π_ρ) of an arm's prompter; of ρ* by reweighting when `name` is None."""
        return self.j_pi() - (self.j_rho() if name is None else self.j(name))

    def difference(self, one: str, other: str) -> Term:
        return self.j(one) - self.j(other)

    def shortfall(self, name: str) -> Term:
        """λ KL(ρ‖ρ*) = F(ρ*) − F(ρ) of an arm's prompter: what optimisation left of its objective."""
        return self.value() - self.j(name) + self.kl_reference(name)

    def policy_shortfall(self, name: str) -> Term:
        """β KL(π_θ‖π*) of a tuned policy: what its training left of its objective."""
        return self.value_model() - self.j(name) + self.kl_policy(name)
