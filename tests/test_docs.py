"""What the documents say is so: blocks run, commands parse, tutorials print what they show, links lead
somewhere, and the site builds without a warning."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import tutorials

from alignpro.commands.flags import options_of
from alignpro.commands.main import VERBS, _parse
from alignpro.errors import AlignProError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MADE = DOCS / "cli"  # by docs/conf.py, for the site alone
WRITTEN = sorted(path for path in DOCS.rglob("*.md") if path.parent != MADE)
DOCUMENTS = [ROOT / "README.md", *WRITTEN, *sorted((ROOT / "experiments").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^ *```bash\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
# Those of experiments/ are records of long runs.
PAGES = [p for p in DOCUMENTS if p.parent.name != "experiments" and BLOCK.search(p.read_text())]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- promises, and the tests that hold them ---


def unkept(text: str) -> list[str]:
    """Rows of a table of promises without a test, and tests that are not there."""
    rows = [line for line in text.split("\n") if line.startswith("| ") and not line.startswith("| promise")]
    found = [row for row in rows if not re.search(r"`tests/\S+::\w+`", row)]
    for file, name in re.findall(r"`(tests/\S+)::(\w+)`", text):
        path = ROOT / file
        if not path.is_file() or not re.search(rf"^ *def {name}\(", path.read_text(), re.MULTILINE):
            found.append(f"{file}::{name}")
    return found


def test_each_promise_has_its_test():
    page = (DOCS / "security.md").read_text()
    assert page.count("::test_") > 30
    assert unkept(page) == []
    assert unkept("| promise | held by |\n| a | `tests/test_docs.py::absent` |\n| b | - |") == [
        "| b | - |",
        "tests/test_docs.py::absent",
    ]


# --- blocks of Python ---


def run(text: str, name: str) -> int:
    names: dict[str, object] = {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + block[1], name, "exec"), names)
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(page.read_text(), str(page)) > 0


def test_a_wrong_block_is_noticed():
    with pytest.raises(NameError, match="missing"):
        run("text\n```python\nmissing\n```\n", "page")


# --- commands ---


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of each `alignpro …` line in a block of shell, but for those with "…" to fill in."""
    for block in SHELL.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"\s*(?:\w+=\S* +)*alignpro (.*)", line)  # after variables
            if found and "…" not in line and "..." not in line:
                yield shlex.split(found[1], comments=True)


COMMANDS = [(page, words) for page in DOCUMENTS for words in commands(page.read_text())]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda p: named(p) if isinstance(p, Path) else p[0])
def test_commands_parse(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--config" in words:
        Path(words[words.index("--config") + 1]).write_text("{}")
    _parse(words)


def test_a_wrong_command_is_noticed():
    (words,) = commands("```bash\nX=1 alignpro verify \\\n  --instance 3  # one\nalignpro train …\nls\n```\n")
    assert words == ["verify", "--instance", "3"]
    with pytest.raises(AlignProError, match="--instance"):
        _parse(words)


# --- tutorials ---

TUTORIALS = ["verify_a_bound", "test_a_conjecture", "run_the_paper"]
"""Those without models; tests/llm/test_tutorials.py has the others."""


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorials_print_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(DOCS if name == "run_the_paper" else tmp_path)
    tutorials.shows(tutorials.page_of(name), tutorials.played(name))


def test_another_output_is_noticed():
    page = "```text\na  1.5\n…\nc 2\n```\n"
    tutorials.shows(page, "a 2.5e-3\nb\nc 3\n")
    for printed in ("a 1.5\nc two\n", "c 2\na 1.5\n"):
        with pytest.raises(AssertionError, match="not printed"):
            tutorials.shows(page, printed)


# --- the site ---


class Anchors(HTMLParser):
    """Links and anchors of one page of the site."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.names: set[str] = set()
        self.remote: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.add(found["href"])
        elif link := found.get("src") or (found.get("href") if tag == "link" else None):
            self.links.add(link)
            if urlsplit(link).netloc:
                self.remote.add(link)


def broken(site: Path) -> list[str]:
    """Each link of the site that leads nowhere. What is on other machines is read, not asked for."""
    pages = {path: Anchors(path.read_text()) for path in site.rglob("*.html") if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                good = re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+(:\d+)?", parts.netloc) and " " not in link
            elif parts.scheme:
                good = parts.scheme == "mailto"
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                anchor = unquote(parts.fragment)
                names = pages[target].names if target in pages else set()
                good = target.is_file() and (not anchor or anchor in names)
            if not good:
                found.append(f"{path.relative_to(site)}: {link}")
        found += [f"{path.relative_to(site)}: fetches {link}" for link in page.remote]
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, as `make docs` builds it: a warning is an error."""
    for package in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is missing; run pip install 'alignpro[docs]'")
    out = tmp_path_factory.mktemp("site")
    (options,) = re.findall(r"-m sphinx (.*) build/docs$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "-W" in options.split()
    command = [sys.executable, "-m", "sphinx", *options.split(), str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return out


def test_the_site(site):
    assert not broken(site)
    for start in ("index.html", "docs/start.html", "docs/api/theory.html", "experiments/LOG.html"):
        assert (site / start).is_file()
    assert "alignpro.theory.bounds.check" in (site / "docs/api/theory.html").read_text()
    menu = (site / "docs/index.html").read_text()
    assert 'href="cli/index.html"' in menu
    notebooks = {path.stem: json.loads(path.read_text()) for path in site.glob("_downloads/*/*.ipynb")}
    assert set(notebooks) == {path.stem for path in DOCS.glob("tutorials/*.py")}
    assert {len({cell["id"] for cell in n["cells"]}) - len(n["cells"]) for n in notebooks.values()} == {0}
    for verb in VERBS:
        names = Anchors((site / f"docs/cli/{verb}.html").read_text()).names
        for option in options_of(VERBS[verb]):
            flag = option.flag.replace("--", "").strip("[]. ")
            assert f"cmdoption-alignpro-{verb}-{'arg-' * option.positional}{flag}" in names


WIDER = """() => [...document.querySelectorAll("article *")].filter(e => {
    const scrolls = e.parentElement.closest("div.math, div.table-wrapper, pre, table");
    return !scrolls && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
}).map(e => `${e.tagName} ${e.textContent.slice(0, 60)}`)"""
"""What is wider than the page and in no box of its own that scrolls."""


def test_formulas_fit_a_phone(site, chromium):
    """Nothing makes the page itself scroll sideways, and a formula's box is no wider than the page."""
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    for name in ("theory", "limits", "glossary"):
        page.goto((site / f"docs/{name}.html").as_uri())
        assert page.evaluate(WIDER) == []
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.goto((site / "docs/theory.html").as_uri())
    boxes = "[...document.querySelectorAll('div.math')].map(e => e.getBoundingClientRect().right)"
    assert 300 < max(page.evaluate(boxes)) <= 390
    assert page.evaluate("document.fonts.check('1em \"STIX Two Math\"')")
    page.add_style_tag(content="div.math {width: max-content} .math, wbr {white-space: nowrap}")  # a mutant
    assert max(page.evaluate(boxes)) > 390
    assert page.evaluate(WIDER)
    page.close()


def test_search_finds_greek_by_name(site):
    """The search of the site looks words up in this index, by their stems."""
    index = (site / "searchindex.js").read_text()
    found = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    theory = found["docnames"].index("docs/theory")
    for word in ("lambda", "rho", "beta", "pi", "λ"):
        pages = found["terms"][word]
        assert theory in (pages if isinstance(pages, list) else [pages]), word
    assert "mathrm" not in found["terms"]


def test_broken_links_are_noticed(tmp_path):
    links = ["b.html#there", "b.html#gone", "c.html", "https://host.org/x", "https:/host", "#gone"]
    page = (
        "".join(f'<a href="{link}">x</a>' for link in links) + '<script src="https://host.org/x.js"></script>'
    )
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.html").write_text('<p id="there">')
    assert sorted(line.split(": ")[1] for line in broken(tmp_path)) == [
        "#gone",
        "b.html#gone",
        "c.html",
        "fetches https://host.org/x.js",
        "https:/host",
    ]


@pytest.mark.parametrize("page", DOCUMENTS, ids=named)
def test_links_lead_somewhere(page):
    """On GitHub, too, where a link is a path."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)", prose):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
