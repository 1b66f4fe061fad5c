"""Formulas of the documents are typeset, numbered as in the paper, written one way, and found by name."""

import re
import sys
from html import unescape
from pathlib import Path

import pytest
from mutants import kills, mutated

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$", re.DOTALL)


@pytest.fixture(scope="module")
def formulas():
    """The site's own extension, which needs docutils and Sphinx."""
    pytest.importorskip("sphinx", reason="pip install 'alignpro[docs]'")
    sys.path.insert(0, str(DOCS))
    try:
        import formulas
    finally:
        sys.path.remove(str(DOCS))
    return formulas


def prose(page: Path) -> str:
    return re.sub(r"^(```+).*?^\1$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def read(pieces: list[str]) -> str:
    """A formula without its layout."""
    return unescape(re.sub(r"<[^>]+>", "", "".join(pieces)))


def test_formulas_are_written_for_github_too(formulas):
    """Those of a line are typeset as the site is built, in tests/test_docs.py."""

    def check(block: str, line: str) -> None:
        assert all("</math>" in piece for piece in formulas.mathml(block, True)) or not block
        assert "\n" not in line, line  # GitHub's would be cut
        # A bar is a table's, a star is emphasis, and GitHub takes a backslash before a sign away.
        assert not re.search(r"(?<!\\)[|*]|\\[,;:!{}|]", line), line

    found = 0
    for page in PAGES:
        text = prose(page)
        for block, line in FORMULA.findall(text):
            found += 1
            check(block, line)
        assert "$" not in FORMULA.sub("", text), page
    assert found > 1500
    for wrong in (r"\rho^*", "a|b", r"\{a\}"):
        kills(lambda line: check("", line), wrong)


def test_one_notation():
    """ρ_sft is never ρsft, in pages and docstrings; π_F is never πF."""

    def check(text: str) -> None:
        assert not re.search(r"ρsft|rhosft|πF|\\rho_\{?sft|\\pi_\{F\}|\\rho\^\*|\\rho\^\{\\star\}", text)

    root = DOCS.parent
    for path in (
        *PAGES,
        *root.glob("*.md"),
        *(root / "alignpro").rglob("*.py"),
        *(root / "experiments").glob("*.md"),
    ):
        check(path.read_text())
    kills(check, "E_ρsft R")


def test_the_papers_numbers_are_in_order():
    numbers = re.findall(r"\\tag\{(\d+)\}", (DOCS / "theory.md").read_text())
    assert numbers == [str(n) for n in range(1, 12)]
    linked = {n for page in PAGES for n in re.findall(r"theory\.md#equation-(\w+)", page.read_text())}
    assert linked
    assert linked <= set(numbers)


def test_lines_break_inside_a_formula(formulas):
    """No piece begins with a sign, and none is lost."""

    def check(module) -> None:
        pieces = module.mathml(
            r"F(\rho) = \mathbb E_\rho R - \lambda \mathrm{KL}(\rho_\theta - 1\Vert q), b", False
        )
        assert [read([piece]) for piece in pieces] == ["F(ρ)=𝔼ρR", "−λKL(ρθ−1‖q),", "b"]
        assert '<mo form="infix">−' in pieces[1]
        tex = r"f(\alpha + \beta + \gamma + \delta + \log(1 - \alpha) - \log(2 + \beta))"
        within = module.mathml(tex, False)
        assert max(len(read([piece])) for piece in within) < 24  # a long one breaks within brackets, too

    check(formulas)
    kills(check, mutated(formulas, 'child.set("form", "infix")', "pass"))
    kills(check, mutated(formulas, "(6 if depth == 0 else 16)", "6"))


def test_greek_is_found_by_name(formulas):
    def check(words) -> None:
        assert {"ρ_sft", "rho_sft", "rho", "sft"} <= set(words("E_x ρ_sft"))
        assert {"lambda", "λ"} <= set(words("λ KL"))
        assert {"beta", "pi", "pi_F", "epsilon"} <= set(words("β log π_F, ε₁ and r̂"))
        assert words("plain words") == ["plain", "words"]
        assert "mathrm" not in words(r"\rho_{\mathrm{sft}}")
        assert {"rho", "ρ"} <= set(words(r"\rho_{\mathrm{sft}}"))

    check(formulas.words)
    kills(check, mutated(formulas, ".replace('lamda', 'lambda')", "").words)
    kills(check, formulas.SearchEnglish({}).split)
