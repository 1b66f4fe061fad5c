"""Where things live: imports run one way, nobody reaches into another's room, docstrings stand alone."""

import ast
import functools
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"ground"},
    {"rollouts"},
    {"theory", "estimation", "report"},
    {"llm", "llm.models"},
    {"llm.policies", "llm.data"},
    {"llm.targets"},
    {"llm.rewards"},
    {"llm.training"},
    {"llm.arms"},
    {"commands"},
)
"""From the ground up: a room imports from the floors below it alone."""
ONLY = {"report": {"ground"}}
"""Rooms that import from fewer floors than they stand on."""
GROUND = {
    "",
    "calls",
    "errors",
    "files",
    "locks",
    "runs",
    "claims",
    "moved",
    "shown",
    "strategies",
    "terminal",
    "typed",
}
DOORS = {"__main__", "cli", "testing", "winrate"}
"""Entrances and old paths, which pass on what is elsewhere."""
TORCH = {"torch", "transformers", "trl", "peft", "accelerate"}
BARRED = {"theory": TORCH} | dict.fromkeys(("estimation", "rollouts", "report"), TORCH | {"jax"})
LONGEST = 450


def modules(root: Path = ROOT) -> dict[str, str]:
    """The sources of the package by dotted name below it."""
    found = {}
    for path in (root / "alignpro").rglob("*.py"):
        parts = path.relative_to(root / "alignpro").with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def is_old_path(source: str) -> bool:
    return "__getattr__ = moved(" in source and len(source.splitlines()) < 9


def room(name: str) -> str:
    parts = name.split(".")
    if name in GROUND:
        return "ground"
    return ".".join(parts[:2]) if parts[0] == "llm" else parts[0]


@functools.cache
def _imports(source: str) -> list[tuple[str, str]]:
    pairs = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            pairs += [(str(node.module), alias.name) for alias in node.names]
    return pairs


def imported(source: str, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Modules of the package that a source imports, inside functions too, and the name taken from each."""
    for module, name in _imports(source):
        if module == "alignpro" or module.startswith("alignpro."):
            inner = module.removeprefix("alignpro").lstrip(".")
            whole = f"{inner}.{name}".lstrip(".")
            yield (whole, "") if name and whole in known else (inner, name)


def trespasses(known: Mapping[str, str]) -> list[str]:
    """Each import that runs upwards or sideways, or takes another room's private name."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    found = []
    for name, source in known.items():
        if name in DOORS or is_old_path(source):
            continue
        here = room(name)
        if here not in floor:
            found.append(f"{name}: is in no room")
            continue
        for target, what in imported(source, known):
            there = room(target)
            below = floor.get(there, 99) < floor[here] and there in ONLY.get(here, floor)
            if there != here and not below:
                found.append(f"{name} -> {target}")
            folder = name.rpartition(".")[0] if "." in name else name
            if what.startswith("_") and not what.startswith("__") and target.rpartition(".")[0] != folder:
                found.append(f"{name} takes {target}.{what}")
    return found


def circles(known: Mapping[str, str]) -> list[str]:
    """Modules that reach themselves through what they import."""
    arrows = {name: {t for t, _ in imported(source, known) if t != name} for name, source in known.items()}
    # What an `__init__` passes on is not what its folder's modules stand on.
    packages = {name for name in known if any(other.startswith(f"{name}.") for other in known)}
    done: set[str] = set()
    found: list[str] = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append(" -> ".join((*path[path.index(name) :], name)))
        elif name not in done:
            for target in sorted(arrows.get(name, set()) - packages):
                visit(target, (*path, name))
            done.add(name)

    for name in known:
        visit(name, ())
    return found


def barred(known: Mapping[str, str]) -> list[str]:
    """Libraries that a room imports and must do without."""
    return [
        f"{name} imports {module}"
        for name, source in known.items()
        for module, _ in _imports(source)
        if module.split(".")[0] in BARRED.get(room(name), set())
    ]


def too_long(known: Mapping[str, str]) -> dict[str, int]:
    lines = {name: len(source.splitlines()) for name, source in known.items()}
    return {name: n for name, n in lines.items() if n > LONGEST}


LEANS = re.compile(r"…|\.\.\.|(Likewise|Ditto|The same|As|Of|What|Where|Those of|That of|So)\b")
"""Openings of a docstring that leans on its neighbour or leaves out its noun."""


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes, functions, fields and constants, with their lines."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value.value
                if isinstance(value, str):
                    yield statement.lineno, value


def leaning(known: Mapping[str, str]) -> list[str]:
    return [
        f"{name}:{line}: {text.strip().splitlines()[0]}"
        for name, source in known.items()
        for line, text in docstrings(source)
        if LEANS.match(text.strip())
    ]


def test_imports_run_one_way():
    known = modules()
    assert not trespasses(known)
    for name, line in (
        ("theory.gibbs", "from alignpro.estimation import samples"),
        ("report.page", "def f():\n    from alignpro.rollouts import read"),
        ("llm.models.load", "from alignpro.llm.policies.prompter import Prompter"),
        ("llm.arms.rollout", "from alignpro.llm.models.load import _load"),
        ("files", "from alignpro import rollouts"),
        ("estimation.terms", "from alignpro.commands import main"),
    ):
        assert len(trespasses(known | {name: line})) == 1, line


def test_no_module_reaches_itself():
    known = modules()
    assert not circles(known)
    assert circles(known | {"theory.divergences": "def f():\n    from alignpro.theory.gibbs import tilt"})


@pytest.mark.parametrize("part", BARRED)
def test_rooms_without_heavy_libraries(part):
    known = modules()
    assert not barred(known)
    inside = next(name for name in known if room(name) == part)
    for mutant in ("import torch.nn", "def f():\n    from transformers import AutoModel"):
        assert barred(known | {inside: mutant}) == [f"{inside} imports {_imports(mutant)[0][0]}"]


def test_no_file_is_too_long():
    known = modules()
    assert not too_long(known)
    assert too_long(known | {"errors": "\n" * (LONGEST + 1)}) == {"errors": LONGEST + 1}


def plan(known: Mapping[str, str]) -> str:
    """The folders of the package with their modules, as docs/architecture.md shows them."""
    folders: dict[str, list[str]] = {}
    for name, source in sorted(known.items()):
        if name and not is_old_path(source) and name not in DOORS:
            folder, _, module = name.rpartition(".")
            if any(other.startswith(f"{name}.") for other in known):
                folders.setdefault(name, [])
            else:
                folders.setdefault(folder, []).append(module)
    lines = []
    for folder, names in folders.items():
        head = f"{folder.replace('.', '/')}/" if folder else "(top)"
        lines += textwrap.wrap(
            f"{head:<20} {' '.join(names)}", 110, subsequent_indent=" " * 21, break_on_hyphens=False
        )
    return "\n".join(lines) + "\n"


def test_tests_have_names_of_their_own():
    """Two files of one name in different folders are one module to pytest, which then reads neither."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)


def test_the_architecture_page_names_every_module():
    known = modules()
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert plan(known) in page, f"docs/architecture.md should show\n{plan(known)}"
    assert plan(known | {"report.paint": ""}) not in page


def test_docstrings_stand_alone():
    known = modules()
    assert not leaning(known)
    for opening in (
        "… of the KL.",
        "Likewise; below 1 moves the optimum.",
        "Of a rewrite.",
        "What is hunted.",
    ):
        mutant = f'class A:\n    x: int = 0\n    """{opening}"""\n'
        assert leaning({"errors": mutant}) == [f"errors:3: {opening}"]
    assert not leaning({"errors": '"""Often used. Ascent of a statement."""'})


def test_experiments_and_benchmarks_do_not_import_tests():
    places = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    for path in [*(ROOT / "experiments").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        taken = {module.split(".")[0] for module, _ in _imports(path.read_text())}
        assert not taken & places, path
        assert '/ "tests"' not in path.read_text(), path


def test_the_command_line_starts_light():
    """Options and help wait for none of the libraries that do the work."""
    heavy = ("numpy", "scipy", "jax", "torch", "transformers", "matplotlib", "pandas")
    code = "import sys, alignpro.commands.main as main; list(main.VERBS.values()); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "[]"
