"""From the names of rewards to the reward: rows of `REWARDS`, or the user's own with their bounds."""

import inspect
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

from alignpro.errors import AlignProError
from alignpro.llm.models import contents
from alignpro.llm.models.catalogue import HUB_ID, check_name, checked_folder
from alignpro.llm.models.devices import check_dtype
from alignpro.llm.models.load import loading
from alignpro.llm.rewards import own
from alignpro.llm.rewards.bounds import SYNTAX, Bounds, Declared, parse_bounds
from alignpro.llm.rewards.bradley_terry import BradleyTerryReward
from alignpro.llm.rewards.classifier import SequenceReward, choose_output, public_name, saved_facts
from alignpro.llm.rewards.columns import Columns, columns_of_all
from alignpro.llm.rewards.combined import Mean, Sum, check_parts, check_prompts, said
from alignpro.llm.rewards.endpoint import EndpointReward, check_url
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.judged import JudgeReward
from alignpro.llm.rewards.minilm import minilm_bt
from alignpro.llm.rewards.reward import Reward, lacking, shown
from alignpro.llm.rewards.rubric import JudgeRewardSettings
from alignpro.llm.rewards.texts import NUMBERED, TEXTS
from alignpro.llm.rewards.verifiable import Verifiable
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.settings import EndpointSettings

REWARDS: dict[str, Callable[..., Reward]] = {"minilm-bt": minilm_bt, **TEXTS, "verifiable": Verifiable}
"""The packaged rewards by name: functions that can be called without arguments. Some of them take a number,
written after a colon (`list:5`)."""

JUDGE = "judge"
"""The reward that a model gives on a rubric (`JudgeRewardSettings`)."""
KEY_ENV = "ALIGNPRO_REWARD_KEY"
"""The environment variable whose key goes to an endpoint that is given by its address, if it is set."""

_NAMES = (
    "a folder of a saved reward, or, with @BOUNDS at the end, a hub id owner/name (with #LABEL before the @ "
    "where it has several outputs), a Python function as ./FILE.py:NAME or module:NAME, or the address of an "
    f"endpoint; BOUNDS is {SYNTAX}"
)
_BOUNDS = re.compile(r"clip\b|squash\b|[-+.\d]+[^/]*,")
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_WITH_NUMBER = re.compile(r"([\w-]+):(\d+(?:\.\d+)?)")
_WEIGHTED = re.compile(r"\s*([^*]*?)\s*\*\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """The name of a reward, read once: what is meant, where it is, and the bounds."""

    kind: Literal["packaged", "head", "classifier", "function", "object", "endpoint", "judge"]
    """A row of `REWARDS`, a folder that `BradleyTerryReward.save` wrote, a sequence classifier, a Python
    function, a reward made in Python, an address, or the one word `judge`."""
    target: str = field(repr=False)
    """The name without its bounds; an address may hold a key."""
    bounds: Bounds | None
    """Bounds given with the name; needed unless the reward brings its own."""
    shown: str
    """The name to be written down: of an address without its query, in which there may be a key."""
    label: str | None = None
    """The output of a classifier that is the reward, by its label or number; None where it has but one."""

    @property
    def reads(self) -> Columns:
        """The columns of the prompts' data that the reward reads, known before it is opened."""
        return columns_of_all([self._code()])

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the reward cannot judge, before it is opened."""
        check_prompts(self._code(), prompts)

    def _code(self) -> Any:
        """The reward where it is a few lines of Python, and nothing is to be loaded; else None."""
        light = self.kind in ("function", "object") or REWARDS.get(self.target) is Verifiable
        return self.open() if light else None

    def content(self) -> str | None:
        """Digest what the name stands for, as it is now: the weights of a model, or the code of a function.

        None of a packaged reward, whose name says it, of an endpoint, and of what is not on this machine.
        """
        match self.kind:
            case "head" | "classifier":
                return contents.of_model(self.target)
            case "function" | "object":
                return contents.of_code(_imported(self.target))
        return None

    @property
    def probability(self) -> bool:
        """Whether the reward is the probability of the label: its range is then declared, not squashed."""
        return self.label is not None and isinstance(self.bounds, Declared)

    def open(self, **options: Any) -> Reward:
        """Make the reward.

        Args:
            options: further arguments of what makes it: the function in `REWARDS`, `BradleyTerryReward.load`,
                `SequenceReward.load`, `CallableReward`, `EndpointReward` or `judge_opener`.
        """
        match self.kind:
            case "packaged":
                name, _, number = self.target.partition(":")
                return REWARDS[name](*([float(number)] if number else []), **options)
            case "head":
                return BradleyTerryReward.load(Path(self.target).expanduser(), **options)
            case "classifier":
                chosen: dict[str, Any] = {"output": self.label, "probability": self.probability}
                return SequenceReward.load(self.target, self.bounds, **(chosen | options))
            case "object":
                return _imported(self.target)
            case "judge":
                settings = options.pop("settings", JudgeRewardSettings())
                return judge_opener(settings, **options)()
        bounds = parse_bounds(self.bounds)
        if self.kind == "function":
            return CallableReward(_imported(self.target), bounds, **({"name": self.target} | options))
        return EndpointReward(self.target, bounds, keyed(options.pop("settings", None)), **options)


def keyed(settings: EndpointSettings | None) -> EndpointSettings:
    """Settings of a reward's endpoint, with the key in `KEY_ENV` where that is set and they name no other."""
    settings = settings or EndpointSettings()
    known = settings.key_env is not None or not os.environ.get(KEY_ENV)
    return settings if known else replace(settings, key_env=KEY_ENV)


def judge_opener(
    settings: JudgeRewardSettings,
    endpoint: EndpointSettings | None = None,
    refusals: Refusals | None = None,
    **local: Any,
) -> Callable[[], JudgeReward]:
    """Check how the judge is named, and return what opens the reward: a model is loaded only then.

    Args:
        local: `dtype`, `batch_size` and `chat_template_kwargs` of a judge in this process (`LocalTarget`).
    """
    name, refusals = settings.judge, refusals or Refusals()
    if name is None:
        raise AlignProError("reward_judge: name the model that scores the answers")
    settings.text()  # refused here, where it cannot be read
    if settings.address:
        endpoint = keyed(endpoint)
        if endpoint.model is None:
            raise AlignProError(f"reward_model: name the model that {name} serves")
        served = Endpoint(name, endpoint, role="reward")
        return lambda: JudgeReward(served, settings, refusals)
    if given := (endpoint or EndpointSettings()).given():
        raise AlignProError(f"reward_{given[0]}: is for an endpoint, and {name!r} is no http(s) address")
    check_name(name)
    check_dtype(local.get("dtype", "auto"))

    def load() -> JudgeReward:
        return JudgeReward(LocalTarget(name, **{"batch_size": 8, **local}), settings, refusals)

    return load


@dataclass(frozen=True)
class Plan:
    """The names of one or several rewards, read once, and how they are put together."""

    kind: Literal["one", "sum", "mean"]
    specs: tuple[Spec, ...]
    weights: tuple[float, ...]
    """Weights in the sum, one for each; all 1 otherwise."""

    @property
    def shown(self) -> str:
        """Name it in one line, as it may be written down."""
        return said(self.kind, [spec.shown for spec in self.specs], self.weights)

    def content(self) -> str | None:
        """Digest what the names stand for (see `Spec.content`)."""
        found = [spec.content() for spec in self.specs]
        return "+".join(each or "-" for each in found) if any(found) else None

    @property
    def reads(self) -> Columns:
        """The columns of the prompts' data that the rewards read."""
        return columns_of_all(self.specs)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that one of the rewards cannot judge, before any is opened."""
        for spec in self.specs:
            spec.check_prompts(prompts)

    def put_together(self, rewards: Sequence[Reward]) -> Reward:
        """Make one reward of those that were opened, one for each name."""
        names = [spec.shown for spec in self.specs]
        match self.kind:
            case "one":
                return rewards[0]
            case "mean":
                return Mean(rewards, names)
        return Sum(rewards, self.weights, names)


def read_plan(names: str | Sequence[str]) -> Plan:
    """Read the names of one or several rewards, as `--reward` takes them.

    Args:
        names: one name (see `load_reward`); several, or one with a weight (`0.7*NAME`), for their sum; or
            several after the word `mean`.
    """
    words = [names] if isinstance(names, str) else list(names)
    mean = len(words) > 1 and words[0] == "mean"
    pairs = [_weighted(word) for word in (words[1:] if mean else words)]
    specs, weights = tuple(read_spec(name) for _, name in pairs), tuple(weight for weight, _ in pairs)
    check_parts([spec.shown for spec in specs], weights)
    if mean and (len(specs) < 2 or set(weights) != {1.0}):
        raise AlignProError("reward mean: give at least two rewards after it, without weights")
    return Plan("mean" if mean else "one" if weights == (1.0,) else "sum", specs, weights)


def load_reward(name: str | Sequence[str] = "minilm-bt", **options: Any) -> Reward:
    """Open the reward of that name, or the sum or mean of several.

    Args:
        name: a row of `REWARDS`; a folder that `BradleyTerryReward.save` or `train_reward` wrote;
            `FOLDER@BOUNDS` or `owner/name@BOUNDS` of a reward model, with `#LABEL` before the @ where it has
            several outputs; `FILE.py:function@BOUNDS` or `module:function@BOUNDS`; either without bounds, of
            a reward made in Python, which has its own; `http(s)://…@BOUNDS`, which is sent the key in
            `ALIGNPRO_REWARD_KEY` if that is set;
            or `judge`, with `settings` (`JudgeRewardSettings`) that say which. Several, with weights or after
            the word `mean`: see `read_plan`.
        options: see `Spec.open`; of one reward alone.
    """
    plan = read_plan(name)
    return plan.put_together([spec.open(**options) for spec in plan.specs])


def read_spec(name: str) -> Spec:
    """Read the name of a reward (see `load_reward`), with no download or request. A module is imported."""
    if name in REWARDS:
        return Spec("packaged", name, None, name)
    if name == JUDGE:
        return Spec("judge", name, None, name)
    if (numbered := _WITH_NUMBER.fullmatch(name)) and numbered[1] in NUMBERED:
        spec = Spec("packaged", name, None, name)
        spec.open()  # refuses a number that does not fit
        return spec
    if (begun := name.partition(":"))[0] in NUMBERED and begun[1] and "@" not in name:
        raise AlignProError(f"reward {shown(name)}: give a number after {begun[0]}:, or leave both out")
    folder = Path(name).expanduser()
    if name and folder.is_dir() and not (folder / "config.json").is_file():
        return Spec("head", name, None, name)
    target, bounds = (name, None) if folder.is_dir() else _split(name)
    if _ADDRESS.match(target):
        address = check_url(target)
        return Spec("endpoint", target, _bounded(address, bounds), f"{address}@{bounds}")
    folder = Path(target).expanduser()
    label: str | None = None
    if "#" in target and not folder.is_dir():
        target, _, label = target.rpartition("#")
        folder = Path(target).expanduser()
    if target and folder.is_dir():
        checked_folder(folder)
        if bounds is None and (label is None or saved_facts(folder)):
            _bounded(target, saved_facts(folder).get("bounds"))
        elif label is not None:
            bounds = _of_label(label, bounds)
        if label is not None:
            with loading(f"reward model {target!r}", folder, "sequence classifier"):
                choose_output(
                    AutoConfig.from_pretrained(folder, trust_remote_code=False), label, public_name(folder)
                )
        return Spec("classifier", target, bounds, name, label)
    if label is None and own.names_code(target):
        found = _imported(target)
        if not _is_reward(found):
            return Spec("function", target, _bounded(target, bounds), name)
        if not -math.inf < found.low < found.high < math.inf:
            limits = f"[{found.low}, {found.high}]"
            raise AlignProError(f"reward {target}: its range is {limits}; let low be below high, both finite")
        if bounds is not None:
            raise AlignProError(f"reward {target}: it has bounds of its own; leave out @{bounds}")
        return Spec("object", target, None, name)
    if HUB_ID.fullmatch(target):
        bounds = _bounded(target, bounds) if label is None else _of_label(label, bounds)
        return Spec("classifier", target, bounds, name, label)
    known = ", ".join([*REWARDS, JUDGE])
    name = target if label is None else f"{target}#{label}"
    raise AlignProError(f"reward {shown(name)}: choose from {known}, or name {_NAMES}")


def _bounded(name: str, bounds: Bounds | str | None) -> Bounds:
    """The bounds that stand behind a reward's name, where they must."""
    if bounds is None:
        raise AlignProError(
            f"reward {shown(name)}: Theorem 1 needs a bounded reward; write its range behind it, as "
            f"{name}@0,1 ({SYNTAX})"
        )
    return parse_bounds(bounds)


def _of_label(label: str, bounds: Bounds | None) -> Bounds:
    """The bounds of a label: those of a probability, unless the output itself is to be bounded."""
    bounds = bounds or Declared(0.0, 1.0)
    if isinstance(bounds, Declared) and (bounds.low, bounds.high) != (0, 1):
        raise AlignProError(
            f"reward #{label}@{bounds}: the probability of a label lies in 0,1; give that, or clip:LOW,HIGH "
            "or squash:CENTRE,SCALE of its output"
        )
    return bounds


def _weighted(word: str) -> tuple[float, str]:
    """Divide `WEIGHT*NAME`; a name without weight has 1."""
    found = _WEIGHTED.fullmatch(word)
    try:
        return (float(found[1]), found[2]) if found else (1.0, word)
    except ValueError:
        return 1.0, word  # a * of its own


def _split(name: str) -> tuple[str, Bounds | None]:
    """Divide `NAME@BOUNDS`. Another @ in NAME is left alone."""
    target, at, bounds = name.rpartition("@")
    if at and target and _BOUNDS.match(bounds):
        return target, parse_bounds(bounds)
    return name, None


def _is_reward(found: Any) -> bool:
    return not lacking(found) and not inspect.isclass(found)


def _imported(name: str) -> Any:
    found = own.imported(name)
    if not callable(found) and not _is_reward(found):
        raise AlignProError(f"reward {name}: it is {type(found).__name__}; name a function or a reward")
    return found
