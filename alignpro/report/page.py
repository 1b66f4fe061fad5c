"""What a verb's page says: sections of tables and charts, as plain data.

`alignpro.report.keep` writes a `Page` as self-contained HTML, which `alignpro.report.render` makes. Importing
this needs the standard library alone, and draws nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from alignpro.report.numbers import Json, ends

MOST_PROMPTS = 8
"""Of how many prompts a page shows the texts."""


class Dot(NamedTuple):
    """A number of a chart, with the ends of its interval where it has one."""

    label: str
    """Dots of one label share a row."""
    value: float | None
    lo: float | None = None
    hi: float | None = None
    group: str = ""
    """Told apart by colour and marker, and named in the legend."""


class Dots(NamedTuple):
    """Numbers with intervals, one row for each label."""

    title: str
    axis: str
    """What the numbers are, with their unit."""
    dots: Sequence[Dot]
    marks: Sequence[tuple[float, str]] = ()
    """Dashed lines: where, and what is there."""
    least: float | None = None
    """Where the axis begins at the latest; an interval that goes on leaves it."""


class Curve(NamedTuple):
    name: str
    values: Sequence[float | None]
    """One for each step."""
    errors: Sequence[float | None] = ()
    """Half the height of a band, if any."""


class Curves(NamedTuple):
    """Numbers over steps, one panel for each (axis, curves)."""

    steps: Sequence[int]
    axis: str
    panels: Sequence[tuple[str, Sequence[Curve]]]


class Table(NamedTuple):
    """Cells as text. The first column heads its row."""

    head: str | Sequence[str]
    """Names of columns, in one text with bars between them or one by one."""
    rows: Sequence[Sequence[str]]
    kinds: str
    """One letter a column: w words, n numbers (right aligned), t text that others wrote, shown as it is."""


class Section(NamedTuple):
    heading: str
    sentence: str
    table: Table | None = None
    figure: Dots | Curves | None = None


class Key(NamedTuple):
    """One of the few numbers at the top."""

    name: str
    value: str
    note: str = ""


@dataclass
class Page:
    """What a verb found. Its sections follow one another as they were added."""

    verb: str
    title: str
    lead: str
    """The finding."""
    settings: Json
    """What it was run with, the seed among it."""
    keys: list[Key] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def key(self, name: str, value: str, note: str = "") -> None:
        self.keys.append(Key(name, value, note))

    def add(
        self, heading: str, sentence: str, table: Table | None = None, figure: Dots | Curves | None = None
    ) -> None:
        self.sections.append(Section(heading, sentence, table, figure))


def some(of: Json, keys: str) -> dict[str, Any]:
    """Those of `of` whose keys are named, with spaces between them."""
    return {key: of[key] for key in keys.split()}


def dot(label: str, e: Any, group: str = "") -> Dot:
    """The `Dot` of an `Estimate`, of one read from JSON, or of None."""
    return Dot(label, *ends(e), group)
