"""Public data sets from small files of their schemas, prompts of one's own, and the rules for all of them.

The files are written here; they are read by the very code that reads the hub.
"""

import csv
import gzip
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from urllib.parse import urlparse

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutants import kills, mutated
from pyarrow import parquet

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.data import own as own_files
from alignpro.llm.data import public
from alignpro.llm.data.own import read_prompts
from alignpro.llm.data.public import DATASETS, Source, pairs, prompts
from alignpro.llm.data.split import SPLITS, split_of
from alignpro.llm.data.subset import sample, shorter
from alignpro.llm.models.configure import tiny_model

SOURCES = [name for name, row in DATASETS.items() if isinstance(row, Source) and not row.test]
GRADED = [name for name in SOURCES if DATASETS[name].grades is not None]


def normal(text):
    """Letters, digits and underscores, case-folded, one space between: by another route than `normalised`."""
    kept = (c if c.isalnum() or c == "_" else " " for c in text.casefold())
    return " ".join("".join(kept).split())


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def completion(response, score, rating="3"):
    rated = {"Rating": rating, "Rationale": "said so", "Type": ["1"]}
    return {
        "annotations": {"honesty": rated, "helpfulness": rated},
        "critique": "fair",
        "custom_system_prompt": f"Answer {response}.",
        "fine-grained_score": 3.5,
        "model": "gpt-4",
        "overall_score": score,
        "principle": "honesty",
        "response": response,
    }


def write_ultrafeedback(folder, rows):
    """One .jsonl for each source; rows: (prompt, [(score, response), ...])."""
    half = (len(rows) + 1) // 2
    for name, part in (("flan", rows[:half]), ("truthful_qa", rows[half:])):
        made = [
            {
                "source": name,
                "instruction": x,
                "models": ["gpt-4"] * len(answers),
                "completions": [
                    completion(y, score, "N/A" if i else "3") for i, (score, y) in enumerate(answers)
                ],
                "correct_answers": ["None"],
                "incorrect_answers": ["None"],
            }
            for x, answers in part
        ]
        if made:
            (folder / f"{name}.jsonl").write_text(jsonl(made))


def write_binarized(folder, rows):
    """Parquet shards named after their splits; rows: (prompt, [(score, chosen), (score, rejected)])."""
    (folder / "data").mkdir()

    def turns(x, y):
        return [{"content": x, "role": "user"}, {"content": y, "role": "assistant"}]

    made = [
        {
            "prompt": x,
            "prompt_id": hashlib.sha256(x.encode()).hexdigest(),
            "chosen": turns(x, y),
            "rejected": turns(x, z),
            "messages": turns(x, y),
            "score_chosen": high,
            "score_rejected": low,
        }
        for x, ((high, y), (low, z)) in rows
    ]
    half = (len(made) + 1) // 2
    sft = [row | {"prompt": "only in sft"} for row in made[:1]]
    for split, part in (("train_prefs", made[:half]), ("test_prefs", made[half:]), ("train_sft", sft)):
        if part:
            parquet.write_table(
                pa.Table.from_pylist(part), folder / "data" / f"{split}-00000-of-00001.parquet"
            )


def write_helpsteer(folder, rows):
    """Gzipped .jsonl, one row for each answer, and the answers to one prompt far apart."""
    half = (len(rows) + 1) // 2
    for split, part in (("train", rows[:half]), ("validation", rows[half:])):
        made = [
            {"prompt": x, "response": answers[i][1], "helpfulness": answers[i][0], "correctness": 4}
            | {"coherence": 4, "complexity": 1, "verbosity": 2}
            for i in range(4)
            for x, answers in part
            if i < len(answers)
        ]
        if made:
            with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
                file.write(jsonl(made))


def write_orca(folder, rows):
    made = [
        {"system": f"You are number {i}.", "question": x, "chosen": y, "rejected": z}
        for i, (x, ((_, y), (_, z))) in enumerate(rows)
    ]
    (folder / "orca_rlhf.jsonl").write_text(jsonl(made))


def write_openorca(folder, rows):
    made = [
        {"id": f"niv.{i}", "system_prompt": f"You are number {i}.", "question": x, "response": answers[0][1]}
        for i, (x, answers) in enumerate(rows)
    ]
    half = (len(made) + 1) // 2
    for name, part in (("1M-GPT4-Augmented", made[:half]), ("3_5M-GPT3_5-Augmented", made[half:])):
        if part:
            parquet.write_table(pa.Table.from_pylist(part), folder / f"{name}.parquet")


WRITE = {
    "ultrafeedback": write_ultrafeedback,
    "ultrafeedback-binarized": write_binarized,
    "helpsteer": write_helpsteer,
    "orca-dpo-pairs": write_orca,
    "openorca": write_openorca,
}
TWO = [(8.0, "good"), (5.0, "bad")]
HELPFUL = [(4, "good"), (1, "bad")]


def written(name, rows, folder):
    folder.mkdir(parents=True)
    WRITE[name](folder, rows)
    return folder


def graded(name, xs):
    return [(x, HELPFUL if name == "helpsteer" else TWO) for x in xs]


def test_every_source_has_a_test():
    assert list(WRITE) == SOURCES


# --- what the columns mean ---


@pytest.mark.parametrize("name", SOURCES)
def test_prompts_of_every_schema(name, tmp_path):
    """White space around goes, blank prompts and typographic doubles too; both files or splits are read."""
    folder = written(
        name, graded(name, ["  How?\n", "Why", " ", "why!", "Who is it", "How?"]), tmp_path / "d"
    )
    found = prompts(name, folder=folder)
    assert sorted(found) == ["How?", "Who is it", "Why"]
    ranks = [hashlib.sha256(f"0\n{normal(x)}".encode()).hexdigest() for x in found]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("name", GRADED)
def test_pairs_of_every_schema(name, tmp_path):
    folder = written(name, graded(name, ["How?", "Why", "Who"]), tmp_path / "d")
    found = pairs(name, folder=folder)
    assert {(p.prompt, p.chosen, p.rejected) for p in found} == {
        (x, "good", "bad") for x in ("How?", "Why", "Who")
    }
    assert all((p.source, p.split) == (name, split_of(p.prompt)) for p in found)
    assert [p.prompt for p in found] == prompts(name, folder=folder)
    for split in SPLITS:
        if any(p.split == split for p in found):
            assert pairs(name, split, folder=folder) == [p for p in found if p.split == split]


def test_ultrafeedback_compares_every_two_completions_of_different_score(tmp_path):
    answers = [(7.5, "a"), (2.0, "b"), (7.5, "c"), (None, "d"), (9.0, " "), (1.0, "a")]
    folder = written("ultrafeedback", [("x", answers), ("y", [(3.0, "e"), (4.0, "f")])], tmp_path / "d")
    found = Counter((p.prompt, p.chosen, p.rejected) for p in pairs("ultrafeedback", folder=folder))
    expected = [("x", "a", "b"), ("x", "c", "b"), ("x", "c", "a"), ("x", "b", "a"), ("y", "f", "e")]
    assert found == Counter(expected)


def test_helpsteer_compares_rows_with_one_prompt(tmp_path):
    rows = [("x", [(4, "a"), (2, "b"), (2, "c")]), ("y", [(0, "d")]), ("z", [(3, "e"), (3, "f")])]
    folder = written("helpsteer", rows, tmp_path / "d")
    found = Counter((p.prompt, p.chosen, p.rejected) for p in pairs("helpsteer", folder=folder))
    assert found == Counter([("x", "a", "b"), ("x", "a", "c")])
    # Elsewhere rows are not compared: one question under two system prompts is asked for two answers.
    doubled = [("x", [(1, "a"), (0, "b")]), ("x", [(1, "c"), (0, "d")])]
    folder = written("orca-dpo-pairs", doubled, tmp_path / "o")
    found = {(p.chosen, p.rejected) for p in pairs("orca-dpo-pairs", folder=folder)}
    assert found == {("a", "b"), ("c", "d")}


def test_binarized_drops_ties_and_reads_no_other_splits(tmp_path):
    rows = [("x", TWO), ("y", [(7.0, "a"), (7.0, "b")])]
    folder = written("ultrafeedback-binarized", rows, tmp_path / "d")
    assert [p.prompt for p in pairs("ultrafeedback-binarized", folder=folder)] == ["x"]
    assert sorted(prompts("ultrafeedback-binarized", folder=folder)) == ["x", "y"]
    # The card gives the splits where the files' names do not; without it the names do, as far as they can.
    flat = tmp_path / "flat"
    flat.mkdir()
    for shard in (folder / "data").iterdir():
        (flat / f"{shard.name.split('-')[0]}.parquet").write_bytes(shard.read_bytes())
    assert sorted(prompts("ultrafeedback-binarized", folder=flat)) == ["only in sft", "x", "y"]
    listed = "".join(
        f"  - split: {s}\n    path: {s}.parquet\n" for s in ("train_prefs", "train_sft", "test_prefs")
    )
    (flat / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n# A card\n"
    )
    assert sorted(prompts("ultrafeedback-binarized", folder=flat)) == ["x", "y"]


# --- no prompt in two splits ---


def variants(x, rng):
    """x as other data sets may spell it."""
    marks = rng.choice(["", "?", "!", " ", "\n", "...", '"'])
    x = rng.choice([x, x.upper(), x.title(), x.replace(" ", "  "), x.replace(" ", ", ")])
    return marks + x + rng.choice(["", "?", ".", "\n\n"])


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All data sets, of overlapping prompts, each in its own spelling and order."""
    rng, base = random.Random(0), tmp_path_factory.mktemp("all")
    pool = [f"explain thing {i} to child {i % 7}" for i in range(120)]
    return {
        name: written(name, graded(name, [variants(x, rng) for x in rng.sample(pool, 90)]), base / name)
        for name in SOURCES
    }


def leaks(folders):
    """How many normalised prompts are in two splits, over prompts and pairs of all data sets together."""
    homes = {}
    for name, folder in folders.items():
        for split in SPLITS:
            for x in prompts(name, split, folder=folder):
                homes.setdefault(normal(x), set()).add(split)
            if name in GRADED:
                for pair in pairs(name, split, folder=folder):
                    homes.setdefault(normal(pair.prompt), set()).add(split)
    assert len(homes) > 100
    return sum(len(found) > 1 for found in homes.values())


def test_no_prompt_is_in_two_splits_of_any_data_sets(everything, monkeypatch):
    assert leaks(everything) == 0
    # The mutants: a split by row, and one by the text as it is spelt.
    count = iter(range(10**6))
    for mutant in (
        lambda text: SPLITS[next(count) % 3],
        lambda text: SPLITS[hashlib.sha256(text.encode()).digest()[0] % 3],
    ):
        monkeypatch.setattr(public, "split_of", mutant)
        assert leaks(everything) > 20


def test_splits_are_all_of_a_data_set(everything):
    for name, folder in everything.items():
        parts = [prompts(name, split, folder=folder) for split in SPLITS]
        whole = prompts(name, folder=folder)
        assert all(parts)
        assert sorted(x for part in parts for x in part) == sorted(whole)
        assert [x for x in whole if split_of(x) == "train"] == parts[0]


# --- samples ---

spelt = st.sampled_from(["a", "A", "a?", " a", "b", "B!", "c d", "C, d", "e", "?", "", "f", "Ｆ", "ß", "ss"])


def by_sorting(texts, n, seed, fits):
    """All of it in memory: the first spelling that fits, sorted by hash, the first n."""
    first = {}
    for text in texts:
        if normal(text) and fits(text):
            first.setdefault(normal(text), text.strip())
    order = sorted(first, key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).hexdigest()[:32])
    return [first[key] for key in order][:n]


def first_rows(texts, n, seed, fits):
    """The mutant: the first n rows."""
    kept = dict.fromkeys(text.strip() for text in texts if normal(text) and fits(text))
    return list(kept)[:n]


@given(st.lists(spelt, max_size=30), st.integers(1, 8) | st.none(), st.integers(0, 3), st.integers(1, 4))
@example(["b", "a"], 1, 0, 4)
@settings(max_examples=200, deadline=None)
def test_a_sample_is_the_head_of_all_by_hash(texts, n, seed, longest):
    def fits(text):
        return len(text) <= longest

    assert sample(iter(texts), n, seed, fits) == by_sorting(texts, n, seed, fits)
    if n is not None:
        assert sample(texts, n, seed, fits) == sample(texts, None, seed, fits)[:n]


def test_the_mutants_of_a_sample_die():
    texts = [f"prompt {i}" for i in range(50)]
    found = sample(texts, 10)
    assert sample(texts[::-1], 10) == found == sample(texts, 20)[:10]
    assert first_rows(texts[::-1], 10, 0, bool) != first_rows(texts, 10, 0, bool)
    assert sample(texts, 10, seed=1) != found


def test_samples_are_uniform():
    """How often each of 40 texts is among 10, over 400 seeds. Without replacement the sum of squares is
    (1 - 10/40) (40/39) times a chi-square of 39 degrees of freedom, which exceeds 78 with probability 2.1e-4:
    a false alarm, for both checks together, in less than one of 2,000 choices of the seeds."""
    texts = [f"prompt {i}" for i in range(40)]
    counts = Counter(x for seed in range(400) for x in sample(texts, 10, seed))
    chi_square = sum((counts[x] - 100) ** 2 / 100 for x in texts)
    assert chi_square < 80 * (1 - 10 / 40)
    # Of the training split too, which the hash of `split_of` alone would not give.
    train = [x for x in (f"p{i}" for i in range(58)) if split_of(x) == "train"][:40]
    counts = Counter(x for seed in range(400) for x in sample(train, 10, seed))
    assert sum((counts[x] - 100) ** 2 / 100 for x in train) < 80 * (1 - 10 / 40)


def test_a_sample_measures_few_texts():
    """A text enters the n smallest hashes about n (1 + log(N/n)) times: 79 of 10,000."""
    seen = []
    sample((f"prompt {i}" for i in range(10_000)), 10, fits=lambda x: not seen.append(x))
    assert 10 <= len(seen) < 200


def test_lengths():
    _, tokenizer = tiny_model(vocab="abc")  # a token a character
    assert [shorter(tokens=3, tokenizer=tokenizer)("a" * k) for k in range(1, 6)] == [True] * 3 + [False] * 2
    assert [shorter(characters=2)("a" * k) for k in range(1, 4)] == [True, True, False]
    both = shorter(characters=4, tokens=3, tokenizer=tokenizer)
    assert [both("a" * k) for k in range(1, 6)] == [True] * 3 + [False] * 2
    for bad in ({"characters": 0}, {"tokens": -1, "tokenizer": tokenizer}, {"tokens": 5}):
        with pytest.raises(AlignProError, match="give"):
            shorter(**bad)


# --- mistakes, and a hub out of reach ---


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", SOURCES)
def test_without_the_hub_one_sentence_says_what_to_do(name, offline, capfd):
    with pytest.raises(AlignProError) as caught:
        prompts(name)
    said = str(caught.value)
    assert f"dataset {name}: the hub cannot be reached and no copy of {DATASETS[name].repository}" in said
    assert f"hf download {DATASETS[name].repository} --repo-type dataset --local-dir DIR" in said
    assert "--data-folder DIR" in said
    assert "\n" not in said
    assert capfd.readouterr().err.count("\n") == 1  # what is being read


BAD = {
    "unknown": (("nope",), {}, "choose from instructions, mt-bench, dpo-demo"),
    "split": (("helpsteer", "dev"), {}, "split 'dev': choose from train"),
    "none": (("helpsteer", None, 0), {}, "prompts 0: give at least 1"),
    "no folder": (("helpsteer",), {"folder": "/nowhere"}, "data_folder /nowhere: no such folder"),
    "a package": (("mt-bench",), {"folder": "/"}, "mt-bench comes in a package; leave data_folder out"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_refused_before_anything_is_read(case, monkeypatch):
    monkeypatch.setattr(public, "_rows", None)
    given_, more, message = BAD[case]
    with pytest.raises(AlignProError, match=message):
        prompts(*given_, **more)


def test_files_of_another_schema(tmp_path):
    folder = written("helpsteer", graded("helpsteer", ["How?", "Why", "Who"]), tmp_path / "d")
    for call, message in {
        (lambda: prompts("orca-dpo-pairs", folder=folder), "no column 'question' among prompt, response"),
        (lambda: pairs("openorca", folder=folder), "it has no preference pairs; choose from ultrafeedback"),
        (lambda: prompts("helpsteer", n=4, folder=folder), "prompts 4: choose from 1 to the 3 there are"),
        (lambda: prompts("helpsteer", folder=folder, fits=lambda x: False), "no prompts are left"),
    }:
        with pytest.raises(AlignProError, match=message):
            call()
    ties = written("helpsteer", [("x", [(1, "a"), (1, "b")])], tmp_path / "ties")
    with pytest.raises(AlignProError, match="no two answers to a prompt differ in grade"):
        pairs("helpsteer", folder=ties)
    wrong = {"question": "How?", "chosen": 7, "rejected": 8}
    for rows, message in (
        ([wrong], "row 1 has .* in chosen, rejected"),
        (
            [wrong | {"question": None}, wrong | {"question": 3}],
            "row 2: no text or conversation in column 'question'; check that these",
        ),
    ):
        other = tmp_path / message.split()[1].strip(":")
        other.mkdir(exist_ok=True)
        (other / "x.jsonl").write_text(jsonl(rows))
        with pytest.raises(AlignProError, match=message):
            pairs("orca-dpo-pairs", folder=other)


@pytest.mark.parametrize("content", ["{broken", None])
def test_damaged_and_missing_files(content, tmp_path, capfd):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(AlignProError, match="cannot read it as helpsteer") as caught:
        prompts("helpsteer", folder=tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err.count("\n") == 1


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as `load_dataset` asks for, of one repository; gated until GET /open."""

    files: dict[str, bytes]
    gated = True

    def log_message(self, *args):
        pass

    def reply(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def oid(self, name):
        return hashlib.sha1(self.files[name]).hexdigest()

    def listing(self, names):
        rows = [
            {"type": "file", "path": x, "oid": self.oid(x), "size": len(self.files[x])}
            for x in names
            if x in self.files
        ]
        self.reply(200, json.dumps(rows).encode(), Content_Type="application/json")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.listing(json.loads(body)["paths"])

    def do_GET(self):
        path = urlparse(self.path).path
        if path == "/open":
            type(self).gated = False
            return self.reply(200)
        if self.gated:
            return self.reply(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        if "/resolve/" in path:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if name in self.files:
                return self.reply(200, self.files[name], X_Repo_Commit="a" * 40, ETag=f'"{self.oid(name)}"')
        elif path.rstrip("/").endswith("/tree/" + "a" * 40):
            return self.listing(self.files)
        elif "/tree/" not in path and not path.endswith("/parquet"):
            card = {"id": "Intel/orca_dpo_pairs", "sha": "a" * 40, "private": False, "gated": False}
            card |= {"siblings": [{"rfilename": name} for name in self.files]}
            return self.reply(200, json.dumps(card).encode(), Content_Type="application/json")
        return self.reply(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


ASK = """
import os, urllib.request
from alignpro.errors import AlignProError
from alignpro.llm.data.public import pairs, prompts
try:
    prompts("orca-dpo-pairs")
except AlignProError as error:
    print(error)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/open")
print(sorted(prompts("orca-dpo-pairs")), len(pairs("orca-dpo-pairs")))
"""


def test_through_a_hub(tmp_path, offline):
    """Gated, then open, then out of reach again but cached: the library's own client and a server of ours."""
    source = written("orca-dpo-pairs", graded("orca-dpo-pairs", ["How?", "Why", "how"]), tmp_path / "d")
    Hub.files = {"README.md": b"---\nlicense: apache-2.0\n---\n"}
    Hub.files |= {path.name: path.read_bytes() for path in source.iterdir()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        cleaned = {
            k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
        }
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            env=cleaned | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    refused, found = done.stdout.splitlines()
    assert "the hub asks for a login; accept the terms of Intel/orca_dpo_pairs there and run" in refused
    assert "or download it elsewhere" in refused
    assert found == "['How?', 'Why'] 3"
    assert sorted(prompts("orca-dpo-pairs")) == ["How?", "Why"]


# --- prompts of one's own ---

OWN = ["How?", 'Two\nlines, "quoted"', "Grüße 🙂"]


def own(path, rows, column="prompt"):
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n" + jsonl([{column: x, "n": 1} for x in rows]), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps([{column: x} for x in rows]), encoding="utf-8-sig")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.table({column: rows, "n": [1] * len(rows)}), path)
    else:
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["n", column], *([1, x] for x in rows)])
    return path


@pytest.mark.parametrize("suffix", own_files.FORMATS)
def test_files_of_every_format(suffix, tmp_path):
    path = own(tmp_path / f"mine{suffix}", [*OWN, " How? "])
    assert read_prompts(path) == OWN
    path = own(tmp_path / f"other{suffix}", OWN, "question")
    assert read_prompts(path, "question") == read_prompts(path) == OWN
    path = own(tmp_path / f"odd{suffix}", OWN, "q")
    with pytest.raises(AlignProError, match=r"odd\..*: no column 'prompt'; name one .*\(it has .*q"):
        read_prompts(path)
    path = own(tmp_path / f"blank{suffix}", ["a", " ", "b"])
    where = {".json": "item 2", ".parquet": "row 2"}.get(suffix, "line 3")
    with pytest.raises(AlignProError, match=f"{where}: no text in column 'prompt'; mend or remove"):
        read_prompts(path)
    empty = tmp_path / f"empty{suffix}"
    empty.write_bytes(b"" if suffix != ".json" else b"[]")
    with pytest.raises(AlignProError, match=r"holds no prompts|is no Parquet file"):
        read_prompts(empty)


def test_text_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("﻿a\n\n b c \na\n")
    assert read_prompts(path) == ["a", "b c"]
    with pytest.raises(AlignProError, match=r"without columns; leave it out, or give a file in \.jsonl"):
        read_prompts(path, "prompt")
    path.write_text("\n \n")
    with pytest.raises(AlignProError, match="holds no prompts; put one on each line"):
        read_prompts(path)


def test_only_a_newline_ends_a_line(tmp_path):
    """What `str.splitlines` takes for an end of a line is text, in every file that is read by lines."""
    odd = [f"one{c}two" for c in "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"]

    def check_lines(module):
        path = tmp_path / "odd.txt"
        path.write_bytes("\r\n".join(odd).encode())
        assert module.read_prompts(path) == odd
        path.write_text("\n".join(odd), encoding="utf-8")
        assert module.read_prompts(path) == odd
        path.write_text("".join(json.dumps({"prompt": x}, ensure_ascii=False) + "\n" for x in odd))
        assert module.read_prompts(path.rename(tmp_path / "odd.jsonl")) == odd
        rows = [{"prompt": x, "rewrite": x, "chosen": x, "rejected": "no"} for x in odd]
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
        assert [(p.prompt, p.chosen) for p in module.read_pairs(path)] == [(x, x) for x in odd]
        assert [(p.prompt, p.rewrite) for p in module.read_rewrites(path)] == [(x, x) for x in odd]

    check_lines(own_files)
    wrong = mutated(own_files, '.decode("utf-8-sig").split("\\n")', '.decode("utf-8-sig").splitlines()')
    kills(check_lines, wrong)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"\n', "a.jsonl, line 2: is no JSON object"),
        ("a.jsonl", b'"a"\n', "a.jsonl, line 1: is no JSON object"),
        (
            "a.jsonl",
            b'{"prompt": "a", "prompt": "b"}\n',
            r"line 1: is no JSON object \(a name is given twice",
        ),
        ("a.json", b'[{"prompt": "a", "prompt": "b"}]', "a name is given twice"),
        ("a.json", b'{"prompt": "a"}', "no JSON list of objects"),
        ("a.json", b"[", "no JSON"),
        ("a.csv", b'n,prompt\n1,"a\n', "line 2: cannot be read"),
        ("a.csv", b"n,prompt\n1,a\n2,b, and c\n", "line 3: more fields than the header names"),
        ("a.csv", b"n,prompt\n1,a\n2\n", "line 3: no text in column 'prompt'"),
        ("a.parquet", b"PAR1", "is no Parquet file"),
        ("a.txt", b"\xff\xfe", "it is no UTF-8 text"),
        ("a.csv", b"prompt\n\xff\xfe\n", "it is no UTF-8 text"),
    ],
)
def test_damaged_files_name_the_place(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AlignProError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)
    with pytest.raises(AlignProError, match="cannot read it"):
        read_prompts(tmp_path / "missing" / name)


# --- on the command line ---


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


def verb(name, base, out):
    command = [name, "--out", str(out), "--prompter", base, "--target", base, "--answer-tokens", "2"]
    command += ["--reward", f"{__name__}:shares@0,1"]
    sizes = ["--iterations", "1", "--draws", "2", "--epochs", "1", "--rewrite-tokens", "2"]
    return [*command, *(sizes if name == "train" else ["--proposals", "2", "--rewrite-tokens", "2"])]


def test_train_and_resample_take_a_data_set(base, tmp_path, capsys):
    xs = [f"{a}{b}{c}" for a in "abcd" for b in "efgh" for c in ("", "a")]
    folder = written("helpsteer", graded("helpsteer", xs), tmp_path / "d")
    more = ["--dataset", "helpsteer", "--data-folder", str(folder), "--max-prompt-tokens", "2"]
    short = [x for x in xs if len(x) == 2]
    train = [x for x in short if split_of(x) == "train"]
    assert main.main([*verb("train", base, tmp_path / "t"), *more, "--prompts-per-round", "2"]) == 0
    assert f"{len(train)} prompts; 1 rounds of 2 x 2" in capsys.readouterr().err
    held = [x for x in short if split_of(x) == "test"]
    assert held
    assert main.main([*verb("resample", base, tmp_path / "r"), *more]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "proposals.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in rows} == set(held)
    assert not set(held) & set(train)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--prompts-file", "{mine}"],
            "mine.csv, line 2: no column 'prompt'; name one with --prompt-column, or several",
        ),
        (["--prompt-column", "q"], "prompt_column q: dataset instructions has prompts and no columns; leave"),
        (["--system-prompt", " "], "system_prompt: is empty; write one, or leave it out"),
        (
            ["--dataset", "vicuna-eval", "--data-folder", "{d}"],
            "vicuna-eval: is a test set, to be measured on",
        ),
        (["--prompts-file", "{mine}", "--data-folder", "{d}"], "is for dataset; give it or prompts_file"),
        (["--max-prompt-tokens", "0"], "max_prompt_tokens 0: give at least 1"),
        (
            ["--prompts-file", "{mine}", "--prompt-column", "q", "--max-prompt-tokens", "1"],
            "max_prompt_tokens 1: no prompt is as short; raise it",
        ),
        (
            ["--prompts-file", "{mine}", "--prompt-column", "q", "--train-prompts", "3"],
            "train_prompts 3: choose from 1 to the 2 there are",
        ),
        (["--dataset", "orca"], "dataset 'orca': choose from instructions, mt-bench, dpo-demo"),
        (
            ["--dataset", "openorca", "--data-folder", "{d}/no"],
            "no: no such folder; name the one with the files",
        ),
    ],
)
def test_mistakes_on_the_command_line(more, message, base, tmp_path, capsys):
    mine = own(tmp_path / "mine.csv", ["ab", "cd"], "q")
    more = [word.format(mine=mine, d=tmp_path) for word in more]
    assert main.main([*verb("train", base, tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_help_names_every_data_set(capsys):
    assert main.main(["train", "--help-all"]) == 0
    said = "".join(c for c in capsys.readouterr().out if c.isalnum() or c == "-")
    assert all(name in said for name in DATASETS)
