import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from mutants import kills, mutated

import alignpro
from alignpro.commands import main
from alignpro.theory.bounds import BOUNDS, LOWER_BOUNDS
from alignpro.theory.families import draw

GOOD = ["--beta", "0.5", "--lam", "0.25"]


@pytest.fixture
def files(tmp_path):
    paths = []
    for i, instance in enumerate(draw("signed", 0, (2, 3, 4), 2) + draw("sparse", 0, (1, 9, 2), 1)):
        instance.save(tmp_path / f"{i}.npz")
        paths.append(str(tmp_path / f"{i}.npz"))
    return paths


def test_solve_prints_one_json_object_per_file(files, capsys):
    assert main.main(["solve", *files, *GOOD, "--bounds", "all", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for file, line in zip(files, lines, strict=True):
        found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        keys = "file beta lam r_max r_max_convention j_star j_rho gap exact_gap log_z log_z_star"
        assert " ".join(found) == f"{keys} delta1 delta2 bounds"
        assert found["file"] == file
        assert (found["beta"], found["lam"]) == (0.5, 0.25)
        assert list(found["bounds"]) == [*BOUNDS, *LOWER_BOUNDS]
        assert {b["relation"] for b in found["bounds"].values()} == {"<=", ">="}
        bound = found["bounds"]["theorem1"]
        assert {"rhs", "slack", "terms", "verdict", "vacuous"} <= set(bound)
        assert set(bound["terms"]) == {"model", "prompt_shift", "prompter_kl"}
        np.testing.assert_allclose(found["gap"], found["delta1"] + found["delta2"], atol=1e-12)
    assert len(json.loads(lines[0])["log_z"]) == 2


def test_solve_prints_a_table(files, capsys):
    assert main.main(["solve", files[0], *GOOD, "--r-max", "0.1"]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.strip().startswith("theorem1"))
    assert "inapplicable" in row
    assert "prompter is optimal; NOT SO: rewards in [0, r_max]" in row
    assert "exact identity" in out


def test_verify_holds_and_refutes(tmp_path, capsys):
    few = ["--instances", "300", "--family", "signed"]
    assert main.main(["verify", *few, "--bounds", "theorem1", "--out", str(tmp_path / "new" / "run")]) == 0
    assert "theorem1: no violation in 300 instances" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "run" / "verify.json").read_text())["violations"] == 0
    assert main.main(["verify", *few, "--bounds", "signed_max_abs", "--out", str(tmp_path)]) == 1
    assert "signed_max_abs: REFUTED" in capsys.readouterr().out
    names = ["new", "refuted-signed_max_abs.npz", "report.html", "verify.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


BAD = {
    "no verb": ([], "verb: none is given; give one of demo"),
    "unknown verb": (["prove"], "prove: is no verb; give one of"),
    "unknown flag": (["solve", "FILE", *GOOD, "--jsno"], "Unrecognized options: --jsno; perhaps --json"),
    "no beta": (["solve", "FILE", "--lam", "1"], "Missing from alignpro solve: --beta FLOAT"),
    "text beta": (["solve", "FILE", "--beta", "x", "--lam", "1"], "--beta 'x': give a number"),
    "no file": (["solve", *GOOD], "FILES: no file given"),
    "zero lam": (
        ["solve", "FILE", "--beta", "1", "--lam", "0"],
        "--lam 0.0: must be a positive finite number",
    ),
    "negative": (["solve", "FILE", "--beta", "-2", "--lam", "1"], "--beta -2.0: must be a positive finite"),
    "nan lam": (["solve", "FILE", "--beta", "1", "--lam", "nan"], "--lam nan: must be a positive finite"),
    "infinite": (["solve", "FILE", "--beta", "inf", "--lam", "1"], "--beta inf: must be a positive finite"),
    "huge": (["solve", "FILE", "--beta", "1e30", "--lam", "1"], "--beta 1e+30: is outside"),
    "r_max": (["solve", "FILE", *GOOD, "--r-max", "nan"], "--r-max nan: must be a finite number"),
    "bound": (["solve", "FILE", *GOOD, "--bounds", "q"], "--bounds q: is unknown; give one of theorem1"),
    "missing": (["solve", "FILE", "gone.npz", *GOOD], "gone.npz: no such file"),
    "verify bound": (["verify", "--bounds", "q", "--out", "OUT"], "--bounds q: is unknown"),
    "verify family": (["verify", "--family", "q", "--out", "OUT"], "--family q: is unknown"),
    "verify count": (["verify", "--instances", "0", "--out", "OUT"], "--instances 0: is below one"),
    "verify seed": (["verify", "--seed", "-1", "--out", "OUT"], "--seed -1: must not be negative"),
    "out is a file": (["verify", "--out", "FILE"], "--out "),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_line_and_status_2(case, files, tmp_path, capsys):
    arguments, message = BAD[case]
    out = tmp_path / "out"
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    arguments = [{"FILE": files[0], "OUT": str(out)}.get(a, a) for a in arguments]
    assert main.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"alignpro: error: {message}")
    assert said.err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_every_bad_file_gets_its_line_before_anything_is_computed(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alignpro.theory.scale.instances.solve_instances", lambda *a: pytest.fail("computed"))
    (tmp_path / "text.npz").write_text("no")
    bad = [str(tmp_path / "gone.npz"), str(tmp_path / "text.npz")]
    assert main.main(["solve", files[0], bad[0], files[1], bad[1], *GOOD]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(": ")[2] for line in said.err.splitlines()] == bad


def test_help_version_and_interruption(capsys, monkeypatch):
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out == f"alignpro {alignpro.__version__}\n"
    assert main.main(["solve", "--help"]) == 0
    assert "in reward units" in capsys.readouterr().out

    @dataclass(frozen=True)
    class Wait:
        """Wait."""

        def run(self) -> int:
            raise KeyboardInterrupt

    monkeypatch.setitem(main.VERBS, "wait", Wait)
    assert main.main(["wait"]) == 130
    assert capsys.readouterr().err == "alignpro: interrupted\n"


def test_nothing_heavy_is_imported():
    script = (
        "import sys, alignpro.commands.main, alignpro.commands.verify; "
        "import alignpro.commands.solve, alignpro.theory; "
        "print([m for m in ('torch', 'matplotlib', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    light = "import sys, alignpro, alignpro.commands.main; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_closed_pipe_is_quiet(files):
    command = f"{sys.executable} -m alignpro solve {' '.join(files)} --beta 1 --lam 1 --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_debug_shows_where_a_mistake_was_noticed(capsys):
    assert main.main(["solve", "--debug", "no-such.npz", *GOOD]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1].startswith("alignpro: error: ")
    assert main.main(["solve", "no-such.npz", *GOOD]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_option_of_a_file_is_refused_with_the_files_name(tmp_path, capsys):
    """Options given outright are not blamed on the file. Mutant: whatever is wrong is."""
    file = tmp_path / "c.yaml"
    for text, said in (
        ("lam: much\n", "--lam 'much': give a number;"),
        ("epochs: 1.5\n", "--epochs '1.5': give a whole number;"),
        ("learning_rate: -1\n", "learning_rate -1.0: give a positive"),
        ("algorithm: dpo\n", "algorithm 'dpo': choose from ppo"),
    ):
        file.write_text(text)
        assert main.main(["train", "--out", str(tmp_path / "t"), "--config", str(file)]) == 2
        assert capsys.readouterr().err.startswith(f"alignpro: error: --config {file}: {said}")
    file.write_text("epochs: 2\n")
    assert main.main(["train", "--out", str(tmp_path / "t"), "--config", str(file), "--lam", "much"]) == 2
    assert str(file) not in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_an_interrupted_verb_says_how_it_goes_on(monkeypatch, capsys):
    def stopped(self):
        raise KeyboardInterrupt

    for verb, arguments, said in (
        ("train", ["--out", "x"], "interrupted; the same command with --resume goes on"),
        ("rollout", ["--out", "x"], "interrupted; the same command goes on"),
        ("solve", ["x.npz", *GOOD], "interrupted"),
    ):
        monkeypatch.setattr(main.VERBS[verb], "run", stopped)
        assert main.main([verb, *arguments]) == 130
        assert capsys.readouterr().err == f"alignpro: {said}\n"


def test_a_terminal_that_lacks_letters_loses_nothing():
    """λ and ρ are told by their numbers, where they would end in a traceback after the work."""
    command = [sys.executable, "-m", "alignpro", "train", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"Weight \u03bb of KL(\u03c1" in done.stdout


@pytest.mark.parametrize(
    "words", ["rollout --out {} --instruction a=\udcff --split x", "train --out {}\udce9 --prompts-file x"]
)
def test_words_that_are_not_utf_8(words, tmp_path, capfd):
    """As a shell passes on bytes in another encoding: one line, and nothing is made.

    Another fault ends the mutant before its work.
    """

    def check(module):
        status = 0
        with contextlib.suppress(Exception):
            status = module.main(words.format(tmp_path / "out").split())
        said = capfd.readouterr().err
        assert (status, said.count("\n")) == (2, 1)
        assert "is not UTF-8; type it again, or rename the file" in said
        assert not list(tmp_path.iterdir())

    check(main)
    kills(check, mutated(main, '"\\ud800" <= letter', '"\\ude00" <= letter'))
