"""`alignpro resample`."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from tqdm import tqdm

from alignpro.commands import pages
from alignpro.commands.shared import (
    _BLOCK,
    _check_target_room,
    _home,
    _kept,
    _money,
    check_environment,
    check_prompter,
    open_target,
    user_prompts,
)
from alignpro.errors import AlignProError
from alignpro.files import read_json, writable_folder, write_json, write_text
from alignpro.llm.models import packages
from alignpro.llm.policies.prompter import (
    Prompter,
)
from alignpro.llm.rewards import opening
from alignpro.llm.training.settings import EnvironmentSettings, PromptSettings
from alignpro.report import keep
from alignpro.runs import refuse_other_settings


def run_resample(
    out: str,
    world: EnvironmentSettings,
    *,
    prompter: str,
    template: str | None,
    source: PromptSettings,
    split: str,
    prompts: int | None,
    proposals: int,
    responses: int,
    rewrite_tokens: int | None,
    lam: Sequence[float],
    draws: int,
    seed: int,
) -> None:
    """Everything is checked before anything is loaded; proposals on file are kept."""
    from alignpro.llm.arms import resample
    from alignpro.llm.rewards.endpoint import keep_scores
    from alignpro.llm.rewards.names import shown_name

    prompter, folder = _home(prompter), writable_folder(out)
    for name, value, least in (
        ("proposals", proposals, 1),
        ("responses", responses, 1),
        ("draws", draws, 0),
        ("seed", seed, 0),
        ("rewrite-tokens", 1 if rewrite_tokens is None else rewrite_tokens, 1),
    ):
        if value < least:
            raise AlignProError(f"--{name} {value}: give at least {least}")
    if not lam or not all(0 < value < float("inf") for value in lam):
        raise AlignProError(f"--lam {' '.join(map(str, lam))}: give positive, finite numbers")
    check_prompter(prompter, template)
    opened, cost = check_environment(world)
    xs = user_prompts(source, prompter, split, prompts)
    record = {
        "prompter": prompter,
        "template": template,
        "rewrite_tokens": rewrite_tokens,
        "proposals": proposals,
        "responses": responses,
        "seed": seed,
        "target": world.target,
        "target_model": world.target_model,
        "dtype": world.dtype,
        "reward": shown_name(world.reward),
        "sampling": asdict(world.sampling()),
        "chat_template_kwargs": world.chat_options() or {},
    }
    begun, path = folder / "settings.json", folder / "proposals.jsonl"
    if begun.exists():
        refuse_other_settings(folder, read_json(begun), record, "--out")
    found = {p.prompt: p for p in resample.load_proposals(path)} if path.exists() else {}
    todo = [x for x in xs if x not in found]
    kept = f" ({len(xs) - len(todo)} kept)" if len(todo) < len(xs) else ""
    asked = len(todo) * proposals * responses
    line = f"{len(xs)} prompts{kept}: {len(todo) * proposals} rewrites, at most {asked} answers of at most "
    line += f"{world.answer_tokens} tokens"
    packages.note(line + _money(cost, asked, world.answer_tokens))
    write_json(begun, record)
    if todo:
        from alignpro.llm.training.open_ended import Environment

        target = _kept(opened or open_target(world), folder / "answers", cost)
        judge = keep_scores(opening.load_reward(world.reward), folder / "scores")
        environment = Environment(judge, target, world.sampling(), responses, seed)
        _check_target_room(target.target, todo, world.answer_tokens)
        rho = Prompter.from_pretrained(prompter, template=template, chat_template_kwargs=world.chat_options())
        rho.max_tokens = rewrite_tokens or rho.max_tokens
        rho.prompt_ids(todo)  # all have room, before the first is drawn
        for start in tqdm(range(0, len(todo), _BLOCK), unit="block", disable=None):
            block = todo[start : start + _BLOCK]
            for p in resample.propose(rho, environment, block, proposals, seed=seed):
                found[p.prompt] = p
            resample.save_proposals(path, list(found.values()))
        packages.note(target.ledger.line())
    print(resample.table([found[x] for x in xs], lam))
    keep.keep(pages.report_of_resample([found[x] for x in xs], lam, record), folder)
    if draws:
        rows = [
            {"x": x, "lam": value, "draw": i, "rewrite": rewrite}
            for value in lam
            for x in xs
            for i, rewrite in enumerate(resample.resample(found[x], value, draws, seed=seed))
        ]
        write_text(
            folder / "rewrites.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        print(f"wrote {folder / 'rewrites.jsonl'}")
    print(f"wrote {path}")
