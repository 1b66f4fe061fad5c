"""Instructions that code can check: each checker on answers that follow and that do not, and the reward."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.llm.data.public import prompts
from alignpro.llm.data.rows import Reading
from alignpro.llm.data.verifiable import verifiable as written
from alignpro.llm.models.prompt import Prompt
from alignpro.llm.rewards import instructions, verifiable
from alignpro.llm.rewards.instructions import CHECKERS
from alignpro.llm.rewards.opening import load_reward, read_spec
from alignpro.llm.rewards.verifiable import Verifiable, instructions_of

AT_LEAST, LESS = "at least", "less than"
CASES = {
    "keywords:existence": ({"keywords": ["Red", "blue"]}, ["Blue and redder"], ["red", ""]),
    "keywords:frequency": (
        {"keyword": " sea ", "frequency": 2, "relation": AT_LEAST},
        ["Sea and seaside"],
        ["one sea", "see see"],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["concatenate"], ["A Cat!", "cat"]),
    "keywords:letter_frequency": (
        {"letter": "Q", "let_frequency": 2, "let_relation": LESS},
        ["quick", ""],
        ["Quick quiz"],
    ),
    "language:response_language": (
        {"language": "fr"},
        [
            "Bonjour, je suis très heureux de vous voir ici ce matin.",
            "12",
        ],  # a text without a language passes
        ["Good morning, I am very happy to see you here today."],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": AT_LEAST},
        ["One. Two!", "Really? Dr. Who knows."],
        ["One, two", "Ask Dr. Who."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["one *** two", "***\none\n***\ntwo\n***"],
        ["one", "one *** *** two", "one\n\ntwo"],
    ),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": LESS},
        ["two words", "--- two words ..."],
        ["it's two"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "They"},
        ['Owls.\n\n"They, too', "Owls.\n\nthey"],
        ["Owls.\nthey", "They.\n\nOwls", "A.\n\nThey\n\nB", "Owls.\n\nTheya"],
    ),
    "detectable_content:number_placeholders": (
        {"num_placeholders": 2},
        ["Dear [name], [date]"],
        ["[name\n] [a]", "Dear [name]"],
    ),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["x p. s. y", "P.S. z"], ["PS: y"]),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n  - b"],
        ["* a", "**a**\n* b", "* a\n* b\n* c"],
    ),
    "detectable_format:constrained_response": ({}, ["So: My answer is maybe."], ["My answer is Yes.", "yes"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and *b*"],
        ["*a*", "** **", "*a\nb* *c*"],
    ),
    "detectable_format:multiple_sections": (
        {"num_sections": 2, "section_spliter": "Part "},
        ["Part 1 x Part 2 y", "Part1 Part2"],
        ["Part 1", "part 1 part 2"],
    ),
    "detectable_format:json_format": ({}, ['{"a": 1}', "```json\n[1]\n```", "5"], ["{a: 1}", "", "json [1]"]),
    "detectable_format:title": ({}, ["<<A song>> la"], ["<A song>", "<< >>", "<<a\nb>>"]),
    "combination:two_responses": (
        {},
        ["a ****** b", "****** a ****** b ******"],
        ["a ****** a", "a", "a ****** b ****** c", "a ****** ****** b"],
    ),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Why? "}, ["why? Because."], ["So, why? Because."]),
    "startend:end_checker": ({"end_phrase": "The End. "}, ['x "the end."', "The end. "], ["The end. Not"]),
    "startend:quotation": ({}, [' "a" '], ['"', "'a'", '"a".', 'a "b"']),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["STOP HERE now", "WELL-MADE I"],
        ["Stop HERE", "WELL-MADE"],
    ),
    "change_case:english_capital": (
        {},
        ["THE WEATHER IS VERY FINE THIS MORNING"],
        ["THE weather IS FINE", "ПОГОДА СЕГОДНЯ ОЧЕНЬ ХОРОШАЯ"],
    ),
    "change_case:english_lowercase": (
        {},
        ["the weather is very fine this morning"],
        ["The weather is fine", "le temps est très beau ce matin, mes amis"],
    ),
    "punctuation:no_comma": ({}, ["a; b"], ["a, b"]),
}
"""By instruction: arguments, answers that follow it, answers that do not."""

MUTANTS = {
    "keywords:existence": ("return all(re.search(_pattern(word)", "return any(re.search(_pattern(word)"),
    "keywords:frequency": ("_pattern(keyword.strip()), answer, re.IGNORECASE", "_pattern(keyword), answer"),
    "keywords:forbidden_words": (r'rf"\b{_pattern(word)}\b"', "_pattern(word)"),
    "keywords:letter_frequency": ("[letter.strip().lower()]", "[letter]"),
    "language:response_language": ("in (language, None)", "== language"),
    "length_constraints:number_sentences": ("len(sentences_of(answer))", 'answer.count(".")'),
    "length_constraints:number_paragraphs": (
        "all(parts[1:-1]) and len([part for part in parts if part])",
        "len([part for part in parts if part])",
    ),
    "length_constraints:number_words": (r're.findall(r"\w+", answer)', "answer.split()"),
    "length_constraints:nth_paragraph_first_word": ("full == num_paragraphs and", ""),
    "detectable_content:number_placeholders": (r'"\[.*?\]"', r'"\[.*\]"'),
    "detectable_content:postscript": (r'r"p\.\s?s\."', r'r"p\.s\."'),
    "detectable_format:number_bullet_lists": (r"\*[^\*].*$", r"\*.*$"),
    "detectable_format:constrained_response": ('("yes", "no", "maybe")', '("yes", "no")'),
    "detectable_format:number_highlighted_sections": ("if found.strip()]", "]"),
    "detectable_format:multiple_sections": ("section_spliter.strip())", "section_spliter)"),
    "detectable_format:json_format": ('text.removesuffix("```").strip()', "text.strip()"),
    "detectable_format:title": (r"<<[^\n]+>>", r"<<(?s:.)+>>"),
    "combination:two_responses": ("and full[0] != full[1]", ""),
    "combination:repeat_prompt": (
        ".startswith(prompt_to_repeat.strip()",
        ".__contains__(prompt_to_repeat.strip()",
    ),
    "startend:end_checker": (""".strip('"').lower()""", ".lower()"),
    "startend:quotation": ("len(text) > 1 and ", ""),
    "change_case:capital_word_frequency": (
        "for word in words_of(answer)",
        r'for word in re.findall(r"\w+", answer)',
    ),
    "change_case:english_capital": (
        'answer.isupper() and _language(answer) in ("en", None)',
        "answer.isupper()",
    ),
    "change_case:english_lowercase": (
        'answer.islower() and _language(answer) in ("en", None)',
        "answer.islower()",
    ),
    "punctuation:no_comma": ('"," not in answer', '"," in answer'),
}


@pytest.mark.parametrize("name", CHECKERS)
def test_a_checker_knows_who_follows(name):
    arguments, follow, fail = CASES[name]

    def check(module):
        for answer in follow + fail:
            assert bool(module.CHECKERS[name](answer, **arguments)) == (answer in follow), answer

    check(instructions)
    kills(check, mutated(instructions, *MUTANTS[name]))


def test_relations_are_at_least_and_less_than():
    def check(module):
        words = [module.number_words("a b", 2, relation) for relation in (AT_LEAST, LESS)] + [
            module.number_words("a", 2, relation) for relation in (AT_LEAST, LESS)
        ]
        assert words == [True, False, False, True]

    check(instructions)
    kills(check, mutated(instructions, "count >= limit", "count > limit"))
    kills(check, mutated(instructions, "count < limit", "count <= limit"))
    with pytest.raises(ValueError, match="at most"):
        instructions.number_words("a", 2, "at most")


def asked(*pairs, text="x"):
    return Prompt(
        text,
        columns={"instruction_id_list": [name for name, _ in pairs], "kwargs": [row for _, row in pairs]},
    )


NO_COMMA, SHORT = (
    ("punctuation:no_comma", {}),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": LESS, "keyword": None},  # as a table has it
    ),
)


def test_the_reward_is_the_share_that_is_followed():
    both = asked(NO_COMMA, SHORT)

    def check(module):
        found = module.Verifiable().score(
            [both] * 4 + [asked(NO_COMMA)], ["a b", "a b c", "a, b c", " ", "a"]
        )
        assert found.tolist() == [1, 0.5, 0, 0, 1]

    check(verifiable)
    for right, wrong in (
        ("np.mean(followed(x, y))", "float(all(followed(x, y)))"),
        ("bool(answer.strip()) and ", ""),
        (" if value is not None}", "}"),
    ):
        with_mutant = mutated(verifiable, right, wrong)
        if "None" in right:  # null arguments are refused by the checker
            with pytest.raises(TypeError):
                check(with_mutant)
        else:
            kills(check, with_mutant)
    reward = load_reward("verifiable")
    assert read_spec("verifiable").reads.needed == reward.reads.needed == ("instruction_id_list", "kwargs")
    assert (reward.low, reward.high) == (0, 1)
    json.dumps(reward.describe())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("plain", "column instruction_id_list: reward verifiable needs it, and the prompt 'plain' has none"),
        (
            asked(("style:rhyme", {})),
            "instruction_id_list 'style:rhyme': is not known; choose from keywords:",
        ),
        (asked((["a"], {})), "is not known"),
        (asked(("length_constraints:number_words", {"num_words": 3})), "missing .*relation"),
        (asked(("punctuation:no_comma", {"num_words": 3})), "do not fit instruction punctuation:no_comma"),
        (asked(("length_constraints:number_words", {"num_words": 3, "relation": "at most"})), "at most"),
        (asked(("keywords:existence", {"keywords": 5})), "do not fit instruction keywords:existence"),
        (asked(), "lists of names and of objects"),
        (
            Prompt("x", columns={"instruction_id_list": ["a"], "kwargs": "{}"}),
            "lists of names and of objects",
        ),
        (Prompt("x", columns={"instruction_id_list": ["a"], "kwargs": []}), "lists of names and of objects"),
    ],
)
def test_what_cannot_be_checked_is_named_before_anything_is_asked(prompt, message):
    with pytest.raises(AlignProError, match=message) as error:
        read_spec("verifiable").check_prompts([asked(NO_COMMA), prompt])
    assert "\n" not in str(error.value)


def test_the_packaged_prompts_say_what_is_checked():
    xs = written()
    assert len(xs) == 64
    kept = Reading(keep=("instruction_id_list", "kwargs"))
    assert prompts("verifiable", reading=kept) == xs
    assert sum(len(prompts("verifiable", split)) for split in ("train", "validation", "test")) == 64
    Verifiable().check_prompts(xs)
    assert {name for x in xs for name, _ in instructions_of(x)} == set(CHECKERS)
    for x in xs:
        for name, arguments in instructions_of(x):
            for value in arguments.values():  # the text asks for it
                for said in value if isinstance(value, list) else [value]:
                    known = {"fr": "French", "de": "German", "es": "Spanish", "it": "Italian", 1: "1"}.get(
                        said, said
                    )
                    if said in (AT_LEAST, LESS):
                        assert ("fewer than" in x) or said == AT_LEAST
                    elif name.endswith(("first_word", "number_paragraphs", "number_highlighted_sections")):
                        assert re.search(rf"{known}|two|first|second|1", x, re.IGNORECASE), (x, known)
                    else:
                        words = {2: r"2|two|\[", 3: "3|three"}.get(known, re.escape(str(known)))
                        assert re.search(words, x, re.IGNORECASE), (x, known)


def test_the_packaged_file_has_ifevals_schema():
    file = Path(verifiable.__file__).parents[1] / "data" / "verifiable.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(set(row) == {"prompt", "instruction_id_list", "kwargs"} for row in rows)
    assert file.stat().st_size < 20_000
    scores = Verifiable().score(written(), ["I will not do that."] * 64)
    assert 0 < np.mean(scores) < 0.5  # neither free nor out of reach
