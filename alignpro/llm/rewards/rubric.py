"""A judge's rubric: its settings, what it is asked about one answer, and how its reply is read.

Needs neither torch nor NumPy.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import context_of, transcript
from alignpro.llm.models.sampling import Sampling, digest, is_int
from alignpro.llm.targets.quoting import fenced, read_line
from alignpro.llm.targets.target import Answer

if TYPE_CHECKING:
    from alignpro.llm.targets.ledger import Prices

CRITERIA = ("helpfulness", "harmlessness", "relevance", "accuracy", "depth", "creativity", "level of detail")
"""The seven criteria of the paper's Table 1."""
YES, NO = "Yes", "No"
"""The replies of a judge on the scale yes-no."""
FAILURES = {
    "empty": "nothing was said",
    "cut_off": "the reply reached its limit of tokens, and might have gone on to another score",
    "none": "no score; on yes-no, neither word among the likeliest first tokens",
    "malformed": "a score that is no whole number from 1 to 10, or not on a line of its own",
    "several": "more than one score",
    "refused": "the judge's service would not reply",
}
"""Why a reply is no score."""
ABSENT = -9999.0
"""A log-probability by which services say that a token is not among the likeliest."""
TRIES = 3
"""How often an answer is put to a judge whose replies cannot be read, at most."""


def listed(words: Sequence[str]) -> str:
    """The words as a list in a sentence."""
    return f"{', '.join(words[:-1])} and {words[-1]}"


RUBRIC = (
    f"The answer serves the one who asked, by these criteria: {listed(CRITERIA)}. Its length alone does not "
    "count."
)


class Scale(NamedTuple):
    """A way to ask for a score, and to read the reply."""

    task: str
    """Begins the question, before the rubric."""
    ending: str
    """Ends the question."""
    read: Callable[[Answer], tuple[float | None, str | None]]
    """The score in [0, 1] and None; or None and a key of `FAILURES`."""
    drawn: bool
    """Whether the reply is drawn, so that asking again may give another."""


def read_number(reply: Answer) -> tuple[float | None, str | None]:
    """Read the one line `SCORE: n`: (n − 1)/9."""
    value, failure = read_line(
        reply.text, reply.finish, "score", r"(10|[1-9])(?:[ \t]*(?:/|out of)[ \t]*10)?"
    )
    return (None, failure) if value is None else ((int(value) - 1) / 9, None)


def read_tokens(reply: Answer) -> tuple[float | None, str | None]:
    """Read the log-probabilities of words: P(yes)/(P(yes) + P(no)), spellings in case and space summed.

    A word that is not among them counts as 0; without either there is no score.
    """
    if reply.finish == "refused":
        return None, "refused"
    found: dict[str, list[float]] = defaultdict(list)
    for token, value in json.loads(reply.text):
        # Byte-level and SentencePiece marks of a space, where a server leaves them in.
        if value > ABSENT:
            found[token.replace("\u0120", " ").replace("\u2581", " ").strip().casefold()].append(value)
    yes, no = (found[word.casefold()] for word in (YES, NO))
    most = max([*yes, *no], default=-math.inf)
    if most == -math.inf:
        return None, "none"
    p, q = (sum(math.exp(value - most) for value in values) for values in (yes, no))
    return p / (p + q), None


SCALES = {
    "1-10": Scale(
        "Score it by this rubric:",
        "Explain in at most three sentences. Then end with one line that holds SCORE: and after it a whole "
        "number from 1, the worst, to 10, the best, and nothing else.",
        read_number,
        True,
    ),
    "yes-no": Scale(
        "Decide whether it meets this rubric:",
        f"Reply with one word and nothing else: {YES} if the answer meets the rubric, {NO} if it does not.",
        read_tokens,
        False,
    ),
}
"""Ways to score, by name."""


def question(rubric: str, scale: str, x: str, y: str, control: Sequence[str] = (), again: int = 0) -> str:
    """The text that asks a judge to score the answer `y` to `x` on `rubric`; both are fenced (`quoting`).

    Args:
        control: control tokens of the judge's tokenizer.
        again: another number puts the same in other words: another code around what is quoted.
    """
    asked, what = "QUESTION", "one question"
    if context_of(x):
        asked, what = "CONVERSATION", "the last message of a conversation"
    texts = {asked: transcript(x), "ANSWER": y}
    return "\n\n".join(
        [
            f"You are an impartial judge of one answer to {what}. {SCALES[scale].task}",
            rubric,
            *fenced(f"The {asked.lower()} and the answer", texts, control, "score", again),
            SCALES[scale].ending,
        ]
    )


@dataclass(frozen=True)
class JudgeRewardSettings:
    """A judge as a reward: the model, and how it scores."""

    judge: str | None = None
    """For --reward judge: the model that scores the answers, a packaged name, a local folder, a hub id, or
    the http(s) address of an OpenAI-compatible endpoint, with the options of a reward's endpoint."""
    rubric: str | None = None
    """For --reward judge: what makes an answer good, as text, or the file that says it. Left out: the paper's
    seven criteria."""
    scale: Literal["1-10", "yes-no"] = "1-10"
    """For --reward judge: 1-10 has the judge write a score, which becomes 0 to 1; yes-no takes the
    probability of its saying yes rather than no to whether the answer meets the rubric."""
    reply_tokens: int = 256
    """For --reward judge on 1-10: tokens of a reply, at most; one that reaches them has failed. A judge that
    reasons first needs more."""
    temperature: float = 0.0
    """For --reward judge on 1-10: how freely the judge draws its reply; 0 takes the likeliest token."""
    repeats: int = 20
    """For --reward judge: how many of the first answers are scored twice, in questions that differ in the
    code around what is quoted, to tell the judge's own noise. 0 measures none."""
    prices: tuple[float, float] | None = None
    """For --reward judge: money for a million tokens of the judge's prompts, and of its replies. Left out:
    tokens alone are counted."""

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise AlignProError(f"reward_scale {self.scale!r}: choose from {', '.join(SCALES)}")
        for name, least in (("reply_tokens", 1), ("repeats", 0)):
            value = getattr(self, name)
            if not is_int(value) or value < least:
                raise AlignProError(f"reward_{name} {value!r}: give a whole number of at least {least}")
        if self.temperature and not SCALES[self.scale].drawn:
            raise AlignProError(
                f"reward_temperature {self.temperature}: on yes-no nothing is drawn; leave it at 0"
            )
        self.sampling()
        self.priced()

    def given(self) -> list[str]:
        """Names of the fields that are not at their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    @property
    def address(self) -> bool:
        """Whether the judge is asked at an address."""
        return (self.judge or "").startswith(("http://", "https://"))

    def replies(self, answers: int) -> int:
        """How many replies so many answers take, repeats included and failures apart."""
        return answers + min(self.repeats, answers)

    def bill(self, answers: int, tokens: int) -> str:
        """Say what scoring so many answers asks of the judge, to end a line with.

        Args:
            tokens: those of a prompt and its answer, at most.
        """
        replies, most = self.replies(answers), self.sampling().max_tokens
        said = f"; {replies} replies of a judge, of at most {most} tokens each"
        if (prices := self.priced()) is None:
            return said
        asked = len(question(self.text(), self.scale, "", "")) // 4 + tokens
        cost = prices.cost(replies * asked, replies * most)
        return f"{said}, about {cost:.2f} at most where none has to be asked again"

    def priced(self) -> "Prices | None":
        """The prices; None where they are not known. Raises AlignProError where they are none."""
        if self.prices is None:
            return None
        from alignpro.llm.targets.ledger import Prices

        return Prices(*self.prices)

    def sampling(self, attempt: int = 0) -> Sampling:
        """How the judge decodes.

        A failed reply is asked again at temperature 1 where it was 0, since it would come again.
        """
        if not SCALES[self.scale].drawn:
            return Sampling(max_tokens=1)  # the model's own distribution, whose first token is looked at
        return Sampling(self.temperature or float(attempt > 0), max_tokens=self.reply_tokens)

    def text(self) -> str:
        """The rubric in words, read from its file where it names one."""
        if self.rubric is None:
            return RUBRIC
        path, text = Path(self.rubric).expanduser(), self.rubric
        try:
            there = path.is_file()
        except (OSError, ValueError):  # no name that a file could have
            there = False
        if there:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise AlignProError(f"reward_rubric {self.rubric}: cannot be read ({error})") from None
        if not text.strip():
            raise AlignProError("reward_rubric: is empty; say what makes an answer good, or leave it out")
        if not there and len(text.split()) == 1:
            raise AlignProError(f"reward_rubric {text[:80]!r}: no such file; give one, or a sentence")
        return text.strip()

    def shown(self, model: str | None) -> str:
        """Name the reward by all that its scores depend on; `model` is what an endpoint serves."""
        drawn = f", temperature {self.temperature:g}" if self.temperature else ""
        limit = f", {self.reply_tokens} tokens" if SCALES[self.scale].drawn else ""
        where = f"{model} at {self.judge}" if model else str(self.judge)
        rubric = digest(self.text()).hex()[:8]
        return f"judge {where}, scale {self.scale}, rubric {rubric}{drawn}{limit}"

    def record(self) -> dict[str, Any]:
        """Say for a run's record what scores depend on, beside the judge; nothing where there is none."""
        names = ("scale", "reply_tokens", "temperature")
        said = {name: getattr(self, name) for name in names}
        return {"reward_judge": {"judge": self.judge, "rubric": self.text(), **said}} if self.judge else {}
