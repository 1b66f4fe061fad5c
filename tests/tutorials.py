"""Runs the scripts of docs/tutorials as notebooks; compares what they print with what their pages show."""

import ast
import asyncio
import contextlib
import importlib.util
import io
import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
_SPEC = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
NOTEBOOKS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(NOTEBOOKS)


def page_of(name: str) -> str:
    """The page of a tutorial, which includes its script and links to its notebook."""
    page = (DOCS / "tutorials" / f"{name}.md").read_text()
    assert f"{{literalinclude}} {name}.py" in page
    assert f"<{name}.ipynb>" in page
    return page


def played(name: str, changed: Mapping[str, str] | None = None) -> str:
    """What a tutorial prints, run cell by cell in one namespace below a running event loop, as Jupyter does.

    Args:
        changed: texts of the script, and what is run in their place.
    """
    script = DOCS / "tutorials" / f"{name}.py"
    text = script.read_text()
    assert len(text.splitlines()) < 60
    code = [cell["source"] for cell in NOTEBOOKS.notebook(script, script.with_suffix(".md"))["cells"][1:]]
    assert ast.dump(ast.parse("\n".join(code))) == ast.dump(ast.Module(ast.parse(text).body[1:], []))
    for old, new in (changed or {}).items():
        assert old in text, old
        code = [cell.replace(old, new) for cell in code]

    async def notebook():
        names: dict[str, object] = {"__name__": "__main__"}
        for number, cell in enumerate(code, 1):
            exec(compile(cell, f"{script.name}, cell {number}", "exec"), names)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        asyncio.run(notebook())
    return printed.getvalue()


def blocks(page: str) -> list[str]:
    """What a page shows of the output."""
    return re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def skeleton(text: str) -> list[str]:
    """Lines without what may differ between machines: numbers and spaces."""
    text = re.sub(r"[-+]*\d[\d.,e+-]*", "#", text)
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def shows(page: str, printed: str) -> None:
    """Assert that the page shows what was printed; a line "…" stands for lines left out."""
    (shown,) = blocks(page)
    rest = skeleton(printed)
    for part in shown.split("\n…\n"):
        wanted = skeleton(part)
        places = [i for i in range(len(rest)) if rest[i : i + len(wanted)] == wanted]
        assert places, f"not printed in this order: {wanted}\nbut: {rest}"
        rest = rest[places[0] + len(wanted) :]


def rows(text: str) -> list[str]:
    """Names of the rows of printed tables: what stands before two spaces and a number."""
    return re.findall(r"^ *(\S+(?: \S+)*?) {2,}\S* *-?\d", text, re.MULTILINE)


def shows_rows(page: str, printed: str) -> None:
    """Assert that the page's tables are those that were printed, whatever the numbers and verdicts."""
    shown = [row for block in blocks(page) for row in rows(block)]
    rest = iter(rows(printed))
    assert shown
    for row in shown:
        assert row in rest, f"not printed in this order: {row}"
