"""Rewards r(x, y) of an answer to the original prompt."""

from alignpro.moved import moved

__getattr__ = moved(__name__, load_reward="alignpro.llm.rewards.opening")
