"""A language model as a prompter: the rewriting template around x, and x′ back from its tokens.

prompter = Prompter.from_pretrained("runs/mine/prompter")
prompter.rewrite("How do plants grow?")
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.files import read_json, real, write_json, write_text
from alignpro.llm.models import adapters, catalogue, load, packages, recipes, resolve
from alignpro.llm.models.chat import Said, chat_of
from alignpro.llm.models.forward import room
from alignpro.llm.models.hub import elsewhere, push
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.policy import Ids, log_probs, sample_and_score, sample_key
from alignpro.llm.models.prompt import Message, context_of, messages_of
from alignpro.llm.models.sampling import Sampling
from alignpro.terminal import harmless

PROMPTER_FILE = "prompter.json"
BEFORE = "Conversation so far:"
"""Words before the turns that x answers, as a prompter is shown them."""


@dataclass(frozen=True)
class Template:
    """The rewriting instruction: a system message, examples, and the words that open the prompter's turn.

    ρ_sft is the language model behind this template.
    """

    system: str = "Rewrite the request so that its answer will be more helpful. Keep its meaning."
    """The system message; empty for none."""
    examples: tuple[tuple[str, str], ...] = (
        ("How do plants grow?", "Explain step by step, in simple words, how plants grow from a seed."),
        ("Name a famous painter.", "Name a famous painter and say what made their work important."),
        ("Tips for sleeping better", "What are some practical tips for sleeping better at night?"),
    )
    """Requests and how they are rewritten, which stand in the conversation before x."""
    request: str = "Request: "
    """Words before each request."""
    opening: str = "Rewritten:"
    """Words that open the prompter's turn."""
    space: str = " "
    """Text between the opening words and the rewrite; part of the rewrite's first token."""
    append: bool = False
    """Whether what the prompter says follows x: x′ = x and a space and its words, or x alone if it says
    nothing. Nothing of x can be lost, and x itself costs one end token."""

    def messages(self, x: str) -> list[Message]:
        """The conversation that ends with the request to rewrite x, behind what was said before it."""
        out = [{"role": "system", "content": self.system}] if self.system else []
        for before, after in self.examples:
            out.append({"role": "user", "content": self.request + before})
            out.append({"role": "assistant", "content": self.opening + self.space + after})
        turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in context_of(x)]
        quoted = "\n\n".join([BEFORE, *turns, ""]) if turns else ""
        return [*out, {"role": "user", "content": quoted + self.request + x}]

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, x: str) -> tuple[int, ...]:
        """Token ids of x in the template, which the prompter continues with x′."""
        return chat_of(tokenizer).ids(self.messages(x), self.opening)

    def rewrite_ids(self, tokenizer: PreTrainedTokenizerBase, x: str, rewrite: str) -> tuple[int, ...]:
        """Token ids with which the prompter says `rewrite` of x and ends its turn."""
        said, chat = rewrite, chat_of(tokenizer)
        if self.append:
            if not rewrite.startswith(x):
                raise AlignProError(f"rewrite {rewrite!r}: must begin with {x!r}, since the template appends")
            said = rewrite[len(x) :].strip()
            if not said:
                return (chat.end,)
        return (*chat.text_ids(self.space + said), chat.end)

    def said(self, tokenizer: PreTrainedTokenizerBase, x: str, ids: tuple[int, ...]) -> Said:
        """The rewrite that tokens make of x: without special tokens, a leading thought and white space."""
        found = chat_of(tokenizer).said(ids, opened=False)  # a thought that the template opens is closed
        text = found.text.strip()
        return Said(f"{x} {text}".strip() if self.append else text, found.thought)

    def rewrite(self, tokenizer: PreTrainedTokenizerBase, x: str, ids: tuple[int, ...]) -> str:
        """The text of `said`."""
        return self.said(tokenizer, x, ids).text


TEMPLATES: dict[str, Template] = {
    "rewrite": Template(),
    "append": Template(
        system="Add one short instruction to the request so that its answer will be more helpful.",
        examples=(
            ("How do plants grow?", "Explain it step by step, in simple words."),
            ("Name a famous painter.", "Say what made their work important."),
            ("Tips for sleeping better", "Give a detailed overview with practical examples."),
        ),
        opening="Added:",
        append=True,
    ),
}
"""Named templates: the prompter says the whole rewrite, or only what is added to x."""


def check_template(name: str | None) -> Template:
    """The row of `TEMPLATES`, `rewrite` when None. Raises AlignProError where there is none."""
    name = "rewrite" if name is None else name
    if name not in TEMPLATES:
        raise AlignProError(f"template {name}: choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def has_template(name: str | Path) -> bool:
    """Whether `name` is that of a trained prompter, which has a template of its own."""
    # Whatever lies there in its place, it is no model without one.
    return str(name) in catalogue.RECIPES or os.path.lexists(Path(name).expanduser() / PROMPTER_FILE)


def check_prompter(name: str | Path, template: str | None) -> None:
    """Refuse a template for a trained prompter, one that is none, and what names no model."""
    check_template(template)
    if not has_template(name):
        catalogue.check_name(name)
    elif template is not None:
        raise AlignProError(f"template {template}: {name} has its own; leave it out")


@dataclass(frozen=True)
class Saved:
    """A trained prompter's record in `PROMPTER_FILE`; fields that `Prompter` has, too, mean the same."""

    base: str
    template: Template
    max_tokens: int
    facts: dict[str, Any]
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise AlignProError(f"max_tokens {self.max_tokens}: give at least 1")


def read_saved(folder: Path, name: str) -> Saved:
    """Read the `PROMPTER_FILE` of a prompter's folder; an error calls it by `name`."""
    try:
        return typed.made(Saved, read_json(folder / PROMPTER_FILE), PROMPTER_FILE)
    except AlignProError as error:
        raise AlignProError(
            f"prompter {name!r}: {PROMPTER_FILE} is not one that Prompter.save wrote ({error})"
        ) from None


@dataclass
class Prompter:
    """ρ(x′|x): a language model behind a rewriting template, with a trained adapter or without (ρ_sft).

    Attributes:
        model: the language model; wrapped by PEFT where there is an adapter.
        max_tokens: tokens of a rewrite, the end token included; longer ones are cut off.
        base: name of the language model, which `save` records.
        facts: how it was trained, as JSON values, for the model card.
    """

    model: Any
    tokenizer: Any
    template: Template = field(default_factory=Template)
    max_tokens: int = 48
    base: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        template: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        merged: bool = False,
    ) -> "Prompter":
        """Open a trained prompter (the folder that `save` wrote, or a recipe, which is trained at first use),
        or any model that `load_model` takes.

        Args:
            template: a row of `TEMPLATES`, for a model that has none of its own; `rewrite` when None.
            chat_template_kwargs: further arguments of the chat template; as the prompter was saved if None.
            merged: merge its adapter into the language model, so that it can be trained on from there.

        Raises:
            AlignProError: an unknown template, or one for a trained prompter; a damaged folder, or one whose
                base is not there.
        """
        if not str(name):
            raise AlignProError("prompter '': name a model, or the folder of a trained prompter")
        check_prompter(name, template)
        folder = Path(name).expanduser()
        if not has_template(name):
            loaded = load.load_model(name, dtype, device, chat_template_kwargs=chat_template_kwargs)
            local = folder.exists() and not catalogue.packaged(name)
            return cls(*loaded, check_template(template), base=str(real(folder) if local else name))
        recipe = str(name) in catalogue.RECIPES
        folder = resolve.resolve(name) if recipe else folder
        said = read_saved(folder, str(name))
        own, base, max_tokens, facts = said.template, said.base, said.max_tokens, said.facts
        given = said.chat_template_kwargs if chat_template_kwargs is None else chat_template_kwargs
        options = dict(given)
        if merged or (folder / "config.json").is_file():  # `save` with `whole`
            loaded = load.load_model(folder, dtype, device, chat_template_kwargs=options)
            return cls(*loaded, own, max_tokens, str(name if recipe else real(folder)), facts)
        if not (folder / catalogue.ADAPTER_WEIGHTS).is_file():
            raise AlignProError(
                f"prompter {str(name)!r}: {catalogue.ADAPTER_WEIGHTS} is missing; save it again"
            )
        base = adapters.find_base(base, folder)
        if base in catalogue.RECIPES and facts.get("recipe", {}).get("version") != recipes.cache_key(base):
            packages.note(f"{name}: was trained from another version of {base}, which it may not quite fit")
        model, tokenizer = load.load_model(base, dtype, device, chat_template_kwargs=options)
        adapted = load.attach_adapter(model, folder, str(name))
        return cls(adapted, tokenizer, own, max_tokens, base, facts)

    def save(self, folder: str | Path, *, whole: bool = False) -> None:
        """Write the adapter (safetensors), `prompter.json` and a model card; not the language model itself.

        Args:
            whole: write the language model and its tokenizer; for one without an adapter (merged).
        """
        folder = Path(folder)
        if whole == hasattr(self.model, "peft_config"):
            why = "an untrained prompter is its base model; there is nothing to save"
            if whole:
                why = "whole is for a model without an adapter; merge it first"
            raise AlignProError(f"Prompter.save: {why}")
        folder.mkdir(parents=True, exist_ok=True)
        if not whole and self.base:
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = self.base  # not the folder where it lies in a cache
        # PEFT would ask the hub whether the vocabulary grew; adapters here are on layers alone.
        more = {} if whole else {"save_embedding_layers": False}
        with quiet():
            self.model.save_pretrained(str(folder), safe_serialization=True, **more)
        if whole:
            self.tokenizer.save_pretrained(str(folder))
        options = dict(chat_of(self.tokenizer).options)
        record = Saved(self.base, self.template, self.max_tokens, self.facts, options)
        write_json(folder / PROMPTER_FILE, asdict(record))
        write_text(folder / "README.md", self.card())

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload what `save` writes to `repository` (owner/name), and return its address.

        Needs `hf auth login`, or HF_TOKEN in the environment; see `alignpro.llm.models.hub.push`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder, whole=not hasattr(self.model, "peft_config"))
            return push(folder, repository, private=private)

    def card(self) -> str:
        """The model card, as Markdown, in which names and facts of others are text."""
        facts = "\n".join(
            # Indented, it is code.
            harmless(f"    {json.dumps(key)[1:-1]}: {json.dumps(elsewhere(value), ensure_ascii=False)}")
            for key, value in self.facts.items()
            if value is not None
        )
        base = f"base_model: {self.base}\n" if catalogue.HUB_ID.fullmatch(self.base) else ""
        name = re.sub(r"[^\w .-]", "-", Path(self.base).name)
        adapter = hasattr(self.model, "peft_config")
        library, kind = ("peft", "A LoRA adapter") if adapter else ("transformers", "A language model")
        aim = "the objective of Align-Pro (arXiv 2501.03486, equation 9)"
        if "sft" in self.facts and "settings" not in self.facts:
            aim = "pairs of a prompt and its rewrite"
        return (
            f"---\nlibrary_name: {library}\n{base}tags:\n- prompt-optimization\n- align-pro\n---\n\n"
            f"# A prompter for {name}\n\n"
            f"It rewrites a request so that a frozen language model answers it better. {kind} trained "
            f"with `alignpro` on {aim}.\n\n"
            "```python\nfrom alignpro.llm.policies.prompter import Prompter\n\n"
            'prompter = Prompter.from_pretrained("<this folder>")\n'
            'print(prompter.rewrite("How do plants grow?"))\n'
            f"```\n\n## Training\n\n{facts or 'not recorded'}\n\n## Limits\n\n"
            "Trained for one frozen model, one reward and one kind of prompt; elsewhere it may do harm.\n"
        )

    def prompt_ids(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids that each prompt's rewrites continue; refuses prompts without room (`check_room`)."""
        found = [self.template.prompt_ids(self.tokenizer, x) for x in prompts]
        check_room(self.model, prompts, found, self.max_tokens, f"prompter {self.base or 'model'!r}")
        return found

    def rewrites(
        self, prompts: Sequence[str], samples: int = 1, *, first: int = 0, seed: int = 0, batch_size: int = 64
    ) -> list[list[str]]:
        """Draw x′ ~ ρ(·|x), [prompts][samples]; equal arguments, equal rewrites.

        Args:
            first: number of the first sample of each prompt: samples are told apart by their numbers.
        """
        if isinstance(prompts, str) or not all(isinstance(x, str) and x.strip() for x in prompts):
            raise AlignProError("prompts: give a list of strings that are not empty")
        if samples < 1:
            raise AlignProError(f"samples {samples}: give at least 1")
        drawn = sample_and_score(
            self.model,
            self.tokenizer.pad_token_id,
            self.prompt_ids(prompts),
            [[sample_key("rewrite", seed, x, i) for i in range(first, first + samples)] for x in prompts],
            Sampling(max_tokens=self.max_tokens),
            batch_size=batch_size,
            score=False,
        )
        return [
            [self.template.rewrite(self.tokenizer, x, tuple(ids)) for ids, _ in row]
            for x, row in zip(prompts, drawn, strict=True)
        ]

    def rewrite(self, x: str, *, seed: int = 0) -> str:
        """Draw one rewrite x′ ~ ρ(·|x)."""
        return self.rewrites([x], seed=seed)[0][0]

    def log_probs(self, prompts: Sequence[str], rewrites: Sequence[str]) -> np.ndarray:
        """log ρ(rewrites[i] | prompts[i]) in nats, [n] float64, the end of the turn included."""
        pairs = zip(prompts, rewrites, strict=True)
        said = [self.template.rewrite_ids(self.tokenizer, *pair) for pair in pairs]
        with torch.no_grad():
            scores = log_probs(self.model, self.prompt_ids(prompts), said)
        return scores.log_probs.double().sum(1).cpu().numpy()


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Token ids of `prompt` as the user's turn of the frozen model's chat, after the turns before it."""
    return chat_of(tokenizer).ids(messages_of(prompt))


def check_room(model: Any, prompts: Sequence[str], ids: Sequence[Ids], tokens: int, name: str) -> None:
    """Refuse prompts that leave no room for a continuation of `tokens` in what the model reads."""
    most = room(model)
    if most is None or not ids:
        return
    i = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[i]) + tokens > most:
        shown = prompts[i] if len(prompts[i]) <= 60 else prompts[i][:57] + "..."
        raise AlignProError(
            f"prompt {shown!r}: has {len(ids[i])} tokens to {name}, its template's included, which with "
            f"{tokens} more exceed the {most} that it reads; leave it out (--max-prompt-tokens), or lower "
            "max_tokens"
        )
