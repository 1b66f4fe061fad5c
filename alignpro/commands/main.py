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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol, Union

import tyro

import alignpro
from alignpro.commands import pages
from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.arms.judge import JudgeSettings
from alignpro.llm.training.settings import (
    PRESETS,
    EnvironmentSettings,
    PromptSettings,
    RewardSettings,
    RolloutSettings,
    SFTSettings,
    TrainSettings,
)
from alignpro.report import keep


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
    """Folder for verify.json, report.html and the instances that refute a statement."""

    def run(self) -> int:
        from alignpro.commands import verify

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
    report: str | None = None
    """File for a page of the results, .html."""

    def run(self) -> int:
        from tqdm import tqdm

        from alignpro.commands import solve

        if self.report is not None:
            keep.check_file(self.report)
        with tqdm(total=len(self.files), unit="file", disable=len(self.files) < 100, leave=False) as bar:
            results = solve.solve_files(
                self.files, self.beta, self.lam, self.bounds, self.r_max, progress=bar.update
            )
        if self.json:
            for result in results:
                print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        else:
            print(solve.table(results))
        if self.report is not None:
            keep.keep(pages.report_of_solve(results), self.report)
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
    """Folder for hunt.json, report.html and the instances found (.npz)."""

    def run(self) -> int:
        from alignpro.commands import hunt

        budget = hunt.Budget(self.shape, self.restarts, self.steps, self.tries, self.seed, self.seconds)
        return hunt.main(self.bounds, budget, self.out)


@dataclass(frozen=True)
class Explore:
    """A local page on which beta and lambda move and the theory follows: optima, gap, bounds, frontier.

    Of a random instance, or of a saved one; and a reader of rollouts. Serves on 127.0.0.1 only, until Ctrl-C.
    """

    file: str | None = None
    """An instance: an .npz file with the arrays p, prior, frozen, own, reward, such as the demo writes."""
    family: str | None = None
    """A family of random instances; the page can change it. Default: lm_like."""
    shape: tuple[int, int, int] = (4, 8, 16)
    """Prompts, rewrites and responses of the random instance; the page can change them."""
    seed: int = 0
    """Determines it."""
    rollouts: str | None = None
    """Rollouts to read, as alignpro rollout writes them."""
    port: int | None = None
    """Where to listen, 1024 to 65535. Default: a free port."""
    no_browser: bool = False
    """Only print the address."""

    def run(self) -> int:
        from alignpro.commands import explore

        app = explore.App(self.file, self.family, self.shape, self.seed, self.rollouts)
        return explore.main(app, self.port, not self.no_browser)


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
    chat_template_kwargs: str | None = None
    """Further arguments of the model's chat template, as a JSON object."""
    sampled_rewards: bool = False
    """Reward a rewrite with one sampled response, not with its expected reward."""
    seed: int = 0
    """Determines prompts, samples and training."""

    def run(self) -> int:
        with _needs_llm("demo"):
            from alignpro.commands import demo

        preset = demo.QUICK if self.quick else demo.DemoSettings()

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        settings = replace(
            preset,
            **given("model", "reward", "prompts_file", "prompts", "beta", "seed", "chat_template_kwargs"),
            exact_rewards=not self.sampled_rewards,
            enumeration=replace(preset.enumeration, **given("rewrites", "responses")),
            training=replace(preset.training, **given("lam", "algorithm", "iterations")),
        )
        demo.run(self.out, settings, resume=self.resume)
        return 0


@contextlib.contextmanager
def _needs_llm(verb: str) -> Iterator[None]:
    """Around what imports for a verb: a package that is missing is told with its remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise AlignProError(
            f"{verb}: the package {error.name} is missing; run pip install 'alignpro[llm]'"
        ) from error


@dataclass(frozen=True)
class Train:
    """Train a prompter (or, with --task rlhf, the RLHF oracle) on open-ended text.

    The default settings are faithful: their optimum is the paper's closed form. A setting that moves it is
    refused, and named, unless --allow-moved-optimum is given. Interrupt at any time; --resume continues.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl, report.html, the answers paid for, and prompter/, the trained
    one."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    preset: str = "faithful"
    """Named settings that the options start from: faithful, or paper (lr 1.41e-5, batch 128, adaptive KL)."""
    prompter: str = "smollm2-135m-instruct"
    """rho_sft: a packaged name, a local folder, a hub id, or a fine-tuned prompter's folder."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A fine-tuned
    prompter has its own. Default: rewrite."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    train_prompts: int | None = None
    """How many prompts of the data set's training split (or of the file), from the first. Default: all."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb, trackio."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        with _needs_llm("train"):
            from alignpro.commands import train
        if self.preset not in PRESETS:
            raise AlignProError(f"--preset {self.preset}: choose from {', '.join(PRESETS)}")
        train.run_train(
            self.out,
            self.settings,
            self.environment,
            prompter=self.prompter,
            template=self.template,
            source=self.source,
            train_prompts=self.train_prompts,
            report_to=self.report_to,
            resume=self.resume,
        )
        return 0


@dataclass(frozen=True)
class Sft:
    """Fine-tune the prompter into rho_sft on pairs of a prompt and its rewrite.

    The pairs' own split, by prompt, keeps some to measure on. The result's folder goes to train --prompter.
    """

    out: str
    """Folder for checkpoints, metrics.jsonl and prompter/, the fine-tuned one."""
    pairs: str
    """JSON lines (or one JSON list) of objects with a prompt and a rewrite."""
    settings: tyro.conf.OmitArgPrefixes[SFTSettings] = field(default_factory=SFTSettings)
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    prompter: str = "smollm2-135m-instruct"
    """What is fine-tuned: a packaged name, a local folder or a hub id."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A trained prompter
    has its own. Default: rewrite."""
    prompt_field: str = "prompt"
    """The field that holds the prompt."""
    rewrite_field: str = "rewrite"
    """The field that holds the rewrite; optimized_prompt in BPO's data."""
    chat_template_kwargs: str | None = None
    """Further arguments of the prompter's chat template, as a JSON object."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb, trackio."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        with _needs_llm("sft"):
            from alignpro.commands import sft
        sft.run_sft(
            self.out,
            self.settings,
            prompter=self.prompter,
            template=self.template,
            pairs=self.pairs,
            prompt_field=self.prompt_field,
            rewrite_field=self.rewrite_field,
            report_to=self.report_to,
            resume=self.resume,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        return 0


@dataclass(frozen=True)
class Resample:
    """The training-free prompter: draw rewrites from rho_sft, judge them, reweight to rho* or keep the best.

    Prints what each lambda, and best-of-n, would gain. Interrupt at any time; the same command continues.
    """

    out: str
    """Folder for proposals.jsonl, report.html, the answers paid for, and rewrites.jsonl."""
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(default_factory=EnvironmentSettings)
    prompter: str = "smollm2-135m-instruct"
    """rho_sft: a packaged name, a local folder, a hub id, or a prompter's folder."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A trained prompter
    has its own. Default: rewrite."""
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    split: str = "test"
    """Of the data set: train, validation or test."""
    prompts: int | None = None
    """How many of them, from the first. Default: all."""
    proposals: int = 16
    """Rewrites drawn for each prompt."""
    responses: int = 1
    """Answers that judge each distinct one."""
    rewrite_tokens: int | None = None
    """Tokens of a rewrite, at most. Default: the prompter's own."""
    lam: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Each lambda to reweight by, in units of the reward."""
    draws: int = 0
    """Rewrites of each prompt to resample at each lambda, into rewrites.jsonl."""
    seed: int = 0
    """Determines rewrites and answers."""

    def run(self) -> int:
        with _needs_llm("resample"):
            from alignpro.commands import resample
        resample.run_resample(
            self.out,
            self.environment,
            prompter=self.prompter,
            template=self.template,
            source=self.source,
            split=self.split,
            prompts=self.prompts,
            proposals=self.proposals,
            responses=self.responses,
            rewrite_tokens=self.rewrite_tokens,
            lam=self.lam,
            draws=self.draws,
            seed=self.seed,
        )
        return 0


@dataclass(frozen=True)
class Rollout:
    """Roll out prompters and policies on real models: texts, rewards and log-probabilities of every party.

    Writes rollouts.jsonl, from which estimate, headroom and compare work without a GPU. Interrupt at any
    time; the same command continues, and further arms can be added to a finished folder.
    """

    out: str
    """Folder for rollouts.jsonl, report.html and the answers paid for."""
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    settings: tyro.conf.OmitArgPrefixes[RolloutSettings] = field(default_factory=RolloutSettings)
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(
        # Log-probabilities are what it is for: bfloat16 leaves tenths of a nat of noise in each.
        default_factory=lambda: EnvironmentSettings(dtype="float32")
    )
    prompter: str | None = None
    """rho_sft: a packaged name, a local folder or a hub id. Default: what the trained ones were trained from,
    or smollm2-135m-instruct."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A trained prompter
    has its own. Default: rewrite."""
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    split: str = "test"
    """Of the data set: train, validation or test."""
    prompts: int | None = None
    """How many of them, from the first. Default: all."""

    def run(self) -> int:
        with _needs_llm("rollout"):
            from alignpro.commands import rollout
        rollout.run_rollout(
            self.out,
            self.settings,
            self.environment,
            prompter=self.prompter,
            template=self.template,
            source=self.source,
            split=self.split,
            prompts=self.prompts,
        )
        return 0


@dataclass(frozen=True)
class RewardModel:
    """Train a reward model on preference pairs by eq. (1), Bradley-Terry, and say how good it is.

    The pairs are split by prompt: 70% to learn from, 15% to tune on, 15% to measure on. Interrupt at any
    time; --resume continues. The result's folder goes to train --reward, as it is.
    """

    out: str
    """Folder for the reward model (safetensors), reward.json and metrics.jsonl."""
    pairs: str
    """JSON lines, objects with the strings prompt, chosen and rejected."""
    settings: tyro.conf.OmitArgPrefixes[RewardSettings] = field(default_factory=RewardSettings)
    base: str = "smollm2-135m-instruct"
    """What is trained: a packaged name, a local folder or a hub id of a language model or reward model."""
    template: str | None = None
    """How a sample is written: a text with {prompt} and {response}. Default: the model's chat template."""
    device: str = "auto"
    """auto, cpu or cuda."""
    resume: bool = False
    """Continue an interrupted run in that folder (or start one)."""

    def run(self) -> int:
        with _needs_llm("reward-model"):
            from alignpro.commands import reward_model
        reward_model.run_reward_model(
            self.base,
            self.pairs,
            self.out,
            self.settings,
            template=self.template,
            device=self.device,
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
    chat_template_kwargs: str | None = None
    """Further arguments of the prompter's chat template, as a JSON object. Default: as it was trained."""

    def run(self) -> int:
        with _needs_llm("rewrite"):
            from alignpro.commands import rewrite
        rewrite.run_rewrite(
            self.prompter,
            self.prompts,
            self.samples,
            self.seed,
            self.max_tokens,
            self.json,
            self.chat_template_kwargs,
        )
        return 0


@dataclass(frozen=True)
class Merge:
    """Write the whole model that a trained prompter (or any adapter that PEFT saved) and its base make.

    The result is a folder of safetensors that every program which reads transformers' models takes.
    """

    adapter: tyro.conf.Positional[str]
    """The folder of a trained prompter or policy, of the run that made it, or of an adapter."""
    out: str
    """A new folder for the model."""
    dtype: str = "float32"
    """Type of its weights: float32, bfloat16 or float16."""

    def run(self) -> int:
        with _needs_llm("merge"):
            from alignpro.commands import merge
        merge.run_merge(self.adapter, self.out, self.dtype)
        return 0


@dataclass(frozen=True)
class Estimate:
    """Check Theorem 1 on rollouts: every term, the gap, the bounds and their verdicts, with intervals.

    Exit status 1 when a bound is violated.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them: arms none and sft at least."""
    beta: float
    """RLHF tuning parameter, positive, in reward units."""
    lam: float
    """Prompt tuning parameter (lambda), positive, in reward units; that of training for a trained arm."""
    level: float = 0.95
    """Of the intervals; those of the slacks cover jointly."""
    r_max: float | None = None
    """Theorem 1's r_max, when it is known a priori. Default: from the declared range of the reward."""
    betting: bool = False
    """Intervals with guaranteed coverage for mean rewards and total variations; they are wider."""
    json: bool = False
    """One JSON object, instead of tables."""
    out: str | None = None
    """Folder for estimate.json and report.html."""

    def run(self) -> int:
        from alignpro import estimation
        from alignpro.commands import tables

        rollouts = _rollouts(self.file, self.out)
        interval: Any = "betting" if self.betting else "bootstrap"
        report = estimation.estimate(
            rollouts, self.beta, self.lam, self.level, r_max=self.r_max, interval=interval
        )
        values = report.json()
        _tell("estimate", values, tables.of_estimate(report), self.json, self.out)
        if self.out is not None:
            keep.keep(pages.report_of_estimate(values), self.out)
        return int(any(bound.verdict == "violated" for bound in report.bounds))


@dataclass(frozen=True)
class Headroom:
    """Should one train at all? What an optimal prompter could gain at each lambda, before any training.

    Needs arm sft with at least two draws per prompt and two answers per draw; arm none for the comparison
    with no prompter.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    lam: tuple[float, ...] = ()
    """Prompt tuning parameters (lambda), in reward units. Default: 2% to 50% of the reward's range."""
    level: float = 0.95
    """Of the intervals; those behind the answer cover jointly."""
    json: bool = False
    """One JSON object, instead of tables."""
    out: str | None = None
    """Folder for headroom.json and report.html."""

    def run(self) -> int:
        from alignpro import estimation
        from alignpro.commands import tables

        report = estimation.headroom(_rollouts(self.file, self.out), self.lam, self.level)
        values = report.json()
        _tell("headroom", values, tables.of_headroom(report), self.json, self.out)
        if self.out is not None:
            keep.keep(pages.report_of_headroom(values), self.out)
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare arms by mean reward, variance and win rate, paired over prompts."""

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    arms: tuple[str, ...]
    """The baseline, then what is compared with it."""
    level: float = 0.95
    """Of the intervals; differences cover jointly over the arms."""
    json: bool = False
    """One JSON object, instead of a table."""
    out: str | None = None
    """Folder for compare.json and report.html."""

    def run(self) -> int:
        from alignpro import estimation
        from alignpro.commands import tables

        report = estimation.compare(_rollouts(self.file, self.out), self.arms, self.level)
        values = report.json()
        _tell("compare", values, tables.of_comparison(report), self.json, self.out)
        if self.out is not None:
            keep.keep(pages.report_of_compare(values), self.out)
        return 0


@dataclass(frozen=True)
class Judge:
    """Win rates by a judge model: pairs of answers compared in both orders, by the paper's seven criteria.

    Prints calls, tokens and cost before anything is asked. Interrupt at any time; the same command continues,
    and further prompts can be added.
    """

    file: tyro.conf.Positional[str]
    """Rollouts, as alignpro rollout writes them."""
    arms: tuple[str, str]
    """The arm of interest (A in the paper's Table 1), then what it is compared with (B)."""
    out: str
    """Folder for judgements.jsonl, winrate.json, report.html and the replies paid for."""
    settings: tyro.conf.OmitArgPrefixes[JudgeSettings]
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    level: float = 0.95
    """Of the intervals."""
    json: bool = False
    """One JSON object, instead of a table."""

    def run(self) -> int:
        from alignpro.commands import judge
        from alignpro.estimation import winrate
        from alignpro.estimation.intervals import check_level
        from alignpro.llm.arms import judge as judge_judge

        check_level(self.level)
        with _needs_llm("judge"):
            rows = judge.run_judge(self.file, self.arms, self.settings, self.out)
        found = winrate.win_rates(winrate.collect(rows), self.level)
        text = "\n".join([winrate.table(found), *(f"  {line}" for line in judge.failed_replies(rows))])
        values = found.json()
        _tell("winrate", values, text, self.json, self.out)
        keep.keep(
            pages.report_of_judge(values, read_json(os.path.join(self.out, judge_judge.SETTINGS_FILE))),
            self.out,
        )
        return 0


@dataclass(frozen=True)
class Doctor:
    """Tell what is installed, what this machine has, what is cached, and how to get what is missing.

    Fetches nothing and asks no network. Exit status 1 when alignpro itself lacks a package.
    """

    json: bool = False
    """One JSON object, instead of a table."""

    def run(self) -> int:
        from alignpro.commands import doctor

        found = doctor.examine()
        _tell("doctor", found, doctor.table(found), self.json, None)
        return int(found["extras"][0]["remedy"] is not None)


def _rollouts(file: str, out: str | None) -> Any:
    from alignpro import rollouts
    from alignpro.files import writable_folder

    if out is not None:
        writable_folder(out)
    return rollouts.read(file)


def _tell(name: str, values: dict[str, Any], text: str, as_json: bool, out: str | None) -> None:
    """Print a result, as text or JSON, and keep it as `name`.json in the folder `out`."""
    from alignpro.files import write_json

    if out is not None:
        write_json(os.path.join(out, f"{name}.json"), values)
    print(json.dumps(values, ensure_ascii=False, allow_nan=False) if as_json else text)


VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "train": Train,
    "rewrite": Rewrite,
    "merge": Merge,
    "sft": Sft,
    "reward-model": RewardModel,
    "resample": Resample,
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


_SHELLS = ("bash", "zsh", "fish")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status.

    0 done; 1 a finding (a violated bound); 2 a mistake in the input, told in one line on stderr; 130
    interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    typed = keep.TYPED.set(tuple(arguments))
    try:
        if list(arguments) in (["--version"], ["-V"]):
            print(f"alignpro {alignpro.__version__}")
            return 0
        if list(arguments[:1]) == ["--completion"]:
            shell = (*arguments[1:], "")[0]
            if shell not in _SHELLS:
                raise AlignProError(f"--completion {shell}: choose from {', '.join(_SHELLS)}")
            arguments = ["--tyro-print-completion", shell]
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
    finally:
        keep.TYPED.reset(typed)


if __name__ == "__main__":
    sys.exit(main())
