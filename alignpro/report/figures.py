"""Figures of pages, drawn by matplotlib in the theme's style, with fixed bytes."""

import io
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard

from alignpro.report import theme
from alignpro.report.numbers import interval, number, unplaced
from alignpro.report.page import BarPanel, Bars, Curve, Curves, Dot, Dots, Figure, Panel, Stack, Stacks
from alignpro.report.text import shorten, typographic

try:
    from matplotlib import font_manager, ft2font, style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(f"{error.name} is missing: pip install 'alignpro[report]'") from error

MOST_DOTS = 80
_WIDTH, _DPI = 7.2, 160  # inches; 7.2 in are 691 CSS pixels, the page's text width, so points stay points
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
_PLAIN: dict[str, Any] = {"facecolor": theme.PAPER, "edgecolor": "none", "pad": 1}
_HATCHED: dict[str, Any] = {"facecolor": theme.PAPER, "edgecolor": theme.INK, "hatch": "//////"}


class Drawing(NamedTuple):
    """A figure as matplotlib has it, and what it says to those who cannot see it."""

    canvas: Canvas
    alt: str
    more: str = ""
    """A sentence on what the figure leaves out."""
    tall: bool = False
    """Whether it may go over several sheets in print."""


def draw(figure: Figure) -> Drawing | None:
    """The figure, drawn; None where it holds no finite number."""
    with style.context(["default", theme.STYLE]):  # whatever the user's matplotlibrc says
        if isinstance(figure, Dots):
            return _dots(figure)
        if isinstance(figure, Curves):
            return _curves(figure)
        return _stacks(figure) if isinstance(figure, Stacks) else _bars(figure)


def png(drawing: Drawing) -> bytes:
    """The drawing as a PNG file, without version or date: the same figure gives the same bytes."""
    file = io.BytesIO()
    with style.context(["default", theme.STYLE]):
        drawing.canvas.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _canvas(height: float) -> Canvas:
    canvas = Canvas(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained", facecolor=theme.PAPER)
    FigureCanvasAgg(canvas)
    return canvas


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(ft2font.FT2Font(font_manager.findfont(theme.FONT)).get_charmap())


def _drawable(text: str, width: int) -> str:
    """`text` in at most `width` characters, with a question mark in a box for what the font lacks."""
    return "".join(c if ord(c) in _glyphs() else "\ufffd" for c in shorten(text, width))


def _label(text: str, width: int = 90) -> str:
    """A text of the page itself: numbers set in type, no folders."""
    return _drawable(typographic(unplaced(text)), width)


def _entry(text: str) -> str:
    """A label of a legend, where a dollar sign is a dollar sign."""
    return _label(text).replace("$", r"\$")


def _said(value: float | None, form: str = ".4g") -> str:
    return typographic(number(value, form))


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) < 1e300  # False for NaN


def _note(axes: Axes, text: str, at: Any, offset: Any, coordinates: Any = "data", **look: Any) -> None:
    """Small words beside a place, moved from it by points; a dollar sign in them is a dollar sign."""
    look = dict[str, Any](textcoords="offset points", fontsize=9) | look
    axes.annotate(text, at, xycoords=coordinates, xytext=offset, parse_math=False, **look)


def _name_rows(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_yticks(places, labels)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)  # a dollar sign in a name is a dollar sign
    axes.tick_params(axis="y", length=0)


def _dots(chart: Dots) -> Drawing | None:
    """Dots and their intervals, one line each; lines of one label stand together."""
    dots = [(dot, dot.value) for dot in chart.dots if _finite(dot.value)][:MOST_DOTS]
    if not dots:
        return None
    groups = list(dict.fromkeys(dot.group for dot, _ in dots))
    labels: dict[str, list[float]] = {}
    names = {d.label for d, _ in dots}
    canvas = _canvas(1.15 + 0.22 * len(dots) + 0.1 * len(names) + 0.25 * (len(groups) > 1))
    axes = canvas.add_subplot()
    every = [v for d, _ in dots for v in d[1:4]] + [x for x, _ in chart.marks]
    left, right = _scale(axes, [v for v in every if v is None or chart.least is None or v >= chart.least])
    y = 0.0
    for dot, value in dots:
        y += 0.22 if dot.label in labels else 0.32
        labels.setdefault(dot.label, []).append(y)
        _draw_dot(axes, dot, value, y, theme.SERIES[groups.index(dot.group) % len(theme.SERIES)])
    for x, words in chart.marks:
        axes.axvline(x, color=theme.INK, lw=1, ls=(0, (4, 3)), zorder=0)
        nearer = x > left + 0.6 * (right - left) and axes.get_xscale() == "linear"
        side, shift = ("right", -3) if nearer else ("left", 3)
        _note(axes, _label(words, 24), (x, 1), (shift, 2), ("data", "axes fraction"), ha=side)
    ticks = [sum(places) / len(places) for places in labels.values()]
    _name_rows(axes, ticks, [_label(label, 38) for label in labels])
    for places in labels.values():
        axes.axhline(places[-1] + 0.16, color=theme.GRID, lw=0.6, zorder=0)
    axes.set_ylim(y + 0.2, 0.12)
    axes.set_xlabel(_label(chart.axis), parse_math=False)
    axes.set_title(_label(chart.title), pad=18 if chart.marks else 6, parse_math=False)
    if len(groups) > 1:
        entries = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        canvas.legend(entries.values(), map(_entry, entries), loc="outside lower center", ncols=3)
    said = [f"{d.label}{f', {d.group}' if d.group else ''}: {interval(d)}" for d, _ in dots]
    said += [f"{words} at {number(x)}" for x, words in chart.marks]
    more = len(chart.dots) - MOST_DOTS
    return Drawing(
        canvas,
        typographic(unplaced(f"{chart.title}, {chart.axis}. {'; '.join(said)}.")),
        f"{more} more are in the table." if more > 0 else "",
        tall=len(chart.dots) > 45,
    )


def _draw_dot(axes: Axes, dot: Dot, value: float, y: float, look: tuple[str, str]) -> None:
    colour, marker = look
    left, right = axes.get_xlim()
    end = value
    if dot.lo is not None and dot.hi is not None:
        end = max(value, dot.hi)
        limits = [max(dot.lo, left), min(dot.hi, right)]  # an interval without an end leaves the axes
        axes.plot(limits, [y, y], color=colour, lw=2, solid_capstyle="butt", alpha=0.6)
    axes.plot(value, y, marker, ms=6, color=colour, label=dot.group)
    box = {"bbox": _PLAIN | {"pad": 0.5}, "annotation_clip": False}
    _note(axes, _said(value, ".3g"), (min(end, right), y), (6, 0), va="center", **box)


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


def _curves(chart: Curves) -> Drawing | None:
    if not chart.steps or not chart.panels:
        return None
    panels = [Panel(*panel) for panel in chart.panels]
    each = 2.6 if any(panel.marks for panel in panels) else 1.55
    canvas = _canvas(0.7 + each * len(panels))
    every = canvas.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    said = []
    for axes, panel in zip(every, panels, strict=True):
        for i, curve in enumerate(panel.curves):
            known = _rounded(_draw_curve(axes, chart.steps, curve, i))
            ends = f"{number(known[0])} → {number(known[-1])}" if known else "–"
            between = f", between {number(min(known))} and {number(max(known))}" if known else ""
            said.append(f"{panel.axis}, {curve.name}: {ends}{between}")
            if i == 0:
                axes.set_title(_label(panel.title or f"{panel.axis}: {ends}"), parse_math=False)
        said += [f"{words} at {number(y)}" for y, words in panel.marks]
        if panel.title:
            axes.set_ylabel(_label(panel.axis), parse_math=False)
        for i, (y, _) in enumerate(panel.marks):
            axes.axhline(y, color=theme.INK, lw=1, ls=_DASHES[1 + i % 2], zorder=0)
        if panel.marks:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + 0.25 * (high - low) * (len(panel.curves) > 1))  # room for the legend
            _mark_sides(axes, panel.marks, 0.75 * each)
        if len(panel.curves) > 1:
            axes.legend(loc="upper left" if panel.marks else "best", ncols=2, columnspacing=1.2)
        axes.grid(axis="y", color=theme.GRID, lw=0.6)
    every[-1].set_xlabel(_label(chart.axis), parse_math=False)
    every[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    over = f"Curves over {number(chart.steps[0])} to {number(chart.steps[-1])} {chart.axis}"
    return Drawing(canvas, typographic(unplaced(f"{over}. {'; '.join(said)}.")))


def _rounded(values: Sequence[float]) -> list[float]:
    """The values with those as 0 that are rounding beside the largest of them."""
    least = 1e-6 * max(map(abs, values), default=0.0)
    return [v if abs(v) > least else 0.0 for v in values]


def _draw_curve(axes: Axes, steps: Sequence[int], curve: Curve, i: int) -> list[float]:
    """Draw the i-th curve of a panel; its finite values."""
    colour, marker = theme.SERIES[i % len(theme.SERIES)]
    values = [float(v) if _finite(v) else float("nan") for v in curve.values]
    errors = [e if _finite(e) else 0.0 for e in curve.errors]
    look: dict[str, Any] = {"color": colour, "label": _entry(curve.name)}
    if curve.points:
        look |= {"fmt": "D", "ms": 5, "mfc": theme.PAPER, "lw": 1, "capsize": 3, "alpha": 0.85}
        kept = [i for i, value in enumerate(values) if _finite(value)]
        heights = [errors[i] for i in kept] if errors else None
        axes.errorbar([steps[i] for i in kept], [values[i] for i in kept], yerr=heights, **look)
    else:
        look |= {"ls": _DASHES[i % len(_DASHES)], "lw": 1.6}
        look |= {"marker": marker, "ms": 4.5} if len(values) <= 40 else {}
        axes.plot(steps, values, **look)
        if any(map(_finite, curve.errors)):
            low, high = ([v + s * e for v, e in zip(values, errors, strict=True)] for s in (-1, 1))
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
    return [v for v in values if _finite(v)]


def _mark_sides(axes: Axes, marks: Sequence[tuple[float, str]], inches: float) -> None:
    """Name level lines right of the axes (`inches` high), at their heights unless names would overlap."""
    low, high = axes.get_ylim()
    least = 14 / 72 / inches * (high - low)  # lines of 14 points
    order = sorted(marks)
    places = [y for y, _ in order]
    for before, i in pairwise(range(len(places))):
        places[i] = max(places[i], places[before] + least)
    shift = sum(p - y for p, (y, _) in zip(places, order, strict=True)) / len(places)
    beside = ("axes fraction", "data")
    line = {"arrowstyle": "-", "color": theme.MUTED, "lw": 0.7, "shrinkA": 1, "shrinkB": 0}
    look: dict[str, Any] = {"textcoords": beside, "fontsize": 9.5, "annotation_clip": False}
    for (y, words), place in zip(order, places, strict=True):
        at = (1.03, place - shift)
        _note(axes, _label(words, 32), (1, y), at, beside, va="center", arrowprops=line, **look)


def _stacks(chart: Stacks) -> Drawing | None:
    """Each sum as its positive terms side by side, what is subtracted hatched over their end."""
    rows = [s for s in chart.stacks if all(map(_finite, (*s.terms.values(), s.total, s.against)))]
    if not rows:
        return None
    names = dict.fromkeys(n for s in rows for n, v in s.terms.items() if v > 0)
    colours = {name: theme.TERMS[i % len(theme.TERMS)] for i, name in enumerate(names)}
    canvas = _canvas(1.9 + 0.74 * len(rows))
    axes = canvas.add_subplot()
    marks = [chart.mark[0]] if chart.mark else []
    right = max(*marks, *(sum(v for v in s.terms.values() if v > 0) for s in rows), *(s.total for s in rows))
    left = min([0.0, *(min(s.against, s.total) for s in rows)])
    axes.set_xlim(left * 1.05, right * 1.44 or 1.0)
    for i, stack in enumerate(rows):
        _draw_stack(axes, i, stack, right, colours)
    axes.axvline(0, color=theme.MUTED, lw=0.8)
    if chart.mark:
        axes.axvline(chart.mark[0], color=theme.INK, lw=1.2, ls=(0, (4, 3)), zorder=0)
        words = f" {_label(chart.mark[1], 60)}"
        axes.text(chart.mark[0], -0.56, words, fontsize=9, va="center", parse_math=False)
    _name_rows(axes, range(len(rows)), [_label(s.label, 38) for s in rows])
    axes.set_ylim(len(rows) - 0.45, -0.75)
    axes.set_xlabel(_label(chart.axis), parse_math=False)
    axes.set_title(_label(chart.title), pad=12, parse_math=False)
    handles: list[Any] = [Patch(facecolor=colours[name], label=_entry(name)) for name in names]
    minus = dict.fromkeys(n for s in rows for n, v in s.terms.items() if v < 0)
    handles += [Patch(**_HATCHED, label=_entry(f"subtracted: {', '.join(minus)}"))] if minus else []
    handles += axes.plot([], [], color=theme.INK, lw=3, label=_entry(chart.total))
    handles += [Patch(facecolor=theme.MUTED, label=_entry(chart.against))]
    canvas.legend(handles=handles, loc="outside lower center", ncols=2, columnspacing=2)
    sides = ((s.label, number(s.total, ".3f"), number(s.against, ".3f")) for s in rows)
    alt = "; ".join(f"{name}: {chart.total} {one}, {chart.against} {other}" for name, one, other in sides)
    return Drawing(canvas, typographic(unplaced(f"{chart.title}, {chart.axis}. {alt}.")))


def _draw_stack(axes: Axes, i: int, stack: Stack, right: float, colours: dict[str, str]) -> None:
    total, top, middle, height = stack.total, i - 0.12, i + 0.24, 0.4
    end = 0.0
    for name, value in stack.terms.items():
        if value <= 0:
            continue
        axes.barh(top, value, height, left=end, color=colours[name], edgecolor=theme.PAPER, lw=0.6)
        if value > 0.07 * right and (end + value <= total or total - end > 0.07 * right):
            axes.text((end + min(end + value, total)) / 2, top, _said(value, ".3f"), ha="center", va="center")
        end += value
    taken = sum(value for value in stack.terms.values() if value < 0)
    if taken < 0:  # over the lower half only, so that what it takes away stays in sight
        axes.barh(top + 0.1, taken, 0.2, left=end, **_HATCHED, lw=0.8)
    axes.plot([total, total], [top - 0.27, top + 0.27], color=theme.INK, lw=3, solid_capstyle="butt")
    place = max(end, total) + 0.012 * right
    sum_of = f"{_said(end, '.3f')} − {_said(-taken, '.3f')} = " if taken < 0 else ""
    axes.text(place, top, f"{sum_of}{_said(total, '.3f')}", va="center", bbox=_PLAIN)
    if stack.note:
        note = _label(stack.note, 24)
        axes.text(place, middle, note, va="center", fontweight="bold", color=theme.VERMILION, bbox=_PLAIN)
    axes.barh(middle, stack.against, 0.2, color=theme.MUTED)
    place = max(stack.against, 0) + 0.012 * right
    axes.text(place, middle, _said(stack.against, ".3f"), va="center", fontsize=9.5, bbox=_PLAIN)


def _bars(chart: Bars) -> Drawing | None:
    """Rows of bars, one for each series; titles and labels are others' texts, drawn as they are."""
    if not chart.panels:
        return None
    heights = [len(panel.rows) + 2.1 for panel in chart.panels]
    canvas = _canvas(0.265 * sum(heights) + 0.9)
    every = canvas.subplots(len(heights), 1, height_ratios=heights, squeeze=False, sharex=True)[:, 0]
    colours = [colour for colour, _ in theme.SERIES]
    for axes, panel in zip(every, chart.panels, strict=True):
        _draw_bars(axes, panel, colours[: len(chart.series)])
    every[-1].set_xlabel(_label(chart.axis), parse_math=False)
    named = zip(colours, chart.series, strict=False)
    handles = [Patch(facecolor=colour, label=_entry(name)) for colour, name in named]
    canvas.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    said = []
    for panel in chart.panels:
        longest = (max(panel.rows, key=lambda row: row[2][j], default=None) for j in range(len(chart.series)))
        of = [f"{name} {shorten(row[0], 60)}" for name, row in zip(chart.series, longest, strict=True) if row]
        said.append(f"{shorten(panel.title, 60)}: {', '.join(of)}")
    return Drawing(canvas, f"{chart.axis}. The longest bars. {'; '.join(said)}.", tall=True)


def _draw_bars(axes: Axes, panel: BarPanel, colours: Sequence[str]) -> None:
    width = 0.81 / len(colours)
    for j, colour in enumerate(colours):
        places = [i + width * (j - (len(colours) - 1) / 2) for i in range(len(panel.rows))]
        axes.barh(places, [values[j] for _, _, values in panel.rows], 0.93 * width, color=colour)
    _name_rows(axes, range(len(panel.rows)), [_drawable(label, 46) for label, _, _ in panel.rows])
    axes.tick_params(axis="y", pad=31, labelsize=9)
    axes.tick_params(axis="x", labelbottom=True)
    for i, (_, remark, _) in enumerate(panel.rows):  # beside the label: a right-to-left text would move it
        _note(axes, _label(remark, 12), (0, i), (-5, 0), ("axes fraction", "data"), ha="right", va="center")
    axes.set_ylim(len(panel.rows) - 0.45, -0.55)
    axes.grid(axis="x", color=theme.GRID, lw=0.6)
    axes.set_axisbelow(True)
    heading, place = _drawable(panel.title, 80), ("figure fraction", "axes fraction")
    _note(axes, heading, (0, 1), (6, 5), place, fontsize=10, fontweight="bold")
