"""From the name of a reward to the reward: a row of `REWARDS`, or one of the user's own with its bounds."""

import importlib
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alignpro.errors import AlignProError
from alignpro.llm.models.catalogue import HUB_ID, checked_folder
from alignpro.llm.models.libraries import one_line
from alignpro.llm.models.packages import scrub
from alignpro.llm.rewards.bounds import SYNTAX, Bounds, parse_bounds
from alignpro.llm.rewards.bradley_terry import BradleyTerryReward
from alignpro.llm.rewards.classifier import SequenceReward, saved_facts
from alignpro.llm.rewards.endpoint import EndpointReward, check_url
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.minilm import minilm_bt
from alignpro.llm.rewards.reward import Reward, shown
from alignpro.llm.targets.settings import EndpointSettings

REWARDS: dict[str, Callable[..., Reward]] = {"minilm-bt": minilm_bt}
"""The packaged rewards by name: functions that can be called without arguments."""

KEY_ENV = "ALIGNPRO_REWARD_KEY"
"""The environment variable whose key goes to an endpoint that is given by its address, if it is set."""

_NAMES = (
    "a folder of a saved reward, or, with @BOUNDS at the end, a hub id owner/name, module:function or the "
    f"address of an endpoint; BOUNDS is {SYNTAX}"
)
_BOUNDS = re.compile(r"clip\b|squash\b|[-+.\d]+[^/]*,")
_ADDRESS = re.compile(r"https?://")
_IMPORT = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


@dataclass(frozen=True)
class Spec:
    """The name of a reward, read once: what is meant, where it is, and the bounds."""

    kind: Literal["packaged", "head", "classifier", "function", "object", "endpoint"]
    """A row of `REWARDS`, a folder that `BradleyTerryReward.save` wrote, a sequence classifier, a Python
    function, a reward made in Python, or an address."""
    target: str = field(repr=False)
    """The name without its bounds; an address may hold a key."""
    bounds: Bounds | None
    """Bounds given with the name; needed unless the reward brings its own."""
    shown: str
    """The name to be written down: of an address without its query, in which there may be a key."""

    def open(self, **options: Any) -> Reward:
        """Make the reward.

        Args:
            options: further arguments of what makes it: the function in `REWARDS`, `BradleyTerryReward.load`,
                `SequenceReward.load`, `CallableReward` or `EndpointReward`.
        """
        match self.kind:
            case "packaged":
                return REWARDS[self.target](**options)
            case "head":
                return BradleyTerryReward.load(Path(self.target).expanduser(), **options)
            case "classifier":
                return SequenceReward.load(self.target, self.bounds, **options)
            case "object":
                return _imported(self.target)
        bounds = parse_bounds(self.bounds)
        if self.kind == "function":
            return CallableReward(_imported(self.target), bounds, **({"name": self.target} | options))
        settings = options.pop("settings", EndpointSettings())
        if settings.key_env is None and os.environ.get(KEY_ENV):
            settings = replace(settings, key_env=KEY_ENV)
        return EndpointReward(self.target, bounds, settings, **options)


def load_reward(name: str = "minilm-bt", **options: Any) -> Reward:
    """Open the reward of that name.

    Args:
        name: a row of `REWARDS`; a folder that `BradleyTerryReward.save` or `train_reward` wrote;
            `FOLDER@BOUNDS` or `owner/name@BOUNDS` of a reward model; `module:function@BOUNDS`;
            `module:object` of a reward made in Python, with its own bounds; or `http(s)://…@BOUNDS`, which is
            sent the key in `ALIGNPRO_REWARD_KEY` if that is set.
        options: see `Spec.open`.
    """
    return read_spec(name).open(**options)


def read_spec(name: str) -> Spec:
    """Read the name of a reward (see `load_reward`), with no download or request. A module is imported."""
    if name in REWARDS:
        return Spec("packaged", name, None, name)
    folder = Path(name).expanduser()
    if name and folder.is_dir() and not (folder / "config.json").is_file():
        return Spec("head", name, None, name)
    target, bounds = (name, None) if folder.is_dir() else _split(name)
    if _ADDRESS.match(target):
        address = check_url(target)
        return Spec("endpoint", target, parse_bounds(bounds), f"{address}@{bounds}")
    folder = Path(target).expanduser()
    if target and folder.is_dir():
        checked_folder(folder)
        if bounds is None:
            parse_bounds(saved_facts(folder).get("bounds"))
        return Spec("classifier", target, bounds, name)
    if _IMPORT.fullmatch(target):
        if not _is_reward(_imported(target)):
            return Spec("function", target, parse_bounds(bounds), name)
        if bounds is not None:
            raise AlignProError(f"reward {target}: it has bounds of its own; leave out @{bounds}")
        return Spec("object", target, None, name)
    if HUB_ID.fullmatch(target):
        return Spec("classifier", target, parse_bounds(bounds), name)
    raise AlignProError(f"reward {shown(target)}: choose from {', '.join(REWARDS)}, or name {_NAMES}")


def _split(name: str) -> tuple[str, Bounds | None]:
    """Divide `NAME@BOUNDS`. Another @ in NAME is left alone."""
    target, at, bounds = name.rpartition("@")
    if at and target and _BOUNDS.match(bounds):
        return target, parse_bounds(bounds)
    return name, None


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
            f"{shown(scrub(one_line(error)), 200)}); put its folder on PYTHONPATH"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise AlignProError(f"reward {name}: {module} has no {attributes}; check the spelling")
        found = getattr(found, attribute)
    if not callable(found) and not _is_reward(found):
        raise AlignProError(f"reward {name}: it is {type(found).__name__}; name a function or a reward")
    return found
