"""Evaluations on held-out prompts while a policy is trained: which round to keep, and when to stop.

Every evaluation takes the same prompts and the same keys of draws, so that two of them differ by what was
learned and little else. The rule that chooses is the sign of the mean gain over the best one so far, which
is to keep the highest mean; equal ones leave the earlier. A margin (one standard error, say) would favour
earlier rounds, for which there is no reason: the objective counts the KL already, and keeping a worse round
costs what missing a better one costs. A mean that was the highest of several is too high on average, so it
is no estimate of what the chosen prompter is worth.
"""

import contextlib
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json, write_text
from alignpro.llm.data.rows import identity
from alignpro.llm.models.chat import Said
from alignpro.llm.models.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.models.prompt import as_json
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.models.shards import gathered, is_sharded
from alignpro.llm.training.checkpoints import Kept, Line
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.settings import EvaluationSettings, TrainSettings
from alignpro.runs import claim

EVALUATIONS_FILE = "evaluations.jsonl"
BEST_FILE = "best.safetensors"
"""The best adapter so far, in a checkpoint."""
CHOSEN_FILE = "evaluations.json"
"""The evaluations so far, in a checkpoint."""
MOST_EXAMPLES = 4
"""Prompts of which an evaluation keeps the first rewrite."""


def check_held_out(held_out: Sequence[str], prompts: Sequence[str]) -> None:
    """Raise AlignProError for fewer than two held-out prompts, or one that is learned from, however typed."""
    if len(held_out) < 2:
        raise AlignProError(
            f"eval_every: {len(held_out)} held-out prompts are there, and a standard error takes 2; give "
            "more prompts, or leave eval_every out"
        )
    learned = {identity(x) for x in prompts}
    for x in held_out:
        if identity(x) in learned:
            raise AlignProError(f"held_out {str(x)[:60]!r}: is learned from too; hold out other prompts")


class Evaluations(Kept):
    """Evaluates the policy on held-out prompts, keeps the adapter of the best evaluation, and stops.

    With several processes each takes a share of the prompts and all know all results, so that they decide
    alike. A checkpoint holds the evaluations before it and the best adapter: what an interruption loses is
    evaluated again, with the same draws, and answers on file are not paid for twice.

    Args:
        prompts: never learned from.
        prompt_ids, said: see `open_ended.Task`, with the tokenizer filled in.
        path: file of the results, one JSON line for each evaluation.
        progress: whether each is told on standard error.
    """

    trainer: Any = None
    """The trainer whose policy is evaluated; set by it."""

    def __init__(
        self,
        prompts: Sequence[str],
        how: EvaluationSettings,
        settings: TrainSettings,
        environment: Environment,
        prompt_ids: Callable[[str], tuple[int, ...]],
        said: Callable[[str, tuple[int, ...]], Said],
        path: Path,
        progress: bool = False,
    ) -> None:
        self.prompts, self.how, self.settings, self.environment = list(prompts), how, settings, environment
        self.prompt_ids, self.said, self.path, self.progress = prompt_ids, said, path, progress
        self.rounds = how.rounds(settings.iterations)
        self.lines: list[Line] = []
        self.best: dict[str, Tensor] = {}

    @property
    def kept(self) -> int:
        """The round after which the best evaluation was, 0 before the first."""
        return int(self.lines[-1]["best"])

    @property
    def stopped(self) -> int | None:
        """The round after which patience ended before the last round; None where it did not."""
        done = int(self.lines[-1]["round"]) if self.lines else self.settings.iterations
        if self.how.patience is None or done >= self.settings.iterations:
            return None
        since = sum(line["round"] > self.kept for line in self.lines)
        return done if since >= self.how.patience else None

    def record(self) -> dict[str, Any]:
        """The round that the kept prompter is from, for the records of the run."""
        stop = {} if self.stopped is None else {"stopped_after": self.stopped}
        return {"round": self.kept, "rounds": self.settings.iterations, "by": "held-out objective", **stop}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.global_step:
            self.lines, self.best = [], {}
            self.evaluate(0)
        elif state.is_world_process_zero:
            self.write()  # without what came after the checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done, within = divmod(state.global_step, self.settings.steps_per_round)
        if not within and done in self.rounds:
            logging = control.should_log  # of the round, which what is logged here would settle
            self.evaluate(done)
            control.should_log = logging
            if self.stopped is not None:
                control.should_training_stop = control.should_save = True

    def evaluate(self, done: int) -> None:
        """Evaluate after `done` rounds, and keep the adapter if it is the best so far."""
        process, model = self.trainer.accelerator, self.trainer.accelerator.unwrap_model(self.trainer.model)
        mine = [*range(process.process_index, len(self.prompts), process.num_processes)]
        with undisturbed(model):
            found = self._measured(model, mine, first=not done)
            if process.num_processes > 1:
                found = sorted(gather_object(found), key=lambda row: row["prompt"])
            line = self._line(done, found)
            self.lines.append(line)
            if self.kept == done:
                self.best = {name: p.detach().cpu().clone() for name, p in _trained(model)}
            if self.trainer.args.report_to:
                names = ("reward", "kl", "objective")
                self.trainer.log({f"eval_{name}": line[name] for name in names})
        if self.trainer.state.is_world_process_zero:
            self.write()
            if self.progress:
                tqdm.write(f"alignpro: {told(line)}", file=sys.stderr)

    def _measured(self, model: Any, mine: Sequence[int], first: bool) -> list[dict[str, Any]]:
        """Rewards and log-ratios of each draw of the prompts at `mine`."""
        if not mine and not is_sharded(model):
            return []
        # With shards the other processes wait for this one at each pass, though it has no prompt.
        how, xs = self.how, [self.prompts[i] for i in mine or [0]]
        n = how.first if first else how.eval_draws
        ids = [self.prompt_ids(x) for x in xs]
        keys = [
            [sample_key("evaluation", self.settings.seed, list(row), draw) for draw in range(n)]
            for row in ids
        ]
        # As the prompter is used later, whatever it is sampled with while it is trained.
        sampling = Sampling(max_tokens=self.settings.max_tokens)
        pad = self.trainer.processing_class.pad_token_id
        with gathered(model):
            drawn = [pair for row in sample_and_score(model, pad, ids, keys, sampling) for pair in row]
        starts, tokens = [row for row in ids for _ in range(n)], [said for said, _ in drawn]
        values = [math.fsum(each) for _, each in drawn]
        with torch.no_grad():
            if self.trainer.rescored:
                values = log_probs(model, starts, tokens).log_probs.double().sum(1).tolist()
            with model.disable_adapter():
                before = log_probs(model, starts, tokens).log_probs.double().sum(1).tolist()
        if not mine:
            return []
        asked, draws = [x for x in xs for _ in range(n)], [*range(n)] * len(xs)
        texts = [self.said(x, tuple(said)).text for x, said in zip(asked, tokens, strict=True)]
        scores, answers = self.environment.answered(asked, texts, draws)
        again = scores.total
        if first and how.eval_proposals > 1 and self.environment.target is not None:
            # Weights and what they earn are to be judged by other answers.
            again = self.environment.score(asked, texts, [n + draw for draw in draws])
        rows = []
        for k, i in enumerate(mine):
            at = slice(k * n, (k + 1) * n)
            row: dict[str, Any] = {"prompt": i, "rewards": scores.total[at].tolist()}
            row["ratios"] = [a - b for a, b in zip(values[at], before[at], strict=True)]
            row |= {"again": again[at].tolist(), "text": texts[at.start], "answer": answers[at.start]}
            rows.append(row)
        return rows

    def _line(self, done: int, found: Sequence[dict[str, Any]]) -> Line:
        """The evaluation as its file holds it; `best` is the best one's round, this one included."""
        how, lam, oracle = self.how, self.settings.lam, self.environment.target is None
        each = np.array([(r["rewards"][: how.eval_draws], r["ratios"][: how.eval_draws]) for r in found])
        rewards, ratios = each.mean(2).T
        worth = rewards - lam * ratios
        line: Line = {"round": done, "step": done * self.settings.steps_per_round}
        for name, values in (("reward", rewards), ("kl", ratios), ("objective", worth)):
            line |= {name: float(values.mean()), f"{name}_stderr": _error(values)}
        line["best"] = done
        if self.lines:
            best = next(e for e in self.lines if e["round"] == self.kept)
            gains = worth - np.array(best["objectives"])
            line |= {"gain": float(gains.mean()), "gain_stderr": _error(gains)}
            line["best"] = done if line["gain"] > 0 else best["round"]
        elif how.eval_proposals > 1:
            line["proposals"] = {
                "rewards": [r["rewards"] for r in found],
                "again": [r["again"] for r in found],
            }
        line["objectives"] = worth.tolist()
        line["examples"] = [
            {
                "prompt": as_json(self.prompts[row["prompt"]]),
                "rewrite": None if oracle else row["text"],
                "answer": row["answer"],
                "reward": row["rewards"][0],
            }
            for row in found[:MOST_EXAMPLES]
        ]
        return line

    def save(self, folder: Path) -> None:
        """Write the evaluations so far and the best adapter into a checkpoint."""
        write_json(folder / CHOSEN_FILE, self.lines)
        save_file(self.best, folder / BEST_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.lines = read_json(folder / CHOSEN_FILE)
        self.best = load_file(folder / BEST_FILE)

    @torch.no_grad()
    def restore(self, model: Any) -> None:
        """Give the policy the adapter of the best evaluation."""
        for name, parameter in _trained(model):
            parameter.copy_(self.best[name])

    def write(self) -> None:
        """Write the results to their file."""
        claim(self.path)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))


def told(line: Line) -> str:
    """An evaluation in a line of text."""
    names = ("objective", "reward", "kl")
    said = ", ".join(f"{name} {line[name]:.4f} ± {line[f'{name}_stderr']:.4f}" for name in names)
    best = "the best so far" if line["best"] == line["round"] else f"best after round {line['best']}"
    return f"held-out prompts after round {line['round']}: {said}; {best}"


def _error(values: np.ndarray) -> float:
    """Standard error of the mean over prompts."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _trained(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The adapter's weights by name."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Read a model outside of training, and leave it and every random state as they were."""
    training, cuda = model.training, torch.cuda.is_available()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - others use it
    devices = torch.cuda.get_rng_state_all() if cuda else []
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(devices)
