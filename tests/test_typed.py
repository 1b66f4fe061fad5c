"""JSON, YAML and records: what is read is what was written, or one line says what is wrong."""

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from mutants import kills, mutated

from alignpro import files, typed
from alignpro.errors import AlignProError

TEXT = {
    '{"a": [1, -2.5e3, null, true, "é\\ud83c\\udf3b"]}': {"a": [1, -2500.0, None, True, "é🌻"]},
    "[" * 100 + "]" * 100: None,
    "-" + "9" * 308: -(10**308 - 1),
    "[-Infinity]": [-math.inf],
    '{"a": 1, "a": 2}': {"a": 2},
    '"\\\\ud800"': "\\ud800",
}
NO_JSON = {
    "": "",
    "[" * 100_000: "nested too deeply",
    "[" * 101 + "]" * 101: "nested too deeply",
    '{"a":' * 100_000: "nested too deeply",
    "9" * 309: "309 digits",
    '["a\\ud800b"]': "half a character",
    '{"\\uDFFF": 1}': "half a character",
    "9" * 5000: "digits",
}


def check_json(reader):
    for text, value in TEXT.items():
        assert value is None or reader.parse_json(text) == reader.parse_json(text.encode()) == value
    for text, message in NO_JSON.items():
        try:
            reader.parse_json(text)
        except ValueError as error:
            assert message in str(error)  # noqa: PT017 - a mutant's must fail the assertion
        else:
            raise AssertionError(text[:40])
    for text in ("NaN", "[-Infinity]", "1e999", '{"a": 1, "a": 2}'):
        try:
            reader.parse_json(text, strict=True)
        except ValueError:
            continue
        raise AssertionError(text)


def test_json_is_read_whole_or_refused():
    check_json(files)
    for right, wrong in (
        ("> _DEEPEST and _deeper(value)", "> _DEEPEST and False"),
        ("> MOST_DIGITS:", "> 10 * MOST_DIGITS:"),
        ("if _HALF.search(text)", "if False"),
        ("if len(found) < len(pairs)", "if False"),
        ("_STRICT if strict else _ONCE", "_ONCE"),
    ):
        kills(check_json, mutated(files, right, wrong))


def test_bytes_are_utf_8(tmp_path):
    assert files.parse_json(b'\xef\xbb\xbf"a"') == "a"
    for data in ('"a"'.encode("utf-16"), b'"\xff"', b""):
        with pytest.raises(ValueError):  # noqa: PT011 - of several kinds
            files.parse_json(data)
    path = tmp_path / "a.json"
    files.write_json(path, {"a": "half \ud800 of one"})
    with pytest.raises(AlignProError, match="missing or damaged"):
        files.read_json(path)
    path.write_text("[]")
    with pytest.raises(AlignProError, match="missing or damaged"):
        files.read_json(path, dict)
    path.unlink()
    path.symlink_to(path)
    for read in (files.read_json, files.read_json_lines, files.byte_lines):
        with pytest.raises(AlignProError):
            read(path)


@dataclass(frozen=True)
class Inner:
    pair: tuple[str, float] = ("a", 1.0)


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    kind: Literal["x", "y"] | None = None
    parts: tuple[Inner, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    either: str | dict[str, int] = ""


WHOLE = {"name": "n", "count": 3, "kind": "y", "parts": [{"pair": ["b", 2]}], "either": {"a": 1}}
WRONG = {
    "lacks name": {"count": 3},
    "name 3 must be a text": WHOLE | {"name": 3},
    "count True must be a whole number": WHOLE | {"count": True},
    "count 1.0 must be": WHOLE | {"count": 1.0},
    "count 9223372036854775808 must": WHOLE | {"count": 2**63},
    "kind 'z' must be one of x, y": WHOLE | {"kind": "z"},
    "parts {} must be a list": WHOLE | {"parts": {}},
    "parts 0 3 must be an object": WHOLE | {"parts": [3]},
    "parts 0 pair ['b'] must be a list of 2": WHOLE | {"parts": [{"pair": ["b"]}]},
    "parts 0 pair 1 nan must be a number": WHOLE | {"parts": [{"pair": ["b", math.nan]}]},
    "either a 'x' must be a whole number": WHOLE | {"either": {"a": "x"}},
    "has no field other": WHOLE | {"other": 1},
    "[] must be an object": [],
}


def check_records(reader):
    assert reader.made(Outer, WHOLE, "w") == Outer("n", 3, "y", (Inner(("b", 2.0)),), {}, {"a": 1})
    for message, value in WRONG.items():
        try:
            found = reader.made(Outer, value, "w")
        except AlignProError as error:
            assert message in str(error).replace(":", "")  # noqa: PT017
        else:
            raise AssertionError(f"{message}: {found}")


def test_records_are_checked_by_the_types_of_their_fields():
    check_records(typed)
    for right, wrong in (
        ("type(value) is int and", "isinstance(value, int) and"),
        ("not math.isnan(value)", "True"),
    ):
        kills(check_records, mutated(typed, right, wrong))


def yaml_of(reader, tmp_path, text, **how):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return reader.read_yaml(path, "--config", **how)


def test_yaml_is_read_by_the_rules_of_1_2(tmp_path):
    text = "a: 010\nb: 1:30\nc: no\nd: 1e-3\ne: [yes, true, ~]\nf: 2020-01-01\ng: {h: .inf}\ni: 0x10\n"
    values = {"a": 10, "b": "1:30", "c": "no", "d": 0.001, "e": ["yes", True, None], "f": "2020-01-01"}

    def check(reader):
        assert yaml_of(reader, tmp_path, text) == values | {"g": {"h": math.inf}, "i": "0x10"}

    check(typed)
    kills(check, mutated(typed, 'Loader.add_constructor("tag:yaml.org,2002:int", Loader._int)', "pass"))
    said = yaml_of(typed, tmp_path, text, as_text=True)
    assert said == {k: v for k, v in values.items() if isinstance(v, str)} | {
        "a": "010",
        "d": "1e-3",
        "e": ["yes", "true", None],
        "g": {"h": ".inf"},
        "i": "0x10",
    }
    assert yaml_of(typed, tmp_path, b"\xef\xbb\xbfa: &x {b: 1}\nc: {<<: *x, d: 2}")["c"] == {"b": 1, "d": 2}


NO_YAML = {
    "given twice": "a: 1\nb: {c: 1, c: 2}\n",
    "line 2": "a: 1\na: 2\n",
    "nested too deeply": "a: " + "[" * 60 + "]" * 60,
    "holds no options": "[a]",
    "half a character": 'a: "\\ud800"',
    "digits": "a: " + "9" * 400,
    "no UTF-8": "a: 1".encode("utf-16"),
    "not valid YAML": "a: !!python/object/apply:os.getcwd []",
}


def test_yaml_that_is_none_is_told_in_one_line(tmp_path):
    def check(reader):
        for message, text in NO_YAML.items():
            try:
                yaml_of(reader, tmp_path, text)
            except AlignProError as error:
                assert message in str(error)  # noqa: PT017 - a mutant's must fail the assertion
                assert "\n" not in str(error)  # noqa: PT017
            else:
                raise AssertionError(message)

    check(typed)
    for right, wrong in (
        ("and key.value in names[:at]:", "and False:"),
        ("if self.depth > _DEEPEST:", "if self.depth > 20 * _DEEPEST:"),
        ('if isinstance(text, str) and any("', 'if isinstance(text, bytes) and any("'),
    ):
        kills(check, mutated(typed, right, wrong))
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    value = yaml_of(typed, tmp_path, bomb)
    with pytest.raises(AlignProError, match="must be a whole number"):
        typed.made(dict[str, int], value, "w")  # a `repr` of it would have 9^8 parts


def test_what_is_written_is_read(tmp_path):
    value = {"a": [1, 0.1, "é", None, True], "b": {"c": "\u2028"}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json", dict) == value
    assert json.loads((tmp_path / "a.json").read_text()) == value
