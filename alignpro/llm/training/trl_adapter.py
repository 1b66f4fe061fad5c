"""All that is used of TRL's inside, in one place: training by rollouts as four questions to a subclass.

The hooks are methods that TRL does not promise to keep. `PRIVATE` names every one of them, so that a new
version of TRL is judged by one test and mended in this file.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer

from alignpro.errors import AlignProError
from alignpro.llm.training.checkpoints import WholeCheckpoints

Rows = list[list[int]]
Party = Literal["policy", "behaviour", "reference"]
"""Who scores: the policy with gradients; the policy as it was when it drew; ρ_sft."""

PRIVATE: dict[str, tuple[str, ...]] = {
    "_tokenize_prompts": ("prompts",),
    "_generate_single_turn": ("prompt_ids",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_prepare_inputs": ("generation_batch",),
    "_generate_and_score_completions": ("inputs",),
    "_compute_loss": ("model", "inputs"),
    "_save_checkpoint": ("model", "trial"),
    "_load_from_checkpoint": ("resume_from_checkpoint",),
}
"""Methods of `GRPOTrainer` and `RLOOTrainer` that are overridden or called here, and parameters relied on.

Beside them the attributes `_metrics`, `_step`, `_buffered_inputs`, `_last_loaded_step`, `vllm_generation`,
`num_generations`, `num_generations_eval`, `num_iterations`, `reward_weights`, `ref_model` and
`current_gradient_accumulation_steps`.
"""

_UNTOUCHED = 1e-3
"""Nats a token that rounding may make of an adapter that changes nothing."""


class Rollouts(WholeCheckpoints):
    """Mixin for TRL's trainers. A subclass says how prompts become tokens, how rewrites are drawn, scored."""

    accelerator: Any
    model: Any
    ref_model: Any
    use_vllm: bool
    vllm_generation: Any
    num_generations: Any
    num_generations_eval: Any
    num_iterations: Any
    current_gradient_accumulation_steps: int
    rescored = False
    """Whether each part of a round is scored once more, as its first step will score it: in low precision two
    ways to pack the same rewrites differ by more than a clip range."""
    reads_features = False
    """Whether the algorithm asks for `features`."""
    idle = False
    """Whether this round teaches nothing: until rewards first differ the policy is ρ_sft, where the KL has no
    gradient, and Adam, which knows no scale, would make whole steps of its rounding."""

    def tokens_of(self, prompts: Sequence[str]) -> Rows:
        """Token ids that the policy continues, for each prompt."""
        raise NotImplementedError

    def draw(self, prompt_ids: Rows) -> Rows:
        """One continuation of each."""
        raise NotImplementedError

    def score(self, party: Party, model: Any, prompts: Rows, said: Rows, steps: int) -> tuple[Tensor, Tensor]:
        """[B, steps] log-probabilities of the tokens that were said, and entropies before them, in nats; 0
        past the end."""
        raise NotImplementedError

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T, H] hidden states of the reference before each completion token."""
        raise NotImplementedError

    def rewarded(self, rewards: Tensor) -> Tensor:
        """[B, 1] rewards of all processes' rewrites, as the algorithm takes them."""
        return rewards

    def note(self, name: str, value: Tensor) -> None:
        """Log the mean of `value` over all processes, averaged over the round."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())  # type: ignore[attr-defined]

    def group(self) -> int:
        """Rewrites of each prompt."""
        return self.num_generations if self.model.training else self.num_generations_eval

    def places(self, count: int) -> list[int]:
        """Place of each local sequence among the continuations of its prompt, over all processes."""
        start = self.accelerator.process_index * count
        return [(start + i) % self.group() for i in range(count)]

    def mine(self, values: Tensor) -> Tensor:
        """This process's part of one value for each rewrite of all processes."""
        count = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * count :][:count]

    def draw_by_vllm(self, prompt_ids: Rows) -> Rows:
        """Continuations drawn by vLLM with the policy's present weights."""
        step = self.state.global_step
        if step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step: int = step
        return self.vllm_generation.generate(prompts=prompt_ids, images=None, num_generations=self.group())[1]

    def _tokenize_prompts(self, prompts: list[str]) -> Any:
        return self.tokens_of(prompts), None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        said = self.draw(prompt_ids)
        return (said, None) if isinstance(self, GRPOTrainer) else said

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        rows = _rows(input_ids, attention_mask, logits_to_keep)
        party: Party = "behaviour"
        if torch.is_grad_enabled():
            party = "policy"
        elif self.is_reference(model):
            party = "reference"
        values, entropies = self.score(party, model, *rows, logits_to_keep)
        if party == "reference":
            self._reference = rows, values
            if self.state.global_step == 0:
                self._check_untouched(model, rows, values)
        return values, entropies, None

    def is_reference(self, model: Any) -> bool:
        """Whether `model` speaks for ρ_sft: a model of its own, or the policy without its adapter."""
        if self.ref_model is not None:
            return model is self.ref_model
        layers = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        return any(layer.disable_adapters for layer in layers)

    def _check_untouched(self, model: Any, rows: tuple[Rows, Rows], reference: Tensor) -> None:
        """Before the first step the policy is the reference: their KL is 0, or one is read wrongly."""
        behaviour, _ = self.score("behaviour", model, *rows, reference.shape[1])
        tokens = max(1, sum(map(len, rows[1])))
        off = float((behaviour - reference).abs().sum()) / tokens
        if not off <= _UNTOUCHED:
            raise AlignProError(
                f"round 1: the untrained policy differs from the model that it starts from by {off:.2g} nats "
                "a token; they are one model, so it is read or sampled wrongly here: report its architecture"
            )

    def _calculate_rewards(self, *positional: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*positional, **named)  # type: ignore[misc]
        self.note("score", rewards.mean())  # the same name in all, before any KL
        self.idle = bool((rewards == rewards[0]).all()) and _untouched(self.model)
        return self.rewarded(rewards)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return batch | ({"advantages": torch.zeros_like(batch["advantages"])} if self.idle else {})

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        every = self.args.steps_per_generation * self.num_iterations
        fresh = self.model.training and (self._step % every == 0 or self._buffered_inputs is None)  # type: ignore[attr-defined]
        inputs = super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        if fresh and self.rescored and self.args.steps_per_generation > 1:
            for batch in self._buffered_inputs:  # type: ignore[attr-defined]
                with torch.no_grad():
                    self._score_again(batch)
        return inputs

    def _score_again(self, batch: dict[str, Any]) -> None:
        values, _ = self.score("policy", self.model, *parts_of(batch))
        if "old_logps" in batch:  # RLOO: of whole sequences
            batch["old_logps"] = values.sum(1)
        elif batch.get("old_per_token_logps") is not None:
            batch["old_per_token_logps"] = values


class GRPORollouts(Rollouts, GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer on the hooks of `Rollouts`, without its KL in the loss.

    Differentiated at the samples, the k3 estimate there has the gradient of KL(ρ_sft‖ρ), the other direction,
    so that the optimum is not ρ*. A subclass puts the KL into the reward.
    """

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        beta, self.beta = self.beta, 0.0
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta


class KLInReward(GRPORollouts):
    """TRL's GRPO trainer with −λ log(ρ_θ/ρ_sft) in the reward."""

    def rewarded(self, rewards: Tensor) -> Tensor:
        (prompts, said), reference = self._reference
        with torch.no_grad():
            behaviour, _ = self.score("behaviour", self.model, prompts, said, reference.shape[1])
        ratio = (behaviour - reference).sum(1)  # the reference is 0 past the end
        self.note("kl", ratio.mean())
        return rewards - self.args.beta * self.accelerator.gather(ratio)[:, None]


class RLOORollouts(Rollouts, RLOOTrainer):  # type: ignore[misc]
    """TRL's RLOO trainer on the hooks of `Rollouts`; it has the KL in the reward as it is."""


class OwnLoss(GRPORollouts):
    """An algorithm of one's own on GRPO's machinery: a round's batch, its loss, what its checkpoints hold.

    Rewrites need no group: with `num_generations` 1 each prompt has one.
    """

    def appraised(self, batch: dict[str, Any], scores: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """The batch, with old and reference log-probabilities in it, and what the loss needs besides.

        `scores` are the [B] rewards of this process's completions, `prompts` their prompts.
        """
        raise NotImplementedError

    def loss_of(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """The loss of one part of the batch, a mean over its sequences."""
        raise NotImplementedError

    def rewarded(self, rewards: Tensor) -> Tensor:
        self._raw_rewards = rewards
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if batch.get("old_per_token_logps") is None:  # left out where the first loss would compute the same
            with torch.no_grad():
                batch["old_per_token_logps"] = self.token_scores(self.model, batch)[0]
        scores = self.mine((self._raw_rewards * self.reward_weights.to(self._raw_rewards.device)).sum(1))
        return self.appraised(batch, scores, [row["prompt"] for row in inputs])

    def token_scores(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """[B, T] log-probabilities of the batch's completions, and entropies before their tokens, in nats."""
        return self._get_per_token_logps_and_entropies(model, *joined(batch))[:2]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = self.loss_of(model, inputs)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)


def _untouched(model: torch.nn.Module) -> bool:
    """Whether the model has an adapter that still changes nothing: its second factors begin at 0."""
    second = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    return bool(second) and not any(weight.any() for weight in second)


def joined(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Prompts and completions of a batch as one: token ids, attention mask, and the completions' width."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return ids, attention, batch["completion_ids"].shape[1]


def parts_of(batch: dict[str, Any]) -> tuple[Rows, Rows, int]:
    """Prompts and completions of a batch without their padding, and the completions' width."""
    ids, attention, keep = joined(batch)
    return *_rows(ids, attention, keep), keep


def _rows(ids: Tensor, attention: Tensor, keep: int) -> tuple[Rows, Rows]:
    """Prompts and completions of a padded batch, without their padding."""
    split = ids.shape[1] - keep
    prompts, said = [], []
    for row, mask in zip(ids.tolist(), attention.bool().tolist(), strict=True):
        prompts.append([t for t, m in zip(row[:split], mask[:split], strict=True) if m])
        said.append([t for t, m in zip(row[split:], mask[split:], strict=True) if m])
    return prompts, said


def without_groups(config: GRPOConfig, check: Callable[[], None]) -> None:
    """Run TRL's own `check` of a configuration whose algorithm compares no rewrites of one prompt.

    TRL refuses `num_generations` 1, which its trainer handles; for the check the group is the whole batch.
    """
    group = config.num_generations
    if group != 1:
        check()
        return
    size = config.per_device_train_batch_size * (config.steps_per_generation or 1)
    size *= int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        raise AlignProError("prompts x samples = 1: one rewrite tells nothing of another; give at least 2")
    config.num_generations = size
    try:
        check()
    finally:
        config.num_generations = group
