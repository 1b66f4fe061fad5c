"""`alignpro <verb>`: each verb is a dataclass whose docstrings are its --help and whose `run` does it.

To add one, write the dataclass and its row in `VERBS`. Import what it needs inside `run`, so that no verb
waits for another's libraries.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, Union

import tyro

import alignpro
from alignpro.errors import AlignProError


class Verb(Protocol):
    """A subcommand: parsed arguments, and what they do."""

    def run(self) -> int:
        """Do it; the exit status: 0, or 1 for a finding such as a violated bound."""
        ...


@dataclass(frozen=True)
class Verify:
    """Check Theorem 1, its sharper forms, lower bounds, identities and lemmas on random instances.

    Exit status 1 when a statement is violated (with --certify: when that is proved). Known-wrong ones
    (signed_max_abs, quarter_l1, beta_eighth, never_outperforms, pinsker_l1, l1_at_most_one,
    suboptimality_reversed, trained_reversed) test the tester: they must be refuted.
    """

    bound: tuple[str, ...] = ()
    """What to check, by name: theorem1, trained, ceiling, exact_gap, ... or a known-wrong statement; an
    unknown name lists them all. Default: every true statement. Up to three are shown family by family."""
    instances: int = 1_000_000
    """How many random instances, shared among the families."""
    seed: int = 0
    """Determines every draw."""
    family: tuple[str, ...] = ()
    """Families of instances to draw from. Default: all."""
    certify: tuple[int, ...] = (0,)
    """Prove, in ball arithmetic, the verdicts on this many most doubtful instances of each statement and
    family, and on what floating point calls violated. --certify alone: 8."""
    out: str | None = None
    """Folder for verify.json and the instances that refute a statement."""

    def run(self) -> int:
        from alignpro import verify

        if len(self.certify) > 1:
            raise AlignProError(f"--certify {' '.join(map(str, self.certify))}: give one number, or none")
        certify = self.certify[0] if self.certify else 8
        return verify.main(self.bound, self.instances, self.seed, self.family, self.out, certify)


@dataclass(frozen=True)
class Solve:
    """Print the exact optima, the gap and its bounds for saved instances.

    Every file is validated before anything is computed.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """Instances: .npz files with the arrays p, prior, frozen, own, reward."""
    beta: float
    """RLHF tuning parameter, positive, in reward units."""
    lam: float
    """Prompt tuning parameter (lambda), positive, in reward units."""
    bounds: tuple[str, ...] = ("theorem1",)
    """Upper and lower bounds on the gap by name (theorem1, span, tight, barycentre, trained, ceiling, ...; an
    unknown name lists them), or all."""
    r_max: float | None = None
    """Theorem 1's r_max, when it is known a priori. Default: the largest reward, measured from the least one
    if that is negative."""
    json: bool = False
    """One JSON object per file and line, instead of a table."""

    def run(self) -> int:
        from tqdm import tqdm

        from alignpro import solve

        with tqdm(total=len(self.files), unit="file", disable=len(self.files) < 100, leave=False) as bar:
            results = solve.solve_files(
                self.files, self.beta, self.lam, self.bounds, self.r_max, progress=bar.update
            )
        if self.json:
            for result in results:
                print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        else:
            print(solve.table(results))
        return 0


@dataclass(frozen=True)
class Hunt:
    """Look for the worst case of a statement: by gradient ascent, and for the smallest counterexample.

    Exit status 1 when one is refuted. Statements: those of verify, and q2, whether the optimal prompter can
    outperform the RLHF optimum. Ctrl-C keeps what was found so far.
    """

    bounds: tyro.conf.Positional[tuple[str, ...]]
    """What to hunt, e.g. theorem1, tight, signed_max_abs, q2."""
    shape: tuple[int, int, int] = (2, 3, 3)
    """Prompts, rewrites and responses of the instances; counterexamples may be smaller."""
    restarts: int = 256
    """How many ascents, side by side."""
    steps: int = 500
    """Steps of each ascent."""
    tries: int = 2000
    """Random instances in search of a small counterexample."""
    seed: int = 0
    """Determines the search."""
    seconds: float | None = None
    """Time for each statement, compilation aside. Default: no limit."""
    out: str | None = None
    """Folder for hunt.json and the instances found (.npz)."""

    def run(self) -> int:
        from alignpro import hunt

        budget = hunt.Budget(self.shape, self.restarts, self.steps, self.tries, self.seed, self.seconds)
        return hunt.main(self.bounds, budget, self.out)


@dataclass(frozen=True)
class Demo:
    """Theory meets PPO on a real language model: the main job.

    Restricts SmolLM2-135M-Instruct, as prompter and as frozen model, to finite sets of rewrites and responses
    on which everything is exact; trains the prompter; checks Theorem 1 before and after; writes report.html.
    """

    out: str
    """Folder for the report and all that it rests on. Created if need be; must not hold another run."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""
    quick: bool = False
    """Smaller sets and a shorter training: minutes become one or two."""
    model: str | None = None
    """Prompter and frozen model: a packaged name, a local folder or a hub id.

    Default: smollm2-135m-instruct."""
    reward: str | None = None
    """Reward model: a packaged name or the folder of a saved one. Default: minilm-bt."""
    prompts_file: str | None = None
    """Your own prompts, one per line. Default: real instructions from a package."""
    prompts: int | None = None
    """How many prompts. Default: 8 (quick: 3)."""
    rewrites: int | None = None
    """Distinct rewrites per prompt, the original among them. Default: 16 (quick: 8)."""
    responses: int | None = None
    """Distinct responses per prompt. Default: 32 (quick: 12)."""
    beta: float | None = None
    """RLHF tuning parameter, positive, in reward units. Default: 0.1."""
    lam: float | None = None
    """Prompt tuning parameter (lambda), positive, in reward units. Default: 0.05."""
    algorithm: str | None = None
    """ppo or rloo. Default: ppo."""
    iterations: int | None = None
    """Rounds of sampling, each followed by 4 optimizer steps. Default: 16 (quick: 4)."""
    sampled_rewards: bool = False
    """Reward a rewrite with one sampled response, not with its expected reward."""
    seed: int = 0
    """Determines prompts, samples and training."""

    def run(self) -> int:
        try:
            from alignpro.llm import demo
        except ModuleNotFoundError as error:
            raise AlignProError(
                f"demo: the package {error.name} is missing; run pip install 'alignpro[llm]'"
            ) from error

        preset = demo.QUICK if self.quick else demo.DemoSettings()

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        settings = replace(
            preset,
            **given("model", "reward", "prompts_file", "prompts", "beta", "seed"),
            exact_rewards=not self.sampled_rewards,
            enumeration=replace(preset.enumeration, **given("rewrites", "responses")),
            training=replace(preset.training, **given("lam", "algorithm", "iterations")),
        )
        demo.run(self.out, settings, resume=self.resume)
        return 0


VERBS: dict[str, type[Verb]] = {"demo": Demo, "verify": Verify, "hunt": Hunt, "solve": Solve}


def _parse(arguments: Sequence[str]) -> Verb:
    kinds: Any = Union[  # noqa: UP007 - built from a dict
        tuple(Annotated[verb, tyro.conf.subcommand(name=name)] for name, verb in VERBS.items())
    ]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise AlignProError(f"{arguments[0]}: is no verb; give one of {', '.join(VERBS)}")
    if len(VERBS) == 1:
        arguments = arguments[1:]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kinds,
                prog="alignpro",
                description="The theory of prompt optimization for alignment, verified and put to use.",
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise AlignProError(_one_line(said.getvalue(), arguments)) from None


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """The parser's framed complaint as one line, whether framed in Unicode or in ASCII."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip("│| \t") for line in box.splitlines()]
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.startswith(("╭", "╰")):
            continue
        if re.fullmatch("[─-]{5,}", line):
            paragraphs.append([])
        elif line:
            paragraphs[-1].append(line)
    if "╭" not in box and len(paragraphs) > 1:
        del paragraphs[0]  # the title, which the Unicode frame holds in its border
    said = " ".join(paragraphs[0]).rstrip(".")
    if len(paragraphs) > 1 and paragraphs[1] and paragraphs[1][0].startswith("Perhaps you meant"):
        said += f"; perhaps {paragraphs[1][1]}"
    verb = f" {arguments[0]}" if arguments and arguments[0] in VERBS else ""
    return f"{said or 'cannot read the arguments'}; see alignpro{verb} --help"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status.

    0 done; 1 a finding (a violated bound); 2 a mistake in the input, told in one line on stderr; 130
    interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if list(arguments) in (["--version"], ["-V"]):
            print(f"alignpro {alignpro.__version__}")
            return 0
        status = _parse(arguments).run()
        sys.stdout.flush()
        return status
    except AlignProError as error:
        for line in str(error).splitlines():
            print(f"alignpro: error: {line}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
