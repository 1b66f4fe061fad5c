"""Training a prompter on prefix trees, where ρ_θ, ρ* and every divergence between them are exact."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from alignpro.llm.models.adapters import left_as_it_was
from alignpro.llm.models.libraries import quiet
from alignpro.llm.policies.tree import TreeScores, TreeTask, tree_scores, tree_states
from alignpro.llm.training.algorithms import configured, trainer_on
from alignpro.llm.training.checkpoints import Line, Metrics, Trained, last_checkpoint
from alignpro.llm.training.settings import TrainSettings, TreeSettings
from alignpro.llm.training.trl_adapter import Party, Rollouts, Rows, parts_of
from alignpro.runs import here, owning

CURVE_FILE = "curve.jsonl"


class TreeRollouts(Rollouts):
    """Sample from, and score on, the exact policies of prefix trees.

    Actions end with a leaf's last decision: what follows has probability one, so it carries no choice,
    no KL and no gradient.
    """

    def __init__(self, *positional: Any, task: TreeTask, **named: Any) -> None:
        self.task = task
        self._row = {text: x for x, text in enumerate(task.prompts)}
        self._row_of_ids = {tuple(ids): x for x, ids in enumerate(task.prompt_ids)}
        self._leaf = [{a: i for i, a in enumerate(tree.layout.actions)} for tree in task.trees]
        self._cache: dict[tuple[str, int], tuple[int, TreeScores]] = {}
        super().__init__(*positional, **named)

    # Log-probabilities without gradient are constant between optimizer steps (the reference's for ever), so
    # sampling, PPO's old log-probabilities and the exact curve share one forward pass.
    def _tree_scores(self, party: Party, model: nn.Module, rows: Iterable[int]) -> dict[int, TreeScores]:
        task, model, rows = self.task, self.accelerator.unwrap_model(model), sorted(set(rows))

        def fresh(rows: Sequence[int]) -> dict[int, TreeScores]:
            trees = [task.trees[x] for x in rows]
            return dict(zip(rows, tree_scores(model, [task.prompt_ids[x] for x in rows], trees), strict=True))

        if party == "policy":
            return fresh(rows)
        version = 0 if party == "reference" else self.state.global_step
        stale = [x for x in rows if self._cache.get((party, x), (-1, None))[0] != version]
        if stale:
            self._cache |= {(party, x): (version, s) for x, s in fresh(stale).items()}
        return {x: self._cache[party, x][1] for x in rows}

    @torch.no_grad()
    def exact_policy(self) -> list[np.ndarray]:
        """ρ_θ(·|x) over the leaves of each prompt's tree, as X float64 arrays that sum to one."""
        scores = self._tree_scores("behaviour", self.model, range(len(self.task.prompts)))
        return [s.probabilities() for s in scores.values()]

    def tokens_of(self, prompts: Sequence[str]) -> Rows:
        return [list(self.task.prompt_ids[self._row[p]]) for p in prompts]

    @torch.no_grad()
    def draw(self, prompt_ids: Rows) -> Rows:
        rows = [self._row_of_ids[tuple(ids)] for ids in prompt_ids]
        scores = self._tree_scores("behaviour", self.model, rows)

        def pick(x: int, places: Tensor) -> Tensor:
            return torch.multinomial(scores[x].leaf_log_probs.exp().cpu(), len(places), replacement=True)

        leaves = self.per_row(rows, rows, pick).tolist()
        return [list(self.task.trees[x].layout.actions[y]) for x, y in zip(rows, leaves, strict=True)]

    def leaves(self, rows: Sequence[int], said: Rows) -> list[int]:
        """Leaf of each action."""
        return [self._leaf[x][tuple(action)] for x, action in zip(rows, said, strict=True)]

    def per_row(self, rows: list[int], leaves: list[int], pick: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Assemble [B, ...] from one call of `pick`, by a row and leaves, per distinct row."""
        parts, places = [], []
        for x in sorted(set(rows)):
            where = [i for i, row in enumerate(rows) if row == x]
            parts.append(pick(x, torch.tensor([leaves[i] for i in where])))
            places += where
        return torch.cat(parts)[torch.argsort(torch.tensor(places))]

    def score(self, party: Party, model: Any, prompts: Rows, said: Rows, steps: int) -> tuple[Tensor, Tensor]:
        rows = [self._row_of_ids[tuple(ids)] for ids in prompts]
        leaves, scores = self.leaves(rows, said), self._tree_scores(party, model, rows)
        return (
            self.per_row(rows, leaves, lambda x, y: scores[x].step_log_probs(y, steps)),
            self.per_row(rows, leaves, lambda x, y: scores[x].step_entropies(y, steps)),
        )

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        if not hasattr(self, "_features"):  # the reference never changes: one pass serves all of training
            model = self.accelerator.unwrap_model(self.model)
            with model.disable_adapter():
                states = tree_states(model, self.task.prompt_ids, [t.layout for t in self.task.trees])
            self._features = [s.float() for s in states]
        prompts, said, keep = parts_of(batch)
        rows = [self._row_of_ids[tuple(ids)] for ids in prompts]

        def pick(x: int, y: Tensor) -> Tensor:
            layout = self.task.trees[x].layout
            return self._features[x][torch.as_tensor(layout.fit(layout.leaf_states, keep) + 1)[y]]

        return self.per_row(rows, self.leaves(rows, said), pick)


class Curve(Metrics):
    """The metrics by iteration: exact quantities of ρ_θ, and the sampled ones beside them.

    The line of step s describes ρ_θ after s optimizer steps. Its sampled values come from the batch drawn
    from that same ρ_θ; the last line has none.
    """

    def __init__(
        self,
        path: Path,
        evaluate: Callable[[list[np.ndarray]], Mapping[str, float]],
        every: int,
        progress: Callable[[int, int, Mapping[str, float]], None] | None,
    ) -> None:
        super().__init__(path)
        self.evaluate, self.every, self.progress = evaluate, every, progress
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        super().on_train_begin(args, state, control, **named)
        self.lines = [line for line in self.lines if line["step"] < state.global_step]
        self.started = time.monotonic() - (self.lines[-1]["seconds"] if self.lines else 0.0)
        self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._measure(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Line | None = None, **_: Any) -> None:
        sampled = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        for line in self.lines:
            if line["step"] == state.global_step - self.every and "sampled" not in line:
                line["sampled"] = sampled
                self.write()

    def _measure(self, state: Any) -> None:
        exact = dict(self.evaluate(self.trainer.exact_policy()))
        seconds = time.monotonic() - self.started
        self.add({"step": state.global_step, "seconds": round(seconds, 3), "exact": exact})
        if self.progress:
            self.progress(state.global_step, state.max_steps, exact)


@dataclass(frozen=True)
class TrainedTree(Trained):
    """Result of training on prefix trees; its metrics are the lines of `curve.jsonl`."""

    policy: list[np.ndarray]
    """ρ_θ over the leaves of each prompt's tree, X arrays."""


@owning("training on trees", option="out")
def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: TreeTask,
    settings: TreeSettings,
    out: str | Path,
    *,
    evaluate: Callable[[list[np.ndarray]], Mapping[str, float]],
    resume: bool = False,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> TrainedTree:
    """Train a LoRA adapter of `model` on the task; every iteration is a checkpoint.

    Args:
        model: the reference prompter ρ_sft; its weights are not changed.
        evaluate: called with the exact ρ_θ once per iteration; what it returns goes into the curve.
        out: folder for `curve.jsonl`, `settings.json`, checkpoints and the adapter.
        resume: continue from the last checkpoint in `out`, if there is one.
        progress: called with (step, last step, exact quantities) once per iteration.
    """
    out = Path(out)
    record = asdict(settings)
    here(out).begin(record, resume=resume, names=("checkpoint-*", CURVE_FILE, "adapter"))

    depth = max(t.layout.leaf_edges.shape[1] for t in task.trees)
    full = TrainSettings(**record, prompts=len(task.prompts), max_tokens=depth)

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rows = [trainer._row[p] for p in prompts]

        def pick(x: int, leaves: Tensor) -> Tensor:
            return torch.tensor(task.reward(x, leaves.tolist()), dtype=torch.float64)

        return trainer.per_row(rows, trainer.leaves(rows, completion_ids), pick).tolist()

    curve = Curve(out / CURVE_FILE, evaluate, settings.epochs, progress)
    with quiet(), left_as_it_was(model):
        config = configured(full, out, model)
        trainer = trainer_on(
            TreeRollouts, full, config, model, tokenizer, reward, task.prompts, curve, task=task
        )
        curve.trainer = trainer
        trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
        trainer.model.save_pretrained(str(out / "adapter"), safe_serialization=True)
    return TrainedTree(out, record, curve.lines, trainer.exact_policy())
