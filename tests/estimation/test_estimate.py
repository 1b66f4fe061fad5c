"""`estimate`, `headroom` and `compare` end to end: from a file to verdicts, tables, JSON and exit status."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from importlib import import_module

import numpy as np
import pytest
from estimate_oracle import halfway, instance, truth
from mutants import kills, mutated
from scipy import stats

from alignpro.claims import Claim
from alignpro.commands import main
from alignpro.errors import AlignProError, check_temperature
from alignpro.estimation import compare, estimate, headroom, statements
from alignpro.estimation.intervals import bootstrap_t
from alignpro.estimation.paired import Term, estimates
from alignpro.estimation.simulate import Size, simulate, simulated_rows
from alignpro.estimation.terms import Terms
from alignpro.rollouts import LOGPS, collect

headroom_module = import_module("alignpro.estimation.headroom")
BETA, LAM = 0.25, 0.2
SIZE = Size(60, 24, 12, 4)


def arguments(i):
    pi = i.frozen[i.own] * np.exp(i.reward / BETA)
    return {
        "prompters": {"trained": halfway(i, LAM)},
        "policies": {"rlhf": pi / pi.sum(-1, keepdims=True)},
        "reward_range": (0.0, 1.0),
    }


@pytest.fixture(scope="module")
def rows():
    i = instance(3)
    return list(simulated_rows(i, np.random.default_rng(0), SIZE, **arguments(i)))


@pytest.fixture(scope="module")
def rollouts():
    i = instance(3)
    return simulate(i, np.random.default_rng(0), SIZE, **arguments(i))


@pytest.fixture
def file(rows, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(row.line() for row in rows))
    return path


def test_a_policy_outside_the_frozen_models_support_is_told(rows):
    """Trained without truncation, evaluated with it: an infinite KL comes with its reason and a remedy."""
    mine = [row for row in rows if row.arm == "rlhf"]
    changed = {id(row): replace(row, logp_frozen_x=-math.inf) for row in mine[:3]}
    found = estimate(collect([changed.get(id(row), row) for row in rows]), BETA, LAM)
    (told,) = {why for why in found.missing.values() if "KL(pi||pi_F)" in why}
    assert f"never gives 3 of its {len(mine)} answers, so that KL(pi||pi_F) is infinite" in told
    assert "--answer-top-p 1" in told


def by_name(found):
    return {(b.name, b.prompter): b for b in found.bounds}


def test_every_quantity_is_near_its_truth(rollouts):
    """Within three half-widths of a 95% interval: false alarm 1e-8 each."""
    found = estimate(rollouts, BETA, LAM)
    true = truth(instance(3), BETA, LAM, halfway(instance(3), LAM))
    checked = 0
    for name, e in found.quantities.items():
        if name in true:
            checked += 1
            assert abs(e.value - true[name]) <= 1.5 * (e.hi - e.lo), name
            assert e.lo <= e.value <= e.hi
            assert (e.n_clusters, e.level) == (60, 0.95)
    assert checked == 13
    bound = by_name(found)["theorem1", "rho*"]
    for e, name in ((bound.gap, "gap"), (bound.rhs, "rhs"), (bound.slack, "slack")):
        assert abs(e.value - true[name]) <= 1.5 * (e.hi - e.lo)
    assert found.missing == {}
    assert found.warnings == ()


def test_the_parts_add_up(rollouts):
    found = estimate(rollouts, BETA, LAM)
    for bound in found.bounds:
        assert bound.rhs.value == pytest.approx(sum(t.value for t in bound.terms.values()), abs=1e-12)
        assert bound.slack.value == pytest.approx(bound.rhs.value - bound.gap.value, abs=1e-12)
    for split in found.splits.values():
        parts = (split.prompting_ceiling, split.kl_regularisation, split.optimisation)
        assert sum(part.value for part in parts) == pytest.approx(split.gap.value, abs=1e-12)
    assert found.splits["rho*"].optimisation.value == 0.0
    assert found.gaps["rlhf - none"].value == pytest.approx(
        found.quantities["J(rlhf)"].value - found.quantities["J(none)"].value
    )


def test_true_bounds_hold_with_simultaneous_limits(rollouts):
    found = estimate(rollouts, BETA, LAM)
    assert {b.verdict for b in found.bounds} == {"holds"}
    assert set(by_name(found)) == {
        (name, "trained" if claim.any_prompter else "rho*") for name, claim in statements.CLAIMS.items()
    }
    alone = [estimate(rollouts, BETA, LAM).quantities[k] for k in found.quantities]
    assert alone == list(found.quantities.values())  # deterministic
    assert by_name(found)["tight", "rho*"].slack.value < by_name(found)["theorem1", "rho*"].slack.value


def false_bound(terms):
    """A tenth of Theorem 1's right side."""
    true = statements.theorem1(terms)
    share = 0.1 * (true.slack + true.gap)
    return statements.Statement(true.gap, {"tenth": share}, share - true.gap, {})


def test_a_false_bound_is_violated(monkeypatch):
    i, lam = instance(5, spread=0.7, noise=2.0), 0.5
    wide = simulate(i, np.random.default_rng(0), SIZE._replace(answers=40), reward_range=(0.0, 1.0))
    monkeypatch.setitem(statements.CLAIMS, "false", Claim(false_bound, "known wrong"))
    true = truth(i, BETA, lam, i.prior)
    assert true["gap"] > 0.1 * true["rhs"] + 0.05
    bounds = by_name(estimate(wide, BETA, lam))
    assert bounds["false", "rho*"].verdict == "violated"
    assert bounds["theorem1", "rho*"].verdict == "holds"
    assert bounds["false", "rho*"].slack.hi < 0


def test_a_prompter_passed_off_as_rho_star_violates_theorem_1(tmp_path, capsys):
    """On two responses, x itself the best rewrite, the theorem gives away F(ρ*) − E_ρ_sft R and no more."""
    rng = np.random.default_rng(0)
    i = instance(0, shape=(8, 4, 2))
    i.frozen = np.array([[0.2, 0.8], [0.4, 0.6], [0.6, 0.4], [0.9, 0.1]])
    i.reward = np.tile([0.0, 1.0], (8, 1))
    i.own = np.zeros(8, int)
    worst = np.tile([0.0, 0.0, 0.02, 0.98], (8, 1))
    best = i.prior * np.exp(i.reward @ i.frozen.T / LAM)
    best /= best.sum(-1, keepdims=True)
    verdicts = {}
    for name, star in (("worst", worst), ("true", best)):
        path = tmp_path / f"{name}.jsonl"
        rows = simulated_rows(i, rng, Size(80, 40, 20, 4), prompters={"star": star})
        path.write_text("".join(row.line() for row in rows))
        status = main.main(["estimate", str(path), "--beta", "0.5", "--lam", str(LAM), "--json"])
        found = json.loads(capsys.readouterr().out)
        verdicts[name] = (status, found["bounds"][0]["verdict"])
        assert found["bounds"][0]["prompter"] == "star"
    assert verdicts == {"worst": (1, "violated"), "true": (0, "holds")}


def test_a_black_box_gets_what_rewards_allow(rows):
    bare = collect([replace(row, **dict.fromkeys(LOGPS)) for row in rows])
    found = estimate(bare, BETA, LAM)
    bounds = by_name(found)
    assert bounds["theorem1", "rho*"].verdict == "inapplicable"
    assert bounds["theorem1", "rho*"].slack is None
    assert "logp_frozen_rewrite is missing in 2880 of 2880 rows of arm sft" in bounds["theorem1", "rho*"].why
    assert bounds["rewards_only", "rho*"].verdict == "holds"
    assert bounds["trained_rewards_only", "trained"].verdict == "holds"
    assert {"J(pi*)", "TV(pi*, pi_F)", "lambda log Z", "J(rho*)"} <= set(found.quantities)
    assert "TV(pi_F(.|x), pi_F(.|x'))" in found.missing
    full = estimate(collect(rows), BETA, LAM)
    assert found.quantities["lambda log Z"] == full.quantities["lambda log Z"]


def test_one_missing_log_probability_is_not_skipped(rows):
    at = next(i for i, row in enumerate(rows) if row.arm == "sft")
    damaged = [*rows]
    damaged[at] = replace(rows[at], logp_frozen_x=None)
    found = estimate(collect(damaged), BETA, LAM)
    assert "logp_frozen_x is missing in 1 of 2880 rows" in found.missing["TV(pi_F(.|x), pi_F(.|x'))"]


def test_a_file_without_the_reference_says_so(rows):
    found = estimate(collect([row for row in rows if row.arm == "none"]), BETA, LAM)
    assert {b.verdict for b in found.bounds} == {"inapplicable"}
    assert found.bounds[0].why == "arm sft is absent; roll it out"
    assert "J(pi*)" in found.quantities


def test_r_max_that_does_not_enclose_the_range(rollouts):
    assert by_name(estimate(rollouts, BETA, LAM, r_max=2.0))["theorem1", "rho*"].verdict == "holds"
    bound = by_name(estimate(rollouts, BETA, LAM, r_max=0.5))["theorem1", "rho*"]
    assert bound.verdict == "inapplicable"
    assert bound.why == "not so: rewards in [0, r_max]"


def test_degenerate_weights_warn_and_do_not_decide(rollouts):
    found = estimate(rollouts, 0.01, 0.01)
    assert len(found.warnings) == 2
    assert "weights of pi* are degenerate" in found.warnings[0] + found.warnings[1]
    q = found.quantities
    assert q["J(pi*)"].bracket
    assert q["J(pi*)"].hi == 1.0
    assert q["lambda log Z"].bracket
    assert not q["J(none)"].bracket
    assert all(e.lo <= e.value <= e.hi for e in q.values())


def test_inconclusive_says_how_many_prompts_would_settle(rollouts, monkeypatch):
    def nearly(terms):
        true = statements.theorem1(terms)
        shift = replace(true.slack, values=np.full(60, true.slack.values.mean() - 0.005))
        return true._replace(slack=true.slack - shift)

    monkeypatch.setitem(statements.CLAIMS, "nearly", Claim(nearly, "upper bound"))
    bound = by_name(estimate(rollouts, BETA, LAM))["nearly", "rho*"]
    assert bound.verdict == "inconclusive"
    half = bound.slack.value - bound.slack.lo
    assert bound.more_prompts == pytest.approx(60 * (half / 0.005) ** 2 - 60, rel=0.02, abs=2)
    assert f"about {bound.more_prompts} more prompts" in bound.why


def test_seeds_of_a_prompt_stay_together(rows):
    """Twice the same training seed is no more evidence: same prompts, same interval."""
    again = [replace(row, seed=1) for row in rows if row.arm == "trained"]
    once, twice = estimate(collect(rows), BETA, LAM), estimate(collect(rows + again), BETA, LAM)
    a, b = once.quantities["J(trained)"], twice.quantities["J(trained)"]
    assert (b.lo, b.hi) == pytest.approx((a.lo, a.hi))
    assert b.n == 2 * a.n
    assert b.n_clusters == a.n_clusters


def test_unequal_numbers_of_draws_are_estimated(rows):
    fewer = [row for row in rows if not (row.arm == "sft" and int(row.prompt_id) % 2 and row.draw > 9)]
    found = estimate(collect(fewer), BETA, LAM)
    true = truth(instance(3), BETA, LAM, halfway(instance(3), LAM))
    e = found.quantities["lambda log Z"]
    assert abs(e.value - true["lambda log Z"]) <= 1.5 * (e.hi - e.lo)


def test_a_prompt_that_an_arm_lacks_is_named(rows):
    with pytest.raises(AlignProError, match="arm trained: has no rows for prompt_id '7'"):
        estimate(
            collect([row for row in rows if not (row.arm == "trained" and row.prompt_id == "7")]), BETA, LAM
        )


def test_betting_limits_are_wider(rollouts):
    plain = estimate(rollouts, BETA, LAM).quantities["J(sft)"]
    sure = estimate(rollouts, BETA, LAM, interval="guaranteed").quantities["J(sft)"]
    assert "betting" in sure.method
    assert sure.hi - sure.lo > plain.hi - plain.lo


def test_no_interval_leaves_the_range_of_its_quantity(rollouts):
    """Few and skewed prompts: the bootstrap alone would."""
    values = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.9, 0.2])
    assert bootstrap_t(values, 0.95)[1] > 1.0  # the mutant: its limits as they are
    term = Term(values, 0.0, 1.0, frozenset({"none"}), "none", "mean")
    mirrored = replace(term, values=1.0 - values)
    for simultaneous in (False, True):
        found = estimates({"a": term, "b": mirrored}, rollouts, 0.95, simultaneous=simultaneous)
        assert found["a"].hi == 1.0
        assert found["b"].lo == 0.0
        assert 0.0 <= found["a"].lo < found["a"].value < 1.0
    # A mean that lies outside, as one of unbiased estimates may, stays in its interval.
    outside = estimates({"a": replace(term, values=values + 0.5)}, rollouts, 0.95)["a"]
    assert outside.lo <= outside.value == outside.hi


# --- ranges other than [0, 1] -----------------------------------------------------------------------------

RANGES = {(0.0, 2.0): 2.0, (-1.0, 1.0): 2.0, (1.0, 3.0): 3.0}
"""Declared ranges, and Theorem 1's r_max in each."""


def ranged(low, high, beta=BETA, lam=LAM):
    """The same draws with rewards mapped from [0, 1] to [low, high]; β and λ in proportion."""
    i, width = instance(3), high - low
    trained = {"trained": halfway(i, LAM)}
    i.reward = low + width * i.reward
    size = Size(20, 16, 12, 4)
    rollouts = simulate(i, np.random.default_rng(0), size, prompters=trained, reward_range=(low, high))
    return rollouts, width * beta, width * lam


def test_theorem_1_takes_the_upper_end_of_the_range():
    def check(r_max_of):
        for (low, high), r_max in RANGES.items():
            terms = Terms(*ranged(low, high))
            found = statements.theorem1(terms)
            assert found.assumptions == {"rewards in [0, r_max]": True}
            own = statements.theorem1(terms, r_max)
            assert np.array_equal(found.terms["model"].values, own.terms["model"].values)
            r_max = r_max_of(terms)
            for name, tv in (("model", terms.tv_model()), ("prompt_shift", terms.tv_shift())):
                if not np.allclose(found.terms[name].values, r_max * tv.values, rtol=1e-12):
                    return False
            parts = sum(term.values for term in found.terms.values())
            assert parts.mean() == pytest.approx(found.rhs.values.mean(), abs=1e-12)
        return True

    assert check(lambda t: t.high if t.low >= 0 else t.width)
    assert not check(lambda t: t.width)
    assert not check(lambda t: t.high)
    inside = statements.theorem1(Terms(*ranged(1.0, 3.0)), 2.5)
    negative = statements.theorem1(Terms(*ranged(-1.0, 1.0)), 5.0)
    assert [s.assumptions["rewards in [0, r_max]"] for s in (inside, negative)] == [False, False]


@pytest.mark.parametrize("reward_range", RANGES)
@pytest.mark.parametrize("temperatures", [(BETA, LAM), (0.01, 0.01)], ids=["plain", "degenerate"])
def test_units_and_origin_of_the_reward_do_not_matter(reward_range, temperatures):
    """Every number moves with the reward's range as its meaning says, its interval too."""
    low, high = reward_range
    width = high - low
    one = estimate(*ranged(0.0, 1.0, *temperatures))
    other = estimate(*ranged(low, high, *temperatures))

    def moved(e, scale, shift=0.0):
        return pytest.approx([shift + scale * v for v in (e.value, e.lo, e.hi)], rel=1e-9, abs=1e-9)

    def three(e):
        return [e.value, e.lo, e.hi]

    assert list(one.quantities) == list(other.quantities)
    for name, e in one.quantities.items():
        level = name.startswith("J(") or name in ("beta log Z*", "lambda log Z")
        want = moved(e, 1.0) if name.startswith("TV") else moved(e, width, low if level else 0.0)
        assert three(other.quantities[name]) == want, name
        assert other.quantities[name].bracket == e.bracket
    for name, e in one.gaps.items():
        assert three(other.gaps[name]) == moved(e, width), name
    for b, c in zip(one.bounds, other.bounds, strict=True):
        if b.name != "theorem1":
            assert (b.name, b.verdict, b.vacuous) == (c.name, c.verdict, c.vacuous)
            # Its limits are joint with Theorem 1's, whose r_max does not move so.
            assert c.slack.value == pytest.approx(width * b.slack.value)
            for name, term in b.terms.items():
                assert three(c.terms[name]) == moved(term, width)


def test_headroom_and_compare_in_other_units():
    for low, high in RANGES:
        width = high - low
        (one, *_), (other, *_) = ranged(0.0, 1.0), ranged(low, high)
        a, b = headroom(one), headroom(other)
        assert [at.lam for at in b.at] == pytest.approx([width * at.lam for at in a.at])
        assert a.decision == b.decision
        assert b.answer.startswith(b.decision.capitalize())
        for at, scaled in zip(a.at, b.at, strict=True):
            for name in ("over_reference", "net", "over_none"):
                x, y = getattr(at, name), getattr(scaled, name)
                assert [y.value, y.lo, y.hi] == pytest.approx(
                    [width * v for v in (x.value, x.lo, x.hi)], abs=1e-9
                )
        assert b.between.value == pytest.approx(width**2 * a.between.value)
        assert b.ceiling.value == pytest.approx(width * a.ceiling.value)
        x, y = (compare(of, ["none", "trained"]) for of in (one, other))
        assert y.mean["none"].value == pytest.approx(low + width * x.mean["none"].value)
        ours, theirs = x.against["trained"], y.against["trained"]
        assert theirs.variance.value == pytest.approx(width**2 * ours.variance.value)
        assert theirs.win_rate.value == pytest.approx(ours.win_rate.value)
        assert theirs.finding == ours.finding


def test_vacuous_from_the_width_on(monkeypatch):
    """The right side at the width is vacuous; below it is not, however near."""
    for low, high in RANGES:
        rollouts, beta, lam = ranged(low, high)
        for share, vacuous in ((1.0, True), (1.0 - 2**-40, False)):
            gap = Term(np.zeros(20), -9.0, 9.0, frozenset({"none"}), "none", "nothing", reach=(0.0, 0.0))
            known = share * (high - low)
            slack = replace(gap, values=np.full(20, known), reach=(known, known))
            flat = statements.Statement(gap, {"all": slack}, slack, {})
            monkeypatch.setitem(statements.CLAIMS, "flat", Claim(lambda t, flat=flat: flat, "upper bound"))
            (found,) = (b for b in estimate(rollouts, beta, lam).bounds if b.name == "flat")
            assert found.vacuous == vacuous
            assert found.finding == "holds" + ", vacuous" * vacuous


# --- β and λ ----------------------------------------------------------------------------------------------

GOOD = [0.5, 1, np.float32(0.5), np.float64(0.25), np.int64(1), Fraction(1, 4)]
NOT_SO = [0, -1.0, math.nan, math.inf, "1", None, True, np.bool_(True), 1e-19, 1e19, 10**400, np.float32(-1)]


def test_theory_and_estimation_take_the_same_temperatures():
    """The mutant asks for Python's own numbers, as estimation once did."""
    few = simulate(instance(3), np.random.default_rng(0), Size(5, 4, 3, 2), reward_range=(0.0, 1.0))
    estimation = (
        lambda value: estimate(few, value, 0.5).beta,
        lambda value: estimate(few, 0.5, value).lam,
        lambda value: headroom(few, (value,)).at[0].lam,
    )

    def own_numbers(value):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise AlignProError(f"lam {value!r}: must be a positive finite number, in reward units")
        return float(value)

    def answer(way, value):
        try:
            return way(value)
        except AlignProError as error:
            return str(error).split(" ", 1)[1].split(";")[0]

    def same(*ways):
        return all(len({answer(way, value) for way in (theory, *ways)}) == 1 for value in GOOD + NOT_SO)

    def theory(value):
        return check_temperature("lam", value)

    assert same(*estimation)
    assert not same(own_numbers)
    assert {type(answer(theory, value)) for value in GOOD} == {float}
    assert {type(answer(theory, value)) for value in NOT_SO} == {str}


# --- headroom ---------------------------------------------------------------------------------------------


def test_headroom_finds_what_is_there(rollouts):
    found = headroom(rollouts, (LAM,))
    true = truth(instance(3), BETA, LAM, halfway(instance(3), LAM))
    (at,) = found.at
    for e, value in (
        (at.over_reference, true["J(rho*)"] - true["J(sft)"]),
        (at.net, true["lambda log Z"] - true["J(sft)"]),
        (at.over_none, true["J(rho*)"] - true["J(none)"]),
        (found.within, true["within"]),
        (found.between, true["between"]),
    ):
        assert abs(e.value - value) <= 1.5 * (e.hi - e.lo)
    assert list(found.best_of) == [2, 4, 8, 12]
    gains = [e.value for e in found.best_of.values()]
    assert gains == sorted(gains)


def constant(i, reward):
    i.reward = np.broadcast_to(reward, i.reward.shape)
    return i


def test_headroom_answers():
    """A rewrite that always works; rewriting that changes nothing; too little to tell."""
    i = instance(0, shape=(10, 4, 2))
    i.frozen = np.array([[0.99, 0.01]] * 3 + [[0.01, 0.99]])
    i.own, i.prior = np.zeros(10, int), np.full((10, 4), 0.25)
    yes = constant(i, [0.1, 0.9])
    size = Size(60, 16, 16, 4)
    rollouts = simulate(yes, np.random.default_rng(0), size, reward_range=(0, 1))
    assert headroom(rollouts, (0.3, 0.5)).answer.startswith("Yes: a prompter that pools strategies")
    found = headroom(replace(rollouts, strategy=None), (0.3, 0.5))
    assert found.answer.startswith("Yes: at lambda 0.5 the optimal prompter earns +0.4")
    i.frozen = np.array([[0.5, 0.5]] * 4)
    flat = constant(i, [0.4999, 0.5001])
    flat_rollouts = simulate(flat, np.random.default_rng(0), size, reward_range=(0, 1))
    assert headroom(flat_rollouts, (0.8,)).answer.startswith("No: ")
    assert headroom(flat_rollouts, (0.1, 0.8)).answer.startswith("Undecided: nothing drawn earns more than")
    i.frozen = np.random.default_rng(1).dirichlet(np.ones(2), 4)
    vague = constant(i, [0.3, 0.7])
    rollouts = simulate(vague, np.random.default_rng(0), Size(6, 4, 3, 2), reward_range=(0, 1))
    found = headroom(replace(rollouts, strategy=None), (0.2,))
    assert found.answer.startswith("Undecided: ")


def test_headroom_says_what_fine_tuning_adds(rollouts, rows):
    """The gap of Theorem 1, where it is known; and a word for each case. Mutant: no prompter for π*."""
    true = truth(instance(3), BETA, LAM, halfway(instance(3), LAM))
    size = Size(60, 16, 16, 4)

    def drawn(frozen, reward, size=size):
        i = instance(0, shape=(10, 4, 2))
        i.own, i.prior, i.frozen = np.zeros(10, int), np.full((10, 4), 0.25), np.array(frozen)
        return simulate(constant(i, reward), np.random.default_rng(0), size, reward_range=(0, 1))

    alike = [[0.5, 0.5]] * 4
    cases = {
        "Fine-tuning adds to prompting: at beta 0.2": drawn(alike, [0.1, 0.9]),
        "Fine-tuning adds nothing to prompting": drawn(alike, [0.4999, 0.5001]),
        "Whether fine-tuning adds to prompting is open": drawn(alike, [0.45, 0.55], Size(6, 4, 3, 2)),
    }

    def check(module):
        (at,) = module.headroom(rollouts, (LAM,), beta=BETA).at
        assert at.tuned.lo <= true["J(pi*)"] - true["J(rho*)"] <= at.tuned.hi
        for words, drawn in cases.items():
            found = module.headroom(drawn, (0.3, 0.5), beta=0.2)
            assert found.tuning.startswith(words), found.tuning
            assert found.at[0].tuned.lo <= found.at[0].tuned.value <= found.at[0].tuned.hi

    check(headroom_module)
    kills(
        check,
        mutated(headroom_module, "terms.j_pi() - terms.j_rho(lam)", 'terms.j("none") - terms.j_rho(lam)'),
    )
    found = headroom(rollouts, (LAM,))
    assert (found.beta, found.tuning, found.at[0].tuned) == (None, "", None)
    with pytest.raises(AlignProError, match=r"headroom at beta 0\.2: arm none is absent"):
        headroom(collect([row for row in rows if row.arm != "none"]), (LAM,), beta=0.2)
    with pytest.raises(AlignProError, match="beta -1"):
        headroom(rollouts, (LAM,), beta=-1.0)


def test_headroom_needs_two_answers_per_draw(rows):
    single = [row for row in rows if row.answer == 0]
    with pytest.raises(AlignProError, match="headroom: arm sft has a draw with 1 answer; give every rewrite"):
        headroom(collect(single))
    with pytest.raises(AlignProError, match="headroom: arm sft is absent"):
        headroom(collect([row for row in rows if row.arm == "none"]))


# --- compare ----------------------------------------------------------------------------------------------


def test_compare_is_the_paired_analysis(rollouts):
    found = compare(rollouts, ["none", "trained"])
    means = {}
    for arm in ("none", "trained"):
        own = rollouts.rows(arm)
        means[arm] = np.array([rollouts.reward[own & (rollouts.prompt == i)].mean() for i in range(60)])
    difference = means["trained"] - means["none"]
    against = found.against["trained"]
    assert against.mean.value == pytest.approx(difference.mean())
    t = stats.t.interval(0.95, 59, difference.mean(), stats.sem(difference))
    assert (against.mean.lo, against.mean.hi) == pytest.approx(t, abs=0.25 * (t[1] - t[0]))
    won = 0.0
    for i in range(60):
        mine = rollouts.reward[rollouts.rows("trained") & (rollouts.prompt == i)]
        other = rollouts.reward[rollouts.rows("none") & (rollouts.prompt == i)]
        won += ((mine[:, None] > other) + 0.5 * (mine[:, None] == other)).mean() / 60
    assert against.win_rate.value == pytest.approx(won)
    assert against.variance.value == pytest.approx(
        found.variance["trained"].value - found.variance["none"].value
    )


def test_an_arm_against_its_copy_is_even(rows):
    copy = [replace(row, arm="copy", prompter="copy") for row in rows if row.arm == "sft"]
    found = compare(collect(rows + copy), ["sft", "copy", "trained"])
    assert found.against["copy"].mean.value == 0
    assert found.against["copy"].win_rate.value == pytest.approx(0.5)
    assert found.against["copy"].variance.value == pytest.approx(0, abs=1e-12)


def test_total_variance_is_unbiased_and_covers():
    """600 experiments of 20 prompts. The mutant, the variance of all rewards together, is biased down."""
    from alignpro.estimation.compare import _variances
    from alignpro.estimation.intervals import bootstrap_t

    i, n = instance(4), 30
    sims = simulate(i, np.random.default_rng(0), Size(600 * n, 4, 2, 2), reward_range=(0.0, 1.0))
    r = sims.reward[sims.rows("none")].reshape(600, n, 4)
    values = np.array([_variances(one.mean(-1), np.square(one).mean(-1)) for one in r])
    own = i.frozen[i.own]
    mean, square = i.p @ (own * i.reward).sum(-1), i.p @ (own * i.reward**2).sum(-1)
    true = square - mean**2
    error = values.mean(-1).std() / np.sqrt(600)
    assert abs(values.mean() - true) < 4.5 * error  # false alarm 7e-6
    assert r.reshape(600, -1).var(-1).mean() < true
    lo, hi = bootstrap_t(values, 0.95, resamples=1000)
    assert 0.93 <= np.mean((lo <= true) & (true <= hi)) <= 0.99


# --- command line -----------------------------------------------------------------------------------------


def test_verbs_print_tables_and_strict_json(file, tmp_path, capsys):
    verbs = {
        "estimate": (["--beta", str(BETA), "--lam", str(LAM)], "gap <= rhs"),
        "headroom": (["--lam", str(LAM), "0.5"], "the optimal prompter's gain"),
        "compare": (["--arms", "none", "sft", "trained", "rlhf"], "win rate"),
    }
    for verb, (options, said) in verbs.items():
        out = tmp_path / "new" / verb
        assert main.main([verb, str(file), *options, "--out", str(out)]) == 0
        assert said in capsys.readouterr().out
        assert main.main([verb, str(file), *options, "--json"]) == 0
        line = capsys.readouterr().out
        assert line.count("\n") == 1
        found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert found == json.loads((out / f"{verb}.json").read_text())


BAD = {
    "gone": (["estimate", "gone.jsonl", "--beta", "1", "--lam", "1"], "gone.jsonl: cannot read it"),
    "beta": (["estimate", "FILE", "--beta", "0", "--lam", "1"], "beta 0.0: must be a positive finite number"),
    "lam": (["estimate", "FILE", "--beta", "1", "--lam", "inf"], "lam inf: must be a positive finite"),
    "level": (["compare", "FILE", "--arms", "none", "sft", "--level", "95"], "level 95.0: must lie between"),
    "arm": (
        ["compare", "FILE", "--arms", "none", "sfd"],
        "--arms sfd: is no arm here; give some of none, sft",
    ),
    "one arm": (["compare", "FILE", "--arms", "none"], "--arms none: compare at least two"),
    "twice": (["compare", "FILE", "--arms", "none", "none"], "--arms none: is named twice"),
    "headroom lam": (["headroom", "FILE", "--lam", "-1"], "lam -1.0: must be a positive finite number"),
    "out": (["headroom", "FILE", "--out", "FILE"], "--out "),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_get_one_line_and_status_2(case, file, capsys):
    arguments, message = BAD[case]
    assert main.main([str(file) if a == "FILE" else a for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"alignpro: error: {message}")
    assert said.err.count("\n") == 1


def test_verbs_wait_for_no_numbers_and_estimation_for_neither_jax_nor_torch():
    code = (
        "import sys, importlib\n"
        "for v in ('estimate', 'headroom', 'compare'): importlib.import_module(f'alignpro.commands.{v}')\n"
        "loaded = lambda: [m for m in ('numpy', 'jax', 'torch', 'scipy') if m in sys.modules]\n"
        "print(loaded())\n"
        "import alignpro.estimation\n"
        "print(loaded())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n['numpy']\n"
