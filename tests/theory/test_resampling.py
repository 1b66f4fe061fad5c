"""The resampled prompter: its law by brute force, bounds, where they are attained, what no method can do."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import kills, mutated

from alignpro import calls as closed
from alignpro.errors import AlignProError
from alignpro.theory import Instance
from alignpro.theory.families import FAMILIES, draw
from alignpro.theory.proof import resampling as proof
from alignpro.theory.results import answered, calls_needed, resample_law, resampled, worst_share
from alignpro.theory.results.robustness import worst_loss

SPREAD = ("independent", "peaked", "sparse", "near_deterministic")
FIELDS = ("probs", "loss", "reward_loss", "tv", "kl", "chi2", "kl_bound")


def brute(b, e, t, n):
    """Every sequence of n draws, its probability, and which of them is kept."""
    w, law = np.exp((e - e.max()) / t), np.zeros(len(b))
    for drawn in itertools.product(range(len(b)), repeat=n):
        d = list(drawn)
        law += b[d].prod() * np.bincount(d, w[d], len(b)) / w[d].sum()
    star = b * w / (b * w).sum()
    share = star / b
    return {
        "probs": law,
        "loss": t * (law * np.log(law / star)).sum(),
        "reward_loss": (star - law) @ e,
        "tv": np.abs(star - law).sum() / 2,
        "kl": (star * np.log(star / law)).sum(),
        "chi2": star @ share - 1,
        "kl_bound": star @ np.log1p((share - 1) / n),
    }


def laws():
    """Eight laws of four rewrites: one shape in all tests, so that it is compiled once."""
    rng = np.random.default_rng(3)
    return rng.dirichlet(np.ones(4), 8), rng.uniform(-1, 1, (8, 4)), 10 ** rng.uniform(-1.3, 1, 8)


def one(base, energy, t, n):
    """`resample_law` of one small law, padded to that shape."""
    b, e = np.zeros((8, 4)), np.zeros((8, 4))
    b[:, : len(base)], e[:, : len(base)] = base, energy
    return jax.tree.map(lambda leaf: leaf[0], resample_law(b, e, np.full(8, float(t)), n))


def test_the_law_is_that_of_all_sequences_of_draws():
    b, e, t = laws()

    def check(law):
        for n in (1, 2, 5):
            found = law(b, e, t, n)
            for i in range(len(b)):
                for name, true in brute(b[i], e[i], t[i], n).items():
                    np.testing.assert_allclose(getattr(found, name)[i], true, rtol=1e-9, atol=1e-13)

    check(resample_law)
    kills(check, lambda b, e, t, n: resample_law(b, e, t, n + 1))
    kills(check, lambda b, e, t, n: resample_law(b, e / 2, t, n))


CHAINS = (
    ("kl", "kl_bound", "kl_chi2"),
    ("tv", "tv_bound", "tv_excess"),
    ("loss", "reward_loss", "reward_bound", "reward_worst"),
)


def _instances(count):
    """Instances of each family with a λ from far below the rewards' range to far above it, and an n."""
    rng = np.random.default_rng(0)
    for family in SPREAD:
        batch = FAMILIES[family](rng, count, (2, 4, 3))
        yield batch, 10.0 ** rng.uniform(-2.5, 2, count), 2 ** rng.integers(0, 20, count)


def test_bounds_hold_in_order_on_every_family():
    every = jax.jit(jax.vmap(resampled))

    def check(scale):
        """`scale` multiplies χ², and what stands for n in the bounds' denominators."""
        for batch, lam, n in _instances(60):
            found = every(batch, jnp.asarray(lam), jnp.asarray(n))
            changed = found._replace(
                kl_chi2=jnp.log1p(scale * found.chi2 / n[:, None]),
                tv_excess=scale * found.excess / (n[:, None] + found.excess),
                reward_worst=scale * found.reward_worst,
            )
            slip = 1e-11 * (1.0 + np.abs(lam))[:, None]
            for chain in CHAINS:
                values = [np.asarray(getattr(changed, name)) for name in chain]
                assert np.isfinite(values).all()
                for less, more in itertools.pairwise(values):
                    assert (less <= more * (1 + 1e-9) + slip).all(), chain
            assert (found.chi2 <= found.excess * (1 + 1e-9) + slip).all()
            assert (found.excess <= found.chi2 * (1 + 1e-9) + 0.25 + slip).all()

    check(1.0)
    kills(check, 0.9)


def test_one_draw_attains_the_bounds_and_rarity_makes_the_others_tight():
    """n = 1: equality. A good rewrite of mass m → 0 as λ → 0: no smaller multiple of χ²/n would do."""
    b, e, t = laws()
    found = resample_law(b, e, t, 1)
    for chain in CHAINS:
        less, more = (getattr(found, name) for name in chain[len(chain) - 3 : len(chain) - 1])
        np.testing.assert_allclose(less, more, rtol=1e-10, atol=1e-14)
    for n in (1, 3, 20):
        m = 1e-4
        rare = one([1 - m, m], [0.0, 1.0], 1e-3, n)
        assert float(rare.kl) == pytest.approx(-math.log(-math.expm1(n * math.log1p(-m))), rel=1e-9)
        assert -1e-12 <= float(rare.kl_chi2 - rare.kl) < n * m
        assert -1e-12 <= float(rare.tv_excess - rare.tv) < (n * m) ** 2 + n * m * m
    # Two rewrites of odds e^{z/2} attain the last in the chain at n = 1.
    z = 3.0
    q = math.exp(-z / 2)
    two = one(np.array([1, q]) / (1 + q), [0.0, 1.0], 1 / z, 1)
    assert float(two.reward_loss) == pytest.approx(float(two.reward_worst), rel=1e-12)
    # And at any n a law of two rewrites attains `reward_worst` as a bound on `reward_bound`.
    n = 7
    q = math.sqrt(n / (n + math.expm1(z)))
    m = 1 / (1 + math.exp(z) * q)
    two = one([1 - m, m], [0.0, 1.0], 1 / z, n)
    assert float(two.reward_bound) == pytest.approx(float(two.reward_worst), rel=1e-12)


def test_large_numbers_and_small_temperatures():
    """A million draws lose 1/n of the reward; at λ → 0 the law is that of the best of n; zeros stay zero."""
    b, e, _ = laws()
    far = resample_law(b, e, np.full(8, 0.3), 10**6)
    np.testing.assert_allclose(jnp.sum(far.probs, -1), 1.0, rtol=1e-13)
    # Against first order: E_ρ* R − E_ρn R → Cov_ρ*(R, w)/n.
    star = b * np.exp(e / 0.3)
    star /= star.sum(-1, keepdims=True)
    w = star / b
    cov = (star * w * e).sum(-1) - (star * w).sum(-1) * (star * e).sum(-1)
    np.testing.assert_allclose(far.reward_loss * 1e6, cov, rtol=1e-4)
    greedy = one([0.9, 0.1, 0.0], [0.0, 1.0, 5.0], 1e-9, 3)
    np.testing.assert_allclose(greedy.probs, [0.729, 0.271, 0.0, 0.0], rtol=1e-13)
    assert all(np.isfinite(np.asarray(value)).all() for value in greedy)


def test_answers_tilt_by_a_larger_reward():
    """R_A from all tuples of answers; the loss within bounds; both equal where one rewrite is sure."""
    i = draw("independent", 5, (2, 3, 3))[0]
    lam, a = 0.15, 3
    frozen, r = np.asarray(i.frozen), np.asarray(i.reward)

    def check(noisy):
        found = noisy(i, lam, a)
        first, second = np.zeros((2, 3)), np.zeros((2, 3))
        for y in itertools.product(range(3), repeat=a):
            y = list(y)
            chance = frozen[:, y].prod(1)
            mean = r[:, y].mean(1)
            first += chance * np.exp(mean / lam)[:, None]
            second += chance * np.exp(2 * mean / lam)[:, None]
        np.testing.assert_allclose(found.rise, lam * np.log(first) - r @ frozen.T, rtol=1e-9)
        prior = np.asarray(i.prior)
        square = (prior * second).sum(1) / (prior * first).sum(1) ** 2 - 1
        np.testing.assert_allclose(found.chi2, square, rtol=1e-9)
        assert (found.rise <= found.rise_bound[:, None]).all()
        assert (found.prompter.loss <= found.loss_bound).all()
        assert (found.loss_bound <= found.loss_fourth).all()

    check(answered)
    kills(check, lambda i, lam, a: answered(i, lam, 1))
    kills(
        check, lambda i, lam, a: answered(i, lam, a)._replace(rise_bound=0 * answered(i, lam, a).rise_bound)
    )


def test_the_worst_noise_is_attained_by_two_rewrites():
    """One that always gives the same, one of two answers at the worst odds, drawn at the worst odds."""
    lam, a = 0.2, 2
    u = 1 / (a * lam)
    odds = (u / -math.expm1(-u) - 1) / math.expm1(u)  # of the answer overrated, in the tilted law
    p = odds * math.exp(u) / (odds * math.exp(u) + 1 - odds)
    p = 1 - p  # the tilt of the reverse: E r e^{r/t} starts from the other end
    rows = np.array([[1 - p, p, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    rise = float(worst_loss(1.0, a * lam))
    v = rise / lam
    tilted = (v / -math.expm1(-v) - 1) / math.expm1(v)  # what ρ* gives to the rewrite that noise overrates
    prior = [[tilted, 1 - tilted, 0.0]] * 2
    i = Instance([1.0, 0.0], prior, rows, [0, 0], [[0.0, 1.0, p]] * 2)
    found = answered(i, lam, a)
    assert float(found.rise[0, 0]) == pytest.approx(rise, rel=1e-9)
    assert float(found.prompter.loss[0]) == pytest.approx(float(found.loss_bound[0]), rel=1e-9)


def test_enough_calls_are_enough():
    """By enumerating draws with their answers: the reward lost is at most eps, as promised."""
    sure = 0.97 * np.eye(3) + 0.01  # so that few answers are enough
    i = Instance([0.5, 0.5], [[0.5, 0.3, 0.2]] * 2, sure, [0, 0], [[0.0, 0.5, 1.0], [1.0, 0.2, 0.0]])
    lam, frozen, r = 0.3, np.asarray(i.frozen), np.asarray(i.reward)

    def lost(n, a):
        """E_x of what (n, A) loses: rewrites with their mean rewards are the 3·3^A outcomes drawn."""
        total = 0.0
        for x in range(2):
            pairs = [
                (k, frozen[k, list(y)].prod(), r[x, list(y)].mean())
                for k in range(3)
                for y in itertools.product(range(3), repeat=a)
            ]
            k, chance, mean = (np.array(v) for v in zip(*pairs, strict=True))
            law = resample_law(np.asarray(i.prior)[x, k] * chance, mean, lam, n)
            true = r[x] @ frozen.T
            star = np.asarray(i.prior)[x] * np.exp(true / lam)
            total += i.p[x] * ((star / star.sum()) @ true - np.asarray(law.probs) @ true[k])
        return float(total)

    eps = lost(1, 1) / 2
    plan = calls_needed(i, lam, eps)
    assert plan is not None
    assert plan.loss <= eps
    assert plan.answers <= 2

    def check(n):
        assert lost(n, plan.answers) <= eps

    check(plan.draws)
    kills(check, 1)
    assert calls_needed(i, lam, eps / 4).calls > plan.calls
    assert calls_needed(i, 1e-4, 1e-9, most_answers=4) is None


def test_closed_forms():
    for width, lam, n in ((1.0, 0.1, 5), (2.0, 3.0, 1), (1.0, 0.01, 10**6), (0.5, 40.0, 3)):
        assert closed.worst_share(width, lam, n) == pytest.approx(
            float(worst_share(width, lam, n)), rel=1e-12
        )
        assert closed.worst_rise(width, lam) == pytest.approx(float(worst_loss(width, lam)), rel=2e-5)
        assert closed.worst_rise(width, lam) >= float(worst_loss(width, lam)) * (1 - 1e-12)
    plan = closed.calls_sure(1.0, 0.5, 0.05)
    noise = closed.noise_share(1.0, 0.5, plan.answers)
    # Solved for n: (e^z − 1)/(e^{4 artanh(share)} − 1).
    assert plan.draws == math.ceil(math.expm1(2.0) / math.expm1(4 * math.atanh(0.05 - noise)))
    assert plan.loss == pytest.approx(noise + closed.worst_share(1.0, 0.5, plan.draws))
    assert closed.calls_sure(1.0, 1e-3, 0.01) is None


def test_no_test_tells_with_fewer_draws_and_one_does_with_as_many():
    """All tests of N draws: one says yes with chance c where none is good, and always where one is."""

    def check(calls_to_tell):
        for m, b, a in ((0.02, 0.025, 0.0), (0.2, 0.1, 0.1), (0.4, 0.05, 0.3)):
            needed = calls_to_tell(m, b, a)
            for n in range(1, 400):
                # Where no good rewrite is seen both prompts give the same draws; a test may say yes to them
                # with probability c ≤ a at most. It then misses with probability (1 − c)(1 − m)^n.
                misses = (1 - a) * (1 - m) ** n
                assert (misses <= b * (1 + 1e-12)) == (n >= needed - 1e-9), (m, b, a, n)

    check(closed.calls_to_tell)
    kills(check, lambda m, b, a: math.log((1 - a) / b) / m)  # its first order is too many
    kills(check, lambda m, b, a: math.log(1 / b) / -math.log1p(-m))
    for bad in (
        {"mass": 0.0, "miss": 0.1},
        {"mass": 0.1, "miss": 1.0},
        {"mass": 0.1, "miss": 0.1, "false_alarm": 1.0},
    ):
        with pytest.raises(AlignProError, match="must be"):
            closed.calls_to_tell(**bad)


def test_what_is_out_of_reach_is_lost_by_resampling_too():
    """On the prompts of the proof, with exact answers, the resampled prompter loses at least as much."""
    width, lam = 1.0, 0.1
    for n in (1, 30, 1000):
        least = closed.unreachable_loss(width, lam, n)
        m = 2.0 ** np.linspace(-6, 2, 8) / (n + 1) / 4.0
        base = np.stack([1 - m, m, 0 * m, 0 * m], 1)
        worth = np.tile([0.0, width, 0.0, 0.0], (8, 1))
        worst = float(jnp.max(resample_law(base, worth, np.full(8, lam), n).reward_loss))
        assert least <= worst + 0.02
        assert worst <= float(width * worst_share(width, lam, n))
    # Without a call: the best of what can be said is that of ρ_sft, width tanh(width/4λ) worse.
    assert closed.unreachable_loss(width, lam, 0) == pytest.approx(math.tanh(width / (4 * lam)), rel=1e-5)
    n = closed.calls_out_of_reach(width, lam, 0.05)
    assert closed.unreachable_loss(width, lam, n) > 0.05 >= closed.unreachable_loss(width, lam, n + 1)
    assert closed.calls_out_of_reach(width, 10.0, 0.5) == 0


def test_bounds_are_proved_in_balls():
    chains = (
        ("kl", "kl_bound"),
        ("kl_bound", "kl_chi2"),
        ("tv", "tv_bound"),
        ("reward_loss", "reward_bound"),
        ("reward_bound", "reward_worst"),
        ("loss", "reward_loss"),
    )

    def check(certified):
        b, e, _ = laws()
        for x, n in ((0, 1), (1, 3)):
            prior, r = b[x, :3] / b[x, :3].sum(), e[x, :3]
            found, close = certified(prior, r, "1/4", n), one(prior, r, 0.25, n)
            for c, (less, more) in zip(found, chains, strict=True):
                slack = float(getattr(close, more) - getattr(close, less))
                assert c.slack_lower - 1e-9 <= slack <= c.slack_upper + 1e-9
                assert c.verdict == "holds" or (c.verdict == "inconclusive" and abs(slack) < 1e-9), c

    check(lambda *a: proof.certified_resampling(*a, max_precision=256))
    wrong = mutated(proof, "np.log(more / n + 1)).sum(), kl)", "np.log(more / n + 1)).sum() / 2, kl)")
    kills(check, lambda *a: wrong.certified_resampling(*a, max_precision=256))
    with pytest.raises(AlignProError, match="too many to enumerate"):
        proof.certified_resampling(np.full(9, 1 / 9), np.zeros(9), 1.0, 40)


def test_bad_numbers_are_refused():
    i = draw("independent", 5, (2, 3, 3))[0]
    for call, match in (
        (lambda: resampled(i, 0.1, 0), "n 0: must be an integer"),
        (lambda: resampled(i, -1.0, 2), "lam -1.0"),
        (lambda: answered(i, 0.1, 0), "answers 0: must be an integer"),
        (lambda: calls_needed(i, 0.1, 0.0), r"eps 0\.0: must be a positive"),
        (lambda: closed.calls_out_of_reach(1.0, 0.1, -1.0), r"eps -1\.0"),
    ):
        with pytest.raises(AlignProError, match=match):
            call()
