"""Numbers, intervals and addresses as text."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from alignpro.report.page import Json

_ADDRESS = re.compile(r"(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)(?:[?#][^\s'\"]*)?")
_PATH = re.compile(
    r"(?<![\w./…<|)\]}~])(?<!https:)(?<!http:)(?:file:)?(?:~[\w-]*)?/+(?:[^\s/'\",;]+/+)*([^\s/'\",;]+)?"
)


def unplaced(text: str) -> str:
    """`text` without the folders of absolute paths, …/name, and without keys and passwords of addresses."""
    text = _ADDRESS.sub(lambda m: m[1] + m[2] + ("?…" if "?" in m[0] else ""), text)
    return _PATH.sub(lambda m: f"…/{m[1]}" if m[1] else m[0] if len(m[0]) == 1 else "…/", text)


def number(value: float | None, form: str = ".4g") -> str:
    """For reading: whole numbers as they are, a dash for none, ∞ for what no interval bounds."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    text = "∞" if value > 1e300 else "-∞" if value < -1e300 else format(value, form)
    return text.replace("-", "−")


def interval(e: Json | None, form: str = ".4g") -> str:
    """value [lo, hi], or what there is of it."""
    if e is None or e["lo"] is None:
        return number(None if e is None else e["value"], form)
    return f"{number(e['value'], form)} [{number(e['lo'], form)}, {number(e['hi'], form)}]"


def _limits(e: Json | None) -> str:
    return "" if e is None or e["lo"] is None else f"{number(e['lo'])} to {number(e['hi'])}"
