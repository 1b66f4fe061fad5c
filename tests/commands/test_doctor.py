"""`alignpro doctor`: what is missing is named with the command that gets it, and nothing is fetched."""

import json
import socket
from importlib import metadata

import pytest

from alignpro.commands import doctor, main


@pytest.fixture
def without(monkeypatch):
    """Makes packages look as if they were not installed, or of another version."""
    version = metadata.version

    def pretend(**packages):
        def found(name):
            if name not in packages:
                return version(name)
            if packages[name] is None:
                raise metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(metadata, "version", found)

    return pretend


def test_all_is_well(capsys):
    assert main.main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["extras"][0] | {"packages": 0} == {
        "extra": "alignpro",
        "for": "verify, solve",
        "packages": 0,
        "missing": [],
        "unfit": [],
        "remedy": None,
    }
    names = {row["extra"] for row in said["extras"]}
    assert {"certify", "native", "testing", "report", "llm", "http"} <= names
    # Each extra that a user can ask for is described: a new one without a line here is noticed.
    provided = set(metadata.metadata("alignpro").get_all("Provides-Extra")) - {"dev"}
    assert provided <= set(doctor.EXTRAS)


def test_what_is_missing_is_named_with_its_remedy(without, capsys):
    without(trl=None, peft="0.1")
    assert main.main(["doctor"]) == 0  # an extra is a choice
    said = capsys.readouterr().out
    assert "lacks trl, peft" in said
    assert "pip install 'alignpro[llm]'" in said
    assert "pip install 'alignpro[certify]'" not in said
    without(jax=None)
    assert main.main(["doctor"]) == 1
    assert "pip install alignpro    #" in capsys.readouterr().out


def test_versions_are_compared(without):
    (llm,) = [row for row in doctor.examine()["extras"] if row["extra"] == "llm"]
    assert llm["unfit"] == []
    without(trl="1.99")  # the trainers build on the internals of one minor
    (llm,) = [row for row in doctor.examine()["extras"] if row["extra"] == "llm"]
    assert llm["unfit"] == ["trl"]


def test_it_asks_no_network(monkeypatch, tmp_path, capsys):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "none" / "yet"))
    assert main.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "fetched at first use" in said
    assert " cached" not in said
    assert not (tmp_path / "none").exists()


def test_completion(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main.main(["--completion", shell]) == 0
        said = capsys.readouterr().out
        assert "reward-model" in said
    assert main.main(["--completion", "ksh"]) == 2
    assert "--completion ksh: choose from bash, zsh, fish" in capsys.readouterr().err
