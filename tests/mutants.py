"""Mutants: a module with one slip in it, and the assertion that a check notices."""

import inspect
import types

import pytest


def mutated(module, right, wrong):
    """A copy of the module, with `right`, which occurs in it once, written `wrong`."""
    source = inspect.getsource(module)
    assert source.count(right) == 1, right
    made = types.ModuleType(module.__name__)
    made.__file__ = module.__file__
    exec(compile(source.replace(right, wrong), module.__file__, "exec"), vars(made))
    return made


def kills(check, wrong):
    """A property's check must fail on a mutant: otherwise it tests nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CI", "BUILD_NUMBER"):  # there pytest explains the wanted failure, for minutes
            patch.delenv(name, raising=False)
        try:
            check(wrong)
        except AssertionError:
            return
    raise RuntimeError("the property accepts the mutant")
