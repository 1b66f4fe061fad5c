"""The grid of tasks, whole, on a model of two layers: what it runs, resumes and says."""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tasks
from mutants import kills, mutated
from paper_grid import launch, work
from task_grid import kinds, page, plan, results

from alignpro import rollouts
from alignpro.files import read_json, read_json_lines
from alignpro.llm.arms import route
from alignpro.llm.arms.rollout import FILE, prompt_id
from alignpro.llm.data.split import split_of
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.targets.ledger import spent


@pytest.fixture(scope="module")
def size(tmp_path_factory):
    """Two tasks on a tiny model, with prompts and instructions of its few letters."""
    folder = tmp_path_factory.mktemp("home")
    model, tokenizer = tiny_model(0)
    model.config.max_position_embeddings = 4096  # one character a token
    model.save_pretrained(str(folder / "model"), safe_serialization=True)
    tokenizer.save_pretrained(str(folder / "model"))
    letters = np.random.default_rng(0)
    rows = ["".join(letters.choice(list("abcdefgh"), 6)) for _ in range(80)]
    lines = (json.dumps({"prompt": x, "response": x, "helpfulness": 1}) + "\n" for x in rows)
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "instructions.txt").write_text("ab\ncd\nef\n")
    prompter = {"prompter": str(folder / "model"), "template": "append", "rewrite_tokens": 4}
    return plan.Size(
        table_prompts=20,
        iterations=2, prompts=2, samples=4, rlhf_iterations=1, seeds=(0, 1), lam=0.1, held_out=6,
        foreseen_draws=2,
        answer_tokens=6, rewrite_tokens=4, target=str(folder / "model"), prompters={"tiny": prompter},
        tasks={"short": "brevity:3", "plain": "task_grid.kinds:list_or_plain"},
        source={"dataset": "helpsteer", "data_folder": str(folder)},
        training={"epochs": 1, "lora_rank": 2},
        race={"instructions": str(folder / "instructions.txt"), "budget": 24},
        route={"instructions": str(folder / "instructions.txt")},
        taught=("plain",), teaching={"epochs": 1, "lora_rank": 2}, keeping={"iterations": 2},
    )  # fmt: skip


def arguments(out, **more):
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    given = {
        "only": "",
        "preset": "all",
        "tasks": None,
        "dry_run": False,
        "summary_only": False,
        "publish": None,
    }
    return argparse.Namespace(out=out, **vars(parser.parse_args([])) | given | more)


@pytest.fixture(scope="module")
def whole(size, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert tasks.run(arguments(out), size) == 0
    return out


def read_prompts(size):
    """All prompts that there are."""
    return [row["prompt"] for row in read_json_lines(Path(size.source["data_folder"]) / "train.jsonl")]


def test_what_it_says(size, whole, tmp_path, capsys):
    found = read_json(whole / "results.json")
    assert not found["missing"]
    for name, task in found["tasks"].items():
        assert set(task["mean"]) >= {"none", "sft", "router", "star", "best_of_n", "rloo", "trained", "rlhf"}
        assert ("fixed" in task["mean"]) == bool(task["instruction"]), name
        gain = task["trained and none"]["mean"]
        assert gain["value"] == pytest.approx(
            task["mean"]["trained"]["value"] - task["mean"]["none"]["value"]
        )
        assert gain["value"] == pytest.approx(np.mean([e["value"] for e in task["by seed"]]))
        assert task["trained over"]["none"]["value"] == pytest.approx(gain["value"])
        mean = {arm: e["value"] for arm, e in task["mean"].items()} | {"fixed": np.nan}
        if task["instruction"]:
            mean["fixed"] = task["mean"]["fixed"]["value"]
        for part, one, other in (
            ("one instruction", "fixed", "none"),
            ("reading the prompt", "trained", "fixed"),
            ("fine-tuning", "rlhf", "trained"),
        ):
            realised = task["numbers"][part]["realised"]
            assert (realised is None) == (not task["instruction"] and "fixed" in (one, other))
            assert realised is None or realised["value"] == pytest.approx(mean[one] - mean[other])
        assert task["numbers"]["fine-tuning"]["foreseen"]["lo"] is not None
        assert {b["name"] for b in task["bounds"]} == {"theorem1", "trained", "trained_rewards_only"}
        assert len(task["examples"]) == 3
        over, told = task["reading"]["over the best fixed instruction"], {"told"} & set(task["mean"])
        assert bool(told) == (name == "plain")
        assert set(over) == ({"router", "trained", *told} if task["instruction"] else set())
        for arm, gain in task["reading"]["over half of reading"].items():
            assert (gain is None) == (not told or not task["instruction"])
            half = gain and over[arm]["value"] - over["told"]["value"] / 2
            assert gain is None or gain["value"] == pytest.approx(half)
        for arm, gain in over.items():
            assert gain["value"] == pytest.approx(mean[arm] - mean["fixed"])
    assert len(found["foresight"]) == 2 * (len(results.LAMS) + len(size.seeds))
    counts = results.tally(found["foresight"])
    assert sum(n for name, n in counts.items() if ", " in name) == counts["points"] == 12
    page = (whole / "results.md").read_text()
    (dtype,) = found["dtypes"]
    assert f", in {dtype}" in page
    assert ("tenths of a nat" in page) == (dtype == "bfloat16")
    assert all(f"| {name} |" in page for name in size.tasks)
    for drawn in ("foresight.png", "means.png"):
        assert (whole / drawn).read_bytes()[:4] == b"\x89PNG"
        assert f"({drawn})" in page
    before = (whole / "results.json").read_bytes()
    assert tasks.run(arguments(whole, summary_only=True, publish=tmp_path), size) == 0
    assert (whole / "results.json").read_bytes() == before
    assert (tmp_path / "results.md").read_text() == page


def test_a_prompter_is_taught_what_the_router_picks(size, whole):
    """Pairs of every prompt that is not held out with the router's picks, learned from, and trained on from
    there. Mutant: the pairs are of held-out prompts."""
    here = whole / "plain"
    job = next(job for job in plan.jobs(size, whole) if job.name == "plain/picks")
    prompts = read_prompts(size)
    (whole / "again").mkdir()

    def check(module):
        again = module.Picks(**vars(job) | {"name": "again"})
        assert again.act(whole)
        pairs = {row["prompt"]: row["rewrite"] for row in read_json_lines(whole / "again" / plan.PAIRS)}
        assert set(pairs) == {x for x in prompts if split_of(x) != "test"}
        assert list(pairs.values()) == route.load(here / "route").rewrites(list(pairs))

    check(plan)
    assert (whole / "again" / plan.PAIRS).read_bytes() == (here / "picks" / plan.PAIRS).read_bytes()
    kills(check, mutated(plan, 'split_of(x) != "test"', 'split_of(x) == "test"'))
    said = read_json(whole / "results.json")
    assert set(said["taught"]) == {"plain"}
    of, told = said["taught"]["plain"], said["tasks"]["plain"]
    for arm in ("router", of["over"]):  # the same texts as beside the other arms
        assert of["mean"][arm]["value"] == told["mean"][arm]["value"]
    for arm, gain in of["gain"].items():
        assert gain["value"] == pytest.approx(of["mean"][arm]["value"] - of["mean"][of["over"]]["value"])
    assert of["gain"]["trained"]["value"] == pytest.approx(np.mean([e["value"] for e in of["by seed"]]))
    # What reading earned stands beside what was foreseen of it, where one instruction is there to be beaten.
    earned = {"value": 0.5, "lo": 0.25, "hi": 0.75}
    for over in ("fixed", "none"):
        shown = page.numbers({**said, "taught": {"plain": {"over": over, "gain": {"trained": earned}}}})
        assert ("+0.500 [+0.250, +0.750]" in shown.splitlines()[-1]) == (over == "fixed")
    began = json.loads((here / "taught-1" / "settings.json").read_text())
    assert str(here / "sft" / "prompter") in json.dumps(began)


def test_who_is_told_the_kind_gets_what_earns_most_on_it(whole, size, monkeypatch):
    """On the router's table, of each kind by itself. Mutant: of all prompts together."""
    kind = kinds.Kind("has an a", lambda x: "a" in x)
    monkeypatch.setattr(
        kinds, "lettered", kinds.ByKind(kind, load_reward("ease"), load_reward("brevity")), False
    )
    table = [
        row for row in read_json_lines(whole / "plain" / "route" / "cells.jsonl") if row["kind"] == "table"
    ]
    prompts = {prompt_id(x): x for x in read_prompts(size)}
    job = plan.Told(
        "told", "told", {**size.source, "reward": "task_grid.kinds:lettered", "router": "plain/route"}
    )
    (whole / "told").mkdir()

    def check(module):
        assert module.Told(**vars(job)).act(whole)
        earned = {0: Counter(), 1: Counter()}
        for row in table:
            for name, cells in zip(row["candidates"], row["rewards"], strict=True):
                for x, (reward,) in zip(row["prompts"], cells, strict=True):
                    earned["a" in prompts[x]][name] += reward
        for row in read_json_lines(whole / "told" / route.REWRITES):
            (best, _), *_ = earned["a" in row["x"]].most_common()
            assert row["rewrite"] == f"{row['x']} {best}".strip()

    check(plan)
    kills(check, mutated(plan, "known == k", "known >= 0"))


def test_the_router_rewrites_the_held_out_prompts(size, whole):
    """Those of the other arms, as it picks for them; its table is asked once for all tasks."""
    tables = []
    for task in size.tasks:
        folder = whole / plan.slug(task)
        held = read_json_lines(folder / "rollout" / FILE)
        asked = {
            arm: {row["x"]: row["rewrite"] for row in held if row["arm"] == arm} for arm in ("none", "router")
        }
        assert asked["none"].keys() == asked["router"].keys()
        found = Counter(rewrite.removeprefix(x).strip() for x, rewrite in asked["router"].items())
        facts = read_json(folder / "route" / "route.json")
        assert (dict(facts["picks"]), facts["calls"]) == (found, 20 * 4)
        assert (
            read_json(whole / "results.json")["tasks"][task]["reading"]["router"]["picks"] == facts["picks"]
        )
        tables.append([row["prompts"] for row in read_json_lines(folder / "route" / "cells.jsonl")][:1])
    assert tables[0] == tables[1]


def test_everything_that_tasks_share_is_asked_once(size, whole):
    """The rewrites of ρ_sft are the same for every reward, and so are the answers to them."""
    one, two = (rollouts.read(whole / plan.slug(task) / "rollout" / FILE) for task in size.tasks)
    assert (
        one.logps["logp_reference"][one.rows("sft")] == two.logps["logp_reference"][two.rows("sft")]
    ).all()
    assert not list(whole.glob("**/ppo-*/answers"))
    jobs = plan.jobs(size, whole)
    assert all(work.finished(job, whole) for job in jobs)
    paid = sum(of.answers for of in spent(whole / "answers").values())
    assert paid < sum(plan.asks(job) for job in jobs if "rlhf" not in job.name)


def test_another_reward_of_the_same_texts(size, whole):
    file = whole / "foreseen" / "tiny" / FILE
    own, other = rollouts.read(file), results.rewarded(file, "ease")
    assert (results.rewarded(file, "brevity:3").reward == own.reward).all()
    assert (other.reward != own.reward).any()
    assert (other.prompt == own.prompt).all()


def test_a_training_is_a_point_at_its_own_lambda(size, whole):
    assert len(list(results._foresight(replace(size, lam=0.07), whole, size.tasks))) == 2 * len(results.LAMS)


def test_a_choice_is_not_valued_by_the_answer_that_made_it():
    """Noise gains nothing (4.5 standard errors, false alarm 7e-6); of known rewards the best is taken."""
    noise = np.random.default_rng(0).standard_normal((20_000, 4, 2))

    def fair(module):
        found = module.crossed(noise, 0.1)
        assert abs(found.mean()) <= 4.5 * found.std() / np.sqrt(len(found))
        known = np.broadcast_to(np.array([0.0, 0.2, 1.0])[:, None], (3, 2))
        assert module.crossed(known, 1e-3) == pytest.approx(1.0)
        assert module.crossed(known, 1e9) == pytest.approx(0.4)

    fair(results)
    kills(fair, mutated(results, "(weights * others)", "(weights * rewards)"))
    kills(fair, mutated(results, "np.exp((rewards", "np.exp(-(rewards"))


def test_mistakes_are_one_line(tmp_path, capsys):
    assert tasks.main(["--out", str(tmp_path / "a"), "--only", "nothing"]) == 2
    assert tasks.main(["--out", str(tmp_path / "a"), "--processes", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert tasks.main(["--out", str(tmp_path / "a"), "--dry-run"]) == 0
    assert "reading-ease/ppo-0" in capsys.readouterr().out
    assert tasks.main(["--out", str(tmp_path / "a"), "--tasks", "nothing"]) == 2
    assert "--tasks 'nothing': choose from 'reading ease', " in capsys.readouterr().err
    assert tasks.main(["--out", str(tmp_path / "a"), "--tasks", "list or plain", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "list-or-plain/ppo-0" in said
    assert "reading-ease" not in said
    assert tasks.main(["--out", str(tmp_path / "a"), "--preset", "reading", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "list-plain-for-a-child/taught-2" in said
    assert "rloo" not in said
    assert not list(Path(tmp_path / "a").iterdir())


def test_tasks_by_who_asks_have_their_own_prompts(size, tmp_path):
    """Half of them a child's; reference rollouts of the trained prompter alone. Mutant: all are a child's."""
    both = replace(size, tasks={"short": "brevity:3", "list, plain for a child": "ease"})
    plan.write_asked(size, tmp_path)
    assert not (tmp_path / plan.ASKED).exists()

    def check(module):
        module.write_asked(both, tmp_path)
        said = [row["prompt"] for row in read_json_lines(tmp_path / plan.ASKED)]
        assert sum(kinds.FROM_A_CHILD.of(said)) == (len(said) + 1) // 2
        bare = {x.removeprefix(who) for x in said for who in kinds.WHO if x.startswith(who)}
        assert len(bare) == len(set(said)) == len(said) > 400

    check(plan)
    kills(
        check, mutated(plan, "kinds.asked(instructions())", "['A child asks: ' + x for x in instructions()]")
    )
    jobs = {job.name: job.options for job in plan.jobs(both, tmp_path)}
    own = {name for name, options in jobs.items() if options["dataset"] == str(tmp_path / plan.ASKED)}
    assert own == {name for name in jobs if "who" in name or name.startswith("list-plain-for-a-child/")}
    assert {"foreseen/tiny", "resampled/tiny", "foreseen/who/tiny", "resampled/who/tiny"} <= set(jobs)
    alone = replace(both, tasks={"list, plain for a child": "ease"})
    assert "foreseen/tiny" not in {job.name for job in plan.jobs(alone, tmp_path)}


def test_each_kind_of_requests_has_its_reward():
    """By its name, as the grid's jobs give it. Mutant: each kind has the other's."""
    x = ["Name three birds.", "Name a bird.", "Write of birds."]
    y = ["1. A crow\n2. An owl", "Considerable ornithological responsibility."]

    def check(module):
        assert module.SEVERAL.of(x).tolist() == [1, 0, 0]
        assert module.MAKING.of([*x, ""]).tolist() == [0, 0, 1, 0]
        for kind, names in ((module.SEVERAL, ("list", "ease")), (module.MAKING, ("brevity", "ease"))):
            parts = [load_reward(name) for name in names]
            found = module.ByKind(kind, *parts).score(np.repeat(x, 2), y * 3)
            plain = [parts[1 - k].score(["x"], [said])[0] for k in kind.of(x) for said in y]
            np.testing.assert_array_equal(found, plain)

    check(kinds)
    kills(check, mutated(kinds, "((1, self.one), (0, self.other))", "((0, self.one), (1, self.other))"))
    reward = load_reward("task_grid.kinds:list_or_plain")
    assert reward.score([x[0], x[0]], y).tolist() == [1.0, 0.0]
    assert (reward.low, reward.high) == (0.0, 1.0)
    for name in plan.TASKS.values():
        load_reward(name)
