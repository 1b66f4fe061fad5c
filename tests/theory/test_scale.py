import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from theory_oracle import EPS, close, kills, oracle

from alignpro.errors import AlignProError
from alignpro.theory.bounds import BOUNDS, IDENTITIES, LEMMAS
from alignpro.theory.families import FAMILIES, random_prompters, take
from alignpro.theory.instance import KEYS, Instance, unchecked
from alignpro.theory.pairwise import expected_tv, pairwise_tv
from alignpro.theory.scale import distances, routes
from alignpro.theory.scale.routes import ROUTES, prompt_shift, route, solve_batch, solve_large
from alignpro.theory.solution import solution

# Below and above one broadcast; not, and only just, multiples of the blocks; with a single row or column.
SHAPES = [(3, 5, 7), (257, 129, 33), (1, 300, 200), (40, 50, 400)]


def rows(rng, n, m, dtype=np.float64):
    return rng.dirichlet(np.full(m, 0.5), n).astype(dtype)


def case(seed, shape, dtype=np.float64, *, keep=1.0, kinds=None, owners=None):
    """A random instance; ρ_sft keeps a share of its entries, or has few different rows."""
    rng = np.random.default_rng(seed)
    x, k, y = shape
    prior = rows(rng, x, k) * (rng.uniform(size=(x, k)) < keep)
    prior[:, 0] += 1e-9
    prior /= prior.sum(-1, keepdims=True)
    if kinds:
        prior = prior[rng.integers(min(kinds, x), size=x)]
    own = rng.integers(owners or k, size=x)
    arrays = (rows(rng, 1, x)[0], prior, rows(rng, k, y), rng.uniform(size=(x, y)))
    p, prior, frozen, reward = (a.astype(dtype) for a in arrays)
    return unchecked(p, prior, frozen, own, reward)


def plain_pairs(p, q):
    return np.array([[0.5 * sum(abs(a - b) for a, b in zip(u, v, strict=True)) for v in q] for u in p])


def plain(instance):
    prior, frozen, own = (np.asarray(getattr(instance, key)) for key in ("prior", "frozen", "own"))
    exact = frozen.astype(float)
    distances = np.stack([0.5 * np.abs(exact - row).sum(-1) for row in exact])
    return (prior.astype(float) * distances[own]).sum(-1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_dense_kernel_is_the_definition(dtype):
    def check(function):
        for seed, shape in enumerate(SHAPES):
            i = case(seed, shape, dtype)
            got, want = function(i.frozen, i.own, i.prior), plain(i)
            assert got.dtype == dtype
            assert close(got, want, want, (shape[1] + shape[2] + 4) * np.finfo(dtype).eps / EPS)

    check(jax.jit(expected_tv))
    kills(check, lambda frozen, own, prior: 2 * expected_tv(frozen, own, prior))
    kills(check, lambda frozen, own, prior: expected_tv(frozen, (own + 1) % len(frozen), prior))
    kills(check, lambda frozen, own, prior: expected_tv(frozen, own, prior[:, ::-1]))
    # The last row or column forgotten, as by a block that is not filled up:
    kills(check, lambda f, own, prior: expected_tv(f[:, :-1], own, prior))


def test_pairs_are_relatively_accurate_and_zero_between_equals():
    """1 − Σ min(p, q) has no correct digit for rows 1e-14 apart; and it is not 0 between equal rows."""
    rng = np.random.default_rng(0)
    near = np.repeat(rows(rng, 1, 400), 120, 0)
    near[1::2, 0] += 1e-14 * np.arange(1, 121, 2)

    def check(function):
        got, want = np.asarray(function(near, near)), plain_pairs(near[:3], near)
        assert close(got[:3], want, want, 402)
        assert (np.diag(got) == 0).all()
        assert (got[::2, ::2] == 0).all()

    check(pairwise_tv)
    kills(check, lambda p, q: 1 - jnp.sum(jnp.minimum(p[:, None], q[None]), -1))


def test_vmap_and_no_x_by_k_by_y_array():
    frozen = np.stack([case(s, (60, 50, 40)).frozen for s in range(3)])
    i = case(9, (60, 50, 40))
    mapped = jax.jit(jax.vmap(expected_tv, in_axes=(0, None, None)))(frozen, i.own, i.prior)
    for one, f in zip(mapped, frozen, strict=True):
        np.testing.assert_allclose(one, expected_tv(f, i.own, i.prior), rtol=100 * EPS)

    shape = (700, 600, 900)
    args = [jax.ShapeDtypeStruct(s, t) for s, t in (((600, 900), float), ((700,), int), ((700, 600), float))]

    def check(function):
        compiled = jax.jit(function).lower(*args).compile().memory_analysis()
        assert compiled.temp_size_in_bytes < 0.02 * 8 * np.prod(shape)

    def loss(frozen, own, prior):
        return jnp.sum(expected_tv(frozen, own, prior))

    check(expected_tv)
    check(jax.grad(loss, (0, 2)))

    def by_autodiff(frozen, own, prior):
        row = lambda q: jnp.sum(jnp.abs(q[None, :] - frozen), -1)  # noqa: E731
        return jnp.sum(prior * jax.lax.map(row, frozen[own]))

    kills(check, jax.grad(by_autodiff))


@pytest.mark.parametrize("shape", [(3, 5, 7), (60, 70, 40), (300, 2, 200)])
def test_gradients(shape):
    i = case(1, shape)
    weights = np.random.default_rng(2).standard_normal(shape[0])

    def check(function):
        def loss(frozen, prior):
            return jnp.sum(weights * function(frozen, i.own, prior))

        got = jax.jit(jax.grad(loss, (0, 1)))(i.frozen, i.prior)
        # d/dfrozen by the formula: ½ Σ g ρ sign, once from the side of x and once from that of x′.
        signs = np.sign(i.frozen[i.own][:, None, :] - i.frozen[None])
        flow = 0.5 * (weights[:, None] * i.prior)[:, :, None] * signs
        want = -flow.sum(0)
        np.add.at(want, i.own, flow.sum(1))
        size = np.abs(weights).sum()
        assert close(got[0], want, size, 2 * sum(shape))
        distances = 0.5 * np.abs(i.frozen[i.own][:, None, :] - i.frozen[None]).sum(-1)
        assert close(got[1], weights[:, None] * distances, size, 2 * sum(shape))

    check(expected_tv)
    kills(check, lambda frozen, own, prior: expected_tv(jax.lax.stop_gradient(frozen), own, prior))
    kills(check, lambda f, own, prior: jnp.sum(prior * pairwise_tv(f[own], jax.lax.stop_gradient(f)), -1))


@pytest.fixture(params=[True, False], ids=["native", "without llvmlite"])
def native(request, monkeypatch):
    """Both ways on one CPU device."""
    if not request.param:
        monkeypatch.setattr(routes, "_native", lambda devices: False)
    return request.param


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_every_route_gives_the_same(dtype, native):
    cases = [
        case(3, (70, 60, 50), dtype),
        case(4, (70, 60, 50), dtype, keep=0.05, owners=7),
        case(5, (70, 60, 50), dtype, kinds=3),
        case(6, (1, 1, 1), dtype),
        case(7, (5, 300, 2), dtype, kinds=1),
        case(8, (9, 33, 300), dtype),
    ]
    for family, draw in FAMILIES.items():
        batch = draw(np.random.default_rng(8), 1, (6, 5, 8))
        cases.append(unchecked(*(getattr(take(batch, 0), key) for key in KEYS)))
        assert family

    def check(function):
        for i in cases:
            want, n = plain(i), 2 * sum(i.shape) + 16
            for by in ROUTES:
                got = function(i, by)
                assert got.dtype == i.prior.dtype
                assert close(got, want, want, n * np.finfo(got.dtype).eps / EPS), by

    check(prompt_shift)
    kills(check, lambda i, by: prompt_shift(i, by) * (1 + 1e-4))
    for by in ROUTES:
        kills(check, lambda i, b, by=by: prompt_shift(i, b) * (1.001 if b == by else 1))


def test_sorting_keeps_relative_accuracy():
    """Prefix sums as Σ w a − Σ w q would leave nothing of a total variation of 1e-14."""
    i = case(11, (40, 40, 30), kinds=1)
    frozen = np.repeat(i.frozen[:1], 40, 0) * (1 + 1e-14 * np.random.default_rng(0).uniform(size=(40, 30)))
    i = unchecked(i.p, i.prior, frozen, np.arange(40), i.reward)

    def check(function):
        assert close(function(i), plain(i), plain(i), 2 * 40 + 30 + 8)

    check(lambda i: prompt_shift(i, "sorted"))

    def cancelling(i):
        total = np.zeros(40)
        for q in i.frozen.T:
            order = np.argsort(q)
            w, wq = np.cumsum(i.prior[0][order]), np.cumsum((i.prior[0] * q)[order])
            total[order] += q[order] * (2 * w - w[-1]) - 2 * wq + wq[-1]
        return 0.5 * total

    kills(check, cancelling)


def test_the_code_reads_no_row_that_is_not_there():
    i = case(0, (3, 4, 5))
    for own in (np.array([0, 4, 1]), np.array([0, -1, 1])):
        with pytest.raises(IndexError, match="own must lie in 0, …, 3"):
            distances.expected_tv(i.frozen, own, i.prior)


def test_the_route_follows_the_structure():
    assert route(case(0, (300, 300, 50))) == "dense"
    assert route(case(0, (300, 300, 50), keep=0.005)) == "pairs"
    assert route(case(0, (3000, 3000, 3), kinds=1)) == "sorted"
    assert route(case(0, (3000, 3000, 3), kinds=1, owners=3)) == "dense"
    with pytest.raises(AlignProError, match=r"route 'fast' is unknown; give one of dense, pairs, sorted"):
        prompt_shift(case(0, (2, 2, 2)), "fast")


def test_solve_large_is_solution():
    i = case(12, (30, 25, 40), keep=0.3)
    rho = random_prompters(np.random.default_rng(1), i.prior)
    instance = Instance(*(getattr(i, key) for key in KEYS))
    got, want = solve_large(instance, 0.3, 0.2, prompter=rho), jax.jit(solution)(i, 0.3, 0.2, rho)
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        a, b = (np.nan_to_num(np.asarray(v, float)) for v in (a, b))
        assert close(a, b, 1 + np.abs(b), 200), name
    for wrong in (0.0, float("nan")):
        with pytest.raises(AlignProError, match=r"^lam .*must be a positive finite number"):
            solve_large(i, 0.3, wrong)
    with pytest.raises(AlignProError, match=r"^prompter: has shape"):
        solve_large(i, 0.3, 0.2, prompter=np.ones((2, 2)))


def test_batches_against_plain_numpy(monkeypatch, native):
    monkeypatch.setattr(routes, "_CHUNK", 64)
    monkeypatch.setattr(routes, "_CACHED", 16 * 8)
    count, rng = 150, np.random.default_rng(13)
    batch = FAMILIES["signed"](rng, count, (2, 4, 3))
    beta, lam = 10.0 ** rng.uniform(-1, 1, (2, count))

    def check(function):
        got = function(batch, beta, lam)
        assert all(leaf.shape == (count,) for leaf in jax.tree.leaves(got))
        for n in (0, 1, 63, 64, 100, count - 1):
            one = take(batch, n)
            want = oracle(*(np.asarray(getattr(one, key)) for key in KEYS), beta[n], lam[n])
            size = 1 + want["r_max"]
            assert close(got.lhs[n], want["gap"], size, 100)
            assert close(got.rhs[n], want["sides"]["theorem1"][1], size, 100)
            assert close(got.terms["model"][n], want["r_max"] * want["tv_model"], size, 100)
            assert close(got.terms["prompt_shift"][n], want["r_max"] * want["tv_shift"], size, 100)
            assert close(-got.terms["prompter_kl"][n], want["prompter_kl"], size, 100)

    check(solve_batch)
    kills(check, lambda b, beta, lam: solve_batch(b, lam, beta))
    kills(check, lambda b, beta, lam: solve_batch(b, beta, lam[::-1]))
    kills(check, lambda b, beta, lam: jax.tree.map(lambda a: np.roll(a, 1), solve_batch(b, beta, lam)))

    rho = random_prompters(rng, batch.prior)
    trained = solve_batch(batch, beta, lam, BOUNDS["trained"], prompter=rho)
    one = BOUNDS["trained"](jax.jit(solution)(take(batch, 7), beta[7], lam[7], rho[7]))
    np.testing.assert_allclose(trained.rhs[7], one.rhs, rtol=1e-12)


def test_bad_batches():
    batch = FAMILIES["independent"](np.random.default_rng(0), 3, (2, 2, 2))
    none = jax.tree.map(lambda a: a[:0], batch)
    with pytest.raises(AlignProError, match=r"^batch: p has shape \(0, 2\); .* one instance or more$"):
        solve_batch(none, 0.5, 0.5)
    with pytest.raises(AlignProError, match=r"^batch: p has shape \(2,\); give arrays with one leading axis"):
        solve_batch(take(batch, 0), 1.0, 1.0)
    short = unchecked(batch.p, batch.prior[:2], batch.frozen, batch.own, batch.reward)
    with pytest.raises(AlignProError, match=r"^batch: prior has shape \(2, 2, 2\); give 3 instances of it"):
        solve_batch(short, 1.0, 1.0)
    with pytest.raises(
        AlignProError, match=r"^batch: prompter has shape \(2, 2, 2\); give 3 instances of it"
    ):
        solve_batch(batch, 1.0, 1.0, prompter=np.full((2, 2, 2), 0.5))
    with pytest.raises(AlignProError, match=r"^lam: has shape \(2,\); give one number or 3"):
        solve_batch(batch, 1.0, np.ones(2))
    for wrong in (0.0, np.array([1.0, -1.0, 1.0]), np.array([1.0, np.nan, 1.0])):
        with pytest.raises(AlignProError, match=r"^beta .*must be a positive finite number"):
            solve_batch(batch, wrong, 1.0)


def judged(s, statements=None):
    """Each true statement: whether it applies and yet is false beyond its rounding, or not a number."""
    out = {}
    for name, statement in (statements or {**BOUNDS, **IDENTITIES, **LEMMAS}).items():
        t = statement(s)
        applies = jnp.all(jnp.array([jnp.asarray(v) for v in t.assumptions.values()] or [True]))
        slack = t.rhs - t.lhs
        false = (jnp.abs(slack) > t.error) if name in IDENTITIES else (slack < -t.error)
        out[name] = applies & (false | jnp.isnan(slack))
    return out


def single(batch):
    """The batch in float32."""
    return unchecked(
        *(np.asarray(getattr(batch, key)).astype(int if key == "own" else np.float32) for key in KEYS)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_never_refutes_what_is_true(family):
    """20,000 instances of every family at temperatures from 1e-6 to 1e6, in float32 throughout."""
    rng = np.random.default_rng(14)
    batch = single(FAMILIES[family](rng, 20_000, (2, 4, 3)))
    beta, lam = 10.0 ** rng.uniform(-6, 6, (2, 20_000))
    refuted = {name: int(bad.sum()) for name, bad in solve_batch(batch, beta, lam, judged).items()}
    assert not any(refuted.values()), refuted


def test_float32_would_refute_with_the_rounding_of_float64():
    """The check above can fail: with float64's unit of rounding it does."""
    rng = np.random.default_rng(15)
    batch = single(FAMILIES["adversarial"](rng, 500, (2, 4, 3)))

    def short(s):
        errors = {name: value * 2.0**-29 for name, value in s._asdict().items() if name.endswith("_error")}
        return judged(s._replace(eps=s.eps * 2.0**-29, **errors), IDENTITIES)

    assert solve_batch(batch, 0.3, 10.0, short)["exact_gap"].any()


_ON_FOUR = """
import json, sys
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
import test_scale as t
i, batch = t.shared()
s = t.solve_large(i, 0.3, 0.2)
print(json.dumps({
    "devices": len(s.gap.sharding.device_set),
    "dense": t.prompt_shift(i, "dense").tolist(),
    "gap": float(s.average(s.gap)),
    "rhs": t.solve_batch(batch, 0.3, 0.2).rhs.tolist(),
}))
"""


def shared():
    """30 prompts, and 101 instances: neither is a multiple of four."""
    return case(12, (30, 25, 40), keep=0.3), FAMILIES["sparse"](np.random.default_rng(3), 101, (2, 4, 3))


def test_four_devices_give_what_one_gives():
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", _ON_FOUR, str(Path(__file__).parent)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    i, batch = shared()
    gap = oracle(*(np.asarray(getattr(i, key)) for key in KEYS), 0.3, 0.2)["gap"]
    rhs = solve_batch(batch, 0.3, 0.2).rhs

    def check(found):
        assert found["devices"] == 4
        assert close(found["dense"], plain(i), plain(i), 2 * sum(i.shape))
        assert close(found["gap"], gap, 1.0, 200)
        assert close(found["rhs"], rhs, 1.0, 64)

    four = json.loads(done.stdout.splitlines()[-1])
    check(four)
    kills(check, {**four, "rhs": four["rhs"][26:] + four["rhs"][:26]})
    kills(check, {**four, "dense": four["dense"][8:] + four["dense"][:8]})


@pytest.mark.gpu
def test_on_a_gpu():
    try:
        gpus = jax.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"no CUDA device for JAX here ({str(error).splitlines()[0]})")
    i = case(16, (300, 200, 500), keep=0.5)
    got = prompt_shift(i, "dense", gpus)
    assert close(got, plain(i), plain(i), 2 * sum(i.shape))
    large = solve_large(i, 0.3, 0.2, devices=gpus)
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.jit(solution)(i, 0.3, 0.2)
    assert (np.abs(np.asarray(large.gap) - np.asarray(want.gap)) <= want.gap_error + large.gap_error).all()
