"""The cost in KL of a gain in reward: budgets, frontiers, best of n, the price of prompting."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from alignpro.errors import LEAST, MOST, AlignProError, as_number
from alignpro.shown import Shown
from alignpro.theory.bounds import paper_r_max
from alignpro.theory.divergences import TINY, Floats, kl, log1p, log_quotient, scaled_kl
from alignpro.theory.elementwise import average
from alignpro.theory.gibbs import positive, tilt
from alignpro.theory.instance import Instance, bare, rectangular
from alignpro.theory.results.rewards import (
    Temperature,
    as_prompter,
    as_temperature,
    extremes,
    given,
    rewards_of,
    root_of,
    variance,
)
from alignpro.theory.solution import Solution


class KLBudget(NamedTuple):
    """Theorem 1 read as a budget: its right side is ≥ 0 while E_x KL(ρ*‖ρ_sft) ≤ (ε1+ε2)/λ. Nats."""

    model: Float[Array, " X"]
    """ε1(x) = r_max TV(π*, π_F), reward units."""
    shift: Float[Array, " X"]
    """ε2(x) = r_max E_ρ_sft TV(π_F(·|x), π_F(·|x′)), reward units."""
    spent: Float[Array, " X"]
    """KL(ρ*‖ρ_sft) per prompt, nats."""
    mean_budget: Float[Array, ""]
    """Mean over P of (ε1+ε2)/λ, nats."""
    mean_spent: Float[Array, ""]
    """Mean over P of `spent`, nats."""
    within: Bool[Array, ""]
    """Whether mean_spent ≤ mean_budget. Where False, ρ* provably outperforms π*: J(π*) − J(π_ρ*) < 0."""


def kl_budget(s: Solution) -> KLBudget:
    """(ε1+ε2)/λ in nats, ε1 and ε2 the first two terms of Theorem 1, r_max = `bounds.paper_r_max`.

    J(π*) − J(π_ρ*) ≤ λ(budget − spent): an overspent budget is a certificate that prompting beats RLHF;
    within it Theorem 1 decides nothing. About ρ*, also where `s` was computed for another prompter.
    """
    width = paper_r_max(s)
    model, shift = width * s.tv_model, width * s.tv_shift
    spent = s.prompter_kl / s.lam
    mean_budget, mean_spent = s.average((model + shift) / s.lam), s.average(spent)
    return KLBudget(model, shift, spent, mean_budget, mean_spent, mean_spent <= mean_budget)


@jax.jit
def _lam_at_kl(base: Array, energy: Array, wanted: Array, p: Array | None = None) -> Array:
    """The temperature [N] at which each row's tilt spends `wanted` [N]; [1], in the mean, with p [N].

    Rows of constant energy spend nothing at any temperature: they give the least one.
    """
    span = extremes(base, energy, jnp.zeros_like(energy[..., 0])).span
    if p is not None:
        span = jnp.max(jnp.where(p > 0, span, 0.0), -1, keepdims=True)

    def excess(t):
        tilted = tilt(base, energy, jnp.broadcast_to(t, base.shape[:-1]))
        spent = tilted.cost / t
        steep = variance(tilted.probs, energy) / t / t
        if p is not None:
            spent, steep = (average(p, v)[None] for v in (spent, steep))
        return jnp.log(wanted) - jnp.log(spent), steep / spent

    # KL(λ) = ∫ s Var_s ds over s from 0 to 1/λ, and Var ≤ span²/4: so KL ≤ span²/(8λ²).
    high = jnp.clip(span / jnp.sqrt(8.0 * wanted) * (1 + 1e-9), LEAST, MOST)
    return root_of(excess, jnp.full_like(high, LEAST), high)


def lam_for_kl(
    instance: Instance, kl: Float[Floats, ""] | float, *, per_prompt: bool = False
) -> Float[Array, ""] | Float[Array, " X"]:
    """The λ whose ρ* spends exactly E_x KL(ρ*‖ρ_sft) = kl; one λ(x) per prompt with `per_prompt`.

    It is unique, as that KL falls strictly in λ, from −E_x log ρ_sft(argmax R) to 0. One λ for all prompts is
    the best way to spend a mean KL (`frontier`). On the host; KL is met to 1e-12 relative.

    Raises:
        AlignProError: kl is not a positive number, R is constant so that nothing can be spent, kl is not
            below the supremum (which is stated), or the λ lies outside 1e-18 to 1e18.
    """
    wanted = as_number("kl", kl)
    if not 0 < wanted < np.inf:
        raise AlignProError(f"kl {kl}: must be a positive finite number of nats; kl 0 is the limit λ → ∞")
    p = np.asarray(instance.p)
    prior, rewrite, limit = (np.asarray(v) for v in _support(bare(instance)))
    most = limit[p > 0] if per_prompt else np.asarray(p @ limit)
    if not wanted < most.min():
        where = f" (prompt {int(np.flatnonzero(p > 0)[most.argmin()])})" if per_prompt else ""
        raise AlignProError(
            f"kl {wanted:.12g}: cannot be spent; the supremum, as λ → 0, is {most.min():.12g} nats{where}; "
            "give less"
        )
    if per_prompt:
        rows = np.where((p > 0)[:, None], rewrite, 0.0)
        found = _lam_at_kl(prior, rows, np.full(p.shape, wanted))
        off = np.where(p > 0, np.abs(np.asarray(_spent(prior, rewrite, found)) / wanted - 1), 0.0).max()
    else:
        found = _lam_at_kl(prior, rewrite, np.asarray([wanted]), p)[0]
        off = abs(float(p @ np.asarray(_spent(prior, rewrite, jnp.full(p.shape, found)))) / wanted - 1)
    if not off <= 1e-9:
        raise AlignProError(
            f"kl {wanted:.12g}: needs a lam outside 1e-18 to 1e18, or closer to the supremum than rounding "
            "allows; rescale the rewards or give another kl"
        )
    return jnp.where(jnp.asarray(p) > 0, found, jnp.inf) if per_prompt else found


@jax.jit
def _support(instance: Instance) -> tuple[Array, Array, Array]:
    """ρ_sft, R (from the best response) and the supremum of KL(ρ*‖ρ_sft), nats per prompt."""
    r = rewards_of(instance)
    return r.prior, r.rewrite, -jnp.log(extremes(r.prior, r.rewrite, r.tie).mass)


_spent = jax.jit(lambda base, energy, t: tilt(base, energy, t).cost / t)


class Frontier(NamedTuple):
    """The reward–KL frontier traced by ρ*, one row per λ."""

    lam: Float[Array, " L"]
    """λ, which is also the slope d reward/d KL at this point, in reward units per nat."""
    kl: Float[Array, "L X"]
    """KL(ρ*‖ρ_sft), nats."""
    reward: Float[Array, "L X"]
    """E_ρ* R, reward units."""
    lift: Float[Array, "L X"]
    """E_ρ* R − E_ρ_sft R ≥ 0, without cancellation."""
    mean_kl: Float[Array, " L"]
    """Mean over P of `kl`, nats."""
    mean_reward: Float[Array, " L"]
    """Mean over P of `reward`, reward units."""
    mean_lift: Float[Array, " L"]
    """Mean over P of `lift`, reward units."""

    def to_frame(self) -> Any:
        """A `pandas.DataFrame` with a row for each λ: the means of KL, reward and lift."""
        return Shown.to_frame(self)  # type: ignore[arg-type]

    def plot(self) -> Any:
        """The mean reward at each λ as a `matplotlib.figure.Figure`."""
        return Shown.plot(self)  # type: ignore[arg-type]


def frontier(instance: Instance, lams: Float[Floats, " L"], *, responses: bool = False) -> Frontier:
    """(KL, E R) along ρ*_λ: no prompter with that KL or less has more reward, per prompt or in the mean.

    The curve is increasing and concave, with slope λ. With `responses`, the frontier of all policies started
    from π_ρ_sft (base Σ ρ_sft π_F, energy r*): it lies on or above the first.
    """
    if not isinstance(lams, jax.core.Tracer):
        lams = positive("lams", rectangular("lams", lams))
    lams, r = jnp.asarray(lams, float), rewards_of(instance)
    base, energy = (r.prior @ r.frozen, r.response) if responses else (r.prior, r.rewrite)
    reference = jnp.sum(base * energy, -1) + r.top
    tilted = jax.vmap(lambda t: tilt(base, energy, t))(lams)
    spent = tilted.cost / lams[:, None]
    reward = reference[None, :] + tilted.lift
    p = jnp.broadcast_to(jnp.asarray(instance.p, float), spent.shape)
    means = (average(p, v) for v in (spent, reward, tilted.lift))
    return Frontier(lams, spent, reward, tilted.lift, *means)


class BestOfN(NamedTuple):
    """The best of n independent draws from a base, by energy."""

    probs: Float[Array, "... K"]
    """Distribution of the draw that is kept (probabilities), exactly."""
    lift: Float[Array, "..."]
    """Mean energy less the base's, ≥ 0, energy units."""
    kl: Float[Array, "..."]
    """KL of `probs` to the base, nats, exactly."""
    kl_bound: Float[Array, "..."]
    """The lesser of log n − (n−1)/n and log((1 − (1−m)ⁿ)/m), m the mass of the best energy: ≥ kl, nats."""
    lam: Float[Array, "..."]
    """The temperature at which the Gibbs tilt spends the same KL; ∞ where that is 0."""
    frontier_lift: Float[Array, "..."]
    """The lift of that tilt: the most any distribution with this KL attains."""


def best_of_n(
    base: Float[Floats, "... K"],
    energy: Float[Floats, "... K"],
    n: Int[Floats, ""] | int,
    *,
    tie: Float[Floats, "..."] | float = 0.0,
) -> BestOfN:
    """Best of n with ties: draw n times from `base`, keep a draw of the largest energy (any of those tied).

    With F, F₋ the base's mass at or below, and strictly below, an energy, p(k) = base(k)·(Fⁿ − F₋ⁿ)/(F − F₋);
    and KL(p‖base) ≤ log n − (n−1)/n (arXiv 2401.01879), and at most the largest log p/base, that of the best
    energy, which is the lesser where that has much mass.

    Args:
        base: probability vectors on the last axis.
        energy: values to be maximised; those off the support are ignored.
        n: at least 1; 1e6 and more are safe (no difference of powers is ever formed).
        tie: energies this close to the next, in energy units, count as equal.

    Raises:
        AlignProError: n is less than 1 or not an integer.
    """
    if not isinstance(n, jax.core.Tracer) and not ((draws := as_number("n", n)) >= 1 and draws.is_integer()):
        raise AlignProError(f"n {n}: must be an integer of at least 1; give the number of draws")
    base, energy = jnp.broadcast_arrays(jnp.asarray(base, float), jnp.asarray(energy, float))
    return _best_of_n(base, energy, jnp.asarray(n, float), jnp.asarray(tie, float))


@jax.jit
def _best_of_n(base: Array, energy: Array, draws: Array, tie: Array) -> BestOfN:
    lead, size = base.shape[:-1], base.shape[-1]
    rows, values = base.reshape(-1, size), energy.reshape(-1, size)
    ties = jnp.broadcast_to(tie, lead).reshape(-1)
    ratio = jax.vmap(lambda b, e, t: _best_ratio(b, e, t, draws))(rows, values, ties)
    probs = rows * jnp.exp(ratio)
    ones = jnp.ones_like(rows)
    divergence = scaled_kl(ones, probs, rows, ratio, ratio)
    largest = jnp.max(jnp.where(rows > 0, ratio, -jnp.inf), -1)
    top = extremes(rows, values, ties).maximum
    d = jnp.where(rows > 0, values - top[:, None], 0.0)
    lift = jnp.maximum(jnp.sum(rows * jnp.expm1(ratio) * d, -1), 0.0)
    spends = (divergence > 0) & (jnp.min(d, -1) < 0)
    lam = _lam_at_kl(rows, d, jnp.where(spends, divergence, 1.0))
    best = jnp.where(spends, tilt(rows, d, lam).lift, 0.0)
    return BestOfN(
        probs=probs.reshape(base.shape),
        lift=lift.reshape(lead),
        kl=divergence.reshape(lead),
        kl_bound=jnp.minimum(jnp.log(draws) - (draws - 1) / draws, largest).reshape(lead),
        lam=jnp.where(spends, lam, jnp.inf).reshape(lead),
        frontier_lift=best.reshape(lead),
    )


def _best_ratio(base: Array, energy: Array, tie: Array, n: Array) -> Array:
    """log p/base of the best of n; 0 where the base is 0."""
    size = base.shape[0]
    energy = jnp.where(base > 0, energy, -jnp.inf)
    order = jnp.argsort(energy)
    sorted_energy, sorted_base = energy[order], base[order]
    first = jnp.where(sorted_base[1:] > 0, sorted_energy[1:] - sorted_energy[:-1], 0.0) > tie
    group = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), first]).astype(int))
    mass = jax.ops.segment_sum(sorted_base, group, size)
    below = jnp.cumsum(mass)
    above = jnp.concatenate([jnp.cumsum(mass[::-1])[::-1][1:], jnp.zeros(1)])
    # log F from whichever tail is the smaller: relatively accurate near F = 1, where the nth power bites.
    log_f = jnp.where(above < 0.5, log1p(-above), jnp.log(jnp.where(below > 0, below, 1.0)))
    f = jnp.where(above < 0.5, 1.0 - above, below)
    share = jnp.clip(jnp.where(mass > 0, mass / jnp.where(f > 0, f, 1.0), 0.0), 0.0, 1.0)
    share = jnp.where(jnp.cumsum(mass) <= mass, 1.0, share)  # the lowest group: F₋ = 0
    # Fⁿ − F₋ⁿ = Fⁿ (1 − (1 − share)ⁿ)
    some = jnp.where(mass > 0, mass, 1.0)
    drawn = -jnp.expm1(n * log1p(-jnp.where(mass > 0, share, 0.0)))
    log_ratio = n * log_f + jnp.log(jnp.where(mass > 0, drawn / some, 1.0))
    log_ratio = jnp.where((mass > 0) & (n > 1), log_ratio, 0.0)
    return jnp.where(base > 0, jnp.zeros(size).at[order].set(log_ratio[group]), 0.0)


def best_of_n_rewrites(instance: Instance, n: Int[Floats, ""] | int) -> BestOfN:
    """`best_of_n` of the prompter, per prompt [X]: n rewrites from ρ_sft, the one of largest R is used."""
    r = rewards_of(instance)
    return best_of_n(r.prior, r.rewrite, n, tie=r.tie)


class KLPrice(NamedTuple):
    """The reward–KL ledger of one prompter against π*; nats but for `gap`."""

    gap: Float[Array, " X"]
    """E_π* r* − E_π_ρ r*, reward units; negative where the prompter outperforms π*."""
    star: Float[Array, " X"]
    """KL(π*‖π_F(·|x))."""
    policy: Float[Array, " X"]
    """KL(π_ρ‖π_F(·|x)); ∞ where π_ρ leaves the support."""
    between: Float[Array, " X"]
    """KL(π_ρ‖π*); ∞ where π_ρ leaves the support."""


def kl_price(instance: Instance, beta: Temperature, prompter: Float[Floats, "X K"]) -> KLPrice:
    """gap(ρ) = β[KL(π*‖π_F) + KL(π_ρ‖π*) − KL(π_ρ‖π_F)], per prompt, exactly, where the KLs are finite.

    So who outperforms π* in reward must pay: gap(ρ) < 0 ⇒ KL(π_ρ‖π_F) > KL(π*‖π_F) + KL(π_ρ‖π*). A prompter
    that is no matrix of probabilities is an `AlignProError`.
    """
    beta, r = as_temperature("beta", beta), rewards_of(instance)
    rho = as_prompter(instance, prompter)
    model = tilt(r.own, r.response, beta)
    policy = rho @ r.frozen
    leaves = jnp.any(given(rho, r.frozen) & (r.own <= 0), -1)
    to_own = log_quotient(policy, r.own)
    # log π_ρ/π* through log π*/π_F, which is known where π* underflows.
    ratio = jnp.where(model.probs > TINY, log_quotient(policy, model.probs), to_own - model.log_ratio)
    star = jnp.where(r.own > 0, jnp.maximum(model.probs, TINY), 0.0)
    return KLPrice(
        gap=jnp.sum(model.probs * r.response, -1) - jnp.sum(rho * r.rewrite, -1),
        star=model.cost / beta,
        policy=jnp.where(leaves, jnp.inf, kl(policy, r.own)),
        between=jnp.where(leaves, jnp.inf, scaled_kl(jnp.ones_like(policy), policy, star, ratio, ratio)),
    )
