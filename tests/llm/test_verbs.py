"""`alignpro sft` and `alignpro resample`, as a user meets them, on small models of the tests' own."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
from faulty import Server
from mutants import kills

from alignpro.commands import main
from alignpro.commands import resample as resample_verb
from alignpro.llm.arms.resample import load_proposals
from alignpro.llm.data.split import split_of
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.policies.prompter import Prompter

PROMPTS = ["abc", "def", "gab", "hhc", "e"]


def shares(prompts, responses):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("e") / max(1, len(y)) for y in responses]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = tiny_model(seed=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# --- sft ---


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"x": "".join(x), "better": "".join(x[::-1])} for x in itertools.product("abcd", repeat=3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(base, pairs, out, *more):
    command = ["sft", "--out", str(out), "--prompter", base, "--pairs", str(pairs)]
    command += [
        "--prompt-column",
        "x",
        "--rewrite-column",
        "better",
        "--epochs",
        "2",
        "--rewrite-tokens",
        "6",
    ]
    return main.main([*command, "--learning-rate", "0.01", *more])


def test_sft_gives_a_prompter_that_train_takes(base, pairs, tmp_path, capsys):
    assert sft(base, pairs, tmp_path / "sft") == 0
    said = capsys.readouterr()
    sizes = [
        sum(split_of("".join(x)) == part for x in itertools.product("abcd", repeat=3))
        for part in ("train", "validation", "test")
    ]
    steps = 2 * math.ceil(sizes[0] / 16)
    assert (
        f"64 pairs: {sizes[0]} to learn from, {sizes[1]} and {sizes[2]} to measure on; 2 epochs, {steps} "
        "steps of 16 at most" in said.err
    )
    folder = tmp_path / "sft" / "prompter"
    tuned, before = Prompter.from_pretrained(folder), Prompter.from_pretrained(base)
    test = [x for x in map("".join, itertools.product("abcd", repeat=3)) if split_of(x) == "test"]
    for party, word in ((before, "before"), (tuned, "after")):
        nats = -party.log_probs(test, [x[::-1] for x in test]).sum() / (
            5 * len(test)
        )  # a space, three letters, the end
        assert f"{nats:.3f}" in next(line for line in said.out.splitlines() if line.startswith("test: "))
        assert word in said.out
    assert f"--prompter {folder}" in said.out
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["train", "--out", str(tmp_path / "train"), "--prompter", str(folder), "--target", base]
    command += ["--reward", f"{__name__}:shares@0,1", "--prompts-file", str(tmp_path / "prompts.txt")]
    command += [
        "--iterations",
        "1",
        "--prompts-per-round",
        "2",
        "--draws",
        "2",
        "--epochs",
        "1",
        "--rewrite-tokens",
        "4",
    ]
    assert main.main([*command, "--answer-tokens", "4"]) == 0
    # And a second run does not touch the first, unless it resumes it.
    assert sft(base, pairs, tmp_path / "sft") == 2
    assert "holds a run of sft (base " in capsys.readouterr().err
    assert sft(base, pairs, tmp_path / "sft", "--resume") == 0
    assert sft(base, pairs, tmp_path / "sft", "--resume", "--seed", "1") == 2
    assert "settings.seed = 0, not 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "epochs 0: give a whole number of at least 1"),
        (["--pairs", "/nowhere"], "rewrites /nowhere: cannot read it"),
        (["--rewrite-column", "worse"], "line 1: field 'worse' is missing"),
        (["--prompter", "nope"], "nope"),
    ],
)
def test_mistakes_in_sft_cost_nothing(more, message, base, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Prompter, "from_pretrained", None)
    assert sft(base, pairs, tmp_path / "out", *more) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


# --- resample ---


@pytest.fixture
def command(base, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    out = ["resample", "--out", str(tmp_path / "out"), "--prompter", base, "--target", base]
    out += ["--reward", f"{__name__}:shares@0,1", "--prompts-file", str(tmp_path / "prompts.txt")]
    return [*out, "--dtype", "float32", "--answer-tokens", "4", "--rewrite-tokens", "4", "--proposals", "8"]


def test_resample_prints_what_the_formulas_say(command, tmp_path, capsys):
    """Gain, KL and effective sample size of eq. (10) on the proposals, and the best of n, by plain NumPy."""
    assert main.main([*command, "--lam", "0.05", "2", "--draws", "3", "--proposal-answers", "2"]) == 0
    said = capsys.readouterr()
    assert "5 prompts: 40 rewrites, at most 80 answers of at most 4 tokens" in said.err
    rewards = np.array([p.rewards for p in load_proposals(tmp_path / "out" / "proposals.jsonl")])
    assert rewards.shape == (5, 8)
    lines = {line.split("  ")[0].strip() or line: line for line in map(str.strip, said.out.splitlines())}
    assert f"rho_sft: mean reward {rewards.mean():.4f}" in said.out
    for lam in (0.05, 2):
        w = np.exp(rewards / lam) / np.exp(rewards / lam).sum(1, keepdims=True)
        gain = ((w - 1 / 8) * rewards).sum(1).mean()
        kl = (w * np.log(8 * np.maximum(w, 1e-300))).sum(1).mean()
        ess = (1 / (w**2).sum(1)).mean()
        assert lines[f"lam {lam:g}"].split()[2:5] == [f"{gain:+.4f}", f"{kl:.3f}", f"{ess:.1f}"]
    everything = np.array(list(itertools.product(range(8), repeat=2)))
    distinct = everything[everything[:, 0] != everything[:, 1]]
    best = rewards[:, distinct].max(2).mean(1) - rewards.mean(1)
    assert lines["best of 2"].split()[3] == f"{best.mean():+.4f}"
    assert lines["best of 8"].split()[3] == f"{(rewards.max(1) - rewards.mean(1)).mean():+.4f}"
    rows = [json.loads(line) for line in (tmp_path / "out" / "rewrites.jsonl").read_text().splitlines()]
    assert [(r["lam"], r["x"], r["draw"]) for r in rows] == [
        (lam, x, i) for lam in (0.05, 2.0) for x in PROMPTS for i in range(3)
    ]
    proposed = {p.prompt: p.rewrites for p in load_proposals(tmp_path / "out" / "proposals.jsonl")}
    assert all(r["rewrite"] in proposed[r["x"]] for r in rows)


def test_resample_goes_on_where_it_stopped(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resample_verb, "BLOCK", 2)
    assert main.main([*command, "--draws", "2"]) == 0

    def on_file(folder):
        """All but the reward's own account, which counts the scores of one process."""
        found = (tmp_path / folder).glob("*.json*")
        return {p.name: p.read_bytes() for p in found if p.name != "reward.json"}

    files = on_file("out")
    elsewhere = [a.replace(str(tmp_path / "out"), str(tmp_path / "cut")) for a in command]
    from alignpro.llm.arms import resample

    propose, count = resample.propose, iter(range(9))

    def interrupted(*positional, **named):
        if next(count) == 1:
            raise KeyboardInterrupt
        return propose(*positional, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample, "propose", interrupted)
        assert main.main([*elsewhere, "--draws", "2"]) == 130
    assert len(load_proposals(tmp_path / "cut" / "proposals.jsonl")) == 2
    capsys.readouterr()
    assert main.main([*elsewhere, "--draws", "2"]) == 0
    assert "5 prompts (2 kept): 24 rewrites" in capsys.readouterr().err
    assert on_file("cut") == files
    # Other λ ask for nothing; other proposals are another folder's.
    monkeypatch.setattr(Prompter, "from_pretrained", None)
    assert main.main([*command, "--lam", "0.5"]) == 0
    for more, name in ((["--seed", "1"], "seed = 0, not 1"), (["--proposals", "9"], "proposals = 8, not 9")):
        assert main.main([*command, *more]) == 2
        assert name in capsys.readouterr().err


def test_a_lost_account_of_the_reward_is_made_again(command, tmp_path, capsys):
    """Bounds of the rewards decide what is printed; its counts went with the file. Mutant: no bounds."""
    kept = tmp_path / "out" / "reward.json"
    assert main.main(command) == 0
    said = capsys.readouterr().out
    whole = json.loads(kept.read_text())
    assert whole["bounds"]["scored"] > 0

    def check(act):
        act()
        assert main.main(command) == 0
        again = capsys.readouterr()
        assert again.out == said
        assert "reward.json: is missing or damaged; made again, without its counts" in again.err
        made = json.loads(kept.read_text())
        assert made["bounds"]["scored"] == 0
        assert made | {"bounds": whole["bounds"]} == whole

    check(kept.unlink)
    for damaged in ("", "[1]", kept.read_text().replace('"low"', '"low "')):
        check(lambda damaged=damaged: kept.write_text(damaged))
    kills(check, lambda: None)


def raising(prompts, responses):
    raise ValueError("a slip")


def test_a_failed_start_claims_nothing_and_another_model_is_told_of(command, base, tmp_path, capsys):
    """Another reward may have the folder; once there are proposals, its frozen model is theirs."""
    mine = shutil.copytree(base, tmp_path / "mine")
    given = [
        str(mine) if word == base and command[i - 1] == "--target" else word for i, word in enumerate(command)
    ]
    bad = [word.replace(":shares@", ":raising@") for word in given]
    assert main.main(bad) == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"answers"}  # paid for
    assert main.main(given) == 0
    capsys.readouterr()
    assert main.main(bad) == 2
    assert (
        "was started with reward = test_verbs:shares@0,1, not test_verbs:raising@0,1"
        in capsys.readouterr().err
    )
    tiny_model(seed=2)[0].save_pretrained(mine)
    assert main.main(given) == 2
    assert (
        f"--out: {tmp_path / 'out'} was started with another content of target (" in capsys.readouterr().err
    )
    assert main.main(["train", "--out", str(tmp_path / "out"), "--resume"]) == 2
    assert "holds a run of resample (prompter " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lam", "-1"], "--lam -1.0: give positive, finite numbers"),
        (["--proposals", "0"], "--proposals 0: give at least 1"),
        (["--rewrite-tokens", "0"], "--rewrite-tokens 0: give at least 1"),
        (["--split", "dev"], "split 'dev': choose from"),
        (["--reward", "nope"], "reward 'nope'"),
        (["--target-model", "m"], "target_model: is for an endpoint"),
        (["--reward-max-calls", "3"], "reward_max_calls: is for an endpoint"),
    ],
)
def test_mistakes_in_resample_cost_nothing(more, message, command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Prompter, "from_pretrained", None)
    assert main.main([*command, *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_a_reward_at_an_address_has_flags_of_its_own(command, tmp_path, capsys, monkeypatch):
    def scores(n, body):
        rows = [{"index": i, "score": y.count("e") / 4} for i, y in enumerate(body["text_2"])]
        return 200, {}, json.dumps({"data": rows}).encode()

    monkeypatch.setenv("PLANTED", "sk-planted-17c3")
    with Server(scores) as server:
        at = [f"{server.url}@0,1" if "shares@" in word else word for word in command]
        at += ["--reward-dialect", "score", "--reward-model", "judge", "--reward-key-env", "PLANTED"]
        assert main.main([*at, "--reward-max-calls", "1", "--prompts", "1"]) == 0, capsys.readouterr().err
        ((body, headers),) = server.requests
    assert body["model"] == "judge"
    assert headers["authorization"] == "Bearer sk-planted-17c3"
    (found,) = load_proposals(tmp_path / "out" / "proposals.jsonl")
    assert all(0 <= r <= 1 for r in found.rewards)
