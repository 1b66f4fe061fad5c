"""A router: it reads the prompt's embedding and picks an instruction, as a table of rewards taught it.

What it predicts is the part of R(x, s) that is of both x and s, by ridge regression on the embedding of x; to
that comes the mean of s. The ridge is chosen by cross-validation, by what the chosen instructions earn on
prompts left out; among the ridges is the infinite one, which is the best fixed instruction.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from paper_grid.plan import Job

from alignpro.files import read_json_lines, write_json, write_text
from alignpro.llm.arms.rollout import FILE
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.rewards.features import Embedder
from task_grid import table

REWRITES, FACTS = "rewrites.jsonl", "router.json"
RIDGES = (np.inf, 30.0, 10.0, 3.0, 1.0, 0.3)
"""From the stiffest: of two that earn as much, the first is taken."""
FOLDS = 8


@dataclass(frozen=True)
class Routed(Job):
    """The job of a task's router: learn from the table, and rewrite the held-out prompts.

    Its options are `instructions`, `reward`, and the folders of two rollouts: `table`, and `held_out` for the
    prompts.
    """

    def act(self, out: Path) -> bool:
        """Write the rewrites, as `rollout --rewrites-file` takes them, and what the router learned."""
        o = self.options
        known = table.read(out / o["table"] / FILE, o["instructions"], o["reward"])
        prompts = list(dict.fromkeys(row["x"] for row in read_json_lines(out / o["held_out"] / FILE)))
        seen, values = embedded(known.prompts), known.rewards.mean(2)
        found = fit(seen, values)
        picked = [known.texts[s] for s in found.pick(embedded(prompts))]
        pairs = zip(prompts, picked, strict=True)
        rows = ({"prompt": str(x), "rewrite": with_instruction(x, text)} for x, text in pairs)
        write_text(out / self.name / REWRITES, "".join(json.dumps(row) + "\n" for row in rows))
        fixed = left_out(values, lambda learned: np.full(len(values), values[learned].mean(0).argmax()))
        facts = {
            "calls": known.rewards.size,
            "ridge": "none: one instruction for all" if np.isinf(found.ridge) else found.ridge,
            "picks": dict(Counter(text or "(none)" for text in picked).most_common()),
            "earns on prompts left out": float(earned(seen, values, found.ridge).mean()),
            "one instruction does": float(fixed.mean()),
        }
        write_json(out / self.name / FACTS, facts)
        return True


def embedded(prompts: Sequence[str]) -> np.ndarray:
    """Unit vectors [X, D] by which prompts are read: the packaged MiniLM's."""
    return Embedder().embed(prompts)


@dataclass(frozen=True)
class Router:
    """Picks a strategy for a prompt by its embedding."""

    mean: np.ndarray
    """Mean reward [S] of each strategy."""
    known: np.ndarray
    """Embeddings [X, D], unit vectors, of the prompts that it was taught."""
    weights: np.ndarray
    """[X, S]: what each known prompt adds to the prediction, times the inner product with it."""
    ridge: float

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        """Rewards [N, S] expected of every strategy on prompts with embeddings [N, D], but for a number that
        all strategies of a prompt share."""
        return self.mean + embeddings @ self.known.T @ self.weights

    def pick(self, embeddings: np.ndarray) -> np.ndarray:
        """The strategy [N] of highest predicted reward."""
        return self.predict(embeddings).argmax(1)


def taught(embeddings: np.ndarray, rewards: np.ndarray, ridge: float) -> Router:
    """Fit the router with this ridge on rewards [X, S], noisy, of prompts with embeddings [X, D]."""
    mean = rewards.mean(0)
    both = rewards - mean - rewards.mean(1, keepdims=True) + mean.mean()
    if np.isinf(ridge):
        return Router(mean, embeddings, np.zeros_like(both), ridge)
    kernel = embeddings @ embeddings.T
    return Router(mean, embeddings, np.linalg.solve(kernel + ridge * np.eye(len(kernel)), both), ridge)


def left_out(values: np.ndarray, choose: Callable[[np.ndarray], np.ndarray], seed: int = 0) -> np.ndarray:
    """What prompts earn [X] of `values` [X, S] by strategies that were chosen without them, fold by fold.

    Args:
        choose: from truth values [X], the prompts to learn from, to the strategy of each prompt [X].
    """
    count = len(values)
    fold = np.random.default_rng([seed, count]).permutation(count) % min(FOLDS, count)
    found = np.empty(count)
    for k in range(fold.max() + 1):
        held = fold == k
        found[held] = values[held, choose(~held)[held]]
    return found


def earned(embeddings: np.ndarray, rewards: np.ndarray, ridge: float) -> np.ndarray:
    """What the prompts earn [X] by routers that were taught without them."""
    return left_out(rewards, lambda known: taught(embeddings[known], rewards[known], ridge).pick(embeddings))


def fit(embeddings: np.ndarray, rewards: np.ndarray, ridges: Sequence[float] = RIDGES) -> Router:
    """Fit the router whose ridge earns most on prompts left out."""
    best = max(ridges, key=lambda ridge: earned(embeddings, rewards, ridge).mean())
    return taught(embeddings, rewards, best)
