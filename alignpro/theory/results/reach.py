"""The best that prompting can reach: its reward ceiling, and the projection of π* on what it can induce."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from alignpro.errors import AlignProError, as_number
from alignpro.theory.divergences import TINY, log_quotient, scaled_kl
from alignpro.theory.gibbs import Tilted, tilt
from alignpro.theory.instance import Instance
from alignpro.theory.results.rewards import Rewards, Temperature, as_temperature, extremes, rewards_of
from alignpro.theory.solution import EPS

# The interior point method: how far w·s may be from μ; the decrement, in μ per row, that counts as centred;
# what μ is cut to then, as a share of the gap per row.
_CENTRAL, _CENTRED, _CUT = 100.0, 0.1, 0.03


def interior_point(
    frozen: Array, usable: Array, log_q: Array, tol: Array, limit: Array | int
) -> tuple[Array, Array, Array]:
    """(weights, gap, steps): min over the simplex on `usable` of KL(w·frozen ‖ q), by primal–dual steps.

    Newton steps on f − μ Σ log w, with s/w in place of μ/w² in the Hessian, are shortened until the objective
    no longer rises; μ is cut once centred. Rows that are not usable have w = 0: they drop out.
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


_CELLS = 2**23  # of a projection's matrices held at once


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
    """Whether gap ≤ tol·max(1, span(x)/β). Where False, only `kl − gap` ≤ minimum ≤ `kl` is known."""
    iterations: Int[Array, " X"]
    """Newton steps taken."""
    usable: Bool[Array, "X K"]
    """Rows whose support lies in that of π_F(·|x); the others have infinite KL. The own row always is."""


def information_projection(
    instance: Instance, beta: Temperature, *, tol: float = 1e-10, max_iterations: int = 200
) -> Projection:
    """The best prompter for the REGULARISED objective: min over ρ of KL(π_ρ(·|x) ‖ π*(·|x)), certified.

    With G(π) = E_π r − β KL(π‖π_F(·|x)), G(π*) − G(π_ρ) = β KL(π_ρ‖π*): β·kl > 0 is a lower bound on the
    regularised gap of EVERY prompter, and 0 iff π* is a mixture of the frozen model's rows. The duality gap
    vouches for `weights` whatever found them: a primal–dual interior point, O(K²Y + K³) per step and prompt.

    Args:
        instance: the problem.
        beta: β > 0, reward units.
        tol: on the gap, in nats times max(1, span(x)/β): β·gap ≤ tol·max(β, span), reward units.
        max_iterations: Newton steps per prompt.

    Raises:
        AlignProError: β is not positive and finite, or tol not positive. Missed convergence is no error:
            it is `converged`, per prompt.
    """
    beta = as_temperature("beta", beta)
    if not as_number("tol", tol) > 0:
        raise AlignProError(f"tol {tol}: must be positive; give one such as 1e-10")
    return _project(rewards_of(instance), beta, tol, max_iterations)


@jax.jit
def _project(rewards: Rewards, beta: Array, tol: Array | float, limit: Array | int) -> Projection:
    frozen, own = rewards.frozen, rewards.own
    rewrites, responses = frozen.shape
    model = tilt(own, rewards.response, beta)
    # A row is usable iff it puts nothing where the own row has nothing.
    usable = ((frozen > 0).astype(float) @ (own <= 0).astype(float).T).T <= 0
    span = extremes(own, rewards.response, jnp.zeros_like(rewards.top)).span
    allowance = tol * jnp.maximum(1.0, span / beta)

    def one(row):
        row_usable, log_q, row_tol = row
        return interior_point(frozen, row_usable, log_q, row_tol, limit)

    batch = max(1, _CELLS // (rewrites * (rewrites + responses)))
    weights, gap, iterations = lax.map(
        one, (usable, model.log_probs, allowance), batch_size=min(batch, usable.shape[0])
    )
    policy = weights @ frozen
    divergence = to_optimum(policy, own, model)
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


def to_optimum(
    policy: Float[Array, "... Y"], own: Float[Array, "... Y"], model: Tilted
) -> Float[Array, "..."]:
    """KL(policy‖π*) in nats, π* = `model` being a tilt of `own`; ∞ where the policy leaves its support."""
    star = jnp.where(own > 0, jnp.maximum(model.probs, TINY), 0.0)
    far = jnp.log(jnp.maximum(policy, TINY)) - jnp.where(own > 0, model.log_probs, 0.0)
    ratio = jnp.where(model.probs > TINY, log_quotient(policy, star), jnp.where(policy > 0, far, 0.0))
    return scaled_kl(jnp.ones_like(policy), policy, star, ratio, ratio)


class Ceiling(NamedTuple):
    """Lower bounds on the gap of every prompter, attained; reward units."""

    anywhere: Float[Array, " X"]
    """E_π* r* − max over all K rewrites of R(x,x′): for any prompter whatever."""
    supported: Float[Array, " X"]
    """E_π* r* − max of R(x,·) over the support of ρ_sft: for prompters that keep it. ≥ `anywhere`."""
    best: Int[Array, " X"]
    """The rewrite that attains `anywhere`."""


def prompting_ceiling(instance: Instance, beta: Temperature) -> Ceiling:
    """gap(ρ)(x) ≥ E_π* r* − max_x′ R(x,x′) for every ρ, with equality iff ρ(·|x) sits on the maximisers.

    A positive ceiling is what no prompter can recover; a negative one says that some prompter outperforms π*
    (Q2), and by how much at most.
    """
    r = rewards_of(instance)
    model = tilt(r.own, r.response, as_temperature("beta", beta))
    optimum = jnp.sum(model.probs * r.response, -1)
    inside = jnp.where(r.prior > 0, r.rewrite, -jnp.inf)
    return Ceiling(
        anywhere=optimum - jnp.max(r.rewrite, -1),
        supported=optimum - jnp.max(inside, -1),
        best=jnp.argmax(r.rewrite, -1),
    )


class ResponseValue(NamedTuple):
    """The value that tilting responses adds to tilting rewrites, at the same temperature; reward units."""

    prompting: Float[Array, " X"]
    """λ log E_ρ_sft e^{R/λ} = F(ρ*)."""
    joint: Float[Array, " X"]
    """λ log E_{ρ_sft, π_F} e^{r/λ}: the optimum over distributions of (x′, y) jointly."""
    added: Float[Array, " X"]
    """joint − prompting ≥ 0; → E_ρ_sft Var(r|x′)/(2λ) as λ → ∞."""


def response_value(instance: Instance, lam: Temperature) -> ResponseValue:
    """λ log E e^{r/λ} ≥ λ log E_ρ_sft e^{R/λ}: what choosing prompts leaves to choosing responses.

    Its left side is the value of RLHF started from π_ρ_sft at temperature λ. Equal iff r* is constant on each
    rewrite's responses; informative where `variance_split` has much within rewrites.
    """
    lam, r = as_temperature("lam", lam), rewards_of(instance)
    star = tilt(r.prior, r.rewrite, lam)
    h = lax.map(lambda d: tilt(r.frozen, jnp.broadcast_to(d, r.frozen.shape), lam).gain, r.response)
    joint = tilt(r.prior, r.rewrite + h, lam).free_energy
    near = tilt(star.probs, h, lam).free_energy  # keeps its relative accuracy, but ρ* may underflow
    span = extremes(r.prior, r.rewrite + h, r.tie).span
    added = jnp.where(span < lam, near, joint - star.free_energy)
    return ResponseValue(star.free_energy + r.top, joint + r.top, jnp.maximum(added, 0.0))
