"""Keeping a page: where it is written, and what is said of the run that it is about."""

import contextlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignpro.files import atomic_write, write_text
from alignpro.report.numbers import unplaced
from alignpro.report.page import Page
from alignpro.terminal import say

TYPED: ContextVar[Sequence[str] | None] = ContextVar("TYPED", default=None)
"""The command line's arguments, for the page of what they run; None outside of it."""


def keep(page: Page, place: str | os.PathLike[str]) -> Path | None:
    """Write `page` to `place`, a file that ends in .html or a folder, and say so on stderr; its path.

    In a folder it is report.html, or VERB-report.html where another verb's report.html is. Figures that are
    files of their own are written beside it. Where the extra `report` is not installed nothing is written,
    and one line on stderr says what to install. Raises AlignProError where the file cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":  # one process of several writes
        return None
    path = Path(place)
    if path.suffix != ".html" or path.is_dir():
        path = path / "report.html"
        head = path.read_bytes()[:2000].decode(errors="replace") if path.exists() else None
        if head is not None and f'<meta name="generator" content="alignpro {page.verb}"' not in head:
            path = path.with_name(f"{page.verb}-report.html")
    try:
        from alignpro.report import render
    except ImportError as error:
        say(f"alignpro: {path.name} is not written: {error}", error=True)
        return None
    html, pictures = render.page(page, facts())
    for name, png in pictures.items():
        if png is None:
            path.with_name(name).unlink(missing_ok=True)  # an earlier run's would pass for this one's
            continue
        with atomic_write(path.with_name(name)) as file:
            file.write(png)
    write_text(path, html)
    say(f"wrote {path}", error=True)
    return path


def facts() -> dict[str, Any]:
    """The command, the time, and the versions of the packages that were loaded, for `render.page`."""
    packages: dict[str, str] = {}
    for name in ("alignpro", "numpy", "scipy", "jax", "torch", "transformers", "trl", "peft"):
        with contextlib.suppress(PackageNotFoundError):  # run from a source tree
            packages |= {name: version(name)} if name in sys.modules else {}
    typed = TYPED.get()
    system = f"{platform.system()} {platform.machine()}"
    return {
        "command": None if typed is None else " ".join(["alignpro", *map(_argument, typed)]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "system": system, **packages},
    }


def _argument(word: str) -> str:
    # A path among the arguments may hold spaces: all of the word up to its last slash is folders.
    shown = unplaced(re.sub(r"^([^\s=/]*=)?(?:file:)?(?:~[\w-]*)?/.*/(?=.)", r"\1…/", word, flags=re.S))
    return shown if shown != word and not re.search(r"\s", shown) else shlex.quote(shown)
