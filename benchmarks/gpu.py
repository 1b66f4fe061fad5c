"""What a GPU makes of it, in eight minutes: tests, the theory's largest term, one step of PPO at real sizes.

    make gpu                                         # on a machine with a GPU; no network, no hub
    python benchmarks/gpu.py --out build/gpu         # the same: gpu.json and gpu.md in that folder
    python benchmarks/gpu.py --tiny                  # on any machine: tries this script on small models

It needs torch, transformers, peft, trl and JAX, and runs from a checkout without installation. Weights are
drawn at random from the models' own configurations (experiments/paper_grid/rehearse.py), so texts are
nonsense of full length. Three parts, in processes of their own; what the time does not suffice for is left
out and said.

- `step`: one PPO step of Qwen2.5-1.5B before Qwen2.5-7B and of Phi-3.5-mini before Llama-3.1-8B, both with a
  reward of RM-Gemma-2B's size, in bfloat16: tokens a second by phase, the share of time inside the models'
  forward and backward passes, peak memory; and the same step by transformers' `generate`, padded batches and
  backward, as a rival (benchmarks/llm.py has both).
- `theory`: E TV(π_F(·|x), π_F(·|x′)) at X = K = Y = 4096 in float32 and float64, beside torch.cdist; and the
  card's peak of that operation, |a − b| summed in registers, measured by unrolled sums that hardly read.
- `tests`: pytest -m gpu.

Goals: a step's tokens a second at least 0.7 of the rival's; the theory at least half of the measured peak.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

PAIRS = {
    "Qwen2.5-1.5B → 7B": ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    "Phi-3.5 → Llama-3.1-8B": ("microsoft/Phi-3.5-mini-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
}
REWARD = "weqweasdas/RM-Gemma-2B"
RIVALS = ("alignpro ppo", "plain transformers")
LIMIT_S = 460.0
"""Seconds for everything: a part that has none left is not done."""


# --- one step ---


def step(pair: str, rival: str, tiny: bool) -> dict[str, Any]:
    """One rival's step of one pair of models, the better of two after one that is not counted."""
    import llm
    import numpy as np
    import torch
    from paper_grid import rehearse

    from alignpro.llm.models import catalogue
    from alignpro.llm.policies.prompter import Prompter
    from alignpro.llm.rewards.classifier import SequenceReward
    from alignpro.llm.targets.local import LocalTarget

    os.environ[catalogue.REHEARSAL] = "1"
    parser = argparse.ArgumentParser()
    llm.add_arguments(parser)
    sizes = "--prompts 2 --samples 4 --rewrite-tokens 4 --answer-tokens 6 --microbatches 2 --lora-layers 1"
    if not tiny:
        sizes = (
            "--prompts 8 --samples 8 --rewrite-tokens 64 --answer-tokens 128 --microbatches 4 --lora-layers 1"
        )
    args = parser.parse_args(sizes.split())
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 2)) for _ in range(60 * args.prompts)]
    prompts = [" ".join(words[60 * i : 60 * (i + 1)]) for i in range(args.prompts)]
    with tempfile.TemporaryDirectory() as folder:
        names = (*PAIRS[pair], REWARD)
        scale = "tiny" if tiny else "real"
        paths = [
            rehearse.write_model(rehearse.CONFIGS[n], Path(folder) / str(i), scale)
            for i, n in enumerate(names)
        ]
        dtype = "float32" if tiny else "bfloat16"
        start = time.perf_counter()
        made = llm.Parts(
            Prompter.from_pretrained(paths[0], template="rewrite", dtype=dtype),
            LocalTarget(paths[1], dtype=dtype, batch_size=args.prompts * args.samples),
            SequenceReward.load(paths[2], "clip:-20,20", dtype=dtype, batch_size=args.prompts * args.samples),
            prompts,
        )
        loading = time.perf_counter() - start
        row = llm.measured(rival, args, made)
    return {
        **row,
        "by_phase": {
            phase: row["tokens"][kind] / row["phases"][phase]
            for kind, phase in (("rewrites", "prompter generation"), ("answers", "frozen generation"))
        },
        "loading_seconds": loading,
        "sizes": vars(args),
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


# --- the theory ---


def _timed(run: Any, repeats: int) -> float:
    """Seconds, the least; compilation and the first run are not counted."""
    run()
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        walls.append(time.perf_counter() - start)
    return min(walls)


def peak(dtype: str, size: int) -> float:
    """Terms |a − b| summed a second, all in registers: `size` numbers, 128 terms each, one fused kernel."""
    import jax
    import numpy as np

    import alignpro.theory  # noqa: F401  (64-bit floats)

    others = np.random.default_rng(0).uniform(size=128).astype(dtype)

    @jax.jit
    def sums(a: Any) -> Any:
        totals = [0.0 * a for _ in range(4)]  # four side by side wait for nothing but their own last term
        for i, b in enumerate(others):
            totals[i % 4] = totals[i % 4] + jax.numpy.abs(a - b)
        return sum(totals)

    a = jax.device_put(np.random.default_rng(1).uniform(size=size).astype(dtype))
    return 128 * size / _timed(lambda: sums(a).block_until_ready(), 5)


def theory(dtype: str, tiny: bool) -> dict[str, Any]:
    """Terms |a − b| a second: ours with all transfers, its kernel alone, torch, and the peak."""
    import jax
    import numpy as np
    import torch
    from theory import pair_data

    from alignpro.theory.instance import unchecked
    from alignpro.theory.pairwise import expected_tv
    from alignpro.theory.scale.routes import prompt_shift

    n = 256 if tiny else 4096
    frozen, own, prior = (a.astype(dtype) if a.dtype == np.float64 else a for a in pair_data(n, n, n, seed=0))
    instance = unchecked(None, prior, frozen, own, None)
    devices = jax.devices()
    arrays, kernel = jax.device_put((frozen, own, prior)), jax.jit(expected_tv)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    f, w, o = (torch.from_numpy(a).to(where) for a in (frozen, prior, own))

    def with_torch() -> np.ndarray:
        return (0.5 * (w * torch.cdist(f[o], f, p=1)).sum(-1)).cpu().numpy()

    found = {}
    for name, run in {
        "alignpro": lambda: prompt_shift(instance, "dense", devices),
        "alignpro, on the device": lambda: kernel(*arrays).block_until_ready(),
        "torch.cdist": with_torch,
    }.items():
        found[name] = n**3 / _timed(run, 5)
    ours, theirs = prompt_shift(instance, "dense", devices), with_torch()
    return {
        "terms_per_second": found,
        "peak": peak(dtype, 2**16 if tiny else 2**24),
        "size": n,
        "largest_difference": float(np.max(np.abs(ours - theirs) / theirs)),
        "device": str(devices[0]),
    }


# --- everything ---


def alone(job: list[Any], seconds: float) -> dict[str, Any]:
    """One job in a process of its own, or why it has no result."""
    # JAX would take most of the card's memory, though torch is there too.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps(job)],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {seconds:.0f} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": said[-1][:300]}
    return {**json.loads(done.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - start}


def tests(seconds: float) -> dict[str, Any]:
    """The tests marked `gpu`: how many passed, failed and were skipped."""
    if importlib.util.find_spec("pytest") is None:
        return {"failed": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    command += ["-p", "no:cacheprovider", "--no-header", "-rfEs"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    told = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|skipped|errors?)\b.* in ", line)]
    return {"status": done.returncode, "said": (counts or [done.stderr[-300:]])[-1], "lines": told}


def everything(args: argparse.Namespace) -> dict[str, Any]:
    """All parts, as far as the time goes; each is written as soon as it is there."""
    from llm import machine

    begun = time.perf_counter()
    found: dict[str, Any] = {"machine": machine(), "tiny": args.tiny, "step": {}, "theory": {}}

    def left() -> float:
        return args.seconds - (time.perf_counter() - begun)

    def write() -> None:
        found["seconds"] = time.perf_counter() - begun
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        (args.out / "gpu.md").write_text(page(found))

    for pair in PAIRS:
        rows = found["step"][pair] = {}
        for rival in RIVALS:
            print(f"step, {pair}, {rival} ({left():.0f} s left)", flush=True)
            rows[rival] = alone(["step", pair, rival, args.tiny], max(1.0, left()))
            write()
    for dtype in ("float32", "float64"):
        print(f"theory, {dtype} ({left():.0f} s left)", flush=True)
        found["theory"][dtype] = alone(["theory", dtype, args.tiny], max(1.0, left()))
        write()
    print(f"tests ({left():.0f} s left)", flush=True)
    found["tests"] = tests(max(1.0, left()))
    write()
    return found


def _ratio(rows: dict[str, Any]) -> float | None:
    if any("failed" in rows.get(rival, {"failed": ""}) for rival in RIVALS):
        return None
    ours, plain = (rows[rival]["tokens_per_second"] for rival in RIVALS)
    return ours / plain


def page(found: dict[str, Any]) -> str:
    """The table."""
    facts = found["machine"]
    devices = {row.get("device") for rows in found["step"].values() for row in rows.values()} - {None}
    lines = [
        f"{', '.join(sorted(devices)) or 'no step was done'}; torch {facts['torch']}, jax {facts['jax']}, "
        f"alignpro {facts['alignpro']}; {facts['date']}; {found['seconds']:.0f} s in all; "
        + ("tiny models: these numbers mean nothing." if found["tiny"] else "one run, seed 0."),
        "",
        "| pair | | step, s | rewrites tok/s | answers tok/s | all tok/s | in models | peak GB | × rival |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair, rows in found["step"].items():
        for rival, row in rows.items():
            if "failed" in row:
                lines.append(f"| {pair} | {rival} | {row['failed']} | | | | | | |")
                continue
            ratio = _ratio(rows) if rival == RIVALS[0] else 1.0
            rates = row["by_phase"]
            lines.append(
                f"| {pair} | {rival} | {row['seconds']:.2f} | {rates['prompter generation']:.0f} "
                f"| {rates['frozen generation']:.0f} | {row['tokens_per_second']:.0f} "
                f"| {row['inside'] / row['seconds']:.0%} | {row['memory'] / 1e9:.1f} "
                f"| {'' if ratio is None else f'{ratio:.2f}'} |"
            )
    lines += ["", "| theory | | terms a second | of peak |", "|---|---|---|---|"]
    for dtype, row in found["theory"].items():
        if "failed" in row:
            lines.append(f"| {dtype} | {row['failed']} | | |")
            continue
        lines += [
            f"| {dtype}, X = K = Y = {row['size']} | {name} | {rate:.3g} | {rate / row['peak']:.0%} |"
            for name, rate in {**row["terms_per_second"], "peak": row["peak"]}.items()
        ]
    if "tests" in found:
        said = found["tests"]
        lines += ["", f"Tests marked `gpu`: {said.get('failed') or said['said']}"]
        lines += [f"- {line}" for line in said.get("lines", [])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "gpu", help="folder of gpu.json and gpu.md"
    )
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help="for everything")
    parser.add_argument("--tiny", action="store_true", help="small models, on any machine")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, *given = json.loads(args.job)
        print(json.dumps({"step": step, "theory": theory}[name](*given)))
        return 0
    if not args.tiny:
        import torch

        if not torch.cuda.is_available():
            print(
                "gpu.py: error: torch sees no CUDA device here; --tiny tries the script without one",
                file=sys.stderr,
            )
            return 2
    missing = [n for n in ("transformers", "peft", "trl", "jax") if importlib.util.find_spec(n) is None]
    if missing:
        print(f"gpu.py: error: {', '.join(missing)} is not installed; pip install '.[llm]'", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    found = everything(args)
    print((args.out / "gpu.md").read_text())
    failed = [row for rows in found["step"].values() for row in rows.values() if "failed" in row]
    failed += [row for row in found["theory"].values() if "failed" in row]
    return 1 if failed or found["tests"].get("status", 1) not in (0, 5) else 0


if __name__ == "__main__":
    sys.exit(main())
