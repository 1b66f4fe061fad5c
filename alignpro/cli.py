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
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol, Union

import tyro

import alignpro
from alignpro.errors import AlignProError
from alignpro.llm.settings import PRESETS, TrainSettings


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
            raise _needs_llm("demo", error) from error

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


def _needs_llm(verb: str, error: ModuleNotFoundError) -> AlignProError:
    return AlignProError(f"{verb}: the package {error.name} is missing; run pip install 'alignpro[llm]'")


@dataclass(frozen=True)
class Train:
    """Train a prompter (or, with --task rlhf, the RLHF oracle) on open-ended text.

    The default settings are faithful: their optimum is the paper's closed form. A setting that moves it is
    refused, and named, unless --allow-moved-optimum is given. Interrupt at any time; --resume continues.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl, the answers paid for, and prompter/, the trained one."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    preset: str = "faithful"
    """Named settings that the options start from: faithful, or paper (lr 1.41e-5, batch 256, adaptive KL)."""
    prompter: str = "smollm2-135m-instruct"
    """rho_sft: a packaged name, a local folder, a hub id, or a fine-tuned prompter's folder."""
    target: str = "smollm2-135m-instruct"
    """Frozen model: a name like the prompter's, or the http(s) address of an OpenAI-compatible endpoint."""
    reward: str = "minilm-bt"
    """A packaged reward, a reward model's folder or hub id with its range (owner/name@squash:0,2), a Python
    function (module:function@0,1), or an endpoint's address."""
    dataset: str = "instructions"
    """Packaged prompts, of which the training split is used."""
    prompts_file: str | None = None
    """Your own prompts instead, one per line."""
    answer_tokens: int = 64
    """Tokens of the frozen model's answers, at most."""
    answer_temperature: float = 1.0
    """Of the frozen model. The paper evaluates with 1.5, top-p 0.6 and top-k 20."""
    answer_top_p: float = 1.0
    """Of the frozen model."""
    answer_top_k: int = 0
    """Of the frozen model; 0 keeps all tokens."""
    target_model: str | None = None
    """Endpoint: the model's name there."""
    target_key_env: str | None = None
    """Endpoint: NAME of the environment variable that holds its key."""
    target_dialect: str | None = None
    """Endpoint: openai, vllm or transformers (the latter two take top-k)."""
    target_concurrency: int | None = None
    """Endpoint: requests at a time. Default: 8."""
    target_max_calls: int | None = None
    """Endpoint: budget of requests, after which training stops and can be resumed."""
    target_max_tokens: int | None = None
    """Endpoint: budget of tokens."""
    prices: tuple[float, float] | None = None
    """Money per million prompt tokens and answer tokens, for the ledger."""
    dtype: str = "bfloat16"
    """Of a frozen model in this process. float32 makes answers independent of how they are batched."""
    batch_size: int = 64
    """Sequences at once, of a frozen model in this process."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb, trackio."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        try:
            from alignpro.llm import run
            from alignpro.llm.frozen import Sampling
        except ModuleNotFoundError as error:
            raise _needs_llm("train", error) from error
        if self.preset not in PRESETS:
            raise AlignProError(f"--preset {self.preset}: choose from {', '.join(PRESETS)}")
        endpoint: dict[str, Any] = {
            "model": self.target_model,
            "key_env": self.target_key_env,
            "dialect": self.target_dialect,
            "concurrency": self.target_concurrency,
            "max_calls": self.target_max_calls,
            "max_tokens": self.target_max_tokens,
        }
        run.run_train(
            self.out,
            self.settings,
            prompter=self.prompter,
            target=self.target,
            answers=Sampling(
                self.answer_temperature, self.answer_top_p, self.answer_top_k, self.answer_tokens
            ),
            reward=self.reward,
            dataset=self.dataset,
            prompts_file=self.prompts_file,
            dtype=self.dtype,
            batch_size=self.batch_size,
            endpoint=endpoint,
            prices=self.prices,
            report_to=self.report_to,
            resume=self.resume,
        )
        return 0


@dataclass(frozen=True)
class Rewrite:
    """Rewrite prompts with a trained prompter."""

    prompter: tyro.conf.Positional[str]
    """The folder that training wrote (…/prompter), or any model, as rho_sft."""
    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to rewrite. Default: one per line of standard input."""
    samples: int = 1
    """Rewrites of each."""
    seed: int = 0
    """Determines them."""
    max_tokens: int | None = None
    """Tokens of a rewrite, at most. Default: as it was trained."""
    json: bool = False
    """One JSON object per line, instead of the rewrite alone."""

    def run(self) -> int:
        try:
            from alignpro.llm import run
        except ModuleNotFoundError as error:
            raise _needs_llm("rewrite", error) from error
        run.run_rewrite(self.prompter, self.prompts, self.samples, self.seed, self.max_tokens, self.json)
        return 0


VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "train": Train,
    "rewrite": Rewrite,
    "verify": Verify,
    "hunt": Hunt,
    "solve": Solve,
}


def _expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with what --preset and --config stand for in front; what is given outright wins.

    Raises:
        AlignProError: the preset is unknown, the file unreadable, or no mapping of options to plain values.
    """
    verb, *rest = arguments
    given = {a.split("=")[0].removeprefix("--").replace("-", "_") for a in rest if a.startswith("--")}

    def value_of(name: str) -> str | None:
        for i, a in enumerate(rest):
            if a.startswith(f"--{name}="):
                return a.split("=", 1)[1]
            if a == f"--{name}" and i + 1 < len(rest):
                return rest[i + 1]
        return None

    options: dict[str, Any] = {}
    path = value_of("config")
    said = _yaml(path) if path is not None else {}
    preset = value_of("preset") or said.get("preset")
    if preset is not None and preset in PRESETS:
        options |= PRESETS[str(preset)]
    options |= said
    out = [verb]
    for name, value in options.items():
        if name in given or value is None or value is False:
            continue
        flag = "--" + name.replace("_", "-")
        values = value if isinstance(value, list | tuple) else [value]
        out += [flag] if value is True else [flag, *map(str, values)]
    return [*out, *rest]


def _yaml(path: str) -> dict[str, Any]:
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
        raise AlignProError(
            f"--config {path}: is not valid YAML{place}; write lines such as lam: 0.05"
        ) from None
    if not isinstance(said, dict):
        raise AlignProError(f"--config {path}: holds no options; write lines such as lam: 0.05")
    options: dict[str, Any] = {}
    for name, value in said.items():
        plain = isinstance(value, bool | int | float | str) or value is None
        if not plain and not (
            isinstance(value, list) and all(isinstance(v, int | float | str) for v in value)
        ):
            raise AlignProError(f"--config {path}: {name} is neither a value nor a list of values")
        options[str(name).replace("-", "_")] = value
    return options


def _parse(arguments: Sequence[str]) -> Verb:
    kinds: Any = Union[  # noqa: UP007 - built from a dict
        tuple(Annotated[verb, tyro.conf.subcommand(name=name)] for name, verb in VERBS.items())
    ]
    if arguments and not arguments[0].startswith("-") and arguments[0] not in VERBS:
        raise AlignProError(f"{arguments[0]}: is no verb; give one of {', '.join(VERBS)}")
    if arguments and arguments[0] == "train":
        arguments = _expanded(arguments)
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
    said = re.sub(r"^Error parsing (?!--)\S+: ", "", " ".join(paragraphs[0]).rstrip("."))
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
