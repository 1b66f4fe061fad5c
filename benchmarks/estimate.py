"""How long 100,000 rollouts take to read and estimate, and in how much memory, in a process of their own.

    python benchmarks/estimate.py [--prompts 500] [--json result.json]

Every prompt has 40 answers of its own, 16 rewrites of the reference and of a trained prompter with 5 answers
each, with texts of realistic length. The file is written first, and does not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from theory import machine

CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from alignpro.estimation import compare, estimate, headroom
from alignpro.rollouts import read
seconds = {"import": time.perf_counter() - start}
def timed(name, function, *arguments):
    since = time.perf_counter()
    result = function(*arguments)
    seconds[name] = time.perf_counter() - since
    return result
rollouts = timed("read", read, sys.argv[1])
report = timed("estimate", estimate, rollouts, 0.2, 0.2)
seconds["read and estimate, all told"] = time.perf_counter() - start
timed("headroom", headroom, rollouts)
timed("compare", compare, rollouts, ["none", "sft", "trained"])
seconds["CPU, all told"] = time.process_time()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"rollouts": len(rollouts), "seconds": seconds, "peak_gib": peak,
                  "verdicts": {b.name: b.verdict for b in report.bounds}}))
"""


def write(path: Path, prompts: int) -> None:
    from dataclasses import replace

    from alignpro.estimation.simulate import Size, simulated_rows
    from alignpro.theory import FAMILIES, Instance

    rng = np.random.default_rng(0)
    batch = FAMILIES["lm_like"](rng, 1, (40, 12, 40))
    arrays = [np.asarray(getattr(batch, key))[0] for key in ("p", "prior", "frozen", "own", "reward")]
    instance = Instance(*arrays)
    trained = {"trained": np.asarray(instance.prior)}
    rows = simulated_rows(instance, rng, Size(prompts, 40, 16, 5), prompters=trained)
    with open(path, "w") as file:
        for row in rows:
            file.write(replace(row, response=row.response + " and so on" * 50).line())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=500, help="with 200 rollouts each")
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.jsonl"
        write(path, options.prompts)
        size = path.stat().st_size / 2**20
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(path)], check=True, capture_output=True, text=True
        )
    result = {"machine": machine(), "file_mib": size, **json.loads(done.stdout)}
    for name, seconds in result["seconds"].items():
        print(f"{name:30} {seconds:6.2f} s")
    print(f"{result['rollouts']} rollouts, {size:.0f} MiB of JSON, peak {result['peak_gib']:.2f} GiB")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
