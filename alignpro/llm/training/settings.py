"""Settings, apart from what they set so that they cost no import of torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import is_int

ALGORITHM_NAMES = ("ppo", "rloo", "grpo")
TASK_NAMES = ("prompter", "rlhf")
SCHEDULES: dict[str, dict[str, Any]] = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "constant": {}}


def _check_whole(settings: Any, least: Mapping[str, int]) -> None:
    """Raise AlignProError unless each field named is a whole number of at least what `least` says."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not is_int(value) or value < low:
            raise AlignProError(f"{name} {value!r}: give a whole number of at least {low}")


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults are faithful: they leave the optimum at ρ* (eq. 10)."""

    algorithm: str = "ppo"
    """ppo, rloo or grpo."""
    task: str = "prompter"
    """prompter; or rlhf, which trains the frozen model itself (eq. 2), with lam as β."""
    lam: float = 0.05
    """λ: weight of KL(ρ‖ρ_sft) in the objective (eq. 9), in units of the reward."""
    iterations: int = 32
    """Rounds of sampling."""
    prompts: int = 8
    """User prompts in each round."""
    samples: int = 8
    """Rewrites of each of them."""
    responses: int = 1
    """Answers of the frozen model to each rewrite; the reward is their mean."""
    epochs: int = 4
    """Passes over a round's samples."""
    minibatches: int = 1
    """Optimizer steps in each pass."""
    learning_rate: float = 1e-3
    """Adam's step for the adapter."""
    schedule: str = "cosine_with_min_lr"
    """Of the learning rate: cosine_with_min_lr (to a tenth) or constant."""
    max_tokens: int = 48
    """Tokens of a rewrite (rlhf: of an answer), its end token included."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_layers: float = 0.5
    """Share of the layers, from the top, that carry the adapter."""
    policy_dtype: str = "float32"
    """Type of the weights under the adapter, which is trained in float32: float32, bfloat16 for half the
    memory, or 4bit for an eighth (bitsandbytes; the adapter is then in bfloat16, as TRL has it)."""
    critic_learning_rate: float = 3e-3
    """PPO: Adam's step for the critic."""
    gae_lambda: float = 1.0
    """PPO: λ of generalized advantage estimation. Below 1 moves the optimum wherever the critic is not exact,
    the more the longer the rewrite."""
    max_grad_norm: float | None = 1.0
    """Longest gradient of a step; a longer one is cut to it. None: none is cut."""
    microbatches: int = 1
    """Parts in which an optimizer step's rewrites go through the model, one after the other: the same
    gradient with less memory."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: about a third more time
    for a fraction of the memory."""
    clip_range: float = 0.2
    """PPO, GRPO: ε of the clipped surrogate."""
    value_clip_range: float | None = None
    """PPO: clip of the value update. Default: off."""
    vf_coef: float = 1.0
    """PPO: weight of the value loss."""
    whiten_advantages: bool = False
    """PPO: divide advantages by their spread."""
    temperature: float = 1.0
    """Of the prompter while it is trained. Other than 1 moves the optimum: λ becomes about λ/temperature."""
    top_p: float = 1.0
    """Likewise; below 1 moves the optimum."""
    top_k: int = 0
    """Likewise; other than 0 moves the optimum."""
    gamma: float = 1.0
    """PPO: discount. Other than 1 moves the optimum."""
    kl_estimator: str = "k1"
    """PPO: of the KL in the reward. k3 moves the optimum."""
    whiten_rewards: bool = False
    """PPO: divide rewards by their spread. Moves the optimum."""
    target_kl: float | None = None
    """PPO: adapt λ so that a rewrite's KL nears this, in nats. Moves the optimum: λ is not fixed."""
    kl_horizon: int = 10_000
    """PPO: rewrites over which λ adapts."""
    vllm: str | None = None
    """Draw rewrites with vLLM, through TRL: colocate (in the training processes) or server (`trl vllm-serve`
    on this machine). The draws then depend on more than the seed, and a resumed run repeats none."""
    allow_moved_optimum: bool = False
    """Train even where a setting moves the optimum away from ρ*."""
    save_every: int = 1
    """Rounds between checkpoints."""
    seed: int = 0
    """Determines prompts' order, samples and training."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("algorithm", ALGORITHM_NAMES),
            ("task", TASK_NAMES),
            ("schedule", SCHEDULES),
            ("kl_estimator", ("k1", "k3")),
            ("policy_dtype", ("float32", "bfloat16", "4bit")),
            ("vllm", ("colocate", "server")),
        ):
            if getattr(self, name) not in choices and (name, getattr(self, name)) != ("vllm", None):
                raise AlignProError(f"{name} {getattr(self, name)!r}: choose from {', '.join(choices)}")
        for name in (
            "lam",
            "learning_rate",
            "critic_learning_rate",
            "lora_layers",
            "temperature",
            "clip_range",
            "vf_coef",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
                raise AlignProError(f"{name} {value}: give a positive, finite number")
        for name in ("top_p", "gamma", "gae_lambda", "lora_layers"):
            if not 0 < getattr(self, name) <= 1:
                raise AlignProError(f"{name} {getattr(self, name)}: give a number above 0 and at most 1")
        for name in ("value_clip_range", "target_kl", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise AlignProError(f"{name} {value}: give a positive number, or leave it out")
        least = {
            "iterations": 1,
            "prompts": 1,
            "samples": 1,
            "responses": 1,
            "epochs": 1,
            "minibatches": 1,
            "microbatches": 1,
            "max_tokens": 1,
        }
        least |= {"lora_rank": 1, "save_every": 1, "seed": 0, "top_k": 0, "kl_horizon": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise AlignProError(f"{name} {getattr(self, name)}: give at least {low}")
        if self.algorithm != "ppo" and self.samples < 2:
            raise AlignProError(
                f"samples {self.samples}: {self.algorithm} compares rewrites of one prompt; give at least 2"
            )
        if self.samples * self.prompts % (self.minibatches * self.microbatches):
            name = "minibatches" if self.samples * self.prompts % self.minibatches else "microbatches"
            raise AlignProError(
                f"{name} {getattr(self, name)}: does not divide {self.prompts} prompts x {self.samples}"
            )
        if self.samples * self.prompts < 2:
            raise AlignProError(
                "prompts x samples = 1: one rewrite tells nothing of another; give at least 2"
            )

    @property
    def steps_per_round(self) -> int:
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class SFTSettings:
    """How the prompter is fine-tuned."""

    learning_rate: float = 2e-4
    """AdamW's step for the adapter, decaying along a cosine."""
    epochs: int = 3
    """Passes over the training pairs."""
    batch_size: int = 16
    """Pairs per optimizer step."""
    max_tokens: int = 128
    """Tokens of a rewrite, its end token included, here and when sampled later. Longer pairs are left out:
    cut, they would teach never to end."""
    lora_rank: int = 16
    """Rank of the adapter."""
    lora_layers: float = 1.0
    """Share of the layers, from the top, that carry the adapter."""
    save_every: int = 100
    """Optimizer steps between checkpoints."""
    seed: int = 0
    """Of the adapter's initial values and the order of the pairs."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "lora_layers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
                raise AlignProError(f"{name} {value}: give a positive, finite number")
        if self.lora_layers > 1:
            raise AlignProError(f"lora_layers {self.lora_layers}: give a share of the layers, at most 1")
        least = {"epochs": 1, "batch_size": 1, "max_tokens": 2, "lora_rank": 1, "save_every": 1, "seed": 0}
        _check_whole(self, least)


@dataclass(frozen=True)
class RewardSettings:
    """How a reward model is trained."""

    learning_rate: float = 1e-4
    """AdamW's step, decaying along a cosine. About 1e-5 where all weights are trained."""
    epochs: float = 1.0
    """Passes over the training pairs. Reward models overfit after few."""
    batch_size: int = 16
    """Pairs per optimizer step."""
    max_tokens: int = 1024
    """Of a sample, template included; longer ones lose the beginning of the prompt."""
    lora_rank: int = 16
    """Rank of the adapter, which is merged before saving; 0 trains all weights."""
    centre: float = 0.01
    """Weight of the mean of (r(x,y_u) + r(x,y_v))² (arXiv 2312.09244): eq. (1) leaves a term in x free."""
    save_every: int = 100
    """Optimizer steps between checkpoints."""
    seed: int = 0
    """Of the head's initial weights, the adapter's, and the order of the pairs."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise AlignProError(f"{name} {value}: give a positive, finite number")
        if not (math.isfinite(self.centre) and self.centre >= 0):
            raise AlignProError(f"centre {self.centre}: give a finite number, at least 0")
        least = {"batch_size": 1, "max_tokens": 1, "save_every": 1, "lora_rank": 0, "seed": 0}
        _check_whole(self, least)


PRESETS: dict[str, dict[str, Any]] = {
    "faithful": {},
    # TRL 0.11.4's PPOConfig with the one value that the gpt2-sentiment notebook sets, its learning rate. Ours
    # are a LoRA adapter where the notebook trains all weights, and a critic beside the policy.
    "paper": {
        "algorithm": "ppo",
        "lam": 0.2,
        "target_kl": 6.0,
        "kl_horizon": 10_000,
        "learning_rate": 1.41e-5,
        "critic_learning_rate": 1.41e-5,
        "schedule": "constant",
        "prompts": 128,
        "samples": 1,
        "epochs": 4,
        "minibatches": 1,
        "max_grad_norm": None,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "vf_coef": 0.1,
        "whiten_advantages": True,
        "allow_moved_optimum": True,
    },
}
"""Named settings. `paper`: those of the notebook that the paper names, whose λ adapts and whose generalized
advantages have λ 0.95, so that its optimum is ρ* for no λ given in advance; see `moved_optimum`."""


def moved_optimum(args: Any) -> dict[str, str]:
    """The settings that move the optimum of training away from ρ* of eq. (10), and what each of them moves.

    Args:
        args: a `PPOConfig`, or another of TRL's, of which those that it has are looked at.
    """

    def has(name: str, default: Any) -> Any:
        value = getattr(args, name, default)
        return default if value is None else value

    found = {}
    if has("temperature", 1.0) != 1.0:
        found["temperature"] = (
            f"{args.temperature}: rewrites are drawn from another policy than the one that is scored, which "
            "changes λ to about λ/temperature; set it to 1.0"
        )
    for name, neutral in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if has(name, neutral) != neutral:
            found[name] = (
                f"{getattr(args, name)}: unlikely tokens are never drawn, so ρ loses part of the support of "
                f"ρ_sft; set it to {neutral}"
            )
    if has("repetition_penalty", 1.0) != 1.0:
        found["repetition_penalty"] = (
            f"{args.repetition_penalty}: rewrites are drawn from another policy than the one that is scored; "
            "set it to 1.0"
        )
    if has("kl_estimator", "k1") != "k1":
        found["kl_estimator"] = (
            f"{args.kl_estimator}: in the reward only k1 has the gradient of the KL; set it to k1"
        )
    if has("target_kl", 0.0):
        found["target_kl"] = f"{args.target_kl}: λ follows the KL, so there is no fixed λ; leave it out"
    if has("gamma", 1.0) != 1.0:
        found["gamma"] = (
            f"{args.gamma}: the reward at the end weighs less than the KL of early tokens; set it to 1.0"
        )
    if has("gae_lambda", 1.0) != 1.0:
        found["gae_lambda"] = (
            f"{args.gae_lambda}: where the critic does not explain the returns, early tokens see a share of "
            "the score and all of their own KL; set it to 1.0"
        )
    if has("whiten_rewards", False):
        found["whiten_rewards"] = (
            "True: every batch has a reward scale, and so a λ, of its own; set it to False"
        )
    if has("loss_type", "dr_grpo") not in ("dr_grpo", "none"):
        found["loss_type"] = (
            f"{args.loss_type}: tokens of long and of short rewrites weigh differently; set it to dr_grpo"
        )
    if has("scale_rewards", "none") not in ("none", False):
        found["scale_rewards"] = (
            f"{args.scale_rewards}: prompts whose rewards differ little weigh more, against a fixed λ; "
            "set it to none"
        )
    if has("normalize_advantages", False):
        found["normalize_advantages"] = "True: every batch has a scale of its own; set it to False"
    if has("mask_truncated_completions", False):
        found["mask_truncated_completions"] = "True: rewrites that were cut off do not count; set it to False"
    return found


def refuse_moved_optimum(args: Any) -> None:
    """Raise AlignProError for `moved_optimum`, unless `args.allow_moved_optimum`."""
    found = moved_optimum(args)
    if found and not getattr(args, "allow_moved_optimum", False):
        name, why = next(iter(found.items()))
        others = f" (so do {', '.join(list(found)[1:])})" if len(found) > 1 else ""
        raise AlignProError(
            f"{name} = {why}. It moves PPO's optimum away from ρ*{others}; allow_moved_optimum trains all "
            "the same"
        )
