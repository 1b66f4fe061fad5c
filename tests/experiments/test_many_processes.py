"""benchmarks/scale.py in its small form: many processes on one folder, some of them killed."""

import contextlib
import importlib
import os
import sys
from pathlib import Path

import paper
import pytest
from mutants import kills
from paper_grid import work

from alignpro import locks
from alignpro.llm.targets.store import Store

BENCHMARKS = Path(paper.__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def scale():
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("scale")
    sys.path[:] = before


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def check_grid(scale):
    found = scale.grid(8, 60, 0.02, 0.1)
    assert (found["cells"], found["twice"]) == (60, 0)
    assert found["deaths"] > 2
    assert found["started"] >= 8


@pytest.mark.parametrize("flock", [True, False])
def test_every_cell_is_done_once_though_workers_die(scale, monkeypatch, flock):
    if not flock:
        monkeypatch.setattr(locks, "_lock", lambda *_, **__: None)
        monkeypatch.setattr(locks, "BEAT_S", 0.05)
        monkeypatch.setattr(locks, "STALE_S", 1.0)
    check_grid(scale)


def test_cells_that_nobody_claims_are_done_twice(scale, monkeypatch):
    """The mutant: every worker has every job."""

    def claim(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return contextlib.nullcontext(locks.Lease(folder / ".claim-1", 1, 0))

    monkeypatch.setattr(work, "claim", claim)
    kills(check_grid, scale)


def check_budget(scale):
    found = scale.budget(4, 60, killed=2, delay_s=0.002)
    assert found["counted"] == 60
    assert 60 - 2 * 4 <= found["received"] <= 60  # but for those under way at a kill


def test_a_budget_holds_to_the_call_though_some_are_killed(scale, monkeypatch):
    check_budget(scale)
    monkeypatch.setattr(Store, "meter", lambda *_: None)  # each has it for itself
    kills(check_budget, scale)


def test_what_is_measured(scale):
    found = scale.rollouts(2, 40, 0.001)
    assert found["per_second"] > 0
    assert found["ideal"] == 2 * 8 / 0.001
    assert "400 answers by 2 writers" in scale.ledger.measure("sqlite", 400, 2)
    assert scale.lives(str(os.getpid()))
    assert not scale.lives("999999999")
