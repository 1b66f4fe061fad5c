"""`alignpro train` and `alignpro rewrite`, as a user meets them, on small models of the tests' own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kept
import numpy as np
import pytest
from faulty import Server

from alignpro.commands import main
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.policies.prompter import Prompter

KEY = "sk-planted-51d84b067f3a9c2e"
SMALL = [
    "--iterations",
    "2",
    "--prompts-per-round",
    "2",
    "--draws",
    "4",
    "--epochs",
    "1",
    "--rewrite-tokens",
    "4",
]


def shares(prompts, responses):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("a") / max(1, len(y)) for y in responses]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny, tokenizer = tiny_model(seed=1)
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def call(model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\ngab\n")

    def run(*arguments, target=("--target", model)):
        common = [
            "--out",
            str(tmp_path / "out"),
            "--prompter",
            model,
            *target,
            "--reward",
            f"{__name__}:shares@0,1",
        ]
        status = main.main(
            ["train", *common, "--prompts-file", str(prompts), *SMALL, "--answer-tokens", "4", *arguments]
        )
        return status, capsys.readouterr()

    return run


def test_train_then_rewrite_in_three_lines(call, tmp_path, capsys):
    status, said = call("--dtype", "float32")
    assert status == 0, said.err
    assert "2 rounds of 2 x 4 rewrites, 16 answers of at most 4 tokens; 2 ppo steps" in said.err
    assert "mean reward of a round: 0." in said.out
    out = tmp_path / "out"
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert all(0 <= line["score"] <= 1 for line in metrics)
    assert len(kept.lines(out / "answers")) == 16

    prompter = Prompter.from_pretrained(out / "prompter")
    rewrite = prompter.rewrite("abc")
    assert prompter.rewrite("abc") == rewrite
    assert prompter.facts["settings"]["iterations"] == 2
    assert main.main(["rewrite", str(out / "prompter"), "abc", "--json", "--draws", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["x"] for line in lines] == ["abc"] * 3
    assert lines[0]["rewrite"] == rewrite
    base = Prompter.from_pretrained(prompter.base)
    # What was saved moves probabilities; without it they are those of the base.
    moved = prompter.log_probs(["abc"], ["ab"]) - base.log_probs(["abc"], ["ab"])
    assert np.abs(moved) > 1e-6
    with prompter.model.disable_adapter():
        np.testing.assert_allclose(
            prompter.log_probs(["abc"], ["ab"]), base.log_probs(["abc"], ["ab"]), rtol=1e-6
        )
    card = (out / "prompter" / "README.md").read_text()
    assert "Prompter.from_pretrained" in card
    assert not [*out.rglob("*.bin"), *out.rglob("*.pkl")]

    status, said = call()
    assert status == 2
    assert f"--out {out}: holds a run of train (task prompter, prompter " in said.err
    assert f"; continue it with alignpro train --out {out} --resume, and its settings" in said.err


def test_options_from_a_file_and_what_wins(call, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("lam: 0.25\nseed: 7\nalgorithm: rloo\niterations: 9\n")
    status, said = call("--config", str(config), "--seed", "3")
    assert status == 0, said.err
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert (settings["lam"], settings["algorithm"]) == (0.25, "rloo")
    assert (settings["seed"], settings["iterations"]) == (3, 2)  # the command line wins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "5"], "top_k = 5: unlikely tokens are never drawn"),
        (["--preset", "best"], "preset 'best': choose from faithful, paper"),
        (["--reward", "nope"], "reward 'nope'"),
        (["--target", "http://127.0.0.1:9/v1"], "target_model: name the model that"),
        (["--target-model", "m"], "model: is for an endpoint"),
        (["--algorithm", "dpo"], "algorithm 'dpo': choose from ppo, rloo, grpo"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: cannot read it"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, call):
    status, said = call(*arguments)
    assert status == 2
    lines = [line for line in said.err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert message in lines[0]


def test_rewrite_refuses_what_it_cannot_do(capsys, tmp_path):
    (tmp_path / "prompter.json").write_text("{}")
    for arguments, message in (
        ([str(tmp_path), "x"], "prompter.json is not one that Prompter.save wrote"),
        (["", "x"], "prompter '': name a model"),
        ([str(tmp_path), "x", "--draws", "0"], "--draws 0: give at least 1"),
    ):
        assert main.main(["rewrite", *arguments]) == 2
        assert message in capsys.readouterr().err


_PLANTED = """
import sys
sys.path.insert(0, sys.argv[1])
from alignpro.commands import main as cli
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


def test_a_failing_endpoint_costs_nothing_and_no_key_leaks(model, tmp_path, monkeypatch, capfd):
    """30% of calls fail, with the key echoed in the error; the run goes on, and the key is nowhere."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\ngab\n")
    echo = json.dumps({"error": {"message": f"bad day, key {KEY}"}}).encode()

    def failing(n, body):
        return (500, {}, echo) if n % 10 in (0, 4, 7) else None

    def arguments(out, server):
        return [
            *("--out", str(out), "--prompter", model, "--target", server.url, "--target-model", "m"),
            *("--target-key-env", "PLANTED", "--target-backoff-s", "0"),
            *("--reward", "test_run:shares@0,1"),
            *("--prompts-file", str(prompts), *SMALL),
        ]

    def calls(server):
        assert all(headers["authorization"] == f"Bearer {KEY}" for _, headers in server.requests)
        return len(server.requests)

    monkeypatch.setenv("PLANTED", KEY)
    with Server(failing) as server:  # in a process of its own: all that it writes is seen
        command = [sys.executable, "-c", _PLANTED, str(Path(__file__).parent)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        bad = subprocess.run(
            [*command, *arguments(tmp_path / "bad", server)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        asked = calls(server)
    assert bad.returncode == 0, bad.stderr
    with Server(lambda n, body: None) as server:
        assert main.main(["train", *arguments(tmp_path / "good", server)]) == 0
        fewer = calls(server)
    assert asked > fewer == 16
    assert (tmp_path / "bad" / "metrics.jsonl").read_text() == (
        tmp_path / "good" / "metrics.jsonl"
    ).read_text()

    written = capfd.readouterr()

    def leaks(more=b""):
        files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        streams = [s.encode() for s in (bad.stdout, bad.stderr, *written)]
        return any(KEY.encode() in content for content in [*files, *streams, more])

    assert not leaks()
    assert leaks(KEY.encode())  # the search finds one where there is one
