"""`alignpro rewrite`: prompts rewritten with a trained prompter, or a router."""

import json
import sys
from dataclasses import dataclass
from typing import ClassVar

import tyro

from alignpro.commands.options import ChatOption, SeedOption
from alignpro.commands.shared import check_least
from alignpro.errors import AlignProError
from alignpro.terminal import say


@dataclass(frozen=True, kw_only=True)
class Rewrite(ChatOption, SeedOption):
    """Rewrite prompts with a trained prompter, or a router."""

    prompter: tyro.conf.Positional[str]
    """The prompter: the folder that training wrote, or the prompter/ in it; any model's name does, too,
    untrained. Or a router: the folder that route wrote."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts to rewrite, each in quotes. Left out: those of the file, or one per line of standard input."""
    prompts_file: str | None = None
    """File of prompts or chats to rewrite: .jsonl, .json, .csv, .tsv or .parquet; any other is read as text
    with one prompt per line. Left out: standard input, where no prompts are given."""
    prompt_column: str | None = None
    """Column of the prompts in that file. Left out: prompt, or another common name where it is the only
    one."""
    system_prompt: str | None = None
    """System message that the frozen model will be given with every prompt that has none. Left out: none."""
    draws: int = 1
    """How many rewrites of each prompt to draw."""
    rewrite_tokens: int | None = None
    """The most tokens of one rewrite; a longer one is cut. Left out: as many as in training. A router's
    have no limit."""
    json: bool = False
    """Print one JSON object per line, with the prompt as x, the turns before it as context, and the rewrite,
    instead of the rewrite alone."""

    renamed: ClassVar = {"samples": "draws", "max-tokens": "rewrite-tokens"}
    examples = (
        ("with a trained prompter", 'alignpro rewrite runs/ease "How do tides work?"'),
        (
            "four rewrites of each prompt of a file, as JSON",
            "alignpro rewrite runs/ease --prompts-file mine.csv --draws 4 --json",
        ),
    )

    def run(self) -> int:
        from alignpro.llm.arms import route
        from alignpro.llm.data.own import read_prompts
        from alignpro.llm.data.rows import Reading
        from alignpro.llm.models.prompt import said

        reading = Reading(self.prompt_column, system=self.system_prompt)
        if self.prompts_file is not None and not self.prompts:
            given = read_prompts(self.prompts_file, reading=reading)
        elif self.prompts_file is not None or self.prompt_column is not None:
            raise AlignProError(
                "prompts_file: give prompts or their file, and prompt_column with a file only"
            )
        else:
            typed = self.prompts or tuple(sys.stdin)
            given = [reading.made(x if self.prompts else x.strip()) for x in typed if x.strip()]
        if not given:
            raise AlignProError("prompts: none given; name some, or write one per line to standard input")
        check_least(1, draws=self.draws, rewrite_tokens=self.rewrite_tokens)
        if route.is_router(self.prompter):
            self._check_of_prompters()
            rows = [[rewrite] * self.draws for rewrite in route.load(self.prompter).rewrites(given)]
        else:
            rows = self._drawn(given)
        for x, row in zip(given, rows, strict=True):
            for rewrite in row:
                line = {**said(x), "rewrite": rewrite}
                say(json.dumps(line, ensure_ascii=False) if self.json else rewrite)
        return 0

    def _check_of_prompters(self) -> None:
        """Refuse options that mean nothing to a router."""
        for name in ("rewrite_tokens", "chat_template_kwargs"):
            if (value := getattr(self, name)) is not None:
                raise AlignProError(
                    f"{name} {value!r}: {self.prompter!r} is a router, which adds an instruction and draws "
                    "nothing; leave it out"
                )

    def _drawn(self, given: list[str]) -> list[list[str]]:
        """Rewrites of a language model, `draws` of each prompt."""
        from alignpro.commands.opening import trained_home
        from alignpro.llm.policies.prompter import Prompter

        home = trained_home(self.prompter)
        prompter = Prompter.from_pretrained(home, chat_template_kwargs=self.chat_options())
        prompter.max_tokens = self.rewrite_tokens or prompter.max_tokens
        return prompter.rewrites(given, self.draws, seed=self.seed)
