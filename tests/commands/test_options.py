"""How options are read and shown, and what verbs may import."""

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
import tyro

from alignpro.commands import flags, helping
from alignpro.commands.flags import Prefixed


@dataclass(frozen=True)
class Server:
    """A server."""

    model: str | None = None
    """Name of the model
    there (as it
    knows it). Left out: the first."""
    calls: int = 8
    """Requests at once."""


@dataclass(frozen=True)
class Verb:
    """A verb."""

    out: str
    """Folder."""
    target: Annotated[Server, Prefixed("target")] = field(default_factory=Server)
    judge: Annotated[Server, Prefixed("judge")] = field(default_factory=lambda: Server(calls=3))
    lam: tuple[float, ...] = ()
    """Numbers."""
    prices: tuple[float, float] | None = None
    """Two numbers."""
    how: Literal["fast", "slow"] = "fast"
    """How it
    goes.

    Second paragraph."""
    resume: bool = False
    """Go on."""

    flags: ClassVar = {"prices": "money"}
    examples = (("one", "alignpro verb --out a"),)


def parsed(*arguments, **how):
    how = {"config": flags.CONFIG, "registry": flags.REGISTRY} | how
    return tyro.cli(Verb, args=list(arguments), **how)


def help_of(width=100, whole=False):
    return helping.text("verb", Verb, width, whole)


def test_one_record_under_two_names():
    found = parsed("--out", "x", "--target-model", "m", "--judge-calls", "9", "--money", "1", "2")
    assert found == Verb("x", Server("m", 8), Server(None, 9), prices=(1.0, 2.0))
    assert type(found.target) is Server
    assert parsed("--out", "x") == Verb("x")
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        parsed("--out", "x", "--target-model")
    assert "--target-model" in said.getvalue()


def test_help_shows_defaults_where_there_are_some():
    said = " ".join(help_of().split())
    assert "--target-model NAME Name of the model there (as it knows it). Left out: the first. --" in said
    assert "--target-calls INT Requests at once. (default: 8)" in said
    assert "--judge-calls INT Requests at once. (default: 3)" in said
    assert "--money FLOAT FLOAT Two numbers. --" in said
    assert "--how {fast,slow} How it goes. (default: fast)" in said
    for unsaid in ("None", "False", "(default: )", "STR"):
        assert unsaid not in said


def test_help_fits_the_terminal():
    for width in (56, 80, 100):
        lines = help_of(width).splitlines()
        assert max(map(len, lines)) <= width
        assert lines[-1] == "  alignpro verb --out a"


def test_plain_help_has_first_paragraphs_of_common_options(monkeypatch):
    monkeypatch.setattr(Verb, "common", "out how", raising=False)
    said, whole = help_of(), help_of(whole=True)
    assert "--lam" not in said
    assert "Second paragraph." not in said
    assert "--help-all shows the 7 other options, too" in said
    for part in ("--lam", "Second paragraph.", "--target-…: A server:", "--judge-…: A server:"):
        assert part in whole
    assert whole.count("--how {fast,slow}") == 1


def test_verbs_of_models_start_without_libraries():
    heavy = ("numpy", "scipy", "jax", "torch", "transformers", "tqdm")
    names = ("train", "sft", "reward_model", "resample", "rollout", "rewrite", "merge", "instruct", "route")
    names += ("opening", "shared")

    def met(*modules):
        code = f"import sys\nfor name in {modules}: __import__(name)\n"
        code += f"print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert met(*(f"alignpro.commands.{name}" for name in names)) == "[]"
    assert met("alignpro.commands.merge", "alignpro.llm.targets.ledger") != "[]"
