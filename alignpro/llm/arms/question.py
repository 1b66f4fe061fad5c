"""The question that a judge is asked about two answers, and how its reply is read.

Question and answers are fenced (`alignpro.llm.targets.quoting`); a reply counts only with exactly one
verdict.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignpro.llm.rewards.rubric import CRITERIA, listed
from alignpro.llm.targets.quoting import fenced, read_line

FAILURES = {
    "refused": "a service would give no reply, or had given no answer to judge",
    "empty": "nothing was said",
    "cut_off": "the reply reached max_tokens, and might have gone on to another verdict",
    "none": "no verdict",
    "malformed": "a verdict that is not one of A, B and TIE, or not on a line of its own",
    "several": "more than one verdict",
}
"""Why a reply is no verdict."""

Choice = Literal["A", "B", "TIE"]
"""The better answer: A is shown first, B second."""


def question(x: str, first: str, second: str, control: Sequence[str] = ()) -> str:
    """The text that asks a judge whether `first` (A) or `second` (B) answers `x` better; see `quoted`."""
    texts = {"QUESTION": x, "ANSWER A": first, "ANSWER B": second}
    return "\n\n".join(
        [
            "You are an impartial judge of two answers to one question. Decide which answer is better by "
            f"these criteria: {listed(CRITERIA)}. Neither the order in which the answers are shown nor their "
            "length alone counts.",
            *fenced("The question and the answers", texts, control, "verdict"),
            "Compare the answers in at most three sentences. Then end with one line that holds VERDICT: and "
            "after it A, B or TIE, and nothing else.",
        ]
    )


@dataclass(frozen=True)
class Reading:
    """The content of one reply of a judge."""

    choice: Choice | None
    """The better answer; None where the reply gives no verdict."""
    failure: str | None
    """Why there is no verdict, a key of `FAILURES`; None where there is one."""
    text: str
    """The reply as it came."""


def read_verdict(text: str, finish: str = "stop") -> Reading:
    """Find the one verdict in a reply that ended by `finish` (see `Answer`); a <think> block is not read."""
    value, failure = read_line(text, finish, "verdict", r"(?:answer[ \t]+)?(A|B|TIE)")
    choice: Any = value and value.upper()
    return Reading(choice, failure, text)
