"""How many calls, from rollouts: estimates against the truth, limits that hold, and what the verb shows."""

import json

import numpy as np
import pytest
from estimate_oracle import instance
from mutants import kills

from alignpro import calls as closed
from alignpro.commands import headroom as verb
from alignpro.commands.main import main
from alignpro.errors import AlignProError
from alignpro.estimation import calls, headroom
from alignpro.estimation.paired import Arm
from alignpro.estimation.simulate import Size, simulate, simulated_rows
from alignpro.report.numbers import plain
from alignpro.rollouts import read

LAM, EPS = 0.5, 0.05


def rare(mass=0.05):
    """One prompt whose rewrites are worth 0 but for a share `mass`, worth 1: no noise in answers."""
    i = instance(0, shape=(1, 2, 2))
    i.p, i.own = np.ones(1), np.zeros(1, int)
    i.frozen, i.prior, i.reward = np.eye(2), np.array([[1 - mass, mass]]), np.array([[0.0, 1.0]])
    return i


def lost(mass, lam, n):
    """E_ρ* R − E_ρn R where a share `mass` is worth 1 and the rest 0, over how many of n draws are good."""
    g = np.exp(1 / lam)
    good = np.arange(n + 1)
    log = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    chance = np.exp(log[n] - log[good] - log[n - good] + good * np.log(mass) + (n - good) * np.log1p(-mass))
    return mass * g / (1 - mass + mass * g) - chance @ (good * g / (good * g + n - good))


def test_losses_are_those_of_the_draws_as_an_instance():
    """By their formulas, with the draws as all rewrites; the mutant weighs by the wrong temperature."""
    rng = np.random.default_rng(0)
    r = rng.uniform(size=(3, 5, 4))

    def check(lam):
        for x in range(3):
            means = r[x].mean(-1)
            star = np.exp(means / LAM) / np.exp(means / LAM).sum()
            w = 5 * star
            by_hand = star @ ((means - means.min()) * (w - 1) / (w + 6))
            assert calls.sampling_loss(r, lam, 7)[x] == pytest.approx(by_hand)
            rise = 2 * LAM * np.log(np.exp((r[x] - means[:, None]) / (2 * LAM)).mean(-1)) * 4 / 3
            noisy = np.exp((means + rise) / LAM)
            by_hand = abs(star @ means - noisy @ means / noisy.sum())
            assert calls.noise_loss(r, lam, 2)[x] == pytest.approx(by_hand)

    check(LAM)
    kills(check, 2 * LAM)


def test_estimated_calls_are_near_those_of_the_truth():
    i, lam, eps = rare(0.3), 0.3, 0.05
    rollouts = simulate(i, np.random.default_rng(0), Size(60, 4, 64, 2), reward_range=(0, 1))
    (at,) = headroom(rollouts, (lam,), eps=eps).calls.at
    # Of the truth: the least n with the bound's value at most eps.
    g = np.exp(1 / lam)
    share = 0.3 * g / (0.7 + 0.3 * g)
    w = share / 0.3
    true = closed.fewest(lambda n: share * (w - 1) / (w + n - 1), eps)
    assert at.estimated.answers == 1
    assert at.estimated.noise == 0
    assert 0.75 * true <= at.estimated.draws <= 1.3 * true
    assert lost(0.3, lam, at.estimated.draws) <= eps * 1.2


def test_the_limit_holds_where_most_prompts_show_no_good_rewrite():
    """Draws are found to suffice, though 1 in 50 is good; in no run too few."""
    i, lam, eps = rare(0.02), 0.5, 0.1
    arms = [
        Arm(simulate(i, np.random.default_rng(seed), Size(30, 2, 4, 8), reward_range=(0, 1)), "sft")
        for seed in range(6)
    ]

    def check(widest):
        for arm in arms:
            (at,) = calls.calls(arm, (lam,), eps, 0.95, 0.0, widest).at
            assert at.limited is not None
            assert lost(0.02, lam, at.limited.draws) <= eps
            assert at.limited.loss <= eps
            assert at.limited.calls == at.limited.draws * 8

    check(1.0)
    kills(check, 0.05)  # as if no reward above 0.05 could be
    (at,) = calls.calls(arms[0], (lam,), eps, 0.95, 0.0, 1.0).at
    assert at.limited.draws <= 16 * at.sure.draws
    (cold,) = calls.calls(arms[0], (0.02,), eps, 0.95, 0.0, 1.0).at
    assert cold.limited is None  # 8 answers are too few
    assert cold.sure is None
    assert cold.out_of_reach > 10**6


def test_rewards_near_their_top_need_fewer_draws():
    """The limit reads off rewards that no weight can be large."""
    i = rare(0.5)
    i.reward = np.array([[0.8, 1.0]])
    rollouts = simulate(i, np.random.default_rng(0), Size(60, 2, 8, 64), reward_range=(0, 1))
    (at,) = headroom(rollouts, (0.2,), eps=0.1).calls.at
    assert at.limited.draws * 10 < at.sure.draws


def test_the_verb_shows_them(tmp_path, capsys):
    rows = simulated_rows(instance(3), np.random.default_rng(0), Size(8, 2, 6, 4), reward_range=(0, 1))
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(row.line() for row in rows))
    assert main(["headroom", str(path), "--lam", "0.5", "--eps", "0.05", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["calls"]
    assert found["eps"] == EPS
    (at,) = found["at"]
    assert main(["headroom", str(path), "--lam", "0.5", "--eps", "0.05"]) == 0
    said = capsys.readouterr().out
    for plan in (at["estimated"], at["sure"]):
        assert f"{plan['draws']:,} x {plan['answers']} = {plan['calls']:,}" in said
        assert plan["calls"] == plan["draws"] * plan["answers"]
        assert plan["loss"] <= EPS
    assert f"{at['out_of_reach']} or fewer" in said
    result = headroom(read(path), (0.5,), eps=EPS)
    assert plain(result)["calls"] == found
    (table,) = [s for s in verb.page(result).sections if s.heading == "How many calls"]
    assert f"{at['estimated']['calls']:,}" in table.tables[0].rows[0][1]
    assert headroom(read(path), (0.5,)).calls is None
    with pytest.raises(AlignProError, match=r"eps -1\.0: must be a positive finite number"):
        headroom(read(path), (0.5,), eps=-1.0)
