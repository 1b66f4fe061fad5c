"""Training a prompter on open-ended rewrites: real prompts, a real frozen model, a real reward.

`ALGORITHMS` names the trainers: PPO of our own on TRL's machinery, TRL's RLOO, and TRL's GRPO with the KL
moved into the reward. All share one sampler and one scorer (`policy`), which read every shared prefix once.
With the default, faithful settings the optimum of each is ρ* of eq. (10).

The same code trains the RLHF oracle of eq. (2): `task = "rlhf"` makes the policy the frozen model itself,
its action the answer y, and λ plays β.
"""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines, write_json, write_text
from alignpro.llm.checkpoints import (
    ROLLOUT_ARGUMENTS,
    check_reporters,
    completing,
    last_checkpoint,
    refuse_other_settings,
)
from alignpro.llm.frozen import Sampling, Target
from alignpro.llm.models import quiet
from alignpro.llm.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.ppo import PPOConfig, PPOTrainer
from alignpro.llm.prompter import Prompter, Template, target_ids
from alignpro.llm.rewards import Reward, check_scores
from alignpro.llm.settings import SCHEDULES, TrainSettings, refuse_moved_optimum
from alignpro.llm.tree_train import adapter_config

METRICS_FILE = "metrics.jsonl"
SETTINGS_FILE = "settings.json"
PROMPTER_FOLDER = "prompter"


# --- the environment -----------------------------------------------------------------------------------


@dataclass
class Environment:
    """What an action is worth: the frozen model answers, the reward judges.

    Args:
        reward: r(x, y).
        target: π_F; None where the action is the answer itself (rlhf).
        sampling: how π_F decodes.
        responses: answers per rewrite.
        seed: of π_F's samples.
    """

    reward: Reward
    target: Target | None
    sampling: Sampling = field(default_factory=Sampling)
    responses: int = 1
    seed: int = 0

    def score(self, prompts: Sequence[str], actions: Sequence[str], draws: Sequence[int]) -> np.ndarray:
        """[n] mean rewards of actions as rewrites of (or answers to) the prompts.

        Args:
            draws: which draw of π_F each action gets: equal draws of equal rewrites are the same answers.

        Raises:
            AlignProError: a reward that is not finite or not in its declared range, with the sample; or from
                the target.
        """
        if self.target is None:
            return self._checked(prompts, actions)
        asked = [action if action.strip() else " " for action in actions]  # something, even where it is empty
        answers = self.target.respond(
            asked,
            self.sampling,
            first=[d * self.responses for d in draws],
            samples=self.responses,
            seed=self.seed,
        )
        texts = [answer.text for row in answers for answer in row]
        scores = self._checked([x for x in prompts for _ in range(self.responses)], texts)
        return scores.reshape(len(prompts), self.responses).mean(1)

    def _checked(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        scores = self.reward.score(prompts, responses)
        return check_scores(prompts, responses, scores, self.reward.low, self.reward.high)


@dataclass(frozen=True)
class Task:
    """How a user's prompt becomes the policy's prompt, and tokens an action."""

    prompt_ids: Callable[[Any, str], tuple[int, ...]]
    text: Callable[[Any, str, tuple[int, ...]], str]


def _prompter_task(template: Template) -> Task:
    return Task(template.prompt_ids, template.rewrite)


def _rlhf_task(template: Template) -> Task:
    def text(tokenizer: Any, x: str, ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    return Task(target_ids, text)


TASKS: dict[str, Callable[[Template], Task]] = {"prompter": _prompter_task, "rlhf": _rlhf_task}


# --- on TRL's trainers ---------------------------------------------------------------------------------


class OpenRollouts:
    """Mixin for TRL's trainers: one sampler and one scorer, which read shared prefixes once.

    The behaviour policy's log-probabilities are kept from sampling, the reference's hidden states (for PPO's
    critic) from its scoring: nothing goes through a model twice.
    """

    accelerator: Any
    args: Any
    model: Any
    ref_model: Any
    state: Any
    use_vllm: bool
    vllm_generation: Any
    _last_loaded_step: int

    def __init__(self, *positional: Any, task: Task, draws_seed: int, **named: Any) -> None:
        self._task, self._draws_seed = task, draws_seed
        self._drawn: list[list[float]] = []
        self._hidden: Tensor | None = None
        super().__init__(*positional, **named)

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict]:
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        ids = {x: list(self._task.prompt_ids(tokenizer, x)) for x in dict.fromkeys(prompts)}
        return [ids[x] for x in prompts], None, {}

    def _group(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval  # type: ignore[attr-defined]

    def places(self, count: int) -> list[int]:
        """Place of each local sequence among the continuations of its prompt, over all processes."""
        start = self.accelerator.process_index * count
        return [(start + i) % self._group() for i in range(count)]

    def _draw(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        if self.use_vllm:
            return self._draw_by_vllm(prompt_ids)
        step, args = self.state.global_step, self.args
        places = self.places(len(prompt_ids))
        rows: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(prompt_ids):
            rows.setdefault(tuple(ids), []).append(i)
        keys = [
            [sample_key("train", self._draws_seed, step, list(ids), places[i]) for i in where]
            for ids, where in rows.items()
        ]
        sampling = Sampling(args.temperature, args.top_p, args.top_k or 0, args.max_completion_length)
        model = self.accelerator.unwrap_model(self.model)
        training = model.training
        model.eval()
        drawn = sample_and_score(model, self.processing_class.pad_token_id, [*rows], keys, sampling)  # type: ignore[attr-defined]
        model.train(training)
        out: list[list[int]] = [[] for _ in prompt_ids]
        self._drawn = [[] for _ in prompt_ids]
        for where, row in zip(rows.values(), drawn, strict=True):
            for i, (ids, values) in zip(where, row, strict=True):
                out[i], self._drawn[i] = ids, values
        return out

    def _draw_by_vllm(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """As TRL does it, but keeping what vLLM says of its own tokens: it is the behaviour policy."""
        step = self.state.global_step
        if step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = step
        _, ids, values, _ = self.vllm_generation.generate(
            prompts=prompt_ids, images=None, num_generations=self._group()
        )
        self._drawn = [[each[0] for each in row] for row in values]
        return ids

    def _is_reference(self, model: Any) -> bool:
        from peft.tuners.tuners_utils import BaseTunerLayer

        if self.ref_model is not None:
            return model is self.ref_model
        layers = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
        return any(layer.disable_adapters for layer in layers)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        split = input_ids.shape[1] - logits_to_keep
        prompts, said = [], []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            prompts.append([t for t, m in zip(ids[:split], mask[:split], strict=True) if m])
            said.append([t for t, m in zip(ids[split:], mask[split:], strict=True) if m])
        if torch.is_grad_enabled():
            scores = log_probs(model, prompts, said, steps=logits_to_keep)
            return scores.log_probs, scores.entropies, None
        if self._is_reference(model):
            scores = log_probs(model, prompts, said, steps=logits_to_keep, hidden=self.needs_hidden)
            self._hidden = scores.hidden
            return scores.log_probs, scores.entropies, None
        kept = self._sampled_log_probs(logits_to_keep, input_ids.device)
        return kept, torch.zeros_like(kept), None

    def _sampled_log_probs(self, steps: int, device: torch.device) -> Tensor:
        """[B, steps] log-probabilities of the batch last drawn, kept from sampling; 0 past the end."""
        kept = torch.zeros(len(self._drawn), steps, device=device)
        for i, values in enumerate(self._drawn):
            kept[i, : len(values)] = torch.tensor(values)
        return kept

    needs_hidden = False

    def _calculate_rewards(self, *positional: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*positional, **named)  # type: ignore[misc]
        self._note("score", rewards.mean())  # the same name in all, before any KL
        return rewards

    def _note(self, name: str, value: Tensor) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value.item())  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with completing(self):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: TRL's card would credit another method. `Prompter.save` writes one."""


class OpenPPOTrainer(OpenRollouts, PPOTrainer):
    """PPO on open-ended rewrites."""

    needs_hidden = True

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self._draw(prompt_ids), None

    def _critic_features(self, batch: dict[str, Tensor]) -> Tensor:
        assert self._hidden is not None
        return self._hidden


class OpenRLOOTrainer(OpenRollouts, RLOOTrainer):
    """TRL's RLOO (arXiv 2402.14740); its β is λ, in the reward."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self._draw(prompt_ids)


class OpenGRPOTrainer(OpenRollouts, GRPOTrainer):
    """TRL's GRPO (arXiv 2402.03300) with −λ log(ρ_θ/ρ_sft) in the reward, not a k3 estimate in the loss.

    Differentiated at the samples, the k3 in GRPO's loss has the gradient of KL(ρ_sft‖ρ), the other direction,
    so that its optimum is not ρ*.
    """

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> Any:
        return self._draw(prompt_ids), None

    def _get_per_token_logps_and_entropies(self, model: Any, *positional: Any, **named: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, *positional, **named)
        if not torch.is_grad_enabled() and self._is_reference(model):
            self._reference = found[0]
        return found

    def _calculate_rewards(self, *positional: Any, **named: Any) -> Tensor:
        rewards = super()._calculate_rewards(*positional, **named)
        old = self._sampled_log_probs(self._reference.shape[1], self._reference.device)
        ratio = (old - self._reference).sum(1)  # the reference is 0 past the end
        self._note("kl", self.accelerator.gather(ratio).mean())
        return rewards - self.args.beta * self.accelerator.gather(ratio)[:, None]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        beta, self.beta = self.beta, 0.0
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.beta = beta


def _ppo(common: dict[str, Any], s: TrainSettings) -> tuple[type, Any]:
    names = "kl_estimator target_kl kl_horizon gamma gae_lambda clip_range value_clip_range vf_coef"
    names += " whiten_rewards whiten_advantages critic_learning_rate allow_moved_optimum"
    common = common | {"loss_type": "dr_grpo", "scale_rewards": "none"}  # of GRPO's loss, unused
    common |= {"vllm_importance_sampling_correction": False}  # PPO's ratio is to what vLLM said already
    config = PPOConfig(**common, kl_coef=s.lam, **{name: getattr(s, name) for name in names.split()})
    return OpenPPOTrainer, config


def _rloo(common: dict[str, Any], s: TrainSettings) -> tuple[type, Any]:
    return OpenRLOOTrainer, RLOOConfig(**common, beta=s.lam, epsilon=s.clip_range, normalize_advantages=False)


def _grpo(common: dict[str, Any], s: TrainSettings) -> tuple[type, Any]:
    common |= {"loss_type": "dr_grpo", "scale_rewards": "none", "vllm_importance_sampling_correction": False}
    config = GRPOConfig(**common, beta=s.lam, epsilon=s.clip_range)
    return OpenGRPOTrainer, config


ALGORITHMS: dict[str, Callable[[dict[str, Any], TrainSettings], tuple[type, Any]]] = {
    "ppo": _ppo,
    "rloo": _rloo,
    "grpo": _grpo,
}


# --- training ------------------------------------------------------------------------------------------


class Metrics(TrainerCallback):
    """One JSON line per round: what the trainer logged but for clocks, so that a resumed run repeats it."""

    def __init__(self, path: Path, settings: TrainSettings, progress: bool) -> None:
        self.path, self.settings, self.progress = path, settings, progress
        self.lines: list[dict[str, Any]] = []
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step and self.path.exists():
            self.lines = [line for line in read_json_lines(self.path) if line["step"] <= state.global_step]
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=self.settings.iterations,
                initial=state.global_step // self.settings.steps_per_round,
                unit="round",
                disable=None if self.progress else True,
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        timed = ("time", "runtime", "per_second", "num_tokens")
        kept = {k: v for k, v in (logs or {}).items() if not any(t in k for t in timed)}
        self.lines.append({"step": state.global_step, **kept})
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(f"reward {kept.get('score', math.nan):.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


@dataclass(frozen=True)
class Trained:
    """What training leaves: the policy and the lines of `metrics.jsonl`."""

    prompter: Prompter
    metrics: list[dict[str, Any]]


def train(
    prompter: Prompter,
    environment: Environment,
    prompts: Sequence[str],
    settings: TrainSettings,
    out: str | Path,
    *,
    resume: bool = False,
    report_to: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Trained:
    """Train an adapter of the prompter; its language model is the reference ρ_sft and does not change.

    Args:
        prompter: ρ_sft, without an adapter (rlhf: the frozen model; its template is not used).
        environment: what rewrites are worth.
        prompts: the users' prompts, gone through in random order, again and again.
        out: folder for metrics.jsonl, settings.json, checkpoints, and prompter/, the trained one.
        resume: continue from the last checkpoint in `out`, if there is one. On a CPU the metrics are those of
            an uninterrupted run to the bit.
        report_to: tensorboard, wandb, trackio.
        facts: for the model card and settings.json.
        progress: whether a terminal sees a bar.

    Raises:
        AlignProError: a setting that moves the optimum, no prompts, a checkpoint made with other settings; a
            reward that is not finite.
    """
    out = Path(out)
    check_reporters(report_to)
    if not prompts:
        raise AlignProError("prompts: none given; name at least one")
    if hasattr(prompter.model, "peft_config"):
        raise AlignProError(
            "prompter: it has an adapter already; merge it into its model to train on from there"
        )
    prompts, tokenizer = list(dict.fromkeys(prompts)), prompter.tokenizer
    if settings.prompts > len(prompts):
        raise AlignProError(f"prompts {settings.prompts}: more than the {len(prompts)} distinct ones given")
    rows = _rounds(prompts, settings.prompts, settings.iterations, np.random.default_rng([settings.seed, 1]))

    world = int(os.environ.get("WORLD_SIZE", "1"))
    batch = settings.prompts * settings.samples
    if batch % (settings.minibatches * world):
        raise AlignProError(
            f"prompts x samples = {batch}: {world} processes x {settings.minibatches} minibatches do not fit"
        )
    common: dict[str, Any] = ROLLOUT_ARGUMENTS | {
        "output_dir": str(out),
        "per_device_train_batch_size": batch // settings.minibatches // world,
        "num_generations": settings.samples,
        "num_iterations": settings.epochs,
        "steps_per_generation": settings.minibatches,
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
        "use_cpu": next(prompter.model.parameters()).device.type == "cpu",
    }
    if settings.vllm is not None:
        if find_spec("vllm") is None:
            raise AlignProError(
                f"vllm {settings.vllm}: the package vllm is missing; run pip install vllm, or leave it out"
            )
        common |= {"use_vllm": True, "vllm_mode": settings.vllm}
    task = TASKS[settings.task](prompter.template)

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        pairs = zip(prompts, completion_ids, strict=True)
        texts = [task.text(tokenizer, x, tuple(ids)) for x, ids in pairs]
        step = trainer.state.global_step
        draws = [step * settings.samples + place for place in trainer.places(len(prompts))]
        return [float(value) for value in environment.score(prompts, texts, draws)]

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' advice on other set-ups
        kind, config = ALGORITHMS[settings.algorithm](common, settings)
        if not settings.allow_moved_optimum:
            refuse_moved_optimum(config)
        out.mkdir(parents=True, exist_ok=True)
        record = {"settings": asdict(settings), "prompts": len(prompts), **(facts or {})}
        if resume and (out / SETTINGS_FILE).exists():
            refuse_other_settings(out, read_json(out / SETTINGS_FILE), json.loads(json.dumps(record)))
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(out / SETTINGS_FILE, record)
        metrics = Metrics(out / METRICS_FILE, settings, progress)
        torch.manual_seed(settings.seed)  # the adapter's initial values
        trainer = kind(
            model=prompter.model,
            peft_config=adapter_config(prompter.model, settings.lora_rank, settings.lora_layers),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": rows}),
            processing_class=tokenizer,
            callbacks=[metrics],
            task=task,
            draws_seed=settings.seed,
        )
        trainer.remove_callback(PrinterCallback)
        _refuse_sharded(trainer.accelerator)
        trainer.train(resume_from_checkpoint=last_checkpoint(out) if resume else None)
        trained = replace(
            prompter,
            model=trainer.accelerator.unwrap_model(trainer.model).eval(),
            max_tokens=settings.max_tokens,
            facts={**prompter.facts, "settings": asdict(settings), **(facts or {})},
        )
        if trainer.args.should_save:
            trained.save(out / PROMPTER_FOLDER)
    return Trained(trained, metrics.lines)


def _refuse_sharded(accelerator: Any) -> None:
    """Sampling reads whole weights, at another pace in each process; shards would wait for one another."""
    kind = accelerator.distributed_type
    plugin = accelerator.state.deepspeed_plugin if kind == DistributedType.DEEPSPEED else None
    if kind == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3):
        name = "FSDP" if plugin is None else "DeepSpeed ZeRO-3"
        raise AlignProError(
            f"distributed_type {name}: it shards the weights that rewrites are drawn from; use DDP, or "
            "DeepSpeed with zero_stage 2"
        )


def _rounds(prompts: Sequence[str], size: int, rounds: int, rng: np.random.Generator) -> list[str]:
    """Prompts of each round in turn: one permutation after another, none twice in a round.

    Twice in a round, its samples would share their keys.
    """
    queue: list[str] = []
    out: list[str] = []
    for _ in range(rounds):
        chosen: list[str] = []
        while len(chosen) < size:
            place = next((i for i, x in enumerate(queue) if x not in chosen), None)
            if place is None:
                queue += [prompts[i] for i in rng.permutation(len(prompts))]
            else:
                chosen.append(queue.pop(place))
        out += chosen
    return out
