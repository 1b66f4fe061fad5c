"""The texts of --help and --help-all, and the page of each verb on the site, all from `flags.options_of`."""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from alignpro.commands.flags import Option, options_of

_COLUMN = 28
"""Characters before an option's help."""
_JOINED = "\xa0"
"""A space at which no line ends."""


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in (text or "").split("\n\n")]


def summary(verb: type) -> str:
    """Say what a verb does, in a sentence."""
    return _paragraphs(verb.__doc__)[0]


def common(verb: type) -> list[Option]:
    """The options that --help shows, in order: those that the verb's `common` names, or else all."""
    options = {option.flag.removeprefix("--"): option for option in options_of(verb)}
    named: str = getattr(verb, "common", "")
    first = [option for option in options.values() if option.positional]
    return first + [options[name] for name in named.split()] if named else list(options.values())


def _usage(name: str, verb: type) -> str:
    needed = [option for option in options_of(verb) if option.positional]
    needed += [o for o in options_of(verb) if o.required and not o.positional]
    words = [o.flag if o.positional else f"{o.flag} {o.takes}" for o in needed]
    return " ".join(["usage: alignpro", name, *words, "[options]"])


def _rows(option: Option, width: int, whole: bool) -> Iterator[str]:
    """An option's lines: its name, and beside or below it its help, of which --help has one paragraph."""
    said = option.help.split("\n\n")
    after = "(required)" if option.required and not option.positional else ""
    after = f"(default: {option.default})" if option.default else after
    if not whole:
        said = said[:1]
    said[-1] = f"{said[-1]} {after.replace(' ', _JOINED)}".strip()
    lines = [line for part in said for line in textwrap.wrap(part, width - _COLUMN, break_on_hyphens=False)]
    head = f"  {option.flag} {option.takes}".rstrip()
    if len(head) > _COLUMN - 2:
        yield head
        head = ""
    for line in lines or [""]:
        yield f"{head:<{_COLUMN}}{line}".rstrip().replace(_JOINED, " ")
        head = ""


def _command(command: str, width: int) -> list[str]:
    """A command in lines of at most `width` characters where its words allow it, broken before a flag."""
    first, *rest = re.split(r" (?=--)", command)
    lines = [f"  {first}"]
    for words in rest:
        if len(lines[-1]) + len(words) > width - 3:
            lines[-1] += " \\"
            lines.append(f"      {words}")
        else:
            lines[-1] += f" {words}"
    return lines


def text(name: str, verb: type, width: int, whole: bool = False) -> str:
    """The help of a verb, in lines of at most `width` characters.

    Args:
        whole: every option with all that is said of it, by groups, as --help-all has it.
    """
    width = max(width, 2 * _COLUMN)
    options, shown = options_of(verb), common(verb)
    lines = textwrap.wrap(_usage(name, verb), width, subsequent_indent=" " * 16, break_on_hyphens=False)
    for part in _paragraphs(verb.__doc__):
        lines += ["", *textwrap.wrap(part, width, break_on_hyphens=False)]
    lines += ["", "options:"]
    for option in shown:
        lines += _rows(option, width, whole)
    rest = [option for option in options if option not in shown]
    more = f"; --help-all shows the {len(rest)} other options, too" if rest and not whole else ""
    lines.append(f"{'  -h, --help':<{_COLUMN}}Show this{more}.")
    if whole:
        for group, members in grouped(rest).items():
            lines += ["", *textwrap.wrap(f"{group or 'More'}:", width)]
            lines += [line for option in members for line in _rows(option, width, True)]
    lines += ["", "examples:"]
    for what, command in examples(verb):
        lines += [f"  # {what}", *_command(command, width)]
    return "\n".join(lines)


def examples(verb: type) -> Sequence[tuple[str, str]]:
    """Examples of a verb: what each does, and its command."""
    return getattr(verb, "examples", ())


def grouped(options: Sequence[Option]) -> dict[str, list[Option]]:
    """The options by what their records hold."""
    found: dict[str, list[Option]] = {}
    for option in options:
        found.setdefault(option.group, []).append(option)
    return found


def overview(verbs: Mapping[str, type], width: int) -> str:
    """The help of the command without a verb."""
    lines = [
        "usage: alignpro VERB ...",
        "",
        "The theory of prompt optimization for alignment, verified and put to use.",
        "",
        "verbs:",
    ]
    column = max(map(len, verbs)) + 4
    for name, verb in verbs.items():
        head = f"  {name}"
        for line in textwrap.wrap(summary(verb), max(width - column, 20), break_on_hyphens=False):
            lines.append(f"{head:<{column}}{line}")
            head = ""
    lines += ["", "alignpro VERB --help says how a verb is used, and ends with examples."]
    lines += ["alignpro --version says which version this is; alignpro --completion bash (zsh, fish) prints"]
    lines += ["what completes verbs and options in that shell; --debug, with any verb, shows where a mistake"]
    lines += ["was noticed."]
    return "\n".join(lines)


# --- the site ---


def _escaped(text: str) -> str:
    """Text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>$#|~])", r"\\\1", text)


def page(name: str, verb: type) -> str:
    """The page of a verb on the site, in MyST's Markdown."""
    lines = [f"# alignpro {name}", ""]
    for part in _paragraphs(verb.__doc__):
        lines += [_escaped(part), ""]
    lines += ["```text", _usage(name, verb).removeprefix("usage: "), "```", ""]
    shown = common(verb)
    told = [line for what, command in examples(verb) for line in (f"# {what}", *_command(command, 100))]
    lines += ["```bash", *(line.removeprefix("  ") for line in told), "```", ""]
    lines += ["```{program} alignpro " + name, "```", ""]
    rest = [option for option in options_of(verb) if option not in shown]
    for group, members in {("Common options" if rest else "Options"): shown, **grouped(rest)}.items():
        lines += [f"## {_escaped(group or 'More options')}", ""]
        for option in members:
            flag = option.flag.strip("[]")
            said = [_escaped(part) for part in option.help.split("\n\n")]
            if option.default or option.required:
                said.append(f"Default: `{option.default}`." if option.default else "Required.")
            lines += ["````{option} " + f"{flag} {option.takes}".rstrip(), "\n\n".join(said), "````", ""]
    return "\n".join(lines)


def index(verbs: Mapping[str, type]) -> str:
    """The page that lists the verbs, in MyST's Markdown."""
    lines = [
        "# Command line",
        "",
        "Every verb of `alignpro`, with its options as `--help-all` shows them.",
        "",
    ]
    lines += ["| verb | what it does |", "|---|---|"]
    lines += [f"| [{name}]({name}.md) | {_escaped(summary(verb))} |" for name, verb in verbs.items()]
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *verbs, "```", ""])
