"""A mutation score: how many small deliberate faults in a file make its tests fail.

    python benchmarks/mutation.py                          # every target, 12 faults each
    python benchmarks/mutation.py estimation --faults 40   # one target, more of them

A fault swaps a comparison or an operation, moves a constant, drops a `not`, or takes a maximum for a
minimum. Faults are drawn by the seed; each runs the target's tests in a process and a copy of the tree of its
own, until one fails. What no test notices is printed with its line: an equivalent change, or a test to write.
Not part of the test suite.
"""

import argparse
import ast
import contextlib
import copy
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TARGETS = {
    "statements": (
        (
            "theory/bounds.py",
            "theory/two_points.py",
            *(f"theory/statements/{n}.py" for n in ("statement", "upper", "lower", "lemmas")),
        ),
        tuple(f"tests/theory/test_{n}.py" for n in ("bounds", "certify", "two_points", "laws")),
    ),
    "results": (("theory/results/reach.py", "theory/results/readings.py"), ("tests/theory/test_limits.py",)),
    "estimation": (
        (
            "estimation/samples.py",
            "estimation/paired.py",
            "estimation/terms.py",
            "estimation/intervals.py",
            "estimation/statements.py",
            "estimation/estimate.py",
            "estimation/headroom.py",
            "estimation/pooled.py",
            "estimation/components.py",
            "estimation/compare.py",
            "estimation/winrate.py",
        ),
        ("tests/estimation",),
    ),
    "ppo": (("llm/training/ppo.py",), ("tests/llm/test_ppo.py", "tests/llm/test_tree_train.py")),
    "rewards": (
        tuple(
            f"llm/rewards/{name}.py"
            for name in ("reward", "bounds", "accuracy", "bradley_terry", "features", "minilm")
        ),
        # Without the tests of the packaged head: with a fault in its code it would be trained anew.
        (
            "tests/llm/test_rewards.py",
            "tests/llm/test_reward_models.py",
            "--deselect=tests/llm/test_rewards.py::TestTrainedReward",
        ),
    ),
}
"""By name: files below alignpro/, and the tests that should notice."""
SECONDS = 900
"""A fault that makes its tests run longer counts as noticed."""

_PAIRS = (
    (ast.Lt, ast.LtE),
    (ast.Gt, ast.GtE),
    (ast.Eq, ast.NotEq),
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.And, ast.Or),
)
SWAPS: dict[type, type] = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
NAMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "any": "all", "all": "any"}


def faults(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Each place of a source where a fault can be made, and its kind."""
    inside_annotation = {
        id(part)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if getattr(node, field, None) is not None
        for part in ast.walk(getattr(node, field))
    }
    for node in ast.walk(tree):
        if id(node) in inside_annotation:
            continue
        if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
            yield node, "operation"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
            yield node, "comparison"
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, "constant"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, "unary"
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in NAMES:
            yield node, "extreme"


def broken(source: str, number: int) -> tuple[str, int, str]:
    """The source with its fault of that number; the line, and what was done there."""
    tree = ast.parse(source)
    node, kind = list(faults(tree))[number]
    before = ast.unparse(node)
    changed = copy.copy(node)
    if kind == "operation":
        changed.op = SWAPS[type(node.op)]()
    elif kind == "comparison":
        changed.ops = [SWAPS[type(node.ops[0])]()]
    elif kind == "constant":
        changed.value = node.value + 1 if isinstance(node.value, int) else node.value * 2 + 0.5
    elif kind == "extreme":
        changed.func = copy.copy(node.func)
        slot = "attr" if isinstance(node.func, ast.Attribute) else "id"
        setattr(changed.func, slot, NAMES[getattr(node.func, slot)])
    elif kind == "unary":
        changed = node.operand
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, field, changed)
            elif isinstance(value, list) and any(item is node for item in value):
                value[:] = [changed if item is node else item for item in value]
    return ast.unparse(ast.fix_missing_locations(tree)), node.lineno, f"{before}  ->  {ast.unparse(changed)}"


def noticed(tree: Path, tests: tuple[str, ...]) -> bool:
    """Whether the tests fail in that copy of the tree, in a fork that has the heavy libraries loaded."""
    child = os.fork()
    if child == 0:
        os.chdir(tree)
        os.setsid()
        sys.path[:0] = [str(tree), str(tree / "experiments")]
        os.environ["PYTHONPATH"] = str(tree)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        import pytest

        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) != 0))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; left out: all")
    parser.add_argument("--faults", type=int, default=12, help="how many of each target")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(TARGETS)}")
    sys.dont_write_bytecode = True
    import hypothesis  # noqa: F401 - loaded once, shared by the forks
    import numpy  # noqa: F401
    import scipy.stats  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="alignpro-mutation-") as scratch:
        tree = Path(scratch) / "tree"
        for part in ("alignpro", "tests", "experiments", "docs"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md", "Makefile", "CHANGELOG.md"):
            shutil.copy(ROOT / part, tree / part)
        for name in args.targets or TARGETS:
            files, tests = TARGETS[name]
            if noticed(tree, tests):
                print(f"{name}: its tests fail without any fault; mend them first")
                continue
            sources = {file: (tree / "alignpro" / file).read_text() for file in files}
            every = [(f, i) for f, s in sources.items() for i, _ in enumerate(faults(ast.parse(s)))]
            drawn = random.Random(args.seed).sample(every, min(args.faults, len(every)))
            survived = []
            for file, number in tqdm(sorted(drawn), desc=name, unit="fault"):
                source, line, said = broken(sources[file], number)
                (tree / "alignpro" / file).write_text(source)
                if not noticed(tree, tests):
                    survived.append(f"  {file}:{line}: {said}")
                (tree / "alignpro" / file).write_text(sources[file])
            killed = len(drawn) - len(survived)
            print(f"{name}: {killed} of {len(drawn)} faults noticed, of {len(every)} possible", flush=True)
            print("\n".join(survived), flush=True)


if __name__ == "__main__":
    main()
