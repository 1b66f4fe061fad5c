"""The beginning of a page, for a notebook: the finding, the numbers and tables, in the notebook's style."""

from collections.abc import Sequence
from html import escape

from alignpro.report.page import Page, Table
from alignpro.report.text import typographic, visible

SECTIONS = 4
"""Sections whose tables are shown, at most."""
ROWS = 20
"""Rows of a table that are shown, at most."""


def excerpt(page: Page) -> str:
    """HTML without a style of its own; every text is data, never markup."""
    keys = "; ".join(f"{key.name} {key.value}{f' ({key.note})' if key.note else ''}" for key in page.keys)
    parts = [f"<p><strong>{_said(page.title)}.</strong> {_said(page.lead)}</p>", f"<p>{_said(keys)}</p>"]
    for section in [s for s in page.sections if s.tables][:SECTIONS]:
        parts.append(f"<p><strong>{_said(section.heading)}</strong></p>")
        parts += map(_table, section.tables)
    return "\n".join(parts)


def preformatted(text: str) -> str:
    """HTML of text that is laid out by spaces."""
    return f"<pre>{escape(text)}</pre>"


def _said(text: str) -> str:
    return escape(typographic(text))


def _table(table: Table) -> str:
    head = table.head.split("|") if isinstance(table.head, str) else table.head
    rows = [_row("th", [_said(name.strip()) for name in head])]
    for row in table.rows[:ROWS]:
        cells = zip(row, table.kinds, strict=True)
        rows.append(
            _row("td", [escape(visible(cell)) if kind == "t" else _said(cell) for cell, kind in cells])
        )
    if len(table.rows) > ROWS:
        rows.append(_row("td", [f"… {len(table.rows) - ROWS} more rows"]))
    return f"<table>{''.join(rows)}</table>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"
