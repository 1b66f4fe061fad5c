import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_expit
from scipy.stats import binom
from theory_oracle import kills

from alignpro.errors import AlignProError
from alignpro.theory import Instance
from alignpro.theory.families import draw
from alignpro.theory.results.preferences import (
    expected_preferences,
    fit_rewards,
    propagate,
    sample_preferences,
)
from alignpro.theory.results.robustness import reward_noise

SHAPE = (4, 3, 5)
FALSE_ALARM = 1e-4
"""Probability that a correct interval fails the coverage test, over the choice of seed."""


def problem(seed, shape=SHAPE):
    return draw("independent", seed, shape)[0]


def repeated(instance, times):
    """The first prompt, over and over: each prompt's fit is then one repetition."""
    rows = np.zeros(times, int)
    return Instance(
        np.full(times, 1 / times),
        np.asarray(instance.prior)[rows],
        instance.frozen,
        np.asarray(instance.own)[rows],
        np.asarray(instance.reward)[rows],
    )


def loss(wins, r, ridge=0.0):
    return -(wins * log_expit(r[:, None] - r[None])).sum() + ridge / 2 * (r**2).sum()


def test_a_numerical_optimiser_arrives_at_the_same_rewards():
    rng = np.random.default_rng(0)
    cases = [(rng.integers(1, 30, (5, 5)) * (1 - np.eye(5)), ridge) for ridge in (0.0, 0.0, 0.1, 3.0)]
    best = []
    for wins, ridge in cases:
        found = minimize(lambda r, w=wins, k=ridge: loss(w, r, k), np.zeros(5), options={"gtol": 1e-9})
        best.append(found.x - found.x.mean())

    def check(fit):
        for (wins, ridge), want in zip(cases, best, strict=True):
            got = fit(wins[None], ridge)
            np.testing.assert_allclose(got.reward[0], want, atol=1e-6)
            np.testing.assert_allclose(got.loss, loss(wins, got.reward[0]) / wins.sum(), rtol=1e-12)
            assert got.distance[0] < 1e-9
            assert got.gradient[0] < 1e-9 * wins.sum()

    check(fit_rewards)
    kills(check, lambda w, k: fit_rewards(w.transpose(0, 2, 1), k))
    kills(check, lambda w, k: fit_rewards(w, k + 0.01))


def test_infinite_data_give_the_true_rewards_up_to_a_shift():
    def check(fit):
        for seed, scale in ((1, 1.0), (2, 5.0), (3, 20.0)):
            instance = problem(seed)
            reward = scale * np.asarray(instance.reward) + 7.0
            instance = dataclasses.replace(instance, reward=reward)
            for pairs in (None, np.array([[0, 1], [1, 2], [2, 3], [3, 4]])):
                got = fit(expected_preferences(instance, pairs, 100.0))
                want = reward - reward.mean(-1, keepdims=True)
                # The certificate covers the true distance; curvature falls as e^{−scale}.
                assert (np.ptp(got.reward - want, axis=-1) <= got.distance + 1e-12).all()
                assert (got.distance < 1e-12 * np.exp(scale) * 100).all()

    check(fit_rewards)
    kills(check, lambda w: fit_rewards(w, 1e-6))
    kills(
        check,
        lambda w: fit_rewards(w)._replace(
            distance=0 * fit_rewards(w).distance, reward=fit_rewards(w).reward * 1.01
        ),
    )


def test_counts_of_any_size():
    """The likelihood's scale changes standard errors only: 1/√."""
    wins = sample_preferences(np.random.default_rng(1), problem(4), n=50)
    base = fit_rewards(wins)
    for scale in (1e-200, 1e-3, 1e12, 1e200):
        scaled = fit_rewards(scale * wins)
        np.testing.assert_allclose(scaled.reward, base.reward, atol=1e-12)
        np.testing.assert_allclose(scaled.loss, base.loss, rtol=1e-12)
        if 1e-100 < scale < 1e100:
            np.testing.assert_allclose(scaled.covariance * scale, base.covariance, rtol=1e-8, atol=1e-12)


def test_the_shift_and_the_components():
    """{0, 1} and {2, 3} never meet, 4 is never compared: two differences are known, nothing across."""
    wins = np.zeros((1, 5, 5))
    wins[0, 0, 1], wins[0, 1, 0], wins[0, 2, 3], wins[0, 3, 2] = 3, 1, 2, 2
    for ridge in (0.0, 0.5):
        got = fit_rewards(wins, ridge)
        labels = got.component[0]
        assert labels[0] == labels[1] != labels[2] == labels[3] != labels[4] != labels[0]
        np.testing.assert_allclose(
            [got.reward[0, :2].sum(), got.reward[0, 2:4].sum(), got.reward[0, 4]], 0, atol=1e-12
        )
        se = got.difference_se()[0]
        assert np.isinf(se[0, 2])
        assert np.isinf(se[4, 1])
        assert np.isfinite(se[0, 1])
    got = fit_rewards(wins)
    np.testing.assert_allclose(got.reward[0, 0] - got.reward[0, 1], np.log(3), rtol=1e-10)
    # Two responses: the log-odds' standard error, √(1/3 + 1/1) by hand.
    np.testing.assert_allclose(got.difference_se()[0, 0, 1], np.sqrt(1 / 3 + 1), rtol=1e-9)
    empty = fit_rewards(np.zeros((2, 3, 3)))
    assert (empty.reward == 0).all()
    assert np.isinf(empty.difference_se()[:, 0, 1]).all()


def test_separated_comparisons_have_no_maximum():
    wins = np.zeros((2, 4, 4))
    wins[0] = 1 - np.eye(4)
    for u, v in ((0, 1), (1, 0), (2, 3), (3, 2), (2, 0), (3, 1)):
        wins[1, u, v] = 1
    with pytest.raises(
        AlignProError, match=r"^wins\[1\]: responses \[2, 3\] never lost .* give ridge > 0 \(such as 0\.1\)"
    ):
        fit_rewards(wins)
    got = fit_rewards(wins, 0.1)
    assert got.separated.tolist() == [False, True]
    assert got.reward[1, 2:].min() > got.reward[1, :2].max()
    # Less ridge, larger rewards: they diverge as the logarithm.
    widths = [np.ptp(fit_rewards(wins, k).reward[1]) for k in (1e-2, 1e-4, 1e-6)]
    assert widths[0] + 3 < widths[1] < widths[2] - 3
    # One comparison the other way, and the maximum exists.
    wins[1, 0, 2] = 1
    assert not fit_rewards(wins).separated.any()


def test_ford_condition_against_brute_force():
    """Every digraph on three responses: refused exactly when some split was crossed one way only."""
    for bits in range(64):
        wins = np.zeros((1, 3, 3))
        edges = [(u, v) for u in range(3) for v in range(3) if u != v]
        for i, (u, v) in enumerate(edges):
            wins[0, u, v] = bits >> i & 1
        splits = [[0], [1], [2], [0, 1], [0, 2], [1, 2]]
        bad = any(
            wins[0][np.ix_(s, [k for k in range(3) if k not in s])].any()
            and not wins[0][np.ix_([k for k in range(3) if k not in s], s)].any()
            for s in splits
        )
        try:
            fit_rewards(wins)
            refused = False
        except AlignProError:
            refused = True
        assert refused == bad, bits


def covered(inside):
    """Whether a 95% interval's coverage over the repetitions is within what chance allows."""
    low, high = binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], inside.size, 0.95)
    assert low <= inside.sum() <= high, inside.mean()


def test_intervals_cover_as_often_as_they_say():
    """1,000 repetitions of 400 comparisons a pair: differences of r̂ and of R̂, ρ̂ and π̂."""
    instance = repeated(problem(5), 1000)
    wins = sample_preferences(np.random.default_rng(6), instance, n=400)
    fit = fit_rewards(wins)
    beta, lam = 0.5, 0.3
    found = propagate(instance, fit, beta, lam)
    r = np.asarray(instance.reward)
    true = reward_noise(instance, r, beta, lam)
    energy = r @ np.asarray(instance.frozen).T

    def check(factor):
        se = factor * fit.difference_se()
        covered(np.abs(fit.reward[:, 0] - fit.reward[:, 1] - (r[:, 0] - r[:, 1])) <= 1.96 * se[:, 0, 1])
        covered(np.abs(fit.reward[:, 2] - fit.reward[:, 4] - (r[:, 2] - r[:, 4])) <= 1.96 * se[:, 2, 4])
        error = found.rewrite_reward - energy
        covered(np.abs(error[:, 0] - error[:, 2]) <= 1.96 * factor * found.rewrite_se[:, 0, 2])
        covered(np.abs(found.rho[:, 1] - true.prompter.probs[:, 1]) <= 1.96 * factor * found.rho_se[:, 1])
        covered(np.abs(found.pi[:, 3] - true.model.probs[:, 3]) <= 1.96 * factor * found.pi_se[:, 3])

    check(1.0)
    kills(check, 0.9)
    kills(check, 1.1)

    # What ρ̂ and π̂ lose: the predicted mean, and the bound at its level.
    noise = reward_noise(instance, fit.reward, beta, lam)

    def predicted(factor):
        for part, guess in (
            (noise.prompter, found.predicted_loss),
            (noise.model, found.predicted_model_loss),
        ):
            loss = np.asarray(part.loss)
            # 4 standard errors of the mean over repetitions (false alarm 6e-5), and 2% for the second order.
            allowed = 4 * loss.std() / np.sqrt(loss.size) + 0.02 * loss.mean()
            assert abs(loss.mean() - factor * guess.mean()) <= allowed

    predicted(1.0)
    kills(predicted, 0.8)
    kills(predicted, 1.25)

    def bounded(span, bound):
        lowest = binom.ppf(FALSE_ALARM, 1000, 0.95)
        assert (noise.prompter.span_error <= span).sum() >= lowest
        assert (noise.prompter.loss <= bound).sum() >= lowest
        assert (bound <= span**2 / (8 * lam) * (1 + 1e-12)).all()

    bounded(found.span, found.loss_bound)
    kills(lambda f: bounded(f * found.span, f**2 * found.loss_bound), 0.5)


def test_error_falls_as_one_over_the_comparisons():
    instance = repeated(problem(7), 1000)
    mean = []
    for n in (200, 3200):
        fit = fit_rewards(sample_preferences(np.random.default_rng(8), instance, n=n))
        mean.append(float(np.mean(reward_noise(instance, fit.reward, 0.5, 0.3).prompter.loss)))
    # A mean of 1,000 losses is known to about 4%: 16 ± 5 standard errors of the ratio.
    assert 11 < mean[0] / mean[1] < 21


def test_propagation_by_finite_differences():
    """Each standard error is the gradient's norm in the metric of the covariance."""
    instance = problem(9)
    fit = fit_rewards(sample_preferences(np.random.default_rng(10), instance, n=30))
    found = propagate(instance, fit, 0.4, 0.2)
    step = 1e-5
    for i in range(5):
        moved = [
            propagate(instance, fit._replace(reward=fit.reward + s * step * np.eye(5)[i]), 0.4, 0.2)
            for s in (1, -1)
        ]
        slope = (moved[0].rho - moved[1].rho) / (2 * step)
        slope_pi = (moved[0].pi - moved[1].pi) / (2 * step)
        slopes = [slope] if i == 0 else [*slopes, slope]
        slopes_pi = [slope_pi] if i == 0 else [*slopes_pi, slope_pi]
    for all_slopes, want in ((slopes, found.rho_se), (slopes_pi, found.pi_se)):
        gradient = np.stack(all_slopes, -1)
        se = np.sqrt(np.einsum("xku,xuv,xkv->xk", gradient, fit.covariance, gradient))
        np.testing.assert_allclose(se, want, rtol=1e-6)


def test_unidentified_rewards_say_so():
    instance = problem(11)
    wins = sample_preferences(
        np.random.default_rng(12), instance, pairs=np.array([[0, 1], [2, 3], [3, 4]]), n=50
    )
    found = propagate(instance, fit_rewards(wins, 0.01), 0.5, 0.5)
    assert not found.identified.any()
    assert np.isinf(found.loss_bound).all()
    assert np.isinf(found.rho_se).all()
    # Unless the other components cannot be reached.
    inside = dataclasses.replace(
        instance, frozen=np.array([[0, 0, 0.5, 0.25, 0.25]] * 2 + [[0, 0, 0, 0, 1.0]])
    )
    found = propagate(inside, fit_rewards(wins, 0.01), 0.5, 0.5)
    assert found.identified.all()
    assert np.isfinite(found.loss_bound).all()


def test_sampling():
    instance = problem(13)
    wins = sample_preferences(np.random.default_rng(14), instance, n=np.array([0, 1, 10, 20000]))
    assert wins[0].sum() == 0
    assert wins[1].sum() == 10
    np.testing.assert_allclose(wins[2] + wins[2].T, 10 * (1 - np.eye(5)))
    share = expected_preferences(instance)[3]
    np.testing.assert_allclose(share + share.T, 1 - np.eye(5))
    spread = 5 * np.sqrt(share * (1 - share) / 20000)  # false alarm 1e-5 over the 20 entries
    assert (np.abs(wins[3] / 20000 - share) <= spread).all()
    assert (np.abs(wins[3] / 20000 - share.T) > spread).any()
    again = sample_preferences(np.random.default_rng(14), instance, n=np.array([0, 1, 10, 20000]))
    assert (wins == again).all()


def test_bad_input():
    instance = problem(15)
    good = np.ones((4, 5, 5)) - np.eye(5)
    for wins, message in (
        (np.ones((5, 5)), r"^wins: has shape \(5, 5\); give counts \[X, Y, Y\]"),
        (good - 2, r"^wins\[0, 0, 0\] = -2 is negative"),
        (good * np.nan, r"^wins\[0, 0, 0\] = nan is not finite"),
        (np.ones((4, 5, 5)), r"^wins\[0, 0, 0\] = 1 compares a response with itself; set it to 0"),
        ([["a"]], r"^wins: is no array of numbers"),
    ):
        with pytest.raises(AlignProError, match=message):
            fit_rewards(wins)
    for ridge in (-1.0, np.inf, np.nan):
        with pytest.raises(AlignProError, match=r"^ridge .*: must be a finite number of at least 0"):
            fit_rewards(good, ridge)
    fit = fit_rewards(good)
    with pytest.raises(AlignProError, match=r"^level 95\.0: must lie between 0 and 1"):
        propagate(instance, fit, 1.0, 1.0, 95.0)
    with pytest.raises(AlignProError, match=r"^lam 0\.0: must be a positive finite number"):
        propagate(instance, fit, 1.0, 0.0)
    with pytest.raises(
        AlignProError, match=r"^fit: is about 3 prompts and 5 responses but the instance has 4"
    ):
        propagate(instance, fit_rewards(good[:3]), 1.0, 1.0)
    with pytest.raises(AlignProError, match=r"^pairs\[1\] = \[2, 2\]: give two different responses, 0 to 4"):
        expected_preferences(instance, [[0, 1], [2, 2]])
    with pytest.raises(AlignProError, match=r"^pairs: has shape \(3,\)"):
        expected_preferences(instance, [0, 1, 2])
    with pytest.raises(AlignProError, match=r"^n -1: give one number of comparisons of at least 0"):
        expected_preferences(instance, n=-1)
    with pytest.raises(AlignProError, match=r"^n 1\.5: sampled comparisons are whole numbers"):
        sample_preferences(np.random.default_rng(0), instance, n=1.5)
