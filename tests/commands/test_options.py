"""How options are read and shown, and what verbs may import."""

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import tyro

from alignpro.commands import main
from alignpro.commands import options as shown


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
    target: Annotated[Server, shown.Prefixed("target")] = field(default_factory=Server)
    judge: Annotated[Server, shown.Prefixed("judge")] = field(default_factory=lambda: Server(calls=3))
    lam: tuple[float, ...] = ()
    """Numbers."""
    prices: tuple[float, float] | None = None
    """Two numbers."""
    resume: bool = False
    """Go on."""


def parsed(*arguments, **how):
    how = {"config": shown.CONFIG, "registry": shown.REGISTRY} | how
    return tyro.cli(Verb, args=list(arguments), **how)


def help_of(**how):
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
        parsed("--help", **how)
    return " ".join(said.getvalue().replace("│", " ").split())


def test_one_record_under_two_names():
    found = parsed("--out", "x", "--target-model", "m", "--judge-calls", "9", "--prices", "1", "2")
    assert found == Verb("x", Server("m", 8), Server(None, 9), prices=(1.0, 2.0))
    assert type(found.target) is Server
    assert parsed("--out", "x") == Verb("x")
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        parsed("--out", "x", "--target-model")
    assert "--target-model" in said.getvalue()


def test_help_shows_defaults_where_there_are_some():
    said = help_of()
    assert "--target-model STR Name of the model there (as it knows it). Left out: the first. --" in said
    assert "--target-calls INT Requests at once. (default: 8)" in said
    assert "--judge-calls INT Requests at once. (default: 3)" in said
    for unsaid in ("None", "False", "(default: )"):
        assert unsaid not in said
        assert unsaid in help_of(config=(tyro.conf.FlagCreatePairsOff,), registry=None)  # as tyro has it


@pytest.mark.parametrize("verb", main.VERBS)
def test_no_verb_speaks_of_none(verb, capsys):
    assert main.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--" in said
    for unsaid in ("{None}", "(default: None)", "(default: )", "(default: False)"):
        assert unsaid not in said


def test_verbs_of_models_start_without_libraries():
    heavy = ("numpy", "scipy", "jax", "torch", "transformers", "tqdm")
    names = ("train", "sft", "reward_model", "resample", "rollout", "rewrite", "merge", "instruct")
    names += ("opening", "shared")

    def met(*modules):
        code = f"import sys\nfor name in {modules}: __import__(name)\n"
        code += f"print([m for m in {heavy} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert met(*(f"alignpro.commands.{name}" for name in names)) == "[]"
    assert met("alignpro.commands.merge", "alignpro.llm.targets.ledger") != "[]"
