"""The batch in the vector lanes: the same numbers as `vmap`, whatever the function."""

import importlib.util
import math
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from theory_oracle import kills

from alignpro.theory import compiled
from alignpro.theory.bounds import BOUNDS, IDENTITIES, LEMMAS, LOWER_BOUNDS, theorem1
from alignpro.theory.families import FAMILIES, random_prompters
from alignpro.theory.instance import KEYS, unchecked
from alignpro.theory.scale import lanes, solve_batch, vectors
from alignpro.theory.scale.lanes import in_lanes
from alignpro.theory.solution import solution


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    """Code on file would hide what these tests do to its writers."""
    monkeypatch.setattr(compiled, "folder", lambda: None)


def everything(statements, *arguments):
    """A Solution and statements of it."""
    *arrays, beta, lam, prompter = arguments
    s = solution(unchecked(*arrays), beta, lam, prompter)
    return s, {name: statement(s)[:4] for name, statement in statements.items()}


def draws(family, shape, count=40, dtype=np.float64, prompter=True):
    rng = np.random.default_rng(0)
    batch = FAMILIES[family](rng, count, shape)
    beta, lam = 10.0 ** rng.uniform(-6, 6, (2, count))
    arrays = [np.asarray(getattr(batch, key)) for key in KEYS]
    rho = random_prompters(rng, batch.prior) if prompter else None
    return [
        None if a is None else a.astype(dtype if a.dtype.kind == "f" else int)
        for a in (*arrays, beta, lam, rho)
    ]


def shapes(arguments):
    return [None if a is None else jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in arguments]


def agree(function, arguments, ulps=2.0**12):
    """Up to rounding relative to each array's instance: the order of sums may differ."""
    got, want = in_lanes(function, *shapes(arguments))(*arguments), jax.jit(jax.vmap(function))(*arguments)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        b = np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if b.dtype.kind != "f":
            np.testing.assert_array_equal(a, b)
            continue
        size = np.abs(np.where(np.isfinite(b), b, 0.0)).reshape(len(b), -1).max(-1)
        np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
        both = np.isfinite(b)
        off = (
            np.where(both, np.abs(np.where(both, a, 0) - np.where(both, b, 0)), 0).reshape(len(b), -1).max(-1)
        )
        assert (off <= ulps * np.finfo(b.dtype).eps * size).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("shape", [(4, 4, 8), (1, 1, 1)])
def test_probabilities_and_divergences_are_those_of_vmap(shape, dtype):
    def some(*arguments):
        s, _ = everything({}, *arguments)
        fields = ("rho_star", "pi_star", "tv_model", "tv_shift", "tv_barycentre", "prompter_kl", "model_kl")
        return {
            name: getattr(s, name) for name in (*fields, "prompter_gain", "is_star", "supported", "covered")
        }

    for prompter in (True, False):
        agree(some, draws("sparse", shape, dtype=dtype, prompter=prompter))


@pytest.fixture(scope="module", params=[np.float64, np.float32], ids=["float64, quick", "float32"])
def both(request):
    """Every statement, compiled once in either way."""
    function = partial(everything, {**BOUNDS, **LOWER_BOUNDS, **IDENTITIES, **LEMMAS})
    example = shapes(draws("independent", (2, 4, 3), dtype=request.param))
    quick = request.param == np.float64
    return in_lanes(function, *example, quick=quick), jax.jit(jax.vmap(function)), request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_every_statement_is_that_of_vmap_within_its_own_error(family, both):
    """The rounding bound that each side reports covers how they differ; a swapped argument it does not."""
    lanewise, usual, dtype = both
    arguments = draws(family, (2, 4, 3), dtype=dtype)
    want = usual(*arguments)[1]

    def check(arguments):
        got = lanewise(*arguments)[1]
        for name, b in want.items():
            lhs, rhs, error, _ = got[name]
            with np.errstate(invalid="ignore"):  # ∞ − ∞ where a KL is infinite on either side
                slack, other = rhs - lhs, np.asarray(b[1]) - np.asarray(b[0])
                same = np.abs(slack - other) <= 2.0 * (np.asarray(b[2]) + error)
            assert (same | (slack == other) | (np.isnan(slack) & np.isnan(other))).all(), name

    check(arguments)
    if family == "independent":
        p, prior, frozen, own, reward, beta, lam, rho = arguments
        kills(check, [p, prior, frozen, own, reward, lam, beta, rho])
        kills(check, [p, prior, frozen, (own + 1) % 4, reward, beta, lam, rho])


def test_operations_one_by_one(monkeypatch):
    rng = np.random.default_rng(1)
    arguments = [rng.normal(size=(21, 3, 4)), rng.normal(size=(21, 5, 4)), rng.integers(3, size=(21, 2))]

    def check(product=lanes._product, rows=lanes._rows, transposed=lanes._transposed):
        monkeypatch.setattr(lanes, "_product", product)
        monkeypatch.setattr(lanes, "_rows", rows)
        monkeypatch.setattr(lanes, "_transposed", transposed)
        agree(lambda a, b, i: a @ b.T, arguments)
        agree(lambda a, b, i: a[i], arguments)
        agree(lambda a, b, i: a[:, 1:3].T + 1.0, arguments)
        agree(lambda a, b, i: (jnp.max(a, 0), jnp.min(b), jnp.any(a > 1, -1), jnp.all(b > -1)), arguments)
        agree(lambda a, b, i: (jnp.prod(a, 0), a**3, jnp.square(b), 1.0 / jnp.sqrt(jnp.abs(a))), arguments)
        agree(lambda a, b, i: jnp.where(jnp.arange(4)[None] == 2, a, 0.0).reshape(-1), arguments)
        agree(lambda a, b, i: (jnp.float64(3.0), i[0], jnp.arange(3)), arguments)  # the same in every lane
        agree(lambda a, b, i: jnp.broadcast_to(jnp.sum(b, 0), (2, 4)), arguments)
        agree(lambda a, b, i: (-i, abs(i - 1), jnp.maximum(i, 1), i * 2.0, i + 1 > 1, i - 7), arguments)
        agree(lambda a, b, i: (~(a > 0), (a > 0) ^ (a > 1), (a > 0).astype(np.int64), a != 1.0), arguments)
        agree(lambda a, b, i: (a.astype(np.float32), i.astype(np.int32), (i - 1).astype(bool)), arguments)

    check()
    product, rows, turned = lanes._product, lanes._rows, lanes._transposed
    kills(lambda f: check(product=f), lambda v, eqn, left, right: product(v, eqn, left[::-1], right))
    kills(lambda f: check(rows=f), lambda v, eqn, operand, indices: rows(v, eqn, operand[::-1], indices))
    kills(lambda f: check(transposed=f), lambda v, lines: turned(v, lines)[::-1])


def test_what_is_the_same_is_worked_out_once(monkeypatch):
    """And what differs in a constant, an argument or a parameter alone is not taken for the same."""
    rng = np.random.default_rng(6)
    monkeypatch.setattr(lanes, "LONGEST", 90)  # 12 for each of six results, and for one exponential

    def check(identity=lanes._identity):
        monkeypatch.setattr(lanes, "_identity", identity)
        agree(
            lambda a, b: (jnp.exp(a) + 1.0, jnp.exp(a) + 2.0, a + b, b + a, jnp.exp(a) * a, jnp.exp(a) * b),
            [rng.normal(size=(9, 3, 4)), rng.normal(size=(9, 3, 4))],
        )
        agree(lambda a: (a[:, :2], a[:, 2:]), [rng.normal(size=(9, 3, 4))])

    check()
    kills(check, lambda value: 0)
    with pytest.raises(NotImplementedError, match="operations would take too long"):
        check(lambda value: object())


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63])
def test_an_instance_does_not_know_its_neighbours(count, monkeypatch):
    """Bit for bit: whichever its lane, its thread and the others in its vector."""
    rng = np.random.default_rng(4)
    batch = rng.normal(size=(63, 3, 4)), rng.normal(size=63)

    def check(function, chunk=lanes._CHUNK):
        monkeypatch.setattr(lanes, "_CHUNK", chunk)
        run = in_lanes(function, *shapes(batch))
        whole, part = run(*batch), run(*(a[-count:] for a in batch))
        np.testing.assert_array_equal(whole[-count:], part)
        np.testing.assert_array_equal(
            run(batch[0], np.broadcast_to(0.5, 63)), run(batch[0], np.full(63, 0.5))
        )
        strided = np.stack([batch[0], batch[0] + 1], -1)[..., 0]
        np.testing.assert_array_equal(run(strided, batch[1]), whole)

    run = in_lanes(lambda a, b: jnp.exp(a) * b, *shapes(batch))
    with pytest.raises(ValueError, match=r"an argument has shape \(62,\) where \(63,\) was meant"):
        run(batch[0], batch[1][1:])
    check(lambda a, b: jnp.exp(a) * b)
    check(lambda a, b: jnp.exp(a) * b, 16)


def test_nan_and_infinity_pass_through():
    x = np.array([math.nan, math.inf, -math.inf, 0.0, 1.0, -1.0, 1e-307, 1e308, -1e308, 710.0, -750.0])
    pairs = [np.array(a) for a in zip(*[(a, b) for a in x for b in x], strict=True)]
    for name in ("exp", "log", "expm1", "log1p", "tanh", "arctanh", "sqrt", "abs", "negative"):
        with np.errstate(all="ignore"):
            want = getattr(np, name)(x)
        got = in_lanes(getattr(jnp, name), jax.ShapeDtypeStruct((), x.dtype))(x)
        np.testing.assert_array_max_ulp(got, want, 8)
    for name in ("maximum", "minimum", "less", "greater_equal", "equal", "not_equal", "add", "divide"):
        with np.errstate(all="ignore"):
            want = getattr(np, name)(*pairs)
        got = in_lanes(getattr(jnp, name), *[jax.ShapeDtypeStruct((), x.dtype)] * 2)(*pairs)
        np.testing.assert_array_equal(got, want)
    # Below the smallest normal number: 0 when given, a number when it comes up.
    below = in_lanes(lambda a: (a, jnp.log(a * 2.0**-1022)), jax.ShapeDtypeStruct((), x.dtype))
    given, log = below(np.array([2.0**-1023, -(2.0**-1023), 2.0**-1022, 0.25, 2.0**-52]))
    np.testing.assert_array_equal(given, [0.0, 0.0, 2.0**-1022, 0.25, 2.0**-52])
    np.testing.assert_array_max_ulp(log[3:], np.array([-1024, -1074]) * math.log(2.0), 2)
    extremes = in_lanes(lambda a: (jnp.max(a), jnp.min(a)), jax.ShapeDtypeStruct((3,), x.dtype))
    rows = np.array([[1.0, math.nan, 0.0], [math.nan, 1.0, 2.0], [0.0, 1.0, math.nan], [2.0, math.inf, 1.0]])
    np.testing.assert_array_equal(extremes(rows), np.array([rows.max(-1), rows.min(-1)]))


FUNCTIONS = {"exp": mpmath.exp, "expm1": mpmath.expm1, "log": mpmath.log, "log1p": mpmath.log1p}
FUNCTIONS |= {"tanh": mpmath.tanh, "arctanh": mpmath.atanh, "sqrt": mpmath.sqrt}


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_to_the_last_digits(name, dtype, monkeypatch):
    """Within the units of rounding that the docstring of `vectors` states; a term fewer is seen."""
    rng, info, n = np.random.default_rng(5), np.finfo(dtype), 400
    top, sign = float(info.maxexp) * math.log(2.0), rng.choice([-1.0, 1.0], n)
    near = sign * 10.0 ** rng.uniform(-20, -0.1, n)
    normal = 2.0 ** rng.uniform(info.minexp, info.maxexp, n)
    points = {
        "exp": [rng.uniform(-top * 1.06, top * 0.999, n), near],
        "expm1": [rng.uniform(-40, top * 0.999, n), near, rng.uniform(-0.7, 0.7, n)],
        "log": [normal, 1 + near, rng.uniform(0.5, 2.0, n)],
        "log1p": [-1 + 10.0 ** rng.uniform(-6, 0, n), normal, near],
        "tanh": [rng.uniform(-20, 20, n), near],
        "arctanh": [rng.uniform(-1, 1, n) * (1 - 1e-7), near],
        "sqrt": [normal],
    }
    x = np.concatenate(points[name]).astype(dtype)
    x = x[x > 0] if name in ("log", "sqrt") else x[np.abs(x) < 1] if name == "arctanh" else x
    with mpmath.workprec(120):
        exact = [FUNCTIONS[name](mpmath.mpf(float(v))) for v in x]
        least = mpmath.mpf(float(info.smallest_subnormal))

        def check(form):
            monkeypatch.setattr(vectors, "_DOUBLE" if dtype == np.float64 else "_SINGLE", form)
            got = in_lanes(getattr(jnp, name), jax.ShapeDtypeStruct((), dtype))(x)
            worst = max(
                abs(mpmath.mpf(float(value)) - truth) / max(abs(truth) * float(info.eps), least)
                for value, truth in zip(got, exact, strict=True)
            )
            assert worst <= (2.5 if name == "arctanh" else 2.0)

        form = vectors._DOUBLE if dtype == np.float64 else vectors._SINGLE
        check(form)
        terms = {"exp": "exp_terms", "tanh": "exp_terms", "expm1": "expm1_terms"}.get(name, "log_terms")
        if name != "sqrt":
            kills(check, form._replace(**{terms: getattr(form, terms) - 3}))


def test_what_lanes_cannot_express_is_computed_all_the_same():
    """A statement with a sort takes the way of vmap."""
    rng = np.random.default_rng(2)
    batch = FAMILIES["independent"](rng, 30, (2, 3, 4))

    def median_gap(s):
        return jnp.sort(s.gap)[0]

    number, whole = jax.ShapeDtypeStruct((3,), float), jax.ShapeDtypeStruct((3,), int)
    for function, of, message in (
        (jnp.sort, number, "sort has no rule for batches in lanes"),
        (lambda x: jnp.outer(x, jnp.arange(2**14.0)), number, "operations would take too long to compile"),
        (lambda x: x // 2, whole, "div of integers has no rule"),
        (lambda x: x.astype(int), number, "float to integer has no rule"),
        (lambda x: 1 << x, whole, "shifts by a variable have no rule"),
        (lambda x: x**-2, number, "integer_pow to -2 has no rule"),
        (lambda x: x, jax.ShapeDtypeStruct((3,), np.float16), "float16 have no vectors"),
        (lambda x: x, jax.ShapeDtypeStruct((3,), bool), "arguments of bits have no rule"),
    ):
        with pytest.raises(NotImplementedError, match=message):
            in_lanes(function, of)
    got = solve_batch(batch, 0.3, 0.2, median_gap)
    want = solve_batch(batch, 0.3, 0.2, lambda s: jnp.minimum(s.gap[0], s.gap[1]))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_solve_batch_without_llvmlite(monkeypatch):
    """The way of vmap is taken where llvmlite is not installed, and agrees."""
    batch = FAMILIES["lm_like"](np.random.default_rng(3), 130, (3, 4, 5))
    fast = solve_batch(batch, 0.3, 0.2, theorem1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    slow = solve_batch(batch, 0.3, 0.2, theorem1)
    assert (np.abs(fast.rhs - slow.rhs) <= fast.error + slow.error).all()
    assert (np.abs(fast.lhs - slow.lhs) <= fast.error + slow.error).all()
    assert (fast.rhs != slow.rhs).any()  # the last digits tell that there are two ways
