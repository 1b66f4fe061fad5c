"""What prompting can reach at best on finite spaces, and what it costs.

Ceilings (`prompting_ceiling`, `information_projection`), prices (`kl_budget`, `lam_for_kl`, `frontier`,
`best_of_n`, `kl_price`), derivatives (`sensitivity`, `headroom`), and the paper's readings of its own
limits (`limit_readings`, `critical_lam`). Whole proofs: docs/limits.md.

All logarithms are natural; TV is half the L1 distance; "reward units" are those of the rewards. Everything
is per prompt [X] unless said otherwise, pure, and safe under jit and vmap, but for `lam_for_kl`, which
checks its input on the host. Rewards enter differences measured from a reachable response, so that a large
common offset costs no accuracy.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignpro.errors import AlignProError
from alignpro.theory.bounds import paper_r_max
from alignpro.theory.divergences import TINY, Floats, kl, log1p, log_quotient, scaled_kl
from alignpro.theory.gibbs import check_temperature, tilt
from alignpro.theory.instance import Instance, bare, probabilities
from alignpro.theory.pairwise import pairwise_tv
from alignpro.theory.robustness import reachable
from alignpro.theory.solution import EPS, Solution

Temperature = Float[Floats, ""] | float

_LEAST, _MOST = 1e-18, 1e18  # temperatures `check_temperature` lets through
# The interior point method: how far w·s may be from μ; the decrement, in μ per row, that counts as centred;
# what μ is cut to then, as a share of the gap per row.
_CENTRAL, _CENTRED, _CUT = 100.0, 0.1, 0.03
_CELLS = 2**23  # of a projection's matrices held at once


class _Rewards(NamedTuple):
    """Rewards of one instance, measured from `top`."""

    top: Float[Array, " X"]
    """The best response reachable from x by its own row or by the support of ρ_sft, reward units."""
    response: Float[Array, "X Y"]
    """r*(x,y) − top; 0 where no row reaches y, > 0 only where only rows off the support do."""
    rewrite: Float[Array, "X K"]
    """R(x,x′) − top."""
    tie: Float[Array, " X"]
    """Two R's this close are equal to rounding."""
    prior: Float[Array, "X K"]
    frozen: Float[Array, "K Y"]
    own: Float[Array, "X Y"]
    """π_F(·|x)."""


def _rewards(instance: Instance) -> _Rewards:
    return _compiled_rewards(bare(instance))


@jax.jit
def _compiled_rewards(instance: Instance) -> _Rewards:
    prior, frozen = jnp.asarray(instance.prior, float), jnp.asarray(instance.frozen, float)
    reward, own = jnp.asarray(instance.reward, float), frozen[jnp.asarray(instance.own)]
    reach = reachable(instance)
    top = jnp.max(jnp.where(reach, reward, -jnp.inf), -1)
    anywhere = jnp.any(frozen > 0, 0)
    response = jnp.where(anywhere[None, :], reward - top[:, None], 0.0)
    span = -jnp.min(jnp.where(reach, response, 0.0), -1)
    return _Rewards(
        top=top,
        response=response,
        rewrite=response @ frozen.T,
        tie=(2 * frozen.shape[-1] + 6) * EPS * span,
        prior=prior,
        frozen=frozen,
        own=own,
    )


def _temperature(name: str, value: Temperature) -> Array:
    """β or λ as an array; checked where it is a plain number (a traced one cannot be)."""
    return jnp.asarray(value if isinstance(value, jax.Array) else check_temperature(name, value), float)


def _prompter(instance: Instance, prompter: Float[Floats, "X K"]) -> Array:
    if not isinstance(prompter, jax.core.Tracer):
        prompter = probabilities("prompter", prompter, np.shape(instance.prior))
    return jnp.asarray(prompter, float)


@jax.jit
def _mean(p: Float[Floats, " X"], per_prompt: Float[Floats, "... X"]) -> Float[Array, "..."]:
    """E_{x~P}; a prompt of probability 0 does not count, whatever its value."""
    p = jnp.broadcast_to(jnp.asarray(p, float), jnp.shape(per_prompt))
    return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, per_prompt, 0.0), 0.0), -1)


@jax.jit
def _variance(probs: Float[Floats, "... n"], values: Float[Floats, "... n"]) -> Float[Array, "..."]:
    """Var_p(values), measured from the most probable value: accurate next to a point mass."""
    probs, values = jnp.broadcast_arrays(probs, values)
    mode = jnp.argmax(probs, -1)[..., None]
    d = jnp.where(probs > 0, values - jnp.take_along_axis(values, mode, -1), 0.0)
    return jnp.sum(probs * (d - jnp.sum(probs * d, -1, keepdims=True)) ** 2, -1)


class _Extremes(NamedTuple):
    """An energy on the support of a base, on the last axis."""

    best: Float[Array, "... n"]
    """Whether it is maximal there, to within `tie` (bool)."""
    mass: Float[Array, "..."]
    """base(maximisers)."""
    separation: Float[Array, "..."]
    """Least energy of a maximiser less the best of the others; ∞ where there are no others."""
    maximum: Float[Array, "..."]
    span: Float[Array, "..."]


@jax.jit
def _extremes(base: Array, energy: Array, tie: Array) -> _Extremes:
    inside = base > 0
    maximum = jnp.max(jnp.where(inside, energy, -jnp.inf), -1)
    best = inside & (energy >= (maximum - tie)[..., None])
    least = jnp.min(jnp.where(best, energy, jnp.inf), -1)
    second = jnp.max(jnp.where(inside & ~best, energy, -jnp.inf), -1)
    return _Extremes(
        best=best,
        mass=jnp.minimum(jnp.sum(jnp.where(best, base, 0.0), -1), 1.0),
        separation=least - second,
        maximum=maximum,
        span=maximum - jnp.min(jnp.where(inside, energy, jnp.inf), -1),
    )


def _root(function: Callable[[Array], tuple[Array, Array]], low: Array, high: Array) -> Array:
    """t in [low, high] (> 0) where each entry of an increasing function changes sign.

    `function(t)` gives the value and its derivative in log t. Newton steps in log t, with a bisection
    every third round and wherever a step would leave the bracket.
    """

    def go_on(state):
        _, _, _, done, rounds = state
        return (rounds < 240) & ~jnp.all(done)

    def step(state):
        low, high, t, done, rounds = state
        value, slope = function(t)
        low, high = jnp.where(value < 0, t, low), jnp.where(value < 0, high, t)
        newton = t * jnp.exp(jnp.clip(-value / slope, -700.0, 700.0))
        middle = jnp.sqrt(low) * jnp.sqrt(high)
        inside = (newton >= low) & (newton <= high)
        good = inside & ((rounds % 3 < 2) | (jnp.abs(newton - t) <= 1e-6 * t))
        new = jnp.where(good, newton, middle)
        finished = (inside & (jnp.abs(newton - t) <= 4 * EPS * t)) | (high <= low * (1 + 4 * EPS))
        return low, high, jnp.where(done, t, new), done | finished, rounds + 1

    start = jnp.sqrt(low) * jnp.sqrt(high)
    return lax.while_loop(go_on, step, (low, high, start, high <= low, 0))[2]


# ------------------------------------------------------------------------------- what can be reached


class Projection(NamedTuple):
    """The information projection of π*(·|x) on conv{π_F(·|x′)}, with its certificate."""

    weights: Float[Array, "X K"]
    """ρ(x′|x): the prompter that reaches it (probabilities). 0 exactly on rows that are not `usable`."""
    policy: Float[Array, "X Y"]
    """π_ρ(y|x) (probabilities)."""
    kl: Float[Array, " X"]
    """KL(π_ρ‖π*) in nats: `kl − gap` ≤ the minimum ≤ `kl`."""
    loss: Float[Array, " X"]
    """β·kl = G(π*) − G(π_ρ), reward units."""
    gap: Float[Array, " X"]
    """Duality gap max_k ⟨∇, w − e_k⟩ plus a bound on its rounding, in nats: bounds `kl` − minimum."""
    converged: Bool[Array, " X"]
    """gap ≤ tol·max(1, span(x)/β). Where False, only `kl − gap` ≤ minimum ≤ `kl` is known."""
    iterations: Int[Array, " X"]
    """Newton steps taken."""
    usable: Bool[Array, "X K"]
    """Rows whose support lies in that of π_F(·|x); the others have infinite KL. The own row always is."""


def information_projection(
    instance: Instance, beta: Temperature, *, tol: float = 1e-10, max_iterations: int = 200
) -> Projection:
    """The best prompter for the REGULARISED objective: min over ρ of KL(π_ρ(·|x) ‖ π*(·|x)), certified.

    Statement: with G(π) = E_π r − β KL(π‖π_F(·|x)), G(π*) − G(π_ρ) = β KL(π_ρ‖π*). So the projection
    maximises G over all prompters, and β·min KL is what no prompter can recover of RLHF's own objective.
    Proof: log π* = log π_F + r/β − log Z*, multiply by β and take E_π_ρ; compare with G(π*) = β log Z*. ∎
    Certificate: f(w) = KL(Σ_k w_k π_F(·|k)‖π*) is convex, so f(v) ≥ f(w) + ⟨∇f(w), v − w⟩ ≥ f(w) − gap for
    every v, gap = max_k ⟨∇f(w), w − e_k⟩ (Frank–Wolfe). It vouches for `weights` whatever found them.

    Method: primal–dual interior point. f is compatible with the barrier −Σ log w_k
    (|f‴| ≤ f″·max|h_k/w_k|), so Newton steps are few (20–40) at any conditioning, where exponentiated
    gradient and Frank–Wolfe take 10³ to 10⁶ steps to 1e-10. Scaled by √w, the Hessian is B Bᵀ with
    B = √w_k π_F(y|k)/√m_y, of norm exactly 1. O(K²Y + K³) per step and prompt.

    Informative: β·kl > 0 is a lower bound on the regularised gap of EVERY prompter; it is 0 iff π* is a
    mixture of the frozen model's rows, when prompting matches RLHF exactly.

    Args:
        instance: the problem.
        beta: β > 0, reward units.
        tol: on the gap, in nats times max(1, span(x)/β): β·gap ≤ tol·max(β, span), reward units.
        max_iterations: Newton steps per prompt.

    Raises:
        AlignProError: β is not positive and finite, or tol not positive. Missed convergence is no error:
            it is `converged`, per prompt.
    """
    beta = _temperature("beta", beta)
    if not tol > 0:
        raise AlignProError(f"tol {tol}: must be positive; give one such as 1e-10")
    return _project(_rewards(instance), beta, tol, max_iterations)


@jax.jit
def _project(rewards: _Rewards, beta: Array, tol: Array | float, limit: Array | int) -> Projection:
    frozen, own = rewards.frozen, rewards.own
    rewrites, responses = frozen.shape
    model = tilt(own, rewards.response, beta)
    # A row is usable iff it puts nothing where the own row has nothing.
    usable = ((frozen > 0).astype(float) @ (own <= 0).astype(float).T).T <= 0
    span = _extremes(own, rewards.response, jnp.zeros_like(rewards.top)).span
    allowance = tol * jnp.maximum(1.0, span / beta)

    def one(row):
        row_usable, log_q, row_tol = row
        return _interior(frozen, row_usable, log_q, row_tol, limit)

    batch = max(1, _CELLS // (rewrites * (rewrites + responses)))
    weights, gap, iterations = lax.map(
        one, (usable, model.log_probs, allowance), batch_size=min(batch, usable.shape[0])
    )
    policy = weights @ frozen
    star = jnp.where(own > 0, jnp.maximum(model.probs, TINY), 0.0)
    far = jnp.log(jnp.maximum(policy, TINY)) - jnp.where(own > 0, model.log_probs, 0.0)
    ratio = jnp.where(model.probs > TINY, log_quotient(policy, star), jnp.where(policy > 0, far, 0.0))
    ones = jnp.ones_like(policy)
    divergence = scaled_kl(ones, policy, star, ratio, ratio)
    return Projection(
        weights=weights,
        policy=policy,
        kl=divergence,
        loss=beta * divergence,
        gap=gap,
        converged=gap <= allowance,
        iterations=iterations,
        usable=usable,
    )


def _interior(
    frozen: Array, usable: Array, log_q: Array, tol: Array, limit: Array | int
) -> tuple[Array, Array, Array]:
    """(weights, gap, steps): min over the simplex on `usable` of KL(w·frozen ‖ q), by primal–dual steps.

    Optimality: ∇f − ν = s ≥ 0, w·s = 0. Each Newton step on f − μ Σ log w, with s/w in place of μ/w² in the
    Hessian, is shortened until the objective no longer rises along it; once it is centred, μ is cut. Rows
    that are not usable have w = 0: they drop out.
    """
    rewrites, responses = frozen.shape
    a = jnp.where(usable[:, None], frozen, 0.0)
    inside = log_q > -jnp.inf
    log_q = jnp.where(inside, log_q, 0.0)
    count = jnp.sum(usable)

    def slopes(w):
        m = w @ a
        log_m = jnp.where(inside, jnp.log(jnp.maximum(m, TINY)), 0.0)
        g = a @ (log_m - log_q)
        g = jnp.where(usable, g - jnp.min(jnp.where(usable, g, jnp.inf)), 0.0)
        return m, g, jnp.abs(log_m) + jnp.abs(log_q)

    def certificate(w, g, size):
        noise = (rewrites + responses + 16) * EPS * (1.0 + jnp.max(a @ size))
        return jnp.sum(w * g) + noise

    def barrier(w, g, mu):
        return jnp.where(usable, g - mu / jnp.where(usable, w, 1.0), 0.0)

    def step(state):
        w, s, mu, best, best_gap, rounds, _ = state
        m, g, _ = slopes(w)
        safe = jnp.where(usable, w, 1.0)
        s = jnp.where(usable, jnp.clip(s, mu / (_CENTRAL * safe), _CENTRAL * mu / safe), 1.0)
        root = jnp.sqrt(w)
        b = root[:, None] * a / jnp.sqrt(jnp.where(m > 0, m, 1.0))[None, :]
        matrix = b @ b.T + jnp.diag(s + 4 * rewrites * EPS)
        fall = barrier(w, g, mu)
        right = jnp.stack([-root * fall, root], -1)
        u = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(matrix), True), right)
        nu = -jnp.sum(root * u[:, 0]) / jnp.sum(root * u[:, 1])
        relative = jnp.where(usable, (u[:, 0] + nu * u[:, 1]) / jnp.sqrt(safe), 0.0)
        dw = w * relative
        ds = jnp.where(usable, mu / safe - s - s * relative, 0.0)

        def longest(ratio):
            return jnp.minimum(1.0, 0.99 / jnp.maximum(jnp.max(ratio), 1e-300))

        def moved(length):
            new = w * (1.0 + length * relative)
            return new / jnp.sum(new)

        downhill = jnp.sum(fall * dw)

        def rises(search):
            length, tries = search
            new = moved(length)
            _, ng, _ = slopes(new)
            return (tries < 40) & ~(jnp.sum(barrier(new, ng, mu) * dw) <= -0.3 * downhill)

        length, tries = lax.while_loop(rises, lambda c: (0.5 * c[0], c[1] + 1), (longest(-relative), 0))
        w, s = moved(length), s + longest(-ds / s) * ds
        _, g, size = slopes(w)
        gap = certificate(w, g, size)
        better = gap < best_gap
        best, best_gap = jnp.where(better, w, best), jnp.where(better, gap, best_gap)
        # Forty halvings in vain are rounding: nothing more to gain at this μ.
        centred = (-downhill <= _CENTRED * mu * count) | (tries >= 40)
        mu = jnp.where(centred, _CUT * jnp.sum(w * g) / count, mu)
        return w, s, mu, best, best_gap, rounds + 1, ~jnp.isfinite(gap)

    def go_on(state):
        _, _, _, _, best_gap, rounds, stuck = state
        return (best_gap > tol) & (rounds < limit) & ~stuck

    w = usable / count
    _, g, size = slopes(w)
    mu = _CUT * jnp.sum(w * g) / count
    start = (
        w,
        mu / jnp.where(usable, w, 1.0),
        mu,
        w,
        certificate(w, g, size),
        jnp.asarray(0),
        jnp.asarray(False),
    )
    _, _, _, best, gap, rounds, _ = lax.while_loop(go_on, step, start)
    return best, gap, rounds


class Ceiling(NamedTuple):
    """Lower bounds on the gap of every prompter, attained; reward units."""

    anywhere: Float[Array, " X"]
    """E_π* r* − max over all K rewrites of R(x,x′): for any prompter whatever."""
    supported: Float[Array, " X"]
    """The same over the support of ρ_sft: for prompters that keep its support. ≥ `anywhere`."""
    best: Int[Array, " X"]
    """The rewrite that attains `anywhere`."""
    best_supported: Int[Array, " X"]
    """The rewrite that attains `supported`."""


def prompting_ceiling(instance: Instance, beta: Temperature) -> Ceiling:
    """gap(ρ)(x) ≥ E_π* r* − max_x′ R(x,x′) for every ρ, with equality iff ρ(·|x) sits on the maximisers.

    Proof: gap(ρ)(x) = [E_π* r* − max R] + E_ρ[max R − R], and the second part is ≥ 0. ∎ Taken over the
    support of ρ_sft it is also the limit of the gap of ρ* as λ → 0. Randomising never helps plain reward.

    Informative: a positive ceiling is what no prompter can recover; a negative one says that some prompter
    outperforms π* (Q2), and by how much at most.

    Raises:
        AlignProError: β is not positive and finite.
    """
    r = _rewards(instance)
    model = tilt(r.own, r.response, _temperature("beta", beta))
    optimum = jnp.sum(model.probs * r.response, -1)
    inside = jnp.where(r.prior > 0, r.rewrite, -jnp.inf)
    return Ceiling(
        anywhere=optimum - jnp.max(r.rewrite, -1),
        supported=optimum - jnp.max(inside, -1),
        best=jnp.argmax(r.rewrite, -1),
        best_supported=jnp.argmax(inside, -1),
    )


class ResponseValue(NamedTuple):
    """What a tilt of the responses adds to one of the rewrites, at the same temperature; reward units."""

    prompting: Float[Array, " X"]
    """λ log E_ρsft e^{R/λ} = F(ρ*)."""
    joint: Float[Array, " X"]
    """λ log E_{ρ_sft, π_F} e^{r/λ}: the optimum over distributions of (x′, y) jointly."""
    added: Float[Array, " X"]
    """joint − prompting ≥ 0; → E_ρsft Var(r|x′)/(2λ) as λ → ∞."""


def response_value(instance: Instance, lam: Temperature) -> ResponseValue:
    """λ log E e^{r/λ} ≥ λ log E_ρsft e^{R/λ}: what choosing prompts leaves to choosing responses.

    The left side is the value of RLHF started from π_ρsft at temperature λ. Statement: the difference is
    λ log E_ρ* e^{h/λ}, with h(x′) = λ log E_{π_F(·|x′)} e^{(r − R)/λ} ≥ 0; it is 0 iff r* is constant on
    every rewrite's responses. Proof: factor e^{R/λ} out of E_{π_F(·|x′)} e^{r/λ}; ρ* ∝ ρ_sft e^{R/λ}; h ≥ 0
    is Jensen's inequality. ∎ Informative where `variance_split` has much within rewrites.

    Raises:
        AlignProError: λ is not positive and finite.
    """
    lam, r = _temperature("lam", lam), _rewards(instance)
    star = tilt(r.prior, r.rewrite, lam)
    h = lax.map(lambda d: tilt(r.frozen, jnp.broadcast_to(d, r.frozen.shape), lam).gain, r.response)
    joint = tilt(r.prior, r.rewrite + h, lam).free_energy
    near = tilt(star.probs, h, lam).free_energy  # keeps its relative accuracy, but ρ* may underflow
    span = _extremes(r.prior, r.rewrite + h, r.tie).span
    added = jnp.where(span < lam, near, joint - star.free_energy)
    return ResponseValue(star.free_energy + r.top, joint + r.top, jnp.maximum(added, 0.0))


# ------------------------------------------------------------------------------------- what it costs


class KLBudget(NamedTuple):
    """Theorem 1 read as a budget: its right side is ≥ 0 while E_x KL(ρ*‖ρ_sft) ≤ (ε1+ε2)/λ. Nats."""

    model: Float[Array, " X"]
    """ε1(x) = r_max TV(π*, π_F), reward units."""
    shift: Float[Array, " X"]
    """ε2(x) = r_max E_ρsft TV(π_F(·|x), π_F(·|x′)), reward units."""
    budget: Float[Array, " X"]
    """(ε1+ε2)/λ per prompt, nats."""
    spent: Float[Array, " X"]
    """KL(ρ*‖ρ_sft) per prompt, nats."""
    mean_budget: Float[Array, ""]
    mean_spent: Float[Array, ""]
    within: Bool[Array, ""]
    """mean_spent ≤ mean_budget. Where False, ρ* provably outperforms π*: J(π*) − J(π_ρ*) < 0."""


def kl_budget(s: Solution) -> KLBudget:
    """(ε1+ε2)/λ in nats, ε1 and ε2 the first two terms of Theorem 1, r_max = `bounds.paper_r_max`.

    Statement: J(π*) − J(π_ρ*) ≤ λ(budget − spent). So an overspent budget is a certificate that prompting
    beats RLHF; within it Theorem 1 decides nothing. Proof: divide Theorem 1 by λ. ∎ About ρ*, also where
    `s` was computed for another prompter.
    """
    width = paper_r_max(s)
    model, shift = width * s.tv_model, width * s.tv_shift
    budget, spent = (model + shift) / s.lam, s.prompter_kl / s.lam
    mean_budget, mean_spent = s.average(budget), s.average(spent)
    return KLBudget(model, shift, budget, spent, mean_budget, mean_spent, mean_spent <= mean_budget)


@jax.jit
def _lam_at_kl(base: Array, energy: Array, wanted: Array, p: Array | None = None) -> Array:
    """The temperature [N] at which each row's tilt spends `wanted` [N]; [1], in the mean, with p [N].

    Rows of constant energy spend nothing at any temperature: they give the least one.
    """
    span = _extremes(base, energy, jnp.zeros_like(energy[..., 0])).span
    if p is not None:
        span = jnp.max(jnp.where(p > 0, span, 0.0), -1, keepdims=True)

    def excess(t):
        tilted = tilt(base, energy, jnp.broadcast_to(t, base.shape[:-1]))
        spent = tilted.cost / t
        steep = _variance(tilted.probs, energy) / t / t
        if p is not None:
            spent, steep = (_mean(p, v)[None] for v in (spent, steep))
        return jnp.log(wanted) - jnp.log(spent), steep / spent

    # KL(λ) = ∫ s Var_s ds over s from 0 to 1/λ, and Var ≤ span²/4: so KL ≤ span²/(8λ²).
    high = jnp.clip(span / jnp.sqrt(8.0 * wanted) * (1 + 1e-9), _LEAST, _MOST)
    return _root(excess, jnp.full_like(high, _LEAST), high)


def lam_for_kl(
    instance: Instance, kl: Float[Floats, ""] | float, *, per_prompt: bool = False
) -> Float[Array, ""] | Float[Array, " X"]:
    """The λ whose ρ* spends exactly E_x KL(ρ*‖ρ_sft) = kl; one λ(x) per prompt with `per_prompt`.

    Statement: E_x KL(ρ*_λ‖ρ_sft) falls strictly in λ, from −E_x log ρ_sft(argmax R) (λ → 0) to 0 (λ → ∞),
    so the λ is unique. Proof: d KL/dλ = −Var_ρ*(R)/λ³ < 0 (`sensitivity`); the limits are those of ρ*
    (`limit_readings`). ∎ One λ for all prompts is the best way to spend a mean KL (`frontier`). On the host;
    KL is met to 1e-12 relative.

    Raises:
        AlignProError: kl is not a positive number, R is constant so that nothing can be spent, kl is not
            below the supremum (which is stated), or the λ lies outside 1e-18 to 1e18.
    """
    wanted = float(kl)
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
    r = _rewards(instance)
    return r.prior, r.rewrite, -jnp.log(_extremes(r.prior, r.rewrite, r.tie).mass)


_spent = jax.jit(lambda base, energy, t: tilt(base, energy, t).cost / t)


class Frontier(NamedTuple):
    """The reward–KL frontier traced by ρ*, one row per λ."""

    lam: Float[Array, " L"]
    """Also the slope d reward/d KL there, reward units per nat."""
    kl: Float[Array, "L X"]
    """KL(ρ*‖ρ_sft), nats."""
    reward: Float[Array, "L X"]
    """E_ρ* R, reward units."""
    lift: Float[Array, "L X"]
    """E_ρ* R − E_ρsft R ≥ 0, without cancellation."""
    mean_kl: Float[Array, " L"]
    mean_reward: Float[Array, " L"]
    mean_lift: Float[Array, " L"]


def frontier(instance: Instance, lams: Float[Floats, " L"], *, responses: bool = False) -> Frontier:
    """(KL, E R) along ρ*_λ: no prompter with that KL or less has more reward, per prompt or in the mean.

    Statement: E_x KL(ρ‖ρ_sft) ≤ E_x KL(ρ*_λ‖ρ_sft) ⇒ E_x E_ρ R ≤ E_x E_ρ*_λ R; the curve is increasing and
    concave, with slope λ. Proof: E R(ρ) − λ KL(ρ) ≤ E R(ρ*) − λ KL(ρ*), so E R(ρ) ≤ E R(ρ*) − λ(KL(ρ*) −
    KL(ρ)). Slope: (−Var/λ²)/(−Var/λ³) = λ, which falls as KL rises. ∎

    With `responses`, the frontier of all policies started from π_ρsft (base Σ ρ_sft π_F, energy r*): it lies
    on or above the first, since KL(π_ρ‖π_ρsft) ≤ KL(ρ‖ρ_sft) (data processing) and E_π_ρ r = E_ρ R.

    Raises:
        AlignProError: a λ is not positive and finite.
    """
    if not isinstance(lams, jax.core.Tracer):
        lams = np.asarray([check_temperature("lams", v) for v in np.asarray(lams).tolist()])
    lams, r = jnp.asarray(lams, float), _rewards(instance)
    base, energy = (r.prior @ r.frozen, r.response) if responses else (r.prior, r.rewrite)
    reference = jnp.sum(base * energy, -1) + r.top
    tilted = jax.vmap(lambda t: tilt(base, energy, t))(lams)
    spent = tilted.cost / lams[:, None]
    reward = reference[None, :] + tilted.lift
    p = jnp.asarray(instance.p, float)
    means = (_mean(p, v) for v in (spent, reward, tilted.lift))
    return Frontier(lams, spent, reward, tilted.lift, *means)


class BestOfN(NamedTuple):
    """The best of n independent draws from a base, by energy."""

    probs: Float[Array, "... K"]
    """Exact pmf."""
    lift: Float[Array, "..."]
    """Mean energy less the base's, ≥ 0, energy units."""
    kl: Float[Array, "..."]
    """Exact KL to the base, nats."""
    kl_bound: Float[Array, "..."]
    """log n − (n−1)/n ≥ kl, nats."""
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

    Statement: with F, F₋ the base's mass at or below, and strictly below, an energy,
    p(k) = base(k)·(Fⁿ − F₋ⁿ)/(F − F₋), so tied values share in proportion to the base; and
    KL(p‖base) ≤ log n − (n−1)/n (arXiv 2401.01879). Proof: p/base is the mean of h(u) = n uⁿ⁻¹ over
    [F₋, F]; t log t is convex, so KL ≤ ∫ h log h = log n − (n−1)/n, with equality only in the limit of no
    atoms. ∎ The bound is loose where the best value has much mass: KL < −log base(argmax) too.

    Args:
        base: probability vectors on the last axis.
        energy: values to be maximised; those off the support are ignored.
        n: at least 1; 1e6 and more are safe (no difference of powers is ever formed).
        tie: energies this close to the next, in energy units, count as equal.

    Raises:
        AlignProError: n is less than 1 or not an integer.
    """
    if not isinstance(n, jax.Array) and (isinstance(n, bool) or int(n) != n or n < 1):
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
    top = _extremes(rows, values, ties).maximum
    d = jnp.where(rows > 0, values - top[:, None], 0.0)
    lift = jnp.maximum(jnp.sum(rows * jnp.expm1(ratio) * d, -1), 0.0)
    spends = (divergence > 0) & (jnp.min(d, -1) < 0)
    lam = _lam_at_kl(rows, d, jnp.where(spends, divergence, 1.0))
    best = jnp.where(spends, tilt(rows, d, lam).lift, 0.0)
    shape = lead if lead else ()
    return BestOfN(
        probs=probs.reshape(base.shape),
        lift=lift.reshape(shape),
        kl=divergence.reshape(shape),
        kl_bound=jnp.broadcast_to(jnp.log(draws) - (draws - 1) / draws, shape),
        lam=jnp.where(spends, lam, jnp.inf).reshape(shape),
        frontier_lift=best.reshape(shape),
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
    """`best_of_n` of the prompter: n rewrites from ρ_sft, the one with the largest R(x,·) is used. [X]."""
    r = _rewards(instance)
    return best_of_n(r.prior, r.rewrite, n, tie=r.tie)


def best_of_n_responses(instance: Instance, n: Int[Floats, ""] | int) -> BestOfN:
    """`best_of_n` of the frozen model: n responses from π_F(·|x), the one of largest r* is kept. [X].

    Its `frontier_lift` is RLHF's: E_π* r* − R(x,x) at the β that spends the same KL.
    """
    r = _rewards(instance)
    return best_of_n(r.own, r.response, n)


class KLPrice(NamedTuple):
    """The reward–KL ledger of one prompter against π*; nats but for `gap`."""

    gap: Float[Array, " X"]
    """E_π* r* − E_π_ρ r*, reward units; negative where the prompter outperforms π*."""
    star: Float[Array, " X"]
    """KL(π*‖π_F(·|x))."""
    policy: Float[Array, " X"]
    """KL(π_ρ‖π_F(·|x)); ∞ where π_ρ leaves the support."""
    between: Float[Array, " X"]
    """KL(π_ρ‖π*); ∞ there too."""


def kl_price(instance: Instance, beta: Temperature, prompter: Float[Floats, "X K"]) -> KLPrice:
    """gap(ρ) = β[KL(π*‖π_F) + KL(π_ρ‖π*) − KL(π_ρ‖π_F)], per prompt, exactly, where the KLs are finite.

    So who outperforms π* in reward must pay: gap(ρ) < 0 ⇒ KL(π_ρ‖π_F) > KL(π*‖π_F) + KL(π_ρ‖π*).
    Proof: G(π*) − G(π_ρ) = β KL(π_ρ‖π*) (`information_projection`), with G written out. ∎

    Args:
        prompter: any ρ(x′|x), rows of probabilities.

    Raises:
        AlignProError: β is not positive and finite, or the prompter no matrix of probabilities.
    """
    beta, r = _temperature("beta", beta), _rewards(instance)
    rho = _prompter(instance, prompter)
    model = tilt(r.own, r.response, beta)
    policy = rho @ r.frozen
    to_own = log_quotient(policy, r.own)
    # log π_ρ/π* through log π*/π_F, which is known where π* underflows.
    ratio = jnp.where(model.probs > TINY, log_quotient(policy, model.probs), to_own - model.log_ratio)
    star = jnp.where(r.own > 0, jnp.maximum(model.probs, TINY), 0.0)
    return KLPrice(
        gap=jnp.sum(model.probs * r.response, -1) - jnp.sum(rho * r.rewrite, -1),
        star=model.cost / beta,
        policy=kl(policy, r.own),
        between=scaled_kl(jnp.ones_like(policy), policy, star, ratio, ratio),
    )


# ---------------------------------------------------------------------------------- derivatives


class Sensitivity(NamedTuple):
    """Derivatives in λ and β, closed forms, per prompt."""

    achieved_lam: Float[Array, " X"]
    """d E_ρ* R/dλ = −Var_ρ*(R)/λ²."""
    value_lam: Float[Array, " X"]
    """d F(ρ*)/dλ = −KL(ρ*‖ρ_sft)."""
    kl_lam: Float[Array, " X"]
    """d KL(ρ*‖ρ_sft)/dλ = −Var_ρ*(R)/λ³."""
    gap_lam: Float[Array, " X"]
    """d gap/dλ = Var_ρ*(R)/λ² ≥ 0."""
    optimum_beta: Float[Array, " X"]
    """d E_π* r*/dβ = −Var_π*(r*)/β²."""
    value_beta: Float[Array, " X"]
    """d (β log Z*)/dβ = −KL(π*‖π_F)."""
    kl_beta: Float[Array, " X"]
    """d KL(π*‖π_F)/dβ = −Var_π*(r*)/β³."""
    gap_beta: Float[Array, " X"]
    """d gap/dβ = −Var_π*(r*)/β² ≤ 0."""


def sensitivity(instance: Instance, beta: Temperature, lam: Temperature) -> Sensitivity:
    """Every derivative in λ and β in closed form, each a sum of terms of one sign: no cancellation.

    Proof: with s = 1/t, log Z(s) has derivatives E_p e and Var_p(e) in s (p the tilt at t); ds/dt = −1/t².
    t log Z then has derivative log Z − E_p e/t = −KL(p‖base), and KL = s E_p e − log Z has d KL/ds =
    s Var_p(e). ∎ The gap rises in λ and falls in β, strictly unless R (r*) is constant on the support.

    Raises:
        AlignProError: β or λ is not positive and finite.
    """
    beta, lam, r = _temperature("beta", beta), _temperature("lam", lam), _rewards(instance)

    def slopes(base, energy, t):
        tilted = tilt(base, energy, t)
        first = _variance(tilted.probs, energy) / t / t
        return -first, -tilted.cost / t, -first / t, first

    achieved, value, spent, gap = slopes(r.prior, r.rewrite, lam)
    optimum, value_beta, spent_beta, _ = slopes(r.own, r.response, beta)
    return Sensitivity(achieved, value, spent, gap, optimum, value_beta, spent_beta, optimum)


class Headroom(NamedTuple):
    """What ρ* gains over ρ_sft, from ρ_sft alone; reward units per prompt."""

    lift: Float[Array, " X"]
    """E_ρ* R − E_ρsft R = λ Jeff(ρ*, ρ_sft)."""
    covariance: Float[Array, " X"]
    """Cov_ρsft(R, e^{R/λ})/E_ρsft e^{R/λ}, the same number."""
    first_order: Float[Array, " X"]
    """Var_ρsft(R)/λ, its limit as λ → ∞."""
    lower: Float[Array, " X"]
    """first_order·(1 − e^{−a})/a ≤ lift, a = span_R/λ."""
    upper: Float[Array, " X"]
    """min{first_order·(eᵃ − 1)/a, span_R tanh(a/4), max R − E_ρsft R} ≥ lift."""


def headroom(instance: Instance, lam: Temperature) -> Headroom:
    """E_ρ* R − E_ρsft R = Cov_ρsft(R, e^{R/λ})/E_ρsft e^{R/λ}, bracketed by its first-order term.

    Proof: ρ*/ρ_sft = e^{R/λ}/E_ρsft e^{R/λ}. Brackets: lift = ∫ Var_s(R) ds over s from 0 to 1/λ; the third
    cumulant of R is at most span_R·Var_s in size, so Var_s lies within e^{±span_R s} of Var_ρsft(R). And
    lift ≤ span_R·TV(ρ*, ρ_sft) ≤ span_R·tanh(span_R/(4λ)) (`limit_readings`). ∎ No exponential overflows.

    Informative: `first_order` when λ ≥ span_R (it is right to a factor e there); below, max R − E_ρsft R.

    Raises:
        AlignProError: λ is not positive and finite.
    """
    lam, r = _temperature("lam", lam), _rewards(instance)
    star, edge = tilt(r.prior, r.rewrite, lam), _extremes(r.prior, r.rewrite, r.tie)
    mean = jnp.sum(r.prior * r.rewrite, -1)
    centred = jnp.where(r.prior > 0, r.rewrite - mean[:, None], 0.0)
    growth = jnp.expm1(star.log_ratio)  # e^{R/λ}/E e^{R/λ} − 1
    first = _variance(r.prior, r.rewrite) / lam
    a = edge.span / lam
    some = jnp.where(a > 0, a, 1.0)
    upper = jnp.where(a > 0, first * jnp.expm1(jnp.minimum(a, 600.0)) / some, 0.0)
    most = jnp.minimum(edge.span * jnp.tanh(a / 4), edge.maximum - mean)
    return Headroom(
        lift=star.lift,
        covariance=jnp.sum(jnp.where(r.prior > 0, r.prior * centred * growth, 0.0), -1),
        first_order=first,
        lower=jnp.where(a > 0, -first * jnp.expm1(-a) / some, 0.0),
        upper=jnp.where(a < 600.0, jnp.minimum(upper, most), most),
    )


class VarianceSplit(NamedTuple):
    """Var(r) of one prompter's responses, per prompt; squared reward units."""

    total: Float[Array, " X"]
    """Var_π_ρ(r*(x,·)), from the policy itself."""
    within: Float[Array, " X"]
    """E_ρ Var(r|x′)."""
    between: Float[Array, " X"]
    """Var_ρ(R): all that a choice among rewrites can act on."""


def variance_split(instance: Instance, prompter: Float[Floats, "X K"]) -> VarianceSplit:
    """Var(r) = E[Var(r|x′)] + Var(E[r|x′]).

    Proof: r − E r = (r − R) + (R − E_ρ R), and the cross term has conditional mean 0. ∎ The share
    between/total is prompting's: tilting ρ at a large λ gains between/λ, tilting the responses of π_ρ at the
    same temperature total/λ, to first order (`headroom`).

    Raises:
        AlignProError: the prompter is no matrix of probabilities of the shape of `instance.prior`.
    """
    r, rho = _rewards(instance), _prompter(instance, prompter)
    conditional = lax.map(lambda d: _variance(r.frozen, d[None, :]), r.response)
    return VarianceSplit(
        total=_variance(rho @ r.frozen, r.response),
        within=jnp.sum(rho * conditional, -1),
        between=_variance(rho, r.rewrite),
    )


# -------------------------------------------------------------------------------------- the limits


class LimitReadings(NamedTuple):
    """The paper's readings of Theorem 1's limits, as numbers per prompt."""

    tv_model: Float[Array, " X"]
    """d_TV(π*, π_F): the first term over r_max."""
    tv_model_bound: Float[Array, " X"]
    """tanh(span_r/(4β)) ≥ tv_model."""
    reward_constant: Bool[Array, " X"]
    """r*(x,·) is constant on the support of π_F(·|x): iff the first term is 0."""
    tv_shift: Float[Array, " X"]
    """E_ρsft d_TV(π_F(·|x), π_F(·|x′)): the second term over r_max."""
    reference_is_own: Bool[Array, " X"]
    """Every rewrite in the support of ρ_sft has the own row's responses: iff the second term is 0."""
    tv_prompter: Float[Array, " X"]
    """d_TV(ρ*, ρ_sft) → 0 as λ → ∞."""
    tv_prompter_bound: Float[Array, " X"]
    """tanh(span_R/(4λ)) ≥ tv_prompter."""
    best_mass: Float[Array, " X"]
    """m = ρ_sft(argmax R)."""
    separation: Float[Array, " X"]
    """Δ: the best R less the next (∞ if there is none), reward units."""
    off_best: Float[Array, " X"]
    """ρ*(off argmax R) = d_TV(ρ*, ρ_0) → 0 as λ → 0."""
    off_best_bound: Float[Array, " X"]
    """q/(1 + q) ≥ off_best with q = (1−m)/m·e^{−Δ/λ}; itself at most q."""
    greedy: Float[Array, "X K"]
    """ρ_0 = ρ_sft given argmax R: the limit λ → 0."""
    greedy_kl: Float[Array, " X"]
    """KL(ρ_0‖ρ_sft) = −log m, the supremum of KL(ρ*‖ρ_sft), nats."""
    shortfall: Float[Array, " X"]
    """max R − E_ρ* R, reward units."""
    shortfall_bound: Float[Array, " X"]
    """λ(−log m − KL(ρ*‖ρ_sft)) ≥ shortfall."""


def limit_readings(instance: Instance, beta: Temperature, lam: Temperature) -> LimitReadings:
    """What becomes of each term as λ, β → 0 or ∞, with rates; all maxima over the support of ρ_sft.

    Statements and proofs: (1) TV(π*,π_F) = 0 iff r* is constant on the support, as π*/π_F = e^{r/β}/Z*.
    (2) A tilt of span a (in units of the temperature) moves at most tanh(a/4) in TV: it multiplies the odds
    of any event by at most eᵃ, and b eᵃ/(1 − b + b eᵃ) − b is largest, tanh(a/4), at b = 1/(1 + e^{a/2}).
    (3) ρ*(off)/ρ*(best) ≤ (1−m)/m·e^{−Δ/λ}, term by term; on argmax R, ρ* ∝ ρ_sft.
    (4) F(ρ*) ≥ F(ρ_0) = max R + λ log m. ∎

    Values of R equal to rounding count as tied. Informative: the bounds in λ for λ above span_R (2) or below
    Δ (3); (4) in between.

    Raises:
        AlignProError: β or λ is not positive and finite.
    """
    beta, lam, r = _temperature("beta", beta), _temperature("lam", lam), _rewards(instance)
    star, model = tilt(r.prior, r.rewrite, lam), tilt(r.own, r.response, beta)
    edge, response = _extremes(r.prior, r.rewrite, r.tie), _extremes(r.own, r.response, jnp.zeros_like(r.top))
    rest = jnp.sum(jnp.where(edge.best, 0.0, r.prior), -1)
    odds = rest / edge.mass * jnp.exp(-edge.separation / lam)
    distance = pairwise_tv(r.own, r.frozen)
    greedy_kl = jnp.where(edge.mass < 0.5, -jnp.log(edge.mass), -log1p(-jnp.minimum(rest, 0.5)))
    return LimitReadings(
        tv_model=model.tv,
        tv_model_bound=jnp.tanh(response.span / (4 * beta)),
        reward_constant=response.span == 0,
        tv_shift=jnp.sum(r.prior * distance, -1),
        reference_is_own=jnp.all((r.prior <= 0) | (distance == 0), -1),
        tv_prompter=star.tv,
        tv_prompter_bound=jnp.tanh(edge.span / (4 * lam)),
        best_mass=edge.mass,
        separation=edge.separation,
        off_best=jnp.sum(jnp.where(edge.best, 0.0, star.probs), -1),
        off_best_bound=jnp.where(rest > 0, odds / (1.0 + odds), 0.0),
        greedy=jnp.where(edge.best, r.prior, 0.0) / edge.mass[:, None],
        greedy_kl=greedy_kl,
        shortfall=jnp.sum(jnp.where(r.prior > 0, star.probs * (edge.maximum[:, None] - r.rewrite), 0.0), -1),
        shortfall_bound=lam * greedy_kl - star.cost,
    )


class Critical(NamedTuple):
    """Where the sign of the gap changes along one temperature."""

    value: Float[Array, "..."]
    """The critical temperature; 0 or ∞ where the sign is the same for all."""
    lower: Float[Array, "..."]
    """Closed-form enclosure from below, …"""
    upper: Float[Array, "..."]
    """… and from above."""


@jax.jit
def _critical(
    base: Array, energy: Array, target: Array, tie: Array, noise: Array, p: Array | None
) -> Critical:
    """The temperature at which E_tilt[energy] falls to `target`. A difference within `noise` has no sign."""
    edge = _extremes(base, energy, tie)
    combine: Callable[[Array], Array] = (lambda v: v) if p is None else (lambda v: _mean(p, v)[None])
    target = combine(target)
    head = combine(edge.maximum) - target
    tail = target - combine(jnp.sum(base * energy, -1))
    price, width = combine(-jnp.log(edge.mass)), combine(edge.span**2)
    least = combine(noise)
    inside = (head > least) & (tail > least)

    def excess(t):
        tilted = tilt(base, energy, jnp.broadcast_to(t, base.shape[:-1]))
        mean = combine(jnp.sum(tilted.probs * energy, -1))
        return target - mean, combine(_variance(tilted.probs, energy) / t)

    lower = jnp.where(inside, head / jnp.where(price > 0, price, 1.0), 0.0)
    upper = jnp.where(inside, width / (4 * jnp.where(inside, tail, 1.0)), jnp.inf)
    start = jnp.where(inside, jnp.clip(lower * (1 - 1e-9), _LEAST, _MOST), 1.0)
    end = jnp.where(inside, jnp.clip(upper * (1 + 1e-9), _LEAST, _MOST), 1.0)
    root = jnp.where(
        inside, _root(excess, start, jnp.maximum(start, end)), jnp.where(head > least, jnp.inf, 0.0)
    )
    lower, upper = jnp.where(inside, lower, root), jnp.where(inside, upper, root)
    return Critical(root, lower, upper) if p is None else Critical(root[0], lower[0], upper[0])


def critical_lam(instance: Instance, beta: Temperature, *, per_prompt: bool = False) -> Critical:
    """λ_c: ρ* outperforms π* (gap < 0) exactly for λ < λ_c. Answers Q2.

    Statement: some λ makes the gap negative iff max_{support} R > E_π* r* (in the mean over P, or per prompt
    with `per_prompt`). Then (max R − E_π* r*)/E log(1/m) ≤ λ_c ≤ E span_R²/(4(E_π* r* − E_ρsft R)), with
    m = ρ_sft(argmax R) and the upper one ∞, as is λ_c, where ρ_sft itself outperforms π*. 0: never.
    Differences of R within its rounding count as none.
    Proof: the gap rises in λ (`sensitivity`), from `prompting_ceiling` to E_π* r* − E_ρsft R. Lower:
    max R − E_ρ* R ≤ λ log(1/m) (`limit_readings`); upper: E_ρ* R − E_ρsft R ≤ span_R²/(4λ) (`headroom`). ∎

    Raises:
        AlignProError: β is not positive and finite.
    """
    r = _rewards(instance)
    model = tilt(r.own, r.response, _temperature("beta", beta))
    target = jnp.sum(model.probs * r.response, -1)
    return _critical(
        r.prior, r.rewrite, target, r.tie, r.tie, None if per_prompt else jnp.asarray(instance.p, float)
    )


def critical_beta(instance: Instance, lam: Temperature, *, per_prompt: bool = False) -> Critical:
    """β_c: ρ* outperforms π* (gap < 0) exactly for β > β_c. The mirror image of `critical_lam`.

    Statement: some β does so iff E_ρ* R > R(x,x). 0: every β, as E_ρ* R exceeds what π_F can reach at all.
    Proof: the gap falls in β, from max r* (on the support of π_F(·|x)) − E_ρ* R to R(x,x) − E_ρ* R. The
    enclosure is that of `critical_lam` with π_F, r*, β in the place of ρ_sft, R, λ. ∎

    Raises:
        AlignProError: λ is not positive and finite.
    """
    r = _rewards(instance)
    star = tilt(r.prior, r.rewrite, _temperature("lam", lam))
    target = jnp.sum(star.probs * r.rewrite, -1)
    p = None if per_prompt else jnp.asarray(instance.p, float)
    return _critical(r.own, r.response, target, jnp.zeros_like(r.top), r.tie, p)
