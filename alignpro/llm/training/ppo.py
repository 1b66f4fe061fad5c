"""Proximal policy optimization of a prompter (Schulman et al., arXiv 1707.06347), whose optimum is ρ*.

With γ = 1 and the penalty −λ (log ρ_θ − log ρ_sft) added to the reward of every token (the k1 estimator),
the expected return of a rewrite is R(x, x′) − λ log ρ_θ(x′|x)/ρ_sft(x′|x): PPO ascends the prompter's
objective (eq. 9), whose only maximiser is ρ* (eq. 10). `settings.moved_optimum` says what would move it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import GRPOConfig

from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json
from alignpro.llm.models.forward import text_config
from alignpro.llm.training.settings import TrainSettings, refuse_moved_optimum
from alignpro.llm.training.trl_adapter import OwnLoss, without_groups


def shaped_rewards(
    score: Tensor,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    mask: Tensor,
    lam: float,
    estimator: str = "k1",
) -> Tensor:
    """[B, T] rewards: −λ (log ρ_θ − log ρ_ref) at each token, in nats, the score [B] added at the last one.

    `mask` [B, T] is 1 on the completion's tokens, a prefix of each row. With the estimator k1 a row sums to
    score − λ·(log-ratio of the sequence); k3 puts e^−k1 − 1 + k1 in the place of k1, whose mean is the KL but
    whose gradient, in the reward, is not that of the KL.
    """
    ratio = log_probs - ref_log_probs
    rewards = -lam * (ratio if estimator == "k1" else torch.expm1(-ratio) + ratio) * mask
    last = mask.sum(1).long().clamp(min=1) - 1
    return rewards.scatter_add(1, last[:, None], score[:, None].to(rewards.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantages (arXiv 1506.02438) and returns (advantages + values), [B, T], 0 past the end.

    A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t; the value after the last token is 0.
    """
    mask = mask.to(values.dtype)
    values = values * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(running)
        running = rewards[:, t] + gamma * following - values[:, t] + gamma * gae_lambda * running
        running = running * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """The negated clipped objective, −min(w A, clip(w, 1 ± ε) A) with w = ρ_θ/ρ_old, summed over tokens.

    Summing over a sequence's tokens and averaging over the batch gives every sequence the weight that the
    policy gradient gives it; averaging over tokens would favour short ones. Beside the loss, a scalar, comes
    the share of tokens whose gradient the clip removes.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = -torch.minimum(ratio * advantages, clipped * advantages) * mask
    dead = ((ratio > 1 + clip_range) & (advantages > 0)) | ((ratio < 1 - clip_range) & (advantages < 0))
    return loss.sum() / len(mask), (dead * mask).sum() / mask.sum().clamp(min=1)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float | None,
    tokens: Tensor | None = None,
) -> Tensor:
    """½ mean over tokens of max((V − G)², (V_c − G)²), V_c clipped to ±clip_range about the old value.

    `tokens` is the number to divide by, where the mean is over more than this batch.
    """
    error = (values - returns).square()
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (near - returns).square())
    return 0.5 * (error * mask).sum() / (mask.sum() if tokens is None else tokens).clamp(min=1)


@dataclass
class AdaptiveKL:
    """The controller of λ of Ziegler et al. (arXiv 1909.08593): λ grows while the KL is above `target`.

    With it no λ is fixed, so training has no one optimum ρ* of eq. (10).
    """

    value: float
    """λ as it is now, in reward units."""
    target: float
    """KL of a sequence that λ is adapted to, in nats."""
    horizon: int
    """Sequences over which λ adapts."""

    def update(self, kl: float, sequences: int) -> None:
        """Adapt λ after a batch of that mean KL: λ ← λ (1 + clip(KL/target − 1, ±0.2)·sequences/horizon)."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * sequences / self.horizon


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` over the masked tokens."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, mean: Callable[[Tensor, Tensor], Tensor] = masked_mean
) -> Tensor:
    """1 − Var(G − V)/Var(G) over the masked tokens: 1 for a perfect critic, 0 for a constant one."""

    def variance(x: Tensor) -> Tensor:
        return mean((x - mean(x, mask)).square(), mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-12)


def leave_one_out(totals: Tensor, group: int) -> Tensor:
    """The mean of the other values of each one's group, [n]; `group` ≥ 2 values follow each other.

    As a baseline it has no expected gradient: given the prompt, the others are independent of the rewrite x′
    whose score function it multiplies, and E ∇log ρ_θ(x′|x) = 0 (arXiv 2402.14740).
    """
    grouped = totals.view(-1, group)
    return ((grouped.sum(1, keepdim=True) - grouped) / (group - 1)).flatten()


def standard_error(values: Tensor, group: int) -> Tensor:
    """Standard error of the mean of `values` [n] within prompts, the `group` ≥ 2 values of each together."""
    return (values.view(-1, group).var(1).mean() / len(values)).sqrt()


_LEAST_SCALE = 1e-3


class Critic(nn.Module):
    """V(state): a small network on the frozen reference model's hidden state, [..., H] -> [...].

    It reads fixed features, so training it never moves the policy and no second language model is needed.
    The output is a correction, in units of the first batch's returns that differ, to their mean.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.body = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU(), last)
        self.center: Tensor
        self.scale: Tensor
        self.register_buffer("center", torch.tensor(0.0))
        self.register_buffer("scale", torch.tensor(0.0))  # 0: not calibrated yet

    def calibrate(self, totals: Tensor) -> None:
        """Fix the output's units from the first batch's total rewards [B]; later calls change nothing."""
        if self.scale == 0:
            self.center.copy_(totals.mean())
            self.scale.copy_(totals.std(correction=0).clamp(min=_LEAST_SCALE))

    def forward(self, features: Tensor) -> Tensor:
        return self.center + self.scale * self.body(features).squeeze(-1)

    def loss(self, *arguments: Any) -> Tensor:
        """`clipped_value_loss` in the critic's own units, so that one learning rate serves rewards of any."""
        return clipped_value_loss(*arguments) / self.scale.clamp(min=_LEAST_SCALE).square()


@dataclass
class PPOConfig(GRPOConfig):
    """Settings of `PPOTrainer` beside those of `trl.GRPOConfig`, whose `num_iterations` are PPO's epochs.

    Each means what it does in `TrainSettings` and has the default of there. `critic_width` is the number of
    the critic's hidden units.
    """

    beta: float = TrainSettings.lam  # λ, by TRL's name
    kl_estimator: str = TrainSettings.kl_estimator
    target_kl: float | None = TrainSettings.target_kl
    kl_horizon: int = TrainSettings.kl_horizon
    gamma: float = TrainSettings.gamma
    gae_lambda: float = TrainSettings.gae_lambda
    clip_range: float = TrainSettings.clip_range
    value_clip_range: float | None = TrainSettings.value_clip_range
    whiten_rewards: bool = TrainSettings.whiten_rewards
    whiten_advantages: bool = TrainSettings.whiten_advantages
    group_baseline: bool = TrainSettings.group_baseline
    vf_coef: float = TrainSettings.vf_coef
    critic_learning_rate: float = TrainSettings.critic_learning_rate
    critic_width: int = 128
    allow_moved_optimum: bool = TrainSettings.allow_moved_optimum

    def __post_init__(self) -> None:
        without_groups(self, super().__post_init__)


CRITIC_FILE = "critic.safetensors"
KL_FILE = "kl.json"


class PPOTrainer(OwnLoss):
    """PPO with a learned critic and the KL in the reward. A subclass says how rewrites are drawn and scored.

    Several processes (DDP) train as one with their batches joined: means and the critic's gradients are taken
    over all of them.
    """

    reads_features = True
    _tag_names = ["trl", "ppo"]  # noqa: RUF012 - the base class declares a list
    _name = "PPO"

    def __init__(self, *positional: Any, args: PPOConfig, **named: Any) -> None:
        if not args.beta > 0:
            raise AlignProError(f"lam = {args.beta}: λ (beta of the configuration) must be positive")
        args.loss_type, args.scale_rewards = "dr_grpo", "none"  # of GRPO's loss, which PPO does not use
        refuse_moved_optimum(args)
        super().__init__(*positional, **(named | {"args": args}))
        hidden = text_config(self.model).hidden_size
        self.critic = Critic(hidden, args.critic_width).to(self.accelerator.device)
        broadcast([p.data for p in self.critic.parameters()])  # alike in every process
        self.kl = AdaptiveKL(args.beta, args.target_kl or 0.0, args.kl_horizon)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The policy's optimizer, with the critic's parameters at a learning rate of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            group = {"params": list(self.critic.parameters()), "lr": self.args.critic_learning_rate}
            optimizer.add_param_group(group | {"weight_decay": 0.0})
            optimizer.register_step_pre_hook(lambda *_: self.join_critic_gradients())
            # The Trainer clears the gradients of its model only.
            optimizer.register_step_post_hook(lambda *_: self.critic.zero_grad())
        return optimizer

    def join_critic_gradients(self) -> None:
        """Average the critic's gradients over processes: DDP joins those of the model that it wraps."""
        if self.accelerator.num_processes > 1:
            for parameter in self.critic.parameters():
                if parameter.grad is not None:
                    parameter.grad.copy_(self.accelerator.reduce(parameter.grad, "mean"))

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean over the masked tokens of all processes."""
        sums = torch.stack([(values * mask).sum(), mask.sum()])
        total, count = self.accelerator.reduce(sums, "sum")
        return total / count.clamp(min=1)

    def appraised(self, batch: dict[str, Any], scores: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        args, mask = self.args, batch["completion_mask"].float()
        old, reference = batch["old_per_token_logps"], batch["ref_per_token_logps"]
        if not torch.isfinite(scores).all():
            bad = int((~torch.isfinite(scores)).nonzero()[0, 0])
            raise AlignProError(f"reward of {prompts[bad]!r} is {scores[bad].item()}; rewards must be finite")
        lam = self.kl.value
        rewards = shaped_rewards(scores, old, reference, mask, lam, args.kl_estimator)
        if args.group_baseline and self.group() > 1:
            others = leave_one_out(self.accelerator.gather(rewards.sum(1)), self.group())
            centred = scores - self.mine(others)
            rewards = shaped_rewards(centred, old, reference, mask, lam, args.kl_estimator)
        if args.whiten_rewards:
            mean = self.mean(rewards, mask)
            rewards = rewards / self.mean((rewards - mean).square(), mask).sqrt().clamp(min=1e-8)
        features = self.features(batch)
        if not self.idle:
            self.critic.calibrate(self.accelerator.gather(rewards.sum(1)))
        with torch.no_grad():
            values = self.critic(features) * mask
        advantages, returns = generalized_advantages(rewards, values, mask, args.gamma, args.gae_lambda)
        # A constant baseline has no expected gradient. No rescaling: Adam is scale free already.
        advantages = (advantages - self.mean(advantages, mask)) * mask
        if args.whiten_advantages:
            advantages = advantages / self.mean(advantages.square(), mask).sqrt().clamp(min=1e-8)
        if self.idle:
            advantages, returns = torch.zeros_like(advantages), values

        log_ratio = ((old - reference) * mask).sum(1)
        self.note("ppo/reward", scores.mean())
        self.note("ppo/kl_k1", log_ratio.mean())
        self.note("ppo/lambda", torch.tensor(lam, device=scores.device))
        objective = scores - lam * log_ratio
        self.note("ppo/objective", objective.mean())
        every, each = self.accelerator.gather(objective), self.group()
        if each > 1:
            self.note("ppo/objective_stderr", standard_error(every, each))
        self.note("ppo/explained_variance", explained_variance(values, returns, mask, self.mean))
        if args.target_kl and self.model.training:
            kl = self.accelerator.gather(log_ratio)
            self.kl.update(float(kl.mean()), len(kl))
        return batch | {
            "advantages": advantages,
            "ppo_values": values,
            "ppo_returns": returns,
            "ppo_features": features,
            # Sequences of the round over all processes: every part of it counts by its own number of them.
            "ppo_sequences": torch.tensor(float(len(every)), device=scores.device),
        }

    def loss_of(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        mask, args = batch["completion_mask"].float(), self.args
        log_probs, entropies = self.token_scores(model, batch)
        policy, clipped = clipped_surrogate(
            log_probs, batch["old_per_token_logps"], batch["advantages"], mask, args.clip_range
        )
        values = self.critic(batch["ppo_features"])
        # As many tokens as so many sequences of the round have on average: the parts of a step add up.
        tokens = batch["num_items_in_batch"] * (len(mask) / batch["ppo_sequences"])
        old_values, returns = batch["ppo_values"], batch["ppo_returns"]
        value = self.critic.loss(values, old_values, returns, mask, args.value_clip_range, tokens)
        self.note("ppo/policy_loss", policy.detach())
        self.note("ppo/value_loss", value.detach())
        self.note("ppo/clip_fraction", clipped)
        self.note("entropy", (entropies.detach() * mask).sum() / mask.sum())
        self.note("ppo/approx_kl", ((batch["old_per_token_logps"] - log_probs.detach()) * mask).sum(1).mean())
        return policy + args.vf_coef * value

    def save_more(self, folder: Path) -> None:
        save_file(self.critic.state_dict(), folder / CRITIC_FILE)
        write_json(folder / KL_FILE, {"lambda": self.kl.value})

    def load_more(self, folder: Path) -> None:
        self.critic.load_state_dict(load_file(folder / CRITIC_FILE))
        self.kl.value = float(read_json(folder / KL_FILE)["lambda"])
