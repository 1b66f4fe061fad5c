"""The algorithms that train a policy by rollouts, in one table. Faithful settings leave the optimum at ρ*."""

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from trl import GRPOConfig, RLOOConfig

from alignpro.errors import AlignProError
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.forward import has_experts
from alignpro.llm.training.checkpoints import Metrics, trainer_of
from alignpro.llm.training.ppo import PPOConfig, PPOTrainer
from alignpro.llm.training.settings import SCHEDULES, TrainSettings, refuse_moved_optimum
from alignpro.llm.training.trl_adapter import KLInReward, RLOORollouts, Rollouts

Arguments = dict[str, Any]


class Algorithm(NamedTuple):
    """How a policy is improved."""

    trainer: type[Rollouts]
    configure: Callable[[Arguments, TrainSettings], Any]
    """TRL's configuration, from the arguments that all algorithms share and the settings."""


_LOSS: Arguments = {
    # Of GRPO's loss, which PPO does not use: a mean over sequences, in the rewards' own scale.
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "vllm_importance_sampling_correction": False,  # the ratio is to what vLLM said already
}


def _ppo(common: Arguments, s: TrainSettings) -> PPOConfig:
    names = "kl_estimator target_kl kl_horizon gamma gae_lambda clip_range value_clip_range vf_coef"
    names += " whiten_rewards whiten_advantages group_baseline critic_learning_rate allow_moved_optimum"
    return PPOConfig(**common, **_LOSS, **{name: getattr(s, name) for name in names.split()})


def _rloo(common: Arguments, s: TrainSettings) -> RLOOConfig:
    return RLOOConfig(**common, epsilon=s.clip_range, normalize_advantages=False)


def _grpo(common: Arguments, s: TrainSettings) -> GRPOConfig:
    return GRPOConfig(**common, **_LOSS, epsilon=s.clip_range)


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(PPOTrainer, _ppo),
    "rloo": Algorithm(RLOORollouts, _rloo),
    "grpo": Algorithm(KLInReward, _grpo),
}
"""PPO of our own on TRL's machinery (`ppo`), TRL's RLOO (arXiv 2402.14740), and TRL's GRPO (arXiv 2402.03300)
with the KL moved into the reward. `settings.ALGORITHM_NAMES` lists the names where torch is not at hand."""


def check_processes(settings: TrainSettings) -> int:
    """How many processes train together (WORLD_SIZE); AlignProError where the settings do not suit them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.prompts * settings.samples % (settings.minibatches * settings.microbatches * world):
        raise AlignProError(
            f"prompts x samples = {settings.prompts * settings.samples}: {world} processes x "
            f"{settings.minibatches} minibatches x {settings.microbatches} microbatches do not fit"
        )
    if settings.shard and world < 2:
        raise AlignProError(
            "shard: divides weights among processes, and this is one; start several, as with "
            "`torchrun --nproc_per_node 8 -m alignpro train ...`, or leave it out"
        )
    return world


def configured(
    settings: TrainSettings, out: Path, model: Any, report_to: Sequence[str] = (), longest: int | None = None
) -> Any:
    """TRL's configuration of the algorithm for training `model` into `out`.

    `longest` is the number of tokens of the longest prompt: vLLM in the training processes keeps room for
    that and a rewrite, and not for as many tokens as the model could read.
    """
    world = check_processes(settings)
    batch = settings.prompts * settings.samples
    steps = settings.minibatches * settings.microbatches
    common: Arguments = {
        "bf16": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other kind needs trained inputs
        "disable_tqdm": True,
        # Buffers are alike in all processes. Sent at each pass, they would wait where one makes more passes.
        "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": has_experts(model),  # those that no token was sent to
        "shuffle_dataset": False,  # the order is given; a fixed one makes resuming bit-exact
        "remove_unused_columns": False,
        "disable_dropout": True,
        "log_completions": False,
        "output_dir": str(out),
        "beta": settings.lam,  # TRL calls β what is λ here
        "per_device_train_batch_size": batch // steps // world,
        "gradient_accumulation_steps": settings.microbatches,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_grad_norm": settings.max_grad_norm,
        "num_generations": settings.samples,
        "num_iterations": settings.epochs,
        "steps_per_generation": steps,
        "max_steps": settings.iterations * settings.steps_per_round,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "lr_scheduler_kwargs": SCHEDULES[settings.schedule],
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_completion_length": settings.max_tokens,
        "logging_steps": settings.steps_per_round,
        # Within a round the batch is in memory only: checkpoints fall between rounds.
        "save_steps": settings.save_every * settings.steps_per_round,
        "report_to": list(report_to),
        "seed": settings.seed,
        "use_cpu": next(model.parameters()).device.type == "cpu",
    }
    if settings.vllm is not None:
        if find_spec("vllm") is None:
            raise AlignProError(
                f"vllm {settings.vllm}: the package vllm is missing; run pip install 'trl[vllm]', whose "
                "version of it TRL supports, or leave it out"
            )
        common |= {"use_vllm": True, "vllm_mode": settings.vllm}
        if longest is not None:
            common["vllm_max_model_length"] = longest + settings.max_tokens
        if settings.vllm_memory is not None:
            common["vllm_gpu_memory_utilization"] = settings.vllm_memory
    config = ALGORITHMS[settings.algorithm].configure(common, settings)
    if not settings.allow_moved_optimum:
        refuse_moved_optimum(config)
    return config


def trainer_on(
    rollouts: type[Rollouts],
    settings: TrainSettings,
    config: Any,
    model: Any,
    tokenizer: Any,
    reward: Callable[..., list[float]],
    rows: Sequence[str],
    metrics: Metrics,
    **named: Any,
) -> Any:
    """The trainer of the algorithm with an adapter on `model`, drawing and scoring by `rollouts`.

    `rows` are the prompts of each round in turn; `named` are further arguments of `rollouts`.
    """
    kind = ALGORITHMS[settings.algorithm].trainer
    torch.manual_seed(settings.seed)  # the adapter's initial values
    return trainer_of(
        type(f"{rollouts.__name__}Of{kind.__name__}", (rollouts, kind), {}),
        {"prompt": list(rows)},
        metrics,
        model=model,
        peft_config=adapter_config(model, settings.lora_rank, settings.lora_layers),
        reward_funcs=reward,
        args=config,
        processing_class=tokenizer,
        **named,
    )
