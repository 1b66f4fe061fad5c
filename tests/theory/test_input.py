"""What is given to the theory in Python: numbers of every kind are read, and what is none is named."""

import inspect
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mutants import kills, mutated

from alignpro import errors, theory
from alignpro.errors import AlignProError
from alignpro.theory import results, solution, tilt
from alignpro.theory.families import draw
from alignpro.theory.instance import Instance, Names
from alignpro.theory.proof import certify as proof
from alignpro.theory.results import chains, information_projection
from alignpro.theory.results.chains import Chain
from alignpro.theory.results.preferences import expected_preferences
from alignpro.theory.results.robustness import worst_loss
from alignpro.theory.solution import _solution

# As users have them: without the check of types that tests add.
check, certify = inspect.unwrap(theory.check), inspect.unwrap(proof.certify)
best_of_n, frontier, lam_for_kl, universal = (
    inspect.unwrap(getattr(results, name)) for name in ("best_of_n", "frontier", "lam_for_kl", "universal")
)
solve_chain = inspect.unwrap(chains.solve_chain)

INSTANCE = draw("independent", 3, (2, 3, 4))[0]
RAGGED = [[1.0], [0.5, 0.5]]
HALVES = (0.5, Fraction(1, 2), np.float32(0.5), np.array(0.5), jnp.asarray(0.5), jnp.float32(0.5))


def test_beta_is_any_kind_of_number():
    def every_kind(module):
        for half in HALVES:
            try:
                assert module.check_temperature("beta", half) == 0.5
                assert module.check_number("r_max", half, 0) == 0.5
            except module.AlignProError as error:
                raise AssertionError(half) from error
        for whole in (2, np.int64(2), jnp.asarray(2)):
            assert module.check_temperature("beta", whole) == 2.0

    every_kind(errors)
    kills(every_kind, mutated(errors, 'getattr(value, "shape", None) == ()', "value is None"))
    bounds = {check(INSTANCE, half, half, "tight", r_max=half).rhs for half in HALVES}
    assert len(bounds) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", r"beta '0\.5': is no number but of type str; give a number"),
        (None, r"beta None: is no number"),
        (True, r"beta True: is no number"),
        (1 + 2j, r"beta .*: is no number"),
        (np.array(True), r"beta True: is no number"),
        (np.array([0.5]), r"beta: is an array of shape \(1,\); give one number"),
        (jnp.ones((2, 1)), r"beta: is an array of shape \(2, 1\); give one number"),
        (Fraction(10) ** 400, r"beta .*: must be a positive finite number"),
        (-(Fraction(10) ** 400), r"beta .*: must be a positive finite number"),
        (0, r"beta 0: must be a positive finite number"),
        (jnp.asarray(jnp.nan), r"beta nan: must be a positive finite number"),
    ],
)
def test_what_is_no_temperature_is_named(value, message):
    with pytest.raises(AlignProError, match=f"^{message}"):
        errors.check_temperature("beta", value)


WRONG = {
    "solution, beta 0": (lambda: solution(INSTANCE, 0.0, 1.0), r"beta 0\.0: must be a positive"),
    "solution, lam -1": (lambda: solution(INSTANCE, 1.0, -1.0), r"lam -1\.0: must be a positive"),
    "solution, lam of JAX": (lambda: solution(INSTANCE, 1.0, jnp.asarray(-1.0)), r"lam -1\.0: must be"),
    "solution, prompter": (lambda: solution(INSTANCE, 1.0, 1.0, np.ones((2, 3))), r"prompter\[0\] sums to 3"),
    "tilt": (lambda: tilt(np.ones(2) / 2, np.ones(2), 0.0), r"temperature 0\.0: must be a positive"),
    "tilt, rows": (
        lambda: tilt(np.ones((2, 2)) / 2, np.ones((2, 2)), np.array([1.0, -1.0])),
        r"temperature -1\.0: must be a positive",
    ),
    "worst_loss": (lambda: worst_loss(1.0, -1.0), r"temperature -1\.0: must be a positive"),
    "projection": (lambda: information_projection(INSTANCE, jnp.asarray(0.0)), r"beta 0\.0: must be"),
    "bound": (lambda: check(INSTANCE, 1.0, 1.0, ["tight"]), r"bound \['tight'\] is unknown"),
    "r_max text": (lambda: check(INSTANCE, 1.0, 1.0, r_max="1"), r"r_max '1': is no number"),
    "r_max": (lambda: check(INSTANCE, 1.0, 1.0, r_max=-1.0), r"r_max -1\.0: must be a finite number of at"),
    "prompter": (lambda: check(INSTANCE, 1.0, 1.0, "trained", prompter=RAGGED), r"prompter: rows of unequal"),
    "statement": (lambda: certify(INSTANCE, 1.0, 1.0, ["tight"]), r"statement \['tight'\] is unknown"),
    "stage": (lambda: Chain([1.0], [RAGGED], [[1.0]], [0], [[0.0]]), r"stages\[0\]: rows of unequal"),
    "reward": (lambda: universal(RAGGED, 1.0), r"reward: rows of unequal"),
    "labels": (lambda: universal(np.ones((2, 2)), 1.0, labels=RAGGED), r"labels: rows of unequal"),
    "pairs": (lambda: expected_preferences(INSTANCE, pairs=RAGGED), r"pairs: rows of unequal"),
    "lams": (lambda: frontier(INSTANCE, RAGGED), r"lams: rows of unequal"),
    "kl": (lambda: lam_for_kl(INSTANCE, "x"), r"kl 'x': is no number"),
    **{
        f"n {n}": (lambda n=n: best_of_n(np.ones(2) / 2, np.arange(2.0), n), r"n .*(an integer|is no number)")
        for n in (float("inf"), float("nan"), 1.5, 0, "2", None, True)
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_in_one_line(case):
    call, message = WRONG[case]
    with pytest.raises(AlignProError, match=f"^{message}") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_is_traced_passes():
    values = jnp.asarray([0.3, 0.7])
    found = jax.vmap(lambda beta: solution(INSTANCE, beta, 0.2).delta1)(values)
    one = solution(INSTANCE, 0.7, 0.2).delta1
    np.testing.assert_allclose(found[1], one, rtol=1e-13)
    assert np.isfinite(jax.grad(lambda t: tilt(np.ones(2) / 2, np.arange(2.0), t).lift)(0.5))


def test_names_are_text():
    arrays = {key: np.asarray(getattr(INSTANCE, key)) for key in ("p", "prior", "frozen", "own", "reward")}
    for names, message in (
        (["a"], "names: is of type list; give Names"),
        ("ab", "names: is of type str"),
        (Names(prompts=(1, 2)), "names: prompts are not all text"),
        (Names(prompts="ab"), "names: prompts are not all text"),
        (Names(prompts=("a", None)), "names: prompts are not all text"),
        (Names(prompts=("a",)), "names: 1 prompts named but there are 2"),
    ):
        with pytest.raises(AlignProError, match=f"^{message}"):
            Instance(**arrays, names=names)
    listed = Instance(**arrays, names=Names(prompts=["a", "b"]))  # as tuples, which JAX can hash
    assert listed.names == Names(prompts=("a", "b"))
    assert jax.jit(lambda i: i.p.sum())(listed) == pytest.approx(1.0)


def test_a_new_shape_costs_no_compilation():
    """Padded to one of two shapes, with the numbers and the bounds on rounding of its own sizes."""
    compiled = jax.jit(solution)

    def same(solve):
        for shape in ((2, 3, 4), (1, 1, 1), (3, 2, 8)):
            instance = draw("sparse", 5, shape)[0]
            prompter = np.asarray(instance.prior)[:, ::-1]
            for rho in (None, prompter / prompter.sum(-1, keepdims=True)):
                got, want = solve(instance, 0.3, 0.2, rho), compiled(instance, 0.3, 0.2, rho)
                for name, a, b in zip(got._fields, got, want, strict=True):
                    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
                    size = 1e-9 if name.endswith("_error") else 1e-13
                    np.testing.assert_allclose(a, b, rtol=size, atol=1e-14, err_msg=name)

    same(solution)
    before = _solution._cache_size()
    for shape in ((2, 5, 4), (6, 7, 2)):
        solution(draw("sparse", 6, shape)[0], 0.3, 0.2)
    assert _solution._cache_size() == before
    kills(same, lambda i, beta, lam, rho: solution(i, beta * (1 + 1e-6), lam, rho))


def test_solve_chain_takes_numbers_of_any_kind():
    chain = Chain([1.0], [[[0.5, 0.5]], np.eye(2)], np.eye(2), [0], [[0.0, 1.0]])
    plain = solve_chain(chain, 1.0, (0.5, 0.25))
    for lams in (jnp.asarray([0.5, 0.25]), (Fraction(1, 2), Fraction(1, 4)), [np.float32(0.5), 0.25]):
        assert float(solve_chain(chain, Fraction(1), lams).value[0]) == float(plain.value[0])
