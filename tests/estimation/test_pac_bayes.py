"""Limits for prompters that the same sample chose: constants, coverage, the optimum, and the race's own."""

import math
from itertools import product

import mpmath
import numpy as np
import pytest
from mutants import kills, mutated
from scipy.optimize import minimize_scalar

from alignpro.errors import AlignProError
from alignpro.estimation import compare, pac_bayes, race
from alignpro.estimation.pac_bayes import below, constant


def kl(p, m):
    """kl(p‖m), nats, of two numbers with 0 < m < 1."""
    return (p * math.log(p / m) if p else 0.0) + ((1 - p) * math.log((1 - p) / (1 - m)) if p < 1 else 0.0)


def moment(n, p):
    """E e^{n kl(k/n‖p)} for k successes in n: by enumeration."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) * math.exp(n * kl(k / n, p)) for k in range(n + 1))


def test_the_constant_is_the_moment_whatever_the_mean():
    """Sharp: an equality. The mutants leave it out, and take √n."""

    def check(of):
        for n, p in product((1, 2, 3, 7, 30), (0.01, 0.5, 0.93)):
            assert math.exp(of(n)) == pytest.approx(moment(n, p), rel=1e-9)

    check(constant)
    kills(check, lambda n: 0.0)
    kills(check, lambda n: 0.5 * math.log(n))
    for n in (1, 2, 3, 7, 8, 100, 10_000):
        assert constant(n) <= constant(n, True) + 1e-9 <= math.log(2.0 * math.sqrt(n)) + 2e-9
    assert [constant(1), constant(1, True)] == pytest.approx([math.log(2.0)] * 2)


def crossed(log_c, p, delta, most):
    """Probability that n kl(mean‖p) exceeds log(C/δ) at some n ≤ `most`: by dynamic programming."""
    alive, out = np.ones(1), 0.0
    for n in range(1, most + 1):
        alive = np.append(alive * (1 - p), 0.0) + np.append(0.0, alive * p)
        over = np.array([n * kl(k / n, p) > log_c(n) - math.log(delta) for k in range(n + 1)])
        out += alive[over].sum()
        alive = np.where(over, 0.0, alive)
    return out


def test_one_constant_is_right_at_all_times():
    """Up to 150 prompts, however many are chosen by looking. Without it too many samples leave some time."""

    def check(log_c):
        for p in (0.1, 0.5):
            assert crossed(log_c, p, 0.3, 150) <= 0.3

    check(lambda n: constant(n, True))
    kills(check, lambda n: 0.0)


def test_the_capital_never_falls_short_of_kl_by_more_than_the_constant():
    """e^{n kl} ≤ τ(n) W for means that are no whole numbers of successes too, with equality at both ends."""
    for n in (1, 3, 20):
        for s in np.linspace(0.0, n, 41):
            x = s / n
            log_w = float(mpmath.log(mpmath.beta(s + 0.5, n - s + 0.5) / mpmath.pi))
            best = (s * math.log(x) if s else 0.0) + ((n - s) * math.log(1 - x) if s < n else 0.0)
            assert best - log_w <= constant(n, True) + 1e-9
            if s in (0.0, n):
                assert best - log_w == pytest.approx(constant(n, True))


def test_kl_is_turned_round():
    for p, most in ((0.3, 0.1), (0.999, 0.02), (1e-3, 1e-3), (1.0, 0.7), (0.5, 3.0)):
        found = float(below(np.array(p), np.array(most)))
        with mpmath.workdps(30):
            other = (1 - mpmath.mpf(p)) * mpmath.log((1 - p) / (1 - mpmath.mpf(found))) if p < 1 else 0
            at = p * mpmath.log(p / mpmath.mpf(found)) + other
        assert float(at) == pytest.approx(most, rel=1e-9)
    assert below(np.array([0.0, 0.4]), np.array([1.0, np.inf])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("n", [1, 3])
def test_limits_cover_on_every_table(n):
    """Exactly: all tables of 0 and 1 of two prompters, for 81 pairs of chances, at a level of 0.55."""
    grid, level = np.linspace(0.02, 0.98, 9), 0.55
    missed = np.zeros((2, 9, 9))
    first, second = grid[:, None], grid[None]
    for cells in product((0.0, 1.0), repeat=2 * n):
        table = np.reshape(cells, (n, 2))
        found, k = pac_bayes.pac_bayes(table, 0.0, 1.0, level), table.sum(0)
        chance = first ** k[0] * (1 - first) ** (n - k[0]) * second ** k[1] * (1 - second) ** (n - k[1])
        for i, of in enumerate((found.gibbs, found.best)):
            truth = of.weights[0] * first + of.weights[1] * second
            missed[i] += chance * (of.limit > truth)
    assert missed.max() <= 1 - level
    assert missed.max() > 0.02  # they say something


def test_a_prior_chosen_by_looking_is_noticed():
    """30 prompters alike, 4 prompts, 50 tables: over 8 misses with probability 0.1% were they 5%."""
    rng, chance = np.random.default_rng(0), 0.34
    tables = (rng.random((50, 4, 30)) < chance).astype(float)

    def check(chosen):
        found = [pac_bayes.pac_bayes(t[:, [t.mean(0).argmax()]] if chosen else t, 0.0, 1.0) for t in tables]
        assert max(sum(getattr(f, of).limit > chance for f in found) for of in ("gibbs", "best")) <= 8

    check(False)
    kills(check, True)


def cases():
    rng = np.random.default_rng(1)
    for n, count in ((8, 3), (40, 12), (200, 5)):
        means = rng.dirichlet(np.ones(3), count)[:, 0]
        table = -1.0 + 3.0 * rng.beta(2 * means, 2 * (1 - means), (n, count))  # rewards from -1 to 2
        prior = 0.9 * rng.dirichlet(np.ones(count))
        yield table, prior


def test_no_mixture_has_a_greater_limit():
    """Against ℓ(κ), from the optimal value of equation (9), and random mixtures. The mutants tilt less."""

    def check(module):
        for table, prior in cases():
            n, means = len(table), (table.mean(0) + 1.0) / 3.0
            found = module.pac_bayes(table, -1.0, 2.0, prior=prior)
            limit, mixed, c = (found.gibbs.limit + 1.0) / 3.0, found.gibbs, constant(n) - math.log(0.05)

            def guarantee(log_kappa, n=n, means=means, prior=prior, c=c):
                k = math.exp(log_kappa)
                value = math.log(prior @ np.exp(n * k * (means - 1.0))) / n + k
                return -math.expm1(value - c / n) / math.expm1(k)

            best = min(minimize_scalar(guarantee, (at, at + 0.1)).fun for at in (-3.0, -1.0, 1.0))
            assert limit == pytest.approx(max(-best, 0.0), abs=1e-7)
            q = np.random.default_rng(2).dirichlet(np.ones(len(prior)), 200)
            others = below(q @ means, ((q * np.log(q / prior)).sum(1) + c) / n)
            assert others.max() <= limit + 1e-12
            tilt = prior * np.exp((table.mean(0) - table.mean(0).max()) / mixed.lam)
            assert mixed.weights == pytest.approx(tilt / tilt.sum(), abs=1e-6)
            p = np.array(mixed.weights) @ means
            assert mixed.mean == pytest.approx(3.0 * p - 1.0)
            slope = math.log(p * (1 - limit) / (limit * (1 - p)))
            assert mixed.lam == pytest.approx(3.0 / (n * slope), rel=1e-5)
            assert mixed.kl == pytest.approx(float(mixed.weights @ np.log(mixed.weights / prior)))

    check(pac_bayes)
    for right, wrong in (
        ("b, n * slope", "b, slope"),
        ("(n * float(tilted", "(float(tilted"),
        ("width / (n", "1 / (n"),
    ):
        kills(check, mutated(pac_bayes, right, wrong))


def test_what_is_certain_is_sharp():
    """One prompter that always earned all: δ = ξ(n) times the chance of that, L^n."""
    found = pac_bayes.pac_bayes(np.ones((6, 1)), 0.0, 1.0)
    assert found.gibbs.limit == pytest.approx((0.05 / math.exp(constant(6))) ** (1 / 6))
    none = pac_bayes.pac_bayes(np.zeros((6, 3)), 0.0, 1.0)
    assert (none.gibbs.limit, none.best.limit, none.gibbs.kl) == (0.0, 0.0, 0.0)
    alike = pac_bayes.pac_bayes(np.tile(np.array([[0.0], [1.0]]), (10, 500)), 0.0, 1.0)
    assert alike.gibbs.limit > alike.best.limit + 0.05  # a mixture pays for no choice


def test_bad_arguments():
    for table, prior in ((np.full((5, 2), 1.5), None), (np.zeros(5), None), (np.zeros((5, 2)), [0.9, 0.9])):
        with pytest.raises(AlignProError, match=r"^(table|prior): give"):
            pac_bayes.pac_bayes(table, 0.0, 1.0, prior=prior)


def run(seed, module=race):
    rng = np.random.default_rng(seed)
    chance = np.linspace(0.3, 0.6, 12)
    found = module.race(
        lambda arms, at, each: (rng.random((len(arms), len(at), each)) < chance[arms][:, None, None]) * 1.0,
        12, 200, 0.0, 1.0, budget=600,
    )  # fmt: skip
    return found, chance


def test_the_race_guarantees_what_it_chose():
    """b is uniform over all arms, not over those that were left (the mutant); all limits hold in 20 races."""

    def check(module):
        for seed in range(3):
            found, _ = run(seed, module)
            sure, last = found.guaranteed, [r for r in found.ranked if r.mean.n_clusters == found.prompts]
            assert len(sure.gibbs.weights) == len(last) < 12
            assert sure.anytime
            assert sure.n == found.prompts
            assert sure.best.kl == pytest.approx(math.log(12))
            assert found.ranked[0].mean.lo <= sure.best.limit < found.ranked[0].mean.value

    check(race)
    kills(check, mutated(race, "1.0 / arms)", "1.0 / len(last))"))
    for seed in range(20):
        found, chance = run(seed)
        arms = [raced.arm for raced in found.ranked]
        assert found.guaranteed.best.limit <= chance[arms[0]]
        weights = found.guaranteed.gibbs.weights
        assert found.guaranteed.gibbs.limit <= np.dot(weights, chance[arms[: len(weights)]])


def test_compare_guarantees_its_best_arm():
    from populations import draw, problems

    from alignpro.commands.compare import page, text

    found = compare(
        draw(problems()["rewards 0.5 +- 0.1"], 20, np.random.default_rng(0)), ["none", "sft", "trained"]
    )
    best = max(found.mean, key=lambda name: found.mean[name].value)
    sure = found.guaranteed
    assert sure.best.weights[list(found.mean).index(best)] == 1.0
    assert sure.best.mean == pytest.approx(found.mean[best].value)
    assert 0.2 < sure.best.limit < found.mean[best].lo
    assert f'"{best}" earns at least {sure.best.limit:.4g}; at random with shares ' in text(found)
    assert any(section.heading == "What is guaranteed" for section in page(found).sections)
