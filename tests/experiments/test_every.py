"""Every experiment answers --help, and runs at a size of seconds where it needs no packaged weights."""

import json
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
WEIGHTS = (
    "enumerated_ppo",
    "frames",
    "gradients",
    "judge_choice",
    "open_ppo",
    "ppo_settings",
    "price",
    "reading",
    "training_free",
)
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


def test_coverage_on_hard_populations(run, tmp_path, capsys):
    """In pieces, beside another version's, and published as one file; what is there is not done again."""
    size = ["--repetitions", "2", "--prompts", "5"]
    other = ["--hard", "Bernoulli(0.2)", *size, "--out", str(tmp_path / "other")]
    assert run("coverage", other) == 0
    kept = json.loads((tmp_path / "other" / "bernoulli-0.2--5.json").read_text())
    kept["rows"]["mean"]["covered"] = 0.25  # no share of two
    (tmp_path / "other" / "bernoulli-0.2--5.json").write_text(json.dumps(kept))
    both = ["--hard", "Bernoulli(0.2)", "rewards 0.5 +- 0.1", *size, "--out", str(tmp_path / "out")]
    assert (
        run("coverage", [*both, "--beside", str(tmp_path / "other"), "--publish", str(tmp_path / "a.json")])
        == 0
    )
    assert "| mean | 25.0% -> " in capsys.readouterr().out
    one, two = json.loads((tmp_path / "a.json").read_text())["results"]
    assert (one["population"], one["before"]["mean"]["covered"]) == ("Bernoulli(0.2)", 0.25)
    assert {"J(pi*)", "slack span", "win rate", "headroom's answer"} <= two["rows"].keys()
    assert run("coverage", other) == 0
    assert "| mean | 25.0% |" in capsys.readouterr().out


def test_the_mutant_that_does_not_import_is_noticed(run, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("from test_train import FAST\n")
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", tmp_path)
    with pytest.raises(ImportError):
        run("broken", ["--help"])
