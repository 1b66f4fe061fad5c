"""Every experiment answers --help, and runs at a size of seconds where it needs no packaged weights."""

import runpy
import sys
from pathlib import Path

import jax
import paper
import pytest

FOLDER = Path(paper.__file__).parent
SMALL = {
    "beyond_the_bound": "--instances 4",
    "best_instruction": "--repetitions 2",
    "coverage": "--repetitions 2 --out OUT/coverage.json",
    "paper": "--preset small --dry-run",
    "pooled": "--repetitions 1 --only flat --out OUT/pooled.json",
    "tasks": "--dry-run --out OUT/tasks",
    "tiny_optimum": "--seeds 1 --iterations 1",
    "when_informative": "--instances 8",
    "which_bound": "--instances 20",
}
WEIGHTS = ("enumerated_ppo", "frames", "judge_choice", "open_ppo", "ppo_settings", "training_free")
EVERY = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture
def run(monkeypatch):
    """Runs an experiment as its command does, in this process: a new one would import for many seconds."""

    def as_program(name, arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        try:
            runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0
        return 0

    jax.config.update("jax_numpy_rank_promotion", "allow")  # as it is outside of tests
    yield as_program
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.parametrize("name", EVERY)
def test_help(name, run, capsys):
    assert run(name, ["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    assert "--help" in said


@pytest.mark.parametrize("name", EVERY)
def test_a_small_run(name, run, tmp_path, capsys):
    if name in WEIGHTS:
        pytest.skip(f"needs packaged weights and minutes: python experiments/{name}.py --help")
    assert run(name, SMALL[name].replace("OUT", str(tmp_path)).split()) == 0
    assert len(capsys.readouterr().out) > 50


def test_the_mutant_that_does_not_import_is_noticed(run, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("from test_train import FAST\n")
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path)
    with pytest.raises(ImportError):
        run("broken", ["--help"])
