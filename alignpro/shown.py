"""Results that show themselves: printed as their verb prints them, as a table of pandas, as a picture."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

_WIDEST = 240


class Shown:
    """A result of a verb. `print` gives the verb's tables, a notebook shows them, and `repr` is one line."""

    def __str__(self) -> str:
        return _layouts().text(self)

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        return _layouts().html(self)

    def to_frame(self) -> Any:
        """The result's numbers as a `pandas.DataFrame`, each `Estimate` with its limits beside it.

        Raises:
            AlignProError: pandas is missing; or this result has no numbers to list.
        """
        return _layouts().frame(self)

    def plot(self, figure: str = "") -> Any:
        """A figure of the verb's page as a `matplotlib.figure.Figure`, to show or to save (`savefig`).

        Args:
            figure: the heading above it on the page, or the beginning of it. Left out: the first figure.

        Raises:
            AlignProError: matplotlib is missing; there is no such figure, or no number in it to draw.
        """
        return _layouts().plot(self, figure)


def _layouts() -> Any:
    # By name, as the package's own names are: who prints a result must not have to import the command line,
    # and this module, on which results stand, must not stand on it.
    return importlib.import_module("alignpro.commands.showing")


def brief(record: Any) -> str:
    """A record in one line: its name, and short numbers and texts; of arrays and containers the sizes."""
    fields = record._asdict() if hasattr(record, "_asdict") else _fields(record)
    said = f"{type(record).__name__}({', '.join(f'{name}={_short(v)}' for name, v in fields.items())})"
    return said if len(said) <= _WIDEST else f"{said[: _WIDEST - 3]}…)"


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:39]}…")
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, int):
        return repr(value)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Mapping | list | tuple | set | frozenset) and not hasattr(value, "_asdict"):
        return f"<{len(value)}>"
    return f"{type(value).__name__}(…)"
