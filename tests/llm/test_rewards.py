"""The Bradley–Terry head against plain formulas, and the trained reward on real text."""

import ast
import dataclasses
import inspect
import json
import math
import statistics
import sys

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.estimation.winrate import wilson
from alignpro.llm.data import packaged
from alignpro.llm.data.packaged import PreferencePair
from alignpro.llm.data.split import split_of
from alignpro.llm.models import packages
from alignpro.llm.rewards import accuracy, bradley_terry, features, minilm, opening
from alignpro.llm.rewards.bradley_terry import BradleyTerryReward, bradley_terry_loss, fit_bradley_terry
from alignpro.llm.rewards.features import TEXT_FEATURES, Embedder

NEEDED = ("minilm", "llamafactory", "eval-framework")
needs_reward = pytest.mark.skipif(
    not all(packages.cached(name) for name in NEEDED),
    reason='fetch and train it with: python -c "from alignpro.llm.rewards.opening import load_reward; '
    'load_reward()"',
)


def synthetic(n: int, dimension: int, seed: int):
    """Feature differences and the preferences that a known linear reward makes by eq. (1)'s model."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=dimension)
    differences = rng.normal(size=(n, dimension))
    prefers_first = rng.random(n) < 1 / (1 + np.exp(-differences @ truth))
    return truth, np.where(prefers_first[:, None], differences, -differences)


def test_the_loss_is_equation_1():
    rng = np.random.default_rng(0)
    w, d = rng.normal(size=4), rng.normal(size=(7, 4))
    share = rng.dirichlet(np.ones(7))
    expected = 0.0
    for i in range(7):
        margin = sum(w[j] * d[i, j] for j in range(4))
        expected -= share[i] * math.log(1 / (1 + math.exp(-margin)))
    expected += 0.5 * 0.3 * sum(x * x for x in w)
    assert bradley_terry_loss(w, d, share, 0.3)[0] == pytest.approx(expected, rel=1e-12)


def numerical_gradient(w, d, share, decay, step=1e-6):
    eye = np.eye(len(w)) * step
    f = [
        bradley_terry_loss(w + e, d, share, decay)[0] - bradley_terry_loss(w - e, d, share, decay)[0]
        for e in eye
    ]
    return np.array(f) / (2 * step)


def test_the_gradient_is_the_derivative_and_mutants_are_not():
    rng = np.random.default_rng(1)
    w, d = rng.normal(size=5), rng.normal(size=(9, 5))
    share = rng.dirichlet(np.ones(9))
    gradient = bradley_terry_loss(w, d, share, 0.2)[1]
    numeric = numerical_gradient(w, d, share, 0.2)
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)
    sigma = 1 / (1 + np.exp(-d @ w))
    mutants = {
        "σ(m) for σ(−m)": -d.T @ (share * sigma) + 0.2 * w,
        "sign": d.T @ (share * (1 - sigma)) + 0.2 * w,
        "unweighted": -d.T @ (1 - sigma) / 9 + 0.2 * w,
        "no decay": -d.T @ (share * (1 - sigma)),
        "decay doubled": -d.T @ (share * (1 - sigma)) + 0.4 * w,
    }
    for name, mutant in mutants.items():
        assert np.abs(mutant - numeric).max() > 1e-3, name


def test_the_loss_does_not_overflow():
    loss, gradient = bradley_terry_loss(np.array([1e4]), np.array([[-1.0]]), np.ones(1), 0.0)
    assert loss == 1e4
    assert gradient == pytest.approx([1.0])


def test_training_recovers_a_known_linear_reward():
    truth, differences = synthetic(20_000, 6, seed=2)
    fitted = fit_bradley_terry(differences, np.ones(len(differences)), 1e-6)
    np.testing.assert_allclose(fitted, truth, atol=0.12)
    # A stationary point of the objective it claims to minimise.
    share = np.full(len(differences), 1 / len(differences))
    assert np.abs(bradley_terry_loss(fitted, differences, share, 1e-6)[1]).max() < 1e-6


def test_training_is_deterministic_and_shrinks_with_decay():
    _, differences = synthetic(200, 5, seed=3)
    fits = [fit_bradley_terry(differences, np.ones(200), decay) for decay in (0.01, 0.01, 1.0, 100.0)]
    np.testing.assert_array_equal(fits[0], fits[1])
    norms = [np.linalg.norm(fit) for fit in fits[1:]]
    assert norms[0] > norms[1] > norms[2] > 0


def test_pair_weights_act_as_repetition():
    _, differences = synthetic(60, 4, seed=4)
    counts = np.random.default_rng(5).integers(1, 4, size=60)
    repeated = fit_bradley_terry(np.repeat(differences, counts, axis=0), np.ones(counts.sum()), 0.1)
    np.testing.assert_allclose(fit_bradley_terry(differences, counts.astype(float), 0.1), repeated, atol=1e-6)


def test_separable_pairs_need_decay():
    for decay in (0.0, -1.0, math.nan):
        with pytest.raises(AlignProError, match="positive"):
            fit_bradley_terry(np.ones((3, 1)), np.ones(3), decay)
    with pytest.raises(AlignProError, match="no preference pairs"):
        fit_bradley_terry(np.ones((0, 1)), np.ones(0), 1.0)


def test_text_features_notice_what_they_name():
    def feature(name: str, response: str, prompt: str = "Name a red fruit") -> float:
        return features.text_features(prompt, response)[TEXT_FEATURES.index(name) - 2]

    assert feature("prompt words", "a red fruit") == 1.0
    assert feature("prompt words", "an apple") == 0.0
    assert feature("distinct words", "apple") == 0.0
    assert feature("distinct words", "apple apple apple apple") < feature("distinct words", "apple apple") < 0
    assert (feature("ends", "An apple."), feature("ends", "An apple and")) == (1.0, 0.0)
    assert feature("list lines", "- apple\n2. cherry\nplain") == pytest.approx(2 / 3)
    assert feature("ends", " ") == feature("list lines", "\n") == 0.0
    assert feature("prompt words", "red") == feature("capitals", "A") == 1.0
    assert feature("word length", "ab, abcd") == 3.0
    assert feature("question", "Which?") == 1.0
    assert feature("first person", "Sorry, I can't") == 1.0
    assert feature("capitals", "APP") == 1.0
    assert feature("non-ASCII", "苹果") == 1.0
    for text in ("", " ", "\n", "🙂", "?!", "a" * 10_000):
        assert np.isfinite(features.text_features("", text)).all()
    assert len(features.text_features("x", "y")) == len(TEXT_FEATURES) - 2


def test_cutting_keeps_white_space_inside():
    assert minilm._cut("  one\n\n- two  three four", 4) == "one\n\n- two  three"
    assert minilm._cut("one", 3) == "one"
    assert minilm._cut("  ", 3) == ""


def test_prompts_weigh_the_same_and_groups_have_their_shares():
    def pair(prompt: str, source: str, split: str = "train") -> PreferencePair:
        return PreferencePair(prompt, "a", "b", source, split)  # type: ignore[arg-type]

    pairs = [pair("x", "hb"), pair("x", "hb"), pair("y", "dpo"), pair("z", "dpo", "test"), pair("x", "echo")]
    weight = minilm._pair_weights(pairs, 4, {"echo": 0.1})
    assert weight == pytest.approx([0.25, 0.25, 0.5, 1.0, 0.1])


class Given:
    """A reward that says of each response the number that is written in it."""

    def logits(self, prompts, responses):
        return np.array([float(y) for y in responses])


def check_accuracy(measure):
    """Three prompts: one of two pairs won, one tie, one lost; each prompt counts once."""
    pairs = [("a", "1", "0"), ("a", "0", "1"), ("b", "1", "1"), ("c", "0", "2")]
    fact = measure(Given(), [PreferencePair(*pair, "hand", "test") for pair in pairs])
    assert fact["value"] == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert (fact["prompts"], fact["pairs"]) == (3, 4)
    assert (fact["lo"], fact["hi"]) == wilson(fact["value"], 3)


def test_accuracy_counts_ties_half_and_prompts_once():
    check_accuracy(accuracy.accuracy)
    for right, wrong in {
        "0.5 * (margin == 0)": "1.0 * (margin == 0)",  # a tie that counts whole
        "(margin > 0) + 0.5": "(margin >= 0) + 0.5",  # and one that counts one and a half
        "+ 0.5 * (margin == 0)": "",  # and not at all
        "setdefault(prompt,": "setdefault((prompt, hit),",  # results for prompts
        "chosen - rejected": "rejected - chosen",
        "wilson(value, n)": "wilson(value, len(prompts))",
    }.items():
        kills(check_accuracy, mutated(accuracy, right, wrong).accuracy)


def test_the_longer_answer_has_more_words():
    pairs = [("a", "one two", "characters"), ("b", "one", "two"), ("b", "1 2 3", "one two"), ("c", "", "1")]
    fact = accuracy.longer_wins([PreferencePair(*pair, "hand", "test") for pair in pairs])
    assert fact["value"] == pytest.approx((1 + 0.75 + 0) / 3)


def check_ridge(ridge):
    """Only slopes are shrunk, and by half where a direction has `penalty` times that mean square."""
    rng = np.random.default_rng(0)
    n, penalty = 400, 0.03
    e = rng.choice([-1.0, 1.0], size=(n // 2, 1)) * math.sqrt(penalty / Embedder.DIMENSION)
    inputs = np.c_[np.r_[e, -e], np.ones(n)]  # of mean 0
    slope, constant = 7.0, 3.0
    found = ridge(inputs, inputs @ [slope, constant], np.full(n, 2.0), penalty)
    assert found == pytest.approx([slope / 2, constant], rel=1e-9)
    # A row that weighs twice is two rows.
    y, twice = rng.normal(size=n), np.r_[np.ones(n - 1), 2.0]
    again = ridge(np.r_[inputs, inputs[-1:]], np.r_[y, y[-1]], np.ones(n + 1), penalty)
    assert ridge(inputs, y, twice, penalty) == pytest.approx(again, rel=1e-9)


def test_the_ridge_shrinks_slopes_and_not_the_constant():
    check_ridge(minilm._ridge)
    for right, wrong in {
        "    ridge[-1] = 0.0\n": "",  # the ridge on the constant too
        "ridge[-1] = 0.0": "ridge[0] = 0.0",
        "penalty / Embedder.DIMENSION": "penalty",
        "    weights = weights / weights.sum()\n": "",
        "inputs.T @ (weights * targets)": "inputs.T @ targets / len(targets)",
    }.items():
        kills(check_ridge, mutated(minilm, right, wrong)._ridge)


def check_squash(squash):
    """Against plain formulas: baseline of the pairs' means, centre a median, scale a weighted deviation."""
    rng = np.random.default_rng(0)
    n, slope = 31, 1.5
    inputs, weights = np.c_[rng.normal(size=(n, 3)), np.ones(n)], rng.uniform(1, 9, size=n)
    half, line = rng.exponential(size=n), inputs @ [1.0, -2.0, 0.5, 4.0]
    baseline, _, scale = squash(line + half, line - half, inputs, weights, slope)
    assert inputs @ baseline == pytest.approx(line, abs=2e-3)  # the ridge is that small
    spread = sum(w * h * h for w, h in zip(weights, half, strict=True)) / sum(weights)
    assert scale == pytest.approx(slope * math.sqrt(spread), rel=1e-12)
    skewed = line + rng.exponential(size=n) ** 2
    baseline, centre, _ = squash(skewed + half, skewed - half, inputs, weights, slope)
    residual = [*(skewed + half - inputs @ baseline), *(skewed - half - inputs @ baseline)]
    assert centre == pytest.approx(statistics.median(residual), abs=1e-12)


def test_the_squash_is_chosen_from_the_training_answers():
    check_squash(minilm._squash)
    for right, wrong in {
        "np.median(": "np.mean(",
        "(chosen - rejected) / 2": "(chosen - rejected)",
        ") ** 2, weights=weights)": ") ** 2)",
        "slope * within": "within",
        "(chosen + rejected) / 2, weights": "chosen, weights",
        "rejected - expected": "expected - rejected",
    }.items():
        kills(check_squash, mutated(minilm, right, wrong)._squash)


class Drawn:
    """Embeds a text as a unit vector drawn by it."""

    def embed(self, texts):
        rows = np.stack([np.random.default_rng([*text.encode()]).normal(size=384) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_head_that_was_saved_scores_as_it_did(tmp_path):
    rng, size = np.random.default_rng(0), Embedder.DIMENSION + len(TEXT_FEATURES)
    arrays = dict(zip(("weights", "mean", "scale_by"), rng.normal(size=(3, size)), strict=True))
    baseline = rng.normal(size=Embedder.DIMENSION + 1)
    texts = ["", "One.", "- two\n- three"]

    def check(module, changed=baseline):
        head = module.BradleyTerryReward(
            **arrays, baseline=changed, centre=0.3, scale=40.0, facts={"name": "a"}, embedder=Drawn()
        )
        head.save(tmp_path / "head")
        assert {p.name for p in (tmp_path / "head").iterdir()} == {"head.safetensors", "reward.json"}
        try:
            again = module.BradleyTerryReward.load(tmp_path / "head", Drawn())
        except AlignProError as error:
            raise AssertionError from error
        assert again.describe() == {"name": "a"}
        np.testing.assert_array_equal(again.score(texts, texts[::-1]), head.score(texts, texts[::-1]))

    check(bradley_terry)
    kills(lambda module: check(module, baseline[:-1]), bradley_terry)  # of another encoder
    for right, wrong in {
        "(Embedder.DIMENSION + 1,)": "(Embedder.DIMENSION - 1,)",
        "np.array([self.centre, self.scale])": "np.array([self.scale, self.centre])",
        'load_file(folder / "head.safetensors")': 'load_file(folder / "reward.json")',
    }.items():
        kills(check, mutated(bradley_terry, right, wrong))


class Turned:
    """Embeds a text that is an angle in degrees as the unit vector of that angle."""

    def embed(self, texts):
        angles = np.radians([float(text) for text in texts])
        return np.c_[np.cos(angles), np.sin(angles)].astype(np.float32)


def check_features(module):
    """The answer's embedding, how near it is to the prompt's, and by how much too near."""
    found = module.features(["0", "0", "90"], ["60", "30", "90"], Turned())
    angles = np.radians([60, 30, 90])
    cosine = np.array([0.5, math.sqrt(0.75), 1.0])
    expected = np.c_[np.cos(angles), np.sin(angles), cosine, [0.0, math.sqrt(0.75) - 0.8, 0.2]]
    assert found[:, :4] == pytest.approx(expected, abs=1e-6)
    assert found[:, 4:].tolist() == [module.text_features("0", y) for y in ("60", "30")] + [
        module.text_features("90", "90")
    ]


def test_features_know_an_answer_from_an_echo():
    check_features(features)
    for right, wrong in {
        "np.maximum(0.0, cosine - 0.8)": "np.maximum(0.0, cosine - 0.9)",
        "column_stack([ey,": "column_stack([ex,",
        "[text_features(x, y)": "[text_features(y, x)",
    }.items():
        kills(check_features, mutated(features, right, wrong))


def test_the_key_of_the_head_follows_its_code_and_data(monkeypatch):
    config = minilm.TrainingConfig()
    key = minilm.cache_key(config)
    assert minilm.cache_key(dataclasses.replace(config, seed=1)) != key
    source = inspect.getsource
    for name in minilm.MADE_BY:
        for change, same in (("x = 1\n", False), ("# a comment\n", True)):
            with monkeypatch.context() as patch:
                changed = {name: change}
                patch.setattr(
                    minilm.inspect, "getsource", lambda m, c=changed: source(m) + c.get(m.__name__, "")
                )
                assert (minilm.cache_key(config) == key) == same, name
    monkeypatch.setitem(
        minilm.catalogue.PACKAGES,
        "minilm",
        dataclasses.replace(minilm.catalogue.PACKAGES["minilm"], sha256="0" * 64),
    )
    assert minilm.cache_key(config) != key


def test_code_is_what_it_does():
    code = 'def f(x):\n    """Doc."""\n    return 2 * x  # twice\n'
    assert packages.code_digest(code) == packages.code_digest("def f(x):\n\n    return (2 * x)\n")
    others = ("3 * x", "2 + x", "2 * x, 'Doc.'")
    assert len({packages.code_digest(code.replace("2 * x", other)) for other in ("2 * x", *others)}) == 4
    assert ast.parse(code).body  # it is the code that is compared, not a failure to read it


def test_unknown_rewards(tmp_path):
    with pytest.raises(AlignProError, match="minilm-bt"):
        opening.load_reward("nope")
    with pytest.raises(AlignProError, match="cannot load a reward") as error:
        opening.load_reward(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.weights
@pytest.mark.skipif(not packages.cached("llamafactory"), reason=needs_reward.kwargs["reason"])
def test_constructed_pairs_are_true_by_construction():
    answers = dict(packaged.reference_answers())
    config = minilm.TrainingConfig(constructed_prompts=40)
    built = minilm.constructed_pairs(config)
    kinds = {kind for kind, _ in config.constructed}
    assert {p.source for p in built} == kinds
    chosen = {p.prompt: p.chosen for p in built}
    assert len(chosen) == 40
    for p in built:
        assert p.chosen == minilm._cut(answers[p.prompt], config.short_words) != p.rejected
        assert p.split == split_of(p.prompt)
        if p.source == "echo":
            assert p.rejected == p.prompt
        elif p.source == "silence":
            assert p.rejected == ""
        elif p.source == "other answer":
            assert p.rejected in {y for x, y in chosen.items() if x != p.prompt}
        else:
            opening = p.chosen.split()[:6]
            assert p.rejected.split() == opening * (len(p.rejected.split()) // len(opening))
            assert len(p.rejected.split()) >= 2 * len(opening)
    assert sum(p.source == "other answer" for p in built) >= 38


@pytest.fixture(scope="module")
def reward():
    return opening.load_reward("minilm-bt")


SMALL = minilm.TrainingConfig(
    sources=("dpo-demo",), weight_decays=(1.0, 0.1), short_words=8, constructed_prompts=30
)


@pytest.fixture(scope="module")
def small():
    return Embedder(max_tokens=16)


PROMPT = "What are the benefits of regular exercise?"
GOOD = "Regular exercise strengthens the heart, improves mood and sleep, and helps keep a healthy weight."
BAD = {
    "other subject": "The French Revolution began in 1789 and ended the monarchy of Louis XVI in France.",
    "echo": PROMPT,
    "loop": "Regular exercise strengthens Regular exercise strengthens Regular exercise strengthens",
    "silence": "",
    "debris": "asdf 9#@! lkj qwe zxc :: ;; }}",
}


@pytest.mark.weights
@needs_reward
class TestTrainedReward:
    @pytest.mark.parametrize("kind", BAD)
    def test_a_good_answer_beats_an_obviously_bad_one(self, reward, kind):
        good, bad = reward.score([PROMPT] * 2, [GOOD, BAD[kind]])
        assert good > bad + 0.1

    def test_scores_lie_in_the_declared_range(self, reward):
        texts = ["", " ", "\x00", "🙂" * 500, "a" * 20_000, GOOD, GOOD * 50, "\n" * 100]
        scores = reward.score([PROMPT] * len(texts), texts)
        assert scores.dtype == np.float64
        assert scores.shape == (len(texts),)
        assert ((reward.low <= scores) & (scores <= reward.high)).all()
        assert reward.score([], []).shape == (0,)

    def test_padding_an_answer_earns_nothing(self, reward):
        filler = " In addition, it is good to note that this is something to note."
        texts = [GOOD + filler * n for n in (0, 2, 4, 8)]
        scores = reward.score([PROMPT] * len(texts), texts)
        assert scores[-1] < scores[0]

    def test_a_score_does_not_depend_on_its_batch(self, reward):
        texts = [GOOD, *BAD.values()]
        together = reward.score([PROMPT] * len(texts), texts)
        fresh = dataclasses.replace(reward, embedder=Embedder())
        alone = [fresh.score([PROMPT], [text])[0] for text in texts]
        np.testing.assert_allclose(alone, together, atol=1e-5)

    def test_the_score_is_the_squashed_head(self, reward):
        """Recomputed from the saved numbers, without the class's own arithmetic."""
        phi = features.features([PROMPT], [GOOD], reward.embedder)[0]
        ex = reward.embedder.embed([PROMPT])[0].astype(float)
        raw = sum(reward.weights * (phi - reward.mean) * reward.scale_by)
        raw -= ex @ reward.baseline[:-1] + reward.baseline[-1]
        expected = 1 / (1 + math.exp(-(raw - reward.centre) / reward.scale))
        assert reward.score([PROMPT], [GOOD])[0] == pytest.approx(expected, rel=1e-9)

    def test_it_beats_chance_and_length_on_held_out_prompts(self, reward):
        # The first 40 words of every answer: a third of the time, and the length that small models write.
        test = [minilm._shortened(pair, 40) for pair in packaged.preference_pairs(split="test")]
        measured = accuracy.accuracy(reward, test)
        assert measured == pytest.approx(reward.describe()["test_accuracy_first_40_words"], abs=0.02)
        assert measured["lo"] > 0.5
        assert measured["value"] > accuracy.longer_wins(test)["value"]

    def test_the_description_is_json_and_measured(self, reward):
        facts = reward.describe()
        json.dumps(facts, allow_nan=False)
        assert abs(facts["length_correlation"]) < 0.35
        assert sum(facts["pairs"].values()) == len(packaged.preference_pairs())
        assert facts["limits"]
        facts["limits"].clear()
        assert reward.describe()["limits"]  # a copy

    def test_saving_and_loading(self, reward, tmp_path):
        reward.save(tmp_path / "saved")
        assert {p.name for p in (tmp_path / "saved").iterdir()} == {"head.safetensors", "reward.json"}
        again = opening.load_reward(str(tmp_path / "saved"))
        texts = [GOOD, *BAD.values()]
        prompts = [PROMPT] * len(texts)
        np.testing.assert_allclose(again.score(prompts, texts), reward.score(prompts, texts), atol=1e-6)
        assert again.describe() == reward.describe()
        head = tmp_path / "saved" / "head.safetensors"
        head.write_bytes(head.read_bytes()[:-8])
        with pytest.raises(AlignProError, match="cannot load a reward"):
            BradleyTerryReward.load(tmp_path / "saved")

    def test_mistakes_are_named(self, reward):
        with pytest.raises(AlignProError, match="2 prompts and 1 responses"):
            reward.score(["a", "b"], ["c"])
        with pytest.raises(AlignProError, match=r"responses\[1\] is NoneType"):
            reward.score(["a", "b"], ["c", None])
        broken = dataclasses.replace(reward, weights=np.full_like(reward.weights, np.nan))
        with pytest.raises(
            AlignProError, match=r"sample 0 \(prompt .*regular exercise.* is nan.*delete its cache folder"
        ):
            broken.score([PROMPT], [GOOD])

    def test_identical_texts_are_embedded_once(self, reward):
        embedder = Embedder(cache_size=3)
        rows = []
        forward = embedder._forward
        embedder._forward = lambda batch: rows.append(len(batch)) or forward(batch)
        first = embedder.embed(["a", "b", "a", "c"])
        assert rows == [3]
        np.testing.assert_array_equal(first[0], first[2])
        np.testing.assert_array_equal(embedder.embed(["a"]), first[:1])
        assert rows == [3]
        # The mean over a text's own tokens, whatever is embedded with it.
        long = "a text of more tokens than the others have"
        hidden = embedder._model(**embedder._tokenizer(long, return_tensors="pt")).last_hidden_state[0]
        plain = (hidden.mean(0) / hidden.mean(0).norm()).detach().numpy()
        np.testing.assert_allclose(embedder.embed(["e", long])[1], plain, atol=1e-6)
        np.testing.assert_allclose(embedder.embed(["a"]), first[:1], atol=1e-6)
        embedder.embed(["d"])  # evicts the least recently used
        assert len(embedder._cache) == 3
        np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)


@pytest.mark.weights
@needs_reward
class TestTraining:
    """Of small heads, which are not kept."""

    def test_training_is_deterministic_and_its_code_is_in_the_key(self, small):
        """A small configuration, twice; and another seed builds other pairs."""
        one = minilm.train_bradley_terry(SMALL, small)
        ran = set()
        sys.setprofile(lambda frame, *_: ran.add(frame.f_globals.get("__name__", "")))
        try:
            two = minilm.train_bradley_terry(SMALL, small)
        finally:
            sys.setprofile(None)
        np.testing.assert_array_equal(one.weights, two.weights)
        assert one.describe() == two.describe()
        other = dataclasses.replace(SMALL, seed=1)
        assert minilm.constructed_pairs(SMALL) != minilm.constructed_pairs(other)
        # They fetch, check and describe, and have no part in the head.
        others = {f"alignpro.llm.models.{name}" for name in ("packages", "catalogue", "libraries", "prompt")}
        others |= {"alignpro.files", "alignpro.llm.rewards.reward", "alignpro.llm.targets.target"}
        others |= {"alignpro.estimation.winrate"}

        def check_key(made_by):
            assert {name for name in ran if name.startswith("alignpro")} <= {*made_by} | others

        check_key(minilm.MADE_BY)
        for name in minilm.MADE_BY:
            kills(check_key, set(minilm.MADE_BY) - {name})
        # The weight decay is that of the least validation loss, and the squash fits the training answers.
        losses = one.facts["validation_loss"]
        assert losses[str(one.facts["weight_decay"])] == min(losses.values())
        assert len(set(losses.values())) == 2
        judged = packaged.preference_pairs(SMALL.sources)
        judged += [minilm._shortened(p, SMALL.short_words) for p in judged]
        other = [p for p in minilm.constructed_pairs(SMALL) if p.source == "other answer"]
        answers = [
            (p.prompt, y) for p in judged + other if p.split == "train" for y in (p.chosen, p.rejected)
        ]

        def check_middle(head):
            assert np.median(head.logits(*zip(*answers, strict=True))) == pytest.approx(0.0, abs=1e-6)

        check_middle(one)
        off = mutated(minilm, "(f - mean) * scale_by", "(f + mean) * scale_by")
        kills(check_middle, off.train_bradley_terry(SMALL, small))

    def test_nothing_is_learned_from_the_test_split(self, small, monkeypatch):
        """Pairs of the test split with the preference turned round change what is measured, not the head."""
        config, read = dataclasses.replace(SMALL, weight_decays=(1.0,)), packaged.preference_pairs

        def trained(*turned):
            def pairs(sources=None):
                return [
                    dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) if p.split in turned else p
                    for p in read(sources)
                ]

            monkeypatch.setattr(packaged, "preference_pairs", pairs)
            return minilm.train_bradley_terry(config, small)

        def check_split(one, other):
            for name in ("weights", "mean", "scale_by", "baseline", "centre", "scale"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name

        one = trained()
        turned = trained("test", "validation")
        check_split(one, turned)
        kills(lambda other: check_split(one, other), trained("train"))
        right, wrong = (r.facts["test_accuracy"]["value"] for r in (one, turned))
        assert right == pytest.approx(1 - wrong)
        assert turned.facts["validation_loss"] != one.facts["validation_loss"]
