"""Prompts and preference pairs."""

from alignpro.moved import moved

__getattr__ = moved(__name__, instructions="alignpro.llm.data.packaged", split_of="alignpro.llm.data.split")
