"""Values from JSON and YAML as records, each checked by the types of its fields; and the reader of YAML."""

import dataclasses
import functools
import math
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from alignpro.errors import AlignProError
from alignpro.files import MOST_DIGITS

R = TypeVar("R")
_MOST_WHOLE = 1 << 63
_LISTS = (tuple, list, Sequence)
_PLAIN: dict[Any, str] = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
}
_DEEPEST = 50
"""Levels of YAML within one another; presets have four."""
_BRIEF = reprlib.Repr()  # the whole `repr` of what a file repeats by reference may never end
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 40, 40


def made(kind: type[R], value: Any, where: str) -> R:
    """Make `value`, as JSON or YAML has it, one of a type: lists become tuples, and objects records.

    Args:
        kind: a dataclass, or the type that a field of one is annotated with.
        where: words for the place, which an error begins with.

    Raises:
        AlignProError: the value, or one within it, is of another type; it names the first that is. So does
            an object that lacks a field of the record, or has another.
    """
    return _made(kind, value, where)


def _made(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated:
        return _made(parts[0], value, where)
    if origin in (Union, types.UnionType):
        return _one_of(parts, value, where)
    if origin is Literal:
        if not any(value == part and type(value) is type(part) for part in parts):
            _wrong(value, where, f"one of {', '.join(map(str, parts))}")
        return value
    if dataclasses.is_dataclass(origin):
        return _record(origin, value, where)
    if origin in _LISTS and parts:
        return _listed(origin, parts, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping) and parts:
        if not isinstance(value, dict):
            _wrong(value, where, "an object")
        return {_made(parts[0], k, where): _made(parts[1], v, f"{where} {k}") for k, v in value.items()}
    if origin is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if origin is int and type(value) is int and -_MOST_WHOLE <= value < _MOST_WHOLE:
        return value
    if origin not in (int, float) and isinstance(value, origin):
        return value
    return _wrong(value, where, _PLAIN.get(origin, "nothing that is known"))


def _one_of(parts: Sequence[Any], value: Any, where: str) -> Any:
    """The value as the first of several types that it is of."""
    others = [part for part in parts if part is not types.NoneType]
    if value is None and len(others) < len(parts):
        return None
    for part in others[:-1]:
        try:
            return _made(part, value, where)
        except AlignProError:
            continue
    return _made(others[-1], value, where)


def _listed(origin: Any, parts: Sequence[Any], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        _wrong(value, where, "a list")
    each = parts if origin is tuple and ... not in parts else [parts[0]] * len(value)
    if len(each) != len(value):
        _wrong(value, where, f"a list of {len(each)}")
    found = [_made(kind, v, f"{where} {i}") for i, (kind, v) in enumerate(zip(each, value, strict=True))]
    return found if origin is list else tuple(found)


@functools.cache
def _fields(record: type) -> dict[str, tuple[Any, bool]]:
    """The type of each field that is given to a record, and whether it must be."""
    hints, none = get_type_hints(record, include_extras=True), dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is none and field.default_factory is none)
        for field in dataclasses.fields(record)
        if field.init
    }


def _record(record: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        _wrong(value, where, "an object")
    known = _fields(record)
    if lacking := [name for name, (_, needed) in known.items() if needed and name not in value]:
        raise AlignProError(f"{where}: lacks {lacking[0]}; add it")
    if odd := [name for name in value if name not in known]:
        said = _BRIEF.repr(odd[0]).strip("'")
        raise AlignProError(f"{where}: has no field {said}; choose from {', '.join(known)}")
    return record(**{name: _made(known[name][0], v, f"{where} {name}") for name, v in value.items()})


def _wrong(value: Any, where: str, wanted: str) -> Any:
    raise AlignProError(f"{where}: {_BRIEF.repr(value)} must be {wanted}; mend it")


# --- YAML ---


def read_yaml(path: str | Path, option: str, *, as_text: bool = False) -> dict[str, Any]:
    """Read the names and values in a file of YAML, by the rules of YAML 1.2: a number is decimal, and a truth
    value true or false.

    Args:
        option: the flag that named the file; an error begins with it.
        as_text: give texts, as they are written, for numbers and truth values, which the options of the
            command line read by their own types.

    Raises:
        AlignProError: the file cannot be read, is no YAML of names and values, or has a name twice.
    """
    at = f"{option} {path}"
    try:
        import yaml
    except ModuleNotFoundError:
        raise AlignProError(f"{option}: the package yaml is missing; run pip install pyyaml") from None
    try:
        said = yaml.load(Path(path).read_bytes().decode("utf-8-sig"), Loader=_loader(as_text))
    except OSError as error:
        raise AlignProError(f"{at}: cannot read it ({error.strerror}); name a YAML file") from None
    except UnicodeDecodeError:
        raise AlignProError(f"{at}: is not valid YAML (no UTF-8); write lines such as lam: 0.05") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f" at line {mark.line + 1}" if mark else ""
        why = f" ({why})" if isinstance(error, yaml.constructor.ConstructorError) else ""
        remedy = "write lines such as lam: 0.05"
        raise AlignProError(f"{at}: is not valid YAML{place}{why}; {remedy}") from None
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said):
        raise AlignProError(f"{at}: holds no options; write lines such as lam: 0.05")
    return said


@functools.cache
def _loader(as_text: bool) -> Any:
    """A loader for YAML 1.2's core values, which refuses names given twice and what is nested for no reason.

    By YAML 1.1, which PyYAML has, 010 is 8, 1:30 is 90, and `no` is false.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.depth += 1
            if self.depth > _DEEPEST:
                self._refuse("is nested too deeply", self.peek_event().start_mark)
            found = super().compose_node(parent, index)
            self.depth -= 1
            return found

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for at, (key, _) in enumerate(node.value):
                if isinstance(key, yaml.ScalarNode) and key.value in names[:at]:
                    self._refuse(f"{_BRIEF.repr(key.value)} is given twice", key.start_mark)
            return super().construct_mapping(node, deep)

        def construct_scalar(self, node: Any) -> Any:
            text = super().construct_scalar(node)
            if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                self._refuse("holds half a character", node.start_mark)
            return text

        def _refuse(self, why: str, mark: Any) -> None:
            raise yaml.constructor.ConstructorError(None, None, why, mark)

        def _int(self, node: Any) -> int:
            if len(node.value) > MOST_DIGITS:
                self._refuse(f"a whole number has {len(node.value)} digits", node.start_mark)
            return int(self.construct_scalar(node))

        def _float(self, node: Any) -> float:
            return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))

    core = {
        "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
        "merge": (r"<<", ["<"]),
        "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
        "int": (r"[-+]?[0-9]+", list("-+0123456789")),
        "float": (
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
            r"|\.(?:nan|NaN|NAN))",
            list("-+.0123456789"),
        ),
    }
    for name, (pattern, first) in core.items():
        if not as_text or name in ("null", "merge"):
            Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(rf"{pattern}\Z"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", Loader._int)
    Loader.add_constructor("tag:yaml.org,2002:float", Loader._float)
    return Loader
