"""Figures of pages, drawn by matplotlib with one style, one set of colours and fixed bytes."""

import base64
import io
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, TypeGuard

from alignpro.report.numbers import number, unplaced
from alignpro.report.page import Curves, Dots

try:
    from matplotlib import font_manager, ft2font
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'alignpro[report]'") from error

_INK, _MUTED, _VERMILLION = "#1a1a1a", "#6b6b6b", "#D55E00"
_FONT = "DejaVu Sans"  # shipped with matplotlib, so every machine draws the same
_STYLE: dict[str, Any] = {
    "font.family": _FONT,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}
_WIDTH, _DPI = 7.2, 160  # inches; 7.2 in are 691 CSS pixels, the page's text width, so points stay points


class Plot(NamedTuple):
    """A figure of the page: its file's name, PNG bytes, and what it says to those who cannot see it."""

    name: str
    png: bytes
    alt: str


def visible(text: str) -> str:
    """`text` with every control, bidirectional, invisible or unassigned character spelled out as ⟨U+202E⟩.

    Newlines and tabs stay; so do visible characters of every script.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else f"⟨U+{ord(c):04X}⟩"
        for c in text
    )


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters; the middle goes, as rewrites of one prompt begin alike."""
    text = " ".join(visible(text).split())
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 5
    head, tail_text = text[: width - 1 - tail], text[-tail:]
    if " " in head[len(head) // 2 :]:  # at a word's end, where that costs little
        head = head[: head.rindex(" ")]
    if " " in tail_text[: tail // 2]:
        tail_text = tail_text[tail_text.index(" ") :]
    return f"{head.rstrip()}…{tail_text.lstrip()}"


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})  # no version or date: fixed bytes
    return file.getvalue()


@cache
def _glyphs() -> frozenset[int]:
    path = font_manager.findfont(_FONT)
    return frozenset(ft2font.FT2Font(path).get_charmap())


def _drawable(text: str) -> str:
    """`text` with a question mark in a box for what the font lacks, instead of a warning."""
    return "".join(c if ord(c) in _glyphs() else "\ufffd" for c in text)


def _label(text: str) -> str:
    return _drawable(shorten(text, 24)).replace("$", r"\$")


def _source(plot: Plot) -> str:
    return "data:image/png;base64," + base64.b64encode(plot.png).decode()


# A colour and a marker each: told apart with every common colour blindness, and in print.
_GROUPS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MOST_DOTS = 80


def _figure_of(chart: Dots | Curves | None) -> dict[str, Any]:
    if chart is None:
        return {"plot": None, "lacks": False}
    plot = _dots(chart) if isinstance(chart, Dots) else _panels(chart)
    if plot is None:
        return {"plot": None, "lacks": True}
    more = len(chart.dots) - MOST_DOTS if isinstance(chart, Dots) else 0
    said = f"{more} more are in the table." if more > 0 else ""
    tall = isinstance(chart, Dots) and len(chart.dots) > 45  # in print it may go over several sheets
    return {"plot": {"src": _source(plot), "alt": plot.alt, "tall": tall, "more": said}, "lacks": False}


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < 1e300  # False for NaN


def _dots(chart: Dots) -> Plot | None:
    """Dots and their intervals, one line each; lines of one label stand together."""
    dots = [(dot, dot.value) for dot in chart.dots if _finite(dot.value)][:MOST_DOTS]
    if not dots:
        return None
    groups = list(dict.fromkeys(dot.group for dot, _ in dots))
    labels: dict[str, list[float]] = {}
    figure = _figure(
        1.15 + 0.22 * len(dots) + 0.1 * len({d.label for d, _ in dots}) + 0.25 * (len(groups) > 1)
    )
    axes = figure.add_subplot()
    every = [v for d, _ in dots for v in d[1:4]] + [x for x, _ in chart.marks]
    left, right = _scale(axes, [v for v in every if v is None or chart.least is None or v >= chart.least])
    y = 0.0
    for dot, value in dots:
        y += 0.22 if dot.label in labels else 0.32
        labels.setdefault(dot.label, []).append(y)
        colour, marker = _GROUPS[groups.index(dot.group) % len(_GROUPS)]
        end = value
        if dot.lo is not None and dot.hi is not None:
            end = max(value, dot.hi)
            limits = [max(dot.lo, left), min(dot.hi, right)]  # an interval without an end leaves the axes
            axes.plot(limits, [y, y], color=colour, lw=2, solid_capstyle="butt", alpha=0.6)
        axes.plot(value, y, marker, ms=6, color=colour, label=dot.group)
        place: dict[str, Any] = {
            "xytext": (6, 0),
            "textcoords": "offset points",
            "va": "center",
            "fontsize": 9,
            "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        }
        axes.annotate(number(value, ".3g"), (min(end, right), y), annotation_clip=False, **place)
    for x, words in chart.marks:
        axes.axvline(x, color=_INK, lw=1, ls=(0, (4, 3)), zorder=0)
        nearer = x > left + 0.6 * (right - left) and axes.get_xscale() == "linear"
        axes.annotate(
            _label(words),
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if nearer else 3, 2),
            textcoords="offset points",
            ha="right" if nearer else "left",
            fontsize=9,
        )
    ticks = [sum(places) / len(places) for places in labels.values()]
    axes.set_yticks(ticks, [_drawable(shorten(unplaced(label), 38)) for label in labels])
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    for places in labels.values():
        axes.axhline(places[-1] + 0.16, color="#e5e5e5", lw=0.6, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y + 0.2, 0.12)
    axes.set_xlabel(_plain(chart.axis), parse_math=False)
    axes.set_title(_plain(chart.title), pad=18 if chart.marks else 6, parse_math=False)
    if len(groups) > 1:
        entries = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(entries.values(), map(_plain, entries), loc="outside lower center", ncols=3)
    said = [f"{d.label}{f', {d.group}' if d.group else ''}: {_value(d.value, d.lo, d.hi)}" for d, _ in dots]
    said += [f"{words} at {number(x)}" for x, words in chart.marks]
    return Plot("", _png(figure), unplaced(f"{chart.title}, {chart.axis}. {'; '.join(said)}."))


def _scale(axes: Axes, values: Sequence[float | None]) -> tuple[float, float]:
    """Limits with room for all that is finite; symmetric log where one number would crush the others."""
    ends = [float(v) for v in values if _finite(v)]
    low, high, sizes = min(ends), max(ends), sorted(abs(v) for v in ends if v)
    middle = sizes[len(sizes) // 2] if sizes else 1.0
    if sizes and sizes[-1] > 300 * middle:
        axes.set_xscale("symlog", linthresh=2 * middle)
        axes.set_xlim((5 * low if low < 0 else low) - 0.1 * middle, 5 * max(high, middle))
    else:
        room = (high - low) or abs(high) or 1.0
        axes.set_xlim(low - 0.04 * room, high + 0.16 * room)
    return axes.get_xlim()


def _plain(text: str) -> str:
    return _drawable(shorten(unplaced(text), 90))


def _value(value: float | None, lo: float | None, hi: float | None) -> str:
    return number(value) + ("" if lo is None or hi is None else f" [{number(lo)}, {number(hi)}]")


def _panels(chart: Curves) -> Plot | None:
    """Curves over steps, one panel below the other."""
    if not chart.panels:
        return None
    figure = _figure(0.7 + 1.55 * len(chart.panels))
    every = figure.subplots(len(chart.panels), 1, sharex=True, squeeze=False)[:, 0]
    said = []
    for axes, (name, curves) in zip(every, chart.panels, strict=True):
        for i, curve in enumerate(curves):
            colour, marker = _GROUPS[i % len(_GROUPS)]
            values = [float(v) if _finite(v) else float("nan") for v in curve.values]
            look: dict[str, Any] = {"color": colour, "ls": _DASHES[i % len(_DASHES)], "lw": 1.6}
            look |= {"marker": marker, "ms": 4.5} if len(values) <= 40 else {}
            axes.plot(chart.steps, values, label=_plain(curve.name), **look)
            if any(map(_finite, curve.errors)):
                band = [e if _finite(e) else 0.0 for e in curve.errors]
                low, high = ([v + s * e for v, e in zip(values, band, strict=True)] for s in (-1, 1))
                axes.fill_between(chart.steps, low, high, color=colour, alpha=0.18, lw=0)
            known = [v for v in values if _finite(v)]
            ends = f"{number(known[0])} → {number(known[-1])}" if known else "–"
            between = f", between {number(min(known))} and {number(max(known))}" if known else ""
            said.append(f"{name}, {curve.name}: {ends}{between}")
            if i == 0:
                axes.set_title(_plain(f"{name}: {ends}"), parse_math=False)
        if len(curves) > 1:
            axes.legend(loc="best", ncols=2)
        axes.grid(axis="y", color="#e5e5e5", lw=0.6)
    every[-1].set_xlabel(chart.axis)
    every[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    alt = (
        f"Curves over {number(chart.steps[0])} to {number(chart.steps[-1])} {chart.axis}. {'; '.join(said)}."
    )
    return Plot("", _png(figure), unplaced(alt))
