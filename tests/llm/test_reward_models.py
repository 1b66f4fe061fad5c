"""Rewards of the user's own against plain formulas, real tiny models and a server on the loopback."""

import asyncio
import http.server
import json
import math
import random
import threading

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    GemmaConfig,
    GemmaForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from alignpro.errors import AlignProError
from alignpro.llm import data, models, reward_models, rewards
from alignpro.llm.data import PreferencePair
from alignpro.llm.reward_models import (
    Bounded,
    CallableReward,
    Clip,
    Declared,
    EndpointReward,
    RewardSettings,
    SequenceReward,
    Squash,
    check_scores,
    fill,
    parse_bounds,
    read_pairs,
    train_reward,
)

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
    bounded(["x"], ["y"], [3.0])
    facts = bounded.describe()
    # The ends themselves are not clipped: `<=` for `<` would count 5.
    assert (facts["clipped"], facts["scored"], facts["clipped_share"]) == (3, 6, 0.5)
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
    for bad in ("", "{prompt}", "{response} {response} {prompt}", "{x}"):
        with pytest.raises(AlignProError, match="template"):
            reward_models.check_template(bad)


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
    short = SequenceReward.load(folder, "squash:0,2", device="cpu", max_tokens=3)
    with pytest.raises(AlignProError, match="template alone is longer"):
        short.score(["a"], ["b"])


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
    assert plain.template == reward_models.PLAIN
    assert (
        plain.encode("hi", "yo")["input_ids"] == tokenizer(fill(reward_models.PLAIN, "hi", "yo"))["input_ids"]
    )
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
    causal = save(tmp_path / "causal", *models.tiny_model())
    with pytest.raises(AlignProError, match=r"no weights for score\.weight.*train_reward"):
        SequenceReward.load(causal, "squash:0,1", device="cpu")
    with pytest.raises(AlignProError, match="Theorem 1 needs a bounded reward"):
        SequenceReward.load(folder, device="cpu")
    monkeypatch.setattr(models, "_from_hub", lambda _: pytest.fail("a download before the check"))
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


def test_async_flags_are_checked_not_guessed():
    with pytest.raises(AlignProError, match="set is_async=True"):
        CallableReward(async_overlap, "0,1").score(["a"], ["b"])
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
    monkeypatch.delenv(reward_models.KEY_ENV, raising=False)
    monkeypatch.setenv("MY_REWARD_KEY", KEY)
    server = Server()
    yield server
    server.close()


def endpoint(server, **options):
    return EndpointReward(server.url, **({"bounds": "0,1", "backoff": 0.0, "retries": 2} | options))


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
    reward = endpoint(server, style=style, template="{prompt}{response}")
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
    pauses = []
    monkeypatch.setattr(reward_models.time, "sleep", pauses.append)
    answers = iter([{}, {"Retry-After": "7"}, {"Retry-After": "1e9"}, {"Retry-After": "nan"}, {}])
    server.answer = lambda path, body: (503, next(answers), {})
    with pytest.raises(AlignProError, match="status 503"):
        endpoint(server, backoff=0.5, retries=4).score(["a"], ["b"])
    assert pauses == [0.5, 7.0, 60.0, 4.0]


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
    keyed = {"bounds": "0,1", "key_env": "MY_REWARD_KEY", "backoff": 0.0, "retries": 1}

    def keyed_reward(**options):
        return EndpointReward(url, **(keyed | options))

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
    failing(lambda: EndpointReward("http://127.0.0.1:9/x?token=query-secret", **keyed), *sample)
    failing(lambda: EndpointReward(url, "0,1", key_env=KEY))
    failing(lambda: EndpointReward("http://me:url-secret@127.0.0.1/", "0,1"))
    failing(lambda: EndpointReward("url-secret", "0,1"))
    texts.append(repr(keyed_reward()) + json.dumps(keyed_reward().describe()))
    everything = " ".join(texts)
    for secret in (KEY, "query-secret", "url-secret"):
        assert secret not in everything
    assert "query-secret" in url
    assert server.asked  # the loop above did talk to the server


def test_bad_keys_and_settings_are_named_before_any_request(server, monkeypatch):
    with pytest.raises(AlignProError, match="NO_SUCH_KEY: this environment variable is not set"):
        endpoint(server, key_env="NO_SUCH_KEY")
    monkeypatch.setenv("MY_REWARD_KEY", "two words")
    with pytest.raises(AlignProError, match="is no key") as error:
        endpoint(server, key_env="MY_REWARD_KEY")
    assert "words" not in str(error.value)
    for bad in (
        {"style": "x"},
        {"timeout": 0.0},
        {"timeout": math.nan},
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
        (b'{"rewards": 0.5}', "not of style rewards"),
        (b'["rewards"]', "not of style rewards"),
        (b'{"rewards": [0.5, 2.0, 0.5]}', r"outside the declared"),
    ],
)
def test_answers_that_are_no_rewards(server, answer, match):
    good = server.answer
    server.answer = lambda path, body: (200, {}, answer) if "d" in body["prompts"] else good(path, body)
    with pytest.raises(AlignProError, match=match):
        endpoint(server, batch_size=3).score(list("abcedf"), list("uvwxyz"))


# --- names ---


def test_rewards_by_name(folder, server, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from alignpro.llm.reward_models import CallableReward\n"
        "def short(prompts, responses):\n    return [1 / (1 + len(y)) for y in responses]\n"
        "def one(prompt, response):\n    return 0.5\n"
        "made = CallableReward(one, '0,1', each=True)\n"
        "number = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('no\\nluck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards.load_reward("my_rewards:short@0,1").score(["a"], ["bcd"]) == pytest.approx([0.25])
    assert rewards.load_reward("my_rewards:made").score(["a"], ["b"]) == pytest.approx([0.5])
    assert rewards.load_reward("my_rewards:one@0,1", each=True).score(["a"], ["b"]) == pytest.approx([0.5])
    assert rewards.load_reward(f"{server.url}@clip:0,2").score(["a"], ["a"]) == pytest.approx([1 / 26])
    monkeypatch.setenv(reward_models.KEY_ENV, KEY)
    rewards.load_reward(f"{server.url}@0,1").score(["a"], ["a"])
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    loaded = rewards.load_reward(f"{folder}@squash:0,2", device="cpu")
    assert isinstance(loaded, SequenceReward)
    assert loaded.bounded.bounds == Squash(0.0, 2.0)
    rewards.check_name("weqweasdas/RM-Gemma-2B@squash:0,2")
    asked = len(server.asked)
    for name, match in {
        "nope": "minilm-bt",
        "": "minilm-bt",
        "my_rewards:short": "Theorem 1 needs",
        "my_rewards:made@0,1": "bounds of its own",
        "my_rewards:absent@0,1": "has no absent",
        "my_rewards:number@0,1": "is int",
        "no_such_module:f@0,1": "importing no_such_module failed",
        "broken_rewards:f@0,1": "importing broken_rewards failed",
        "my_rewards:short@clip:1": "clip:LOW,HIGH",
        "weqweasdas/RM-Gemma-2B": "Theorem 1 needs",
        server.url: "Theorem 1 needs",
        "http://me:pw@1.2.3.4/x,y": "without a user name",
        str(folder): "Theorem 1 needs",
        "../nowhere/else@0,1": "choose from",
    }.items():
        for use in (rewards.check_name, rewards.load_reward):
            with pytest.raises(AlignProError, match=match) as error:
                use(name)
            assert "\n" not in str(error.value)
            assert "pw" not in str(error.value)
    assert len(server.asked) == asked


# --- eq. (1) ---


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
            pairs.append(PreferencePair(x, chosen, rejected, "letters", data.split_of(x)))
    return pairs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("base") / "tiny", *models.tiny_model())


QUICK = RewardSettings(learning_rate=3e-3, epochs=2, batch_size=32, max_tokens=64, lora_rank=0)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "reward"
    return out, train_reward(letter_pairs(900), base, out, QUICK, device="cpu")


def test_training_learns_the_preference_and_the_swapped_mutant_its_opposite(base, trained, tmp_path):
    """A reward that knows nothing passes the first check with probability 2.5% (one side of Wilson's 95%)."""
    facts = trained[1].facts
    assert facts["test_accuracy"]["lo"] > 0.5
    assert facts["test_loss"] < math.log(2)
    assert facts["test_accuracy"]["prompts"] == facts["prompts"]["test"] > 100
    swapped = train_reward(letter_pairs(900, swap=True), base, tmp_path / "swapped", QUICK, device="cpu")
    true = letter_pairs(900)
    mutant = rewards.accuracy(swapped, [p for p in true if p.split == "test"])
    assert mutant["hi"] < 0.5


def test_the_measures_are_of_held_out_prompts_by_equation_1(trained):
    """Recomputed from the reward's scores without the class's own sums."""
    reward, pairs = trained[1], letter_pairs(900)
    assert reward.facts["pairs"] == {
        f"letters {part}": sum(p.split == part for p in pairs) for part in sorted(data.SPLITS)
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
    assert {p.suffix for p in out.iterdir()} <= {".json", ".safetensors", ".jinja"}
    pairs = letter_pairs(20, seed=5)
    prompts, responses = [p.prompt for p in pairs], [p.chosen for p in pairs]
    for again in (SequenceReward.load(out, device="cpu"), rewards.load_reward(str(out), device="cpu")):
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
    one, two = (train_reward(pairs, base, tmp_path / str(i), settings, device="cpu") for i in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.facts == two.facts
    assert isinstance(one.model, LlamaForSequenceClassification)  # and no adapter around it
    names = one.model.state_dict().keys()
    assert not any("lora" in name for name in names)
    untouched = models.load_model(base, device="cpu")[0].state_dict()
    moved = {n for n in names if n in untouched and not torch.equal(one.model.state_dict()[n], untouched[n])}
    assert any("q_proj" in n for n in moved)
    assert not any("embed" in n for n in moved)
    other = train_reward(
        pairs, base, tmp_path / "other", RewardSettings(**{**one.facts["settings"], "seed": 1}), device="cpu"
    )
    assert other.facts["test_loss"] != one.facts["test_loss"]
    heads = [reward_models._base(base, seed)[0].score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_mistakes_cost_no_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr(reward_models, "_fit", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(reward_models, "_base", lambda *_: pytest.fail("loaded"))
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
    assert all((p.source, p.split) == ("mine", data.split_of(p.prompt)) for p in read)
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
