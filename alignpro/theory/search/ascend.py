"""Gradient ascent to the instance where a statement is tightest, or broken furthest."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alignpro.theory.divergences import Floats
from alignpro.theory.families import FAMILIES, Shape, random_prompters
from alignpro.theory.instance import KEYS, Instance, normalise, unchecked
from alignpro.theory.scale.routes import quick_options
from alignpro.theory.search.found import FLOOR, TEMPERATURES, Found, Target, evaluate
from alignpro.theory.search.shrink import simplify
from alignpro.theory.solution import solution

CHUNK = 50
"""How many steps are taken between two looks at the clock."""
RESEEDS = (0.25, 0.5, 0.75)
"""Shares of the steps after which the worse half of the restarts begins again beside the best."""
FINALISTS = 8
"""How many restarts of each aim end as validated instances."""


class Point(NamedTuple):
    """Coordinates that ascent moves: logits of the policies, rewards, log β, log λ; first axis [restarts]."""

    p: Float[Floats, "... X"]
    prior: Float[Floats, "... X K"]
    frozen: Float[Floats, "... K Y"]
    reward: Float[Floats, "... X Y"]
    prompter: Float[Floats, "... X K"]
    """log ρ/ρ_sft, up to a constant per prompt."""
    beta: Float[Floats, "..."]
    lam: Float[Floats, "..."]


class Fixed(NamedTuple):
    """Parts that a restart keeps: which probabilities are exactly 0 (−∞, else 0), rows, reward range, aim."""

    p: Float[Floats, "... X"]
    prior: Float[Floats, "... X K"]
    frozen: Float[Floats, "... K Y"]
    own: Int[Floats, "... X"]
    low: Float[Floats, "..."]
    aim: Int[Floats, "..."]
    """0 to climb the ratio lhs/rhs, 1 to climb −slack."""


class _State(NamedTuple):
    point: Point
    mean: Point
    square: Point
    best: Point
    value: Float[Floats, " N"]
    step: Float[Floats, ""]


RATES = Point(*np.array([0.1, 0.1, 0.1, 0.03, 0.1, 0.1, 0.1]))
"""Adam's first step in each coordinate; it falls to a hundredth along a cosine."""
_LOGIT = 40.0


def _arrays(point: Point, fixed: Fixed) -> tuple[Instance, Array, Array, Array]:
    prior = jax.nn.softmax(point.prior + fixed.prior, -1)
    instance = unchecked(
        jax.nn.softmax(point.p + fixed.p, -1),
        prior,
        jax.nn.softmax(point.frozen + fixed.frozen, -1),
        fixed.own,
        point.reward,
    )
    rho = jax.nn.softmax(point.prior + fixed.prior + point.prompter, -1)
    return instance, jnp.exp(point.beta), jnp.exp(point.lam), rho


_compiled_arrays = jax.jit(_arrays)


def _objective(wanted: Target, point: Point, fixed: Fixed) -> Float[Array, ""]:
    instance, beta, lam, rho = _arrays(point, fixed)
    found = wanted.statement(solution(instance, beta, lam, rho if wanted.any_prompter else None))
    live = found.ceiling > 0
    scale = jnp.where(live, found.ceiling, 1.0)
    slack = found.rhs - found.lhs
    if wanted.equality:
        value = jnp.abs(slack) / scale
    else:
        ratio = found.lhs / jnp.maximum(found.rhs, FLOOR * scale)
        # Bounded, as λ KL of a far prompter can exceed the span a thousandfold.
        broken = -slack / (scale + jnp.abs(found.lhs) + jnp.abs(found.rhs))
        value = jnp.where(fixed.aim == 0, ratio, broken)
    applies = functools.reduce(jnp.logical_and, found.assumptions.values(), live)
    return jnp.where(applies & jnp.isfinite(value), value, -jnp.inf)


@functools.lru_cache(maxsize=16)
def _climber(wanted: Target) -> Callable[..., _State]:
    slope = jax.vmap(jax.value_and_grad(functools.partial(_objective, wanted)))
    low, high = (math.log(t) for t in TEMPERATURES)

    def project(point: Point, fixed: Fixed) -> Point:
        def held(logits):
            return jnp.clip(logits - jnp.max(logits, -1, keepdims=True), -_LOGIT, 0.0)

        return Point(
            held(point.p),
            held(point.prior),
            held(point.frozen),
            jnp.clip(point.reward, fixed.low[:, None, None], 1.0),
            jnp.clip(point.prompter, -_LOGIT, _LOGIT),
            jnp.clip(point.beta, low, high),
            jnp.clip(point.lam, low, high),
        )

    def step(fixed: Fixed, steps: Array, state: _State) -> _State:
        value, gradient = slope(state.point, fixed)
        better = value > state.value

        def keep(new, old):
            return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        best = jax.tree.map(keep, state.point, state.best)
        gradient = jax.tree.map(lambda g: jnp.where(jnp.isfinite(g), g, 0.0), gradient)
        n = state.step + 1.0
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state.mean, gradient)
        square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state.square, gradient)
        pace = 0.01 + 0.99 * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.minimum(state.step / steps, 1.0)))

        def move(rate, x, m, v):
            return x + rate * pace * (m / (1 - 0.9**n)) / (jnp.sqrt(v / (1 - 0.99**n)) + 1e-12)

        point = project(jax.tree.map(move, RATES, state.point, mean, square), fixed)
        return _State(point, mean, square, best, jnp.maximum(value, state.value), n)

    def climb(state: _State, fixed: Fixed, steps: Array, count: Array) -> _State:
        return lax.fori_loop(0, count, lambda _, s: step(fixed, steps, s), state)

    return jax.jit(climb, compiler_options=quick_options())


def _starts(rng: np.random.Generator, restarts: int, shape: Shape, families) -> tuple[Point, Fixed]:
    """Random instances of the families in turn, as logits; rewards brought into [0, 1] or [−1, 1]."""
    parts = []
    for i, family in enumerate(families):
        count = len(range(i, restarts, len(families)))
        if count:
            parts.append(FAMILIES[family](rng, count, shape))
    batch = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts)
    policies = [np.asarray(getattr(batch, key)) for key in ("p", "prior", "frozen")]
    masks = [np.where(policy > 0, 0.0, -np.inf) for policy in policies]
    logits = [np.log(np.where(policy > 0, policy, 1.0)) for policy in policies]
    logits = [np.maximum(logit, -_LOGIT) for logit in logits]
    reward = np.asarray(batch.reward)
    least, most = reward.min((1, 2), keepdims=True), reward.max((1, 2), keepdims=True)
    low = np.where(np.arange(restarts) % 4 < 2, 0.0, -1.0)
    outside = (least < low[:, None, None]) | (most > 1)
    unit = (reward - least) / np.where(most > least, most - least, 1.0)
    reward = np.where(outside, low[:, None, None] + (1.0 - low[:, None, None]) * unit, reward)
    rho = random_prompters(rng, policies[1])
    away = np.where((rho > 0) & (policies[1] > 0), np.log(np.where(rho > 0, rho, 1.0)) - logits[1], 0.0)
    beta, lam = rng.uniform(math.log(TEMPERATURES[0]), math.log(TEMPERATURES[1]), (2, restarts))
    p, prior, frozen = logits
    point = Point(p, prior, frozen, reward, away, beta, lam)
    p, prior, frozen = masks
    return point, Fixed(p, prior, frozen, np.asarray(batch.own), low, np.arange(restarts) % 2)


def _reseed(rng: np.random.Generator, state: _State, fixed: Fixed) -> tuple[_State, Fixed]:
    """The worse half of each aim becomes the best eighth, moved by 1e-3 to 1 of the usual unit."""
    value, aim = np.array(state.value), np.asarray(fixed.aim)
    source = np.arange(len(value))
    for one in (0, 1):
        order = np.array([i for i in np.argsort(-value, kind="stable") if aim[i] == one], dtype=int)
        worse = order[(len(order) + 1) // 2 :]
        source[worse] = np.resize(order[: max(1, len(order) // 8)], len(worse))
    moved = source != np.arange(len(source))
    width = np.where(moved, 10.0 ** rng.uniform(-3, 0, len(source)), 0.0)

    def beside(rate, x):
        return x + 10.0 * rate * width.reshape((-1,) + (1,) * (x.ndim - 1)) * rng.standard_normal(x.shape)

    best, fixed = jax.tree.map(lambda leaf: np.asarray(leaf)[source], (state.best, fixed))
    zeros = jax.tree.map(np.zeros_like, best)
    point = jax.tree.map(beside, RATES, best)
    return _State(point, zeros, zeros, best, value[source], state.step), fixed


@dataclass(frozen=True)
class Ascent:
    """The outcome of gradient ascent."""

    tightest: Found | None
    """The instance of the largest ratio lhs/rhs where that counts (see `FLOOR`); None where none does."""
    worst: Found | None
    """The instance on which it is broken furthest, relative to the span; None where nothing breaks it."""
    start: float
    """The largest ratio among the starts."""
    steps: int
    """How many steps were taken."""
    interrupted: bool = False


def ascend(
    wanted: Target,
    shape: Shape = (2, 3, 3),
    *,
    restarts: int = 256,
    steps: int = 500,
    seed: int = 0,
    seconds: float | None = None,
    families: tuple[str, ...] | None = None,
    progress: Callable[[int, float], object] = lambda steps, best: None,
) -> Ascent:
    """Gradient ascent (Adam) over instances, β, λ and, where the statement is about any, the prompter.

    Half of the restarts climb the ratio lhs/max(rhs, FLOOR·span), half −slack relative to what was compared;
    half hold rewards in [0, 1], half in [−1, 1]. Policies are softmaxes on the support of their start. One
    compilation per statement and shape; determined by the seed, unless the clock stops it.

    Args:
        wanted: the statement.
        shape: (X, K, Y) of the instances.
        restarts: how many are climbed side by side.
        steps: how many steps each takes.
        seed: determines the starts.
        seconds: stop at the end of the chunk of steps in which this much time has passed.
        families: where to start; all when None.
        progress: called with the steps done and the best objective so far.

    An interruption (Ctrl-C) ends the climb and is told by `interrupted`.
    """
    families = tuple(FAMILIES) if families is None else families
    began, done, interrupted = time.perf_counter(), 0, False
    rng = np.random.default_rng(seed)
    point, fixed = _starts(rng, restarts, shape, families)
    zeros = jax.tree.map(np.zeros_like, point)
    state = _State(point, zeros, zeros, point, np.full(restarts, -np.inf), np.zeros(()))
    climb, start, ratio = _climber(wanted), -math.inf, np.asarray(fixed.aim) == 0
    try:
        while done < steps and (seconds is None or time.perf_counter() - began < seconds):
            if any(done - CHUNK < share * steps <= done for share in RESEEDS):
                state, fixed = _reseed(rng, state, fixed)
            count = min(CHUNK, steps - done) if done else 1  # the first step's value is the start's
            state = jax.block_until_ready(climb(state, fixed, float(steps), count))
            done += count
            best = float(np.max(np.asarray(state.value)[ratio], initial=-math.inf))
            start = best if done == 1 else start
            progress(done, best)
    except KeyboardInterrupt:
        interrupted = True
    found = _finalists(wanted, state, fixed, shape)
    # Of those equally tight, where most is at stake.
    tight = max(found, key=lambda f: (round(f.tightness, 6), f.rhs / f.span if f.span > 0 else 0.0))
    broken = [f for f in found if f.violated]
    if not wanted.equality:  # of an identity there is only rounding to show
        tight = simplify(tight, shape)
    return Ascent(
        tightest=tight if tight.tightness > -math.inf else None,
        worst=simplify(max(broken, key=lambda f: f.excess), shape) if broken else None,
        start=start,
        steps=done,
        interrupted=interrupted,
    )


def _finalists(wanted: Target, state: _State, fixed: Fixed, shape: Shape) -> list[Found]:
    """The best points of the best restarts, as validated instances."""
    instance, beta, lam, rho = jax.tree.map(np.asarray, _compiled_arrays(state.best, fixed))
    low, high = TEMPERATURES
    value, aim = np.asarray(state.value), np.asarray(fixed.aim)
    first = [i for one in (0, 1) for i in [j for j in np.argsort(-value) if aim[j] == one][:FINALISTS]]
    return [
        evaluate(
            wanted,
            Instance(*(np.asarray(getattr(instance, key))[i] for key in KEYS)),
            float(np.clip(beta[i], low, high)),
            float(np.clip(lam[i], low, high)),
            normalise(rho[i]),
            shape,
        )
        for i in first
    ]
