"""Numbers, intervals, columns and JSON values: how every verb writes what it found."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def number(value: float | None, form: str = ".4g") -> str:
    """`value` for reading: whole numbers with commas, "-" for none or NaN, inf for what nothing bounds."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return "inf" if value > 1e300 else "-inf" if value < -1e300 else format(value, form)


def interval(e: Any, form: str = ".4g") -> str:
    """`value [lo, hi]` of an `Estimate` or of one read from JSON, or what there is of it; "-" for None."""
    value, lo, hi = ends(e)
    if lo is None:
        return number(value, form)
    return f"{number(value, form)} [{number(lo, form)}, {number(hi, form)}]"


def limits(e: Any, form: str = ".4g") -> str:
    """`lo to hi` of an `Estimate`; empty where there is no interval."""
    _, lo, hi = ends(e)
    return "" if lo is None else f"{number(lo, form)} to {number(hi, form)}"


def ends(e: Any) -> tuple[float | None, float | None, float | None]:
    """The value and both ends of an `Estimate`, or of one read from JSON; None for what it lacks."""
    if e is None:
        return None, None, None
    if isinstance(e, Mapping):
        return e["value"], e["lo"], e["hi"]
    return e.value, e.lo, e.hi


def columns(rows: Sequence[Sequence[str]], kinds: str = "", indent: str = "  ") -> str:
    """Rows of text as aligned lines; `kinds` has a letter a column, n for numbers: these stand right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    sides = [str.rjust if kind == "n" else str.ljust for kind in kinds.ljust(len(widths), "w")]
    lines = []
    for row in rows:
        cells = [side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)]
        lines.append(indent + "  ".join(cells).rstrip())
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: dicts and lists for records and arrays, None for NaN and infinities."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array or a number of NumPy, JAX or torch
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ADDRESS = re.compile(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")
_PATH = re.compile(
    r"(?<![\w./…<|)\]}~])(?<!https:)(?<!http:)(?:file:)?(?:~[\w-]*)?/+(?:[^\s/'\",;]+/+)*([^\s/'\",;]+)?"
)


def unplaced(text: str) -> str:
    """`text` without the folders of absolute paths, …/name, and without keys and passwords of addresses."""
    text = _ADDRESS.sub(lambda m: m[1] + m[2] + ("?…" if "?" in m[0] else ""), text)
    return _PATH.sub(lambda m: f"…/{m[1]}" if m[1] else m[0] if len(m[0]) == 1 else "…/", text)
