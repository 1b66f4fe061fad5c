"""`alignpro demo --task`: what it asks for, what it shows, and that an interrupted one goes on."""

import json
from dataclasses import replace

import pytest
from mutants import kills, mutated

from alignpro import rollouts
from alignpro.commands import demo_task, main
from alignpro.estimation.compare import compare
from alignpro.files import read_json_lines
from alignpro.llm.arms import task as tasks
from alignpro.llm.data import packaged
from alignpro.llm.data.split import split_of
from alignpro.llm.models import catalogue, recipes
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training import open_ended

NAME = "plain-language"


@pytest.fixture
def small(made_recipe, monkeypatch):
    """The task in seconds, on tiny models."""
    row = tasks.TASKS[NAME]
    training = replace(row.training, iterations=3, prompts=2, samples=4, max_tokens=8, learning_rate=1e-2)
    monkeypatch.setitem(tasks.TASKS, NAME, replace(row, training=training, held_out=12, answer_tokens=6))
    return catalogue.RECIPES[row.prompter].base


def check_result(module, folder):
    """Examples are the first held-out prompts; shares are of rewrites, and each arm's add up to 1."""
    file, task = folder / "rollouts" / "rollouts.jsonl", tasks.TASKS[NAME]
    lines = read_json_lines(folder / "training" / "metrics.jsonl")
    found = module.result(NAME, task, file, lines)
    held_out = [x for x in packaged.instructions() if split_of(x) == "test"]
    assert [e.x for e in found.examples] == held_out[:3]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for e in found.examples:
        mine = [r for r in rows if r["x"] == e.x and r["draw"] == r["answer"] == 0]
        (before,) = (r for r in mine if r["arm"] == "none")
        (after,) = (r for r in mine if r["arm"] == "trained")
        assert (e.answer, e.reward) == (before["response"], before["reward"])
        assert (e.rewrite, e.answer_after, e.reward_after) == tuple(
            after[name] for name in ("rewrite", "response", "reward")
        )
        assert before["rewrite"] == e.x
    for share, arm in (("before", "sft"), ("after", "trained")):
        assert sum(getattr(a, share) for a in found.added) == pytest.approx(1)
        rewrites = [r["rewrite"] for r in rows if r["arm"] == arm and r["answer"] == 0]
        assert len(rewrites) == 24
        for a in found.added:
            of = [x for x in rewrites if any(x == f"{p} {a.text}".strip() for p in held_out)]
            assert getattr(a, share) == pytest.approx(len(of) / 24)
    assert [a.after for a in found.added] == sorted((a.after for a in found.added), reverse=True)
    both = rollouts.read(file)
    assert found.comparison == compare(both, ["none", "sft", "trained"])
    assert found.over_start == compare(both, ["sft", "trained"]).against["trained"]
    assert [line["step"] for line in found.metrics] == [2, 4, 6]


def test_a_task_from_start_to_page(small, tmp_path, monkeypatch, capfd):
    """Cut short in training, and gone on with; that training and rollouts end the same, their tests show."""
    whole = tmp_path / "whole"
    run = ["demo", "--task", NAME, "--model", str(small), "--out", str(whole), "--seed"]
    draw, rounds = open_ended.OpenRollouts.draw, []

    def interrupted(self, *positional):
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return draw(self, *positional)

    with monkeypatch.context() as patch:
        patch.setattr(open_ended.OpenRollouts, "draw", interrupted)
        assert main.main([*run, "1"]) == 130
        told = capfd.readouterr().err
        assert (
            f"{NAME}: 3 rounds of 2 x 4 rewrites, 24 answers of at most 6 tokens; then 144 answers at" in told
        )
        assert "instructions-sft is trained first" not in told
        assert main.main([*run, "1"]) == 2
        assert "holds a run of demo (" in capfd.readouterr().err
        assert main.main([*run, "2", "--resume"]) == 2
        assert "training.seed = 1, not 2" in capfd.readouterr().err
        assert main.main([*run, "1", "--resume"]) == 0
        assert len(rounds) == 4  # two of them after the interruption
    assert "add '" in capfd.readouterr().out
    check_result(tasks, whole)
    for right, wrong in {
        'if row["answer"]:': "if False:",
        'if not row["draw"]:': "if row['draw']:",
        'arms["none"], arms["trained"]': 'arms["sft"], arms["trained"]',
        "texts[text][1], texts[text][0])": "texts[text][0], texts[text][1])",
        'compare(found, ["sft", "trained"])': 'compare(found, ["none", "trained"])',
        "list(first.items())[:examples]": "list(first.items())[-examples:]",
    }.items():
        kills(lambda module: check_result(module, whole), mutated(tasks, right, wrong))
    # The prompter that it was trained from is named, not where it lies in a cache, and is the reference.
    prompter = json.loads((whole / "training" / "prompter" / "prompter.json").read_text())
    assert prompter["base"] == "instructions-sft"
    rows = read_json_lines(whole / "rollouts" / "rollouts.jsonl")
    assert {row["prompter"] for row in rows if row["arm"] == "sft"} == {"instructions-sft"}
    assert all(row["logp_reference"] < 0 for row in rows if row["arm"] == "trained")
    # Opened on a base of another version, it is said.
    prompter["facts"]["recipe"]["version"] = "another"
    (whole / "training" / "prompter" / "prompter.json").write_text(json.dumps(prompter))
    Prompter.from_pretrained(whole / "training" / "prompter")
    assert "was trained from another version of instructions-sft" in capfd.readouterr().err
    # What is seen first, in this order; and a mutant, in which it is not.
    html = (whole / "report.html").read_text()

    def check_order(html):
        order = [
            "Gain over no prompter",
            "Before and after",
            "What the prompter adds",
            "How it learned",
            "Arms",
        ]
        places = [html.index(f">{word}<") for word in order]
        assert places == sorted(places)

    check_order(html)
    kills(check_order, html.replace(">Before and after<", "><") + ">Before and after<")


def test_the_tasks(capfd, tmp_path):
    for name, task in tasks.TASKS.items():
        assert task.prompter in catalogue.RECIPES
        assert task.quick().training.iterations < task.training.iterations
        assert recipes.home(task.prompter).name.startswith(task.prompter)
        assert "is trained first" in demo_task.cost(name, task, True)
    for options, said in {
        "--task poems": f"task 'poems': choose from {NAME}",
        f"--task {NAME} --beta 1": "--beta: is not for --task; leave it out",
        f"--task {NAME} --model gone": "model 'gone': no such folder",
    }.items():
        assert main.main(["demo", "--out", str(tmp_path / "x"), *options.split()]) == 2
        assert said in capfd.readouterr().err
