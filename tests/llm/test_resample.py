"""The training-free prompter against exact answers on finite sets, and end to end on a tiny model."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from mutants import kills

from alignpro.errors import AlignProError
from alignpro.estimation import means
from alignpro.estimation.intervals import bootstrap_t
from alignpro.llm.arms import resample as resampling
from alignpro.llm.arms.resample import (
    Proposals,
    best_of_n,
    evaluate,
    load_proposals,
    propose,
    resample,
    resampled,
    save_proposals,
    star,
)
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter, Template
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.training.environment import Environment
from alignpro.theory import gibbs
from alignpro.theory.results import cost

BASE = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
REWARD = np.array([0.1, 0.5, 0.5, 0.9, 1.4])
LAM = 0.4
Z = 4.06  # two-sided normal quantile at 5e-5: what each comparison below may cry wolf at


def drawn(n, seed, base=BASE, reward=REWARD):
    """Exact rewards of n draws from a finite ρ_sft."""
    k = np.random.default_rng(seed).choice(len(base), n, p=base)
    return Proposals("x", tuple(map(str, k)), tuple(reward[k]))


def counted(weights=BASE, n=20, reward=REWARD):
    """Each rewrite as often as its probability says, so that ρ̂_sft is ρ_sft."""
    k = np.repeat(np.arange(len(weights)), np.round(weights * n).astype(int))
    return Proposals("x", tuple(map(str, k)), tuple(reward[k]))


# --- ρ* ---


@pytest.mark.parametrize("lam", [1e-6, 1e-3, 0.1, 0.4, 1.0, 1.5, 10.0, 1e3, 1e6])
@pytest.mark.parametrize("shift", [0.0, -3.0, 1e3])
def test_star_is_the_tilt_of_the_theory(lam, shift):
    p = counted(reward=REWARD + shift)
    want, got = gibbs.tilt(BASE, REWARD + shift, lam), star(p, lam)
    mass = np.bincount(np.array(p.rewrites, int), got.weights)
    np.testing.assert_allclose(mass, want.probs, rtol=1e-9, atol=1e-300)
    scale = 1e-12 * (1 + abs(shift))
    assert got.value - got.prior_value == pytest.approx(float(want.lift), rel=1e-6, abs=scale)
    assert got.free_energy == pytest.approx(float(want.free_energy), rel=1e-12, abs=scale)
    # Relative accuracy, even where it is 1e-13: the shift costs the rewards themselves some digits.
    assert got.kl == pytest.approx(float(want.cost) / lam, rel=1e-8 if shift == 0 else 1e-4, abs=0)
    assert got.ess == pytest.approx(got.weights.sum() ** 2 / (got.weights**2).sum())
    if lam == 1e6 and shift == 0:  # mutant: the plain sum Σ w log(n w), which is all rounding here
        plain = float(got.weights @ np.log(len(got.weights) * got.weights))
        assert plain != pytest.approx(float(want.cost) / lam, rel=1e-8, abs=0)


def test_gains_are_means_over_prompts_with_intervals_where_there_are_enough():
    few, many = [drawn(12, seed) for seed in range(3)], [drawn(12, seed) for seed in range(9)]
    short = resampled([replace(p, prompt=str(i)) for i, p in enumerate(few)], [1e-6, LAM])
    gains = [max(p.rewards) - np.mean(p.rewards) for p in few]
    assert short.prior == pytest.approx(np.mean([p.rewards for p in few]))
    assert short.tilted[0].gain.value == pytest.approx(np.mean(gains))
    assert short.best[-1].gain.value == pytest.approx(np.mean(gains))
    assert short.tilted[0].kl > short.tilted[1].kl == pytest.approx(np.mean([star(p, LAM).kl for p in few]))
    assert short.tilted[1].ess == pytest.approx(np.mean([star(p, LAM).ess for p in few]))
    assert [t.few for t in short.tilted] == [
        sum(bool(star(p, lam).warning) for p in few) for lam in (1e-6, LAM)
    ]
    assert [b.n for b in short.best] == [2, 4, 8, 12]
    assert all(
        b.gain.value == pytest.approx(np.mean([best_of_n(p, b.n).value - np.mean(p.rewards) for p in few]))
        and b.kl_bound == best_of_n(few[0], b.n).kl_bound
        for b in short.best
    )
    assert short.tilted[0].gain.lo is None
    gain = resampled(many, [LAM]).tilted[0].gain
    assert gain.lo < gain.value < gain.hi
    assert (short.n, len(short.rewrites)) == (12, 3)
    first = short.rewrites[0]
    assert (first.prompt, first.reward, first.mean) == ("0", max(few[0].rewards), np.mean(few[0].rewards))
    assert few[0].rewards[few[0].rewrites.index(first.rewrite)] == first.reward


def test_gains_that_agree_have_limits_where_the_range_is_known(monkeypatch):
    """No prompt of 9 gains: percentile-t (the mutant) would be sure of 0."""
    flat = [replace(drawn(12, seed), rewards=(0.5,) * 12) for seed in range(9)]

    def percentile_t(values, low, high, level):
        lo, hi = bootstrap_t(values, level)
        return means.Limits(values.mean(-1), lo, hi, lo)

    def check(way):
        monkeypatch.setattr(resampling, "limits", way)
        gain = resampled(flat, [LAM], 1.3).tilted[0].gain
        assert (gain.value, gain.lo) == (0.0, 0.0)
        assert 0.1 < gain.hi < 1.3

    check(means.limits)
    kills(check, percentile_t)
    monkeypatch.setattr(resampling, "limits", means.limits)
    open_ended = resampled(flat, [LAM]).tilted[0].gain
    assert (open_ended.lo, open_ended.hi) == (-math.inf, math.inf)


def test_limits_of_lambda():
    p = counted()
    cold, hot = star(p, 1e-6), star(p, 1e6)
    best = np.array(p.rewards) == max(p.rewards)
    np.testing.assert_allclose(cold.weights, best / best.sum(), atol=1e-300)
    assert (cold.value, cold.ess) == (pytest.approx(1.4), pytest.approx(best.sum()))
    assert cold.kl == pytest.approx(math.log(len(best) / best.sum()))
    np.testing.assert_allclose(hot.weights, 1 / len(best), rtol=1e-5)
    assert (hot.value, hot.ess) == (pytest.approx(BASE @ REWARD, abs=1e-5), pytest.approx(len(best)))
    assert 0 < hot.kl < 1e-11
    # Equal rewards say nothing, at any λ.
    flat = star(Proposals("x", ("a", "b", "a"), (0.3,) * 3), 1e-6)
    np.testing.assert_allclose(flat.weights, 1 / 3)
    assert (flat.kl, flat.ess, flat.value) == (0, pytest.approx(3), pytest.approx(0.3))


def test_small_effective_sample_sizes_are_warned_of():
    p = counted()
    assert not star(p, LAM).warning
    assert "effective sample size 1.0 of 20 at lam 1e-06 for 'x'" in star(p, 1e-6).warning
    assert star(p, LAM, share=0.99).warning


def mean_of(estimate, n, runs=2000):
    """(mean, standard error) over independent proposals; seeds are fixed."""
    values = np.array([estimate(drawn(n, seed)) for seed in range(runs)])
    return values.mean(), values.std(ddof=1) / math.sqrt(runs)


def test_consistent_with_the_bias_that_is_documented():
    """Each comparison has a false-alarm rate of at most 5e-5 over seeds; these seeds are fixed."""
    exact = gibbs.tilt(BASE, REWARD, LAM)
    truth = {
        "value": float(exact.probs @ REWARD),
        "free_energy": float(exact.free_energy),
        "kl": float(exact.cost) / LAM,
    }
    for name, true in truth.items():
        few, many = (mean_of(lambda p, name=name: getattr(star(p, LAM), name), n) for n in (8, 64))
        assert few[0] + Z * few[1] < true, name  # biased down, clearly
        assert few[0] < many[0] < true, name
        big = getattr(star(drawn(200_000, 0), LAM), name)
        assert big == pytest.approx(true, abs=0.01)
    one, error = mean_of(lambda p: star(p, LAM).prior_value, 8)
    assert abs(one - BASE @ REWARD) < Z * error
    # Mutant: weights of draws from ρ_sft that count ρ_sft once more.
    p = drawn(200_000, 0)
    wrong = star(p, LAM).weights * BASE[np.array(p.rewrites, int)]
    assert abs(wrong @ np.array(p.rewards) / wrong.sum() - truth["value"]) > 0.1


def test_noise_raises_what_chose():
    """Noise of variance s² in R̂: about s²/λ, s²/(2λ) and s²/(2λ²) too much."""
    rng, s, lam, n = np.random.default_rng(0), 0.3, 2.0, 400_000
    p = drawn(n, 1)
    noisy = replace(p, rewards=tuple(np.array(p.rewards) + rng.normal(0, s, n)))
    a, b = star(p, lam), star(noisy, lam)
    assert b.value - a.value == pytest.approx(s * s / lam, abs=0.005)
    assert b.free_energy - a.free_energy == pytest.approx(s * s / (2 * lam), abs=0.005)
    assert b.kl - a.kl == pytest.approx(s * s / (2 * lam * lam), rel=0.1)


def test_resampling_follows_the_weights():
    p = counted()
    draws = 20_000
    got = np.bincount([int(text) for text in resample(p, LAM, draws, seed=0)], minlength=5) / draws
    want = np.asarray(gibbs.tilt(BASE, REWARD, LAM).probs)
    assert (np.abs(got - want) < Z * np.sqrt(want * (1 - want) / draws)).all()
    assert not (np.abs(got - BASE) < 0.05).all()  # mutant: no weights
    assert resample(p, LAM, 9, seed=0) == resample(p, LAM, 9, seed=0) != resample(p, LAM, 9, seed=1)
    assert set(resample(p, 1e-6, 50)) == {"4"}


# --- best of n ---


def test_best_of_n_equals_enumeration():
    r = np.array([0.3, 0.9, 0.1, 0.9, 0.5, 0.3])
    p = Proposals("x", tuple("abcdef"), tuple(r))
    for n in range(1, 7):
        subsets = [list(c) for c in itertools.combinations(range(6), n)]
        chance = np.zeros(6)
        for c in subsets:
            top = [i for i in c if r[i] == r[c].max()]
            chance[top] += 1 / len(top) / len(subsets)
        # Tied values share over all subsets, so their chances are equal.
        got = best_of_n(p, n)
        np.testing.assert_allclose(got.weights, chance, atol=1e-12)
        assert got.value == pytest.approx(np.mean([r[c].max() for c in subsets]))
        np.testing.assert_allclose(got.values, [best_of_n(p, m).value for m in range(1, n + 1)])
        assert got.kl_bound == pytest.approx(math.log(n) - (n - 1) / n)
    # Mutants: the first of the tied takes all; draws with replacement.
    assert best_of_n(p).weights[[1, 3]] == pytest.approx([0.5, 0.5])
    assert best_of_n(p, 2).value != pytest.approx(np.mean([max(a, b) for a in r for b in r]))


def test_best_of_n_is_unbiased_for_the_theory():
    """The mean over proposals of 12 draws is E max R over n ≤ 12 draws: false alarms at 5e-5 each."""
    runs = np.array([best_of_n(drawn(12, seed)).values for seed in range(1000)])
    mean, error = runs.mean(0), runs.std(0, ddof=1) / math.sqrt(len(runs))
    for n in (1, 2, 4, 12):
        exact = cost.best_of_n(BASE, REWARD, n)
        assert abs(mean[n - 1] - float(exact.probs @ REWARD)) < Z * error[n - 1]
        assert float(exact.kl) <= best_of_n(drawn(12, 0), n).kl_bound + 1e-12
    # Mutant: off by one.
    exact = cost.best_of_n(BASE, REWARD, 4)
    assert abs(mean[2] - float(exact.probs @ REWARD)) > Z * error[2]


def test_many_draws_stay_accurate():
    n = 2000
    p = Proposals("x", ("a",) * n, tuple(np.linspace(0, 1, n)))
    got = best_of_n(p)
    m = np.arange(1, n + 1)
    # Of ranks 1 … N without replacement, the largest of m is m(N + 1)/(m + 1) in the mean.
    np.testing.assert_allclose(got.values, (m * (n + 1) / (m + 1) - 1) / (n - 1), rtol=1e-10)


# --- fresh answers ---


class Echo:
    """A target whose answer i to a prompt is a number from a table; it counts what it is asked."""

    name, remote, calls, retried, revision = "echo", False, 0, 0, "1"

    def __init__(self, noise):
        self.noise, self.asked = noise, []

    def stop(self):
        pass

    def respond(self, prompts, sampling, *, first=0, samples=1, seed=0, on_answer=None):
        from alignpro.llm.targets.target import Answer

        self.calls += len(prompts) * samples
        rows = []
        for text, start in zip(prompts, first, strict=True):
            row = []
            for i in range(start, start + samples):
                self.asked.append((text, i))
                noise = np.random.default_rng([*text.encode(), 7, i]).normal(0, self.noise)
                row.append(Answer(repr(noise), "stop", 1, 1))
            rows.append(row)
        return rows


class Number:
    """r(x, y) = the number that y says: the rewrites do not differ, so all choice is luck."""

    low, high = -10.0, 10.0

    def score(self, prompts, responses):
        return np.array([float(y) for y in responses])

    def describe(self):
        return {}


class Words:
    """A prompter whose rewrites are given."""

    def __init__(self, rows):
        self.rows = rows

    def rewrites(self, prompts, samples, *, seed=0):
        return [[*self.rows][:samples] for _ in prompts]


def test_fresh_answers_are_free_of_the_winners_curse():
    """Every rewrite is worth 0; the best of 32 by one answer looks worth two standard deviations."""
    target = Echo(1.0)
    environment = Environment(Number(), target, responses=2)  # which both functions override
    prompts = [f"p{i}" for i in range(40)]
    rows = [f"w{i}" for i in range(32)]
    proposals = [
        propose(Words([f"{x} {w}" for w in rows]), environment, [x], 32, responses=1)[0] for x in prompts
    ]
    choices = [best_of_n(p).weights for p in proposals]
    used = set(target.asked)
    assert np.mean([best_of_n(p).value for p in proposals]) > 1.5
    assert np.mean([star(p, 0.5).value for p in proposals]) > 1.0
    fresh = evaluate(proposals, choices, environment, 4)
    assert abs(fresh.value) < Z * fresh.standard_error
    assert fresh.standard_error == pytest.approx(np.std(fresh.values, ddof=1) / math.sqrt(40))
    assert fresh.calls == 160 == len(set(target.asked) - used)  # no answer is used twice
    # Mutant: the answers that chose.
    chosen = [p.rewrites[int(np.argmax(c))] for p, c in zip(proposals, choices, strict=True)]
    assert replace(environment, responses=1).score(prompts, chosen, [0] * 40).mean() > 1.5


def test_rewards_are_of_the_original_prompt():
    """Mutant: r(x′, y), with which each rewrite would be judged by itself."""

    class Judge(Number):
        def score(self, prompts, responses):
            assert set(prompts) <= {"x", "z"}
            return np.array([float(x == "x") for x in prompts])

    environment = Environment(Judge(), Echo(1.0))
    found = propose(Words(["a", "b"]), environment, ["x", "z"], 2)
    assert [p.rewards for p in found] == [(1.0, 1.0), (0.0, 0.0)]
    np.testing.assert_array_equal(evaluate(found, [np.ones(2) / 2] * 2, environment, 3).values, [1.0, 0.0])
    with pytest.raises(AssertionError):
        environment.score(["a"], ["a"], [0])


def test_repeats_share_their_answers_and_are_paid_for_once(tmp_path):
    target = Echo(1.0)
    environment = Environment(Number(), target, responses=2)
    (p,) = propose(Words(["a", "b", "a", "a"]), environment, ["x"], 4, responses=3, include_original=True)
    assert p.rewards[0] == p.rewards[2] == p.rewards[3] != p.rewards[1]
    assert p.calls == target.calls == 9
    assert {i for _, i in target.asked} == {0, 1, 2}
    assert p.original == Environment(Number(), target, responses=3).score(["x"], ["x"], [0])[0]
    ties = np.array(p.rewards) == max(p.rewards)
    np.testing.assert_allclose(best_of_n(p).weights, ties / ties.sum())
    save_proposals(tmp_path / "p.jsonl", [p, drawn(3, 0)])
    assert load_proposals(tmp_path / "p.jsonl") == [p, drawn(3, 0)]
    json.loads((tmp_path / "p.jsonl").read_text().splitlines()[0])
    assert propose(Words(["a"]), environment, ["x"], 1)[0].responses == 2
    assert propose(Words(["1", "2"]), Environment(Number(), None), ["x"], 2)[0].calls == 0


def test_bad_arguments_are_named(tmp_path):
    p = drawn(4, 0)
    environment = Environment(Number(), Echo(1.0))
    for call, message in (
        (lambda: star(p, 0.0), r"^lam 0.0: give a positive, finite number$"),
        (lambda: star(p, math.nan), r"^lam nan: give"),
        (lambda: best_of_n(p, 5), r"^n 5: choose a whole number from 1 to the 4 rewrites drawn$"),
        (lambda: best_of_n(p, 0), r"^n 0: choose"),
        (lambda: resample(p, LAM, 0), r"^draws 0: choose a whole number of at least 1$"),
        (
            lambda: Proposals("x", ("a",), ()),
            r"^rewards of 'x': give a finite one for each of its 1 rewrites$",
        ),
        (lambda: Proposals("x", ("a",), (math.inf,)), r"^rewards of 'x': give a finite one"),
        (
            lambda: propose(Words([]), environment, ["x", "x"], 2),
            r"^prompts: give a list of distinct strings",
        ),
        (lambda: propose(Words([]), environment, ["x"], 2, responses=0), r"^responses 0: choose"),
        (lambda: evaluate([p], [np.ones(3) / 3], environment), r"^choices: that of 'x' must be 4 weights"),
        (
            lambda: evaluate([p], [np.ones(4)], environment),
            r"^choices: that of 'x' must be 4 weights of sum 1",
        ),
        (lambda: evaluate([p], [], environment), r"^choices: 0 for 1 prompts"),
    ):
        with pytest.raises(AlignProError, match=message):
            call()
    path = tmp_path / "p.jsonl"
    save_proposals(path, [p])
    path.write_text(path.read_text() + '{"prompt": "x"}\n')
    with pytest.raises(AlignProError, match=r"p\.jsonl, line 2: not what save_proposals wrote"):
        load_proposals(path)
    with pytest.raises(AlignProError, match=r"none: missing or damaged"):
        load_proposals(tmp_path / "none")


# --- end to end ---


class Letters:
    """r(x, y): the share of y's first four characters that are "a"."""

    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array([y[:4].count("a") / 4 for y in responses])

    def describe(self):
        return {}


def test_end_to_end_on_a_tiny_model():
    """Selected rewrites are better on fresh answers, and repeat exactly."""
    bare = Template(system="", examples=(), request="", opening="", space="")
    prompter = Prompter(*tiny_model(seed=1, vocab="abcd"), bare, max_tokens=4)
    target = LocalTarget(tiny_model(seed=2, vocab="abcd"))
    environment = Environment(Letters(), target, Sampling(max_tokens=4))
    prompts = ["ab", "cd", "ba", "dc", "aa", "bb"]
    proposals = propose(prompter, environment, prompts, 32, responses=8, seed=0)
    assert sum(p.calls for p in proposals) == target.calls
    assert proposals == propose(prompter, environment, prompts, 32, responses=8, seed=0)
    assert proposals != propose(prompter, environment, prompts, 32, responses=8, seed=1)
    plain = evaluate(proposals, [np.full(32, 1 / 32)] * 6, environment, 192)
    tilted = evaluate(proposals, [star(p, 0.05).weights for p in proposals], environment, 192)
    best = evaluate(proposals, [best_of_n(p).weights for p in proposals], environment, 192)
    # Rewards in [0, 1] have a standard deviation of at most 1/2, so a difference of two means of 6·192 this:
    error = 0.5 * math.sqrt(2 / (6 * 192))
    assert tilted.value - plain.value > Z * error
    assert best.value - plain.value > Z * error
    # Mutant: the worst of n.
    worst = [best_of_n(replace(p, rewards=tuple(-r for r in p.rewards))).weights for p in proposals]
    assert evaluate(proposals, worst, environment, 192).value < plain.value
    assert all(set(resample(p, 0.05, 3)) <= set(p.rewrites) for p in proposals)
