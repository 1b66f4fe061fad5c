"""`alignpro route`, as a user meets it: who is asked what, what its numbers are of, what it leaves behind."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faulty import Server, completion
from mutants import kills, mutated

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.estimation import routing
from alignpro.llm.arms import route
from alignpro.llm.arms.given import read_given
from alignpro.llm.arms.instruct import FILE
from alignpro.llm.arms.rollout import prompt_id
from alignpro.llm.data.split import split_of
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import digest
from alignpro.llm.targets.tokens import prompt_ids

CANDIDATES = ["", "Shout.", "Hush.", "Sing."]
PROMPTS = [f"{'Add' if i % 2 else 'bee'} {i:03}" for i in range(90)]
"""Half begin with a capital: they want the second candidate, the others the third."""


def shares(prompts, responses):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("e") / max(1, len(y)) for y in responses]


def instruction_of(asked):
    return max((text for text in (*CANDIDATES, "Sing loud.") if asked.endswith(text)), key=len)


def worth(asked):
    """Letters e of ten, give or take one."""
    one = asked[0].isupper()
    of = {"": 3, "Shout.": 8 if one else 4, "Hush.": 3 if one else 8, "Sing.": 2, "Sing loud.": 2}
    return of[instruction_of(asked)]


def says(n, body):
    asked = body["messages"][-1]["content"]
    k = worth(asked) + digest(asked, body.get("seed", 0))[0] % 3 - 1
    said = {"index": 0, "message": {"role": "assistant", "content": "e" * k + "x" * (10 - k)}}
    return 200, {}, json.dumps(completion(body, choices=[said | {"finish_reason": "stop"}])).encode()


@pytest.fixture(autouse=True)
def _without_drawing(request, monkeypatch):
    """Pages take longer than all else; tests/commands has them."""
    if "tmp_path" in request.fixturenames:
        monkeypatch.setattr("alignpro.report.keep.keep", lambda page, place: None)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A tiny causal model, whose states tell letters apart."""
    folder = tmp_path_factory.mktemp("reader")
    letters = "".join(sorted({*"".join(PROMPTS)}))
    model, tokenizer = tiny_model(0, letters)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture
def command(tmp_path, reader):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "list.txt").write_text("\n".join(CANDIDATES[1:]))

    def get(server, *more, out="out"):
        words = ["route", "--out", str(tmp_path / out), "--target", server.url, "--target-model", "m"]
        words += ["--instructions-file", str(tmp_path / "list.txt"), "--reader", reader]
        words += ["--prompts-file", str(tmp_path / "prompts.txt"), "--train-prompts", "40"]
        return [*words, "--reward", f"{__name__}:shares@0,1", "--eval-answers", "3", *more]

    return get


def rows_of(folder):
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_it_reads_and_its_numbers_are_of_fresh_prompts(command, tmp_path, capsys):
    with Server(says) as server:
        assert main.main(command(server)) == 0, capsys.readouterr().err
        asked = [body["messages"][-1]["content"] for body, _ in server.requests]
    said = capsys.readouterr()
    found = json.loads((tmp_path / "out" / "route.json").read_text())
    held = [x for x in PROMPTS if split_of(x) != "train"]
    assert (
        f"4 candidates on 40 prompts: 160 answers of at most 64 tokens, and at most {9 * len(held)} on"
        in said.err
    )
    of = Counter()
    for text in asked:
        x = text.removesuffix(instruction_of(text)).removesuffix(" ")
        assert x in PROMPTS
        of[instruction_of(text), split_of(x) == "train"] += 1
    assert {name: of[name, True] for name in CANDIDATES} == dict.fromkeys(CANDIDATES, 40)
    # Held-out prompts are asked alone, with the single instruction, and with the one that is picked for each.
    picks = {}
    for line in (tmp_path / "out" / route.REWRITES).read_text().splitlines():
        row = json.loads(line)
        picks[row["x"]] = row["rewrite"].removeprefix(row["x"]).strip()
    assert list(picks) == held
    assert found["picks"] == [list(pair) for pair in Counter(picks.values()).most_common()]
    single = found["single"]
    assert single in ("Shout.", "Hush.")
    wanted = {"": set(held), single: set(held)}
    for x, pick in picks.items():
        wanted.setdefault(pick, set()).add(x)
    for name in CANDIDATES:
        assert of[name, False] == 3 * len(wanted.get(name, ()))
    # It has learned to read, and each number is a mean of rewards on file.
    assert np.mean([picks[x] == ("Shout." if x[0].isupper() else "Hush.") for x in held]) > 0.9
    rewards = {}
    for row in rows_of(tmp_path / "out"):
        for name, table in zip(row["candidates"], row["rewards"], strict=True):
            for x, values in zip(row["prompts"], table, strict=True):
                rewards[row["kind"], name, x] = values
    ids = {x: prompt_id(x) for x in PROMPTS}

    def mean(choice):
        return np.mean([rewards["held out", choice(x), ids[x]] for x in held])

    router, one, none = mean(picks.get), mean(lambda x: single), mean(lambda x: "")
    for name, value in (
        ("over_single", router - one),
        ("over_none", router - none),
        ("single_over_none", one - none),
    ):
        gain = found[name]["gain"]
        assert gain["value"] == pytest.approx(value)
        assert (gain["n_clusters"], gain["n"]) == (len(held), 2 * 3 * len(held))
    assert found["over_single"]["gain"]["lo"] <= 0.2 <= found["over_single"]["gain"]["hi"] + 0.05
    assert f"Read the prompt: the router earns {found['over_single']['gain']['value']:.4g}" in said.out
    seen = [x for row in rows_of(tmp_path / "out") if row["kind"] == "table" for x in row["prompts"]]
    table = np.array([[rewards["table", s, x][0] for s in CANDIDATES] for x in seen])
    assert single == CANDIDATES[table.mean(0).argmax()]
    alike = routing.left_out(table, routing.fixed(table)).mean()
    assert found["foreseen"]["base"]["value"] == pytest.approx(alike)
    assert found["foreseen"]["gain"]["lo"] > 0


def test_what_it_leaves_rewrites_new_prompts(command, tmp_path, capsys):
    with Server(says) as server:
        assert main.main(command(server)) == 0
    capsys.readouterr()
    new = ["Add 777", "bee 777"]
    assert main.main(["rewrite", str(tmp_path / "out"), *new, "--draws", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["rewrite"] for row in rows] == ["Add 777 Shout."] * 2 + ["bee 777 Hush."] * 2
    saved = route.load(tmp_path / "out")
    assert saved.rewrites(new) == [row["rewrite"] for row in rows[::2]]
    assert route.load(tmp_path / "out").picks([]) == []
    for option, value in (("--rewrite-tokens", "8"), ("--chat-template-kwargs", "{}")):
        assert main.main(["rewrite", str(tmp_path / "out"), *new, option, value]) == 2
        assert "is a router, which adds an instruction" in capsys.readouterr().err
    # And its file is an arm of rollout.
    held = [x for x in PROMPTS if split_of(x) != "train"]
    given = read_given(tmp_path / "out" / route.REWRITES, held).of
    assert given == {x: (rewrite,) for x, rewrite in zip(held, saved.rewrites(held), strict=True)}


def test_a_finished_folder_asks_for_no_more_than_what_is_new(command, tmp_path, capsys):
    with Server(says) as server:
        assert main.main(command(server, "--train-prompts", "20")) == 0
        asked, first = len(server.requests), (tmp_path / "out" / "route.json").read_bytes()
        assert main.main(command(server, "--train-prompts", "20")) == 0
        assert len(server.requests) == asked
        assert (tmp_path / "out" / "route.json").read_bytes() == first
        assert main.main(command(server, "--train-prompts", "40")) == 0
        assert len(server.requests) <= asked + 20 * 4 + 3 * len(PROMPTS)
        capsys.readouterr()
        assert main.main(command(server, "--seed", "1")) == 2
        assert "prompts = " in capsys.readouterr().err


@pytest.mark.parametrize("cut", [1, 5])
def test_an_interrupted_table_goes_on_to_the_same_files(cut, command, tmp_path, monkeypatch):
    monkeypatch.setattr(route, "BLOCK", 40)
    append, count = route.Cells.ask, iter(range(99))

    def torn(self, *positional):
        if next(count) == cut:
            raise KeyboardInterrupt
        return append(self, *positional)

    with Server(says) as server:
        assert main.main(command(server, out="whole")) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(route.Cells, "ask", torn)
            assert main.main(command(server)) == 130
        asked = len(server.requests)
        assert main.main(command(server)) == 0
        assert len(server.requests) < 2 * asked + 9 * len(PROMPTS)
        for name in (FILE, "route.json", route.FACTS, route.ARRAYS, route.REWRITES):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_one_for_all_where_all_want_the_same(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(globals(), "worth", lambda asked: {"Sing.": 8}.get(instruction_of(asked), 3))
    with Server(says) as server:
        assert main.main(command(server)) == 0
    found = json.loads((tmp_path / "out" / "route.json").read_text())
    assert found["single"] == "Sing."
    assert found["over_single"] is None
    assert found["single_over_none"]["gain"]["value"] == pytest.approx(0.5, abs=0.03)
    assert "One for all: the router picks 'Sing.' for every held-out prompt." in capsys.readouterr().out
    saved = replace(route.load(tmp_path / "out"), read=None)  # where nothing is told apart nothing is read
    assert saved.picks(["Add 1"]) == ["Sing."]


def test_the_instruction_to_compare_with(command, tmp_path, capsys):
    """A race's winner, say; it is a candidate, too. Mutant: the table's best takes its place."""

    def check(module):
        with Server(says) as server, pytest.MonkeyPatch.context() as patch:
            patch.setattr(route, "find", module.find)
            out = f"out-{id(module)}"
            assert main.main(command(server, "--single", "Sing loud.", "--eval-prompts", "6", out=out)) == 0
        found = json.loads((tmp_path / out / "route.json").read_text())
        assert found["single"] == "Sing loud."
        assert found["instructions"] == [*CANDIDATES, "Sing loud."]
        assert found["calls"] == 40 * 5
        assert "over 'Sing loud.' for all" in capsys.readouterr().out

    check(route)
    kills(check, mutated(route, "if single is None:", "if True:"))
    assert route.candidates_of(None, "Use simple words.") == route.candidates_of(None)


def test_what_prompts_are_read_by(reader):
    """Against a plain forward pass. Mutants: the first token's state, which is the same for all; no mean."""
    model, tokenizer = tiny_model(0, "".join(sorted({*"".join(PROMPTS)})))
    prompts = ["Add 1", "bee 22", "d"]

    def check(module) -> None:
        found = module.states(model, tokenizer, prompts)
        for x, row in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt_ids(tokenizer, x)])
            middle = model(ids, output_hidden_states=True).hidden_states[1][0].detach().double().numpy()
            plain = np.concatenate([middle[-1], middle.mean(0)])
            np.testing.assert_allclose(row, plain, rtol=1e-5, atol=1e-6)

    check(route)
    kills(check, mutated(route, "middle[-1], middle.mean(0)", "middle[0], middle.mean(0)"))
    kills(check, mutated(route, "middle[-1], middle.mean(0)", "middle[-1], middle[-1]"))
    with pytest.raises(AlignProError, match="reader: the model tells no hidden states"):
        route.states(Mute(), tokenizer, prompts)
    loaded = route.Reader(reader, "float32").read()(prompts)
    np.testing.assert_allclose(loaded, route.states(model, tokenizer, prompts), rtol=1e-5, atol=1e-6)
    # A target that has the model loaded reads; one of another name does not.
    for name, expected in ((reader, "this one"), ("another", loaded)):
        target = SimpleNamespace(name=name, model=None, tokenizer=tokenizer)
        try:
            found = route.Reader(reader, "float32").read(lambda target=target: target)(prompts)
        except AttributeError:  # of None, which was taken for the model
            found = "this one"
        assert np.array_equal(found, expected)


def test_a_reader_with_other_weights_is_refused(tmp_path, reader):
    """The same prompts would get other instructions, without a word. Mutant: the digest is not compared."""
    copy = tmp_path / "model"
    shutil.copytree(reader, copy)
    rng = np.random.default_rng(0)
    router = routing.taught(rng.standard_normal((9, 64)), rng.uniform(size=(9, 3)), 1.0)
    by = route.Reader(str(copy), "float32")
    route.Saved(router, ("", "Shout.", "Hush."), by, by.read()).save(tmp_path)

    def check(module):
        assert module.load(tmp_path).reader.model == str(copy)
        kept = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        try:
            with pytest.raises(AlignProError, match="has other weights than those that it was taught by"):
                module.load(tmp_path)
        except pytest.fail.Exception as error:
            raise AssertionError from error
        finally:
            (copy / "model.safetensors").write_bytes(kept)

    check(route)
    kills(check, mutated(route, "not in (facts.weights, None):", "in (0, 1):"))


class Mute:
    """A model without hidden states."""

    device = "cpu"

    def __call__(self, **_):
        return SimpleNamespace(hidden_states=None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train-prompts", "7"], "train_prompts 7: give at least 8"),
        (["--eval-prompts", "4"], "eval_prompts 4: give a whole number of at least 5"),
        (["--answers", "0"], "answers 0: give a whole number of at least 1"),
        (["--level", "1"], "level 1.0: must lie between 0.5 and 1"),
        (["--instructions-file", "none.txt"], "instructions_file none.txt: cannot read it"),
        (["--reader", "nowhere/at/all"], "nowhere/at/all"),
        (["--reward", "nope"], "reward 'nope'"),
    ],
)
def test_mistakes_cost_nothing(more, message, command, tmp_path, capsys):
    with Server(says) as server:
        assert main.main(command(server, *more)) == 2
        assert not server.requests
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / route.FACTS).write_text("{}"),
        lambda folder: (folder / route.FACTS).write_text("["),
        lambda folder: (folder / route.ARRAYS).unlink(),
        lambda folder: (folder / route.ARRAYS).write_bytes(b"x" * 50),
        lambda folder: (folder / route.FACTS).write_text(
            (folder / route.FACTS).read_text().replace('"Shout."', '"Shout.", "Cry."')
        ),
    ],
)
def test_a_damaged_router_is_told_in_a_line(damage, tmp_path, capsys):
    rng = np.random.default_rng(0)
    router = routing.taught(rng.standard_normal((9, 4)), rng.uniform(size=(9, 3)), 1.0)
    reader = route.Reader("nowhere")
    saved = route.Saved(router, ("", "Shout.", "Hush."), reader, lambda prompts: np.zeros((1, 4)))
    saved.save(tmp_path)
    again = route.load(tmp_path).router
    for name in ("mean", "centre", "scale", "weights"):
        assert (getattr(again, name) == getattr(router, name)).all()
    damage(tmp_path)
    assert main.main(["rewrite", str(tmp_path), "Add 1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
