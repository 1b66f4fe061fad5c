"""alignpro: verify, and then exploit, the theory of prompt optimization for LLM alignment."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use, so that `alignpro --version` need not wait for JAX, nor JAX for torch.
_HOME = {
    "AlignProError": "alignpro.errors",
    "BOUNDS": "alignpro.theory",
    "BoundReport": "alignpro.theory",
    "FAMILIES": "alignpro.theory",
    "Instance": "alignpro.theory",
    "Solution": "alignpro.theory",
    "check": "alignpro.theory",
    "grid": "alignpro.theory",
    "load": "alignpro.theory",
    "solution": "alignpro.theory",
    "tilt": "alignpro.theory",
    "train": "alignpro.llm",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'alignpro' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
