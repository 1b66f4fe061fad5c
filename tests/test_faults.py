"""A small share of benchmarks/faults.py: a damaged file is told in one line, or read as what it says."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
import time
from pathlib import Path

import pytest
from mutants import kills

import alignpro
from alignpro.errors import AlignProError

SLOW = {"options of a verb": 2, "a preset of the grid": 1, "answers": 6, "an instruction's rewards": 6}
"""Fewer cases of those that take longer."""


@pytest.fixture(scope="module")
def faults():
    path = Path(alignpro.__file__).parents[1] / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setitem(sys.modules, "faults", module)
        patch.setenv("HF_HUB_OFFLINE", "1")
        spec.loader.exec_module(module)
        yield module


def findings(faults, name, kind, cases, seed=0):
    """The cases that are none of: refused, read as before, read as another for a reason."""
    found = []
    for fault, where, came in faults.run(name, kind, cases, seed, places=name not in SLOW):
        told = came.what in ("refused", "same")
        if not told and not (came.what == "differs" and faults.reason(name, fault, where)):
            found.append((came.what, fault, where, came.said[:200]))
    return found


def test_damaged_files_are_told_or_read(faults):
    light = {name: kind for name, kind in faults.KINDS.items() if not kind.heavy}
    assert len(light) > 20
    for name, kind in light.items():
        assert not findings(faults, name, kind, SLOW.get(name, 12)), name


def test_what_a_harness_must_notice(faults, monkeypatch):
    def made(folder):
        (folder / "a.json").write_text(json.dumps({"a": 1, "b": [2.5, "c"]}))

    def read(folder):
        try:
            said = json.loads((folder / "a.json").read_bytes())
            return int(said["a"]), [float(said["b"][0]), str(said["b"][1])]
        except Exception as error:
            raise AlignProError("a.json: is damaged") from error

    whole = faults.Kind("a.json", made, read)

    def check(kind):
        assert not [f for f in findings(faults, "a", kind, 80) if f[0] != "differs"]

    check(whole)

    def slow(folder):
        if not (folder / "a.json").is_file():
            time.sleep(60)
        return read(folder)

    monkeypatch.setattr(faults, "HANG_S", 0.1)
    careless = {
        "no error at all": lambda folder: json.loads((folder / "a.json").read_bytes())["a"],
        "slow": slow,
        "two lines": lambda folder: two_lines(read, folder),
    }
    for reader in careless.values():
        kills(check, dataclasses.replace(whole, read=reader))
    kinds = {what for what, *_ in findings(faults, "a", whole, 200)}
    assert kinds == {"differs"}  # a text in a number's place, since nothing says why that is right


def two_lines(read, folder):
    try:
        return read(folder)
    except AlignProError as error:
        raise AlignProError("a\nb") from error


def test_it_runs_by_hand(faults):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert faults.main(["preference pairs", "--cases", "10"]) == 0
    assert "cases" in said.getvalue()
