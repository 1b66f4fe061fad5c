"""Self-contained HTML from a `Page`, whose texts by strangers and models are data, never markup."""

import base64
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from alignpro.report import theme
from alignpro.report.numbers import unplaced
from alignpro.report.page import Page, Section, Table
from alignpro.report.text import typographic, visible

try:
    import jinja2
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'alignpro[report]'") from error

from alignpro.report import figures

_MARKED = {"holds": "holds", "reproduced": "holds", "violated": "violated", "REFUTED": "violated"}
_KINDS = {"w": "words", "n": "n", "t": "texts"}


class Rendered(NamedTuple):
    """A page as files."""

    html: str
    pictures: dict[str, bytes | None]
    """PNG files to stand beside the page, by name; None where the figure had nothing to draw."""


def page(content: Page, made: Mapping[str, Any]) -> Rendered:
    """A verb's page as self-contained HTML, and its figures that are files of their own.

    Absolute paths and keys in addresses are cut from all its texts but those in cells of kind t and in what
    is quoted, which stay as others wrote them. `made` is `alignpro.report.keep.facts()`.
    """
    pictures: dict[str, bytes | None] = {}
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(theme.template),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Every expression of the template passes here, so no text reaches the page without `visible`. Exactly
        # `str`: what a macro returns is markup of the template's own.
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["flat"] = _flat
    text = environment.get_template("page.html.j2").render(
        verb=content.verb,
        title=_set(content.title),
        lead=_paragraphs(content.lead),
        key_numbers=[{name: _set(text) for name, text in key._asdict().items()} for key in content.keys],
        sections=[_section(section, pictures) for section in content.sections],
        settings=content.settings,
        made=made,
        marked=_MARKED,
    )
    return Rendered(text, pictures)


def _set(text: str) -> str:
    """A text of the verb's own: without folders, its numbers set in type."""
    return typographic(unplaced(text))


def _paragraphs(text: str) -> list[str]:
    return _set(text).split("\n\n")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested JSON as (dotted name, text) rows, without the folders of absolute paths."""
    if isinstance(value, Mapping):
        return [row for k, v in value.items() for row in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list | tuple):
        if not any(isinstance(v, Mapping | list | tuple) for v in value):
            return [(prefix, unplaced(", ".join(map(str, value))))]
        return [row for i, v in enumerate(value) for row in _flat(v, f"{prefix}.{i + 1}")]
    if value is None:
        return [(prefix, "–")]
    return [(prefix, f"{value:.6g}" if isinstance(value, float) else unplaced(str(value)))]


def _section(section: Section, pictures: dict[str, bytes | None]) -> dict[str, Any]:
    """Values of a section for the template; adds the figure's own file to `pictures`."""
    drawing = None if section.figure is None else figures.draw(section.figure)
    png = None if drawing is None else figures.png(drawing)
    if section.file:
        pictures[section.file] = png
    plot = None
    if drawing is not None and png is not None:
        source = "data:image/png;base64," + base64.b64encode(png).decode()
        plot = {"src": source, "alt": drawing.alt, "tall": drawing.tall, "more": drawing.more}
    return {
        **vars(section),
        "heading": _set(section.heading),
        "paragraphs": _paragraphs(section.sentence) if section.sentence else [],
        "points": [_set(point) for point in section.points],
        "plot": plot,
        "lacks": section.figure is not None and plot is None,
        "tables": [_cells(table) for table in section.tables],
    }


def _whole(text: str) -> str:
    """A cell's text in which no line ends within an interval [lo, hi]."""
    return re.sub(r"(?<=\[)[^\[\] ]+, (?=[^\[\] ]+\])", lambda m: m[0].replace(" ", "\u00a0"), text)


def _cells(table: Table) -> dict[str, Any]:
    head = table.head.split("|") if isinstance(table.head, str) else table.head
    rows = [
        [cell if kind == "t" else _whole(_set(cell)) for kind, cell in zip(table.kinds, row, strict=True)]
        for row in table.rows
    ]
    kinds = [_KINDS[kind] for kind in table.kinds]
    for i, kind in enumerate(kinds):
        if kind == "words" and any(len(row[i]) > 26 for row in rows):
            kinds[i] = "long" if all(len(row[i]) < 100 for row in rows) else "longest"
    short = [i for i, kind in enumerate(kinds) if kind in ("words", "n")]
    widest = [
        max(len(text) + 3 for text in (*name.split(), *(row[i] for row in rows), ""))
        for i, name in enumerate(head)
    ]
    return {
        "head": [_set(name.strip()) for name in head],
        "rows": rows,
        "kinds": kinds,
        # More characters than a sheet of paper has room for, and than a telephone has.
        "dense": sum(widest[i] for i in short) > 90,
        "stack": "texts" in kinds or sum(widest) > 48,
        "best": set(table.best),
    }
