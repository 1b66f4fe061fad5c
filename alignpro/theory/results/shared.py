"""One prompter for all prompts: the best that does not read x, and the exact price of not reading it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignpro.errors import AlignProError
from alignpro.theory.divergences import Floats
from alignpro.theory.elementwise import average
from alignpro.theory.instance import Instance, probabilities, rectangular
from alignpro.theory.results.rewards import Temperature, as_temperature, rewards_of
from alignpro.theory.solution import EPS


class Universal(NamedTuple):
    """The optimum over prompters q(s) that ignore x, beside ρ*, which reads it; reward units unless said.

    Strategies s = 1…S are the same for every prompt ("add this instruction"); R(x, s) is the expected reward
    of strategy s on x. F(ρ) = E_x [E_ρ R − λ KL(ρ(·|x)‖ρ_sft(·|x))]. Proofs: docs/limits.md.
    """

    q: Float[Array, " S"]
    """q*(s) ∝ exp E_x[log ρ_sft(s|x) + R(x,s)/λ] (probabilities); with ρ_sft the same for every x it is
    ρ_sft exp(E_x R/λ)/Z̄. 0 for a strategy that ρ_sft(·|x) excludes for some x of positive probability."""
    star: Float[Array, "X S"]
    """ρ*(s|x) ∝ ρ_sft(s|x) exp(R(x,s)/λ) (probabilities)."""
    value: Float[Array, ""]
    """F(q*) = λ log Z̄."""
    read: Float[Array, ""]
    """F(ρ*) = E_x λ log Z(x)."""
    price: Float[Array, ""]
    """F(ρ*) − F(q*) = E_x `per_prompt` ≥ 0: what a prompter earns by reading x."""
    per_prompt: Float[Array, " X"]
    """λ KL(q*‖ρ*(·|x)) ≥ 0; 0 exactly where the rewards that q* weighs rank strategies as all prompts do."""
    lower: Float[Array, ""]
    """Lower bound on `price` by `interaction` alone and how far rewards fall: equality for two strategies."""
    upper: Float[Array, ""]
    """Upper bound on `price` by `interaction` alone and how far rewards rise: equality for two strategies."""
    interaction: Float[Array, " X"]
    """Var_{q*} of D(x,s) = A(x,s) − E_x A(·,s), A = R + λ log ρ_sft: the variance of what x does to the order
    of strategies, in squared reward units. `price` → E_x interaction/(2λ) as λ → ∞."""
    explained: Float[Array, ""]
    """F of the best prompter that reads only the label of x, less F(q*): the part of `price` that the labels
    explain; `price` itself where none were given."""
    achieved: Float[Array, ""]
    """J(q*) = E_x E_{q*} R."""
    achieved_read: Float[Array, ""]
    """J(ρ*) = E_x E_ρ* R."""
    best: Int[Array, ""]
    """The strategy of largest E_x R: the best fixed instruction, which λ → 0 leaves of q*."""
    best_reward: Float[Array, ""]
    """E_x R(x, best)."""
    error: Float[Array, ""]
    """Bound on the rounding of `price`, `explained`, `lower` and `upper`."""


def universal(
    reward: Float[Floats, "X S"],
    lam: Temperature,
    prior: Float[Floats, "S"] | Float[Floats, "X S"] | None = None,
    p: Float[Floats, " X"] | None = None,
    labels: Int[Floats, " X"] | None = None,
) -> Universal:
    """Solve for the best prompter that ignores x, and weigh it against the one that reads x, exactly.

    Args:
        reward: R(x, s), expected rewards.
        lam: λ > 0, reward units.
        prior: ρ_sft, one row for all prompts or one each (rows of probabilities); uniform when None.
        p: P(x) (probabilities); uniform when None.
        labels: kinds of prompts, whole numbers from 0: how much of the price they explain.

    Raises:
        AlignProError: a bad shape or number; a λ that is not positive and finite; or no strategy in the
            support of ρ_sft(·|x) for every x, so that every prompter that ignores x has KL = ∞.
    """
    given = rectangular("reward", reward)
    numbers = given.dtype.kind in "fiu" and given.ndim == 2 and given.size
    if not numbers or not np.isfinite(given := given.astype(float)).all():
        raise AlignProError(f"reward: has shape {given.shape}; give finite numbers [prompts, strategies]")
    prompts, strategies = given.shape
    weights = np.full(prompts, 1 / prompts) if p is None else probabilities("p", p, (prompts,))
    if prior is None:
        prior = np.full((prompts, strategies), 1 / strategies)
    elif rectangular("prior", prior).ndim == 1:
        prior = np.tile(probabilities("prior", prior, (strategies,)), (prompts, 1))
    else:
        prior = probabilities("prior", prior, (prompts, strategies))
    if not ((prior > 0) | (weights == 0)[:, None]).all(0).any():
        raise AlignProError("prior: excludes every strategy for some prompt; leave one that all share")
    kinds = np.zeros(prompts, int) if labels is None else rectangular("labels", labels)
    if kinds.shape != (prompts,) or kinds.dtype.kind not in "iu" or kinds.min() < 0:
        raise AlignProError(f"labels: give {prompts} whole numbers from 0, one for each prompt")
    found = _universal(
        given, prior, weights, as_temperature("lam", lam), np.unique(kinds, return_inverse=True)[1]
    )
    return found._replace(explained=found.price) if labels is None else found


def _log_mean_exp(log_q: Array, u: Array, inside: Array) -> Array:
    """log E_q e^u of rows of u with mean 0: relatively accurate, also where it is small or q underflows."""
    small = jnp.max(jnp.abs(jnp.where(inside, u, 0.0)), -1) < 1.0
    v = jnp.where(small[..., None], u, 0.0)
    large = jax.scipy.special.logsumexp(jnp.where(inside, log_q + u, -jnp.inf), -1)
    return jnp.where(small, jnp.log1p(jnp.sum(jnp.exp(log_q) * _rest(v), -1)), large)


def _rest(z: Array) -> Array:
    """e^z − 1 − z ≥ 0, relatively accurate; a series where the difference would cancel."""
    near = jnp.abs(z) < 0.3
    w = jnp.where(near, z, 0.0)
    series = jnp.zeros_like(w)
    for n in range(15, 1, -1):  # Σ zⁿ/n! = z²/2·(1 + z/3·(1 + z/4·(…)))
        series = 1.0 + series * w / (n + 1) if n > 2 else w * w / 2 * (1.0 + series * w / 3)
    return jnp.where(near, series, jnp.expm1(jnp.where(near, 0.0, z)) - z)


def _two_point(log_variance: Array, log_reach: Array, sign: int) -> Array:
    """log E e^u of the law on {m, −variance/m} with mean 0 and that variance, m = sign·reach; 0 without one.

    Of all laws with that mean and variance it has the largest E e^u where u ≤ m (m > 0), and the least where
    u ≥ m (m < 0): e^u has a positive third derivative.
    """
    none = (log_variance == -jnp.inf) | (log_reach == -jnp.inf)
    log_v, log_m = jnp.where(none, 0.0, log_variance), jnp.where(none, 0.0, log_reach)
    m, other = sign * jnp.exp(log_m), -sign * jnp.exp(log_v - log_m)
    log_both = jnp.logaddexp(2 * log_m, log_v)
    small = jnp.maximum(jnp.abs(m), jnp.abs(other)) < 1.0
    rests = _rest(jnp.where(small, m, 0.0)), _rest(jnp.where(small, other, 0.0))
    lifted = jnp.log1p(jnp.exp(log_v - log_both) * rests[0] + jnp.exp(2 * log_m - log_both) * rests[1])
    found = jnp.where(small, lifted, jnp.logaddexp(log_v + m, 2 * log_m + other) - log_both)
    return jnp.where(none, 0.0, found)


@jax.jit
def _universal(reward: Array, prior: Array, p: Array, lam: Array, kinds: Array) -> Universal:
    counted, weight = (p > 0)[:, None], p[:, None]
    log_prior = jnp.where(prior > 0, jnp.log(jnp.where(prior > 0, prior, 1.0)), -jnp.inf)
    all_share = jnp.all((prior > 0) | ~counted, 0)
    used = jnp.broadcast_to(all_share, prior.shape)
    # Rewards are measured from each prompt's best, which moves F of every prompter alike.
    top = jnp.max(jnp.where(prior > 0, reward, -jnp.inf), -1)
    shifted = reward - top[:, None]
    logits = shifted / lam + log_prior

    def tilted(values: Array, where: Array) -> tuple[Array, Array]:
        """Log-probabilities, and the log of their normaliser; −∞ where there is nothing."""
        held = jnp.where(where, values, -jnp.inf)
        log_z = jax.scipy.special.logsumexp(held, -1)
        return held - jnp.where(log_z > -jnp.inf, log_z, 0.0)[..., None], log_z

    log_star, log_z = tilted(logits, prior > 0)
    energy = jnp.where(used & (prior > 0), logits, 0.0)
    mean = jnp.sum(weight * energy, 0)
    log_q, log_z_all = tilted(mean, all_share)
    q, star = jnp.exp(log_q), jnp.exp(log_star)
    rows = jnp.broadcast_to(log_q, prior.shape)

    # What x changes about the order of strategies: about the likeliest, where rounding is least.
    reference = jnp.argmax(log_q)
    apart = energy - mean[None]
    d = jnp.where(used, apart - apart[:, reference][:, None], 0.0)
    order = d - jnp.sum(q[None] * d, -1, keepdims=True)
    # Strategies that q* cannot use but ρ*(·|x) can add to Z(x) alone.
    _, beyond = tilted(logits, (prior > 0) & ~used)
    _, within = tilted(logits, (prior > 0) & used)
    more = jnp.logaddexp(0.0, beyond - within)
    per_prompt = lam * jnp.where(p > 0, _log_mean_exp(rows, order, used) + more, 0.0)

    log_square = 2 * jnp.log(jnp.abs(order))
    log_variance = jax.scipy.special.logsumexp(jnp.where(used, rows + log_square, -jnp.inf), -1)
    # What rounding may have made of each: the bounds are those of the worst case.
    size = jnp.max(jnp.where(counted & used, jnp.abs(shifted) + lam * jnp.abs(log_prior), 0.0))
    slip = (sum(reward.shape) + 16) * EPS * (1 + size / lam)
    at_reference = jnp.arange(q.shape[0]) == reference
    log_rest = jax.scipy.special.logsumexp(jnp.where(at_reference, -jnp.inf, log_q))
    slips = (jnp.where(at_reference, jnp.exp(log_rest), 1.0) * slip)[None]
    rise, fall = (jnp.max(jnp.where(used, side + slips, 0.0), -1) for side in (order, -order))
    spread, slack = log_variance / 2, jnp.log(2 * slip) + log_rest / 2
    wide = 2 * jnp.logaddexp(spread, slack)
    narrow = 2 * (spread + jnp.log1p(-jnp.exp(jnp.minimum(slack - spread, 0.0))))
    narrow = jnp.where(spread > slack, narrow, -jnp.inf)
    upper = lam * (_two_point(wide, jnp.log(rise), 1) + more)
    lower = lam * (_two_point(narrow, jnp.log(fall), -1) + more)

    member = jax.nn.one_hot(kinds, kinds.shape[0], axis=0) * p[None]  # [kind, X]
    mass = jnp.sum(member, -1)
    share = member / jnp.where(mass > 0, mass, 1.0)[:, None]
    usable = ~jnp.any((member > 0)[..., None] & (prior <= 0)[None], 1)
    _, log_z_kind = tilted(share @ jnp.where(prior > 0, logits, 0.0), usable)
    explained = lam * jnp.sum(jnp.where(mass > 0, mass * log_z_kind, 0.0)) - lam * log_z_all

    expected = jnp.sum(weight * reward, 0)
    best = jnp.argmax(expected)
    offset = jnp.sum(p * top)
    return Universal(
        q=q,
        star=star,
        value=offset + lam * log_z_all,
        read=offset + lam * average(p, log_z),
        price=average(p, per_prompt),
        per_prompt=per_prompt,
        lower=average(p, lower),
        upper=average(p, upper),
        interaction=lam**2 * jnp.exp(log_variance),
        explained=explained,
        achieved=jnp.sum(q * expected),
        achieved_read=average(p, jnp.sum(star * reward, -1)),
        best=best,
        best_reward=expected[best],
        error=2 * slip * lam + 2 * EPS * sum(reward.shape) * jnp.max(jnp.abs(reward)),
    )


def strategy_table(
    instance: Instance, rewrites: Int[Floats, "X S"]
) -> tuple[Float[Array, "X S"], Float[Array, "X S"]]:
    """Read R(x, s) and ρ_sft(s|x) of strategies off an instance, whose rewrites are texts.

    Args:
        rewrites: the position among the instance's rewrites of what strategy s makes of x.

    Returns:
        R(x, s) in reward units, and ρ_sft given that x is rewritten by one of the strategies (probabilities).

    Raises:
        AlignProError: a position that is none, or a prompt for which ρ_sft excludes every strategy.
    """
    at = rectangular("rewrites", rewrites)
    most = np.shape(instance.frozen)[0]
    if at.ndim != 2 or at.shape[0] != len(instance.own) or at.dtype.kind not in "iu":
        raise AlignProError(f"rewrites: give whole numbers [{len(instance.own)} prompts, strategies]")
    if (at < 0).any() or (at >= most).any():
        raise AlignProError(f"rewrites: give positions from 0 to {most - 1}")
    found = rewards_of(instance)
    prior = np.take_along_axis(np.asarray(found.prior), at, 1)
    total = prior.sum(1, keepdims=True)
    if (total <= 0).any():
        raise AlignProError(f"rewrites: rho_sft excludes all strategies of prompt {int(total.argmin())}")
    rewards = np.take_along_axis(np.asarray(found.rewrite), at, 1) + np.asarray(found.top)[:, None]
    return jnp.asarray(rewards), jnp.asarray(prior / total)
