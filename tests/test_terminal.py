"""What is printed: nothing foreign steers a terminal, and no reader who left hides a finding."""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import kills, mutated

from alignpro import terminal
from alignpro.commands import main

ROOT = Path(__file__).parents[1]
HOSTILE = "\x1b]0;X\x07 \u202eabc \x9b31m \x7f \u2066 a\rb \ud800"


def printed(root):
    """Calls in the package that print past `terminal.say`, by file and line."""
    found = []
    for path in sorted((root / "alignpro").rglob("*.py")):
        source = path.read_text()
        if path.name == "terminal.py" or not re.search(r"\bprint\(|\.write\(", source):
            continue
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("print", "sys.stdout.write", "sys.stderr.write"):
                found.append(f"{path.name}:{node.lineno}")
            if called == "tqdm.write" and not ast.unparse(node.args[0]).startswith("harmless("):
                found.append(f"{path.name}:{node.lineno}")
    return found


def test_everything_is_said_in_one_place(tmp_path):
    assert printed(ROOT) == []
    (tmp_path / "alignpro").mkdir()
    (tmp_path / "alignpro" / "x.py").write_text("print(1)\ntqdm.write(a)\ntqdm.write(harmless(a))\n")
    assert printed(tmp_path) == ["x.py:1", "x.py:2"]


def test_nothing_foreign_steers_the_terminal(capsys):
    def check(module):
        shown = module.harmless(HOSTILE)
        assert shown.replace(" ", "").isprintable()
        assert json.loads(module.harmless(json.dumps({"a": HOSTILE}, ensure_ascii=False))) == {"a": HOSTILE}
        kept = "λ − 日本 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🔬\n\tx"
        assert module.harmless(kept) == kept

    check(terminal)
    kills(check, mutated(terminal, "\\u202a-\\u202e", ""))
    kills(check, mutated(terminal, "\\x7f-\\x9f", "\\x7f"))
    assert main.main([f"no{HOSTILE}"]) == 2
    told = capsys.readouterr().err
    assert told.replace("\n", "").isprintable()
    assert "\\u001b]0;X\\u0007" in told


@contextlib.contextmanager
def unread():
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    gone = os.fdopen(writer, "w")
    try:
        yield gone
    finally:
        with contextlib.suppress(OSError):
            gone.close()


class Says:
    """A verb that finds something."""

    def run(self):
        terminal.say("found")
        terminal.say("more")
        return 1


@pytest.fixture
def says(monkeypatch):
    monkeypatch.setattr(main, "_parse", lambda arguments: Says())


def test_a_finding_outlives_its_reader(says, monkeypatch):
    """Mutant: the reader's leaving is a success, as it was."""

    def check(module):
        with monkeypatch.context() as patch, unread() as gone:
            patch.setattr(sys, "stdout", gone)
            patch.setattr(terminal, "say", module.say)
            assert main.main(["x"]) == 1

    check(terminal)
    kills(
        check,
        mutated(
            terminal,
            "        _lose(stream, failure, error)\n    except ValueError:  #",
            "        raise SystemExit(0) from None\n    except ValueError:  #",
        ),
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
def test_a_full_disk_behind_standard_output_is_told(says, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main.main(["x"]) == 2
    assert capsys.readouterr().err == (
        "alignpro: error: standard output: cannot be written (No space left on device); free space, or "
        "send it elsewhere\n"
    )


def test_a_page_is_written_though_nobody_reads(tmp_path):
    """Standard output is closed, or its reader gone, before the result is printed: both files are there."""
    from alignpro.commands.shared import tell
    from alignpro.report.page import Page

    for closed in (False, True):
        with pytest.MonkeyPatch.context() as patch, unread() as gone:
            if closed:
                gone.close()
            patch.setattr(sys, "stdout", gone)
            folder = tmp_path / str(closed)
            folder.mkdir()
            tell(
                "estimate",
                {"a": 1},
                "text",
                False,
                str(folder),
                lambda: Page("estimate", "Title", "Lead", {}),
            )
        assert {path.name for path in folder.iterdir()} == {"estimate.json", "report.html"}
    terminal.begin()


def test_closed_streams_and_other_encodings():
    """A file opened while a standard stream is closed must not get its number."""
    script = (
        "import os, sys; from alignpro import terminal; terminal.begin();"
        "fd = os.open(sys.argv[1], os.O_RDONLY); terminal.say('λ'); terminal.say('x', error=True);"
        "assert sys.stdin.read() == '' ; assert fd > 2, fd"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", '"$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, script, __file__]
    assert subprocess.run(command, env=environment).returncode == 0
    command = [sys.executable, "-c", script, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\u03bb\n", b"x\n")


def test_a_stream_without_a_file_is_fine(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    terminal.say("x")
    monkeypatch.setattr(sys, "stdout", said := io.StringIO())
    terminal.say("x\x1b")
    assert said.getvalue() == "x\\u001b\n"
