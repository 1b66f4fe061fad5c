import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from theory_oracle import EPS, close, finite, kills

from alignpro.errors import AlignProError, check_temperature
from alignpro.theory.gibbs import Tilted, grid, tilt

compiled = jax.jit(tilt)


def exact_tilt(base, energy, temperature, digits=60):
    with mpmath.workdps(digits):
        base = [mpmath.mpf(float(b)) for b in base]
        total = mpmath.fsum(base)
        base = [b / total for b in base]
        energy = [mpmath.mpf(float(e)) for e in energy]
        t = mpmath.mpf(float(temperature))
        top = max(e for b, e in zip(base, energy, strict=True) if b > 0)
        weights = [b * mpmath.exp((e - top) / t) for b, e in zip(base, energy, strict=True)]
        z = mpmath.fsum(weights)
        probs = [w / z for w in weights]
        value = top + t * mpmath.log(z)
        mean = mpmath.fsum(b * e for b, e in zip(base, energy, strict=True))
        gained = mpmath.fsum(q * e for q, e in zip(probs, energy, strict=True)) - mean
        return {
            "probs": [float(q) for q in probs],
            "free_energy": float(value),
            "lift": float(gained),
            "gain": float(value - mean),
            "cost": float(gained - (value - mean)),
            "tv": float(mpmath.fsum(abs(q - b) for q, b in zip(probs, base, strict=True)) / 2),
            "log_z": float(value / t),
        }


def random_case(seed):
    rng = np.random.default_rng(seed)
    n = 6
    base = rng.dirichlet(np.full(n, rng.choice([0.1, 1.0, 10.0])))
    if seed % 3 == 0:
        base[rng.integers(n)] = 0.0
    base = np.where(base < 1e-300, 0.0, base)
    base /= base.sum()
    energy = rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 3)
    if seed % 4 == 0:
        energy = 1e6 + 1e-3 * rng.standard_normal(n)
    return base, energy, 10.0 ** rng.uniform(-6, 6)


def test_against_high_precision_at_every_temperature():
    """λ·KL at λ = 1e6 and the greedy limit at 1e-6 keep their relative accuracy."""

    def check(solver):
        for seed in range(150):
            base, energy, t = random_case(seed)
            got, want = solver(base, energy, t), exact_tilt(base, energy, t)
            d = energy - energy[base > 0].max()
            width = -d[base > 0].min()
            mass = -(base * d).sum()  # distance of the base's mean from the top
            # Rounding of probabilities near the top: its share of the base is known to eps absolutely.
            assert close(got.probs, want["probs"], 1.0, 30)
            assert close(got.free_energy, want["free_energy"], np.abs(energy[base > 0]).max(), 20)
            assert close(got.log_z, want["log_z"], np.abs(energy[base > 0]).max() / t, 20)
            # A difference the base's own rounding leaves uncertain by eps relative to its mass off the top.
            off = base[(d < 0) & (base > 0)].sum()
            slack = 200 + 60 / max(off, EPS)
            assert close(got.gain, want["gain"], want["gain"], slack + 30 * min(width, mass) / t)
            assert close(got.lift, want["lift"], want["lift"], slack)
            assert close(got.cost, want["cost"], want["cost"], slack)
            assert close(got.tv, want["tv"], want["tv"], slack)

    check(compiled)

    def plain(base, energy, t):
        u = (energy - energy[base > 0].max()) / t
        weights = base * np.exp(np.where(base > 0, u, -np.inf))
        probs = weights / weights.sum()
        value = energy[base > 0].max() + t * np.log(weights.sum())
        mean = (base * energy).sum()
        lift = (probs * energy).sum() - mean
        return compiled(base, energy, t)._replace(
            probs=probs, free_energy=value, lift=lift, gain=value - mean, cost=lift - value + mean
        )

    kills(check, plain)
    kills(check, lambda b, e, t: compiled(b, e, t * (1 + 1e-9)))


extremes = st.tuples(
    st.lists(st.sampled_from([0.0, 1e-300, 1e-20, 0.1, 1.0, 3.0]), min_size=3, max_size=3).filter(
        lambda b: sum(b) > 1e-3
    ),
    st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e6, 1e6 + 1e-3, 1e308, -1e308, 1.7e308, 1e-9]),
        min_size=3,
        max_size=3,
    ),
    st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e6]),
)


@settings(max_examples=300, deadline=None)
@given(extremes)
def test_never_nan_and_always_a_distribution(case):
    base, energy, t = case
    base = np.array(base) / sum(base)
    got = compiled(base, np.array(energy), t)
    assert all(finite(leaf) for leaf in got)
    # A probability is exp of a log-ratio, so it is known to eps times that ratio.
    ratio = np.abs(np.asarray(got.log_ratio)[np.asarray(got.probs) > 0]).max()
    assert close(got.probs.sum(), 1.0, 1.0, 20 + 4 * ratio)
    assert (np.asarray(got.probs)[base == 0] == 0).all()
    assert (np.asarray(got.log_probs)[base == 0] == -np.inf).all()
    assert min(got.lift, got.gain, got.cost, got.tv) >= 0
    assert got.tv <= 1 + 8 * EPS


def test_limits():
    base, energy = np.array([0.2, 0.3, 0.5, 0.0]), np.array([1.0, 2.0, 2.0, 9.0])
    cold, hot = compiled(base, energy, 1e-6), compiled(base, energy, 1e6)
    # λ → 0: all mass on the best rewrite, ties in proportion to the base; off the support nothing counts.
    assert close(cold.probs, [0, 0.375, 0.625, 0], 1.0, 4)
    assert close(cold.free_energy, 2.0 + 1e-6 * np.log(0.8), 2.0, 4)
    # λ → ∞: the base, with λ·KL → Var/(2λ).
    assert close(hot.probs, base, 1e-6 / EPS, 1)
    np.testing.assert_allclose(hot.cost, 0.16 / 2e6, rtol=1e-5)
    for value in (0.0, 1e6, -1e308):
        equal = compiled(base, np.full(4, value), 0.5)
        assert (np.asarray(equal.probs) == base).all()
        assert equal.lift == equal.cost == equal.gain == equal.tv == 0
        assert equal.free_energy == value


def test_the_likely_keep_their_odds_when_the_best_is_all_but_impossible():
    """exp(energy/T) underflows for the likely outcome, but its share is known: here 0.034 and 4e-9."""

    def check(solver):
        for base, energy, t in (
            ([1e-300, 1.0], [0.0, -694.127], 1.0),
            ([1e-300, 1.0], [1.0, 0.0], 1 / 691.0),
        ):
            got, want = solver(np.array(base), np.array(energy), t), exact_tilt(base, energy, t)
            assert close(got.probs, want["probs"], 1.0, 3000)  # a few roundings of an exponent of 700
        base, energy = np.array([1e-30, 1.0], np.float32), np.array([0.0, -100.0], np.float32)
        got = solver(base, energy, np.float32(1))
        np.testing.assert_allclose(got.log_ratio[1], exact_log_ratio(base, energy, 1.0), rtol=1e-6)
        np.testing.assert_allclose(got.probs[1], np.exp(exact_log_ratio(base, energy, 1.0)), rtol=1e-4)

    def exact_log_ratio(base, energy, t):
        base, energy = base.astype(float), energy.astype(float)
        return energy[1] / t - np.log((base * np.exp(energy / t)).sum())

    check(compiled)

    def underflows(base, energy, t):
        exp_a = jnp.exp((energy - energy.max()) / t)
        return compiled(base, energy, t)._replace(probs=base * exp_a / (base * exp_a).sum())

    kills(check, jax.jit(underflows))


def test_float32_stays_float32_and_is_as_accurate():
    def check(solver):
        for seed in range(100):
            base, energy, t = random_case(seed)
            t = np.clip(t, 1e-5, 1e5)
            base = np.where(base < 1e-30, 0.0, base).astype(np.float32)
            energy = energy.astype(np.float32)
            got = solver(base, energy, t)
            assert {leaf.dtype for leaf in got} == {np.dtype(np.float32)}
            want = exact_tilt(base, energy, np.float32(t))
            d = energy - energy[base > 0].max()
            off = base[(d < 0) & (base > 0)].sum()
            single, width, mass = 2.0**29, -d[base > 0].min(), -(base * d).sum()
            slack = single * (200 + 60 / max(off, 2.0**-23))
            assert close(got.probs, want["probs"], 1.0, 30 * single)
            assert close(
                got.gain, want["gain"], want["gain"] + 1e-36, slack + 30 * single * min(width, mass) / t
            )
            assert close(got.lift, want["lift"], want["lift"] + 1e-36, slack)
            assert close(got.cost, want["cost"], want["cost"] + 1e-36, slack)
            assert close(got.tv, want["tv"], want["tv"] + 1e-36, slack)

    check(compiled)
    kills(check, lambda b, e, t: compiled(b.astype(float), e.astype(float), t))
    kills(check, lambda b, e, t: compiled(b, e, np.float32(t * 1.001)))


def test_lift_is_gain_plus_cost():
    """Jeffreys identity: E_p e − E_base e = T KL(p‖base) + T KL(base‖p), the last being `gain`."""

    def check(solver):
        for seed in range(200):
            got = solver(*random_case(seed))
            assert close(got.lift, got.gain + got.cost, got.lift, 1e5)

    check(compiled)
    kills(check, lambda b, e, t: compiled(b, e, t)._replace(cost=compiled(b, e, t).cost * (1 + 1e-8)))


def test_a_numerical_optimiser_finds_nothing_better():
    """p maximises E_q[energy] − T KL(q‖base); an optimiser that knows only that arrives at it."""
    rng = np.random.default_rng(3)

    def check(solver):
        for _ in range(8):
            base, energy = rng.dirichlet(np.ones(5)), rng.uniform(size=5)
            t = 10.0 ** rng.uniform(-1, 1)

            def loss(theta, base=base, energy=energy, t=t):
                q = np.exp(theta - theta.max())
                q /= q.sum()
                value = (q * energy).sum() - t * (q * np.log(q / base)).sum()
                slope = energy - t * np.log(q / base)
                return -value, -q * (slope - (q * slope).sum())

            found = minimize(loss, np.zeros(5), jac=True, method="BFGS", options={"gtol": 1e-10})
            q = np.exp(found.x - found.x.max())
            got = solver(base, energy, t)
            np.testing.assert_allclose(got.probs, q / q.sum(), atol=1e-6)
            np.testing.assert_allclose(got.free_energy, -found.fun, rtol=1e-10)

    check(compiled)
    kills(check, lambda b, e, t: compiled(b, e, 1.01 * t))


def test_metamorphic():
    def check(solver):
        for seed in range(60):
            base, energy, t = random_case(seed)
            got = solver(base, energy, t)
            order = np.random.default_rng(seed).permutation(base.size)
            moved = solver(base[order], energy[order], t)
            assert close(moved.probs, np.asarray(got.probs)[order], 1.0, 60)
            # Multiplying energies and temperature by a power of two changes no digit.
            doubled = solver(base, 4 * energy, 4 * t)
            assert (np.asarray(doubled.probs) == np.asarray(got.probs)).all()
            assert doubled.cost == 4 * got.cost
            # A shift that is exact in floating point (integers, say) changes nothing either.
            whole = np.round(energy)
            a, b = solver(base, whole, t), solver(base, whole + 2.0**30, t)
            assert close(a.probs, b.probs, 1.0, 0)
            # An outcome split in two shares its mass.
            split = solver(
                np.append(base, base[-1]) * np.append(np.ones(5), [0.5, 0.5]),
                np.append(energy, energy[-1]),
                t,
            )
            assert close(np.asarray(split.probs)[-2:].sum(), np.asarray(got.probs)[-1], 1.0, 60)

    check(compiled)
    kills(check, lambda b, e, t: compiled(b, e, t + 1))
    kills(check, lambda b, e, t: compiled(b, e + 1e-3 * np.arange(len(e)), t))


def test_batching_and_compiling_change_nothing():
    rng = np.random.default_rng(4)
    base, energy = rng.dirichlet(np.ones(4), size=7), rng.standard_normal((7, 4))
    temperatures = 10.0 ** rng.uniform(-6, 6, 7)
    whole = tilt(base, energy, temperatures)
    mapped = jax.jit(jax.vmap(tilt))(base, energy, temperatures)
    for i in range(7):
        alone = tilt(base[i], energy[i], temperatures[i])
        for a, b, c in zip(whole, mapped, alone, strict=True):
            np.testing.assert_allclose(a[i], c, rtol=1e-12)
            np.testing.assert_allclose(b[i], c, rtol=1e-12)
    both = grid(
        lambda beta, lam: tilt(base[0], energy[0], beta + lam),
        jnp.array([1.0, 2.0]),
        jnp.array([0.1, 0.2, 0.3]),
    )
    assert isinstance(both, Tilted)
    assert both.probs.shape == (2, 3, 4)
    np.testing.assert_allclose(
        both.free_energy[1, 2], tilt(base[0], energy[0], 2.3).free_energy, rtol=4 * EPS
    )


def test_sensitivity_to_temperature():
    """d E_p[energy]/dT = −Var_p(energy)/T²."""
    rng = np.random.default_rng(5)
    base, energy = rng.dirichlet(np.ones(5)), rng.uniform(size=5)
    for t in (0.1, 1.0, 1e3):
        slope = jax.grad(lambda t: tilt(base, energy, t).lift)(t)
        probs = np.asarray(tilt(base, energy, t).probs)
        variance = (probs * (energy - (probs * energy).sum()) ** 2).sum()
        np.testing.assert_allclose(slope, -variance / t**2, rtol=1e-9)


def test_gradients_are_finite_with_zeros_in_the_base():
    base, energy = jnp.array([0.0, 0.4, 0.6]), jnp.array([5.0, 1.0, 2.0])
    for t in (1e-6, 1.0, 1e6):
        for field in ("free_energy", "lift", "cost", "gain", "tv"):
            slope = jax.grad(lambda e, t=t, field=field: getattr(tilt(base, e, t), field))(energy)
            assert np.isfinite(slope).all(), (field, t)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_bad_temperatures(value):
    with pytest.raises(AlignProError, match=r"^--lam .*must be a positive finite number"):
        check_temperature("--lam", value)


def test_temperatures_out_of_range():
    for value in (1e-19, 1e19):
        with pytest.raises(AlignProError, match=r"is outside 1e-18 to 1e18"):
            check_temperature("beta", value)
