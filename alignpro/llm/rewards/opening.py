"""Opens the reward that a name stands for: a row of `REWARDS`, or whatever a user names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignpro.llm.rewards.bradley_terry import BradleyTerryReward
from alignpro.llm.rewards.minilm import minilm_bt
from alignpro.llm.rewards.reward import Reward


def check_name(name: str) -> None:
    """Refuse what names no reward (see `load_reward`), without a download.

    Raises:
        AlignProError: so.
    """
    if name not in REWARDS and not _is_head(name):
        from alignpro.llm.rewards import names

        names.check_name(name)


def load_reward(name: str = "minilm-bt", **options: Any) -> Reward:
    """The reward of that name: a row of `REWARDS`, the folder of a saved Bradley–Terry reward, or whatever
    `reward_models.open_reward` takes (a reward model, module:function, an endpoint), with its options.

    Raises:
        AlignProError: none of these; or from fetching, training or loading.
    """
    if name in REWARDS:
        return REWARDS[name](**options)
    if _is_head(name):
        return BradleyTerryReward.load(Path(name).expanduser(), **options)
    from alignpro.llm.rewards import names

    return names.open_reward(name, **options)


def _is_head(name: str) -> bool:
    folder = Path(name).expanduser()
    return bool(name) and folder.is_dir() and not (folder / "config.json").is_file()


REWARDS: dict[str, Callable[..., Reward]] = {"minilm-bt": minilm_bt}
