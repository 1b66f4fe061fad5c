"""`alignpro <verb>`: each verb is a dataclass in `VERBS`; its docstrings are --help, its `run` does it."""

import contextlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, Union

import tyro

import alignpro
from alignpro.commands.compare import Compare
from alignpro.commands.demo import Demo
from alignpro.commands.doctor import Doctor
from alignpro.commands.estimate import Estimate
from alignpro.commands.explore import Explore
from alignpro.commands.headroom import Headroom
from alignpro.commands.hunt import Hunt
from alignpro.commands.instruct import Instruct
from alignpro.commands.judge import Judge
from alignpro.commands.merge import Merge
from alignpro.commands.options import CONFIG, REGISTRY
from alignpro.commands.resample import Resample
from alignpro.commands.reward_model import RewardModel
from alignpro.commands.rewrite import Rewrite
from alignpro.commands.rollout import Rollout
from alignpro.commands.sft import Sft
from alignpro.commands.shared import Verb
from alignpro.commands.solve import Solve
from alignpro.commands.train import Train
from alignpro.commands.verify import Verify
from alignpro.errors import AlignProError
from alignpro.report import keep

VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "train": Train,
    "rewrite": Rewrite,
    "merge": Merge,
    "sft": Sft,
    "reward-model": RewardModel,
    "resample": Resample,
    "instruct": Instruct,
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


def _expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with what --preset and --config stand for in front; what is given outright wins."""
    from alignpro.llm.training.settings import PRESETS

    verb, *rest = arguments
    given = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in rest if a.startswith("--")}

    def value_of(name: str) -> str | None:
        for i, a in enumerate(rest):
            if a.startswith(f"--{name}="):
                return a.split("=", 1)[1]
            if a == f"--{name}" and i + 1 < len(rest):
                return rest[i + 1]
        return None

    path = value_of("config")
    said = {} if path is None else _yaml(path)
    preset: Any = value_of("preset") or said.get("preset")
    options = PRESETS.get(preset, {}) | said
    out = [verb]
    for name, value in options.items():
        if name in given or value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, list | tuple) else [value]
        out += [flag] if value is True else [flag, *map(str, values)]
    return [*out, *rest]


def _yaml(path: str) -> dict[str, Any]:
    """The options in a file of YAML. Raises AlignProError where it holds anything else."""
    try:
        import yaml

        with open(path, encoding="utf-8") as file:
            said = yaml.safe_load(file)
    except ModuleNotFoundError:
        raise AlignProError("--config: the package yaml is missing; run pip install pyyaml") from None
    except OSError as error:
        raise AlignProError(f"--config {path}: cannot read it ({error.strerror}); name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}" if where else ""
        remedy = "write lines such as lam: 0.05"
        raise AlignProError(f"--config {path}: is not valid YAML{place}; {remedy}") from None
    if not isinstance(said, dict):
        raise AlignProError(f"--config {path}: holds no options; write lines such as lam: 0.05")
    options: dict[str, Any] = {}
    for name, value in said.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(v, int | float | str) for v in values):
            raise AlignProError(f"--config {path}: {name} is neither a value nor a list of values")
        options[str(name).replace("-", "_")] = value
    return options


def _parse(arguments: Sequence[str]) -> Verb:
    kinds: Any = Union[  # noqa: UP007 - built from a dict
        tuple(Annotated[verb, tyro.conf.subcommand(name=name)] for name, verb in VERBS.items())
    ]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise AlignProError(f"{arguments[0]}: is no verb; give one of {', '.join(VERBS)}")
    if arguments and "config" in getattr(VERBS.get(arguments[0]), "__dataclass_fields__", {}):
        arguments = _expanded(arguments)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kinds,
                prog="alignpro",
                description="The theory of prompt optimization for alignment, verified and put to use.",
                args=list(arguments),
                config=CONFIG,
                registry=REGISTRY,
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise AlignProError(_one_line(said.getvalue(), arguments)) from None


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """tyro's complaint as one line: it gives none but in a frame, of Unicode or of ASCII."""
    parts = re.split("[─-]{5,}", re.sub(r"\x1b\[[0-9;]*m", "", box))
    lines = [[line.strip("│|╭╮╰╯ \t") for line in part.splitlines()] for part in parts]
    _, complaint, more, *_ = [[*filter(None, part)] for part in lines if any(part)] + [[], [], []]
    said = re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(complaint).rstrip("."))
    if more and more[0].startswith("Perhaps you meant"):
        said += f"; perhaps {more[1]}"
    verb = f" {arguments[0]}" if arguments and arguments[0] in VERBS else ""
    return f"{said or 'cannot read the arguments'}; see alignpro{verb} --help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and give its exit status: 0 done, 1 a finding, 2 a mistake, 130 interrupted.

    `--debug`, anywhere among the arguments, shows where a mistake was noticed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug, arguments = "--debug" in arguments, [a for a in arguments if a != "--debug"]
    typed = keep.TYPED.set(tuple(arguments))
    try:
        if list(arguments) in (["--version"], ["-V"]):
            print(f"alignpro {alignpro.__version__}")
            return 0
        if list(arguments[:1]) == ["--completion"]:
            shell = (*arguments[1:], "")[0]
            if shell not in ("bash", "zsh", "fish"):
                raise AlignProError(f"--completion {shell}: choose from bash, zsh, fish")
            arguments = ["--tyro-print-completion", shell]
        status = _parse(arguments).run()
        sys.stdout.flush()
        return status
    except AlignProError as error:
        if debug:
            from alignpro.llm.models.packages import scrub

            print(scrub("".join(traceback.format_exception(error))), file=sys.stderr)
        for line in str(error).split("\n"):
            print(f"alignpro: error: {line}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "alignpro").split(".")[0] == "alignpro":
            raise
        remedy = f"the package {error.name} is missing; run pip install 'alignpro[llm]'"
        print(f"alignpro: error: {arguments[0]}: {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("alignpro: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader left; keep the interpreter from complaining as it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    finally:
        keep.TYPED.reset(typed)


if __name__ == "__main__":
    sys.exit(main())
