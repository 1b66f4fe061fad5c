"""Arithmetic of per-prompt terms: ranges, biases and brackets of sums, differences and negatives."""

import itertools
from dataclasses import fields, replace

import numpy as np
import pytest
from estimate_oracle import instance

from alignpro.estimation import paired, terms
from alignpro.estimation.paired import Term, estimates
from alignpro.estimation.simulate import Size, simulate
from alignpro.estimation.terms import LEAST_ESS, MOST_NOISE, MOST_NOISE_UNCORRECTED, Terms

RNG = np.random.default_rng(0)


def term(bias="none", low=0.0, high=1.0, weak=False, ess=None):
    values = RNG.uniform(size=7)
    ends = (values - RNG.uniform(size=7), values + RNG.uniform(size=7)) if weak else (None, None)
    return Term(values, low, high, frozenset({"none"}), bias, "mean", *ends, ess)


BIASES = ("none", "up", "down", "unknown")
SUMS = {
    ("up", "up"): "up",
    ("down", "down"): "down",
    ("up", "down"): "unknown",
    ("unknown", "up"): "unknown",
    ("unknown", "down"): "unknown",
    ("unknown", "unknown"): "unknown",
    **{("none", bias): bias for bias in BIASES},
}


def test_the_bias_of_a_sum_is_known_only_where_both_agree():
    turned = {"none": "none", "up": "down", "down": "up", "unknown": "unknown"}

    def check(add, subtract):
        pairs = [(a, b, SUMS.get((a, b)) or SUMS[b, a]) for a, b in itertools.product(BIASES, repeat=2)]
        return all(
            add(term(a), term(b)).bias == subtract(term(a), term(turned[b])).bias == want
            for a, b, want in pairs
        )

    def first_known(a, b):
        return replace(a + b, bias=a.bias if a.bias != "none" else b.bias)

    assert check(Term.__add__, Term.__sub__)
    assert not check(first_known, lambda a, b: first_known(a, -b))  # opposite biases called known
    assert not check(Term.__add__, Term.__add__)  # what is subtracted not turned over


def test_brackets_of_a_difference_take_the_other_end():
    a, b, exact = term(weak=True), term(weak=True), term()
    assert np.array_equal((a - b).lower, a.lower - b.upper)
    assert np.array_equal((a - b).upper, a.upper - b.lower)
    assert not np.array_equal((a - b).lower, a.lower - b.lower)  # the mutant
    assert np.array_equal((a - exact).lower, a.lower - exact.values)
    assert np.array_equal((exact - a).lower, exact.values - a.upper)
    assert (exact + exact).lower is None
    shifted = term(low=-1.0, high=3.0)
    assert ((exact - shifted).low, (exact - shifted).high) == (-3.0, 2.0)
    assert ((exact + shifted).low, (2.0 * shifted).high) == (-1.0, 6.0)
    assert (term(ess=9.0) + term(ess=3.0)).ess == (term(ess=3.0) - term()).ess == 3.0


def test_a_term_turned_over_has_its_interval_turned_over(rollouts):
    """Subtracted terms are estimated as they are, with their sign."""
    for t in (term("up"), term("down", weak=True), term(weak=True, ess=2.0)):
        turned = -t
        again = -turned
        assert all(np.array_equal(getattr(t, f.name), getattr(again, f.name)) for f in fields(Term))
        for joint in (False, True):
            found = estimates({"t": t, "-t": -t}, rollouts, 0.95, simultaneous=joint)
            one, other = found["t"], found["-t"]
            assert (other.value, other.lo, other.hi) == (-one.value, -one.hi, -one.lo)
            assert other.bias == paired._FLIP[one.bias]


def test_a_difference_is_in_doubt_where_a_side_is(rollouts):
    """All of 7 prompts earn 0, as most do; noise of the other arm makes the difference look well."""
    rare = replace(term(), values=np.zeros(7))
    noise = replace(rare, values=0.5 + 0.3 * np.linspace(-1.0, 1.0, 7))
    alone = estimates({"d": rare - noise}, rollouts, 0.95)["d"]
    found = estimates({"d": rare - noise, "n": noise}, rollouts, 0.95, sides={"d": (rare, noise)})
    assert "percentile-t" in alone.method  # the mutant
    assert "betting" in found["d"].method
    assert "percentile-t" in found["n"].method


def test_a_term_near_the_end_of_its_own_range_is_in_doubt(rollouts):
    """A variance of nearly all that it can be, of pseudo-values that may reach further."""
    values = 0.249 + 0.002 * np.linspace(-1.0, 1.0, 7)
    near = replace(term(), values=values, low=0.0, high=0.25, reach=(0.0, 1.0))
    found = estimates({"near": near, "far": replace(near, values=values - 0.1)}, rollouts, 0.95)
    assert "betting" in found["near"].method
    assert "percentile-t" in found["far"].method
    assert "percentile-t" in estimates({"near": replace(near, high=1.0)}, rollouts, 0.95)["near"].method


@pytest.fixture(scope="module")
def rollouts():
    return simulate(instance(3), np.random.default_rng(0), Size(7, 4, 24, 6), reward_range=(0.0, 1.0))


def fewer(rollouts, answers):
    keep = rollouts.answer < answers
    names = ("prompt", "arm", "seed", "draw", "answer", "reward", "refused")
    return replace(
        rollouts,
        **{name: getattr(rollouts, name)[keep] for name in names},
        logps={name: values[keep] for name, values in rollouts.logps.items()},
    )


@pytest.mark.parametrize(("answers", "most"), [(3, MOST_NOISE_UNCORRECTED), (4, MOST_NOISE), (6, MOST_NOISE)])
def test_noise_is_too_much_above_its_threshold(answers, most, rollouts, monkeypatch):
    """λ a little above and below where the noise of log-weights is `most`; the warning's remedy suffices."""
    given = fewer(rollouts, answers)
    noise = float(np.mean(Terms(given, 1.0, 1.0)._star(1.0)[0].noise))  # falls as 1/λ²

    def weak_below_alone():
        found = []
        for share in (0.99, 1.01):
            lam = share * np.sqrt(noise / most)
            terms_ = Terms(given, 1.0, float(lam))
            weights = terms_._star(float(lam))[1]
            assert weights.ess > LEAST_ESS
            found.append(weights.weak)
            assert weights.weak == bool(terms_.warnings)
        return found == [True, False]

    assert weak_below_alone()
    for name in ("MOST_NOISE", "MOST_NOISE_UNCORRECTED"):
        decides = getattr(terms, name) == most
        with monkeypatch.context() as mutant:
            mutant.setattr(terms, name, 2 * getattr(terms, name))
            assert weak_below_alone() == (not decides)


def test_the_answers_that_a_warning_asks_for_suffice(rollouts):
    lam = 0.03
    found = Terms(rollouts, 1.0, lam)
    star, weights = found._star(lam)
    assert weights.weak
    (warning,) = found.warnings.values()
    asked = int(warning.split("about ")[1].split()[0])
    per_answer = float(np.mean(star.noise)) * (6 - 1)
    assert per_answer / (asked - 1) <= MOST_NOISE < per_answer / (asked - 3)
