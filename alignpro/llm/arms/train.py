"""Training in one call: names or objects in, the trained prompter out."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data.own import read_prompts
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards.bounds import Declared
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.rewards.reward import Reward
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.target import Target
from alignpro.llm.training import open_ended
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.settings import EvaluationSettings, TrainSettings, refuse_moved_optimum


def train(
    prompts: Sequence[str] | Path,
    *,
    reward: Reward | str | Callable[[list[str], list[str]], Sequence[float]],
    target: Target | str,
    prompter: Prompter | str = "smollm2-135m-instruct",
    out: str | Path = "runs/train",
    reward_range: tuple[float, float] = (0.0, 1.0),
    answers: Sampling | None = None,
    held_out: Sequence[str] = (),
    eval_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> open_ended.TrainedPrompter:
    """Train a prompter on prompts of your own, against a frozen model and a reward.

    The same run as `alignpro train`: everything it writes is in `out`. After an exception, of the reward or
    of anything else, the same `Prompter` can be given again.

    Args:
        prompts: the users' prompts, or the path of a file that `read_prompts` reads.
        reward: the name of one (`load_reward`), a `Reward`, or a function of prompts and answers, two lists
            of strings, that gives a number for each, in `reward_range`.
        target: the frozen model: the name or folder of one to load, or a `Target` such as an `Endpoint`.
        prompter: ρ_sft: the name or folder of a model, or a `Prompter` without an adapter.
        out: folder of the run.
        reward_range: the least and the largest number that a function may give; Theorem 1 needs them.
        answers: how the frozen model decodes; `Sampling()` if None, its own distribution.
        held_out: prompts never learned from, to evaluate on.
        eval_every: rounds between evaluations on `held_out`, the best of which decides what is kept. Left
            out: every fourth where there are held-out prompts, otherwise none.
        resume: continue the run in `out`; without one there it is begun.
        progress: whether a terminal sees a bar.
        settings: fields of `TrainSettings`, by their names or by those on the command line, such as lam,
            iterations, draws, prompts_per_round or learning_rate.

    Raises:
        AlignProError: a bad argument, or a setting that moves the optimum unless allow_moved_optimum is true.
    """
    flags = {flag: name for name, flag in TrainSettings.flags.items()}
    settings = {flags.get(name, name): value for name, value in settings.items()}
    known = [field.name for field in dataclasses.fields(TrainSettings)]
    if unknown := sorted(set(settings) - set(known)):
        raise AlignProError(f"{unknown[0]}: is no setting of training; choose from {', '.join(known)}")
    if isinstance(prompts, str):
        raise AlignProError(f"prompts {prompts!r}: give a list of prompts, or the Path of a file")
    given = read_prompts(prompts) if isinstance(prompts, Path) else list(prompts)
    settings.setdefault("prompts", max(1, min(TrainSettings.prompts, len(set(given)))))
    chosen = TrainSettings(**settings).here()
    refuse_moved_optimum(chosen)
    if eval_every is None and held_out:
        eval_every = 4
    return open_ended.train(
        _prompter(prompter, chosen),
        Environment(
            _reward(reward, reward_range),
            _target(target),
            answers or Sampling(),
            chosen.responses,
            chosen.seed,
        ),
        given,
        chosen,
        out,
        held_out=held_out,
        evaluation=EvaluationSettings(eval_every=eval_every),
        resume=resume,
        progress=progress,
    )


def _prompter(given: Prompter | str, settings: TrainSettings) -> Prompter:
    if isinstance(given, Prompter):
        return given
    return Prompter.from_pretrained(given, dtype=settings.policy_dtype, merged=True)


def _reward(given: Any, bounds: tuple[float, float]) -> Reward:
    if isinstance(given, str):
        return load_reward(given)
    if hasattr(given, "score"):
        return given
    if not callable(given):
        raise AlignProError(f"reward: {type(given).__name__} is none; give a name, a Reward or a function")
    return CallableReward(given, Declared(*bounds))


def _target(given: Target | str) -> Target:
    if not isinstance(given, str):
        return given
    if given.startswith(("http://", "https://")):
        raise AlignProError(f"target {given!r}: give an Endpoint, which says which model it serves")
    return LocalTarget(given)
