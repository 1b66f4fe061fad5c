"""Whether what is released installs and works where nothing else is: by Python, in environments of their own.

    python benchmarks/release.py                               # the Pythons at hand, without language models
    python benchmarks/release.py --extras report,certify,native
    python benchmarks/release.py --python python3.13 --extras llm
    python benchmarks/release.py --python python3.13 --suite   # the sdist's tests, as `make test` has them

The wheel and the sdist are built from the files that git tracks at HEAD. Each Python has an environment made
for it, the wheel is installed with the constraints that `make` uses, and checks run in an empty folder. What
failed shows its output, a table at the end says what passed, and the exit status is 1 where anything failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
PROGRAM = """
import numpy as np
from alignpro import Instance, check
rng = np.random.default_rng(0)
p, prior, frozen = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.ones(5), 4)
instance = Instance(p, prior, frozen, [0, 1, 2], rng.uniform(size=(3, 5)))
found = check(instance, beta=0.3, lam=0.2, bound="theorem1")
assert found.verdict == "holds", found
print(found)
"""
CHECKS: dict[str, list[str]] = {
    "version": ["alignpro", "--version"],
    "verify": ["alignpro", "verify", "--bounds", "theorem1", "--instances", "1000"],
    "python": ["python", "-c", PROGRAM],
    "doctor": ["alignpro", "doctor"],
}
"""By name: what runs after every installation."""
MORE = {"llm": {"demo": ["alignpro", "demo", "--quick", "--out", "demo"]}}
"""By extra: what runs besides, where it is installed."""


def tracked(folder: Path) -> Path:
    """The files of HEAD alone, unpacked into `folder`."""
    archive = folder / "head.tar"
    subprocess.run(["git", "archive", "--output", str(archive), "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "head", filter="data")
    return folder / "head"


def built(source: Path, out: Path) -> tuple[Path, Path]:
    """The wheel and the sdist."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(out)], cwd=source, check=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


class Environment:
    """A new virtual environment, and what passed in it."""

    def __init__(self, python: str, home: Path):
        self.python, self.home, self.results = python, home, {}
        self.home.mkdir(parents=True)
        self.run("create", [python, "-m", "venv", str(home / "venv")], ROOT)

    def run(self, name: str, command: list[str], folder: Path) -> bool:
        """Run `command` with this environment first on the path; nothing of the caller's Python is seen."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "VIRTUAL_ENV"}
        kept["PATH"] = os.pathsep.join([str(self.home / "venv" / "bin"), kept["PATH"]])
        found = shutil.which(command[0], path=kept["PATH"]) or command[0]
        started = time.monotonic()
        done = subprocess.run(
            [found, *command[1:]],
            cwd=folder,
            env=kept,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.results[name] = (done.returncode == 0, time.monotonic() - started)
        print(f"{self.python}, {name}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode:
            print(done.stdout[-4000:], flush=True)
        return done.returncode == 0

    def installed(self, *what: str) -> bool:
        """Install what a user's pip would, and the torch of `make`."""
        torch = str(ROOT / "requirements" / "torch.txt")
        pip = ["python", "-m", "pip", "install", "--quiet", "--constraint", torch]
        return self.run("install", [*pip, *what], ROOT)

    @property
    def passed(self) -> bool:
        return all(good for good, _ in self.results.values())


def one(python: str, home: Path, wheel: Path, sdist: Path, args: argparse.Namespace) -> Environment:
    """Everything for one Python."""
    here = Environment(python, home)
    if args.suite:
        with tarfile.open(sdist) as opened:
            opened.extractall(home, filter="data")
        (source,) = home.glob("alignpro-*")
        if here.passed and here.installed("torch") and here.installed(f"{source}[dev]"):
            here.run("suite", ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile"], source)
        return here
    what = f"{wheel}[{args.extras}]" if args.extras else str(wheel)
    if not (here.passed and here.installed(what)):
        return here
    empty = home / "empty"
    empty.mkdir()
    checks = CHECKS.copy()
    for extra in args.extras.split(","):
        checks |= MORE.get(extra, {})
    for name, command in checks.items():
        here.run(name, command, empty)
    return here


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="*", default=[p for p in PYTHONS if usable(p)], help="commands")
    parser.add_argument("--extras", default="", help="with commas: report,llm")
    parser.add_argument("--suite", action="store_true", help="run the sdist's tests in place of the checks")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="alignpro-release-") as folder:
        home = Path(folder)
        wheel, sdist = built(tracked(home), home / "dist")
        done = [one(python, home / str(i), wheel, sdist, args) for i, python in enumerate(args.python)]
    print(f"\n{wheel.name}{f' [{args.extras}]' if args.extras else ''}")
    for here in done:
        steps = ", ".join(
            f"{name} {'✓' if good else '✗'} {took:.0f} s" for name, (good, took) in here.results.items()
        )
        print(f"{here.python}: {steps}")
    return 0 if done and all(here.passed for here in done) else 1


def usable(python: str) -> bool:
    """Whether the command starts: a shim may name a Python that is not there."""
    found = shutil.which(python)
    return bool(found) and subprocess.run([found, "--version"], capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
