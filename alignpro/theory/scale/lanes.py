"""Very many small instances: a function compiled to machine code that takes an instance in each vector lane.

`in_lanes` traces a function of one instance with JAX and writes its every operation as one instruction on
vectors of 8 instances (16 in float32); `llvmlite` compiles that. Arrays over the short axes exist only while
the code is written, as NumPy arrays of instructions: a transpose or a slice costs nothing. See docs/scale.md.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import Any

import jax
import numpy as np
from jax.extend import core
from llvmlite import ir

from alignpro.theory.scale.vectors import (
    BIT,
    BYTE,
    INDEX,
    POINTER,
    Code,
    Vectors,
    element,
    function,
    index,
    loop,
)

LONGEST, LONGEST_QUICK = 2**14, 2**16
"""Operations that are worth compiling, at some 0.3 ms each, or 0.1 ms quickly."""
# Instances that a thread takes at a time.
_CHUNK = 2**12
_ARGUMENTS = (INDEX, INDEX, POINTER, POINTER, POINTER, INDEX)
_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")
_CHAINS = {
    "reduce_sum": "add",
    "reduce_prod": "mul",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
}


def in_lanes(function: Callable[..., Any], *examples: Any, quick: bool = False) -> Callable[..., Any]:
    """`function` of one instance as a function of a batch, the first axis of NumPy arguments and results.

    Args:
        function: of arrays or pytrees of arrays; traceable, without loops, sorts or random numbers.
        examples: arguments of one instance, or their `jax.ShapeDtypeStruct`s.
        quick: compile in a third of the time, to code that takes about twice as long.

    An argument without axes of its own may be broadcast over the batch. Numbers given that are below the
    smallest normal one count as 0, as in XLA.

    Raises:
        NotImplementedError: an operation without a rule here, or too many (`LONGEST`, `LONGEST_QUICK`).
        ValueError: (by the result) an argument's shape is not that of a batch of the examples.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    flat = jax.make_jaxpr(lambda *leaves: _inlined(traced.jaxpr, traced.consts, leaves, {}))(
        *jax.tree.leaves(examples)
    )
    arguments, results = ([v.aval for v in vs] for vs in (flat.jaxpr.invars, flat.jaxpr.outvars))
    # A register of 64 bytes, or what the machine makes of it.
    width = 64 // min((a.dtype.itemsize for a in arguments if a.dtype.kind == "f"), default=8)
    longest = LONGEST_QUICK if quick else LONGEST
    code = Code.kept(lambda: _written(flat, width, longest), _ARGUMENTS, quick, width, _parts(flat))
    structure = jax.tree.structure(shapes)

    def bound(given: Sequence[np.ndarray], out: Sequence[np.ndarray]) -> Callable[[int, int], None]:
        """The code on these arrays, from and to the instances it is called with."""
        steps = np.array([a.strides[0] // a.itemsize for a in given], np.int64)
        from_, to = (np.array([a.ctypes.data for a in arrays], np.uintp) for arrays in (given, out))
        tables, length = (from_, steps, to), out[0].shape[-1] if out else 0
        return lambda start, stop: code(start, stop, *(a.ctypes.data for a in tables), length)

    def run(*batch: Any) -> Any:
        leaves = [_contiguous(a, v) for a, v in zip(jax.tree.leaves(batch), arguments, strict=True)]
        count = len(leaves[0])
        for array, v in zip(leaves, arguments, strict=True):  # the code would read on past its end
            if array.shape != (count, *v.shape):
                raise ValueError(f"an argument has shape {array.shape} where {(count, *v.shape)} was meant")
        out = [np.empty((*v.shape, count), v.dtype) for v in results]
        whole, solve = count - count % width, bound(leaves, out)
        if whole <= _CHUNK:  # a pool of threads would take longer to start
            solve(0, whole)
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                starts = range(0, whole, _CHUNK)
                list(pool.map(lambda start: solve(start, min(start + _CHUNK, whole)), starts))
        if rest := count - whole:
            # The last few fill a vector of their own.
            filled = [a[np.minimum(np.arange(whole, whole + width), count - 1)] for a in leaves]
            last = [np.empty((*v.shape, width), v.dtype) for v in results]
            bound(filled, last)(0, width)
            for array, some in zip(out, last, strict=True):
                array[..., whole:] = some[..., :rest]
        return jax.tree.unflatten(structure, [_batch_first(a) for a in out])

    return run


def _batch_first(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 1 else np.ascontiguousarray(array.transpose(-1, *range(array.ndim - 1)))


def _contiguous(array: Any, one: Any) -> np.ndarray:
    array = np.asarray(array, one.dtype)
    if array.ndim == 1 and array.strides[0] == 0:  # one number for the whole batch
        return array
    return np.require(array, requirements=["C", "A"])


def _identity(value: Any) -> Any:
    """A key that two values share if they are the same traced value or the same constant."""
    if isinstance(value, jax.core.Tracer):
        return id(value)
    array = np.asarray(value)
    return array.dtype, array.shape, array.tobytes()


def _inlined(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], seen: dict[Any, Any]) -> list[Any]:
    """Evaluate with every call opened up and nothing worked out twice; `seen` holds what was."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, core.Literal) else known[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive.name in _CALLS:
            inner = next(eqn.params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in eqn.params)
            outputs = _inlined(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, seen)
        else:
            same = (eqn.primitive, str(eqn.params), *map(_identity, inputs))
            if same not in seen:
                outputs = eqn.primitive.bind(*inputs, **eqn.params)
                seen[same] = outputs if eqn.primitive.multiple_results else [outputs], inputs
            outputs, _ = seen[same]
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _parts(flat: Any) -> list[Any]:
    """All that a traced function's code is made of: equal lists, equal code."""
    numbers: dict[Any, int] = {}

    def name(v: Any) -> Any:
        return _identity(v.val) if isinstance(v, core.Literal) else numbers.setdefault(v, len(numbers))

    jaxpr = flat.jaxpr
    ends = [[(name(v), str(v.aval)) for v in vs] for vs in (jaxpr.constvars, jaxpr.invars)]
    steps = [
        (
            eqn.primitive.name,
            str(eqn.params),
            [*map(name, eqn.invars)],
            [(name(v), str(v.aval)) for v in eqn.outvars],
        )
        for eqn in jaxpr.eqns
    ]
    return [ends, steps, [*map(name, jaxpr.outvars)], [*map(_identity, flat.consts)]]


def _live(jaxpr: Any) -> list[Any]:
    """The equations that the results need."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return live[::-1]


def _written(flat: Any, width: int, longest: int) -> ir.Function:
    """kernel(from, to, arguments, their strides, results, length of a result's row), a loop over vectors.

    Arguments are [N, …] with so many numbers from instance to instance, results […, N].
    """
    jaxpr, live = flat.jaxpr, _live(flat.jaxpr)
    for eqn in live:
        if len(eqn.outvars) != 1:
            raise NotImplementedError(f"{eqn.primitive} has no rule for batches in lanes")
    if (count := sum(map(_count, live))) > longest:
        raise NotImplementedError(f"{count} operations would take too long to compile; {longest} are fine")
    written = function(*_ARGUMENTS)
    start, stop, arguments, strides, results, length = written.args
    b = ir.IRBuilder(written.append_basic_block("entry"))
    vectors = Vectors(b, width)

    def entries(pointers: Any, count: int, of: Any) -> list[Any]:
        return [b.load(b.gep(pointers, [index(k)], source_etype=of), typ=of) for k in range(count)]

    given = list(zip(jaxpr.invars, entries(arguments, len(jaxpr.invars), POINTER), strict=True))
    steps = entries(strides, len(jaxpr.invars), INDEX)
    places = entries(results, len(jaxpr.outvars), POINTER)
    known: dict[Any, np.ndarray] = {}
    for v, value in zip(jaxpr.constvars, flat.consts, strict=True):
        known[v] = _constants(vectors, value, v.aval)

    def read(v: Any) -> np.ndarray:
        return _constants(vectors, v.val, v.aval) if isinstance(v, core.Literal) else known[v]

    with loop(b, start, stop, width) as first:
        for (v, pointer), step in zip(given, steps, strict=True):
            lanes = [
                b.gep(pointer, [b.mul(b.add(first, index(lane)), step)], source_etype=element(v.aval.dtype))
                for lane in range(width)
            ]
            known[v] = _loaded(vectors, lanes, v.aval)
        for eqn in live:
            known[eqn.outvars[0]] = _operation(vectors, eqn, [read(v) for v in eqn.invars])
        for v, place in zip(jaxpr.outvars, places, strict=True):
            size = BYTE if v.aval.dtype == bool else element(v.aval.dtype)
            for k, value in enumerate(read(v).flat):
                if v.aval.dtype == bool:
                    value = b.zext(value, vectors.vector(BYTE))
                at = b.gep(place, [b.add(b.mul(length, index(k)), first)], source_etype=size)
                b.store(value, at, align=v.aval.dtype.itemsize)
    b.ret_void()
    return written


def _loaded(vectors: Vectors, lanes: list[Any], aval: Any) -> np.ndarray:
    """An argument's vectors, from where it begins in each lane."""
    b, width, of, size = vectors.builder, vectors.width, element(aval.dtype), math.prod(aval.shape)
    if of == BIT:
        raise NotImplementedError("arguments of bits have no rule for batches in lanes")
    out: list[Any] = [None] * size

    def load(lane: Any, at: int, what: Any) -> Any:
        place = b.gep(lane, [index(at)], source_etype=of)
        return b.load(place, typ=what, align=aval.dtype.itemsize)

    if size >= width:
        for at in [*range(0, size - width, width), size - width]:  # the last may overlap the one before
            rows = [load(lane, at, vectors.vector(of)) for lane in lanes]
            out[at : at + width] = _transposed(vectors, rows)
    else:
        for at in range(size):
            value = ir.Constant(vectors.vector(of), ir.Undefined)
            for k, lane in enumerate(lanes):
                value = b.insert_element(value, load(lane, at, of), index(k))
            out[at] = value
    return _objects([vectors.flushed(value) for value in out], aval.shape)


def _transposed(vectors: Vectors, rows: list[Any]) -> list[Any]:
    """A square of numbers turned: in each round pairs of rows exchange blocks of half the size of theirs."""
    width, step = vectors.width, 1
    while step < width:
        lanes = range(width)
        low = [i - step + width if i & step else i for i in lanes]
        high = [i + width if i & step else i + step for i in lanes]
        turned = list(rows)
        for i in lanes:
            if not i & step:
                for at, mask in ((i, low), (i + step, high)):
                    picked = ir.Constant(ir.VectorType(ir.IntType(32), width), mask)
                    turned[at] = vectors.builder.shuffle_vector(rows[i], rows[i + step], picked)
        rows, step = turned, 2 * step
    return rows


def _objects(values: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values
    return out.reshape(shape)


def _constants(vectors: Vectors, value: Any, aval: Any) -> np.ndarray:
    numbers = np.broadcast_to(np.asarray(value, aval.dtype), aval.shape)
    of = element(aval.dtype)
    return _objects([vectors.constant(number, of) for number in numbers.flat], aval.shape)


def _count(eqn: Any) -> int:
    """The operations that an equation stands for."""
    name, size = eqn.primitive.name, math.prod(eqn.outvars[0].aval.shape)
    if name in _MOVES or name == "iota":
        return 0
    if name in _CHAINS:
        return math.prod(eqn.invars[0].aval.shape)
    if name == "dot_general":
        contracted = eqn.params["dimension_numbers"][0][0]
        return 2 * size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return size * (eqn.invars[0].aval.shape[0] if name == "gather" else 1)


def _each(rule: Callable[..., Any], shape: tuple[int, ...], *arrays: np.ndarray) -> np.ndarray:
    """The rule on every entry; once where broadcasting made entries the same."""
    arrays = tuple(np.broadcast_to(a, shape) for a in arrays)
    done: dict[Any, Any] = {}
    out = []
    for values in zip(*(a.flat for a in arrays), strict=True):
        key = tuple(map(id, values))
        if key not in done:
            done[key] = rule(*values)
        out.append(done[key])
    return _objects(out, shape)


def _operation(vectors: Vectors, eqn: Any, inputs: list[np.ndarray]) -> np.ndarray:
    """The result of one equation."""
    name, params, shape = eqn.primitive.name, eqn.params, eqn.outvars[0].aval.shape
    if name in _MOVES:
        return _MOVES[name](eqn, *inputs)
    if name in _CHAINS:
        combine, axes = vectors.operations[_CHAINS[name]], params["axes"]
        kept = [axis for axis in range(inputs[0].ndim) if axis not in axes]
        rows = inputs[0].transpose(*kept, *axes).reshape(math.prod(shape), -1)
        return _objects([reduce(combine, row) for row in rows], shape)
    if name == "dot_general":
        return _product(vectors, eqn, *inputs)
    if name == "gather":
        return _rows(vectors, eqn, *inputs)
    if name == "iota":
        return _constants(vectors, eqn.primitive.bind(**params), eqn.outvars[0].aval)
    rule: Callable[..., Any]
    if name == "convert_element_type":
        rule = partial(vectors.convert, old=eqn.invars[0].aval.dtype, new=params["new_dtype"])
    elif name == "bitcast_convert_type":
        rule = partial(vectors.bits_as, new=params["new_dtype"])
    elif name == "integer_pow":
        rule = partial(vectors.power, exponent=params["y"])
    elif name in vectors.operations:
        rule = vectors.operations[name]
    else:
        raise NotImplementedError(f"{name} has no rule for batches in lanes")
    return _each(rule, shape, *inputs)


def _product(vectors: Vectors, eqn: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Contraction over one axis of each: Σ_i left[…, i] right[…, i], outer over the rest."""
    (contracted, across), batch = eqn.params["dimension_numbers"]
    if len(contracted) != 1 or any(batch):
        raise NotImplementedError("this dot_general has no rule for batches in lanes")
    rows = np.moveaxis(left, contracted[0], -1).reshape(-1, left.shape[contracted[0]])
    columns = np.moveaxis(right, across[0], -1).reshape(-1, right.shape[across[0]])
    terms = [[list(map(vectors.mul, row, column)) for column in columns] for row in rows]
    values = [reduce(vectors.add, term) for row in terms for term in row]
    return _objects(values, eqn.outvars[0].aval.shape)


def _rows(vectors: Vectors, eqn: Any, operand: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """operand[indices] along the first axis: by comparisons, as each lane has its own index."""
    numbers, last = eqn.params["dimension_numbers"], indices.ndim - 1
    if not (
        numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *operand.shape[1:])
        and numbers.offset_dims == tuple(range(last, last + operand.ndim - 1))
    ):
        raise NotImplementedError("this gather has no rule for batches in lanes")
    choose = vectors.builder.select
    out = []
    for wanted in indices[..., 0].flat:
        beyond = [vectors.compare(">=", wanted, i) for i in range(1, len(operand))]
        for chosen, *others in operand.reshape(len(operand), -1).T:
            for here, other in zip(beyond, others, strict=True):
                chosen = choose(here, other, chosen)
            out.append(chosen)
    return _objects(out, eqn.outvars[0].aval.shape)


def _broadcast(eqn: Any, value: np.ndarray, *_: Any) -> np.ndarray:
    shape, ones = eqn.params["shape"], [1] * len(eqn.params["shape"])
    for axis, size in zip(eqn.params["broadcast_dimensions"], value.shape, strict=True):
        ones[axis] = size
    return np.broadcast_to(value.reshape(ones), shape)


def _reshape(eqn: Any, value: np.ndarray) -> np.ndarray:
    return value.reshape(eqn.outvars[0].aval.shape)


def _slice(eqn: Any, value: np.ndarray) -> np.ndarray:
    p = eqn.params
    strides = p["strides"] or (1,) * value.ndim
    return value[tuple(map(slice, p["start_indices"], p["limit_indices"], strides))]


_MOVES: dict[str, Callable[..., np.ndarray]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _reshape,
    "transpose": lambda eqn, value: value.transpose(eqn.params["permutation"]),
    "slice": _slice,
    "stop_gradient": lambda eqn, value: value,
    "copy": lambda eqn, value: value,
}
