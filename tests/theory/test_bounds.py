import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import mutated
from theory_oracle import COVER, EPS, close, exact, fields, finite, kills, oracle

from alignpro.errors import AlignProError
from alignpro.report.numbers import plain
from alignpro.theory import bounds
from alignpro.theory.bounds import (
    BOUNDS,
    IDENTITIES,
    LEMMAS,
    LOWER_BOUNDS,
    STATEMENTS,
    WRONG_BOUNDS,
    check,
    judge,
    report,
)
from alignpro.theory.families import FAMILIES, draw, random_prompters
from alignpro.theory.gibbs import grid
from alignpro.theory.instance import Instance
from alignpro.theory.scale.instances import solve_instances
from alignpro.theory.solution import Solution, solution
from alignpro.theory.statements import lemmas, lower, upper

compiled = jax.jit(solution)
TRUE = {**BOUNDS, **LOWER_BOUNDS, **LEMMAS, **IDENTITIES}


@jax.jit
@jax.vmap
def evaluate_all(instance, beta, lam, prompter):
    star, other = solution(instance, beta, lam), solution(instance, beta, lam, prompter)
    return {name: found(other if found.any_prompter else star) for name, found in STATEMENTS.items()}


def changed(instance, **fields):
    return dataclasses.replace(instance, **fields)


def test_a_thousand_instances_against_plain_numpy():
    """`solve` on many shapes, padded and batched, against the formulas written out."""
    rng = np.random.default_rng(0)
    names = [n for n in FAMILIES if n not in ("near_deterministic", "scaled", "peaked")]
    instances = []
    for i in range(1000):
        shape = tuple(int(n) for n in rng.integers(1, 8, 3))
        instances += draw(names[i % len(names)], i, shape)
    beta, lam = 0.4, 0.7
    wanted = [oracle(*fields(instance), beta, lam) for instance in instances]

    def check_all(solve):
        for got, want in zip(solve(instances), wanted, strict=True):
            size = max(1.0, np.abs(want["j_star"]), np.abs(want["j_rho"]))
            for key in ("j_star", "j_rho", "gap", "delta1", "delta2"):
                assert abs(got[key] - want[key]) <= 1e-10 * max(abs(want[key]), 1e-3 * size), key
            assert abs(got["exact_gap"] - want["sides"]["exact_gap"][1]) <= 1e-13 * size
            for key in ("log_z", "log_z_star"):
                np.testing.assert_allclose(got[key], want[key], rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(got["r_max"], want["r_max"], rtol=1e-10)
            for name, bound in got["bounds"].items():
                if bound["verdict"] == "inapplicable":
                    assert (
                        name == "drift"
                    )  # a rewrite induces what the frozen model cannot give: KL is infinite
                    continue
                rhs = want["sides"][name][0 if name in LOWER_BOUNDS else 1]
                # The plain formula's rounding of a KL near 0 is magnified by the square root.
                tolerance = 1e-7 if name == "kl_only" else 1e-10
                assert abs(bound["rhs"] - rhs) <= tolerance * max(abs(rhs), 1e-3 * size), name
                sign = -1 if name in LOWER_BOUNDS else 1
                assert bound["slack"] == sign * (bound["rhs"] - got["gap"])
            first = got["bounds"]["theorem1"]["terms"]
            np.testing.assert_allclose(
                first["model"], want["r_max"] * want["tv_model"], rtol=1e-10, atol=1e-14
            )
            np.testing.assert_allclose(
                first["prompt_shift"], want["r_max"] * want["tv_shift"], rtol=1e-10, atol=1e-14
            )
            np.testing.assert_allclose(-first["prompter_kl"], want["prompter_kl"], rtol=1e-10, atol=1e-13)

    def solve(many, lam=lam):
        return [one.json() for one in solve_instances(many, beta, lam, (*BOUNDS, *LOWER_BOUNDS))]

    check_all(lambda many: plain(solve(many)))
    kills(check_all, lambda many: plain(solve(many, lam * (1 + 1e-6))))


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_error_is_within_its_bound(family):
    """Against 80 digits at temperatures from 1e-6 to 1e6: the claimed error covers the true one."""
    rng = np.random.default_rng(1)
    cases = []
    for i, instance in enumerate(draw(family, 5, (2, 3, 3), 12)):
        beta, lam = 10.0 ** rng.uniform(-6, 6, 2)
        rho = random_prompters(rng, np.asarray(instance.prior)) if i % 2 else None
        cases.append((instance, beta, lam, rho, exact(instance, beta, lam, rho, 80)))

    def check_all(shrink):
        for instance, beta, lam, rho, want in cases:
            s = compiled(instance, beta, lam, rho)
            for name, statement in STATEMENTS.items():
                found = statement(s)
                if all(bool(a) for a in found.assumptions.values()):
                    lhs, rhs = want["sides"][name]
                    assert abs(float(found.rhs - found.lhs) - (rhs - lhs)) <= shrink * float(found.error), (
                        name
                    )
                    if name in IDENTITIES:
                        assert abs(float(found.lhs) - lhs) <= shrink * float(found.error), name

    check_all(1.0)
    kills(check_all, 1e-6)


CURVED = ("kl_only", "pinsker", "jeffreys_tv")
"""Of an infinite slope where a divergence is 0 or an overlap vanishes: looked at away from there."""


def test_the_error_of_a_statement_is_that_of_its_parts():
    """Every number of a solution off by its own error, all the worst way: the sides are off by no more.

    To first order, by automatic differentiation; and the error claimed is not far above, in the median.
    """
    rng = np.random.default_rng(10)
    star, other = [], []
    for instance in (i for family in FAMILIES for i in draw(family, 15, (2, 3, 3), 20)):
        beta, lam = 10.0 ** rng.uniform(-3, 3, 2)
        star.append(compiled(instance, beta, lam, None))
        other.append(compiled(instance, beta, lam, random_prompters(rng, np.asarray(instance.prior))))
    star, other = (jax.tree.map(lambda *leaves: np.stack(leaves), *many) for many in (star, other))

    def share(statement, s):
        """How much of the error claimed is used up, by instance."""

        def slack(parts):
            found = jax.vmap(statement)(s._replace(**parts))
            return jnp.sum(found.rhs - found.lhs), found

        slopes, found = jax.grad(slack, has_aux=True)({name: getattr(s, name) for name in COVER})
        moved = 0.0
        for name, slope in slopes.items():
            bound = sum(getattr(s, cover) for cover in COVER[name])
            with np.errstate(invalid="ignore"):  # an infinite KL where the statement does not apply
                moved += np.where(slope != 0, np.abs(slope) * bound, 0.0).sum(-1)
        error = np.asarray(found.error)
        applies = np.all([error > 0, *found.assumptions.values()], axis=0)
        if statement.__name__ in CURVED:
            applies &= np.all((s.overlap_model > 0.5) & (s.model_kl > 1e3 * s.model_error), -1)
        return (moved / np.where(applies, error, 1.0))[applies]

    def check(claims):
        for name, claim in claims.items():
            used = share(claim.function, other if claim.any_prompter else star)
            assert used.max() <= 1 + (1e-3 if name in CURVED else 1e-12), name
            assert np.median(used) > 0.5 or name in CURVED, name

    check(TRUE)
    for name, module, right, wrong in (
        ("any_gap", lemmas, "s.prompter_error + s.excess_error", "s.prompter_error - s.excess_error"),
        ("any_gap", lemmas, "s.prompter_error + s.excess_error", "s.excess_error"),
        ("suboptimality", lemmas, "2.0 * s.rho_error", "s.rho_error + s.prompter_error"),
        ("theorem1_l1", lemmas, ', "tv_model_error", "tv_shift_error"', ""),
        ("induced", upper, "s.span * s.tv_rho_error, {}", "4 * s.span * s.tv_rho_error, {}"),
        ("mirror", lower, "s.model_error + s.prompter_error + s.span", "s.prompter_error + s.span"),
    ):
        kills(check, {name: mutated(module, right, wrong).CLAIMS[name]})


@pytest.mark.parametrize("family", FAMILIES)
def test_true_statements_hold(family):
    """Each on 2,000 instances per family, the larger draw being `alignpro verify`'s."""
    rng = np.random.default_rng(2)
    batch = FAMILIES[family](rng, 2000, (3, 4, 3))
    beta, lam = 10.0 ** rng.uniform(-6, 6, (2, 2000))
    every = evaluate_all(batch, beta, lam, random_prompters(rng, np.asarray(batch.prior)))
    for name in TRUE:
        found = every[name]
        slack, error = np.asarray(found.rhs - found.lhs), np.asarray(found.error)
        applies = np.all([np.ones(2000, bool), *found.assumptions.values()], axis=0)
        assert applies.all() or name in ("drift", "regularised")
        slack, error = slack[applies], error[applies]
        assert finite(slack), name
        assert (slack >= -error).all(), name
        if name in IDENTITIES:
            assert (slack <= error).all(), name


def test_every_statement_has_teeth():
    """Half of any term less, or half of what is subtracted more, and some instance refutes the statement."""
    rng = np.random.default_rng(8)
    refuted: dict[tuple[str, str], int] = {}
    for family in FAMILIES.values():
        batch = family(rng, 2000, (3, 4, 3))
        beta, lam = 10.0 ** rng.uniform(-3, 3, (2, 2000))
        every = evaluate_all(batch, beta, lam, random_prompters(rng, np.asarray(batch.prior)))
        for name in TRUE:
            found = jax.tree.map(np.asarray, every[name])
            applies = np.all([np.ones(2000, bool), *found.assumptions.values()], axis=0)
            slack = found.rhs - found.lhs
            if name in IDENTITIES:
                wrong = {"right side": np.abs(slack + 1e-6 * found.rhs) > found.error}
            elif name in LEMMAS:
                share = 0.55 if name == "theorem1_l1" else 0.05  # its right side is twice what it must be
                wrong = {"right side": slack - share * np.abs(found.rhs) < -found.error}
            else:
                with np.errstate(invalid="ignore"):  # an infinite KL where the statement does not apply
                    wrong = {t: slack - 0.5 * np.abs(v) < -found.error for t, v in found.terms.items()}
            for term, violated in wrong.items():
                refuted[name, term] = refuted.get((name, term), 0) + int((violated & applies).sum())
    assert {name for name, _ in refuted} == set(TRUE)
    assert min(refuted.values()) > 0, [key for key, count in refuted.items() if not count]


def test_signed_terms_sum_to_the_bound():
    """Of every upper and lower bound (and of whatever else names terms), to rounding of what is summed."""
    rng = np.random.default_rng(9)
    named: dict[str, set[str]] = {}
    drawn = []
    for family in FAMILIES.values():
        batch = family(rng, 2000, (3, 4, 3))
        beta, lam = 10.0 ** rng.uniform(-3, 3, (2, 2000))
        every = evaluate_all(batch, beta, lam, random_prompters(rng, np.asarray(batch.prior)))
        drawn.append(jax.tree.map(np.asarray, every))

    def check_all(signed):
        for every in drawn:
            noise = every[
                "suboptimality"
            ].error  # of the divergences of ρ, which only the terms hold one by one
            for name, found in every.items():
                claim, terms = STATEMENTS[name], signed(found.terms)
                if terms or claim.kind in ("upper bound", "lower bound"):
                    bound = found.lhs if claim.relation == ">=" else found.rhs
                    applies = np.all([np.ones(2000, bool), *found.assumptions.values()], axis=0)
                    size = sum(map(np.abs, terms.values()), start=0 * bound)
                    off = np.abs(sum(terms.values(), start=0 * bound) - bound)
                    assert (off <= 2 * noise + found.error + 32 * EPS * size)[applies].all(), name
                    named.setdefault(name, set()).update(terms)

    with np.errstate(invalid="ignore"):  # infinite KLs where a statement does not apply
        check_all(dict)
        kills(check_all, lambda terms: {key: np.abs(value) for key, value in terms.items()})
        kills(check_all, lambda terms: dict(list(terms.items())[:-1]))
    assert {*BOUNDS, *LOWER_BOUNDS} <= {*named}
    assert all(named[name] for name in (*BOUNDS, *LOWER_BOUNDS))


def test_a_bound_that_equals_the_trivial_one_is_vacuous():
    """Upper: β below span/4 leaves span itself. Lower: π* = π_F, and the only rewrite has other answers."""
    equal = [
        ("beta_only", Instance([1.0], [[1.0]], [[0.5, 0.5]], [0], [[0.0, 1.0]])),
        ("mirror", Instance([1.0], [[0.0, 1.0]], np.eye(2), [0], [[0.0, 1.0]])),
    ]
    statements = [(name, STATEMENTS[name](compiled(instance, 0.1, 1.0))) for name, instance in equal]

    def check_all(said):
        for name, statement in statements:
            found = said(name, statement)
            assert abs(found.rhs) == float(statement.ceiling) == 1.0
            assert found.vacuous, name
            away = {"lhs": statement.lhs + 1e-9} if name == "mirror" else {"rhs": statement.rhs - 1e-9}
            assert not said(name, statement._replace(**away)).vacuous, name

    def strict(relation):
        def mutant(name, statement):
            found = report(name, statement)
            at = abs(found.rhs) == float(statement.ceiling) and found.relation == relation
            return dataclasses.replace(found, vacuous=found.vacuous and not at)

        return mutant

    check_all(report)
    kills(check_all, strict("<="))
    kills(check_all, strict(">="))


def test_wrong_statements_are_refuted():
    rng = np.random.default_rng(3)
    refuted = dict.fromkeys(WRONG_BOUNDS, 0)
    for family in FAMILIES.values():
        batch = family(rng, 2000, (3, 4, 3))
        beta, lam = 10.0 ** rng.uniform(-3, 3, (2, 2000))
        found = evaluate_all(batch, beta, lam, random_prompters(rng, np.asarray(batch.prior)))
        for name in refuted:
            slack = np.asarray(found[name].rhs - found[name].lhs)
            refuted[name] += int((slack < -np.asarray(found[name].error)).sum())
    assert min(refuted.values()) > 0, refuted


def test_signed_rewards_by_hand():
    """One prompt, one rewrite, a fair coin with rewards ±1: gap = 2 TV, so max |r| = 1 is too small."""
    coin = Instance([1.0], [[1.0]], [[0.5, 0.5]], [0], [[-1.0, 1.0]])
    found = check(coin, 0.5, 1.0)
    tv = np.tanh(2.0) / 2
    np.testing.assert_allclose(found.gap, np.tanh(2.0), rtol=8 * EPS)
    np.testing.assert_allclose(found.terms["model"], 2 * tv, rtol=8 * EPS)
    assert found.verdict == "inconclusive"  # an equality: only rounding is left
    wrong = WRONG_BOUNDS["signed_max_abs"](compiled(coin, 0.5, 1.0))
    np.testing.assert_allclose(wrong.rhs - wrong.lhs, -tv, rtol=8 * EPS)


def test_adversarial_instances_are_tight():
    """Rewards aligned with both total variations make the tight form an equality, and 1e-12 less is seen."""
    rng = np.random.default_rng(4)
    seen = 0
    for instance in draw("adversarial", 6, (1, 3, 4), 60):
        if set(np.unique(instance.reward)) <= {0.0, 1.0}:
            beta, lam = 10.0 ** rng.uniform(-1, 1, 2)
            found = check(instance, beta, lam, "tight")
            assert found.verdict == "inconclusive"
            assert found.error < 1e-12
            assert judge(found.slack - 1e-12, found.error) == "violated"
            seen += 1
    assert seen > 10


def scalars(instance, beta, lam):
    s = compiled(instance, beta, lam)
    return {
        "gap": float(s.average(s.gap)),
        "exact": float(s.average(s.model_jeffreys + s.shift - s.prompter_jeffreys)),
        **{name: float(bound(s).rhs) for name, bound in BOUNDS.items()},
    }


def test_metamorphic():
    rng = np.random.default_rng(5)
    cases = [(draw(f, 7, (3, 4, 5))[0], *10.0 ** rng.uniform(-2, 2, 2)) for f in FAMILIES if f != "scaled"]

    def same(a, b, size, factor=1.0):
        for key in a:
            assert abs(factor * a[key] - b[key]) <= 4000 * EPS * size * max(factor, 1), key

    def check_all(compute):
        for instance, beta, lam in cases:
            p, prior, frozen, own, reward = fields(instance)
            size = np.ptp(reward) + np.abs(reward).max()
            base = compute(instance, beta, lam)
            # Renaming responses, rewrites or prompts.
            order = rng.permutation(5)
            same(
                base,
                compute(changed(instance, frozen=frozen[:, order], reward=reward[:, order]), beta, lam),
                size,
            )
            order = rng.permutation(4)
            renamed = changed(
                instance, prior=prior[:, order], frozen=frozen[order], own=np.argsort(order)[own]
            )
            same(base, compute(renamed, beta, lam), size)
            order = rng.permutation(3)
            moved = changed(instance, p=p[order], prior=prior[order], own=own[order], reward=reward[order])
            same(base, compute(moved, beta, lam), size)
            # A rewrite listed twice, its mass shared.
            twice = np.concatenate([prior[:, :3], prior[:, 3:] * 0.25, prior[:, 3:] * 0.75], 1)
            doubled = changed(instance, prior=twice, frozen=np.concatenate([frozen, frozen[3:]]))
            same(base, compute(doubled, beta, lam), size)
            # A response split in two of equal reward.
            split = np.concatenate([frozen[:, :4], frozen[:, 4:] * 0.25, frozen[:, 4:] * 0.75], 1)
            again = changed(instance, frozen=split, reward=np.concatenate([reward, reward[:, 4:]], 1))
            same(base, compute(again, beta, lam), size)
            # Rewards, β and λ in other units.
            same(base, compute(changed(instance, reward=3 * reward), 3 * beta, 3 * lam), size, 3)
            # A shift of each prompt's rewards moves neither the gap nor any bound but Theorem 1's r_max.
            shifted = compute(changed(instance, reward=reward + 100 * rng.uniform(size=(3, 1))), beta, lam)
            same(
                {k: v for k, v in base.items() if k != "theorem1"},
                {k: v for k, v in shifted.items() if k != "theorem1"},
                size + 200,
            )

    check_all(scalars)
    kills(check_all, lambda i, b, t: {"gap": scalars(i, b, t)["gap"] + 1e-6 * float(i.reward[0, 0])})
    kills(check_all, lambda i, b, t: scalars(i, b, t + 1e-3))
    kills(check_all, lambda i, b, t: {"mean": float(np.mean(i.frozen))})


def test_negative_rewards_are_shifted_to_zero():
    """The convention for signed rewards is Theorem 1 on rewards shifted by their minimum."""
    instance = draw("signed", 3, (2, 3, 4))[0]
    lifted = changed(instance, reward=instance.reward - instance.reward.min())
    a, b = check(instance, 0.5, 0.5), check(lifted, 0.5, 0.5)
    assert close(a.rhs, b.rhs, abs(a.rhs) + 1, 100)
    assert close(a.gap, b.gap, abs(a.gap) + 1, 100)


def test_the_papers_readings():
    rng = np.random.default_rng(6)
    instance = draw("independent", 8, (3, 4, 5))[0]
    # First term 0 when nothing distinguishes responses, so π* = π_F.
    flat = check(changed(instance, reward=np.full((3, 5), 0.3)), 0.5, 0.5)
    assert flat.terms["model"] == 0
    assert flat.gap == 0
    # Second term, and the prompter's, 0 when ρ_sft is a point mass on x itself.
    alone = check(changed(instance, prior=np.eye(4)[np.asarray(instance.own)]), 0.5, 0.5)
    assert alone.terms["prompt_shift"] == alone.terms["prompter_kl"] == 0
    # λ → ∞ is no prompt optimization; λ → 0 the best rewrite.
    hot, cold = compiled(instance, 0.5, 1e6), compiled(instance, 0.5, 1e-6)
    np.testing.assert_allclose(hot.rho_star, instance.prior, atol=2e-6)
    best = np.asarray(hot.rewrite_reward).argmax(-1)
    np.testing.assert_allclose(cold.rho_star, np.eye(4)[best], atol=1e-12)
    # π_ρ* can outperform π*: β large, and a rewrite better than the prompt.
    wins = [check(i, 1e3, 1e-2).gap < 0 for i in draw("independent", int(rng.integers(1000)), (2, 4, 4), 20)]
    assert any(wins)


def test_trained_form_needs_no_optimal_prompter():
    rng = np.random.default_rng(7)
    instance = draw("independent", 9, (3, 4, 5))[0]
    rho = rng.dirichlet(np.ones(4), size=3)
    assert check(instance, 0.5, 0.5, "trained", prompter=rho).verdict == "holds"
    for name in [name for name, claim in BOUNDS.items() if not claim.any_prompter]:
        assert check(instance, 0.5, 0.5, name, prompter=rho).verdict == "inapplicable"
    # ρ* itself, given as a matrix: no shortfall, and the span form again.
    star = compiled(instance, 0.5, 0.5).rho_star
    again, span = check(instance, 0.5, 0.5, "trained", prompter=star), check(instance, 0.5, 0.5, "span")
    assert again.terms["shortfall"] < 1e-28
    assert close(again.rhs, span.rhs, 1.0, 100)
    # Mass where ρ_sft has none: KL is infinite and the statement does not apply.
    outside = changed(instance, prior=np.array([[0.5, 0.5, 0, 0]] * 3))
    found = check(outside, 0.5, 0.5, "trained", prompter=rho)
    assert found.verdict == "inapplicable"
    assert found.terms["prompter_kl"] == -np.inf


def test_unreachable_responses_do_not_count():
    """The span form ignores a response no reachable policy gives; Theorem 1's r_max does not."""
    instance = Instance([1.0], [[1.0, 0.0]], [[0.5, 0.5, 0.0], [0, 0, 1.0]], [0], [[0.0, 1.0, 50.0]])
    assert float(compiled(instance, 1.0, 1.0).span[0]) == 1
    # R of a rewrite that ρ_sft never takes counts what only that rewrite can give.
    np.testing.assert_array_equal(compiled(instance, 1.0, 1.0).rewrite_reward, [[0.5, 50.0]])
    assert check(instance, 1.0, 1.0).rhs == pytest.approx(50 * check(instance, 1.0, 1.0, "span").rhs)


def test_what_rewrites_induce_is_decided_by_supports():
    """ρ* of the second rewrite underflows, but it is positive: π_ρ* leaves the support of π_F(·|x)."""
    instance = Instance([1.0], [[0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5]], [0], [[1.0, 0.0]])
    s = compiled(instance, 1.0, 1e-6)
    assert s.rho_star[0, 1] == 0
    assert not bool(s.covered)
    assert check(instance, 1.0, 1e-6, "drift").verdict == "inapplicable"
    stay = np.array([[1.0, 0.0]])
    assert check(instance, 1.0, 1e-6, "drift", prompter=stay).verdict != "inapplicable"


def test_r_max_override():
    instance = draw("independent", 10, (2, 3, 4))[0]
    assert check(instance, 1.0, 1.0, r_max=2.0).terms["model"] > check(instance, 1.0, 1.0).terms["model"]
    found = check(instance, 1.0, 1.0, r_max=0.5)
    assert found.verdict == "inapplicable"
    assert found.assumptions["rewards in [0, r_max]"] is False
    signed = changed(instance, reward=instance.reward - 0.5)
    assert check(signed, 1.0, 1.0, r_max=2.0).verdict == "inapplicable"


def test_verdicts():
    assert judge(0.1, 0.01) == "holds"
    assert judge(-0.1, 0.01) == "violated"
    assert judge(0.01, 0.01) == "inconclusive"
    assert judge(-0.01, 0.01) == "inconclusive"
    assert judge(0.0, 0.0) == "holds"
    assert judge(-1e-300, 0.0) == "violated"
    assert judge(1.0, 0.0, applicable=False) == "inapplicable"
    assert judge(float("nan"), 0.1) == "inconclusive"
    assert judge(float("inf"), 0.1) == "holds"
    assert judge(0.2, 0.1, equality=True) == "violated"
    assert judge(-0.1, 0.1, equality=True) == "holds"
    assert judge(-0.1, 0.1, equality=True, size=0.1) == "inconclusive"
    assert judge(-0.1, 0.1, equality=True, size=0.11) == "holds"
    assert judge(0.2, 0.1, equality=True, size=0.1) == "violated"
    assert judge(0.0, 0.0, equality=True, size=0.0) == "holds"


def test_an_identity_of_nothing_but_rounding_is_inconclusive():
    """Rewards apart by a unit of rounding: the gap is lost in its error, and says nothing of the identity."""
    near = Instance([1.0], [[0.5, 0.5]], np.eye(2), [0], [[1.0, 1.0 + EPS]])
    far = Instance([1.0], [[0.5, 0.5]], np.eye(2), [0], [[0.0, 1.0]])

    def verdicts(of):
        for name in ("exact_gap", "any_gap"):
            found = of(near, 1e-3, 1e-3, name)
            assert found.verdict == ("inconclusive" if found.error >= abs(found.gap) else "holds")
            assert of(far, 1.0, 1.0, name).verdict == "holds"
        # λ so small beside a tie within rounding that ρ* itself is unknown.
        tied = Instance([1.0], [[0.5, 0.5]], [[0.5, 0.5], [0.5 + 1e-15, 0.5 - 1e-15]], [0], [[0.0, 1.0]])
        assert of(tied, 1e3, 1e-17, "regularised").verdict == "inconclusive"
        assert of(far, 1.0, 1.0, "suboptimality").verdict == "holds"  # 0 = 0 by construction

    verdicts(check)
    kills(verdicts, mutated(bounds, "error > 0 and size <= error", "False").check)


def test_the_error_of_what_is_induced_counts_that_of_the_optimal_prompter():
    """Rewrites whose rewards tie to within rounding, at a λ below that: ρ* is only known to be on both."""
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(12):
        frozen = rng.dirichlet(np.ones(3), 2)
        reward = np.array([[0.3, 0.3, 0.9]])
        frozen[1] = frozen[0][[1, 0, 2]]
        reward[0, 1] *= 1 + 10.0 ** rng.uniform(-15, -13)
        instance = Instance([1.0], [rng.dirichlet([1, 1])], frozen, [0], reward)
        lam, beta = 10.0 ** rng.uniform(-15, -12), 10.0 ** rng.uniform(-2, 3)
        cases.append((instance, beta, lam, exact(instance, beta, lam, None, 60)))

    def covers(solve):
        for instance, beta, lam, want in cases:
            found = lower.drift(Solution(*solve(instance, beta, lam)))
            lhs, rhs = want["sides"]["drift"]
            assert abs(float(found.rhs - found.lhs) - float(rhs - lhs)) <= float(found.error)

    covers(solution)
    counted = "e_induced = e_induced + jnp.where(live, jnp.minimum(known, most), 0.0)"
    kills(covers, mutated(importlib.import_module("alignpro.theory.solution"), counted, "pass").solution)
    # Where ρ* is known the error is no larger than it was: that of rounding.
    plain = Instance([1.0], [[0.5, 0.5]], [[0.5, 0.5], [0.9, 0.1]], [0], [[0.0, 1.0]])
    assert float(solution(plain, 1.0, 0.1).induced_error[0]) < 1e-12


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e6])
def test_no_scale_gives_nan(scale, temperature):
    for family in ("independent", "sparse", "adversarial", "signed"):
        base = draw(family, 11, (2, 3, 4))[0]
        instance = changed(base, reward=base.reward * scale)
        s = compiled(instance, temperature, temperature)
        assert all(finite(leaf) for leaf in jax.tree.leaves(s))
        for name in TRUE:
            verdict = check(instance, temperature, temperature, name).verdict
            assert verdict in ("holds", "inconclusive") or name in ("drift", "regularised")


def test_grid_jit_and_vmap_agree():
    instance = draw("independent", 12, (2, 3, 4))[0]
    betas, lams = jnp.array([1e-3, 1.0]), jnp.array([1e-2, 1.0, 1e4])
    swept = jax.jit(lambda i: grid(lambda b, t: solution(i, b, t), betas, lams))(instance)
    for i, beta in enumerate(betas):
        for j, lam in enumerate(lams):
            one = compiled(instance, beta, lam)
            for a, b in zip(jax.tree.leaves(swept), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a[i, j], b, rtol=1e-11, atol=1e-14)
    eager = solution(instance, 1.0, 1.0)
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled(instance, 1.0, 1.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)


def test_a_gradient_of_the_slack_is_finite_and_right():
    instance = draw("independent", 13, (2, 3, 4))[0]

    def slack(lam):
        found = BOUNDS["tight"](solution(instance, 0.5, lam))
        return found.rhs - found.lhs

    step = 1e-6
    numeric = (slack(0.5 + step) - slack(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(slack)(0.5), numeric, atol=1e-8)


def test_bad_arguments():
    instance = draw("independent", 14, (2, 3, 4))[0]
    with pytest.raises(AlignProError, match=r"^bound 'theorem2' is unknown; give one of theorem1"):
        check(instance, 1.0, 1.0, "theorem2")
    with pytest.raises(AlignProError, match=r"^beta 0\.0: must be a positive finite number"):
        check(instance, 0.0, 1.0)
    with pytest.raises(AlignProError, match=r"^prompter: has shape \(2, 2\)"):
        check(instance, 1.0, 1.0, "trained", prompter=np.full((2, 2), 0.5))
    with pytest.raises(AlignProError, match=r"^prompter\[0\] sums to 1\.5, not 1"):
        check(instance, 1.0, 1.0, "trained", prompter=np.full((2, 3), 0.5))
