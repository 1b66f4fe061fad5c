"""In-process targets: each answer's distribution, its independence of everything else, and log-probabilities.

Statistical tests draw with fixed seeds; each states the probability with which a correct program would fail
under a fresh seed.
"""

import json
import string
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from mutants import kills
from scipy import stats
from transformers import GenerationConfig

from alignpro.errors import AlignProError
from alignpro.llm.models import policy
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import EVALUATION, Sampling, stream_key
from alignpro.llm.policies.prompter import target_ids
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.target import Answer, Stopped

PROMPTS = ["a", "bcd", "abcdefgh", "hgf", "ab", "eeeeee"]
FALSE_ALARM = 1e-6


@pytest.fixture(scope="module")
def target():
    return LocalTarget(tiny_model(seed=1), batch_size=8)


@pytest.fixture(scope="module")
def wide():
    """More tokens than the paper's top_k of 20."""
    return LocalTarget(tiny_model(seed=1, vocab=string.ascii_letters), batch_size=100)


def next_token(target, ids, sampling=None) -> np.ndarray:
    """[V]: the distribution of the next token, by formulas of its own."""
    with torch.no_grad():
        logits = target.model(torch.tensor([ids])).logits[0, -1].double().numpy()
    sampling = sampling or Sampling()
    p = np.exp(logits / sampling.temperature - (logits / sampling.temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    # The fewest likeliest tokens whose probability reaches top_p.
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= sampling.top_p]] = 0
    return p / p.sum()


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of Pearson's chi-square test; 0 where the impossible happened. Rare cells (< 5 expected) are pooled."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 5
    o = np.append(counts[~rare], counts[rare].sum())
    e = np.append(expected[~rare], expected[rare].sum())
    o, e = o[e > 0], e[e > 0]
    if len(e) < 2:
        return 1.0
    return float(stats.chi2.sf(((o - e) ** 2 / e).sum(), len(e) - 1))


def first_tokens(target, prompt, sampling, n, seed=0) -> np.ndarray:
    """[V] counts. `<pad>` and `<unk>` have no text, so both are counted as `<unk>`."""
    counts = np.zeros(len(target.tokenizer))
    for answer in target.respond([prompt], sampling, samples=n, seed=seed)[0]:
        assert answer.tokens == 1
        token = target.tokenizer.convert_tokens_to_ids(answer.text) if answer.text else 2
        counts[1 if answer.finish == "stop" else token] += 1
    return counts


def merged(p: np.ndarray) -> np.ndarray:
    p = p.copy()
    p[2] += p[0]
    p[0] = 0
    return p


SETTINGS = {
    "own": Sampling(max_tokens=1),
    "hot": Sampling(temperature=2.0, max_tokens=1),
    "cold": Sampling(temperature=0.5, max_tokens=1),
    "nucleus": Sampling(top_p=0.6, max_tokens=1),
    "top-k": Sampling(top_k=3, max_tokens=1),
    "the paper's": Sampling(temperature=1.5, top_p=0.6, top_k=20, max_tokens=1),
    "its top-k ignored": Sampling(temperature=1.5, top_p=0.6, max_tokens=1),
    "its nucleus ignored": Sampling(temperature=1.5, top_k=20, max_tokens=1),
    "its temperature ignored": Sampling(top_p=0.6, top_k=20, max_tokens=1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_token_has_the_right_distribution(wide, name):
    """False alarm 1e-6 per setting. The other settings are the mutants: an option that is ignored."""
    counts = first_tokens(wide, "hello", SETTINGS[name], 3000)
    ids = target_ids(wide.tokenizer, "hello")
    p = {other: p_value(counts, merged(next_token(wide, ids, s))) for other, s in SETTINGS.items()}
    assert p[name] > FALSE_ALARM
    mutants = {other for other in SETTINGS if other != name}
    assert all(p[other] < FALSE_ALARM for other in mutants), p


def test_the_steps_are_independent_draws(target):
    """The joint of two tokens, at a false alarm of 1e-6; the mutant draws both with one uniform."""
    start = list(target_ids(target.tokenizer, "ab"))
    size = len(target.tokenizer)
    joint = np.zeros((size, size))
    first = next_token(target, start)
    for token in range(size):
        if token != 1:
            joint[token] = first[token] * next_token(target, [*start, token])
    joint[1, 0] = first[1]  # ended: nothing follows
    rows = target._generate([start] * 1, [0], Sampling(max_tokens=2))
    assert len(rows[0]) <= 2

    def count(keys_of, n=4000) -> float:
        counts = np.zeros((size, size))
        for i in range(0, n, 500):
            keys = [keys_of(j) for j in range(i, i + 500)]
            for row in target._generate([start] * 500, keys, Sampling(max_tokens=2)):
                counts[row[0], row[1] if len(row) > 1 else 0] += 1
        return p_value(counts.ravel(), joint.ravel())

    assert count(lambda j: stream_key(0, Sampling(), "ab", j)) > FALSE_ALARM
    draws = policy.Draws.__init__

    def one_uniform(self, *arguments):
        draws(self, *arguments)
        self.uniforms = self.uniforms[:, :1].expand_as(self.uniforms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.Draws, "__init__", one_uniform)
        assert count(lambda j: stream_key(0, Sampling(), "ab", j)) < FALSE_ALARM


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=12), Sampling(1.5, 0.6, 20, max_tokens=12)])
def test_an_answer_depends_on_nothing_else_that_is_asked(target, sampling):
    """Exactly, for every batch size, order and split of the calls; a batch-wide stream does not."""
    model = target.model, target.tokenizer
    want = LocalTarget(model, batch_size=64).respond(PROMPTS, sampling, samples=4, seed=3)
    assert len({answer.text for row in want for answer in row}) > 12
    for size in (1, 3, 7):
        assert LocalTarget(model, batch_size=size).respond(PROMPTS, sampling, samples=4, seed=3) == want
    order = [4, 1, 5, 0, 3, 2]
    shuffled = target.respond([PROMPTS[i] for i in order], sampling, samples=4, seed=3)
    assert [shuffled[order.index(i)] for i in range(6)] == want
    for i, prompt in enumerate(PROMPTS):
        assert target.respond([prompt], sampling, first=2, samples=2, seed=3) == [want[i][2:]]
    ragged = target.respond(["a", "a", "ab"], sampling, first=[3, 0, 1], seed=3)
    assert ragged == [[want[0][3]], [want[0][0]], [want[4][1]]]

    def batch_wide(self, keys, *rest):  # the mutant: what one shared generator would give
        original(self, [keys[0] + i for i in range(len(keys))], *rest)

    original = policy.Draws.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy.Draws, "__init__", batch_wide)
        assert LocalTarget(model, batch_size=3).respond(PROMPTS, sampling, samples=4, seed=3) != want


def test_every_part_of_the_key_makes_other_answers(target):
    base = Sampling(max_tokens=16)
    want = target.respond(["abcd"], base, samples=6)[0]
    assert len({answer.text for answer in want}) == 6  # samples differ
    assert target.respond(["abcd"], base, samples=6, seed=1)[0] != want
    assert target.respond(["abcd"], Sampling(1.01, max_tokens=16), samples=6)[0] != want
    keys = [
        stream_key(*k)
        for k in (
            (0, base, "a", 0),
            (1, base, "a", 0),
            (0, base, "b", 0),
            (0, base, "a", 1),
            (0, EVALUATION, "a", 0),
        )
    ]
    assert len(set(keys)) == 5
    # A longer limit continues the same answer.
    longer = target.respond(["abcd"], Sampling(max_tokens=30), samples=6)[0]
    assert all(new.text.startswith(old.text) for new, old in zip(longer, want, strict=True))
    assert any(new.tokens > old.tokens for new, old in zip(longer, want, strict=True))


def test_answers_end_where_the_model_ends(target):
    answers = target.respond(PROMPTS, Sampling(max_tokens=10), samples=20)
    flat = [answer for row in answers for answer in row]
    assert {answer.finish for answer in flat} == {"stop", "length"}
    for row, prompt in zip(answers, PROMPTS, strict=True):
        for answer in row:
            assert answer.prompt_tokens == len(target_ids(target.tokenizer, prompt))
            assert answer.tokens == 10 if answer.finish == "length" else answer.tokens <= 10
            assert "<" not in answer.text
            assert len(answer.text) <= answer.tokens - (answer.finish == "stop")
            assert Answer(**json.loads(json.dumps(asdict(answer)))) == answer


def test_temperature_0_takes_the_likeliest(target):
    answers = target.respond(["abc", "d"], Sampling(temperature=0, max_tokens=5), samples=2)
    for row, prompt in zip(answers, ("abc", "d"), strict=True):
        ids = list(target_ids(target.tokenizer, prompt))
        for _ in range(row[0].tokens):
            ids.append(int(np.argmax(next_token(target, ids))))
        new = ids[-row[0].tokens :]
        assert row[0] == row[1]
        assert row[0].text == target.tokenizer.decode(new, skip_special_tokens=True)


def test_what_the_model_ships_does_not_leak_in():
    model, tokenizer = tiny_model(seed=1)
    want = LocalTarget((model, tokenizer)).respond(PROMPTS, Sampling(max_tokens=8), samples=3)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_p=0.3,
        top_k=2,
        repetition_penalty=1.7,
        no_repeat_ngram_size=1,
        eos_token_id=[1],
        pad_token_id=0,
        max_length=20,
    )
    assert LocalTarget((model, tokenizer)).respond(PROMPTS, Sampling(max_tokens=8), samples=3) == want


def test_out_of_memory_halves_the_batch(target, monkeypatch):
    want = target.respond(PROMPTS, Sampling(max_tokens=4), samples=3)
    small = LocalTarget((target.model, target.tokenizer), batch_size=16)
    generate, sizes = small._generate, []

    def little_memory(rows, keys, sampling, most=3):
        sizes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(rows, keys, sampling)

    monkeypatch.setattr(small, "_generate", little_memory)
    assert small.respond(PROMPTS, Sampling(max_tokens=4), samples=3) == want
    assert sizes[:4] == [16, 8, 4, 2]
    monkeypatch.setattr(small, "_generate", lambda r, k, s: little_memory(r, k, s, most=0))
    with pytest.raises(Stopped, match="smaller model") as error:
        small.respond(PROMPTS, Sampling(max_tokens=4))
    assert error.value.reason == "failed"

    # Rewrites, and whatever else is drawn in batches, likewise.
    keys = [[1, 2, 3], [4, 5], [6]]
    asked = target.model, target.tokenizer.pad_token_id, [[3], [4], [5]], keys, Sampling(max_tokens=4)
    whole, drawn, sizes = policy.sample_and_score(*asked), policy.draw, []

    def little(model, pad, rows, keys, sampling, score):
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return drawn(model, pad, rows, keys, sampling, score=score)

    monkeypatch.setattr(policy, "draw", little)
    assert [[ids for ids, _ in row] for row in policy.sample_and_score(*asked)] == [
        [ids for ids, _ in row] for row in whole
    ]
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]


def test_log_probs_are_the_chain_rule(target):
    prompts = ["abc", "d", "abcdef", "a"]
    ids = target.tokenizer.convert_tokens_to_ids
    cut, ended = Answer("ba", "length", 1, 2, ids(["b", "a"])), Answer("c", "stop", 1, 2, [ids("c"), 1])
    responses = ["fgh", cut, "", ended]
    got = target.log_probs(prompts, responses)
    assert (got.shape, got.dtype) == ((4,), np.float64)

    def chain(prompt, text, ended):
        ids, total = list(target_ids(target.tokenizer, prompt)), 0.0
        for token in [*target.tokenizer(text).input_ids, *([1] if ended else [])]:
            total += np.log(next_token(target, ids)[token])
            ids.append(token)
        return total

    want = [chain("abc", "fgh", 1), chain("d", "ba", 0), chain("abcdef", "", 1), chain("a", "c", 1)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    # The mutants: forgetting the end token, or counting it where the answer was cut off.
    for i, text in enumerate(("fgh", "ba", "", "c")):
        assert abs(got[i] - chain(prompts[i], text, i == 1)) > 1e-2
    one = LocalTarget((target.model, target.tokenizer), batch_size=1)
    np.testing.assert_allclose(one.log_probs(prompts, responses), got, atol=1e-5)


def test_log_probs_sum_to_one(target):
    """Over every answer of at most one token: the ended ones, and those cut off after one."""
    ids = target.tokenizer.convert_tokens_to_ids
    texts = [Answer("", "stop", 1, 1, (1,)), *(Answer(c, "length", 1, 1, (ids(c),)) for c in "abcdefgh")]
    total = np.exp(target.log_probs(["abc"] * len(texts), texts)).sum()
    rest = next_token(target, target_ids(target.tokenizer, "abc"))[[0, 2]].sum()
    assert total + rest == pytest.approx(1, abs=1e-6)


def test_several_end_tokens_count_together(target):
    model, tokenizer = tiny_model(seed=1)
    model.generation_config.eos_token_id = [1, 4]
    both = LocalTarget((model, tokenizer))
    first = next_token(target, target_ids(tokenizer, "abc"))
    assert both.log_probs(["abc"], [""])[0] == pytest.approx(np.log(first[1] + first[4]), abs=1e-5)
    finishes = Counter(a.finish for a in both.respond(["abc"], Sampling(max_tokens=1), samples=300)[0])
    # A binomial of 300; false alarm about 1e-6 (five standard deviations).
    share = first[1] + first[4]
    assert abs(finishes["stop"] / 300 - share) < 5 * (share * (1 - share) / 300) ** 0.5


def test_bfloat16(tmp_path):
    model, tokenizer = tiny_model(seed=2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    half = LocalTarget(tmp_path, dtype="bfloat16", device="cpu")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.name == str(tmp_path)
    full = LocalTarget(tmp_path, dtype="float32", device="cpu", name="tiny")
    assert full.name == "tiny"
    answers = half.respond(PROMPTS, EVALUATION, samples=2)
    assert answers == half.respond(PROMPTS, EVALUATION, samples=2)
    np.testing.assert_allclose(half.log_probs(["ab"], ["c"]), full.log_probs(["ab"], ["c"]), atol=0.2)
    assert half.revision != full.revision


def test_the_revision_is_the_weights():
    one, two = (LocalTarget(tiny_model(seed=seed)) for seed in (0, 0))
    assert one.revision == two.revision
    assert LocalTarget(tiny_model(seed=1)).revision != one.revision
    model, tokenizer = tiny_model(seed=0)
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    assert LocalTarget((model, tokenizer)).revision != one.revision
    model, tokenizer = tiny_model(seed=0)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    assert LocalTarget((model, tokenizer)).revision != one.revision


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", None),
        ("top_k", -1),
        ("top_k", 2.0),
        ("max_tokens", 0),
        ("max_tokens", True),
    ],
)
def test_bad_sampling_is_refused(field, value):
    with pytest.raises(AlignProError, match=field) as error:
        Sampling(**{field: value})
    assert "\n" not in str(error.value)
    assert "choose" in str(error.value)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompts": "abc"},
        {"prompts": ["a", 3]},
        {"samples": 0},
        {"samples": 1.5},
        {"first": -1},
        {"first": [0]},
        {"seed": "x"},
        {"prompts": ["a", ""]},
    ],
)
def test_bad_requests_are_refused_before_any_work(target, bad, monkeypatch):
    monkeypatch.setattr(target, "_generate", None)
    good = {"prompts": ["a", "b"], "samples": 1, "first": 0, "seed": 0}
    arguments = {**good, **bad}
    with pytest.raises(AlignProError) as error:
        target.respond(arguments.pop("prompts"), Sampling(max_tokens=4), **arguments)
    assert "\n" not in str(error.value)


def test_a_prompt_without_room_is_refused_and_the_others_answered(target):
    """The mutant refuses one token too many."""

    def check(most):
        rows = target.respond(["a" * most, "a" * (most + 1), "b"], Sampling(max_tokens=4), samples=2, seed=3)
        assert [{answer.finish == "refused" for answer in row} for row in rows] == [{False}, {True}, {False}]
        assert rows[2] == target.respond(["b"], Sampling(max_tokens=4), samples=2, seed=3)[0]
        assert (rows[1][0].tokens, rows[1][0].prompt_tokens) == (0, most + 1)
        assert "beyond the 512 that model" in rows[1][0].text
        values = target.log_probs(["a", "b"], [rows[1][0], rows[2][0]])
        assert np.isnan(values[0])
        assert np.isfinite(values[1])

    check(508)
    kills(check, 507)


def test_bad_targets_and_bad_log_probs(target):
    with pytest.raises(AlignProError, match="batch_size"):
        LocalTarget(tiny_model(), batch_size=0)
    with pytest.raises(AlignProError, match="one response per prompt"):
        target.log_probs(["a"], [])
    with pytest.raises(AlignProError, match=r"responses\[0\]"):
        target.log_probs(["a"], [None])
    with pytest.raises(AlignProError, match=r"responses\[0\] has no token ids"):
        target.log_probs(["a"], [Answer("b", "stop", 1, 2)])
    assert target.log_probs([], []).shape == (0,)
    assert target.respond([], Sampling()) == []
