"""How long one waits for small things: CPU seconds (user and system) of whole commands, start included.

    python benchmarks/felt.py                          # this checkout
    python benchmarks/felt.py --checkouts ../old .     # two in turn: other work on the machine hits both
    python benchmarks/felt.py --only solve hunt --repeats 3

The first run of each checkout finds nothing compiled (its cache is a new folder); the others find what the
first has kept. The least of these is reported beside the first.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

FILE = """
import sys
import numpy as np
from alignpro.theory.families import draw
draw("adversarial", 0, (3, 4, 5))[0].save(sys.argv[1])
"""
SHAPES = """
from alignpro.theory import solution
from alignpro.theory.families import draw
for shape in ((2, 3, 3), (3, 4, 5), (4, 4, 4), (5, 7, 6)):
    solution(draw("adversarial", 0, shape)[0], 0.3, 0.2)
"""


def commands(file: str) -> dict[str, list[str]]:
    verb = ["-m", "alignpro"]
    return {
        "import": ["-c", "import alignpro.theory"],
        "solve": [*verb, "solve", file, "--beta", "0.5", "--lam", "0.5"],
        "shapes": ["-c", SHAPES],
        "hunt": [*verb, "hunt", "q2"],
        "verify20000": [*verb, "verify", "--instances", "20000"],
        "verify": [*verb, "verify"],
    }


def cpu(arguments: list[str], checkout: str, cache: str) -> float:
    changes = {"PYTHONPATH": str(Path(checkout).resolve()), "ALIGNPRO_CACHE": cache}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Elsewhere: Python would take the code of the folder it starts in.
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | changes,
        cwd=Path(cache).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):  # 1: a statement is refuted
        raise SystemExit(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkouts", nargs="+", default=[str(Path(__file__).parents[1])])
    parser.add_argument("--only", nargs="+", help="names of the first column")
    parser.add_argument("--repeats", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "a.npz")
        caches = [str(Path(folder) / str(i)) for i in range(len(args.checkouts))]
        cpu(["-c", FILE, file], args.checkouts[0], str(Path(folder) / "other"))
        print(f"CPU seconds, load {os.getloadavg()[0]:.1f}")
        print(f"{'':14s}" + "".join(f"{name[-20:]:>22s}" for name in args.checkouts))
        for name, arguments in commands(file).items():
            if args.only and name not in args.only:
                continue
            times: list[list[float]] = [[] for _ in caches]
            for _ in range(args.repeats):
                for each, checkout, cache in zip(times, args.checkouts, caches, strict=True):
                    each.append(cpu(arguments, checkout, cache))
            cells = (f"first {each[0]:.2f}, then {min(each[1:] or each):.2f}" for each in times)
            print(f"{name:14s}" + "".join(f"{cell:>22s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
