"""The two-point bound, by the formula as it is written, in another arithmetic and by search."""

import dataclasses

import jax
import mpmath
import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.theory import two_points
from alignpro.theory.bounds import BOUNDS, WRONG_BOUNDS, check
from alignpro.theory.families import FAMILIES, draw
from alignpro.theory.instance import Instance
from alignpro.theory.solution import solution
from alignpro.theory.statements import upper
from alignpro.theory.two_points import lift, points


@jax.jit
@jax.vmap
def solved(instance, t):
    s = solution(instance, t, t)
    return s, upper.two_point_lift(s).value, {name: BOUNDS[name](s).rhs for name in BOUNDS}


def written(variance, rise, t):
    """σ²(e^z − 1)/(M + (σ²/M) e^z), z = (M + σ²/M)/t, in 50 digits."""
    with mpmath.workdps(50):
        v, m, t = (mpmath.mpf(float(n)) for n in (variance, rise, t))
        grown = mpmath.exp((m + v / m) / t)
        return float(v * (grown - 1) / (m + v / m * grown))


def test_the_lift_is_the_formula_at_every_scale():
    rng = np.random.default_rng(0)
    rise, fall, t = 10.0 ** rng.uniform(-6, 6, (3, 300))
    t = np.maximum(t, (rise + fall) / 1e5)  # e^{1e5} is a number of mpmath's
    want = [written(a * m, m, s) for m, a, s in zip(rise, fall, t, strict=True)]

    def check_all(function):
        found = function(rise, fall, t, eps=2.0**-52)
        assert (np.abs(found.value - np.array(want)) <= found.error + 1e-300).all()
        np.testing.assert_allclose(found.value, want, rtol=1e-11)

    check_all(lift)
    kills(check_all, lambda m, a, s, **k: lift(a, m, s, **k))
    kills(check_all, mutated(two_points, "weight = high + low * grown", "weight = low + high * grown").lift)
    for nothing in (lift(0.0, 0.0, 1.0), lift(1.0, 0.0, 1.0), lift(0.0, 1.0, 1.0)):
        assert nothing.value == nothing.error == 0


def test_the_error_covers_points_that_are_off():
    """M and a moved by what they may be off, at temperatures where that is and is not small."""
    rng = np.random.default_rng(1)
    rise, fall, t = 10.0 ** rng.uniform(-3, 3, (3, 2000))
    off = 10.0 ** rng.uniform(-14, -8, (2, 2000)) * np.stack([rise, fall])
    moved = [lift(rise + i * off[0], fall + j * off[1], t).value for i in (-1, 1) for j in (-1, 1)]

    def check_all(function):
        found = function(rise, fall, t, *off, 2.0**-52)
        # To first order, which is all where a point moves by less than a 10⁻⁵th of the temperature.
        close = off.max(0) < 1e-5 * t
        assert close.mean() > 0.5
        for value in moved:
            assert (np.abs(value - found.value) <= 1.001 * found.error + 1e-300)[close].all()

    check_all(lift)
    for right in ("by_fall + by_rise", "steep * fall_error", "(upper * upper * part + steep)"):
        kills(check_all, mutated(two_points, right, f"0.5 * ({right})").lift)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_relatively_accurate(family):
    """M and Var/M of the own rows, next to a point mass too, within the errors that the solution claims."""
    cases = draw(family, 3, (3, 4, 5), 20)
    found = []
    for instance in cases:
        s = solution(instance, 1.0, 1.0)
        with mpmath.workdps(60):
            for x, k in enumerate(instance.own):
                row = [mpmath.mpf(float(v)) for v in instance.frozen[k]]
                total = mpmath.fsum(row)
                r = [mpmath.mpf(float(v)) for v in instance.reward[x]]
                mean = mpmath.fsum(p * v for p, v in zip(row, r, strict=True)) / total
                rise = max(v for p, v in zip(row, r, strict=True) if p > 0) - mean
                square = mpmath.fsum(p * (v - mean) ** 2 for p, v in zip(row, r, strict=True)) / total
                fall = square / rise if rise > 0 else mpmath.mpf(0)
                errors = float(s.rise_error[x]), float(s.fall_error[x])
                off = (abs(float(float(v[x]) - w)) for v, w in ((s.own_rise, rise), (s.own_fall, fall)))
                found.append((*off, *errors))
    rise, fall, rise_error, fall_error = np.array(found).T
    assert (rise <= rise_error).all()
    assert (fall <= fall_error).all()


def test_two_rewards_make_it_an_equality():
    """Whatever the odds and β; a hair of another reward does not."""
    for mass, beta in ((0.5, 1.0), (0.01, 0.2), (0.9, 3.0), (1e-6, 0.05)):
        two = Instance([1.0], [[1.0]], [[1 - mass, mass, 0.0]], [0], [[0.0, 1.0, 0.3]])
        found = check(two, beta, 1.0, "two_point")
        assert found.verdict == "inconclusive"
        np.testing.assert_allclose(found.rhs, found.gap, rtol=1e-13)
        wrong = WRONG_BOUNDS["two_point_swapped"](solution(two, beta, 1.0))
        assert mass == 0.5 or abs(wrong.rhs - wrong.lhs) > 1e-3 * wrong.lhs
        three = dataclasses.replace(two, frozen=[[0.9 - 0.9 * mass, 0.9 * mass, 0.1]])
        assert check(three, beta, 1.0, "two_point").verdict == "holds"


def test_the_two_points_are_proved_equal():
    """In ball arithmetic, where no rounding hides a difference."""
    from alignpro.theory.proof.certify import certify

    two = Instance([1.0], [[1.0]], [[0.75, 0.25]], [0], [[0.0, 1.0]])

    def check_all(statement):
        found = certify(two, "1/3", 1.0, statement)
        assert (found.verdict, found.slack) == ("holds", "0")

    check_all("two_point")
    kills(check_all, "two_point_swapped")
    assert certify(two, "1/3", 1.0, "two_point_swapped").verdict == "violated"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_looser_than_what_it_replaces(family):
    """M, Var/β·(e^{M/β} − 1)/(M/β), span·tanh(span/(4β)); and `combined` than all of these and span·TV."""
    rng = np.random.default_rng(4)
    instances = FAMILIES[family](rng, 3000, (2, 3, 5))
    beta = 10.0 ** rng.uniform(-3, 3, 3000) * np.maximum(np.ptp(instances.reward, (1, 2)), 1e-12)
    s, found, every = jax.tree.map(np.asarray, solved(instances, beta))
    b = beta[:, None]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        variance = s.own_fall * np.expm1(s.own_rise / b)
    width = s.own_span
    noise = 1e-13 * width + 1e-300
    for other in (s.own_rise, variance, width * np.tanh(width / (4 * b))):
        assert (found <= other * (1 + 1e-12) + noise).all()
    assert (s.delta1 <= found * (1 + 1e-12) + noise + s.model_error).all()
    noise = 1e-12 * s.span.max(-1) + np.abs(every["theorem1"]) * 1e-12
    order = {
        "law": ("combined",),
        "combined": ("two_point", "barycentre"),
        "two_point": ("beta_tanh",),
        "beta_tanh": ("beta_only",),
        "barycentre": ("tight", "kl_only"),
        "tight": ("span",),
        "span": ("theorem1",),
        "induced_law": ("induced",),
    }
    for sharper, looser in order.items():
        for other in looser:
            assert (every[sharper] <= every[other] + noise).all(), (sharper, other)


def test_the_law_at_hand_is_between_the_two_laws():
    """Random laws: the lift of any is at most that of {−Var/M, M}, at least that of {−m, Var/m}."""
    rng = np.random.default_rng(5)
    base = rng.dirichlet(np.full(6, 0.3), size=20_000)
    base = np.where(base < 1e-12, 0.0, base)
    base /= base.sum(-1, keepdims=True)
    values = np.round(rng.normal(size=(20_000, 6)) * 10.0 ** rng.uniform(-2, 1, (20_000, 1)), 3)
    t = 10.0 ** rng.uniform(-2, 2, 20_000)
    top = np.where(base > 0, values, -np.inf).max(-1, keepdims=True)
    weights = base * np.exp(np.where(base > 0, values - top, 0.0) / t[:, None])
    gained = (weights / weights.sum(-1, keepdims=True) * values).sum(-1) - (base * values).sum(-1)

    def check_all(most, least):
        assert (gained <= most + 1e-12).all()
        assert (gained >= least - 1e-12).all()

    _, rise, below = map(np.asarray, points(base, values))
    _, drop, above = map(np.asarray, points(base, -values))
    most, least = np.asarray(lift(rise, below, t).value), np.asarray(lift(above, drop, t).value)
    check_all(most, least)
    kills(lambda v: check_all(v, least), np.asarray(lift(below, rise, t).value))
    kills(lambda v: check_all(most, v), np.asarray(lift(drop, above, t).value))
    spread = gained > 1e-6
    assert np.median((gained / np.where(spread, most, 1.0))[spread]) > 0.9
