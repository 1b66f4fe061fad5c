"""Decides whether a run in a folder can be continued."""

from collections.abc import Iterator, Mapping
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
