"""The resampled prompter: the exact law of n draws reweighted, its distance from ρ*, how many calls it takes.

n rewrites are drawn from ρ_sft, A answers to each give a mean reward R̂, and one rewrite is kept with chances
in proportion to e^{R̂/λ}. As n and A grow its law ρ_n tends to ρ*. Proofs: `docs/limits.md`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alignpro.calls import Plan, cheapest, check_eps
from alignpro.errors import AlignProError, as_number, check_temperature
from alignpro.theory.divergences import TINY, Floats, log1p, scaled_kl
from alignpro.theory.gibbs import positive, tilt
from alignpro.theory.instance import Instance, bare
from alignpro.theory.results.rewards import Temperature, as_temperature, extremes, reachable, rewards_of
from alignpro.theory.results.robustness import Perturbation, extent, perturbation, worst_loss

_NODES = 320
"""Nodes of the integral: with them its relative error is below 1e-16 for n to 1e15."""
_LEFT, _RIGHT = 40.0, 6.7
"""Ends in log t: n e^{−40 − log n} is below rounding, and so is e^{−e^6.7}."""


class Resampled(NamedTuple):
    """The law ρ_n of the rewrite kept of n, by exact rewards, beside the optimal tilt ρ*; w = ρ*/ρ_sft."""

    probs: Float[Array, "... K"]
    """ρ_n (probabilities)."""
    loss: Float[Array, "..."]
    """F(ρ*) − F(ρ_n) = λ KL(ρ_n‖ρ*), reward units: at least 0, at most `reward_loss`."""
    reward_loss: Float[Array, "..."]
    """E_ρ* R − E_ρn R ≥ 0, reward units."""
    reward_bound: Float[Array, "..."]
    """E_ρ*[(R − min R)(w − 1)/(w + n − 1)] ≥ `reward_loss`, reward units; equality at n = 1."""
    reward_worst: Float[Array, "..."]
    """span(R)·`worst_share(span(R), λ, n)` ≥ `reward_bound`, reward units."""
    tv: Float[Array, "..."]
    """d_TV(ρ*, ρ_n) (probability)."""
    tv_bound: Float[Array, "..."]
    """E_ρ*[(w − 1)⁺/(w + n − 1)] ≥ `tv` (probability); equality at n = 1."""
    tv_excess: Float[Array, "..."]
    """c/(n + c) ≥ `tv_bound`, c being `excess` (probability)."""
    kl: Float[Array, "..."]
    """KL(ρ*‖ρ_n), nats."""
    kl_bound: Float[Array, "..."]
    """E_ρ* log(1 + (w − 1)/n) ≥ `kl`, nats; equality at n = 1."""
    kl_chi2: Float[Array, "..."]
    """log(1 + χ²/n) ≥ `kl_bound`, nats."""
    excess: Float[Array, "..."]
    """c = E_ρ*(w − 1)⁺, from `chi2` to `chi2` + ¼."""
    chi2: Float[Array, "..."]
    """χ²(ρ*‖ρ_sft) = E_ρ* w − 1."""


def resample_law(
    base: Float[Floats, "... K"],
    energy: Float[Floats, "... K"],
    temperature: Float[Floats, "..."] | float,
    n: Int[Floats, ""] | int,
) -> Resampled:
    """Draw n times from `base`, keep one draw with chances ∝ e^{energy/temperature}: its law, exactly.

    ρ_n(k) = base(k)·n ∫ e^{−t} φ_k(t)^{n−1} dt over t > 0, φ_k(t) = Σ_j base(j) exp(−t e^{(energy_j −
    energy_k)/temperature}): that is 1/(w_k + the others' w) as an integral of exponentials, whose mean over
    independent draws is a power. The trapezoid rule in log t is exact to rounding, at any n and temperature.

    Args:
        base: probability vectors, zeros allowed.
        energy: finite values in reward units (R, or pairs' R̂); those off the support are ignored.
        temperature: λ > 0, broadcast against the leading axes.
        n: at least 1; costs the same at every n.

    Raises:
        AlignProError: n is not a whole number of at least 1, or a temperature is not positive and finite.
    """
    if not isinstance(n, jax.core.Tracer) and not ((draws := as_number("n", n)) >= 1 and draws.is_integer()):
        raise AlignProError(f"n {n}: must be an integer of at least 1; give the number of draws")
    base, energy = jnp.broadcast_arrays(jnp.asarray(base, float), jnp.asarray(energy, float))
    t = jnp.broadcast_to(jnp.asarray(positive("temperature", temperature), float), base.shape[:-1])
    return _resample_law(base, energy, t, jnp.asarray(n, float))


@jax.jit
def _resample_law(base: Array, energy: Array, t: Array, n: Array) -> Resampled:
    size = base.shape[-1]
    rows = jax.vmap(lambda b, e, lam: _one_law(b, e, lam, n))
    found = rows(base.reshape(-1, size), energy.reshape(-1, size), t.reshape(-1))
    return jax.tree.map(lambda leaf: leaf.reshape(base.shape[:-1] + leaf.shape[1:]), found)


def _one_law(base: Array, energy: Array, t: Array, n: Array) -> Resampled:
    """`resample_law` of one row [K]."""
    support = base > 0
    low, high = extent(energy, support)
    e = jnp.where(support, energy - high, 0.0)
    star = tilt(base, e, t)
    over = jnp.where(support, jnp.expm1(star.log_ratio), 0.0)  # w − 1
    weight = over + 1.0

    left = -_LEFT - jnp.log(n)
    step = (_RIGHT - left) / (_NODES - 1)
    u = left + step * jnp.arange(_NODES)

    def kept(k: Array) -> Array:
        """The integral for rewrite k, which is ρ_n/base there."""
        apart = jnp.clip((e - e[k]) / t, -1e300, 1e300)
        shrunk = jnp.expm1(-jnp.exp(u[:, None] + apart[None, :]))
        others = jnp.sum(base[None, :] * shrunk, -1)  # φ − 1
        power = jnp.where(n > 1, (n - 1.0) * log1p(jnp.maximum(others, -1.0)), 0.0)
        return jnp.sum(jnp.exp(jnp.log(n) + u - jnp.exp(u) + power)) * step

    share = lax.map(kept, jnp.arange(base.shape[0]))
    probs = jnp.where(support, base * share, 0.0)
    # log ρ_n/ρ*; where a chance underflows its product with anything finite is 0.
    ratio = jnp.where(support, jnp.log(jnp.maximum(share, TINY)) - star.log_ratio, 0.0)
    ones = jnp.ones_like(base)
    loss = scaled_kl(
        t * ones, probs, jnp.where(support, jnp.maximum(star.probs, TINY), 0.0), ratio, t * ratio
    )
    kl = scaled_kl(ones, star.probs, jnp.where(support, jnp.maximum(probs, TINY), 0.0), -ratio, -ratio)
    above = jnp.where(support, e - (low - high), 0.0)
    single = n < 1.5  # where w/(w + n − 1) = 1, also of w that underflow
    nearer = over * jnp.where(single, base, star.probs / jnp.where(single, 1.0, weight + n - 1.0))
    log_mean = jnp.where(single, star.log_ratio, log1p(jnp.where(single, 0.0, over / n)))
    excess = jnp.sum(star.probs * jnp.maximum(over, 0.0))
    chi2 = jnp.sum(base * over * over)
    near = ratio < 1.0
    moved = jnp.where(near, star.probs * -jnp.expm1(jnp.where(near, ratio, 0.0)), star.probs - probs)
    return Resampled(
        probs=probs,
        loss=loss,
        reward_loss=jnp.sum(moved * above),
        reward_bound=jnp.sum(nearer * above),
        reward_worst=(high - low) * worst_share(high - low, t, n),
        tv=0.5 * jnp.sum(jnp.abs(moved)),
        tv_bound=jnp.sum(jnp.maximum(nearer, 0.0)),
        tv_excess=excess / (n + excess),
        kl=kl,
        kl_bound=jnp.sum(star.probs * log_mean),
        kl_chi2=log1p(chi2 / n),
        excess=excess,
        chi2=chi2,
    )


def resampled(instance: Instance, lam: Temperature, n: Int[Floats, ""] | int) -> Resampled:
    """`resample_law` of the prompter, per prompt [X]: n rewrites from ρ_sft, reweighted by their exact R."""
    r = rewards_of(instance)
    return resample_law(r.prior, r.rewrite, as_temperature("lam", lam), n)


def worst_share(width: Any, lam: Any, n: Any) -> Array:
    """tanh(¼ log(1 + (e^{width/λ} − 1)/n)) ≥ TV(ρ*, ρ_n), and ≥ (E_ρ* R − E_ρn R)/width.

    Needs the width of the rewards alone, R's or, of noisy R̂, that of r. At n = 1 it is tanh(width/4λ),
    attained by two rewrites. Pure; any shapes that broadcast.
    """
    z = jnp.asarray(width, float) / jnp.asarray(lam, float)
    n = jnp.asarray(n, float)
    # log(1 + (e^z − 1)/n) = z − log n + log(1 + (n − 1) e^{−z}) where e^z overflows.
    grown = jnp.where(
        z < 30.0,
        log1p(jnp.expm1(jnp.minimum(z, 30.0)) / n),
        z + log1p((n - 1.0) * jnp.exp(-z)) - jnp.log(n),
    )
    return jnp.tanh(0.25 * grown)


class Answered(NamedTuple):
    """The tilt by rewards that are means of A answers, n → ∞, and what that noise costs; per prompt [X]."""

    rise: Float[Array, "X K"]
    """R_A − R ≥ 0, R_A = Aλ log E_{π_F(·|x′)} e^{r/(Aλ)}, reward units: ρ_A ∝ ρ_sft e^{R_A/λ}."""
    rise_bound: Float[Array, " X"]
    """`worst_loss(span(r), Aλ)` ≥ `rise`, at most span(r)²/(8Aλ), reward units."""
    prompter: Perturbation
    """ρ_A against ρ*. `loss` is F(ρ*) − F(ρ_A), `reward_loss` E_ρ* R − E_ρA R, of either sign."""
    loss_bound: Float[Array, " X"]
    """`worst_loss(rise_bound, λ)` ≥ `prompter.loss`, attained by two rewrites; reward units."""
    loss_fourth: Float[Array, " X"]
    """span(r)⁴/(512 A² λ³) ≥ `loss_bound`, reward units."""
    chi2: Float[Array, " X"]
    """χ² of the noisy weights, E e^{2R̂/λ}/(E e^{R̂/λ})² − 1, over rewrites and answers: with n draws
    KL(ρ_A‖law kept) ≤ log(1 + χ²/n), and the law's TV from ρ_A is at most c/(n + c), c = χ² + ¼."""


def answered(instance: Instance, lam: Temperature, answers: Int[Floats, ""] | int) -> Answered:
    """Tilt by mean rewards of A independent answers in R's place: E[e^{R̂/λ}|x′] = e^{R_A/λ}.

    Exact for every A, with no enumeration of answers. Raises AlignProError where `answers` is not a whole
    number of at least 1 or λ is not positive and finite.
    """
    number = answers
    if not isinstance(number, jax.core.Tracer) and not (
        (a := as_number("answers", number)) >= 1 and a % 1 == 0
    ):
        raise AlignProError(f"answers {answers}: must be an integer of at least 1; give answers to a rewrite")
    return _answered(bare(instance), as_temperature("lam", lam), jnp.asarray(number, float))


@jax.jit
def _answered(instance: Instance, lam: Array, answers: Array) -> Answered:
    r = rewards_of(instance)
    low, high = extent(r.response, reachable(instance))
    width = high - low

    def raised(t: Array) -> Array:
        """t log E_{π_F(·|x′)} e^{r/t} − R(x, x′), [X, K]."""
        gains = lax.map(lambda d: tilt(r.frozen, jnp.broadcast_to(d, r.frozen.shape), t).gain, r.response)
        return jnp.where(r.prior > 0, gains, 0.0)

    rise = raised(answers * lam)
    bound = worst_loss(width, answers * lam * jnp.ones_like(width))
    square = tilt(r.prior, r.rewrite + raised(0.5 * answers * lam), 0.5 * lam).free_energy
    first = tilt(r.prior, r.rewrite + rise, lam).free_energy
    u = width / (answers * lam)
    return Answered(
        rise=rise,
        rise_bound=bound,
        prompter=perturbation(r.prior, r.rewrite, r.rewrite + rise, lam, rise),
        loss_bound=worst_loss(bound, lam * jnp.ones_like(bound)),
        loss_fourth=u * u * (width / lam) * (width / 512.0),
        chi2=jnp.expm1(jnp.maximum(square - first, 0.0) * (2.0 / lam)),
    )


def calls_needed(instance: Instance, lam: float, eps: float, *, most_answers: int = 2**20) -> Plan | None:
    """Fewest calls for which E_x[E_ρ* R − E R of the rewrite kept] ≤ eps is proved, over A = 1, 2, 4, ….

    That loss is at most E_x[(E_ρ* R − E_ρA R)⁺ + span(R)·c/(n + c)], c = χ² + ¼ of `answered`; the first part
    is exact. One n and one A for all prompts; None where no A up to `most_answers` is enough. On the host.

    Raises:
        AlignProError: λ or eps is not positive and finite.
    """
    lam, eps = check_temperature("lam", lam), check_eps(eps)
    r = rewards_of(instance)
    p, width = np.asarray(instance.p), np.asarray(extremes(r.prior, r.rewrite, r.tie).span)

    @functools.cache
    def at(a: int) -> tuple[float, np.ndarray]:
        found = answered(instance, lam, a)
        noise = float(p @ np.maximum(np.asarray(found.prompter.reward_loss), 0.0))
        return noise, np.asarray(found.chi2) + 0.25

    def sampling(a: int, n: int) -> float:
        c = at(a)[1]
        return float(p @ (width * (c / (n + c))))

    return cheapest(eps, lambda a: at(a)[0], sampling, most_answers)
