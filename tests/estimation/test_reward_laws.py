"""Laws of the reward from samples: the distance, its radius, and limits that hold at every n."""

import numpy as np
import pytest
from mutants import kills, mutated
from scipy.stats import wasserstein_distance

from alignpro.errors import AlignProError
from alignpro.estimation import laws


def test_distance_is_scipys():
    """Of unequal sizes and with ties."""
    rng = np.random.default_rng(0)
    ours, theirs = (np.round(rng.uniform(size=(30, n)), 1) for n in (7, 11))

    def check(function):
        for a, b, found in zip(ours, theirs, function(ours, theirs), strict=True):
            np.testing.assert_allclose(found, wasserstein_distance(a, b), rtol=1e-12, atol=1e-14)

    check(laws.distance)
    kills(check, mutated(laws, "-1 / theirs.shape[-1]", "-1 / ours.shape[-1]").distance)
    kills(check, lambda a, b: abs(a.mean(-1) - b.mean(-1)))


def test_the_radius_is_massarts():
    """√(log(2/α)/2n), exceeded by a coin's W1 less often than α."""
    assert laws.radius(50, 2.0, 0.95) == pytest.approx(2 * np.sqrt(np.log(40) / 100))
    assert laws.radius(50, 2.0, 0.95, 4) == pytest.approx(2 * np.sqrt(np.log(160) / 100))
    rng, grid = np.random.default_rng(1), (np.arange(4000) + 0.5) / 4000
    drawn = rng.integers(2, size=(1000, 12)).astype(float)  # a fair coin: W1 is |share − ½|
    off = laws.distance(drawn, np.tile(grid > 0.5, (1000, 1)).astype(float))

    def check(radius):
        assert (off > radius(12, 1.0, 0.8)).mean() <= 0.2

    check(laws.radius)
    kills(check, mutated(laws, "(2 * n)", "(8 * n)").radius)
    with pytest.raises(AlignProError, match="level"):
        laws.radius(12, 1.0, 1.5)


@pytest.mark.parametrize("prompts", [5, 40])
@pytest.mark.parametrize("copied", [False, True])
def test_limits_cover_whatever_the_answers_share(prompts, copied):
    """100 experiments on laws that cross or are rare, answers independent or copies of one: 95% or more."""
    rng = np.random.default_rng(prompts)
    missed, widths = 0, []
    for _ in range(100):
        odds = rng.choice([0.01, 0.5], size=(prompts, 1))
        sizes = ((prompts, 1), (prompts, 6)) if copied else ((prompts, 6), (prompts, 6))
        ours = np.broadcast_to(rng.uniform(size=sizes[0]) < odds, (prompts, 6)).astype(float)
        theirs = rng.uniform(0.4, 0.6, size=sizes[1])
        lo, hi = laws.shift_limits(list(ours), list(theirs), 1.0, 0.95)
        # A coin that is 1 with probability p against the uniform law on [.4, .6], area by area.
        true = np.mean([0.4 + 0.1 * ((1 - p) ** 2 + p**2) for p in (0.01, 0.5)])
        missed += not lo <= true <= hi
        widths.append(hi - lo)
    assert missed <= 5 + 3 * np.sqrt(100 * 0.05 * 0.95)
    assert min(widths) > 0
