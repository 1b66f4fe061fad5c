"""Intervals against their formulas, their coverage where it is guaranteed, and what verdicts follow."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from alignpro.errors import AlignProError
from alignpro.estimation.intervals import (
    Estimate,
    _counts,
    betting,
    bootstrap_t,
    check_level,
    empirical_bernstein,
    prompts_to_settle,
    studentise,
    verdict_of,
)


def beta_values(seed, repetitions, n):
    return np.random.default_rng(seed).beta(0.5, 2.0, size=(repetitions, n))


def covered(limits, true):
    return np.mean((limits[0] <= true) & (true <= limits[1]))


def test_empirical_bernstein_is_its_formula():
    x = beta_values(0, 1, 50)[0]
    log = np.log(4 / 0.1)
    half = np.sqrt(2 * np.var(x, ddof=1) * log / 50) + 7 * log / (3 * 49)
    lo, hi = empirical_bernstein(x, 0.0, 1.0, 0.9)
    assert lo == pytest.approx(max(x.mean() - half, 0))
    assert hi == pytest.approx(min(x.mean() + half, 1))


def test_betting_is_where_the_capital_reaches_two_over_alpha():
    x, alpha = beta_values(1, 1, 30)[0], 0.05

    def capital(m, x):
        mean, square, wealth, most = 0.5, 0.25, 0.0, 0.0
        seen = [0.5]
        for t, value in enumerate(x, 1):
            bet = min(np.sqrt(2 * np.log(2 / alpha) / (len(x) * square / t)), 0.75 / m)
            wealth += np.log1p(bet * (value - m))
            most = max(most, wealth)
            seen.append(value)
            mean = np.mean(seen)
            square += (value - mean) ** 2
        return most

    lo, hi = betting(x, 0.0, 1.0, 1 - alpha)
    assert capital(lo * 0.98, x) >= np.log(2 / alpha) > capital(lo * 1.02, x)
    assert capital((1 - hi) * 0.98, 1 - x) >= np.log(2 / alpha) > capital((1 - hi) * 1.02, 1 - x)


@pytest.mark.parametrize("n", [1, 5, 20, 100])
@pytest.mark.parametrize("kind", [betting, empirical_bernstein])
def test_guaranteed_intervals_cover_at_every_n(kind, n):
    """2,000 repetitions: below 0.935 with probability 0.2% if coverage were just 95%."""
    assert covered(kind(beta_values(2, 2000, n), 0.0, 1.0, 0.95), 0.2) >= 0.935


def test_betting_is_the_sharper_of_the_two():
    x = beta_values(3, 200, 60)
    widths = [
        np.median(np.subtract(*kind(x, 0.0, 1.0, 0.95)[::-1])) for kind in (betting, empirical_bernstein)
    ]
    assert widths[0] < 0.75 * widths[1]


@pytest.mark.parametrize("n", [20, 60, 3000])
def test_bootstrap_t_covers_a_skewed_mean(n):
    """1,000 repetitions; 0.93 to 0.99. The mutant without studentising falls short at n = 20."""
    x = beta_values(4, 1000, n)
    assert 0.93 <= covered(bootstrap_t(x, 0.95), 0.2) <= 0.99
    if n == 20:
        rng = np.random.default_rng(0)
        means = x[:, rng.integers(n, size=(400, n))].mean(-1)
        assert covered(np.quantile(means, (0.025, 0.975), axis=-1), 0.2) < 0.925


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.floats(0.1, 10), st.floats(-5, 5))
def test_bootstrap_t_moves_with_its_values(seed, scale, shift):
    x = beta_values(seed, 1, 12)[0]
    lo, hi = bootstrap_t(x, 0.9)
    moved = bootstrap_t(scale * x + shift, 0.9)
    assert moved == pytest.approx((scale * lo + shift, scale * hi + shift), rel=1e-9, abs=1e-9)
    turned = bootstrap_t(-x, 0.9)
    assert turned == pytest.approx((-hi, -lo), rel=0.05, abs=0.02)  # two quantiles of 2,000 draws apart


def test_normal_values_give_students_t():
    x = np.random.default_rng(5).standard_normal(40)
    lo, hi = bootstrap_t(x, 0.95, resamples=20000)
    t = stats.t.interval(0.95, 39, x.mean(), x.std(ddof=1) / np.sqrt(40))
    assert (lo, hi) == pytest.approx(t, abs=0.15 * (t[1] - t[0]))


@pytest.mark.parametrize("n", [40, 2500])
def test_simultaneous_limits_cover_all_rows_at_once(n):
    """600 repetitions; separate 95% intervals (the mutant) miss one of five independent rows in a fifth."""
    rng = np.random.default_rng(6)
    found = studentise(rng.standard_normal((600, 5, n)), resamples=1000)
    lo, hi = found.simultaneous(0.95)
    assert 0.925 <= np.mean(np.all((lo <= 0) & (hi >= 0), -1)) <= 0.98
    lo, hi = found.interval(0.95)
    assert np.mean(np.all((lo <= 0) & (hi >= 0), -1)) < 0.85


def test_rows_that_move_together_cost_nothing():
    x = beta_values(7, 1, 50)
    same = studentise(np.concatenate([x, 2 * x, 3 * x]))
    alone = studentise(x)
    assert np.subtract(*same.simultaneous(0.95))[0] == pytest.approx(
        np.subtract(*alone.simultaneous(0.95))[0]
    )


def test_constant_values_have_no_width():
    lo, hi = bootstrap_t(np.full(9, 0.1), 0.95)
    assert lo == hi == pytest.approx(0.1)


def test_few_prompts_are_refused():
    with pytest.raises(AlignProError, match="prompts: 4 are too few for an interval; give at least 5"):
        bootstrap_t(np.arange(4.0), 0.95)


@pytest.mark.parametrize("level", [0.5, 1, 95, True, "high"])
def test_level_is_checked(level):
    with pytest.raises(AlignProError, match=r"level .* must lie between 0.5 and 1"):
        check_level(level)


def test_verdicts():
    assert verdict_of(0.1, 0.2) == "holds"
    assert verdict_of(-0.2, -0.1) == "violated"
    assert verdict_of(-0.1, 0.2) == "inconclusive"
    assert verdict_of(0.1, 0.2, applicable=False) == "inapplicable"


def test_prompts_to_settle():
    slack = Estimate(0.1, -0.1, 0.3, 0.95, 1000, 50, "", "none")
    more = prompts_to_settle(slack)
    assert more is not None
    assert 0.2 * np.sqrt(50 / (50 + more)) < 0.1  # limits shrink as 1/√n …
    assert 0.2 * np.sqrt(50 / (50 + more - 2)) >= 0.1  # … and no prompt is asked for in vain
    assert prompts_to_settle(Estimate(1e-9, -1, 1, 0.95, 1000, 50, "", "none")) is None
    # All rewards agree: the slack is 0, and known to be.
    assert prompts_to_settle(Estimate(0.0, 0.0, 0.0, 0.95, 1000, 50, "", "none")) is None


def test_errors_are_those_of_the_sample():
    """n − 1 in the standard error, here and in every resample; with n (the mutant) few prompts cover less."""
    x = beta_values(8, 3, 6)
    found = studentise(x, resamples=200)
    assert found.error == pytest.approx(stats.sem(x, axis=-1), rel=1e-12)
    assert found.error != pytest.approx(stats.sem(x, axis=-1, ddof=0), rel=0.05)
    counts = _counts(6, 200).astype(int)
    for b in np.flatnonzero((counts > 0).sum(0) > 2)[:20]:
        sample = np.repeat(x, counts[:, b], -1)
        for ddof, same in ((1, True), (0, False)):
            t = (sample.mean(-1) - x.mean(-1)) / stats.sem(sample, axis=-1, ddof=ddof)
            assert (found.draws[:, b] == pytest.approx(t, rel=1e-9)) == same


def test_remarks():
    plain = Estimate(0.1, 0.0, 0.2, 0.95, 10, 5, "", "none")
    assert plain.remarks == ()
    assert replace(plain, bias="unknown").remarks == ()
    odd = replace(plain, bias="down", bracket=True, ess=2.34)
    assert odd.remarks == ("degenerate weights: bounds", "biased down", "ESS 2.3")
