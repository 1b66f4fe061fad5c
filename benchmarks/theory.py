"""How fast the theory is, beside NumPy, SciPy and torch in the same run.

    python benchmarks/theory.py                      # the sizes of docs/scale.md
    python benchmarks/theory.py --pairs 256 256 512 --instances 20000 --repeats 3
    python benchmarks/theory.py --json result.json

Two tasks, in float64 unless said otherwise:

- `pairs`: E_{x'~rho_sft} TV(pi_F(.|x), pi_F(.|x')) for every x, one instance of X, K, Y;
- `batch`: gap, three terms and right side of Theorem 1 for many instances of 4 x 4 x 8.

Rivals have all cores where they can use them: SciPy's `cdist` is given some of the prompts on each, and
JAX's jit(vmap) some of the instances. Every rival runs alone in a process of its own, so that the peak memory
is its own; the data are made anew there from the seed, outside the clock, and arrays are handed over in the
library's own form. The first call (compilation) is reported by itself and not counted. Times are wall-clock:
the least and the median of the repeats. The load average says whether the machine was idle; where it was not,
compare CPU seconds.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SHAPE = (4, 4, 8)
BETA, LAM = 0.3, 0.2


def pair_data(x: int, k: int, y: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """frozen [K, Y], own [X], prior [X, K]: dense, rows all different."""
    rng = np.random.default_rng(seed)
    frozen = rng.standard_gamma(1.0, (k, y))
    prior = rng.standard_gamma(1.0, (x, k))
    own = rng.permutation(k)[:x] if x <= k else rng.integers(k, size=x)
    return frozen / frozen.sum(-1, keepdims=True), own, prior / prior.sum(-1, keepdims=True)


def batch_data(count: int, seed: int) -> list[np.ndarray]:
    """p [N, X], prior [N, X, K], frozen [N, K, Y], own [N, X], reward [N, X, Y]; the same for every N."""
    x, k, y = SHAPE

    def block(start: int) -> tuple[np.ndarray, ...]:
        rng, n = np.random.default_rng([seed, start]), 10_000
        rows = [rng.standard_gamma(1.0, (n, *size)) for size in ((x,), (x, k), (k, y))]
        p, prior, frozen = (a / a.sum(-1, keepdims=True) for a in rows)
        return p, prior, frozen, rng.integers(k, size=(n, x)), rng.uniform(size=(n, x, y))

    blocks = [block(start) for start in range(0, count, 10_000)]
    return [np.concatenate(arrays)[:count] for arrays in zip(*blocks, strict=True)]


# The pairwise term. Each rival returns a function of no arguments and what to check its result against.


def pairs_scipy(frozen, own, prior):
    from scipy.spatial.distance import cdist

    # `cdist` uses one core and lets go of the GIL: each core takes some of the prompts.
    cores = os.cpu_count() or 1
    parts = [part for part in np.array_split(np.arange(len(own)), cores) if len(part)]

    def some(part):
        return 0.5 * np.einsum("xk,xk->x", prior[part], cdist(frozen[own[part]], frozen, "cityblock"))

    def run():
        with ThreadPoolExecutor(cores) as pool:
            return np.concatenate(list(pool.map(some, parts)))

    return run


def pairs_numpy(frozen, own, prior):
    """One row at a time: X×K×Y would not fit."""

    def run():
        out = np.empty(len(own))
        difference = np.empty_like(frozen)
        for x, row in enumerate(own):
            np.subtract(frozen, frozen[row], out=difference)
            out[x] = 0.5 * prior[x] @ np.abs(difference, out=difference).sum(-1)
        return out

    return run


def pairs_torch(frozen, own, prior):
    import torch

    f, w, o = torch.from_numpy(frozen), torch.from_numpy(prior), torch.from_numpy(own)
    return lambda: (0.5 * (w * torch.cdist(f[o], f, p=1)).sum(-1)).numpy()


def pairs_alignpro(frozen, own, prior):
    """As `solve_large` computes it: machine code where llvmlite is installed."""
    from alignpro.theory.instance import unchecked
    from alignpro.theory.scale.routes import prompt_shift

    instance = unchecked(None, prior, frozen, own, None)
    return lambda: prompt_shift(instance)


def pairs_alignpro_jax(frozen, own, prior):
    """As `solution` computes it, under jit, vmap and grad."""
    import jax

    import alignpro.theory  # noqa: F401  (64-bit floats)
    from alignpro.theory.pairwise import expected_tv

    arrays, run = jax.device_put((frozen, own, prior)), jax.jit(expected_tv)
    return lambda: np.asarray(run(*arrays))


def pairs_alignpro_single(frozen, own, prior):
    return pairs_alignpro(frozen.astype(np.float32), own, prior.astype(np.float32))


def pairs_alignpro_sparse(frozen, own, prior):
    """ρ_sft with 32 rewrites for each prompt."""
    return pairs_alignpro(frozen, own, sparse_prior(prior))


def pairs_alignpro_shared(frozen, own, prior):
    """One ρ_sft for all prompts."""
    return pairs_alignpro(frozen, own, np.repeat(prior[:1], len(prior), 0))


def sparse_prior(prior: np.ndarray) -> np.ndarray:
    """The 32 likeliest rewrites of each row."""
    keep = min(32, prior.shape[1])
    kept = np.where(prior >= np.partition(prior, -keep, -1)[:, -keep, None], prior, 0.0)
    return kept / kept.sum(-1, keepdims=True)


# Theorem 1 on many small instances.


def theorem1_numpy(p, prior, frozen, own, reward, np=np):
    """Gap, right side and the three terms; leading axes allowed. Log-space, as one would write it.

    `np` is NumPy, or JAX's copy of it.
    """
    own_rows = np.take_along_axis(frozen, own[..., None], -2)
    r = reward @ np.swapaxes(frozen, -1, -2)
    top = reward.max(-1, keepdims=True)
    weights = own_rows * np.exp((reward - top) / BETA)
    pi = weights / weights.sum(-1, keepdims=True)
    u = (r - r.max(-1, keepdims=True)) / LAM
    weights = prior * np.exp(u)
    z = weights.sum(-1, keepdims=True)
    rho = weights / z
    r_max = reward.max((-1, -2))
    model = 0.5 * np.abs(pi - own_rows).sum(-1)
    shift = 0.5 * (prior * np.abs(own_rows[..., :, None, :] - frozen[..., None, :, :]).sum(-1)).sum(-1)
    kl = (rho * (u - np.log(z))).sum(-1)
    gap = (p * ((pi * reward).sum(-1) - (rho * r).sum(-1))).sum(-1)
    terms = r_max * (p * model).sum(-1), r_max * (p * shift).sum(-1), LAM * (p * kl).sum(-1)
    return gap, terms[0] + terms[1] - terms[2], *terms


def batch_loop(*arrays):
    return lambda: np.array([theorem1_numpy(*one) for one in zip(*arrays, strict=True)]).T


def batch_loop_scipy(*arrays):
    """The same loop with cdist and logsumexp."""
    from scipy.spatial.distance import cdist
    from scipy.special import logsumexp

    def one(p, prior, frozen, own, reward):
        own_rows, r = frozen[own], reward @ frozen.T
        log_pi = reward / BETA - logsumexp(reward / BETA, b=own_rows, axis=-1, keepdims=True)
        log_rho = r / LAM - logsumexp(r / LAM, b=prior, axis=-1, keepdims=True)
        pi, rho = own_rows * np.exp(log_pi), prior * np.exp(log_rho)
        r_max = reward.max()
        model = r_max * p @ (0.5 * np.abs(pi - own_rows).sum(-1))
        shift = r_max * p @ (0.5 * (prior * cdist(own_rows, frozen, "cityblock")).sum(-1))
        kl = LAM * p @ (rho * log_rho).sum(-1)
        gap = p @ ((pi * reward).sum(-1) - (rho * r).sum(-1))
        return gap, model + shift - kl, model, shift, kl

    return lambda: np.array([one(*each) for each in zip(*arrays, strict=True)]).T


def batch_numpy(*arrays):
    """All at once, 10,000 instances at a time, which stay in the cache."""

    def run():
        parts = [
            theorem1_numpy(*(a[i : i + 10_000] for a in arrays)) for i in range(0, len(arrays[0]), 10_000)
        ]
        return np.concatenate([np.stack(part) for part in parts], -1)

    return run


def batch_jax(*arrays):
    """The formulas under jit(vmap), 10,000 instances at a time, a chunk for each core."""
    import jax

    jax.config.update("jax_enable_x64", True)
    one = jax.jit(jax.vmap(lambda *instance: jax.numpy.stack(theorem1_numpy(*instance, np=jax.numpy))))

    def some(start):
        return np.asarray(one(*(a[start : start + 10_000] for a in arrays))).T

    def run():
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return np.concatenate(list(pool.map(some, range(0, len(arrays[0]), 10_000))), -1)

    return run


def batch_torch(*arrays):
    import torch

    tensors = [torch.from_numpy(a) for a in arrays]

    def chunk(p, prior, frozen, own, reward):
        own_rows = torch.take_along_dim(frozen, own[..., None], -2)
        r = reward @ frozen.mT
        pi = torch.softmax(own_rows.log() + reward / BETA, -1)
        log_rho = r / LAM - torch.logsumexp(prior.log() + r / LAM, -1, keepdim=True)
        rho = prior * log_rho.exp()
        r_max = reward.amax((-1, -2))
        model = r_max * (p * 0.5 * (pi - own_rows).abs().sum(-1)).sum(-1)
        shift = r_max * (p * 0.5 * (prior * torch.cdist(own_rows, frozen, p=1)).sum(-1)).sum(-1)
        kl = LAM * (p * (rho * log_rho).sum(-1)).sum(-1)
        gap = (p * ((pi * reward).sum(-1) - (rho * r).sum(-1))).sum(-1)
        return torch.stack([gap, model + shift - kl, model, shift, kl])

    def run():
        size = 10_000
        parts = [chunk(*(t[i : i + size] for t in tensors)) for i in range(0, len(tensors[0]), size)]
        return torch.cat(parts, -1).numpy()

    return run


def _terms(s):
    from alignpro.theory.bounds import theorem1

    t = theorem1(s)
    return t.lhs, t.rhs, t.terms["model"], t.terms["prompt_shift"], -t.terms["prompter_kl"]


def _with_error(s):
    from alignpro.theory.bounds import theorem1

    return (*_terms(s), theorem1(s).error)


def batch_alignpro(*arrays, statement=_terms):
    from alignpro.theory.instance import unchecked
    from alignpro.theory.scale import solve_batch

    batch = unchecked(*arrays)
    return lambda: np.stack(solve_batch(batch, BETA, LAM, statement)[:5])


def batch_alignpro_error(*arrays):
    """With the bound on the rounding error of every slack."""
    return batch_alignpro(*arrays, statement=_with_error)


def batch_alignpro_single(p, prior, frozen, own, reward):
    p, prior, frozen, reward = (a.astype(np.float32) for a in (p, prior, frozen, reward))
    return batch_alignpro(p, prior, frozen, own, reward)


# Each rival and, for the batch, the share of the instances it is given: loops are timed on fewer.
PAIRS: dict[str, Callable[..., Any]] = {
    "scipy cdist": pairs_scipy,
    "numpy": pairs_numpy,
    "torch cdist": pairs_torch,
    "alignpro": pairs_alignpro,
    "alignpro float32": pairs_alignpro_single,
    "alignpro, JAX alone": pairs_alignpro_jax,
    "alignpro, sparse ρ_sft": pairs_alignpro_sparse,
    "alignpro, shared ρ_sft": pairs_alignpro_shared,
}
BATCH: dict[str, tuple[Callable[..., Any], int]] = {
    "numpy batched": (batch_numpy, 1),
    "numpy loop": (batch_loop, 100),
    "scipy loop": (batch_loop_scipy, 100),
    "torch batched": (batch_torch, 1),
    "jax jit(vmap)": (batch_jax, 1),
    "alignpro": (batch_alignpro, 1),
    "alignpro with errors": (batch_alignpro_error, 1),
    "alignpro float32": (batch_alignpro_single, 1),
}


def peak(dtype: str) -> float:
    """Terms |a − b| summed per second by all cores, all in registers: the best case of that operation.

    Eight sums side by side, which wait for nothing but their own last term; by one thread, and by as many as
    there are cores; the best of several. It is measured, so other work on the machine lowers it.
    """
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

    sums, size, of = 8, register_bytes(), element(dtype)
    written = function(INDEX, POINTER)
    b = ir.IRBuilder(written.append_basic_block("entry"))
    vectors = Vectors(b, size // np.dtype(dtype).itemsize)
    wide, half = vectors.vector(of), vectors.constant(0.5, of)
    places = [b.gep(written.args[1], [index(i)], source_etype=wide) for i in range(sums + 1)]
    totals = [b.alloca(wide) for _ in range(sums)]
    for total, place in zip(totals, places, strict=False):
        b.store(b.load(place, typ=wide, align=8), total)
    other = b.load(places[-1], typ=wide, align=8)
    with loop(b, index(0), written.args[0], 1):
        for total in totals:
            value = b.load(total, typ=wide)
            term = vectors.mul(half, vectors.abs(b.fsub(other, value)))
            b.store(vectors.add(value, term), total)
    for total, place in zip(totals, places, strict=False):
        b.store(b.load(total, typ=wide), place, align=8)
    b.ret_void()
    code, steps, cores, best = Code.of(written), 2**24, os.cpu_count() or 1, 0.0
    for threads in (1, cores):
        data = np.random.default_rng(0).uniform(size=(threads, (sums + 1) * size // 8))
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(5):
                start = time.perf_counter()
                list(pool.map(lambda row: code(steps, row.ctypes.data), data))
                rate = threads * steps * sums * vectors.width / (time.perf_counter() - start)
                best = max(best, rate)
    return best


def measure(task: str, name: str, sizes: list[int], repeats: int, seed: int) -> dict[str, Any]:
    """Run in a process of its own."""
    if task == "peak" and importlib.util.find_spec("llvmlite") is None:
        return {"skipped": "llvmlite is not installed"}
    if task == "peak":
        return {"terms_per_second": {dtype: peak(dtype) for dtype in ("float64", "float32")}}
    if "torch" in name and importlib.util.find_spec("torch") is None:
        return {"skipped": "torch is not installed"}
    if task == "pairs":
        data = list(pair_data(*sizes, seed))
        make, work = PAIRS[name], float(np.prod(sizes))
    else:
        make, share = BATCH[name]
        count = max(1, sizes[0] // share)
        data, work = batch_data(count, seed), float(count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = make(*data)
    start = time.perf_counter()
    result = run()
    first = time.perf_counter() - start
    walls, cpus = [], []
    for _ in range(repeats):
        start, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - start)
        cpus.append(time.process_time() - cpu)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "first": first,
        "min": min(walls),
        "median": statistics.median(walls),
        "cpu": min(cpus),
        "per_second": work / min(walls),
        "work": work,
        "peak_mib": after / 1024,
        "data_mib": before / 1024,
        "check": np.asarray(result)[..., :3].astype(float).tolist(),
    }


def alone(task: str, name: str, sizes: list[int], repeats: int, seed: int) -> dict[str, Any]:
    job = json.dumps([task, name, sizes, repeats, seed])
    done = subprocess.run(
        [sys.executable, __file__, "--job", job], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"skipped": f"failed: {done.stderr.strip().splitlines()[-1] if done.stderr else 'killed'}"}
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            model = next(
                (line.split(":")[1].strip() for line in file if line.startswith("model name")), model
            )
    versions = {name: _version(name) for name in ("numpy", "scipy", "jax", "torch", "alignpro")}
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        **versions,
    }


def _version(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", nargs=3, type=int, default=[1024, 1024, 4096], metavar=("X", "K", "Y"))
    parser.add_argument("--instances", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rivals", nargs="+", help="only these, beside what they are compared with")
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(*json.loads(args.job))))
        return

    found: dict[str, Any] = {"machine": machine(), "seed": args.seed, "pairs": {}, "batch": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None))
    found["peak"] = alone("peak", "", [], 0, 0)
    rates = found["peak"].get("terms_per_second", {})
    said = [f"{rate / 1e9:.1f}e9/s {dtype}" for dtype, rate in rates.items()] or [found["peak"]["skipped"]]
    print("measured peak, |a - b| summed in registers:", ", ".join(said))
    x, k, y = args.pairs
    tables = {
        "pairs": (f"pairs, X={x} K={k} Y={y}: terms |a - b|", PAIRS, args.pairs, "scipy cdist"),
        "batch": (f"batch, {args.instances} of 4x4x8: instances", BATCH, [args.instances], "numpy batched"),
    }
    for task, (title, rivals, sizes, base) in tables.items():
        print(f"\n{title} (seed {args.seed}, {args.repeats} repeats, load {os.getloadavg()[0]:.1f})")
        head = (
            "",
            "first s",
            "min s",
            "median s",
            "CPU s",
            "per second",
            f"x {base}",
            "x by CPU s",
            "of peak",
            "peak MiB",
        )
        print(f"{head[0]:24s}" + "".join(f"{cell:>14s}" for cell in head[1:]))
        for name in rivals:
            if args.rivals and name not in (base, *args.rivals):
                continue
            row = found[task][name] = alone(task, name, sizes, args.repeats, args.seed)
            if "skipped" in row:
                print(f"{name:24s} {row['skipped']}", flush=True)
                continue
            dtype = "float32" if "float32" in name else "float64"
            dense = task == "pairs" and "ρ_sft" not in name
            if base in found[task] and "cpu" in found[task][base]:
                compared = found[task][base]
                row["times_cpu"] = compared["cpu"] / compared["work"] / (row["cpu"] / row["work"])
            row["of_peak"] = row["per_second"] / rates[dtype] if dense and rates else None
            row["times"] = (
                row["per_second"] / found[task][base]["per_second"]
                if base in found[task] and ("per_second" in found[task][base])
                else None
            )
            agree = 1e-4 if dtype == "float32" else 1e-10
            if (dense or task == "batch") and "check" in found[task][base]:
                row["agrees"] = bool(np.allclose(row["check"], found[task][base]["check"], agree, agree))
            cells = (
                f"{row['first']:.3f}",
                f"{row['min']:.3f}",
                f"{row['median']:.3f}",
                f"{row['cpu']:.3f}",
                f"{row['per_second']:.3g}",
                "" if row["times"] is None else f"{row['times']:.2f}",
                f"{row['times_cpu']:.2f}" if "times_cpu" in row else "",
                "" if row["of_peak"] is None else f"{100 * row['of_peak']:.0f}%",
                f"{row['peak_mib']:.0f}",
            )
            note = "" if row.get("agrees", True) else f"  differs from {base}"
            print(f"{name:24s}" + "".join(f"{cell:>14s}" for cell in cells) + note, flush=True)
    loop, ours = found["batch"].get("numpy loop", {}), found["batch"].get("alignpro", {})
    if "per_second" in loop and "per_second" in ours:
        print(f"\nalignpro / numpy loop: {ours['per_second'] / loop['per_second']:.0f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main()
