"""Each tutorial's script as a Jupyter notebook, made while the site is built."""

import ast
import json
import re
from pathlib import Path
from typing import Any


def cells(script: str) -> list[str]:
    """The script's code after its docstring, divided where blank lines stand between statements."""
    code = script.removeprefix(ast.get_source_segment(script, ast.parse(script).body[0]) or "")
    found: list[str] = []
    for part in re.split(r"\n\n+(?=\S)", code.strip("\n")):
        if found and _imports(found[-1]) and _imports(part):
            found[-1] += f"\n\n{part}"
        else:
            found.append(part)
    return found


def _imports(code: str) -> bool:
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body)


def notebook(script: Path, page: Path) -> dict[str, Any]:
    """The notebook (format 4.5) of a tutorial: what it is about, then its code, without outputs."""
    text = script.read_text(encoding="utf-8")
    (title,) = re.findall(r"^# (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    install = re.search(r"pip\s+install '(\.\[[a-z,]+\])'", page.read_text(encoding="utf-8"))
    about = f"# {title}\n\n{ast.get_docstring(ast.parse(text))}"
    if install:
        about += f"\n\nIn a checkout of alignpro: `pip install '{install[1]}' jupyterlab`."
    made: list[dict[str, Any]] = [{"cell_type": "markdown", "source": about}]
    made += [
        {"cell_type": "code", "source": cell, "outputs": [], "execution_count": None} for cell in cells(text)
    ]
    for number, cell in enumerate(made):
        cell |= {"id": f"{script.stem}-{number}".replace("_", "-"), "metadata": {}}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def write(app: Any, config: Any) -> None:
    """Write a notebook beside each tutorial; git ignores them."""
    for script in Path(app.srcdir, "docs", "tutorials").glob("*.py"):
        made = notebook(script, script.with_suffix(".md"))
        script.with_suffix(".ipynb").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("config-inited", write)
    return {"parallel_read_safe": True}
