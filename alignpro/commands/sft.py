"""`alignpro sft`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import tyro

from alignpro.errors import AlignProError
from alignpro.llm.training.settings import (
    SFTSettings,
)
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from collections import Counter

from alignpro.commands.shared_llm import _home, check_prompter
from alignpro.commands.train import _fitting
from alignpro.files import read_json_lines, writable_folder
from alignpro.llm.data import split
from alignpro.llm.models import packages
from alignpro.llm.models.chat import parse_options
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training.checkpoints import check_reporters
from alignpro.report.numbers import number
from alignpro.report.page import Dot, Dots, Json, Page, Table


def run_sft(
    out: str,
    settings: SFTSettings,
    *,
    prompter: str,
    template: str | None,
    pairs: str,
    prompt_field: str,
    rewrite_field: str,
    report_to: Sequence[str],
    resume: bool,
    chat_template_kwargs: str | None = None,
) -> None:
    """Everything is checked before anything is loaded."""
    prompter = _home(prompter)
    check_prompter(prompter, template)
    check_reporters(report_to)
    folder = writable_folder(out)
    if any(folder.iterdir()) and not resume:
        raise AlignProError(f"--out {folder}: it is not empty; name a new folder, or continue with --resume")

    from alignpro.llm.data.own import read_rewrites
    from alignpro.llm.training.sft import METRICS_FILE, PROMPTER_FOLDER, sft

    read = read_rewrites(pairs, prompt=prompt_field, rewrite=rewrite_field)
    sizes = Counter(split.split_of(pair.prompt) for pair in read)
    steps = settings.epochs * -(-sizes["train"] // settings.batch_size)
    packages.note(
        f"{len(read)} pairs: {sizes['train']} to learn from, {sizes['validation']} and {sizes['test']} to "
        f"measure on; {settings.epochs} epochs, {steps} steps of {settings.batch_size} at most"
    )
    options = None if chat_template_kwargs is None else parse_options(chat_template_kwargs)
    base = Prompter.from_pretrained(prompter, template=template, chat_template_kwargs=options, merged=True)
    tuned = sft(base, read, settings, folder, resume=resume, report_to=report_to)
    found = tuned.prompter.facts["sft"]
    keep.keep(report_of_sft(read_json_lines(folder / METRICS_FILE), found), folder)
    for part, nats in found["nats_per_token"].items():
        print(f"{part}: {nats['before']:.3f} nats per token before, {nats['after']:.3f} after")
    print(f"wrote {folder / PROMPTER_FOLDER}; train it with --prompter {folder / PROMPTER_FOLDER}")


def report_of_sft(metrics: Sequence[Json], found: Json) -> Page:
    """Of metrics.jsonl and of `Prompter.facts["sft"]`."""
    measured = found["nats_per_token"]
    part = "test" if "test" in measured else next(iter(measured))
    before, after = (number(measured[part][when], ".3f") for when in ("before", "after"))
    page = Page(
        "sft",
        "Fine-tuning a prompter on rewrites",
        f"On held-out rewrites ({part}) the prompter needs {after} nats per token; before, {before}.",
        {key: found[key] for key in found if key != "nats_per_token"},
    )
    page.key("Nats per token", after, f"before {before}; {part}, {found['pairs'][part]} pairs")
    page.key("Pairs learned from", number(found["pairs"]["train"]), f"{found['left_out']} too long, left out")
    page.key("Optimizer steps", number(metrics[-1]["step"]))
    rows = [
        (name, number(found["pairs"][name]), number(e["before"], ".4f"), number(e["after"], ".4f"))
        for name, e in measured.items()
    ]
    dots = [Dot(name, e[when], group=when) for name, e in measured.items() for when in ("before", "after")]
    page.add(
        "Held-out rewrites",
        "Mean −log ρ(x′|x) over the tokens, the end included, of rewrites that were not learned from.",
        Table("split | pairs | before | after", rows, "wnnn"),
        Dots("What a held-out rewrite costs", "nats per token", dots),
    )
    panels = {"nats per token": "loss", "share of tokens foreseen": "mean_token_accuracy"}
    said, curves = _fitting(metrics, "nats per token", panels)
    page.add("Learning", said, None, curves)
    return page


@dataclass(frozen=True)
class Sft:
    """Fine-tune the prompter into rho_sft on pairs of a prompt and its rewrite.

    The pairs' own split, by prompt, keeps some to measure on. The result's folder goes to train --prompter.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl and prompter/, the fine-tuned one."""
    pairs: str
    """JSON lines (or one JSON list) of objects with a prompt and a rewrite."""
    settings: tyro.conf.OmitArgPrefixes[SFTSettings] = field(default_factory=SFTSettings)
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    prompter: str = "smollm2-135m-instruct"
    """What is fine-tuned: a packaged name, a local folder or a hub id."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A trained prompter
    has its own. Default: rewrite."""
    prompt_field: str = "prompt"
    """The field that holds the prompt."""
    rewrite_field: str = "rewrite"
    """The field that holds the rewrite; optimized_prompt in BPO's data."""
    chat_template_kwargs: str | None = None
    """Further arguments of the prompter's chat template, as a JSON object."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb, trackio."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        run_sft(
            self.out,
            self.settings,
            prompter=self.prompter,
            template=self.template,
            pairs=self.pairs,
            prompt_field=self.prompt_field,
            rewrite_field=self.rewrite_field,
            report_to=self.report_to,
            resume=self.resume,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        return 0
