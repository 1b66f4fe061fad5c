"""Arms of a fixed instruction and of another system's rewrites, and rewards in parts, through every verb."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from faulty import Server
from mutants import kills, mutated

from alignpro import rollouts
from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.arms import draws, given, rollout
from alignpro.llm.arms.draws import Arm, Work, stream
from alignpro.llm.arms.given import read_given
from alignpro.llm.arms.judge import pairs
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.llm.models import prompt
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.packages import sha256
from alignpro.llm.models.prompt import Prompt, said_in
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards.scores import Scores, scored
from alignpro.llm.targets.local import LocalTarget

PROMPTS = ["abc", "def", "gab", "hhc", "e"]
SAYS = "Answer step by step."


class Three:
    """A reward of three weighted parts, one a penalty, with the spread of an ensemble."""

    low, high = -0.2, 0.8
    ranges = {"share": (0.0, 0.5), "length": (-0.2, 0.0), "echo": (0.0, 0.3)}  # noqa: RUF012

    def scores(self, prompts, responses):
        parts = {
            "share": np.array([0.5 * y.count("e") / max(1, len(y)) for y in responses]),
            "length": np.array([-0.2 * min(1.0, len(y) / 8) for y in responses]),
            "echo": np.array([0.3 * (y[:1] in x) for x, y in zip(prompts, responses, strict=True)]),
        }
        return Scores(sum(parts.values()), parts, np.array([0.01 * len(y) for y in responses]))

    def score(self, prompts, responses):
        return self.scores(prompts, responses).total

    def describe(self):
        return {"name": "three"}


THREE = Three()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, prompts, and rewrites that another system made of them, as BPO names its fields."""
    folder = tmp_path_factory.mktemp("home")
    model, tokenizer = tiny_model(seed=1)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    # Every second one as another system may have changed it; one prompt has two rewrites.
    rows = [{"instruction": x.upper() + " !" if i % 2 else x, "context": ""} for i, x in enumerate(PROMPTS)]
    rows = [
        row | {"optimized_prompt": f"bead {x}", "calls": 3, "cost": 0.25}
        for row, x in zip(rows, PROMPTS, strict=True)
    ]
    rows += [{"prompt": "abc", "rewrite": "face"}, {"prompt": "of no use", "rewrite": "here", "calls": 1}]
    write(folder / "bpo.jsonl", rows)
    return folder


def world(home):
    return [
        *("--prompts-file", str(home / "prompts.txt"), "--dtype", "float32", "--target", str(home / "base")),
        *("--reward", f"{__name__}:THREE", "--answer-tokens", "4", "--prompter", str(home / "base")),
    ]


def rolled(home, out, *more):
    return main.main(["rollout", "--out", str(out), *world(home), "--rewrite-tokens", "4", *more])


def rows_of(out):
    return [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
    """A training run, and rollouts of every kind of arm."""
    out = tmp_path_factory.mktemp("run")
    command = [
        "train",
        "--out",
        str(out / "trained"),
        *world(home),
        "--iterations",
        "3",
        "--prompts-per-round",
        "3",
    ]
    assert main.main([*command, "--draws", "2", "--epochs", "1", "--rewrite-tokens", "4"]) == 0
    more = ["--arms", "none", "sft", "--trained", str(out / "trained"), "--instruction", f"step={SAYS}"]
    assert rolled(home, out / "rolled", *more, "--rewrites-file", f"bpo={home / 'bpo.jsonl'}") == 0
    return out


def told(folder):
    """The text of a page, without its tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text()))


# --- parts of a reward -----------------------------------------------------------------------------------


def test_parts_add_up_in_training(run):
    lines = [json.loads(line) for line in (run / "trained" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3

    def check(without):
        for line in lines:
            parts = [line[f"reward/{name}"] for name in THREE.ranges if name != without]
            assert sum(parts) == pytest.approx(line["score"], abs=1e-6)

    check(None)
    for name in THREE.ranges:
        kills(check, name)
    assert all(line["reward_spread"] > 0 for line in lines)
    assert all("refused_share" not in line for line in lines)  # a model in this process refuses nothing
    page = told(run / "trained")
    for name in (*THREE.ranges, "spread between members"):
        assert f" {name} " in page


def test_parts_add_up_from_the_rows_to_the_pages(run, tmp_path, capsys):
    file, arms = run / "rolled" / "rollouts.jsonl", ["none", "sft", "trained", "step", "bpo"]
    rows = rows_of(run / "rolled")
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    means = {}
    for arm, mine in by_arm.items():
        assert len(mine) == len(PROMPTS) * 4 * 2
        for row in mine:
            again = THREE.scores([row["x"]], [row["response"]])
            for name, (value, low, high) in row["reward_parts"].items():
                assert (low, high) == THREE.ranges[name]
                assert value == pytest.approx(again.parts[name][0])
            assert row["reward_spread"] == pytest.approx(again.spread[0])
            assert sum(part[0] for part in row["reward_parts"].values()) == pytest.approx(row["reward"])
        means[arm] = {name: np.mean([row["reward_parts"][name][0] for row in mine]) for name in THREE.ranges}

    summary = rollout.summarise(file)
    for arm in summary.arms:
        assert {name: mean.value for name, mean in arm.parts.items()} == pytest.approx(means[arm.name])
        assert sum(mean.value for mean in arm.parts.values()) == pytest.approx(arm.mean.value)
        assert arm.spread == pytest.approx(np.mean([row["reward_spread"] for row in by_arm[arm.name]]))

    capsys.readouterr()
    say = ["estimate", str(file), "--beta", "0.3", "--lam", "0.3"]
    assert main.main([*say, "--out", str(tmp_path / "estimate"), "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert main.main(say) in (0, 1)
    text = capsys.readouterr().out
    assert (
        main.main(["compare", str(file), "--arms", *arms, "--out", str(tmp_path / "compare"), "--json"]) == 0
    )
    compared = json.loads(capsys.readouterr().out)
    pages = {"estimate": told(tmp_path / "estimate"), "compare": told(tmp_path / "compare")}
    for arm in arms:
        parts = {name: e["value"] for name, e in found["parts"][arm].items()}
        assert parts == pytest.approx(means[arm])
        assert sum(parts.values()) == pytest.approx(found["quantities"][f"J({arm})"]["value"])
        assert parts == {name: e["value"] for name, e in compared["parts"][arm].items()}
        for name, e in found["parts"][arm].items():
            low, high = THREE.ranges[name]
            assert low - 1e-12 <= e["lo"] <= e["value"] <= e["hi"] <= high + 1e-12
            for where in (text, *pages.values()):
                assert f"{e['value']:.4g}" in where.replace("−", "-"), (arm, name)
        if arm != "none":
            moved = {name: e["value"] for name, e in compared["against"][arm]["parts"].items()}
            assert moved == pytest.approx({name: parts[name] - means["none"][name] for name in parts})
            assert sum(moved.values()) == pytest.approx(compared["against"][arm]["mean"]["value"])
    assert compared["prompters"]["bpo"].endswith("(made with 16 calls, a cost of 1.25, it says)")
    assert "made with 16 calls" in pages["compare"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": [0.2, 0.2]}, "its parts are a, and it declares ranges of a, b"),
        ({"a": [0.2, 0.2], "b": [0.3, 0.8]}, "its part b leaves the declared [0, 0.5]"),
        ({"a": [0.2, 0.2], "b": [0.3, 0.2]}, "its parts do not add up to it"),
        ({"a": [0.2, np.nan], "b": [0.3, 0.3]}, "its part a leaves the declared"),
    ],
)
def test_parts_that_no_file_could_hold_are_refused_at_once(parts, message):
    class Bad:
        low, high, ranges = 0.0, 1.0, {"a": (0.0, 0.5), "b": (0.0, 0.5)}

        def scores(self, prompts, responses):
            return Scores(np.array([0.5, 0.5]), {name: np.array(v) for name, v in parts.items()})

    with pytest.raises(AlignProError) as caught:
        scored(Bad(), ["x", "x"], ["y", "z"])
    assert message in str(caught.value)


# --- a fixed instruction ---------------------------------------------------------------------------------

BEFORE = [{"role": "system", "content": "hab"}, {"role": "user", "content": "gee"}]


def test_an_instruction_follows_every_prompt(run):
    mine = [row for row in rows_of(run / "rolled") if row["arm"] == "step"]

    def check(module):
        for text, expected in ((SAYS, f"abc {SAYS}"), ("\n\nBriefly.", "abc\n\nBriefly."), ("", "abc")):
            assert module.with_instruction("abc", text) == expected

    check(prompt)
    kills(check, mutated(prompt, '"" if not text or text[0].isspace() else " "', '" "'))
    kills(check, mutated(prompt, '"" if not text or text[0].isspace() else " "', '""'))
    work, arm = SimpleNamespace(settings=RolloutSettings(draws=2)), Arm("step", text=SAYS)
    assert [d.rewrite for d in draws._instructed(work, arm, ["abc"])[0]] == [f"abc {SAYS}"] * 2
    assert {(row["x"], row["rewrite"]) for row in mine} == {(x, f"{x} {SAYS}") for x in PROMPTS}
    assert all(row["logp_prompter"] is row["logp_reference"] is None for row in mine)
    assert all(row["logp_frozen_rewrite"] > -np.inf for row in mine)
    assert {row["prompter"] for row in mine} == {f"x, then {SAYS!r}"}


def test_it_stands_in_the_prompts_conversation():
    """The frozen model is asked the rewrite after the turns before x: its own log-probabilities say so."""
    target = LocalTarget(tiny_model(seed=1), name="tiny")
    plain = Sampling(max_tokens=4)
    settings = RolloutSettings(draws=2, answers=2)
    work = Work(settings, THREE, target, target.log_probs, plain, None, None)
    x = Prompt("abc", BEFORE, {"answer": "b"})
    parties = dict.fromkeys(("frozen", "prompter", "reward_model", "sampling"), "a")
    rows = rollout.block_rows(work, Arm("step", text="hah"), [x], parties)
    assert len(rollouts.collect(rows)) == 4
    itself = rollout.block_rows(work, Arm("none"), [x], parties)
    assert {row.rewrite for row in itself} == {row.x for row in itself} == {"abc"}
    assert len(rollouts.collect(itself)) == 4
    asked = said_in(x, "abc hah")
    [answers] = target.respond([asked], plain, samples=4, seed=stream("answers", 0))

    def check(asked):
        of_rewrite = target.log_probs([asked] * 4, answers, plain)
        assert [row.logp_frozen_rewrite for row in rows] == pytest.approx(of_rewrite.tolist(), abs=1e-4)

    check(asked)
    kills(check, "abc hah")  # out of its conversation
    for row in rows:
        assert (row.x, row.rewrite, row.context, row.columns) == ("abc", "abc hah", BEFORE, {"answer": "b"})


# --- rewrites of another system --------------------------------------------------------------------------


def test_rewrites_are_found_by_prompt_and_taken_in_turn(run, home):
    rows = [row for row in rows_of(run / "rolled") if row["arm"] == "bpo"]
    said = {(row["x"], row["draw"]): row["rewrite"] for row in rows}
    assert said == {
        (x, d): "face" if x == "abc" and d % 2 else f"bead {x}" for x in PROMPTS for d in range(4)
    }
    # Draws of one rewrite have answers of their own.
    texts = [
        tuple(row["response"] for row in rows if row["x"] == "def" and row["draw"] == d) for d in range(4)
    ]
    assert len(set(texts)) > 1
    assert all(row["logp_prompter"] is row["logp_reference"] is None for row in rows)
    record = json.loads((run / "rolled" / "settings.json").read_text())["arms"]
    digest = sha256(home / "bpo.jsonl")[:12]
    assert record["step (seed 0)"] == {"instruction": SAYS}
    assert record["bpo (seed 0)"] == {
        "file": str(home / "bpo.jsonl"),
        "sha256": digest,
        "calls": 16,
        "cost": 1.25,
    }
    page = told(run / "rolled")
    assert f"bpo.jsonl {digest} (made with 16 calls, a cost of 1.25, it says)" in page
    assert f"x, then &#39;{SAYS}&#39;" in page

    def check(module):
        work = SimpleNamespace(settings=RolloutSettings(draws=3), given={"a": {"x": ["1", "2"]}})
        assert [d.rewrite for d in module._given(work, Arm("a", file="f"), ["x"])[0]] == ["1", "2", "1"]

    check(draws)
    kills(check, mutated(draws, "row[i % len(row)]", "row[min(i, len(row) - 1)]"))


def test_they_are_judged_like_any_arms(run):
    found = pairs(run / "rolled" / "rollouts.jsonl", ["bpo", "step"], prompts=3)
    assert [pair.x for pair in found] == PROMPTS[:3]


def test_neither_needs_a_prompter(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Prompter, "from_pretrained", None)
    more = ["--arms", "none", "--instruction", f"step={SAYS}", "brief=Be brief."]
    assert rolled(home, tmp_path, *more, "--rewrites-file", f"bpo={home / 'bpo.jsonl'}", "--draws", "1") == 0
    said = capsys.readouterr().err
    assert "none (seed 0), step (seed 0), brief (seed 0), bpo (seed 0): 0 rewrites, 40 answers" in said
    assert "bpo: the first 1 of up to 2 rewrites" in said
    assert {row["rewrite"] for row in rows_of(tmp_path) if row["arm"] == "bpo"} == {
        f"bead {x}" for x in PROMPTS
    }


def test_a_changed_file_or_instruction_is_refused(home, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    shutil.copy(home / "bpo.jsonl", file)
    arms = ["--arms", "none", "--draws", "1"]
    given_ = [*arms, "--rewrites-file", f"bpo={file}", "--instruction", f"step={SAYS}"]
    assert rolled(home, tmp_path / "out", *given_) == 0
    before = (tmp_path / "out" / "rollouts.jsonl").read_bytes()
    assert rolled(home, tmp_path / "out", *given_) == 0
    capsys.readouterr()
    assert rolled(home, tmp_path / "out", *arms, "--instruction", "step=Be brief.") == 2
    assert f"arms.step (seed 0).instruction = {SAYS}, not Be brief." in capsys.readouterr().err
    file.write_text(file.read_text().replace("face", "cafe"))
    assert rolled(home, tmp_path / "out", *given_) == 2
    assert "arms.bpo (seed 0).sha256 = " in capsys.readouterr().err
    assert (tmp_path / "out" / "rollouts.jsonl").read_bytes() == before


BAD = {
    "no name": (["--instruction", "Be brief."], "instruction 'Be brief.': give NAME=TEXT"),
    "no text": (["--instruction", "a= "], "instruction 'a= ': give NAME=TEXT"),
    "odd name": (["--rewrites-file", "a b=f"], "rewrites_file 'a b=f': give NAME=FILE, the name of letters"),
    "an arm's name": (["--instruction", "sft=a"], "sft is an arm of its own"),
    "rlhf": (["--rewrites-file", "rlhf=f"], "rlhf is an arm of its own"),
    "trained": (["--rewrites-file", "trained=f"], "trained is an arm of its own"),
    "twice": (["--instruction", "a=b", "a=c"], "a is an arm of its own"),
    "both": (["--instruction", "a=b", "--rewrites-file", "a=f"], "a is an arm of its own"),
    "as an arm": (
        ["--arms", "rewrites"],
        "arms 'rewrites': choose from none, sft, star, best_of_n; give NAME=",
    ),
    "no file": (["--rewrites-file", "a=/nowhere.jsonl"], "rewrites_file /nowhere.jsonl: cannot read it"),
    "no format": (
        ["--rewrites-file", "a=/nowhere.txt"],
        "rewrites_file /nowhere.txt: give a file in .jsonl, .json",
    ),
    "few": (
        ["--rewrites-file", "a=HOME/few.jsonl"],
        "has none for 3 of 5 prompts, first for 'def'; add them",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_told_before_anything_is_loaded(case, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Prompter, "from_pretrained", None)
    monkeypatch.setattr("alignpro.commands.opening.World.target", None)
    write(home / "few.jsonl", [{"x": x, "rewritten": "a"} for x in ("abc", "e")])
    more, message = BAD[case]
    assert rolled(home, tmp_path / "out", *(a.replace("HOME", str(home)) for a in more)) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not list((tmp_path / "out").glob("*"))


def test_fields_formats_and_lists(tmp_path):
    as_list = [
        {"x": "A b", "rewrites": ["one", " two "]},
        {"prompt": "c?", "rewritten": "three", "tokens": "7"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(as_list))
    write(tmp_path / "a.jsonl", as_list)
    for name in ("a.json", "a.jsonl"):
        found = read_given(tmp_path / name, ["A b", "c?"])
        assert found.of == {"A b": ("one", "two"), "c?": ("three",)}
        assert found.cost == {"tokens": 7.0}
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "rewrite", "calls"], ["A, b", "one", "2"], ["c", "two", ""]])
    found = read_given(tmp_path / "a.csv", ["a b", "c"])
    assert (found.of, found.cost) == ({"a b": ("one",), "c": ("two",)}, {"calls": 2.0})
    assert read_given(write(tmp_path / "b.jsonl", as_list[:1]), ["A b"]).costs() == ""


def test_the_nearest_prompt_counts(tmp_path):
    """Text and turns before it, then text, then what is left without case and punctuation."""
    rows = [
        {"prompt": "say it", "rewrite": "loose"},
        {"prompt": "Say it!", "context": BEFORE, "rewrite": "in the chat"},
        {"instruction": "Sum up", "context": "a text", "rewrite": "with its text"},
        {"prompt": "!?", "rewrite": "signs"},
        {"messages": [*BEFORE, {"role": "user", "content": "Go on."}], "rewritten": "whole"},
    ]
    few = write(tmp_path / "few.jsonl", rows)
    more = write(tmp_path / "more.jsonl", [*rows, {"prompt": "Say it!", "rewrite": "exact"}])
    expected = {"Say it!": "exact", Prompt("Say it!", BEFORE): "in the chat", "SAY, it": "loose exact"}
    expected |= {Prompt("Go on.", BEFORE): "whole"}
    expected |= {"Sum up\na text": "with its text", "!?": "signs", Prompt("Say it!", BEFORE[:1]): "exact"}

    def read(module, file, prompts):
        try:
            return {x: " ".join(texts) for x, texts in module.read_given(file, prompts).of.items()}
        except AlignProError as error:
            return str(error)

    def check(module):
        assert read(module, more, list(expected)) == expected
        assert read(module, few, ["Say it!"]) == {"Say it!": "loose"}
        # Of signs alone nothing is left to be near.
        assert "none for 2 of 3 prompts, first for '??'; add" in read(module, few, ["Say it!", "??", "…"])

    check(given)
    for right, wrong in (
        ("said_in(x, x), str(x), ", "str(x), said_in(x, x), "),
        ("(normalised(x) or x)", "normalised(x)"),
        ("normalised(x) or x", "str(x)"),
        ("[x] if context_of(x) else", ""),
        ('("instruction", "context") if', '("instruction",) if'),
    ):
        kills(check, mutated(given, right, wrong))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"rewrite": "a"}, "line 1: no text in prompt or x or messages or final_input or instruction"),
        ({"prompt": " ", "rewrite": "a"}, "line 1: no text in prompt"),
        ({"prompt": "a"}, "line 1: no text, or list of texts, in rewrite or optimized_prompt"),
        ({"prompt": "a", "rewrite": ["b", ""]}, "line 1: no text, or list of texts"),
        ({"prompt": "a", "rewrites": []}, "line 1: no text, or list of texts"),
        ({"prompt": "a", "rewrite": "b", "calls": -1}, "line 1: calls -1 is no number of at least 0"),
        ({"prompt": "a", "rewrite": "b", "cost": "dear"}, "line 1: cost 'dear' is no number"),
        ({"prompt": "a", "rewrite": "b", "context": [{"role": "x"}]}, "line 1: context {'role': 'x'}"),
        ({"prompt": 5, "rewrite": "b"}, "line 1: no text or conversation in column 'prompt'"),
    ],
)
def test_damaged_rows_are_named(row, message, tmp_path):
    with pytest.raises(AlignProError) as caught:
        read_given(write(tmp_path / "a.jsonl", [row]), ["a"])
    assert message in str(caught.value)


def test_a_rewrite_without_room_is_refused_before_anything_is_asked(home, tmp_path, capsys):
    write(home / "long.jsonl", [{"prompt": x, "rewrite": "ab" * 5000 if x == "e" else "a"} for x in PROMPTS])
    assert rolled(home, tmp_path, "--arms", "none", "--rewrites-file", f"long={home / 'long.jsonl'}") == 2
    said = capsys.readouterr().err
    assert "prompt 'abab" in said
    assert "more exceed the" in said
    assert not (tmp_path / "rollouts.partial.jsonl").exists()


# --- refused answers, from a real service ----------------------------------------------------------------


def refuses(body):
    """One request in five, whatever its number: by what it asks."""
    return int.from_bytes(digest(json.dumps(body, sort_keys=True))[:4]) % 5 == 0


def filtered(n, body):
    if not refuses(body):
        return None
    error = {
        "message": "The response was filtered",
        "code": "content_filter",
        "type": None,
        "param": "prompt",
    }
    return 400, {}, json.dumps({"error": error}).encode()


def test_refused_answers_are_counted_from_the_service_to_the_pages(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(filtered) as server:
        behind = [
            "--target",
            server.url,
            "--target-model",
            "m",
            "--refused-most",
            "0.6",
            "--refused-reward",
            "0.3",
        ]
        arms = ["--arms", "none", "--instruction", f"step={SAYS}"]
        assert rolled(home, tmp_path / "rolled", *arms, *behind) == 0
        said = capsys.readouterr().out
        counts = {False: 0, True: 0}
        for body, _ in server.requests:
            counts[refuses(body)] += 1
        command = ["train", "--out", str(tmp_path / "trained"), *world(home), *behind, "--iterations", "6"]
        command += ["--prompts-per-round", "3", "--draws", "2", "--epochs", "1", "--rewrite-tokens", "8"]
        assert main.main(command) == 0
        trained = [refuses(body) for body, _ in server.requests[sum(counts.values()) :]]

    rows = rows_of(tmp_path / "rolled")
    refused = [row for row in rows if row["response"] is None]
    assert (len(rows) - len(refused), len(refused)) == (counts[False], counts[True])
    assert 0 < len(refused) < len(rows)
    for row in refused:  # half of the range, in all parts
        assert row["reward"] == 0.3
        middle = {
            name: [pytest.approx((low + high) / 2), low, high] for name, (low, high) in THREE.ranges.items()
        }
        assert row["reward_parts"] == middle
    page = told(tmp_path / "rolled")
    for arm in ("none", "step"):
        share = f"{(n := sum(row['arm'] == arm for row in refused))} ({n / 40:.1%})"
        assert f"; refused: {share}" in next(line for line in said.splitlines() if line.startswith(arm))
        assert f" {arm} " in page
        assert share in page
    assert "A refused answer counts with its declared reward." in page
    assert "(refused)" in page or all(row["draw"] or row["answer"] for row in refused)

    lines = [json.loads(line) for line in (tmp_path / "trained" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["refused_share"] for line in lines]
    assert len(shares) == 6
    assert len(trained) == 36  # no two rewrites of a round are one
    rounds = np.reshape(trained, (6, 6)).mean(1)

    def check(expected):
        assert shares == pytest.approx(list(expected))

    check(rounds)
    # Of all rounds so far, which a resumed run does not know.
    kills(check, np.cumsum(rounds) / np.arange(1, 7))
    assert "share of answers refused" in told(tmp_path / "trained")
    for line in lines:
        assert sum(line[f"reward/{name}"] for name in THREE.ranges) == pytest.approx(line["score"], abs=1e-6)
