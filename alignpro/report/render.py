"""Self-contained HTML from a `Page`.

Texts in it were written by strangers and by language models: they are data everywhere, never markup,
mathtext or a formula.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from alignpro.report.numbers import unplaced
from alignpro.report.page import Page, Table

try:
    import jinja2
    from matplotlib import style
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'alignpro[report]'") from error

from alignpro.report.figures import _STYLE, _figure_of, visible

# --- the page ---------------------------------------------------------------------------------------------


def _number(value: Any, digits: int = 3) -> str:
    if value is None:
        return "–"
    text = f"{value:.{digits}f}"
    return "0." + "0" * digits if text.startswith("-0.") and not text.strip("-0.") else text.replace("-", "−")


def _percent(value: Any, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%".replace("-", "−")


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


def _range(sizes: Sequence[int] | int) -> str:
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if not sizes:
        return "0"
    return str(sizes[0]) if min(sizes) == max(sizes) else f"{min(sizes)}–{max(sizes)}"


def _finalize(value: Any) -> Any:
    # Every expression of the template passes here, so no text reaches the page without `visible`. Exactly
    # `str`: what a macro returns is markup of the template's own.
    return visible(value) if type(value) is str else value


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda file: files("alignpro.report").joinpath("templates", file).read_text(encoding="utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "num": _number,
        "pct": _percent,
        "flat": _flat,
        "range": _range,
        "unplaced": unplaced,
    }
    return environment.get_template(name)


_MARKED = {"holds": "holds", "reproduced": "holds", "violated": "violated", "REFUTED": "violated"}
_SHORT = ("words", "n")
_KINDS = {"w": "words", "n": "n", "t": "texts"}


def page(content: Page, made: Mapping[str, Any]) -> str:
    """A verb's page as self-contained HTML.

    Absolute paths and keys in addresses are cut from all its texts but those in cells of kind t, which stay
    as others wrote them.

    Args:
        content: what it says.
        made: `alignpro.report.keep.facts()`.
    """
    with style.context(["default", _STYLE]):  # whatever the user's matplotlibrc says
        sections = [
            {
                "heading": unplaced(s.heading),
                "sentence": unplaced(s.sentence),
                **_figure_of(s.figure),
                **_cells(s.table),
            }
            for s in content.sections
        ]
    keys = [{name: unplaced(text) for name, text in key._asdict().items()} for key in content.keys]
    return _template("page.html.j2").render(
        verb=content.verb,
        title=unplaced(content.title),
        lead=unplaced(content.lead),
        key_numbers=keys,
        sections=sections,
        settings=content.settings,
        made=made,
        marked=_MARKED,
    )


def _cells(table: Table | None) -> dict[str, Any]:
    if table is None:
        return {"head": None, "rows": None}
    head = table.head.split("|") if isinstance(table.head, str) else table.head
    rows = [
        [cell if kind == "t" else unplaced(cell) for kind, cell in zip(table.kinds, row, strict=True)]
        for row in table.rows
    ]
    kinds = [_KINDS[kind] for kind in table.kinds]
    for i, kind in enumerate(kinds):
        if kind == "words" and any(len(row[i]) > 26 for row in rows):
            kinds[i] = "long" if all(len(row[i]) < 100 for row in rows) else "longest"
    # Of the characters that a sheet of paper has room for.
    dense = (
        sum(max((len(row[i]) + 3 for row in rows), default=0) for i, k in enumerate(kinds) if k in _SHORT)
        > 90
    )
    return {
        "head": [unplaced(name.strip()) for name in head],
        "rows": rows,
        "kinds": kinds,
        "dense": dense,
    }
