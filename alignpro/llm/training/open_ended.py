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
from trl import GRPOConfig, RLOOConfig

from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines, write_json, write_text
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.chat import Said, chat_of
from alignpro.llm.models.forward import how_of, unwrap
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter, Template, check_room, target_ids
from alignpro.llm.rewards.reward import Reward, check_scores
from alignpro.llm.targets.target import Target
from alignpro.llm.training.checkpoints import ROLLOUT_ARGUMENTS, check_reporters, last_checkpoint
from alignpro.llm.training.ppo import PPOConfig, PPOTrainer
from alignpro.llm.training.settings import SCHEDULES, TrainSettings, refuse_moved_optimum
from alignpro.llm.training.trl_adapter import GRPORollouts, Party, RLOORollouts, Rollouts
from alignpro.runs import refuse_other_settings

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
    said: Callable[[Any, tuple[int, ...]], Said]


def _prompter_task(template: Template) -> Task:
    return Task(template.prompt_ids, template.rewrite, template.said)


def _rlhf_task(template: Template) -> Task:
    def said(tokenizer: Any, ids: tuple[int, ...]) -> Said:
        return chat_of(tokenizer).said(ids)

    return Task(target_ids, lambda tokenizer, x, ids: said(tokenizer, ids).text, said)


TASKS: dict[str, Callable[[Template], Task]] = {"prompter": _prompter_task, "rlhf": _rlhf_task}


# --- on TRL's trainers ---------------------------------------------------------------------------------


class OpenRollouts(Rollouts):
    """Rewrites of open-ended text: one sampler and one scorer, which read shared prefixes once.

    What the behaviour policy said of its rewrites is kept from drawing them in float32. In low precision the
    sampler's numbers and the scorer's differ by more than a clip range, and another engine's do in any: then
    they are scored as training scores them, and `sampler_mismatch` tells by how much that differs.
    """

    def __init__(self, *positional: Any, task: Task, draws_seed: int, **named: Any) -> None:
        self._task, self._draws_seed = task, draws_seed
        self._drawn: list[list[float]] = []
        self._hidden: Tensor | None = None
        super().__init__(*positional, **named)
        causal = unwrap(self.model)
        self.rescored = self.use_vllm or causal.dtype != torch.float32

    def tokens_of(self, prompts: Sequence[str]) -> list[list[int]]:
        """See `Rollouts.tokens_of`."""
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        ids = {x: list(self._task.prompt_ids(tokenizer, x)) for x in dict.fromkeys(prompts)}
        return [ids[x] for x in prompts]

    def draw(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """See `Rollouts.draw`."""
        said = self.draw_by_vllm(prompt_ids) if self.use_vllm else self._sample(prompt_ids)
        if self.rescored:
            sampled = self._drawn
            model = self.accelerator.unwrap_model(self.model)
            with torch.no_grad():
                values = log_probs(model, prompt_ids, said).log_probs
            self._drawn = [row[: len(ids)] for row, ids in zip(values.tolist(), said, strict=True)]
            if not self.use_vllm:
                pairs = zip(sampled, self._drawn, strict=True)
                off = [abs(math.fsum(a) - math.fsum(b)) for a, b in pairs]
                self.note("sampler_mismatch", torch.tensor(np.mean(off), device=values.device))
        return said

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
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

    def score(
        self, party: Party, model: Any, prompts: list[list[int]], said: list[list[int]], steps: int
    ) -> tuple[Tensor, Tensor]:
        """See `Rollouts.score`."""
        if party == "behaviour":
            kept = self.kept_log_probs(steps)
            return kept, torch.zeros_like(kept)
        hidden = party == "reference" and self.needs_hidden
        scores = log_probs(model, prompts, said, steps=steps, hidden=hidden)
        if hidden:
            self._hidden = scores.hidden
        return scores.log_probs, scores.entropies

    def kept_log_probs(self, steps: int) -> Tensor:
        """[B, steps] log-probabilities of the batch last drawn by the policy that drew it; 0 past the end."""
        kept = torch.zeros(len(self._drawn), steps, device=self.accelerator.device)
        for i, values in enumerate(self._drawn):
            kept[i, : len(values)] = torch.tensor(values)
        return kept

    needs_hidden = False


class OpenPPOTrainer(OpenRollouts, PPOTrainer):
    """PPO on open-ended rewrites."""

    needs_hidden = True

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        """See `PPOTrainer.features`: kept from scoring the reference."""
        assert self._hidden is not None
        return self._hidden


class OpenRLOOTrainer(OpenRollouts, RLOORollouts):
    """TRL's RLOO (arXiv 2402.14740); its β is λ, in the reward."""


class OpenGRPOTrainer(OpenRollouts, GRPORollouts):
    """TRL's GRPO (arXiv 2402.03300) with −λ log(ρ_θ/ρ_sft) in the reward."""

    def score(
        self, party: Party, model: Any, prompts: list[list[int]], said: list[list[int]], steps: int
    ) -> tuple[Tensor, Tensor]:
        """See `Rollouts.score`."""
        found = super().score(party, model, prompts, said, steps)
        if party == "reference":
            self._reference = found[0]
        return found

    def rewarded(self, rewards: Tensor) -> Tensor:
        """See `Rollouts.rewarded`."""
        behaviour = self.kept_log_probs(self._reference.shape[1])
        ratio = (behaviour - self._reference).sum(1)  # the reference is 0 past the end
        self.note("kl", ratio.mean())
        return rewards - self.args.beta * self.accelerator.gather(ratio)[:, None]


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
    steps = settings.minibatches * settings.microbatches
    if batch % (steps * world):
        raise AlignProError(
            f"prompts x samples = {batch}: {world} processes x {settings.minibatches} minibatches x "
            f"{settings.microbatches} microbatches do not fit"
        )
    common: dict[str, Any] = ROLLOUT_ARGUMENTS | {
        "output_dir": str(out),
        "per_device_train_batch_size": batch // steps // world,
        "gradient_accumulation_steps": settings.microbatches,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_grad_norm": settings.max_grad_norm or 0.0,  # 0: the Trainer cuts none
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
        "use_cpu": next(prompter.model.parameters()).device.type == "cpu",
    }
    if settings.vllm is not None:
        if find_spec("vllm") is None:
            raise AlignProError(
                f"vllm {settings.vllm}: the package vllm is missing; run pip install 'trl[vllm]', whose "
                "version of it TRL supports, or leave it out"
            )
        common |= {"use_vllm": True, "vllm_mode": settings.vllm}
    task = TASKS[settings.task](prompter.template)
    ids = [task.prompt_ids(tokenizer, x) for x in prompts]
    check_room(prompter.model, prompts, ids, settings.max_tokens, f"prompter {prompter.base or 'model'!r}")

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        pairs = zip(prompts, completion_ids, strict=True)
        texts = [task.text(tokenizer, x, tuple(ids)) for x, ids in pairs]
        thoughts = [task.said(tokenizer, tuple(ids)).thought for ids in completion_ids]
        if any(thoughts):
            trainer.note("thought_share", torch.tensor(np.mean(thoughts), device=trainer.accelerator.device))
        step = trainer.state.global_step
        draws = [step * settings.samples + place for place in trainer.places(len(prompts))]
        return [float(value) for value in environment.score(prompts, texts, draws)]

    with quiet():
        kind, config = ALGORITHMS[settings.algorithm](common, settings)
        if not settings.allow_moved_optimum:
            refuse_moved_optimum(config)
        out.mkdir(parents=True, exist_ok=True)
        record = {
            "settings": asdict(settings),
            "prompts": len(prompts),
            "chat": chat_of(tokenizer).describe(),
            "read": how_of(prompter.model).describe(),
            **(facts or {}),
        }
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
