"""What is sure under a wrong reward, the λ for it, and a few rewrites in the best mixture's place."""

import itertools

import jax
import mpmath
import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.theory import Instance
from alignpro.theory.families import FAMILIES, draw, take
from alignpro.theory.proof import resampling as proof
from alignpro.theory.results import few_rewrites, floor, robust_lam

SHAPE = (2, 4, 3)
every = jax.jit(floor)
few = jax.jit(few_rewrites, static_argnames="most")


def rewards(i):
    return np.asarray(i.reward) @ np.asarray(i.frozen).T


def test_the_floor_is_the_least_of_all_errors_of_that_width():
    """Against errors at all corners, and random ones between; bounds below it; every wrong R̃ does better."""
    rng = np.random.default_rng(0)

    def check(bound):
        for seed, family in enumerate(("independent", "peaked", "signed", "adversarial")):
            i = draw(family, seed, SHAPE)[0]
            lam, delta = 10.0 ** rng.uniform(-1.5, 0.5), rng.uniform(0.05, 0.8)
            found, r = bound(i, lam, delta), rewards(i)
            for x in range(len(i.p)):
                inside = np.asarray(i.prior)[x] > 0
                prior, row = np.asarray(i.prior)[x][inside], r[x][inside]
                width = delta * np.ptp(row)

                def earned(error, prior=prior, row=row, lam=lam):
                    g = prior * np.exp((row - row.max() + error) / lam)
                    return g @ row / g.sum()

                corners = [earned(width * np.array(c)) for c in itertools.product((0, 1), repeat=len(row))]
                assert float(found.floor[x]) == pytest.approx(min(corners), abs=1e-12)
                assert all(
                    earned(width * rng.uniform(size=len(row))) >= float(found.floor[x]) - 1e-12
                    for _ in range(20)
                )
                assert float(found.reward[x]) == pytest.approx(earned(0.0), abs=1e-12)
            assert (found.by_tv <= found.floor + 1e-12).all()
            assert (found.by_value <= found.floor + 1e-12).all()

    check(every)
    kills(check, lambda i, lam, d: every(i, lam, d / 2))
    kills(check, lambda i, lam, d: every(i, lam, d)._replace(by_tv=every(i, lam, d).reward))


def test_both_bounds_below_the_floor_are_sharp():
    """Two rewrites of the worst odds attain `by_tv`; as λ → 0 `by_value` is max R − δ span, and attained."""
    lam, delta = 0.3, 0.5
    tilted = 1 / (1 + np.exp(delta / (2 * lam)))
    g = np.array([tilted, (1 - tilted) * np.exp(-1 / lam), 0.0, 0.0])
    rows = np.eye(3)[[0, 1, 2, 2]]

    def padded(prior, worth):
        return Instance([1.0, 0.0], [prior] * 2, rows, [0, 0], [worth] * 2)

    found = every(padded(g / g.sum(), [0.0, 1.0, 0.0]), lam, delta)
    assert float(found.by_tv[0]) == pytest.approx(float(found.floor[0]), abs=1e-12)
    cold = every(padded([0.2, 0.3, 0.5, 0.0], [0.0, 0.500001, 1.0]), 1e-9, 0.5)
    assert float(cold.by_value[0]) == pytest.approx(0.5, abs=1e-6)
    assert float(cold.floor[0]) == pytest.approx(0.5, abs=1e-5)
    assert float(cold.by_tv[0]) == pytest.approx(0.0, abs=1e-6)


def test_the_best_lam_is_no_worse_than_any_other():
    i = draw("independent", 3, SHAPE)[0]
    grid = [every(i, float(lam), 0.4) for lam in 10.0 ** np.linspace(-3, 3, 60)]

    def check(found, one):
        for bound in ("floor", "by_tv", "by_value"):
            values = np.stack([np.asarray(getattr(at, bound)) for at in grid])
            best, rows = found(i, 0.4, bound=bound), one(i, 0.4, bound=bound)
            assert float(best.value) >= (values @ np.asarray(i.p)).max() - 1e-6
            assert (np.asarray(rows.value) >= values.max(0) - 1e-6).all()
            # A lower bound it is, at that λ.
            again = getattr(every(i, float(best.lam), 0.4), bound)
            assert float(best.value) == pytest.approx(float(np.asarray(i.p) @ np.asarray(again)), rel=1e-12)
            assert float(np.asarray(i.p) @ np.asarray(rows.value)) >= float(best.value) - 1e-6

    def rowwise(*a, **k):
        return robust_lam(*a, per_prompt=True, **k)

    check(robust_lam, rowwise)
    kills(lambda f: check(f, rowwise), lambda i, d, bound: robust_lam(i, 2 * d, bound=bound))
    flat = Instance(i.p, i.prior, i.frozen, i.own, np.ones((2, 3)))
    for call, match in (
        (lambda: robust_lam(flat, 0.1), "worth the same"),
        (lambda: robust_lam(i, -0.1), r"delta -0\.1: must be at least 0"),
        (lambda: few_rewrites(i, 0.1, 0), "most 0: must be an integer"),
    ):
        with pytest.raises(AlignProError, match=match):
            call()


def test_floors_are_proved_in_balls():
    i = draw("independent", 3, SHAPE)[0]

    def check(certified):
        for x in range(2):
            prior, r = np.asarray(i.prior)[x], rewards(i)[x]
            found, close = certified(prior, r, "1/5", "1/3"), every(i, 0.2, 1 / 3)
            for c, name in zip(found, ("by_tv", "by_value"), strict=True):
                assert c.verdict == "holds"
                slack = float(close.floor[x] - getattr(close, name)[x])
                assert c.slack_lower - 1e-12 <= slack <= c.slack_upper + 1e-12

    check(proof.certified_floor)
    kills(check, mutated(proof, "(u / 4).tanh()", "(u / 8).tanh()").certified_floor)
    with pytest.raises(AlignProError, match="positive numbers"):
        proof.certified_floor(np.array([0.0, 1.0]), np.zeros(2), 1.0, 0.1)


OWN = np.array([0.1, 0.2, 0.3, 0.4])
CORNERS = Instance(
    [1.0, 0.0], np.full((2, 5), 0.2), np.vstack([np.eye(4), OWN]), [4, 4], [-0.7 * np.log(OWN)] * 2
)
"""At β = 0.7 its π* is uniform over the four answers that rewrites give one each."""


def kl(p, q):
    inside = p > 0
    return float(sum(a * mpmath.log(a / b) for a, b in zip(p[inside], q[inside], strict=True)))


def optimum(i, beta, x):
    own = np.asarray(i.frozen)[i.own[x]]
    star = own * np.exp((np.asarray(i.reward)[x] - np.asarray(i.reward)[x].max()) / beta)
    return star / star.sum()


def test_a_few_rewrites_are_near_the_best_mixture():
    """Every mixture of m equal parts, enumerated: the best within the bound, the greedy within its own."""
    rng = np.random.default_rng(1)
    cases = [(i, 10.0 ** rng.uniform(-1, 1)) for family in ("independent", "lm_like")
             for i in [take(FAMILIES[family](rng, 1, (2, 5, 4)), 0)]]  # fmt: skip
    # Rewrites that answer one thing each, and a mixture between: no single one is near.
    cases.append((CORNERS, 0.7))

    def check(few):
        tight = 0.0
        for i, beta in cases:
            found = few(i, beta, 5)
            frozen = np.asarray(i.frozen)
            for x in range(len(i.p)):
                star = optimum(i, beta, x)
                assert float(found.single[x]) == pytest.approx(
                    min(kl(row, star) for row in frozen), abs=1e-12
                )
                least = float(found.mixture[x] - found.gap[x])
                for m in range(1, 6):
                    best = min(
                        kl(frozen[list(c)].mean(0), star)
                        for c in itertools.combinations_with_replacement(range(5), m)
                    )
                    mixed = frozen[np.asarray(found.chosen)[x, :m]].mean(0)
                    greedy = float(found.loss[x, m - 1])
                    assert greedy == pytest.approx(kl(mixed, star), abs=1e-12)
                    bound = float(found.mixture[x]) + np.log1p(float(found.spread[x]) / m)
                    assert least <= best <= min(bound, greedy) + 1e-12
                    assert bound == pytest.approx(float(found.bound[x, m - 1]))
                    assert greedy <= float(found.greedy_bound[x, m - 1]) + 1e-12
                    tight = max(tight, (best - least) / max(bound - least, 1e-9))
        assert tight > 0.3

    check(few)
    kills(check, stubborn)
    kills(check, lambda i, b, m: few(i, b, m)._replace(spread=0.1 * few(i, b, m).spread))


def stubborn(i, beta, most):
    """The mutant: the first rewrite, again and again."""
    found = few(i, beta, most)
    losses = [[kl(np.asarray(i.frozen)[0], optimum(i, beta, x))] * most for x in range(len(i.p))]
    return found._replace(chosen=0 * found.chosen, loss=np.array(losses))


def test_a_mixture_that_no_rewrite_replaces():
    """π* is uniform: a mixture of rewrites of one answer each gives it, and none alone."""
    found = few(CORNERS, 0.7, 5)
    star = np.full(4, 0.25)
    single = min(kl(row, star) for row in np.asarray(CORNERS.frozen))
    assert float(found.mixture[0]) == pytest.approx(0.0, abs=1e-8)
    assert float(found.single[0]) == pytest.approx(single)
    assert float(found.price[0]) == pytest.approx(0.7 * single, abs=1e-7)
    assert single > 0.1
    assert float(found.spread[0]) <= 3 + 1e-9
    # Where π* is a row itself, nothing is lost.
    without = Instance(CORNERS.p, CORNERS.prior, CORNERS.frozen, CORNERS.own, np.zeros((2, 4)))
    assert float(few(without, 0.7, 5).price[0]) == pytest.approx(0.0, abs=1e-8)
