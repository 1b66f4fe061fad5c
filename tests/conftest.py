"""Shapes and types of the exact theory are checked at run time, in tests only."""

import os
import sys
from pathlib import Path

# Several test processes share the cores: one thread each, or they crawl. Before anything reads it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

# `Instance` is left out: it takes anything array-like, and its own validation is what is tested.
_CHECKED = [
    f"alignpro.theory.{path.stem}"
    for path in (Path(__file__).parents[1] / "alignpro" / "theory").glob("*.py")
    if path.stem not in ("__init__", "instance")
]
if "alignpro.theory" not in sys.modules:
    install_import_hook(_CHECKED, "beartype.beartype")

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="session")
def _strict_shapes():
    """Arrays of different rank must be lined up in writing, so that a batch axis cannot slip in."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", "allow")
