"""Keeps what the libraries underneath say, and what they call things, away from users and from the rest."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator

from transformers import LlamaModel
from transformers.utils import logging as transformers_logging

CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""The argument by which a model of this version of transformers takes keys and values read before."""


def one_line(error: BaseException) -> str:
    """The text of an exception, in at most 200 characters; its type's name where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No loading bars for work of a few seconds, no advice on other set-ups and no notices of deprecation.

    The user's own settings come back afterwards.
    """
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
