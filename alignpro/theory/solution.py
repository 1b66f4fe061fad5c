"""`solution`: every quantity of the paper on one instance, in log space, with bounds on its rounding."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignpro.shown import brief
from alignpro.theory.divergences import Floats, Scalar, same_floats, scaled_kl, wasserstein
from alignpro.theory.elementwise import average
from alignpro.theory.gibbs import exponent, policy_kl, positive, power_of_two, tilt_scaled
from alignpro.theory.instance import Instance, bare, padded, probabilities, replaced
from alignpro.theory.pairwise import expected_tv
from alignpro.theory.two_points import points

EPS = 2.0**-52


class Solution(NamedTuple):
    """Everything the statements are made of, in reward units unless said otherwise.

    Per prompt [X]; `average` takes the mean over P. "ρ" is the prompter asked about: ρ*, or that of
    `solution`. Rewards enter differences (gap, Δ1, …) from each prompt's best, so an offset costs nothing.
    """

    p: Float[Array, " X"]
    """P(x)."""
    beta: Float[Array, ""]
    """β, the temperature of RLHF."""
    lam: Float[Array, ""]
    """λ, the temperature of prompt tuning."""
    rewrite_reward: Float[Array, "X K"]
    """R(x,x′) = E_{y~π_F(·|x′)} r*(x,y), for every rewrite, in the reference's support or not."""
    rho_star: Float[Array, "X K"]
    """ρ*(x′|x), Lemma 1 (probabilities)."""
    pi_star: Float[Array, "X Y"]
    """π*(y|x), equation 4 (probabilities)."""
    log_z: Float[Array, " X"]
    """log Z(x) in nats, Z of Lemma 1."""
    log_z_star: Float[Array, " X"]
    """log Z*(x) in nats, Z* of equation 4."""
    value: Float[Array, " X"]
    """F(ρ*) = λ log Z(x), the optimum of objective (9)."""
    optimum: Float[Array, " X"]
    """E_{y~π*} r*."""
    original: Float[Array, " X"]
    """E_{y~π_F(·|x)} r* = R(x,x): no prompt optimization."""
    reference: Float[Array, " X"]
    """E_{x′~ρ_sft} R(x,x′)."""
    achieved: Float[Array, " X"]
    """E_{x′~ρ} R(x,x′)."""
    gap: Float[Array, " X"]
    """E_π* r* − E_ρ R, from its definition (5); its mean over P is J(π*) − J(π_ρ)."""
    delta1: Float[Array, " X"]
    """Δ1 = E_π* r* − R(x,x) ≥ 0, equation 7, relatively accurate (it is `model_jeffreys`)."""
    delta2: Float[Array, " X"]
    """Δ2 = R(x,x) − E_ρ R, equation 7."""
    shift: Float[Array, " X"]
    """R(x,x) − E_ρ_sft R."""
    ceiling: Float[Array, " X"]
    """E_π* r* − max of R(x,·) over the support of ρ_sft: what no prompter there can undercut."""
    value_gap: Float[Array, " X"]
    """E_π* r* − F(ρ*) = E_π* r* − λ log Z(x)."""
    own_span: Float[Array, " X"]
    """max − min of r*(x,·) over the support of π_F(·|x); at most `span`."""
    own_rise: Float[Array, " X"]
    """M: max of r*(x,·) over the support of π_F(·|x), minus its mean there."""
    own_fall: Float[Array, " X"]
    """Var(r*)/M under π_F(·|x), 0 where M is: with M, the two points of `two_point`'s bound."""
    tv_model: Float[Array, " X"]
    """d_TV(π*(·|x), π_F(·|x))."""
    overlap_model: Float[Array, " X"]
    """1 − `tv_model` = Σ_y min(π*, π_F), relatively accurate."""
    tv_shift: Float[Array, " X"]
    """E_{x′~ρ_sft} d_TV(π_F(·|x), π_F(·|x′))."""
    tv_barycentre: Float[Array, " X"]
    """d_TV(π_F(·|x), π_ρ_sft(·|x)), π_ρ_sft = Σ_x′ ρ_sft(x′|x) π_F(·|x′); at most `tv_shift`."""
    tv_induced: Float[Array, " X"]
    """d_TV(π*(·|x), π_ρ(·|x))."""
    tv_prompter: Float[Array, " X"]
    """d_TV(ρ(·|x), ρ_sft(·|x))."""
    law_model: Float[Array, " X"]
    """W1 of the laws of r*(x,y), y from π*(·|x) and from π_F(·|x): ∫ |difference of their distribution
    functions|. Equal to `delta1`."""
    law_shift: Float[Array, " X"]
    """W1 of the laws of r*(x,y) under π_F(·|x) and under π_ρ_sft(·|x); at most span times `tv_barycentre`."""
    law_induced: Float[Array, " X"]
    """W1 of the laws of r*(x,y) under π*(·|x) and under π_ρ(·|x); at most span times `tv_induced`."""
    model_kl: Float[Array, " X"]
    """β KL(π*‖π_F)."""
    model_jeffreys: Float[Array, " X"]
    """β Jeff(π*, π_F)."""
    prompter_kl: Float[Array, " X"]
    """λ KL(ρ*‖ρ_sft)."""
    prompter_jeffreys: Float[Array, " X"]
    """λ Jeff(ρ*, ρ_sft) = λ KL(ρ*‖ρ_sft) + λ KL(ρ_sft‖ρ*)."""
    prompter_gain: Float[Array, " X"]
    """λ KL(ρ_sft‖ρ*) = F(ρ*) − E_ρ_sft R ≥ 0."""
    induced_to_star: Float[Array, " X"]
    """β KL(π_ρ‖π*)."""
    induced_to_model: Float[Array, " X"]
    """β KL(π_ρ‖π_F(·|x))."""
    kl_to_star: Float[Array, " X"]
    """λ KL(ρ‖ρ*); 0 for ρ*."""
    kl_from_star: Float[Array, " X"]
    """λ KL(ρ*‖ρ); 0 for ρ*."""
    kl_to_reference: Float[Array, " X"]
    """λ KL(ρ‖ρ_sft)."""
    kl_from_reference: Float[Array, " X"]
    """λ KL(ρ_sft‖ρ)."""
    kl_excess: Float[Array, " X"]
    """λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft) = −λ E_ρ log(ρ*/ρ_sft), without cancellation."""
    shortfall: Float[Array, " X"]
    """F(ρ*) − F(ρ), from its definition; equal to `kl_to_star`."""
    span: Float[Array, " X"]
    """max − min of r*(x,·) over the responses reachable from x: those of positive probability under
    π_F(·|x), or under π_F(·|x′) for some x′ in the support of ρ_sft or of ρ."""
    reward_max: Float[Array, ""]
    """Largest reward over all entries, reachable or not: the theorem's r_max refers to it."""
    reward_min: Float[Array, ""]
    """Least reward over all entries, reachable or not."""
    is_star: Array
    """Whether ρ is ρ* by construction (bool)."""
    supported: Array
    """Whether ρ puts no mass where ρ_sft has none (bool)."""
    covered: Array
    """Whether π_ρ puts no mass where π_F(·|x) has none, for every x of positive probability (bool)."""
    gap_error: Float[Array, " X"]
    """Bound on the rounding of `gap`."""
    model_error: Float[Array, " X"]
    """Bound on the rounding of each β term: `delta1`, `model_kl`, `model_jeffreys`."""
    prompter_error: Float[Array, " X"]
    """Bound on the rounding of each λ term of ρ*: `prompter_kl`, `prompter_jeffreys`, `value`."""
    rho_error: Float[Array, " X"]
    """Bound on the rounding of each λ term of ρ: `kl_to_star`, `kl_to_reference`, `shortfall`, …"""
    excess_error: Float[Array, " X"]
    """Bound on the rounding of `kl_excess`."""
    shift_error: Float[Array, " X"]
    """Bound on the rounding of `shift`."""
    induced_error: Float[Array, " X"]
    """Bound on the rounding of `induced_to_star` and of `induced_to_model`."""
    rise_error: Float[Array, " X"]
    """Bound on the rounding of `own_rise`."""
    fall_error: Float[Array, " X"]
    """Bound on the rounding of `own_fall`."""
    law_error: Float[Array, " X"]
    """Bound on the rounding of `law_model`, of `law_shift` and of `law_induced`."""
    tv_model_error: Float[Array, " X"]
    """Bound on the rounding of `tv_model` (probability)."""
    tv_shift_error: Float[Array, " X"]
    """Bound on the rounding of `tv_shift` and of `tv_barycentre` (probability)."""
    tv_rho_error: Float[Array, " X"]
    """Bound on the rounding of `tv_induced` and of `tv_prompter` (probability)."""
    eps: Float[Array, ""] | float = EPS
    """The unit of rounding of these numbers, 2⁻⁵² or 2⁻²³."""

    def __repr__(self) -> str:
        return brief(self)

    def average(self, per_prompt: Any) -> Any:
        """The mean over P; a prompt of probability 0 does not count, whatever its value."""
        return average(self.p, per_prompt)

    @property
    def j_star(self) -> Float[Array, ""]:
        """J(π*), the mean reward of RLHF's optimal policy."""
        return self.average(self.optimum)

    @property
    def j_rho(self) -> Float[Array, ""]:
        """J(π_ρ), the mean reward of the prompter asked about."""
        return self.average(self.achieved)


def solution(
    instance: Instance,
    beta: Scalar,
    lam: Scalar,
    prompter: Float[Floats, "X K"] | None = None,
    tv_shift: Float[Floats, " X"] | None = None,
) -> Solution:
    """Every quantity of the paper for one instance, exactly.

    Args:
        instance: the problem; under vmap, with leading axes.
        beta: RLHF tuning parameter β > 0, in reward units.
        lam: prompt tuning parameter λ > 0, in reward units.
        prompter: any ρ(x′|x) [X, K], rows of probabilities; ρ* when None.
        tv_shift: the field of that name where it is known (`scale.prompt_shift`): the one cost of X·K·Y, and
            the same for every β, λ and ρ.

    Pure: use it under jit, vmap (over instances, or over (β, λ) with `gibbs.grid`) and grad, which compile it
    for each shape. Called outside them on at most 32 prompts, rewrites and responses, it is padded to one of
    two shapes, so that a new shape costs no compilation. In float64, or in float32 when p, prior, frozen and
    reward all are: every error bound is then that of float32. Never NaN for a valid instance with |rewards|
    below 1e300 (float32: below 1e30, β and λ from 1e-6 to 1e6).

    Raises:
        AlignProError: β or λ is not positive and finite, or the prompter no matrix of probabilities, where
            they are not traced.
    """
    beta, lam = positive("beta", beta), positive("lam", lam)
    if prompter is not None and not isinstance(prompter, jax.core.Tracer):
        probabilities("prompter", prompter, np.shape(instance.prior))
    given = bare(instance), beta, lam, prompter, tv_shift
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(given))
    if traced or max(shape := instance.shape) > _ROOMS[-1] or np.ndim(instance.p) != 1:
        return _solution(*given)
    return _padded(*given, next(size for size in _ROOMS if max(shape) <= size))


_ROOMS = (8, 32)
_WIDE = {"rewrite_reward": 1, "rho_star": 1, "pi_star": 2}


def _padded(instance: Instance, beta: Any, lam: Any, prompter: Any, tv_shift: Any, size: int) -> Solution:
    """`solution` on arrays with copies of probability 0, of which nothing is left in the result.

    Sums have further terms that are exactly 0, so bounds on rounding are those of the instance's own sizes.
    """
    shape = instance.shape
    to = (size, size, size)
    wide = padded(instance, to)
    if prompter is not None:
        prompter = padded(replaced(instance, prior=np.asarray(prompter)), to).prior
    if tv_shift is not None:
        tv_shift = np.pad(np.asarray(tv_shift), (0, size - shape[0]), mode="edge")
    return _cut(_solution(wide, beta, lam, prompter, tv_shift, np.asarray(shape[1:], float)), shape)


@partial(jax.jit, static_argnums=1)
def _cut(found: Solution, shape: tuple[int, int, int]) -> Solution:
    def cut(name: str, array: Any) -> Any:
        if name in _WIDE:
            return array[: shape[0], : shape[_WIDE[name]]]
        return array[: shape[0]] if array.ndim else array

    return Solution(*(cut(name, leaf) for name, leaf in found._asdict().items()))


@jax.jit
def _solution(
    instance: Instance, beta: Any, lam: Any, prompter: Any, tv_shift: Any, sizes: Any = None
) -> Solution:
    """`solution`; `sizes` are the numbers of rewrites and of responses in sums, where arrays are padded."""
    p, prior, frozen, reward = same_floats(instance.p, instance.prior, instance.frozen, instance.reward)
    dtype, own = p.dtype, jnp.asarray(instance.own)
    eps = float(jnp.finfo(dtype).eps)
    beta, lam = jnp.asarray(beta, dtype), jnp.asarray(lam, dtype)
    _, rewrites, responses = instance.shape
    every = jnp.arange(rewrites)
    if sizes is not None:
        rewrites, responses = sizes.astype(dtype)
    own_frozen = frozen[own]

    # What lies out of reach has probability 0 under every policy compared, but could be huge: drop it.
    used = prior > 0 if prompter is None else (prior > 0) | (jnp.asarray(prompter) > 0)
    # Positive entries of `frozen` are normal numbers and so are these sums: nothing underflows.
    reach = (used.astype(dtype) @ frozen + own_frozen) > 0
    power = exponent(jnp.max(jnp.where(reach, jnp.abs(reward), 0.0), -1))
    shrink, unit = power_of_two(-power, dtype), power_of_two(power, dtype)
    scaled = jnp.where(reach, reward * shrink[:, None], -jnp.inf)
    top = jnp.max(scaled, -1)
    d = jnp.where(reach, scaled - top[:, None], 0.0)  # ≤ 0, in units of `unit`
    r = d @ frozen.T
    span = -jnp.min(d, -1)
    b, t = beta * shrink, lam * shrink

    model = tilt_scaled(own_frozen, d, b)
    star = tilt_scaled(prior, r, t)
    rho = star.probs if prompter is None else jnp.asarray(prompter, dtype)
    is_own = every[None, :] == own[:, None]
    own_r = jnp.sum(jnp.where(is_own, r, 0.0), -1)  # one entry: exact, and cheaper than a gather
    reference = jnp.sum(prior * r, -1)
    optimum = jnp.sum(model.probs * d, -1)
    achieved = jnp.sum(rho * r, -1)
    tv_shift = expected_tv(frozen, own, prior) if tv_shift is None else jnp.asarray(tv_shift, dtype)

    # λ log(ρ*/ρ_sft) in reward units, finite for every λ: what the ratio times λ would be.
    tk = t[:, None]
    star_log = jnp.where(prior > 0, r - star.free_energy[:, None], 0.0)
    zero = jnp.zeros_like(span)
    if prompter is None:
        kl_to_star = kl_from_star = shortfall = zero
        kl_to_reference, kl_from_reference, kl_excess = star.cost, star.gain, -star.cost
        supported = jnp.asarray(True)
        tv_prompter = star.tv
    else:
        kl_to_star, kl_to_reference, inside, log_rho = policy_kl(rho, prior, star, star_log, tk)
        ratio = jnp.where(inside, log_rho - star.log_ratio, 0.0)
        scaled_ratio = jnp.where(inside, tk * log_rho - star_log, 0.0)
        tkk = jnp.broadcast_to(tk, rho.shape)
        kl_from_star = scaled_kl(tkk, star.probs, rho, -ratio, -scaled_ratio)
        kl_from_reference = scaled_kl(tkk, prior, rho, -log_rho, -tk * log_rho)
        kl_excess = -jnp.sum(rho * star_log, -1)
        # F(ρ*) − F(ρ) with F(ρ*) from its own definition, so that the identity is a test of log Z.
        f_star = jnp.sum(star.probs * r, -1) - star.cost
        shortfall = f_star - (achieved - kl_to_reference)
        supported = jnp.all(jnp.where(rho > 0, prior > 0, True))
        tv_prompter = 0.5 * jnp.sum(jnp.abs(rho - prior), -1)

    # The induced policies of ρ_sft and ρ, and what the second costs on the RLHF side.
    barycentre, induced = prior @ frozen, rho @ frozen
    bk = b[:, None]
    model_log = jnp.where(own_frozen > 0, d - model.free_energy[:, None], 0.0)
    of_induced = policy_kl(induced, own_frozen, model, model_log, bk)
    induced_to_star, induced_to_model, within, log_induced = of_induced
    # By supports, as the product of two small probabilities may underflow; ρ* has that of ρ_sft.
    given = (prior if prompter is None else rho) > 0
    responses_given = (given.astype(np.float32) @ (frozen > 0).astype(np.float32)) > 0
    covered = jnp.all(jnp.where(responses_given & (p > 0)[:, None], own_frozen > 0, True))
    own_span, rise, fall = points(own_frozen, scaled)
    law = partial(wasserstein, d)

    # Rounding: first-order bounds on what was just done, doubled. Sums of n terms err by n·eps times the
    # sum of magnitudes. A log-ratio of a tilt errs by eps times (energy/temperature + |log Z| + n), and an
    # error e in a tilt's energies moves E_p[energy] by at most 2 e E_p|energy − mean|/temperature.
    live = span > 0
    scale = jnp.where(live, span, 0.0)

    def ratio_noise(probs: Array, energy: Array, free: Array, temperature: Array, n: Any) -> Array:
        distance = -jnp.sum(probs * energy, -1) + jnp.abs(free)
        return jnp.where(live, eps * (4.0 * distance / temperature + n + 8), 0.0)

    model_noise = ratio_noise(model.probs, d, model.free_energy, b, responses)
    model_magnitude = jnp.sum(model.probs * jnp.abs(model_log), -1) + b * model.tv
    e_model = scale * (model_noise + (responses + 8) * eps) + (responses + 8) * eps * model_magnitude

    best = jnp.max(jnp.where(prior > 0, r, -jnp.inf), -1)
    e_r = (2 * responses + 6) * eps * scale
    star_noise = ratio_noise(star.probs, r - best[:, None], star.free_energy - best, t, rewrites)
    mean = jnp.sum(star.probs * r, -1, keepdims=True)
    spread = jnp.sum(star.probs * jnp.abs(r - mean), -1)
    carried = jnp.where(e_r > 0.1 * t, scale, 2.0 * e_r * spread / t)
    magnitude = jnp.sum(star.probs * jnp.abs(star_log), -1) + t * star.tv
    e_star = (
        2.0 * e_r
        + scale * (star_noise + (rewrites + 8) * eps)
        + carried
        + jnp.where(live, (rewrites + 8) * eps * magnitude, 0.0)
    )
    if prompter is None:
        e_rho = e_excess = e_star
    else:
        weight = rho + prior + star.probs
        sums = jnp.sum(jnp.where(inside, weight * (jnp.abs(tk * log_rho) + jnp.abs(star_log)), 0.0), -1)
        moved = t * jnp.sum(jnp.abs(rho - prior) + jnp.abs(rho - star.probs), -1)
        e_rho = e_star + 6.0 * e_r + (rewrites + 12) * eps * (4.0 * sums + moved + scale)
        on_rho = jnp.sum(rho * jnp.abs(star_log), -1) + jnp.abs(star.free_energy - best)
        e_excess = jnp.where(live, 2.0 * e_r + (rewrites + 12) * eps * (on_rho + scale), 0.0)
    e_shift = 2.0 * e_r + (rewrites + 4) * eps * scale
    on_induced = jnp.where(within, induced * (jnp.abs(bk * log_induced) + jnp.abs(model_log)), 0.0)
    moved = jnp.sum(jnp.abs(induced - own_frozen) + jnp.abs(induced - model.probs), -1)
    e_induced = e_model + (responses + rewrites + 12) * eps * (
        4.0 * jnp.sum(on_induced, -1) + b * moved + scale
    )
    if prompter is None:
        # Each log ρ*(x′) errs by up to `noise`, by which π_ρ(y) moves as a share of itself. Where all of them
        # may be anything (rewards tied to within rounding, a λ below it), KL(·‖π_F) is only known to be at
        # most log max 1/π_F, being convex, and β KL(·‖π*) exceeds it by the span at most.
        slip = 2.0 * e_r / t
        noise = slip[:, None] + eps * (4.0 * jnp.abs(r - star.free_energy[:, None]) / tk + rewrites + 8)
        share = (rho * jnp.minimum(noise, 1.0)) @ frozen
        on_share = jnp.where(within, share * (jnp.abs(bk * log_induced) + jnp.abs(model_log) + bk), 0.0)
        most = scale - b * jnp.log(jnp.min(jnp.where(own_frozen > 0, own_frozen, 1.0), -1))
        known = jnp.where(slip < 0.25, 2.0 * jnp.sum(on_share, -1), most)
        e_induced = e_induced + jnp.where(live, jnp.minimum(known, most), 0.0)
    tilt_noise = jnp.where(live, star_noise + jnp.minimum(2.0 * e_r / t, 1.0), 0.0)
    e_rho_tv = (tilt_noise if prompter is None else 0.0) + model_noise + (responses + rewrites + 8) * eps
    e_gap = e_model + (e_star if prompter is None else e_r + (rewrites + 8) * eps * scale)
    own_noise = (2 * responses + 8) * eps
    e_tv_model = 2.0 * (model_noise + jnp.where(live, responses * eps * model.tv, 0.0))
    e_tv_shift = 2.0 * jnp.where(tv_shift > 0, (responses + rewrites + 8) * eps, zero)
    e_tv_rho = 2.0 * jnp.where(live | (prompter is not None), e_rho_tv, 0.0)

    return Solution(
        p=p,
        beta=beta,
        lam=lam,
        # Off the support the sum runs over unreachable responses too, which `d` has dropped.
        rewrite_reward=jnp.where(
            used | is_own,
            (top[:, None] + r) * unit[:, None],
            reward @ frozen.T,
        ),
        rho_star=star.probs,
        pi_star=model.probs,
        log_z=top / t + star.free_energy / t,
        log_z_star=top / b + model.free_energy / b,
        value=(top + star.free_energy) * unit,
        optimum=(top + optimum) * unit,
        original=(top + own_r) * unit,
        reference=(top + reference) * unit,
        achieved=(top + achieved) * unit,
        gap=(optimum - achieved) * unit,
        delta1=model.lift * unit,
        delta2=(own_r - achieved) * unit,
        shift=(own_r - reference) * unit,
        ceiling=(optimum - best) * unit,
        value_gap=(optimum - star.free_energy) * unit,
        own_span=own_span * unit,
        own_rise=rise * unit,
        own_fall=fall * unit,
        tv_model=model.tv,
        overlap_model=jnp.sum(jnp.minimum(model.probs, own_frozen), -1),
        tv_shift=tv_shift,
        tv_barycentre=jnp.where(tv_shift > 0, 0.5 * jnp.sum(jnp.abs(own_frozen - barycentre), -1), 0.0),
        tv_induced=0.5 * jnp.sum(jnp.abs(model.probs - induced), -1),
        tv_prompter=tv_prompter,
        law_model=law(model.probs, own_frozen) * unit,
        law_shift=jnp.where(tv_shift > 0, law(own_frozen, barycentre) * unit, 0.0),
        law_induced=law(model.probs, induced) * unit,
        model_kl=model.cost * unit,
        model_jeffreys=model.lift * unit,
        prompter_kl=star.cost * unit,
        prompter_jeffreys=star.lift * unit,
        prompter_gain=star.gain * unit,
        induced_to_star=induced_to_star * unit,
        induced_to_model=induced_to_model * unit,
        kl_to_star=kl_to_star * unit,
        kl_from_star=kl_from_star * unit,
        kl_to_reference=kl_to_reference * unit,
        kl_from_reference=kl_from_reference * unit,
        kl_excess=kl_excess * unit,
        shortfall=shortfall * unit,
        span=span * unit,
        reward_max=jnp.max(reward),
        reward_min=jnp.min(reward),
        is_star=jnp.asarray(prompter is None),
        supported=supported,
        covered=covered,
        gap_error=2.0 * e_gap * unit,
        model_error=2.0 * e_model * unit,
        prompter_error=2.0 * e_star * unit,
        rho_error=2.0 * e_rho * unit,
        excess_error=2.0 * e_excess * unit,
        shift_error=2.0 * e_shift * unit,
        induced_error=2.0 * e_induced * unit,
        rise_error=own_noise * rise * unit,
        fall_error=own_noise * (fall + own_noise * rise) * unit,
        # W1 moves by at most the span times the total variation between what was meant and what was found.
        law_error=scale * jnp.maximum(jnp.maximum(e_tv_model, e_tv_shift), e_tv_rho) * unit,
        tv_model_error=e_tv_model,
        tv_shift_error=e_tv_shift,
        tv_rho_error=e_tv_rho,
        eps=jnp.asarray(eps, dtype),
    )
