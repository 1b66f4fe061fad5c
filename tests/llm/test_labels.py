"""Classifiers with several labels: which output is the reward, and whether as a probability."""

import itertools
import json

import numpy as np
import pytest
import torch
from mutants import kills, mutated
from test_reward_models import X, Y, gemma, save

from alignpro.commands import main
from alignpro.commands.opening import World
from alignpro.commands.options import EnvironmentSettings, RewardModelSettings
from alignpro.errors import AlignProError
from alignpro.llm.rewards import classifier
from alignpro.llm.rewards.bounds import Squash
from alignpro.llm.rewards.classifier import SequenceReward
from alignpro.llm.rewards.opening import load_reward, read_spec

LABELS = ("NEGATIVE", "POSITIVE", "Neutral", "neutral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each kind: exclusive labels, and labels that are independent of each other."""
    home = tmp_path_factory.mktemp("labels")
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    names["num_labels"] = len(LABELS)
    save(home / "one", *gemma(**names))
    save(home / "many", *gemma(**names, problem_type="multi_label_classification"))
    return home


@pytest.fixture(scope="module")
def logits(folders):
    """[samples, labels]: the heads' outputs, computed without the reward's code but for the tokens."""
    model, _ = gemma(num_labels=len(LABELS))
    reward = SequenceReward.load(folders / "one", "clip:-1,1", output=0, device="cpu")
    ids = [reward.encode(x, y)["input_ids"] for x, y in zip(X, Y, strict=True)]
    with torch.no_grad():
        return np.array([model(torch.tensor([row])).logits[0].tolist() for row in ids])


def softmax(rows):
    return np.exp(rows) / np.exp(rows).sum(1, keepdims=True)


def test_a_label_is_a_probability_or_an_output(folders, logits):
    def check(module):
        def score(folder, bounds, **how):
            return module.SequenceReward.load(folders / folder, bounds, device="cpu", **how).score(X, Y)

        for i in range(len(LABELS)):
            chance = score("one", "0,1", output=i, probability=True)
            np.testing.assert_allclose(chance, softmax(logits)[:, i], rtol=1e-5)
            apart = score("many", "0,1", output=i, probability=True)
            np.testing.assert_allclose(apart, 1 / (1 + np.exp(-logits[:, i])), rtol=1e-5)
            raw = score("one", "squash:0,2", output=i)
            np.testing.assert_allclose(raw, 1 / (1 + np.exp(-logits[:, i] / 2)), rtol=1e-5)

    check(classifier)
    for right, wrong in (
        ("chosen - logits[:, others].logsumexp(1)", "chosen - logits.logsumexp(1)"),
        ('or self.model.config.problem_type == "multi_label_classification"', ""),
        ("chosen = logits[:, self.output]", "chosen = logits[:, 0]"),
        ("expit(logits) if self.probability else logits", "expit(logits)"),
    ):
        kills(check, mutated(classifier, right, wrong))


def test_labels_are_named_on_the_command_line(folders, logits):
    one = str(folders / "one")
    for name, expected in (
        (f"{one}#POSITIVE@0,1", softmax(logits)[:, 1]),
        (f"{one}#positive@0,1", softmax(logits)[:, 1]),
        (f"{one}#POSITIVE", softmax(logits)[:, 1]),
        (f"{one}#1@0,1", softmax(logits)[:, 1]),
        (f"{one}#neutral@0,1", softmax(logits)[:, 3]),
        (f"{one}#1@squash:0,2", 1 / (1 + np.exp(-logits[:, 1] / 2))),
        (f"{one}#Neutral@clip:-9,9", logits[:, 2]),
    ):
        reward = load_reward(name, device="cpu")
        np.testing.assert_allclose(reward.score(X, Y), expected, rtol=1e-5)
        assert read_spec(name).shown == name
        json.dumps(reward.describe(), allow_nan=False)
    assert load_reward(f"{one}#1@0,1", device="cpu").describe()["label"] == "POSITIVE"
    assert load_reward(f"{one}#1@0,1", device="cpu").describe()["read_as"] == "probability"
    hub = read_spec("owner/name#toxic@0,1")
    assert (hub.kind, hub.target, hub.label, hub.probability) == ("classifier", "owner/name", "toxic", True)
    assert not read_spec("owner/name#1@squash:0,2").probability
    assert read_spec("owner/name@squash:0,2").label is None


def test_the_model_and_its_label_are_told_apart_from_a_folders_name(tmp_path):
    save(tmp_path / "it#1", *gemma())
    spec = read_spec(f"{tmp_path}/it#1@squash:0,2")
    assert (spec.target, spec.label, spec.bounds) == (f"{tmp_path}/it#1", None, Squash(0.0, 2.0))


def test_labels_that_are_not_there_are_told_with_those_that_are(folders, tmp_path):
    one = str(folders / "one")
    listed = r"\(0 NEGATIVE, 1 POSITIVE, 2 Neutral, 3 neutral\)"
    save(tmp_path / "single", *gemma())
    for name, message in (
        (f"{one}#SAD@0,1", f"output 'SAD': reward model 'one' has no such output {listed}"),
        (f"{one}#NEUTRAL@0,1", "has no such output"),  # two are like it
        (f"{one}#4@0,1", "has no such output"),
        (f"{one}#@0,1", "has no such output"),
        (f"{one}#POSITIVE@0,2", "probability of a label lies in 0,1"),
        ("owner/name#POSITIVE@-1,1", "probability of a label lies in 0,1"),
    ):
        with pytest.raises(AlignProError, match=message) as error:
            read_spec(name)
        assert "\n" not in str(error.value)
    with pytest.raises(AlignProError, match=f"has 4 outputs {listed}; name one by its label"):
        load_reward(f"{one}@0,1", device="cpu")
    with pytest.raises(AlignProError, match="has one output, and no probability"):
        load_reward(f"{tmp_path}/single#0@0,1", device="cpu")
    assert load_reward(f"{tmp_path}/single#0@squash:0,2", device="cpu").score(X, Y).shape == (3,)


def test_options_reach_the_model(folders, tmp_path):
    options = RewardModelSettings(dtype="bfloat16", batch_size=2, sample_tokens=40)
    name = f"{folders / 'one'}#POSITIVE@0,1"
    world = World(EnvironmentSettings(reward=(name, "ease"), reward_model=options))
    reward = world.reward(tmp_path).rewards[0]
    assert (reward.describe()["dtype"], reward.batch_size, reward.max_tokens) == ("bfloat16", 2, 40)
    train = ["train", "--out", "o", "--reward", name]
    verb = main._parse([*train, "--reward-sample-tokens", "9999"])
    with pytest.raises(AlignProError, match="9999"):
        World(verb.environment).reward(tmp_path)
    with pytest.raises(AlignProError, match="reward_dtype 'int3': choose from float32"):
        main._parse([*train, "--reward-dtype", "int3"])


def test_every_output_of_labels_sums_to_one(folders):
    rewards = [load_reward(f"{folders / 'one'}#{i}@0,1", device="cpu") for i in range(len(LABELS))]
    np.testing.assert_allclose(sum(r.score(X, Y) for r in rewards), 1, rtol=1e-6)
    for a, b in itertools.pairwise(rewards):
        assert a.describe() != b.describe()
