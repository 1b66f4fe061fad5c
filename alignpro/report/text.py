"""Text on a page: strangers' characters made visible, long lines shortened, ASCII numbers set in type."""

import re
import unicodedata

_MINUS = re.compile(r"(?<![\w.)\]/-])-(?=\.?\d|inf\b)|(?<=\de)-(?=\d)")
_INFINITE = re.compile(r"(?<![\w.])inf(?![\w.])")
_NONE = re.compile(r"^-$|(?<=\[)-(?=,)|(?<=, )-(?=\])")


def typographic(text: str) -> str:
    """`text` with the ASCII of `alignpro.report.numbers` set in type: − of a number, ∞ for inf, – for none.

    Hyphens within words, dates and ranges stay.
    """
    return _INFINITE.sub("∞", _NONE.sub("–", _MINUS.sub("−", text)))


def visible(text: str) -> str:
    """`text` with every control, bidirectional, invisible or unassigned character spelled out as ⟨U+202E⟩.

    Newlines and tabs stay; so do visible characters of every script.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else f"⟨U+{ord(c):04X}⟩"
        for c in text
    )


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters; the middle goes, as rewrites of one prompt begin alike."""
    text = " ".join(visible(text).split())
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 5
    head, tail_text = text[: width - 1 - tail], text[-tail:]
    if " " in head[len(head) // 2 :]:  # at a word's end, where that costs little
        head = head[: head.rindex(" ")]
    if " " in tail_text[: tail // 2]:
        tail_text = tail_text[tail_text.index(" ") :]
    return f"{head.rstrip()}…{tail_text.lstrip()}"
