"""Statistics of one prompt against their definitions, and their bias by exact enumeration of all samples."""

import itertools

import numpy as np
import pytest
from estimate_oracle import expectation
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.estimation import samples

EPS = np.finfo(float).eps
rewards = st.lists(st.floats(0, 1), min_size=2, max_size=4, unique=True)
temperatures = st.floats(0.05, 5)


def laws(outcomes):
    weights = st.lists(st.integers(1, 9), min_size=len(outcomes), max_size=len(outcomes))
    return weights.map(lambda w: (outcomes, np.array(w) / sum(w)))


law = rewards.flatmap(laws)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=2, max_size=9), temperatures)
def test_tilt_is_its_definition(r, t):
    r = np.array(r)
    g = np.exp(r / t)
    w = g / g.mean()
    found = samples.tilt(np.stack([r, r[::-1]]), t)
    scale = 64 * EPS * (1 + 3 / t) * len(r)
    assert found.value == pytest.approx(t * np.log(g.mean()), abs=scale * max(t, 1))
    assert found.mean == pytest.approx((w * r).mean(), abs=3 * scale)
    assert found.tv == pytest.approx(0.5 * np.abs(w - 1).mean(), abs=scale)
    assert found.ess == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=scale)


def test_tilt_does_not_overflow():
    found = samples.tilt(np.array([0.0, 1.0, 0.5]), 1e-6)
    assert found.mean == 1.0
    assert found.ess == pytest.approx(1.0)
    assert found.tv == pytest.approx(2 / 3)


@settings(max_examples=40, deadline=None)
@given(law, temperatures, st.integers(2, 4))
def test_plain_value_and_mean_are_biased_down(law, t, m):
    """Proved in `Tilt`. The mutant, the largest sample instead of the weighted mean, is not."""
    r, p = np.array(law[0]), law[1]
    g = p * np.exp(r / t)
    slip = 64 * EPS * (1 + 1 / t) * 4**m
    assert expectation(lambda s: samples.tilt(s, t).value, r, p, m) <= t * np.log(g.sum()) + slip
    assert expectation(lambda s: samples.tilt(s, t).mean, r, p, m) <= (g @ r) / g.sum() + slip


def test_the_largest_sample_would_be_biased_up():
    r, p, t = np.array([0.0, 1.0]), np.array([0.5, 0.5]), 5.0
    g = p * np.exp(r / t)
    assert expectation(np.max, r, p, 3) > (g @ r) / g.sum() + 0.2


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), *[st.floats(-2, 2, allow_subnormal=False)] * 2)
def test_jackknife_removes_order_one_over_m(m, c, d):
    """Also where groups are unequal. The classic weights m and m − 1 do not, then."""
    found = samples.jackknife(lambda s: np.asarray(c + d / s.shape[-1]), np.zeros(m))
    # What is computed of the least normal numbers is subnormal, and keeps no relative accuracy.
    assert found == pytest.approx(c, abs=1e3 * (EPS * (abs(c) + abs(d)) + np.finfo(float).smallest_subnormal))


def test_the_classic_weights_fail_for_groups():
    m, groups = 40, np.array_split(np.arange(40), 16)
    left = np.mean([1 / (m - len(g)) for g in groups])
    assert abs(m * (1 / m) - (m - 1) * left) > 0.01


def test_model_tilt_is_nearer_the_truth_than_plain():
    r, p, t, m = np.array([0.0, 0.4, 1.0]), np.array([0.3, 0.4, 0.3]), 0.5, 7
    g = p * np.exp(r / t)
    pi = g / g.sum()
    true = np.array([t * np.log(g.sum()), pi @ r, 0.5 * np.abs(pi - p).sum()])
    plain = expectation(lambda s: np.stack(samples.tilt(s, t)[:3]), r, p, m) - true
    better = expectation(lambda s: samples.model_tilt(s, t), r, p, m) - true
    assert np.all(np.abs(better[:2]) < 0.3 * np.abs(plain[:2]))
    assert abs(better[2]) < 0.02


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=3, max_size=3), st.lists(st.integers(1, 9), min_size=3, max_size=3)
)
def test_total_variation_is_unbiased_and_the_histogram_is_not(q, p):
    """E max(0, 1 − q/p) is exactly TV; half the L1 distance of two histograms is biased up."""
    q = np.array([q[0], q[1], q[2] + 1]) / (sum(q) + 1)
    p = np.array(p) / sum(p)
    true = 0.5 * np.abs(p - q).sum()
    with np.errstate(divide="ignore"):
        values = samples.shortfall_of_ratio(np.log(p), np.log(q))
    assert np.all((values >= 0) & (values <= 1))
    assert p @ values == pytest.approx(true, abs=16 * EPS)

    def histogram(at):
        counts = np.bincount(at.astype(int), minlength=3) / len(at)
        return np.abs(counts - q).sum() / 2  # even when q itself is known

    plug_in = expectation(histogram, range(3), p, 4)
    assert plug_in >= true - 1e-12
    if true < 0.1:
        assert plug_in > true + 0.02
    # Two mutants: no cut at 0 estimates how much q covers, and the ratio turned over is unbounded.
    assert p @ (1 - q / p) == pytest.approx(0, abs=16 * EPS)


def _prompter_outcomes(prior, chance, draws=2, answers=2):
    """All (probability, rewards [draws, answers]) of Bernoulli answers to draws of a rewrite."""
    for ks in itertools.product(range(len(prior)), repeat=draws):
        for bits in itertools.product((0.0, 1.0), repeat=draws * answers):
            r = np.reshape(bits, (draws, answers))
            q = np.array([chance[k] for k in ks])[:, None]
            yield np.prod([prior[k] for k in ks]) * np.prod(np.where(r > 0, q, 1 - q)), r


@settings(max_examples=25, deadline=None)
@given(st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)), st.floats(0.1, 0.9), st.floats(0.02, 2))
def test_the_lower_bound_is_below_the_value_of_rho_star(chance, mix, lam):
    """Exactly, for any noise and two draws. Without cross-fitting (the mutant) it is not."""
    prior = np.array([mix, 1 - mix])
    true = lam * np.log(prior @ np.exp(np.array(chance) / lam))
    others = np.random.default_rng(0).integers(2, size=(3, 2, 2)).astype(float)
    total = 0.0
    for weight, r in _prompter_outcomes(prior, chance):
        total += weight * samples.prompter_tilt(np.concatenate([r[None], others]), lam).lower[0]
    assert total <= true + 1e-12


def test_without_cross_fitting_noise_is_taken_for_value():
    prior, chance, lam = np.array([0.5, 0.5]), (0.5, 0.5), 0.2  # rewrites alike: nothing can be gained
    same = sum(w * samples.tilt(r.mean(-1), lam).mean for w, r in _prompter_outcomes(prior, chance))
    crossed = sum(
        w * samples.prompter_tilt(np.stack([r, r]), lam).mean[0] for w, r in _prompter_outcomes(prior, chance)
    )
    assert same > 0.6
    assert crossed == pytest.approx(0.5, abs=1e-12)


def test_prompter_tilt_agrees_with_enumeration_when_noise_is_small():
    rng = np.random.default_rng(1)
    r = np.array([0.2, 0.5, 0.9])
    prior = np.array([0.5, 0.3, 0.2])
    at = rng.choice(3, p=prior, size=(400, 40))
    noise = 0.1 * rng.standard_normal((400, 40, 4))
    lam = 0.3
    g = prior * np.exp(r / lam)
    found = samples.prompter_tilt(r[at][..., None] + noise, lam)
    for values, true in ((found.value, lam * np.log(g.sum())), (found.mean, g @ r / g.sum())):
        error = values.std() / 20
        assert abs(values.mean() - true) < 4.5 * error  # false alarm 7e-6
    assert found.value.mean() > found.lower.mean()
    assert samples.noisy_value(r[at][..., None] + noise, lam)[0].mean() > found.lower.mean()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda k: st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=k, max_size=k)
    ),
    st.data(),
)
def test_best_of_is_the_average_over_subsets(r, data):
    r = np.array(r, float)
    n = data.draw(st.integers(1, len(r)))
    expected = []
    for a in (0, 1):
        by, value = r[:, 1 - a], r[:, a]
        for subset in itertools.combinations(range(len(r)), n):
            chosen = by[list(subset)]
            expected.append(value[list(subset)][chosen == chosen.max()].mean())
    assert samples.best_of(np.stack([r, r]), n) == pytest.approx(np.mean(expected), abs=64 * EPS)


def test_best_of_many_draws_does_not_overflow():
    r = np.random.default_rng(0).uniform(size=(1, 3000, 2))
    assert samples.best_of(np.repeat(r[..., :1], 2, -1), 3000)[0] == pytest.approx(r[..., 0].max())


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.floats(0.1, 0.9))
def test_variance_split_is_unbiased(chance, mix):
    """The mutant, the variance of the means as it is, takes noise for an effect of rewriting."""
    prior, chance = np.array([mix, 1 - mix]), np.array(chance)
    outcomes = list(_prompter_outcomes(prior, chance))
    found = sum(w * samples.variance_split(r) for w, r in outcomes)
    mean = prior @ chance
    within, between = prior @ (chance * (1 - chance)), prior @ (chance - mean) ** 2
    assert found == pytest.approx([within, between], abs=1e-12)
    mutant = sum(w * r.mean(-1).var(ddof=1) for w, r in outcomes)
    assert mutant == pytest.approx(between + within / 2, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=7), st.lists(st.integers(0, 4), min_size=1, max_size=7)
)
def test_win_rate_counts_pairs(ours, theirs):
    pairs = [(a > b) + 0.5 * (a == b) for a in ours for b in theirs]
    found = samples.win_rate(np.array(ours, float), np.array(theirs, float))
    assert found == pytest.approx(np.mean(pairs), abs=16 * EPS)


def test_without_noise_the_lower_bound_is_the_plain_value():
    """Gibbs' principle is then an equation: mean and entropy together. Mutants leave the entropy out."""
    r, lam = np.random.default_rng(0).uniform(size=(6, 5)), 0.2

    def lower(rewards, lam, entropy=True):
        w = samples._softmax(rewards / lam)
        spread = -(w * np.log(w)).sum(-1) if entropy else np.log(rewards.shape[-1])
        return (w * rewards).sum(-1) - lam * (np.log(rewards.shape[-1]) - spread)

    def check(lower):
        return lower == pytest.approx(samples.tilt(r, lam).value, abs=1e-12)

    found = samples.prompter_tilt(np.repeat(r[..., None], 3, -1), lam).lower
    assert check(found)
    assert check(lower(r, lam))
    assert not check(lower(r, lam, entropy=False))
    assert not check(found - lam * np.log(5))  # and with nothing for w's own


def test_cross_fitting_has_spent_an_answer(monkeypatch):
    """Two draws and three answers, exactly: the jackknife over answers must count A − 1 of them."""
    prior, chance, lam = np.array([0.5, 0.5]), np.array([0.5, 1.0]), 0.5
    weights, r = zip(*_prompter_outcomes(prior, chance, answers=3), strict=True)
    plain = samples.jackknife

    def without_noise(name):
        draws = [chance[list(k)] for k in itertools.product((0, 1), repeat=2)]
        return np.mean([plain(lambda s: getattr(samples.tilt(s, lam), name), rewards) for rewards in draws])

    def bias(name):
        found = getattr(samples.prompter_tilt(np.stack(r), lam), name)
        return np.array(weights) @ found - without_noise(name)

    assert bias("mean") == pytest.approx(0, abs=1e-12)
    assert bias("value") == pytest.approx(0, abs=1e-12)
    monkeypatch.setattr(samples, "jackknife", lambda s, r, axis=-1, spent=0: plain(s, r, axis))
    assert bias("mean") > 0.01  # the mutant: spent = 0
    assert bias("value") > 0.002
