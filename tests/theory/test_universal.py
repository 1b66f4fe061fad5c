"""One prompter for all prompts: its optimum, the price of not reading x, and the bounds on that."""

from fractions import Fraction
from functools import cache

import jax
import mpmath
import numpy as np
import pytest
from mutants import mutated
from theory_oracle import kills

from alignpro.errors import AlignProError
from alignpro.theory import Instance, solution
from alignpro.theory.results import shared, strategy_table, universal

SHAPES = ((1, 1), (3, 1), (1, 4), (2, 3), (5, 2), (4, 5))
"""Prompts and strategies of random problems: few, since each is compiled anew."""


def tables(count, seed, wide=True):
    """Random problems: (reward, lam, prior, p, labels); λ and rewards over twelve decades where `wide`."""
    rng = np.random.default_rng(seed)
    for t in range(count):
        prompts, strategies = SHAPES[rng.integers(len(SHAPES))]
        reward = rng.normal(size=(prompts, strategies)) * (10.0 ** rng.uniform(-6, 6) if wide else 1.0)
        if t % 3 == 0:  # every prompt ranks the strategies alike
            reward = reward[:, :1] + rng.normal(size=(1, strategies)) * np.abs(reward).max()
        if t % 7 == 0:
            reward = np.round(reward)
        rows = 1 if t % 2 else prompts
        prior = np.broadcast_to(rng.dirichlet(np.ones(strategies), rows), reward.shape).copy()
        p = rng.dirichlet(np.ones(prompts))
        if t % 5 == 0 and strategies > 1:  # a prompt whose prior knows one strategy
            prior[rng.integers(prompts), 1:] = 0
            prior /= prior.sum(1, keepdims=True)
        if t % 11 == 0 and prompts > 1:
            p[0] = 0
        lam = 10.0 ** (rng.uniform(-6, 6) if wide else rng.uniform(-1, 1))
        yield reward, lam, prior, p / p.sum(), rng.integers(0, 3, prompts)


def oracle(reward, lam, prior, p, labels):
    """F(ρ*), F(q*) and the optimum that reads labels alone, from the definitions, at 60 digits."""
    number = np.vectorize(lambda v: mpmath.mpf(float(v)), otypes=[object])
    with mpmath.workdps(60):
        r, base, weights, lam = number(reward), number(prior), number(p), mpmath.mpf(float(lam))
        base, weights = base / base.sum(1)[:, None], weights / weights.sum()

        def best(members):
            """P·λ log Z̄ of the prompts that share one q, by their weights."""
            mass = sum(weights[x] for x in members)
            total = mpmath.mpf(0)
            for s in range(r.shape[1]):
                if all(base[x, s] > 0 for x in members):
                    total += mpmath.exp(
                        sum(weights[x] * (mpmath.log(base[x, s]) + r[x, s] / lam) for x in members) / mass
                    )
            return lam * mass * mpmath.log(total) if total else -mpmath.inf

        there = [x for x in range(len(p)) if p[x] > 0]
        kinds = [[x for x in there if labels[x] == kind] for kind in set(labels[there].tolist())]
        return sum(best([x]) for x in there), best(there), sum(best(kind) for kind in kinds)


@cache
def judged():
    # The largest first: most mutants fall there, before the other shapes are compiled.
    cases = sorted(tables(60, 0), key=lambda case: -case[0].size)
    return [(case, oracle(*case)) for case in cases]


def agrees(solve):
    for (reward, lam, prior, p, labels), (read, value, by_label) in judged():
        found = solve(reward, lam, prior, p, labels)
        error = float(found.error)
        assert error < 1e-11 * (np.abs(reward).max() + 10 * lam)  # says something
        for got, true in (
            (found.read, read), (found.value, value), (found.price, read - value),
            (found.explained, by_label - value),
        ):  # fmt: skip
            assert abs(float(got) - float(true)) <= error
        assert found.lower - error <= float(read - value) <= found.upper + error
        assert found.price >= -error


def test_it_is_the_optimum_and_its_price_at_60_digits():
    agrees(universal)
    for right, wrong in (
        ("read=offset + lam * average(p, log_z)", "read=offset + lam * log_z[0]"),
        ("mean = jnp.sum(weight * energy, 0)", "mean = jnp.mean(energy, 0)"),
        ("order = d - jnp.sum(q[None] * d, -1, keepdims=True)", "order = d"),
        ("more = jnp.logaddexp(0.0, beyond - within)", "more = 0.0 * within"),
        ("jnp.max(jnp.where(used, side + slips, 0.0), -1) for side in (order, -order)",
         "jnp.max(jnp.where(used, side + slips, 0.0), -1) / 2 for side in (order, -order)"),
        ("narrow = 2 * (spread", "narrow = 2.01 * (spread"),
        ("jnp.sum(jnp.where(mass > 0, mass * log_z_kind, 0.0))", "jnp.mean(log_z_kind)"),
    ):  # fmt: skip
        kills(agrees, mutated(shared, right, wrong).universal)


def test_it_beats_every_other_prompter_that_ignores_x():
    """F from its definition, at q* and near it: sharp, since the shortfall is λ KL(q‖q*)."""

    def objective(q, reward, lam, prior, p):
        return p @ ((q * reward).sum(1) - lam * (q * np.log(q / prior)).sum(1))

    def check(solve):
        rng = np.random.default_rng(1)
        for reward, lam, prior, p, _ in tables(30, 2, wide=False):
            if not (prior > 0).all():
                continue
            q = np.asarray(solve(reward, lam, prior, p).q)
            best = objective(q, reward, lam, prior, p)
            for size in (1.0, 1e-2):
                other = q * np.exp(size * rng.normal(size=q.shape))
                other /= other.sum()
                shortfall = lam * (other * np.log(other / q)).sum()
                np.testing.assert_allclose(
                    best - objective(other, reward, lam, prior, p), shortfall, rtol=1e-6, atol=1e-13
                )

    check(universal)
    kills(
        check,
        mutated(shared, "mean = jnp.sum(weight * energy, 0)", "mean = jnp.mean(energy, 0)").universal,
    )


def test_two_strategies_attain_both_bounds():
    def check(solve):
        rng = np.random.default_rng(3)
        for _ in range(20):
            reward, lam = rng.normal(size=(4, 2)), 10.0 ** rng.uniform(-1, 2)
            found = solve(reward, lam)
            tolerance = 1e-9 * float(found.price) + 4 * float(found.error)
            assert abs(found.upper - found.lower) <= tolerance
            assert abs(found.upper - found.price) <= tolerance

    check(universal)
    kills(check, mutated(shared, "wide = 2 * jnp.logaddexp", "wide = 2.02 * jnp.logaddexp").universal)


def test_limits_in_lambda():
    rng = np.random.default_rng(4)
    reward, p = rng.normal(size=(5, 3)), rng.dirichlet(np.ones(5))
    cold = universal(reward, 1e-3, p=p)
    fixed = p @ reward.max(1) - (p @ reward).max()
    assert abs(float(cold.price) - fixed) < 5e-3
    assert int(cold.best) == int((p @ reward).argmax())
    np.testing.assert_allclose(float(cold.best_reward), (p @ reward).max(), rtol=1e-14)
    np.testing.assert_allclose(float(cold.achieved), (p @ reward).max(), atol=5e-3)
    hot = universal(reward, 1e6, p=p)
    apart = reward - p @ reward
    apart -= apart.mean(1, keepdims=True)
    interaction = (apart**2).mean(1)  # q* is uniform there
    np.testing.assert_allclose(hot.interaction, interaction, rtol=1e-5)
    np.testing.assert_allclose(float(hot.price), p @ interaction / 2e6, rtol=1e-5)
    alike = universal(reward[:1].repeat(5, 0), 0.1, p=p)
    assert 0 <= float(alike.price) <= float(alike.error)


def test_labels_explain_what_they_can():
    reward = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    by_kind = universal(reward, 0.1, labels=np.array([7, 7, 2]))
    assert by_kind.price > 0.1
    np.testing.assert_allclose(by_kind.explained, by_kind.price, rtol=1e-14)
    by_nothing = universal(reward, 0.1, labels=np.zeros(3, int))
    assert abs(by_nothing.explained) <= by_nothing.error
    np.testing.assert_allclose(universal(reward, 0.1).explained, by_kind.price, rtol=1e-14)


def test_strategies_of_an_instance_are_those_of_its_prompter():
    """Where every prompt's rewrites are its strategies, ρ* and F are `solution`'s."""
    rng = np.random.default_rng(5)
    prompts, strategies, rewrites = 3, 4, 12
    at = np.arange(12).reshape(3, 4)
    prior = np.zeros((prompts, rewrites))
    np.put_along_axis(prior, at, rng.dirichlet(np.ones(strategies), prompts), 1)
    instance = Instance(
        p=rng.dirichlet(np.ones(prompts)), prior=prior, frozen=rng.dirichlet(np.ones(6), rewrites),
        own=at[:, 0], reward=rng.normal(size=(prompts, 6)),
    )  # fmt: skip
    reward, base = strategy_table(instance, at)
    found, exact = universal(reward, 0.3, base, instance.p), solution(instance, 1.0, 0.3)
    np.testing.assert_allclose(found.star, np.take_along_axis(np.asarray(exact.rho_star), at, 1), rtol=1e-12)
    np.testing.assert_allclose(found.read, exact.average(exact.value), rtol=1e-12)
    kills(
        lambda base: np.testing.assert_allclose(universal(reward, 0.3, base, instance.p).read, found.read),
        np.full(base.shape, 0.25),
    )


def test_it_runs_under_vmap_and_grad():
    rng = np.random.default_rng(6)
    reward, p = rng.normal(size=(4, 3)), np.full(4, 0.25)
    prior, kinds = np.full((4, 3), 1 / 3), np.zeros(4, int)
    slope = jax.grad(lambda lam: shared._universal(reward, prior, p, lam, kinds).value)(0.7)
    found = universal(reward, 0.7)
    kl = float((found.q * np.log(np.asarray(found.q) * 3)).sum())
    np.testing.assert_allclose(slope, -kl, rtol=1e-10)  # the envelope theorem
    many = jax.vmap(lambda lam: shared._universal(reward, prior, p, lam, kinds).price)(np.array([0.7, 7.0]))
    np.testing.assert_allclose(many[0], found.price, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.array([[np.nan, 0.0], [0.0, 1.0]])}, "reward: "),
        ({"lam": 0.0}, "lam"),
        ({"prior": np.array([0.5, 0.4])}, "prior"),
        ({"prior": np.eye(2)}, "prior: excludes every strategy"),
        ({"p": np.array([1.5, -0.5])}, "p"),
        ({"labels": np.array([0, -1])}, "labels"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    given = {"reward": np.eye(2), "lam": 1.0, **change}
    with pytest.raises(AlignProError, match=message):
        universal(**given)


@pytest.mark.parametrize(
    ("rewrites", "message"),
    [([[0, 9]], "positions"), ([[1, 2]], "excludes")],
)
def test_positions_that_are_none_are_refused(rewrites, message):
    instance = Instance(
        p=np.ones(1),
        prior=np.eye(3)[:1],
        frozen=np.full((3, 2), 0.5),
        own=np.zeros(1, int),
        reward=np.array([[0.0, 1.0]]),
    )
    with pytest.raises(AlignProError, match=message):
        strategy_table(instance, np.array(rewrites))


def test_its_bounds_are_proved_in_ball_arithmetic():
    pytest.importorskip("flint")
    from alignpro.theory.proof import shared as proof

    def middle(ball):
        """Of "[1.2 +/- 3e-9]", "[+/- 3e-9]" or a rational."""
        text = ball.strip("[]").split("+/-")[0].strip()
        return float(Fraction(text)) if text else 0.0

    def check(prove):
        proved = 0
        for reward, lam, prior, p, _ in tables(40, 7):
            if not ((prior > 0).all() and (p > 0).all()):
                continue
            bounds = prove(reward, lam, prior, p, 512)
            assert "violated" not in {bound.verdict for bound in bounds}
            if "inconclusive" in {bound.verdict for bound in bounds}:
                continue  # equalities: one prompt, one or two strategies, no interaction
            proved += 1
            lower, upper = bounds
            found = universal(reward, lam, prior, p)
            error = float(found.error)
            assert abs(middle(lower.rhs) - float(found.price)) <= error + 1e-15 * abs(middle(lower.rhs))
            # The bounds in floating point leave room for rounding, and only for that.
            assert float(found.lower) <= middle(lower.lhs) + error
            assert float(found.upper) >= middle(upper.rhs) - error
        assert proved >= 8

    check(proof.certified_price)
    kills(check, mutated(proof, '"max") for row', '"min") for row').certified_price)
    with pytest.raises(AlignProError, match="positive"):
        proof.certified_price(np.eye(2), 1.0, np.eye(2), np.full(2, 0.5))
