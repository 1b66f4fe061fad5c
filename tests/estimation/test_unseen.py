"""What was not drawn: the bounds hold for every law, and intervals of π* and ρ* cover where they decide."""

import numpy as np
import pytest
from estimate_oracle import instance
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import kills

from alignpro.errors import AlignProError
from alignpro.estimation import estimate, headroom, terms, unseen
from alignpro.estimation.paired import estimates
from alignpro.estimation.simulate import Size, simulate
from alignpro.estimation.terms import Terms

LAW = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 99)), min_size=2, max_size=5)


def value(r, p, t):
    return 1.0 + t * np.log(p @ np.exp((r - 1.0) / t))


@settings(max_examples=40, deadline=None)
@given(LAW, st.floats(0.02, 3.0), st.floats(0.001, 1.0))
def test_both_bounds_hold_for_every_law(law, t, c):
    """By their own formulas. The mutant takes V(t) in V(t/2)'s place."""
    r, weights = np.array(law).T
    p = weights / weights.sum()
    g = p @ np.exp((r - 1.0) / t)
    assert 1.0 + t * (np.log(c) - 1.0 + g / c) >= value(r, p, t) - 1e-12
    tilt = p * np.exp((r - 1.0) / t)
    mean = tilt @ r / tilt.sum()

    def bound(half):
        side = unseen.Side(np.full(5, half), half, half)
        found = unseen.mean_above(side, np.full(5, value(r, p, t)), 0.0, 1.0)
        assert np.all(found.values >= mean - 1e-12)

    bound(value(r, p, t / 2.0))
    if mean - value(r, p, t) > 1e-9 and value(r, p, t) < 0.99:
        side = 2.0 * value(r, p, t) - value(r, p, t)
        assert side < mean


def test_the_bound_is_sharp_for_an_answer_that_is_sure():
    """One reward alone: V(t) = r at every t, and the bound is r."""
    r = np.full(5, 0.4)
    v = unseen.Side(r, 0.4, 0.4)
    assert unseen.mean_above(v, r, 0.4, 0.4).values == pytest.approx(r)
    c = unseen.value_above(np.full(40, 0.5), 0.1, 1.0)
    assert c.values.mean() == pytest.approx(1.0 + 0.1 * np.log(0.5), abs=0.1)


def test_hidden_is_the_share_of_the_mixture():
    r, t, share = np.array([0.1, 0.3, 0.2]), 0.2, 0.01
    g = np.exp(r / t).mean()
    top = share * np.exp(1.0 / t)
    assert unseen.hidden(r, t, 1.0, share) == pytest.approx(top / (g + top))


def rare(chance=0.01, solvable=1):
    i = instance(0, shape=(solvable, 2, 2))
    i.p = np.full(solvable, 1.0 / solvable)
    i.frozen, i.own = np.array([[1.0 - chance, chance]] * 2), np.zeros(solvable, int)
    i.reward = np.zeros((solvable, 2))
    i.reward[0, 1] = 1.0
    return i


@pytest.mark.parametrize("solvable", [1, 4], ids=["all prompts", "a quarter"])
def test_intervals_of_what_is_rarely_seen_cover(solvable, monkeypatch):
    """10 runs: were the coverage 95%, all but two cover with probability 99%. The mutant sees no doubt."""
    i, beta = rare(solvable=solvable), 0.1
    g = 0.01 * np.e**10
    true = {"J": g / (0.99 + g) / solvable, "V": beta * np.log(0.99 + g) / solvable}

    def check(share):
        monkeypatch.setattr(unseen, "SHARE", share)
        covered = {"J": 0, "V": 0}
        for seed in range(10):
            rollouts = simulate(i, np.random.default_rng(seed), Size(20, 16, 2, 2))
            found = Terms(rollouts, beta, 0.5)
            both = estimates({"J": found.j_pi(), "V": found.value_model()}, rollouts, 0.95)
            for name, e in both.items():
                covered[name] += e.lo <= true[name] <= e.hi
                assert e.hi - e.lo > 0
        assert min(covered.values()) >= 8

    check(unseen.SHARE)
    kills(check, np.inf)


def test_ordinary_rewards_are_not_in_doubt():
    rollouts = simulate(instance(3), np.random.default_rng(0), Size(40, 32, 16, 4), reward_range=(0, 1))
    found = Terms(rollouts, 0.25, 0.2)
    assert not found.j_pi().weak
    assert not found.value().weak


def test_no_no_where_a_rewrite_too_rare_to_be_drawn_would_gain():
    """None of 48 rewrites is good, as happens to 2% good ones. At a λ where rarity outweighs gain, a no."""
    i = rare()
    i.frozen, i.prior = np.eye(2), np.array([[1.0, 0.0]])
    bad = simulate(i, np.random.default_rng(0), Size(8, 8, 6, 2), reward_range=(0, 1))
    said = headroom(bad, (0.1,))
    assert said.decision == "undecided"
    assert said.at[0].over_reference.hi > 0.9
    # Rewards that differ a little: weights look well, and still nothing is known of one rewrite in 500.
    i.frozen, i.prior = np.array([[0.5, 0.5]] * 2), np.full((1, 2), 0.5)
    i.reward = np.array([[0.499, 0.501]])
    flat = simulate(i, np.random.default_rng(1), Size(60, 8, 32, 4), reward_range=(0, 1))
    assert headroom(flat, (0.8,)).decision == "no"
    small = headroom(flat, (0.05, 0.8))
    assert small.decision == "undecided"
    assert "rewrites that are one in 520 or rarer" in small.answer


def test_guaranteed_limits_rest_on_no_weights():
    """With betting every slack is a bracket of bounded values; KLs from log-probabilities alone are not."""
    rollouts = simulate(instance(3), np.random.default_rng(0), Size(40, 16, 12, 4), reward_range=(0, 1))
    found = terms.Terms(rollouts, 0.25, 0.2, sure=0.95)
    for term in (found.j_pi(), found.value_model(), found.value(), found.j_rho(), found.gap(None)):
        assert term.weak
        assert term.bounded
        for side, (low, high) in term.rows:
            assert low - 1e-12 <= side.min() <= side.max() <= high + 1e-12
    report = estimate(rollouts, 0.25, 0.2, interval="guaranteed")
    assert all("percentile-t" not in b.slack.method for b in report.bounds if b.slack is not None)


def test_headroom_refuses_copies():
    from test_copies import copied

    with pytest.raises(AlignProError, match="headroom: all answers to a rewrite are one text in 80 of 80"):
        headroom(copied(), (0.1,))
