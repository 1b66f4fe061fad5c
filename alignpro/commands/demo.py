"""`alignpro demo`: theory meets PPO on a real language model."""

import csv
import io
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alignpro.commands.demo_page import EXAMPLES, PROMPTERS, answers_of, page, shown
from alignpro.errors import AlignProError
from alignpro.llm.training.settings import Algorithm
from alignpro.report import keep
from alignpro.report.numbers import Json
from alignpro.report.text import visible
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.llm.arms.demo import DemoResult


@dataclass(frozen=True)
class Demo:
    """Theory meets PPO on a real language model: the main job.

    Restricts SmolLM2-135M-Instruct, as prompter and as frozen model, to finite sets of rewrites and responses
    on which everything is exact; trains the prompter; checks Theorem 1 before and after; writes report.html.
    With --task it trains a prompter on open-ended text that a person can see working.
    """

    out: str
    """Folder for the report and all that it rests on. Created if need be; must not hold another run."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""
    quick: bool = False
    """Smaller sets and a shorter training: minutes become one or two."""
    task: Literal["plain-language"] | None = None
    """Show instead what a prompter can do on open-ended text: plain-language trains one, by PPO, to have the
    frozen model answer in plain words, and shows held-out prompts before and after. Left out: the exact
    demo."""
    model: str | None = None
    """Prompter and frozen model (with --task, the frozen model alone): a packaged name, a local folder or a
    hub id. Left out: smollm2-135m-instruct."""
    reward: str | None = None
    """Reward model: a packaged name or the folder of a saved one. Left out: minilm-bt."""
    prompts_file: str | None = None
    """Your own prompts, one per line. Left out: real instructions from a package."""
    prompts: int | None = None
    """How many prompts. Left out: 8, or 3 with --quick."""
    rewrites: int | None = None
    """How many distinct rewrites of each prompt, the original among them. Left out: 16, or 8 with --quick."""
    responses: int | None = None
    """How many distinct responses to each prompt. Left out: 32, or 12 with --quick."""
    beta: float | None = None
    """Weight of the KL divergence in RLHF (beta), positive, in reward units. Left out: 0.1."""
    lam: float | None = None
    """Weight of the KL divergence in prompt optimization (lambda), positive, in reward units. Left out:
    0.05."""
    algorithm: Algorithm | None = None
    """How the policy is improved. Left out: ppo."""
    iterations: int | None = None
    """How many rounds of sampling, each followed by 4 optimizer steps. Left out: 16, or 4 with --quick."""
    chat_template_kwargs: str | None = None
    """Further arguments of the model's chat template, as a JSON object."""
    sampled_rewards: bool = False
    """Reward a rewrite with one sampled response, not with its expected reward."""
    seed: int = 0
    """Number that determines prompts, what is drawn and training."""

    common = "out quick task model reward prompts-file prompts beta lam resume seed"
    examples = (
        ("the exact demo, smaller: one or two minutes", "alignpro demo --quick --out runs/quick"),
        (
            "a prompter that has a model answer in plain words, before and after",
            "alignpro demo --task plain-language --out runs/task",
        ),
    )

    def run(self) -> int:
        if self.task is not None:
            from alignpro.commands import demo_task

            self._refuse_exact()
            named = {name: getattr(self, name) for name in ("quick", "resume", "seed", "model")}
            return demo_task.run(self.task, self.out, **named)

        from alignpro.files import write_text
        from alignpro.llm.arms import demo

        preset = demo.QUICK if self.quick else demo.DemoSettings()

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        settings = replace(
            preset,
            **given("model", "reward", "prompts_file", "prompts", "beta", "seed", "chat_template_kwargs"),
            exact_rewards=not self.sampled_rewards,
            enumeration=replace(preset.enumeration, **given("rewrites", "responses")),
            training=replace(preset.training, **given("lam", "algorithm", "iterations")),
        )
        started = time.monotonic()
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        result = demo.run(self.out, settings, resume=self.resume, command=command)
        write_text(Path(self.out) / EXAMPLES, examples(result.prompts))
        keep.keep(page(result), self.out)
        say(f"{text(result)} ({time.monotonic() - started:.0f} s in all)", error=True)
        return 0

    def _refuse_exact(self) -> None:
        """Refuse, with --task, the options of the exact demo."""
        kept = ("out", "resume", "quick", "task", "model", "seed")
        for option in fields(self):
            if option.name not in kept and getattr(self, option.name) != option.default:
                raise AlignProError(f"--{option.name.replace('_', '-')}: is not for --task; leave it out")


def text(result: "DemoResult") -> str:
    """Three lines: what training closed, what is left, and what Theorem 1 says of it."""
    gaps = [f"{result.policies[name]['gap']:.3f}" for name in PROMPTERS]
    bound = result.bounds["theorem1"]["star"]
    return (
        f"training closed {result.policies['theta']['closed']:.1%} of F(ρ*) − F(ρ_sft); "
        f"gap to RLHF {gaps[0]} → {gaps[1]}, at ρ* {gaps[2]}\n"
        f"Theorem 1 {bound['verdict']}: gap {bound['gap']:.3f}, right side {bound['rhs']:.3f}"
        f"{' (vacuous)' if bound['vacuous'] else ''}"
    )


def _guard(text: str) -> str:
    """Safe in a spreadsheet: what would be read as a formula starts with a quote."""
    text = visible(text)
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@＝＋－＠") or text[:1] in ("\t", "\n") else text


def examples(prompts: Sequence[Json]) -> str:
    """CSV, one row per prompt: rewards, each policy's favourite rewrite, and most probable responses."""
    rows = []
    for p in prompts:
        row = {"prompt": _guard(p["prompt"]), "gap": p["gap"]}
        row |= {f"reward_{name}": value for name, value in p["rewards"].items()}
        for who in (*PROMPTERS, "reward"):
            best: Mapping[str, Any] = max(p["rewrites"], key=lambda r: r[who], default={})
            column = "best_rewrite" if who == "reward" else f"rewrite_{who}"
            row |= {column: _guard(best.get("text", "")), f"{column}_R": best.get("reward", "")}
            if who != "reward":
                row[f"{column}_probability"] = best.get(who, "")
        for name, answers in answers_of(p).items():
            row[f"response_{name}"] = _guard(shown(answers[0])) if answers else ""
            row[f"response_{name}_reward"] = answers[0]["reward"] if answers else ""
        rows.append(row)
    file = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n", restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file.getvalue()
