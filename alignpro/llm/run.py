"""What `alignpro train` and `alignpro rewrite` do: open what was named, say what it will cost, run."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import writable_folder
from alignpro.llm import data, models, packages, rewards
from alignpro.llm.frozen import Sampling, Target
from alignpro.llm.ledger import Cached, Prices
from alignpro.llm.prompter import PROMPTER_FILE, Prompter
from alignpro.llm.settings import TrainSettings, refuse_moved_optimum

# Of a rewrite in its chat template, for the estimate of costs.
_PROMPT_TOKENS = 64


def is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def open_target(target: str, *, dtype: str, batch_size: int, endpoint: Mapping[str, Any]) -> Target:
    """A model in this process, or an OpenAI-compatible endpoint where `target` is an address.

    Args:
        endpoint: fields of `endpoint.Endpoint` besides base_url; `model` is required for one.

    Raises:
        AlignProError: an endpoint without the name of its model, or a model with an endpoint's settings.
    """
    given = {name: value for name, value in endpoint.items() if value is not None}
    if not is_address(target):
        if given:
            raise AlignProError(
                f"{next(iter(given))}: is for an endpoint, and {target!r} is no http(s) address"
            )
        from alignpro.llm.local import LocalTarget

        return LocalTarget(target, dtype=dtype, batch_size=batch_size)
    from alignpro.llm.endpoint import Endpoint

    if "model" not in given:
        raise AlignProError(f"target_model: name the model that {target} serves")
    return Endpoint(base_url=target, **given)


def user_prompts(dataset: str, prompts_file: str | None) -> list[str]:
    """The user's prompts: one per line of the file, or the training split of a row of `data.DATASETS`."""
    if prompts_file is not None:
        path = Path(prompts_file)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise AlignProError(f"prompts_file {path}: cannot read it ({reason}); name a text file") from None
        kept = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not kept:
            raise AlignProError(f"prompts_file {path}: holds no prompts; put one on each line")
        return kept
    if dataset not in data.DATASETS:
        raise AlignProError(
            f"dataset {dataset!r}: choose from {', '.join(data.DATASETS)}, or give prompts_file"
        )
    return [x for x in data.DATASETS[dataset]() if data.split_of(x) == "train"]


def run_train(
    out: str,
    settings: TrainSettings,
    *,
    prompter: str,
    target: str,
    answers: Sampling,
    reward: str,
    dataset: str,
    prompts_file: str | None,
    dtype: str,
    batch_size: int,
    endpoint: Mapping[str, Any],
    prices: Sequence[float] | None,
    report_to: Sequence[str],
    resume: bool,
) -> None:
    """Everything is checked before anything is loaded."""
    refuse_moved_optimum(settings)
    folder = writable_folder(out)
    started = (folder / "settings.json").exists()
    if started and not resume:
        raise AlignProError(
            f"--out {folder}: holds a run already; continue it with --resume or choose another"
        )
    if not (Path(prompter).expanduser() / PROMPTER_FILE).is_file():
        models.check_name(prompter)
    rlhf = settings.task == "rlhf"
    opened: Target | None = None
    if is_address(target) and not rlhf:
        opened = open_target(target, dtype=dtype, batch_size=batch_size, endpoint=endpoint)
    elif not rlhf:
        models.check_name(target)
    rewards.check_name(reward)
    cost = Prices(*prices) if prices is not None else None
    prompts = user_prompts(dataset, prompts_file)

    from alignpro.llm.train import Environment, train

    rounds, each = settings.iterations, settings.prompts * settings.samples
    asked = 0 if rlhf else rounds * each * settings.responses
    line = f"{len(prompts)} prompts; {rounds} rounds of {settings.prompts} x {settings.samples} "
    line += "answers" if rlhf else f"rewrites, {asked} answers of at most {answers.max_tokens} tokens"
    line += f"; {rounds * settings.steps_per_round} {settings.algorithm} steps"
    if cost is not None and asked:
        most = cost.cost(asked * _PROMPT_TOKENS, asked * answers.max_tokens)
        line += f"; about {most:.2f} at most for answers, at {_PROMPT_TOKENS} tokens a prompt"
    packages.note(line)

    judge = rewards.load_reward(reward)
    world: Cached | None = None
    if not rlhf:
        opened = opened or open_target(target, dtype=dtype, batch_size=batch_size, endpoint=endpoint)
        world = Cached(opened, folder / "answers", prices=cost, note=None)
    facts = {"prompter": prompter, "target": target, "reward": reward, "answers": asdict(answers)}
    base = Prompter.from_pretrained(prompter, dtype="float32")
    environment = Environment(judge, world, answers, settings.responses, settings.seed)
    trained = train(
        base, environment, prompts, settings, folder, resume=resume, report_to=report_to, facts=facts
    )
    if world is not None:
        packages.note(world.ledger.line())
    last = trained.metrics[-1]
    first = trained.metrics[0]
    print(f"mean reward of a round: {first['score']:.4f} at first, {last['score']:.4f} at last")
    print(f"wrote {folder / 'prompter'}")


def run_rewrite(
    prompter: str, prompts: Sequence[str], samples: int, seed: int, max_tokens: int | None, as_json: bool
) -> None:
    """Prompts from the arguments, or one per line of standard input."""
    given = list(prompts) or [line.strip() for line in sys.stdin if line.strip()]
    if not given:
        raise AlignProError("prompts: none given; name some, or write one per line to standard input")
    if samples < 1:
        raise AlignProError(f"--samples {samples}: give at least 1")
    opened = Prompter.from_pretrained(prompter)
    if max_tokens is not None:
        if max_tokens < 1:
            raise AlignProError(f"--max-tokens {max_tokens}: give at least 1")
        opened.max_tokens = max_tokens
    for x, row in zip(given, opened.rewrites(given, samples, seed=seed), strict=True):
        for rewrite in row:
            print(json.dumps({"x": x, "rewrite": rewrite}, ensure_ascii=False) if as_json else rewrite)
