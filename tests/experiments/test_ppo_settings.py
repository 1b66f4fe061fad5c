"""The sweep of settings: what several machines did is one table, and settings are compared seed by seed."""

import json
import sys
from pathlib import Path

import numpy as np
import ppo_settings
import pytest
from mutants import kills, mutated
from paper_grid import work

from alignpro.files import write_json
from alignpro.llm.training.evaluation import EVALUATIONS_FILE

REWARDS = {
    "ease/0-seed-0": 0.50,
    "ease/0-seed-2": 0.61,
    "ease/7-seed-0": 0.64,
    "ease/7-seed-1": 0.70,
    "ease/7-seed-2": 0.66,
}


def finished(out, names):
    """Trainings in `out` as they are when they are done."""
    for name in names:
        home = out / name
        home.mkdir(parents=True)
        lines = [
            {"round": 0, "reward": 0.5, "kl": 0.0},
            {"round": 20, "reward": REWARDS[name], "kl": 1.0},
        ]
        (home / EVALUATIONS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(home / work.FINISHED, {"seconds": 1.0, "cpu_seconds": 1.0})


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ppo_settings.py", *map(str, arguments)])
        return ppo_settings.main(), capsys.readouterr()

    return run


def test_what_several_machines_did_is_one_table(tmp_path, command):
    """Compared with the centre over the seeds that both have. Mutant: of the means of different seeds."""
    one, two = tmp_path / "one", tmp_path / "two"
    names = list(REWARDS)
    finished(one, names[:2])
    finished(two, names[2:])
    assert command("--out", one, "--summary-only")[0] == 0
    status, said = command("--out", two, "--summary-only", "--known", one / "results.json")
    assert status == 0
    found = json.loads((two / "results.json").read_text())
    assert set(found["trainings"]) == set(REWARDS)

    def check(module):
        settings = module.summarise(found["trainings"])["settings"]
        row = settings["reading ease, 16 × 2"]
        assert row["seeds"] == 3
        values = np.array([0.64, 0.70, 0.66])
        assert row["reward"]["value"] == pytest.approx(values.mean())
        assert row["reward"]["error"] == pytest.approx(np.sqrt(values.var(ddof=1) / 3))
        both = np.array([0.64 - 0.50, 0.66 - 0.61])
        assert row["over the centre"]["value"] == pytest.approx(both.mean())
        assert row["over the centre"]["error"] == pytest.approx(np.sqrt(both.var(ddof=1) / 2))
        assert settings["reading ease, centre"]["over the centre"] is None

    check(ppo_settings)
    of = "if centre[seed]]"
    kills(check, mutated(ppo_settings, f"centre[seed][\"reward\"] for seed, one in some.items() {of}",
                         f"centre[0][\"reward\"] for seed, one in some.items() {of}"))  # fmt: skip
    assert "| reading ease, 16 × 2 | 3 | 0.500 | 0.667 ± 0.018 | +0.095 ± 0.045 | 1.000 ± 0.000 |" in said.out


def test_every_setting_is_told_from_every_other():
    """By the options that are kept with a training. Mutant: those of the centre alone are kept."""

    def check(module):
        kept = [
            json.dumps(module.varied(job)) for job in module.jobs(Path("out")) if job.name.endswith("seed-0")
        ]
        assert len(set(kept)) == len(module.SETTINGS)

    check(ppo_settings)
    kills(check, mutated(ppo_settings, "{*CENTRE}.union(*SETTINGS.values())", "{*CENTRE}"))


def test_known_trainings_are_not_done_again_and_are_of_the_same_settings(tmp_path, command, monkeypatch):
    one = tmp_path / "one"
    finished(one, list(REWARDS)[:1])
    command("--out", one, "--summary-only")
    known = one / "results.json"
    asked = []
    monkeypatch.setattr(ppo_settings.launch, "do_all", lambda args, command, jobs, out: asked.extend(jobs))
    command("--out", tmp_path / "two", "--only", "ease/0-", "--known", known)
    assert [job.name for job in asked] == ["ease/0-seed-1", "ease/0-seed-2"]
    results = json.loads(known.read_text())
    kept = results["trainings"]["ease/0-seed-0"]
    for change, said in (
        (lambda r: r.update(answers=64), "of 64 answers each, not 640"),
        (lambda r: r["trainings"]["ease/0-seed-0"]["options"].update(lam=0.3), "has other settings here"),
        (lambda r: r["trainings"].update({"ease/99-seed-0": dict(kept)}), "other settings"),
        (lambda r: r.pop("trainings"), "trainings"),
    ):
        other = json.loads(json.dumps(results))
        change(other)
        (tmp_path / "other.json").write_text(json.dumps(other))
        status, heard = command("--out", tmp_path / "three", "--known", tmp_path / "other.json")
        assert (status, heard.err.count("\n")) == (2, 1)
        assert said in heard.err
