"""The page of a verb as plain data, which needs the standard library alone; `keep` writes it as HTML."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from alignpro.report.numbers import Json, ends, limits, number

MOST_PROMPTS = 8
"""Number of prompts of which a page shows the texts."""


class Dot(NamedTuple):
    """A number of a figure, with the ends of its interval where it has one."""

    label: str
    """Its row; dots of one label share a row."""
    value: float | None
    lo: float | None = None
    hi: float | None = None
    group: str = ""
    """Its series, told apart by colour and marker, and named in the legend."""


class Dots(NamedTuple):
    """Numbers with intervals, one row for each label. A figure's axis names the numbers and their unit."""

    title: str
    axis: str
    dots: Sequence[Dot]
    marks: Sequence[tuple[float, str]] = ()
    """Dashed lines: where, and what is there."""
    least: float | None = None
    """Latest beginning of the axis; an interval that goes on leaves it."""


class Curve(NamedTuple):
    """One number over the steps of a figure."""

    name: str
    values: Sequence[float | None]
    """One value for each step."""
    errors: Sequence[float | None] = ()
    """Half the height of a band, or of an error bar, for each step."""
    points: bool = False
    """Draw open diamonds with error bars, as for a sampled estimate, rather than a line with a band."""


class Panel(NamedTuple):
    """The curves that share one axis."""

    axis: str
    curves: Sequence[Curve]
    marks: Sequence[tuple[float, str]] = ()
    """Level dashed lines: at what height, and what is there."""
    title: str = ""
    """The panel's heading. Left out: the axis, and the first curve's first and last value."""


class Curves(NamedTuple):
    """Numbers over steps, in panels one below the other."""

    steps: Sequence[int]
    axis: str
    panels: Sequence[Panel | tuple[str, Sequence[Curve]]]


class Stack(NamedTuple):
    """A sum of signed terms, and the number that it is to be compared with."""

    label: str
    terms: Mapping[str, float]
    """Numbers to add (positive) and to subtract (negative), by the name that the legend shows."""
    total: float
    against: float
    note: str = ""
    """A remark beside the sum, such as vacuous."""


class Stacks(NamedTuple):
    """Sums of signed terms as stacked bars; what is subtracted is hatched."""

    title: str
    axis: str
    stacks: Sequence[Stack]
    total: str
    against: str
    """Names of the sums, and of the numbers that they are compared with."""
    mark: tuple[float, str] | None = None


class BarPanel(NamedTuple):
    """Rows of bars under one heading. Its texts are others', and are drawn as they are."""

    title: str
    rows: Sequence[tuple[str, str, Sequence[float]]]
    """Label, a short remark after it, and a value for each series."""


class Bars(NamedTuple):
    """Bars side by side, one for each series, in panels one below the other."""

    axis: str
    series: Sequence[str]
    panels: Sequence[BarPanel]


Figure: TypeAlias = Dots | Curves | Stacks | Bars


class Table(NamedTuple):
    """Cells as text. The first column heads its row."""

    head: str | Sequence[str]
    """Names of columns, in one text with bars between them or one by one."""
    rows: Sequence[Sequence[str]]
    kinds: str
    """One letter a column: w words, n numbers (right aligned), t text that others wrote, shown as it is."""
    best: Collection[tuple[int, int]] = ()
    """Row and column of each cell that stands out."""


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own: paragraphs, a list, a figure and tables, in this order."""

    heading: str
    sentence: str
    """Introduction of the section; an empty line begins a new paragraph."""
    tables: Sequence[Table] = ()
    figure: Figure | None = None
    points: Sequence[str] = ()
    """Entries of a list."""
    quoted: str = ""
    """Text that others wrote, shown after the heading as it is."""
    file: str = ""
    """Name of the figure's own PNG file, to be written beside the page. Left out: no such file."""
    facts: Json | None = None
    """Nested values to show as a table of names and values."""
    folded: bool = False
    """Show the heading alone until the reader opens it."""


class Key(NamedTuple):
    """One of the few numbers at the top."""

    name: str
    value: str
    note: str = ""


@dataclass
class Page:
    """Finding of a verb. Its sections follow one another as they were added."""

    verb: str
    title: str
    lead: str
    """The finding; an empty line begins a new paragraph."""
    settings: Json
    """Settings of the run, the seed among them."""
    keys: list[Key] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def key(self, name: str, value: str, note: str = "") -> None:
        """Add a number to those at the top."""
        self.keys.append(Key(name, value, note))

    def estimate(self, name: str, e: Any, form: str = ".4g") -> None:
        """Add an `Estimate`, one read from JSON, or None to the numbers at the top, with its limits."""
        self.key(name, number(ends(e)[0], form), limits(e, form))

    def add(
        self,
        heading: str,
        sentence: str,
        table: Table | Sequence[Table] | None = None,
        figure: Figure | None = None,
        **more: Any,
    ) -> None:
        """Add a section; `more` are further fields of `Section`."""
        tables = () if table is None else (table,) if isinstance(table, Table) else table
        self.sections.append(Section(heading, sentence, tables, figure, **more))


def some(of: Json, keys: str) -> dict[str, Any]:
    """Entries of `of` whose keys are named, with spaces between them."""
    return {key: of[key] for key in keys.split()}


def dot(label: str, e: Any, group: str = "") -> Dot:
    """The `Dot` of an `Estimate`, of one read from JSON, or of None."""
    return Dot(label, *ends(e), group)


def dots(of: Mapping[str, Any], group: str = "") -> list[Dot]:
    """The `Dot` of each estimate, by its label."""
    return [dot(label, e, group) for label, e in of.items()]
