"""The site: `make docs`. Its source folder is the repository, so that links work as on GitHub."""

import re
import sys
from pathlib import Path

from sphinx import addnodes
from sphinx.ext import napoleon

import alignpro
from alignpro.commands import helping
from alignpro.commands.main import VERBS

sys.path.insert(0, str(Path(__file__).parent))

project = "alignpro"
author = "the alignpro authors"
version = release = alignpro.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "formulas", "notebooks"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_dmath_allow_labels = False
html_math_renderer = "mathml"
root_doc = "docs/index"
include_patterns = [
    *("docs/**", "experiments/*.md", "experiments/results/**/*.md", "README.md", "CHANGELOG.md"),
]
exclude_patterns = [".*", "build", "runs"]  # not to be searched
smartquotes = False  # formulas are written as they are meant
highlight_language = "text"
myst_heading_anchors = 4  # GitHub's slugs
suppress_warnings = ["ref.python"]  # the shapes in annotations pass for names
autodoc_default_options = {"members": True, "member-order": "bysource"}

html_theme = "furo"
html_title = f"alignpro {version}"
html_additional_pages = {"index": "redirect.html"}  # the root document lies one folder down
templates_path = ["_templates"]
html_show_sourcelink = html_copy_source = html_show_copyright = False
html_static_path, html_css_files = ["_static"], ["wide.css"]
toc_object_entries = False  # hundreds to a page; the search finds them

_VALUES = ("attribute", "data", "property")
_GOOGLE = napoleon.Config(napoleon_use_ivar=True)


def _docstring(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text with `code` and Google's sections: |r|, ρ* and x_ mean themselves."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    parts = re.split(r"(?<!`)(`[^`]+`)(?!`)", "\n".join(lines))
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"`{part}`" + "\\ " * parts[i + 1][:1].isalnum()  # `Ball`s
        else:
            parts[i] = re.sub(r"([\\|*]|(?<=\w)_(?!\w))", r"\\\1", part)
    lines[:] = "".join(parts).split("\n")
    if what not in _VALUES:  # there "range: of what" would be read as a type and its description
        lines[:] = napoleon.GoogleDocstring(lines, _GOOGLE, app, what, name, obj, options).lines()


def _signature(app, what, name, obj, options, signature, returns):
    """Fields are listed below a class; a signature of forty says nothing."""
    long = what == "class" and signature and len(signature) > 300
    home = r"~?(?<![\w.])(jaxlib\._jax|jaxtyping|numpy|typing)\."
    short = [text and re.sub(home, "", text) for text in (signature, returns)]
    return ("(…)" if long else short[0]), short[1]


def _folders(app, doctree) -> None:
    """GitHub can show a folder, a site cannot: its name stays, without a link."""
    here = Path(app.srcdir, app.env.docname).parent
    for link in list(doctree.findall(addnodes.pending_xref)):
        if link["reftype"] == "myst" and (here / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def _command_line(app, config) -> None:
    """Write a page for each verb into docs/cli, from the options that the verbs have; git ignores them."""
    folder = Path(app.srcdir, "docs", "cli")
    folder.mkdir(exist_ok=True)
    pages = {name: helping.page(name, verb) for name, verb in VERBS.items()}
    for name, text in ({"index": helping.index(VERBS)} | pages).items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:  # else it would be read again
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.stem not in ("index", *pages):
            path.unlink()


def setup(app) -> None:
    app.connect("config-inited", _command_line)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-process-signature", _signature)
    app.connect("doctree-read", _folders)
