"""Training a prompter on prefix trees, where ρ_θ, ρ* and every divergence between them are exact.

`ALGORITHMS` names the trainers. Each runs TRL's own loop (data, optimizer, checkpoints, resume); only
sampling and scoring are replaced, by the exact policy on the prompter's prefix trees.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import RLOOConfig

from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines, write_json, write_text
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.libraries import quiet
from alignpro.llm.policies.tree import TreeScores, TreeTask, tree_scores, tree_states
from alignpro.llm.training.checkpoints import ROLLOUT_ARGUMENTS, last_checkpoint
from alignpro.llm.training.ppo import PPOConfig, PPOTrainer
from alignpro.llm.training.trl_adapter import Party, RLOORollouts, Rollouts, parts_of
from alignpro.runs import refuse_other_settings

CURVE_FILE = "curve.jsonl"


@dataclass(frozen=True)
class TrainSettings:
    """How long and how hard to train. The defaults leave the optimum at ρ* (eq. 10)."""

    algorithm: str = "ppo"
    """ppo, or rloo (TRL's own)."""
    lam: float = 0.05
    """λ: weight of KL(ρ‖ρ_sft) in the prompter's objective (eq. 9), in units of the reward."""
    iterations: int = 16
    """Rounds of sampling; each is followed by `epochs` optimizer steps."""
    samples: int = 64
    """Rewrites sampled per prompt and iteration."""
    epochs: int = 4
    """Optimizer steps on each batch of samples."""
    learning_rate: float = 1e-3
    """Adam's step for the adapter, decaying to a tenth along a cosine."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_layers: float = 0.5
    """Share of the layers, from the top, that carry the adapter. Fewer are faster."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise AlignProError(f"algorithm {self.algorithm!r}: choose from {', '.join(ALGORITHMS)}")
        for name in ("lam", "learning_rate", "lora_layers"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise AlignProError(f"{name} = {value}: give a positive, finite number")
        if self.lora_layers > 1:
            raise AlignProError(f"lora_layers = {self.lora_layers}: a share of the layers, at most 1")
        for name, least in (("iterations", 1), ("samples", 2), ("epochs", 1), ("lora_rank", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise AlignProError(f"{name} = {getattr(self, name)}: give at least {least}")


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
    def _tree_scores(self, party: Party, model: nn.Module, rows: Sequence[int]) -> list[TreeScores]:
        task = self.task
        if party == "policy":
            model = self.accelerator.unwrap_model(model)
            return tree_scores(model, [task.prompt_ids[x] for x in rows], [task.trees[x] for x in rows])
        kind, version = (party, 0) if party == "reference" else (party, self.state.global_step)
        stale = [x for x in rows if self._cache.get((kind, x), (-1, None))[0] != version]
        if stale:
            model = self.accelerator.unwrap_model(model)
            fresh = tree_scores(model, [task.prompt_ids[x] for x in stale], [task.trees[x] for x in stale])
            self._cache.update({(kind, x): (version, s) for x, s in zip(stale, fresh, strict=True)})
        return [self._cache[kind, x][1] for x in rows]

    @torch.no_grad()
    def exact_policy(self) -> list[np.ndarray]:
        """ρ_θ(·|x) over the leaves of each prompt's tree, as X float64 arrays that sum to one."""
        scores = self._tree_scores("behaviour", self.model, range(len(self.task.prompts)))
        return [s.probabilities() for s in scores]

    def tokens_of(self, prompts: Sequence[str]) -> list[list[int]]:
        """See `Rollouts.tokens_of`."""
        return [list(self.task.prompt_ids[self._row[p]]) for p in prompts]

    @torch.no_grad()
    def draw(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """See `Rollouts.draw`."""
        rows = [self._row_of_ids[tuple(ids)] for ids in prompt_ids]
        unique = sorted(set(rows))
        scores = dict(zip(unique, self._tree_scores("behaviour", self.model, unique), strict=True))
        actions: list[list[int]] = [[] for _ in rows]
        for x in unique:
            places = [i for i, row in enumerate(rows) if row == x]
            probabilities = scores[x].leaf_log_probs.exp().cpu()
            for i, leaf in zip(
                places, torch.multinomial(probabilities, len(places), replacement=True), strict=True
            ):
                actions[i] = list(self.task.trees[x].layout.actions[leaf])
        return actions

    def leaves(self, prompts: list[list[int]], said: list[list[int]]) -> tuple[list[int], list[int]]:
        """(row, leaf) of each action."""
        rows = [self._row_of_ids[tuple(ids)] for ids in prompts]
        return rows, [self._leaf[x][tuple(action)] for x, action in zip(rows, said, strict=True)]

    def _per_row(self, rows: list[int], leaves: list[int], pick: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Assemble [B, ...] from one call of `pick` per distinct row."""
        parts, places = [], []
        for x in sorted(set(rows)):
            where = [i for i, row in enumerate(rows) if row == x]
            parts.append(pick(x, torch.tensor([leaves[i] for i in where])))
            places += where
        return torch.cat(parts)[torch.argsort(torch.tensor(places))]

    def score(
        self, party: Party, model: Any, prompts: list[list[int]], said: list[list[int]], steps: int
    ) -> tuple[Tensor, Tensor]:
        """See `Rollouts.score`."""
        rows, leaves = self.leaves(prompts, said)
        unique = sorted(set(rows))
        scores = dict(zip(unique, self._tree_scores(party, model, unique), strict=True))
        return (
            self._per_row(rows, leaves, lambda x, y: scores[x].step_log_probs(y, steps)),
            self._per_row(rows, leaves, lambda x, y: scores[x].step_entropies(y, steps)),
        )


class TreePPOTrainer(TreeRollouts, PPOTrainer):
    """PPO on prefix trees."""

    @torch.no_grad()
    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """See `PPOTrainer.features`."""
        if not hasattr(self, "_features"):  # the reference never changes: one pass serves all of training
            model = self.accelerator.unwrap_model(self.model)
            with model.disable_adapter():
                states = tree_states(model, self.task.prompt_ids, [t.layout for t in self.task.trees])
            self._features = [s.float() for s in states]
        prompts, said, keep = parts_of(batch)
        rows, leaves = self.leaves(prompts, said)

        def pick(x: int, y: Tensor) -> Tensor:
            layout = self.task.trees[x].layout
            return self._features[x][torch.as_tensor(layout.fit(layout.leaf_states, keep) + 1)[y]]

        return self._per_row(rows, leaves, pick)


class TreeRLOOTrainer(TreeRollouts, RLOORollouts):
    """TRL's RLOO (arXiv 2402.14740) on prefix trees; its β is λ."""


def _ppo(common: dict[str, Any], settings: TrainSettings) -> tuple[type, Any]:
    config = PPOConfig(
        **common, kl_coef=settings.lam, loss_type="dr_grpo", scale_rewards="none", critic_learning_rate=3e-3
    )
    return TreePPOTrainer, config


def _rloo(common: dict[str, Any], settings: TrainSettings) -> tuple[type, Any]:
    return TreeRLOOTrainer, RLOOConfig(**common, beta=settings.lam, normalize_advantages=False)


ALGORITHMS: dict[str, Callable[[dict[str, Any], TrainSettings], tuple[type, Any]]] = {
    "ppo": _ppo,
    "rloo": _rloo,
}


class Curve(TrainerCallback):
    """Writes one JSON line per iteration: exact quantities of ρ_θ, and the sampled ones beside them.

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
        self.path, self.evaluate, self.every, self.progress = path, evaluate, every, progress
        self.trainer: Any = None
        self.lines: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step and self.path.exists():
            self.lines = [line for line in read_json_lines(self.path) if line["step"] < state.global_step]
        self.started = time.monotonic() - (self.lines[-1]["seconds"] if self.lines else 0.0)
        self._add(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._add(state)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        sampled = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        for line in self.lines:
            if line["step"] == state.global_step - self.every and "sampled" not in line:
                line["sampled"] = sampled
                self._write()

    def _add(self, state: Any) -> None:
        exact = dict(self.evaluate(self.trainer.exact_policy()))
        seconds = time.monotonic() - self.started
        self.lines.append({"step": state.global_step, "seconds": round(seconds, 3), "exact": exact})
        self._write()
        if self.progress:
            self.progress(state.global_step, state.max_steps, exact)

    def _write(self) -> None:
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        policy: ρ_θ over the leaves of each prompt's tree, X arrays.
        curve: the lines of `curve.jsonl`.
    """

    policy: list[np.ndarray]
    curve: list[dict[str, Any]]


def train(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: TreeTask,
    settings: TrainSettings,
    out: str | Path,
    *,
    evaluate: Callable[[list[np.ndarray]], Mapping[str, float]],
    resume: bool = False,
    progress: Callable[[int, int, Mapping[str, float]], None] | None = None,
) -> Trained:
    """Train a LoRA adapter of `model` on the task; every iteration is a checkpoint.

    Args:
        model: the reference prompter ρ_sft; its weights are not changed.
        evaluate: called with the exact ρ_θ once per iteration; what it returns goes into the curve.
        out: folder for `curve.jsonl`, `settings.json`, checkpoints and the adapter.
        resume: continue from the last checkpoint in `out`, if there is one.
        progress: called with (step, last step, exact quantities).

    Raises:
        AlignProError: a checkpoint made with other settings.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    record = out / "settings.json"
    if resume and record.exists():
        refuse_other_settings(out, read_json(record), asdict(settings))
    write_json(record, asdict(settings))

    batch = settings.samples * len(task.prompts)
    common: dict[str, Any] = ROLLOUT_ARGUMENTS | {
        "output_dir": str(out),
        "per_device_train_batch_size": batch,
        "num_generations": settings.samples,
        "num_iterations": settings.epochs,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 1.0,
        "max_steps": settings.iterations * settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "max_completion_length": max(t.layout.leaf_edges.shape[1] for t in task.trees),
        "logging_steps": settings.epochs,
        "save_steps": settings.epochs,  # between two epochs of one batch, resuming would redraw the batch
        "report_to": [],
        "seed": settings.seed,
        "use_cpu": next(model.parameters()).device.type == "cpu",
    }

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rows = [trainer._row[p] for p in prompts]
        leaves = [trainer._leaf[x][tuple(ids)] for x, ids in zip(rows, completion_ids, strict=True)]
        values = [0.0] * len(rows)
        for x in sorted(set(rows)):
            where = [i for i, row in enumerate(rows) if row == x]
            for i, value in zip(where, task.reward(x, [leaves[i] for i in where]), strict=True):
                values[i] = float(value)
        return values

    curve = Curve(out / CURVE_FILE, evaluate, settings.epochs, progress)
    with quiet():
        kind, config = ALGORITHMS[settings.algorithm](common, settings)
        torch.manual_seed(settings.seed)  # the adapter's initial values
        trainer = kind(
            model=model,
            peft_config=adapter_config(model, settings.lora_rank, settings.lora_layers),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": list(task.prompts)}),
            processing_class=tokenizer,
            callbacks=[curve],
            task=task,
        )
        trainer.remove_callback(PrinterCallback)
        curve.trainer = trainer
        trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
        trainer.model.save_pretrained(str(out / "adapter"), safe_serialization=True)
    return Trained(trainer.exact_policy(), curve.lines)
