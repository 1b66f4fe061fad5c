"""Hunting a statement: the worst instance by gradient ascent, the smallest counterexample by shrinking.

A statement is `lhs ≤ rhs` (`bounds.Statement`). `ascend` looks where it is tightest, or broken furthest;
`smallest` for the simplest instance that breaks it. Neither proves anything by finding nothing; what they
find is evaluated again as a validated `Instance`, with the rounding bound of its statement.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from alignpro.errors import AlignProError
from alignpro.theory.bounds import ANY_PROMPTER, IDENTITIES, STATEMENTS, Statement, Verdict, judge
from alignpro.theory.divergences import Floats
from alignpro.theory.families import FAMILIES, Shape, random_prompters
from alignpro.theory.instance import KEYS, Instance, normalise, unchecked
from alignpro.theory.solution import Solution, solution

FLOOR = 1e-3
"""A ratio lhs/rhs counts where rhs is at least this share of the reward span: 0/0 is not tight."""
TEMPERATURES = (1e-3, 1e3)
"""Between which β and λ are sought."""
CHUNK = 50
"""Steps between two looks at the clock."""
RESEEDS = (0.25, 0.5, 0.75)
"""After these shares of the steps the worse half of the restarts begins again beside the best."""
FINALISTS = 8
"""Of each aim, how many restarts end as validated instances."""


class Target(NamedTuple):
    """What is hunted: a row of `bounds.STATEMENTS`, or a conjecture of your own."""

    name: str
    statement: Callable[[Solution], Statement]
    any_prompter: bool = False
    """About any ρ, so to be evaluated on others than ρ*."""
    equality: bool = False
    """An identity: lhs = rhs."""


ALIASES = {"q2": "never_outperforms", "outperform": "never_outperforms"}
"""The paper's question Q2 is settled by what refutes its denial."""


def target(name: str) -> Target:
    """The statement called `name`, or its alias.

    Raises:
        AlignProError: it is unknown.
    """
    key = ALIASES.get(name, name)
    if key not in STATEMENTS:
        raise AlignProError(f"BOUND {name}: is unknown; give one of {', '.join([*STATEMENTS, *ALIASES])}")
    return Target(key, STATEMENTS[key], key in ANY_PROMPTER, key in IDENTITIES)


@dataclass(frozen=True)
class Found:
    """An instance on which a statement is tight or false, in reward units."""

    target: Target
    instance: Instance
    beta: float
    lam: float
    prompter: np.ndarray | None
    """[X, K]; None for ρ*."""
    lhs: float
    rhs: float
    error: float
    """Bound on the rounding of rhs − lhs."""
    span: float
    """E_x span(x) in reward units, the scale of both sides; 1 for statements about probabilities."""
    verdict: Verdict
    """holds | violated | inconclusive | inapplicable, in float64 with its rounding bound."""
    rho_star: np.ndarray
    """ρ*(x′|x) [X, K]."""
    pi_star: np.ndarray
    """π*(y|x) [X, Y]."""
    rewrite_reward: np.ndarray
    """R(x,x′) [X, K]."""

    @property
    def ratio(self) -> float:
        """lhs/rhs; infinite where rhs ≤ 0 < lhs, NaN where neither is positive."""
        if self.rhs > 0:
            return self.lhs / self.rhs
        return math.inf if self.lhs > 0 else math.nan

    @property
    def slack(self) -> float:
        """rhs − lhs; for an identity −|rhs − lhs|."""
        return -abs(self.rhs - self.lhs) if self.target.equality else self.rhs - self.lhs

    @property
    def violated(self) -> bool:
        """Beyond rounding, with both sides finite."""
        return self.verdict == "violated" and math.isfinite(self.slack)

    @property
    def tightness(self) -> float:
        """lhs/rhs where rhs is at least `FLOOR` of the span, else −∞. For an identity, |rhs − lhs|/span."""
        if self.verdict == "inapplicable" or not (self.span > 0 and math.isfinite(self.slack)):
            return -math.inf
        if self.target.equality:
            return -self.slack / self.span
        return self.ratio if self.rhs >= FLOOR * self.span else -math.inf

    @property
    def excess(self) -> float:
        """−slack/span: by how much it is broken, as a share of the reward span (of 1 where that is 0)."""
        return -self.slack / (self.span if self.span > 0 else 1.0)


# Compiling is nearly all the time a hunt takes: 1.4 s with these where it would be 4.8 s, for slower steps
# that take a third of a second in all.
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def _options() -> dict[str, Any] | None:
    """`_QUICK` where this JAX knows those options."""
    try:
        jax.jit(lambda x: x + 1.0, compiler_options=_QUICK)(0.0)
    except Exception:
        return None
    return _QUICK


@functools.lru_cache(maxsize=64)
def _evaluator(statement: Callable[[Solution], Statement], any_prompter: bool) -> Callable[..., Any]:
    def one(instance: Instance, beta, lam, prompter):
        s = solution(instance, beta, lam, prompter if any_prompter else None)
        return statement(s), (s.rho_star, s.pi_star, s.rewrite_reward)

    return jax.jit(one, compiler_options=_options())


def evaluate(
    wanted: Target,
    instance: Instance,
    beta: float,
    lam: float,
    prompter: np.ndarray | None = None,
    shape: Shape | None = None,
) -> Found:
    """The statement on one instance, padded to `shape` so that one compilation serves all smaller ones.

    A statement about any prompter uses `prompter`, and ρ_sft where that is None.
    """
    x, k, y = instance.shape
    to = instance.shape if shape is None else shape
    more = [(0, n - m) for n, m in zip(to, (x, k, y), strict=True)]
    p, prior, frozen, own, reward = (np.asarray(getattr(instance, key)) for key in KEYS)
    rho = prior if prompter is None else prompter

    def rows_of(policy: np.ndarray) -> np.ndarray:
        return np.pad(np.pad(policy, (more[0], (0, 0)), mode="edge"), ((0, 0), more[1]))

    # Copies of probability 0: no maximum, minimum or support changes.
    arrays = unchecked(
        np.pad(p, more[0]),
        rows_of(prior),
        np.pad(np.pad(frozen, (more[1], (0, 0)), mode="edge"), ((0, 0), more[2])),
        np.pad(own, more[0], mode="edge"),
        np.pad(reward, (more[0], more[2]), mode="edge"),
    )
    found, (rho_star, pi_star, rewrite_reward) = jax.device_get(
        _evaluator(wanted.statement, wanted.any_prompter)(arrays, beta, lam, rows_of(np.asarray(rho)))
    )
    lhs, rhs, error, span = (float(v) for v in found[:4])
    applies = all(bool(v) for v in found.assumptions.values())
    return Found(
        target=wanted,
        instance=instance,
        beta=float(beta),
        lam=float(lam),
        prompter=np.asarray(rho) if wanted.any_prompter else None,
        lhs=lhs,
        rhs=rhs,
        error=error,
        span=span,
        verdict=judge(rhs - lhs, error, applies, wanted.equality),
        rho_star=rho_star[:x, :k],
        pi_star=pi_star[:x, :y],
        rewrite_reward=rewrite_reward[:x, :k],
    )


class Point(NamedTuple):
    """What ascent moves: logits of the policies, rewards, log β, log λ; leading axis [restarts]."""

    p: Float[Floats, "... X"]
    prior: Float[Floats, "... X K"]
    frozen: Float[Floats, "... K Y"]
    reward: Float[Floats, "... X Y"]
    prompter: Float[Floats, "... X K"]
    """log ρ/ρ_sft, up to a constant per prompt."""
    beta: Float[Floats, "..."]
    lam: Float[Floats, "..."]


class Fixed(NamedTuple):
    """What each restart keeps: which probabilities are exactly 0 (−∞, else 0), rows, reward range, aim."""

    p: Float[Floats, "... X"]
    prior: Float[Floats, "... X K"]
    frozen: Float[Floats, "... K Y"]
    own: Int[Floats, "... X"]
    low: Float[Floats, "..."]
    aim: Int[Floats, "..."]
    """0: the ratio lhs/rhs; 1: −slack."""


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

    return jax.jit(climb, compiler_options=_options())


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
    """What gradient ascent found."""

    tightest: Found | None
    """Of the largest ratio lhs/rhs where that counts (see `FLOOR`)."""
    worst: Found | None
    """Broken furthest, relative to the span; None where nothing is."""
    start: float
    """The largest ratio among the starts."""
    steps: int
    """How many were taken."""
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
    half hold rewards in [0, 1], half in [−1, 1]. Policies are softmaxes on the support of their start, a
    random instance of one of the families. One compilation per statement and shape; determined by the seed,
    unless it is stopped by the clock.

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
    instance, beta, lam, rho = jax.tree.map(np.asarray, _arrays(state.best, fixed))
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


# What loses which axis with a prompt, a rewrite, a response.
_PARTS = (
    {"p": 0, "prior": 0, "own": 0, "reward": 0, "prompter": 0},
    {"prior": 1, "frozen": 0, "prompter": 1},
    {"frozen": 1, "reward": 1},
)


def _again(found: Found, shape: Shape | None, beta: float, lam: float, **arrays: np.ndarray) -> Found | None:
    """The find with other arrays, whose policies are divided by their sums; None where one sums to 0."""
    for key in ("p", "prior", "frozen", "prompter"):
        total = arrays[key].sum(-1, keepdims=True)
        if not (total > 0).all():
            return None
        arrays[key] = arrays[key] / total
    prompter = arrays.pop("prompter")
    kept: Any = [arrays[key] for key in KEYS]
    return evaluate(found.target, Instance(*kept), beta, lam, prompter, shape)


def _parts(found: Found) -> dict[str, np.ndarray]:
    arrays = {key: np.asarray(getattr(found.instance, key)) for key in KEYS}
    return arrays | {"prompter": arrays["prior"] if found.prompter is None else found.prompter}


def _without(found: Found, axis: int, index: int, shape: Shape | None) -> Found | None:
    """The find without one prompt, rewrite (unless it is a prompt's own) or response."""
    arrays = _parts(found)
    if axis == 1:
        if (arrays["own"] == index).any():
            return None
        arrays["own"] = arrays["own"] - (arrays["own"] > index)
    for key, position in _PARTS[axis].items():
        arrays[key] = np.delete(arrays[key], index, position)
    return _again(found, shape, found.beta, found.lam, **arrays)


def _rounded(found: Found, digits: int, shape: Shape | None) -> Found | None:
    """The find in so many decimals, temperatures in so many digits."""
    arrays = {key: a if key == "own" else np.round(a, digits) for key, a in _parts(found).items()}
    beta, lam = (float(f"{t:.{digits - 1}e}") for t in (found.beta, found.lam))
    return _again(found, shape, beta, lam, **arrays)


def simplify(found: Found, shape: Shape | None = None) -> Found:
    """What matters of a find: without the prompts, rewrites and responses it can do without, in few digits.

    A counterexample stays one and keeps 99% of its excess; the ratio of a tight instance falls by no more
    than a tenth of its distance from 1 (1e-6 at least, 1e-3 at most).
    """
    least = found.tightness - max(1e-6, min(1e-3, 0.1 * abs(1.0 - found.tightness)))
    violated, excess = found.violated, 0.99 * found.excess

    def kept(again: Found | None) -> TypeGuard[Found]:
        if again is None or again.violated != violated:
            return False
        return again.excess >= excess if violated else again.tightness >= least

    found_less = True
    while found_less:
        found_less = False
        for axis, size in enumerate(found.instance.shape):
            for index in range(size if size > 1 else 0):
                again = _without(found, axis, index, shape)
                if kept(again):
                    found, found_less = again, True
                    break
    for digits in (1, 2, 3, 4):
        again = _rounded(found, digits, shape)
        if kept(again):
            return again
    return found


@dataclass(frozen=True)
class Smallest:
    """What the search for a small counterexample found."""

    found: Found | None
    tried: int
    """How many instances were evaluated, those of the shrinking included."""
    interrupted: bool = False


class _OutOfTime(KeyboardInterrupt):
    """Leaves Hypothesis at once, as Ctrl-C does."""


def smallest(
    wanted: Target,
    shape: Shape = (2, 3, 3),
    *,
    seed: int = 0,
    tries: int = 2000,
    seconds: float | None = None,
    low: float = -1.0,
    progress: Callable[[int], object] = lambda tried: None,
) -> Smallest:
    """The simplest counterexample with at most `shape` prompts, rewrites and responses (`hypothesis.find`).

    Simplest: fewest sizes, then whole weights and short decimals near 0 (see `alignpro.testing`). A
    counterexample is a violation beyond rounding, with both sides finite.

    Args:
        wanted: the statement.
        shape: largest sizes; one compilation serves all smaller ones.
        seed: determines the search.
        tries: how many random instances to try before giving up; a quarter of it for each smaller shape.
        seconds: give up, or keep the simplest so far, after this much time.
        low: least reward; the largest is 1.
        progress: called with how many were evaluated.

    Raises:
        AlignProError: Hypothesis is not installed.
    """
    from alignpro.testing import counterexample, problems

    began, tried = time.perf_counter(), 0
    simplest: Found | None = None

    def holds(case: tuple[Instance, float, float, np.ndarray]) -> bool:
        nonlocal tried, simplest
        if seconds is not None and time.perf_counter() - began > seconds:
            raise _OutOfTime
        found = evaluate(wanted, *case, shape=shape)
        tried += 1
        progress(tried)
        if found.violated:
            simplest = found  # what comes later is simpler
        return not found.violated

    def search(sizes: Shape, tries: int) -> Found | None:
        cases = problems(*sizes, low=low, temperature=TEMPERATURES)
        refuted = counterexample(holds, cases, seed=seed, tries=tries)
        return None if refuted is None else evaluate(wanted, *refuted[0])

    try:
        least = again = search(shape, tries)
        while least is not None and again is not None:
            x, k, y = least.instance.shape
            # Shrinking can get stuck: look afresh with one prompt, rewrite or response less.
            fewer = [(x - 1, k, y), (x, k - 1, y), (x, k, y - 1)]
            found = (search(sizes, max(1, tries // 4)) for sizes in fewer if min(sizes) > 0)
            again = next((find for find in found if find is not None), None)
            least = again or least
    except KeyboardInterrupt as stop:
        return Smallest(simplest, tried, not isinstance(stop, _OutOfTime))
    return Smallest(least, tried)


def certificate(found: Found) -> Any:
    """A find proved in ball arithmetic (`certify.Certificate`); None where python-flint is not installed."""
    try:
        from alignpro.theory.certify import certify
    except AlignProError:
        return None
    wanted = found.target
    return certify(
        found.instance,
        found.beta,
        found.lam,
        wanted.name if wanted.name in STATEMENTS else wanted.statement,
        found.prompter,
        equality=wanted.equality,
    )
