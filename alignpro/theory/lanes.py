"""Very many small instances: `vmap` with the batch in the vector lanes, for XLA on a CPU.

A batch of 4×4×8 instances has short last axes, and XLA's CPU code for those is scalar. `in_lanes` carries
the batch as the LAST axis of every array instead. Reductions and products over the short axes are written
out as chains of slices, so that all work is elementwise along the batch; and what is used more than once is
computed once, behind an optimization barrier, since XLA's fusion would copy cheap operations into each of
their users and so do a long polynomial over and over.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

# XLA's CPU pipeline drops the barriers before it fuses, unless that pass is left out. Neither option
# changes a result; both save time.
_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander", "xla_cpu_prefer_vector_width": 512}
# Axes up to this long are written out; longer ones are better off in XLA's own loops.
LONGEST = 32

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
_MOVES = ("broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "stop_gradient", "copy")
# fmt: off
_ELEMENTWISE = frozenset(
    [
        "abs", "add", "add_any", "and", "asin", "atan", "atan2", "atanh", "bitcast_convert_type",
        "cbrt", "ceil", "clamp", "convert_element_type", "cos", "cosh", "div", "eq", "erf", "erfc",
        "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log",
        "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem",
        "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "shift_right_logical",
        "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "xor",
    ]
)
# fmt: on
_CHAINS: dict[str, Callable[[Any, Any], Any]] = {
    "reduce_sum": lax.add,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_and": lax.bitwise_and,
    "reduce_or": lax.bitwise_or,
}


def in_lanes(function: Callable[..., Any], *examples: Any) -> Callable[..., Any]:
    """`function` of one instance as a function of a batch, which is the last axis of arguments and results.

    Args:
        function: of arrays or pytrees of arrays; traceable, without loops, sorts or random numbers.
        examples: arguments of one instance, or their `jax.ShapeDtypeStruct`s.

    Compile the result with `compiler_options()`.

    Raises:
        NotImplementedError: the function has an operation that is not elementwise and not in this file.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    flat = jax.make_jaxpr(lambda *leaves: _inlined(traced.jaxpr, traced.consts, leaves))(
        *jax.tree.leaves(examples)
    )
    live = _live(flat.jaxpr)
    for eqn in live:
        if len(eqn.outvars) != 1 or not (_rule(eqn) or eqn.primitive.name in _ELEMENTWISE):
            raise NotImplementedError(f"{eqn.primitive} has no rule for batches in lanes")
    tree = jax.tree.structure(shapes)

    def run(*arguments: Any) -> Any:
        return jax.tree.unflatten(tree, _evaluate(flat, live, jax.tree.leaves(arguments)))

    return run


@lru_cache
def compiler_options() -> dict[str, Any]:
    """What makes XLA keep the barriers and use wide vectors, as far as this XLA knows the options."""

    def known(option: tuple[str, Any]) -> bool:
        try:
            jax.jit(lambda x: x, compiler_options=dict([option])).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return dict(filter(known, _OPTIONS.items()))


def _inlined(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate with every call opened up."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else known[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name in _CALLS:
            inner = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
            outputs = _inlined(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        else:
            outputs = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = outputs if eqn.primitive.multiple_results else [outputs]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _live(jaxpr: Any) -> list[Any]:
    """The equations that the results need."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return live[::-1]


def _evaluate(flat: Any, live: list[Any], leaves: list[Any]) -> list[Any]:
    jaxpr, count = flat.jaxpr, leaves[0].shape[-1]
    uses = Counter(v for eqn in live for v in eqn.invars if not isinstance(v, core.Literal))
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*flat.consts, *leaves], strict=True))
    batched = set(jaxpr.invars)
    cost: dict[Any, int] = {}  # operations since the last barrier

    def read(v: Any) -> Any:
        """[…, B]; what is the same for the whole batch is […, 1]."""
        if isinstance(v, core.Literal) or v not in batched:
            return jnp.asarray(v.val if isinstance(v, core.Literal) else known[v], v.aval.dtype)[..., None]
        return known[v]

    def full(v: Any) -> Any:
        value = read(v)
        return jnp.broadcast_to(value, (*value.shape[:-1], count))

    for eqn in live:
        out, name = eqn.outvars[0], eqn.primitive.name
        inputs = [v for v in eqn.invars if not isinstance(v, core.Literal)]
        rule = _rule(eqn)
        if rule is not None:
            value = rule(eqn, *map(read, eqn.invars))
        else:
            value = eqn.primitive.bind(*_aligned(map(full, eqn.invars)), **eqn.params)
        spent = sum(cost.get(v, 0) for v in inputs) + (name not in _MOVES)
        chained = rule is not None and name not in _MOVES
        if (chained or (uses[out] > 1 and spent > 1)) and value.shape[-1] == count:
            value, spent = lax.optimization_barrier(value), 0
        known[out], cost[out] = value, spent
        batched.add(out)
    return [full(v) for v in jaxpr.outvars]


def _aligned(values: Any) -> list[Any]:
    """Ranks made equal: JAX lets scalars meet arrays."""
    values = list(values)
    rank = max(value.ndim for value in values)
    return [value.reshape((1,) * (rank - value.ndim) + value.shape) for value in values]


def _rule(eqn: Any) -> Callable[..., Any] | None:
    name = eqn.primitive.name
    if name in _CHAINS:
        axes, shape = eqn.params["axes"], eqn.invars[0].aval.shape
        return _chain if all(shape[axis] <= LONGEST for axis in axes) else None
    if name == "gather":
        return _rows if _takes_rows(eqn) else None
    if name == "dot_general":
        (left, _), batch = eqn.params["dimension_numbers"]
        fits = len(left) == 1 and not any(batch) and eqn.invars[0].aval.shape[left[0]] <= LONGEST
        return _product if fits else None
    return _RULES.get(name)


def _chain(eqn: Any, value: Any) -> Any:
    combine = _CHAINS[eqn.primitive.name]
    for axis in sorted(eqn.params["axes"], reverse=True):
        parts = [lax.index_in_dim(value, i, axis, keepdims=False) for i in range(value.shape[axis])]
        value = reduce(combine, parts)
    return value


def _product(eqn: Any, left: Any, right: Any) -> Any:
    """Contraction over one axis of each: Σ_i left[…, i] right[…, i], outer over the rest."""
    ((i,), (j,)), _ = eqn.params["dimension_numbers"]
    ones = [1] * (left.ndim - 2), [1] * (right.ndim - 2)

    def term(y: int) -> Any:
        a = lax.index_in_dim(left, y, i, keepdims=False)
        b = lax.index_in_dim(right, y, j, keepdims=False)
        return a.reshape(*a.shape[:-1], *ones[1], a.shape[-1]) * b.reshape(*ones[0], *b.shape)

    return reduce(lax.add, [term(y) for y in range(left.shape[i])])


def _takes_rows(eqn: Any) -> bool:
    """Whether a gather is operand[indices] along the first axis."""
    operand, indices = (v.aval for v in eqn.invars)
    numbers, rank = eqn.params["dimension_numbers"], len(operand.shape)
    return (
        numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *operand.shape[1:])
        and numbers.offset_dims == tuple(range(len(indices.shape) - 1, len(indices.shape) + rank - 2))
        and operand.shape[0] <= LONGEST
    )


def _rows(eqn: Any, operand: Any, indices: Any) -> Any:
    rest = operand.ndim - 2
    index = indices[..., 0, :]
    index = index.reshape(*index.shape[:-1], *[1] * rest, index.shape[-1])
    shape = jnp.broadcast_shapes(index.shape, (*[1] * (index.ndim - rest - 1), *operand.shape[1:]))
    rows = [jnp.broadcast_to(operand[i], shape) for i in range(operand.shape[0])]
    return reduce(lambda chosen, i: jnp.where(index >= i, rows[i], chosen), range(1, len(rows)), rows[0])


def _broadcast(eqn: Any, value: Any, *_: Any) -> Any:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    return lax.broadcast_in_dim(value, (*shape, value.shape[-1]), (*dims, len(shape)))


def _slice(eqn: Any, value: Any) -> Any:
    p = eqn.params
    strides = p["strides"] or (1,) * (value.ndim - 1)
    return lax.slice(value, (*p["start_indices"], 0), (*p["limit_indices"], value.shape[-1]), (*strides, 1))


_RULES: dict[str, Callable[..., Any]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": lambda eqn, value: value.reshape(*eqn.params["new_sizes"], value.shape[-1]),
    "squeeze": lambda eqn, value: lax.squeeze(value, eqn.params["dimensions"]),
    "transpose": lambda eqn, value: lax.transpose(value, (*eqn.params["permutation"], value.ndim - 1)),
    "slice": _slice,
    "stop_gradient": lambda eqn, value: value,
    "copy": lambda eqn, value: value,
    "iota": lambda eqn: eqn.primitive.bind(**eqn.params)[..., None],
}
