"""Packaged rewards that read an answer alone: bounded in [0, 1], cheap, and the same on every machine."""

import functools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.rewards.reward import Array, check_scores, check_texts


@dataclass
class TextReward:
    """A reward that is a function of the answer's text."""

    name: str
    measures: str
    """In words, what a score says."""
    gamed: str
    """In words, how an answer gets a high score without being better."""
    function: Callable[[str], float] = field(repr=False)
    """Makes of an answer a number in [0, 1]."""
    low: float = 0.0
    high: float = 1.0

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response: [n] float64 in [0, 1]."""
        check_texts(prompts, responses)
        scores = np.array([self.function(y) for y in responses], dtype=np.float64)
        return check_scores(prompts, responses, scores, self.low, self.high)

    def describe(self) -> dict[str, Any]:
        """Say what it measures and how it is gamed."""
        return {"name": self.name, "kind": "text", "measures": self.measures, "gamed": self.gamed}


def words_of(text: str) -> list[str]:
    """List the words: runs of letters and digits, with the apostrophes and hyphens inside them."""
    return re.findall(r"\w+(?:['’-]\w+)*", text)


_NO_END = re.compile(
    r"(?:^|[\s(\"“])(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|e\.g|i\.e|[A-HJ-Z])\.$|(?:^|\n)\W*\d+\.$"
)


def sentences_of(text: str) -> list[str]:
    """Divide a text after ., ! and ? (with what closes after them) before white space; not after a title such
    as "Dr.", an initial, or the number of a list's item."""
    found = [""]
    for part in re.split(r"(?<=[.!?])(?=\s)|(?<=[.!?][\"'”’)\]])(?=\s)", text):
        found[-1] += part
        said = found[-1].strip()
        if said and not _NO_END.search(said):
            found.append("")
    return [said.strip() for said in found if said.strip()]


_SILENT = re.compile(
    r"(?<=[^aeiouyl])e$|(?<=[aeiouy]l)e$"  # make, whole; not table
    r"|(?<=[^aeiouytd])ed$|(?<=[aeiouy]l)es$|(?<=[^aeiouysxzcgl])(?<![sc]h)es$"  # asked, makes; not wanted
    r"|(?<=[^aeiouy])e(?:ly|ful|less|ment|ness)s?$"  # safely
)
_APART = re.compile(
    r"(?<![tscg])i(?:a|o(?!n))|(?<![tscgq])ie[tn](?!d)|[aeiou]ing|(?<!p)eo(?!u)|(?<![gq])ua|uou|sms?$"
)
"""Vowels in one run that are spoken apart (media, quiet, doing), and the one of -ism that is not written."""


def syllables_of(word: str) -> int:
    """Estimate the syllables of an English word: its runs of vowels, without silent e; at least 1.

    Of the words in the CMU dictionary 92% get their number, of 1,525 common ones 97%; the mean error is 0.04
    too few (hyphenation patterns, which are also to be had offline, get 62% and 0.42 too few).
    """
    plain = unicodedata.normalize("NFKD", word.casefold())
    letters = re.sub("[^a-z]", "", plain)
    if not letters:  # a number, or another script, which is not to pass for easy
        return max(1, sum(map(str.isalpha, plain)))
    count = len(re.findall("[aeiouy]+", letters)) + len(_APART.findall(letters))
    return max(1, count - len(_SILENT.findall(letters)))


def ease() -> TextReward:
    """Flesch's reading ease over 100, cut to [0, 1]: 0.6 to 0.7 is plain English, 1 a child's book."""

    def flesch(text: str) -> float:
        # The end of a line ends a sentence, since items of lists have no full stops.
        sentences = [words_of(said) for line in text.splitlines() for said in sentences_of(line)]
        words = [word for said in sentences for word in said]
        if not words:
            return 0.0
        syllables = sum(map(syllables_of, words)) / len(words)
        length = len(words) / sum(map(bool, sentences))
        return min(max((206.835 - 1.015 * length - 84.6 * syllables) / 100, 0.0), 1.0)

    return TextReward(
        "ease",
        "Flesch's reading ease of English, (206.835 - 1.015 words/sentence - 84.6 syllables/word) / 100",
        "short words in short sentences, whatever they say: Go. Go. Go.",
        flesch,
    )


def sentiment() -> TextReward:
    """VADER's compound score of the answer (Hutto & Gilbert 2014), from [-1, 1] to [0, 1]; 0.5 is neutral.

    Raises:
        AlignProError: the package is not installed.
    """
    analyzer = _vader()
    return TextReward(
        "sentiment",
        "how positive the words are: VADER's compound score c as (1 + c) / 2, and 0.5 without any such word",
        "praise, exclamation marks and length: it adds up over words and nears 1 in any long, kind text",
        lambda text: (1 + analyzer.polarity_scores(text)["compound"]) / 2,
    )


@functools.cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError:
        raise missing("reward sentiment", "vaderSentiment") from None
    return SentimentIntensityAnalyzer()


def missing(what: str, package: str) -> AlignProError:
    """Say that a package of the extra `rewards` is not installed."""
    return AlignProError(f"{what}: the package {package} is missing; run pip install 'alignpro[rewards]'")


def brevity(words: float = 30) -> TextReward:
    """exp(-n / `words`) for an answer of n words; 0 for one of none."""
    if not 0 < words < math.inf:
        raise AlignProError(f"reward brevity:{words:g}: give a positive number of words")
    return TextReward(
        "brevity" if words == 30 else f"brevity:{words:g}",
        f"exp(-words / {words:g}); 0 for an answer without a word",
        "one word, right or wrong",
        lambda text: math.exp(-n / words) if (n := len(words_of(text))) else 0.0,
    )


def json_format() -> TextReward:
    """1 where the answer is one JSON object or array, in a code fence or not; else 0."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    def parses(text: str) -> float:
        try:
            value = json.loads(unfenced(text), parse_constant=refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(isinstance(value, dict | list))

    return TextReward("json", "1 where the whole answer is a JSON object or array, else 0", "{}", parses)


def unfenced(text: str) -> str:
    """Take the code fence of Markdown off a text that is in one."""
    found = re.fullmatch(r"\s*```\w*\n(.*?)```\s*", text, re.DOTALL)
    return (found[1] if found else text).strip()


_ITEM = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,3}[.)])\s+\S", re.MULTILINE)


def a_list(items: float | None = None) -> TextReward:
    """min / max of the number of a list's items and the one asked for; without one, 1 for two or more."""
    if items is not None and not (items >= 1 and float(items).is_integer()):
        raise AlignProError(f"reward list:{items:g}: give a whole number of items, from 1")

    def share(text: str) -> float:
        found = len(_ITEM.findall(text))
        if items is None:
            return float(found >= 2)
        return min(found, items) / max(found, items)

    what = "1 for two or more items, else 0"
    if items is not None:
        what = f"n / {items:g} or {items:g} / n, whichever is below 1, of n items"
    return TextReward(
        "list" if items is None else f"list:{items:g}",
        f"lines that begin with a bullet or a number: {what}",
        "items that say nothing",
        share,
    )


_FOLDED = str.maketrans("@$0134!57", "asoieaist")
_SWEAR = re.compile(
    r"\b(?!shii?take|shittim)(?:(?:mother|bull|horse|dumb|smart|bad|kick|jack|cluster)-?)?"
    r"(?:f+u+c+k+\w*|s+h+i+t+\w*|a+s+s+(?:es|hole\w*|hat\w*|wipe\w*)?|arse(?:hole)?s?|bitch\w*|bastards?|bollocks"
    r"|bugger(?:ed|ing|s)?|c+u+n+t+s?|cocksucker\w*|crap(?:py|s)?|damn(?:ed|it)?|dickhead\w*|douche(?:bag)?s?"
    r"|goddamn\w*|piss(?:ed|es|ing|er|ers)?|pussy|sluts?|slutty|stfu|twats?|wank\w*|whores?|wtf)\b"
)


def clean() -> TextReward:
    """1 for an answer without a swear word, else 0."""

    def free(text: str) -> float:
        plain = unicodedata.normalize("NFKC", text).casefold()
        # A number stays one: 455 spells nothing.
        words = [w.translate(_FOLDED) if re.search("[a-z]", w) else w for w in plain.split()]
        return float(not (_SWEAR.search(plain) or _SWEAR.search(" ".join(words))))

    return TextReward(
        "clean",
        "1 without an English swear word of a short list, spelt with digits and signs too, else 0",
        "insults in other words; nearly every model's answers have it already",
        free,
    )


TEXTS: dict[str, Callable[..., TextReward]] = {
    "ease": ease,
    "sentiment": sentiment,
    "brevity": brevity,
    "json": json_format,
    "list": a_list,
    "clean": clean,
}
"""The rewards of this module by name: functions that can be called without arguments."""
NUMBERED = ("brevity", "list")
"""Names of those that take a number."""
