"""The quantities of the theory, taken from rollouts as per-prompt values (`Term`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from alignpro.estimation import laws, samples
from alignpro.estimation.paired import COMBINED, Absent, Arm, Term
from alignpro.rollouts import Rollouts

LEAST_ESS = 8.0
"""Effective samples per prompt, in the median, below which importance weights are degenerate."""
MOST_NOISE = 0.5
"""Variance that the noise of answers may add to the log-weights of ρ*; above it they are too coarse."""
MOST_NOISE_UNCORRECTED = 0.05
"""Such noise with fewer than 4 answers to a draw, too few for the jackknife over answers."""


_BY_BETA = "self-normalised weights e^{r/beta}, jackknifed"


class Weights(NamedTuple):
    """Importance weights of an arm's samples."""

    arm: str
    ess: float
    """Effective samples of a prompt, in the median."""
    weak: bool
    """Whether they are degenerate, so that what they give is bracketed by bounds."""

    def term(self, values, low, high, lower, upper, method: str) -> Term:
        """A term by these weights; `lower` and `upper` hold where they are degenerate."""
        found = Term(values, low, high, frozenset({self.arm}), "unknown", method, ess=self.ess)
        if not self.weak:
            return found
        lower, upper = (np.broadcast_to(end, len(values)) for end in (lower, upper))
        return replace(found, lower=lower, upper=upper)


class Terms:
    """Everything the statements need from rollouts at β and λ, in reward units, computed once and on demand.

    Methods raise Absent, with the remedy, where the rollouts cannot give a term; `warnings` are of the terms
    computed so far, by kind.
    """

    def __init__(self, rollouts: Rollouts, beta: float, lam: float) -> None:
        self.rollouts, self.beta, self.lam = rollouts, beta, lam
        self.low, self.high = rollouts.low, rollouts.high
        self.width = self.high - self.low
        self.warnings: dict[str, str] = {"refused": said} if (said := rollouts.refusals()) else {}
        self._arms: dict[str, Arm] = {}
        self._cache: dict[Any, Any] = {}

    def arm(self, name: str) -> Arm:
        if name not in self._arms:
            self._arms[name] = Arm(self.rollouts, name)
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

    @cached_property
    def _model(self) -> tuple[np.ndarray, samples.Tilt, Weights]:
        """π* by the answers of arm none: value, mean and TV freed of their bias, [3, n]; and as they are."""
        arm = self.arm("none")
        arm.least(2, 1)
        values = arm.per_prompt(lambda r: samples.model_tilt(r[..., 0], self.beta))
        plain = samples.Tilt(*arm.per_prompt(lambda r: samples.tilt(r[..., 0], self.beta)))
        ess = float(np.median(plain.ess))
        if ess < LEAST_ESS:
            self.warnings["model weights"] = (
                f"the weights of pi* are degenerate: {ess:.1f} effective answers per prompt at beta "
                f"{self.beta:g}; draw more answers in arm none, or raise beta"
            )
        return values, plain, Weights("none", ess, ess < LEAST_ESS)

    def j_pi(self) -> Term:
        """J(π*), the expected reward of the RLHF optimum, by reweighting the answers of arm none."""
        values, plain, weights = self._model
        return weights.term(values[1], self.low, self.high, plain.mean, self.high, _BY_BETA)

    def tv_model(self) -> Term:
        """TV(π*, π_F), the total variation between the RLHF optimum and the frozen model.

        Where weights are degenerate: at least (E_π* r − E_πF r)/width, at most tanh(width/(4β)).
        """
        values, plain, weights = self._model
        least = (plain.mean - self.j("none").values) / self.width
        return weights.term(values[2], 0.0, 1.0, least, np.tanh(self.width / (4.0 * self.beta)), _BY_BETA)

    def model_kl(self) -> Term:
        """β KL(π*‖π_F) = J(π*) − β log Z*, in reward units."""
        values, _, weights = self._model
        return weights.term(values[1] - values[0], 0.0, self.width, 0.0, self.width, _BY_BETA)

    def value_model(self) -> Term:
        """β log Z*, the optimal value of the RLHF objective."""
        values, plain, weights = self._model
        return weights.term(values[0], self.low, self.high, plain.value, self.high, _BY_BETA)

    def model_slack(self, width: float) -> Term:
        """Slack of Theorem 1's first term: width·TV(π*, π_F) − (E_π* r − E_πF r) ≥ 0."""
        values, _, weights = self._model
        slack = width * values[2] - (values[1] - self.j("none").values)
        return weights.term(slack, -self.width, width, 0.0, width, _BY_BETA)

    def _star(self, lam: float) -> tuple[samples.PrompterTilt, Weights]:
        """ρ* by the draws of arm sft; a warning where noise, or few effective draws, make that useless."""

        def make() -> tuple[samples.PrompterTilt, Weights]:
            arm = self.arm("sft")
            arm.least(2, 2)
            star = samples.PrompterTilt(*arm.per_prompt(lambda r: samples.prompter_tilt(r, lam)))
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
            return star, Weights("sft", ess, noise > most or ess < LEAST_ESS)

        return self._once(("star", lam), make)

    def _upper_value(self, lam: float) -> np.ndarray | None:
        """Values that are biased up for λ log Z, or None where the draws are too few to say."""
        value, ess = self.arm("sft").per_prompt(lambda r: samples.noisy_value(r, lam))
        return value if float(np.median(ess)) >= LEAST_ESS else None

    def value(self, lam: float | None = None) -> Term:
        """λ log Z = F(ρ*), the optimal value of the prompter's objective, in reward units."""
        lam = self.lam if lam is None else lam
        star, weights = self._star(lam)
        known = self._upper_value(lam) if weights.weak else None
        method = "weights e^{R/lambda} along 0..1/lambda, cross-fitted over answers, jackknifed over draws"
        upper = self.high if known is None else known
        return weights.term(star.value, self.low, self.high, star.lower, upper, method)

    def j_rho(self, lam: float | None = None) -> Term:
        """E_ρ* R, the expected reward of the optimal prompter, by reweighting ρ_sft.

        Where that is useless: at least λ log Z, and at most 2V(λ/2) − V(λ), V(λ) = λ log Z, since log Z is
        convex in 1/λ with slope E_ρ* R.
        """
        lam = self.lam if lam is None else lam
        star, weights = self._star(lam)
        half = self._upper_value(lam / 2.0) if weights.weak else None
        upper = self.high if half is None else 2.0 * half - star.lower
        method = "weights e^{R/lambda}, cross-fitted over answers, jackknifed over draws"
        return weights.term(star.mean, self.low, self.high, star.lower, upper, method)

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
        return weights.term(star.mean - star.value, 0.0, self.width, 0.0, self.width, COMBINED)

    def prompter_slack(self) -> Term:
        """Slack of Theorem 1's last step: F(ρ*) − E_ρsft R ≥ 0, with F(ρ*) of arm star where there is one."""
        if "star" in self.rollouts.arms:
            return self.j("star") - self.star_kl() - self.j("sft")
        return self.value() - self.j("sft")

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
        """Slack of Theorem 1's second term: width·E TV − (R(x,x) − E_ρsft R) ≥ 0."""
        return width * self.tv_shift() - (self.j("none") - self.j("sft"))

    def law_shift(self) -> Term:
        """E_x W1 of the laws of r under π_F(·|x) and under π_ρsft(·|x), from rewards alone: biased up."""
        none, sft = self.arm("none"), self.arm("sft")
        values = self._once("law_shift", lambda: laws.shift(laws.by_prompt(none), laws.by_prompt(sft)))
        method = "area between the distribution functions of rewards of arms none and sft"
        return Term(values, 0.0, self.width, frozenset({"none", "sft"}), "up", method)

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
