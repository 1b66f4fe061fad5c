"""`alignpro instruct`, as a user meets it: what is asked of whom, what its numbers are of, what goes on."""

import json
from collections import Counter

import numpy as np
import pytest
from faulty import Server, completion
from kept import lines
from mutants import kills, mutated

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.arms import instruct
from alignpro.llm.arms.settings import InstructSettings
from alignpro.llm.data.bank import INSTRUCTIONS
from alignpro.llm.data.split import split_of
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import digest

PROMPTS = [f"Tell me about number {i}." for i in range(60)]
WORTH = {"Say e.": 7, "Be brief.": 4, "Use short words.": 3, "Sing.": 2, "": 1}
CANDIDATES = ["", "Be brief.", "Use short words.", "Say e.", "Sing."]


def shares(prompts, responses):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("e") / max(1, len(y)) for y in responses]


def instruction_of(asked):
    """The candidate that ends what was asked."""
    return max((text for text in WORTH if asked.endswith(text)), key=len)


def says(n, body):
    """Ten letters, of which as many are e as the instruction is worth, give or take one."""
    asked = body["messages"][-1]["content"]
    k = WORTH[instruction_of(asked)] + digest(asked, body.get("seed", 0))[0] % 3 - 1
    said = {"index": 0, "message": {"role": "assistant", "content": "e" * k + "x" * (10 - k)}}
    return 200, {}, json.dumps(completion(body, choices=[said | {"finish_reason": "stop"}])).encode()


@pytest.fixture(autouse=True)
def _without_drawing(request, monkeypatch):
    """Pages take longer than all else; tests/commands has them, and one test here."""
    if "tmp_path" in request.fixturenames and "best" not in request.node.name:
        monkeypatch.setattr("alignpro.report.keep.keep", lambda page, place: None)


@pytest.fixture
def command(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "list.txt").write_text("Be brief.\n\nUse short words. \nSay e.\nSing.\nBe brief.\n")

    def get(server, *more, out="out"):
        words = ["instruct", "--out", str(tmp_path / out), "--target", server.url, "--target-model", "m"]
        words += [
            "--instructions-file",
            str(tmp_path / "list.txt"),
            "--prompts-file",
            str(tmp_path / "prompts.txt"),
        ]
        words += ["--reward", f"{__name__}:shares@0,1", "--budget", "200", "--eval-answers", "3", *more]
        return words

    return get


def rows_of(folder):
    return [json.loads(line) for line in (folder / instruct.FILE).read_text().splitlines()]


def test_what_is_asked_and_what_the_numbers_are_of(command, tmp_path, capsys):
    with Server(says) as server:
        assert main.main(command(server)) == 0, capsys.readouterr().err
        asked = [body["messages"][-1]["content"] for body, _ in server.requests]
    said = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "instruct.json").read_text())
    held = [x for x in PROMPTS if split_of(x) != "train"]
    after = 2 * 3 * len(held)
    assert (
        f"5 candidates on up to {len(PROMPTS) - len(held)} prompts: at most 200 answers of at most 64 "
        f"tokens, and {after} to the winner on {len(held)} others"
    ) in said.err
    # Every candidate at the end of prompts for training, in the race; the winner and none on the others.
    of = Counter()
    for text in asked:
        instruction = instruction_of(text)
        x = text.removesuffix(instruction).removesuffix(" ")
        assert x in PROMPTS
        assert text == (f"{x} {instruction}" if instruction else x)
        of[instruction, split_of(x) == "train"] += 1
    assert {name for name, training in of if training} == set(CANDIDATES)
    assert {key: n for key, n in of.items() if not key[1]} == dict.fromkeys(
        [("Say e.", False), ("", False)], 3 * len(held)
    )
    assert sum(n for (_, training), n in of.items() if training) == found["calls"] <= 200
    # Numbers are means of the rewards on file.
    rewards = {name: [] for name in CANDIDATES}
    rows = rows_of(tmp_path / "out")
    for row in rows:
        if row["kind"] == "race":
            for name, table in zip(row["candidates"], row["rewards"], strict=True):
                rewards[name] += np.ravel(table).tolist()
    assert found["winner"] == "Say e." == found["candidates"][0]["instruction"]
    for candidate in found["candidates"]:
        mine = rewards[candidate["instruction"]]
        assert candidate["mean"]["value"] == pytest.approx(np.mean(mine))
        assert candidate["mean"]["n"] == len(mine) == of[candidate["instruction"], True]
    tables = np.concatenate([row["rewards"] for row in rows if row["kind"] == "held out"], 1)
    assert tables.shape == (2, len(held), 3)
    gain = found["held_out"]["gain"]
    assert gain["value"] == pytest.approx(tables[0].mean() - tables[1].mean())
    assert gain["lo"] <= 0.6 <= gain["hi"]
    assert gain["n_clusters"] == len(held)
    assert "best: Say e." in said.out
    assert f"On {len(held)} other prompts it earns {tables[0].mean():.4g}, against" in said.out
    # From the race's prompts alone, with b uniform over the five.
    best = found["guaranteed"]["best"]
    assert best["kl"] == pytest.approx(np.log(5))
    assert f'"Say e." earns at least {best["limit"]:.4g}; at random with shares ' in said.out
    assert found["candidates"][0]["mean"]["lo"] <= best["limit"] < found["candidates"][0]["mean"]["value"]


def test_other_seeds_take_other_prompts_and_answers(command, tmp_path):
    with Server(says) as server:
        for seed in ("0", "1"):
            assert main.main(command(server, "--budget", "30", "--seed", seed, out=seed)) == 0
        first = [rows_of(tmp_path / seed)[0] for seed in ("0", "1")]
    assert first[0]["prompts"] != first[1]["prompts"]
    assert first[0]["rewards"] != first[1]["rewards"]


@pytest.mark.parametrize("cut", ["before a write", "in the middle of a write", "in the middle of a block"])
def test_an_interrupted_race_goes_on_to_the_same_files(cut, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("alignpro.estimation.race.BLOCK", 40)
    append, judged, count = instruct.append, instruct.judged, iter(range(99))

    def torn(path, data):
        if next(count) == 2:
            append(path, data[: len(data) // 2] if cut.startswith("in") else b"")
            raise KeyboardInterrupt
        append(path, data)

    def unscored(*positional):
        if next(count) == 2:
            raise KeyboardInterrupt
        return judged(*positional)

    small = ("--budget", "60", "--eval-prompts", "5", "--eval-answers", "1")
    with Server(says) as server:
        assert main.main(command(server, *small, out="whole")) == 0
        asked = len(server.requests)
        with pytest.MonkeyPatch.context() as patch:
            name, cutter = ("judged", unscored) if cut.endswith("block") else ("append", torn)
            patch.setattr(instruct, name, cutter)
            assert main.main(command(server, *small)) == 130
        assert asked < len(server.requests) < 2 * asked
        capsys.readouterr()
        assert main.main(command(server, *small)) == 0
        assert len(server.requests) == 2 * asked  # nothing was asked twice
        for name in (instruct.FILE, "instruct.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_folder_asks_for_no_more_than_what_is_new(command, tmp_path, capsys):
    small = ("--eval-prompts", "5", "--eval-answers", "1")
    with Server(says) as server:
        assert main.main(command(server, *small, "--budget", "60")) == 0
        asked = len(server.requests)
        assert main.main(command(server, *small, "--budget", "60")) == 0
        assert len(server.requests) == asked
        assert main.main(command(server, *small, "--budget", "90")) == 0
        assert asked < len(server.requests) < 2 * asked
        assert len(server.requests) == len(lines(tmp_path / "out" / "answers"))
        capsys.readouterr()
        for more, message in ((["--seed", "1"], "prompts = "), (["--answer-top-k", "3"], "top_k = 0, not 3")):
            assert main.main(command(server, *small, *more)) == 2
            assert message in capsys.readouterr().err


def test_at_temperature_0_nothing_is_asked_twice(command, tmp_path):
    """The same answer would be paid for again. Mutant: it is taken for a new one."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:20]))

    def check(module):
        with Server(says) as server:
            words = command(server, "--answer-temperature", "0", "--budget", "200", out=str(id(module)))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(instruct, "find", module.find)
                assert main.main(words) == 0
            asked = [body["messages"][-1]["content"] for body, _ in server.requests]
        raced = [
            text for text in asked if split_of(text.removesuffix(instruction_of(text)).strip()) == "train"
        ]
        assert len(raced) == len(set(raced))

    check(instruct)
    kills(check, mutated(instruct, "fresh=cells.sampling.temperature > 0", "fresh=True"))


def test_no_instruction_may_be_the_best(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(WORTH, "", 9)
    with Server(says) as server:
        assert main.main(command(server, "--budget", "60")) == 0
        others = [b for b, _ in server.requests if split_of(b["messages"][-1]["content"]) != "train"]
    found = json.loads((tmp_path / "out" / "instruct.json").read_text())
    assert (found["winner"], found["held_out"]) == ("", None)
    assert "No instruction at all did best: leave the prompts as they are." in capsys.readouterr().out
    assert not [b for b in others if instruction_of(b["messages"][-1]["content"]) == ""]
    assert (tmp_path / "out" / "report.html").exists()


def test_a_model_in_this_process_and_the_packaged_bank(tmp_path, capsys):
    model, tokenizer = tiny_model(seed=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["instruct", "--out", str(tmp_path / "out"), "--target", str(tmp_path / "model")]
    words += ["--prompts-file", str(tmp_path / "prompts.txt"), "--reward", f"{__name__}:shares@0,1"]
    words += ["--answer-tokens", "3", "--dtype", "float32", "--budget", "800", "--eval-prompts", "6"]
    assert main.main(words) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "instruct.json").read_text())
    assert {c["instruction"] for c in found["candidates"]} == {"", *INSTRUCTIONS}
    assert found["calls"] <= 800
    if found["held_out"]:
        assert found["held_out"]["gain"]["n_clusters"] == 6
    on_file = {name: (tmp_path / "out" / name).read_bytes() for name in ("cells.jsonl", "instruct.json")}
    for name in on_file:  # the answers on file are enough
        (tmp_path / "out" / name).unlink()
    assert main.main(words) == 0
    assert on_file == {name: (tmp_path / "out" / name).read_bytes() for name in on_file}


def test_refused_answers_are_counted_and_worth_what_is_declared(command, tmp_path, capsys):
    def fault(n, body):
        if body["messages"][-1]["content"].endswith("Sing."):
            error = {"error": {"message": "filtered", "code": "content_filter"}}
            return 400, {}, json.dumps(error).encode()
        return says(n, body)

    with Server(fault) as server:
        words = command(server, "--refused-reward", "0.95", "--refused-most", "1", "--budget", "80")
        assert main.main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "instruct.json").read_text())
    assert found["winner"] == "Sing."
    assert found["held_out"]["mean"]["value"] == pytest.approx(0.95)
    sung = [row for row in rows_of(tmp_path / "out") if "Sing." in row["candidates"]]
    refused = sum(np.array(row["rewards"])[row["candidates"].index("Sing.")].size for row in sung)
    assert found["refused"] == refused
    assert f"{refused} answers were refused" in said.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "14"], "budget 14: 5 candidates take at least 15 answers"),
        (["--budget", "0"], "budget 0: give a whole number of at least 1"),
        (["--answers", "0"], "answers 0: give a whole number of at least 1"),
        (["--eval-prompts", "4"], "eval_prompts 4: give a whole number of at least 5"),
        (["--level", "0.4"], "level 0.4: must lie between 0.5 and 1"),
        (["--instructions-file", "none.txt"], "instructions_file none.txt: cannot read it"),
        (["--reward", "nope"], "reward 'nope'"),
        (["--refused-reward", "2"], "refused_reward 2"),
    ],
)
def test_mistakes_cost_nothing(more, message, command, tmp_path, capsys):
    with Server(says) as server:
        assert main.main(command(server, *more)) == 2
        assert not server.requests
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]


def test_lists_and_prompts_that_do_not_do(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(AlignProError, match="holds none; write one on each line"):
        instruct.read_instructions(str(tmp_path / "empty.txt"))
    assert instruct.read_instructions(None) == ("", *INSTRUCTIONS)
    training = [x for x in PROMPTS if split_of(x) == "train"]
    others = [x for x in PROMPTS if x not in training]

    def check(module):
        raced, held = module.divided(PROMPTS, PROMPTS, InstructSettings(prompts=30, held_out=6))
        assert len(set(raced)) == 30
        assert len(set(held)) == 6
        assert set(raced) <= set(training)
        assert not set(held) & set(training)
        assert raced != module.divided(PROMPTS, PROMPTS, InstructSettings(prompts=30, seed=1))[0]

    check(instruct)
    kills(check, mutated(instruct, 'if split_of(first_turn(x)) != "train"', ""))
    kills(check, mutated(instruct, 'if split_of(first_turn(x)) == "train"', ""))
    kills(check, mutated(instruct, "[settings.seed, 1]", "[0, 1]"))
    with pytest.raises(AlignProError, match="held_out: 0 prompts are not for training"):
        instruct.divided(training, training, InstructSettings())
    with pytest.raises(AlignProError, match="prompts: none are for training"):
        instruct.divided(others, others, InstructSettings())
