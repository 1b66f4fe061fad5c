import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mutants import mutated
from scipy.optimize import minimize
from theory_oracle import EPS, exact, fields, finite, kills

from alignpro.errors import AlignProError
from alignpro.theory import results
from alignpro.theory.bounds import theorem1
from alignpro.theory.families import FAMILIES, draw, random_prompters, take
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import Instance
from alignpro.theory.results import cost, reach, readings
from alignpro.theory.solution import solution

compiled, compiled_tilt = jax.jit(solution), jax.jit(tilt)
J = SimpleNamespace(
    **{
        name: jax.jit(getattr(results, name))
        for name in (
            "information_projection", "prompting_ceiling", "response_value", "kl_budget", "best_of_n",
            "kl_price", "sensitivity", "headroom", "variance_split", "limit_readings", "best_of_n_rewrites",
        )
    },
    frontier=jax.jit(cost.frontier, static_argnames="responses"),
    critical_lam=jax.jit(readings.critical_lam, static_argnames="per_prompt"),
    critical_beta=jax.jit(readings.critical_beta, static_argnames="per_prompt"),
)  # fmt: skip
"""Compiled once per shape; what they refuse is tested on the plain functions."""
mapped_projection = jax.jit(jax.vmap(reach.information_projection))
SPREAD = ("independent", "peaked", "sparse", "near_deterministic", "signed", "scaled")


def batch(family, count, shape, seed):
    rng = np.random.default_rng(seed)
    return FAMILIES[family](rng, count, shape), 10.0 ** rng.uniform(-6, 6, count), rng


def rewards(instance):
    """R [X, K] and the own rows [X, Y], in plain NumPy."""
    _, _, frozen, own, reward = fields(instance)
    return reward @ frozen.T, frozen[own]


def plain_kl(p, q):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * np.log(p / q), 0.0).sum(-1)


# ------------------------------------------------------------------- information projection


@pytest.mark.parametrize("family", FAMILIES)
def test_projection_is_certified_on_every_family(family):
    """The gap is recomputed here from its definition, so that a wrong certificate would be seen."""
    instances, betas, _ = batch(family, 80, (3, 7, 9), 0)
    found = mapped_projection(instances, jnp.asarray(betas))
    assert np.asarray(found.converged).all()
    assert np.asarray(found.iterations).max() < 60

    def check(weights):
        for i in range(0, 80, 4):
            model = compiled_tilt(instances.frozen[i][instances.own[i]], instances.reward[i], betas[i])
            for x in range(3):
                usable = np.asarray(found.usable[i, x])
                own = instances.frozen[i][instances.own[i, x]]
                assert (usable == ~((instances.frozen[i] > 0) & (own == 0)).any(-1)).all()
                w, inside = np.asarray(weights[i, x]), own > 0
                assert (w[~usable] == 0).all()
                assert abs(w.sum() - 1) <= 16 * EPS
                m = np.maximum((w @ instances.frozen[i])[inside], 1e-300)
                slope = instances.frozen[i][usable][:, inside] @ (
                    np.log(m) - np.asarray(model.log_probs[x])[inside]
                )
                gap = w[usable] @ slope - slope.min()
                span = np.ptp(instances.reward[i, x][inside])
                assert gap <= 1e-10 * max(1.0, span / betas[i])

    check(found.weights)
    if family not in ("sparse",):  # there most prompts have one usable row
        uniform = np.asarray(found.usable) / np.asarray(found.usable).sum(-1, keepdims=True)
        kills(check, jnp.asarray(uniform))


def test_projection_against_scipy():
    """SLSQP on the plain formula finds nothing lower than kl − gap, and comes close to kl."""

    def check(project):
        for seed, family in enumerate(("independent", "shared_rewrites", "signed", "adversarial") * 3):
            instance = draw(family, seed, (3, 4, 5))[0]
            beta = 10.0 ** np.random.default_rng(seed).uniform(-0.7, 1)
            found, star = project(instance, beta), compiled(instance, beta, 1.0).pi_star
            for x in range(2):
                q = np.asarray(star[x])

                def loss(w, q=q, frozen=instance.frozen):
                    m = np.clip(w, 1e-12, None) @ frozen
                    return plain_kl(m, q), frozen @ (np.log(m / q) + 1)

                best = minimize(
                    loss, np.full(4, 0.25), jac=True, method="SLSQP", bounds=[(0, 1)] * 4,
                    constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(4)},
                    options={"ftol": 1e-14, "maxiter": 500},
                )  # fmt: skip
                w = np.clip(best.x, 0, None) / np.clip(best.x, 0, None).sum()
                value = plain_kl(w @ instance.frozen, q)
                assert value >= found.kl[x] - found.gap[x] - 1e-13
                assert value <= found.kl[x] + 1e-7
                np.testing.assert_allclose(
                    found.kl[x], plain_kl(found.weights[x] @ instance.frozen, q), rtol=1e-10, atol=1e-12
                )

    check(J.information_projection)

    def rough(instance, beta):
        found = J.information_projection(instance, beta)
        return found._replace(kl=1.01 * found.kl)

    kills(check, rough)


def test_projection_maximises_the_regularised_objective():
    """β kl = G(π*) − G(π_ρ) by its definition, and no random prompter has a larger G."""
    rng = np.random.default_rng(2)

    def check(loss_of):
        for seed in range(6):
            instance, beta = draw("independent", seed, (3, 4, 5))[0], 0.3
            found, (_, own) = J.information_projection(instance, beta), rewards(instance)
            star = np.asarray(compiled(instance, beta, 1.0).pi_star)

            def g(policy, own=own, r=instance.reward, beta=beta):
                return (policy * r).sum(-1) - beta * plain_kl(policy, own)

            loss = np.asarray(loss_of(found))
            np.testing.assert_allclose(g(star) - g(np.asarray(found.policy)), loss, atol=1e-12)
            for _ in range(50):
                rho = rng.dirichlet(np.full(4, 0.5), size=3)
                assert (g(star) - g(rho @ instance.frozen) >= loss - 1e-9).all()

    check(lambda found: found.loss)
    kills(check, lambda found: 1.001 * found.loss)
    # π* a mixture of rows: nothing is lost, and it is found.
    frozen = np.array([[0.6, 0.4], [0.1, 0.9], [0.95, 0.05]])
    inside = Instance([1.0], [[0.2, 0.3, 0.5]], frozen, [0], [[1.0, 0.0]])
    exactly = J.information_projection(inside, 1.0)
    assert exactly.converged.all()
    assert exactly.kl[0] < 1e-10


def test_projection_says_when_it_has_not_converged():
    instance = draw("independent", 0, (3, 4, 5))[0]
    short = reach.information_projection(instance, 0.1, max_iterations=3)
    full = reach.information_projection(instance, 0.1)
    assert not short.converged.any()
    assert full.converged.all()
    assert (full.kl >= short.kl - short.gap).all()
    with pytest.raises(AlignProError, match=r"^tol 0\.0: must be positive"):
        reach.information_projection(instance, 0.1, tol=0.0)
    with pytest.raises(AlignProError, match=r"^beta -1\.0: must be a positive finite number"):
        reach.information_projection(instance, -1.0)


# ------------------------------------------------------------------------------- ceilings


@pytest.mark.parametrize("family", SPREAD)
def test_ceiling(family):
    """Below the gap of random prompters, ρ* and every deterministic one; attained by the best."""
    rng = np.random.default_rng(3)

    def check(ceiling_of):
        for seed, instance in enumerate(draw(family, 4, (3, 4, 5), 8)):
            beta, lam = 10.0 ** rng.uniform(-2, 2, 2)
            s, ceiling = compiled(instance, beta, lam), ceiling_of(instance, beta)
            size = 1e-13 * np.asarray(s.span) + 1e-15 * np.abs(instance.reward).max()
            everywhere = draw(family, 90 + seed, (3, 4, 5))[0].prior
            for rho, bound in (
                (random_prompters(rng, instance.prior), ceiling.supported),
                (np.asarray(s.rho_star), ceiling.supported),
                (everywhere, ceiling.anywhere),
            ):
                gap = np.asarray(s.optimum) - (rho * np.asarray(s.rewrite_reward)).sum(-1)
                assert (gap >= np.asarray(bound) - 8 * size).all()
            assert (ceiling.anywhere <= ceiling.supported).all()
            best = np.where(instance.prior > 0, rewards(instance)[0], -np.inf).argmax(-1)
            for k, bound in ((ceiling.best, ceiling.anywhere), (best, ceiling.supported)):
                gap = np.asarray(s.optimum) - np.asarray(s.rewrite_reward)[np.arange(3), k]
                np.testing.assert_allclose(gap, bound, rtol=0, atol=size.max() * 8)

    check(J.prompting_ceiling)

    def shifted(instance, beta):
        c = J.prompting_ceiling(instance, beta)
        step = 1e-6 * np.ptp(instance.reward)
        return c._replace(anywhere=c.anywhere + step, supported=c.supported + step)

    kills(check, shifted)


def test_response_value():
    """Against the joint tilt over (x′, y) written out; ≥ 0; 0 when rewards are constant on each row."""

    def check(value):
        for seed, instance in enumerate(draw("sparse", 5, (3, 4, 5), 20)):
            lam = 10.0 ** np.random.default_rng(seed).uniform(-3, 4)
            found = value(instance, lam)
            joint = (instance.prior[:, :, None] * instance.frozen).reshape(3, -1)
            want = compiled_tilt(
                joint, np.repeat(instance.reward[:, None], 4, 1).reshape(3, -1), lam
            ).free_energy
            np.testing.assert_allclose(found.joint, want, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(found.prompting, compiled(instance, 1.0, lam).value, atol=1e-13)
            np.testing.assert_allclose(found.added, want - found.prompting, atol=1e-12)
            assert (found.added >= 0).all()
            hot = value(instance, 1e6).added
            within = J.variance_split(instance, instance.prior).within
            np.testing.assert_allclose(hot, within / 2e6, rtol=1e-5, atol=1e-30)

    check(J.response_value)
    kills(check, lambda i, t: J.response_value(i, t)._replace(added=J.response_value(i, t).added * 1.01))
    certain = Instance([1.0], [[0.3, 0.7]], np.eye(2), [0], [[0.2, 0.9]])
    assert (J.response_value(certain, 0.1).added == 0).all()


# --------------------------------------------------------------------------------- prices


def test_budget_is_theorem_one():
    """Overspent exactly when Theorem 1's right side is negative, and then π_ρ* does outperform π*."""
    overspent = 0

    def check(budget_of):
        nonlocal overspent
        rng = np.random.default_rng(6)
        for _ in range(60):
            prior = np.full((3, 4), 0.01 / 3)
            prior[:, 0] = 0.99  # ρ_sft stays on x, and the best rewrite is rare
            frozen = rng.dirichlet(np.full(5, 0.3), size=4)
            instance = Instance(np.full(3, 1 / 3), prior, frozen, [0, 0, 0], rng.uniform(size=(3, 5)))
            beta, lam = 10.0 ** rng.uniform(-1, 2), 10.0 ** rng.uniform(-2, 0)
            s = compiled(instance, beta, lam)
            found, statement = budget_of(s), theorem1(s)
            np.testing.assert_allclose(
                lam * (found.mean_budget - found.mean_spent), statement.rhs, rtol=1e-9, atol=1e-13
            )
            want = exact(instance, beta, lam)
            np.testing.assert_allclose(lam * found.mean_spent, float(want["prompter_kl"]), rtol=1e-9)
            if not found.within:
                overspent += 1
                assert s.average(s.gap) < 0

    check(J.kl_budget)
    assert overspent > 3
    kills(check, lambda s: J.kl_budget(s._replace(tv_shift=2 * s.tv_shift)))


@pytest.mark.parametrize("family", [*SPREAD, "adversarial"])
def test_lam_for_kl_spends_exactly_that(family):
    """To 1e-12 relative, from 1e-9 of the supremum to nearly all of it, per prompt and in the mean."""
    for instance in draw(family, 7, (3, 4, 5), 3):
        r = rewards(instance)[0]
        best = np.where(instance.prior > 0, r, -np.inf)
        mass = np.where(
            best >= best.max(-1, keepdims=True) - 1e-13 * np.ptp(instance.reward), instance.prior, 0
        )
        most = -np.log(mass.sum(-1))
        if most.min() < 1e-12:
            continue
        for share in (1e-9, 1e-3, 0.5, 0.99):

            def check(lam_of, instance=instance, share=share, most=most):
                mean = share * float(instance.p @ most)
                s = compiled(instance, 1.0, lam_of(instance, mean))
                np.testing.assert_allclose(s.average(s.prompter_kl) / s.lam, mean, rtol=1e-12)
                lams = lam_of(instance, share * most.min(), per_prompt=True)
                for x in np.flatnonzero(instance.p):
                    s = compiled(instance, 1.0, lams[x])
                    np.testing.assert_allclose(s.prompter_kl[x] / lams[x], share * most.min(), rtol=1e-12)

            check(cost.lam_for_kl)
        kills(check, lambda *a, **k: cost.lam_for_kl(*a, **k) * (1 + 1e-6))


def test_lam_for_kl_refuses_what_cannot_be_spent():
    instance = Instance([0.5, 0.5], [[0.25, 0.75]] * 2, np.eye(2), [0, 0], [[1.0, 0.0], [0.0, 1.0]])
    most = 0.5 * np.log(4) + 0.5 * np.log(4 / 3)
    assert 0 < cost.lam_for_kl(instance, most * (1 - 1e-9)) < 0.1
    with pytest.raises(AlignProError, match=rf"^kl 2: cannot be spent; the supremum.* {most:.6f}\d* nats; "):
        cost.lam_for_kl(instance, 2.0)
    with pytest.raises(AlignProError, match=r"the supremum, as λ → 0, is 0\.287682\d* nats \(prompt 1\)"):
        cost.lam_for_kl(instance, 0.3, per_prompt=True)
    with pytest.raises(AlignProError, match=r"^kl 1e-60: needs a lam outside"):
        cost.lam_for_kl(instance, 1e-60)
    flat = dataclasses.replace(instance, reward=np.ones((2, 2)))
    with pytest.raises(AlignProError, match=r"the supremum, as λ → 0, is 0 nats"):
        cost.lam_for_kl(flat, 1e-9)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AlignProError, match=r"^kl .*: must be a positive finite number of nats"):
            cost.lam_for_kl(instance, bad)


def test_frontier_is_optimal():
    """Random prompters, and SLSQP started from them, stay below it; it is concave, with slope λ."""
    rng = np.random.default_rng(8)
    lams = np.geomspace(1e-3, 1e3, 41)

    def check(trace):
        for seed in range(3):
            instance = draw("independent", seed, (3, 4, 5))[0]
            r = rewards(instance)[0]
            f = trace(instance, lams)
            assert (np.diff(f.mean_kl) <= 4 * EPS).all()
            assert (np.diff(f.mean_reward) <= 4 * EPS).all()
            chord = np.diff(f.mean_lift[10:30]) / np.diff(f.mean_kl[10:30])  # slopes between neighbours
            assert ((chord >= lams[10:29]) & (chord <= lams[11:30])).all()
            for rho in [random_prompters(rng, instance.prior) for _ in range(200)]:
                spent, gained = plain_kl(rho, instance.prior), (rho * r).sum(-1)
                above = f.mean_reward + lams * (instance.p @ spent - f.mean_kl)
                assert instance.p @ gained <= above.min() + 1e-12
            for i in (12, 20, 26):
                kl, prior = float(f.kl[i, 0]), instance.prior[0]
                best = minimize(
                    lambda w, e=r[0]: -(w @ e), prior, method="SLSQP", bounds=[(1e-9, 1)] * 4,
                    constraints=[
                        {"type": "eq", "fun": lambda w: w.sum() - 1},
                        {"type": "ineq", "fun": lambda w, kl=kl, q=prior: kl - plain_kl(w, q)},
                    ],
                    options={"ftol": 1e-13, "maxiter": 300},
                )  # fmt: skip
                np.testing.assert_allclose(-best.fun, f.reward[i, 0], atol=1e-6)

    check(J.frontier)
    kills(check, lambda i, v: J.frontier(i, v)._replace(mean_reward=J.frontier(i, v).mean_reward - 1e-3))
    kills(check, lambda i, v: J.frontier(i, 2 * v))


def test_responses_have_the_higher_frontier():
    """KL(π_ρ‖π_ρ_sft) ≤ KL(ρ‖ρ_sft), so the rewrites' points lie below the responses' tangents."""
    lams = np.geomspace(1e-2, 1e2, 9)
    for instance in draw("sparse", 9, (3, 4, 5), 5):
        low, high = J.frontier(instance, lams), J.frontier(instance, lams, responses=True)

        def check(low, high, lams=lams):
            above = high.mean_reward[None] + lams[None] * (low.mean_kl[:, None] - high.mean_kl[None])
            assert (low.mean_reward[:, None] <= above + 1e-12).all()

        check(low, high)
        kills(partial(check, low), high._replace(mean_kl=high.mean_kl + 0.5))
    with pytest.raises(AlignProError, match=r"^lams 0\.0: must be a positive finite number"):
        cost.frontier(instance, np.array([1.0, 0.0]))


# -------------------------------------------------------------------------------- best of n


def exact_best(base, energy, n):
    with mpmath.workdps(60):
        base = [mpmath.mpf(float(b)) for b in base]
        base = [b / mpmath.fsum(base) for b in base]
        probs = []
        for b, e in zip(base, energy, strict=True):
            upto = mpmath.fsum(c for c, f in zip(base, energy, strict=True) if f <= e)
            under = mpmath.fsum(c for c, f in zip(base, energy, strict=True) if f < e)
            probs.append(b * (upto**n - under**n) / (upto - under) if b else mpmath.mpf(0))
        spent = mpmath.fsum(p * mpmath.log(p / b) for p, b in zip(probs, base, strict=True) if p)
        gained = mpmath.fsum((p - b) * float(e) for p, b, e in zip(probs, base, energy, strict=True))
        return [float(p) for p in probs], float(spent), float(gained)


def test_best_of_n_against_high_precision():
    def check(best):
        for seed in range(60):
            rng = np.random.default_rng(seed)
            base = rng.dirichlet(np.full(6, rng.choice([0.05, 1.0])))
            base = np.where(base < 1e-200, 0.0, base)
            if seed % 3 == 0:
                base[rng.integers(6)] = 0.0
            base /= base.sum()
            energy = rng.integers(4, size=6).astype(float)
            n = int(rng.choice([1, 2, 7, 1000, 10**6]))
            probs, spent, gained = exact_best(base, energy, n)
            found = best(base, energy, n)
            # Fⁿ is known to n·eps·(1 − F)-ish relative; below 1e-250 it may underflow.
            np.testing.assert_allclose(found.probs, probs, rtol=1e-9, atol=1e-250)
            np.testing.assert_allclose(found.kl, spent, rtol=1e-11, atol=1e-14)
            np.testing.assert_allclose(found.lift, gained, rtol=1e-11, atol=1e-14)
            assert found.kl <= found.kl_bound + 1e-14
            top = base[energy == energy[base > 0].max()].sum()
            most = min(np.log(n) - (n - 1) / n, np.log(-np.expm1(n * np.log1p(-min(top, 1 - 1e-16))) / top))
            np.testing.assert_allclose(found.kl_bound, most, rtol=1e-9, atol=1e-14)
            assert found.lift <= found.frontier_lift + 1e-12

    def untied(base, energy, n):
        return J.best_of_n(base, energy + 1e-9 * np.arange(6), n)

    check(J.best_of_n)
    kills(check, untied)
    kills(check, lambda b, e, n: J.best_of_n(b, e, n + 1))
    kills(check, mutated(cost, "(draws - 1) / draws, largest)", "(draws - 1) / draws, jnp.inf)").best_of_n)


def test_best_of_n_by_enumeration_and_in_the_limit():
    """n = 3 over all triples, a tie broken among the draws; n = 1 and n = 10⁶."""
    base, energy = np.array([0.5, 0.2, 0.2, 0.1, 0, 0]), np.array([1.0, 3.0, 3.0, 2.0, 9.0, 0.0])
    want = np.zeros(6)
    for triple in np.ndindex(4, 4, 4):
        top = [k for k in triple if energy[k] == max(energy[list(triple)])]
        for k in top:
            want[k] += base[list(triple)].prod() / len(top)
    np.testing.assert_allclose(cost.best_of_n(base, energy, 3).probs, want, rtol=1e-14)
    assert J.best_of_n(base, energy, 1).kl == 0
    assert J.best_of_n(base, energy, 1).lift == 0
    assert J.best_of_n(base, energy, 1).lam == np.inf
    np.testing.assert_allclose(J.best_of_n(base, energy, 10**6).probs, [0, 0.5, 0.5, 0, 0, 0], atol=1e-300)
    np.testing.assert_allclose(J.best_of_n(base, np.ones(6), 9).probs, base, rtol=4 * EPS)
    for bad, why in ((0, "must be an integer of at least 1"), (-2, "must be an"), (True, "is no number")):
        with pytest.raises(AlignProError, match=f"^n {bad}: {why}"):
            cost.best_of_n(base, energy, bad)


def test_best_of_n_rewrites():
    instance = draw("sparse", 10, (3, 4, 5))[0]
    r, top = rewards(instance)[0], J.best_of_n_rewrites(instance, 5)
    for x in range(3):
        np.testing.assert_allclose(top.probs[x], exact_best(instance.prior[x], r[x], 5)[0], rtol=1e-12)
        if np.isfinite(top.lam[x]):
            s = compiled(instance, 1.0, top.lam[x])
            np.testing.assert_allclose(s.prompter_kl[x] / s.lam, top.kl[x], rtol=1e-11)
            np.testing.assert_allclose(s.prompter_jeffreys[x], top.frontier_lift[x], rtol=1e-9)
    # Two rewrites that are the same row: tied whatever the rounding.
    rows = np.zeros((4, 5))
    rows[:, :3] = [[0.1, 0.2, 0.7], [0.7, 0.2, 0.1], [0.3, 0.3, 0.4], [0, 1, 0]]
    twins = Instance(
        np.full(3, 1 / 3), [[0.2, 0.3, 0.5, 0.0]] * 3, rows, [0] * 3, [[0.3, 0.1, 0.3, 0.0, 0.0]] * 3
    )
    np.testing.assert_allclose(
        J.best_of_n_rewrites(twins, 5).probs[0, :3], [0.4 * (1 - 2.0**-5), 0.6 * (1 - 2.0**-5), 2.0**-5]
    )


# --------------------------------------------------------------------- price, derivatives


def test_kl_price_identity():
    rng = np.random.default_rng(11)

    def check(price):
        for family in ("independent", "near_deterministic", "signed"):
            for instance in draw(family, 12, (3, 4, 5), 5):
                beta = 10.0 ** rng.uniform(-1, 1)
                rho = rng.dirichlet(np.ones(4), size=3)
                found = price(instance, beta, rho)
                size = np.maximum(np.asarray(found.policy), 1.0) * beta + np.ptp(instance.reward)
                off = found.gap - beta * (found.star + found.between - found.policy)
                assert (np.abs(off) <= 1e-12 * size).all()

    check(J.kl_price)
    kills(check, lambda *a: J.kl_price(*a)._replace(between=J.kl_price(*a).star))
    outside = Instance([1.0], [[0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]], [0], [[0.0, 1.0]])
    found = J.kl_price(outside, 1.0, np.array([[0.5, 0.5]]))
    assert found.policy == found.between == np.inf
    assert found.gap == -0.5
    with pytest.raises(AlignProError, match=r"^prompter\[0\] sums to 1\.5"):
        cost.kl_price(outside, 1.0, np.array([[0.5, 1.0]]))


def _watched(instance, beta, lam):
    s = solution(instance, beta, lam)
    return {
        "achieved": s.achieved,
        "value": s.value,
        "gap": s.gap,
        "optimum": s.optimum,
        "kl": s.prompter_kl / lam,
    }


def test_sensitivity_against_autodiff():
    slopes = jax.jit(
        lambda i, b, m: (
            jax.jvp(lambda v: _watched(i, v, m), (b,), (1.0,))[1],
            jax.jvp(lambda v: _watched(i, b, v), (m,), (1.0,))[1],
        )
    )
    cases = []
    for family in ("independent", "sparse", "signed", "near_deterministic"):
        for seed, instance in enumerate(draw(family, 13, (3, 4, 5), 4)):
            beta, lam = 10.0 ** np.random.default_rng(seed).uniform(-1, 1, 2)
            in_beta, in_lam = slopes(instance, beta, lam)
            want = {f"{key}_lam": in_lam[key] for key in ("achieved", "value", "gap", "kl")}
            want |= {f"{key}_beta": in_beta[key] for key in ("optimum", "gap")}
            cases.append(((instance, beta, lam), want))

    def check(sensitivity):
        for arguments, want in cases:
            found = sensitivity(*arguments)
            for name, value in want.items():
                np.testing.assert_allclose(getattr(found, name), value, rtol=1e-9, atol=1e-13, err_msg=name)

    check(J.sensitivity)
    for name in ("achieved_lam", "value_lam", "kl_lam", "gap_beta"):

        def off(*arguments, name=name):
            found = J.sensitivity(*arguments)
            return found._replace(**{name: 0.999 * getattr(found, name)})

        kills(check, off)


@pytest.mark.parametrize("lam", [1e-6, 1e-2, 0.3, 10.0, 1e6])
def test_sensitivity_against_high_precision(lam):
    """Finite differences in 60 digits, at temperatures where floats would cancel."""
    instance = draw("independent", 14, (3, 4, 5))[0]

    def quantities(beta, lam):
        want = exact(instance, beta, lam)
        return [
            want["j_rho"],
            want["j_star"],
            want["prompter_kl"] / mpmath.mpf(lam),
            want["j_rho"] - want["prompter_kl"],
        ]

    def check(sensitivity):
        found = sensitivity(instance, lam, lam)
        with mpmath.workdps(60):
            h = lam * 2.0**-20
            hi, lo = quantities(lam + h, lam + h), quantities(lam - h, lam - h)
            step = mpmath.mpf(lam + h) - mpmath.mpf(lam - h)
            slopes = [float((a - b) / step) for a, b in zip(hi, lo, strict=True)]
        names = ("achieved_lam", "optimum_beta", "kl_lam", "value_lam")
        got = [float(instance.p @ np.asarray(getattr(found, name))) for name in names]
        np.testing.assert_allclose(got, slopes, rtol=1e-8, atol=1e-290)

    check(J.sensitivity)
    if lam > 1e-6:  # there every slope has underflowed to its limit, 0
        kills(check, lambda i, b, t: J.sensitivity(i, 1.001 * b, 1.001 * t))


@pytest.mark.parametrize("family", SPREAD)
def test_headroom(family):
    rng = np.random.default_rng(15)
    cases = [(i, 10.0 ** rng.uniform(-6, 6)) for i in draw(family, 16, (3, 4, 5), 6)]

    def check(head):
        for instance, lam in cases:
            found = head(instance, lam)
            lift = np.asarray(found.lift)
            want = exact(instance, 1.0, lam)
            s = compiled(instance, 1.0, lam)
            np.testing.assert_allclose(
                s.average(found.covariance), float(want["prompter_kl"] + want["prompter_kl_back"]),
                rtol=1e-9, atol=float(s.average(s.prompter_error)) + 1e-300,
            )  # fmt: skip
            noise = 2 * np.asarray(s.prompter_error) + 1e-300
            np.testing.assert_allclose(found.covariance, lift, rtol=1e-9, atol=noise.max())
            assert (lift >= found.lower * (1 - 1e-12) - noise).all()
            assert (lift <= found.upper * (1 + 1e-12) + noise).all()
            hot = head(instance, 1e5 * float(np.max(s.span)))
            np.testing.assert_allclose(hot.lift, hot.first_order, rtol=2e-5)

    check(J.headroom)
    kills(check, lambda i, t: J.headroom(i, t)._replace(covariance=J.headroom(i, t).covariance * 1.001))
    kills(check, lambda i, t: J.headroom(i, t)._replace(first_order=J.headroom(i, t).first_order / 2))


@pytest.mark.parametrize("scale", [1e155, 1e300])
def test_headroom_and_sensitivity_at_any_scale(scale):
    """Squares of rewards overflow; a variance in units of the span does not."""
    instance = draw("independent", 4, (2, 3, 4))[0]
    scaled = dataclasses.replace(instance, reward=scale * np.asarray(instance.reward))
    lam = min(max(0.3 * scale, 1e-18), 1e18)

    def check(headroom):
        found = headroom(scaled, lam)
        for name, value in found._asdict().items():
            assert not np.isnan(value).any(), name
        assert (found.lower <= found.lift * (1 + 1e-12)).all()
        assert (found.lift <= found.upper * (1 + 1e-12)).all()
        assert np.isfinite(found.upper).all()
        assert (found.lower > 0).all()
        plain = np.asarray(readings.headroom(instance, 1.0).first_order)
        with np.errstate(over="ignore"):
            np.testing.assert_allclose(found.first_order, scale * plain * (scale / lam), rtol=1e-9)

    check(readings.headroom)
    squared = mutated(readings, "most * (below / lam)", "variance(r.prior, r.rewrite) / lam").headroom
    if scale == 1e155:  # at 1e300 both overflow
        kills(check, squared)
    assert all(not np.isnan(v).any() for v in readings.sensitivity(scaled, lam, lam))


def test_a_policy_that_leaves_the_support_seldom_leaves_it():
    """1e-200 of a rewrite that gives a response π_F(·|x) cannot, with 1e-200: KL is infinite, not 1e-16."""
    instance = Instance([1.0], [[1.0, 1e-200]], [[1.0, 0.0], [1.0, 1e-200]], [0], [[0.0, 1.0]])

    def check(price):
        found = price(instance, 1.0, np.asarray(instance.prior))
        assert np.isinf(found.policy).all()
        assert np.isinf(found.between).all()

    check(cost.kl_price)
    kills(check, mutated(cost, "given(rho, r.frozen) &", "(rho @ r.frozen > 0) &").kl_price)


def test_both_ends_of_the_headroom_are_attained_by_two_rewrites():
    """Rewards 0 and 1, the better of mass b, at λ = 1/a: both laws of two values are ρ_sft's own."""
    cases = [(1 / (1 + np.exp(2.0)), 4.0), (0.1, 1e-6), (0.1, 1e3), (1e-12, 30.0), (0.999, 0.5)]

    def check(head):
        for mass, a in cases:
            found = head(Instance([1.0], [[1 - mass, mass]], np.eye(2), [0], [[0.0, 1.0]]), 1 / a)
            np.testing.assert_allclose(found.upper, found.lift, rtol=1e-11)
            np.testing.assert_allclose(found.lower, found.lift, rtol=1e-11)

    check(J.headroom)
    swapped = mutated(readings, "lift(most, below, lam)", "lift(below, most, lam)")
    kills(check, jax.jit(swapped.headroom))
    swapped = mutated(readings, "lift(above, least, lam)", "lift(least, above, lam)")
    kills(check, jax.jit(swapped.headroom))


def test_variance_split():
    def check(split):
        for family in SPREAD:
            for instance in draw(family, 17, (3, 4, 5), 5):
                rho = random_prompters(np.random.default_rng(0), instance.prior)
                found = split(instance, rho)
                np.testing.assert_allclose(found.total, found.within + found.between, rtol=1e-8)
                r = rewards(instance)[0]
                centred = r - r.mean(-1, keepdims=True)
                plain = (rho * centred**2).sum(-1) - (rho * centred).sum(-1) ** 2
                np.testing.assert_allclose(
                    found.between, plain, rtol=1e-6, atol=1e-12 * np.ptp(instance.reward) ** 2
                )

    check(J.variance_split)
    kills(check, lambda *a: J.variance_split(*a)._replace(within=J.variance_split(*a).total))


# ------------------------------------------------------------------------------- the limits


@pytest.mark.parametrize("family", FAMILIES)
def test_limit_readings(family):
    rng = np.random.default_rng(18)
    cases = [(i, *10.0 ** rng.uniform(-3, 3, 2)) for i in draw(family, 19, (3, 4, 5), 10)]

    def check(read):
        for instance, beta, lam in cases:
            got, s = read(instance, beta, lam), compiled(instance, beta, lam)
            noise = 1e-12 + 60 * EPS * np.asarray(s.span) / min(beta, lam)
            assert (got.tv_model <= got.tv_model_bound + noise).all()
            assert (got.tv_prompter <= got.tv_prompter_bound + noise).all()
            assert (got.off_best <= got.off_best_bound * (1 + noise) + 1e-300).all()
            error = 4 * np.asarray(s.prompter_error)
            assert (got.shortfall <= got.shortfall_bound + error).all()
            np.testing.assert_allclose(got.tv_shift, s.tv_shift, rtol=1e-12)
            # The limits themselves.
            r = rewards(instance)[0]
            best = np.where(instance.prior > 0, r, -np.inf)
            top = (best >= best.max(-1, keepdims=True) - 1e-13 * np.asarray(s.span)[:, None]) * instance.prior
            clear = np.asarray(got.separation) > 1e-12 * np.asarray(s.span)  # no tie up to rounding
            want = top / top.sum(-1, keepdims=True)
            np.testing.assert_allclose(got.greedy[clear], want[clear], rtol=1e-12)
            np.testing.assert_allclose(got.greedy_kl[clear], -np.log(top.sum(-1))[clear], atol=1e-12)
            cold = np.where(np.asarray(got.separation) < np.inf, got.separation, 1.0).min() / 800
            cold = max(cold, 1e-18)
            if cold > 1e6 * EPS * np.max(s.span):
                rho = compiled(instance, beta, cold).rho_star
                np.testing.assert_allclose(rho, got.greedy, atol=1e-6)
            hot = read(instance, 1e8 * np.max(s.span) + 1, 1e8 * np.max(s.span) + 1)
            assert (hot.tv_model <= 1e-8).all()
            assert (hot.tv_prompter <= 1e-8).all()

    check(J.limit_readings)
    if family != "shared_rewrites":
        kills(
            check,
            lambda *a: J.limit_readings(*a)._replace(tv_prompter=2 * J.limit_readings(*a).tv_prompter_bound),
        )
    if family not in ("shared_rewrites", "sparse"):
        kills(check, lambda *a: J.limit_readings(*a)._replace(greedy=J.limit_readings(*a).greedy[:, ::-1]))


def test_limit_bounds_are_attained():
    """Two rewrites, b = 1/(1 + e^{a/2}): tanh(a/4) exactly; and the odds bound is an equality."""
    for a in (1e-6, 0.1, 3.0, 30.0):
        b = 1 / (1 + np.exp(a / 2))
        two = Instance([1.0], [[b, 1 - b]], np.eye(2), [0], [[1.0, 0.0]])
        got = J.limit_readings(two, 1.0, 1 / a)
        np.testing.assert_allclose(got.tv_prompter, got.tv_prompter_bound, rtol=1e-9)
        np.testing.assert_allclose(got.off_best, got.off_best_bound, rtol=1e-12)
    still = Instance([1.0], [[0.5, 0.5]], [[0.3, 0.7, 0.0]] * 2, [0], [[2.0, 2.0, 5.0]])
    got = J.limit_readings(still, 0.1, 0.1)
    assert got.reward_constant.all()
    assert got.reference_is_own.all()
    assert got.tv_model == got.tv_shift == got.tv_prompter == got.off_best == got.shortfall == 0
    assert not J.limit_readings(two, 1.0, 1.0).reference_is_own.any()

    def check(read):
        """A rewrite that ρ_sft never gives may answer as it likes."""
        alone = read(Instance([1.0], [[1.0, 0.0]], np.eye(2), [0], [[1.0, 0.0]]), 1.0, 1.0)
        assert alone.reference_is_own.all()
        assert alone.tv_shift == 0

    check(J.limit_readings)
    kills(check, mutated(readings, "(r.prior <= 0) |", "(r.prior < 0) |").limit_readings)


@pytest.mark.parametrize("per_prompt", [False, True])
def test_critical_temperatures(per_prompt):
    """The gap has the sign it should on both sides, the enclosure holds, and all three kinds occur."""
    kinds = set()

    def check(lam_of, beta_of):
        rng = np.random.default_rng(20)
        for family in ("independent", "signed", "sparse", "peaked"):
            for instance in draw(family, 21, (3, 4, 5), 15):
                beta, lam = 10.0 ** rng.uniform(-1, 1.5), 10.0 ** rng.uniform(-2, 0.5)

                def gap(beta, lam, instance=instance):
                    s = compiled(instance, beta, lam)
                    return np.asarray(s.gap) if per_prompt else np.asarray([s.average(s.gap)])

                for found, at, sign in (
                    (lam_of(instance, beta, per_prompt=per_prompt), lambda t, b=beta: gap(b, t), 1),
                    (beta_of(instance, lam, per_prompt=per_prompt), lambda t, m=lam: gap(t, m), -1),
                ):
                    value = np.atleast_1d(found.value)
                    assert (np.atleast_1d(found.lower) <= value * (1 + 1e-12)).all()
                    assert (value <= np.atleast_1d(found.upper) * (1 + 1e-12)).all()
                    for i, t in enumerate(value):
                        kinds.add("zero" if t == 0 else "never" if np.isinf(t) else "root")
                        if t == 0:
                            probes = ((1e-3, 1), (10.0, 1))
                        elif np.isinf(t):
                            probes = ((1e-3, -1), (10.0, -1))
                        else:
                            probes = ((t * 0.999, -1), (t * 1.001, 1))
                            assert abs(at(t)[i]) <= 1e-12 * np.ptp(instance.reward)
                        for where, side in probes:
                            assert sign * side * at(where)[i] >= -1e-14 * np.ptp(instance.reward)

    check(J.critical_lam, J.critical_beta)
    assert kinds == {"zero", "never", "root"}

    def off(function, *a, **k):
        found = function(*a, **k)
        return found._replace(value=found.value * 1.01, upper=found.upper * 1.01)

    kills(lambda f: check(f, J.critical_beta), partial(off, J.critical_lam))
    kills(lambda f: check(J.critical_lam, f), partial(off, J.critical_beta))


def test_the_enclosure_of_a_critical_temperature_is_sharp():
    """A coin of the odds e^{−span/(2λ)} reaches `upper`, a rare best that must nearly win `lower`."""

    def of_lam(mass, target):
        """ρ_sft gives reward 1 with probability `mass`; π*, at β far above its reward, has `target`."""
        frozen = [[1.0, 0.0], [0.0, 1.0], [1 - target, target]]
        return Instance([1.0], [[1 - mass, mass, 0.0]], frozen, [2], [[0.0, 1.0]])

    def of_beta(mass, target):
        """π_F(·|x) gives reward 1 with probability `mass`, and the one rewrite has `target`."""
        return Instance([1.0], [[0.0, 1.0]], [[1 - mass, mass], [1 - target, target]], [0], [[0.0, 1.0]])

    def check(lam_of, beta_of):
        for function, made in ((lam_of, of_lam), (beta_of, of_beta)):
            for mass in (0.5 - 1e-3, 0.3, 1e-3):  # from m to 1 − m: odds e^{−a/2} to e^{a/2}, a = span/λ
                found = function(made(mass, 1 - mass), 1e12)
                np.testing.assert_allclose(found.upper, found.value, rtol=1e-7)
            rare = function(made(1e-200, 0.01), 1e12)
            np.testing.assert_allclose(rare.lower, rare.value, rtol=0.03)

    check(J.critical_lam, J.critical_beta)
    for key, factor in (("upper", 2), ("lower", 0.5)):

        def off(function, *arguments, key=key, factor=factor):
            found = function(*arguments)
            return found._replace(**{key: factor * getattr(found, key)})

        kills(lambda f: check(f, J.critical_beta), partial(off, J.critical_lam))
        kills(lambda f: check(J.critical_lam, f), partial(off, J.critical_beta))


def test_the_mean_span_encloses_no_critical_temperature():
    """Where prompts differ in span, span/(4 artanh(τ/span)) of the means is none: the widest prompt
    counts."""
    mass, width = 0.1, np.array([0.0, 2.0])
    frozen = [[1.0, 0.0], [0.0, 1.0], [mass, 1 - mass]]
    instance = Instance(
        [0.5, 0.5], [[1 - mass, mass, 0.0]] * 2, frozen, [2, 2], width[:, None] * np.array([[0.0, 1.0]])
    )
    gain = 0.5 * width[1] * (1 - 2 * mass)

    def check(upper):
        assert J.critical_lam(instance, 1e12).value <= upper * (1 + 1e-9)

    check(width.max() / (4 * np.arctanh(gain / width.mean())))
    np.testing.assert_allclose(
        J.critical_lam(instance, 1e12).upper, width.max() / (4 * np.arctanh(gain / width.mean())), rtol=1e-9
    )
    kills(check, width.mean() / (4 * np.arctanh(gain / width.mean())))


def test_a_difference_within_rounding_has_no_critical_temperature():
    """max R exceeds E_π* r* by 1e-16 of the span, as computed: no sign, so no enclosure to contradict."""
    drawn = FAMILIES["near_deterministic"](np.random.default_rng(28), 4000, (2, 4, 5))
    found = J.critical_lam(take(drawn, 1374), 2.0710231280918547, per_prompt=True)
    assert ((found.lower <= found.value) & (found.value <= found.upper)).all()
    assert float(found.value[1]) in (0.0, np.inf)


def test_the_smallest_instance_where_prompting_wins():
    """1 × 2 × 2, by hand: λ_c where e^{1/λ}/(1 + e^{1/λ}) meets the frozen model's own optimum."""
    tiny = Instance([1.0], [[0.5, 0.5]], [[0.5, 0.5], [0.0, 1.0]], [0], [[0.0, 1.0]])
    beta = 2.0
    target = 1 / (1 + np.exp(-1 / beta))  # E_π* r
    share = 2 * target - 1  # ρ*(second) with R = (½, 1) reaches it
    want = 0.5 / np.log(share / (1 - share))
    if share <= 0.5:
        want = np.inf
    found = J.critical_lam(tiny, beta)
    assert share < 0.5
    assert found.value == want == np.inf  # at this β ρ_sft itself wins
    beta = 0.7
    share = 2 / (1 + np.exp(-1 / beta)) - 1
    np.testing.assert_allclose(
        readings.critical_lam(tiny, beta).value, 0.5 / np.log(share / (1 - share)), rtol=1e-13
    )
    # One rewrite, or one value of reward, in effect: never.
    assert J.critical_lam(dataclasses.replace(tiny, frozen=[[0.5, 0.5]] * 2), 0.7).value == 0
    assert J.critical_lam(dataclasses.replace(tiny, reward=[[0.3, 0.3]]), 0.7).value == 0


# ------------------------------------------------------------------------ transformations


def everything(instance, beta, lam):
    return (
        reach.information_projection(instance, beta),
        reach.prompting_ceiling(instance, beta),
        reach.response_value(instance, lam),
        cost.kl_budget(solution(instance, beta, lam)),
        cost.frontier(instance, jnp.stack([lam, 2 * lam])),
        cost.best_of_n_rewrites(instance, 4),
        cost.best_of_n(jnp.asarray(instance.frozen)[instance.own], instance.reward, 4),
        cost.kl_price(instance, beta, jnp.asarray(instance.prior)),
        readings.sensitivity(instance, beta, lam),
        readings.headroom(instance, lam),
        readings.variance_split(instance, jnp.asarray(instance.prior)),
        readings.limit_readings(instance, beta, lam),
        readings.critical_lam(instance, beta),
        readings.critical_beta(instance, lam, per_prompt=True),
    )


def test_one_compiled_call_over_many_instances_and_no_nan():
    """vmap of jit at temperatures from 1e-6 to 1e6, on every family."""
    mapped = jax.jit(jax.vmap(everything))
    for family in FAMILIES:
        instances, betas, rng = batch(family, 12, (2, 3, 3), 22)
        lams = 10.0 ** rng.uniform(-6, 6, 12)
        found = mapped(instances, betas, lams)
        assert all(finite(leaf) for leaf in jax.tree.leaves(found))
    one = J.headroom(jax.tree.map(lambda a: a[5], instances), lams[5])
    for a, b in zip(found[9], one, strict=True):
        np.testing.assert_allclose(a[5], b, rtol=1e-9)
