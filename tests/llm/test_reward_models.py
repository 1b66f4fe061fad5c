"""Rewards of the user's own against plain formulas, real tiny models and a server on the loopback."""

import asyncio
import contextlib
import http.server
import itertools
import json
import logging
import math
import os
import random
import re
import shlex
import sqlite3
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    GemmaConfig,
    GemmaForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from alignpro.commands import main as cli
from alignpro.errors import AlignProError
from alignpro.llm.models import configure, resolve
from alignpro.llm.rewards import opening
from alignpro.llm.rewards.bounds import Bounded, Clip, Declared, Squash, parse_bounds
from alignpro.llm.rewards.classifier import SequenceReward
from alignpro.llm.rewards.endpoint import CachedReward, EndpointReward
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.reward import PLAIN, check_scores, check_template, fill, shown
from alignpro.llm.targets import http as transport
from alignpro.llm.targets import ledger, responses
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Stopped
from alignpro.llm.training.environment import Environment

# --- bounds ---


def test_bounds_are_read_as_written():
    assert parse_bounds("0,1") == Declared(0.0, 1.0)
    assert parse_bounds(" clip:-5, 5 ") == Clip(-5.0, 5.0)
    assert parse_bounds("squash:0,2.5") == Squash(0.0, 2.5)
    for bounds in (Declared(-1.5, 2.0), Clip(0.0, 1e-3), Squash(-3.25, 0.5)):
        assert parse_bounds(str(bounds)) == bounds
        json.dumps(bounds.describe(), allow_nan=False)
    bad = ("", "1", "1,0", "0,0", "0,inf", "nan,1", "clip:0", "squash:0,0", "squash:0,-1", "log:0,1", "0,1,2")
    for text in (*bad, None):
        with pytest.raises(AlignProError, match="bounds") as error:
            parse_bounds(text)
        assert "\n" not in str(error.value)


def test_squash_is_the_logistic():
    raw = np.array([-800.0, -3.0, 1.0, 2.0, 700.0])
    expected = [0.0, *(1 / (1 + math.exp(-(s - 1.0) / 2.0)) for s in raw[1:4]), 1.0]
    np.testing.assert_allclose(Squash(1.0, 2.0).apply(raw), expected, atol=1e-15)
    mutants = {"no centre": Squash(0.0, 2.0), "scale inverted": Squash(1.0, 0.5)}
    for name, mutant in mutants.items():
        assert np.abs(mutant.apply(raw) - expected).max() > 0.1, name


def test_clipping_is_counted():
    bounded = Bounded(Clip(0.0, 1.0))
    scores = bounded(["x"] * 5, ["y"] * 5, [-2.0, 0.0, 0.5, 1.0, 7.0])
    np.testing.assert_array_equal(scores, [0, 0, 0.5, 1, 1])
    bounded(["x"] * 3, ["y"] * 3, [3.0, 4.0, 5.0])
    facts = bounded.describe()
    # The ends themselves are not clipped: `<=` for `<` would count 7.
    assert (facts["clipped"], facts["scored"], facts["clipped_share"]) == (5, 8, 0.625)
    assert (facts["raw_least"], facts["raw_greatest"]) == (-2.0, 7.0)


@pytest.mark.parametrize("bounds", ["0,1", "clip:0,1", "squash:0,1"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_becomes_a_reward(bounds, bad):
    if bounds != "0,1" and not math.isnan(bad):  # the mutant that bounds first would let infinity through
        assert np.isfinite(parse_bounds(bounds).apply(np.array([bad]))).all()
    bounded = Bounded(parse_bounds(bounds))
    with pytest.raises(AlignProError, match=rf"sample 1 \(prompt 'q', response 'bad'\) is {bad}"):
        bounded(["p", "q", "r"], ["good", "bad", "worse"], [0.5, bad, math.nan])
    assert bounded.scored == 0


def test_a_declared_range_is_kept_or_named():
    bounded = Bounded(Declared(0.0, 1.0))
    np.testing.assert_array_equal(bounded("ab", "cd", [0.0, 1.0]), [0.0, 1.0])
    with pytest.raises(AlignProError, match=r"sample 1 .* is 1\.5, outside the declared \[0, 1\]"):
        bounded("ab", "cd", [0.5, 1.5])


def test_the_sample_is_shown_on_one_harmless_line():
    nasty = "\x1b[31mred\r\nalignpro: error: forged\u2028\u202e" + "z" * 500
    with pytest.raises(AlignProError) as error:
        check_scores([nasty], [nasty], [math.nan])
    text = str(error.value)
    assert all(c.isprintable() for c in text)
    assert len(text) < 450
    assert "red" in text
    assert not nasty[:20].isprintable()  # the mutant that shows it raw


def test_scores_must_be_numbers_one_per_sample():
    x = ["p", "q"]
    np.testing.assert_array_equal(check_scores(x, x, (True, np.float32(0.5))), [1.0, 0.5])
    np.testing.assert_array_equal(check_scores(x, x, torch.tensor([1.0, 2.0]).bfloat16()), [1.0, 2.0])
    for bad in (None, "ab", {"a": 1, "b": 2}, 1.0, np.array(1.0), torch.tensor(1.0)):
        with pytest.raises(AlignProError, match="sequence of one number per sample"):
            check_scores(x, x, bad)
    for bad in ([1.0], [1.0] * 3, np.ones(3)):
        with pytest.raises(AlignProError, match="return one per sample"):
            check_scores(x, x, bad)
    for bad in (None, "1.0", [1.0], 1j):
        with pytest.raises(AlignProError, match=r"sample 1 .* return a number"):
            check_scores(x, x, [0.0, bad])
    with pytest.raises(AlignProError, match=r"sample 0 .* return a number"):
        check_scores(x, x, np.ones((2, 1)))


def test_templates_are_filled_literally():
    prompt, response = "{response} {0.__class__}", "{prompt} {{}} \\1"
    expected = "Q {response} {0.__class__} A {prompt} {{}} \\1"
    assert fill("Q {prompt} A {response}", prompt, response) == expected
    chained = "Q {prompt} A {response}".replace("{prompt}", prompt).replace("{response}", response)
    assert chained != expected  # the mutant of two passes
    for good in ("chat", "pair", PLAIN, "{response}{prompt}"):
        check_template(good)
    for bad in ("", "{prompt}", "{response}", "{response} {response} {prompt}", "{prompt}{prompt}{response}"):
        with pytest.raises(AlignProError, match="template"):
            check_template(bad)


def test_texts_are_shown_whole_up_to_80_characters():
    assert shown("a" * 80) == repr("a" * 80)
    assert shown("a" * 81) == repr("a" * 77 + "...")


# --- sequence classifiers ---

SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)


def gemma(seed=0, **changes):
    """A random tiny Gemma classifier over characters, with Gemma's template and a tokenizer that adds BOS."""
    ids = {token: i for i, token in enumerate((*SPECIALS, *"abcdefghijklmnopqrstuvwxyz \n"))}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <eos> $B", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIALS[4:]),
    )
    tokenizer.chat_template = GEMMA_TEMPLATE
    values = {
        "vocab_size": len(ids),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "num_labels": 1,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    } | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GemmaForSequenceClassification(GemmaConfig(**values)).eval(), tokenizer


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("rm") / "tiny-gemma", *gemma())


@pytest.fixture(scope="module")
def reward(folder):
    return SequenceReward.load(folder, "squash:0,2", device="cpu")


def raw_score(model, ids):
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits[0, 0])


X = ["say hello", "what is a cat", "a"]
Y = ["hello", "a small animal that says meow and sleeps all day long", ""]


def test_a_gemma_reward_model_is_scored_by_its_own_recipe(reward):
    """The recipe of RM-Gemma-2B's card: template, BOS out, tokenizer (which puts it back), raw logit."""
    model, tokenizer = gemma()
    found = reward.logits(X, Y)
    twice = []
    for x, y, score in zip(X, Y, found, strict=True):
        chat = [{"role": "user", "content": x}, {"role": "assistant", "content": y}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
        ids = tokenizer(text.replace(tokenizer.bos_token, ""))["input_ids"]
        assert reward.encode(x, y)["input_ids"] == ids
        assert ids.count(2) == 1
        assert score == pytest.approx(raw_score(model, ids), abs=1e-5)
        twice.append(raw_score(model, tokenizer(text)["input_ids"]))  # the mutant: two BOS
    assert np.abs(found - twice).min() > 1e-3
    expected = 1 / (1 + np.exp(-found / 2))
    np.testing.assert_allclose(reward.score(X, Y), expected, rtol=1e-12)
    assert (reward.low, reward.high) == (0.0, 1.0)
    assert reward.score([], []).shape == (0,)


def test_scores_do_not_depend_on_the_batch_or_its_order(reward):
    rng = random.Random(0)
    texts = ["".join(rng.choice("abcdef ") for _ in range(rng.randrange(60))) for _ in range(40)]
    together = reward.logits(texts, texts[::-1])
    alone = [reward.logits([x], [y])[0] for x, y in zip(texts, texts[::-1], strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.std(together) > 0.1  # constants would pass
    np.testing.assert_array_equal(together[:3], reward.logits(texts, texts[::-1])[:3])


def test_padding_shifts_no_learned_position(tmp_path):
    """GPT-2 learns its positions, so padding on the left (the mutant) moves every token of a short sample."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=256, num_labels=1, pad_token_id=0
        )
        model = GPT2ForSequenceClassification(config).eval()
    save(tmp_path / "m", model, gemma()[1])
    reward = SequenceReward.load(tmp_path / "m", "squash:0,1", device="cpu")
    alone = [raw_score(model, reward.encode(x, y)["input_ids"]) for x, y in zip(X, Y, strict=True)]
    np.testing.assert_allclose(reward.logits(X, Y), alone, atol=1e-5)
    reward.tokenizer.padding_side = "left"
    assert np.abs(reward.logits(X, Y) - alone).max() > 1e-4


@pytest.mark.parametrize("configured", [None, 1])
def test_a_pad_token_that_is_the_end_token_misplaces_nothing(tmp_path, configured):
    model, tokenizer = gemma(pad_token_id=configured)
    tokenizer.pad_token = "<eos>"
    save(tmp_path / "m", model, tokenizer)
    reward = SequenceReward.load(
        tmp_path / "m", "clip:-9,9", template="{prompt} {response}<eos>", device="cpu", batch_size=8
    )
    together = reward.logits(X, Y)
    np.testing.assert_allclose(
        together, [reward.logits([x], [y])[0] for x, y in zip(X, Y, strict=True)], atol=1e-5
    )
    # What the model itself says of one sample without padding.
    own = [raw_score(model, reward.encode(x, y)["input_ids"]) for x, y in zip(X, Y, strict=True)]
    np.testing.assert_allclose(together, own, atol=1e-5)
    if configured is None:
        assert reward.tokenizer.pad_token == "<pad>"
        # The mutant that pads with the end token reads the score one token early.
        model.config.pad_token_id = 1
        early = [raw_score(model, reward.encode(x, y)["input_ids"]) for x, y in zip(X, Y, strict=True)]
        assert np.abs(together - early).min() > 1e-3


def test_truncation_takes_the_beginning_of_the_prompt_and_keeps_the_response(folder):
    reward = SequenceReward.load(folder, "squash:0,2", device="cpu", max_tokens=40)
    prompt = "the beginning of a long prompt and the end"
    ids = reward.encode(prompt, "the answer")["input_ids"]
    text = reward.tokenizer.decode(ids)
    assert len(ids) in (39, 40)  # this template trims a blank at the cut
    assert "the answer<end_of_turn>" in text
    assert text.startswith("<bos><start_of_turn>user")
    assert "end<end_of_turn>" in text
    assert "beginning" not in text
    whole = SequenceReward.load(folder, "squash:0,2", device="cpu").encode(prompt, "the answer")["input_ids"]
    assert "answer" not in reward.tokenizer.decode(whole[:40])  # the mutant that cuts on the right
    assert reward.counts == {"prompts_truncated": 1, "responses_truncated": 0, "special_tokens_removed": 0}
    ids = reward.encode(prompt, "kept " + "z" * 50)["input_ids"]
    assert len(ids) == 40
    assert "kept zz" in reward.tokenizer.decode(ids)
    assert reward.counts["responses_truncated"] == 1
    assert reward.describe()["prompts_truncated"] == 2
    # Nothing is cut that fits exactly.
    fits = "y" * (40 - len(reward.encode("", "")["input_ids"]))
    assert reward.encode("", fits)["input_ids"].count(ids[-1]) == ids.count(ids[-1])
    assert reward.counts["prompts_truncated"] == 2
    with pytest.raises(AlignProError, match="template alone is longer"):
        SequenceReward.load(folder, "squash:0,2", device="cpu", max_tokens=3)


def test_texts_cannot_spell_special_tokens(reward):
    plain = reward.encode("hi", "good")["input_ids"]
    for forged in ("good<end_of_turn>", "<bos>good", "g<end_<eos>of_turn>ood", "go<start_of_<bos>turn>od"):
        assert reward.encode("hi", forged)["input_ids"] == plain
    assert reward.encode("<pad>hi", "good")["input_ids"] == plain
    text = reward.tokenizer.apply_chat_template(
        [{"role": "user", "content": "good<end_of_turn>"}], tokenize=False
    )
    assert reward.tokenizer(text)["input_ids"].count(5) == 2  # the mutant: the text ends its own turn


def test_other_templates(folder, tmp_path, capsys):
    model, tokenizer = gemma()
    own = SequenceReward.load(folder, "squash:0,2", device="cpu", template="q {prompt} a {response}")
    ids = tokenizer("q hi a yo")["input_ids"]
    assert own.encode("hi", "yo")["input_ids"] == ids
    assert ids[0] == 2  # the tokenizer's own BOS
    pair = SequenceReward.load(folder, "squash:0,2", device="cpu", template="pair")
    assert pair.encode("hi", "yo")["input_ids"] == tokenizer("hi", "yo")["input_ids"]
    assert np.isfinite(pair.score(X, Y)).all()
    tokenizer.chat_template = None
    save(tmp_path / "plain", model, tokenizer)
    capsys.readouterr()
    plain = SequenceReward.load(tmp_path / "plain", "squash:0,2", device="cpu")
    assert "no chat template" in capsys.readouterr().err
    assert plain.template == PLAIN
    assert plain.encode("hi", "yo")["input_ids"] == tokenizer(fill(PLAIN, "hi", "yo"))["input_ids"]
    with pytest.raises(AlignProError, match="has no chat template"):
        SequenceReward.load(tmp_path / "plain", "squash:0,2", device="cpu", template="chat")


def test_one_output_is_chosen_by_number(tmp_path):
    model, tokenizer = gemma(num_labels=3)
    save(tmp_path / "m", model, tokenizer)
    with pytest.raises(AlignProError, match="3 outputs"):
        SequenceReward.load(tmp_path / "m", "squash:0,2", device="cpu")
    with pytest.raises(AlignProError, match="output 3"):
        SequenceReward.load(tmp_path / "m", "squash:0,2", device="cpu", output=3)
    scores = [
        SequenceReward.load(tmp_path / "m", "squash:0,2", device="cpu", output=i).logits(X, Y)
        for i in range(3)
    ]
    with torch.no_grad():
        ids = SequenceReward.load(tmp_path / "m", "0,1", device="cpu", output=0).encode(X[0], Y[0])[
            "input_ids"
        ]
        expected = model(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose([s[0] for s in scores], expected, atol=1e-5)
    assert np.ptp(expected.numpy()) > 1e-2


def test_dtypes_and_the_description(folder, reward):
    half = SequenceReward.load(folder, "squash:0,2", device="cpu", dtype="bfloat16")
    np.testing.assert_allclose(half.score(X, Y), reward.score(X, Y), atol=0.05)
    facts = half.describe()
    text = json.dumps(facts, allow_nan=False)
    assert str(folder.parent) not in text
    assert (facts["name"], facts["dtype"], facts["bounds"]["scored"]) == ("tiny-gemma", "bfloat16", 3)
    assert facts["architecture"] == "GemmaForSequenceClassification"


def test_models_that_are_no_reward_models(folder, tmp_path, monkeypatch):
    causal = save(tmp_path / "causal", *configure.tiny_model())
    with pytest.raises(AlignProError, match=r"no weights for score\.weight.*train_reward"):
        SequenceReward.load(causal, "squash:0,1", device="cpu")
    with pytest.raises(AlignProError, match="Theorem 1 needs a bounded reward"):
        SequenceReward.load(folder, device="cpu")
    monkeypatch.setattr(resolve, "_from_hub", lambda _: pytest.fail("a download before the check"))
    with pytest.raises(AlignProError, match="Theorem 1 needs a bounded reward"):
        SequenceReward.load("weqweasdas/RM-Gemma-2B", device="cpu")
    with pytest.raises(AlignProError, match="template"):
        SequenceReward.load("weqweasdas/RM-Gemma-2B", "0,1", template="{x}", device="cpu")
    with pytest.raises(AlignProError, match="dtype"):
        SequenceReward.load(folder, "0,1", dtype="int4")
    with pytest.raises(AlignProError, match=r"max_tokens 257: .* 1 to 256"):
        SequenceReward.load(folder, "0,1", max_tokens=257, device="cpu")
    pickled = tmp_path / "pickled"
    model, tokenizer = gemma()
    save(pickled, model, tokenizer)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(AlignProError, match="only pickled weights"):
        SequenceReward.load(pickled, "squash:0,1", device="cpu")
    (pickled / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(AlignProError, match="cannot load"):
        SequenceReward.load(pickled, "squash:0,1", device="cpu")


def test_a_damaged_model_stops_with_the_sample(folder):
    reward = SequenceReward.load(folder, "clip:-1,1", device="cpu")
    with torch.no_grad():
        reward.model.model.embed_tokens.weight[reward.tokenizer.convert_tokens_to_ids("z")] = math.nan
    np.testing.assert_array_less(np.abs(reward.score(["a"], ["b"])), 1.0001)
    with pytest.raises(AlignProError, match=r"sample 1 \(prompt 'a', response 'zebra'\) is nan"):
        reward.score(["a", "a", "a"], ["b", "zebra", "zoo"])
    with pytest.raises(AlignProError, match="2 prompts and 1 responses"):
        reward.score(["a", "b"], ["c"])
    with pytest.raises(AlignProError, match=r"responses\[1\] is NoneType"):
        reward.score(["a", "b"], ["c", None])


# --- Python functions ---


def overlap(prompts, responses, bonus=0.0):
    return [len(set(x) & set(y)) / 26 + bonus for x, y in zip(prompts, responses, strict=True)]


def one_overlap(prompt, response, bonus=0.0):
    return overlap([prompt], [response], bonus)[0]


async def async_overlap(prompts, responses, bonus=0.0):
    await asyncio.sleep(0)
    return overlap(prompts, responses, bonus)


async def async_one(prompt, response, bonus=0.0):
    await asyncio.sleep(0)
    return one_overlap(prompt, response, bonus)


FORMS = {
    "batch": (overlap, {}),
    "small batches": (overlap, {"batch_size": 2}),
    "each": (one_overlap, {"each": True}),
    "async": (async_overlap, {"is_async": True, "batch_size": 2}),
    "async each": (async_one, {"is_async": True, "each": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_function_gives_the_same_rewards(form):
    function, options = FORMS[form]
    reward = CallableReward(function, "0,2", context={"bonus": 0.25}, **options)
    prompts = ["abc", "xyz", "abcdef", "q", "abcxyz"]
    responses = ["cab", "xaz", "fed", "", "zyxcba"]
    expected = np.array([3, 2, 3, 0, 6]) / 26 + 0.25
    np.testing.assert_allclose(reward.score(prompts, responses), expected, rtol=1e-15)
    assert reward.score([], []).shape == (0,)
    assert reward.score(prompts, responses).dtype == np.float64
    assert reward.describe()["name"] == function.__name__
    json.dumps(reward.describe(), allow_nan=False)


@pytest.mark.parametrize("form", FORMS)
def test_an_exception_of_the_function_names_its_sample(form):
    function, options = FORMS[form]
    is_async, each = options.get("is_async", False), options.get("each", False)

    def check(x, y):
        if "bad" in ([x] if each else x):
            raise KeyError("no such thing at https://me:pw@host/secret")
        return function(x, y)

    async def check_async(x, y):
        return await check(x, y)

    reward = CallableReward(check_async if is_async else check, "0,2", **options)
    with pytest.raises(AlignProError, match=r"raised KeyError") as error:
        reward.score(["a", "b", "c", "bad", "e"], list("vwxyz"))
    text = str(error.value)
    assert "\n" not in text
    assert "secret" not in text
    assert "pw" not in text
    assert isinstance(error.value.__cause__, KeyError)
    where = {"each": "sample 3 (prompt 'bad'", "batch": "samples 0 to 4", "small": "samples 2 to 3"}
    assert where["each" if each else "batch" if form == "batch" else "small"] in text


def test_results_that_are_no_rewards_name_the_sample():
    def case(result, **options):
        return CallableReward(lambda x, y: result(x, y), "0,1", **options)

    samples = (["p", "q", "r"], ["a", "b", "c"])
    with pytest.raises(AlignProError, match="2 scores for 3 samples"):
        case(lambda x, y: [0.0, 1.0]).score(*samples)
    with pytest.raises(AlignProError, match=r"sample 2 \(prompt 'r', response 'c'\) is nan"):
        case(lambda x, y: math.nan if x == "r" else 0.5, each=True).score(*samples)
    with pytest.raises(AlignProError, match=r"sample 2 .* of type NoneType: return a number"):
        case(lambda x, y: [None if t == "r" else 0.5 for t in x], batch_size=2).score(*samples)
    with pytest.raises(AlignProError, match=r"outside the declared \[0, 1\]"):
        case(lambda x, y: 1.01, each=True).score(*samples)
    np.testing.assert_array_equal(
        case(lambda x, y: torch.tensor([0.5]), each=True).score(*samples), [0.5] * 3
    )
    np.testing.assert_array_equal(case(lambda x, y: torch.tensor(0.5), each=True).score(*samples), [0.5] * 3)


def test_async_flags_are_checked():
    with pytest.raises(AlignProError, match="set is_async=True"):  # nothing shows it before it is called
        CallableReward(lambda x, y: async_overlap(x, y), "0,1").score(["a"], ["b"])
    with pytest.raises(AlignProError, match="set is_async=False"):
        CallableReward(overlap, "0,1", is_async=True).score(["a"], ["b"])
    for bad in ({"concurrency": 0}, {"batch_size": 0}):
        with pytest.raises(AlignProError, match="at least 1"):
            CallableReward(overlap, "0,1", **bad)
    with pytest.raises(AlignProError, match="bounds"):
        CallableReward(overlap, None)
    with pytest.raises(AlignProError, match="cannot be called"):
        CallableReward("overlap", "0,1")


@pytest.mark.parametrize("limit", [1, 3])
def test_asynchronous_calls_overlap_up_to_the_limit(limit):
    under_way, most = 0, 0

    async def slow(prompt, response):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _ in range(5):
            await asyncio.sleep(0)
        under_way -= 1
        return 0.5

    CallableReward(slow, "0,1", each=True, is_async=True, concurrency=limit).score(["x"] * 9, ["y"] * 9)
    assert most == limit  # neither one after the other nor all at once


def test_an_asynchronous_function_works_inside_a_running_loop():
    reward = CallableReward(async_one, "0,1", each=True, is_async=True)

    async def main():
        return reward.score(["abc"], ["ab"])

    assert asyncio.run(main()) == pytest.approx([2 / 26])


def test_the_first_failure_cancels_what_waits():
    begun = []

    async def fails(prompt, response):
        begun.append(prompt)
        await asyncio.sleep(0)
        raise RuntimeError("down")

    with pytest.raises(AlignProError, match="raised RuntimeError"):
        CallableReward(fails, "0,1", each=True, is_async=True, concurrency=2).score(["x"] * 50, ["y"] * 50)
    assert len(begun) < 50


# --- an endpoint on the loopback ---

KEY = "sk-loopback-0123456789"


class Server:
    """Answers POSTs with `answer(path, body)`: (status, headers, content); keeps what it was asked."""

    def __init__(self):
        self.asked, self.headers = [], []
        self.answer = lambda path, body: (200, {}, {"rewards": overlap(body["prompts"], body["responses"])})
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(dict(self.headers))
                status, headers, content = outer.answer(self.path, body)
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/reward"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(opening.KEY_ENV, raising=False)
    monkeypatch.setenv("MY_REWARD_KEY", KEY)
    server = Server()
    yield server
    server.close()


def rewarding(url, bounds="0,1", **options):
    own = {name: options.pop(name) for name in ("template", "batch_size") if name in options}
    return EndpointReward(url, bounds, EndpointSettings(**options), **own)


def endpoint(server, **options):
    return rewarding(server.url, **({"backoff_s": 0.0, "retries": 2} | options))


def test_an_endpoint_scores_in_batches_with_its_key(server):
    reward = endpoint(server, batch_size=2, key_env="MY_REWARD_KEY", model="m")
    prompts, responses = ["abc", "xyz", "é\n{x}", "q", "ab"], ["cab", "xaz", "é", "", "ba"]
    np.testing.assert_allclose(reward.score(prompts, responses), overlap(prompts, responses))
    assert sorted(len(body["prompts"]) for body in server.asked) == [1, 2, 2]
    assert {h["Authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    assert all(body["model"] == "m" for body in server.asked)
    shown = repr(reward) + str(vars(reward)) + json.dumps(reward.describe())
    assert KEY not in shown
    assert reward.describe()["bounds"]["scored"] == 5
    endpoint(server).score(["a"], ["b"])
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize("style", ["score", "classify"])
def test_other_styles_follow_the_index(server, style):
    def answer(path, body):
        pairs = zip(body["text_1"], body["text_2"], strict=True) if style == "score" else body["input"]
        values = [len("".join(p)) / 100 for p in pairs]
        rows = [
            {"index": i, "score": v} if style == "score" else {"index": i, "probs": [v], "label": "x"}
            for i, v in enumerate(values)
        ]
        return 200, {}, {"data": rows[::-1]}

    server.answer = answer
    reward = endpoint(server, dialect=style, template="{prompt}{response}")
    np.testing.assert_allclose(reward.score(["a", "bbb", "cc"], ["", "b", "ccc"]), [0.01, 0.04, 0.05])


def test_failures_that_may_pass_are_tried_again(server):
    statuses = [503, 429]
    good = server.answer
    server.answer = lambda path, body: (statuses.pop(), {}, {}) if statuses else good(path, body)
    assert endpoint(server).score(["abc"], ["a"]) == pytest.approx([1 / 26])
    assert len(server.asked) == 3
    server.answer = lambda path, body: (503, {}, {})
    server.asked.clear()
    with pytest.raises(AlignProError, match="status 503"):
        endpoint(server).score(["abc"], ["a"])
    assert len(server.asked) == 3  # 1 + retries
    server.answer = lambda path, body: (400, {}, {})
    server.asked.clear()
    with pytest.raises(AlignProError, match="status 400"):
        endpoint(server).score(["abc"], ["a"])
    assert len(server.asked) == 1


def test_pauses_double_and_heed_the_server(server, monkeypatch):
    pauses, clock = [], types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    async def sleep(_, seconds):
        if seconds > 0:
            pauses.append(seconds)
            clock.now += seconds

    monkeypatch.setattr(transport, "time", clock)
    monkeypatch.setattr(transport._Run, "_sleep", sleep)
    jitter = []
    monkeypatch.setattr(transport.random, "uniform", lambda *ends: jitter.append(ends) or 1.0)
    answers = iter([{}, {"Retry-After": "7"}, {"Retry-After": "60"}, {"Retry-After": "nan"}, {}])
    server.answer = lambda path, body: (503, next(answers), {})
    with pytest.raises(AlignProError, match="status 503"):
        endpoint(server, backoff_s=0.5, retries=4).score(["a"], ["b"])
    assert pauses == [0.5, 7.0, 60.0, 4.0]
    assert set(jitter) == {(0.5, 1.5)}
    server.answer = lambda path, body: (503, {"Retry-After": "61"}, {})
    with pytest.raises(AlignProError, match="asks to wait 61 s: run again then"):
        endpoint(server).score(["a"], ["b"])


def test_no_secret_in_any_error(server):
    """A server that repeats everything, a redirect, a dead port, and keys given in the wrong place."""
    texts = []

    def failing(make, *samples):
        with pytest.raises(AlignProError) as error:
            make().score(*samples) if samples else make()
        cause = error.value
        while cause is not None:
            texts.append(str(cause) + repr(cause))
            cause = cause.__cause__
        assert error.value.__suppress_context__ or error.value.__context__ is None
        assert "\n" not in str(error.value)
        return str(error.value)

    url = f"{server.url}?token=query-secret"
    keyed = {"bounds": "0,1", "key_env": "MY_REWARD_KEY", "backoff_s": 0.0, "retries": 1}

    def keyed_reward(**options):
        return rewarding(url, **(keyed | options))

    sample = (["p"], ["r"])
    server.answer = lambda path, body: (401, {}, {"error": f"bad key {KEY} at {path}"})
    assert "MY_REWARD_KEY" in failing(keyed_reward, *sample)
    server.answer = lambda path, body: (200, {}, f"not json {KEY}".encode())
    failing(keyed_reward, *sample)
    server.answer = lambda path, body: (200, {}, {"scores": [KEY]})
    failing(keyed_reward, *sample)
    server.answer = lambda path, body: (200, {}, {"rewards": [KEY]})
    failing(keyed_reward, *sample)
    server.answer = lambda path, body: (307, {"Location": "/elsewhere"}, {})
    server.asked.clear()
    failing(keyed_reward, *sample)
    assert len(server.asked) == 1
    failing(lambda: rewarding("http://127.0.0.1:9/x?token=query-secret", **keyed), *sample)
    failing(lambda: rewarding(url, "0,1", key_env=KEY))
    assert "not set" in failing(lambda: rewarding(url, "0,1", key_env="hf_pasted0123456789"))
    failing(lambda: rewarding("http://me:url-secret@127.0.0.1/", "0,1"))
    failing(lambda: rewarding("url-secret", "0,1"))
    texts.append(repr(keyed_reward()) + json.dumps(keyed_reward().describe()))
    everything = " ".join(texts)
    for secret in (KEY, "query-secret", "url-secret", "hf_pasted"):
        assert secret not in everything
    assert "query-secret" in url
    assert server.asked  # the loop above did talk to the server


def test_bad_keys_and_settings_are_named_before_any_request(server, monkeypatch):
    with pytest.raises(AlignProError, match="NO_SUCH_KEY: that environment variable is not set"):
        endpoint(server, key_env="NO_SUCH_KEY")
    monkeypatch.setenv("MY_REWARD_KEY", "two words")
    with pytest.raises(AlignProError, match="is no key") as error:
        endpoint(server, key_env="MY_REWARD_KEY")
    assert "words" not in str(error.value)
    for bad in (
        {"dialect": "x"},
        {"timeout_s": 0.0},
        {"timeout_s": math.nan},
        {"retries": -1},
        {"concurrency": 0},
        {"template": "chat"},
        {"bounds": None},
    ):
        with pytest.raises(AlignProError, match=next(iter(bad))):
            endpoint(server, **bad)
    assert not server.asked
    monkeypatch.setitem(__import__("sys").modules, "httpx2", None)
    with pytest.raises(AlignProError, match=r"pip install 'alignpro\[http\]'"):
        endpoint(server)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b'{"rewards": [0.5, NaN, 0.5]}', r"sample 4 \(prompt 'd', response 'y'\) is nan"),
        (b'{"rewards": [0.5, null, 0.5]}', r"sample 4 .* of type NoneType"),
        (b'{"rewards": [0.5, "0.5", 0.5]}', r"sample 4 .* of type str"),
        (b'{"rewards": [0.5]}', "1 scores for"),
        (b'{"rewards": 0.5}', "not of dialect rewards"),
        (b'["rewards"]', "not of dialect rewards"),
        (b'{"rewards": [0.5, 2.0, 0.5]}', r"outside the declared"),
    ],
)
def test_answers_that_are_no_rewards(server, answer, match):
    good = server.answer
    server.answer = lambda path, body: (200, {}, answer) if "d" in body["prompts"] else good(path, body)
    with pytest.raises(AlignProError, match=match):
        endpoint(server, batch_size=3).score(list("abcedf"), list("uvwxyz"))


def test_the_budget_of_requests_is_kept_and_named(server):
    statuses = [503]
    good = server.answer
    server.answer = lambda path, body: (statuses.pop(), {}, {}) if statuses else good(path, body)
    reward = endpoint(server, batch_size=1, concurrency=1, max_calls=4)
    with pytest.raises(
        Stopped, match=r"^max_calls 4: the budget of http.* is spent; .* \(3 of 5 scored\)"
    ) as error:
        reward.score(list("abcde"), list("vwxyz"))
    assert error.value.reason == "max_calls"
    assert len(server.asked) == reward.calls == 4  # retries count
    assert reward.retried == 1
    with pytest.raises(Stopped, match="max_calls"):  # for the object's life
        reward.score(["f"], ["f"])
    assert len(server.asked) == 4


def test_a_query_is_in_no_log(server, caplog, monkeypatch):
    reward = rewarding(f"{server.url}?token=query-secret", "0,1")
    with caplog.at_level(logging.DEBUG):
        reward.score(["a"], ["b"])
        assert server.url in caplog.text
        assert "query-secret" not in caplog.text
        # The mutant: httpx2 logs as it likes.
        logging.getLogger("httpx2").removeFilter(responses._without_queries)
        monkeypatch.setattr(transport, "client_library", lambda: __import__("httpx2"))
        monkeypatch.setattr(responses, "client_library", lambda: __import__("httpx2"))
        reward.score(["a"], ["b"])
        assert "query-secret" in caplog.text


# --- scores that were paid for ---

TEXTS = ["".join(x) for x in itertools.product("abc", "xyz", "ab")]  # 18 distinct ones


def asked_for(server):
    return [pair for body in server.asked for pair in zip(body["prompts"], body["responses"], strict=True)]


def test_a_score_is_asked_for_once(server, tmp_path):
    plain = endpoint(server).score(TEXTS, TEXTS[::-1])
    server.asked.clear()
    one = CachedReward(endpoint(server, batch_size=5), tmp_path)
    # The same sample twice is asked once.
    np.testing.assert_array_equal(one.score(TEXTS * 2, TEXTS[::-1] * 2), np.tile(plain, 2))
    assert sorted(asked_for(server)) == sorted(zip(TEXTS, TEXTS[::-1], strict=True))
    assert (one.low, one.high, one.describe()) == (0.0, 1.0, one.reward.describe())
    assert one.line() == "18 scores in 4 requests (0 retries), 0 more from the file"
    server.asked.clear()
    # To the bit, and whatever the bounds; a prompt and a response are not the response and the prompt.
    two = CachedReward(endpoint(server, bounds="squash:0.1,0.2"), tmp_path)
    np.testing.assert_array_equal(two.score(TEXTS, TEXTS[::-1]), Squash(0.1, 0.2).apply(plain))
    assert two.describe()["bounds"]["scored"] == 18
    assert two.line() == "0 scores in 0 requests (0 retries), 18 more from the file"
    assert not server.asked
    two.score(["new", TEXTS[0], TEXTS[-1]], [TEXTS[0], TEXTS[-1], "new"])
    assert sorted(asked_for(server)) == sorted([("new", TEXTS[0]), (TEXTS[-1], "new")])
    assert one.score([], []).shape == (0,)


def test_what_else_determines_a_score_is_in_its_key(server, tmp_path):
    def answer(path, body):
        xs = body.get("prompts") or body.get("text_1")
        value = len(body.get("model") or path) / 100
        return 200, {}, {"rewards": [value] * len(xs), "data": [{"index": 0, "score": value}]}

    server.answer = answer
    rewards_ = [
        rewarding(url, "0,1", **options)
        for url in (server.url, f"{server.url}?v=2")
        for options in ({}, {"model": "m"}, {"model": "m", "dialect": "score"})
    ]
    for reward in rewards_:
        CachedReward(reward, tmp_path).score(["x"], ["y"])
    assert len(server.asked) == 6 == len({reward.revision for reward in rewards_})
    # Not what only says how it is asked for; and an address's query is not in the file.
    again = rewarding(server.url, "clip:0,1", timeout_s=9.0, retries=0, batch_size=1, max_calls=1)
    assert again.revision == rewards_[0].revision
    assert b"v=2" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize("mutant", [False, True])
def test_scores_that_came_before_a_failure_are_kept(server, tmp_path, monkeypatch, mutant):
    """The mutant hands them on when all are there."""
    if mutant:
        raw = EndpointReward.raw

        def late(self, prompts, responses, on_score, meter):
            scores = raw(self, prompts, responses, meter=meter)
            for i, score in enumerate(scores):
                on_score(i, score)
            return scores

        monkeypatch.setattr(EndpointReward, "raw", late)
    good = server.answer
    server.answer = lambda path, body: good(path, body) if len(server.asked) <= 7 else (400, {}, {})
    reward = CachedReward(endpoint(server, batch_size=2, concurrency=1), tmp_path)
    with pytest.raises(Stopped, match=r"status 400 .*\(14 of 18 scored\)"):
        reward.score(TEXTS, TEXTS)
    server.answer = good
    server.asked.clear()
    again = CachedReward(endpoint(server), tmp_path)
    np.testing.assert_array_equal(again.score(TEXTS, TEXTS), overlap(TEXTS, TEXTS))
    assert len(asked_for(server)) == (18 if mutant else 4)


KILLED = """
import sys
from alignpro.llm.rewards.endpoint import CachedReward
from alignpro.llm.rewards.endpoint import EndpointReward
from alignpro.llm.targets.settings import EndpointSettings
texts = sys.argv[3:]
reward = EndpointReward(sys.argv[1], "0,1", EndpointSettings(concurrency=1), batch_size=1)
CachedReward(reward, sys.argv[2]).score(texts, texts)
"""


def test_kill_9_loses_only_the_score_in_flight(server, tmp_path):
    good = server.answer

    def answer(path, body):
        if len(server.asked) == 8:
            process.kill()
        return good(path, body)

    server.answer = answer
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path), *TEXTS]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.wait(100) == -9
    assert len(server.asked) == 8
    server.answer = good
    server.asked.clear()
    again = CachedReward(endpoint(server), tmp_path)
    np.testing.assert_array_equal(again.score(TEXTS, TEXTS), overlap(TEXTS, TEXTS))
    assert [x for x, _ in asked_for(server)] == TEXTS[7:]


def test_only_rewards_are_kept(server, tmp_path):
    """A score out of the declared range is not: the server, once mended, is asked again."""
    good = server.answer
    server.answer = lambda path, body: (200, {}, {"rewards": [7.0] * len(body["prompts"])})
    for bounds, says in (("0,1", r"sample 0 .* is 7, outside the declared"), ("clip:0,1", None)):
        reward = CachedReward(endpoint(server, bounds=bounds), tmp_path / bounds)
        if says:
            with pytest.raises(AlignProError, match=says):
                reward.score(["a"], ["a"])
        else:
            assert reward.score(["a"], ["a"]) == 1.0
    server.answer = good
    np.testing.assert_allclose(CachedReward(endpoint(server), tmp_path / "0,1").score(["a"], ["a"]), 1 / 26)
    with contextlib.closing(sqlite3.connect(tmp_path / "0,1" / ledger.FILE)) as file, file:
        file.execute("UPDATE answers SET line = replace(line, ?, 'cheese')", (repr(1 / 26),))
    with pytest.raises(AlignProError, match=r"sample 0 \(prompt 'a', response 'a'\) is nan"):
        CachedReward(endpoint(server), tmp_path / "0,1").score(["a"], ["a"])


def test_training_goes_on_without_paying_twice(server, tmp_path, capsys, monkeypatch):
    """Against the same training judged by the same function in this process."""
    base = save(tmp_path / "base", *configure.tiny_model(seed=1))
    (tmp_path / "prompts.txt").write_text("abc\ndef\ngab\n")
    small = (
        "--iterations 3 --prompts-per-round 2 --draws 4 --epochs 1 --rewrite-tokens 4 "
        "--answer-tokens 4 --dtype float32"
    )

    def train(out, reward, *more):
        command = ["train", "--out", str(tmp_path / out), "--prompter", str(base), "--target", str(base)]
        command += ["--prompts-file", str(tmp_path / "prompts.txt"), "--reward", reward, *shlex.split(small)]
        return cli.main([*command, *more]), capsys.readouterr()

    def metrics(out):
        return (tmp_path / out / "metrics.jsonl").read_text()

    assert train("plain", f"{__name__}:overlap@0,1")[0] == 0
    name = f"{server.url}?token=query-secret@0,1"
    score, rounds = CachedReward.score, []

    def killed(self, *samples):
        scores = score(self, *samples)
        rounds.append(len(scores))
        if len(rounds) == 2:
            raise KeyboardInterrupt  # judged, but not yet learned from
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(CachedReward, "score", killed)
        status, begun = train("paid", name)
    assert status == 130
    assert "; 24 scores from an endpoint" in begun.err
    status, said = train("paid", name, "--resume")
    assert status == 0, said.err
    assert metrics("paid") == metrics("plain")
    assert len(asked_for(server)) == len(set(asked_for(server)))
    assert re.search(r"\d+ scores in 1 requests \(0 retries\), [1-9]\d* more from the file", said.err)
    everything = b"".join(p.read_bytes() for p in (tmp_path / "paid").rglob("*") if p.is_file())
    assert b"query-secret" not in everything + (begun.err + said.err + said.out).encode()
    assert f"{server.url}@0.0,1.0".encode() in everything


# --- names ---


def test_rewards_by_name(folder, server, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from alignpro.llm.rewards.function import CallableReward\n"
        "def short(prompts, responses):\n    return [1 / (1 + len(y)) for y in responses]\n"
        "def one(prompt, response):\n    return 0.5\n"
        "made = CallableReward(one, '0,1', each=True)\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert opening.load_reward("my_rewards:short@0,1").score(["a"], ["bcd"]) == pytest.approx([0.25])
    assert opening.load_reward("my_rewards:made").score(["a"], ["b"]) == pytest.approx([0.5])
    assert opening.load_reward("my_rewards:one@0,1", each=True).score(["a"], ["b"]) == pytest.approx([0.5])
    assert opening.load_reward(f"{server.url}@clip:0,2").score(["a"], ["a"]) == pytest.approx([1 / 26])
    monkeypatch.setenv(opening.KEY_ENV, KEY)
    opening.load_reward(f"{server.url}@0,1").score(["a"], ["a"])
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    loaded = opening.load_reward(f"{folder}@squash:0,2", device="cpu")
    assert isinstance(loaded, SequenceReward)
    assert loaded.bounded.bounds == Squash(0.0, 2.0)
    opening.read_spec("weqweasdas/RM-Gemma-2B@squash:0,2")
    asked = len(server.asked)
    for name, match in {
        "nope": "minilm-bt",
        "": "minilm-bt",
        "my_rewards:short": "Theorem 1 needs",
        "my_rewards:made@0,1": "bounds of its own",
        "my_rewards:absent@0,1": "has no absent",
        "my_rewards:number@0,1": "is int",
        "no_such_module:f@0,1": "no module no_such_module here or on PYTHONPATH; .* ./no_such_module.py",
        "pty:spawn@0,1": "a module of Python's own library",
        "no/such.py:f@0,1": "there is no file no/such.py",
        "broken_rewards:f@0,1": "importing broken_rewards failed",
        "my_rewards:short@clip:1": "clip:LOW,HIGH",
        "weqweasdas/RM-Gemma-2B": "Theorem 1 needs",
        server.url: "Theorem 1 needs",
        "http://me:pw@1.2.3.4/x,y": "without a user name",
        str(folder): "Theorem 1 needs",
        "../nowhere/else@0,1": "choose from",
    }.items():
        for use in (opening.read_spec, opening.load_reward):
            with pytest.raises(AlignProError, match=match) as error:
                use(name)
            assert "\n" not in str(error.value)
            assert "pw" not in str(error.value)
    assert len(server.asked) == asked


def test_a_function_in_the_working_folder(tmp_path, monkeypatch, capsys):
    """By its file or its module, without PYTHONPATH; what runs is said first, and an error names its line."""
    text = "import json\n\n\ndef score(prompts, responses):\n    return [{NUMBER} for _ in responses]\n"
    (tmp_path / "own_of_mine.py").write_text(text.replace("{NUMBER}", "0.25"))
    (tmp_path / "yaml.py").write_text("raise SystemExit('run by mistake')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in (
        "./own_of_mine.py:score@0,1",
        "own_of_mine:score@0,1",
        f"{tmp_path}/own_of_mine.py:score@0,1",
    ):
        assert opening.load_reward(name).score(["a"], ["b"]).tolist() == [0.25]
    assert "alignpro: reward ./own_of_mine.py:score: runs ./own_of_mine.py" in capsys.readouterr().err
    with pytest.raises(AlignProError, match="yaml has no score"):
        opening.load_reward("yaml:score@0,1")

    # Edited, as beside a notebook.
    (tmp_path / "own_of_mine.py").write_text(text.replace("{NUMBER}", "{}['missing']"))
    os.utime(tmp_path / "own_of_mine.py", ns=(1, 1))
    reward = opening.load_reward("./own_of_mine.py:score@0,1")
    with pytest.raises(
        AlignProError, match=r"raised KeyError \(\"'missing'\"\) at own_of_mine.py:5 on sample 0"
    ):
        reward.score(["a"], ["b"])
    (tmp_path / "own_of_mine.py").write_text("import json\njson.loads('')\n")
    os.utime(tmp_path / "own_of_mine.py", ns=(2, 2))
    with pytest.raises(AlignProError, match=r"JSONDecodeError: .* at own_of_mine.py:2"):
        opening.load_reward("./own_of_mine.py:score@0,1")


def test_an_environment_takes_rewards_alone():
    with pytest.raises(AlignProError, match=r"function has no score; give it a range, as in CallableReward"):
        Environment(lambda prompts, responses: [0.0], None)
    with pytest.raises(AlignProError, match="str has no score; give a Reward"):
        Environment("minilm-bt", None)


def test_a_name_says_what_is_meant(folder, tmp_path, monkeypatch):
    """Kind, place, bounds and what may be written down, from one reading."""
    (tmp_path / "said.py").write_text("def f(x, y):\n    return [0.5 for _ in y]\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@0,1").mkdir()
    odd, secret = str(tmp_path / "a@b"), "https://host:8443/v1/score"
    for name, kind, target, bounds in (
        ("minilm-bt", "packaged", "minilm-bt", None),
        (odd, "head", odd, None),
        (str(tmp_path / "a@0,1"), "head", str(tmp_path / "a@0,1"), None),
        (f"{folder}@clip:-1,2", "classifier", str(folder), Clip(-1.0, 2.0)),
        ("owner/name@squash:0,2", "classifier", "owner/name", Squash(0.0, 2.0)),
        ("said:f@0,1", "function", "said:f", Declared(0.0, 1.0)),
        (f"{secret}?key=k@x@0,1", "endpoint", f"{secret}?key=k@x", Declared(0.0, 1.0)),
    ):
        spec = opening.read_spec(name)
        assert (spec.kind, spec.target, spec.bounds) == (kind, target, bounds)
        assert spec.shown == (f"{secret}@0.0,1.0" if kind == "endpoint" else name)
        assert "key=k" not in repr(spec)
