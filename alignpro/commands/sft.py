"""`alignpro sft`."""

from collections import Counter
from collections.abc import Sequence

from alignpro.commands import pages
from alignpro.commands.shared import _home, check_prompter
from alignpro.errors import AlignProError
from alignpro.files import read_json_lines, writable_folder
from alignpro.llm.data import split
from alignpro.llm.models import packages
from alignpro.llm.models.chat import parse_options
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training.checkpoints import check_reporters
from alignpro.llm.training.settings import SFTSettings
from alignpro.report import keep


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

    from alignpro.llm.training.sft import METRICS_FILE, PROMPTER_FOLDER, read_rewrites, sft

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
    found = tuned.facts["sft"]
    keep.keep(pages.report_of_sft(read_json_lines(folder / METRICS_FILE), found), folder)
    for part, nats in found["nats_per_token"].items():
        print(f"{part}: {nats['before']:.3f} nats per token before, {nats['after']:.3f} after")
    print(f"wrote {folder / PROMPTER_FOLDER}; train it with --prompter {folder / PROMPTER_FOLDER}")
