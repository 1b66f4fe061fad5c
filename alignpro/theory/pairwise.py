"""Total variations between many pairs of rows, in bounded memory.

E_{x′~ρ_sft} TV(π_F(·|x), π_F(·|x′)) is the only X·K·Y cost of the theory that is no matrix product. Nothing
here holds X×K×Y numbers: the largest array beside the arguments is the X×K matrix of distances.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from alignpro.theory.divergences import Floats

# Up to this many terms one broadcast is fastest: XLA fuses it, and a loop would cost more than it saves.
_SMALL = 2**15
# On CPU a block of pairs accumulates over _UNROLL responses at a time with rewrites in the vector lanes: XLA
# does not vectorise reductions over the minor axis. A block (_ROWS × _LANE_BYTES) stays in the L2 cache.
_ROWS, _LANE_BYTES, _UNROLL = 256, 1024, 16
# Elsewhere this many rows share one fused reduction, so that what is read of the other matrix serves all.
_FUSED_ROWS = 8


def _even(size: int, most: int) -> int:
    """The block of at most `most` (to a multiple of 8) that covers `size` in the fewest, even blocks."""
    blocks = -(-size // most)
    return -(-size // (blocks * 8)) * 8


def _blocks(a: Array, rows: int, inner: int) -> Array:
    """[n, m] → [n/rows, m/inner, inner, rows], padded with zeros."""
    a = jnp.pad(a, ((0, -a.shape[0] % rows), (0, -a.shape[1] % inner)))
    return a.reshape(a.shape[0] // rows, rows, -1, inner).transpose(0, 2, 3, 1)


def _accumulate(term, start: Array, left: Array, right: Array) -> Array:
    """start + Σ term(left[i, j], right[i, j]) over i (a loop) and j (written out, so that XLA fuses it)."""

    def step(total, pair):
        terms = [term(pair[0][j], pair[1][j]) for j in range(left.shape[1])]
        return total + sum(terms[1:], terms[0]), None

    return lax.scan(step, start, (left, right))[0]


def _l1_on_cpu(p: Array, q: Array) -> Array:
    rows, lanes = _even(len(p), _ROWS), _even(len(q), _LANE_BYTES // p.dtype.itemsize)
    a, b = _blocks(p, rows, _UNROLL), _blocks(q, lanes, _UNROLL)
    zero = jnp.zeros((rows, lanes), p.dtype)

    def distance(u: Array, v: Array) -> Array:
        return jnp.abs(u[:, None] - v[None, :])

    blocks = lax.map(lambda u: lax.map(lambda v: _accumulate(distance, zero, u, v), b), a)
    return blocks.transpose(0, 2, 1, 3).reshape(len(a) * rows, -1)[: len(p), : len(q)]


def _l1_elsewhere(p: Array, q: Array) -> Array:
    return lax.map(lambda row: jnp.sum(jnp.abs(row[None, :] - q), -1), p, batch_size=_FUSED_ROWS)


@jax.custom_vjp
def _l1_in_blocks(p: Float[Array, "X Y"], q: Float[Array, "K Y"]) -> Float[Array, "X K"]:
    return lax.platform_dependent(p, q, cpu=_l1_on_cpu, default=_l1_elsewhere)


def _signs(p: Array, q: Array, weights: Array) -> Float[Array, "X Y"]:
    """Σ_k weights[x,k] sign(p[x,y] − q[k,y]), with responses in the vector lanes."""
    rows = _even(len(p), 64)
    rewrites = jnp.pad(q, ((0, -len(q) % _UNROLL), (0, 0))).reshape(-1, _UNROLL, q.shape[1])
    padded = jnp.pad(p, ((0, -len(p) % rows), (0, 0))).reshape(-1, rows, p.shape[1])

    def block(pw):
        def term(weight: Array, row: Array) -> Array:
            return weight[:, None] * jnp.sign(pw[0] - row[None, :])

        return _accumulate(term, jnp.zeros_like(pw[0]), pw[1], rewrites)

    return lax.map(block, (padded, _blocks(weights, rows, _UNROLL))).reshape(-1, p.shape[1])[: len(p)]


# Autodiff of the loops would keep the sign of every one of the X×K×Y differences.
_l1_in_blocks.defvjp(
    lambda p, q: (_l1_in_blocks(p, q), (p, q)),
    lambda pq, g: (_signs(pq[0], pq[1], g), _signs(pq[1], pq[0], g.T)),
)


def pairwise_tv(p: Float[Floats, "X Y"], q: Float[Floats, "K Y"]) -> Float[Array, "X K"]:
    """TV(p[x], q[k]) = ½ Σ_y |p[x,y] − q[k,y]| for every pair of rows (probabilities).

    Each term is non-negative, so each distance is accurate to (Y + 2) units of rounding relative to itself
    and is exactly 0 between equal rows. Under jit, vmap and reverse-mode grad; the derivative takes
    sign(0) = 0 where entries tie. In the dtype of its arguments.
    """
    p, q = jnp.asarray(p), jnp.asarray(q)
    small = p.shape[0] * q.size <= _SMALL
    total = jnp.sum(jnp.abs(p[:, None, :] - q[None, :, :]), -1) if small else _l1_in_blocks(p, q)
    return 0.5 * total


def expected_tv(
    frozen: Float[Floats, "K Y"], own: Int[Floats, " X"], prior: Float[Floats, "X K"]
) -> Float[Array, " X"]:
    """E_{x′~ρ_sft(·|x)} TV(π_F(·|x), π_F(·|x′)) for each x, the second term of Theorem 1 (probability).

    Args: as in `Instance`. Dense: the cost is X·K·Y whatever the zeros of `prior`; `scale.prompt_shift`
    exploits them. Accurate to (Y + K + 4) units of rounding relative to itself.
    """
    frozen = jnp.asarray(frozen)
    return jnp.sum(jnp.asarray(prior) * pairwise_tv(frozen[jnp.asarray(own)], frozen), -1)
