"""Formulas of the site: LaTeX becomes MathML while it is built, so that pages need no script and no font of their own;
and the search finds λ by the word "lambda"."""

import re
import unicodedata
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.search.en import SearchEnglish

TAG = re.compile(r"\\tag\{(\d+)\}")
_NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
_BREAKS = set("=≤≥∝∼→≪⇒+−-,")  # where a line may end
_OPERAND = {"mi", "mn", "msub", "msup", "msubsup", "mfrac", "msqrt", "mover", "mtext"}


def mathml(tex: str, block: bool) -> str:
    """MathML of a formula. One within a line is in pieces, between which the line may end: no browser breaks a formula."""
    tex = re.sub(r"'+", lambda found: "^{" + r"\prime" * len(found[0]) + "}", TAG.sub("", tex))
    made = tex2mathml(tex.strip(), as_block=block).replace("&ApplyFunction;", "\u2061")
    root = ElementTree.fromstring(made)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
        element.text = (element.text or "").strip()
        element.tail = ""
    for element in list(root.iter()):
        _space(element)
    if block:
        return ElementTree.tostring(root, encoding="unicode")
    pieces = [ElementTree.Element("math")]
    depth = 0
    for child in root:
        text = child.text or ""
        before = child.tag == "mo" and depth == 0 and text in _BREAKS and len(pieces[-1]) and text != ","
        if before and _length(pieces[-1]) > 6:
            pieces.append(ElementTree.Element("math"))
            child.set("form", "infix")  # first in its piece it would be a sign
        depth += (text in "([{" and bool(text)) - (text in ")]}" and bool(text))
        pieces[-1].append(child)
        if child.tag == "mo" and depth == 0 and text == ",":
            pieces.append(ElementTree.Element("math"))
    return "<wbr>".join(ElementTree.tostring(piece, encoding="unicode") for piece in pieces if len(piece))


def _length(element: ElementTree.Element) -> int:
    return len("".join(element.itertext()))


def _name(element: ElementTree.Element) -> bool:
    """Whether it is a name of several letters, or an expectation, with or without an index."""
    while element.tag in ("msub", "msup", "msubsup", "munder") and len(element):
        element = element[0]
    return element.tag == "mi" and (len(element.text or "") > 1 and (element.text or "").isalpha() or element.text == "𝔼")


def _space(parent: ElementTree.Element) -> None:
    """Set names off from what stands beside them, as log is from Z: MathML does so for operators only."""
    if parent.tag not in ("math", "mrow", "mtd", "mstyle", "msqrt"):
        return
    children = [c for c in parent if not (c.tag == "mo" and c.text == "\u2061")]
    for child in list(parent):
        parent.remove(child)
    for left, right in zip([None, *children], children, strict=False):
        if left is not None and (
            (_name(right) and (left.tag in _OPERAND or left.text in (")", "]")))
            or (_name(left) and right.tag in (*_OPERAND, "munder", "munderover"))
        ):
            ElementTree.SubElement(parent, "mspace", width="0.167em")
        parent.append(right)


def _inline(self, node: nodes.math) -> None:
    self.body.append(f'<span class="math">{mathml(node.astext(), False)}</span>')
    raise nodes.SkipNode


def _display(self, node: nodes.math_block) -> None:
    tag = TAG.search(node.astext())
    number = f'<span class="eqno">({tag[1]})</span>' if tag else ""
    # A box of its own that scrolls, by keyboard too.
    self.body.append(self.starttag(node, "div", CLASS="math", TABINDEX="0"))
    self.body.append(f"{mathml(node.astext(), True)}{number}</div>\n")
    raise nodes.SkipNode


def _anchors(app, doctree: nodes.document) -> None:
    """Links reach the paper's equations, theory.md#equation-9, and terms, glossary.md#term-gap, as they do headings."""
    slugs = app.env.metadata[app.env.docname].setdefault("myst_slugs", {})
    for block in doctree.findall(nodes.math_block):
        if tag := TAG.search(block.astext()):
            block["ids"].append(f"equation-{tag[1]}")
    for node in (*doctree.findall(nodes.math_block), *doctree.findall(nodes.term)):
        for name in node["ids"]:
            slugs[name] = (node.line, name, node.astext())


def words(text: str) -> list[str]:
    """The words of a text, with Greek letters by their names too: ρ_sft gives "ρ_sft", "rho_sft", "rho" and "sft"."""
    found = []
    for word in re.findall(r"\w+", text):
        spelt = "".join(_spelt(letter) for letter in unicodedata.normalize("NFKD", word))
        found += {word: None, spelt.replace(" ", ""): None, **dict.fromkeys(re.findall(r"[^\W_ ]+", spelt))}
    return [word for word in found if word not in _COMMANDS]


_COMMANDS = {"mathrm", "mathbb", "vert", "text", "tag"}  # of LaTeX, and in every formula


def _spelt(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if not re.fullmatch(r"GREEK \w+ LETTER \w+", name):
        return letter
    return name.split()[-1].lower().replace("lamda", "lambda") + " "  # as Unicode has it


class Search(SearchEnglish):
    """English, in which a Greek letter is found by its name."""

    def split(self, text: str) -> list[str]:
        return words(text)


def setup(app) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.add_search_language(Search)
    app.connect("doctree-read", _anchors)
    return {"parallel_read_safe": True}
