"""`alignpro sft`: a prompter fine-tuned on given rewrites."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from alignpro.commands.options import ChatOption, PrompterOptions, ReportedRun
from alignpro.commands.shared import fell
from alignpro.errors import AlignProError
from alignpro.llm.training.pair_settings import SFTSettings
from alignpro.report import keep
from alignpro.report.numbers import number
from alignpro.report.page import Dot, Dots, Page, Table
from alignpro.runs import here, owning

if TYPE_CHECKING:
    from alignpro.llm.training.sft import Tuned


@dataclass(frozen=True, kw_only=True)
class Sft(ChatOption, PrompterOptions, ReportedRun):
    """Fine-tune the prompter into rho_sft on pairs of a prompt and its rewrite.

    The pairs' own split, by prompt, keeps some to measure on. The result's folder goes to train --prompter.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl, report.html and prompter/, the fine-tuned one."""
    pairs: str
    """File of pairs to learn from: JSON lines (or one JSON list) of objects with a prompt and a rewrite. Or
    the word instructions: packaged prompts, each followed by one of about a hundred plain instructions; the
    template is then append, unless another is named."""
    settings: tyro.conf.OmitArgPrefixes[SFTSettings] = field(default_factory=SFTSettings)
    prompt_column: str | None = None
    """Column (key) of the prompts, texts or conversations, in those objects. Left out: prompt, or another
    common name where it is the only one."""
    rewrite_column: str | None = None
    """Column (key) of the rewrites in those objects. Left out: rewrite, or optimized_prompt as in the data of
    BPO."""

    renamed: ClassVar = {"prompt-field": "prompt-column", "rewrite-field": "rewrite-column"}
    common = (
        "out pairs prompter template prompt-column rewrite-column epochs learning-rate pairs-per-step "
        "rewrite-tokens seed config resume"
    )
    examples = (
        (
            "on packaged instructions, to begin training with",
            "alignpro sft --pairs instructions --out runs/sft",
        ),
        (
            "on pairs of your own",
            "alignpro sft --pairs mine.jsonl --prompt-column question --rewrite-column asked --out runs/sft",
        ),
    )

    @owning("sft")
    def run(self) -> int:
        from alignpro.commands.opening import trained_home
        from alignpro.llm.data import own, split
        from alignpro.llm.data.pairs import PAIRS
        from alignpro.llm.data.rows import first_turn
        from alignpro.llm.models import contents, packages
        from alignpro.llm.policies.prompter import check_prompter, has_template
        from alignpro.llm.training.settings import check_reporters

        settings, prompter = self.settings, trained_home(self.prompter)
        made, template = self.pairs in PAIRS, self.template
        if made and (self.prompt_column or self.rewrite_column):
            raise AlignProError(
                f"--pairs {self.pairs}: is packaged; leave out --prompt-column and --rewrite-column"
            )
        if made and template is None and not has_template(prompter):
            template = "append"
        check_prompter(prompter, template)
        check_reporters(self.report_to)
        run, folder = here(self.out), Path(self.out)
        run.contents["prompter"] = lambda: contents.of_model(prompter)
        run.check(self.resume, ("*",))

        from alignpro.llm.policies.prompter import Prompter
        from alignpro.llm.training.sft import sft

        if made:
            read = PAIRS[self.pairs]()
        else:
            read = own.read_rewrites(self.pairs, prompt=self.prompt_column, rewrite=self.rewrite_column)
        sizes = Counter(split.split_of(first_turn(pair.prompt)) for pair in read)
        steps = settings.epochs * -(-sizes["train"] // settings.batch_size)
        packages.note(
            f"{len(read)} pairs: {sizes['train']} to learn from, {sizes['validation']} and {sizes['test']} "
            f"to measure on; {settings.epochs} epochs, {steps} steps of {settings.batch_size} at most"
        )
        base = Prompter.from_pretrained(
            prompter,
            template=template,
            dtype=settings.policy_dtype,
            chat_template_kwargs=self.chat_options(),
            merged=True,
        )
        result = sft(base, read, settings, folder, resume=self.resume, report_to=self.report_to)
        keep.keep(page(result), folder)
        print(text(result))
        return 0


def text(result: "Tuned") -> str:
    from alignpro.llm.training.checkpoints import PROMPTER_FOLDER

    made = result.folder / PROMPTER_FOLDER
    lines = [
        f"{part}: {e.before:.3f} nats per token before, {e.after:.3f} after"
        for part, e in result.held_out.items()
    ]
    return "\n".join([*lines, f"wrote {made}; train it with --prompter {made}"])


def page(result: "Tuned") -> Page:
    record, held_out = result.record, result.held_out
    part = "test" if "test" in held_out else next(iter(held_out))
    measured = held_out[part]
    before, after = number(measured.before, ".3f"), number(measured.after, ".3f")
    made = Page(
        "sft",
        "Fine-tuning a prompter on rewrites",
        f"On held-out rewrites ({part}) the prompter needs {after} nats per token; before, {before}.",
        record,
    )
    made.key("Nats per token", after, f"before {before}; {part}, {measured.pairs} pairs")
    learned = number(record["pairs"]["train"])
    made.key("Pairs learned from", learned, f"{record['left_out']} too long, left out")
    made.key("Optimizer steps", number(result.metrics[-1]["step"]))
    rows = [
        (name, number(e.pairs), number(e.before, ".4f"), number(e.after, ".4f"))
        for name, e in held_out.items()
    ]
    dots = []
    for name, e in held_out.items():
        dots += [Dot(name, e.before, group="before"), Dot(name, e.after, group="after")]
    made.add(
        "Held-out rewrites",
        "Mean −log ρ(x′|x) over the tokens, the end included, of rewrites that were not learned from.",
        Table("split | pairs | before | after", rows, "wnnn"),
        Dots("What a held-out rewrite costs", "nats per token", dots),
    )
    panels = {"nats per token": "loss", "entropy, nats a token": "entropy"}
    said, curves = fell(result.metrics, "nats per token", panels)
    made.add("Learning", said, None, curves)
    return made
