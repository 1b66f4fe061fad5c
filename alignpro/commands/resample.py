"""`alignpro resample`: the training-free prompter."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from alignpro.commands.options import (
    EnvironmentSettings,
    MeasuredPrompts,
    PrompterOptions,
    RunOptions,
    SeedOption,
)
from alignpro.commands.shared import REWARD_FILE, check_least, with_reward
from alignpro.errors import AlignProError
from alignpro.files import read_json, write_text
from alignpro.report import keep
from alignpro.report.numbers import interval, number
from alignpro.report.page import MOST_PROMPTS, Dots, Json, Page, Table, dot
from alignpro.runs import claim, here, owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.commands.opening import World
    from alignpro.llm.arms.resample import Proposals, Resampled

FILE = "proposals.jsonl"
BLOCK = 32
"""Prompts proposed for between two writes of proposals.jsonl."""
_CURSE = "R̂ chose, so these gains are optimistic: alignpro rollout --arms star best_of_n asks afresh"


@dataclass(frozen=True, kw_only=True)
class Resample(SeedOption, PrompterOptions, RunOptions):
    """The training-free prompter: draw rewrites from rho_sft, judge them, reweight to rho* or keep the best.

    Prints what each lambda, and best-of-n, would gain. Interrupt at any time; the same command continues.
    """

    out: str
    """Folder for proposals.jsonl, report.html, the answers paid for, and rewrites.jsonl."""
    proposals: int = 16
    """How many rewrites of rho_sft each prompt's are resampled from. More come closer to rho*, the optimal
    prompter, and cost as many answers."""
    proposal_answers: int = 1
    """How many answers of the frozen model judge each distinct proposal; more make its reward less noisy."""
    rewrite_tokens: int | None = None
    """The most tokens of one rewrite. Left out: as many as the prompter was made for."""
    lam: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Weights of the KL divergence in prompt optimization (lambda) to resample at, positive, in reward units:
    the smaller, the further rewrites go from what rho_sft would write."""
    draws: int = 0
    """How many rewrites of each prompt to draw, at each lambda, into rewrites.jsonl; 0 writes none."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[MeasuredPrompts] = field(default_factory=MeasuredPrompts)

    renamed: ClassVar = {"responses": "proposal-answers"}
    common = (
        "out prompter reward target dataset prompts-file prompts split lam proposals proposal-answers draws "
        "rewrite-tokens answer-tokens seed config"
    )
    examples = (
        (
            "what choosing among 16 rewrites of each of 50 prompts gains",
            "alignpro resample --out runs/free --prompter instructions-sft --reward ease --prompts 50",
        ),
        (
            "more proposals, and four rewrites of each prompt at one lambda on file",
            "alignpro resample --out runs/free --proposals 64 --lam 0.05 --draws 4 --prompts-file mine.csv",
        ),
    )

    @owning("resample")
    def run(self) -> int:
        from alignpro.commands.opening import World, trained_home, user_prompts
        from alignpro.llm.arms import resample
        from alignpro.llm.models import packages
        from alignpro.llm.models.prompt import said
        from alignpro.llm.policies.prompter import check_prompter

        prompter, environment = trained_home(self.prompter), self.environment
        run, folder = here(self.out), Path(self.out)
        check_least(1, proposals=self.proposals, proposal_answers=self.proposal_answers)
        check_least(1, rewrite_tokens=self.rewrite_tokens)
        check_least(0, draws=self.draws, seed=self.seed)
        if not self.lam or not all(0 < value < math.inf for value in self.lam):
            raise AlignProError(f"--lam {' '.join(map(str, self.lam))}: give positive, finite numbers")
        check_prompter(prompter, self.template)
        world = World(environment)
        xs = user_prompts(self.source, prompter, self.source.split, self.source.prompts, world)
        world.check_prompts(xs)
        kept_as = ("template", "rewrite_tokens", "proposals", "seed")
        # On file under the name that it had at first, so that runs of then can be continued.
        record = {"prompter": prompter, "responses": self.proposal_answers}
        record |= {name: getattr(self, name) for name in kept_as}
        record |= environment.record(world.reward_name)
        path = folder / FILE
        run.contents |= world.contents(prompter=prompter)
        run.begin(record, names=(FILE,))
        found = {p.prompt: p for p in resample.load_proposals(path)} if path.exists() else {}
        todo = [x for x in xs if x not in found]
        kept = f" ({len(xs) - len(todo)} kept)" if len(todo) < len(xs) else ""
        asked, tokens = len(todo) * self.proposals * self.proposal_answers, environment.answer_tokens
        packages.note(
            f"{len(xs)} prompts{kept}: {len(todo) * self.proposals} rewrites, at most {asked} answers of at "
            f"most {tokens} tokens{world.money(asked, tokens)}"
        )
        if todo:
            self._propose(world, prompter, folder, todo, found)
        else:
            world.tell_again(folder)
        proposals = [found[x] for x in xs]
        described = read_json(folder / REWARD_FILE, dict)
        result = resample.resampled(proposals, self.lam, described["high"] - described["low"])
        say(text(result))
        made = page(result, {**record, "lambda": list(self.lam)})
        keep.keep(with_reward(made, folder), folder)
        if self.draws:
            rows = [
                {**said(p.prompt), "lam": value, "draw": i, "rewrite": rewrite}
                for value in self.lam
                for p in proposals
                for i, rewrite in enumerate(resample.resample(p, value, self.draws, seed=self.seed))
            ]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / "rewrites.jsonl", lines, private=True)
            say(f"wrote {folder / 'rewrites.jsonl'}")
        say(f"wrote {path}")
        return 0

    def _propose(
        self, world: "World", prompter: str, folder: Path, todo: list[str], found: dict[str, "Proposals"]
    ) -> None:
        """Proposals for the prompts `todo`, into `found` and, block by block, on file."""
        from tqdm import tqdm

        from alignpro.commands.opening import check_target_room
        from alignpro.llm.arms import resample
        from alignpro.llm.models import packages
        from alignpro.llm.policies.prompter import Prompter
        from alignpro.llm.training.environment import Environment

        environment = self.environment
        frozen = world.target()
        target, judge = world.kept(frozen, folder), world.reward(folder)
        worth = Environment(
            judge, target, environment.sampling(), self.proposal_answers, self.seed, world.refusals
        )
        check_target_room(frozen, todo, environment.answer_tokens)
        options = environment.chat_options()
        rho = Prompter.from_pretrained(prompter, template=self.template, chat_template_kwargs=options)
        rho.max_tokens = self.rewrite_tokens or rho.max_tokens
        rho.prompt_ids(todo)  # all have room, before the first is drawn
        for start in tqdm(range(0, len(todo), BLOCK), unit="block", disable=None):
            block = todo[start : start + BLOCK]
            for p in resample.propose(rho, worth, block, self.proposals, seed=self.seed):
                found[p.prompt] = p
            claim(folder)
            resample.save_proposals(folder / FILE, list(found.values()))
        packages.note(target.ledger.line())
        world.told(judge, folder)


def text(result: "Resampled") -> str:
    lines = [f"rho_sft: mean reward {result.prior:.4f}, by R̂ as all below"]
    lines.append(f"{'':>10}  {'gain':>8}  {'KL, nats':>8}  effective sample size of {result.n}")
    for at in result.tilted:
        few = f"; too few on {at.few} of {len(result.rewrites)} prompts" if at.few else ""
        name = f"lam {at.lam:g}"
        lines.append(f"{name:>10}  {at.gain.value:>+8.4f}  {at.kl:>8.3f}  {at.ess:.1f}{few}")
    for best in result.best:
        name, bound = f"best of {best.n}", f"≤ {best.kl_bound:.3f}"
        lines.append(f"{name:>10}  {best.gain.value:>+8.4f}  {bound:>8}")
    return "\n".join([*lines, _CURSE])


def page(result: "Resampled", record: Json) -> Page:
    """Gains at each λ and of the best of n, and the best rewrites; `record` is how they were drawn."""
    prompts = len(result.rewrites)
    rows, dots = [], []
    for at in result.tilted:
        remark = f"too few on {at.few} of {prompts} prompts" if at.few else "–"
        name = f"λ = {number(at.lam)}"
        rows.append((name, interval(at.gain), number(at.kl, ".3f"), number(at.ess, ".1f"), remark))
        dots.append(dot(name, at.gain, "reweighted to ρ*"))
    for best in result.best:
        name = f"best of {best.n}"
        rows.append((name, interval(best.gain), f"≤ {best.kl_bound:.3f}", "–", "–"))
        dots.append(dot(name, best.gain, "best of n"))
    made = Page(
        "resample",
        "The training-free prompter",
        f"Rewrites drawn from ρ_sft and reweighted to ρ*, or cut to the best of n. {_CURSE}.",
        record,
    )
    made.key("Mean reward of ρ_sft", number(result.prior), "by R̂")
    for row in rows[:2]:
        made.key(f"Gain, {row[0]}", row[1].split(" [")[0], f"KL {row[2]} nats")
    made.key("Prompts", number(prompts), f"{result.n} rewrites of each")
    made.add(
        "Gains over ρ_sft",
        "In reward units, with 95% intervals over prompts where there are enough of them; KL to ρ_sft in "
        f"nats, and the effective sample size of {result.n}.",
        Table("how | gain | KL | effective sample size | remarks", rows, "wnnnw"),
        Dots("Gain over ρ_sft, by R̂", "reward units, 95% intervals", dots, [(0.0, "no gain")]),
    )
    texts = [(b.prompt, b.rewrite, number(b.reward), number(b.mean)) for b in result.rewrites[:MOST_PROMPTS]]
    made.add(
        "Rewrites",
        f"The one of largest R̂ for {len(texts)} of {prompts} prompts, beside the mean R̂ of all.",
        Table("prompt | best rewrite | its R̂ | mean R̂", texts, "ttnn"),
    )
    return made
