import dataclasses

import jax
import mpmath
import numpy as np
import pytest
from mutants import mutated
from scipy.optimize import minimize_scalar
from theory_oracle import EPS, close, fields, finite, kills, oracle

from alignpro.errors import AlignProError
from alignpro.theory import Instance, solution
from alignpro.theory.families import FAMILIES, draw
from alignpro.theory.results import robustness
from alignpro.theory.results.robustness import (
    _frozen_noise,
    _reward_noise,
    ensemble,
    frozen_noise,
    misspecified_lam,
    perturbation,
    reachable,
    reward_noise,
    worst_loss,
    worst_tv,
)

compiled = jax.jit(perturbation)
averaged = jax.jit(ensemble)
solved = jax.jit(solution)
SHAPE = (2, 4, 3)


def exact_perturbation(base, energy, estimate, t, digits=150):
    """From the definitions, on mpmath numbers."""
    with mpmath.workdps(digits):
        mp = mpmath.mpf
        b, e, h = ([mp(float(v)) for v in row] for row in (base, energy, estimate))
        t = mp(float(t))

        def policy(energies):
            top = max(v for w, v in zip(b, energies, strict=True) if w > 0)
            weights = [w * mpmath.exp((v - top) / t) for w, v in zip(b, energies, strict=True)]
            return [w / mpmath.fsum(weights) for w in weights]

        def kl(p, q):
            return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)

        def mean(p, v):
            return mpmath.fsum(x * y for x, y in zip(p, v, strict=True))

        p, q = policy(e), policy(h)
        f_p, f_q = mean(p, e) - t * kl(p, b), mean(q, e) - t * kl(q, b)
        d = [y - x for x, y in zip(e, h, strict=True)]
        return {
            "loss": float(f_p - f_q),
            "reverse": float(t * kl(p, q)),
            "illusion": float(mean(q, d) - mean(p, d)),
            "reward_loss": float(mean(p, e) - mean(q, e)),
            "tv": float(mpmath.fsum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2),
        }


def padded(*values):
    """Five outcomes, the last of them impossible or worth nothing: one shape is compiled for all."""
    return np.array([*values, *[0.0] * (5 - len(values))])


def small(prior, frozen, reward):
    """One prompt with few rewrites and responses, padded to SHAPE."""
    x, k, y = SHAPE
    rows = np.eye(y)[np.zeros(k, int)]
    rows[: len(frozen), : len(frozen[0])] = frozen
    full_prior, full_reward = np.zeros((x, k)), np.zeros((x, y))
    full_prior[:, : len(prior)], full_reward[:, : len(reward)] = prior, reward
    return Instance(np.eye(x)[0], full_prior, rows, np.zeros(x, int), full_reward)


def random_case(seed):
    """Energies on a grid of powers of two, so that ê − e is exact."""
    rng = np.random.default_rng(seed)
    base = rng.dirichlet(np.full(5, rng.choice([0.1, 1.0, 10.0])))
    if seed % 3 == 0:
        base[rng.integers(5)] = 0.0
        base /= base.sum()
    energy = np.round(rng.uniform(size=5) * 2**30) / 2**30
    size = 2.0 ** -rng.integers(0, 20)
    delta = size * np.round(rng.standard_normal(5) * 2**10) / 2**10
    return base, energy, energy + delta, 10.0 ** rng.uniform(-4, 6)


def test_against_the_definitions_in_150_digits():
    """F(ρ*) − F(ρ̂) = λ KL(ρ̂‖ρ*), both divergences, the reward-hacking gap: relatively accurate."""
    cases = [random_case(seed) for seed in range(80)]
    wanted = [exact_perturbation(*case) for case in cases]

    def check(compute):
        for (base, energy, estimate, t), want in zip(cases, wanted, strict=True):
            got = compute(base, energy, estimate, t)
            support = base > 0
            width = np.ptp(energy[support]) + np.ptp((estimate - energy)[support])
            # Energies over t are exponents: a policy is known to eps times them. Far apart, absolutely.
            relative = 100 * (1 + width / t)
            s = float(got.span_error)
            floor = width if s > 100 * t else EPS * s
            for name in ("loss", "reverse", "illusion", "tv"):
                want_size = want[name] * relative + (floor / t if name == "tv" else floor)
                assert close(getattr(got, name), want[name], want_size, 20), (name, t)
            spread = np.ptp(energy[support]) * want["tv"] * relative + floor
            assert close(got.reward_loss, want["reward_loss"], spread, 20)

    check(compiled)
    kills(check, lambda b, e, h, t: compiled(b, e, h, t)._replace(loss=compiled(b, e, h, t).reverse))
    kills(check, lambda b, e, h, t: compiled(b, e, h, t * (1 + 1e-8)))
    kills(check, lambda b, e, h, t: compiled(b, e, h + 1e-9 * np.arange(5), t))


def below(a, b, scale, roundings=1000):
    assert np.all(np.asarray(a) <= np.asarray(b) * (1 + 1e-9) + roundings * EPS * np.asarray(scale))


def check_bounds(found, scale):
    """Every inequality of a `Perturbation`."""
    s = np.asarray(found.span_error) + scale
    below(found.loss, found.loss_sharp, s)
    below(found.loss_sharp, found.loss_span, s)
    below(found.loss_span, found.loss_sup, s)
    below(found.loss_sharp, found.span_error, s)
    below(found.loss_lower, found.loss, s)
    below(found.loss, found.loss_upper, s)
    below(found.loss, found.illusion, s)
    below(np.abs(found.reward_loss), found.reward_bound, s)
    below(found.illusion, found.illusion_bound, s)
    below(found.tv, found.tv_bound, 1.0)


def noisy_batch(name, count, seed):
    rng = np.random.default_rng(seed)
    batch = FAMILIES[name](rng, count, SHAPE)
    beta, lam = 10.0 ** rng.uniform(-6, 6, (2, count))
    size = np.ptp(batch.reward, axis=(1, 2))
    noise = 10.0 ** rng.uniform(-6, 2, (count, 1, 1)) * size[:, None, None]
    # Half of the errors sit at the ends of their range, where the span bounds are tight.
    error = rng.standard_normal(batch.reward.shape)
    error = np.where(rng.uniform(size=(count, 1, 1)) < 0.5, np.sign(error), error)
    estimate = batch.reward + noise * error
    mix = 10.0 ** rng.uniform(-6, 0, (count, 1, 1))
    other = np.where(
        rng.uniform(size=(count, 1, 1)) < 0.5,
        rng.dirichlet(np.ones(SHAPE[2]), (count, SHAPE[1])),
        np.roll(batch.frozen, 1, axis=-1),  # moves mass without leaving sparse rows
    )
    frozen = (1 - mix) * batch.frozen + mix * other
    scale = size + np.abs(batch.reward).max((1, 2)) * 0.1 + noise[:, 0, 0]
    return batch, estimate, frozen / frozen.sum(-1, keepdims=True), beta, lam, scale


reward_batch = jax.jit(jax.vmap(_reward_noise))
frozen_batch = jax.jit(jax.vmap(_frozen_noise))


def check_family(name, count, seed):
    batch, estimate, frozen, beta, lam, scale = noisy_batch(name, count, seed)
    found, other = reward_batch(batch, estimate, beta, lam), frozen_batch(batch, frozen, beta, lam)
    assert all(finite(leaf) for leaf in jax.tree.leaves((found, other)))
    scale = scale[:, None]
    for part in (found.prompter, found.model, other.prompter):
        check_bounds(part, scale)
    # The rounding of r̂ itself is an error of energies, which policies see divided by β and λ.
    seen = np.abs(estimate).max((1, 2)) / np.minimum(beta, lam)
    carried = scale * (1 + 0.01 * np.minimum(seen, 1 / EPS))[:, None]
    for sides in (found.sides, other.sides):
        below(sides.gap_change, sides.gap_bound, carried)
        below(sides.rhs_change, sides.rhs_bound, carried)
        below(sides.theorem1_change, sides.theorem1_bound, carried)
    # ε on responses is ε on R, and the frozen model hands on only a share of the span.
    below(found.prompter.error, found.reward_error, scale)
    below(found.prompter.span_error, found.contraction * found.reward_span_error, scale)
    below(other.prompter.error, other.span * other.tv, scale)
    below(other.prompter.loss, other.loss_tv_sharp, scale)
    below(other.loss_tv_sharp, other.loss_tv, scale)
    below(other.model_tv, other.model_tv_bound, 1.0)
    below(np.abs(other.model_reward_loss), other.model_reward_bound, scale)
    return found, other


@pytest.mark.parametrize("name", FAMILIES)
def test_every_bound_holds_on_every_family(name):
    check_family(name, 500, 0)


def test_the_random_instances_refute_slips():
    """The same instances tell a wrong constant: what they check is not vacuous."""
    found, other = zip(*(check_family(name, 500, 1) for name in FAMILIES), strict=True)
    everything = [(f.prompter, f.model, o.prompter) for f, o in zip(found, other, strict=True)]
    slips = {
        "loss ≤ s²/(10t)": lambda p: p.loss > 0.8 * p.loss_span,
        "loss ≤ Var/(2t)": lambda p: p.loss > p.loss_upper * 0.5 * (np.asarray(p.span_error) > 0),
        "reverse ≤ upper": lambda p: p.reverse > p.loss_upper * 1.01,
        "illusion ≤ loss": lambda p: p.illusion > 1.01 * p.loss,
        "reward loss ≥ 0": lambda p: p.reward_loss < -1e-6 * p.reward_bound,
        "tv ≤ tanh(s/8t)": lambda p: p.tv > np.tanh(np.arctanh(np.minimum(p.tv_bound, 1 - 1e-16)) / 2) + 1e-9,
    }
    for name, wrong in slips.items():
        assert any(np.any(np.asarray(wrong(p))) for parts in everything for p in parts), name


@pytest.mark.parametrize("width", [1e-9, 1e-3, 0.3, 1.0, 3.0, 40.0, 600.0])
def test_the_worst_loss_is_a_maximum_and_is_attained(width):
    """Over all probabilities of two outcomes, found by a search that knows only the definition."""
    t = 0.7

    def loss_at(logit, digits=50):
        with mpmath.workdps(digits):
            q = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
            u = mpmath.mpf(width) / mpmath.mpf(t)
            z = 1 - q + q * mpmath.exp(u)
            return float(mpmath.mpf(t) * (q * mpmath.exp(u) / z * u - mpmath.log(z)))

    u = width / t
    peak = minimize_scalar(
        lambda x: -loss_at(x), bounds=(-u - 12, 12), method="bounded", options={"xatol": 1e-9}
    )

    def check(bound):
        np.testing.assert_allclose(float(bound(width, t)), -peak.fun, rtol=1e-12)

    check(worst_loss)
    kills(check, lambda s, t: s * s / (8 * t) * (1 + 1e-3) - s**4 / (128 * t**3))
    kills(check, lambda s, t: worst_loss(s, t) * (1 - 1e-9))
    below(worst_loss(width, t), min(width, width**2 / (8 * t)), width)
    q = 1 / (1 + np.exp(min(-peak.x, 700)))
    if q > 1e-290:
        found = compiled(padded(q, 1 - q), np.zeros(5), padded(width, 0.0), t)
        np.testing.assert_allclose(found.loss, found.loss_sharp, rtol=1e-9)


def test_worst_tv_and_the_reward_bound_are_attained():
    """Two outcomes with odds e^{−s/2t} on the one that r̂ overrates: TV = tanh(s/4t), and the reward's."""
    s, t = 0.8, 0.3
    a = 1 / (1 + np.exp(s / (2 * t)))
    energy = padded(0.0, 1.0)
    base = padded(a, 1 - a) * np.exp(-energy / t)
    found = compiled(base / base.sum(), energy, energy + padded(s, 0.0), t)
    np.testing.assert_allclose(found.tv, np.tanh(s / (4 * t)), rtol=1e-13)
    np.testing.assert_allclose(found.tv, worst_tv(s, t), rtol=1e-13)
    np.testing.assert_allclose(found.reward_loss, found.reward_bound, rtol=1e-13)
    np.testing.assert_allclose(found.illusion, found.illusion_bound, rtol=1e-13)


def test_small_errors_cost_half_the_variance():
    """loss = Var_ρ*(δ)/(2λ)(1 + O(s/λ)): both variance forms close in on it."""
    rng = np.random.default_rng(2)
    base, energy, delta = rng.dirichlet(np.ones(5)), rng.uniform(size=5), rng.standard_normal(5)
    for size in (1e-3, 1e-6, 1e-9):
        found = compiled(base, energy, energy + size * delta, 0.5, size * delta)
        p = np.asarray(found.probs)
        var = size**2 * ((p * delta**2).sum() - (p * delta).sum() ** 2)
        for value in (found.loss, found.loss_lower, found.loss_upper):
            np.testing.assert_allclose(value, var, rtol=20 * size + 1e-12)
        assert found.loss_lower <= found.loss * (1 + 1e-12) <= found.loss_upper * (1 + 1e-11)


def test_a_shift_per_prompt_costs_nothing():
    for instance in draw("independent", 3, SHAPE, 5):
        reward = np.round(np.asarray(instance.reward) * 2**20) / 2**20
        instance = dataclasses.replace(instance, reward=reward)
        found = reward_noise(instance, reward + np.array([[-8.0], [64.0]]), 0.3, 0.2)
        for part in (found.prompter, found.model):
            # R̂ − R of a shift is the shift to rounding of an expectation.
            assert (np.asarray(part.loss) <= 1e-26).all()
            assert (np.asarray(part.span_error) <= 64 * 8 * EPS).all()
            np.testing.assert_allclose(part.error, [8, 64], rtol=1e-14)
        assert (np.asarray(found.sides.gap_change) <= 1e-13).all()
        assert (np.asarray(found.reward_span_error) == 0).all()


def test_reward_noise_by_plain_numpy():
    """The losses, from the oracle's F and J of the prompter it builds from r̂; RLHF from its π*."""
    rng = np.random.default_rng(4)
    beta, lam = 0.4, 0.3
    cases = []
    for name in ("independent", "sparse", "signed", "shared_rewrites"):
        for instance in draw(name, 5, SHAPE, 10):
            cases.append((instance, instance.reward + rng.uniform(-0.5, 0.5, instance.reward.shape)))

    def check(compute):
        for instance, estimate in cases:
            p, prior, frozen, own, reward = fields(instance)
            true = oracle(p, prior, frozen, own, reward, beta, lam)
            hat = oracle(p, prior, frozen, own, estimate, beta, lam)
            deployed = oracle(p, prior, frozen, own, reward, beta, lam, hat["rho"])
            found = compute(instance, estimate, beta, lam)
            np.testing.assert_allclose(p @ found.prompter.loss, deployed["shortfall"], atol=1e-14)
            lost = true["j_rho"] - deployed["j_rho"]
            np.testing.assert_allclose(p @ found.prompter.reward_loss, lost, atol=1e-14)
            hacked = sum(
                p[x] * (reward[x] @ (np.array(true["pi"][x]) - np.array(hat["pi"][x]))) for x in range(2)
            )
            np.testing.assert_allclose(p @ found.model.reward_loss, hacked, atol=1e-14)
            assert p @ found.sides.gap_change >= abs(hat["gap"] - true["gap"]) - 1e-14
            reach = np.array([frozen[own[x]] > 0 for x in range(2)]) | (prior @ frozen > 0)
            assert (np.asarray(reachable(instance)) == reach).all()
            error = np.abs(np.where(reach, estimate - reward, 0)).max(-1)
            np.testing.assert_allclose(found.reward_error, error, rtol=1e-15)
            distances = np.abs(frozen[:, None] - frozen[None]).sum(-1) / 2
            widest = [distances[np.ix_(row > 0, row > 0)].max() for row in prior]
            np.testing.assert_allclose(found.contraction, widest, rtol=1e-14)
            s = solved(instance, beta, lam, np.asarray(found.prompter.probs))
            np.testing.assert_allclose(found.prompter.loss, s.kl_to_star, rtol=1e-11)

    check(reward_noise)
    kills(check, lambda i, e, b, t: reward_noise(i, e, b, t * (1 + 1e-6)))
    kills(check, lambda i, e, b, t: reward_noise(i, e, b * (1 + 1e-6), t))


def test_the_bounds_on_the_sides_are_attained():
    """Policies that no reward moves (β, λ huge) and deterministic responses: the gap moves by span(δ)."""
    instance = small([0.0, 1.0], np.eye(2), [0.0, 0.0])
    found = reward_noise(instance, instance.reward + np.array([0.5, -0.5, 0]), 1e9, 1e9).sides
    np.testing.assert_allclose(found.gap_change, 1.0, rtol=1e-8)
    np.testing.assert_allclose(found.gap_bound, 1.0, rtol=1e-8)
    # The span form's width moves by span(δ) beside TV2 = 1.
    np.testing.assert_allclose(found.rhs_change, 1.0, rtol=1e-8)
    np.testing.assert_allclose(found.rhs_bound, 1.0, rtol=1e-8)
    # A frozen model that gives the other response with probability δ: R moves by span·δ, and so does the gap.
    instance = small([0.0, 1.0], [[1.0, 0], [1, 0]], [0.0, 1.0])
    frozen = np.array(instance.frozen)
    frozen[1] = [0.75, 0.25, 0.0]
    other = frozen_noise(instance, frozen, 1e9, 1e9)
    np.testing.assert_allclose(other.prompter.error, 0.25, rtol=1e-12)
    np.testing.assert_allclose(other.sides.gap_change, 0.25, rtol=1e-7)
    np.testing.assert_allclose(other.sides.gap_bound, 0.25, rtol=1e-7)


def test_a_little_mass_on_a_great_reward_moves_pi_star():
    """1e-6 of new mass and β = 0.05 make π* nearly certain of another response; the bound is attained."""
    instance = small([1.0], [[1.0, 0.0]], [0.0, 1.0])
    frozen = np.array(instance.frozen)
    frozen[0] = [1 - 1e-6, 1e-6, 0.0]
    found = frozen_noise(instance, frozen, 0.05, 1.0)
    mass = 1e-6 * np.exp(20)
    np.testing.assert_allclose(found.model_tv, mass / (1 - 1e-6 + mass), rtol=1e-9)
    np.testing.assert_allclose(found.model_tv_bound, found.model_tv, rtol=1e-9)
    assert found.model_loss[0] == np.inf  # KL to a π* without that response
    # Where the true model has it, the loss is its definition.
    turned = small([1.0], [[0.5, 0.5]], [0.0, 1.0])
    frozen[0] = [0.9, 0.1, 0.0]
    back = frozen_noise(turned, frozen, 0.5, 1.0)
    star, hat = np.array([0.5, 0.5 * np.e**2]), np.array([0.9, 0.1 * np.e**2])
    star, hat = star / star.sum(), hat / hat.sum()
    np.testing.assert_allclose(back.model_loss, 0.5 * (hat * np.log(hat / star)).sum(), rtol=1e-12)
    np.testing.assert_allclose(back.model_reward_loss, star[1] - hat[1], rtol=1e-12)
    np.testing.assert_allclose(back.tv_rows, [0.4, 0, 0, 0], rtol=1e-14)


def test_a_move_of_less_than_a_rounding_unit():
    """(1e-17, 1) sums to 1 in float64: half of the L1 distance from (0, 1) is half of what is moved."""
    cases = []
    for moved in ([[1e-17, 1.0]], [[0.0, 0.5, 0.5 + 1e-16]], [[3e-17, 1e-17, 1.0]], [[0.25, 0.75 - 1e-16]]):
        frozen = np.zeros((1, len(moved[0])))
        frozen[0, -1] = 1.0
        if moved[0][1] == 0.5:
            frozen[0] = [0.0, 0.5, 0.5]
        if moved[0][0] == 0.25:
            frozen[0] = [0.25, 0.75]
        reward = np.linspace(1.0, 0.0, len(frozen[0]))[None]
        p, q = ([mpmath.mpf(float(v)) for v in row] for row in (frozen[0], moved[0]))
        with mpmath.workdps(60):
            p, q = ([v / mpmath.fsum(row) for v in row] for row in (p, q))
            distance = float(sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2)
            change = float(abs(sum((a - b) * float(r) for a, b, r in zip(p, q, reward[0], strict=True))))
        cases.append((Instance([1.0], [[1.0]], frozen, [0], reward), np.array(moved), distance, change))

    def check(found_of):
        for instance, moved, distance, change in cases:
            found = found_of(instance, moved, 1.0, 1.0)
            assert found.tv_rows[0] >= distance * (1 - 1e-12)
            assert found.span[0] * found.tv[0] >= change * (1 - 1e-12)
            assert found.prompter.error[0] <= found.span[0] * found.tv[0] * (1 + 1e-12)

    check(frozen_noise)
    kills(
        check,
        mutated(robustness, "rows = tv_above(frozen, estimate)", "rows = tv(frozen, estimate)").frozen_noise,
    )


def test_misspecified_lambda():
    rng = np.random.default_rng(6)
    for name in FAMILIES:
        for instance in draw(name, 7, SHAPE, 6):
            width = max(float(np.ptp(instance.reward)), 1e-300)
            lam, used = width * 10.0 ** rng.uniform(-2, 2, 2)
            found = misspecified_lam(instance, lam, used)
            check_bounds(found, width)
            wrong = solved(instance, 1.0, used).rho_star
            s = solved(instance, 1.0, lam, wrong)
            np.testing.assert_allclose(found.loss, s.kl_to_star, rtol=1e-8, atol=1e-12 * width)
            direct = np.asarray(solved(instance, 1.0, lam).achieved - s.achieved)
            offset = np.abs(instance.reward).max()
            np.testing.assert_allclose(found.reward_loss, direct, atol=1e-12 * width + 20 * EPS * offset)
            # E R falls with λ.
            assert (np.sign(used - lam) * np.asarray(found.reward_loss) >= -1e-12 * width).all()
            energy = np.asarray(s.rewrite_reward)
            spans = [np.ptp(r[q > 0]) for r, q in zip(energy, np.asarray(instance.prior), strict=True)]
            want = abs(lam / used - 1) * np.array(spans)
            np.testing.assert_allclose(
                found.span_error, want, rtol=1e-7, atol=40 * EPS * offset * (1 + lam / used)
            )
    same = misspecified_lam(draw("independent", 8, SHAPE)[0], 0.3, 0.3)
    assert (np.asarray(same.loss) == 0).all()
    assert (np.asarray(same.loss_sup) == 0).all()


def test_temperatures_far_apart_give_limits():
    """λ′ = 1e-6 under λ = 1e6, and the reverse: the greedy prompter and ρ_sft, with their exact losses."""
    instance = draw("independent", 9, SHAPE)[0]
    s = solved(instance, 1.0, 1e6)
    greedy = misspecified_lam(instance, 1e6, 1e-6)
    best = np.asarray(s.rewrite_reward).argmax(-1)
    want = -1e6 * np.log(np.asarray(instance.prior)[np.arange(2), best])
    np.testing.assert_allclose(greedy.loss, want, rtol=1e-5)
    reference = misspecified_lam(instance, 1e-6, 1e6)
    lost = np.asarray(s.rewrite_reward).max(-1) - np.asarray(s.reference)
    np.testing.assert_allclose(reference.loss, lost, rtol=1e-4)
    for found in (greedy, reference):
        check_bounds(found, 1.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_no_scale_gives_nan(scale, temperature):
    rng = np.random.default_rng(10)
    for name in ("independent", "sparse", "adversarial", "signed"):
        instance = draw(name, 11, SHAPE)[0]
        instance = dataclasses.replace(instance, reward=scale * np.asarray(instance.reward))
        estimate = np.asarray(instance.reward) + scale * 0.1 * rng.standard_normal((2, 3))
        frozen = rng.dirichlet(np.ones(3), 4)
        parts = (
            reward_noise(instance, estimate, temperature, temperature),
            frozen_noise(instance, frozen, temperature, temperature),
            misspecified_lam(instance, temperature, 0.1 * temperature),
        )
        assert all(finite(leaf) for leaf in jax.tree.leaves(parts))
        check_bounds(parts[0].prompter, scale)
        check_bounds(parts[2], scale)


def test_averaging_proxies():
    """t KL(p‖p̄) = mean t KL(p‖p̂_m) − ambiguity, and the average's span bound is at most the members' mean."""
    rng = np.random.default_rng(12)
    cases = []
    for _ in range(40):
        base, energy = rng.dirichlet(np.ones(5), 3), rng.uniform(size=(3, 5))
        cases.append((base, energy, energy + rng.standard_normal((4, 3, 5)), 10.0 ** rng.uniform(-1, 2)))

    def check(compute):
        for case in cases:
            found = compute(*case)
            mean = np.asarray(found.members.reverse).mean(0)
            np.testing.assert_allclose(found.average.reverse, mean - found.ambiguity, atol=2e-13 * mean.max())
            assert (np.asarray(found.ambiguity) >= 0).all()
            below(found.average.span_error, np.asarray(found.members.span_error).mean(0), 1.0)
            below(found.average.loss_span, np.asarray(found.members.loss_span).mean(0), 1.0)
            # A = −t log of the normaliser of the geometric mean.
            product = np.exp(np.log(np.asarray(found.members.probs)).mean(0)).sum(-1)
            np.testing.assert_allclose(found.ambiguity, -case[-1] * np.log(product), rtol=1e-8, atol=1e-13)

    check(averaged)
    kills(check, lambda *case: averaged(*case)._replace(ambiguity=0 * averaged(*case).ambiguity))

    def with_average(b, e, m, t):
        worse = compiled(b, e, np.asarray(m[0]), t)
        return averaged(b, e, m, t)._replace(average=worse)

    kills(check, with_average)
    # No such guarantee for the loss in F: a perfect proxy and a very wrong one, averaged.
    found = averaged(np.array([0.5, 0.5]), np.zeros(2), np.array([[0.0, 0.0], [8.0, 0.0]]), 1.0)
    assert found.average.loss > np.asarray(found.members.loss).mean() + 0.2


def test_independent_errors_average_out():
    """E Var_p(δ̄) = E Var_p(δ)/M, so the loss of small errors falls as 1/M: over all sign patterns."""
    base, energy, t, size = padded(0.2, 0.3, 0.5), padded(0.1, 0.7, 0.4), 0.5, 1e-4
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T.reshape(-1, 2, 3)  # two members each
    delta = size * np.concatenate([signs, 0.0 * signs[..., :2]], -1)

    def expected(errors):
        found = jax.vmap(lambda d: compiled(base, energy, energy + d, t, d).loss)(errors)
        return float(np.mean(found))

    np.testing.assert_allclose(expected(delta.mean(1)), expected(delta[:, 0]) / 2, rtol=1e-3)


def test_bad_input():
    instance = draw("independent", 14, (2, 3, 4))[0]
    with pytest.raises(AlignProError, match=r"^estimate: reward: has 3 responses"):
        reward_noise(instance, np.zeros((2, 3)), 1.0, 1.0)
    bad = np.array(instance.reward)
    bad[1, 2] = np.nan
    with pytest.raises(AlignProError, match=r"^estimate: reward\[1, 2\] = nan is not finite"):
        reward_noise(instance, bad, 1.0, 1.0)
    with pytest.raises(AlignProError, match=r"^beta -1.0: must be a positive finite number"):
        reward_noise(instance, instance.reward, -1.0, 1.0)
    with pytest.raises(AlignProError, match=r"^lam inf: must be a positive finite number"):
        frozen_noise(instance, instance.frozen, 1.0, float("inf"))
    with pytest.raises(AlignProError, match=r"^estimate\[0\] sums to 2, not 1"):
        frozen_noise(instance, np.full((3, 4), 0.5), 1.0, 1.0)
    with pytest.raises(AlignProError, match=r"^estimate: has shape \(2, 4\)"):
        frozen_noise(instance, np.full((2, 4), 0.25), 1.0, 1.0)
    with pytest.raises(AlignProError, match=r"^used 0.0: must be a positive finite number"):
        misspecified_lam(instance, 1.0, 0.0)
