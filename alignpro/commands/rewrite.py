"""`alignpro rewrite`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from alignpro.commands.shared_llm import _home
from alignpro.errors import AlignProError
from alignpro.llm.models.chat import parse_options
from alignpro.llm.policies.prompter import (
    Prompter,
)


def run_rewrite(
    prompter: str,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    max_tokens: int | None,
    as_json: bool,
    chat_template_kwargs: str | None = None,
) -> None:
    """Prompts from the arguments, or one per line of standard input."""
    given = list(prompts) or [line.strip() for line in sys.stdin if line.strip()]
    if not given:
        raise AlignProError("prompts: none given; name some, or write one per line to standard input")
    if samples < 1:
        raise AlignProError(f"--samples {samples}: give at least 1")
    options = None if chat_template_kwargs is None else parse_options(chat_template_kwargs)
    opened = Prompter.from_pretrained(_home(prompter), chat_template_kwargs=options)
    if max_tokens is not None:
        if max_tokens < 1:
            raise AlignProError(f"--max-tokens {max_tokens}: give at least 1")
        opened.max_tokens = max_tokens
    for x, row in zip(given, opened.rewrites(given, samples, seed=seed), strict=True):
        for rewrite in row:
            print(json.dumps({"x": x, "rewrite": rewrite}, ensure_ascii=False) if as_json else rewrite)


@dataclass(frozen=True)
class Rewrite:
    """Rewrite prompts with a trained prompter."""

    prompter: tyro.conf.Positional[str]
    """The folder that training wrote (…/prompter), or any model, as rho_sft."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to rewrite. Default: one per line of standard input."""
    samples: int = 1
    """Rewrites of each."""
    seed: int = 0
    """Determines them."""
    max_tokens: int | None = None
    """Tokens of a rewrite, at most. Default: as it was trained."""
    json: bool = False
    """One JSON object per line, instead of the rewrite alone."""
    chat_template_kwargs: str | None = None
    """Further arguments of the prompter's chat template, as a JSON object. Default: as it was trained."""

    def run(self) -> int:
        run_rewrite(
            self.prompter,
            self.prompts,
            self.samples,
            self.seed,
            self.max_tokens,
            self.json,
            self.chat_template_kwargs,
        )
        return 0
