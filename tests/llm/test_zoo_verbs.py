"""Every verb on every model family, each in seconds on a tiny random model."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import zoo

from alignpro.commands import main
from alignpro.llm.arms import demo
from alignpro.llm.arms.enumerate import Enumeration, enumerate_models
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.models.load import load_model
from alignpro.llm.policies.tree import PrefixTree, leaf_probabilities
from alignpro.llm.rewards import opening
from alignpro.llm.training.tree import train

FAMILIES = list(zoo.FAMILIES)
NIGHTLY = bool(os.environ.get("ALIGNPRO_NIGHTLY"))
"""Whether each family meets each algorithm, and the whole demo, and not a share of them."""
NO_CLASSIFIER = ("lfm2",)
NEAR = 1e-4


class Letters:
    """`zoo.letters` as a packaged reward."""

    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array(zoo.letters(prompts, responses))

    def describe(self):
        return {"name": "letters"}


def run(options, **paths):
    """`alignpro` with these options, in which {name} stands for a path."""
    arguments = [word.format(**paths) for word in options.split()]
    assert main.main(arguments) == 0, options


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A reward that can be imported, and a file of prompts."""
    monkeypatch.syspath_prepend(str(zoo.Path(zoo.__file__).parent))
    return {"at": tmp_path, "prompts": zoo.write_prompts(tmp_path / "prompts.jsonl")}


WORLD = "--target {model} --reward zoo:letters@0,1 --answer-tokens 6 --prompts-file {prompts}"
# So small a learning rate that no step of the round is clipped, the first or a later one.
SHORT = "--iterations 1 --prompts-per-round 2 --draws 2 --epochs 1 --rewrite-tokens 5 --learning-rate 1e-7"
PAPER = (
    "--preset paper --prompts-per-round 4 --minibatches 2 --iterations 1 "
    "--rewrite-tokens 5 --learning-rate 1e-7"
)
TRAININGS = {
    "ppo": SHORT + " --minibatches 2",
    "rloo": SHORT + " --algorithm rloo --policy-dtype bfloat16",
    "grpo": SHORT + " --algorithm grpo --microbatches 2",
    "rlhf": SHORT + " --policy rlhf",
    "paper": PAPER + " --gradient-checkpointing",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_verb_runs(name, animals, world, capsys):
    """Route, rewrite, sft, train in every way, merge, resample, rollout, judge."""
    here = world | {"model": animals(name)}
    texts = [json.loads(line)["prompt"] for line in here["prompts"].read_text().splitlines()]
    texts += [f"Name painter number {i}." for i in range(12)]
    here["more"], here["list"], here["pairs"] = (
        here["at"] / n for n in ("more.jsonl", "list.txt", "pairs.jsonl")
    )
    here["more"].write_text("".join(json.dumps({"prompt": x}) + "\n" for x in texts))
    here["list"].write_text("Be brief.\nSay aaa.\n")
    run(
        f"route --out {{at}}/route {WORLD.replace('prompts}', 'more}')} --instructions-file {{list}} "
        "--train-prompts 8 --eval-prompts 5 --held-out-answers 1",
        **here,
    )
    assert json.loads((here["at"] / "route" / "route.json").read_text())["reader"] == str(here["model"])
    told = capsys.readouterr().err
    run("rewrite {at}/route --prompts-file {more} --json", **here)
    printed = capsys.readouterr()
    here["pairs"].write_text(printed.out)
    assert [json.loads(line)["x"] for line in here["pairs"].read_text().splitlines()] == texts
    run("sft --out {at}/sft --prompter {model} --pairs {pairs} --epochs 1 --rewrite-tokens 64", **here)
    # TRL's two algorithms differ from PPO in nothing that a family could: each family meets one of them.
    left_out = set() if NIGHTLY else {("rloo", "grpo")[FAMILIES.index(name) % 2]}
    for run_name in set(TRAININGS) - left_out:
        # One of them goes on from what the router taught.
        begun = "{at}/sft" if run_name in ("rloo", "grpo") else "{model}"
        run(f"train --out {{at}}/{run_name} --prompter {begun} {WORLD} {TRAININGS[run_name]}", **here)
        first = json.loads((here["at"] / run_name / "metrics.jsonl").read_text().splitlines()[0])
        assert abs(first.get("ppo/kl_k1", first.get("kl"))) < 1e-3
        clips = [v for k, v in first.items() if "clip_fraction" in k or k == "clip_ratio/region_mean"]
        assert clips == [0.0]
        assert json.loads((here["at"] / run_name / "settings.json").read_text())["read"]["masks"]
    run("merge {at}/ppo --out {at}/merged", **here)
    assert main.main(["rewrite", str(here["at"] / "merged"), "How do plants grow?", "--draws", "2"]) == 0
    run(
        f"resample --out {{at}}/resample --prompter {{model}} {WORLD} --proposals 2 --rewrite-tokens 5 "
        "--split train --prompts 2",
        **here,
    )
    run(
        f"rollout --out {{at}}/rollout {WORLD} --arms none sft star --proposals 2 --draws 2 --answers 1 "
        "--trained {at}/ppo --rlhf {at}/rlhf --prompts 2 --dtype float32",
        **here,
    )
    for line in (here["at"] / "rollout" / "rollouts.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["arm"] == "sft":
            assert row["logp_prompter"] == pytest.approx(row["logp_reference"], abs=NEAR)
    run(
        "judge {at}/rollout/rollouts.jsonl --arms sft none --out {at}/judge --judge {model} --forced "
        "--dtype float32",
        **here,
    )
    said = (told + printed.err + capsys.readouterr().err).lower()
    assert "warning" not in said
    assert "deprecat" not in said


SIZES = EnumerationSettings(
    # Random models seldom end a turn: candidates are long and hot.
    rewrites=3,
    responses=3,
    rewrite_tokens=160,
    response_tokens=6,
    candidate_temperature=4.0,
)
PROMPTS = ["How do plants grow?", "Name a painter."]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_demos_model_work(name, animals, tmp_path):
    """Enumeration and PPO on the trees: all that the demo does with a model."""
    model, tokenizer = load_model(animals(name), device="cpu")
    found = enumerate_models(model, tokenizer, model, tokenizer, PROMPTS, Letters(), SIZES)
    (p,) = leaf_probabilities(model, [found.prompt_ids[0]], [PrefixTree(found.rewrite_ids[0])])
    np.testing.assert_allclose(found.instance.prior[0, found.rows(0)], p, rtol=1e-3)
    settings = replace(demo.QUICK.training, iterations=1, samples=8, epochs=1, learning_rate=1e-7)
    policies = []
    trained = train(
        model,
        tokenizer,
        found.task(),
        settings,
        tmp_path,
        evaluate=lambda policy: policies.append(policy) or {},
    )
    np.testing.assert_allclose(policies[0][0], p, rtol=1e-3)  # a fresh adapter changes nothing
    np.testing.assert_allclose(trained.policy[0], p, rtol=1e-2)


@pytest.mark.parametrize("name", FAMILIES if NIGHTLY else ["gemma3", "qwen3_5"])
def test_the_whole_demo(name, animals, tmp_path, monkeypatch):
    monkeypatch.setitem(opening.REWARDS, "letters", Letters)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(PROMPTS))
    settings = replace(
        demo.QUICK,
        model=str(animals(name)),
        reward="letters",
        prompts=2,
        prompts_file=str(texts),
        enumeration=SIZES,
        training=replace(demo.QUICK.training, iterations=1, samples=8),
    )
    content = demo.run(tmp_path / "demo", settings)
    assert content.curve[0]["exact"]["kl_to_sft"] == pytest.approx(0, abs=1e-6)
    assert content.bounds["theorem1"]["star"]["verdict"] == "holds"
    assert Enumeration.load(tmp_path / "demo").prompts == tuple(PROMPTS)


@pytest.mark.parametrize("kind", zoo.CLASSIFIERS)
def test_reward_models_of_both_kinds(kind, animals, world):
    here = world | {"model": animals("qwen2_5"), "reward": animals(kind)}
    run(
        "resample --out {at}/out --prompter {model} --target {model} --reward {reward}@squash:0,2 "
        "--prompts-file {prompts} --split train --prompts 2 --proposals 2 --rewrite-tokens 5 "
        "--answer-tokens 6",
        **here,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_reward_models_from_each_family(name, animals, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    rows = ({"prompt": f"How, {i}?", "chosen": "aaa", "rejected": "zzz"} for i in range(24))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["reward-model", "--base", str(animals(name)), "--pairs", str(pairs)]
    arguments += ["--out", str(tmp_path / "reward"), "--device", "cpu", "--pairs-per-step", "8"]
    status = main.main(arguments)
    said = capsys.readouterr().err
    if name in NO_CLASSIFIER:  # transformers has no classifier of this architecture
        assert status == 2
        assert "transformers has no classifier of its architecture; choose another" in said.splitlines()[-1]
    else:
        assert status == 0, said


@pytest.mark.parametrize("frozen", ["llama3_2", "qwen2_5"])
@pytest.mark.parametrize("prompter", ["phi3_5", "qwen2_5"])
def test_the_papers_pairs_train_as_the_paper_has_it(prompter, frozen, animals, world):
    """One rewrite of each prompt, several steps a pass; the paper's prompters before its frozen models."""
    here = world | {"model": animals(frozen), "prompter": animals(prompter)}
    run(
        "train --preset paper --prompts-per-round 4 --minibatches 2 --iterations 1 "
        "--rewrite-tokens 6 --out {at}/out "
        f"--prompter {{prompter}} {WORLD}",
        **here,
    )
    (line,) = (here["at"] / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 8


def test_no_warning_of_a_library_reaches_a_user(animals, world):
    """With every warning of Python's shown; TRL, transformers and PEFT have some for every run."""
    here = world | {"model": animals("qwen2_5")}
    verbs = [
        f"train --out {{at}}/a --prompter {{model}} {WORLD} {SHORT}",
        f"rollout --out {{at}}/b {WORLD} --prompts 2 --trained {{at}}/a",
    ]
    given = [[word.format(**here) for word in verb.split()] for verb in verbs]
    program = "import sys, json\nfrom alignpro.commands import main as cli\n"
    program += "sys.exit(max(cli.main(verb) for verb in json.loads(sys.argv[1])))"
    command = [sys.executable, "-W", "default", "-c", program, json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": str(zoo.Path(zoo.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "Warning" in line or "deprecat" in line.lower()]
    assert not told
