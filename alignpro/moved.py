"""Old public paths: for one release, a name that has moved is still found where it was, with a warning."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(old: str, *homes: str, **names: str) -> Callable[[str], Any]:
    """The `__getattr__` of the module `old`; `homes` hold all that it held, `names` say where one name is."""

    def find(name: str) -> Any:
        places = (names[name],) if name in names else () if name.startswith("_") else homes
        for place in places:
            module = importlib.import_module(place)
            if hasattr(module, name):
                warnings.warn(
                    f"{old}.{name} has moved to {place}.{name}; the old path goes with the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(module, name)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find
