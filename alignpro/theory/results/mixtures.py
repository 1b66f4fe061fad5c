"""The price of prompts that are not drawn at random: one rewrite, or a few, in the best mixture's place."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alignpro.errors import AlignProError, as_number
from alignpro.theory.divergences import log1p, log_quotient
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import Instance
from alignpro.theory.results.reach import Projection, information_projection, to_optimum
from alignpro.theory.results.rewards import Rewards, Temperature, as_temperature, rewards_of


class FewRewrites(NamedTuple):
    """How near to π* in KL(·‖π*) come 1, 2, … M rewrites, beside the best mixture of all; per prompt [X].

    w are the weights of the best mixture, π_w its policy. β times a KL is lost of RLHF's objective.
    """

    single: Float[Array, " X"]
    """min over x′ of KL(π_F(·|x′)‖π*), nats: the best deterministic prompt."""
    best: Int[Array, " X"]
    """The rewrite that attains `single`."""
    mixture: Float[Array, " X"]
    """KL(π_w‖π*), nats, within `gap` of the least of any prompter."""
    gap: Float[Array, " X"]
    """Duality gap of w, nats."""
    price: Float[Array, " X"]
    """β(single − mixture) ≥ −β·gap, reward units: what RLHF's objective loses by a deterministic prompt."""
    spread: Float[Array, " X"]
    """C = E_{x′~w} χ²(π_F(·|x′)‖π_w), at most min(rewrites in w, Σ_y max_x′ π_F(y|x′)) − 1."""
    chosen: Int[Array, "X M"]
    """The greedy choice: its first m rewrites, each with weight 1/m (repeats add up), for every m."""
    loss: Float[Array, "X M"]
    """KL of the greedy mixture of m rewrites to π*, nats."""
    bound: Float[Array, "X M"]
    """`mixture` + log(1 + C/m), nats: some equal mixture of m rewrites is at most this far."""
    greedy_bound: Float[Array, "X M"]
    """`mixture` + (C + M·gap)/m ≥ `loss`, nats."""


def few_rewrites(instance: Instance, beta: Temperature, most: int = 16) -> FewRewrites:
    """Replace the best mixture of rewrites by m of them, m = 1 … `most`: what is lost, and at most how much.

    Some m rewrites of weight 1/m have KL(π_m‖π*) ≤ min_ρ KL(π_ρ‖π*) + log(1 + C/m), and the greedy choice, of
    the rewrite that keeps Σ_y (Σ_i π_F(y|x_i) − m π_w(y))²/π_w(y) least, has C/m in the logarithm's place.
    A mixture pays where π* lies among rewrites; where `price` is 0 one prompt is as good as any prompter.

    Raises:
        AlignProError: β is not positive and finite, or `most` is not a whole number of at least 1.
    """
    if not ((m := as_number("most", most)) >= 1 and m.is_integer()):
        raise AlignProError(f"most {most}: must be an integer of at least 1; give the number of rewrites")
    beta = as_temperature("beta", beta)
    return _few(information_projection(instance, beta), rewards_of(instance), beta, int(m))


@functools.partial(jax.jit, static_argnames="most")
def _few(found: Projection, r: Rewards, beta: Array, most: int) -> FewRewrites:
    model = tilt(r.own, r.response, beta)

    def alone(row: Array) -> Array:
        return to_optimum(jnp.broadcast_to(row, r.own.shape), r.own, model)

    each = jnp.where(found.usable, lax.map(alone, r.frozen).T, jnp.inf)
    mixture, policy = found.kl, found.policy
    inside = policy > 0
    safe = jnp.where(inside, policy, 1.0)
    # log π_w/π*, through log π*/π_F(·|x), which is known where π* underflows.
    slope = jnp.where(inside, log_quotient(policy, r.own) - model.log_ratio, 0.0)
    level = jnp.sum(policy * slope, -1)
    tilted = (
        slope @ r.frozen.T - level[:, None]
    )  # E of the slope under each rewrite, less that of the mixture
    leaves = (r.frozen > 0).astype(float) @ (~inside).astype(float).T > 0
    apart = r.frozen[None] - policy[:, None]
    squares = jnp.sum(jnp.where(inside[:, None], apart * (apart / safe[:, None]), 0.0), -1)
    allowed = found.usable & ~leaves.T
    spread = jnp.sum(jnp.where(allowed, found.weights * squares, 0.0), -1)

    def add(total: Array, _: Array) -> tuple[Array, Array]:
        """Add the rewrite of least cost to `total`, Σ_i π_F(·|x_i) − m π_w, [X, Y]."""
        lean = jnp.where(inside, total / safe, 0.0)
        cost = 2.0 * jnp.sum(lean[:, None] * apart, -1) + squares + most * tilted
        pick = jnp.argmin(jnp.where(allowed, cost, jnp.inf), -1)
        return total + jnp.take_along_axis(apart, pick[:, None, None], 1)[:, 0], pick

    _, chosen = lax.scan(add, jnp.zeros_like(policy), jnp.arange(most))
    count = jnp.arange(1, most + 1)
    mixed = jnp.cumsum(r.frozen[chosen], 0) / count[:, None, None]
    loss = lax.map(lambda policies: to_optimum(policies, r.own, model), mixed).T
    return FewRewrites(
        single=jnp.min(each, -1),
        best=jnp.argmin(each, -1),
        mixture=mixture,
        gap=found.gap,
        price=beta * (jnp.min(each, -1) - mixture),
        spread=spread,
        chosen=chosen.T,
        loss=loss,
        bound=mixture[:, None] + log1p(spread[:, None] / count[None, :]),
        greedy_bound=mixture[:, None] + (spread + most * found.gap)[:, None] / count[None, :],
    )
