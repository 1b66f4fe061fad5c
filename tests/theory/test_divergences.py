import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from theory_oracle import EPS, kills

from alignpro.theory import divergences as div

vectors = st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([0.05, 1.0, 20.0]))


def pair(draw):
    seed, n, concentration = draw
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(n, concentration), size=2)
    return p, q


def test_kl_is_its_definition():
    @settings(max_examples=60, deadline=None)
    @given(vectors)
    def check_all(draw):
        p, q = pair(draw)
        if (q > 1e-300).all():
            terms = rel_entr(p, q)
            assert abs(kl(p, q) - terms.sum()) <= (len(p) + 8) * 4 * EPS * (np.abs(terms).sum() + 1)

    kl = jax.jit(div.kl)
    check_all()

    def check(function):
        nonlocal kl
        kl = function
        check_all()

    kills(check, jax.jit(lambda p, q: div.kl(q, p)))
    kills(check, jax.jit(lambda p, q: div.kl(p, q) / np.log(2)))


def test_zeros():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(div.kl(p, q), 0.5 * np.log(2), rtol=4 * EPS)
    assert div.kl(q, p) == np.inf
    assert div.jeffreys(p, q) == np.inf
    assert div.kl(p, p) == 0
    assert div.tv(p, p) == 0
    assert div.kl(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0


def test_tv_is_half_the_l1_distance():
    def check(tv):
        assert tv(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1
        p, q = np.array([0.75, 0.25]), np.array([0.5, 0.5])
        assert tv(p, q) == max(p[0] - q[0], q[0] - p[0])  # the largest difference over events

    check(div.tv)
    kills(check, lambda p, q: 2 * div.tv(p, q))


def test_jeffreys_is_both_directions():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), size=(2, 50))
    np.testing.assert_allclose(div.jeffreys(p, q), div.kl(p, q) + div.kl(q, p), rtol=100 * EPS)


@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-8, 1e-12])
def test_nearby_distributions_keep_relative_accuracy(size):
    """Naive Σ p log(p/q) has no correct digit left at 1e-8."""
    rng = np.random.default_rng(1)
    q = rng.dirichlet(np.ones(5))
    # The same amount moved from one entry to another: both sums are the same number.
    step = float(np.float32(size * q.min()))
    p = q + np.array([step, -step, 0, 0, 0])
    moved = [mpmath.mpf(float(a)) for a in p]
    base = [mpmath.mpf(float(a)) for a in q]
    with mpmath.workdps(50):
        want = mpmath.fsum(a * mpmath.log(a / b) - a + b for a, b in zip(moved, base, strict=True))

    def check(kl):
        assert abs(kl(p, q) - float(want)) <= 60 * EPS * float(want)

    check(jax.jit(div.kl))
    if size <= 1e-8:
        kills(check, lambda p, q: rel_entr(p, q).sum())


def test_log1p_and_psi_are_accurate_when_compiled():
    rng = np.random.default_rng(2)
    small = 10.0 ** rng.uniform(-300, 0, 400) * rng.choice([-0.99, 1], 400)
    x = np.concatenate([small, rng.uniform(-0.99, 3, 400), rng.uniform(3, 1e6, 50)])
    u = np.concatenate([small[np.abs(small) > 1e-150], rng.uniform(-700, 700, 300), rng.uniform(-1, 1, 300)])

    def check_log1p(function):
        got = np.asarray(jax.jit(function)(x))
        want = np.array([float(mpmath.log1p(float(v))) for v in x])
        assert (np.abs(got - want) <= 6 * EPS * np.abs(want)).all()

    def check_psi(function):
        got = np.asarray(jax.jit(function)(u))
        with mpmath.workdps(400):
            want = np.array([float(mpmath.exp(float(v)) - 1 - mpmath.mpf(float(v))) for v in u])
        assert (np.abs(got - want) <= 20 * EPS * np.abs(want)).all()

    check_log1p(div.log1p)
    check_psi(div.psi)
    kills(check_log1p, lambda v: jnp.log(1 + v))
    kills(check_psi, lambda v: jnp.expm1(v) - v)


def test_derivatives():
    assert jax.grad(div.log1p)(0.25) == pytest.approx(0.8, rel=4 * EPS)
    assert jax.grad(div.psi)(1e-9) == pytest.approx(np.expm1(1e-9), rel=4 * EPS)
    assert jax.grad(jax.grad(div.psi))(0.0) == 1
