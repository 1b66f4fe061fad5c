"""How options are read and shown, the same for every verb: what `tyro.cli` is given."""

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple, cast

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
REGISTRY = ConstructorRegistry()
_UNPREFIXED: Any = tyro.conf.OmitArgPrefixes


class Prefixed(NamedTuple):
    """Marks a field whose record's flags are --PREFIX-FIELD: `Annotated[Record, Prefixed("target")]`."""

    prefix: str


@functools.cache
def _named(record: type, prefix: str) -> type:
    """`record` under another type, which tells `_options` the prefix of its flags."""
    return type(record.__name__, (record,), {"_prefix": prefix, "__doc__": record.__doc__})


def _hint(default: str) -> str:
    """Say the default after an option's help, unless it is to be left out, or off."""
    return "" if default in ("None", "False", "") else f"(default: {default})"


def _flowing(text: Any) -> Any:
    """Help whose line breaks are the terminal's, not the docstring's."""
    said = text() if callable(text) else text
    return said and "\n\n".join(" ".join(part.split()) for part in said.split("\n\n"))


_asked: list[StructTypeInfo] = []
"""Whose options tyro itself is being asked for."""


@REGISTRY.struct_rule
def _options(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The options of a record as tyro finds them, with `_hint`, `_flowing` help and prefixes."""
    if not dataclasses.is_dataclass(info.type) or _asked:
        return None
    _asked.append(info)
    try:
        found = ConstructorRegistry.get_struct_spec(info)
    finally:
        _asked.pop()
    if not isinstance(found, StructConstructorSpec):
        return None
    prefix = getattr(info.type, "_prefix", None)
    fields = []
    for field in found.fields:
        name = prefix and f"{prefix}-{field.name}"
        kind: Any = Annotated[field.type, tyro.conf.arg(name=name, help_behavior_hint=_hint)]
        default = field.default
        for mark in kind.__metadata__:
            if isinstance(mark, Prefixed):
                record = _named(kind.__origin__, mark.prefix)
                kind, default = _UNPREFIXED[record], record(**vars(default))
        text = functools.partial(_flowing, field.helptext)
        fields.append(dataclasses.replace(field, type=kind, default=default, helptext=text))
    made = cast(type, info.type).__base__ if prefix else found.instantiate
    return StructConstructorSpec(cast(Any, made), tuple(fields))
