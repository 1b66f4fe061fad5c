"""Large instances, and very many small ones: what the arrays are like is used, and the devices share.

These look at concrete arrays, so they are called from the host and not under jit. They compute what
`solution` computes.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.bounds import theorem1
from alignpro.theory.divergences import Floats
from alignpro.theory.gibbs import positive
from alignpro.theory.instance import KEYS, Instance, probabilities, rectangular, unchecked
from alignpro.theory.pairwise import pairwise_tv
from alignpro.theory.solution import Solution, solution

ROUTES = ("dense", "pairs", "sorted")
# Measured on CPU, in units of one term |a − b| of a dense block: such a term of a pair taken alone; an entry
# of a column sorted; an entry of a pass over a sorted column.
_PAIR, _SORT, _PASS = 35, 900, 400
# Numbers held at a time by the routes on the host, and by one step of a batch (its arrays stay in the cache).
_HELD, _CACHED = 2**20, 2**14
# Instances handed over at a time.
_CHUNK = 2**14


def route(instance: Instance) -> str:
    """Which of `ROUTES` is cheapest for `prompt_shift` of this instance on this backend."""
    if jax.default_backend() != "cpu":
        return "dense"  # an accelerator is done with it before the host has sorted
    rewrites = instance.shape[1]
    own, prior = np.asarray(instance.own), np.asarray(instance.prior)
    costs: dict[str, int] = {
        "dense": rewrites * len(np.unique(own)),
        "pairs": _PAIR * int(np.count_nonzero(prior)),
        "sorted": rewrites * (_SORT + _PASS * len(_kinds(prior)[0])),
    }
    return min(costs, key=costs.__getitem__)


def prompt_shift(
    instance: Instance, by: str | None = None, devices: Sequence[jax.Device] | None = None
) -> Float[np.ndarray, " X"]:
    """E_{x′~ρ_sft(·|x)} TV(π_F(·|x), π_F(·|x′)), the field `tv_shift` of `solution` (probability).

    Args:
        instance: the problem, concrete.
        by: a row of `ROUTES`; the cheapest, by `route`, when None.
        devices: those of the dense route; all when None.

    - `dense`: U·K·Y terms for U different rows among `own`, in blocks (`distances.expected_tv` on a CPU with
      llvmlite, `pairwise.pairwise_tv` elsewhere).
    - `pairs`: only pairs of different rows that some x needs (ρ_sft > 0), each once: a sparse ρ_sft.
    - `sorted`: for each response, Σ_k w_k |a − q_k| at every a = q_j at once, from the sorted q: with W the
      running sum of the weights, Σ_{k≤j} w_k (q_j − q_k) = Σ_{i<j} W_i (q_{i+1} − q_i), and the same from
      above. O(K (log K + G) Y) for G different rows of ρ_sft: a shared ρ_sft.

    Every route sums non-negative terms only, so each is accurate to 2 (Y + K + 8) units of rounding
    relative to itself, which is within `tv_shift_error`; equal rows are at exactly 0.
    """
    by = route(instance) if by is None else by
    if by not in ROUTES:
        raise AlignProError(f"route {by!r} is unknown; give one of {', '.join(ROUTES)}")
    own, prior, frozen = (np.asarray(a) for a in (instance.own, instance.prior, instance.frozen))
    if by == "dense":
        shift = _dense(own, prior, frozen, tuple(devices or jax.devices()))
    else:
        exact = frozen.astype(np.float64, copy=False)
        shift = (_by_pairs if by == "pairs" else _by_sorting)(
            own, prior.astype(np.float64, copy=False), exact
        )
    return shift.astype(np.result_type(prior, frozen))


def _one_cpu(devices: tuple[Any, ...]) -> bool:
    return len(devices) == 1 and devices[0].platform == "cpu"


def _native(devices: tuple[Any, ...]) -> bool:
    """Whether one CPU is to do all the work, and llvmlite is there to write its code."""
    return _one_cpu(devices) and importlib.util.find_spec("llvmlite") is not None


def _dense(own: np.ndarray, prior: np.ndarray, frozen: np.ndarray, devices: tuple[Any, ...]) -> np.ndarray:
    if _native(devices):
        from alignpro.theory.scale.distances import expected_tv

        single = frozen.dtype == np.float32
        return expected_tv(frozen if single else frozen.astype(np.float64, copy=False), own, prior)
    rows, which = np.unique(own, return_inverse=True)
    padded = np.pad(rows, (0, -len(rows) % len(devices)))
    distances = np.asarray(_rowwise(devices)(frozen[padded], frozen))
    return np.einsum("xk,xk->x", prior, distances[which])


@lru_cache
def _rowwise(devices: tuple[Any, ...]) -> Callable[..., Any]:
    """`pairwise_tv`, the rows of its first argument spread over the devices."""
    mesh, across = Mesh(np.array(devices), ("x",)), PartitionSpec("x")
    return jax.jit(
        jax.shard_map(
            pairwise_tv, mesh=mesh, in_specs=(across, PartitionSpec()), out_specs=across, check_vma=False
        )
    )


def _by_pairs(own: np.ndarray, prior: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    x, k = np.nonzero(prior)
    apart = own[x] != k
    x, k = x[apart], k[apart]
    # The different unordered pairs of rows as codes, and the pair of each entry x, k of ρ_sft.
    codes = np.minimum(own[x], k) * prior.shape[1] + np.maximum(own[x], k)
    codes, which = np.unique(codes, return_inverse=True)
    low, high = codes // prior.shape[1], codes % prior.shape[1]
    distances = np.empty(len(codes))
    step = max(1, _HELD // 16 // frozen.shape[1])

    def some(i: int) -> None:
        difference = frozen[low[i : i + step]] - frozen[high[i : i + step]]
        np.abs(difference, out=difference).sum(-1, out=distances[i : i + step])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(some, range(0, len(codes), step)))
    return np.bincount(x, prior[x, k] * 0.5 * distances[which], minlength=len(own))


def _kinds(prior: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The different rows, and which of them each row is."""
    seen: dict[bytes, int] = {}
    which = [seen.setdefault(row.tobytes(), len(seen)) for row in prior]
    return prior[[which.index(kind) for kind in range(len(seen))]], which


def _by_sorting(own: np.ndarray, prior: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    rewrites, responses = frozen.shape
    kinds, which = _kinds(prior)
    step = max(1, _HELD // 4 // rewrites)

    def some(y: int) -> np.ndarray:
        distances = np.empty((len(kinds), rewrites))
        columns = np.ascontiguousarray(frozen[:, y : y + step].T)
        order = np.argsort(columns, -1)
        gaps = np.diff(np.take_along_axis(columns, order, -1), axis=-1)
        for kind, weights in enumerate(kinds):
            sorted_weights = weights[order]
            below, above = np.cumsum(sorted_weights, -1), np.cumsum(sorted_weights[:, ::-1], -1)
            sums = np.zeros_like(columns)
            np.cumsum(below[:, :-1] * gaps, -1, out=sums[:, 1:])
            sums[:, -2::-1] += np.cumsum(above[:, :-1] * gaps[:, ::-1], -1)
            distances[kind] = np.bincount(order.ravel(), sums.ravel(), minlength=rewrites)
        return distances

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        distances = sum(pool.map(some, range(0, responses, step)), start=np.zeros((len(kinds), rewrites)))
    return 0.5 * distances[which, own]


def solve_large(
    instance: Instance,
    beta: float,
    lam: float,
    *,
    prompter: Float[Floats, "X K"] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Solution:
    """`solution` of one large instance: `prompt_shift` once, the rest on the prompts of each device.

    X, K and Y may each be thousands; float32 if all arrays are. `prompter` is any ρ(x′|x) [X, K], ρ* when
    None; all `devices` are used when None. For many (β, λ) call `prompt_shift` once and give it to
    `solution`.

    Raises:
        AlignProError: β or λ is not positive and finite, or the prompter is no matrix of probabilities.
    """
    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    if prompter is not None:
        prompter = probabilities("prompter", prompter, np.shape(instance.prior))
    devices = tuple(devices or jax.devices())
    shift = prompt_shift(instance, devices=devices)
    prompts = instance.shape[0]
    extra = -prompts % len(devices)

    # Copies of the first prompt, of probability 0, make the prompts divide evenly.
    def spread(array: Any, copied: bool = True) -> Any:
        array = np.asarray(array)
        return jax.device_put(np.concatenate([array, *[array[:1] * copied] * extra]), across)

    mesh = Mesh(np.array(devices), ("x",))
    across, everywhere = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    arrays = unchecked(
        spread(instance.p, copied=False),
        spread(instance.prior),
        jax.device_put(instance.frozen, everywhere),
        spread(instance.own),
        spread(instance.reward),
    )
    solved = solution(arrays, beta, lam, None if prompter is None else spread(prompter), spread(shift))
    return jax.tree.map(lambda leaf: leaf[:prompts] if leaf.ndim else leaf, solved) if extra else solved


_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@cache
def quick_options() -> dict[str, Any] | None:
    """Options for `jax.jit`: compiled in a third of the time, code takes two or three times as long.

    None where this JAX does not know them.
    """
    try:
        jax.jit(lambda x: x + 1.0, compiler_options=_QUICK)(0.0)
    except Exception:
        return None
    return _QUICK


def solve_batch(
    batch: Instance,
    beta: Float[Floats, "..."] | float,
    lam: Float[Floats, "..."] | float,
    statement: Callable[[Solution], Any] = theorem1,
    *,
    prompter: Float[Floats, "N X K"] | None = None,
    devices: Sequence[jax.Device] | None = None,
    quick: bool = False,
) -> Any:
    """Evaluate one statement on each instance of a batch.

    Args:
        batch: an Instance whose arrays have one leading axis N (as `FAMILIES` draws them).
        beta: β > 0, one or [N], in reward units.
        lam: λ > 0, one or [N], in reward units.
        statement: a value of `BOUNDS`, `IDENTITIES`, … or any function of a `Solution` that returns a
            Statement or another pytree of arrays.
        prompter: one ρ(x′|x) for each instance; ρ* when None.
        devices: those that share the batch axis; all when None.
        quick: compile in a third of the time, to code that takes two or three times as long. Worth it below
            some millions of instances of each shape; results differ by rounding.

    Returns what the statement returns, as NumPy arrays with the leading axis N. Beside the batch and the
    result the memory does not grow with N; it is compiled once for each shape and statement.

    Raises:
        AlignProError: the batch has no leading axis, no instance or unequal numbers of them, or a bad β or λ.
    """
    arrays = unchecked(*(np.asarray(getattr(batch, key)) for key in KEYS))
    if arrays.p.ndim != 2 or not len(arrays.p):
        raise AlignProError(
            f"batch: p has shape {arrays.p.shape}; give arrays with one leading axis, as FAMILIES draws "
            "them, and one instance or more"
        )
    count = len(arrays.p)
    for name, array in [*((key, getattr(arrays, key)) for key in KEYS), ("prompter", prompter)]:
        if array is not None and np.shape(array)[:1] != (count,):
            raise AlignProError(
                f"batch: {name} has shape {np.shape(array)}; give {count} instances of it, as of p"
            )
    temperatures = [_temperatures(name, value, count) for name, value in (("beta", beta), ("lam", lam))]
    devices = tuple(devices or jax.devices())
    given = jax.tree.map(np.asarray, (arrays, *temperatures, prompter))
    leaves, structure = jax.tree.flatten(given)
    one = structure, tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves)
    if _native(devices) and (in_lanes := _in_lanes(statement, one, quick)):
        return in_lanes(*given)
    run, inner = _batched(statement, one, -(-min(_CHUNK, count) // len(devices)), devices, quick)
    unit = inner * len(devices)
    step = -(-min(_CHUNK, count) // unit) * unit

    def solve(start: int) -> Any:
        stop = min(start + step, count)
        # A chunk cut short is filled with its first instance: one shape, one compilation.
        chosen = np.concatenate([np.arange(start, stop), np.full(start + step - stop, start)])
        part = slice(start, stop) if stop - start == step else chosen

        def laid(a: np.ndarray) -> np.ndarray:
            return a[part].reshape(-1, inner, *a.shape[1:])

        def flat(a: Any) -> np.ndarray:
            return np.asarray(a).reshape(-1, *a.shape[2:])[: stop - start]

        return jax.tree.map(flat, run(*jax.tree.map(laid, given)))

    # One CPU device runs one small operation after another, so let the cores take a chunk each.
    with ThreadPoolExecutor(os.cpu_count() if _one_cpu(devices) else 1) as pool:
        pieces = list(pool.map(solve, range(0, count, step)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)


def _temperatures(name: str, value: Any, count: int) -> np.ndarray:
    array = rectangular(name, value)
    if array.shape not in ((), (count,)):
        raise AlignProError(f"{name}: has shape {array.shape}; give one number or {count}, one per instance")
    positive(name, array)
    return np.broadcast_to(array.astype(float), (count,))


def _on_one(statement: Callable[[Solution], Any]) -> Callable[..., Any]:
    return lambda *instance: statement(solution(*instance))


@lru_cache
def _in_lanes(statement: Callable[[Solution], Any], batch: Any, quick: bool) -> Callable[..., Any] | None:
    """The statement on a batch, compiled with an instance in each vector lane; None where that cannot be.

    `batch` is a pytree's structure with the shapes and dtypes of one instance.
    """
    from alignpro.theory.scale.lanes import in_lanes

    structure, leaves = batch
    example = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    try:
        return in_lanes(_on_one(statement), *example, quick=quick)
    except NotImplementedError:
        return None


@lru_cache
def _batched(
    statement: Callable[[Solution], Any], batch: Any, count: int, devices: tuple[Any, ...], quick: bool
) -> tuple[Callable[..., Any], int]:
    """The statement on a chunk, and how many instances each device takes at a time.

    `batch` is as for `_in_lanes`, `count` how many there are for each device. The chunk's arrays are
    [steps, at a time, …].
    """
    one = _on_one(statement)
    largest = max(int(np.prod(shape)) for shape, _ in batch[1])

    def chunk(*pieces: Any) -> Any:
        # Held back, or every use of an array would cut its piece out anew.
        return lax.map(lambda piece: jax.vmap(one)(*lax.optimization_barrier(piece)), pieces)

    across = PartitionSpec("batch")
    mesh = Mesh(np.array(devices), ("batch",))
    mapped = jax.shard_map(chunk, mesh=mesh, in_specs=across, out_specs=across, check_vma=False)
    compiled = jax.jit(mapped, compiler_options=quick_options() if quick else None)
    return compiled, max(1, min(_CACHED // largest, count))
