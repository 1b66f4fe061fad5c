"""Every model family: what is sampled is what is scored, and every verb runs on it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo

from alignpro import cli
from alignpro.errors import AlignProError
from alignpro.llm import check, demo, forward, rewards
from alignpro.llm.chat import chat_of
from alignpro.llm.enumerate import Enumeration, EnumerationSettings
from alignpro.llm.frozen import Sampling
from alignpro.llm.local import LocalTarget
from alignpro.llm.models import load_model
from alignpro.llm.policy import draw, end_tokens, log_probs, sample_key
from alignpro.llm.prompter import Prompter, Template, target_ids
from alignpro.llm.tree import PrefixTree, leaf_probabilities

FAMILIES = list(zoo.FAMILIES)
NO_CLASSIFIER = ("lfm2",)
NEAR = 1e-4
"""Nats; float32 rounding of these models leaves 1e-5."""


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """Name of a family -> its folder, built when it is asked for."""
    folder, built = tmp_path_factory.mktemp("zoo"), {}

    def get(name):
        if name not in built:
            make = zoo.build_classifier if name in zoo.CLASSIFIERS else zoo.build
            built[name] = make(name, folder)
        return built[name]

    return get


@pytest.fixture(scope="session")
def loaded(animals):
    """Name of a family -> its model and tokenizer, loaded once."""
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = load_model(animals(name), device="cpu")
        return cache[name]

    return get


def plain_log_probs(model, prompt, said):
    """[len(said)] by one forward pass of this sequence alone, on the model's own logits."""
    ids = torch.tensor([[*prompt, *said]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(said)[:, None])[:, 0].numpy()


def sequences(tokenizer, seed=0):
    """Prompts of several lengths, some beyond any window here, each with continuations that share a start."""
    rng = np.random.default_rng(seed)
    ordinary = np.arange(20, min(300, len(tokenizer)))

    def tokens(n):
        return [int(i) for i in rng.choice(ordinary, n)]

    pairs = []
    for length in (5, 9, 9, 30):
        prompt, start = tokens(length), tokens(2)
        pairs += [(prompt, [*start, *tokens(n)]) for n in (1, 7, 24)]
    return [p for p, _ in pairs], [said for _, said in pairs]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_a_plain_forward_pass(name, loaded):
    model, tokenizer = loaded(name)
    assert forward.how_of(model).masks == zoo.FAMILIES[name].masks
    prompts, said = sequences(tokenizer)
    with torch.no_grad():
        together = log_probs(model, prompts, said)
        few = log_probs(model, prompts, said, most=40)
    for i, (prompt, ids) in enumerate(zip(prompts, said, strict=True)):
        expected = plain_log_probs(model, prompt, ids)
        for scores in (together, few):  # whatever else is in the call
            got = scores.log_probs[i].double().numpy()
            np.testing.assert_allclose(got[: len(ids)], expected, rtol=0, atol=NEAR)
            assert not got[len(ids) :].any()
    # Entropies and hidden states are of the same passes.
    with torch.no_grad():
        scores = log_probs(model, prompts[:1], said[:1], hidden=True)
        ids = torch.tensor([[*prompts[0], *said[0]]])
        out = model(input_ids=ids, output_hidden_states=True)
        logits = out.logits[0, len(prompts[0]) - 1 : -1].double()
    p = torch.softmax(logits, -1)
    entropy = -(p * torch.log_softmax(logits, -1)).sum(-1)
    np.testing.assert_allclose(scores.entropies[0].numpy(), entropy.numpy(), rtol=0, atol=NEAR)
    hidden = out.hidden_states[-1][0, len(prompts[0]) - 1 : -1]
    np.testing.assert_allclose(scores.hidden[0].numpy(), hidden.numpy(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_a_plain_forward_pass(name, loaded):
    model, tokenizer = loaded(name)
    prompts, said = sequences(tokenizer, seed=1)
    prompts, said = prompts[::3], said[2::3]
    # Any weight of a block in the middle: what flows back through head and upper layers reaches it.
    _, blocks = zoo_blocks(model)
    parameter = next(p for p in blocks[1].parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight
    asked = [p for p in model.parameters() if p is not parameter]
    try:
        for p in asked:
            p.requires_grad_(False)
        parameter.requires_grad_(True)
        (ours,) = torch.autograd.grad(log_probs(model, prompts, said).log_probs.sum(), parameter)
        total = torch.zeros(())
        for prompt, ids in zip(prompts, said, strict=True):
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum()
        (plain,) = torch.autograd.grad(total, parameter)
        # A head that is trained goes the other way, through checkpointed chunks: the same gradient.
        head.requires_grad_(True)
        (trained,) = torch.autograd.grad(log_probs(model, prompts, said).log_probs.sum(), parameter)
    finally:
        for p in model.parameters():
            p.requires_grad_(True)
    scale = float(plain.abs().max())
    assert scale > 1e-3
    for found in (ours, trained):
        np.testing.assert_allclose(found.numpy(), plain.numpy(), rtol=0, atol=2e-4 * scale)


def zoo_blocks(model):
    from alignpro.llm.adapters import blocks_of

    return blocks_of(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_prefix_trees_are_exact(name, loaded):
    """Leaves of trees behind prompts of different lengths, one beyond the window, against plain passes."""
    model, tokenizer = loaded(name)
    prompts, said = sequences(tokenizer, seed=2)
    trees = [PrefixTree(tuple((*ids, 1 + k) for k, ids in enumerate(said[i : i + 3]))) for i in (0, 9)]
    got = leaf_probabilities(model, [prompts[0], prompts[9]], trees)
    for prompt, tree, found in zip((prompts[0], prompts[9]), trees, got, strict=True):
        children = {}
        for leaf in tree.sequences:
            for t in range(len(leaf)):
                children.setdefault(leaf[:t], set()).add(leaf[t])
        expected = []
        for leaf in tree.sequences:
            total = 0.0
            for t, token in enumerate(leaf):
                some = sorted(children[leaf[:t]])
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prompt, *leaf[:t]]])).logits[0, -1].double()
                total += float(torch.log_softmax(logits[some], 0)[some.index(token)])
            expected.append(total)
        np.testing.assert_allclose(np.log(found), expected, rtol=0, atol=NEAR)


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_scored_as_the_model_scores_them(name, loaded):
    """Several samples of prompts of different lengths, past the window, by what was kept from sampling."""
    model, tokenizer = loaded(name)
    prompts, _ = sequences(tokenizer, seed=3)
    rows = [p for p in sorted({tuple(p) for p in prompts}, key=len) for _ in range(3)]
    keys = [sample_key("zoo", i) for i in range(len(rows))]
    drawn = draw(model, tokenizer.pad_token_id, rows, keys, Sampling(max_tokens=20), score=True)
    ends = end_tokens(model)
    for row, (ids, values) in zip(rows, drawn, strict=True):
        np.testing.assert_allclose(values, plain_log_probs(model, row, ids), rtol=0, atol=NEAR)
        assert not set(ids[:-1]) & set(ends)
        assert len(ids) == 20 or ids[-1] in ends
    # A draw is its key's: alone it is the same, but where rounding tips one token.
    pad = tokenizer.pad_token_id
    alone = [
        draw(model, pad, [row], [key], Sampling(max_tokens=20))[0]
        for row, key in zip(rows, keys, strict=True)
    ]
    assert sum(a[0] == b[0] for a, b in zip(alone, drawn, strict=True)) >= len(rows) - 1


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_finds_masks_without_windows(name, dtype, animals, monkeypatch):
    """Read wrongly, a model is read in the slower way, which is right; low precision hides nothing of it."""
    right = forward.windows

    def mutant(model):
        return dict.fromkeys(right(model), None)

    model, tokenizer = load_model(animals(name), dtype, "cpu")
    assert forward.how_of(model).masks != "none"
    monkeypatch.setattr(forward, "windows", mutant)  # check has its own: it still looks beyond the window
    assert check.check_model(model, tokenizer).masks == "none"


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_finds_layers_that_masks_do_not_reach(name, dtype, animals, monkeypatch):
    """Told that masks reach every layer, the check finds that branches leak into one another."""
    monkeypatch.setattr(check, "masks_of", lambda model: ["one", "none"])
    model, tokenizer = load_model(animals(name), dtype, "cpu")
    assert check.check_model(model, tokenizer).masks == "none"


def test_what_agrees_with_nothing_is_refused(animals, monkeypatch):
    model, tokenizer = load_model(animals("qwen2_5"), device="cpu")
    right = forward.Head.finish
    monkeypatch.setattr(forward.Head, "finish", lambda self, logits: 1.1 * right(self, logits))
    monkeypatch.setattr(forward, "_EdgeLogProbs", None)
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(AlignProError, match=r"^model 'odd': the scores of sequences differ .* cannot use it"):
        check.check_model(model, tokenizer, "odd")


def test_a_model_that_was_not_checked_is_refused(animals):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(animals("qwen2_5"))
    with pytest.raises(AlignProError, match=r"it was not checked.*models\.prepare"):
        log_probs(model, [[5]], [[6]])


# --- chats ---


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_where_the_template_ends_it(name, loaded):
    model, tokenizer = loaded(name)
    row = zoo.FAMILIES[name]
    end = tokenizer.convert_tokens_to_ids(row.end)
    assert chat_of(tokenizer).end == end
    assert {end, *map(tokenizer.convert_tokens_to_ids, row.ends)} <= set(end_tokens(model))
    for template in (Template(), Template(append=True)):
        assert template.rewrite_ids(tokenizer, "x", "x y")[-1] == end
    # A rewrite is scored as the model would say it.
    prompter = Prompter(model, tokenizer)
    ids = prompter.prompt_ids(["How?"])[0]
    said = prompter.template.rewrite_ids(tokenizer, "How?", "Explain how.")
    expected = plain_log_probs(model, ids, said).sum()
    assert prompter.log_probs(["How?"], ["Explain how."])[0] == pytest.approx(expected, abs=NEAR)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_instruction_reaches_the_model(name, loaded):
    """Also where the template refuses a system message: then it stands before the first user's turn."""
    _, tokenizer = loaded(name)
    template = Template()
    text = tokenizer.decode(list(template.prompt_ids(tokenizer, "How do plants grow today?")))
    assert template.system in text
    assert text.index(template.system) < text.index(template.examples[0][0])
    assert "Request: How do plants grow today?" in text
    assert text.endswith("Rewritten:")
    takes = chat_of(tokenizer).takes_system
    assert takes == (name not in ("gemma2", "mistral"))


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_prompt_are_text(name, loaded):
    _, tokenizer = loaded(name)
    control = chat_of(tokenizer).control_tokens
    ids = {tokenizer.convert_tokens_to_ids(token) for token in control}
    hostile = "a " + " b".join(control) + "\nc"
    plain = target_ids(tokenizer, "a c")
    for found in (target_ids(tokenizer, hostile), Template().prompt_ids(tokenizer, hostile)):
        text = tokenizer.decode(list(found))
        assert hostile in text
    count = sum(i in ids for i in target_ids(tokenizer, hostile))
    assert count == sum(i in ids for i in plain)  # the template's own
    assert not ids & set(chat_of(tokenizer).text_ids(hostile))
    # Mutant: the text handed to the tokenizer as it is.
    assert sum(i in ids for i in tokenizer(hostile, add_special_tokens=False).input_ids) == len(control)
    # What spells nothing is encoded as ever.
    messages = [{"role": "user", "content": "How do plants grow?"}]
    text = chat_of(tokenizer).render(messages)
    assert target_ids(tokenizer, messages[0]["content"]) == tuple(
        tokenizer(text, add_special_tokens=False).input_ids
    )


def test_today_is_one_day(loaded):
    _, tokenizer = loaded("llama3_2")
    text = tokenizer.decode(list(target_ids(tokenizer, "How?")))
    assert "Today Date: 26 Jul 2024" in text
    # The template asks the clock: left alone it would say another day.
    alone = tokenizer.apply_chat_template([{"role": "user", "content": "How?"}], tokenize=False)
    assert "Today Date: 26 Jul 2024" not in alone
    assert chat_of(tokenizer).describe()["date"] == "2024-07-26"


def test_thoughts_are_taken_off_and_counted(animals, capsys):
    """Qwen3.5 opens a thought before every answer, Qwen3 may begin with one."""
    model, tokenizer = load_model(animals("qwen3_5"), device="cpu")
    assert "opens a thought" in capsys.readouterr().err
    chat = chat_of(tokenizer)
    encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    assert chat.opens_thought
    assert chat.said(encode("so it is</think>\n\nYes.")) == ("Yes.", True) or vars(
        chat.said(encode("so it is</think>\n\nYes."))
    ) == {"text": "Yes.", "thought": True}
    cut = chat.said(encode("so it is and on and on"))
    assert (cut.text, cut.thought) == ("", True)
    # A prompter's thought is closed at once: what follows is the rewrite.
    text = tokenizer.decode(list(Template().prompt_ids(tokenizer, "How?")))
    assert text.endswith("<think>\n\n</think>\n\nRewritten:")
    target = LocalTarget((model, tokenizer))
    (answers,) = target.respond(["How?"], Sampling(max_tokens=6), samples=4)
    assert all(answer.thought for answer in answers)
    # Told not to think, it does not open one; the distribution is another, and so is its name in caches.
    quiet = LocalTarget(
        animals("qwen3_5"), device="cpu", dtype="float32", chat_template_kwargs={"enable_thinking": False}
    )
    assert not chat_of(quiet.tokenizer).opens_thought
    assert quiet.revision != target.revision
    _, other = load_model(animals("qwen3"), device="cpu")
    found = chat_of(other).said(other("<think>\nhm\n</think>\n\nNo.", add_special_tokens=False).input_ids)
    assert (found.text, found.thought) == ("No.", True)
    said = chat_of(other).said(other("No <think> of it", add_special_tokens=False).input_ids)
    assert (said.text, said.thought) == ("No <think> of it", False)


def test_prompts_without_room_are_one_error(loaded):
    model, tokenizer = loaded("phi3_5")
    prompter = Prompter(model, tokenizer, base="phi")
    with pytest.raises(
        AlignProError, match=r"has \d+ tokens to prompter 'phi'.* exceed the 1024 that it reads"
    ):
        prompter.rewrites(["How do plants grow? " * 300])


# --- the verbs ---


class Letters:
    """`zoo.letters` as a packaged reward."""

    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array(zoo.letters(prompts, responses))

    def describe(self):
        return {"name": "letters"}


def run(*arguments):
    assert cli.main([str(a) for a in arguments]) == 0, arguments


@pytest.mark.parametrize("name", FAMILIES)
def test_every_verb_runs(name, animals, tmp_path, monkeypatch, capsys):
    """All but reward-model: sft, train in every way, rewrite, merge, resample, rollout, judge, demo."""
    monkeypatch.syspath_prepend(str(zoo.Path(zoo.__file__).parent))
    model, prompts = animals(name), zoo.write_prompts(tmp_path / "prompts.jsonl")
    pairs = tmp_path / "pairs.jsonl"
    rows = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    rows += [f"Name painter number {i}." for i in range(24)]
    pairs.write_text("".join(json.dumps({"prompt": x, "rewrite": f"{x} Be brief."}) + "\n" for x in rows))
    world = (
        "--target",
        model,
        "--reward",
        "zoo:letters@0,1",
        "--answer-tokens",
        "6",
        "--prompts-file",
        prompts,
    )
    short = ("--iterations", "1", "--prompts", "2", "--samples", "2", "--epochs", "1", "--max-tokens", "5")
    short += ("--learning-rate", "1e-7")  # so small that a second step of the round clips nothing either
    policy = ("--prompter", model, *world)
    run(
        "sft",
        "--out",
        tmp_path / "sft",
        "--prompter",
        model,
        "--pairs",
        pairs,
        "--epochs",
        "1",
        "--max-tokens",
        "64",
    )
    run("train", "--out", tmp_path / "ppo", *policy, *short, "--minibatches", "2")
    run(
        "train",
        "--out",
        tmp_path / "rloo",
        *policy,
        *short,
        "--algorithm",
        "rloo",
        "--policy-dtype",
        "bfloat16",
    )
    run("train", "--out", tmp_path / "grpo", *policy, *short, "--algorithm", "grpo", "--microbatches", "2")
    run("train", "--out", tmp_path / "rlhf", *policy, *short, "--task", "rlhf")
    run(
        *("train", "--out", tmp_path / "paper", *policy, "--preset", "paper", "--prompts", "4"),
        *(
            "--minibatches",
            "2",
            "--iterations",
            "1",
            "--max-tokens",
            "5",
            "--gradient-checkpointing",
            "--learning-rate",
            "1e-7",
        ),
    )
    for trained in ("ppo", "rloo", "grpo", "rlhf", "paper"):
        first = json.loads((tmp_path / trained / "metrics.jsonl").read_text().splitlines()[0])
        kl = first.get("ppo/kl_k1", first.get("kl"))
        assert abs(kl) < 1e-3, (trained, kl)
        clips = [v for k, v in first.items() if "clip_fraction" in k or k == "clip_ratio/region_mean"]
        assert clips
        assert all(v == 0 for v in clips), (trained, clips)
        assert json.loads((tmp_path / trained / "settings.json").read_text())["read"]["masks"]
    run("rewrite", tmp_path / "ppo", "How do plants grow?", "--samples", "2")
    run("merge", tmp_path / "ppo", "--out", tmp_path / "merged")
    run("train", "--out", tmp_path / "again", "--prompter", tmp_path / "ppo", *world, *short)
    run(
        "resample",
        "--out",
        tmp_path / "resample",
        *policy,
        "--proposals",
        "2",
        "--rewrite-tokens",
        "5",
        "--split",
        "train",
        "--prompts",
        "2",
    )
    arms = ("--arms", "none", "sft", "star", "--proposals", "2", "--draws", "2", "--answers", "1")
    arms += ("--trained", tmp_path / "ppo", "--rlhf", tmp_path / "rlhf", "--prompts", "2")
    run("rollout", "--out", tmp_path / "rollout", *world, *arms, "--dtype", "float32")
    file = tmp_path / "rollout" / "rollouts.jsonl"
    for line in map(json.loads, file.read_text().splitlines()):
        if line["arm"] == "sft":
            assert line["logp_prompter"] == pytest.approx(line["logp_reference"], abs=NEAR)
    run(
        "judge",
        file,
        "--arms",
        "sft",
        "none",
        "--out",
        tmp_path / "judge",
        "--judge",
        model,
        "--forced",
        "--dtype",
        "float32",
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_demo_runs(name, animals, tmp_path, monkeypatch):
    """Enumeration, PPO on the trees, the report. Random models seldom end: candidates are long and hot."""
    monkeypatch.setitem(rewards.REWARDS, "letters", Letters)
    texts = tmp_path / "texts.txt"
    texts.write_text("How do plants grow?\nName a painter.\n")
    sizes = EnumerationSettings(
        rewrites=3, responses=3, rewrite_tokens=160, response_tokens=6, candidate_temperature=4.0
    )
    settings = replace(
        demo.QUICK,
        model=str(animals(name)),
        reward="letters",
        prompts=2,
        prompts_file=str(texts),
        enumeration=sizes,
        training=replace(demo.QUICK.training, iterations=1, samples=8),
    )
    content = demo.run(tmp_path / "demo", settings)
    start = content["curve"][0]["exact"]
    assert start["kl_to_sft"] == pytest.approx(0, abs=1e-6)
    assert content["bounds"]["theorem1"]["star"]["verdict"] == "holds"
    # The exact policy is the model's own: leaves of the first tree by plain passes.
    model, _ = load_model(animals(name), device="cpu")
    found = Enumeration.load(tmp_path / "demo")
    tree = PrefixTree(found.rewrite_ids[0])
    (p,) = leaf_probabilities(model, [found.prompt_ids[0]], [tree])
    np.testing.assert_allclose(found.instance.prior[0, found.rows(0)], p, rtol=1e-3)


@pytest.mark.parametrize("kind", zoo.CLASSIFIERS)
def test_reward_models_of_both_kinds(kind, animals, tmp_path, capsys):
    folder = animals(kind)
    prompts = zoo.write_prompts(tmp_path / "prompts.jsonl", 4)
    run(
        *(
            "resample",
            "--out",
            tmp_path / "out",
            "--prompter",
            animals("qwen2_5"),
            "--target",
            animals("qwen2_5"),
        ),
        *(
            "--reward",
            f"{folder}@squash:0,2",
            "--prompts-file",
            prompts,
            "--split",
            "train",
            "--prompts",
            "2",
        ),
        *("--proposals", "2", "--rewrite-tokens", "5", "--answer-tokens", "6"),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_reward_models_from_each_family(name, animals, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"How, {i}?", "chosen": "aaa", "rejected": "zzz"} for i in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["reward-model", "--base", str(animals(name)), "--pairs", str(pairs)]
    arguments += ["--out", str(tmp_path / "reward"), "--device", "cpu", "--batch-size", "8"]
    status = cli.main(arguments)
    said = capsys.readouterr().err
    if name in NO_CLASSIFIER:  # transformers has no classifier of this architecture
        assert status == 2
        assert said.splitlines()[-1].startswith("alignpro: error: reward model ")
    else:
        assert status == 0, said


@pytest.mark.parametrize("frozen", ["llama3_2", "qwen2_5"])
@pytest.mark.parametrize("prompter", ["phi3_5", "qwen2_5"])
def test_the_papers_pairs_train_as_the_paper_has_it(prompter, frozen, animals, tmp_path, monkeypatch):
    """One rewrite of each prompt, several steps a pass; the paper's prompters before its frozen models."""
    monkeypatch.syspath_prepend(str(zoo.Path(zoo.__file__).parent))
    prompts = zoo.write_prompts(tmp_path / "prompts.jsonl")
    run(
        *("train", "--preset", "paper", "--prompts", "4", "--minibatches", "2", "--iterations", "1"),
        *("--prompter", animals(prompter), "--target", animals(frozen), "--reward", "zoo:letters@0,1"),
        *("--max-tokens", "6", "--answer-tokens", "6", "--prompts-file", prompts, "--out", tmp_path / "out"),
    )
    (line,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 8


def test_no_warning_of_a_library_reaches_a_user(animals, tmp_path):
    """With every warning of Python's shown; TRL, transformers and PEFT have some for every run."""
    prompts = zoo.write_prompts(tmp_path / "prompts.jsonl")
    model = str(animals("qwen2_5"))
    world = [
        "--target",
        model,
        "--reward",
        "zoo:letters@0,1",
        "--answer-tokens",
        "5",
        "--prompts-file",
        str(prompts),
    ]
    verbs = [
        [
            "train",
            "--out",
            "a",
            "--prompter",
            model,
            *world,
            "--iterations",
            "1",
            "--prompts",
            "2",
            "--max-tokens",
            "5",
        ],
        ["rewrite", "a", "How do plants grow?", "--samples", "2"],
        ["rollout", "--out", "b", *world, "--trained", "a"],
    ]
    program = "import sys, json\nfrom alignpro import cli\n"
    program += "sys.exit(max(cli.main(verb) for verb in json.loads(sys.argv[1])))"
    command = [sys.executable, "-W", "default", "-c", program, json.dumps(verbs)]
    environment = {**os.environ, "PYTHONPATH": str(zoo.Path(zoo.__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line for line in done.stderr.splitlines() if "warn" in line.lower() or "deprecat" in line.lower()]
    assert not told
