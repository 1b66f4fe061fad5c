"""The whole pipeline offline, on tiny models: stages, interruption, resume, honest content, clear errors."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.arms import demo
from alignpro.llm.arms.demo import DemoSettings, run
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.rewards import opening
from alignpro.llm.training.settings import TreeSettings
from alignpro.theory import check, load, solution


class Letters:
    """r(x, y): the share of y's letters that are a or b."""

    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array([sum(c in "ab" for c in y) / max(len(y), 1) for y in responses])

    def describe(self):
        return {"name": "letters", "limits": ["counts letters"]}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a tiny model, prompts, and settings that name them."""
    folder = tmp_path_factory.mktemp("demo")
    model, tokenizer = tiny_model(seed=1, vocab="abcdef")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("ab\n\ncd\nab\nef\nfa\n")
    settings = DemoSettings(
        model=str(folder / "model"),
        reward="letters",
        prompts=3,
        prompts_file=str(folder / "prompts.txt"),
        enumeration=EnumerationSettings(rewrites=6, responses=8, rewrite_tokens=6, response_tokens=5),
        training=TreeSettings(iterations=6, samples=64, lora_layers=1.0, learning_rate=3e-3, lam=0.1),
    )
    before = dict(opening.REWARDS)
    opening.REWARDS["letters"] = Letters
    yield folder, settings
    opening.REWARDS.clear()
    opening.REWARDS.update(before)


@pytest.fixture(scope="module")
def finished(workplace):
    folder, settings = workplace
    run(folder / "whole", settings, command="alignpro demo")
    return folder / "whole", json.loads((folder / "whole" / "report.json").read_text(encoding="utf-8"))


def test_everything_is_written(finished):
    out, content = finished
    for name in ("report.json", "instance.npz", "texts.json", "training/curve.jsonl"):
        assert (out / name).stat().st_size > 100, name
    assert (out / "training" / "adapter" / "adapter_model.safetensors").exists()
    assert content["command"] == "alignpro demo"
    assert [p["prompt"] for p in content["prompts"]] == ["ab", "cd", "ef"]
    unsafe = [p for p in out.rglob("*") if p.suffix in (".bin", ".pt", ".pkl") and "checkpoint" not in str(p)]
    assert not unsafe


def test_content_is_that_of_the_instance(finished, workplace):
    """Recomputed from instance.npz and the last policy; mutants: ρ_sft, ρ_θ, ρ* confused."""
    out, content = finished
    settings = workplace[1]
    instance = load(out / "instance.npz")
    theta = np.zeros_like(instance.prior)
    start = 0
    for x, prompt in enumerate(content["prompts"]):
        row = [r["theta"] for r in prompt["rewrites"]]
        theta[x, start : start + len(row)] = row
        start += len(row)
    np.testing.assert_allclose(theta.sum(1), 1, rtol=1e-12)
    s = solution(instance, settings.beta, settings.training.lam, theta)
    reward = np.asarray(instance.reward) @ np.asarray(instance.frozen).T
    by_hand = {"sft": np.asarray(instance.prior), "theta": theta, "star": np.asarray(s.rho_star)}
    values = [float(instance.p @ (rho * reward).sum(1)) for rho in by_hand.values()]
    assert len(set(values)) == 3
    for (name, _), value in zip(by_hand.items(), values, strict=True):
        assert content["policies"][name]["reward"] == pytest.approx(value, rel=1e-12)
        assert content["rewards"][name] == pytest.approx(value, rel=1e-12)
        assert content["policies"][name]["gap"] == pytest.approx(float(s.j_star) - value, rel=1e-9)
    assert content["policies"]["sft"]["closed"] == 0
    assert content["policies"]["star"]["closed"] == pytest.approx(1, abs=1e-12)
    assert content["policies"]["theta"]["closed"] == content["curve"][-1]["exact"]["closed"] > 0.3
    for name, expected in (("theorem1", None), ("span", None), ("tight", None)):
        assert content["bounds"][name]["star"]["rhs"] == pytest.approx(
            check(instance, settings.beta, settings.training.lam, name, prompter=expected).rhs
        )
    assert {k: v["verdict"] for k, v in content["bounds"]["trained"].items()} == dict.fromkeys(
        ("star", "sft", "theta"), "holds"
    )


def test_interrupted_and_resumed_equals_uninterrupted(finished, workplace, monkeypatch):
    folder, settings = workplace
    real = demo.Measures.of
    calls = {"n": 0}

    def interrupt(self, rho):
        calls["n"] += 1
        if calls["n"] == 5:
            raise KeyboardInterrupt
        return real(self, rho)

    monkeypatch.setattr(demo.Measures, "of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "cut", settings)
    monkeypatch.undo()
    assert not (folder / "cut" / "report.json").exists()
    result = run(folder / "cut", settings, resume=True)
    whole = finished[1]
    assert result.prompts == whole["prompts"]
    assert [line["exact"] for line in result.curve] == [line["exact"] for line in whole["curve"]]


def test_finished_run_is_not_written_over(finished, workplace):
    out, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    with pytest.raises(AlignProError, match="--resume"):
        run(out, workplace[1])
    with pytest.raises(AlignProError, match=r"beta = 0\.1, not 0\.3"):
        run(out, replace(workplace[1], beta=0.3), resume=True)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == before


def test_mistakes_are_one_line_and_leave_nothing(workplace, tmp_path, capsys, monkeypatch):
    folder, _ = workplace
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "file").write_text("kept")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.json").write_text("{}")
    model = ["--model", str(folder / "model"), "--reward", "letters"]
    cases = [
        (["--out", str(tmp_path / "file")], "a file is in the way"),
        (
            ["--out", str(tmp_path / "other"), *model],
            "holds report.json and no run.json that says of which run",
        ),
        (["--out", str(tmp_path / "a"), "--prompts-file", str(tmp_path / "none.txt")], "No such file"),
        (["--out", str(tmp_path / "a"), "--prompts-file", str(tmp_path / "empty.txt")], "holds no prompts"),
        (["--out", str(tmp_path / "a"), "--lam", "0"], "lam 0.0"),
        (["--out", str(tmp_path / "a"), "--beta", "nan"], "beta = nan"),
        (["--out", str(tmp_path / "a"), "--algorithm", "sft"], "algorithm 'sft'"),
        (["--out", str(tmp_path / "a"), "--prompts", "0"], "prompts = 0"),
        (["--out", str(tmp_path / "a"), "--reward", "nothing"], "reward 'nothing'"),
        (["--out", str(tmp_path / "a"), "--reward", "letters", "--model", "nothing"], "model 'nothing'"),
    ]
    # Before anything is fetched.
    monkeypatch.setattr("alignpro.llm.models.packages.fetch", lambda *a: pytest.fail("fetched"))
    for arguments, words in cases:
        assert main.main(["demo", *arguments]) == 2, arguments
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1, said
        assert said[0].startswith("alignpro: error: ")
        assert words in said[0]
        assert not (tmp_path / "a" / "run.json").exists(), arguments
    assert (tmp_path / "file").read_text() == "kept"
    assert (tmp_path / "other" / "report.json").read_text() == "{}"


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_demo import Letters
from alignpro.commands import main as cli
from alignpro.llm.rewards import opening
opening.REWARDS["letters"] = Letters
sys.exit(cli.main(sys.argv[1:]))
"""


def test_control_c_ends_quietly_and_the_run_continues(workplace, tmp_path):
    """SIGINT to the real process amid training: status 130, no traceback; then --resume finishes."""
    folder, _ = workplace
    command = [sys.executable, "-c", PROGRAM.format(tests=str(Path(__file__).parent)), "demo", "--resume"]
    command += ["--out", str(tmp_path / "run"), "--model", str(folder / "model"), "--reward", "letters"]
    command += ["--prompts-file", str(folder / "prompts.txt"), "--prompts", "2", "--rewrites", "4"]
    # Rounds enough that a machine that is slow to signal still finds it training.
    command += ["--responses", "4", "--iterations", "24"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    curve = tmp_path / "run" / "training" / "curve.jsonl"
    deadline = time.monotonic() + 120
    while not (curve.exists() and len(curve.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "--resume" in said
    assert main.main(command[3:]) == 0
    content = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [line["step"] for line in content["curve"]] == list(range(0, 97, 4))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"report.html", "examples.csv", "bound.png", "curves.png", "policies.png", "rewards.png"} <= names


def test_help_states_the_defaults(capsys):
    """The flags default to None, so their help says what that means; it must stay true."""
    assert main.main(["demo", "--help-all"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    full, quick = DemoSettings(), demo.QUICK
    for name, a, b in (
        ("prompts", full.prompts, quick.prompts),
        ("rewrites", full.enumeration.rewrites, quick.enumeration.rewrites),
        ("responses", full.enumeration.responses, quick.enumeration.responses),
        ("iterations", full.training.iterations, quick.training.iterations),
    ):
        assert f"Left out: {a}, or {b} with --quick." in said, name
    assert f"followed by {full.training.epochs} optimizer steps" in said
    for value in (full.beta, full.training.lam, full.training.algorithm, full.model, full.reward):
        assert f"Left out: {value}." in said
