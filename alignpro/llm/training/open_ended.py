"""Training a prompter on open-ended rewrites: real prompts, a real frozen model, a real reward.

The same code trains the RLHF oracle of eq. (2): `task = "rlhf"` makes the policy the frozen model itself, its
action the answer y, and λ plays β.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.llm.models import packages
from alignpro.llm.models.adapters import left_as_it_was
from alignpro.llm.models.chat import Said, chat_of
from alignpro.llm.models.forward import how_of, unwrap
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.models.prompt import as_json, from_json
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.models.shards import gathered, shard
from alignpro.llm.policies.prompter import Prompter, Template, check_room, target_ids
from alignpro.llm.training.algorithms import configured, trainer_on
from alignpro.llm.training.checkpoints import (
    METRICS_FILE,
    PROMPTER_FOLDER,
    Line,
    Metrics,
    Trained,
    last_checkpoint,
)
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.evaluation import EVALUATIONS_FILE, Evaluations, check_held_out
from alignpro.llm.training.rewrites import REWRITES_FILE, RewriteLog
from alignpro.llm.training.settings import OWN, EvaluationSettings, TrainSettings, check_reporters
from alignpro.llm.training.trl_adapter import Party, Rollouts, Rows
from alignpro.runs import here, owning


@dataclass(frozen=True)
class Task:
    """How a user's prompt x becomes the policy's prompt, and the tokens that follow an action."""

    prompt_ids: Callable[[Any, str], tuple[int, ...]]
    """(tokenizer, x): token ids that the policy continues."""
    said: Callable[[Any, str, tuple[int, ...]], Said]
    """(tokenizer, x, token ids): the action as text, and whether a thought was taken off."""


TASKS: dict[str, Callable[[Template], Task]] = {
    "prompter": lambda template: Task(template.prompt_ids, template.said),
    "rlhf": lambda _: Task(target_ids, lambda tokenizer, _x, ids: chat_of(tokenizer).said(ids)),
}


class OpenRollouts(Rollouts):
    """Rewrites of open-ended text: one sampler and one scorer, which read shared prefixes once.

    What the behaviour policy said of its rewrites is kept from drawing them in float32. In low precision the
    sampler's numbers and the scorer's differ by more than a clip range, and another engine's do in any: then
    they are scored as training scores them, and `sampler_mismatch` tells by how much that differs.
    """

    def __init__(
        self,
        *positional: Any,
        task: Task,
        draws_seed: int,
        evaluations: Evaluations | None = None,
        **named: Any,
    ) -> None:
        self._task, self._draws_seed = task, draws_seed
        self._drawn: list[list[float]] = []
        self._hidden: Tensor | None = None
        super().__init__(*positional, **named)
        self.rescored = self.use_vllm or unwrap(self.model).dtype != torch.float32
        if evaluations is not None:
            evaluations.trainer = self
            self.add_callback(evaluations)  # type: ignore[attr-defined]

    def sums(self) -> tuple[list[float], list[float]]:
        """Log-probabilities of this process's rewrites of the round, by the policy that drew and ρ_sft."""
        return [*map(math.fsum, self._drawn)], self._reference[1].double().sum(1).tolist()

    def tokens_of(self, prompts: Sequence[str]) -> Rows:
        tokenizer = self.processing_class  # type: ignore[attr-defined]
        ids = {x: list(self._task.prompt_ids(tokenizer, _prompt(x))) for x in dict.fromkeys(prompts)}
        return [ids[x] for x in prompts]

    def draw(self, prompt_ids: Rows) -> Rows:
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

    def _sample(self, prompt_ids: Rows) -> Rows:
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
        with gathered(model):
            drawn = sample_and_score(model, self.processing_class.pad_token_id, [*rows], keys, sampling)  # type: ignore[attr-defined]
        model.train(training)
        out: list[list[int]] = [[] for _ in prompt_ids]
        self._drawn = [[] for _ in prompt_ids]
        for where, row in zip(rows.values(), drawn, strict=True):
            for i, (ids, values) in zip(where, row, strict=True):
                out[i], self._drawn[i] = ids, values
        return out

    def score(self, party: Party, model: Any, prompts: Rows, said: Rows, steps: int) -> tuple[Tensor, Tensor]:
        if party == "behaviour":
            kept = torch.zeros(len(self._drawn), steps, device=self.accelerator.device)
            for i, values in enumerate(self._drawn):
                kept[i, : len(values)] = torch.tensor(values)
            return kept, torch.zeros_like(kept)
        hidden = party == "reference" and self.reads_features
        scores = log_probs(model, prompts, said, steps=steps, hidden=hidden)
        if hidden:
            self._hidden = scores.hidden
        return scores.log_probs, scores.entropies

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        assert self._hidden is not None  # kept from scoring the reference
        return self._hidden


class _Rounds(Metrics):
    """The metrics, and a bar that counts rounds."""

    def __init__(self, path: Path, settings: TrainSettings, progress: bool) -> None:
        super().__init__(path)
        self.settings, self.progress = settings, progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        super().on_train_begin(args, state, control, **named)
        if state.is_world_process_zero:
            done, hidden = state.global_step // self.settings.steps_per_round, None if self.progress else True
            self.bar = tqdm(total=self.settings.iterations, initial=done, unit="round", disable=hidden)

    def add(self, line: Line) -> None:
        super().add(line)
        self.bar.update(1)
        said = f"reward {line.get('score', math.nan):.4f}"
        if self.bar.disable and self.progress:  # a file, in which no bar belongs
            done = line["step"] // self.settings.steps_per_round
            packages.note(f"round {done} of {self.settings.iterations}: {said}")
        self.bar.set_postfix_str(said)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.bar is not None:
            self.bar.close()


@dataclass(frozen=True, repr=False)
class TrainedPrompter(Trained):
    """Result of training a prompter (or, with rlhf, a policy)."""

    prompter: Prompter
    evaluations: list[Line] = field(default_factory=list)
    """Lines of evaluations.jsonl; none where nothing was held out."""


@owning("train", option="out")
def train(
    prompter: Prompter,
    environment: Environment,
    prompts: Sequence[str],
    settings: TrainSettings,
    out: str | Path,
    *,
    held_out: Sequence[str] = (),
    evaluation: EvaluationSettings | None = None,
    resume: bool = False,
    report_to: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TrainedPrompter:
    """Train an adapter of the prompter; its language model is the reference ρ_sft and does not change.

    Where an exception ends it, the adapter is taken off again, so that the same `prompter` can be trained.

    Args:
        prompter: ρ_sft, without an adapter (rlhf: the frozen model; its template is not used).
        environment: what rewrites are worth.
        prompts: the users' prompts, gone through in random order, again and again.
        out: folder for metrics.jsonl, rewrites.jsonl, settings.json, checkpoints, and prompter/, the trained
            one: the last round's, or with `evaluation` that of the best evaluation (evaluations.jsonl).
        held_out: prompts never learned from, which `evaluation` evaluates on.
        evaluation: how often to evaluate, and when to stop.
        resume: continue from the last checkpoint in `out`, if there is one; on a CPU to the bit. With a
            constant learning rate `settings.iterations` may be larger than before: a finished run goes on.
        report_to: tensorboard, wandb, trackio.
        facts: for the model card and settings.json.
        progress: whether a terminal sees a bar.
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
    if evaluation is not None and evaluation.eval_every is None:
        evaluation = None
    if evaluation is not None:
        held_out = list(dict.fromkeys(held_out))
        check_held_out(held_out, prompts)
    rows = _rounds(prompts, settings.prompts, settings.iterations, np.random.default_rng([settings.seed, 1]))

    task = TASKS[settings.task](prompter.template)
    read = prompts if evaluation is None else [*prompts, *held_out]
    ids = [task.prompt_ids(tokenizer, x) for x in read]
    check_room(prompter.model, read, ids, settings.max_tokens, f"prompter {prompter.base or 'model'!r}")

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        prompts = [_prompt(row) for row in prompts]
        pairs = zip(prompts, completion_ids, strict=True)
        said = [task.said(tokenizer, x, tuple(ids)) for x, ids in pairs]
        thoughts = torch.tensor(np.mean([each.thought for each in said]), device=trainer.accelerator.device)
        if trainer.accelerator.gather(thoughts).any():  # in all processes or in none, as a note waits for all
            trainer.note("thought_share", thoughts)
        step = trainer.state.global_step
        draws = [step * settings.samples + place for place in trainer.places(len(prompts))]
        refusals = environment.refusals
        asked, refused = refusals.asked, refusals.refused
        texts = [each.text for each in said]
        found, answers = environment.answered(prompts, texts, draws)
        noted = {f"reward/{name}": values for name, values in found.parts.items()}
        noted |= {} if found.spread is None else {"reward_spread": found.spread}
        if refusals.asked > asked and environment.target is not None and environment.target.remote:
            noted["refused_share"] = np.array((refusals.refused - refused) / (refusals.asked - asked))
        for name, values in noted.items():
            trainer.note(name, torch.tensor(values.mean(), device=trainer.accelerator.device))
        rewards = found.total.tolist()
        own = [None] * len(texts) if settings.task == "rlhf" else texts
        columns = zip(map(as_json, prompts), own, answers, rewards, *trainer.sums(), strict=True)
        names = ("prompt", "rewrite", "answer", "reward", "logp", "logp_reference")
        sampled.add(trainer, [dict(zip(names, row, strict=True)) for row in columns])
        return rewards

    with quiet(), left_as_it_was(prompter.model):
        config = configured(settings, out, prompter.model, report_to, max(map(len, ids)))
        facts = dict(facts or {})
        record = {"settings": asdict(settings), "prompts": len(prompts)}
        record["prompts_digest"] = digest(*prompts).hex()[:16]
        if evaluation is not None:
            shown = {"held_out": len(held_out), "held_out_digest": digest(*held_out).hex()[:16]}
            record["evaluation"] = asdict(evaluation) | shown
        else:
            record["evaluation"] = None
        record |= {"chat": chat_of(tokenizer).describe(), "read": how_of(prompter.model).describe(), **facts}
        record = json.loads(json.dumps(record))
        run = here(out)
        # Where the learning rate falls to no planned end, a finished run is the beginning of a longer one.
        grows = ("settings.iterations",) if settings.schedule == "constant" else ()
        run.begin(record, resume=resume, names=OWN, grows=grows)
        metrics = _Rounds(out / METRICS_FILE, settings, progress)
        sampled = RewriteLog(out / REWRITES_FILE, settings.steps_per_round)
        evaluations = None
        if evaluation is not None:
            evaluations = Evaluations(
                held_out,
                evaluation,
                settings,
                environment,
                lambda x: task.prompt_ids(tokenizer, x),
                lambda x, ids: task.said(tokenizer, x, ids),
                out / EVALUATIONS_FILE,
                progress,
            )
        how: dict[str, Any] = {"task": task, "draws_seed": settings.seed, "evaluations": evaluations}
        trainer = trainer_on(
            OpenRollouts,
            settings,
            config,
            prompter.model,
            tokenizer,
            reward,
            list(map(_row, rows)),
            metrics,
            **how,
        )
        _refuse_sharded(trainer.accelerator)
        if settings.shard:
            shard(trainer.model)
        trainer.add_callback(sampled)
        last = last_checkpoint(out) if resume else None
        if evaluations is not None and last is not None:
            evaluations.load(Path(last))
        if evaluations is not None and last is not None and evaluations.stopped is not None:
            metrics.load(Path(last))
            metrics.go_on(evaluations.lines[-1]["step"])  # patience ended before: nothing is left to train
            evaluations.write()
        else:
            trainer.train(resume_from_checkpoint=last)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if evaluations is not None:
            evaluations.restore(model)
            record["kept"] = facts["kept"] = evaluations.record()
        trained = replace(
            prompter,
            model=model.eval(),
            max_tokens=settings.max_tokens,
            facts={**prompter.facts, "settings": asdict(settings), **facts},
        )
        if trainer.args.should_save:
            trained.save(out / PROMPTER_FOLDER)
            if evaluations is not None:
                run.write(kept=record["kept"])
    lines = [] if evaluations is None else evaluations.lines
    return TrainedPrompter(out, record, metrics.lines, trained, lines)


_OBJECT = "\ufdd0"
"""Begins the row of a prompt with more than its text: no character, so that no other prompt begins so."""


def _row(x: str) -> str:
    """The prompt as the trainer's data set holds it, which knows plain strings only."""
    value = as_json(x)
    return value if isinstance(value, str) else _OBJECT + json.dumps(value)


def _prompt(row: str) -> str:
    """The prompt that `_row` wrote."""
    return from_json(json.loads(row[1:])) if row.startswith(_OBJECT) else row


def _refuse_sharded(accelerator: Any) -> None:
    """Refuse what shards all weights: an adapter stays whole, and its base is to be whole while it draws."""
    kind = accelerator.distributed_type
    plugin = accelerator.state.deepspeed_plugin if kind == DistributedType.DEEPSPEED else None
    if kind == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3):
        name = "FSDP" if plugin is None else "DeepSpeed ZeRO-3"
        raise AlignProError(
            f"distributed_type {name}: start the processes without it, as torchrun does, and give --shard, "
            "which divides the frozen weights by FSDP2 and leaves the adapter whole"
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
