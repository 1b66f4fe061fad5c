"""Rollout files: what is read is what was written, and every fault is named by its line."""

import json
import random
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from estimate_oracle import halfway, instance

from alignpro.errors import AlignProError
from alignpro.estimation.simulate import Size, simulate, simulated_rows
from alignpro.rollouts import Rollout, Rollouts, collect, read

SIZE = Size(6, 3, 3, 2)


def arguments():
    i = instance(0)
    return i, {"trained": halfway(i, 0.2)}, {"rlhf": i.frozen[i.own]}


def rows(seed=0):
    i, prompters, policies = arguments()
    rng = np.random.default_rng(seed)
    return list(simulated_rows(i, rng, SIZE, prompters=prompters, policies=policies, reward_range=(0.0, 1.0)))


def write(path, lines):
    path.write_text("".join(lines))
    return path


def same(a: Rollouts, b: Rollouts):
    for field in fields(Rollouts):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if field.name in ("logps", "parts"):
            assert mine.keys() == other.keys()
            for name in mine:
                np.testing.assert_array_equal(mine[name], other[name])
        else:
            np.testing.assert_array_equal(mine, other)
    return True


def test_file_memory_and_simulation_agree(tmp_path):
    i, prompters, policies = arguments()
    straight = simulate(
        i,
        np.random.default_rng(0),
        SIZE,
        prompters=prompters,
        policies=policies,
        reward_range=(0.0, 1.0),
    )
    from_file = read(write(tmp_path / "r.jsonl", [row.line() for row in rows()]))
    from_memory = collect(rows())
    assert same(from_file, from_memory)
    # Rows come arm by arm, so that arms and prompts are numbered alike.
    named = {(arm, 0): arm for arm in straight.arms}
    assert straight.texts is None
    assert same(from_file, replace(straight, prompters=named, texts=from_file.texts))
    assert len(from_file) == 6 * (3 + 6 + 6 + 3)
    assert np.isnan(from_file.logps["logp_policy"][~from_file.rows("rlhf")]).all()


def test_order_of_lines_does_not_matter(tmp_path):
    lines = [row.line() for row in rows()]
    random.Random(0).shuffle(lines)
    a, b = collect(rows()), read(write(tmp_path / "r.jsonl", lines))
    for arm in a.arms:
        for name in a.prompt_ids:
            one = a.reward[a.rows(arm) & (a.prompt == a.prompt_ids.index(name))]
            two = b.reward[b.rows(arm) & (b.prompt == b.prompt_ids.index(name))]
            np.testing.assert_array_equal(one, two)


def test_minus_infinity_extra_fields_and_blank_lines_are_read(tmp_path):
    first, second, *_ = (r for r in rows() if r.arm == "sft" and r.rewrite != r.x)
    odd = json.loads(replace(first, logp_frozen_x=-np.inf).line()) | {"tokens": 7, "reward": 1}
    found = read(write(tmp_path / "r.jsonl", [json.dumps(odd) + "\n", "\n", second.line()]))
    assert found.logps["logp_frozen_x"][0] == -np.inf
    assert found.reward[0] == 1.0


SFT = 20  # a row of arm sft, on line 21
FAULTS = {
    "missing": ({"reward": None}, "lacks the field 'reward'"),
    "text reward": ({"reward": "0.5"}, "reward '0.5' must be a finite number"),
    "bool reward": ({"reward": True}, "reward True must be a finite number"),
    "nan reward": ({"reward": np.nan}, "reward nan must be a finite number"),
    "reward out of range": ({"reward": 1.5}, "reward 1.5 is outside its declared range [0.0, 1.0]"),
    "empty range": ({"reward_low": 1.0}, "reward_low 1.0 must be below reward_high 1.0"),
    "seed": ({"seed": 0.5}, "seed 0.5 must be a whole number"),
    "arm": ({"arm": 3}, "arm 3 must be a string"),
    "huge reward": ({"reward": 10**300}, "reward 1"),
    "reward whose square overflows": (
        {"reward": 1e155},
        "reward 1e+155 must be a finite number, below 1e+150",
    ),
    "range whose square overflows": ({"reward_high": 1e155}, "reward_high 1e+155 must be a finite number"),
    "huge logp": ({"logp_frozen_x": -(10**300)}, "logp_frozen_x -1"),
    "huge spread": ({"reward_spread": 10**300}, "reward_spread 1"),
    "huge parts": ({"reward_parts": {"a": [10**300, 0, 1]}}, "reward_parts {'a': [1"),
    "positive logp": ({"logp_frozen_x": 2.0}, "logp_frozen_x 2.0 must be a log-probability"),
    "nan logp": ({"logp_reference": np.nan}, "logp_reference nan must be a log-probability"),
    "impossible": ({"logp_frozen_rewrite": -np.inf}, "logp_frozen_rewrite is -Infinity"),
    "frozen": ({"frozen": "other"}, "frozen 'other' differs from 'frozen'"),
    "reward model": ({"reward_model": "other"}, "reward_model 'other' differs"),
    "sampling": ({"sampling": "T=2"}, "sampling 'T=2' differs"),
    "range": ({"reward_high": 2.0}, "reward_high 2.0 differs from 1.0"),
    "prompter": ({"prompter": "other"}, "prompter 'other' differs from 'sft' of the same arm 'sft'"),
    "x": ({"x": "other"}, "x differs from that of prompt_id"),
    "no rewrite": ({"rewrite": 5}, "rewrite 5 must be a string or null"),
    "null rewrite": ({"rewrite": "null"}, "rewrite must not be null in arm 'sft'"),
    "rewrite differs": ({"rewrite": "other"}, "rewrite differs between answers of draw"),
    "none rewritten": (
        {"arm": "none", "draw": 99, "prompter": "none"},
        "rewrite must be x itself in arm 'none'",
    ),
    "rlhf rewritten": ({"arm": "rlhf", "draw": 99, "prompter": "rlhf"}, "rewrite must be null in arm 'rlhf'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_are_named_by_line(case, tmp_path):
    """The row before and after is sound; the file with the row as it was is read."""
    change, message = FAULTS[case]
    lines = [asdict(row) for row in rows()]
    at = next(i for i in range(SFT, 99) if lines[i]["answer"] == 1 and lines[i]["rewrite"] != lines[i]["x"])
    if case == "missing":
        del lines[at]["reward"]
    else:
        lines[at] |= {k: None if v == "null" else v for k, v in change.items()}
    path = write(tmp_path / "r.jsonl", [json.dumps(line) + "\n" for line in lines])
    with pytest.raises(AlignProError, match=re.escape(f"{path} line {at + 1}: {message}")) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)  # the remedy


def test_a_prompter_may_differ_between_seeds_only():
    sft = [row for row in rows() if row.arm == "trained"]
    other = [replace(row, seed=1, prompter="second run") for row in sft]
    found = collect(sft + other)
    assert found.prompters == {("trained", 0): "trained", ("trained", 1): "second run"}


def test_truncated_damaged_repeated_and_empty_files(tmp_path):
    lines = [row.line() for row in rows()]
    cut = write(tmp_path / "cut.jsonl", [*lines[:9], lines[9][:40]])
    with pytest.raises(AlignProError, match=r"line 10: is cut short; remove this last line"):
        read(cut)
    with pytest.raises(AlignProError, match=r"line 2: is not JSON .*; write one object per line"):
        read(write(tmp_path / "bad.jsonl", [lines[0], "{oops}\n", lines[1]]))
    with pytest.raises(AlignProError, match=r"line 1: is not JSON .*; write one object per line"):
        read(write(tmp_path / "deep.jsonl", ["[" * 100_000 + "\n"]))
    with pytest.raises(AlignProError, match=r"line 1: is not a JSON object"):
        read(write(tmp_path / "list.jsonl", ["[1]\n"]))
    twice = write(tmp_path / "twice.jsonl", [*lines[:9], lines[4], *lines[9:]])
    with pytest.raises(AlignProError, match=r"line 10: repeats .* line 5; number draws and answers"):
        read(twice)
    with pytest.raises(AlignProError, match="holds no rollouts"):
        read(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(AlignProError, match=r"gone.jsonl: cannot read it \(No such file"):
        read(tmp_path / "gone.jsonl")


def test_a_complete_last_line_needs_no_newline(tmp_path):
    lines = [row.line() for row in rows()]
    lines[-1] = lines[-1].rstrip("\n")
    assert len(read(write(tmp_path / "r.jsonl", lines))) == len(lines)


def test_faults_in_memory_name_the_row():
    with pytest.raises(AlignProError, match="rollout 1: reward 2 is outside"):
        collect([rows()[0], replace(rows()[1], reward=2)])
    with pytest.raises(AlignProError, match=r"rollout 1: repeats .* of rollout 0"):
        collect([rows()[0]] * 2)
    with pytest.raises(AlignProError, match="there are none"):
        collect([])


def test_a_line_is_the_row():
    row = rows()[0]
    assert Rollout(**json.loads(row.line())) == row
    assert row.line().count("\n") == 1
    assert replace(row, response="a\nb\u2028").line().count("\n") == 1


def test_only_a_newline_ends_a_line(tmp_path):
    """Texts may hold what `str.splitlines` (the mutant) takes for the end of a line."""
    odd = "a\u2028b\u2029c\x85d\x0ce\x1cf"
    changed = [replace(row, response=row.response + odd) for row in rows()]
    path = write(tmp_path / "r.jsonl", [row.line() for row in changed])
    assert same(read(path), collect(changed))
    assert len(path.read_text(encoding="utf-8").splitlines()) > len(changed)


# --- fields that rows may lack ----------------------------------------------------------------------------

BEFORE = [{"role": "system", "content": "Be brief."}]


def in_parts(row, **more):
    """The row with its reward in [0, 1] divided into two parts, of which one is a penalty."""
    parts = {"good": [0.25 + 0.75 * row.reward, 0.25, 1.0], "bad": [0.25 * row.reward - 0.25, -0.25, 0.0]}
    return replace(row, reward_parts=parts, **more)


def test_parts_refusals_and_the_prompts_own_fields_are_read(tmp_path):
    plain = rows()
    given = [in_parts(row, context=BEFORE, columns={"answer": [1, None]}, reward_spread=0.1) for row in plain]
    given[3] = replace(given[3], response=None, reward_spread=None)
    random.Random(1).shuffle(given)
    found = read(write(tmp_path / "r.jsonl", [row.line() for row in given]))
    assert same(found, collect(given))
    assert found.part_ranges == {"good": (0.25, 1.0), "bad": (-0.25, 0.0)}
    np.testing.assert_allclose(found.parts["good"], 0.25 + 0.75 * found.reward)
    np.testing.assert_allclose(sum(found.parts.values()), found.reward, atol=1e-15)
    assert found.refused.sum() == np.isnan(found.spread).sum() == 1
    at = int(np.flatnonzero(found.refused)[0])
    lost = next(row for row in given if row.response is None)
    assert (found.reward[at], found.arms[found.arm[at]]) == (lost.reward, lost.arm)
    assert found.refusals().startswith(
        f"answers were refused, 1 of {found.rows(lost.arm).sum()} in arm {lost.arm}:"
    )
    assert np.nanmax(found.spread) == 0.1
    # A file without them is as it was: the other fields agree.
    old = collect(plain)
    assert (dict(old.parts), dict(old.part_ranges), old.spread, old.refusals()) == ({}, {}, None, "")
    np.testing.assert_array_equal(np.sort(old.reward), np.sort(found.reward))


def part(**changed):
    return {"reward_parts": {"good": [0.7, 0.25, 1.0], "bad": [-0.1, -0.25, 0.0], **changed}, "reward": 0.6}


OPTIONAL_FAULTS = {
    "no parts": (
        {"reward_parts": None},
        "reward_parts: the range of 'good' is absent, not (0.25, 1.0) as before it",
    ),
    "no object": ({"reward_parts": [1]}, "reward_parts [1] must be an object of [value, low, high]"),
    "no triple": (part(bad=[-0.1]), "reward_parts {'good'"),
    "text": (part(bad=["-0.1", -0.25, 0.0]), "reward_parts {'good'"),
    "nan": (part(bad=[np.nan, -0.25, 0.0]), "reward_parts {'good'"),
    "another part": (
        part(new=[0.0, 0.0, 1.0]),
        "the range of 'new' is (0.0, 1.0), not absent as before it",
    ),
    "another range": (part(bad=[-0.1, -0.5, 0.0]), "the range of 'bad' is (-0.5, 0.0), not (-0.25, 0.0) as"),
    "outside": (part(bad=[0.1, -0.25, 0.0]), "reward_parts: bad 0.1 is outside its range [-0.25, 0.0]"),
    "sum": (part() | {"reward": 0.61}, "reward_parts add up to 0.6, and reward is 0.61"),
    "spread": ({"reward_spread": -0.1}, "reward_spread -0.1 must be a finite number of at least 0"),
    "no spread": ({"reward_spread": np.inf}, "reward_spread inf must be a finite number"),
    "response": ({"response": 5}, "response 5 must be a string, or null where it was refused"),
    "context": ({"context": []}, "context differs from that of prompt_id"),
    "columns": ({"columns": {"answer": 2}}, "columns differs from that of prompt_id"),
}


@pytest.mark.parametrize("case", OPTIONAL_FAULTS)
def test_faults_of_optional_fields_are_named_by_line(case, tmp_path):
    change, message = OPTIONAL_FAULTS[case]
    lines = [asdict(in_parts(row, context=BEFORE, columns={"answer": 1})) for row in rows()]
    lines[SFT] |= change
    path = write(tmp_path / "r.jsonl", [json.dumps(line) + "\n" for line in lines])
    with pytest.raises(AlignProError) as caught:
        read(path)
    assert f"{path} line {SFT + 1}: " in str(caught.value)
    assert message in str(caught.value)
    assert "; " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": "Be brief."}, "context 'Be brief.' must be a list of messages"),
        ({"context": [{"role": "user"}]}, "context [{'role': 'user'}] must be a list of messages"),
        ({"columns": [1]}, "columns [1] must be an object of values by column name"),
        ({"reward_parts": {"a": [0.2, 0.0, 0.7]}, "reward": 0.2}, "add up to 0.7, and reward_high is 1.0"),
        ({"reward_parts": {"a": [0.2, 0.1, 1.0]}, "reward": 0.2}, "add up to 0.1, and reward_low is 0.0"),
    ],
)
def test_faults_of_all_rows_are_named_too(change, message):
    with pytest.raises(AlignProError, match=r"^rollout 0: ") as caught:
        collect([replace(rows()[0], **change)])
    assert message in str(caught.value)


def test_rounding_of_parts_grows_with_their_size(monkeypatch):
    """Contributions rounded to float32 add up, whatever the unit; what is off by more does not."""
    for unit in (1e-6, 1.0, 1e6):
        parts = {"a": [unit / 3, 0.0, unit], "b": [-unit / 7, -unit, 0.0]}
        total = unit / 3 - unit / 7

        def one(off, total=total, unit=unit, parts=parts):
            row = replace(rows()[0], reward=total + off * unit, reward_low=-unit, reward_high=unit)
            return replace(row, reward_parts=parts)

        collect([one(1e-7)])
        with pytest.raises(AlignProError, match="add up to"):
            collect([one(1e-5)])
        with monkeypatch.context() as mutant:
            mutant.setattr("alignpro.rollouts.PARTS_ROUNDING", 0.0)
            with pytest.raises(AlignProError, match="add up to"):
                collect([one(1e-7)])
            mutant.setattr("alignpro.rollouts.PARTS_ROUNDING", 1e-4)
            collect([one(1e-5)])
