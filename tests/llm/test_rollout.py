"""`alignpro rollout`: every log-probability, fresh answers, and nothing lost to an interruption.

Statistical tests draw with fixed seeds; each states the probability with which a correct program would fail
under a fresh seed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import vllm_stub
from faulty import Server
from kept import lines
from peft import get_peft_model

from alignpro import rollouts
from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.arms import draws, rollout
from alignpro.llm.arms.draws import stream
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.load import load_model
from alignpro.llm.models.policy import sample_and_score, sample_key
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.policies.prompter import Prompter, target_ids
from alignpro.llm.targets import engine
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.target import Answer

PROMPTS = ["abc", "def", "gab", "hhc", "e"]
PLAIN = Sampling(max_tokens=5)
TRUNCATED = Sampling(temperature=1.5, top_p=0.7, top_k=4, max_tokens=5)


def shares(prompts, responses):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("e") / max(1, len(y)) for y in responses]


def noise(prompts, responses):
    """As good as independent of what chose a rewrite: uniform in [0, 1], a function of the answer."""
    return [int.from_bytes(digest(x, y)[:4]) / 2**32 for x, y in zip(prompts, responses, strict=True)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model, prompters and a policy with adapters of their own, and prompts."""
    folder = tmp_path_factory.mktemp("home")
    model, tokenizer = tiny_model(seed=1)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for name, seed in (("one", 1), ("two", 2), ("policy", 3)):
        base = load_model(folder / "base")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(base[0], adapter_config(base[0], 4, 1.0))
            for key, value in adapted.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(value, std=0.2)
        facts = {"settings": {"task": "rlhf" if name == "policy" else "prompter"}}
        Prompter(adapted.eval(), base[1], max_tokens=4, base=str(folder / "base"), facts=facts).save(
            folder / name
        )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


def arguments(home, out, *more, sampling=PLAIN, reward="shares"):
    return [
        "rollout",
        *("--out", str(out), "--prompts-file", str(home / "prompts.txt"), "--dtype", "float32"),
        *("--target", str(home / "base"), "--reward", f"{__name__}:{reward}@0,1"),
        *("--answer-tokens", str(sampling.max_tokens), "--answer-temperature", str(sampling.temperature)),
        *("--answer-top-p", str(sampling.top_p), "--answer-top-k", str(sampling.top_k)),
        *("--prompter", str(home / "base"), "--rewrite-tokens", "4"),
        *more,
    ]


def trained(home):
    return ["--trained", str(home / "one"), str(home / "two"), f"mine={home / 'one'}"]


def rows_of(out):
    rows = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts.read(out / "rollouts.jsonl")) == len(rows)  # the reader agrees
    return rows


def answers_of(out):
    """Token ids by (who answered, prompt as asked, seed of the stream, sample)."""
    found = map(json.loads, lines(out / "answers"))
    return {(a["model"], a["prompt"], a["seed"], a["sample"]): a["answer"]["ids"] for a in found}


def log_prob(model, prompt_ids, said, sampling):
    """log π(said | prompt) by a plain forward pass and NumPy, one token after the other."""
    total = 0.0
    with torch.no_grad():
        ids = [*prompt_ids, *said]
        logits = model(torch.tensor([ids])).logits[0].double().numpy()[len(prompt_ids) - 1 : -1]
    for row, token in zip(logits, said, strict=True):
        p = np.exp((row - row.max()) / sampling.temperature)
        if sampling.top_k:
            p[p < np.sort(p)[-sampling.top_k]] = 0
        p /= p.sum()
        order = np.argsort(-p)
        p[order[np.cumsum(p[order]) - p[order] >= sampling.top_p]] = 0
        with np.errstate(divide="ignore"):
            total += np.log(p[token] / p.sum())
    return total


@pytest.fixture(scope="module", params=[PLAIN, TRUNCATED], ids=["plain", "truncated"])
def run(request, home, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    more = [*trained(home), "--rlhf", str(home / "policy")]
    assert main.main(arguments(home, out, *more, sampling=request.param)) == 0
    return request.param, out


def test_the_summary_is_of_the_rows(run):
    _, out = run
    found, rows = rollout.summarise(out / rollout.FILE, texts=2), rows_of(out)
    assert (found.rollouts, found.prompts, found.low, found.high) == (len(rows), len(PROMPTS), 0, 1)
    for arm in found.arms:
        mine = [r for r in rows if r["arm"] == arm.name]
        each = [np.mean([r["reward"] for r in mine if r["x"] == x]) for x in PROMPTS]
        assert arm.mean.value == pytest.approx(np.mean(each))
        assert arm.mean.lo <= arm.mean.value <= arm.mean.hi
        assert (arm.rollouts, arm.seeds) == (len(mine), len({r["seed"] for r in mine}))
    assert {(r.x, r.arm) for r in found.texts} == {(x, arm.name) for x in PROMPTS[:2] for arm in found.arms}
    assert all(r.draw == r.answer == 0 for r in found.texts)
    assert {arm.name for arm in found.arms} == {r["arm"] for r in rows}


def test_log_probs_of_answers_are_those_of_a_plain_forward_pass(run, home):
    sampling, out = run
    frozen, tokenizer = load_model(home / "base")
    policy = Prompter.from_pretrained(home / "policy").model
    base, tuned, ids = str(home / "base"), str(home / "policy"), answers_of(out)
    impossible, specials, swapped, unprocessed = 0, 0, [], []
    for row in rows_of(out):
        who, asked = (tuned, row["x"]) if row["arm"] == "rlhf" else (base, row["rewrite"].strip() or " ")
        place = row["draw"] * 2 + row["answer"]
        said = ids[who, asked, stream("answers", row["seed"]), place]
        of_x = log_prob(frozen, target_ids(tokenizer, row["x"]), said, sampling)
        assert row["logp_frozen_x"] == pytest.approx(of_x, abs=2e-5)
        impossible += of_x == -np.inf
        specials += 0 in said or 2 in said
        if row["arm"] == "rlhf":
            of_policy = log_prob(policy, target_ids(tokenizer, row["x"]), said, sampling)
            assert row["logp_policy"] == pytest.approx(of_policy, abs=2e-5)
            assert row["rewrite"] is row["logp_frozen_rewrite"] is row["logp_prompter"] is None
            continue
        of_rewrite = log_prob(frozen, target_ids(tokenizer, asked), said, sampling)
        assert of_rewrite > -np.inf  # it was drawn
        assert row["logp_frozen_rewrite"] == pytest.approx(of_rewrite, abs=2e-5)
        assert row["logp_policy"] is None
        if row["x"] == row["rewrite"]:
            assert row["logp_frozen_x"] == row["logp_frozen_rewrite"]
        swapped.append(abs(of_rewrite - row["logp_frozen_x"]))
        natural = log_prob(frozen, target_ids(tokenizer, asked), said, PLAIN)
        unprocessed.append(abs(natural - row["logp_frozen_rewrite"]))
    assert specials > 5  # tokens without a text: cut afresh, the answers would be others
    assert (impossible > 5) == (sampling is TRUNCATED)
    # Mutants: x and x′ confused; the model's own distribution in the place of the sampler's.
    assert np.mean(np.array(swapped) > 1e-2) > 0.5
    assert (np.mean(np.array(unprocessed) > 1e-2) > 0.9) == (sampling is TRUNCATED)


def test_log_probs_of_rewrites_are_those_of_a_plain_forward_pass(run, home):
    _, out = run
    reference = Prompter.from_pretrained(home / "base")
    parties = {"sft": reference, "mine": Prompter.from_pretrained(home / "one")}
    parties["trained"] = parties["mine"]
    rows = {(r["arm"], r["seed"], r["x"], r["draw"]): r for r in rows_of(out) if not r["answer"]}
    swapped = []
    for arm, party in parties.items():
        given = [party.template.prompt_ids(party.tokenizer, x) for x in PROMPTS]
        keys = [[sample_key("rollout", 0, x, i) for i in range(4)] for x in PROMPTS]
        drawn = sample_and_score(party.model, 0, given, keys, Sampling(max_tokens=4))
        for x, prompt, row in zip(PROMPTS, given, drawn, strict=True):
            for i, (said, _) in enumerate(row):
                found = rows[arm, 0, x, i]
                assert found["rewrite"] == party.template.rewrite(party.tokenizer, x, tuple(said))
                of_prompter = log_prob(party.model, prompt, said, PLAIN)  # whatever π_F's sampler
                of_reference = log_prob(reference.model, prompt, said, PLAIN)
                assert found["logp_prompter"] == pytest.approx(of_prompter, abs=2e-5)
                assert found["logp_reference"] == pytest.approx(of_reference, abs=2e-5)
                swapped += [abs(of_prompter - of_reference)] * (arm != "sft")
    assert np.mean(np.array(swapped) > 1e-2) > 0.9  # mutant: the two confused


def test_every_row_is_there_once_and_names_its_parties(run, home):
    _, out = run
    rows = rows_of(out)
    arms = Counter((row["arm"], row["seed"]) for row in rows)
    names = [("none", 0), ("sft", 0), ("trained", 0), ("trained", 1), ("mine", 0), ("rlhf", 0)]
    assert arms == dict.fromkeys(names, len(PROMPTS) * 4 * 2)
    assert len({row["prompter"] for row in rows if row["arm"] == "trained"}) == 2
    assert rows[0]["frozen"].startswith(str(home / "base"))
    # Draws of one text are draws of their own: arm none asks the same of the frozen model every time.
    said = Counter((row["x"], row["response"]) for row in rows if row["arm"] == "none")
    assert len(said) > len(PROMPTS) * 3


def resampled(home, out, *more):
    common = ["--arms", "star", "best_of_n", "--lam", "1e-3", "--proposals", "8", "--draws", "8", *more]
    assert main.main(arguments(home, out, *common, reward="noise")) == 0
    return rows_of(out)


def test_star_and_best_of_n_choose_by_the_proposals_rewards(home, tmp_path, monkeypatch):
    """Weights recomputed from the answers on file. Fresh answers to what was chosen are worth 1/2 on average;
    the mean of at least 40 independent uniform rewards misses it by 0.25 with a chance below 0.02%."""
    rows = resampled(home, tmp_path / "fresh")
    of_proposals, ids = stream("proposals", 0), answers_of(tmp_path / "fresh")
    _, tokenizer = load_model(home / "base")

    def text(said):
        return tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    judged = {asked: text(said) for (_, asked, seed, _), said in ids.items() if seed == of_proposals}
    reference = Prompter.from_pretrained(home / "base")
    reference.max_tokens = 4
    keys = [[sample_key("proposals", 0, x, i) for i in range(8)] for x in PROMPTS]
    given = [reference.template.prompt_ids(tokenizer, x) for x in PROMPTS]
    drawn = sample_and_score(reference.model, 0, given, keys, Sampling(max_tokens=4))
    for x, prompt, row in zip(PROMPTS, given, drawn, strict=True):
        texts = [reference.template.rewrite(tokenizer, x, tuple(said)) for said, _ in row]
        worth = [noise([x], [judged[t or " "]])[0] for t in texts]
        best = {t for t, w in zip(texts, worth, strict=True) if w == max(worth)}
        for arm in ("star", "best_of_n"):  # λ is small: the best alone
            mine = [r for r in rows if r["arm"] == arm and r["x"] == x]
            assert {r["rewrite"] for r in mine} == best, arm
            scores = {log_prob(reference.model, prompt, said, PLAIN) for said, _ in row}
            assert all(min(abs(r["logp_reference"] - s) for s in scores) < 2e-5 for r in mine)
            assert all(r["logp_prompter"] is None for r in mine)
    fresh = np.mean([r["reward"] for r in rows])
    assert abs(fresh - 0.5) < 0.25
    # The mutant: the answers that chose are those that count.
    for module in (rollout, draws):
        monkeypatch.setattr(module, "stream", lambda kind, seed: 5)
    reused = resampled(home, tmp_path / "reused")
    assert np.mean([r["reward"] for r in reused if r["draw"] == r["answer"] == 0]) > 0.8


# --- interruptions ---------------------------------------------------------------------------------------


class Cut(BaseException):
    """An interruption that nothing catches."""


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """What an uninterrupted run in blocks of two prompts leaves."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "BLOCK", 2)
        assert main.main(arguments(home, out, *trained(home)[:2], "--arms", "none", "star")) == 0
    return (out / "rollouts.jsonl").read_bytes()


@pytest.mark.parametrize("cut", ["in the middle of a write", "before a write", "in the middle of a block"])
@pytest.mark.parametrize("block", [0, 4])
def test_an_interrupted_run_goes_on_to_the_same_file(cut, block, whole, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "BLOCK", 2)
    command = arguments(home, tmp_path, *trained(home)[:2], "--arms", "none", "star")
    append, check, count = rollout.append, rollout._frozen_scores, iter(range(99))

    def torn(path, data):
        if next(count) == block:
            append(path, data[: len(data) // 2] if cut.startswith("in") else b"")
            raise Cut
        append(path, data)

    def unscored(*positional):
        if next(count) == block:
            raise Cut
        return check(*positional)

    with pytest.MonkeyPatch.context() as patch:
        name, cutter = ("_frozen_scores", unscored) if cut.endswith("block") else ("append", torn)
        patch.setattr(rollout, name, cutter)
        with pytest.raises(Cut):
            main.main(command)
    assert not (tmp_path / "rollouts.jsonl").exists()
    answered = len(lines(tmp_path / "answers"))
    capsys.readouterr()
    assert main.main(command) == 0
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole
    said = capsys.readouterr().err
    assert ("(56 rollouts kept)" in said) == (block == 4)  # of 5 + 2 prompts, 8 each
    # A third time asks nothing.
    assert answered > 0
    answered = lines(tmp_path / "answers")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert main.main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jsonl")}
    assert lines(tmp_path / "answers") == answered


def test_kill_9(whole, home, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1])\nfrom alignpro.commands import main as cli\n"
    code += "from alignpro.llm.arms import rollout\nrollout.BLOCK = 2\ncli.main(sys.argv[2:])"
    command = arguments(home, tmp_path, *trained(home)[:2], "--arms", "none", "star")
    command = [a.replace(__name__ + ":", Path(__file__).stem + ":") for a in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", code, str(Path(__file__).parent), *command]
    process = subprocess.Popen(run, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    partial = tmp_path / "rollouts.partial.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.stat().st_size:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "BLOCK", 2)
        assert main.main(command) == 0
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole


def test_arms_are_added_and_settings_are_not_changed(whole, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rollout, "BLOCK", 2)
    assert main.main(arguments(home, tmp_path, "--arms", "none")) == 0
    assert main.main(arguments(home, tmp_path, "--arms", "star")) == 0
    assert main.main(arguments(home, tmp_path, *trained(home)[:2], "--arms", "none", "star")) == 0
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole
    capsys.readouterr()
    for more, name in (
        (["--draws", "3"], "draws = 4, not 3"),
        (["--arms", "star", "--lam", "0.3"], "arms.star (seed 0).lam = 0.05, not 0.3"),
        (["--answer-top-k", "3"], "sampling.top_k = 0, not 3"),
        (["--prompts", "2"], "prompts = "),
    ):
        assert main.main(arguments(home, tmp_path, *more)) == 2
        assert name in capsys.readouterr().err
    assert (tmp_path / "rollouts.jsonl").read_bytes() == whole


# --- endpoints, and mistakes -----------------------------------------------------------------------------


def test_an_endpoint_gives_no_log_probs_and_a_budget_is_not_overrun(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def command(out, *more):
        command = arguments(home, out, "--arms", "none", "sft", "--rlhf", str(home / "policy"), *more)
        command[command.index("--target") + 1] = server.url
        return [*command, "--target-model", "m", "--target-concurrency", "2"]

    with Server() as server:
        assert main.main(command(tmp_path / "whole")) == 0
        rows = rows_of(tmp_path / "whole")
        asked = len(server.requests)
        assert main.main(command(tmp_path / "cut", "--target-max-calls", "60")) == 2
        assert "max_calls 60: the budget" in capsys.readouterr().err
        assert len(server.requests) == asked + 60
        assert main.main(command(tmp_path / "cut", "--target-max-calls", "9999")) == 0
        assert len(server.requests) == 2 * asked
    whole, cut = (tmp_path / name / "rollouts.jsonl" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    for row in rows:
        assert row["logp_frozen_x"] is row["logp_frozen_rewrite"] is None
        assert (row["logp_policy"] is None) == (row["arm"] != "rlhf")
        assert (row["logp_prompter"] is None) == (row["arm"] != "sft")
    assert rows[0]["frozen"].startswith(f"m {server.url}")


def test_a_vllm_server_gives_every_log_prob(home, tmp_path, monkeypatch, capsys):
    """Those of a plain forward pass, of a server (a stub: `vllm_stub`) and of vLLM in this process (a fake of
    its module), whose rollouts differ in nothing else; and a budget counts what scoring asked for."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sampling, few = TRUNCATED, ["--prompts", "3", "--draws", "2"]
    model, tokenizer = load_model(home / "base")
    brain = vllm_stub.Engine(model, tokenizer, int(tokenizer.eos_token_id))
    monkeypatch.setitem(sys.modules, "vllm", vllm_stub.module(brain))
    monkeypatch.setattr(engine, "find_spec", lambda name: name)

    def command(out, target, *more):
        command = arguments(
            home, out, "--arms", "none", "sft", "--rlhf", str(home / "policy"), sampling=sampling
        )
        command[command.index("--target") + 1] = target
        return [*command, *few, *more]

    with vllm_stub.VLLMServer(brain) as server:
        served = [
            "--target-model",
            "m",
            "--target-tokenizer",
            str(home / "base"),
            "--target-concurrency",
            "1",
        ]
        assert main.main(command(tmp_path / "whole", server.url, *served)) == 0
        told, asked = capsys.readouterr().err, len(server.requests)
        assert f"in {asked} calls" in told
        most = ["--target-max-calls", str(asked - 20)]
        assert main.main(command(tmp_path / "cut", server.url, *served, *most)) == 2
        assert len(server.requests) == 2 * asked - 20
        assert "max_calls" in capsys.readouterr().err
        assert main.main(command(tmp_path / "cut", server.url, *served)) == 0
    assert (tmp_path / "cut" / "rollouts.jsonl").read_bytes() == (
        tmp_path / "whole" / "rollouts.jsonl"
    ).read_bytes()
    assert main.main(command(tmp_path / "engine", f"vllm:{home / 'base'}")) == 0
    rows, again = rows_of(tmp_path / "whole"), rows_of(tmp_path / "engine")
    said = answers_of(tmp_path / "whole")
    for row, other in zip(rows, again, strict=True):
        for name in ("logp_frozen_x", "logp_frozen_rewrite", "logp_policy", "response", "rewrite"):
            assert row[name] == other[name]
        if row["arm"] == "rlhf":
            assert row["logp_frozen_x"] is not None
            continue
        prompt = row["rewrite"] if row["rewrite"].strip() else " "
        ids = said["m", prompt, stream("answers", row["seed"]), row["draw"] * 2 + row["answer"]]
        for name, text in (("logp_frozen_x", row["x"]), ("logp_frozen_rewrite", prompt)):
            want = log_prob(model, target_ids(tokenizer, text), ids, sampling)
            assert row[name] == pytest.approx(want, abs=1e-4)


BAD = {
    "tokenizer": (["--target-tokenizer", "HOME/base"], "target_tokenizer: is for a vLLM server"),
    "engine": (["--target-engine", "{}"], "target_engine: is for vllm:NAME"),
    "no vllm": (["--target", "vllm:HOME/base"], "the package vllm is missing; pip install vllm"),
    "unknown arm": (["--arms", "best"], "arms 'best': choose from none, sft, star, best_of_n"),
    "arm without folder": (["--arms", "trained"], "name its folder in trained"),
    "twice": (["--arms", "sft", "sft"], "name each once"),
    "no arms": (["--arms"], "arms: none given"),
    "no folder": (["--trained", "/nowhere"], "trained '/nowhere': holds no prompter.json"),
    "taken name": (["--trained", "sft=HOME/one"], "sft is an arm of its own"),
    "a policy": (["--trained", "HOME/policy"], "trained with --policy rlhf; give it as --rlhf"),
    "a prompter": (["--rlhf", "HOME/one"], "trained with --policy prompter; give it as --trained"),
    "another base": (["--trained", "HOME/one", "--prompter", "smollm2-135m-instruct"], "it was trained from"),
    "another target": (["--rlhf", "HOME/policy", "--target", "smollm2-135m-instruct"], "is not the target"),
    "draws": (["--draws", "0"], "draws 0: give a whole number of at least 1"),
    "lam": (["--lam", "0"], "lam 0.0: give a positive"),
    "best of": (["--best-of", "17"], "best_of 17: choose from 1 to the 16 proposals"),
    "split": (["--split", "dev"], "split 'dev': choose from train, validation, test"),
    "prompts": (["--prompts", "9"], "prompts 9: choose from 1 to the 5 there are"),
    "endpoint": (["--target-model", "m"], "model: is for an endpoint"),
    "temperature": (["--answer-temperature", "-1"], "temperature -1.0: choose a finite number"),
    "reward": (["--reward", "nope"], "reward 'nope'"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_told_in_one_line_before_anything_is_loaded(case, home, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("alignpro.llm.policies.prompter.Prompter.from_pretrained", None)
    monkeypatch.setattr("alignpro.commands.opening.World.target", None)
    more, message = BAD[case]
    command = arguments(home, tmp_path / "out", *(a.replace("HOME", str(home)) for a in more))
    assert main.main(command) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


def test_damage_and_changed_weights_are_noticed(home, tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(home / "one", folder)
    command = arguments(home, tmp_path / "out", "--arms", "none", "--trained", str(folder), "--prompts", "1")
    assert main.main(command) == 0
    shutil.copy(home / "two" / "adapter_model.safetensors", folder)
    capsys.readouterr()
    assert main.main(command) == 2
    assert "arms.trained (seed 0).weights = " in capsys.readouterr().err
    (folder / "prompter.json").write_text('{"base": "x"}')
    assert main.main(command) == 2
    assert "prompter.json is not one that Prompter.save wrote" in capsys.readouterr().err


def test_a_template_that_appends(home, tmp_path):
    assert main.main(arguments(home, tmp_path, "--arms", "sft", "--template", "append")) == 0
    rows = rows_of(tmp_path)
    assert all(row["rewrite"].startswith(row["x"]) for row in rows)
    assert any(row["rewrite"] != row["x"] for row in rows)
    # The trained prompters' template is that of ρ_sft, too.
    both = arguments(home, tmp_path / "two", *trained(home), "--template", "append")
    assert main.main(both) == 2


def test_runs_that_share_their_answers_ask_once(home, tmp_path, capsys):
    """And get the rows of runs that do not; another reward of the same answers costs none."""
    shared = ["--answers-folder", str(tmp_path / "shared")]
    assert main.main(arguments(home, tmp_path / "own")) == 0
    assert main.main(arguments(home, tmp_path / "first", *shared)) == 0
    asked = len(lines(tmp_path / "shared"))
    capsys.readouterr()
    assert main.main(arguments(home, tmp_path / "second", *shared, reward="noise")) == 0
    assert " 0 answers in 0 calls" in capsys.readouterr().err.replace("alignpro:", "")
    assert len(lines(tmp_path / "shared")) == asked == len(lines(tmp_path / "own" / "answers"))
    assert not (tmp_path / "first" / "answers").exists()
    own, first, second = (rows_of(tmp_path / name) for name in ("own", "first", "second"))
    assert own == first
    assert [row["response"] for row in second] == [row["response"] for row in own]


def test_old_cached_answers_without_ids_are_refused(home):

    target = LocalTarget(tiny_model(seed=1))
    with pytest.raises(AlignProError, match="has no token ids"):
        target.log_probs(["a"], [Answer("b", "stop", 1, 2)])
