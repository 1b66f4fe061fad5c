"""`alignpro train`."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from alignpro.commands import pages
from alignpro.commands.shared import (
    _home,
    _how_read,
    _kept,
    _money,
    check_environment,
    check_prompter,
    is_address,
    open_target,
    user_prompts,
)
from alignpro.errors import AlignProError
from alignpro.files import read_json, writable_folder
from alignpro.llm.models import configure, packages
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards import opening
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.training.checkpoints import check_reporters
from alignpro.llm.training.settings import (
    EnvironmentSettings,
    PromptSettings,
    TrainSettings,
    refuse_moved_optimum,
)
from alignpro.report import keep


def run_train(
    out: str,
    settings: TrainSettings,
    world: EnvironmentSettings,
    *,
    prompter: str,
    template: str | None = None,
    source: PromptSettings,
    train_prompts: int | None = None,
    report_to: Sequence[str],
    resume: bool,
) -> None:
    """Everything is checked before anything is loaded."""
    prompter = _home(prompter)
    refuse_moved_optimum(settings)
    check_reporters(report_to)
    folder = writable_folder(out)
    started = (folder / "settings.json").exists()
    if started and not resume:
        raise AlignProError(
            f"--out {folder}: holds a run already; continue it with --resume or choose another"
        )
    check_prompter(prompter, template)
    configure.check_dtype(settings.policy_dtype)
    answers, rlhf = world.sampling(), settings.task == "rlhf"
    # The oracle is its own target.
    opened, cost = check_environment(replace(world, target=prompter) if rlhf else world)
    prompts = user_prompts(source, prompter, n=train_prompts)

    from alignpro.llm.rewards.endpoint import CachedReward, keep_scores
    from alignpro.llm.rewards.names import shown_name
    from alignpro.llm.training.open_ended import Environment, train

    rounds, each = settings.iterations, settings.prompts * settings.samples
    asked = 0 if rlhf else rounds * each * settings.responses
    line = f"{len(prompts)} prompts; {rounds} rounds of {settings.prompts} x {settings.samples} "
    line += "answers" if rlhf else f"rewrites, {asked} answers of at most {answers.max_tokens} tokens"
    line += f"; {rounds * settings.steps_per_round} {settings.algorithm} steps"
    if is_address(world.reward):
        line += f"; {asked or rounds * each} scores from an endpoint"
    packages.note(line + _money(cost, asked, answers.max_tokens))

    judge = keep_scores(opening.load_reward(world.reward), folder / "scores")
    target: Cached | None = None
    read: dict[str, Any] = {}
    if not rlhf:
        frozen = opened or open_target(world)
        read = _how_read(frozen)
        target = _kept(frozen, folder / "answers", cost)
    facts = {
        "prompter": prompter,
        "target_read": read,
        "chat_template_kwargs": world.chat_options() or {},
        "template": template,
        "target": world.target,
        "reward": shown_name(world.reward),
        "answers": asdict(answers),
    }
    base = Prompter.from_pretrained(
        prompter,
        template=template,
        dtype=settings.policy_dtype,
        chat_template_kwargs=world.chat_options(),
        merged=True,
    )
    environment = Environment(judge, target, answers, settings.responses, settings.seed)
    trained = train(
        base, environment, prompts, settings, folder, resume=resume, report_to=report_to, facts=facts
    )
    if target is not None:
        packages.note(target.ledger.line())
    if isinstance(judge, CachedReward):
        packages.note(judge.line())
    if not trained.metrics:  # of several processes the first one tells
        return
    first, last = trained.metrics[0], trained.metrics[-1]
    print(f"mean reward of a round: {first['score']:.4f} at first, {last['score']:.4f} at last")
    print(f"wrote {folder / 'prompter'}")
    keep.keep(pages.report_of_train(trained.metrics, read_json(folder / "settings.json")), folder)
