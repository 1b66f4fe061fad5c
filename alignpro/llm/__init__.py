"""Prompters, frozen models, rewards and training. The names used most are here, and loaded on first use."""

import importlib
from typing import Any

_HOME = {
    "Answer": "alignpro.llm.targets.target",
    "CallableReward": "alignpro.llm.rewards.function",
    "Endpoint": "alignpro.llm.targets.endpoint",
    "EndpointSettings": "alignpro.llm.targets.settings",
    "Environment": "alignpro.llm.training.environment",
    "EvaluationSettings": "alignpro.llm.training.settings",
    "JudgeRewardSettings": "alignpro.llm.rewards.rubric",
    "LocalTarget": "alignpro.llm.targets.local",
    "Mean": "alignpro.llm.rewards.combined",
    "Prompter": "alignpro.llm.policies.prompter",
    "Sampling": "alignpro.llm.models.sampling",
    "Sum": "alignpro.llm.rewards.combined",
    "TrainSettings": "alignpro.llm.training.settings",
    "TrainedPrompter": "alignpro.llm.training.open_ended",
    "load_reward": "alignpro.llm.rewards.opening",
    "prompts": "alignpro.llm.data.public",
    "read_prompts": "alignpro.llm.data.own",
    "split_of": "alignpro.llm.data.split",
    "train": "alignpro.llm.arms.train",
}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alignpro.llm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
