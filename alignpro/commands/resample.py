"""`alignpro resample`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.options import EnvironmentSettings, PromptSettings
from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.report import keep

if TYPE_CHECKING:
    from alignpro.llm.arms.resample import Proposals, Resampled

from dataclasses import asdict

from tqdm import tqdm

from alignpro.commands.shared_llm import (
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
from alignpro.files import writable_folder, write_json, write_text
from alignpro.llm.models import packages
from alignpro.llm.policies.prompter import (
    Prompter,
)
from alignpro.llm.rewards import opening
from alignpro.report.numbers import interval, number
from alignpro.report.page import MOST_PROMPTS, Dots, Json, Page, Table, dot
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
    from alignpro.llm.arms import resample as arms_resample
    from alignpro.llm.rewards.cached import keep_scores

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
        "reward": opening.read_spec(world.reward).shown,
        "sampling": asdict(world.sampling()),
        "chat_template_kwargs": world.chat_options() or {},
    }
    begun, path = folder / "settings.json", folder / "proposals.jsonl"
    if begun.exists():
        refuse_other_settings(folder, read_json(begun), record, "--out")
    found = {p.prompt: p for p in arms_resample.load_proposals(path)} if path.exists() else {}
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
            for p in arms_resample.propose(rho, environment, block, proposals, seed=seed):
                found[p.prompt] = p
            arms_resample.save_proposals(path, list(found.values()))
        packages.note(target.ledger.line())
    print(text(arms_resample.resampled([found[x] for x in xs], lam)))
    keep.keep(report_of_resample([found[x] for x in xs], lam, record), folder)
    if draws:
        rows = [
            {"x": x, "lam": value, "draw": i, "rewrite": rewrite}
            for value in lam
            for x in xs
            for i, rewrite in enumerate(arms_resample.resample(found[x], value, draws, seed=seed))
        ]
        write_text(
            folder / "rewrites.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        print(f"wrote {folder / 'rewrites.jsonl'}")
    print(f"wrote {path}")


def text(result: "Resampled") -> str:
    """The gains over ρ_sft, a line for each λ and each n."""
    lines = [f"rho_sft: mean reward {result.prior:.4f}, by R̂ as all below"]
    lines.append(f"{'':>10}  {'gain':>8}  {'KL, nats':>8}  effective sample size of {result.n}")
    for e in result.tilted:
        few = f"; too few on {e.few} of {len(result.rewrites)} prompts" if e.few else ""
        lines.append(f"{f'lam {e.lam:g}':>10}  {e.gain.value:>+8.4f}  {e.kl:>8.3f}  {e.ess:.1f}{few}")
    for best in result.best:
        kl = f"≤ {best.kl_bound:.3f}"
        lines.append(f"{f'best of {best.n}':>10}  {best.gain.value:>+8.4f}  {kl:>8}")
    lines.append("R̂ chose, so these gains are optimistic: alignpro rollout --arms star best_of_n asks afresh")
    return "\n".join(lines)


def report_of_resample(proposals: Sequence["Proposals"], lams: Sequence[float], record: Json) -> Page:
    """Of proposals.jsonl at each λ, and of settings.json beside it."""
    import numpy as np

    from alignpro.estimation.intervals import LEAST_PROMPTS, bootstrap_t
    from alignpro.llm.arms.resample import best_of_n, star

    n = min(len(p.rewrites) for p in proposals)
    prior = np.array([np.mean(p.rewards) for p in proposals])

    def gain(values: list[float]) -> dict[str, float | None]:
        each = np.array(values) - prior
        lo, hi = bootstrap_t(each, 0.95) if len(each) >= LEAST_PROMPTS else (None, None)
        return {"value": each.mean(), "lo": lo, "hi": hi}

    rows, dots = [], []
    for lam in lams:
        found = [star(p, lam) for p in proposals]
        e, few = gain([s.value for s in found]), sum(bool(s.warning) for s in found)
        kl, ess = fmean(s.kl for s in found), fmean(s.ess for s in found)
        remark = f"too few on {few} of {len(found)} prompts" if few else "–"
        rows.append((f"λ = {number(lam)}", interval(e), number(kl, ".3f"), number(ess, ".1f"), remark))
        dots.append(dot(rows[-1][0], e, "reweighted to ρ*"))
    for size in sorted({2**i for i in range(1, n.bit_length())} | {n}):
        e, bound = (
            gain([best_of_n(p, size).values[-1] for p in proposals]),
            math.log(size) - (size - 1) / size,
        )
        rows.append((f"best of {size}", interval(e), f"≤ {bound:.3f}", "–", "–"))
        dots.append(dot(rows[-1][0], e, "best of n"))
    page = Page(
        "resample",
        "The training-free prompter",
        "Rewrites drawn from ρ_sft and reweighted to ρ*, or cut to the best of n. R̂ chose, so these "
        "gains are optimistic: alignpro rollout --arms star best_of_n asks afresh.",
        {**record, "lambda": list(lams)},
    )
    page.key("Mean reward of ρ_sft", number(float(prior.mean())), "by R̂")
    for row in rows[:2]:
        page.key(f"Gain, {row[0]}", row[1].split(" [")[0], f"KL {row[2]} nats")
    page.key("Prompts", number(len(proposals)), f"{n} rewrites of each")
    page.add(
        "Gains over ρ_sft",
        "In reward units, with 95% intervals over prompts where there are enough of them; KL to ρ_sft in "
        f"nats, and the effective sample size of {n}.",
        Table("how | gain | KL | effective sample size | remarks", rows, "wnnnw"),
        Dots("Gain over ρ_sft, by R̂", "reward units, 95% intervals", dots, [(0.0, "no gain")]),
    )
    texts = []
    for p, mean in zip(proposals[:MOST_PROMPTS], prior.tolist(), strict=False):
        best = max(range(len(p.rewrites)), key=p.rewards.__getitem__)
        texts.append((p.prompt, p.rewrites[best], number(p.rewards[best]), number(mean)))
    page.add(
        "Rewrites",
        f"The one of largest R̂ for {len(texts)} of {len(proposals)} prompts, beside the mean R̂ of all.",
        Table("prompt | best rewrite | its R̂ | mean R̂", texts, "ttnn"),
    )
    return page


@dataclass(frozen=True)
class Resample:
    """The training-free prompter: draw rewrites from rho_sft, judge them, reweight to rho* or keep the best.

    Prints what each lambda, and best-of-n, would gain. Interrupt at any time; the same command continues.
    """

    out: str
    """Folder for proposals.jsonl, report.html, the answers paid for, and rewrites.jsonl."""
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    prompter: str = "smollm2-135m-instruct"
    """rho_sft: a packaged name, a local folder, a hub id, or a prompter's folder."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A trained prompter
    has its own. Default: rewrite."""
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    split: str = "test"
    """Of the data set: train, validation or test."""
    prompts: int | None = None
    """How many of them, from the first. Default: all."""
    proposals: int = 16
    """Rewrites drawn for each prompt."""
    responses: int = 1
    """Answers that judge each distinct one."""
    rewrite_tokens: int | None = None
    """Tokens of a rewrite, at most. Default: the prompter's own."""
    lam: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Each lambda to reweight by, in units of the reward."""
    draws: int = 0
    """Rewrites of each prompt to resample at each lambda, into rewrites.jsonl."""
    seed: int = 0
    """Determines rewrites and answers."""

    def run(self) -> int:
        run_resample(
            self.out,
            self.environment,
            prompter=self.prompter,
            template=self.template,
            source=self.source,
            split=self.split,
            prompts=self.prompts,
            proposals=self.proposals,
            responses=self.responses,
            rewrite_tokens=self.rewrite_tokens,
            lam=self.lam,
            draws=self.draws,
            seed=self.seed,
        )
        return 0
