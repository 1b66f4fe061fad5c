"""Numbers are ASCII where they are made, set in type where they are shown; colours stand in the theme."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from alignpro.report import numbers, theme
from alignpro.report.text import typographic

REPORT = Path(theme.__file__).parent
INSTANCE = {"value": -0.5, "lo": float("-inf"), "hi": float("inf")}


@pytest.mark.parametrize(
    ("ascii_", "set_"),
    [
        (numbers.interval(INSTANCE), "−0.5 [−∞, ∞]"),
        (numbers.number(None), "–"),
        (numbers.interval({"value": float("nan"), "lo": None, "hi": None}), "–"),
        (numbers.number(-1.5e-7), "−1.5e−07"),
        ("0.1 [-, -]", "0.1 [–, –]"),
        ("gap -0.1 at λ=-2, (-.5)", "gap −0.1 at λ=−2, (−.5)"),
        ("smollm2-135m, 2026-11-29, 3-5, seed-0, trained - none", None),
        ("information, inference, runs/inf.npz", None),
    ],
)
def test_numbers_are_set_in_type_and_words_are_not(ascii_, set_):
    assert typographic(ascii_) == (ascii_ if set_ is None else set_)


def test_every_colour_stands_in_the_theme():
    colour = re.compile(r"#[0-9A-Fa-f]{6}\b|#[0-9A-Fa-f]{3}\b")
    for path in [*REPORT.rglob("*"), *(REPORT.parent / "commands").glob("*.py")]:
        if path.suffix in (".py", ".html", ".j2") and path.name != "theme.py":
            assert not colour.findall(path.read_text(encoding="utf-8")), path
    for name in ("page.html.j2", "explore.html"):
        assert f"--accent: {theme.BLUE.lower()}" in theme.template(name)
        assert "/* theme */" not in theme.template(name)
    assert f'GREEN = "{theme.GREEN}"' in theme.template("explore.html")


def test_importing_it_loads_neither_torch_nor_jax():
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    check = "import alignpro.report.render, sys; "
    check += "assert not {'torch', 'jax', 'matplotlib.pyplot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
