"""Functions that read columns of the prompts' data, and asynchronous ones, as rewards by name."""

import asyncio
import functools
import json
import shlex

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.prompt import Prompt
from alignpro.llm.rewards import columns, function
from alignpro.llm.rewards.columns import columns_read_by
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.opening import load_reward, read_spec

ROWS = [{"answer": "4", "weight": 0.5}, {"answer": "9", "weight": 1.0}, {"answer": "16", "weight": 0.25}]
PROMPTS = [Prompt(f"{i} squared?", columns=row) for i, row in zip((2, 3, 4), ROWS, strict=True)]
ANSWERS = ["It is 4.", "8", "16"]


def right(prompts, responses, answer, *, weight=None):
    weights = weight or [0.1] * len(answer)
    return [w * (a in y) for a, y, w in zip(answer, responses, weights, strict=True)]


def right_one(prompt, response, answer, *, weight=0.1):
    return weight * (answer in response)


async def right_later(prompts, responses, answer, *, weight=None):
    await asyncio.sleep(0)
    return right(prompts, responses, answer, weight=weight)


async def one_later(prompt, response, answer, *, weight=0.1):
    await asyncio.sleep(0)
    return right_one(prompt, response, answer, weight=weight)


class Later:
    async def __call__(self, prompts, responses, answer, *, weight=None):
        return await right_later(prompts, responses, answer, weight=weight)


FORMS = {
    "batch": (right, {}),
    "each": (right_one, {"each": True}),
    "async": (right_later, {"batch_size": 2}),
    "async each": (one_later, {"each": True}),
    "async object": (Later(), {"batch_size": 1}),
    "async partial": (functools.partial(right_later), {}),
    "async method": (Later().__call__, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_columns_come_with_their_prompts_in_every_form(form):
    called, options = FORMS[form]
    reward = CallableReward(called, "0,1", **options)
    assert reward.is_async == form.startswith("async")
    assert reward.reads.needed == ("answer",)
    assert reward.reads.optional == ("weight",)
    assert reward.score(PROMPTS, ANSWERS).tolist() == [0.5, 0, 0.25]
    fewer = [Prompt(x, columns={"answer": x.columns["answer"]}) for x in PROMPTS]
    np.testing.assert_allclose(reward.score(fewer, ANSWERS), [0.1, 0, 0.1])
    fixed = CallableReward(called, "0,1", context={"answer": "8" if "each" in form else ["8"] * 3}, **options)
    assert fixed.reads.needed == ()


def test_the_rules_of_columns():
    def check(module):
        def read(called, rows):
            found = module.columns_read_by(called)
            return found.of([Prompt("x", columns=row) for row in rows])

        rows = [{"answer": 1, "hint": 2, "x": 3}, {"answer": 4, "x": 5}]
        assert read(lambda x, y, answer: 0, rows) == {"answer": [1, 4]}
        assert read(lambda x, y, answer, hint=0: 0, rows) == {"answer": [1, 4]}  # one has no hint
        assert read(lambda x, y, answer, hint=0: 0, rows[:1]) == {"answer": [1], "hint": [2]}
        assert read(lambda a, b, **more: 0, rows) == {"answer": [1, 4], "x": [3, 5]}
        assert read(lambda x, y, **more: 0, rows) == {"answer": [1, 4]}  # x is taken
        assert read(lambda x, y, *more: 0, rows) == {}
        assert read(lambda x, y: 0, rows) == {}
        assert read(min, rows) == {}  # it says nothing
        assert module.columns_read_by(lambda x, y, z: 0, given={"z"}).needed == ()

    check(columns)
    for right_, wrong in (
        ("if all(name in row for row in rows)", ""),
        ("and p.name not in given", ""),
        ("if name not in self.taken", ""),
        ("parameters[2:]", "parameters[1:]"),
    ):
        try:
            kills(check, mutated(columns, right_, wrong))
        except KeyError:  # the mutant breaks where a column is missing
            assert not wrong
    assert columns_read_by(lambda a, b, c=0, **d: 0).optional == ("c", "*")


def test_a_missing_column_is_named_before_anything_is_called():
    called = []

    def never(prompts, responses, answer, key):
        called.append(prompts)

    reward = CallableReward(never, "0,1")
    for x, missing in (("plain", "answer"), (Prompt("x", columns={"answer": 1}), "key")):
        with pytest.raises(AlignProError, match=f"column {missing}: reward never needs it.*--prompts-file"):
            reward.score([Prompt("ok", columns={"answer": 1, "key": 2}), x], ["a", "b"])
    assert not called


def test_async_functions_work_by_name(tmp_path, monkeypatch):
    (tmp_path / "rf.py").write_text(
        "async def a(prompts, responses):\n    return [0.5 for _ in responses]\n"
        "async def b(prompts, responses, answer):\n    return [float(x) for x in answer]\n"
        "class C:\n    async def __call__(self, prompts, responses):\n        return [1.0] * len(responses)\n"
        "c = C()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("rf:a@0,1").score(["x"], ["y"]).tolist() == [0.5]
    assert load_reward("rf:c@0,1").score(["x"], ["y"]).tolist() == [1.0]
    spec = read_spec("rf:b@0,1")
    assert spec.reads.needed == ("answer",)
    with pytest.raises(AlignProError, match="column answer"):
        spec.check_prompts(["x"])
    assert spec.open().score([Prompt("x", columns={"answer": 0.25})], ["y"]).tolist() == [0.25]

    def check(module):
        assert module.CallableReward(one_later, "0,1", each=True).is_async
        assert module.CallableReward(Later(), "0,1").is_async
        assert not module.CallableReward(right, "0,1").is_async

    check(function)
    kills(check, mutated(function, "(self.function, called)", "(self.function,)"))
    kills(check, mutated(function, "(self.function, called)", "(called,)"))


asked = []


def wants(prompts, responses, letter, weight=None, **more):
    """Rewards a letter that the data name; keeps what it was told."""
    asked.extend(zip(map(str, prompts), letter, weight or [], strict=False))
    return [w * (a in y) for a, y, w in zip(letter, responses, weight, strict=True)]


def test_columns_travel_from_the_file_through_training_and_rollouts(tmp_path, capsys):
    for part in tiny_model(seed=1):
        part.save_pretrained(tmp_path / "base")
    rows = [
        {"prompt": x, "letter": x[0], "weight": i / 3, "note": "n"}
        for i, x in enumerate(("abc", "def", "gab"))
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {(row["prompt"], row["letter"], row["weight"]) for row in rows}
    base, name = tmp_path / "base", f"{__name__}:wants@0,1"
    world = f"--prompter {base} --target {base} --answer-tokens 4 --prompts-file {file} --reward {name} ease"
    train = f"train --out {tmp_path}/t --iterations 2 --prompts-per-round 2 --draws 2 --epochs 1 {world}"
    train += " --rewrite-tokens 4"
    asked.clear()
    assert main.main(shlex.split(train)) == 0, capsys.readouterr().err
    assert {*asked} <= known
    assert asked
    assert (
        main.main(shlex.split(f"rollout --out {tmp_path}/r --arms none --draws 1 --answers 1 {world}")) == 0
    )
    assert {*asked} == known
    lines = (tmp_path / "r" / "rollouts.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["columns"]["letter"] == row["x"][0]
        assert row["columns"]["note"] == "n"
    file.write_text('{"prompt": "abc"}\n')
    capsys.readouterr()
    assert main.main(shlex.split(train.replace(f"{tmp_path}/t", f"{tmp_path}/u"))) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no column 'letter', which the reward asks for" in said


def test_ifevals_own_form_is_read_from_a_file(tmp_path, capsys):
    for part in tiny_model(seed=1):
        part.save_pretrained(tmp_path / "base")
    row = {"key": 1000, "prompt": "abc", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    other = row | {"prompt": "def", "instruction_id_list": ["style:rhyme"]}
    for i, (rows, status) in enumerate((([row], 0), ([row, other], 2))):
        (tmp_path / "input_data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        command = f"rollout --out {tmp_path}/{i} --arms none --draws 1 --answers 2 --answer-tokens 3 "
        command += f"--target {tmp_path}/base --prompts-file {tmp_path}/input_data.jsonl --reward verifiable"
        assert main.main(shlex.split(command)) == status
    assert "instruction_id_list 'style:rhyme': is not known" in capsys.readouterr().err
    rewards = [
        json.loads(line)["reward"] for line in (tmp_path / "0" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert rewards == [1, 1]
