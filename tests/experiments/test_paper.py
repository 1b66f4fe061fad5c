"""The grid of the paper's experiments, whole, on models of two layers: what it names, resumes and refuses."""

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import paper
import pytest
import torch
import yaml
from paper_grid import cost, figures, launch, plan, summary, work

from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model

HERE = Path(__file__).parent
EXPERIMENTS = Path(paper.__file__).parent


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHARES = '''
def shares(prompts, responses):
    """Reward: the share of a's, and a little for length."""
    return [0.9 * y.count("a") / max(1, len(y)) + 0.02 * min(5, len(y)) for y in responses]
'''


def write_preset(path, said):
    """A preset, and beside it the function that it names: a file runs no other."""
    (path.parent / "shares.py").write_text(SHARES)
    path.write_text(yaml.safe_dump(said, sort_keys=False))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two tiny models, two data sets of HelpSteer's columns, and a preset over them."""
    folder = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        model, tokenizer = tiny_model(seed)
        model.config.max_position_embeddings = 4096  # one character a token, and a judge reads a page
        model.save_pretrained(str(folder / f"model-{seed}"), safe_serialization=True)
        tokenizer.save_pretrained(str(folder / f"model-{seed}"))
    letters = np.random.default_rng(0)
    for name in ("one", "two"):
        (folder / name).mkdir()
        rows = ["".join(letters.choice(list("abcdefgh"), 6)) for _ in range(80)]
        lines = (json.dumps({"prompt": x, "response": x, "helpfulness": 1}) + "\n" for x in rows)
        (folder / name / "train.jsonl").write_text("".join(lines))
    preset = {
        "prompters": {"P": {"prompter": str(folder / "model-0")}},
        "frozen": {"F": str(folder / "model-0")},
        "unseen": {"U": str(folder / "model-1")},
        "datasets": {
            name: {"dataset": "helpsteer", "data_folder": str(folder / name)} for name in ("one", "two")
        },
        "seeds": [0, 1],
        "held_out_prompts": 6,
        "held_out_splits": ["test", "validation"],
        "environment": {"reward": "./shares.py:shares@0,1", "answer_tokens": 5, "batch_size": 8},
        "align_pro": {
            "lam": 0.05,
            "iterations": 2,
            "prompts": 2,
            "samples": 4,
            "epochs": 1,
            "max_tokens": 4,
        },
        "rlhf": {"max_tokens": 5},
        "rollout": {"draws": 2, "answers": 2},
        "judge": {"judge": str(folder / "model-1"), "forced": True},
    }
    write_preset(folder / "tiny.yaml", preset)
    return folder


def run(home, out, *more):
    return paper.main(["--preset", str(home / "tiny.yaml"), "--out", str(out), *more])


def results_of(out):
    """The bytes, but for the commit: the tree may be edited while tests run."""
    said = json.loads((out / "results.json").read_bytes())
    said["environment"].pop("git")
    return json.dumps(said)


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert run(home, out) == 0
    return out


def test_every_cell_of_the_paper():
    preset = plan.load("paper")
    cells = plan.cells(preset)
    assert len(set(cells)) == 2 * 2 * 3 * 3
    assert {(c.prompter, c.frozen) for c in cells} == set(summary.PAPER_TABLE_1)
    assert {c.dataset for c in cells} == set(summary.PAPER_DATASETS)
    by_name = {job.name: job for job in plan.jobs(preset)}
    for cell in cells:
        own = plan.jobs_of(preset, cell)
        assert {job.name for job in own} <= set(by_name)
        training = [job for job in own if job.verb == "train"]
        assert len(training) == (cell.configuration != "no-fine-tuning")
        for job in training:
            o = job.options
            assert o["learning_rate"] == 1.41e-5
            assert o["target"] == preset.frozen[cell.frozen]
            assert (o.get("task") == "rlhf") == (cell.configuration == "rlhf")
        (rollout,) = [job for job in own if job.verb == "rollout"]
        decoding = [rollout.options[f"answer_{name}"] for name in ("temperature", "top_p", "top_k")]
        assert decoding == [1.5, 0.6, 20]
        assert rollout.options["reward"].startswith("weqweasdas/RM-Gemma-2B@")
    for job in by_name.values():
        assert set(job.needs) <= set(by_name)
    order = list(by_name)
    assert all(order.index(need) < order.index(name) for name, job in by_name.items() for need in job.needs)


@pytest.mark.parametrize("name", ["small", "paper"])
def test_every_job_is_one_that_its_verb_takes(name, tmp_path):
    """The options parse, as they stand in the config.yaml."""
    from alignpro.commands import main

    for job in plan.jobs(plan.load(name)):
        path = plan.write_config(job, tmp_path)
        if job.verb != "prompts":
            argument = [str(tmp_path / job.argument)] if job.argument else []
            parsed = main._parse([job.verb, *argument, "--config", str(path)])
            assert parsed.out == str(tmp_path / job.name)
    # The mutant: an option that no verb has.
    job = next(job for job in plan.jobs(plan.load(name)) if job.verb == "train")
    path = plan.write_config(job, tmp_path)
    path.write_text(path.read_text() + "nonesuch: 1\n")
    with pytest.raises(AlignProError, match="nonesuch"):
        main._parse([job.verb, "--config", str(path)])


def test_the_whole_grid(home, whole):
    said = json.loads((whole / "results.json").read_text())
    assert [e["dataset"] for e in said["combinations"]] == ["one", "two"]
    assert said["missing"] == []
    for each in said["combinations"]:
        assert set(each["mean"]) == {"none", "sft", "trained", "rlhf", "star", "best_of_n", "rloo"}
        assert set(each["transfer"]) == {"U"}
        assert each["win_rate"]["pairs"] == 6
        assert each["win_rate"]["failed"] == 0
        assert {b["about"] for b in each["theorem1"]} >= {"trained"}
        here = whole / plan.combination("P", "F", each["dataset"])
        rows = [json.loads(line) for line in (here / "rollout" / "rollouts.jsonl").read_text().splitlines()]
        for arm in ("none", "trained", "rlhf"):
            by_prompt = {}
            for row in rows:
                if row["arm"] == arm:
                    by_prompt.setdefault(row["x"], []).append(row["reward"])
            assert len(by_prompt) == 6
            mean = np.mean([np.mean(of) for of in by_prompt.values()])
            assert each["mean"][arm]["value"] == pytest.approx(mean, abs=1e-12)
        gain = each["mean"]["trained"]["value"] - each["mean"]["none"]["value"]
        assert each["contrasts"]["mean_above"][0]["value"] == pytest.approx(gain, abs=1e-12)
        halfway = 0.5 * (each["mean"]["none"]["value"] + each["mean"]["rlhf"]["value"])
        near = each["contrasts"]["near_oracle"][0]["value"]
        assert near == pytest.approx(each["mean"]["trained"]["value"] - halfway, abs=1e-12)
        spread = each["variance"]["none"]["value"] - each["variance"]["trained"]["value"]
        assert each["contrasts"]["lowest_variance"][0]["value"] == pytest.approx(spread, abs=1e-12)
    # Held-out prompts never met training.
    for name in ("one", "two"):
        folder = whole / "prompts" / name
        texts = [
            {json.loads(line)["prompt"] for line in (folder / file).read_text().splitlines()}
            for file in (plan.TRAINING, plan.HELD_OUT)
        ]
        assert not texts[0] & texts[1]
        assert len(texts[1]) == 6


def test_equal_calls(home, whole):
    """The baselines asked the frozen model as often as one training did, up to whole proposals."""
    config = yaml.safe_load((whole / "f/one/p/rollout" / plan.CONFIG).read_text())
    training = [
        yaml.safe_load((whole / f"f/one/p/{n}-0" / plan.CONFIG).read_text()) for n in ("align-pro", "rloo")
    ]
    calls = [t["iterations"] * t["prompts_per_round"] * t["draws"] for t in training]
    assert calls[0] == calls[1]
    assert abs(config["proposals"] * 6 - calls[0]) <= 3


def test_pictures_and_page(whole):
    for name in ("figure2.png", "figure3.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    page = (whole / "results.md").read_text()
    for words in ("**", "## Table 1", "60 : 24", "46 : 46", "## Theorem 1", "## Transfer", "## Examples"):
        assert words in page
    said = json.loads((whole / "results.json").read_text())
    assert figures.page(said) == page
    # Generated text stays in its block.
    said["combinations"][0]["examples"][0]["arms"]["none"]["response"] = (
        "x\n\n# A heading\n![](http://example.org)\u202e"
    )
    page = figures.page(said)
    assert "\n    # A heading" in page
    assert "\n# A heading" not in page
    assert "\u202e" not in page


def test_line_separators_in_texts_pass_through_the_summary(home, whole, tmp_path):
    """U+2028, U+0085 and their kind are text, though `str.splitlines` ends lines there."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    file = out / plan.combination("P", "F", "one") / "rollout" / "rollouts.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    rows[0]["response"] = "one\u2028two\u0085three\x0bfour"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")
    said = summary.summarise(plan.load(str(home / "tiny.yaml")), out)
    first = said["combinations"][0]["examples"][0]
    assert first["arms"][rows[0]["arm"]]["response"] == rows[0]["response"]
    assert "one⟨U+2028⟩two⟨U+0085⟩three" in figures.page(said)
    with pytest.raises(ValueError, match="Unterminated string"):  # the mutant
        [json.loads(line) for line in text.splitlines()]


def test_a_second_time_does_nothing(home, whole):
    before = {
        p: p.stat().st_mtime_ns
        for p in whole.rglob("*")
        if p.is_file() and p.parent != whole and not p.name.startswith(".claim")
    }
    assert run(home, whole) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_killed_at_any_moment_gives_the_same_results(home, whole, tmp_path):
    """kill -9 of two workers on one folder, thrice, amid whatever they are doing; then on to the end.

    Workers are forks of this process, which has everything imported: a new interpreter takes ten seconds.
    """
    fork, rng, kills = multiprocessing.get_context("fork"), random.Random(0), 0
    jobs = len(plan.jobs(plan.load(str(home / "tiny.yaml"))))

    def finished():
        return len(list(tmp_path.rglob(work.FINISHED)))

    for some in (jobs // 6, jobs // 3, jobs // 2):
        workers = [fork.Process(target=run, args=(home, tmp_path)) for _ in range(2)]
        for worker in workers:
            worker.start()
        while finished() < some and all(worker.is_alive() for worker in workers):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        for worker in workers:
            kills += worker.is_alive()
            worker.kill()
            worker.join()
    assert kills > 2
    assert 0 < finished() < jobs
    assert run(home, tmp_path) == 0
    assert results_of(tmp_path) == results_of(whole)


def test_a_failing_job_is_told_and_the_rest_is_kept(home, whole, tmp_path, capsys):
    said = yaml.safe_load((home / "tiny.yaml").read_text())
    said["environment"]["reward"] = "./shares.py:nothing@0,1"
    write_preset(tmp_path / "bad.yaml", said)
    assert paper.main(["--preset", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "nothing" in error
    assert "Traceback" not in error
    assert (tmp_path / "out/prompts/one/finished.json").is_file()


def test_other_settings_are_refused(home, whole, tmp_path, capsys):
    said = yaml.safe_load((home / "tiny.yaml").read_text())
    said["align_pro"]["lam"] = 0.07
    write_preset(home / "other.yaml", said)
    assert paper.main(["--preset", str(home / "other.yaml"), "--out", str(whole)]) == 2
    assert "was done with lam = 0.05, not 0.07" in capsys.readouterr().err


BAD = {
    "no such preset": (None, "choose from"),
    "an unknown field": ({"nonesuch": 1}, "no field nonesuch"),
    "no data sets": ({"datasets": {}}, "datasets is empty"),
    "training split": ({"held_out_splits": ["train"]}, "choose from validation, test"),
    "too many prompts": ({"held_out_prompts": 1000}, "ask for no more"),
    "an unknown machine": ({"machine": "abacus"}, "choose from"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes(name, home, tmp_path, capsys):
    change, words = BAD[name]
    path = tmp_path / "p.yaml"
    if change is not None:
        write_preset(path, yaml.safe_load((home / "tiny.yaml").read_text()) | change)
    assert paper.main(["--preset", str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_dry_run_says_what_it_takes_and_what_cannot_be_had(capsys, monkeypatch):
    from huggingface_hub import HfApi, errors

    def gated(self, name, **_):
        if "Llama" in name:
            raise errors.GatedRepoError("gated", response=_Response())

    monkeypatch.setattr(HfApi, "auth_check", gated)
    assert paper.main(["--preset", "paper", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "36 cells" in said.out
    assert "hours of one H100" in said.out
    assert "meta-llama/Llama-3.1-8B-Instruct: its licence must be accepted first" in said.err

    def unreachable(self, name, **_):
        raise OSError("no route")

    monkeypatch.setattr(HfApi, "auth_check", unreachable)
    assert paper.main(["--preset", "paper", "--dry-run"]) == 2
    assert "the hub cannot be reached (no route)" in capsys.readouterr().err
    monkeypatch.setattr(HfApi, "auth_check", lambda *_, **__: None)
    assert paper.main(["--preset", "paper", "--dry-run"]) == 0


class _Response:
    headers: ClassVar[dict[str, str]] = {}
    request = None
    status_code = 403
    text = ""


def test_costs_add_up():
    """The dry run's largest parts against counts by hand."""
    preset = plan.load("paper")
    job = next(j for j in plan.jobs(preset) if j.name.endswith("phi-3.5-instruct/align-pro-0"))
    found = cost.of_job(job, preset)
    assert found.generated == 40 * 128 * (128 + 256)
    assert found.trained == 40 * 4 * (128 * (125 + 128) + cost.TEMPLATE_TOKENS)
    weights = 3.82e9 * 2 + 8.03e9 * 2 + 2.51e9 * 4  # policy and frozen model in bfloat16, reward in float32
    activations = (8 * (125 + 128)) * 100 * 32 * 3072  # of a sixteenth of the batch
    assert weights + activations < found.memory < cost.MACHINES["h100"].memory
    assert found.seconds > 40 * (128 * 2 + 256 * 2) * cost.MACHINES["h100"].step
    # In one piece it would not fit; checkpointing fits it too.
    whole = replace(job, options={**job.options, "microbatches": 1})
    assert cost.of_job(whole, preset).memory > cost.MACHINES["h100"].memory
    checkpointed = replace(whole, options={**whole.options, "gradient_checkpointing": True})
    assert cost.of_job(checkpointed, preset).memory < cost.MACHINES["h100"].memory


def part(lo, hi):
    return {"value": (lo + hi) / 2, "lo": lo, "hi": hi, "prompts": 9}


@pytest.mark.parametrize(
    ("parts", "corrected", "expected"),
    [
        ([part(0.1, 0.2)], None, "reproduced"),
        ([part(0.1, 0.2), part(-0.1, 0.2)], None, "undecided"),
        ([part(0.1, 0.2), part(-0.2, -0.1)], None, "not reproduced"),
        ([part(-0.2, -0.1)], [part(-0.3, 0.1)], "undecided"),
        ([part(-0.2, -0.1)], [part(-0.3, -0.05)], "not reproduced"),
        ([], None, "undecided"),
        ([None], None, "undecided"),
    ],
)
def test_verdicts(parts, corrected, expected):
    assert summary.verdict(parts, corrected) == expected


def test_a_claim_is_about_all_combinations():
    def each(name, lo, hi):
        contrasts = {"mean_above": [part(lo, hi)]}
        return {
            "prompter": "P",
            "frozen": "F",
            "dataset": name,
            "contrasts": contrasts,
            "corrected": contrasts,
        }

    claim = summary.CLAIMS[0]
    good, bad, open_ = each("a", 0.1, 0.2), each("b", -0.2, -0.1), each("c", -0.1, 0.1)
    assert summary._claim(claim, [good, good])["verdict"] == "reproduced"
    assert summary._claim(claim, [good, open_])["verdict"] == "undecided"
    assert summary._claim(claim, [good, bad, open_])["verdict"] == "not reproduced"
    assert summary._claim(claim, [])["verdict"] == "undecided"


def test_workers_of_one_command(home, tmp_path):
    """--processes starts interpreters of their own, which share the folder; a failing one is told."""
    command = [sys.executable, str(EXPERIMENTS / "paper.py"), "--preset", str(home / "tiny.yaml")]
    command += ["--out", str(tmp_path), "--processes", "2", "--only"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([*command, "prompts"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.rglob(work.FINISHED)} == {"one", "two"}


def test_one_job_is_done_by_one_process(tmp_path):
    with work.claim(tmp_path / "job") as mine:
        assert mine
        held = "import sys; from pathlib import Path; from paper_grid.work import claim\n"
        held += "with claim(Path(sys.argv[1])) as mine: sys.exit(0 if mine else 3)"
        command = [sys.executable, "-c", held, str(tmp_path / "job")]
        environment = {**os.environ, "PYTHONPATH": str(EXPERIMENTS)}
        assert subprocess.run(command, env=environment).returncode == 3
    assert subprocess.run(command, env=environment).returncode == 0


def test_every_worker_has_a_gpu_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    program = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    pool = launch._Local(["-c", program], tmp_path, 3)
    pool.start(3)
    while pool.alive():
        time.sleep(0.01)
    said = [(tmp_path / f"worker-{i}.log").read_text().strip() for i in range(3)]
    assert said == ["2", "5", "2"]


def test_the_papers_grid_rehearsed(tmp_path, capsys):
    """All four pairs and three configurations of the paper's own preset, on tiny models of their kinds."""
    from paper_grid import rehearse

    out = tmp_path / "out"
    arguments = ["--preset", "paper", "--out", str(out)]
    only = [] if os.environ.get("ALIGNPRO_NIGHTLY") else ["--only", "qwen-2.5-1.5b"]
    status = paper.main([*arguments, "--rehearse", "--scale", "tiny", *only])
    said = capsys.readouterr()
    assert status == 0, said.err[-2000:]
    record = json.loads((out / rehearse.FILE).read_text())
    wanted = {rehearse.kind_of(job) for job in plan.jobs(plan.load("paper")) if job.verb != "prompts"}
    kinds = {row["kind"] for row in record["jobs"].values()}
    assert kinds == {kind for kind in wanted if not only or only[1] in kind or kind.endswith("/rlhf")}
    assert all(row["seconds"] > 0 and row["memory"] > 1e8 for row in record["jobs"].values())
    # Arithmetic is not replaced by what tiny models took; by real sizes it is, a round scaled to the run.
    preset = plan.load("paper")
    assert rehearse.load(out, preset) == {}
    name = next(name for name in record["jobs"] if "align-pro" in name)
    job = next(job for job in plan.jobs(preset) if job.name == name)
    record["scale"], record["jobs"][name]["seconds"] = "real", 60.0
    record["jobs"][name]["memory"] = 7e10
    (out / rehearse.FILE).write_text(json.dumps(record))
    rows, estimate = rehearse.load(out, preset), cost.of_job(job, preset)
    found = rehearse.measured(job, estimate, rows)
    rounds = estimate.seconds / record["jobs"][name]["arithmetic"]["seconds"]
    assert found.seconds == pytest.approx(60.0 * rounds)
    assert found.memory == 7e10
    paper.main([*arguments, "--dry-run"])
    assert "Measured by rehearsal on" in capsys.readouterr().out
    record["jobs"][name]["failed"] = "out of memory"
    (out / rehearse.FILE).write_text(json.dumps(record))
    assert paper.main([*arguments, "--dry-run"]) == 2
    assert "its rehearsal failed (out of memory); lower prompts" in capsys.readouterr().err


def test_what_cannot_be_rehearsed_is_named(home, tmp_path, capsys):
    assert paper.main(["--preset", "paper", "--rehearse", "--scale", "huge", "--out", str(tmp_path)]) == 2
    assert "--scale huge: choose from real, tiny" in capsys.readouterr().err
