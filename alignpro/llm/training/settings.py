"""Settings of every training, and which of them move its optimum. Nothing here needs torch or NumPy."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, get_args

from alignpro.errors import AlignProError, check_choices
from alignpro.moved import moved

__getattr__ = moved(__name__, "alignpro.llm.training.pair_settings")

Algorithm = Literal["ppo", "rloo", "grpo"]
"""The rows of `algorithms.ALGORITHMS`, said here because that table needs torch."""
ALGORITHM_NAMES = get_args(Algorithm)
Task = Literal["prompter", "rlhf"]
TASK_NAMES = get_args(Task)
SCHEDULES: dict[str, dict[str, Any]] = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "constant": {}}


def check_whole(settings: Any, least: Mapping[str, int]) -> None:
    """Raise AlignProError unless each field named is a whole number of at least what `least` says."""
    for name, low in least.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise AlignProError(f"{name} {value!r}: give a whole number of at least {low}")


def check_positive(settings: Any, names: Iterable[str]) -> None:
    """Raise AlignProError unless each field named is a positive, finite number."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise AlignProError(f"{name} {value}: give a positive, finite number")


@dataclass(frozen=True)
class FitSettings:
    """Settings that every training has."""

    learning_rate: float = 1e-3
    """Step of the optimizer (Adam)."""
    epochs: float = 1
    """Passes over the training data."""
    lora_rank: int = 16
    """Rank of the adapter (LoRA): a larger one can learn more and takes more memory."""
    seed: int = 0
    """Number that determines the initial weights of what is trained and the order of the data."""

    positive: ClassVar[tuple[str, ...]] = ("learning_rate",)
    """Names of fields that must be positive and finite."""
    least: ClassVar[dict[str, int]] = {"lora_rank": 1, "seed": 0}
    """Names of fields that must be whole numbers, and the least that each may be."""
    flags: ClassVar[dict[str, str]] = {}
    """Names of fields on the command line where they differ: a run's settings.json keeps the fields' own."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_positive(self, self.positive)
        check_whole(self, self.least)
        share = getattr(self, "lora_layers", 1.0)
        if share > 1:
            raise AlignProError(f"lora_layers {share}: give a share of the layers, at most 1")


@dataclass(frozen=True)
class PolicySettings(FitSettings):
    """Settings that training by rollouts has, on open-ended text as on enumerated rewrites."""

    algorithm: Algorithm = "ppo"
    """How the policy is improved: by PPO with a critic, or by RLOO or GRPO, which compare rewrites of one
    prompt."""
    lam: float = 0.05
    """Weight λ of KL(ρ‖ρ_sft) in the objective (eq. 9), in reward units. Smaller lets the prompter move
    further from ρ_sft."""
    iterations: int = 32
    """How many rounds, each of drawing rewrites and then learning from them."""
    samples: int = 8
    """How many rewrites of each prompt to draw in each round."""
    epochs: int = 4
    """Passes over the samples of a round."""
    learning_rate: float = 1e-3
    """Step of the optimizer (Adam) for the adapter."""
    lora_layers: float = 0.5
    """Share of the layers, from the top, that carry the adapter. Fewer are faster."""
    seed: int = 0
    """Number that determines the adapter's start, the order of the prompts and all draws."""

    positive: ClassVar[tuple[str, ...]] = ("lam", "learning_rate", "lora_layers")
    least = FitSettings.least | {"iterations": 1, "samples": 1, "epochs": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.algorithm != "ppo" and self.samples < 2:
            raise AlignProError(
                f"samples {self.samples}: {self.algorithm} compares rewrites of one prompt; give at least 2"
            )


@dataclass(frozen=True)
class TreeSettings(PolicySettings):
    """How to train on enumerated rewrites. Every prompt is in every round, and the optimum is ρ* (eq. 10)."""

    iterations: int = 16
    """Rounds, each of sampling and then `epochs` optimizer steps."""
    samples: int = 64
    """How many rewrites of each prompt to draw in each round."""

    least = PolicySettings.least | {"samples": 2}


@dataclass(frozen=True)
class TrainSettings(PolicySettings):
    """How to train on open-ended text. The defaults are faithful: they leave the optimum at ρ* (eq. 10)."""

    task: Task = "prompter"
    """Policy that is trained: the prompter, or with rlhf the frozen model itself (eq. 2), with lam as β."""
    prompts: int = 8
    """How many user prompts in each round."""
    responses: int = 1
    """How many answers of the frozen model to each rewrite; the reward is their mean."""
    minibatches: int = 1
    """Optimizer steps in each pass."""
    schedule: Literal["cosine_with_min_lr", "constant"] = "cosine_with_min_lr"
    """How the learning rate falls: along a cosine to a tenth, or not at all; then --resume with more
    --iterations takes a finished run further."""
    learning_rate: float = 2e-3
    """Step of the optimizer (Adam) for the adapter. Half of the default finds less in a short training."""
    max_tokens: int = 48
    """The most tokens of one rewrite (with --policy rlhf, of an answer), its end token included."""
    policy_dtype: Literal["auto", "float32", "bfloat16", "4bit"] = "float32"
    """Type of the weights under the adapter, which is trained in float32: bfloat16 takes half the memory and
    4bit an eighth (bitsandbytes; the adapter is then in bfloat16, as TRL has it). auto is bfloat16 on a GPU
    or processor that computes with it, and float32 on others."""
    critic_learning_rate: float = 3e-3
    """PPO: step of the optimizer (Adam) for the critic."""
    gae_lambda: float = 1.0
    """PPO: λ of generalized advantage estimation. Below 1 moves the optimum wherever the critic is not exact,
    the more the longer the rewrite."""
    max_grad_norm: float = 1.0
    """Longest gradient of a step; a longer one is cut to it. 0 cuts none."""
    microbatches: int = 1
    """Parts in which an optimizer step's rewrites go through the model, one after the other: the same
    gradient with less memory."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: about a third more time
    for a fraction of the memory."""
    clip_range: float = 0.2
    """How far a step may move the probability of a token before its gradient is cut: ε of the clipped
    surrogate."""
    value_clip_range: float | None = None
    """PPO: how far a step may move the critic's value, in reward units. Left out: as far as it likes."""
    vf_coef: float = 1.0
    """PPO: weight of the value loss."""
    whiten_advantages: bool = False
    """PPO: divide a round's advantages by their spread."""
    group_baseline: bool = False
    """PPO: count what a rewrite earns from the mean of its prompt's other rewrites of the round. That takes
    out how hard the prompt is, where the critic has not learned it, and leaves the optimum where it is."""
    temperature: float = 1.0
    """Temperature at which the prompter is sampled while it is trained. Other than 1 moves the optimum: λ
    becomes about λ/temperature."""
    top_p: float = 1.0
    """Smallest probability mass of tokens that is sampled from (nucleus). Below 1 moves the optimum."""
    top_k: int = 0
    """Number of likeliest tokens that are sampled from; 0 for all. Other than 0 moves the optimum."""
    gamma: float = 1.0
    """PPO: discount of later rewards. Other than 1 moves the optimum."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """PPO: estimator of the KL in the reward. k3 moves the optimum."""
    whiten_rewards: bool = False
    """PPO: divide a round's rewards by their spread. Moves the optimum."""
    target_kl: float | None = None
    """PPO: adapt λ so that a rewrite's KL nears this, in nats. Moves the optimum: λ is not fixed."""
    kl_horizon: int = 10_000
    """PPO: rewrites over which λ adapts, where target_kl is given."""
    shard: bool = False
    """With several processes: divide the frozen weights of the policy's layers among them (FSDP2) instead of
    keeping all in each. They are whole in each while rewrites are drawn, and layer by layer in learning."""
    vllm: Literal["colocate", "server"] | None = None
    """Draw rewrites with vLLM, through TRL: in the training processes, or by a server (`trl vllm-serve`) on
    this machine. The draws then depend on more than the seed, and a resumed run repeats none."""
    vllm_memory: float | None = None
    """With vllm colocate: share of a GPU's memory that vLLM takes, its copy of the weights included. Left
    out: 0.3."""
    allow_moved_optimum: bool = False
    """Train even where a setting moves the optimum away from ρ*."""
    save_every: int = 1
    """Rounds between checkpoints, which an interrupted run continues from."""

    positive = (*PolicySettings.positive, "critic_learning_rate", "temperature", "clip_range", "vf_coef")
    least = PolicySettings.least | {"prompts": 1, "responses": 1, "minibatches": 1, "microbatches": 1}
    least |= {"max_tokens": 1, "top_k": 0, "kl_horizon": 1, "save_every": 1}
    flags: ClassVar[dict[str, str]] = {
        "samples": "draws",
        "prompts": "prompts_per_round",
        "responses": "answers",
        "max_tokens": "rewrite_tokens",
        "task": "policy",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vllm_memory is not None:
            if self.vllm != "colocate":
                raise AlignProError(f"vllm_memory {self.vllm_memory}: is for vllm colocate; leave it out")
            if not 0 < self.vllm_memory < 1:
                raise AlignProError(f"vllm_memory {self.vllm_memory}: give a share above 0 and below 1")
        if self.shard and (self.vllm is not None or self.policy_dtype == "4bit"):
            other = "policy_dtype 4bit" if self.vllm is None else f"vllm {self.vllm}"
            raise AlignProError(f"shard: cannot be had with {other}; leave one of them out")
        for name in ("top_p", "gamma", "gae_lambda"):
            if not 0 < getattr(self, name) <= 1:
                raise AlignProError(f"{name} {getattr(self, name)}: give a number above 0 and at most 1")
        for name in ("value_clip_range", "target_kl"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise AlignProError(f"{name} {value}: give a positive number, or leave it out")
        if not (math.isfinite(self.max_grad_norm) and self.max_grad_norm >= 0):
            raise AlignProError(f"max_grad_norm {self.max_grad_norm}: give a finite number of at least 0")
        if self.samples * self.prompts % (self.minibatches * self.microbatches):
            name = "minibatches" if self.samples * self.prompts % self.minibatches else "microbatches"
            raise AlignProError(
                f"{name} {getattr(self, name)}: does not divide {self.prompts} prompts x {self.samples}"
            )
        if self.group_baseline and self.samples < 2:
            raise AlignProError("group_baseline: compares rewrites of one prompt; give samples of at least 2")
        if self.samples * self.prompts < 2:
            raise AlignProError(
                "prompts x samples = 1: one rewrite tells nothing of another; give at least 2"
            )

    def here(self) -> "TrainSettings":
        """The settings with the format of weights that `auto` is on this machine: what a run records."""
        from alignpro.llm.models.devices import dtype_of

        kind: Any = dtype_of(self.policy_dtype)
        return replace(self, policy_dtype=kind)

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a round."""
        return self.epochs * self.minibatches


@dataclass(frozen=True)
class EvaluationSettings:
    """Evaluations on held-out prompts while a prompter is trained, by which it is chosen."""

    eval_every: int | None = None
    """Rounds between evaluations on held-out (validation) prompts; the best prompter is then kept. Left out:
    the last round's is.

    There is one evaluation before the first round and one after the last. The prompter that is kept is that
    of the evaluation with the highest objective, reward - lam KL: a later one replaces the best before it
    where its mean gain on the same prompts and draws is positive. That number is too high on average, for it
    was chosen: rollout on test prompts tells what the prompter is worth."""
    eval_prompts: int = 32
    """How many held-out prompts to measure on, at most."""
    eval_draws: int = 2
    """Rewrites of each held-out prompt in each evaluation."""
    eval_proposals: int = 8
    """Rewrites of each held-out prompt that the reference prompter is asked for before the first round, to
    show what resampling them, without training, would earn; 0 leaves that out."""
    patience: int | None = None
    """Stop training after this many evaluations in a row without a new best one. Left out: all rounds are
    trained. The learning rate falls as planned for all rounds, whenever training stops."""

    def __post_init__(self) -> None:
        check_whole(self, {"eval_prompts": 2, "eval_draws": 1, "eval_proposals": 0})
        check_whole(self, {n: 1 for n in ("eval_every", "patience") if getattr(self, n) is not None})
        if self.patience is not None and self.eval_every is None:
            raise AlignProError(
                f"patience {self.patience}: counts evaluations on held-out prompts; give eval_every too"
            )

    def rounds(self, iterations: int) -> list[int]:
        """The rounds after which there is an evaluation, 0 before the first among them."""
        if self.eval_every is None:
            return []
        return sorted({*range(0, iterations, self.eval_every), iterations})

    @property
    def first(self) -> int:
        """Rewrites of each held-out prompt in the evaluation before the first round."""
        return max(self.eval_draws, self.eval_proposals)

    def answers(self, prompts: int, iterations: int, responses: int, oracle: bool) -> int:
        """Answers of the frozen model (with rlhf: of the oracle) in all evaluations, at most."""
        later = self.eval_draws * (len(self.rounds(iterations)) - 1)
        twice = self.eval_proposals > 1 and not oracle
        each = 1 if oracle else responses
        return 0 if self.eval_every is None else prompts * each * (self.first * (1 + twice) + later)


OWN = ("checkpoint-*", "metrics.jsonl", "rewrites.jsonl", "evaluations.jsonl", "prompter")
"""Patterns of what training writes into its folder, beside settings.json and answers."""

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
        "max_grad_norm": 0.0,
        "gamma": 1.0,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "vf_coef": 0.1,
        "whiten_advantages": True,
        "allow_moved_optimum": True,
    },
}
"""Named settings. `paper` is the notebook that the paper names, whose λ adapts and whose generalized
advantages have λ 0.95, so that its optimum is ρ* for no λ given in advance; see `moved_optimum`."""

_OTHER_POLICY = "rewrites are drawn from another policy than the one that is scored"
_UNLIKELY = "unlikely tokens are never drawn, so ρ loses part of the support of ρ_sft"
_OPTIMUM: dict[str, tuple[tuple[Any, ...], str]] = {
    "temperature": ((1.0,), f"{_OTHER_POLICY}, which changes λ to about λ/temperature; set it to 1.0"),
    "top_p": ((1.0,), f"{_UNLIKELY}; set it to 1.0"),
    "top_k": ((0,), f"{_UNLIKELY}; set it to 0"),
    "min_p": ((0.0,), f"{_UNLIKELY}; set it to 0.0"),
    "repetition_penalty": ((1.0,), f"{_OTHER_POLICY}; set it to 1.0"),
    "kl_estimator": (("k1",), "in the reward only k1 has the gradient of the KL; set it to k1"),
    "target_kl": ((0.0,), "λ follows the KL, so there is no fixed λ; leave it out"),
    "gamma": ((1.0,), "the reward at the end weighs less than the KL of early tokens; set it to 1.0"),
    "gae_lambda": (
        (1.0,),
        "where the critic does not explain the returns, early tokens see a share of the score and all of "
        "their own KL; set it to 1.0",
    ),
    "whiten_rewards": ((False,), "every batch has a reward scale, and so a λ, of its own; set it to False"),
    "loss_type": (
        ("dr_grpo", "none"),
        "tokens of long and of short rewrites weigh differently; set it to dr_grpo",
    ),
    "scale_rewards": (
        ("none", False),
        "prompts whose rewards differ little weigh more, against a fixed λ; set it to none",
    ),
    "normalize_advantages": ((False,), "every batch has a scale of its own; set it to False"),
    "mask_truncated_completions": ((False,), "rewrites that were cut off do not count; set it to False"),
}
"""By setting: the values that leave the optimum at ρ*, and what any other does and its remedy."""


def moved_optimum(args: Any) -> dict[str, str]:
    """The settings among `args`, ours or TRL's, that move the optimum away from ρ* (eq. 10), and why."""
    values = {name: getattr(args, name, None) for name in _OPTIMUM}
    return {
        name: f"{value}: {_OPTIMUM[name][1]}"
        for name, value in values.items()
        if value is not None and value not in _OPTIMUM[name][0]
    }


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


Reporter = Literal["tensorboard", "wandb", "trackio"]
"""Services that a trainer can report to; each is the package that it takes."""


def check_reporters(report_to: Sequence[str]) -> None:
    """Raise AlignProError for a name that is no `Reporter`, or whose package is not installed."""
    for name in report_to:
        if name not in get_args(Reporter):
            raise AlignProError(f"report_to {name!r}: choose from {', '.join(get_args(Reporter))}")
        if find_spec(name) is None:
            raise AlignProError(f"report_to {name}: the package is missing; run pip install {name}")
