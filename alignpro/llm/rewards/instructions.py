"""Checkers of verifiable instructions, by the names and arguments that IFEval gives them.

IFEval is by Zhou et al. (2023, arXiv 2311.07911); what each checker accepts is what google-research's
`instruction_following_eval` accepts, oddities included. Three things it takes from elsewhere or leaves to
chance are done otherwise: sentences are divided by `sentences_of` (there: NLTK's punkt), words in capitals
are those of `words_of` (NLTK's tokens), and a letter to be counted may be any character.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from alignpro.llm.rewards.texts import missing, sentences_of, words_of


def _compared(count: int, relation: str, limit: float) -> bool:
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r}: is neither 'at least' nor 'less than'")
    return count >= limit if relation == "at least" else count < limit


def _pattern(text: str) -> str:
    """A keyword is a regular expression, as it is to IFEval, if it is one at all."""
    try:
        re.compile(text)
    except re.error:
        return re.escape(text)
    return text


def existence(answer: str, keywords: Sequence[str]) -> bool:
    return all(re.search(_pattern(word), answer, re.IGNORECASE) for word in keywords)


def frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    found = re.findall(_pattern(keyword.strip()), answer, re.IGNORECASE)
    return _compared(len(found), relation, frequency)


def forbidden_words(answer: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{_pattern(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(Counter(answer.lower())[letter.strip().lower()], let_relation, let_frequency)


def response_language(answer: str, language: str) -> bool:
    return _language(answer) in (language, None)


def number_sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _compared(len(sentences_of(answer)), relation, num_sentences)


def number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs are divided by ***; none but the first and the last may be empty, and those do not count."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    return all(parts[1:-1]) and len([part for part in parts if part]) == num_paragraphs


def number_words(answer: str, num_words: int, relation: str) -> bool:
    return _compared(len(re.findall(r"\w+", answer)), relation, num_words)


def nth_paragraph_first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by two line ends; the nth is counted with the empty ones."""
    parts = [part.strip() for part in answer.split("\n\n")]
    full = len([part for part in parts if part])
    if not 1 <= nth_paragraph <= full or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return full == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def number_placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def postscript(answer: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(known.get(marker) or _pattern(marker.lower()), answer.lower()) is not None


def number_bullet_lists(answer: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def constrained_response(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def number_highlighted_sections(answer: str, num_highlights: int) -> bool:
    """Counts *text* and **text**; the latter may count twice, as there."""
    single = [found.strip("*") for found in re.findall(r"\*[^\n\*]*\*", answer)]
    double = [found[2:-2] for found in re.findall(r"\*\*[^\n\*]*\*\*", answer)]
    return len([found for found in single + double if found.strip()]) >= num_highlights


def multiple_sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    heads = re.findall(rf"\s?{_pattern(section_spliter.strip())}\s?\d+\s?", answer)
    return len(heads) >= num_sections


def json_format(answer: str) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(answer: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", answer))


def two_responses(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def repeat_prompt(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def capital_word_frequency(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    capitals = [word for word in words_of(answer) if word.isupper()]
    return _compared(len(capitals), capital_relation, capital_frequency)


def english_capital(answer: str) -> bool:
    return answer.isupper() and _language(answer) in ("en", None)


def english_lowercase(answer: str) -> bool:
    return answer.islower() and _language(answer) in ("en", None)


def no_comma(answer: str) -> bool:
    return "," not in answer


def _language(text: str) -> str | None:
    """The language of a text by `langdetect`; None where that finds none, which counts as the right one."""
    detect, failure = _detector()
    try:
        return detect(text)
    except failure:
        return None


@functools.cache
def _detector() -> tuple[Callable[[str], str], type[Exception]]:
    try:
        import langdetect
    except ModuleNotFoundError:
        raise missing("an instruction about languages", "langdetect") from None
    langdetect.DetectorFactory.seed = 0  # it draws
    return langdetect.detect, langdetect.LangDetectException


CHECKERS: dict[str, Callable[..., Any]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""All of IFEval's instructions by name: functions of the answer and the arguments, true where it follows."""
