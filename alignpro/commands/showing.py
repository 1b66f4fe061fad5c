"""How results show themselves in Python: by the text and the page of their verb, and as rows of numbers."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from alignpro.errors import AlignProError
from alignpro.report.excerpt import excerpt, preformatted
from alignpro.report.numbers import ends, interval
from alignpro.report.page import Dots, Page, Stack, Stacks, dot
from alignpro.shown import brief

Row = dict[str, Any]


class Layout(NamedTuple):
    """How results of one class look."""

    text: Callable[[Any], str]
    rows: Callable[[Any], list[Row]] | None = None
    """Numbers for `to_frame`, a mapping by column for each row."""
    page: Callable[[Any], Page] | None = None
    """The page whose tables and figures a notebook shows."""


def _of(verb: str, what: str, *more: Any) -> Callable[[Any], Any]:
    """The function `what` of a verb's module, which is imported when a result is shown."""
    return lambda result: getattr(importlib.import_module(f"alignpro.commands.{verb}"), what)(result, *more)


def _verb(verb: str, rows: Callable[[Any], list[Row]] | None = None, *record: Any) -> Layout:
    return Layout(_of(verb, "text"), rows, _of(verb, "page", *record))


def _cells(**numbers: Any) -> Row:
    """Columns of a row. An `Estimate` makes three: its value, and its limits with _lo and _hi in the name."""
    row: Row = {}
    for name, value in numbers.items():
        if hasattr(value, "lo"):
            value, lo, hi = ends(value)
            row |= {name: value, f"{name}_lo": lo, f"{name}_hi": hi}
        else:
            row[name] = value
    return row


def _estimate(e: Any) -> list[Row]:
    return [_cells(value=e, level=e.level, n=e.n, n_prompts=e.n_clusters, method=e.method, bias=e.bias)]


def _estimated(result: Any) -> list[Row]:
    return [*_estimated_rows(result)]


def _estimated_rows(result: Any) -> Iterator[Row]:
    for name, e in result.quantities.items():
        yield {"what": "quantity", "name": name, "about": "", **_cells(value=e), "verdict": ""}
    for arm, e in result.gaps.items():
        yield {"what": "gap", "name": "gap", "about": arm, **_cells(value=e), "verdict": ""}
    for bound in result.bounds:
        numbers = {"rhs": bound.rhs, "slack": bound.slack, **bound.terms}
        for what, e in numbers.items():
            if e is not None:
                named = {"what": what, "name": bound.name, "about": bound.prompter}
                yield {**named, **_cells(value=e), "verdict": bound.verdict}


def _headroom(result: Any) -> list[Row]:
    return [
        _cells(lam=at.lam, over_reference=at.over_reference, net=at.net, over_none=at.over_none)
        for at in result.at
    ]


def _compared(result: Any) -> list[Row]:
    rows = []
    for arm, mean in result.mean.items():
        row = {"arm": arm, **_cells(mean=mean, variance=result.variance[arm])}
        if (against := result.against.get(arm)) is not None:
            row |= _cells(gain=against.mean, variance_gain=against.variance, win_rate=against.win_rate)
        rows.append(row)
    return rows


def _judged(result: Any) -> list[Row]:
    rates = ("win_rate", "length_controlled", "agreement", "first_shown")
    found = {name: getattr(result, name) for name in rates}
    return [{"rate": name, **_cells(value=e), "pairs": e.n} for name, e in found.items() if e is not None]


def _bound(b: Any) -> Row:
    numbers = {name: getattr(b, name) for name in ("gap", "relation", "rhs", "slack", "error")}
    return {"bound": b.name, **numbers, "verdict": b.verdict, "vacuous": b.vacuous, **b.terms}


def _solved(result: Any) -> list[Row]:
    return [
        {"file": one.file, "beta": one.beta, "lam": one.lam, **_bound(b)}
        for one in result.files
        for b in one.bounds.values()
    ]


def _verified(result: Any) -> list[Row]:
    names = ("name", "kind", "verdict", "checked", "violations", "inconclusive", "least_slack", "vacuous")
    return [{name: getattr(claim, name) for name in names} for claim in result.by_statement]


def _resampled(result: Any) -> list[Row]:
    tilted = [
        {"how": "tilt", **_cells(lam=at.lam, gain=at.gain, kl=at.kl, ess=at.ess)} for at in result.tilted
    ]
    return [
        *tilted,
        *({"how": "best of n", **_cells(n=b.n, gain=b.gain, kl=b.kl_bound)} for b in result.best),
    ]


def _raced(result: Any) -> list[Row]:
    return [
        _cells(instruction=c.instruction, mean=c.mean, behind=c.behind, ruled_out=c.ruled_out)
        for c in result.candidates
    ]


def _routed(result: Any) -> list[Row]:
    names = ("over_single", "over_none", "single_over_none", "foreseen")
    found = {name: getattr(result, name) for name in names}
    return [_cells(of=name, gain=g.gain, mean=g.mean, base=g.base) for name, g in found.items() if g]


def _metrics(result: Any) -> list[Row]:
    return [dict(line) for line in result.metrics]


def _trained_page(result: Any) -> Page:
    from alignpro.llm.arms.found import found

    page: Page = _of("train", "page")(found(result))
    return page


def _bound_page(b: Any) -> Page:
    page = Page("solve", f"The bound {b.name}", f"{b.name}: {b.verdict}.", {})
    if b.relation == "<=" and b.terms:
        stack = Stack(b.name, b.terms, b.rhs, b.gap, "vacuous" if b.vacuous else "")
        page.add(
            "Bound and gap",
            "",
            figure=Stacks("The bound beside the gap", "reward units", [stack], "bound", "gap"),
        )
    return page


def _frontier(result: Any) -> list[Row]:
    names = ("lam", "mean_kl", "mean_reward", "mean_lift")
    columns = [getattr(result, name).tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _frontier_page(result: Any) -> Page:
    page = Page("solve", "Reward and KL at each λ", "", {})
    drawn = [
        dot(f"λ = {row['lam']:.3g}, KL {row['mean_kl']:.3g}", _Point(row["mean_reward"]))
        for row in _frontier(result)
    ]
    page.add("Reward at each λ", "", figure=Dots("Mean reward of ρ* at each λ", "reward units", drawn))
    return page


class _Point(NamedTuple):
    value: float
    lo: float | None = None
    hi: float | None = None


LAYOUTS: dict[str, Layout] = {
    "Estimate": Layout(interval, _estimate),
    "EstimateReport": _verb("estimate", _estimated),
    "Headroom": _verb("headroom", _headroom),
    "Comparison": _verb("compare", _compared),
    "WinRates": _verb("judge", _judged, {}),
    "BoundReport": Layout(_of("solve", "text_of_bound"), lambda b: [_bound(b)], _bound_page),
    "Solutions": _verb("solve", _solved),
    "Frontier": Layout(str, _frontier, _frontier_page),
    "Verification": _verb("verify", _verified),
    "Resampled": _verb("resample", _resampled, {}),
    "Instructed": _verb("instruct", _raced, {}),
    "Routed": _verb("route", _routed, {}),
    "TrainedPrompter": Layout(_of("train", "text"), _metrics, _trained_page),
    "TrainedTree": Layout(brief, _metrics),
    "Tuned": _verb("sft", _metrics),
    "TrainedReward": Layout(_of("reward_model", "text"), _metrics, _of("reward_model", "page")),
}
"""By the name of the result's class."""


def _layout(result: Any) -> Layout:
    return LAYOUTS[type(result).__name__]


def text(result: Any) -> str:
    """The result as its verb prints it."""
    return _layout(result).text(result)


def html(result: Any) -> str:
    """The result for a notebook: the tables of its page, or its text where it has none."""
    page = _layout(result).page
    content = None if page is None else page(result)
    return preformatted(text(result)) if content is None or not _tabled(content) else excerpt(content)


def _tabled(page: Page) -> bool:
    return any(section.tables for section in page.sections)


def frame(result: Any) -> Any:
    """The result's rows as a `pandas.DataFrame`."""
    rows = _layout(result).rows
    if rows is None:
        raise AlignProError(f"to_frame: {type(result).__name__} has no rows of numbers")
    try:
        import pandas
    except ModuleNotFoundError:
        raise AlignProError("to_frame: the package pandas is missing; run pip install pandas") from None
    return pandas.DataFrame(rows(result))


def plot(result: Any, figure: str = "") -> Any:
    """A figure of the result's page, drawn; by the beginning of its heading, or the first one."""
    page = _layout(result).page
    found = (
        {} if page is None else {s.heading: s.figure for s in page(result).sections if s.figure is not None}
    )
    if not found:
        raise AlignProError(f"plot: a {type(result).__name__} has no figure; print it or take to_frame()")
    name = next((name for name in found if name.startswith(figure)), None)
    if name is None:
        raise AlignProError(f"plot {figure!r}: is no figure; choose from {', '.join(found)}")
    try:
        import matplotlib.pyplot  # noqa: F401 - a notebook shows figures once it is there

        from alignpro.report.figures import draw
    except ImportError:
        raise AlignProError("plot: matplotlib is missing; run pip install matplotlib") from None
    drawing = draw(found[name])
    if drawing is None:
        raise AlignProError(f"plot {name!r}: holds no finite number to draw; print the result")
    return drawing.canvas
