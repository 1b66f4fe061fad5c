"""Open-ended training: all algorithms reach ρ*, moved settings do not, and interruptions change nothing."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import vllm_stub
from mutants import kills, mutated
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from trl.generation import vllm_generation
from trl.trainer import grpo_trainer, rloo_trainer

from alignpro.errors import AlignProError
from alignpro.files import read_json_lines
from alignpro.llm.arms.resample import answers, star
from alignpro.llm.models import adapters, shards
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter, Template
from alignpro.llm.rewards.bounds import Declared
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.training import algorithms, open_ended, rewrites, settings
from alignpro.llm.training.algorithms import ALGORITHMS
from alignpro.llm.training.checkpoints import METRICS_FILE
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.open_ended import TASKS, train
from alignpro.llm.training.ppo import PPOConfig
from alignpro.llm.training.settings import (
    ALGORITHM_NAMES,
    PRESETS,
    TASK_NAMES,
    EvaluationSettings,
    TrainSettings,
    moved_optimum,
)

PROMPTS = ["ab", "cd", "ef"]
LAM = 0.35
BARE = Template(system="", examples=(), request="", opening="", space="")
SETTINGS = TrainSettings(
    lam=LAM,
    iterations=24,
    prompts=3,
    samples=64,
    epochs=4,
    max_tokens=2,
    learning_rate=3e-3,
    lora_layers=1.0,
    task="rlhf",
)


class TableReward:
    """A fixed random reward in [0, 1.5] of each pair of texts."""

    low, high = 0.0, 1.5

    def score(self, prompts, responses):
        return np.array([self.one(x, y) for x, y in zip(prompts, responses, strict=True)])

    @staticmethod
    def one(x, y):
        return np.random.default_rng([*x.encode(), 0, *y.encode()]).uniform(0, 1.5)

    def describe(self):
        return {}


class Problem:
    """Two tokens over seven: 57 continuations in all, so ρ_θ and ρ* are exact."""

    def __init__(self):
        self.model, self.tokenizer = tiny_model(seed=1, vocab="abcd")
        end = self.tokenizer.eos_token_id
        others = [i for i in range(len(self.tokenizer)) if i != end]
        self.leaves = [(end,), *((a, end) for a in others), *((a, b) for a in others for b in others)]
        self.prior = self.policy(self.model)
        texts = [self.tokenizer.decode(list(leaf), skip_special_tokens=True) for leaf in self.leaves]
        self.rewards = np.array([[TableReward.one(x, y) for y in texts] for x in PROMPTS])
        star = self.prior * np.exp(self.rewards / LAM)
        self.star = star / star.sum(1, keepdims=True)

    def policy(self, model):
        ids = [tuple(self.tokenizer(x).input_ids) for x in PROMPTS for _ in self.leaves]
        with torch.no_grad():
            found = log_probs(model, ids, [leaf for _ in PROMPTS for leaf in self.leaves]).log_probs
        return found.sum(1).double().exp().numpy().reshape(len(PROMPTS), -1)

    def kl_to_star(self, model):
        policy = self.policy(model)
        return float((policy * np.log(policy / self.star)).sum(1).mean())


def fit(folder, settings=SETTINGS, **options):
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    options = {"progress": False} | options
    return train(
        Prompter(model, tokenizer, BARE),
        Environment(TableReward(), None),
        PROMPTS,
        settings,
        folder,
        **options,
    )


def test_policies_sum_to_one():
    np.testing.assert_allclose(Problem().prior.sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize("how", ["ppo", "rloo", "grpo", "group_baseline"])
def test_every_algorithm_reaches_the_optimum(how, tmp_path):
    problem = Problem()
    assert problem.kl_to_star(problem.model) > 0.3
    changed = {"group_baseline": True} if how == "group_baseline" else {"algorithm": how}
    trained = fit(tmp_path, replace(SETTINGS, **changed))
    assert problem.kl_to_star(trained.prompter.model) < 0.04
    # The base model is the reference still, and the trained one can be had again from its folder.
    with trained.prompter.model.disable_adapter():
        np.testing.assert_allclose(problem.policy(trained.prompter.model), problem.prior, rtol=1e-5)
    assert (tmp_path / "prompter" / "adapter_model.safetensors").exists()
    assert not [*tmp_path.glob("prompter/*.bin"), *tmp_path.glob("prompter/*.pt")]


@pytest.mark.parametrize(
    "moved",
    [
        {"temperature": 0.5},
        {"kl_estimator": "k3"},
        {"top_k": 2},
        {"target_kl": 1e-3, "kl_horizon": 200},
    ],
)
def test_what_moves_the_optimum_does_and_is_refused_unless_allowed(moved, tmp_path):
    settings = replace(SETTINGS, **moved)
    with pytest.raises(AlignProError, match=f"^{next(iter(moved))} = .*moves PPO's optimum away from ρ\\*"):
        fit(tmp_path / "refused", settings)
    assert not (tmp_path / "refused").exists()
    problem = Problem()
    trained = fit(tmp_path / "allowed", replace(settings, allow_moved_optimum=True))
    assert problem.kl_to_star(trained.prompter.model) > 0.1


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_half_the_memory(algorithm, tmp_path):
    """Weights in bfloat16 under an adapter in float32 learn as those in float32 do; untrained, 0.3."""
    model, tokenizer = tiny_model(0)
    model.save_pretrained(str(tmp_path / "m"), safe_serialization=True)
    tokenizer.save_pretrained(str(tmp_path / "m"))
    reward = CallableReward(lambda x, y: [text.count("a") / max(1, len(text)) for text in y], Declared(0, 1))
    settings = TrainSettings(
        algorithm=algorithm,
        task="rlhf",
        policy_dtype="bfloat16",
        **{"iterations": 15, "prompts": 2, "samples": 16, "epochs": 2, "max_tokens": 5},
        **{"lam": 0.02, "learning_rate": 3e-2},
    )
    policy = Prompter.from_pretrained(tmp_path / "m", dtype=settings.policy_dtype)
    found = train(policy, Environment(reward, None), ["abc", "de"], settings, tmp_path / "o", progress=False)
    dtypes = {("lora" in name, p.dtype) for name, p in found.prompter.model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert found.metrics[0]["score"] < 0.5
    assert found.metrics[-1]["score"] > 0.8


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_rewrites_drawn_by_vllm(algorithm, monkeypatch, tmp_path):
    """What vLLM says of its tokens is what training takes for the behaviour policy.

    vLLM needs a GPU. Here its place in TRL is taken by an engine with a copy of the weights, as vLLM has,
    which draws from that copy by transformers and is told of new weights by `sync_weights`.
    """
    problem = Problem()
    with pytest.raises(AlignProError, match=r"^vllm colocate: the package vllm is missing; run pip install"):
        fit(tmp_path / "without", replace(SETTINGS, vllm="colocate"))

    class Engine:
        synced = calls = 0

        def __init__(self, model, **named):
            assert named["temperature"] == 1.0
            assert named["top_p"] == 1.0
            self.model, self.copy = model, None

        def sync_weights(self):
            Engine.synced += 1
            self.copy = deepcopy(self.model).eval()

        def generate(self, prompts, images, num_generations, profiler=None):
            Engine.calls += 1
            assert all(prompts[i] == prompts[i - i % num_generations] for i in range(len(prompts)))
            keys = [[sample_key("engine", Engine.calls, i)] for i in range(len(prompts))]
            drawn = sample_and_score(self.copy, 0, prompts, keys, Sampling(max_tokens=2))
            ids, values = ([row[0][k] for row in drawn] for k in (0, 1))
            return prompts, ids, [[[v] for v in row] for row in values], None

    monkeypatch.setattr(algorithms, "find_spec", lambda name: name)
    for module in (grpo_trainer, rloo_trainer):
        monkeypatch.setattr(module, "VLLMGeneration", Engine)
    settings = replace(SETTINGS, algorithm=algorithm, vllm="colocate")
    trained = fit(tmp_path / "with", settings)
    assert Engine.synced == Engine.calls == settings.iterations
    assert problem.kl_to_star(trained.prompter.model) < 0.04


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_trls_own_use_of_vllm(algorithm, monkeypatch, tmp_path):
    """TRL's class is the real one, over a fake module with the names and outputs of vLLM 0.32 (`vllm_stub`).

    RLOO asks vLLM for no log-probabilities and is given none. Room is kept for the longest prompt and a
    rewrite. Mutant: the weights that vLLM began with, which no longer say what is trained.
    """
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    brain = vllm_stub.Engine(deepcopy(model), tokenizer, int(tokenizer.eos_token_id))
    fake, loads = vllm_stub.module(brain), []

    class LLM(fake.LLM):
        def __init__(self, *positional, **named):
            super().__init__(*positional, **named)
            driver = SimpleNamespace(model_runner=SimpleNamespace(model=self))
            self.llm_engine.model_executor = SimpleNamespace(driver_worker=driver)

        def load_weights(self, weights):
            state = brain.model.state_dict()
            for name, value in weights:
                loads.append(float((state[name] - value).abs().max()))
                state[name].copy_(value.detach())
            brain.seen.clear()

        def reset_prefix_cache(self):
            pass

    monkeypatch.setattr(algorithms, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", fake.SamplingParams, raising=False)
    asked = replace(SETTINGS, algorithm=algorithm, iterations=2, samples=8, epochs=1)
    with mock.patch.dict(os.environ):
        trained = fit(tmp_path, replace(asked, vllm="colocate", vllm_memory=0.2))
    made = fake.LLM.made[-1]
    assert (made["max_model_len"], made["gpu_memory_utilization"]) == (2 + asked.max_tokens, 0.2)
    # Before the first round they are equal, before the second they are not.
    assert max(loads[: len(loads) // 2]) == 0.0
    assert max(loads[len(loads) // 2 :]) > 1e-4
    assert len(trained.metrics) == 2


def test_the_oracle_without_training_is_the_one_that_training_nears(tmp_path):
    """Four standard errors (of the delta method, from the exact π*): a false alarm in 6,000 for each number.

    Mutant: answers that are not weighted, whose mean is J(π_F).
    """
    problem, n = Problem(), 2000
    target = LocalTarget((problem.model, problem.tokenizer), batch_size=512)
    found = answers(Environment(TableReward(), target, Sampling(max_tokens=2)), PROMPTS, n)
    w = np.exp(problem.rewards / LAM)
    z = (problem.prior * w).sum(1)
    value = (problem.star * problem.rewards).sum(1)
    error = np.sqrt((problem.prior * (w / z[:, None] * (problem.rewards - value[:, None])) ** 2).sum(1) / n)
    stars = [star(p, LAM) for p in found]
    assert (np.abs([s.value for s in stars] - value) < 4 * error).all()
    assert (np.abs([s.prior_value for s in stars] - value) > 4 * error).all()
    free = np.array([s.free_energy for s in stars])
    spread = np.sqrt((problem.prior * (w / z[:, None] - 1) ** 2).sum(1) / n)
    assert (np.abs(free - LAM * np.log(z)) < 4 * LAM * spread).all()
    # What training leaves: β·KL(π_θ‖π*) below the optimum, here all but nothing.
    trained = problem.policy(fit(tmp_path).prompter.model)
    objective = (trained * (problem.rewards - LAM * np.log(trained / problem.prior))).sum(1)
    assert (objective < free + 4 * LAM * spread).all()
    assert (objective > free - 0.04 * LAM - 4 * LAM * spread).all()


def test_named_settings():
    assert (tuple(ALGORITHMS), tuple(TASKS)) == (ALGORITHM_NAMES, TASK_NAMES)
    paper = TrainSettings(**PRESETS["paper"])
    assert (paper.prompts * paper.samples, paper.minibatches, paper.max_grad_norm) == (128, 1, 0.0)
    assert (paper.learning_rate, paper.lam, paper.epochs, paper.clip_range) == (1.41e-5, 0.2, 4, 0.2)
    common = {"output_dir": "x", "use_cpu": True, "bf16": False}
    config = ALGORITHMS["ppo"].configure(common, paper)
    assert set(moved_optimum(config)) == {"target_kl", "gae_lambda"}
    assert not moved_optimum(ALGORITHMS["ppo"].configure(common, TrainSettings(**PRESETS["faithful"])))
    # TRL's own defaults are not faithful.
    assert {"loss_type", "scale_rewards"} <= set(
        moved_optimum(PPOConfig(output_dir="x", use_cpu=True, bf16=False))
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"algorithm": "dpo"}, r"^algorithm 'dpo': choose from ppo, rloo, grpo$"),
        ({"lam": 0.0}, r"^lam 0.0: give a positive, finite number$"),
        ({"lam": float("nan")}, r"^lam nan: give a positive"),
        (
            {"samples": 1, "algorithm": "rloo"},
            r"^samples 1: rloo compares rewrites of one prompt; give at least 2$",
        ),
        ({"samples": 1, "group_baseline": True}, r"^group_baseline: .*; give samples of at least 2$"),
        ({"minibatches": 5}, r"^minibatches 5: does not divide"),
        ({"vllm_memory": 0.5}, r"^vllm_memory 0.5: is for vllm colocate; leave it out$"),
        ({"vllm": "colocate", "vllm_memory": 1.5}, r"^vllm_memory 1.5: give a share above 0 and below 1$"),
        ({"seed": -1}, r"^seed -1: give a whole number of at least 0$"),
        ({"top_p": 1.5}, r"^top_p 1.5: give a number above 0 and at most 1$"),
        ({"iterations": 0}, r"^iterations 0: give a whole number of at least 1$"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(AlignProError, match=message):
        replace(TrainSettings(), **wrong)


def test_bad_problems_are_named(tmp_path):
    with pytest.raises(AlignProError, match=r"^prompts 4: more than the 3 distinct ones given"):
        fit(tmp_path, replace(SETTINGS, prompts=4))
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    with pytest.raises(
        AlignProError, match=r"has 511 tokens to prompter .* with 2 more exceed the 512 that it"
    ):
        train(
            Prompter(model, tokenizer, BARE),
            Environment(TableReward(), None),
            ["ab", "c" * 511, "a"],
            SETTINGS,
            tmp_path / "long",
        )
    assert not (tmp_path / "long").exists()
    trained = fit(tmp_path / "a", replace(SETTINGS, iterations=1, samples=4))
    with pytest.raises(AlignProError, match=r"^prompter: it has an adapter already"):
        train(trained.prompter, Environment(TableReward(), None), PROMPTS, SETTINGS, tmp_path / "b")

    class Broken(TableReward):
        def score(self, prompts, responses):
            return np.full(len(prompts), np.nan)

    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    with pytest.raises(AlignProError, match=r"reward of sample 0 \(prompt '..', response .*\) is nan: every"):
        train(
            Prompter(model, tokenizer, BARE),
            Environment(Broken(), None),
            PROMPTS,
            SETTINGS,
            tmp_path / "c",
            progress=False,
        )


def test_reporters_are_checked_first(monkeypatch, tmp_path):
    """All three were tried by hand; none is needed for the tests."""
    with pytest.raises(AlignProError, match=r"^report_to 'mlflow': choose from tensorboard, wandb, trackio"):
        fit(tmp_path, report_to=("mlflow",))
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(AlignProError, match=r"^report_to trackio: the package is missing; run pip install"):
        fit(tmp_path, report_to=("trackio",))
    assert not [*tmp_path.iterdir()]


def test_every_round_has_distinct_prompts():
    rng = np.random.default_rng(0)
    rows = open_ended._rounds(list("abcde"), 3, 20, rng)
    assert len(rows) == 60
    assert all(len(set(rows[i : i + 3])) == 3 for i in range(0, 60, 3))
    assert {rows.count(x) for x in "abcde"} == {12}


SHORT = replace(SETTINGS, iterations=8, samples=32, minibatches=2)
HELD = {
    "held_out": ["ba", "dc", "bb"],
    "evaluation": EvaluationSettings(eval_every=3, eval_proposals=2),
}


def test_seed_zero_is_honoured(tmp_path):
    first, again = (fit(tmp_path / name, SHORT).metrics for name in "ab")
    assert first == again
    assert first != fit(tmp_path / "c", replace(SHORT, seed=1)).metrics


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_interrupted_and_resumed_equals_uninterrupted(algorithm, tmp_path):
    """To the bit: model, critic, optimizer, schedule, controller of λ, data order, samples."""
    settings = replace(SHORT, algorithm=algorithm)
    if algorithm == "ppo":
        settings = replace(settings, target_kl=0.2, kl_horizon=300, allow_moved_optimum=True)
    whole = fit(tmp_path / "whole", settings)

    class Cut(TableReward):
        calls = 0

        def score(self, prompts, responses):
            Cut.calls += 1
            if Cut.calls == 6:
                raise KeyboardInterrupt
            return super().score(prompts, responses)

    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    with pytest.raises(KeyboardInterrupt):
        train(
            Prompter(model, tokenizer, BARE),
            Environment(Cut(), None),
            PROMPTS,
            settings,
            tmp_path / "cut",
            progress=False,
        )
    resumed = fit(tmp_path / "cut", settings, resume=True)
    assert resumed.metrics == whole.metrics
    a, b = (dict(t.prompter.model.named_parameters()) for t in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(AlignProError, match=r"was started with settings\.lam = 0\.35, not 0\.4"):
        fit(tmp_path / "cut", replace(settings, lam=0.4), resume=True)


def test_a_finished_run_goes_on_for_more_rounds(tmp_path):
    """Where the learning rate is constant, 3 rounds and then 5 are the first 8, to the bit."""
    longer = replace(SHORT, schedule="constant")
    whole = fit(tmp_path / "whole", longer)
    fit(tmp_path / "cut", replace(longer, iterations=3))
    assert len((tmp_path / "cut" / METRICS_FILE).read_text().splitlines()) == 3
    assert fit(tmp_path / "cut", longer, resume=True).metrics == whole.metrics
    name = "prompter/adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def refused(module, settings, folder):
        model, tokenizer = tiny_model(seed=1, vocab="abcd")
        world = Prompter(model, tokenizer, BARE), Environment(TableReward(), None), PROMPTS
        said = "nothing"
        try:
            module.train(*world, settings, folder, resume=True, progress=False)
        except AlignProError as error:
            said = str(error)
        assert "was started with settings.iterations = " in said

    refused(open_ended, replace(longer, iterations=3), tmp_path / "cut")
    falling = replace(SHORT, iterations=2)
    fit(tmp_path / "falling", falling)
    refused(open_ended, replace(falling, iterations=3), tmp_path / "falling")
    mutant = mutated(open_ended, 'if settings.schedule == "constant" else ()', "")
    kills(lambda m: refused(m, replace(falling, iterations=3), tmp_path / "falling"), mutant)


@pytest.mark.parametrize("name", rewrites.TABLES)
def test_a_watched_run_shows_its_rewrites(name, tmp_path, monkeypatch):
    """W&B and trackio have a table, Table(dataframe=…), and log(…); here something else with these two is in
    their place, as neither is installed for tests (tried with trackio 0.43)."""
    logged = []
    backend = SimpleNamespace(Table=lambda dataframe: dataframe, log=logged.append)
    monkeypatch.setitem(sys.modules, name, backend)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1),
        state=SimpleNamespace(global_step=8, is_world_process_zero=True),
        args=SimpleNamespace(report_to=["tensorboard", name]),
    )
    rows = [{"prompt": x, "rewrite": f"{x}!", "answer": "y", "reward": 0.5} for x in PROMPTS]
    log = rewrites.RewriteLog(tmp_path / "rewrites.jsonl", 4)
    log.add(trainer, rows)
    ((table,),) = (one.values() for one in logged)
    assert table.to_dict("records") == [{"round": 3, **row} for row in rows]
    trainer.args.report_to = []
    log.add(trainer, rows)
    assert len(logged) == 1


def test_a_damaged_line_of_the_rewrites_takes_no_other_with_it(tmp_path):
    """Later rounds are cut off, and a last line half written; one damaged in between stays, unread."""
    row = {"prompt": "ab", "rewrite": "b", "answer": None, "reward": 0.5, "logp": -1.0}
    lines = [json.dumps({"round": n, **row}) for n in (1, 1, 2, 2, 3, 3)]
    damaged = [
        "{",
        "[]",
        "5",
        "null",
        lines[1].replace("reward", "rewerd"),
        lines[1].replace("0.5", '"a"'),
        "\u00ff" * 9,
    ]
    damaged += [json.dumps({"round": 1, **row, "prompt": {"text": 3}}), lines[1].replace("1,", "null,", 1)]

    def check(module):
        for bad in damaged:
            path = tmp_path / "rewrites.jsonl"
            path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n" + lines[0][:9], encoding="latin-1")
            module.cut(path, 2)
            left = path.read_text(encoding="latin-1").split("\n")
            assert left == [lines[0], bad, *lines[2:4], ""], bad
            assert module.read(path) == [json.loads(line) for line in (lines[0], *lines[2:4])], bad
        assert module.read(tmp_path / "none") == []

    check(rewrites)
    kills(check, mutated(rewrites, "<= rounds:", "< rounds:"))
    kills(check, mutated(rewrites, "file.truncate(whole)", "file.truncate(place)"))
    kills(check, mutated(rewrites, '            from_json(line["prompt"])\n', ""))


def environment():
    """For another Python that imports this module."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


# RLIMIT_FSIZE cuts writes short as a full disk does: here those of the third checkpoint, and nothing smaller.
_FULL = """
import json, resource, sys
import test_train as t
right, largest = t.open_ended.Metrics.on_log, 20_000
def on_log(self, args, state, control, logs=None, **named):
    if state.global_step == 3 * t.SHORT.steps_per_round:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    right(self, args, state, control, logs, **named)
t.open_ended.Metrics.on_log = on_log
try:
    t.fit(sys.argv[1], t.SHORT)
except t.AlignProError as error:
    print(json.dumps(str(error)))
"""


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path):
    cut = tmp_path / "cut"
    want = fit(tmp_path / "whole", SHORT).metrics
    said = subprocess.run(
        [sys.executable, "-c", _FULL, str(cut)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    step = SHORT.steps_per_round
    message = json.loads(said.stdout)
    assert message.startswith(f"cannot write {cut / f'checkpoint-{3 * step}'} (")
    assert message.endswith("); free space and resume: the checkpoints before it are whole")
    assert "\n" not in message
    kept = {path.parent.name for path in cut.glob("*/complete")}
    assert kept == {f"checkpoint-{step}", f"checkpoint-{2 * step}"}
    assert fit(cut, SHORT, resume=True).metrics == want


# Imported once; each run is a fork of it, killed after a random while.
_KILLER = """
import os, random, signal, sys, time
import test_train as t
rng, kills, folder = random.Random(0), 0, sys.argv[1]
while True:
    child = os.fork()
    if child == 0:
        t.fit(folder, t.SHORT, resume=True, **t.HELD)
        os._exit(0)
    deadline = time.monotonic() + rng.uniform(0.05, 0.8)
    while time.monotonic() < deadline or kills >= 20:
        if os.waitpid(child, 0 if kills >= 20 else os.WNOHANG)[0]:
            break
        time.sleep(0.005)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        continue
    print(kills)
    if kills >= 20:
        break
    # Finished before its kill: the next one begins again from nothing.
    import shutil
    shutil.rmtree(folder)
"""


def test_killed_at_random_moments_ends_in_the_same_result(tmp_path):
    """kill −9, twenty times at least; each run continues what the one before it left, evaluations too."""
    whole = fit(tmp_path / "whole", SHORT, **HELD).metrics
    command = [sys.executable, "-c", _KILLER, str(tmp_path / "cut")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) >= 20
    lines = (tmp_path / "cut" / METRICS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole
    for name in ("evaluations.jsonl", "rewrites.jsonl", "prompter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Imported once; the processes of a training are forks of it, which find each other as those of torchrun do.
_RANKS = """
import json, os, random, signal, socket, sys, time, traceback
from dataclasses import replace
import test_train as t
from alignpro.llm.training.ppo import PPOTrainer
import torch.distributed

def together(n, work, until=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(n):
        if not (pid := os.fork()):
            at = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in at.items()} | {"MASTER_ADDR": "127.0.0.1"}
            try:
                work()
                torch.distributed.destroy_process_group()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        ranks.append(pid)
    if until is not None:
        while not os.path.exists(until):
            time.sleep(0.005)
        os.kill(ranks[-1], signal.SIGKILL)
        time.sleep(0.5)
        for pid in ranks[:-1]:  # as torchrun does with the others
            os.kill(pid, signal.SIGKILL)
    return [os.waitpid(pid, 0)[1] for pid in ranks]

def train(n, name, settings, kill=None, **how):
    home = f"{folder}/{name}"
    return together(n, lambda: t.fit(home, settings, **how), kill and f"{home}/{kill}")

folder = sys.argv[1]
exec(sys.argv[2])
"""


def ranks(script, folder):
    """Run lines of Python in which train(processes, name, settings) trains into `folder`/name, and
    together(processes, work) does anything."""
    command = [sys.executable, "-c", _RANKS, str(folder), script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


CURVES = (
    "score",
    "ppo/kl_k1",
    "ppo/objective",
    "ppo/policy_loss",
    "ppo/value_loss",
    "ppo/explained_variance",
)


def alike(folder, other):
    """The same curves, evaluations and rewrites."""
    a, b = (read_json_lines(home / METRICS_FILE) for home in (folder, other))
    for name in CURVES:
        np.testing.assert_allclose([x[name] for x in a], [x[name] for x in b], rtol=1e-3, atol=1e-4)
    for a, b in zip(*(read_json_lines(home / "evaluations.jsonl") for home in (folder, other)), strict=True):
        assert a["best"] == b["best"]
        for key in ("objectives", "kl", "objective_stderr"):
            np.testing.assert_allclose(b[key], a[key], atol=1e-3)
    a, b = (read_json_lines(home / "rewrites.jsonl") for home in (folder, other))
    assert [(x["round"], x["prompt"], x["answer"]) for x in a] == [
        (x["round"], x["prompt"], x["answer"]) for x in b
    ]


def test_shards_need_processes(tmp_path):
    sharded = replace(SHORT, shard=True)
    with pytest.raises(AlignProError, match=r"^shard: divides weights among processes, and this is one"):
        fit(tmp_path / "one", sharded)
    for other in ({"policy_dtype": "4bit"}, {"vllm": "server"}):
        with pytest.raises(AlignProError, match=r"^shard: cannot be had with"):
            replace(sharded, **other)


def sharded_beside_whole():
    """In each of several processes: a sharded model scores, learns and draws as the whole one does, though
    the processes have unequal numbers of sequences, and so of passes."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()

    def model():
        base, tokenizer = tiny_model(seed=1, vocab="abcd")
        torch.manual_seed(0)
        made = get_peft_model(base, adapters.adapter_config(base, 4, 1.0))
        for p in made.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.1)
        return made, tokenizer.pad_token_id

    (whole, pad), (divided, _) = model(), model()
    shards.shard(divided)
    rng = np.random.default_rng(rank)
    prompts = rng.integers(4, size=(6 + 4 * rank, 5)).tolist()
    said = rng.integers(4, size=(len(prompts), 4)).tolist()
    keys = [[i] for i in range(len(prompts))]
    found = []
    for one in (whole, divided):
        wrapped = torch.nn.parallel.DistributedDataParallel(one, broadcast_buffers=False)
        values = log_probs(wrapped, prompts, said, most=20).log_probs
        values.square().sum().backward()
        with shards.gathered(one):
            drawn = sample_and_score(one, pad, prompts, keys, Sampling(max_tokens=4))
        again = log_probs(wrapped, prompts, said, most=20).log_probs
        found.append((values, again, *(p.grad for p in one.parameters() if p.requires_grad), drawn))
    *a, drawn = found[0]
    *b, drawn_by_parts = found[1]
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(y.detach(), x.detach(), rtol=1e-5, atol=1e-6)
    assert max(float(x.abs().max()) for x in a[2:]) > 0.1
    assert drawn == drawn_by_parts
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in divided.parameters())
    assert here < 0.7 * sum(p.numel() for p in whole.parameters())


TOGETHER = replace(SHORT, iterations=4, minibatches=1)


def test_several_processes_train_as_one(tmp_path):
    """On CPUs: the loss curve of one process at equal global batch, critic included. Two processes (DDP); two
    with the frozen weights divided between them (FSDP2); and four, of which one is killed, and resumed.

    Evaluations, of which each process has a share of the prompts or, the fourth, none, and the rewrites are
    those of one, too.
    """
    fit(tmp_path / "one", TOGETHER, **HELD)
    ranks(
        """
assert together(2, t.sharded_beside_whole) == [0, 0]
settings = t.TOGETHER
assert train(2, "together", settings, **t.HELD) == [0, 0]
sharded = replace(settings, shard=True)
assert train(2, "two", sharded, **t.HELD) == [0, 0]
assert 9 in train(4, "four", sharded, kill="checkpoint-8/complete", **t.HELD)
assert not os.path.exists(folder + "/four/prompter")
assert train(4, "four", sharded, resume=True, **t.HELD) == [0] * 4
# The mutant: each process's critic goes its own way.
PPOTrainer.join_critic_gradients = lambda self: None
assert train(2, "apart", settings, **t.HELD) == [0, 0]
""",
        tmp_path,
    )
    for name in ("together", "two", "four"):
        alike(tmp_path / name, tmp_path / "one")
    kills(lambda name: alike(tmp_path / name, tmp_path / "one"), "apart")


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
@pytest.mark.parametrize("how", [{"microbatches": 4}, {"gradient_checkpointing": True}])
def test_less_memory_is_the_same_training(algorithm, how, tmp_path):
    """Parts of a step add up to the step, and what is computed again is what was computed."""
    settings = replace(SHORT, algorithm=algorithm, iterations=3, epochs=2, minibatches=2)
    whole = fit(tmp_path / "whole", settings).metrics
    parts = fit(tmp_path / "parts", replace(settings, **how)).metrics
    names = ("score", "grad_norm", "ppo/kl_k1", "ppo/policy_loss", "ppo/value_loss", "kl")
    for name in names:
        if name in whole[0]:
            a, b = ([line[name] for line in lines] for lines in (parts, whole))
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_nothing_is_clipped_before_the_first_step(algorithm, monkeypatch, tmp_path):
    """In bfloat16 too, where sampler and scorer differ by more than the clip range; in parts as well.

    Mutant: what the sampler said is taken for the policy that drew.
    """
    model, tokenizer = tiny_model(seed=1, vocab="abcdefgh", hidden=64, layers=4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    model.save_pretrained(str(tmp_path / "m"), safe_serialization=True)
    tokenizer.save_pretrained(str(tmp_path / "m"))
    settings = replace(
        SHORT, algorithm=algorithm, iterations=1, epochs=1, minibatches=2, max_tokens=12, learning_rate=1e-12
    )

    def first(name):
        policy = Prompter.from_pretrained(tmp_path / "m", dtype="bfloat16", device="cpu")
        found = train(
            policy, Environment(TableReward(), None), PROMPTS, settings, tmp_path / name, progress=False
        )
        return found.metrics[0]

    clip = {"ppo": "ppo/clip_fraction"}.get(algorithm, "clip_ratio/region_mean")
    line = first("right")
    assert line[clip] == 0
    assert line["sampler_mismatch"] > 0.02
    assert abs(line.get("ppo/kl_k1", line.get("kl"))) < 1e-6
    if algorithm == "rloo":  # whose ratio is of whole sequences
        monkeypatch.setattr(open_ended.OpenRollouts, "draw", open_ended.OpenRollouts._sample)
        monkeypatch.setattr(open_ended.OpenRollouts, "_check_untouched", lambda *_: None)
        monkeypatch.setattr(open_ended.OpenRollouts, "_score_again", lambda *_: None)
        right = open_ended.sample_and_score

        def off(*positional, **named):  # as some processors' bfloat16 is, of long rewrites
            rows = right(*positional, **named)
            return [[(ids, [v - 0.1 for v in values]) for ids, values in row] for row in rows]

        monkeypatch.setattr(open_ended, "sample_and_score", off)
        assert first("mutant")[clip] > 0


def test_an_untouched_policy_that_differs_from_its_reference_ends_the_run(monkeypatch, tmp_path):
    """Round 1's KL is 0, or the model is read or sampled wrongly: here a sampler that is off by a little."""
    right = open_ended.sample_and_score

    def wrong(*positional, **named):
        rows = right(*positional, **named)
        return [[(ids, [v - 0.01 for v in values]) for ids, values in row] for row in rows]

    monkeypatch.setattr(open_ended, "sample_and_score", wrong)
    with pytest.raises(
        AlignProError, match=r"^round 1: the untrained policy differs .* by 0\.01 nats a token"
    ):
        fit(tmp_path, SHORT)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_nothing_is_scored_twice(algorithm, monkeypatch, tmp_path):
    """A round scores the reference once and the policy once a step; the rest is kept from sampling."""
    settings = replace(SHORT, algorithm=algorithm, iterations=2, epochs=2, minibatches=1)
    kept = open_ended.OpenRollouts.score
    right, counts = open_ended.log_probs, []

    def counted(*positional, **named):
        counts.append(torch.is_grad_enabled())
        return right(*positional, **named)

    def check(scorer, name):
        counts.clear()
        monkeypatch.setattr(open_ended.OpenRollouts, "score", scorer)
        monkeypatch.setattr(open_ended, "log_probs", counted)
        fit(tmp_path / name, settings)
        assert (counts.count(False), counts.count(True)) == (2, 4)

    check(kept, "right")

    def rescored(self, party, model, prompts, said, steps):
        if party == "behaviour":
            counted(model, [[3]], [[4]])
        return kept(self, party, model, prompts, said, steps)

    with pytest.raises(AssertionError):
        check(rescored, "mutant")


def test_sharded_weights_are_refused():
    from types import SimpleNamespace as Fake

    def accelerator(kind, stage=None):
        return Fake(distributed_type=kind, state=Fake(deepspeed_plugin=Fake(zero_stage=stage)))

    refuse, kinds = open_ended._refuse_sharded, open_ended.DistributedType
    for kind, stage, name in ((kinds.FSDP, None, "FSDP"), (kinds.DEEPSPEED, 3, "DeepSpeed ZeRO-3")):
        with pytest.raises(AlignProError, match=f"^distributed_type {name}: .* give --shard"):
            refuse(accelerator(kind, stage))
    for kind, stage in ((kinds.NO, None), (kinds.MULTI_CPU, None), (kinds.DEEPSPEED, 2)):
        refuse(accelerator(kind, stage))
