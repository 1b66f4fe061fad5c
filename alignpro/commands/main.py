"""`alignpro <verb>`: each verb is a dataclass in `VERBS`; its docstrings are --help, its `run` does it."""

import contextlib
import functools
import io
import re
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

import tyro

import alignpro
from alignpro import terminal
from alignpro.commands import helping, trusted
from alignpro.commands.compare import Compare
from alignpro.commands.demo import Demo
from alignpro.commands.doctor import Doctor
from alignpro.commands.estimate import Estimate
from alignpro.commands.explore import Explore
from alignpro.commands.flags import CONFIG, REGISTRY, arguments_of, from_file, options_of, renamed_in
from alignpro.commands.headroom import Headroom
from alignpro.commands.hunt import Hunt
from alignpro.commands.instruct import Instruct
from alignpro.commands.judge import Judge
from alignpro.commands.merge import Merge
from alignpro.commands.push import Push
from alignpro.commands.resample import Resample
from alignpro.commands.reward_model import RewardModel
from alignpro.commands.rewrite import Rewrite
from alignpro.commands.rollout import Rollout
from alignpro.commands.route import Route
from alignpro.commands.sft import Sft
from alignpro.commands.shared import Verb
from alignpro.commands.solve import Solve
from alignpro.commands.train import Train
from alignpro.commands.verify import Verify
from alignpro.errors import AlignProError
from alignpro.report import keep
from alignpro.terminal import say
from alignpro.typed import read_yaml

VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "train": Train,
    "rewrite": Rewrite,
    "merge": Merge,
    "push": Push,
    "sft": Sft,
    "reward-model": RewardModel,
    "resample": Resample,
    "instruct": Instruct,
    "route": Route,
    "rollout": Rollout,
    "estimate": Estimate,
    "headroom": Headroom,
    "compare": Compare,
    "judge": Judge,
    "verify": Verify,
    "hunt": Hunt,
    "solve": Solve,
    "explore": Explore,
    "doctor": Doctor,
}

CONTINUED = ("rollout", "resample", "judge", "instruct", "route")
"""Verbs that go on by themselves where their folder has a run."""


def _name(flag: str) -> str:
    return flag.split("=")[0].removeprefix("--").replace("_", "-")


def _now(verb: str, name: str, source: str = "") -> str:
    """The name that an option has now, said on stderr where it is another; empty where it has none."""
    new = renamed_in(VERBS[verb]).get(name)
    if new is None:
        return name
    told = f"is called --{new} now" if new else "is given without its name now"
    say(f"alignpro: {source}--{name} {told}; the old name goes with the next release", error=True)
    return new


def _renamed(verb: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a verb with the names that its options have now."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return [*found, *arguments[i:]]
        if argument.startswith("--") and (new := _now(verb, _name(argument))) != _name(argument):
            _, equals, value = argument.partition("=")
            found += [f"--{new}{equals}{value}"] if new else [value] * bool(equals)
        else:
            found.append(argument)
    return found


def _expanded(verb: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments with what --preset and --config stand for in front; what is given outright wins.

    Beside them the file of each option that is taken from one.
    """
    from alignpro.llm.training.settings import PRESETS

    given = {_name(a) for a in arguments if a.startswith("--")}

    def value_of(name: str) -> str | None:
        for i, a in enumerate(arguments):
            if a.startswith(f"--{name}="):
                return a.split("=", 1)[1]
            if a == f"--{name}" and i + 1 < len(arguments):
                return arguments[i + 1]
        return None

    path = value_of("config")
    said: dict[str, Any] = {}
    if path is not None:
        renamed = functools.partial(_now, verb, source=f"{path}: ")
        options = read_yaml(path, "--config", as_text=True)
        said = trusted.checked(path, from_file(VERBS[verb], options, f"--config {path}", renamed), given)
    preset = value_of("preset") or said.get("preset")
    now, named = (
        renamed_in(VERBS[verb]),
        {_name(n): value for n, value in PRESETS.get(str(preset), {}).items()},
    )
    options = {now.get(name, name): value for name, value in named.items()} | said
    out = arguments_of({name: value for name, value in options.items() if name not in given})
    return [*out, *arguments], dict.fromkeys(said.keys() - given, path or "")


def check(verb: str, options: Mapping[str, Any], where: str, *given: str) -> None:
    """Refuse options from a file, by any of their names, that the verb would refuse; `given` go by place.

    Raises:
        AlignProError: so; it begins with `where`.
    """
    said = from_file(VERBS[verb], options, where, lambda name: renamed_in(VERBS[verb]).get(name, name))
    try:
        _parse([verb, *given, *arguments_of(said)])
    except AlignProError as error:
        raise AlignProError(f"{where}: {error}") from None


def _parse(arguments: Sequence[str]) -> Verb:
    if arguments and arguments[0] == "--tyro-print-completion":
        kinds: Any = Union[  # noqa: UP007 - built from a dict
            tuple(Annotated[verb, tyro.conf.subcommand(name=name)] for name, verb in VERBS.items())
        ]
        return tyro.cli(kinds, prog="alignpro", args=list(arguments), config=CONFIG, registry=REGISTRY)
    if not arguments or arguments[0] not in VERBS:
        wrong = f"{arguments[0]}: is no verb" if arguments else "verb: none is given"
        raise AlignProError(f"{wrong}; give one of {', '.join(VERBS)}; see alignpro --help")
    for argument in arguments:  # no record of the run could hold it
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise AlignProError(f"{argument}: is not UTF-8; type it again, or rename the file")
    name, *rest = arguments
    verb, said = VERBS[name], io.StringIO()
    rest, files = _renamed(name, rest), dict[str, str]()
    if "config" in verb.__dataclass_fields__:  # type: ignore[attr-defined]
        rest, files = _expanded(name, rest)
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(verb, prog=f"alignpro {name}", args=rest, config=CONFIG, registry=REGISTRY)
    except SystemExit:
        raise AlignProError(_placed(_one_line(said.getvalue(), name), files)) from None
    except AlignProError as error:  # of the settings that were read
        raise AlignProError(_placed(_as_flags(str(error), name), files)) from error


def _placed(complaint: str, files: Mapping[str, str]) -> str:
    """The complaint with the file before it that the option is from, where it is from one."""
    for option, file in files.items():
        names = "|".join(map(re.escape, (option, option.replace("-", "_"))))
        if re.search(rf"(^|--| )({names})(?=[ .:,]|$)", complaint):
            return f"--config {file}: {complaint}"
    return complaint


def _one_line(box: str, verb: str) -> str:
    """tyro's complaint as one line: it gives none but in a frame, of Unicode or of ASCII."""
    parts = re.split("[─-]{5,}", re.sub(r"\x1b\[[0-9;]*m", "", box))
    lines = [[line.strip("│|╭╮╰╯ \t") for line in part.splitlines()] for part in parts]
    _, complaint, more, *_ = [[*filter(None, part)] for part in lines if any(part)] + [[], [], []]
    said = re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(complaint).rstrip("."))
    number = (
        r"^Error parsing (--\S+): (?:could not convert string to float|invalid literal for int.*): ('.*')$"
    )
    if wrong := re.match(number, said):
        said = f"{wrong[1]} {wrong[2]}: give a {'whole ' * ('int()' in said)}number"
    if more and more[0].startswith("Perhaps you meant"):
        said += f"; perhaps {more[1]}"
    if wrong := re.match(r"invalid choice ('.*') for argument '--(\S+)'", said):
        (option,) = (o for o in options_of(VERBS[verb]) if o.flag == f"--{wrong[2]}")
        said = f"{wrong[2].replace('-', '_')} {wrong[1]}: choose from {', '.join(option.choices)}"
    said = _as_flags(said or "cannot read the arguments", verb)
    return f"{said}; see alignpro {verb} --help"


def _as_flags(message: str, verb: str) -> str:
    """A message in which a setting is called as on the command line, not as in Python."""
    if verb not in VERBS:
        return message
    renamed = renamed_in(VERBS[verb]).items()
    names = {old.replace("-", "_"): new.replace("-", "_") for old, new in renamed if new}
    if not names:
        return message
    found = rf"(^|\bwith settings\.|(?<=\w) x )({'|'.join(names)})(?=[ .:])"
    return re.sub(found, lambda said: said[1] + names[said[2]], message, flags=re.MULTILINE)


def _help(arguments: Sequence[str]) -> str | None:
    """The help that is asked for; None where none is."""
    verb, *rest = arguments or ("",)
    before = rest[: rest.index("--")] if "--" in rest else rest
    width = min(shutil.get_terminal_size().columns, 100)
    if verb in ("-h", "--help", "--help-all"):
        return helping.overview(VERBS, width)
    if verb in VERBS and {"-h", "--help", "--help-all"} & set(before):
        return helping.text(verb, VERBS[verb], width, "--help-all" in before)
    return None


def _goes_on(verb: str) -> str:
    """How an interrupted verb is continued, where it can be."""
    if verb in CONTINUED:
        return "; the same command goes on"
    resumes = "resume" in getattr(VERBS.get(verb), "__dataclass_fields__", {})
    return "; the same command with --resume goes on" if resumes else ""


def _done(arguments: Sequence[str]) -> int:
    """Do what is asked for: a verb, or what is said of them; the exit status."""
    if list(arguments) in (["--version"], ["-V"]):
        say(f"alignpro {alignpro.__version__}")
        return 0
    if list(arguments[:1]) == ["--completion"]:
        shell = (*arguments[1:], "")[0]
        if shell not in ("bash", "zsh", "fish"):
            raise AlignProError(f"--completion {shell}: choose from bash, zsh, fish")
        with contextlib.redirect_stdout(io.StringIO()) as script, contextlib.suppress(SystemExit):
            _parse(["--tyro-print-completion", shell])
        say(script.getvalue().removesuffix("\n"))
        return 0
    if (said := _help(arguments)) is not None:
        say(said)
        return 0
    return _parse(arguments).run()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and give its exit status: 0 done, 1 a finding, 2 a mistake, 130 interrupted.

    `--debug`, anywhere among the arguments, shows where a mistake was noticed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, arguments = "--debug" in arguments, [a for a in arguments if a != "--debug"]
    typed = keep.TYPED.set(tuple(arguments))
    terminal.begin()
    try:
        status = _done(arguments)
        terminal.flush()
        if (failure := terminal.lost()) is not None:
            why = f"cannot be written ({failure.strerror}); free space, or send it elsewhere"
            raise AlignProError(f"standard output: {why}")
        return status
    except AlignProError as error:
        if debug:
            from alignpro.llm.models.packages import scrub

            say(scrub("".join(traceback.format_exception(error))), error=True)
        for line in _as_flags(str(error), (*arguments[:1], "")[0]).split("\n"):
            say(f"alignpro: error: {line}", error=True)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "alignpro").split(".")[0] == "alignpro":
            raise
        remedy = f"the package {error.name} is missing; run pip install 'alignpro[llm]'"
        say(f"alignpro: error: {arguments[0]}: {remedy}", error=True)
        return 2
    except KeyboardInterrupt:
        say(f"alignpro: interrupted{_goes_on((*arguments, '')[0])}", error=True)
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        keep.TYPED.reset(typed)


if __name__ == "__main__":
    sys.exit(main())
