"""Says what a configuration file, which may be a stranger's, is not to choose: code, and where keys go."""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from alignpro.errors import AlignProError
from alignpro.files import real

_CODE = re.compile(r"(?P<place>[\w.]+|.*\.py):(?P<name>[^\W\d][\w.]*(?:@.*)?)", re.DOTALL)
"""A reward that is a Python function: FILE.py:NAME or module:NAME, with bounds after it."""
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_REWARD_KEY = "ALIGNPRO_REWARD_KEY"
_BOUND = "_HOST"


def checked(file: str, options: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The options of a file, with functions beside it named from the working folder.

    Args:
        options: values by the names of flags, without dashes.
        given: flags on the command line, which win over the file's and are the user's own.

    Raises:
        AlignProError: the file names a function that is not in a file beside it, or texts for vLLM's engine;
            or it chooses the variable of a key, or the address that one goes to, and that key is bound to no
            host.
    """
    own = {name: value for name, value in options.items() if name not in given}
    if "reward" in own:
        words = own["reward"] if isinstance(own["reward"], list) else [own["reward"]]
        found = [_beside(file, word) if isinstance(word, str) else word for word in words]
        own["reward"] = found if isinstance(own["reward"], list) else found[0]
        _check_reward_key(file, own, given, [word for word in words if _ADDRESS.match(_parts(word)[1])])
    if _ADDRESS.match(str(own.get("reward-judge"))):
        _check_reward_key(file, own, given, [own["reward-judge"]])
    for name in own:
        if name.endswith("key-env") and own[name] and not _bound(own[name]):
            variable = str(own[name]) if re.fullmatch("[A-Z][A-Z0-9_]{0,63}", str(own[name])) else "VARIABLE"
            raise AlignProError(
                f"--config {file}: {name.replace('-', '_')}: a file does not choose which key is sent; give "
                f"--{name} {variable} on the command line, or export {variable}{_BOUND}=HOST, the host that "
                "the key is for"
            )
    if "target-engine" in own:
        _check_engine(file, own["target-engine"])
    return {**options, **own}


def _bound(variable: Any) -> bool:
    return bool(os.environ.get(f"{variable}{_BOUND}", "").strip())


def _beside(file: str, word: str) -> str:
    """A reward's word, its function's file named from the working folder; AlignProError where it is not in
    the folder of the configuration file."""
    weight, reward = _parts(word)
    found = None if _ADDRESS.match(reward) else _CODE.fullmatch(reward)
    if found is None:
        return word
    place, home = Path(found["place"]).expanduser(), real(Path(file).parent)
    path = real(home / place)
    if place.suffix != ".py" or path.parent != home or not path.is_file():
        shown = word if len(word) <= 80 else f"{word[:79]}…"
        raise AlignProError(
            f"--config {file}: reward {shown}: a file names Python functions of files beside it alone, as "
            "./mine.py:score; put that file there, or give --reward on the command line"
        )
    name = found["place"] if real(Path(found["place"]).expanduser()) == path else os.path.relpath(path)
    return f"{weight}{name}:{found['name']}"


def _parts(word: Any) -> tuple[str, str]:
    """Divide `WEIGHT*NAME`, as the reader of rewards does: what is no number is part of the name."""
    weight, star, name = str(word).partition("*")
    try:
        float(weight)
    except ValueError:
        return "", str(word)
    return f"{weight}{star}" * bool(star), (name if star else str(word)).strip()


def _check_reward_key(
    file: str, own: Mapping[str, Any], given: Collection[str], addresses: Collection[Any]
) -> None:
    """Refuse to send the key that goes to any reward's address to one that a file chose."""
    if not addresses or "reward-key-env" in {*own, *given}:
        return
    if os.environ.get(_REWARD_KEY) and not _bound(_REWARD_KEY):
        host = urlsplit(_parts(next(iter(addresses)))[1]).hostname
        raise AlignProError(
            f"--config {file}: the key in {_REWARD_KEY} would go to {host}, which a file chose; give "
            f"--reward-key-env {_REWARD_KEY} on the command line, or export {_REWARD_KEY}{_BOUND}={host}"
        )


def _check_engine(file: str, text: Any) -> None:
    """Refuse texts among the engine's arguments: some name code that it would import."""
    try:
        found = json.loads(str(text))
    except (ValueError, RecursionError):
        return  # told where it is read
    for name, value in found.items() if isinstance(found, dict) else ():
        if not isinstance(value, int | float | None):
            raise AlignProError(
                f"--config {file}: target_engine {name!r}: a file gives numbers, true and false alone, since "
                "texts may name code; give --target-engine on the command line"
            )
