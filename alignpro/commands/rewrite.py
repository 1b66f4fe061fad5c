"""`alignpro rewrite`: prompts rewritten with a trained prompter."""

import json
import sys
from dataclasses import dataclass

import tyro

from alignpro.commands.options import ChatOption, SeedOption
from alignpro.commands.shared import check_least
from alignpro.errors import AlignProError


@dataclass(frozen=True, kw_only=True)
class Rewrite(ChatOption, SeedOption):
    """Rewrite prompts with a trained prompter."""

    prompter: tyro.conf.Positional[str]
    """The folder that training wrote, or the prompter/ in it; any model's name does, too, untrained."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts to rewrite, each in quotes. Left out: one per line of standard input."""
    samples: int = 1
    """How many rewrites of each prompt."""
    max_tokens: int | None = None
    """The most tokens of one rewrite; a longer one is cut. Left out: as many as in training."""
    json: bool = False
    """Print one JSON object per line, with the prompt as x and the rewrite, instead of the rewrite alone."""

    def run(self) -> int:
        from alignpro.commands.opening import trained_home
        from alignpro.llm.policies.prompter import Prompter

        given = list(self.prompts) or [line.strip() for line in sys.stdin if line.strip()]
        if not given:
            raise AlignProError("prompts: none given; name some, or write one per line to standard input")
        check_least(1, samples=self.samples, max_tokens=self.max_tokens)
        home = trained_home(self.prompter)
        prompter = Prompter.from_pretrained(home, chat_template_kwargs=self.chat_options())
        prompter.max_tokens = self.max_tokens or prompter.max_tokens
        for x, row in zip(given, prompter.rewrites(given, self.samples, seed=self.seed), strict=True):
            for rewrite in row:
                print(json.dumps({"x": x, "rewrite": rewrite}, ensure_ascii=False) if self.json else rewrite)
        return 0
