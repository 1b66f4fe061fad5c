"""Limits of means: coverage where percentile-t has none, no change where it has, and joint limits."""

import numpy as np
import pytest
from mutants import kills

from alignpro.estimation import means
from alignpro.estimation.intervals import betting, studentise
from alignpro.estimation.means import limits, shuffled

POPULATIONS = {
    "rare": (lambda rng, size: (rng.random(size) < 0.05).astype(float), 0.05),
    "at both ends": (lambda rng, size: rng.beta(0.05, 0.95, size), 0.05),
    "a few carry it": (lambda rng, size: (rng.random(size) < 0.1) * rng.random(size), 0.05),
    "skewed": (lambda rng, size: np.minimum(np.exp(1.5 * rng.standard_normal(size)), 50.0) / 50.0, 0.0568),
}
"""Draws in [0, 1] and their means; that of the last from 40 million draws."""


def of(values, level=0.95, **options):
    ends = np.zeros(values.shape[-2]), np.ones(values.shape[-2])
    return limits(values, *ends, level, resamples=400, **options)


def percentile_t(values, level=0.95):
    lo, hi = studentise(values, 400).interval(level)
    return means.Limits(values.mean(-1), lo, hi, np.full(lo.shape, "percentile-t"))


@pytest.mark.parametrize(
    ("name", "n"), [("rare", 20), ("at both ends", 5), ("a few carry it", 5), ("skewed", 5)]
)
def test_limits_cover_where_percentile_t_does_not(name, n):
    """200 repetitions: below 90.5% with probability 1% were the coverage 95%, and 0.0005 at 97%."""
    draw, mean = POPULATIONS[name]
    values = draw(np.random.default_rng([0, n]), (200, 1, n))

    def check(way):
        found = way(values)
        covered = np.mean((found.lo <= mean) & (mean <= found.hi))
        assert covered >= 0.905
        assert np.all(found.hi - found.lo > 1e-3)

    check(of)
    kills(check, percentile_t)


def test_nothing_changes_where_percentile_t_can_be_trusted():
    """Of 200 rows each of uniform and of normal values at most 4% get other limits."""
    rng = np.random.default_rng(1)
    values = np.stack([rng.random((200, 20)), np.clip(0.5 + 0.1 * rng.standard_normal((200, 20)), 0, 1)], 1)
    found, plain = of(values), percentile_t(values)
    same = (found.lo == plain.lo) & (found.hi == plain.hi)
    assert np.all(same == (found.way == "percentile-t"))
    assert np.all(same.mean(0) >= 0.96)


def test_each_sign_of_doubt_is_seen():
    """Ties, an end of the range, skew: by itself, and with the others' absence."""
    rng = np.random.default_rng(2)
    tied = np.concatenate([[0.2], np.full(18, 0.5), [0.8]])
    skewed = np.append(0.5 + 0.01 * rng.standard_normal(19), 0.9)
    plain = 0.5 + 0.1 * np.linspace(-1.7, 1.7, 20)
    rows = np.stack([np.full(20, 0.5), tied, skewed, plain])
    assert means.doubtful(studentise(rows), rows, *np.array([[0.0], [1.0]]), 0.95).tolist() == [
        True, True, True, False
    ]  # fmt: skip
    few = np.linspace(0.1, 0.9, 5)[None]
    near = [bool(means.doubtful(studentise(few), few, *end, 0.95)[0]) for end in ((0.0, 1.0), (-1.0, 2.0))]
    assert near == [True, False]


def test_without_a_range_what_agrees_has_no_limit():
    free = np.full(2, np.inf)
    rows = np.stack([np.full(8, 0.3), np.append(np.zeros(7), 1.0)])
    found = limits(rows, -free, free, 0.95)
    assert found.way.tolist() == ["none", "assumed"]
    assert (found.lo[0], found.hi[0]) == (-np.inf, np.inf)
    rounded = np.where(np.arange(8) % 2, 0.1 + 0.2, 0.3)[None]
    assert limits(rounded, -free[:1], free[:1], 0.95).way.tolist() == ["none"]
    lo, hi = betting((shuffled(rows[1:]) + 1.0) / 3.0, 0.0, 1.0, 0.95)  # within 1 of those seen
    assert (found.lo[1], found.hi[1]) == pytest.approx((3.0 * lo[0] - 1.0, 3.0 * hi[0] - 1.0))


def test_joint_limits_share_the_error():
    """Doubtful rows take their share by Bonferroni; constants are exact and take none."""
    rng = np.random.default_rng(3)
    rare = (rng.random((3, 20)) < 0.05).astype(float)
    found = of(rare, joint=True)
    lo, hi = betting(shuffled(rare), 0.0, 1.0, 1.0 - 0.05 / 3.0)
    assert found.lo == pytest.approx(lo, abs=1e-6)
    assert found.hi == pytest.approx(hi, abs=1e-6)
    smooth = 0.5 + 0.1 * rng.standard_normal((2, 20))
    alone = of(smooth, joint=True)
    assert alone.hi == pytest.approx(studentise(smooth, 400).simultaneous(0.95)[1])
    mixed = limits(
        np.concatenate([smooth, rare[:1], np.full((1, 20), 0.7)]),
        np.array([0.0, 0.0, 0.0, 0.7]), np.array([1.0, 1.0, 1.0, 0.7]), 0.95, joint=True, resamples=400,
    )  # fmt: skip
    assert mixed.way.tolist() == ["percentile-t", "percentile-t", "betting", "exact"]
    assert (mixed.lo[3], mixed.hi[3]) == (0.7, 0.7)
    assert np.all(mixed.hi[:2] >= alone.hi)  # what the rare row takes


def test_limits_turn_over_with_their_values():
    values = POPULATIONS["rare"][0](np.random.default_rng(4), (3, 30))
    found, turned = of(values), limits(-values, -np.ones(3), np.zeros(3), 0.95, resamples=400)
    assert turned.lo == pytest.approx(-found.hi, abs=1e-8)
    assert turned.hi == pytest.approx(-found.lo, abs=1e-8)


def test_sorted_files_are_covered_too():
    """Bets go through prompts in an order of their own; in the file's (the mutant) a sorted file misleads."""
    values = np.sort(np.random.default_rng(5).random((50, 1, 60)), -1)

    def check(ordered):
        found = of(values, ordered=ordered, sure=True)
        assert np.mean((found.lo <= 0.5) & (found.hi >= 0.5)) >= 0.9

    check(False)
    kills(check, True)
