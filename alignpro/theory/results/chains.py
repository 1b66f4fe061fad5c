"""n prompters in sequence, each with its own reference and its own λ, by backward induction.

A chain rewrites x = x₀ to x₁, …, x_n with prompters ρ_i(x_i | x, x_{i−1}); the frozen model answers x_n, and
the reward judges the answer to the ORIGINAL prompt x. The objective, in reward units (`docs/chains.md`), is
F(ρ) = E R(x, x_n) − Σ_i λ_i E KL(ρ_i(·|x, x_{i−1}) ‖ ρ_sft,i(·|x_{i−1})).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.divergences import TINY, Floats, log_quotient, scaled_kl
from alignpro.theory.gibbs import Tilted, tilt
from alignpro.theory.instance import Instance, bare, normalise, probabilities, rectangular
from alignpro.theory.results.rewards import rewards_of
from alignpro.theory.solution import Solution, solution


@dataclass(frozen=True, eq=False)
class Chain:
    """Prompters in sequence in front of a frozen model, on finite spaces; validated when built."""

    p: Any
    """P(x) [X]."""
    stages: Sequence[Any]
    """ρ_sft,1(x₁|x) [X, K₁], ρ_sft,2(x₂|x₁) [K₁, K₂], …, ρ_sft,n [K_{n−1}, K_n] (probabilities)."""
    frozen: Any
    """π_F(y|x_n) [K_n, Y]."""
    own: Any
    """own[x] [X]: the row of `frozen` that is the frozen model on the original prompt x."""
    reward: Any
    """r*(x, y) [X, Y]."""

    def __post_init__(self) -> None:
        if not isinstance(self.stages, Sequence | np.ndarray) or not len(self.stages):
            raise AlignProError("stages: is empty; give at least one reference prompter [X, K], in a list")
        stages = []
        rows = len(np.atleast_1d(rectangular("p", self.p)))
        for i, stage in enumerate(self.stages):
            array = rectangular(f"stages[{i}]", stage)
            if array.ndim != 2 or array.shape[0] != rows or not array.shape[1]:
                before = "prompts in p" if i == 0 else f"columns of stages[{i - 1}]"
                raise AlignProError(
                    f"stages[{i}]: has shape {array.shape}; give [{rows}, K], "
                    f"one row for each of the {rows} {before}"
                )
            stages.append(probabilities(f"stages[{i}]", array, array.shape))
            rows = array.shape[1]
        # Products of probabilities underflow, and what is then missing would be missing from every bound.
        lost = _visited(stages) & (functools.reduce(np.matmul, stages) < TINY)
        if lost.any():
            x, k = (int(i) for i in np.argwhere(lost)[0])
            raise AlignProError(
                f"stages: lead from prompt {x} to rewrite {k} with probability below {TINY:.1e}, which is no "
                "normal float64; make a stage's probability on the way larger, or 0"
            )
        instance = Instance(self.p, _compose(stages), self.frozen, self.own, self.reward)
        object.__setattr__(self, "stages", tuple(stages))
        for key in ("p", "frozen", "own", "reward"):
            object.__setattr__(self, key, getattr(instance, key))

    @property
    def composed(self) -> Instance:
        """The one-stage problem whose reference is the chain's: ρ̄_sft(x_n|x) = Σ_{x₁…} Π ρ_sft,i."""
        return Instance(self.p, _compose(self.stages), self.frozen, self.own, self.reward)


def _visited(stages: Sequence[Any]) -> np.ndarray:
    """Whether the chain can reach x_n from x [X, K_n], by supports."""
    return functools.reduce(lambda a, b: (a.astype(float) @ b.astype(float)) > 0, [s > 0 for s in stages])


def _compose(stages: Sequence[Any]) -> np.ndarray:
    """ρ̄_sft [X, K_n]."""
    return normalise(functools.reduce(np.matmul, stages))


class ChainSolution(NamedTuple):
    """A chain's optimum, and the chain ρ asked about (the optimal one unless others were given).

    Per prompt [X] and in reward units unless said otherwise; `stage_…` have one row per stage [n, X] and hold
    λ_i E KL at stage i, over the prompts that the named chain visits.
    """

    values: tuple[Float[Array, "X _"], ...]
    """V_0 = F* [X, 1], V_1 [X, K₁], …, V_n = R [X, K_n]: the best that can still be had from x_i."""
    policies: tuple[Float[Array, "X _ _"], ...]
    """The optimal prompters ρ*_i [X, K_{i−1}, K_i] (probabilities), K_0 = 1."""
    visits: tuple[Float[Array, "X _"], ...]
    """P(x_i|x) under ρ [X, K_i], i = 1 … n (probabilities)."""
    induced: Float[Array, "X Y"]
    """π_ρ(y|x) (probabilities)."""
    value: Float[Array, " X"]
    """F* = V_0(x)."""
    objective: Float[Array, " X"]
    """F(ρ), from its definition."""
    shortfall: Float[Array, " X"]
    """F* − F(ρ), from the definitions; equal to the sum of `stage_shortfall`."""
    achieved: Float[Array, " X"]
    """E_ρ R(x, x_n)."""
    stage_cost: Float[Array, "n X"]
    """λ_i E_ρ KL(ρ_i‖ρ_sft,i)."""
    stage_shortfall: Float[Array, "n X"]
    """λ_i E_ρ KL(ρ_i‖ρ*_i); 0 for the optimal chain."""
    star_cost: Float[Array, "n X"]
    """λ_i E_ρ* KL(ρ*_i‖ρ_sft,i)."""
    star_jeffreys: Float[Array, "n X"]
    """`star_cost` + λ_i E_ρ_sft KL(ρ_sft,i‖ρ*_i); they sum to E_ρ* R − E_ρ̄_sft R exactly."""
    gap: Float[Array, " X"]
    """E_π* r* − E_ρ R."""
    exact_gap: Float[Array, " X"]
    """β Jeff(π*,π_F) + [R(x,x) − E_ρ̄_sft R] − Σ `star_jeffreys`: the gap of the OPTIMAL chain."""
    span_bound: Float[Array, " X"]
    """span·TV1 + span·TV2 − Σ `star_cost` ≥ the optimal chain's gap: Theorem 1 (`span`) for chains."""
    tight_bound: Float[Array, " X"]
    """`span_bound` with Σ `star_jeffreys` subtracted in place of Σ `star_cost`; never larger."""
    trained_bound: Float[Array, " X"]
    """span·TV1 + span·TV2 + Σ `stage_shortfall` − Σ `stage_cost` ≥ `gap`, for ANY chain ρ."""
    single: Solution
    """One prompter with the composed reference ρ̄_sft and the last λ: TV terms, π*, span, ρ̄_sft's reward."""


def solve_chain(
    chain: Chain,
    beta: float,
    lams: float | Sequence[float] | np.ndarray,
    policies: Sequence[Any] | None = None,
) -> ChainSolution:
    """The optimal chain by backward induction, or any chain judged against it.

    V_n = R, V_{i−1}(x, x_{i−1}) = λ_i log Σ ρ_sft,i(x_i|x_{i−1}) exp(V_i(x, x_i)/λ_i), and ρ*_i tilts ρ_sft,i
    by V_i/λ_i. For any chain F* − F(ρ) = Σ_i λ_i E_ρ KL(ρ_i‖ρ*_i).

    Args:
        chain: the problem.
        beta: β > 0.
        lams: λ_i > 0, one per stage, or one for all.
        policies: any ρ: [X, K₁] (or [X, 1, K₁]) first, then [X, K_{i−1}, K_i] or, blind to x, [K_{i−1}, K_i].

    Raises:
        AlignProError: a bad temperature, a number of λs or policies that is not the number of stages, or a
            policy that is no matrix of probabilities of its stage's shape.
    """
    beta = check_temperature("beta", beta)
    count = len(chain.stages)
    given: list[Any] = [lams] * count if np.ndim(lams) == 0 else [*np.asarray(lams, dtype=object)]
    if len(given) != count:
        raise AlignProError(f"lams: {len(given)} given for {count} stages; give one for each, or one number")
    temperatures = jnp.asarray([check_temperature(f"lams[{i}]", lam) for i, lam in enumerate(given)])
    checked = None if policies is None else _policies(chain, policies)
    arrays = bare(chain.composed)
    stages = tuple(jnp.asarray(stage) for stage in chain.stages)
    return _solve(arrays, solution(arrays, beta, temperatures[-1]), stages, temperatures, checked)


def _policies(chain: Chain, policies: Sequence[Any]) -> tuple[np.ndarray, ...]:
    count, prompts = len(chain.stages), len(chain.p)
    if len(policies) != count:
        raise AlignProError(f"policies: {len(policies)} given for {count} stages; give one for each")
    checked = []
    for i, (policy, stage) in enumerate(zip(policies, chain.stages, strict=True)):
        array = rectangular(f"policies[{i}]", policy)
        if array.ndim == 2:
            array = array[:, None] if i == 0 else np.broadcast_to(array[None], (prompts, *array.shape))
        shape = (prompts, 1 if i == 0 else stage.shape[0], stage.shape[1])
        checked.append(probabilities(f"policies[{i}]", array, shape))
    return tuple(checked)


@jax.jit
def _solve(
    instance: Instance,
    single: Solution,
    stages: tuple[Array, ...],
    lams: Array,
    policies: tuple[Array, ...] | None,
) -> ChainSolution:
    prompts = single.p.shape[0]
    # References and energies have axes [X, K_{i−1}, K_i].
    bases = [stages[0][:, None], *(jnp.broadcast_to(s[None], (prompts, *s.shape)) for s in stages[1:])]
    measured = rewards_of(instance)  # from the best: what a prompt's rewards share would cost digits
    reward, top = measured.rewrite, measured.top[:, None]
    own_reward = jnp.take_along_axis(reward, instance.own[:, None], -1)[:, 0]

    values: list[Array] = [reward]
    stars: list[Tilted] = []
    for base, lam in zip(bases[::-1], lams[::-1], strict=True):
        energy = jnp.broadcast_to(values[0][:, None], base.shape)
        stars.insert(0, tilt(base, energy, lam))
        values.insert(0, stars[0].free_energy)

    def walk(rhos: Sequence[Array]) -> list[Array]:
        visits = [jnp.ones((prompts, 1))]
        for rho in rhos:
            visits.append(jnp.einsum("xa,xab->xb", visits[-1], rho))
        return visits

    def over(rhos: Sequence[Array], each: Sequence[Array]) -> Array:
        # A prompt that is never visited costs nothing, whatever its KL. Whether it is, supports tell: the
        # probability may underflow, but an infinite cost is infinite at any.
        seen = walk([(rho > 0).astype(float) for rho in rhos])
        weighted = [
            jnp.where(v > 0, v * jnp.where(v > 0, c, 0.0), jnp.where((s > 0) & (c == jnp.inf), c, 0.0))
            for v, c, s in zip(walk(rhos), each, seen, strict=False)
        ]
        return jnp.stack([jnp.sum(w, -1) for w in weighted])

    optimal = [star.probs for star in stars]
    star_visits = walk(optimal)
    star_cost = over(optimal, [star.cost for star in stars])
    jeffreys = star_cost + over(bases, [star.gain for star in stars])
    if policies is None:
        visits, stage_cost, stage_shortfall = star_visits, star_cost, jnp.zeros_like(star_cost)
        excess = -star_cost
    else:
        visits = walk(policies)
        costs, shortfalls, excesses = [], [], []
        for rho, base, star, lam, after in zip(policies, bases, stars, lams, values[1:], strict=True):
            inside = (rho > 0) & (base > 0)
            ratio = jnp.where(inside, log_quotient(rho, base), 0.0)
            star_log = jnp.where(inside, after[:, None] - star.free_energy[..., None], 0.0)
            floored = jnp.where(base > 0, jnp.maximum(star.probs, jnp.finfo(float).tiny), 0.0)
            t = jnp.broadcast_to(lam, rho.shape)
            # λ KL(ρ‖ρ*) − λ KL(ρ‖ρ_sft) without cancellation; both are infinite outside the support.
            outside = jnp.any((rho > 0) & (base <= 0), -1)
            excesses.append(jnp.where(outside, jnp.inf, -jnp.sum(rho * star_log, -1)))
            costs.append(scaled_kl(t, rho, base, ratio, t * ratio))
            to_star = jnp.where(inside, ratio - star.log_ratio, 0.0)
            shortfalls.append(scaled_kl(t, rho, floored, to_star, t * ratio - star_log))
        stage_cost, stage_shortfall, excess = (over(policies, each) for each in (costs, shortfalls, excesses))
    achieved = jnp.sum(visits[-1] * reward, -1)
    objective = achieved - jnp.sum(stage_cost, 0)
    value = values[0][:, 0]
    widths = single.own_span * single.tv_model + single.span * single.tv_shift
    best = jnp.sum(star_visits[-1] * reward, -1)
    return ChainSolution(
        values=tuple(v + top for v in values),
        policies=tuple(optimal),
        visits=tuple(visits[1:]),
        induced=visits[-1] @ instance.frozen,
        value=value + top[:, 0],
        objective=objective + top[:, 0],
        shortfall=(best - jnp.sum(star_cost, 0)) - objective,
        achieved=achieved + top[:, 0],
        stage_cost=stage_cost,
        stage_shortfall=stage_shortfall,
        star_cost=star_cost,
        star_jeffreys=jeffreys,
        gap=single.delta1 + own_reward - achieved,
        exact_gap=single.model_jeffreys + single.shift - jnp.sum(jeffreys, 0),
        span_bound=widths - jnp.sum(star_cost, 0),
        tight_bound=widths - jnp.sum(jeffreys, 0),
        trained_bound=widths + jnp.sum(excess, 0),
        single=single,
    )


class Bracket(NamedTuple):
    """A chain's value between two one-stage values, per prompt [X], in reward units."""

    low: Float[Array, " X"]
    """λ_max log Σ ρ̄_sft e^{R/λ_max}."""
    value: Float[Array, " X"]
    """F* of the chain."""
    high: Float[Array, " X"]
    """λ_min log Σ ρ̄_sft e^{R/λ_min}."""


def one_stage_bracket(chain: Chain, lams: float | Sequence[float] | np.ndarray) -> Bracket:
    """V¹(λ_max) ≤ F* ≤ V¹(λ_min), V¹(λ) the value of ONE prompter with the composed reference ρ̄_sft.

    With equal λ all three are equal: more stages neither gain nor lose, and the last prompt's law is the one
    prompter's ρ*. Raises what `solve_chain` does.
    """
    found = solve_chain(chain, 1.0, lams)
    given = np.atleast_1d(np.asarray(lams, float))
    low, high = (
        tilt(chain.composed.prior, found.single.rewrite_reward, np.full(len(chain.p), t)).free_energy
        for t in (given.max(), given.min())
    )
    return Bracket(low, found.value, high)


def joint_tilt(chain: Chain, lam: float) -> Float[Floats, "..."]:
    """The optimal law of whole paths for one λ, enumerated [X, K₁, …, K_n]: ∝ Π ρ_sft,i · exp(R(x, x_n)/λ).

    It is the product of the stages of `solve_chain`. Size X·K₁⋯K_n; for small chains.
    """
    lam = check_temperature("lam", lam)
    paths = np.asarray(chain.stages[0])
    for stage in chain.stages[1:]:
        after = stage.reshape((1,) * (paths.ndim - 1) + stage.shape)
        product = paths[..., None] * after
        if ((product < TINY) & (paths[..., None] > 0) & (after > 0)).any():
            raise AlignProError(f"chain: a path has a probability below {TINY:.1e}; leave such paths out")
        paths = product
    reward = chain.reward @ chain.frozen.T
    flat = paths.reshape(len(paths), -1)
    energy = np.broadcast_to(reward.reshape(len(paths), *(1,) * (paths.ndim - 2), -1), paths.shape).reshape(
        flat.shape
    )
    return tilt(normalise(flat), energy, np.full(len(paths), lam)).probs.reshape(paths.shape)
