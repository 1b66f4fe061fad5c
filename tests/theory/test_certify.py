import importlib.util
import json
import math
import sys
from dataclasses import asdict
from fractions import Fraction

import jax
import mpmath
import numpy as np
import pytest
from flint import arb, ctx
from mutants import mutated
from theory_oracle import COVER, EPS, exact, fields, kills, oracle

from alignpro.errors import AlignProError
from alignpro.theory.bounds import (
    BOUNDS,
    IDENTITIES,
    LEMMAS,
    LOWER_BOUNDS,
    STATEMENTS,
    WRONG_BOUNDS,
    Statement,
    theorem1,
    tight,
    trained,
)
from alignpro.theory.elementwise import sqrt, tanh
from alignpro.theory.families import FAMILIES, draw, random_prompters
from alignpro.theory.instance import Instance
from alignpro.theory.proof import balls as module_balls
from alignpro.theory.proof.balls import Ball, Undecided
from alignpro.theory.proof.certify import EXAMINED, Case, Doubtful, certify, certify_many, solution_balls
from alignpro.theory.solution import Solution, solution
from alignpro.theory.statements import lemmas, lower, upper

compiled = jax.jit(solution)


TRUE = [*BOUNDS, *LOWER_BOUNDS, *IDENTITIES, *LEMMAS]

LOGS = {"log_z": ("lam", "prompter_error"), "log_z_star": ("beta", "model_error")}
GIVEN = ("eps", "p", "beta", "lam", "span", "own_span", "reward_max", "reward_min")
FLAGS = ("is_star", "supported", "covered")


def cases(family, seed=0, count=3, shapes=((1, 2, 2), (2, 4, 3)), decades=2.0):
    """(instance, β, λ, a prompter) of a family."""
    rng = np.random.default_rng(seed)
    for shape in shapes:
        for instance in draw(family, seed, shape, count):
            beta, lam = 10.0 ** rng.uniform(-decades, decades, 2)
            yield instance, beta, lam, random_prompters(rng, np.asarray(instance.prior))


def asked(name, case):
    """The arguments of `certify` for a statement: ρ* or a prompter, as it is about."""
    *rest, prompter = case
    return (*rest, name, prompter if getattr(STATEMENTS.get(name), "any_prompter", False) else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_agrees_with_floats_within_their_error(family):
    assert {*COVER, *LOGS, *GIVEN, *FLAGS, "rewrite_reward", "rho_star", "pi_star"} == {
        name for name in Solution._fields if not name.endswith("_error")
    }
    found = [
        (compiled(instance, beta, lam, rho), instance, beta, lam, rho)
        for instance, beta, lam, prompter in cases(family, shapes=((2, 4, 3),), count=4, decades=4.0)
        for rho in (None, prompter)
    ]

    def check(scale):
        for s, instance, beta, lam, rho in found:
            with ctx.workprec(128):
                balls = solution_balls(instance, beta, lam * scale, rho)

            def error(name, balls=balls, s=s):
                value = np.asarray(getattr(balls, name))
                numbers = np.array([float(v) for v in value.flat]).reshape(value.shape)
                assert numbers.shape == np.shape(getattr(s, name))
                same = numbers == np.asarray(getattr(s, name))  # infinities included
                with np.errstate(invalid="ignore"):
                    difference = np.abs(numbers - np.asarray(getattr(s, name)))
                return np.where(same, 0.0, difference), np.abs(numbers)

            for name, covers in COVER.items():
                difference, size = error(name)
                bound = sum(np.asarray(getattr(s, cover)) for cover in covers)
                if name == "tv_prompter":  # nothing is claimed where rewards do not vary
                    bound = bound + np.where(np.asarray(s.span) > 0, 0.0, 8 * EPS)
                assert (difference <= bound + 8 * EPS * size + 1e-300).all(), name
            for name, (temperature, cover) in LOGS.items():
                difference, size = error(name)
                bound = np.asarray(getattr(s, cover)) / np.asarray(getattr(s, temperature))
                assert (difference <= bound + 8 * EPS * size).all(), name
            for name in GIVEN[1:]:
                difference, size = error(name)
                assert (difference <= 16 * EPS * size).all(), name
            difference, _ = error("pi_star")
            assert (difference <= 2 * np.asarray(s.tv_model_error)[:, None] + 8 * EPS).all()
            if rho is None:
                difference, _ = error("rho_star")
                assert (difference <= 2 * np.asarray(s.tv_rho_error)[:, None] + 8 * EPS).all()
            difference, _ = error("rewrite_reward")
            assert (difference <= 32 * EPS * np.abs(instance.reward).max()).all()
            for name in FLAGS:
                assert bool(getattr(balls, name)) == bool(getattr(s, name)), name

    check(1.0)
    kills(check, 1 + 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_contain_what_mpmath_finds_in_eighty_digits(family):
    """Every statement against the formulas written out in another arithmetic; balls are 128 bits wide."""
    found = [
        (case, rho, exact(*case, rho, 80)["sides"])
        for *case, prompter in cases(family, seed=1, count=2, decades=1.0)
        for rho in (None, prompter)
    ]

    def check(scale):
        for (instance, beta, lam), rho, sides in found:
            size = float(np.abs(instance.reward).max())
            with ctx.workprec(128):
                s = solution_balls(instance, beta, Fraction(lam) * scale, rho)
                for name, statement in STATEMENTS.items():
                    if (rho is None) == statement.any_prompter or name not in sides:
                        continue
                    sides_found = statement(s)
                    if not all(sides_found.assumptions.values()):
                        continue
                    for mine, want in zip(sides_found[:2], sides[name], strict=False):
                        # Differences of digits lost to a common offset.
                        want = arb(arb(mpmath.nstr(want, 70)), size * 1e-45)
                        assert arb(mine.value).overlaps(want), name

    check(1)
    kills(check, 1 + Fraction(1, 10**25))


def test_a_statement_of_balls_claims_no_error():
    """A ball's radius is its error: none comes on top."""
    *case, prompter = next(cases("independent"))
    with ctx.workprec(64):
        star, other = solution_balls(*case), solution_balls(*case, prompter)

        def check(*modules):
            for name, claim in (item for module in modules for item in module.CLAIMS.items()):
                error = claim.function(other if claim.any_prompter else star).error
                assert -1e-15 < error.lower <= 0 <= error.upper < 1e-15, name

        check(upper, lower, lemmas)
        kills(
            check,
            mutated(
                upper,
                "s.rise_error, s.fall_error, s.eps)",
                "s.own_rise, s.fall_error, s.eps)._replace(error=s.own_rise)",
            ),
        )
        kills(check, mutated(upper, "(s, term, term * 0)", "(s, term, term)"))
        kills(check, mutated(lemmas, "lhs * 0", "lhs / 0"))


@pytest.mark.parametrize("name", TRUE)
def test_true_statements_are_decided_and_never_violated(name):
    """On every family at all temperatures; ties (aligned rewards, point masses, the identities) included."""
    decided = 0
    for family in FAMILIES:
        for case in cases(family, seed=2, count=2, decades=4.0):
            found = certify(*asked(name, case))
            assert found.verdict in ("holds", "inapplicable"), (family, str(found))
            assert found.slack_lower >= 0 or found.verdict == "inapplicable"
            decided += found.verdict == "holds"
    assert decided > 2 * len(FAMILIES)


@pytest.mark.parametrize("name", WRONG_BOUNDS)
def test_wrong_statements_are_proved_violated_on_some_instance(name):
    found = [
        certify(*asked(name, case))
        for family in ("signed", "adversarial", "independent", "peaked")
        for case in cases(family, seed=3, count=6)
    ]
    proved = [one for one in found if one.verdict == "violated"]
    assert proved
    assert all(one.slack_upper <= 0 for one in proved)


def without(statement, term):
    """The upper bound with one named term left out."""

    def mutant(s):
        found = statement(s)
        return found._replace(rhs=found.rhs - found.terms[term])

    return mutant


@pytest.mark.parametrize("name", ["theorem1", "span", "tight", "trained"])
def test_dropping_a_term_is_caught(name):
    """Each added term of an upper bound is needed: without it, some instance violates the statement."""
    for term in ("model", "prompt_shift"):

        def check(statement):
            for family in ("adversarial", "signed", "shared_rewrites"):
                for case in cases(family, seed=4, count=4):
                    assert certify(*asked(statement, case)).verdict == "holds"

        check(BOUNDS[name])
        kills(check, without(BOUNDS[name], term))


def test_an_identity_that_is_off_by_a_hair_is_violated():
    *case, _ = next(cases("independent"))

    def off(s):
        found = IDENTITIES["exact_gap"](s)
        return found._replace(rhs=found.rhs + 1e-300)

    found = certify(*case, off, equality=True)
    assert (found.verdict, found.precision) == ("violated", 128)
    assert 0 < found.slack_lower <= 1e-300 <= found.slack_upper
    exactly = certify(*case, "exact_gap")
    assert (exactly.verdict, exactly.slack, exactly.within) == ("holds", "0", 0.0)


def near_tight():
    """Instances on which plain NumPy float64 puts `tight` below by 1e-16 to 1e-13 of its size."""
    rng = np.random.default_rng(5)
    for instance in draw("adversarial", 5, (2, 4, 3), 400):
        beta, lam = 10.0 ** rng.uniform(-1, 1, 2)
        naive = oracle(*fields(instance), beta, lam)
        lhs, rhs = naive["sides"]["tight"]
        slack = (rhs - lhs) / rhs
        if -1e-13 < slack < -1e-16:
            yield instance, beta, lam


def test_violations_that_rounding_forged_are_settled():
    found = [certify(*case, "tight") for case in near_tight()]
    assert len(found) > 30
    assert {one.verdict for one in found} == {"holds"}
    # Some are ties, proved equal; others hold by a hair that float64 cannot see.
    hairs = [one.slack_lower for one in found if one.slack != "0"]
    assert 0 < len(hairs) < len(found)
    assert min(hairs) < 1e-13


def test_a_true_violation_of_1e_14_is_proved():
    def hair(s):
        found = tight(s)
        return found._replace(rhs=found.rhs * (1 - Fraction(1, 10**14)))

    settled = 0
    for case in near_tight():
        small = certify(*case, "tight").slack_upper < 1e-17
        found = certify(*case, hair)
        assert found.verdict == "violated" if small else found.verdict in ("holds", "violated")
        settled += small
    assert settled > 10
    known = tight(compiled(*case, None))
    assert float(known.error) > 1e-14 * float(known.rhs)  # float64 could not have told


def roots(extra):
    """√2 √3 ≤ √6 + extra: no cancellation of terms shows that the roots are equal."""

    def statement(s):
        one = s.beta * 0 + 1
        rhs = sqrt(6 * one) + extra
        return Statement(sqrt(2 * one) * sqrt(3 * one), rhs, s.beta * 0, one, {}, {})

    return statement


def test_precision_is_doubled_until_it_decides_and_stated_where_it_does_not():
    instance, *_ = next(cases("independent"))
    case = (instance, 1.0, 1.0)
    found = certify(*case, roots(2.0**-300))
    assert (found.verdict, found.precision) == ("holds", 512)
    found = certify(*case, roots(-(2.0**-300)))
    assert (found.verdict, found.precision) == ("violated", 512)
    found = certify(*case, roots(2.0**-300), max_precision=300)
    assert (found.verdict, found.precision) == ("inconclusive", 300)
    assert found.slack_lower <= 0 <= found.slack_upper
    assert "inconclusive at 300 bits" in str(found)
    for equality in (False, True):
        found = certify(*case, roots(0.0), equality=equality)
        assert (found.verdict, found.precision) == ("inconclusive", 4096)
        assert found.within < 1e-300
        assert "proved equal to within" in str(found)


def test_a_branch_on_overlapping_balls_takes_no_side():
    instance, *_ = next(cases("independent"))

    def branching(s):
        one = s.beta * 0 + 1
        known = sqrt(2 * one) * sqrt(3 * one) <= sqrt(6 * one) + 2.0**-300
        return Statement(one * 0, one if known else -one, one * 0, one, {}, {})

    assert certify(instance, 1.0, 1.0, branching, max_precision=256).verdict == "inconclusive"
    found = certify(instance, 1.0, 1.0, branching)
    assert (found.verdict, found.precision) == ("holds", 512)


def test_exact_numbers_stay_exact():
    """A point mass on x itself, and rewards that do not vary: nothing irrational enters; ties are ties."""
    frozen = np.array([[0.25, 0.75], [0.5, 0.5]])
    eye, rows = np.eye(2), np.array([0, 1])
    stay = Instance(np.full(2, 0.5), eye, frozen, rows, np.array([[0.0, 1.0], [1.0, 0.0]]))
    flat = Instance(np.full(2, 0.5), np.full((2, 2), 0.5), frozen, rows, np.full((2, 2), 0.3))
    for instance in (stay, flat):
        with ctx.workprec(64):
            s = solution_balls(instance, 0.1, 0.2)
        exactly = ["tv_shift", "shift", "prompter_kl", "prompter_jeffreys"]
        if instance is flat:
            exactly = [name for name in COVER if not name.startswith("induced")]
        for name in exactly:
            assert all(v.exact for v in getattr(s, name)), name
    for name in ("span", "tight", "trained", *IDENTITIES):
        found = certify(flat, 0.1, 0.2, name)
        assert (found.verdict, found.slack, found.precision) == ("holds", "0", 128), name
    # Rows are divided by their exact sum, so thirds are thirds.
    third = Instance(np.full(3, 1 / 3), np.ones((3, 1)), np.full((1, 3), 1 / 3), np.zeros(3, int), np.eye(3))
    s = solution_balls(third, "1/3", Fraction(1, 7))
    assert repr(s.p[0]) == repr(s.beta.item()) == repr(s.reference[0]) == "1/3"
    assert repr(s.lam.item()) == "1/7"
    assert repr(solution_balls(third, 0.5, 1 / 7).lam.item()) != "1/7"


def test_supports_that_differ_give_infinity_or_an_assumption():
    instance = Instance(
        np.ones(1), np.array([[0.5, 0.5, 0.0]]), np.eye(3), np.array([0]), np.array([[0.0, 1.0, 2.0]])
    )
    outside, inside = np.array([[0.0, 0.5, 0.5]]), np.array([[1.0, 0.0, 0.0]])
    s = solution_balls(instance, 1.0, 1.0, outside)
    infinite = [name for name in COVER if name.startswith("kl_") and math.isinf(float(getattr(s, name)[0]))]
    assert infinite == ["kl_to_star", "kl_from_star", "kl_to_reference", "kl_from_reference"]
    assert not s.supported
    assert not s.covered
    found = certify(instance, 1.0, 1.0, "trained", outside)
    assert found.verdict == "inapplicable"
    assert "not met: prompter has the support of its reference" in str(found)
    assert certify(instance, 1.0, 1.0, "theorem1", inside).verdict == "inapplicable"
    assert certify(instance, 1.0, 1.0, "trained", inside).verdict == "holds"
    found = certify(instance, 1.0, 1.0, "suboptimality_reversed", inside)
    assert (found.verdict, found.rhs, found.slack_lower) == ("holds", "inf", math.inf)

    def r_max_of(value):
        return lambda s: theorem1(s, value)

    assert certify(instance, 1.0, 1.0, r_max_of(2.0)).verdict == "holds"
    assert certify(instance, 1.0, 1.0, r_max_of(np.nextafter(2.0, 0))).verdict == "inapplicable"


@pytest.mark.parametrize("beta", [1e-6, 1e6])
@pytest.mark.parametrize("lam", [1e-6, 1e6])
def test_extreme_temperatures_and_scales_are_decided(beta, lam):
    for family in ("scaled", "near_deterministic", "peaked"):
        for instance, _, _, prompter in cases(family, seed=7, count=2):
            for name in ("theorem1", "tight", "exact_gap", "trained"):
                assert certify(*asked(name, (instance, beta, lam, prompter))).verdict == "holds"


def test_certificates_are_read_and_written():
    *case, _ = next(cases("independent"))
    found = certify(*case, "theorem1")
    lower, upper = (Fraction(v) for v in (found.slack_lower, found.slack_upper))
    assert upper - lower <= 2 * Fraction(EPS) * upper
    middle = Fraction(found.slack.split()[0].strip("["))
    assert lower <= middle <= upper
    assert json.loads(json.dumps(asdict(found)))["verdict"] == "holds"
    assert str(found).startswith("theorem1: holds at 128 bits; slack [")
    many = certify_many([Case(*case, "theorem1"), Case(*case, "tight")], quiet=True)
    assert many == [found, certify(*case, "tight")]


def test_balls_enclose():
    with ctx.workprec(64):
        two = Ball(2)
        root = two.sqrt()
        assert not root.exact
        assert Ball(Fraction(9, 4)).sqrt().value == Ball(1.5).value
        assert Fraction(root.lower) ** 2 < 2 < Fraction(root.upper) ** 2
        assert np.nextafter(root.lower, 2) == root.upper
        with pytest.raises(Undecided):
            bool(root * root == 2)
        for verdict in (root < 1.5, root > 1.4, root != 1, root >= 0.0, not root < 1):
            assert verdict is True
        assert (0.5 * two).exact
        assert float(np.float64(0.5) * two) == float(two**-1 * 2) == 1.0
        assert (1 - two).value == (-two + 1).value == -1
        for one, other in ((root, two), (two, root)):
            assert float(one.min(other)) == float(root)
            assert float(one.max(other)) == float(two)
        both = (root * root).max(two)  # overlapping: an enclosure of 2
        assert both.lower <= 2 <= both.upper
        assert (two / 0).lower == -math.inf
        assert (two / 0).upper == math.inf
        small = Ball(-(10**6)).exp()
        assert small > 0
        assert (small.lower, small.upper) == (0.0, 5e-324)
        large = Ball(10**6).exp()
        assert (large.lower, large.upper) == (np.finfo(float).max, math.inf)
        assert repr(tanh(Ball(0))) == "0"
        with pytest.raises(TypeError):
            Ball("two")


def test_a_form_must_lie_in_its_ball():
    """Two evaluations of one number, term by term and in balls, that disagree are an error, not a proof."""
    token = module_balls.carry_forms.set(True)
    try:
        root = Ball(2).sqrt()
        assert (root - root).exact
        assert ((root + 1) / root - 1 / root).value == 1
        with pytest.raises(RuntimeError):
            Ball(arb(2).sqrt(), {(): Ball(1).value})
    finally:
        module_balls.carry_forms.reset(token)


def test_the_most_doubtful_are_kept_whatever_the_chunks():
    rng = np.random.default_rng(0)
    slack, error = rng.uniform(0, 1, 1000), rng.uniform(0.5, 1, 1000)
    slack[[3, 500]] = [np.inf, np.nan]  # inapplicable; floating point tells nothing
    error[7], slack[7] = 1e-300, 1.0
    order = [int(i) for i in np.argsort(slack / error) if i not in (3, 7, 500)]

    def kept(slack, error, chunk, equality=False):
        doubtful = Doubtful(8)
        for start in range(0, slack.size, chunk):
            part = slice(start, start + chunk)
            doubtful.add(slack[part], error[part], lambda i, start=start: start + i, equality)
        return doubtful, [case for _, case in doubtful.kept]

    for chunk in (7, 1000):
        assert set(kept(slack, error, chunk)[1]) == {500, *order[:7]}
    assert kept(np.zeros(3), np.array([0.0, 1.0, 0.0]), 3)[1] == [1]  # exact zeros are settled
    slack[500:] -= 4.0  # many that floating point calls violated: the worst, up to a cap
    claimed = [int(i) for i in np.argsort(slack / error, kind="stable") if slack[i] < -error[i]]
    for chunk in (7, 1000):
        doubtful, cases = kept(slack, error, chunk)
        assert cases == claimed[:EXAMINED]
        assert doubtful.claimed == EXAMINED
    doubtful, cases = kept(slack[:600], error[:600], 50, equality=True)
    assert doubtful.claimed == len(cases) == EXAMINED
    few = kept(slack[490:503], error[490:503], 2)
    assert few[0].claimed == 2
    assert len(few[1]) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta 0.0: must be a positive finite number"),
        ({"lam": "-1/3"}, "lam -0.333"),
        ({"lam": "a third"}, "lam 'a third': is no number; give one such as 0.5 or 1/3"),
        ({"lam": "1/0"}, "lam '1/0': is no number"),
        ({"beta": Fraction(10**400)}, "beta 1e+300: is outside 1e-18 to 1e18"),
        ({"statement": "theorem2"}, "statement 'theorem2' is unknown; give one of theorem1"),
        ({"precision": 1}, "precision 1: must lie between 2 and max_precision 4096 bits"),
        ({"max_precision": 64}, "precision 128: must lie between 2 and max_precision 64 bits"),
        ({"prompter": np.ones((1, 2))}, "prompter[0] sums to 2"),
    ],
)
def test_bad_input(change, message):
    instance = draw("independent", 0, (1, 2, 2))[0]
    with pytest.raises(AlignProError) as caught:
        certify(**({"instance": instance, "beta": 1.0, "lam": 1.0, "statement": "trained"} | change))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_root_of_what_is_not_negative_is_known_to_be_small():
    """A KL whose ball reaches below 0 has a root, in [0, √upper]; a negative number has none."""

    def roots(ball):
        for middle, radius in ((0, 1e-30), (1e-31, 1e-30), (-1e-31, 1e-30)):
            found = ball(module_balls.arb(middle, radius)).sqrt()
            assert -1e-20 <= found.lower <= 0 <= np.sqrt(max(middle + radius, 0)) <= found.upper <= 1.1e-15
        assert ball(module_balls.arb(-1, 1e-3)).sqrt().upper == np.inf
        assert ball(4).sqrt() == 2

    roots(Ball)
    kills(roots, mutated(module_balls, "self.value.contains(0) and", "False and").Ball)


def test_a_batch_is_refused():
    batch = FAMILIES["independent"](np.random.default_rng(0), 3, (1, 2, 2))
    with pytest.raises(AlignProError, match="certify one instance, without batch axes"):
        certify(batch, 1.0, 1.0, "theorem1")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flint", None)
    spec = importlib.util.spec_from_file_location("without_flint", module_balls.__file__)
    with pytest.raises(AlignProError, match=r"pip install 'alignpro\[certify\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_statements_are_all_there():
    assert set(TRUE) | set(WRONG_BOUNDS) == set(STATEMENTS)
    assert STATEMENTS["trained"].function is trained
