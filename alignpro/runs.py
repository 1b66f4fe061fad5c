"""A run in a folder: whether it can be continued with these settings, and on what machine it was made."""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError


def refuse_other_settings(
    folder: Path, before: Any, now: Mapping[str, Any], option: str = "--resume"
) -> None:
    """Raise AlignProError, naming the first setting that differs, unless a run can be continued as asked."""

    def differences(old: Any, new: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for key in new:
                yield from differences(old.get(key), new[key], f"{name}.{key}" if name else key)
        elif old != new:
            yield name, old, new

    for name, old, new in differences(before, now, ""):
        raise AlignProError(
            f"{option}: {folder} was started with {name} = {old}, not {new}; "
            "repeat that setting or choose another folder"
        )


def environment() -> dict[str, Any]:
    """Machine and library versions, for the record: no user name, host name or path."""
    torch = sys.modules.get("torch")
    packages = ("alignpro", "torch", "transformers", "trl", "peft", "jax", "numpy")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }
