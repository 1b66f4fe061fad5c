"""How the options of verbs are read: their names on the command line, and a list of all that a verb has."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from alignpro.errors import AlignProError

CONFIG = (
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.DisallowNone,
    tyro.conf.PositionalMetavarFromFieldName,
)
REGISTRY = ConstructorRegistry()
_UNPREFIXED: Any = tyro.conf.OmitArgPrefixes
_POSITIONAL = get_args(tyro.conf.Positional[str])[1]


class Prefixed(NamedTuple):
    """Marks a field whose record's flags are --PREFIX-FIELD: `Annotated[Record, Prefixed("target")]`."""

    prefix: str


@functools.cache
def _named(record: type, prefix: str) -> type:
    """`record` under another type, which tells `_options` the prefix of its flags."""
    return type(record.__name__, (record,), {"_prefix": prefix, "__doc__": record.__doc__})


_asked: list[StructTypeInfo] = []
"""Whose options tyro itself is being asked for."""


@REGISTRY.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The options of a record as tyro finds them, under the names that `flag_of` gives."""
    if not dataclasses.is_dataclass(info.type) or _asked:
        return None
    _asked.append(info)
    try:
        found = ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.pop()
    if not isinstance(found, StructConstructorSpec):
        return None
    prefix, fields = getattr(info.type, "_prefix", None), []
    for option in found.fields:
        kind, default = cast(Any, option.type), option.default
        if (name := flag_of(cast(type, info.type), option.name)) != option.name.replace("_", "-"):
            kind = Annotated[kind, tyro.conf.arg(name=name)]
        for mark in getattr(kind, "__metadata__", ()):
            if isinstance(mark, Prefixed):
                record = _named(kind.__origin__, mark.prefix)
                kind, default = _UNPREFIXED[record], record(**vars(default))
        fields.append(dataclasses.replace(option, type=kind, default=default))
    made = cast(type, info.type).__base__ if prefix else found.instantiate
    return StructConstructorSpec(cast(Any, made), tuple(fields))


def flag_of(record: type, name: str) -> str:
    """The name, without dashes before it, of the flag of a record's field.

    It is the field's, unless the record's `flags` has another, and begins with the prefix of the record.
    """
    name, prefix = getattr(record, "flags", {}).get(name, name), getattr(record, "_prefix", None)
    return (f"{prefix}-{name}" if prefix else name).replace("_", "-")


@dataclass(frozen=True)
class Option:
    """An option of a verb, or an argument without a name, as help shows it."""

    flag: str
    """Name on the command line, with dashes; of an argument without a name, the word that stands for it."""
    takes: str
    """The value that is to be given: its kind, choices in braces, or nothing."""
    choices: tuple[str, ...]
    """Values to choose from; empty where others are allowed too."""
    help: str
    """The meaning, in paragraphs without line breaks."""
    default: str
    """Its default; empty where the help says what happens without it."""
    required: bool
    """Whether it has to be given."""
    group: str
    """Words for what its record holds; empty for what the verb itself holds."""

    @property
    def positional(self) -> bool:
        """Whether it is given by its place."""
        return not self.flag.startswith("--")

    @property
    def several(self) -> bool:
        """Whether it takes several values."""
        return " " in self.takes


_OF_TEXT = {
    "FOLDER": ("out", "folder"),
    "FILE": ("config", "file", "pairs"),
    "JSON": ("chat-template-kwargs", "extra-body", "engine"),
    "TEXT": ("system-prompt", "rubric", "sample-template"),
    "VARIABLE": ("key-env",),
    "NAME=TEXT": ("instruction",),
    "NAME=FILE": ("rewrites-file",),
}
"""Words for what a text is, by how the flag that takes it ends."""


def _plain(kind: Any) -> Any:
    """The type within its annotations."""
    return _plain(get_args(kind)[0]) if get_origin(kind) is Annotated else kind


def _takes(kind: Any, name: str) -> tuple[str, tuple[str, ...]]:
    """A word for a value of a type in help, and the choices where it is one of several."""
    kind = _plain(kind)
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        choices = tuple(map(str, get_args(kind)))
        return "{" + ",".join(choices) + "}", choices
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        said, choices = _takes(first, name)
        return f"{said} ..." if ... in rest else " ".join([said] * (1 + len(rest))), choices
    if kind is str:
        found = [word for word, ends in _OF_TEXT.items() if any(f"-{name}".endswith(f"-{e}") for e in ends)]
        return (found or ["NAME"])[-1], ()
    return {bool: "", int: "INT", float: "FLOAT"}[kind], ()


def _shown(default: Any) -> str:
    if default is None or isinstance(default, bool) or default in ("", ()):
        return ""
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _flowing(text: Any) -> str:
    """Help whose line breaks are the reader's, not the docstring's."""
    said = text() if callable(text) else text
    return "\n\n".join(" ".join(part.split()) for part in (said or "").split("\n\n"))


@functools.cache
def options_of(verb: type) -> tuple[Option, ...]:
    """Every option of a verb, those of its records included, as tyro finds them."""
    with REGISTRY:
        return tuple(_listed(verb, tyro.MISSING_NONPROP, ""))


def _listed(record: Any, default: Any, group: str) -> Iterator[Option]:
    found = ConstructorRegistry.get_struct_spec(StructTypeInfo.make(record, default, in_union_context=False))
    assert isinstance(found, StructConstructorSpec)
    record = _plain(record)
    for option in found.fields:
        kind, marks = _plain(option.type), getattr(option.type, "__metadata__", ())
        if dataclasses.is_dataclass(kind):
            title = _flowing(kind.__doc__).split("\n\n")[0].rstrip(".")
            prefix = getattr(kind, "_prefix", None)
            yield from _listed(option.type, option.default, f"--{prefix}-…: {title}" if prefix else title)
            continue
        name = flag_of(record, option.name)
        required = option.default in (tyro.MISSING, tyro.MISSING_NONPROP)
        said, choices = _takes(kind, name)
        positional = _POSITIONAL in marks
        if positional:
            said = name.upper().removesuffix("S") + " ..." * said.endswith("...")
            said, name = "", said if required else f"[{said}]"
        yield Option(
            name if positional else f"--{name}",
            said,
            choices,
            _flowing(option.helptext),
            "" if required else _shown(option.default),
            required,
            group,
        )


def renamed_in(verb: type) -> dict[str, str]:
    """Names that a verb's flags had before, and keep for one more release: old to new, without dashes.

    They are those of fields whose record gives their flag another name, and those in the verb's `renamed`,
    where an empty new name says that the value is now given by its place.
    """
    found = {
        f"{prefix}{field}".replace("_", "-"): f"{prefix}{flag}".replace("_", "-")
        for record, prefix in _records(verb, "")
        for field, flag in getattr(record, "flags", {}).items()
    }
    return found | getattr(verb, "renamed", {})


def _records(record: Any, prefix: str) -> Iterator[tuple[type, str]]:
    """A record and those in its fields, each with what its flags begin with."""
    yield record, prefix
    for field in dataclasses.fields(record):
        if dataclasses.is_dataclass(kind := _plain(field.type)):
            marks = [m.prefix for m in getattr(field.type, "__metadata__", ()) if isinstance(m, Prefixed)]
            yield from _records(kind, f"{marks[0]}-" if marks else "")


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def from_file(
    verb: type, options: Mapping[str, Any], where: str, renamed: Callable[[str], str] = str
) -> dict[str, Any]:
    """Check the kinds of values that a file has for a verb's options: one, a list, or a truth value.

    Args:
        where: words for the file, which an error begins with.
        renamed: gives the name that an option has now.

    Returns:
        the values by the options' names now; of what the verb does not have, too.

    Raises:
        AlignProError: a value of another kind than its option takes, or an option that is given twice.
    """
    known, found = {option.flag: option for option in options_of(verb)}, dict[str, Any]()
    for said, value in options.items():
        name = renamed(said.replace("_", "-"))
        option, values = known.get(f"--{name}"), value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(isinstance(v, int | float | str) for v in values):
            raise AlignProError(f"{where}: {said} is neither a value nor a list of values")
        if name in found:
            raise AlignProError(f"{where}: {said} is given twice, by two of its names; keep one")
        if option is not None and value is not None:
            truth = _TRUTH.get(str(value).lower()) if isinstance(value, str | bool) else None
            if not option.takes and truth is None:
                raise AlignProError(f"{where}: {said}: write true or false")
            if option.takes and any(isinstance(v, bool) for v in values):
                raise AlignProError(f"{where}: {said} takes a value, not true or false")
            if values is value and not option.several:
                raise AlignProError(f"{where}: {said} takes one value, not a list")
            value = value if option.takes else truth
        found[name] = value
    return found


def arguments_of(options: Mapping[str, Any]) -> list[str]:
    """Options by name as arguments of the command line; what is None or false is left out."""
    out: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        out += [f"--{name}"] if value is True else [f"--{name}", *map(str, values)]
    return out
