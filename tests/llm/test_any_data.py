"""Any data set, folder or file as the user's prompts, and runs on chats from one end to the other."""

import ast
import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from mutants import kills, mutated
from pyarrow import parquet
from test_datasets import Hub, base, offline, verb  # noqa: F401

from alignpro.commands import main
from alignpro.commands.opening import user_prompts
from alignpro.commands.options import EnvironmentSettings, PromptSettings, RewardModelSettings
from alignpro.errors import AlignProError
from alignpro.llm.data import own
from alignpro.llm.data.own import read_prompts, read_rewrites
from alignpro.llm.data.public import DATASETS, prompts
from alignpro.llm.data.rows import Reading, first_turn
from alignpro.llm.data.split import SPLITS, split_of
from alignpro.llm.models import packages
from alignpro.llm.models.prompt import Prompt, columns_of, context_of
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.runs import refuse_other_settings

SYSTEM = {"role": "system", "content": "You are a gardener. Be brief."}


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(i, turns=2, system=True):
    said = [SYSTEM] * system
    for k in range(turns):
        said.append({"role": "user", "content": f"How do plants of kind {i} grow, part {k}?"})
        said.append({"role": "assistant", "content": f"Slowly, in {k} days."})
    return said


@pytest.fixture
def chats(tmp_path):
    """A folder of chats in three forms, which is no data set of the hub's making."""
    folder = tmp_path / "chats"
    jsonl(folder / "a.jsonl", [{"id": i, "messages": chat(i), "answer": i} for i in range(12)])
    (folder / "more").mkdir()
    for i in range(12, 15):
        (folder / "more" / f"{i}.json").write_text(json.dumps({"messages": chat(i), "answer": i}))
    (folder / "README.md").write_text("# Chats\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.jsonl").write_text("damaged")
    (folder / "dataset_infos.json").write_text("{}")
    return folder


# --- a folder or file of one's own ---


def test_a_folder_of_chats(chats, capfd):
    found = prompts(str(chats))
    assert sorted(map(str, found)) == sorted(f"How do plants of kind {i} grow, part 1?" for i in range(15))
    for x in found:
        i = int(x.split()[5])
        assert list(context_of(x)) == chat(i)[:3]
    assert "15 prompts from column messages of" in capfd.readouterr().err
    parts = [prompts(str(chats), split) for split in SPLITS]
    assert sorted(x for part in parts for x in part) == sorted(found)
    for split, part in zip(SPLITS, parts, strict=True):
        assert {split_of(first_turn(x)) for x in part} <= {split}
    assert prompts(str(chats), n=4) == found[:4]
    assert prompts(str(chats), seed=1) != found


def test_a_file_with_one_chat_alone(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(chat(0)))
    (x,) = prompts(str(tmp_path))
    assert list(context_of(x)) == chat(0)[:3]
    assert read_prompts(tmp_path / "chat.json") == [x]


def test_columns_and_a_system_prompt_for_all_kinds(chats, tmp_path):
    reading = Reading(keep=("answer",), system="Be kind.")
    found = prompts(str(chats), reading=reading)
    assert {columns_of(x)["answer"] for x in found} == set(range(15))
    assert {context_of(x)[0]["content"] for x in found} == {SYSTEM["content"]}
    table = pa.table({"q": ["Why?", "How?"], "answer": [1, 2], "heavy": [b"\0" * 9] * 2})
    parquet.write_table(table, tmp_path / "t.parquet")
    xs = prompts(str(tmp_path / "t.parquet"), reading=Reading("q", ("answer",), system="Be kind."))
    assert {(str(x), columns_of(x)["answer"]) for x in xs} == {("Why?", 1), ("How?", 2)}
    assert [context_of(x) for x in xs] == [({"role": "system", "content": "Be kind."},)] * 2
    with pytest.raises(AlignProError, match=r"columns: give JSON values.*mend or remove the row"):
        prompts(str(tmp_path / "t.parquet"), reading=Reading("q", ("heavy",)))
    (tmp_path / "t.txt").write_text("Why?\n")
    (x,) = read_prompts(tmp_path / "t.txt", reading=Reading(system="Be kind."))
    assert context_of(x) == ({"role": "system", "content": "Be kind."},)
    with pytest.raises(AlignProError, match=r"reward answer: t.txt is read as text, without columns"):
        read_prompts(tmp_path / "t.txt", reading=Reading(keep=("answer",)))


def test_rows_that_differ_in_columns_alone_are_kept(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "Why?", "k": k} for k in (1, 2, 1)])
    assert len(read_prompts(path, reading=Reading(keep=("k",)))) == 2
    assert len(prompts(str(path), reading=Reading(keep=("k",)))) == 2
    assert read_prompts(path) == prompts(str(path)) == ["Why?"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing",
            r"dataset '.*nothing': choose from instructions,.*owner/name, or a file or folder that is",
        ),
        ("empty", r"dataset .*empty: holds no file in \.jsonl, \.ndjson, \.json"),
        ("t.xlsx", r"t\.xlsx: \.xlsx files cannot be read; save it as one of \.jsonl"),
        ("odd", r"b\.jsonl, line 1: no column 'prompt'; name one with --prompt-column.*\(it has q\)"),
    ],
)
def test_what_cannot_be_read_is_one_line(name, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing")
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04")
    jsonl(tmp_path / "odd" / "a.jsonl", [{"prompt": "Why?"}])
    jsonl(tmp_path / "odd" / "b.jsonl", [{"q": "Why?"}])
    with pytest.raises(AlignProError, match=message) as caught:
        prompts(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    with pytest.raises(AlignProError, match="is read from here; leave data_folder out"):
        prompts(str(tmp_path), folder=tmp_path)


@pytest.mark.parametrize("suffix", [".xlsx", ".gz", ".pkl", ".feather", ".yaml"])
def test_tables_are_not_read_as_text(suffix, tmp_path):
    def check_refused(module):
        path = tmp_path / f"mine{suffix}"
        path.write_text("one line\n")
        with contextlib.suppress(AlignProError):
            assert not module.read_prompts(path)

    check_refused(own)
    kills(check_refused, mutated(own, "if kind in UNREAD:", "if False:"))


# --- the hub ---

ASK = """
import sys
from alignpro.errors import AlignProError
from alignpro.llm.data.public import prompts
from alignpro.llm.data.rows import Reading
from alignpro.llm.models.prompt import as_json
for name in ("some/chats", "some/chats:two", "some/chats:one", "some/chats:six"):
    try:
        found = prompts(name, reading=Reading(keep=("k",)))
        print(sorted((str(x), as_json(x).get("context")) for x in found))
    except AlignProError as error:
        print(error)
"""
CARD = """---
configs:
- config_name: one
  data_files: one.jsonl
- config_name: two
  data_files:
  - split: train
    path: two.jsonl
  - split: held
    path: more.jsonl
---
"""


def test_any_data_set_of_the_hub(tmp_path):
    """By the library's own client and a server of ours; all of a configuration's splits, joined."""
    held = [{"messages": chat(3), "k": 3, "title": None}, {"messages": chat(4), "k": 4, "title": "t"}]
    jsonl(tmp_path / "more.jsonl", held)
    jsonl(tmp_path / "one.jsonl", [{"question": "Why?", "k": 0}, {"question": " ", "k": 0}])
    jsonl(tmp_path / "two.jsonl", [{"messages": chat(i), "k": i, "title": "t"} for i in range(2)])

    class Ours(Hub):
        gated = False

    Ours.files = {file.name: file.read_bytes() for file in tmp_path.iterdir()} | {"README.md": CARD.encode()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ours) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        kept |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=kept, capture_output=True, text=True, timeout=300, cwd=tmp_path
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    several, two, one, none = done.stdout.splitlines()
    assert several == (
        "dataset some/chats: has several configurations; name one as some/chats:CONFIG, of one, two"
    )
    assert ast.literal_eval(two) == [
        (f"How do plants of kind {i} grow, part 1?", chat(i)[:3]) for i in (0, 1, 3, 4)
    ]
    assert ast.literal_eval(one) == [("Why?", [])]
    assert (
        none == "dataset some/chats:six: has no configuration six; name one as some/chats:CONFIG, of one, two"
    )
    assert "4 prompts from column messages of some/chats:two" in done.stderr


@pytest.mark.parametrize("name", ["someone/data", "someone/data:large"])
def test_a_hub_out_of_reach(name, offline, tmp_path):  # noqa: F811
    with pytest.raises(AlignProError, match=rf"dataset {name}: .*\(hf download someone/data --repo-type"):
        prompts(name)
    jsonl(tmp_path / "d" / "train.jsonl", [{"query": "Why?"}, {"query": None}])
    if ":" not in name:
        assert prompts(name, folder=tmp_path / "d") == ["Why?"]
        with pytest.raises(
            AlignProError, match=r"dataset someone/data: no column 'k', which the reward asks"
        ):
            prompts(name, folder=tmp_path / "d", reading=Reading(keep=("k",)))
        jsonl(tmp_path / "e" / "train.jsonl", [{"messages": chat(1)}, {"messages": [SYSTEM]}])
        with pytest.raises(
            AlignProError, match="row 2: its conversation has no user's turn to answer; check"
        ):
            prompts(name, folder=tmp_path / "e")


def test_named_sets_without_columns_refuse_rewards_that_need_them(monkeypatch):
    monkeypatch.setitem(DATASETS, "texts", lambda seed=0: ["Why?", Prompt("How?", (), {"answer": 1})])
    with pytest.raises(
        AlignProError, match=r"^dataset texts: has no column 'answer', which the reward asks for"
    ):
        prompts("texts", reading=Reading(keep=("answer",)))
    monkeypatch.setitem(DATASETS, "told", lambda seed=0: [Prompt("How?", (), {"answer": 1, "more": 2})])
    assert prompts("told") == ["How?"]
    (x,) = prompts("told", reading=Reading(keep=("answer",), system="Be kind."))
    assert (columns_of(x), len(context_of(x))) == ({"answer": 1}, 1)
    source = PromptSettings(dataset="told")
    assert user_prompts(source, "", split_of("How?"), world=SimpleNamespace(columns=("answer",))) == [
        Prompt("How?", (), {"answer": 1})
    ]


# --- BPO's test sets ---

SETS = {
    "bpo-test": (
        "bpo_test.json",
        [{"prompt": "Why?", "optimized_prompt": "Why, in short?", "good_res": "b"}],
    ),
    "dolly-eval": (
        "dolly_eval.json",
        [
            {"instruction": "Why?", "context": "", "response": "a", "category": "qa", "idx": 0},
            {"instruction": "Sum up.", "context": "A text.", "response": "a", "category": "qa", "idx": 1},
        ],
    ),
    "self-instruct-eval": (
        "self_instruct_eval.json",
        [{"id": "t_0", "category": "c", "instruction": "Sum up.", "context": "A text.", "output": "a"}],
    ),
    "vicuna-eval": ("vicuna_eval.jsonl", [{"question_id": 1, "text": "Why?", "category": "generic"}]),
}


def test_every_test_set_has_a_test():
    assert list(SETS) == [name for name, row in DATASETS.items() if getattr(row, "test", False)]


@pytest.mark.parametrize("name", SETS)
def test_published_test_sets_are_measured_on_whole(name, tmp_path, offline):  # noqa: F811
    for other, (file, rows) in SETS.items():  # all in one folder, as they are published
        if file.endswith("l"):
            jsonl(tmp_path / file, rows)
        else:
            (tmp_path / file).write_text(json.dumps(rows, indent=4))
        assert other
    want = {"bpo-test": ["Why?"], "vicuna-eval": ["Why?"], "dolly-eval": ["Sum up.\nA text.", "Why?"]}
    for split in (None, "test", "validation"):
        found = prompts(name, split, folder=tmp_path)
        assert sorted(found) == want.get(name, ["Sum up.\nA text."])
    with pytest.raises(AlignProError, match="is a test set, to be measured on; learn from another"):
        prompts(name, "train", folder=tmp_path)
    with pytest.raises(AlignProError, match="--data-folder DIR") as caught:
        prompts(name)
    assert ("hf download THUDM/BPO" in str(caught.value)) == (name == "bpo-test")
    if name != "bpo-test":
        (tmp_path / "none").mkdir()
        with pytest.raises(AlignProError, match=r"none: no .*json\* in it; dataset .*thu-coai/BPO"):
            prompts(name, folder=tmp_path / "none")


def test_the_rewrites_that_a_test_set_carries(tmp_path):
    (tmp_path / "bpo_test.json").write_text(json.dumps(SETS["bpo-test"][1], indent=4))
    (pair,) = read_rewrites(tmp_path / "bpo_test.json")
    assert (pair.prompt, pair.rewrite) == ("Why?", "Why, in short?")
    rows = [row | {"optimized_prompt": "Better."} for row in SETS["dolly-eval"][1]]
    assert [pair.prompt for pair in read_rewrites(jsonl(tmp_path / "d.jsonl", rows))] == prompts_of_dolly()


def prompts_of_dolly():
    return ["Why?", "Sum up.\nA text."]


# --- from one end to the other ---


def small(command, *more):
    sizes = [
        "--iterations",
        "2",
        "--prompts-per-round",
        "2",
        "--draws",
        "2",
        "--epochs",
        "1",
        "--rewrite-tokens",
        "8",
    ]
    return [command, "--answer-tokens", "8", *(sizes if command == "train" else []), *more]


def test_train_and_rollout_on_chats_of_tiny_models(base, tmp_path, capsys):  # noqa: F811
    before = [{"role": "user", "content": "ad"}, {"role": "assistant", "content": "c"}]
    rows = [{"messages": [*before, {"role": "user", "content": x}]} for x in ("d", "e", "f")]
    data = ["--dataset", str(jsonl(tmp_path / "chats" / "a.jsonl", rows).parent)]
    split = split_of("ad")
    assert main.main([*verb("train", base, tmp_path / "t"), *data, "--prompts-per-round", "2"]) == 0
    assert f"3 prompts from column messages of {tmp_path / 'chats'}, split train" in capsys.readouterr().err
    command = ["rollout", "--out", str(tmp_path / "r"), "--target", base, "--reward", f"{__name__}:heard@0,1"]
    command += ["--answer-tokens", "2", "--draws", "1", "--trained", str(tmp_path / "t"), *data]
    assert main.main([*command, "--arms", "none", "sft", "--split", split]) == 0
    assert "3 prompts are too few for intervals: estimate needs 5" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "r" / "rollouts.jsonl").read_text().splitlines()]
    assert {row["arm"] for row in rows} == {"none", "sft", "trained"}
    for row in rows:
        assert row["context"] == before
        assert row["reward"] == 1.0


def heard(prompts, responses):
    """Whether the reward is given each prompt's conversation."""
    return [float([turn["role"] for turn in x.context] == ["user", "assistant"]) for x in prompts]


def test_a_reward_by_columns_and_a_system_prompt_through_all_verbs(base, tmp_path, capsys):  # noqa: F811
    """The reward asks for a column by its name; the prompter, the target and the files keep both."""
    path = jsonl(tmp_path / "a.jsonl", [{"q": x, "answer": k} for k, x in enumerate("abab")])
    data = ["--prompts-file", str(path), "--prompt-column", "q", "--system-prompt", "g"]
    keyed = ["--reward", f"{__name__}:keyed@0,1"]
    assert main.main([*verb("train", base, tmp_path / "t"), *keyed, *data]) == 0
    said = capsys.readouterr().err
    assert "each round takes all 4 prompts, as there are not 8" in said
    assert re.search(r"^alignpro: round 1 of 1: reward 0\.\d{4}$", said, re.MULTILINE)  # no terminal, no bar
    assert "%|" not in said
    assert main.main([*verb("resample", base, tmp_path / "s"), *keyed, *data, "--draws", "1"]) == 0
    before = [{"role": "system", "content": "g"}]
    rows = [json.loads(line) for line in (tmp_path / "s" / "proposals.jsonl").read_text().splitlines()]
    want = [{"text": x, "context": before, "columns": {"answer": k}} for k, x in enumerate("abab")]
    assert [row["prompt"] for row in rows] == want
    rows = [json.loads(line) for line in (tmp_path / "s" / "rewrites.jsonl").read_text().splitlines()]
    assert {row["x"] for row in rows} == {"a", "b"}
    assert all(row["context"] == before for row in rows)
    path.write_text('{"q": "a"}\n')
    assert main.main([*verb("train", base, tmp_path / "v"), *keyed, *data]) == 2
    assert "no column 'answer', which the reward asks for, among q; add it, or" in capsys.readouterr().err
    assert main.main([*verb("train", base, tmp_path / "v"), *keyed, "--dataset", "verifiable"]) == 2
    said = capsys.readouterr().err
    assert "dataset verifiable: has no column 'answer', which the reward asks for; choose" in said
    told = [
        "--dataset",
        "verifiable",
        "--reward",
        "verifiable",
        "--max-prompt-tokens",
        "80",
        "--prompts",
        "2",
    ]
    assert main.main([*verb("train", base, tmp_path / "w"), *told]) == 0


def test_a_run_is_not_gone_on_with_under_other_prompts_or_settings(base, tmp_path, capsys):  # noqa: F811
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": x} for x in "ab"])
    command = [*verb("train", base, tmp_path / "t"), "--prompts-file", str(data), "--prompts", "2"]
    assert main.main([*command, "--refused-reward", "0.5"]) == 0
    for more, said in (
        ([], "refused_reward = 0.5, not None"),
        (["--refused-reward", "0.5", "--system-prompt", "g"], "prompts_digest = "),
    ):
        capsys.readouterr()
        assert main.main([*command, "--resume", *more]) == 2
        assert said in capsys.readouterr().err


def test_what_changes_requests_is_in_the_record_also_where_nothing_does():
    """A run begun with a setting differs from one without: absent keys would not be compared."""
    plain, changed = (
        EnvironmentSettings(
            target_endpoint=EndpointSettings(**options),
            reward_endpoint=EndpointSettings(**options),
            reward_model=RewardModelSettings(**model),
            refused_reward=worth,
        ).record("r")
        for options, model, worth in (
            ({}, {}, None),
            (
                {"model": "m", "dialect": "d", "omit": ("seed",), "extra_body": '{"a": 1}'},
                {"dtype": "float16", "sample_tokens": 9},
                0.5,
            ),
        )
    )
    assert plain.keys() == changed.keys()
    names = tuple(
        f"{role}_{name}"
        for role in ("target", "reward")
        for name in ("model", "dialect", "omit", "extra_body")
    )
    names += ("reward_dtype", "reward_sample_tokens", "refused_reward")
    assert {name for name in plain if plain[name] != changed[name]} == set(names)
    for before, now in ((plain, changed), (changed, plain)):
        with pytest.raises(AlignProError, match="repeat that setting"):
            refuse_other_settings(Path("x"), before, now)


def keyed(prompts, responses, answer):
    return [(k + (x.context[0]["content"] == "g")) / 4 for x, k in zip(prompts, answer, strict=True)]


needs_models = pytest.mark.skipif(
    not all(packages.cached(name) for name in ("smollm2", "minilm", "llamafactory", "eval-framework")),
    reason="the packaged models are fetched by: alignpro train --out runs/first --iterations 1",
)


@pytest.mark.weights
@needs_models
def test_train_on_a_folder_of_chats_with_the_packaged_models(chats, tmp_path, capsys):
    command = small("train", "--out", str(tmp_path / "t"), "--dataset", str(chats), "--iterations", "1")
    assert main.main(command) == 0
    said = capsys.readouterr().err
    assert f"from column messages of {chats}, split train" in said
    lines = [json.loads(line) for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["score"] < 1 for line in lines)
    command = ["rollout", "--out", str(tmp_path / "r"), "--trained", str(tmp_path / "t"), "--draws", "1"]
    command += ["--answer-tokens", "8", "--dataset", str(chats), "--split", "train", "--prompts", "2"]
    command += ["--answers", "1"]
    assert main.main([*command, "--arms", "none"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["context"] == chat(int(row["x"].split()[5]))[:3]
        assert row["logp_frozen_x"] < 0
