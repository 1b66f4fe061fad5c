"""The batch in the vector lanes: the same numbers as `vmap`, whatever the function."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from theory_oracle import kills

from alignpro.theory import lanes, scale
from alignpro.theory.bounds import BOUNDS, IDENTITIES, LEMMAS, LOWER_BOUNDS, theorem1
from alignpro.theory.families import FAMILIES, random_prompters
from alignpro.theory.instance import KEYS, unchecked
from alignpro.theory.lanes import compiler_options, in_lanes
from alignpro.theory.scale import solve_batch
from alignpro.theory.solution import solution


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


def by_lanes(function, arguments, run=None):
    run = run or jax.jit(in_lanes(function, *shapes(arguments)), compiler_options=compiler_options())
    moved = run(*(None if a is None else np.moveaxis(a, 0, -1) for a in arguments))
    return jax.tree.map(lambda a: np.moveaxis(np.asarray(a), -1, 0), moved)


def agree(function, arguments, ulps=2.0**12):
    """Up to rounding relative to each array's instance: the order of sums may differ."""
    got, want = by_lanes(function, arguments), jax.jit(jax.vmap(function))(*arguments)
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


@pytest.mark.parametrize("shape", [(4, 4, 8), (1, 1, 1)])
def test_probabilities_and_divergences_are_those_of_vmap(shape):
    def some(*arguments):
        s, _ = everything({}, *arguments)
        fields = ("rho_star", "pi_star", "tv_model", "tv_shift", "tv_barycentre", "prompter_kl", "model_kl")
        return {
            name: getattr(s, name) for name in (*fields, "prompter_gain", "is_star", "supported", "covered")
        }

    for prompter in (True, False):
        agree(some, draws("sparse", shape, prompter=prompter))


@pytest.fixture(scope="module")
def both():
    """Every statement, compiled once in either way."""
    function = partial(everything, {**BOUNDS, **LOWER_BOUNDS, **IDENTITIES, **LEMMAS})
    lanewise = in_lanes(function, *shapes(draws("independent", (2, 4, 3))))
    return jax.jit(lanewise, compiler_options=compiler_options()), jax.jit(jax.vmap(function))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_statement_is_that_of_vmap_within_its_own_error(family, both):
    """The rounding bound that each side reports covers how they differ; a swapped argument it does not."""
    arguments = draws(family, (2, 4, 3))
    want = both[1](*arguments)[1]

    def check(arguments):
        got = by_lanes(None, arguments, both[0])[1]
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
    arguments = [rng.normal(size=(7, 3, 4)), rng.normal(size=(7, 5, 4)), rng.integers(3, size=(7, 2))]

    def check(product, rows):
        monkeypatch.setattr(lanes, "_product", product)
        monkeypatch.setattr(lanes, "_rows", rows)
        agree(lambda a, b, i: a @ b.T, arguments)
        agree(lambda a, b, i: a[i], arguments)
        agree(lambda a, b, i: a[:, 1:3].T + 1.0, arguments)
        agree(lambda a, b, i: (jnp.max(a, 0), jnp.min(b), jnp.any(a > 1, -1), jnp.all(b > -1)), arguments)
        agree(lambda a, b, i: jnp.where(jnp.arange(4)[None] == 2, a, 0.0).reshape(-1), arguments)
        agree(lambda a, b, i: (jnp.float64(3.0), i[0], jnp.arange(3)), arguments)  # the same in every lane
        agree(lambda a, b, i: jnp.broadcast_to(jnp.sum(b, 0), (2, 4)), arguments)

    product, rows = lanes._product, lanes._rows
    check(product, rows)
    kills(partial(check, rows=rows), lambda eqn, left, right: product(eqn, left[::-1], right))
    kills(partial(check, product), lambda eqn, operand, indices: rows(eqn, operand, 2 - indices))


def test_what_lanes_cannot_express_is_computed_all_the_same():
    """A statement with a sort takes the way of vmap."""
    rng = np.random.default_rng(2)
    batch = FAMILIES["independent"](rng, 30, (2, 3, 4))

    def median_gap(s):
        return jnp.sort(s.gap)[0]

    with pytest.raises(NotImplementedError, match="sort has no rule for batches in lanes"):
        in_lanes(jnp.sort, jax.ShapeDtypeStruct((3,), float))
    with pytest.raises(NotImplementedError, match="reduce_sum has no rule"):
        in_lanes(jnp.sum, jax.ShapeDtypeStruct((lanes.LONGEST + 1,), float))
    got = solve_batch(batch, 0.3, 0.2, median_gap)
    want = solve_batch(batch, 0.3, 0.2, lambda s: jnp.minimum(s.gap[0], s.gap[1]))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_both_ways_of_solve_batch_agree(monkeypatch):
    batch = FAMILIES["lm_like"](np.random.default_rng(3), 130, (3, 4, 5))
    fast = solve_batch(batch, 0.3, 0.2, theorem1)
    monkeypatch.setattr(scale, "_LANES_LARGEST", 0)
    scale._batched.cache_clear()
    slow = solve_batch(batch, 0.3, 0.2, theorem1)
    scale._batched.cache_clear()
    assert (np.abs(fast.rhs - slow.rhs) <= fast.error + slow.error).all()
    assert (np.abs(fast.lhs - slow.lhs) <= fast.error + slow.error).all()


def test_what_is_used_twice_is_computed_once():
    """Without the barriers, or where the compiler drops them, every user has its own copy of a long sum."""
    arguments = draws("independent", (4, 4, 8), prompter=False)
    example = shapes(arguments)

    def products(options):
        function = in_lanes(lambda *a: everything({}, *a)[0].tv_model, *example)
        moved = [None if a is None else np.moveaxis(a, 0, -1) for a in arguments]
        text = jax.jit(function, compiler_options=options).lower(*moved).compile().as_text()
        return len(re.findall(r" multiply\(", text))

    def check(options):
        assert products(options) < 60

    check(compiler_options())
    kills(check, None)
