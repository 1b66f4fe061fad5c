"""The X·K·Y term of one large instance as machine code: sums of |a − b| that stay in the registers.

4 rows of the frozen model meet 4 vectors of others, which is 16 sums in registers, over a strip of 128
responses that stays in the L1 cache. On the host, for one CPU: no jit, no gradients. Needs llvmlite.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from llvmlite import ir

from alignpro.theory.scale.vectors import (
    INDEX,
    POINTER,
    Code,
    Vectors,
    element,
    function,
    index,
    loop,
    register_bytes,
)

_ROWS, _STRIP = 4, 128


def expected_tv(
    frozen: Float[np.ndarray, "K Y"], own: Int[np.ndarray, " X"], prior: Float[np.ndarray, "X K"]
) -> Float[np.ndarray, " X"]:
    """`pairwise.expected_tv` of NumPy arrays, `frozen` of float64 or float32.

    Equal rows of `own` are worked out once. The cores share the rewrites; beside the arguments each holds
    some 32 columns of K×Y and of X×K numbers. Accurate to (Y + K + 4) units of rounding relative to itself.
    """
    frozen = np.ascontiguousarray(frozen)
    rows, which = np.unique(own, return_inverse=True)
    if rows[0] < 0 or rows[-1] >= len(frozen):  # the code would read elsewhere
        raise IndexError(f"own must lie in 0, …, {len(frozen) - 1}, and is {rows[0]} to {rows[-1]}")
    rows = np.pad(rows.astype(np.int64), (0, -len(rows) % _ROWS))
    code, width = _code(frozen.dtype)
    responses = frozen.shape[1]

    def part(start: int) -> np.ndarray:
        others = frozen[start : start + width]
        panel = np.zeros((responses, width), frozen.dtype)
        panel[:, : len(others)] = others.T
        out = np.zeros((len(rows), width), frozen.dtype)
        code(len(rows), responses, *(a.ctypes.data for a in (rows, frozen, panel, out)))
        return np.einsum("xk,xk->x", prior[:, start : start + width], out[which, : len(others)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(part, range(0, len(frozen), width)), start=np.zeros(len(own), prior.dtype))


@lru_cache
def _code(dtype: np.dtype) -> tuple[Code, int]:
    """kernel(n, Y, rows [n], frozen [·, Y], panel [Y, width], out [n, width]), and the width.

    Adds TV(frozen[rows[i]], panel[:, j]) to out[i, j]; n is a multiple of `_ROWS`.
    """
    size = register_bytes()
    lanes, columns = size // dtype.itemsize, 2 if size == 32 else 4  # AVX has half as many registers
    width = lanes * columns
    written = function(INDEX, INDEX, POINTER, POINTER, POINTER, POINTER)
    count, length, rows, frozen, panel, out = written.args
    b = ir.IRBuilder(written.append_basic_block("entry"))
    vectors, of = Vectors(b, lanes), element(dtype)
    half = vectors.constant(0.5, of)

    def at(array: Any, line: Any, length: Any, entry: Any) -> Any:
        """The address of array[line, entry] in rows of `length`."""
        return b.gep(array, [b.add(b.mul(line, length), entry)], source_etype=of)

    def load(address: Any) -> Any:
        return b.load(address, typ=vectors.vector(of), align=dtype.itemsize)

    totals = [[b.alloca(vectors.vector(of)) for _ in range(columns)] for _ in range(_ROWS)]
    with loop(b, index(0), length, _STRIP) as start:
        end = b.add(start, index(_STRIP))
        end = b.select(b.icmp_signed("<", end, length), end, length)
        with loop(b, index(0), count, _ROWS) as first:
            lines = [b.add(first, index(i)) for i in range(_ROWS)]
            own = [b.load(b.gep(rows, [line], source_etype=INDEX), typ=INDEX) for line in lines]
            places = [
                (total, at(out, line, index(width), index(j * lanes)))
                for line, sums in zip(lines, totals, strict=True)
                for j, total in enumerate(sums)
            ]
            for total, place in places:
                b.store(load(place), total)
            with loop(b, start, end, 1) as y:
                others = [load(at(panel, y, index(width), index(j * lanes))) for j in range(columns)]
                for row, sums in zip(own, totals, strict=True):
                    one = vectors.everywhere(b.load(at(frozen, row, length, y), typ=of))
                    for other, total in zip(others, sums, strict=True):
                        term = vectors.mul(half, vectors.abs(b.fsub(one, other)))
                        b.store(vectors.add(b.load(total, typ=vectors.vector(of)), term), total)
            for total, place in places:
                b.store(b.load(total, typ=vectors.vector(of)), place, align=dtype.itemsize)
    b.ret_void()
    return Code.of(written), width
