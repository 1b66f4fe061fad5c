"""The packaged rewards of texts: against Flesch's formula by hand, VADER's published examples, and slips."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.llm.rewards import instructions, texts
from alignpro.llm.rewards.opening import REWARDS, load_reward

ODD = [
    "",
    " \n\t",
    "\x00",
    "\u202eabc",
    "漢字",
    "😀" * 50,
    "e\u0301té",
    "a" * 20_000,
    "[" * 5000,
    "1" * 6000,
    "``````",
]
ROWS = [*texts.TEXTS, "brevity:5", "list:4"]


def of(name, *answers):
    return load_reward(name).score(["a prompt"] * len(answers), list(answers)).tolist()


@pytest.mark.parametrize("name", ROWS)
def test_every_text_has_a_finite_score_in_range_and_the_same_one_each_time(name):
    reward = load_reward(name)
    scores = reward.score([""] * len(ODD), ODD)
    assert scores.shape == (len(ODD),)
    assert ((reward.low <= scores) & (scores <= reward.high)).all()
    np.testing.assert_array_equal(scores, load_reward(name).score(["other"] * len(ODD), ODD))
    assert reward.score([], []).shape == (0,)
    facts = reward.describe()
    assert facts["name"] == name
    assert facts["measures"]
    assert facts["gamed"]
    json.dumps(facts, allow_nan=False)


# --- reading ease ---

SYLLABLES = """
the 1 cat 1 make 1 whole 1 table 2 asked 1 wanted 2 makes 1 changes 2 boxes 2 safely 2 careful 2 reading
2 doing 2 media 3 quiet 2 radio 3 nation 2 special 2 station 2 prism 2 optimism 4 usual 3 people 2 queen
1 hyphenated 4 impossibility 6 statement 2 rules 1 little 2 called 1 played 1 rhythm 1 1984 1 a 1
"""
"""Words with their syllables, counted by ear; rhythm and 1984 as the rules have them."""


def test_syllables_are_those_that_are_heard():
    def check(module):
        pairs = re.findall(r"(\S+) (\d)", SYLLABLES)
        wrong = [(w, module.syllables_of(w), int(n)) for w, n in pairs if module.syllables_of(w) != int(n)]
        assert not wrong

    check(texts)
    for right, wrong in (
        ('count = len(re.findall("[aeiouy]+"', 'count = len(re.findall("[aeiou]+"'),
        ("- len(_SILENT.findall(letters))", "- 0"),
        ("+ len(_APART.findall(letters))", "+ 0"),
        ("ed$|(?<=[aeiouy]l)es$", "ed$|(?<=[aeiou]l)esx$"),
    ):
        kills(check, mutated(texts, right, wrong))


def test_ease_is_fleschs_formula():
    """Words, sentences and syllables of each text are counted by hand; the last is cut at 0."""

    def check(module):
        for text, words, sentences, syllables in (
            ("The cat sat on the mat.", 6, 1, 6),
            ("Reading is a quiet thing to do. It takes little time!", 11, 2, 14),
            ("Dr. Smith asked: “What is it?” Nobody answered", 8, 2, 11),
            ("1. Make a table\n2. Paint it", 7, 2, 8),
            ("Impossibility statement optimism, impossibility.", 4, 1, 18),
        ):
            flesch = 206.835 - 1.015 * words / sentences - 84.6 * syllables / words
            expected = min(max(flesch / 100, 0), 1)
            (found,) = module.ease().score([""], [text])
            assert found == pytest.approx(expected, abs=1e-12), text

    check(texts)
    for right, wrong in (
        ("84.6 * syllables", "84 * syllables"),
        ("1.015 * length", "1.15 * length"),
        ("if said and not _NO_END.search(said)", "if said"),
    ):
        kills(check, mutated(texts, right, wrong))
    assert of("ease", "", "...", "漢字" * 40) == [0, 0, 0]  # nothing to read, or nothing that it can


# --- sentiment ---


def test_sentiment_is_vaders():
    """Compound scores of the examples in VADER's documentation."""
    published = {
        "VADER is smart, handsome, and funny.": 0.8316,
        "VADER is smart, handsome, and funny!": 0.8439,
        "VADER is very smart, handsome, and funny.": 0.8545,
        "VADER is VERY SMART, handsome, and FUNNY.": 0.9227,
        "VADER is not smart, handsome, nor funny.": -0.7424,
        "The book was good.": 0.4404,
        "At least it isn't a horrible book.": 0.431,
        "Today SUX!": -0.5461,
    }

    def check(module):
        found = module.sentiment().score([""] * len(published), list(published))
        np.testing.assert_allclose(found, [(1 + c) / 2 for c in published.values()], atol=6e-5)

    check(texts)
    kills(check, mutated(texts, '(text)["compound"]) / 2', '(text)["compound"] ** 3) / 2'))
    assert of("sentiment", "", "The table is made of wood.") == [0.5, 0.5]


@pytest.mark.parametrize(
    ("use", "loader", "package"),
    [
        (lambda: load_reward("sentiment"), texts._vader, "vaderSentiment"),
        (lambda: instructions.response_language("hello", "en"), instructions._detector, "langdetect"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(use, loader, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.{package}", None)
    loader.cache_clear()
    with pytest.raises(AlignProError, match=rf"{package} is missing; run pip install 'alignpro\[rewards\]'"):
        use()
    monkeypatch.undo()
    use()


# --- forms ---


def test_brevity_falls_by_words():
    def check(module):
        answers = ["one", "one two three", "don't well-known", "", "..."]
        found = module.brevity().score([""] * 5, answers)
        np.testing.assert_allclose(found, [math.exp(-1 / 30), math.exp(-0.1), math.exp(-2 / 30), 0, 0])
        np.testing.assert_allclose(module.brevity(2).score([""], ["a b"]), math.exp(-1))

    check(texts)
    for right, wrong in (("math.exp(-n / words)", "math.exp(-n / 30)"), ("else 0.0,", "else 1.0,")):
        kills(check, mutated(texts, right, wrong))
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(AlignProError, match="a positive number of words"):
            texts.brevity(bad)


def test_json_is_an_object_or_an_array_and_nothing_else():
    def check(module):
        right = ['{"a": [1, null]}', " [] ", '```json\n{"a": 1}\n```', "```\n[1]\n```\n"]
        wrong = [
            "5",
            '"text"',
            "null",
            "{'a': 1}",
            '{"a": 1} and more',
            "[NaN]",
            "[Infinity]",
            "```json\n{\n```",
        ]
        found = module.json_format().score([""] * len(right + wrong), right + wrong)
        assert found.tolist() == [1.0] * len(right) + [0.0] * len(wrong)

    check(texts)
    for right, wrong in (
        (", parse_constant=refuse", ""),
        ("isinstance(value, dict | list)", "value is not None"),
        ("unfenced(text), parse", "text, parse"),
    ):
        kills(check, mutated(texts, right, wrong))


def test_lists_have_the_items_asked_for():
    three = "Here they are:\n- a\n* b\n  3) c\n"

    def check(module):
        def score(text, *number):
            return module.a_list(*number).score([""], [text])[0]

        assert [score(three, n) for n in (3, 6, 1)] == [1, 1 / 2, 1 / 3]
        assert [score(text, 2) for text in ("1. a\n2. b", "(1) a\n(2) b", "• a\n• b")] == [1, 1, 1]
        assert [score(text, 2) for text in ("", "a, b", "**a**\n**b**", "---\n---", "1.5\n2.5")] == [0] * 5
        assert [score(text) for text in (three, "- a", "")] == [1, 0, 0]

    check(texts)
    for right, wrong in (
        ("min(found, items) / max(found, items)", "float(found == items)"),
        ("found >= 2", "found >= 1"),
        ('\\s+\\S"', '\\s*\\S"'),
    ):
        kills(check, mutated(texts, right, wrong))
    for bad in (0, -2, 1.5, math.inf):
        with pytest.raises(AlignProError, match="a whole number of items"):
            texts.a_list(bad)


def test_clean_answers_are_without_swear_words():
    swearing = ["Oh shit.", "FUCK", "f u", "what an a$$hole", "bull-sh1t", "Ｆｕｃｋ it", "dumbass!", "wtf"]
    innocent = (
        "Put the pot on the stove; god knows a stroke can kill. Assess the class in Scunthorpe, 455 of them. "
        "Shiitake, cocktails, Moby Dick, a parsed passage, the bass, Essex, a documented title."
    )

    def check(module):
        found = module.clean().score([""] * len(swearing), swearing)
        assert found.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
        assert module.clean().score([""] * 2, [innocent, ""]).tolist() == [1, 1]

    check(texts)
    for right, wrong in (
        ('or _SWEAR.search(" ".join(words))', "or False"),
        ('normalize("NFKC", text)', 'normalize("NFC", text)'),
        (' if re.search("[a-z]", w) else w', ""),
        ("(?!shii?take|shittim)", ""),
    ):
        kills(check, mutated(texts, right, wrong))


def test_the_document_tells_of_every_packaged_reward():
    """Range, what it measures and how it is gamed, in a row of the table."""
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)`[^|]*\|[^|]+\| *\[0, 1\] *\|[^|]+\|$", page, re.MULTILINE)
    assert rows == list(REWARDS)
