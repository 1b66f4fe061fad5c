"""Training on prefix trees: all algorithms reach ρ*, mutants do not; resuming repeats the run bit for bit."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from tiny_optimum import END, FAST, fit, problem

from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.policies.tree import PrefixTree, TreeTask, leaf_probabilities
from alignpro.llm.training import ppo, trl_adapter
from alignpro.llm.training import tree as train_module
from alignpro.llm.training.ppo import PPOConfig, PPOTrainer
from alignpro.llm.training.settings import ALGORITHM_NAMES, TreeSettings
from alignpro.llm.training.tree import TreeRollouts, train


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_reaches_the_optimum(algorithm, tmp_path):
    trained = fit(tmp_path, TreeSettings(**(vars(FAST) | {"algorithm": algorithm})))
    kl = [line["exact"]["kl_to_star"] for line in trained.metrics]
    assert kl[0] > 0.2
    assert kl[-1] < 0.01
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if algorithm == "ppo":  # each line's sampled values stand beside the exact ones of the same policy
        assert all("ppo/kl_k1" in line["sampled"] for line in trained.metrics[:-1])
        assert trained.metrics[0]["sampled"]["ppo/kl_k1"] == pytest.approx(0, abs=1e-5)

        # False alarm 7e-6 per line; the float32 sums add 1e-5. Mutant: the next line's policy, early on.
        def off(line, exact):
            sampled = line["sampled"]
            error = 4.5 * sampled["ppo/objective_stderr"] + 1e-5
            return abs(sampled["ppo/objective"] - exact["objective"]) > error

        assert not any(off(line, line["exact"]) for line in trained.metrics[:-1])
        assert off(trained.metrics[0], trained.metrics[1]["exact"])
        # Mutant: a critic whose gradients are never cleared explains less than a constant would.
        assert trained.metrics[-2]["sampled"]["ppo/explained_variance"] > 0.5


@pytest.mark.gpu
def test_reaches_the_optimum_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    model, tokenizer, task, evaluate = problem()
    trained = train(model.to("cuda"), tokenizer, task, FAST, tmp_path, evaluate=evaluate)
    assert trained.metrics[-1]["exact"]["kl_to_star"] < 0.01


def test_long_rewrites_reach_the_optimum_with_a_critic_that_knows_nothing(monkeypatch, tmp_path):
    """Ten tokens, of which the first alone earns. Mutant: generalized advantages with λ = 0.8."""
    model, tokenizer = tiny_model(seed=2, vocab="ab")
    a, b = tokenizer("ab").input_ids
    tree = PrefixTree(tuple((*word, END) for word in itertools.product((a, b), repeat=10)))
    score = np.array([0.4 * (leaf[0] == a) for leaf in tree.sequences])
    prompt = tuple(tokenizer("ba").input_ids)
    task = TreeTask(("ba",), (prompt,), (tree,), lambda x, leaves: score[leaves].tolist())
    lam = 0.1
    (prior,) = leaf_probabilities(model, [prompt], [tree])
    star = prior * np.exp(score / lam)
    star /= star.sum()
    settings = TreeSettings(
        lam=lam, iterations=14, samples=128, learning_rate=6e-3, lora_layers=1.0, lora_rank=8
    )

    def distance(name):
        def evaluate(policy):
            return {"kl_to_star": float((policy[0] * np.log(policy[0] / star)).sum())}

        fresh, _ = tiny_model(seed=2, vocab="ab")
        found = train(fresh, tokenizer, task, settings, tmp_path / name, evaluate=evaluate)
        return found.metrics[0]["exact"]["kl_to_star"], found.metrics[-1]["exact"]["kl_to_star"]

    monkeypatch.setattr(ppo.Critic, "forward", lambda self, x: self.center + 0 * self.body(x).squeeze(-1))
    before, after = distance("faithful")
    assert before > 0.25
    assert after < 0.05
    right = ppo.generalized_advantages
    monkeypatch.setattr(ppo, "generalized_advantages", lambda *args: right(*args[:4], 0.8))
    _, moved = distance("moved")
    assert moved > 0.1


def test_k3_in_the_reward_misses_the_optimum(monkeypatch, tmp_path):
    """Mutant: E[k3] is the same KL, but its gradient through the score is not the KL's."""

    right = ppo.shaped_rewards
    monkeypatch.setattr(ppo, "shaped_rewards", lambda *a: right(*a[:5], "k3"))
    assert fit(tmp_path).metrics[-1]["exact"]["kl_to_star"] > 0.05


@pytest.mark.parametrize("algorithm", ALGORITHM_NAMES)
def test_nothing_is_learned_from_rewards_that_are_all_alike(algorithm, monkeypatch, tmp_path):
    """Then ρ* is ρ_sft, where training begins. Mutant: Adam makes whole steps of the KL's rounding."""
    settings = TreeSettings(**(vars(FAST) | {"algorithm": algorithm, "iterations": 3, "samples": 16}))
    model, tokenizer, task, _ = problem()
    constant = dataclasses.replace(task, reward=lambda x, leaves: [0.7] * len(leaves))

    def moved(name):
        fresh, *_ = problem()
        found = train(fresh, tokenizer, constant, settings, tmp_path / name, evaluate=lambda _: {})
        before = leaf_probabilities(model, task.prompt_ids, task.trees)
        return max(float(np.abs(a - b).max()) for a, b in zip(found.policy, before, strict=True))

    assert moved("right") < 1e-6
    monkeypatch.setattr(trl_adapter, "_untouched", lambda model: False)
    assert moved("mutant") > 1e-3


def test_the_critic_takes_its_units_from_the_first_rewards_that_differ(monkeypatch, tmp_path):
    """A reward that is 0 for whole rounds. Mutant: units of the first, a thousandth, for rewards of 1."""
    settings = TreeSettings(**(vars(FAST) | {"iterations": 4, "samples": 64}))
    _, tokenizer, task, _ = problem()

    def units(name):
        model, *_ = problem()
        asked = []

        def rare(x, leaves):
            asked.append(x)
            late = len(asked) > 2 * len(task.prompts)  # two rounds
            return [float(late and leaf == 0) for leaf in leaves]

        late = dataclasses.replace(task, reward=rare)
        found = train(model, tokenizer, late, settings, tmp_path / name, evaluate=lambda _: {})
        last = max((tmp_path / name).glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        critic = load_file(last / ppo.CRITIC_FILE)
        lines = [line["sampled"] for line in found.metrics[:-1]]
        return float(critic["scale"]), [line["ppo/value_loss"] for line in lines]

    scale, losses = units("right")
    assert scale > 0.05
    assert max(losses) < 10
    right = ppo.Critic.calibrate
    monkeypatch.setattr(ppo.Critic, "calibrate", lambda self, totals: right(self, 0 * totals))
    scale, losses = units("mutant")
    assert scale < 0.05
    assert max(losses) > 1000


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    """A run killed between checkpoints continues from the last one and repeats the same numbers exactly."""
    settings = TreeSettings(**(vars(FAST) | {"iterations": 6, "samples": 64}))
    whole = fit(tmp_path / "whole", settings)

    class Killed(Exception):
        pass

    def kill(step, _total, _exact):
        if step == 4 * settings.epochs:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path / "cut", settings, progress=kill)
    resumed = fit(tmp_path / "cut", settings, resume=True)
    assert [line["exact"] for line in resumed.metrics] == [line["exact"] for line in whole.metrics]
    for a, b in zip(resumed.policy, whole.policy, strict=True):
        np.testing.assert_array_equal(a, b)
    # A checkpoint cut short while being written is passed over.
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    (tmp_path / "torn" / "checkpoint-24" / "complete").unlink()
    (tmp_path / "torn" / "checkpoint-24" / "adapter_model.safetensors").unlink()
    torn = fit(tmp_path / "torn", settings, resume=True)
    assert [line["exact"] for line in torn.metrics] == [line["exact"] for line in whole.metrics]
    # Resuming a finished run changes nothing.
    again = fit(tmp_path / "torn", settings, resume=True)
    assert [line["exact"] for line in again.metrics] == [line["exact"] for line in whole.metrics]
    # Mutant: without the critic's checkpoint the numbers differ.
    shutil.rmtree(tmp_path / "cut" / "checkpoint-24", ignore_errors=True)
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(PPOTrainer, "load_more", lambda self, folder: None)
        forgetful = fit(tmp_path / "cut", settings, resume=True)
    assert [line["exact"] for line in forgetful.metrics] != [line["exact"] for line in whole.metrics]


def test_resuming_with_other_settings_is_refused(tmp_path):
    settings = TreeSettings(**(vars(FAST) | {"iterations": 1, "samples": 8}))
    fit(tmp_path, settings)
    with pytest.raises(AlignProError, match=r"learning_rate = 0\.003, not 0\.1"):
        fit(tmp_path, TreeSettings(**(vars(settings) | {"learning_rate": 0.1})), resume=True)


def test_samples_follow_the_exact_policy(tmp_path):
    """χ² of 20,000 sampled rewrites against exact probabilities; false-alarm rate 1e-4 per prompt."""
    settings = TreeSettings(**(vars(FAST) | {"iterations": 1, "samples": 8}))
    seen = {}

    class Spy(TreeRollouts):
        def train(self, *arguments, **named):
            out = super().train(*arguments, **named)
            torch.manual_seed(0)
            ids = [list(i) for i in self.task.prompt_ids for _ in range(10_000)]
            seen["actions"], seen["policy"] = self.draw(ids), self.exact_policy()
            seen["leaf"] = self._leaf
            return out

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(train_module, "TreeRollouts", Spy)
        fit(tmp_path, settings)
    for x in range(2):
        actions = seen["actions"][10_000 * x : 10_000 * (x + 1)]
        counts = np.bincount([seen["leaf"][x][tuple(a)] for a in actions], minlength=20)
        exact = seen["policy"][x]
        common = exact * 10_000 >= 5

        def grouped(values, common=common):
            return np.append(values[common], values[~common].sum())

        observed, expected = grouped(counts), grouped(exact * 10_000)
        keep = expected > 0
        assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-4
        # Mutant: the other prompt's policy does not fit.
        other = grouped(seen["policy"][1 - x] * 10_000)
        assert stats.chisquare(observed, other * observed.sum() / other.sum()).pvalue < 1e-10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": "dpo"}, "algorithm 'dpo'"),
        ({"lam": 0.0}, r"^lam 0\.0"),
        ({"lam": float("nan")}, "^lam nan"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"lora_layers": 1.5}, "lora_layers"),
        ({"samples": 1}, "^samples 1"),
        ({"iterations": 0}, "^iterations 0"),
    ],
)
def test_bad_settings_are_named(change, words):
    with pytest.raises(AlignProError, match=words):
        TreeSettings(**(vars(TreeSettings()) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 5},
        {"gamma": 0.99},
        {"gae_lambda": 0.95},
        {"beta": 0.0},
    ],
)
def test_settings_that_move_the_optimum_are_refused(change, tmp_path):
    model, tokenizer, _, _ = problem()
    args = PPOConfig(**({"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "top_k": 0} | change))
    with pytest.raises(AlignProError, match=next(iter(change))):
        PPOTrainer(model=model, processing_class=tokenizer, reward_funcs=lambda **_: [], args=args)


def test_curve_file_has_one_json_line_per_iteration(tmp_path):
    settings = TreeSettings(**(vars(FAST) | {"iterations": 3, "samples": 8}))
    trained = fit(tmp_path, settings)
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert lines == trained.metrics
    assert [line["step"] for line in lines] == [0, 4, 8, 12]
