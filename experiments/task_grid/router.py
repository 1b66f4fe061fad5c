"""A router: it reads an embedding of the prompt and picks an instruction, as a table of rewards taught it.

What it predicts is the part of R(x, s) that is of both x and s, by ridge regression on the embedding of x; to
that comes the mean of s. The embedding and the ridge are chosen by cross-validation, by what the chosen
instructions earn on prompts left out; among the ridges is the infinite one, the best fixed instruction.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from paper_grid.plan import Job

from alignpro.files import read_json_lines, write_json, write_text
from alignpro.llm.arms.rollout import FILE
from alignpro.llm.models.load import load_model
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.rewards.features import Embedder
from alignpro.llm.targets.tokens import prompt_ids
from task_grid import table

REWRITES, FACTS = "rewrites.jsonl", "router.json"
RIDGES = (np.inf, 30.0, 10.0, 3.0, 1.0, 0.3)
"""From the stiffest: of two that earn as much, the first is taken."""
FOLDS = 8


@dataclass(frozen=True)
class Routed(Job):
    """The job of a task's router: learn from the table, and rewrite the held-out prompts.

    Its options are `instructions`, `reward`, the model whose states embed prompts, and the folders of two
    rollouts: `table`, and `held_out` for the prompts.
    """

    def act(self, out: Path) -> bool:
        """Write the rewrites, as `rollout --rewrites-file` takes them, and what the router learned."""
        o = self.options
        known = table.read(out / o["table"] / FILE, o["instructions"], o["reward"])
        prompts = list(dict.fromkeys(row["x"] for row in read_json_lines(out / o["held_out"] / FILE)))
        values = known.rewards.mean(2)
        read = embeddings([*known.prompts, *prompts], o["model"])
        seen = {name: of[: len(values)] for name, of in read.items()}
        name, found = fit(seen, values)
        picked = [known.texts[s] for s in found.pick(read[name][len(values) :])]
        pairs = zip(prompts, picked, strict=True)
        rows = ({"prompt": str(x), "rewrite": with_instruction(x, text)} for x, text in pairs)
        write_text(out / self.name / REWRITES, "".join(json.dumps(row) + "\n" for row in rows))
        fixed = left_out(values, lambda learned: np.full(len(values), values[learned].mean(0).argmax()))
        facts = {
            "calls": known.rewards.size,
            "embedding": name,
            "ridge": "none: one instruction for all" if np.isinf(found.ridge) else found.ridge,
            "picks": dict(Counter(text or "(none)" for text in picked).most_common()),
            "earns on prompts left out": float(earned(seen[name], values, found.ridge).mean()),
            "one instruction does": float(fixed.mean()),
        }
        write_json(out / self.name / FACTS, facts)
        return True


def embeddings(prompts: Sequence[str], model: str) -> dict[str, np.ndarray]:
    """What prompts are read by, [X, D] each: the packaged MiniLM's vectors, and states of a causal model's
    middle layer, of the last token and in the mean."""
    net, tokenizer = load_model(model)
    states = []
    with torch.inference_mode():
        for x in prompts:
            ids = torch.tensor([prompt_ids(tokenizer, x)], device=net.device)
            layers = net(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            middle = layers[len(layers) // 2][0].double()
            states.append(torch.cat([middle[-1], middle.mean(0)]).cpu().numpy())
    return {"MiniLM": Embedder().embed(prompts), f"{model}'s middle layer": np.array(states)}


@dataclass(frozen=True)
class Router:
    """Picks a strategy for a prompt by its embedding."""

    mean: np.ndarray
    """Mean reward [S] of each strategy."""
    centre: np.ndarray
    """Mean [D] of the embeddings of the prompts that it was taught."""
    scale: np.ndarray
    """Their standard deviation [D]."""
    known: np.ndarray
    """Those embeddings [X, D], standardised, as unit vectors."""
    weights: np.ndarray
    """[X, S]: what each known prompt adds to the prediction, times the inner product with it."""
    ridge: float

    def predict(self, embeddings: np.ndarray) -> np.ndarray:
        """Rewards [N, S] expected of every strategy on prompts with embeddings [N, D], but for a number that
        all strategies of a prompt share."""
        read = _unit((embeddings - self.centre) / self.scale)
        return self.mean + read @ self.known.T @ self.weights

    def pick(self, embeddings: np.ndarray) -> np.ndarray:
        """The strategy [N] of highest predicted reward."""
        return self.predict(embeddings).argmax(1)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


def taught(embeddings: np.ndarray, rewards: np.ndarray, ridge: float) -> Router:
    """Fit the router with this ridge on rewards [X, S], noisy, of prompts with embeddings [X, D]."""
    mean = rewards.mean(0)
    centre, scale = embeddings.mean(0), embeddings.std(0)
    scale = np.where(scale > 0, scale, 1.0)
    known = _unit((embeddings - centre) / scale)
    both = rewards - mean - rewards.mean(1, keepdims=True) + mean.mean()
    if np.isinf(ridge):
        return Router(mean, centre, scale, known, np.zeros_like(both), ridge)
    weights = np.linalg.solve(known @ known.T + ridge * np.eye(len(known)), both)
    return Router(mean, centre, scale, known, weights, ridge)


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


def fit(
    embeddings: Mapping[str, np.ndarray], rewards: np.ndarray, ridges: Sequence[float] = RIDGES
) -> tuple[str, Router]:
    """Fit the router whose embedding and ridge earn most on prompts left out; of equals, the first."""
    choices = [(name, ridge) for name in embeddings for ridge in ridges]
    name, ridge = max(choices, key=lambda one: earned(embeddings[one[0]], rewards, one[1]).mean())
    return name, taught(embeddings[name], rewards, ridge)
