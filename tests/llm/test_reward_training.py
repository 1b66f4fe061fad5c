"""Reward learning by eq. (1): it learns, measures on held-out prompts, resumes exactly, and is a reward."""

import json
import math
import random
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from kept import lines
from mutants import kills
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification
from trl import RewardTrainer

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.estimation.winrate import wilson
from alignpro.files import flaw
from alignpro.llm.data import split
from alignpro.llm.data.own import read_pairs
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.models import configure, load
from alignpro.llm.rewards import accuracy, opening
from alignpro.llm.rewards.classifier import SequenceReward
from alignpro.llm.training import reward as reward_training
from alignpro.llm.training.pair_settings import RewardSettings
from alignpro.llm.training.reward import train_reward


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def raw_score(model, ids):
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


def letter_pairs(n, seed=0, swap=False):
    """Random strings; the one with more a's is preferred (with `swap`, the other)."""
    rng = random.Random(seed)

    def text(k):
        return "".join(rng.choice("abcdefgh") for _ in range(k))

    pairs = []
    while len(pairs) < n:
        x, *answers = text(6), text(8), text(8)
        few, many = sorted(answers, key=lambda y: y.count("a"))
        if few.count("a") < many.count("a"):
            chosen, rejected = (few, many) if swap else (many, few)
            pairs.append(PreferencePair(x, chosen, rejected, "letters", split.split_of(x)))
    return pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("base") / "tiny", *configure.tiny_model())


QUICK = RewardSettings(learning_rate=3e-3, epochs=2, batch_size=32, max_tokens=64, lora_rank=0)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "reward"
    return out, train_reward(letter_pairs(900), base, out, QUICK, device="cpu").reward


def test_training_learns_the_preference_and_the_swapped_mutant_its_opposite(base, trained, tmp_path):
    """A reward that knows nothing passes the first check with probability 2.5% (one side of Wilson's 95%)."""
    facts = trained[1].facts
    assert facts["test_accuracy"]["lo"] > 0.5
    assert facts["test_loss"] < math.log(2)
    assert facts["test_accuracy"]["prompts"] == facts["prompts"]["test"] > 100
    swapped = train_reward(
        letter_pairs(900, swap=True), base, tmp_path / "swapped", QUICK, device="cpu"
    ).reward
    true = letter_pairs(900)
    mutant = accuracy.accuracy(swapped, [p for p in true if p.split == "test"])
    assert mutant["hi"] < 0.5


def test_the_measures_are_of_held_out_prompts_by_equation_1(trained):
    """Recomputed from the reward's scores without the class's own sums."""
    reward, pairs = trained[1], letter_pairs(900)
    assert reward.facts["pairs"] == {
        f"letters {part}": sum(p.split == part for p in pairs) for part in sorted(split.SPLITS)
    }
    for part in ("validation", "test"):
        some = [p for p in pairs if p.split == part]
        margins = [
            reward.logits([p.prompt], [p.chosen])[0] - reward.logits([p.prompt], [p.rejected])[0]
            for p in some
        ]
        loss = sum(math.log1p(math.exp(-m)) for m in margins) / len(margins)
        assert reward.facts[f"{part}_loss"] == pytest.approx(loss, abs=1e-5)
        hits = {}
        for p, m in zip(some, margins, strict=True):
            hits.setdefault(p.prompt, []).append(m > 0)
        value = np.mean([np.mean(h) for h in hits.values()])
        assert reward.facts[f"{part}_accuracy"]["value"] == pytest.approx(value, abs=1e-9)
    # Training saw other prompts: there the same measure is better.
    assert reward.facts["train_accuracy"]["value"] > reward.facts["test_accuracy"]["value"]


def test_the_squash_uses_the_range(trained):
    reward = trained[1]
    train = [p for p in letter_pairs(900) if p.split == "train"]
    scores = np.concatenate(
        [
            reward.score([p.prompt for p in train], [getattr(p, k) for p in train])
            for k in ("chosen", "rejected")
        ]
    )
    assert np.median(scores) == pytest.approx(0.5, abs=1e-6)
    assert np.quantile(scores, 0.9) - np.quantile(scores, 0.1) > 0.3
    assert ((scores > 0.01) & (scores < 0.99)).mean() > 0.95


def test_a_trained_reward_is_saved_as_safetensors_and_loaded_by_name(trained):
    out, reward = trained
    assert {p.suffix for p in out.iterdir()} <= {".json", ".jsonl", ".safetensors", ".jinja"}
    pairs = letter_pairs(20, seed=5)
    prompts, responses = [p.prompt for p in pairs], [p.chosen for p in pairs]
    for again in (SequenceReward.load(out, device="cpu"), opening.load_reward(str(out), device="cpu")):
        np.testing.assert_allclose(
            again.score(prompts, responses), reward.score(prompts, responses), atol=1e-6
        )
        assert again.describe()["training"] == reward.describe()["training"]
        assert again.max_tokens == 64
    wider = SequenceReward.load(out, "clip:-1,1", device="cpu")
    assert (wider.low, wider.high) == (-1.0, 1.0)
    text = (out / "reward.json").read_text()
    assert str(out.parent) not in text
    # Any transformers program reads it as well.
    plain = AutoModelForSequenceClassification.from_pretrained(out)
    ids = reward.encode(prompts[0], responses[0])["input_ids"]
    assert raw_score(plain, ids) == pytest.approx(reward.logits(prompts[:1], responses[:1])[0], abs=1e-5)


def test_an_adapter_is_merged_and_training_is_deterministic(base, tmp_path):
    settings = RewardSettings(learning_rate=1e-2, epochs=1, batch_size=32, max_tokens=64, lora_rank=4)
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    pairs = letter_pairs(200)
    one, two = (train_reward(pairs, base, tmp_path / str(i), settings, device="cpu").reward for i in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.facts == two.facts
    assert isinstance(one.model, LlamaForSequenceClassification)  # and no adapter around it
    names = one.model.state_dict().keys()
    assert not any("lora" in name for name in names)
    untouched = load.load_model(base, device="cpu")[0].state_dict()
    moved = {n for n in names if n in untouched and not torch.equal(one.model.state_dict()[n], untouched[n])}
    assert any("q_proj" in n for n in moved)
    assert not any("embed" in n for n in moved)
    other = train_reward(
        pairs, base, tmp_path / "other", RewardSettings(**{**one.facts["settings"], "seed": 1}), device="cpu"
    ).reward
    assert other.facts["test_loss"] != one.facts["test_loss"]
    # Less memory, the same training: the last step of the epoch is no whole one.
    losses = [
        [line["loss"] for line in train_reward(pairs, base, tmp_path / name, settings, device="cpu").metrics]
        for name, settings in (
            ("whole", settings),
            ("parts", replace(settings, microbatches=4)),
            ("again", replace(settings, gradient_checkpointing=True)),
        )
    ]
    np.testing.assert_allclose(losses[1][:-1], losses[0][:-1], rtol=1e-4)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-4)
    heads = [reward_training._base(base, seed)[0].score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_interrupted_and_resumed_equals_uninterrupted(lora_rank, base, tmp_path, monkeypatch):
    """To the bit, facts and metrics too; a checkpoint cut short while being written is not used."""
    settings = RewardSettings(
        learning_rate=3e-3, epochs=1, batch_size=16, max_tokens=64, lora_rank=lora_rank, save_every=3
    )
    pairs = letter_pairs(160)
    n_steps = math.ceil(sum(p.split == "train" for p in pairs) / 16)
    assert n_steps > 6

    def fit(out, **options):
        return train_reward(pairs, base, tmp_path / out, settings, device="cpu", **options).reward

    whole = fit("whole")
    step = RewardTrainer.training_step
    taken = []

    def cut(self, *positional, **named):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *positional, **named)

    def counted(self, *positional, **named):
        taken.append(self.state.global_step)
        return step(self, *positional, **named)

    out = tmp_path / "cut"
    monkeypatch.setattr(RewardTrainer, "training_step", cut)
    with pytest.raises(KeyboardInterrupt):
        fit("cut")
    checkpoints = out / reward_training.CHECKPOINTS
    assert [p.name for p in checkpoints.iterdir()] == ["checkpoint-3"]
    assert not (out / "reward.json").exists()
    (checkpoints / "checkpoint-4").mkdir()
    for changed, says in (
        ({"settings": replace(settings, seed=1)}, r"was started with settings\.seed = 0, not 1"),
        ({"pairs": pairs[:-1]}, r"was started with pairs\."),
        ({"template": "{prompt} {response}"}, r"was started with template = None, not \{prompt\}"),
    ):
        arguments = {"pairs": pairs, "settings": settings, "template": None} | changed
        with pytest.raises(AlignProError, match=says):
            train_reward(model=base, out=out, device="cpu", resume=True, **arguments)
    with pytest.raises(AlignProError, match=r"cut: holds a run of reward-model \(base .* --resume, "):
        fit("cut")
    # The disk fails at the very end: what was trained is kept. Mutants: beginning again, which ends in the
    # same result, and checkpoints that are never complete.
    monkeypatch.setattr(RewardTrainer, "training_step", counted)
    (out / "model.safetensors").mkdir()
    with pytest.raises(AlignProError, match=r"^cannot write .*cut \(.*free space and resume"):
        fit("cut", resume=True)
    assert taken == list(range(3, n_steps))
    (out / "model.safetensors").rmdir()
    resumed = fit("cut", resume=True)
    assert taken == list(range(3, n_steps))

    def same(other):
        a, b = whole.model.state_dict(), other.model.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)

    assert same(resumed)
    assert resumed.facts == whole.facts
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, n_steps + 1))
    assert whole.facts["optimizer_loss"] == pytest.approx(np.mean([line["loss"] for line in lines]))
    # Nothing of the checkpoints is left, and resuming what is finished changes nothing.
    assert not checkpoints.exists()
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    again = fit("cut", resume=True)
    assert same(again)
    assert (again.facts, again.name, again.bounded.bounds) == (whole.facts, "cut", whole.bounded.bounds)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert taken == list(range(3, n_steps))

    # Its checkpoints are gone, so that a file that was damaged since cannot be made again.
    def check(find):
        monkeypatch.setattr(reward_training, "flaw", find)
        for name in ("model.safetensors", "tokenizer.json", "metrics.jsonl"):
            data = bytearray(before[name])
            data[len(data) // 2] ^= 1
            (out / name).write_bytes(data)
            try:
                fit("cut", resume=True)
            except AlignProError as error:
                assert f"{name} has sha256" in str(error)  # noqa: PT017 - a mutant must fail the assertion
            else:
                raise AssertionError(name)
            (out / name).write_bytes(before[name])

    check(flaw)
    kills(check, lambda folder, files: None)


def test_mistakes_cost_no_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_training, "_fit", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(reward_training, "_base", lambda *_: pytest.fail("loaded"))
    pairs = letter_pairs(50)
    crossing = [*pairs, PreferencePair(pairs[0].prompt.upper(), "a", "b", "s", "validation")]
    assert pairs[0].split != "validation"
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    for arguments, options, match in (
        ((crossing, base, tmp_path / "o"), {}, "and in another"),
        (([p for p in pairs if p.split == "train"], base, tmp_path / "o"), {}, "split test"),
        (([], base, tmp_path / "o"), {}, "split train"),
        ((pairs, base, used), {}, "not empty"),
        ((pairs, base, used / "file"), {}, "cannot write"),
        ((pairs, tmp_path / "nothing", tmp_path / "o"), {}, "no such folder"),
        ((pairs, base, tmp_path / "o"), {"template": "pair"}, "template"),
        ((pairs, base, tmp_path / "o"), {"device": "abacus"}, "device"),
        ((tmp_path / "none.jsonl", base, tmp_path / "o"), {}, "cannot read"),
    ):
        with pytest.raises(AlignProError, match=match):
            train_reward(*arguments, QUICK, **options)
    for bad in (
        {"learning_rate": 0.0},
        {"epochs": math.nan},
        {"batch_size": 0},
        {"max_tokens": 0},
        {"lora_rank": -1},
        {"centre": -1.0},
        {"seed": -1},
    ):
        with pytest.raises(AlignProError, match=next(iter(bad))):
            RewardSettings(**bad)


def test_training_that_diverges_stops(base, tmp_path):
    settings = RewardSettings(learning_rate=1e30, epochs=5, batch_size=8, max_tokens=64, lora_rank=0)
    with pytest.raises(AlignProError, match=r"training diverged|every reward must be finite"):
        train_reward(letter_pairs(200), base, tmp_path / "lost", settings, device="cpu")
    assert not (tmp_path / "lost" / "reward.json").exists()


def test_pairs_are_read_line_by_line(base, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "more": 1} for p in letter_pairs(3)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    read = read_pairs(path)
    assert [(p.prompt, p.chosen, p.rejected) for p in read] == [
        (r["prompt"], r["chosen"], r["rejected"]) for r in rows
    ]
    assert all((p.source, p.split) == ("mine", split.split_of(p.prompt)) for p in read)
    good = json.dumps(rows[0])
    for bad in (
        "{",
        "[]",
        "3",
        '{"prompt": "x", "chosen": "a"}',
        '{"prompt": "x", "chosen": "a", "rejected": 3}',
        '{"prompt": " ", "chosen": "a", "rejected": "b"}',
        '{"prompt": "x", "chosen": "a", "rejected": "a"}',
    ):
        path.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(AlignProError, match=r"mine\.jsonl, line 3"):
            read_pairs(path)
    path.write_text("\n")
    with pytest.raises(AlignProError, match="empty"):
        read_pairs(path)


# --- the command line ---


COMMANDED = [*{p.prompt: p for p in letter_pairs(300)}.values()]  # a pair for each prompt


@pytest.fixture
def call(base, tmp_path, capsys):
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in COMMANDED]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = shlex.split(
        "--learning-rate 3e-3 --epochs 2 --pairs-per-step 32 --sample-tokens 64 --lora-rank 0 --device cpu"
    )

    def run(*arguments, out="out"):
        command = ["reward-model", "--base", str(base), "--pairs", str(file), "--out", str(tmp_path / out)]
        status = main.main([*command, *options, *arguments])
        return status, capsys.readouterr()

    return run


def test_a_reward_model_from_the_command_line_judges_training(call, base, tmp_path, capsys, monkeypatch):
    pairs = COMMANDED
    step = RewardTrainer.training_step

    def cut(self, *positional, **named):
        if self.state.global_step == 9:
            raise KeyboardInterrupt
        return step(self, *positional, **named)

    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "training_step", cut)
        assert call("--save-every", "4", out="it's mine")[0] == 130
    status, said = call("--save-every", "4", "--resume", out="it's mine")
    assert status == 0, said.err
    n = {part: sum(p.split == part for p in pairs) for part in split.SPLITS}
    sizes = f"({n['train']} train, {n['validation']} validation, {n['test']} test)"
    work = f"{2 * math.ceil(n['train'] / 32)} steps of 32 pairs, all weights, samples of at most 64 tokens"
    assert f"{len(pairs)} pairs of {len(pairs)} prompts {sizes}; {work}" in said.err
    # What is printed is what the folder's reward does on prompts it never saw.
    line = next(line for line in said.out.splitlines() if line.startswith("test: accuracy"))
    value, lo, hi = map(float, re.match(r"test: accuracy (\S+) \[(\S+), (\S+)\]", line).groups())
    reward = SequenceReward.load(tmp_path / "it's mine", device="cpu")
    test = [p for p in pairs if p.split == "test"]
    xs = [p.prompt for p in test]
    better = reward.logits(xs, [p.chosen for p in test]) > reward.logits(xs, [p.rejected for p in test])
    assert value == pytest.approx(better.mean(), abs=6e-4)
    assert (lo, hi) == pytest.approx(wilson(better.mean(), n["test"]), abs=6e-4)
    assert f"(95%, {n['test']} prompts)" in line
    # The flag that is printed is the one to use.
    option, name = shlex.split(re.search(r"train with (--reward .+) \(bounds", said.out)[1])
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\ndef\n")
    small = shlex.split(
        "--iterations 1 --prompts-per-round 2 --draws 4 --epochs 1 --rewrite-tokens 4 --answer-tokens 4"
    )
    command = ["train", "--out", str(tmp_path / "run"), "--prompter", str(base), "--target", str(base)]
    status = main.main([*command, "--prompts-file", str(prompts), *small, option, name])
    assert status == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert 0 < metrics["score"] < 1
    assert len(lines(tmp_path / "run" / "answers")) == 8
    assert not [p for p in (tmp_path / "it's mine").rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_mistakes_at_the_command_line_are_one_line(call, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for arguments, says in (
        (["--out", str(tmp_path / "used")], "used: it is not empty; name a new folder, or resume"),
        (["--pairs", str(tmp_path / "none.jsonl")], "none.jsonl: cannot read it (No such file or directory)"),
        (["--base", str(tmp_path / "none")], "no such folder"),
        (["--epochs", "0"], "epochs 0.0: give a positive, finite number"),
        (["--save-every", "0"], "save_every 0: give a whole number of at least 1"),
        (
            ["--sample-template", "{prompt}"],
            "sample_template '{prompt}': write {prompt} and {response} once each",
        ),
        (["--device", "abacus"], "device 'abacus'"),
    ):
        status, said = call(*arguments)
        assert status == 2
        lines = [line for line in said.err.splitlines() if "error" in line]
        assert len(lines) == 1
        assert says in lines[0]
        assert "Traceback" not in said.err
        assert not (tmp_path / "out" / "settings.json").exists()
