"""Win rates against plain formulas, brute force and simulation; each property kills a mutant it shows."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from alignpro.commands import judge as command
from alignpro.errors import AlignProError
from alignpro.estimation import winrate
from alignpro.estimation.intervals import betting, bootstrap_t
from alignpro.estimation.means import shuffled
from alignpro.estimation.winrate import Judgements, collect, length_regression, rate, wilson, win_rates
from alignpro.report.numbers import plain

EPS = np.finfo(float).eps


def judgements(verdicts, prompt=None, lengths=None, asked=None):
    verdicts = np.array(verdicts, dtype=float).reshape(-1, 2)
    n = len(verdicts)
    return Judgements(
        arms=("trained", "none"),
        judge="j",
        prompt=np.arange(n) if prompt is None else np.array(prompt),
        verdicts=verdicts,
        asked=np.ones(n, dtype=bool) if asked is None else np.array(asked),
        lengths=np.full((n, 2), 100.0) if lengths is None else np.array(lengths, dtype=float),
        failures={},
    )


verdict_lists = st.lists(
    st.tuples(*[st.sampled_from([1.0, 0.0, -1.0, math.nan])] * 2), min_size=1, max_size=12
)


# --- both orders ---


def test_two_orders_make_one_outcome():
    for first, second in itertools.product((1, 0, -1), repeat=2):
        named = {v for v in (first, second) if v}
        want = named.pop() if len(named) == 1 else 0  # agreed, or one a tie; otherwise they disagree
        assert winrate.outcomes(np.array([[first, second]], dtype=float))[0] == want
    assert np.isnan(winrate.outcomes(np.array([[math.nan, 1.0], [0.0, math.nan]]))).all()


def test_a_judge_that_always_names_the_first_gets_no_win_out():
    found = win_rates(judgements([[1, -1]] * 20))
    assert (found.wins, found.ties, found.losses) == (0, 20, 0)
    assert (found.win_rate.value, found.agreement.value, found.kappa) == (0.5, 0.0, 0.0)
    assert found.first_shown.value == 1.0
    doubt = "says another thing in 100% of the pairs"
    assert doubt in command.text(found)
    assert doubt in command.page(found, {}).lead
    # One order alone would have called every pair a win.
    assert np.mean(judgements([[1, -1]] * 20).verdicts[:, 0] == 1) == 1.0


def test_a_judge_blind_to_position_agrees_with_itself():
    found = win_rates(judgements([[1, 1]] * 12 + [[-1, -1]] * 6 + [[0, 0]] * 2))
    assert (found.wins, found.ties, found.losses) == (12, 2, 6)
    assert (found.agreement.value, found.kappa, found.first_shown.value) == (1.0, 1.0, 0.5)
    assert "says another thing" not in command.text(found) + command.page(found, {}).lead
    assert found.win_rate.value == pytest.approx(13 / 20)


@given(verdict_lists)
def test_bounds_are_the_extremes_over_what_failed_verdicts_could_have_been(verdicts):
    j = judgements(verdicts)
    holes = np.argwhere(np.isnan(j.verdicts))
    j.verdicts[tuple(holes[5:].T)] = 0.0  # keeps the enumeration small
    holes = holes[:5]
    found = win_rates(j)
    rates = []
    for fill in itertools.product((1.0, 0.0, -1.0), repeat=len(holes)):
        whole = j.verdicts.copy()
        for (i, k), value in zip(holes, fill, strict=True):
            whole[i, k] = value
        rates.append(np.mean([(1 + np.sign(a + b)) / 2 for a, b in whole]))
    np.testing.assert_allclose(found.bounds, (min(rates), max(rates)), rtol=4 * EPS * len(j), atol=0)
    assert found.wins + found.ties + found.losses + found.failed == found.pairs == len(j)
    if found.win_rate is None:
        assert found.failed == found.pairs
    else:
        assert found.win_rate.n == found.pairs - found.failed
        assert found.win_rate.lo <= found.win_rate.value <= found.win_rate.hi


def test_failures_are_no_wins_and_no_losses():
    found = win_rates(judgements([[1, 1]] * 6 + [[-1, -1]] * 2 + [[math.nan, 1]] * 2))
    assert found.win_rate.value == 6 / 8
    assert found.win_rate.value not in (6 / 10, 8 / 10)  # divided by all rows; counted as wins
    assert found.bounds == (pytest.approx(7 / 10), pytest.approx(8 / 10))
    assert found.failed == 2


@given(verdict_lists, st.data())
@settings(max_examples=50)
def test_exchanging_the_arms_exchanges_everything(verdicts, data):
    lengths = np.array(data.draw(st.lists(st.integers(0, 50), min_size=24, max_size=24))).reshape(12, 2)
    lengths = lengths[: len(verdicts)]
    one = win_rates(judgements(verdicts, lengths=lengths))
    j = judgements(verdicts, lengths=lengths[:, ::-1])
    other = win_rates(judgements(-j.verdicts[:, ::-1], lengths=j.lengths))
    assert (one.wins, one.ties, one.losses) == (other.losses, other.ties, other.wins)
    assert one.bounds == pytest.approx(tuple(1 - b for b in other.bounds[::-1]), abs=8 * EPS)
    for name in ("win_rate", "length_controlled"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.value, a.lo, a.hi) == pytest.approx((1 - b.value, 1 - b.hi, 1 - b.lo), abs=1e-9)
    for name in ("agreement", "first_shown"):  # of the judge, not of the arms
        a, b = getattr(one, name), getattr(other, name)
        assert a == b or (a.value, a.lo, a.hi) == pytest.approx((b.value, b.lo, b.hi), abs=8 * EPS)


@given(st.lists(st.tuples(*[st.sampled_from([1.0, 0.0, -1.0])] * 2), min_size=1, max_size=30))
def test_kappa_is_cohens(pairs):
    counts = np.zeros((3, 3))
    for a, b in pairs:
        counts[int(a) + 1, int(b) + 1] += 1
    n = counts.sum()
    observed, chance = np.trace(counts) / n, (counts.sum(0) / n) @ (counts.sum(1) / n)
    got = winrate.cohen_kappa(*np.array(pairs).T)
    if chance == 1:
        assert got is None
    else:
        assert got == pytest.approx((observed - chance) / (1 - chance), abs=64 * EPS / (1 - chance))


def test_identical_answers_are_ties_that_say_nothing_about_the_judge():
    j = judgements([[1, 1]] * 6 + [[0, 0]] * 4, asked=[True] * 6 + [False] * 4)
    found = win_rates(j)
    assert (found.ties, found.identical, found.agreement.n, found.first_shown.n) == (4, 4, 6, 6)
    assert found.win_rate.value == 0.8


# --- intervals ---


@pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (12.5, 20), (1, 1), (60, 100)])
def test_wilson_solves_its_equation(k, n, level):
    p_hat, z = k / n, stats.norm.ppf(0.5 + level / 2)
    lo, hi = wilson(p_hat, n, level)
    for p in (lo, hi):
        if 0 < p < 1:
            assert (p_hat - p) ** 2 == pytest.approx(z * z * p * (1 - p) / n, rel=1e-9)
        else:
            assert p == p_hat  # an end of [0, 1], which the equation has as a root
    if k == 0:  # Wald's would be one point here
        assert hi > 0.1


def test_wilson_covers():
    # Exactly, by summing the binomial: coverage swings about the level, and never far below it.
    n = 50
    limits = np.array([wilson(k / n, n) for k in range(n + 1)])
    wald = np.array([k / n + np.array([-1, 1]) * 1.96 * math.sqrt(k * (n - k) / n**3) for k in range(n + 1)])

    def coverage(limits, p):
        return stats.binom.pmf(np.arange(n + 1), n, p)[(limits[:, 0] <= p) & (p <= limits[:, 1])].sum()

    grid = np.linspace(0.05, 0.95, 91)
    found = [coverage(limits, p) for p in grid]
    assert min(found) > 0.915
    assert np.mean(found) == pytest.approx(0.95, abs=0.01)
    assert min(coverage(wald, p) for p in grid) < 0.915


def clustered(rng, prompts, each):
    """Scores of pairs that share their prompt's own rate; the mean over prompts is 0.6."""
    own = rng.beta(1.2, 0.8, size=prompts)
    counts = rng.integers(1, each + 1, size=prompts)  # as where some pairs failed
    prompt = np.repeat(np.arange(prompts), counts)
    return rng.binomial(1, own[prompt]).astype(float), prompt


def test_the_bootstrap_over_prompts_covers_and_one_over_pairs_does_not():
    # 400 simulations; were the true coverage 93%, fewer than `least` would cover once in 10,000 times.
    runs, least = 400, stats.binom.ppf(1e-4, 400, 0.93)
    rng = np.random.default_rng(0)
    over_prompts = over_pairs = 0
    for _ in range(runs):
        scores, prompt = clustered(rng, 40, 6)
        found = rate(scores, prompt, 0.95)
        over_prompts += found.lo <= 0.6 <= found.hi
        lo, hi = wilson(scores.mean(), len(scores))
        over_pairs += lo <= 0.6 <= hi
    assert over_prompts >= least
    assert over_pairs < least


def test_the_bootstrap_is_that_of_the_ratio():
    # Independently: resample prompts, studentise Σ scores/Σ counts by its residuals.
    scores, prompt = clustered(np.random.default_rng(3), 30, 4)
    sums, counts = np.bincount(prompt, scores), np.bincount(prompt)
    value = sums.sum() / counts.sum()
    rng = np.random.default_rng(1)
    z = (sums - value * counts) / counts.mean()
    t = []
    for _ in range(20_000):
        draw = z[rng.integers(0, 30, 30)]
        t.append(draw.mean() / (draw.std(ddof=1) / math.sqrt(30)))
    error = z.std(ddof=1) / math.sqrt(30)
    want = value - np.quantile(t, [0.975, 0.025]) * error
    found = rate(scores, prompt, 0.95)
    # 2,000 resamples place a 2.5% quantile of t within about 0.15 (4 standard deviations 0.04 each).
    np.testing.assert_allclose([found.lo, found.hi], want, atol=0.16 * 1.5 * error)
    assert found.value == value


def test_wilson_and_betting_stand_in_where_resampling_cannot_be_trusted():
    one_each = rate(np.tile([1.0, 0.0], 20), np.arange(40), 0.95)
    assert (one_each.lo, one_each.hi) == wilson(0.5, 40)
    # Wilson's lower limit at one success in 12 is above 1%, so that it misses 11% of the time there.
    one_success = rate(np.eye(12)[0], np.arange(12), 0.95)
    assert one_success.lo < 0.01 < wilson(1 / 12, 12)[0]
    alike = rate(np.ones(12), np.repeat(np.arange(6), 2), 0.95)
    assert (alike.lo, alike.hi) == pytest.approx([float(end) for end in betting(np.ones(6), 0.0, 1.0, 0.95)])
    assert alike.lo < 0.7  # not the single point that resampling gives
    few = rate(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1]), 0.9)
    want = betting(shuffled(np.array([0.5, 1.0])), 0.0, 1.0, 0.9)
    assert (few.lo, few.hi, few.n, few.n_clusters) == pytest.approx((*map(float, want), 4, 2))
    assert rate(np.array([]), np.array([]), 0.95) is None


def test_no_rate_leaves_the_unit_interval():
    """Nearly all won by few prompts: the bootstrap's own limit (the mutant) is above 1."""
    prompt = np.repeat(np.arange(6), 2)
    scores = np.ones(12)
    scores[:3] = (0.5, 0.0, 0.5)
    value = scores.mean()
    residuals = np.bincount(prompt, scores - value) / 2
    assert bootstrap_t(value + residuals, 0.95)[1] > 1.0
    found, other = rate(scores, prompt, 0.95), rate(1 - scores, prompt, 0.95)
    assert "betting" in found.method
    assert (found.hi, other.lo) == (1.0, 0.0)


# --- length control ---


def logistic(rng, n, theta, phi, shift=1.0):
    """Scores driven by θ + φ t; the first answers are the longer ones by `shift` standard deviations."""
    lengths = np.stack([800 + 200 * (rng.standard_normal(n) + shift), np.full(n, 800.0)], 1).clip(0)
    d = lengths[:, 0] - lengths[:, 1]
    p = special.expit(theta + phi * np.tanh(d / d.std()))
    return rng.binomial(1, p).astype(float), lengths


@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.5, 30.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_regression_is_the_penalised_maximum(scores, seed, drive):
    y = np.array([0.0, 1.0, *scores])
    rng = np.random.default_rng(seed)
    lengths = rng.uniform(0, 100, (len(y), 2))
    lengths[:, 0] += drive * (2 * y - 1)  # at 30, length decides nearly all: φ is only held by its prior
    d = lengths[:, 0] - lengths[:, 1]
    t = np.tanh(d / d.std())

    def loss(at):
        eta = at[0] + at[1] * t
        p = special.expit(eta)
        value = np.logaddexp(0, eta).sum() - y @ eta + 0.5 * winrate.RIDGE * at[1] ** 2
        return value, np.array([(p - y).sum(), (p - y) @ t + winrate.RIDGE * at[1]])

    want = optimize.minimize(loss, [0.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-9}).x
    theta, phi, _ = length_regression(y, lengths)
    np.testing.assert_allclose([theta, phi], want, rtol=1e-5, atol=1e-5)
    # The gradient vanishes to rounding, and with it Σ(y − p): the prior pulls on φ alone.
    np.testing.assert_allclose(loss((theta, phi))[1], 0.0, atol=1e-8 * len(y))


def test_the_controlled_interval_is_the_sandwich_over_prompts():
    scores, lengths = logistic(np.random.default_rng(6), 24, 0.3, 1.0)
    prompt = np.repeat(np.arange(8), 3)
    theta, phi, t = length_regression(scores, lengths)
    found, _ = winrate.length_controlled(scores, lengths, prompt, 0.9)
    p = special.expit(theta + phi * t)
    bread = np.zeros((2, 2))
    meat = np.zeros((2, 2))
    for c in range(8):
        u = sum((scores[i] - p[i]) * np.array([1, t[i]]) for i in range(24) if prompt[i] == c)
        meat += np.outer(u, u) * 8 / 7
    for i in range(24):
        bread += p[i] * (1 - p[i]) * np.outer([1, t[i]], [1, t[i]])
    bread[1, 1] += winrate.RIDGE
    error = math.sqrt((np.linalg.inv(bread) @ meat @ np.linalg.inv(bread))[0, 0])
    want = special.expit(theta + error * stats.t.ppf([0.05, 0.5, 0.95], 7))
    np.testing.assert_allclose([found.lo, found.value, found.hi], want, rtol=1e-9)
    assert (found.n, found.n_clusters) == (24, 8)


def test_where_length_alone_decides_the_controlled_rate_is_a_half():
    # z of the estimate; beyond 4 once in 16,000 times.
    scores, lengths = logistic(np.random.default_rng(0), 4000, 0.0, 3.0)
    found, effect = winrate.length_controlled(scores, lengths, np.arange(4000), 0.95)
    assert scores.mean() > 0.75
    error = (found.hi - found.lo) / (2 * 1.96)
    assert abs(found.value - 0.5) < 4 * error < 0.1
    assert effect > 2.5
    # Evaluated at the mean difference instead of none, it is the raw rate again.
    theta, phi, t = length_regression(scores, lengths)
    assert special.expit(theta + phi * t.mean()) > 0.75


def test_where_length_does_not_matter_the_controlled_rate_is_the_raw_one():
    scores, lengths = logistic(np.random.default_rng(1), 4000, math.log(0.7 / 0.3), 0.0)
    found, effect = winrate.length_controlled(scores, lengths, np.arange(4000), 0.95)
    error = (found.hi - found.lo) / (2 * 1.96)
    assert abs(found.value - 0.7) < 4 * error < 0.08
    assert abs(effect) < 0.5


def test_the_controlled_interval_covers():
    # Two pairs a prompt, the second the first's copy: the honest sample is prompts. 400 simulations; were the
    # true coverage 93%, fewer than `least` would cover once in 10,000 times. Pairs as units do not cover.
    runs, least = 400, stats.binom.ppf(1e-4, 400, 0.93)
    rng = np.random.default_rng(2)
    truth, over_prompts, over_pairs = special.expit(0.4), 0, 0
    for _ in range(runs):
        scores, lengths = logistic(rng, 150, 0.4, 1.5, shift=0.3)
        scores, lengths = np.repeat(scores, 2), np.repeat(lengths, 2, 0)
        for_prompts, _ = winrate.length_controlled(scores, lengths, np.repeat(np.arange(150), 2), 0.95)
        for_pairs, _ = winrate.length_controlled(scores, lengths, np.arange(300), 0.95)
        over_prompts += for_prompts.lo <= truth <= for_prompts.hi
        over_pairs += for_pairs.lo <= truth <= for_pairs.hi
    assert over_prompts >= least
    assert over_pairs < least


def test_nothing_to_control_for_leaves_the_raw_rate():
    rng = np.random.default_rng(5)
    prompt = np.arange(30)
    scores = rng.integers(0, 3, 30) / 2
    raw = rate(scores, prompt, 0.95)
    for lengths in (np.full((30, 2), 7.0), np.stack([np.full(30, 90.0), np.full(30, 40.0)], 1)):
        assert winrate.length_controlled(scores, lengths, prompt, 0.95) == (raw, 0.0)
    won = np.ones(30)
    lengths = rng.uniform(0, 9, (30, 2))
    assert winrate.length_controlled(won, lengths, prompt, 0.95) == (rate(won, prompt, 0.95), 0.0)
    assert winrate.length_controlled(scores[:4], lengths[:4], prompt[:4], 0.95) == (None, 0.0)


# --- files and tables ---


def row(**changes):
    return {
        "prompt_id": "p",
        "arms": ["trained", "none"],
        "judge": "j",
        "lengths": [3, 4],
        "identical": False,
        "verdicts": ["win", "tie"],
        "failures": [None, None],
        **changes,
    }


def test_rows_become_columns(tmp_path):
    rows = [
        row(),
        row(prompt_id="q", verdicts=["loss", None], failures=[None, "several"]),
        row(identical=True, verdicts=["tie", "tie"], failures=[]),
    ]
    path = tmp_path / "judgements.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = winrate.read(path)
    np.testing.assert_array_equal(found.verdicts, [[1, 0], [-1, np.nan], [0, 0]])
    np.testing.assert_array_equal(found.prompt, [0, 1, 0])
    np.testing.assert_array_equal(found.asked, [True, True, False])
    assert (found.arms, found.judge, found.failures) == (("trained", "none"), "j", {"several": 1})
    text = command.text(win_rates(found))
    assert "trained : none" in text
    assert "won 1, lost 0, tied 1 (1 identical), failed 1" in text
    assert "over 2 of 3 pairs; 0.500 to 0.667 were every failed verdict lost, or won" in text
    assert "verdicts that failed: 1 several" in text
    json.dumps(plain(win_rates(found)), allow_nan=False)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "judgements: there are none"),
        ([row(), row(verdicts=["win", "won"])], "judgement 2: is no judgement"),
        ([row(verdicts=["win"])], "judgement 1: is no judgement"),
        ([row(lengths=[1, -2])], "judgement 1: is no judgement"),
        ([{"arms": []}], "judgement 1: is no judgement"),
        ([row(), row(judge="k")], "judgement 2: is of"),
    ],
)
def test_what_is_no_judgement_is_refused(rows, message):
    with pytest.raises(AlignProError, match=message):
        collect(rows)


def test_bad_files_and_levels(tmp_path):
    (tmp_path / "torn").write_text(json.dumps(row())[:-4])
    for name, said in (("torn", "line 1 is no JSON"), ("gone", "missing or damaged")):
        with pytest.raises(AlignProError, match=f"{name}: {said}"):
            winrate.read(tmp_path / name)
    with pytest.raises(AlignProError, match=r"level 95: must lie between"):
        win_rates(judgements([[1, 1]]), 95)


def test_only_a_newline_ends_a_judgement(tmp_path):
    """Names may hold what `str.splitlines` (the mutant) takes for the end of a line."""
    path = tmp_path / "judgements.jsonl"
    odd = row(judge="a\u2028b\x85c\u2029d")
    path.write_text(2 * (json.dumps(odd, ensure_ascii=False) + "\n"), encoding="utf-8")
    found = winrate.read(path)
    assert (len(found), found.judge) == (2, odd["judge"])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 8


def test_what_the_text_and_the_page_say_is_the_results():
    found = win_rates(judgements([[1, 1]] * 5 + [[-1, -1]] * 2 + [[0, 0]] + [[math.nan, 1]]))
    assert (found.judged, found.percentages, found.level) == (8, (62.5, 25.0), 0.95)
    assert found.percentages != (500 / 9, 200 / 9)  # of all pairs, failed ones too
    none = win_rates(judgements([[math.nan, 1]]))
    assert (none.judged, none.percentages, none.level) == (0, None, None)


def test_all_failed_is_a_result_too():
    found = win_rates(judgements([[math.nan, 1], [math.nan, math.nan]]))
    assert (found.win_rate, found.agreement, found.kappa, found.length_controlled) == (None,) * 4
    assert found.bounds == (0.25, 1.0)
    assert "not to be had" in command.text(found)
