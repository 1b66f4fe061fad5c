"""Root finding on compiled functions, with brackets."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from alignpro.theory.divergences import TINY
from alignpro.theory.solution import EPS

# The interior point method: how far w·s may be from μ; the decrement, in μ per row, that counts as centred;
# what μ is cut to then, as a share of the gap per row.
_CENTRAL, _CENTRED, _CUT = 100.0, 0.1, 0.03


def root_of(function: Callable[[Array], tuple[Array, Array]], low: Array, high: Array) -> Array:
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
