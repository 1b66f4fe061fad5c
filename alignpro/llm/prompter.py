"""How a language model becomes a prompter: the rewriting template around x, and x′ back from its tokens."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True)
class Template:
    """The rewriting instruction: a system message, examples, and the words that open the prompter's turn.

    ρ_sft is the language model behind this template. The opening words leave a small model nothing to add
    before the rewrite itself.
    """

    system: str = "Rewrite the request so that its answer will be more helpful. Keep its meaning."
    examples: tuple[tuple[str, str], ...] = (
        ("How do plants grow?", "Explain step by step, in simple words, how plants grow from a seed."),
        ("Name a famous painter.", "Name a famous painter and say what made their work important."),
        ("Tips for sleeping better", "What are some practical tips for sleeping better at night?"),
    )
    request: str = "Request: "
    opening: str = "Rewritten:"
    space: str = " "
    """Between the opening words and the rewrite; part of the rewrite's first token."""

    def messages(self, x: str) -> list[Message]:
        """The conversation that ends with the request to rewrite x."""
        out = [{"role": "system", "content": self.system}] if self.system else []
        for before, after in self.examples:
            out.append({"role": "user", "content": self.request + before})
            out.append({"role": "assistant", "content": self.opening + self.space + after})
        return [*out, {"role": "user", "content": self.request + x}]

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase, x: str) -> tuple[int, ...]:
        """Token ids that the prompter continues with x′."""
        return _chat_ids(tokenizer, self.messages(x), self.opening)

    def rewrite_ids(self, tokenizer: PreTrainedTokenizerBase, rewrite: str) -> tuple[int, ...]:
        """Token ids with which the prompter says `rewrite` and ends its turn."""
        ids = tokenizer(self.space + rewrite, add_special_tokens=False).input_ids
        return (*ids, tokenizer.eos_token_id)

    @staticmethod
    def text(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
        """x′ as text: special tokens and surrounding white space removed."""
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def target_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Token ids of `prompt` as the user's turn of the frozen model's chat."""
    return _chat_ids(tokenizer, [{"role": "user", "content": prompt}])


def _chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], opening: str = ""
) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(str(text) + opening, add_special_tokens=False).input_ids)
