import dataclasses
import itertools

import jax
import numpy as np
import pytest
from mutants import mutated
from scipy.optimize import minimize
from theory_oracle import EPS, finite, kills

from alignpro.errors import AlignProError
from alignpro.theory import BOUNDS
from alignpro.theory.families import random_prompters
from alignpro.theory.results import chains
from alignpro.theory.results.chains import Chain, joint_tilt, one_stage_bracket, solve_chain
from alignpro.theory.solution import solution

SIZES = (2, 3, 2, 4)  # X, K₁, K₂, K₃
LAMS = (0.3, 0.7, 0.15)


def random_chain(seed, sizes=SIZES, responses=3, sparse=False, reward=None):
    rng = np.random.default_rng(seed)

    def rows(a, b):
        weights = rng.dirichlet(np.ones(b), a)
        if sparse:
            keep = rng.uniform(size=(a, b)) < 0.6
            keep[np.arange(a), rng.integers(b, size=a)] = True
            weights = weights * keep
        return weights / weights.sum(-1, keepdims=True)

    x, last = sizes[0], sizes[-1]
    return Chain(
        rows(1, x)[0],
        [rows(a, b) for a, b in itertools.pairwise(sizes)],
        rows(last, responses),
        rng.integers(last, size=x),
        rng.uniform(size=(x, responses)) if reward is None else reward,
    )


def random_policies(seed, chain):
    rng = np.random.default_rng(seed)
    x = len(chain.p)
    bases = [
        s[:, None] if i == 0 else np.broadcast_to(s[None], (x, *s.shape)) for i, s in enumerate(chain.stages)
    ]
    return [random_prompters(rng, np.ascontiguousarray(base)) for base in bases]


def by_paths(chain, beta, lams, policies):
    """Every path written out: E R, λ_i E KL_i and F per prompt, straight from the definition."""
    stages, n = chain.stages, len(chain.stages)
    out = {"achieved": [], "objective": [], "reference": []}
    costs = np.zeros((n, len(chain.p)))
    for x in range(len(chain.p)):
        reward = [chain.frozen[k] @ chain.reward[x] for k in range(len(chain.frozen))]
        total, reference = 0.0, 0.0
        for path in itertools.product(*(range(s.shape[1]) for s in stages)):
            weight = plain = 1.0
            logs = []
            for i, to in enumerate(path):
                came = 0 if i == 0 else path[i - 1]
                base = stages[i][x if i == 0 else came, to]
                rho = policies[i][x, came, to]
                weight, plain = weight * rho, plain * base
                logs.append(np.log(rho / base) if rho > 0 else 0.0)
            if weight > 0:
                total += weight * reward[path[-1]]
                costs[:, x] += weight * np.asarray(lams) * logs
            reference += plain * reward[path[-1]]
        out["achieved"].append(total)
        out["reference"].append(reference)
    out["stage_cost"] = costs
    out["objective"] = np.array(out["achieved"]) - costs.sum(0)
    return out


def test_every_path_enumerated():
    """E R, each stage's cost and F of any chain, by brute force over paths; and V by plain log-sum-exp."""
    cases = [(random_chain(seed, sparse=seed % 2 == 1), seed) for seed in range(6)]

    def check_all(solve):
        for chain, seed in cases:
            star = solve(chain, 0.4, LAMS)
            rho = random_policies(seed, chain)
            for found, policies in (
                (solve(chain, 0.4, LAMS, rho), rho),
                (star, [*map(np.asarray, star.policies)]),
            ):
                want = by_paths(chain, 0.4, LAMS, policies)
                for key in ("achieved", "objective", "stage_cost"):
                    np.testing.assert_allclose(getattr(found, key), want[key], atol=1e-13, err_msg=key)
                np.testing.assert_allclose(
                    found.induced, np.asarray(found.visits[-1]) @ chain.frozen, atol=1e-15
                )
            value = chain.reward @ chain.frozen.T
            for stage, lam in zip(chain.stages[:0:-1], LAMS[:0:-1], strict=True):
                value = lam * np.log((stage[None] * np.exp(value[:, None] / lam)).sum(-1))
            value = LAMS[0] * np.log((chain.stages[0] * np.exp(value / LAMS[0])).sum(-1))
            np.testing.assert_allclose(star.value, value, rtol=1e-12)
            np.testing.assert_allclose(star.value, star.objective, rtol=1e-12)
            # Jeffreys: E_ρ* R − E_ρ̄_sft R, at each stage over its own visits.
            np.testing.assert_allclose(
                np.asarray(star.star_jeffreys).sum(0),
                np.asarray(star.achieved) - want["reference"],
                atol=1e-13,
            )
            np.testing.assert_allclose(star.exact_gap, star.gap, atol=1e-13)

    check_all(solve_chain)
    kills(check_all, lambda c, b, t, *rho: solve_chain(c, b, np.asarray(t)[::-1], *rho))
    kills(check_all, lambda c, b, t, *rho: solve_chain(c, b, np.asarray(t) * (1 + 1e-9), *rho))


def test_equal_lambdas_tilt_whole_paths():
    """With one λ the optimal chain is the joint tilt of all paths, and one stage in disguise."""

    def check_all(solve):
        for seed in range(6):
            chain = random_chain(seed, sparse=seed % 2 == 1)
            found = solve(chain, 0.4, (0.25, 0.25, 0.25))
            first, second, third = (np.asarray(p) for p in found.policies)
            product = first[:, 0, :, None, None] * second[..., None] * third[:, None]
            weights = np.einsum("xa,ab,bc->xabc", *chain.stages)
            weights = weights * np.exp((chain.reward @ chain.frozen.T)[:, None, None] / 0.25)
            weights /= weights.sum((1, 2, 3), keepdims=True)
            np.testing.assert_allclose(product, weights, atol=1e-14)
            np.testing.assert_allclose(joint_tilt(chain, 0.25), weights, atol=1e-14)
            single = solution(chain.composed, 0.4, 0.25)
            np.testing.assert_allclose(found.value, single.value, rtol=1e-13)
            np.testing.assert_allclose(found.visits[-1], single.rho_star, atol=1e-14)
            np.testing.assert_allclose(np.asarray(found.star_cost).sum(0), single.prompter_kl, atol=1e-14)
            np.testing.assert_allclose(
                np.asarray(found.star_jeffreys).sum(0), single.prompter_jeffreys, atol=1e-14
            )

    check_all(solve_chain)
    kills(check_all, lambda c, b, t: solve_chain(c, b, (0.25, 0.25, 0.26)))


def test_one_stage_is_the_paper():
    chain = random_chain(3, sizes=(2, 4))
    found, single = solve_chain(chain, 0.4, 0.3), solution(chain.composed, 0.4, 0.3)
    np.testing.assert_allclose(found.gap, single.gap, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(found.policies[0])[:, 0], single.rho_star, rtol=1e-13)
    for name, value in (("span", found.span_bound), ("tight", found.tight_bound)):
        np.testing.assert_allclose(chain.p @ value, BOUNDS[name](single).rhs, rtol=1e-12)
    rho = random_policies(3, chain)[0]
    trained = BOUNDS["trained"](solution(chain.composed, 0.4, 0.3, rho[:, 0]))
    found = solve_chain(chain, 0.4, 0.3, [rho[:, 0]])
    np.testing.assert_allclose(chain.p @ found.trained_bound, trained.rhs, rtol=1e-12)
    np.testing.assert_allclose(chain.p @ found.gap, trained.lhs, rtol=1e-12)


def test_a_numerical_optimiser_finds_nothing_better():
    """Over all policies of all stages at once, from the definition of F by paths: different λ per stage."""
    chain = random_chain(7, sizes=(1, 2, 3, 2))
    shapes = [(1, 1, 2), (1, 2, 3), (1, 3, 2)]
    sizes = np.cumsum([0, *(int(np.prod(s)) for s in shapes)])

    def unpack(theta):
        parts = [theta[a:b].reshape(s) for (a, b), s in zip(itertools.pairwise(sizes), shapes, strict=True)]
        weights = [np.exp(t - t.max(-1, keepdims=True)) for t in parts]
        return [w / w.sum(-1, keepdims=True) for w in weights]

    best = minimize(lambda t: -by_paths(chain, 1.0, LAMS, unpack(t))["objective"][0], np.zeros(sizes[-1]))

    def check_all(solve):
        found = solve(chain, 1.0, LAMS)
        np.testing.assert_allclose(found.value, -best.fun, rtol=1e-7)
        for policy, other in zip(found.policies, unpack(best.x), strict=True):
            np.testing.assert_allclose(policy, other, atol=1e-4)

    check_all(solve_chain)
    kills(check_all, lambda c, b, t: solve_chain(c, b, (0.3, 0.3, 0.3)))


def test_suboptimality_and_the_trained_bound_for_any_chain():
    """F* − F(ρ) = Σ λ_i E_ρ KL(ρ_i‖ρ*_i), over ρ's own visits; gap(ρ) ≤ the trained form."""
    cases = [(random_chain(seed, sparse=seed % 2 == 1), seed) for seed in range(30)]

    def check_all(solve):
        for chain, seed in cases:
            rng = np.random.default_rng(seed)
            lams = tuple(10.0 ** rng.uniform(-2, 2, 3))
            found = solve(chain, 0.4, lams, random_policies(seed, chain))
            size = 1 + np.asarray(found.stage_cost).sum(0)
            np.testing.assert_allclose(
                np.asarray(found.stage_shortfall).sum(0) / size, found.shortfall / size, atol=1e-12
            )
            assert (np.asarray(found.stage_shortfall) >= 0).all()
            assert (np.asarray(found.trained_bound) >= found.gap - 1e-12 * size).all()
            trained = found.stage_shortfall - found.stage_cost
            one = found.single
            width = one.own_span * one.tv_model + one.span * one.tv_shift
            np.testing.assert_allclose(found.trained_bound, width + trained.sum(0), atol=1e-11 * size.max())

    def at_the_optimal_visits(c, b, t, rho):
        """The mutant: each stage's KL(ρ_i‖ρ*_i) where ρ* goes, in place of where ρ goes."""
        found, star = solve_chain(c, b, t, rho), solve_chain(c, b, t)
        visits = [np.ones((len(c.p), 1)), *map(np.asarray, star.visits[:-1])]
        shortfall = []
        for v, lam, q, p in zip(visits, t, rho, map(np.asarray, star.policies), strict=True):
            terms = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0) / np.maximum(p, 1e-300)), 0.0)
            shortfall.append(lam * (v * terms.sum(-1)).sum(-1))
        return found._replace(stage_shortfall=np.array(shortfall))

    check_all(solve_chain)
    kills(check_all, at_the_optimal_visits)


def test_theorem_1_for_chains():
    """gap ≤ tight ≤ span form; and the tight form is attained by a chain that can only lose what TV sees."""

    def check_all(pick):
        for seed in range(60):
            rng = np.random.default_rng(seed)
            chain = random_chain(seed, sparse=seed % 2 == 1)
            found = solve_chain(chain, 10.0 ** rng.uniform(-3, 3), tuple(10.0 ** rng.uniform(-3, 3, 3)))
            assert (np.asarray(found.tight_bound) <= found.span_bound + 1e-13).all()
            assert (np.asarray(found.gap) <= pick(found) + 1e-13).all()
            assert all(finite(leaf) for leaf in jax.tree.leaves(found))
        # One good response, always given to the prompt itself, and less often to the rewrites.
        frozen = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.75, 0], [0.125, 0.875, 0]])
        chain = dataclasses.replace(
            random_chain(1), frozen=frozen, own=np.zeros(2, int), reward=np.array([[1.0, 0, 0]] * 2)
        )
        found = solve_chain(chain, 0.4, LAMS)
        np.testing.assert_allclose(found.gap, found.tight_bound, atol=1e-14)
        assert (np.asarray(found.gap) <= pick(found) + 1e-13).all()

    check_all(lambda found: found.tight_bound)
    kills(check_all, lambda found: found.tight_bound - 0.01 * found.star_jeffreys.sum(0))
    kills(check_all, lambda found: found.tight_bound - 0.01 * found.single.span * found.single.tv_shift)


def test_the_one_stage_bracket():
    """V¹(λ_max) ≤ F* ≤ V¹(λ_min): which way round is tested, and both ends are met."""

    def check_all(bracket):
        strict = 0
        for seed in range(30):
            rng = np.random.default_rng(seed)
            chain = random_chain(seed, sparse=seed % 2 == 1)
            low, value, high = (np.asarray(v) for v in bracket(chain, tuple(10.0 ** rng.uniform(-2, 1, 3))))
            assert (low <= value + 1e-13).all()
            assert (value <= high + 1e-13).all()
            strict += int((high - low > 1e-3).sum())
        assert strict > 20
        # The stage that does all the work pays its own λ: the ends are attained.
        certain = np.eye(2)
        chain = Chain([1.0], [[[0.5, 0.5]], certain], certain, [0], [[1.0, 0.0]])
        found = bracket(chain, (0.2, 5.0))
        np.testing.assert_allclose(found.value, found.high, rtol=1e-13)
        found = bracket(chain, (5.0, 0.2))
        np.testing.assert_allclose(found.value, found.low, rtol=1e-13)

    check_all(one_stage_bracket)
    kills(check_all, lambda c, t: one_stage_bracket(c, t)._replace(low=one_stage_bracket(c, t).high))
    kills(check_all, lambda c, t: one_stage_bracket(c, t)._replace(high=one_stage_bracket(c, t).low))


def test_sensitivity_to_each_lambda():
    """dF*/dλ_i = −E_ρ* KL_i: the stage's own visited KL (envelope)."""
    chain = random_chain(4)
    found = solve_chain(chain, 0.4, LAMS)
    for i, lam in enumerate(LAMS):
        step = 1e-5
        up, down = (np.array(LAMS) + s * step * np.eye(3)[i] for s in (1, -1))
        slope = (solve_chain(chain, 0.4, up).value - solve_chain(chain, 0.4, down).value) / (2 * step)
        np.testing.assert_allclose(slope, -found.star_cost[i] / lam, atol=1e-8)


@pytest.mark.parametrize("lams", [(1e-6, 1e6, 1.0), (1e6, 1e-6, 1e-6), (1e-6, 1e-6, 1e-6), (1e6, 1e6, 1e6)])
def test_limits(lams):
    """λ → ∞ is the reference, λ → 0 the best that can be reached; large offsets of rewards do not matter."""
    for offset in (0.0, -1e6, 1e300):
        base = random_chain(5, reward=np.array([[0.0, 0.5, 1.0], [1.0, 0.25, 0.0]]))
        chain = dataclasses.replace(base, reward=base.reward + offset if offset < 1 else base.reward * offset)
        found = solve_chain(chain, 1.0, lams, random_policies(5, base))
        assert all(finite(leaf) for leaf in jax.tree.leaves(found))
        if offset < 1:
            plain = solve_chain(base, 1.0, lams)
            for policy, want in zip(found.policies, plain.policies, strict=True):
                np.testing.assert_allclose(policy, want, atol=1e-9 if offset == 0 else 1e-3)
    reward = base.reward @ base.frozen.T
    found = solve_chain(base, 1.0, lams)
    if max(lams) == 1e-6:
        np.testing.assert_allclose(found.achieved, reward.max(-1), atol=1e-12)
    if min(lams) == 1e6:
        np.testing.assert_allclose(found.achieved, (base.composed.prior * reward).sum(-1), atol=1e-6)
        np.testing.assert_allclose(found.visits[-1], base.composed.prior, atol=1e-6)


def test_a_policy_outside_the_reference_costs_infinitely():
    chain = Chain([1.0], [[[0.0, 1.0]], np.eye(2)], np.eye(2), [0], [[1.0, 0.0]])
    found = solve_chain(chain, 1.0, 1.0, [np.array([[0.5, 0.5]]), np.eye(2)])
    assert found.stage_cost[0, 0] == np.inf
    assert found.shortfall[0] == np.inf
    assert found.trained_bound[0] == np.inf
    # What is never visited costs nothing, whatever it would do there.
    stage = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = solve_chain(chain, 1.0, 1.0, [np.array([[0.0, 1.0]]), np.array([[0.5, 0.5], [0.0, 1.0]])])
    assert float(found.stage_cost.sum()) == 0
    assert abs(float(found.shortfall[0])) <= 4 * EPS
    assert (np.asarray(chain.stages[1]) == stage).all()


def test_a_reference_that_underflows_is_refused():
    """1e-300 · 1e-16 is 0 in float64: the best rewrite would be missing from every bound."""
    stages = [np.array([[1.0, 1e-300]]), np.array([[1.0, 0.0], [1.0, 1e-16]])]
    arguments = np.eye(2), [0], [[0.0, 1.0]]

    def check(chain):
        said = ""
        try:
            chain([1.0], stages, *arguments)
        except AlignProError as error:
            said = str(error)
        assert said.startswith("stages: lead from prompt 0 to rewrite 1 with probability below")

    check(Chain)
    kills(check, mutated(chains, "if lost.any():", "if False:").Chain)
    stages[0] = np.array([[1.0, 0.0]])  # a reference that is 0 is a statement, not an accident
    assert Chain([1.0], stages, *arguments).composed.prior[0, 1] == 0
    both = [np.array([[0.5, 0.5 - 1e-300, 1e-300]]), np.array([[0.5, 0.5], [1.0, 0.0], [1.0, 1e-16]])]
    with pytest.raises(AlignProError, match=r"^chain: a path has a probability below"):
        joint_tilt(Chain([1.0], both, *arguments), 1.0)


def test_what_is_seldom_visited_costs_infinitely_where_it_must():
    """Visits of 1e-200 · 1e-200 underflow; what then leaves the reference still has an infinite KL."""
    stages = [np.array([[1.0, 1e-200]]), np.eye(2), np.eye(2)]
    chain = Chain([1.0], stages, np.eye(2), [0], [[0.0, 1.0]])
    policies = [stages[0], np.array([[1.0, 0.0], [1.0, 1e-200]]), np.array([[1.0, 0.0], [1e-200, 1.0]])]
    found = solve_chain(chain, 1.0, 1.0, policies)
    assert np.isinf(found.stage_cost[1, 0])  # x₁ = 1 is visited, and goes where the reference cannot
    assert np.isinf(found.stage_cost[2, 0])  # x₂ = 1 is visited with probability 1e-400


def test_bad_input():
    chain = random_chain(1)
    with pytest.raises(AlignProError, match=r"^stages: is empty; give at least one"):
        Chain([1.0], [], [[1.0]], [0], [[0.0]])
    with pytest.raises(AlignProError, match=r"^stages\[1\]: has shape \(2, 2\); give \[3, K\]"):
        dataclasses.replace(chain, stages=[chain.stages[0], np.eye(2)])
    with pytest.raises(
        AlignProError, match=r"^stages\[0\]: has shape \(3, 3\); give \[2, K\].* prompts in p"
    ):
        dataclasses.replace(chain, stages=[np.eye(3)])
    with pytest.raises(AlignProError, match=r"^stages\[1\]\[0\] sums to 2, not 1"):
        dataclasses.replace(chain, stages=[chain.stages[0], np.ones((3, 2))])
    with pytest.raises(AlignProError, match=r"^frozen: has 3 rewrites"):
        dataclasses.replace(chain, frozen=np.eye(3))
    with pytest.raises(AlignProError, match=r"^lams: 2 given for 3 stages; give one for each, or one number"):
        solve_chain(chain, 1.0, (1.0, 1.0))
    with pytest.raises(AlignProError, match=r"^lams\[1\] -1\.0: must be a positive finite number"):
        solve_chain(chain, 1.0, (1.0, -1.0, 1.0))
    with pytest.raises(AlignProError, match=r"^policies: 1 given for 3 stages"):
        solve_chain(chain, 1.0, 1.0, [chain.stages[0]])
    with pytest.raises(AlignProError, match=r"^policies\[2\]: has shape"):
        solve_chain(chain, 1.0, 1.0, [chain.stages[0], chain.stages[1], np.eye(4)])


def test_the_higher_value_may_have_the_lower_reward():
    """Against one prompter at its smallest λ a chain's value never wins, but its reward may."""
    stages = [np.array([[0.5, 0.5]]), np.array([[1.0, 0.0, 0.0], [0.0, 0.999, 0.001]])]
    chain = Chain(np.ones(1), stages, np.eye(3), np.zeros(1, int), np.array([[0.5, 0.0, 1.0]]))
    gamble, single = (solve_chain(chain, 1.0, lams) for lams in ((1000.0, 0.1), (0.1, 0.1)))
    assert gamble.value < single.value
    np.testing.assert_allclose([gamble.achieved[0], single.achieved[0]], [0.728, 0.561], atol=1e-3)
