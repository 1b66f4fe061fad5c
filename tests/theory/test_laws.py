"""Laws of the reward: W1 by SciPy, the identity with Δ1, and what is not true of every reading at once."""

import numpy as np
import pytest
from mutants import kills, mutated
from scipy.stats import wasserstein_distance

from alignpro.theory import divergences
from alignpro.theory.bounds import BOUNDS, IDENTITIES, WRONG_BOUNDS, check
from alignpro.theory.divergences import wasserstein
from alignpro.theory.families import draw, random_prompters
from alignpro.theory.instance import Instance
from alignpro.theory.solution import solution


@pytest.mark.parametrize("size", [1, 2, 7, 60])
def test_w1_is_scipys(size):
    """With ties and zeros, of few responses (each against each) and of many (sorted)."""
    rng = np.random.default_rng(size)
    p, q = rng.dirichlet(np.full(size, 0.3), size=(2, 40))
    values = np.round(rng.normal(size=(40, size)), 1)

    def check_all(function):
        for a, b, v, found in zip(p, q, values, function(values, p, q), strict=True):
            np.testing.assert_allclose(found, wasserstein_distance(v, v, a, b), rtol=1e-11, atol=1e-14)

    check_all(wasserstein)
    if size > 1:
        slip = (
            ("(other <= v", "(other < v")
            if size <= divergences._SORTED
            else ("[:, :-1]) * steps", "[:, 1:]) * steps")
        )
        kills(check_all, mutated(divergences, *slip).wasserstein)
        kills(check_all, lambda v, a, b: 0.5 * wasserstein(v, a, b))


def test_ties_count_once():
    found = wasserstein(np.array([[0.0, 0.0, 1.0, 1.0]]), np.array([[0.5, 0.5, 0, 0]]), np.full((1, 4), 0.25))
    assert found == 0.5


def rows(instance, rho, beta):
    """π*, π_F(·|x), π_ρ_sft and π_ρ of the first prompt, in plain NumPy."""
    own, r = instance.frozen[instance.own[0]], instance.reward[0]
    tilted = own * np.exp((r - r.max()) / beta)
    return tilted / tilted.sum(), own, instance.prior[0] @ instance.frozen, rho[0] @ instance.frozen


def test_every_lipschitz_reading_at_once():
    """E_π* f − E_π_ρ_sft f ≤ Δ1 + W1 and E_π* f − E_π_ρ f ≤ W1(π*, π_ρ), for clipped, bent and reversed
    rewards."""
    rng = np.random.default_rng(2)

    def check_all(scale):
        for instance in draw("independent", 4, (1, 4, 6), 60):
            rho, beta = random_prompters(rng, instance.prior), 10.0 ** rng.uniform(-2, 1)
            s = solution(instance, beta, 0.3, rho)
            star, _, reference, induced = rows(instance, rho, beta)
            r = instance.reward[0]
            knots = rng.uniform(size=8)
            for f in (
                r,
                -r,
                np.minimum(r, 0.5),
                np.abs(r - 0.4),
                np.sin(r),
                *(np.minimum(r, k) for k in knots),
            ):
                to_reference, to_rho = (star - reference) @ f, (star - induced) @ f
                assert to_reference <= scale * float(s.delta1[0] + s.law_shift[0]) + 1e-12
                assert to_rho <= scale * float(s.law_induced[0]) + 1e-12

    check_all(1.0)
    kills(check_all, 0.5)


def test_less_jeffreys_is_of_the_reward_alone():
    """f = 0 is 1-Lipschitz, and Δ1 + W1 − λ Jeff is negative here: it is no bound for every reading of ρ*."""
    instance = Instance([1.0], [[0.9, 0.1]], [[1.0, 0.0], [0.0, 1.0]], [0], [[0.0, 1.0]])
    found = check(instance, 1.0, 0.05, "law")
    assert found.rhs == pytest.approx(0.1 - 0.9, abs=1e-6)
    assert found.verdict == "holds"
    assert found.gap < found.rhs < 0


def test_laws_see_what_texts_hide():
    """Texts with nothing in common, of the same rewards: every TV is 1, and W1 is 0."""
    texts = Instance([1.0], [[0.0, 1.0]], [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], [0], [[0.0, 1.0, 0.0, 1.0]])
    far, near = check(texts, 1.0, 1.0, "combined"), check(texts, 1.0, 1.0, "law")
    assert far.vacuous
    assert near.terms["prompt_shift"] == 0
    assert near.rhs == pytest.approx(near.gap, abs=1e-14)
    assert check(texts, 1.0, 1.0, "induced_law").rhs == pytest.approx(near.gap, abs=1e-14)


def test_equal_where_answers_to_x_are_better_at_every_level():
    """Then the whole of W1 is needed, and half of it is refuted."""
    instance = Instance([1.0], [[0.0, 1.0]], [[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]], [0], [[0.0, 0.4, 1.0]])
    s = solution(instance, 0.5, 0.5)
    for claim, sign in ((BOUNDS["law"], 0), (WRONG_BOUNDS["law_half"], -1), (IDENTITIES["model_law"], 0)):
        found = claim(s)
        slack, error = float(found.rhs - found.lhs), float(found.error)
        assert slack < -error if sign else abs(slack) <= error


def test_laws_are_proved():
    from alignpro.theory.proof.certify import certify

    equal = Instance([1.0], [[0.0, 1.0]], [[0.25, 0.75], [0.5, 0.5]], [0], [[0.0, 1.0]])
    for name in ("law", "model_law"):
        found = certify(equal, "1/2", "1/3", name)
        assert (found.verdict, found.slack) == ("holds", "0"), name
    assert certify(equal, "1/2", "1/3", "law_half").verdict == "violated"
    assert certify(equal, "1/2", "1/3", "induced_law", np.array([[0.0, 1.0]])).verdict == "holds"
