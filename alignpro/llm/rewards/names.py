"""What a reward's name may say: a folder, a hub id, module:function or an address, each with its bounds."""

import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.models import catalogue, download, libraries
from alignpro.llm.rewards import opening, reward
from alignpro.llm.rewards.bounds import _SYNTAX, Bounds, parse_bounds
from alignpro.llm.rewards.classifier import SequenceReward, _saved_facts
from alignpro.llm.rewards.endpoint import EndpointReward, check_url
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.reward import shown

KEY_ENV = "ALIGNPRO_REWARD_KEY"
"""The environment variable whose key goes to an endpoint that is given by its address, if it is set."""

_NAMES = (
    "a folder of a saved reward, or, with @BOUNDS at the end, a hub id owner/name, module:function or the "
    f"address of an endpoint; BOUNDS is {_SYNTAX}"
)
_IMPORT = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def split_name(name: str) -> tuple[str, Bounds | None]:
    """What `NAME` or `NAME@BOUNDS` names, and the bounds. An @ inside NAME is left alone.

    Raises:
        AlignProError: the bounds are not of `parse_bounds`'s form.
    """
    target, at, bounds = name.rpartition("@")
    if at and target and re.match(r"clip\b|squash\b|[-+.\d]+[^/]*,", bounds):
        return target, parse_bounds(bounds)
    return name, None


def shown_name(name: str) -> str:
    """`name`, to be written down: an address without its query, in which there may be a key."""
    target, bounds = split_name(name)
    if not re.match(r"https?://", target):
        return name
    return check_url(target) + ("" if bounds is None else f"@{bounds}")


def check_name(name: str) -> None:
    """Refuse what `open_reward` would refuse, without a download or a request. A module is imported.

    Raises:
        AlignProError: so.
    """
    _kind(name)


def open_reward(name: str, **options: Any) -> reward.Reward:
    """The reward that `name` names.

    Args:
        name: a folder that `train_reward` wrote; `FOLDER@BOUNDS`, `owner/name@BOUNDS` of a reward model;
            `module:function@BOUNDS`; `module:object` of a reward made in Python, with its own bounds; or
            `http(s)://…@BOUNDS`, which is sent the key in `ALIGNPRO_REWARD_KEY` if that is set.
        options: of `SequenceReward.load`, `CallableReward` or `EndpointReward`.

    Raises:
        AlignProError: nothing has that name, or bounds are missing; or from making the reward.
    """
    kind, target, bounds = _kind(name)
    if kind == "endpoint":
        key = {"key_env": KEY_ENV} if os.environ.get(KEY_ENV) else {}
        return EndpointReward(target, parse_bounds(bounds), **(key | options))
    if kind == "sequence":
        return SequenceReward.load(target, bounds, **options)
    found = _imported(target)
    if _is_reward(found):
        return found
    return CallableReward(found, parse_bounds(bounds), **({"name": target} | options))


def _kind(name: str) -> tuple[str, str, Bounds | None]:
    target, bounds = (name, None) if Path(name).expanduser().is_dir() else split_name(name)
    if re.match(r"https?://", target):
        check_url(target)
        parse_bounds(bounds)
        return "endpoint", target, bounds
    folder = Path(target).expanduser()
    if target and folder.is_dir():
        catalogue.checked_folder(folder)
        if bounds is None:
            parse_bounds(_saved_facts(folder).get("bounds"))
        return "sequence", target, bounds
    if _IMPORT.fullmatch(target):
        found = _imported(target)
        if _is_reward(found):
            if bounds is not None:
                raise AlignProError(f"reward {target}: it has bounds of its own; leave out @{bounds}")
        else:
            parse_bounds(bounds)
        return "function", target, bounds
    if catalogue.HUB_ID.fullmatch(target):
        parse_bounds(bounds)
        return "sequence", target, bounds
    raise AlignProError(f"reward {shown(target)}: choose from {', '.join(opening.REWARDS)}, or name {_NAMES}")


def _is_reward(found: Any) -> bool:
    return all(hasattr(found, name) for name in ("score", "describe", "low", "high")) and not inspect.isclass(
        found
    )


def _imported(name: str) -> Any:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise AlignProError(
            f"reward {name}: importing {module} failed ({type(error).__name__}: "
            f"{shown(download.scrub(libraries.one_line(error)), 200)}); put its folder on PYTHONPATH"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise AlignProError(f"reward {name}: {module} has no {attributes}; check the spelling")
        found = getattr(found, attribute)
    if not callable(found) and not _is_reward(found):
        raise AlignProError(f"reward {name}: it is {type(found).__name__}; name a function or a reward")
    return found
