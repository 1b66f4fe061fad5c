"""Answers and responses as token ids, alike for every frozen model that is asked by them. Needs no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.prompt import messages_of
from alignpro.llm.targets.target import Answer, check_paired, check_strings

Ids = tuple[int, ...]


def prompt_ids(tokenizer: Any, prompt: str) -> Ids:
    """Token ids of `prompt` as the user's turn, after the turns before it."""
    return chat_of(tokenizer).ids(messages_of(prompt))


def ids_of(tokenizer: Any, prompts: Sequence[str]) -> list[Ids]:
    """`prompt_ids` of each prompt; equal ones are cut once.

    Raises:
        AlignProError: a prompt without tokens.
    """
    found: dict[str, Ids] = {}
    for i, prompt in enumerate(prompts):
        if prompt not in found:
            found[prompt] = prompt_ids(tokenizer, prompt)
        if not found[prompt]:
            raise AlignProError(f"prompts[{i}] has no tokens; give a prompt that is not empty")
    return [found[prompt] for prompt in prompts]


def answer_of(
    tokenizer: Any, asked: int, new: Sequence[int], finish: Literal["stop", "length"], log_prob: float | None
) -> Answer:
    """The answer that the tokens `new` are, after a prompt of `asked` tokens."""
    # Without the "clean-up" of some tokenizers, which moves spaces before punctuation.
    said = chat_of(tokenizer).said(new, clean_up_tokenization_spaces=False)
    return Answer(said.text, finish, asked, len(new), tuple(new), said.thought, log_prob)


@dataclass(frozen=True)
class Sequences:
    """Sequences to be scored for the log-probabilities of responses, and these as they become known."""

    rows: list[tuple[int, Ids, Ids]]
    """Which response, its prompt's tokens, and its own. A string has one row for each token that ends it."""
    values: np.ndarray
    """[n] float64, nats: −inf where nothing is known yet, 0 of an answer without tokens, NaN of a refusal."""
    strings: tuple[bool, ...]
    """Which responses are strings."""

    def add(self, row: tuple[int, Ids, Ids], value: float) -> None:
        """Take in the log-probability of a row."""
        i = row[0]
        self.values[i] = np.logaddexp(self.values[i], value) if self.strings[i] else value


def to_score(
    tokenizer: Any,
    ends: Sequence[int],
    prompts: Sequence[str],
    responses: Sequence[str | Answer],
    too_long: Callable[[int, int], str | None],
) -> Sequences:
    """The sequences that `LocalTarget.log_probs` speaks of.

    Args:
        ends: ids of the tokens that end a turn.
        too_long: says why a prompt of so many tokens leaves no room for so many more, if it does.

    Raises:
        AlignProError: not as many prompts as responses; an answer without token ids; no room for a pair.
    """
    check_paired(prompts, responses)
    check_strings(prompts=prompts)
    for i, response in enumerate(responses):
        if not isinstance(response, str | Answer):
            raise AlignProError(f"responses[{i}] is {type(response).__name__}: give a string or an answer")
        if isinstance(response, Answer) and response.finish != "refused" and response.ids is None:
            raise AlignProError(
                f"responses[{i}] has no token ids (an endpoint's that is asked by messages, or one from an "
                "older cache): answer it again in this process, or name the endpoint's tokenizer"
            )
    kept = [i for i, r in enumerate(responses) if isinstance(r, str) or r.finish != "refused"]
    values = np.full(len(prompts), np.nan)
    rows: list[tuple[int, Ids, Ids]] = []
    for i, ids in zip(kept, ids_of(tokenizer, [prompts[i] for i in kept]), strict=True):
        response = responses[i]
        if isinstance(response, str):
            # All but the end is shared.
            said = chat_of(tokenizer).text_ids(response)
            rows += [(i, ids, (*said, end)) for end in ends]
            values[i] = -np.inf
        else:
            rows += [(i, ids, response.ids)] if response.ids else []
            values[i] = 0.0
    for i, ids, said in rows:
        if (reason := too_long(len(ids), len(said))) is not None:
            raise AlignProError(f"prompts[{i}]: {reason}; shorten it")
    return Sequences(rows, values, tuple(isinstance(r, str) for r in responses))
