"""Frozen targets π_F behind one `respond`: a model in this process (`local.py`), an endpoint (`endpoint.py`).

Sample i of a prompt depends on the seed, the sampling parameters, the prompt and i alone, not on what else is
asked, in which order or batch: in this process up to rounding; an endpoint does with the seed that it is sent
what it can. Answers are data: nothing in them is evaluated. `endpoint` and `ledger` need no torch either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import Sampling, is_int


@dataclass(frozen=True)
class Answer:
    """One y. Its fields are JSON values."""

    text: str
    finish: Literal["stop", "length", "refused"]
    """Why the text ends: `stop` at the end token, `length` when cut off at `max_tokens`. `refused`: the
    service would give no answer, and `text` says why (`alignpro.llm.rewards.scores` has what it is worth)."""
    prompt_tokens: int
    tokens: int
    """Tokens generated, the end token included where the backend counts it."""
    ids: tuple[int, ...] | None = None
    """Ids of the tokens generated, end token included; None from an endpoint that is asked by messages.
    Cutting `text` afresh may give others."""
    thought: bool = False
    """Whether a leading thought was taken off `text`, here or by the service; `ids` hold it."""
    log_prob: float | None = None
    """log π_F(y|x′) of the ids in nats, as vLLM told it when it drew them from the model's own distribution;
    None otherwise."""

    def __post_init__(self) -> None:
        if self.ids is not None:
            object.__setattr__(self, "ids", tuple(map(int, self.ids)))  # a list, from JSON
        if not self.text.isascii():  # half a character, which no file can hold, is read as decoders read it
            text = self.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            object.__setattr__(self, "text", text)


Answers = dict[tuple[int, int], Answer]
OnAnswer = Callable[[int, int, Answer], None]
Known = Callable[[int, int], Answer | None]
"""The answer at (position in prompts, sample index), where there is one."""


class Stopped(AlignProError):
    """`respond` ended before everything was answered: a spent budget or a failing target.

    Attributes:
        reason: `max_calls`, `max_tokens` (budgets), `failed` or `stopped` (by an interrupt).
        answers: what was answered before, {(position in prompts, sample index): Answer}.
    """

    def __init__(self, message: str, reason: str, answers: Answers) -> None:
        super().__init__(message)
        self.reason = reason
        self.answers = answers


class Target(Protocol):
    """A frozen model π_F(y|x′)."""

    name: str

    @property
    def calls(self) -> int:
        """Requests sent, or sequences generated, so far."""
        ...

    @property
    def retried(self) -> int:
        """Calls that repeated a failed one."""
        ...

    @property
    def remote(self) -> bool:
        """Whether another machine is asked, for money maybe: `respond` takes `known` and `meter` too then."""
        ...

    @property
    def revision(self) -> str:
        """Changes whenever the answers' distribution may: part of the cache key."""
        ...

    def respond(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
    ) -> list[list[Answer]]:
        """[len(prompts)][samples]: samples `first … first+samples−1` of each prompt.

        Args:
            prompts: x′, the user's turn.
            first: index of the first sample, one for all prompts or one each.
            on_answer: called with (position, sample index, answer) as each arrives.

        Raises:
            AlignProError: bad arguments, before any work.
            Stopped: some were not answered; carries those that were.
        """
        ...


def check_strings(**named: Sequence[Any]) -> None:
    """Refuse anything but strings in each of the named lists."""
    for name, texts in named.items():
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise AlignProError(f"{name}[{i}] is {type(text).__name__}: give a string")


def check_paired(prompts: Sequence[str], responses: Sequence[Any]) -> None:
    """Refuse anything but one response per prompt."""
    if len(prompts) != len(responses):
        raise AlignProError(
            f"{len(prompts)} prompts and {len(responses)} responses: give one response per prompt"
        )


def jobs(
    prompts: Sequence[str], first: Sequence[int] | int, samples: int, seed: int
) -> list[tuple[int, int]]:
    """(position, sample index) of every answer that `respond` is asked for, its arguments checked."""
    if isinstance(prompts, str):
        raise AlignProError("prompts: give a list of strings, not one string")
    check_strings(prompts=prompts)
    if not is_int(samples) or samples < 1:
        raise AlignProError(f"samples {samples!r}: choose a whole number of at least 1")
    if not is_int(seed):
        raise AlignProError(f"seed {seed!r}: choose a whole number")
    starts = list(first) if isinstance(first, Sequence) else [first] * len(prompts)
    if len(starts) != len(prompts):
        raise AlignProError(f"first has {len(starts)} entries for {len(prompts)} prompts: give one for each")
    for start in starts:
        if not is_int(start) or start < 0:
            raise AlignProError(f"first {start!r}: choose a whole number of at least 0")
    return [(p, i) for p, start in enumerate(starts) for i in range(int(start), int(start) + samples)]


def arrange(asked: Sequence[tuple[int, int]], answers: Answers, prompts: int) -> list[list[Answer]]:
    """[prompts][samples], the shape that `respond` returns."""
    out: list[list[Answer]] = [[] for _ in range(prompts)]
    for position, index in asked:
        out[position].append(answers[position, index])
    return out
