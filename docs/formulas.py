"""Formulas of the site, typeset while it is built, and a search that knows Greek.

LaTeX becomes MathML, so that a page needs no script; λ is found by the word "lambda".
"""

import re
import unicodedata
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.search.en import SearchEnglish

TAG = re.compile(r"\\tag\{(\d+)\}")
_BREAKS = set("=≤≥∝∼→≪⇒+−-")  # before these a line may end, and after a comma
_BRACKETS = ("(", ")", "[", "]", "{", "}", "⟨", "⟩")
_OPERANDS = ("mi", "mn", "msub", "msup", "msubsup", "mfrac", "msqrt", "mover", "mtext")


def mathml(tex: str, block: bool) -> list[str]:
    """MathML of a formula: one piece if it stands alone, else pieces between which a line may end."""
    tex = re.sub(r"'+", lambda found: "^{" + r"\prime" * len(found[0]) + "}", TAG.sub("", tex))
    made = tex2mathml(tex.strip(), as_block=block).replace("&ApplyFunction;", "\u2061")
    root = ElementTree.fromstring(made)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (element.text or "").strip(), ""
        if element.text in ("|", "‖"):
            element.set("stretchy", "false")
        if element.tag == "mtable":
            element.set("displaystyle", "true")
    for element in list(root.iter()):
        _space(element)
    pieces = [root] if block else _pieces(root)
    return [ElementTree.tostring(piece, encoding="unicode") for piece in pieces]


def _pieces(root: ElementTree.Element) -> list[ElementTree.Element]:
    """Parts of a formula that are formulas, as no browser breaks one; within brackets where it is long."""
    pieces, depth = [ElementTree.Element("math")], 0
    for child in root:
        sign = child.text if child.tag == "mo" else ""
        long = len("".join(pieces[-1].itertext())) > (6 if depth == 0 else 16)
        if sign in _BREAKS and long:
            pieces.append(ElementTree.Element("math"))
            child.set("form", "infix")  # the first of a piece would be taken for a sign
        if sign in _BRACKETS:
            depth += 1 if _BRACKETS.index(sign) % 2 == 0 else -1
            child.set("stretchy", "false")  # its fellow may be in another piece
        pieces[-1].append(child)
        if sign == "," and (depth == 0 or long):
            pieces.append(ElementTree.Element("math"))
    return [piece for piece in pieces if len(piece)]


def _named(element: ElementTree.Element) -> bool:
    """Whether it is a name of several letters or an expectation, with an index or without."""
    while element.tag in ("msub", "msup", "msubsup", "munder") and len(element):
        element = element[0]
    text = element.text or ""
    return element.tag == "mi" and (text == "𝔼" or (len(text) > 1 and text.isalpha()))


def _space(parent: ElementTree.Element) -> None:
    """Set log off from the Z beside it: MathML knows the space of operators, not of names."""
    if parent.tag not in ("math", "mrow", "mtd", "mstyle", "msqrt"):
        return
    children = [child for child in parent if child.text != "\u2061"]
    for child in list(parent):
        parent.remove(child)
    for left, right in zip([None, *children], children, strict=False):
        if left is not None and (
            (_named(right) and (left.tag in _OPERANDS or left.text in (")", "]")))
            or (_named(left) and right.tag in (*_OPERANDS, "munder", "munderover"))
        ):
            ElementTree.SubElement(parent, "mspace", width="0.167em")
        parent.append(right)


def _inline(self, node: nodes.math) -> None:
    pieces = mathml(node.astext(), block=False)
    pieces[0] = node.get("before", "") + pieces[0]
    pieces[-1] += node.get("after", "")
    self.body.append(f'<span class="math">{"<wbr>".join(f"<span>{piece}</span>" for piece in pieces)}</span>')
    raise nodes.SkipNode


def _display(self, node: nodes.math_block) -> None:
    (formula,) = mathml(node.astext(), block=True)
    tag = TAG.search(node.astext())
    number = f'<span class="eqno">({tag[1]})</span>' if tag else ""
    # Wide ones scroll in this box, by keyboard too.
    self.body.append(self.starttag(node, "div", CLASS="math", TABINDEX="0") + formula + number + "</div>\n")
    raise nodes.SkipNode


def _keep_punctuation(app, doctree: nodes.document) -> None:
    """Brackets and commas beside a formula go with it, so that no line begins or ends with a stray one."""
    for formula in doctree.findall(nodes.math):
        for step, key, mark in ((-1, "before", r"[(\[]$"), (1, "after", r"^(?:[)\].,;:]|'s)+")):
            place = formula.parent.index(formula) + step
            text = formula.parent[place] if 0 <= place < len(formula.parent) else None
            if isinstance(text, nodes.Text) and (found := re.search(mark, text)):
                formula[key] = found[0]
                formula.parent[place] = nodes.Text(re.sub(mark, "", text))


def _add_anchors(app, doctree: nodes.document) -> None:
    """Links find equations (theory.md#equation-9) and terms (glossary.md#term-gap), as they find headings."""
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for block in doctree.findall(nodes.math_block):
        if tag := TAG.search(block.astext()):
            block["ids"].append(f"equation-{tag[1]}")
    for node in (*doctree.findall(nodes.math_block), *doctree.findall(nodes.term)):
        slugs |= {name: (node.line, name, node.astext()) for name in node["ids"]}


def words(text: str) -> list[str]:
    """Words to be found, with Greek by name and letter: ρ_sft gives "ρ_sft", "rho_sft", "rho" and "sft"."""
    found: list[str | None] = []
    for word in re.findall(r"\w+", text):
        spelt = "".join(_spelt(letter) for letter in unicodedata.normalize("NFKD", word))
        parts = re.findall(r"[^\W_]+", spelt)
        found += dict.fromkeys([word, spelt.replace(" ", ""), *parts, *map(_GREEK.get, parts)])
    return [word for word in found if word and word not in ("mathrm", "mathbb", "vert", "tag")]  # LaTeX's


def _spelt(letter: str) -> str:
    name = re.fullmatch(r"GREEK \w+ LETTER (\w+)", unicodedata.name(letter, ""))
    return f" {name[1].lower().replace('lamda', 'lambda')} " if name else letter  # Unicode's spelling


_GREEK = {_spelt(letter).strip(): letter for letter in "αβγδεζηθικλμνξπρστυφχψω"}
"""Letters by the names that LaTeX has for them."""


class Search(SearchEnglish):
    """English, in which a Greek letter is found by its name."""

    def split(self, text: str) -> list[str]:
        return words(text)


def setup(app) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.add_search_language(Search)
    app.connect("doctree-read", _add_anchors)
    app.connect("doctree-read", _keep_punctuation)
    return {"parallel_read_safe": True}
