"""Fixtures of the tests of `explore`."""

from exploring import files, server  # noqa: F401
