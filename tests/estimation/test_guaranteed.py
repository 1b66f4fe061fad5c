"""Guaranteed statements: they cover on hard populations, at 5 and 20 prompts; what has none says so."""

from dataclasses import replace

import numpy as np
import pytest
from mutants import kills, mutated
from populations import draw, problems, truth

from alignpro.commands.estimate import page, text
from alignpro.estimation import estimate, paired, samples, terms, unseen
from alignpro.estimation.intervals import studentise
from alignpro.estimation.means import Limits
from alignpro.estimation.statements import rewards_only

POPULATIONS = problems()
EVEN = POPULATIONS["answers copied within a draw"]._replace(copied=False)
"""Rewards of 0 and 1, and rewrites that are all alike: the slack of `rewards_only` is 0, exactly."""
HARD = {name: case for name, case in POPULATIONS.items() if not case.copied} | {"slack 0": EVEN}
RUNS = 3


def reports(cases, prompts, runs=RUNS):
    for case in cases:
        true = truth(case)
        for seed in range(runs):
            rollouts = draw(case, prompts, np.random.default_rng([seed, prompts]))
            yield estimate(rollouts, case.beta, case.lam, interval="guaranteed"), true


def misses(cases, prompts, runs=RUNS):
    """Reports, those with a guaranteed slack that is not covered, and others' numbers that are not."""
    count, joint, alone = 0, 0, 0
    for report, true in reports(cases, prompts, runs):
        slacks = {f"slack {b.name}": b.slack for b in report.bounds if b.slack is not None}
        slacks = {name: e for name, e in slacks.items() if name in true}
        assert len(slacks) == 2
        others = {n: e for n, e in report.quantities.items() if n in true and e.guaranteed}
        others |= {f"gap {arm}": e for arm, e in report.gaps.items() if f"gap {arm}" in true}

        def out(found, true=true):
            return sum(not e.lo - 1e-9 <= true[name] <= e.hi + 1e-9 for name, e in found.items())

        count, joint, alone = count + 1, joint + bool(out(slacks)), alone + bool(out(others))
        assert all(e.guaranteed for e in [*slacks.values(), *others.values()])
    return count, joint, alone


@pytest.mark.parametrize("prompts", [5, 20])
def test_guaranteed_limits_cover_on_hard_populations(prompts):
    """24 reports: over 5 with a slack amiss has probability 0.2% were each 5%; they have none.

    Of the numbers each by itself covers in 95% at least; at most 3 reports have one amiss.
    """
    count, joint, alone = misses(HARD.values(), prompts)
    assert count == RUNS * len(HARD) == 24
    assert joint <= 5
    assert alone <= 3


def test_percentile_t_is_noticed(monkeypatch):
    """1 in 100 answers earns 1, 5 prompts: 3 of 4 reports with a number amiss by chance, below 0.1%."""

    def percentile_t(values, low, high, level, **_):
        lo, hi = studentise(values, 400).interval(level)
        return Limits(values.mean(-1), lo, hi, np.full(lo.shape, "percentile-t"))

    def check(way):
        monkeypatch.setattr(paired, "limits", way)
        assert misses([POPULATIONS["rewards of 1 in 1% of answers"]], 5, 4)[2] <= 2

    check(paired.limits)
    kills(check, percentile_t)


def test_rows_err_on_their_side_and_stay_within_their_range(monkeypatch):
    """With slacks of 0 the lower rows' means are at most 0, up to 4 standard errors of 300 prompts.

    The mutants value the draws by the answers that weighed them, and forget what the tilt costs.
    """
    rollouts = draw(EVEN, 300, np.random.default_rng(2))

    def check(module):
        monkeypatch.setattr(terms, "samples", module)
        found = terms.Terms(rollouts, EVEN.beta, EVEN.lam, sure=0.95)
        slack = rewards_only(found).slack
        (lower, (low, high)), (upper, (least, most)) = slack.rows
        assert low - 1e-12 <= lower.min() <= lower.max() <= high + 1e-12
        assert least - 1e-12 <= upper.min() <= upper.max() <= most + 1e-12
        assert high - low < 2.1  # 2.28 if the tilt and all draws were not paired
        assert lower.mean() <= 4 * lower.std() / np.sqrt(300)
        assert upper.mean() >= 0.0

    check(samples)
    weighed, price = "((w - 1.0 / draws) * own)", "* own).sum(-1) - price\n        ess"
    kills(check, mutated(samples, weighed, "((w - 1.0 / draws) * rewards.mean(-1))"))
    kills(check, mutated(samples, price, "* own).sum(-1) + price\n        ess"))


def test_numbers_of_a_bound_are_no_rows_that_looked():
    """Upper limits of V(t) enter as numbers: a slope taken from all prompts would make rows dependent."""

    def check(module):
        g = np.random.default_rng(0).random(12)
        side = module.value_above(g, 0.1, 1.0, 0.002)
        assert np.ptp(side.values) == 0.0
        assert side.low == side.high == side.values[0] < 1.0
        above = module.mean_above(side, np.full(12, 0.6), 0.0, 1.0, 0.002)
        assert above.low == above.high
        strict = module.value_above(g, 0.1, 1.0, 0.0002)
        assert strict.high > side.high > module.value_above(g, 0.1, 1.0).values.mean()

    check(unseen)
    kills(
        check,
        mutated(
            unseen, "if error is not None:\n        return constant", "if False:\n        return constant"
        ),
    )
    given = terms.Terms(draw(EVEN, 5, np.random.default_rng(0)), 0.1, 0.1, sure=0.9)
    assert given._error == pytest.approx(0.1 / 24)


def test_what_has_no_guarantee_says_so():
    """KLs from log-probabilities, and the best of the draws; with an arm star each slack that needs them."""
    case = HARD["rewards 0.5 +- 0.1"]
    rollouts = draw(case, 40, np.random.default_rng(1))
    sure, plain = (estimate(rollouts, case.beta, case.lam, interval=i) for i in ("guaranteed", "bootstrap"))
    without = {name for name, e in sure.quantities.items() if not e.guaranteed}
    assert without == {
        "J(best rewrite drawn)", "lambda KL(trained||rho_sft)", "lambda KL(trained||rho*)",
    }  # fmt: skip
    assert all(e.guaranteed is None for e in plain.quantities.values())
    assert all(bound.guaranteed is None for bound in plain.bounds)
    said, line = text(sure), "lambda KL(trained||rho_sft)"
    assert next(row for row in said.splitlines() if line in row).rstrip().endswith("not guaranteed")
    assert "guaranteed" not in text(plain)
    tight = next(bound for bound in sure.bounds if bound.name == "tight")
    assert tight.finding == "holds, guaranteed at every number of prompts"
    assert f"Theorem 1 about rho*: {sure.theorem1.finding}" in page(sure).lead
    arms = tuple("star" if arm == "trained" else arm for arm in rollouts.arms)
    prompters = {
        ("star" if arm == "trained" else arm, seed): n for (arm, seed), n in rollouts.prompters.items()
    }
    rollouts = replace(rollouts, arms=arms, prompters=prompters)
    other = estimate(rollouts, case.beta, case.lam, interval="guaranteed")
    slacks = {bound.name: bound.guaranteed for bound in other.bounds}
    assert slacks == {"theorem1": False, "span": False, "tight": True, "rewards_only": False, "law": True}
    assert next(b for b in other.bounds if b.name == "span").sureness in ("", "not guaranteed")
