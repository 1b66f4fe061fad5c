"""A router: it reads an embedding of the prompt and picks one of some strategies, as instructions to add.

A table of rewards teaches it: R(x, s) of some prompts, each with every strategy. What it predicts is the part
of R(x, s) that is of both x and s, by ridge regression of reduced rank (Izenman 1975) on the embedding of x;
to that comes the mean of s. One way in which prompts differ moves many strategies at once, so that all of
them tell of it, where a regression for each strategy would fit the noise of each. Of two prompters that know
the table alone, the router reads the prompt and the best fixed strategy does not: what it earns beyond is a
part of the price of not reading the prompt (`theory.results.universal`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.errors import AlignProError

RIDGES = (np.inf, 1.0, 0.1)
"""From the stiffest, which is the best fixed strategy for all. More of them find more to read in noise."""
RANKS = (1, 2)
"""How many independent ways of differing a router may read in prompts."""
FOLDS = 8
"""Parts of the prompts, each of which is left out in turn where a choice is judged."""


@dataclass(frozen=True)
class Router:
    """Picks a strategy for a prompt by its embedding."""

    mean: np.ndarray
    """Mean reward [S] of each strategy, in reward units."""
    centre: np.ndarray
    """Mean [D] of the embeddings of the prompts that taught it."""
    scale: np.ndarray
    """Their standard deviation [D], 1 where it is 0."""
    weights: np.ndarray
    """[D, S]: what a standardised embedding, as a unit vector, adds to the prediction."""
    ridge: float
    """Ridge of the regression; infinite where one strategy is picked for all."""
    rank: int | None = None
    """Most independent ways in which prompts differ that it reads; None where nothing limits them."""

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        """Rewards [N, S] expected of every strategy on prompts with embeddings [N, D], but for a number that
        all strategies of a prompt share. Raises AlignProError where the embeddings are of another size."""
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.centre):
            raise AlignProError(
                f"embeddings {list(embeddings.shape)}: the router reads [N, {len(self.centre)}]; give those "
                "of the model that taught it"
            )
        return self.mean + _unit((embeddings - self.centre) / self.scale) @ self.weights

    def pick(self, embeddings: np.ndarray) -> np.ndarray:
        """The strategy [N] of highest predicted reward."""
        return self.predict(embeddings).argmax(1)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def taught(embeddings: np.ndarray, rewards: np.ndarray, ridge: float, rank: int | None = None) -> Router:
    """Fit a router with this ridge and rank.

    Args:
        embeddings: [X, D] of the prompts.
        rewards: [X, S], each the mean of one answer or more.
        ridge: 0 or more; infinite gives the best fixed strategy.
        rank: of the weights, at least 1. Predictions are then those of full rank, projected on the directions
            in which they vary most over the prompts of the table.

    Raises:
        AlignProError: they are not of as many prompts, or hold what is not finite.
    """
    _check(embeddings, rewards)
    mean, centre, scale = rewards.mean(0), embeddings.mean(0), embeddings.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    if np.isinf(ridge):
        return Router(mean, centre, scale, np.zeros((embeddings.shape[1], rewards.shape[1])), ridge)
    known = _unit((embeddings - centre) / scale)
    both = rewards - mean - rewards.mean(1, keepdims=True) + mean.mean()
    # In the space of prompts, which are fewer than dimensions.
    weights = known.T @ np.linalg.solve(known @ known.T + ridge * np.eye(len(known)), both)
    if rank is not None:
        directions = np.linalg.svd(known @ weights, full_matrices=False)[2][:rank]
        weights = weights @ directions.T @ directions
    return Router(mean, centre, scale, weights, ridge, rank)


def _check(embeddings: np.ndarray, rewards: np.ndarray, least: int = 1) -> None:
    if embeddings.ndim != 2 or rewards.ndim != 2 or not least <= len(rewards) == len(embeddings):
        raise AlignProError(
            f"embeddings {list(embeddings.shape)} and rewards {list(rewards.shape)}: give [X, D] and [X, S], "
            f"of the same X, at least {least}"
        )
    if not (np.isfinite(embeddings).all() and np.isfinite(rewards).all()):
        raise AlignProError("embeddings and rewards: some are not finite")


def left_out(values: np.ndarray, choose: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> np.ndarray:
    """Rewards [X] of prompts by strategies that were chosen without them, one fold after the other.

    Args:
        values: [X, S], what each strategy earns on each prompt.
        choose: from truth values [X], which prompts it may learn from, to a strategy of each prompt [X].
        seed: determines the folds.
    """
    count = len(values)
    fold = np.random.default_rng([seed, count]).permutation(count) % min(FOLDS, count)
    found = np.empty(count)
    for k in range(fold.max() + 1):
        held = fold == k
        found[held] = values[held, choose(~held)[held]]
    return found


def earned(embeddings: np.ndarray, rewards: np.ndarray, ridge: float, rank: int | None = None) -> np.ndarray:
    """Rewards [X] of prompts by routers with this ridge and rank that were taught without them."""

    def picked(known: np.ndarray) -> np.ndarray:
        return taught(embeddings[known], rewards[known], ridge, rank).pick(embeddings)

    return left_out(rewards, picked)


def fit(
    embeddings: np.ndarray,
    rewards: np.ndarray,
    ridges: Sequence[float] = RIDGES,
    ranks: Sequence[int] = RANKS,
) -> Router:
    """Fit the router whose ridge and rank earn most on prompts left out (see `taught`).

    Of equals it is the one of lowest rank and stiffest ridge. Another than the stiffest is taken only where
    it earns more than that by over one standard error, prompt by prompt: noise alone would else find
    something to read in most tables. What the router earns on these prompts flatters it, since it was chosen
    by that: `left_out` with this function inside is fair, and fresh prompts are.
    """
    _check(embeddings, rewards, 2)
    # Of an infinite ridge the rank is nothing, so that it is tried once.
    every = [
        (ridge, None if np.isinf(ridge) else rank)
        for rank in sorted(ranks)
        for ridge in sorted(ridges, reverse=True)
    ]
    rows = {each: earned(embeddings, rewards, *each) for each in dict.fromkeys(every)}
    stiffest, best = next(iter(rows)), max(rows, key=lambda each: rows[each].mean())
    gain = rows[best] - rows[stiffest]
    if gain.mean() <= gain.std(ddof=1) / np.sqrt(len(gain)):
        best = stiffest
    return taught(embeddings, rewards, *best)


def fixed(rewards: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """For `left_out`: the strategy that earns most on average, for all prompts."""
    return lambda known: np.full(len(rewards), rewards[known].mean(0).argmax())


def routed(embeddings: np.ndarray, rewards: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """For `left_out`: the picks of a router whose ridge and rank are chosen on the prompts to learn from."""
    return lambda known: fit(embeddings[known], rewards[known]).pick(embeddings)
