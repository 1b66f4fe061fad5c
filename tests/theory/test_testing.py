"""The strategies give valid objects, meet the awkward ones, and shrink to what one can read."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.errors import AlignProError
from alignpro.theory.instance import KEYS, Instance, normalise
from alignpro.theory.testing import (
    chains,
    counterexample,
    instances,
    policies,
    probabilities,
    problems,
    prompters,
    rewards,
    temperatures,
)

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def first(strategy, feature, tries=1000):
    """The simplest value with a feature; fails where there is none."""
    found = counterexample(lambda value: not feature(value), strategy, tries=tries)
    assert found is not None
    return found[0]


FEATURES = {
    "zeros in P": lambda i: (i.p == 0).any(),
    "zeros in the prior": lambda i: ((i.prior == 0).any(-1) & ((i.prior > 0).sum(-1) > 1)).any(),
    "zeros in the model": lambda i: ((i.frozen == 0).any(-1) & ((i.frozen > 0).sum(-1) > 1)).any(),
    "full support": lambda i: i.shape == (1, 2, 2) and all((a > 0).all() for a in (i.p, i.prior, i.frozen)),
    "point masses": lambda i: i.prior.shape[1] > 1 and (i.prior.max(-1) == 1).all(),
    "nearly certain": lambda i: ((i.frozen > 0) & (i.frozen < 1e-9)).any(),
    "tied rewards": lambda i: i.shape[2] == 3 and len(np.unique(i.reward)) == 2,
    "near ties": lambda i: (lambda d: ((d > 0) & (d < 1e-8)).any())(np.diff(np.sort(i.reward), axis=-1)),
    "distinct rewards": lambda i: i.shape[2] == 3 and len(np.unique(i.reward[0])) == 3,
    "signed rewards": lambda i: i.reward.min() < 0 < i.reward.max(),
    "X < K": lambda i: i.shape[0] < i.shape[1],
    "X > K": lambda i: i.shape[0] > i.shape[1],
    "shared own rows": lambda i: i.shape[0] == 2 and i.own[0] == i.own[1] > 0,
    "own out of reach": lambda i: i.prior[0, i.own[0]] == 0,
    "unreachable responses": lambda i: (((i.prior > 0) @ (i.frozen > 0)) == 0).any(),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_instances_meet_the_awkward_cases(feature):
    found = first(instances(2, 3, 3, low=-1.0), FEATURES[feature])
    assert FEATURES[feature](found)


def test_options_exclude_what_they_say():
    bland = instances(2, 3, 3, zeros=False, extremes=False, own="distinct")
    bad = {
        "zeros": lambda i: min(a.min() for a in (i.p, i.prior, i.frozen)) > 0,
        "extremes": lambda i: min(a.min() for a in (i.p, i.prior, i.frozen)) >= 1 / 27,
        "range": lambda i: 0 <= i.reward.min() <= i.reward.max() <= 1,
        "own": lambda i: len(set(i.own.tolist())) == i.shape[0],
    }
    assert counterexample(lambda i: all(good(i) for good in bad.values()), bland, tries=300) is None
    for good in bad.values():
        # The same properties are false of what is drawn by default.
        assert counterexample(good, instances(2, 3, 3, low=-1.0), tries=1000) is not None


@few
@given(instances(3, 4, 2, low=-5.0, high=3.0), st.data())
def test_only_valid_objects(instance, data):
    assert isinstance(instance, Instance)
    x, k, y = instance.shape
    assert x <= 3
    assert k <= 4
    assert y <= 2
    again = Instance(*(np.array(getattr(instance, key)) for key in KEYS))
    for key in KEYS:  # validation left every digit as it was drawn
        np.testing.assert_array_equal(getattr(again, key), getattr(instance, key))
    assert -5 <= instance.reward.min() <= instance.reward.max() <= 3
    for rho in (data.draw(prompters(instance)), data.draw(prompters(instance, zeros=False))):
        np.testing.assert_array_equal(normalise(rho), rho)
        assert not rho[instance.prior == 0].any()
    assert (rho > 0).tolist() == (instance.prior > 0).tolist()


@few
@given(problems(2, 3, 2, temperature=(1e-2, 1e2)))
def test_problems_hold_together(problem):
    instance, beta, lam, rho = problem
    assert 1e-2 <= min(beta, lam) <= max(beta, lam) <= 1e2
    assert rho.shape == instance.prior.shape
    assert not rho[instance.prior == 0].any()


@few
@given(chains(3, 2, 3, 2))
def test_chains_compose_to_the_reference(chain):
    stages, instance = chain
    sizes = [stages[0].shape[0], *(stage.shape[1] for stage in stages)]
    assert (sizes[0], sizes[-1]) == instance.shape[:2]
    for stage, rows in zip(stages, sizes[:-1], strict=True):
        assert stage.shape[0] == rows
        np.testing.assert_allclose(stage.sum(-1), 1, rtol=1e-14)
    product = stages[0]
    for stage in stages[1:]:
        product = product @ stage
    np.testing.assert_allclose(instance.prior, product, rtol=1e-12, atol=1e-15)


def test_chains_of_every_length():
    for length in (1, 2, 3):
        stages, instance = first(chains(3), lambda c, length=length: len(c[0]) == length)
        assert [s.shape for s in stages] == [(1, 1)] * length
        assert instance.shape == (1, 1, 1)
    assert first(chains(2), lambda c: any((s == 0).any() for s in c[0]))


def test_shrinks_to_the_smallest_shape_and_the_shortest_numbers():
    simplest = first(instances(), lambda i: True)
    assert simplest.shape == (1, 1, 1)
    assert simplest.reward.tolist() == [[0.0]]
    spread = first(instances(3, 3, 3), lambda i: (i.frozen[0] > 0).all() and np.ptp(i.reward) > 0.2)
    assert spread.shape in ((1, 1, 2), (2, 1, 1))
    assert spread.reward.tolist() in ([[0, 1]], [[1, 0]], [[0], [1]], [[1], [0]])
    both = first(instances(3, 3, 3), lambda i: i.shape[1] == 2 and i.own[0] == 1 and i.prior[0, 1] > 0.3)
    assert both.shape == (1, 2, 1)
    assert both.prior.tolist() in ([[0.0, 1.0]], [[0.5, 0.5]])
    # Any one prompt can be left out, the first too.
    assert first(instances(3, 2, 2), lambda i: (i.own == 1).any()).shape == (1, 2, 1)
    assert first(probabilities(3), lambda p: 0 < p[0] < p[1] < p[2]).tolist() == [1 / 6, 2 / 6, 3 / 6]
    assert first(probabilities(2, zeros=False), lambda p: True).tolist() == [0.5, 0.5]
    assert first(policies(2, 2), lambda p: (p > 0).all()).tolist() == [[0.5, 0.5]] * 2
    assert first(rewards((2,)), lambda r: 0.2 < r[0] < r[1] < 0.9).tolist() == [0.3, 0.4]
    assert first(rewards((1,), 3.0, 7.0), lambda r: r[0] > 3).tolist() == [7.0]
    assert first(rewards((2, 1), 2.0, 2.0), lambda r: True).tolist() == [[2.0], [2.0]]
    assert first(temperatures(), lambda t: True) == 1.0
    assert first(temperatures(), lambda t: 5 < t < 50) in (6.0, 10.0)


def test_temperatures_cover_their_range():
    for low, high in ((1e-6, 1e-5), (1e5, 1e6), (0.4, 0.6)):
        assert low <= first(temperatures(), lambda t, low=low, high=high: low <= t <= high) <= high
    assert counterexample(lambda t: 0.3 <= t <= 40, temperatures(0.3, 40.0)) is None


def test_a_search_repeats_and_reports_nothing_found():
    # Tried, not shrunk: what is drawn must depend on the seed alone.
    def drawn(seed):
        seen = []
        counterexample(lambda i: seen.append(i.reward.tobytes()) or True, instances(), seed=seed, tries=20)
        return seen

    assert drawn(0) == drawn(0) != drawn(1)
    assert counterexample(lambda i: True, instances(), tries=20) is None
    assert counterexample(lambda i, t: t < 10, instances(), temperatures())[1] == 10.0


BAD = {
    "n": (lambda: probabilities(0), "n 0: give a size of at least 1"),
    "rows": (lambda: policies(0, 2), "rows 0: give a size"),
    "ends": (lambda: rewards((2,), 1.0, 0.0), "low 1.0, high 0.0: give finite rewards with low <= high"),
    "infinite": (lambda: instances(low=-np.inf), "low -inf, high 1.0: give finite rewards"),
    "temperature": (lambda: temperatures(0.0, 1.0), "low 0.0, high 1.0: give positive finite temperatures"),
    "no digit": (lambda: temperatures(1.1, 1.2), "low 1.1, high 1.2: no digit times a power of ten"),
    "size": (lambda: instances(max_k=0), "K 0: give a size of at least 1"),
    "shape": (lambda: instances(shape=(1, 1, 0)), "Y 0: give a size of at least 1"),
    "own": (lambda: instances(own="mine"), "own 'mine': is unknown; give 'any' or 'distinct'"),
    "distinct": (lambda: instances(3, 2, own="distinct"), "own 'distinct' with X 3 and K 2: give K"),
    "stages": (lambda: chains(0), "max_stages 0: give a size"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_told_at_once(case):
    call, message = BAD[case]
    with pytest.raises(AlignProError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_without_hypothesis_there_is_one_line_with_the_remedy():
    script = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from alignpro.commands import main as cli\n"
        "sys.exit(cli.main(['hunt', 'theorem1']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "alignpro: error: alignpro.theory.testing: the package hypothesis is missing; "
        "run pip install 'alignpro[testing]'\n"
    )
