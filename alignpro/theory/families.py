"""Families of random instances, each built to stress one part of the theory.

`FAMILIES[name](rng, count, (X, K, Y))` draws `count` instances at once: an `Instance` whose arrays have one
leading axis, for vmap. A new family is one function and one row.
"""

from collections.abc import Callable

import jax
import numpy as np

from alignpro.errors import AlignProError
from alignpro.theory.divergences import TINY
from alignpro.theory.instance import KEYS, Instance, normalise, replaced, unchecked

Shape = tuple[int, int, int]
Family = Callable[[np.random.Generator, int, Shape], Instance]


def _dirichlet(rng: np.random.Generator, size: tuple[int, ...], concentration: float = 1.0) -> np.ndarray:
    weights = rng.standard_gamma(concentration, size=size)
    # For small concentrations a whole row can underflow: give it one certain outcome.
    weights[..., 0] += weights.sum(-1) == 0
    return _clean(weights)


def _clean(weights: np.ndarray) -> np.ndarray:
    rows = normalise(weights / weights.sum(-1, keepdims=True))
    return np.where(rows < TINY, 0.0, rows)


def _one_hot(index: np.ndarray, n: int) -> np.ndarray:
    return (np.asarray(index)[..., None] == np.arange(n)).astype(float)  # an eye(n) would be n × n


def _log_uniform(rng: np.random.Generator, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
    return 10.0 ** rng.uniform(np.log10(low), np.log10(high), size)


def _alike(
    rng: np.random.Generator, count: int, shape: Shape, policies: Callable[..., np.ndarray]
) -> Instance:
    """P, ρ_sft and π_F all drawn by `policies(rng, size)`, own rows and rewards uniform."""
    x, k, y = shape
    p, prior, frozen = (policies(rng, (count, *size)) for size in ((x,), (x, k), (k, y)))
    return unchecked(p, prior, frozen, rng.integers(k, size=(count, x)), rng.uniform(size=(count, x, y)))


def independent(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Dirichlet(1) probabilities, uniform rewards in [0, 1]: the plain case, no structure at all."""
    return _alike(rng, count, shape, _dirichlet)


def peaked(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Dirichlet(0.05) probabilities: most mass on one outcome, the rest over many orders of magnitude."""
    return _alike(rng, count, shape, lambda rng, size: _dirichlet(rng, size, 0.05))


def _sparse(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    keep = rng.uniform(size=size) < 0.5
    keep |= _one_hot(rng.integers(size[-1], size=size[:-1]), size[-1]) > 0
    return _clean(keep * rng.standard_exponential(size))


def sparse(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Half of P, ρ_sft and π_F exactly 0: supports differ, and some responses cannot be reached."""
    return _alike(rng, count, shape, _sparse)


def shared_rewrites(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """ρ_sft mixes a point mass on x itself (weight 0 to exactly 1) with rewrites all prompts share.

    At weight 1 the theorem's second and third terms are 0. Prompts may own the same row of π_F.
    """
    x, k, y = shape
    own = rng.integers(k, size=(count, x))
    stay = rng.choice([0.0, 0.5, 0.999999, 1.0], size=(count, 1, 1))
    common = _dirichlet(rng, (count, 1, k))
    return unchecked(
        _dirichlet(rng, (count, x)),
        _clean(stay * _one_hot(own, k) + (1 - stay) * common),
        _dirichlet(rng, (count, k, y), 0.5),
        own,
        rng.uniform(size=(count, x, y)),
    )


def _nearly_certain(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    if len(size) == 2:  # P is no policy
        return _dirichlet(rng, size)
    rest = _log_uniform(rng, 1e-18, 1e-1, (*size[:-1], 1))
    certain = _one_hot(rng.integers(size[-1], size=size[:-1]), size[-1])
    return _clean((1 - rest) * certain + rest * _dirichlet(rng, size))


def near_deterministic(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Policies within 1e-18 to 0.1 of a point mass: divergences near 0, log-ratios far from it."""
    return _alike(rng, count, shape, _nearly_certain)


def low_rank(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Every row of π_F mixes the same two behaviours, so that rewrites differ in one direction only.

    Induced policies fill a segment: the information projection lies on its inside or at an end, most rewrites
    are redundant, and the barycentre can sit on π_F(·|x) although every rewrite is far from it.
    """
    x, k, y = shape
    behaviours = _dirichlet(rng, (count, 2, y), 0.3)
    share = rng.beta(0.5, 0.5, size=(count, k, 1))
    return unchecked(
        _dirichlet(rng, (count, x)),
        _dirichlet(rng, (count, x, k)),
        _clean(share * behaviours[:, :1] + (1 - share) * behaviours[:, 1:]),
        rng.integers(k, size=(count, x)),
        rng.uniform(size=(count, x, y)),
    )


def lm_like(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Zipfian probabilities, correlated rows, rewards of few levels: like enumerated language models.

    π_F(·|x′) is a common Zipf law (exponent 1 to 1.5) on responses in random order, with log-normal noise per
    row; ρ_sft is Zipfian with x itself most likely; r* is a common quality plus noise per prompt, rounded to
    halves of its range or finer, as judges do: long tails and ties together.
    """
    x, k, y = shape
    order = rng.permuted(np.broadcast_to(np.arange(1.0, y + 1), (count, y)), axis=-1)
    logits = -rng.uniform(1.0, 1.5, (count, 1, 1)) * np.log(order)[:, None, :]
    logits = logits + rng.uniform(0.1, 1.5, (count, 1, 1)) * rng.standard_normal((count, k, y))
    own = rng.integers(k, size=(count, x))
    ranks = rng.permuted(np.broadcast_to(np.arange(2.0, k + 2), (count, x, k)), axis=-1)
    ranks = np.where(_one_hot(own, k) > 0, 1.0, ranks)
    quality = rng.standard_normal((count, 1, y)) + 0.5 * rng.standard_normal((count, x, y))
    levels = rng.integers(2, 11, size=(count, 1, 1))
    return unchecked(
        _dirichlet(rng, (count, x)),
        _clean(1 / ranks),
        _clean(np.exp(logits)),
        own,
        np.round(levels / (1 + np.exp(-quality))) / levels,
    )


def _aligned(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    x, k, y = shape
    good = np.arange(y) < rng.integers(1, max(y, 2), size=(count, 1))
    own_row = _dirichlet(rng, (count, y))
    mass = np.where(good, own_row, 0.0).sum(-1, keepdims=True)
    # Each rewrite moves a share of the good mass to the bad responses, entry by entry in one direction.
    share = rng.uniform(size=(count, k, 1))
    share[:, 0] = 0.0
    odds = mass / np.maximum(1 - mass, TINY)
    frozen = own_row[:, None] * np.where(good[:, None], 1 - share, 1 + share * odds[:, None])
    size = rng.choice([0.25, 0.5, 1.0], size=(count, x, 1))
    size[:, 0] = 1.0
    return unchecked(
        _dirichlet(rng, (count, x)),
        _dirichlet(rng, (count, x, k)),
        _clean(np.maximum(frozen, 0.0)),
        np.zeros((count, x), dtype=np.int64),
        size * good[:, None],
    )


def adversarial(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Near-tight: rewards are an indicator aligned with both total variations, then perturbed by 1e-17 to 1.

    Unperturbed, `tight` is an equality, and Theorem 1 becomes one as λ grows with one prompt: a constant
    that is too small is refuted here, and so is a rounding bound that is.
    """
    instance = _aligned(rng, count, shape)
    noise = _log_uniform(rng, 1e-17, 1.0, (count, 1, 1)) * rng.integers(0, 2, size=(count, 1, 1))
    reward = (1 - noise) * instance.reward + noise * rng.uniform(size=instance.reward.shape)
    return replaced(instance, reward=reward)


def signed(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Rewards of both signs, half of them near-tight ±1: where max |r| in r_max's place is false."""
    tight, loose = _aligned(rng, count, shape), independent(rng, count, shape)
    pick = rng.integers(0, 2, size=count).astype(bool)

    def choose(a, b):
        return np.where(pick.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    reward = choose(2 * tight.reward - 1, rng.standard_normal(loose.reward.shape))
    return replaced(jax.tree.map(choose, tight, loose), reward=reward)


def scaled(rng: np.random.Generator, count: int, shape: Shape) -> Instance:
    """Rewards on scales from 1e-8 to 1e8 over offsets up to ±1e6: overflow, underflow, cancellation."""
    instance = independent(rng, count, shape)
    scale = _log_uniform(rng, 1e-8, 1e8, (count, 1, 1))
    offset = rng.choice([-1.0, 0.0, 1.0], size=(count, 1, 1)) * _log_uniform(rng, 1e-3, 1e6, (count, 1, 1))
    return replaced(instance, reward=scale * instance.reward + offset)


FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        *(independent, peaked, sparse, shared_rewrites, near_deterministic),
        *(low_rank, lm_like, adversarial, signed, scaled),
    )
}


def draw(family: str, seed: int, shape: Shape, count: int = 1) -> list[Instance]:
    """`count` validated instances of a family, determined by the seed."""
    if family not in FAMILIES:
        raise AlignProError(f"family {family!r} is unknown; give one of {', '.join(FAMILIES)}")
    if min(shape) < 1 or count < 0:
        raise AlignProError(f"shape {shape}, count {count}: give sizes X, K, Y of at least 1")
    batch = FAMILIES[family](np.random.default_rng(seed), count, shape)
    return [take(batch, i) for i in range(count)]


def take(batch: Instance, index: int) -> Instance:
    """One instance of a batch, validated."""
    return Instance(*(getattr(batch, key)[index] for key in KEYS))


def random_prompters(rng: np.random.Generator, prior: np.ndarray) -> np.ndarray:
    """Prompters ρ with the support of `prior` [..., X, K], from 1e-4 away in log-ratio to far from it."""
    width = _log_uniform(rng, 1e-4, 5.0, (*prior.shape[:-2], 1, 1))
    return _clean(prior * np.exp(width * rng.standard_normal(prior.shape)))
