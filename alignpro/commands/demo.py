"""The main job: theory and a real PPO run meet on a real language model.

Four stages, each of which leaves its result in the output folder, so that an interrupted run continues:
enumerate (texts.json, instance.npz), train (training/), analyse (report.json), render (report.html, PNGs).
"""

import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import read_json, writable_folder, write_json
from alignpro.llm.arms.enumerate import Enumeration, enumerate_models
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.data.packaged import instructions
from alignpro.llm.models import catalogue
from alignpro.llm.models.chat import parse_options
from alignpro.llm.models.forward import text_config
from alignpro.llm.models.load import load_model
from alignpro.llm.rewards import opening
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.rewards.reward import Reward
from alignpro.llm.training.settings import TreeSettings
from alignpro.llm.training.tree import TrainedTree, train
from alignpro.runs import refuse_other_settings
from alignpro.theory import BoundReport, Instance, Solution, check, solution
from alignpro.theory.bounds import paper_r_max

RUN_FILE = "run.json"


@dataclass(frozen=True)
class DemoSettings:
    """What to enumerate and how to train; together with the seed it determines the run."""

    model: str = "smollm2-135m-instruct"
    """Prompter and frozen model: a packaged model, a local folder or a hub id."""
    reward: str = "minilm-bt"
    """r(x, y): a packaged reward or the folder of a saved one."""
    chat_template_kwargs: str | None = None
    """Further arguments of the model's chat template, as a JSON object."""
    prompts: int = 8
    """User prompts: real instructions."""
    prompt_words: int = 12
    """Longest user prompt, in words."""
    prompts_file: str | None = None
    """User prompts of your own, one per line, instead of the packaged ones."""
    beta: float = 0.1
    """β of the RLHF optimum π* (eq. 4), in units of the reward."""
    exact_rewards: bool = True
    """Reward a rewrite with R(x, x′); otherwise with r(x, y) of one sampled response."""
    enumeration: EnumerationSettings = field(default_factory=EnumerationSettings)
    training: TreeSettings = field(default_factory=TreeSettings)
    seed: int = 0
    """Of the prompts, the samples and the training."""

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise AlignProError(f"prompts = {self.prompts}: give at least 1")
        parse_options(self.chat_template_kwargs)
        if not (np.isfinite(self.beta) and self.beta > 0):
            raise AlignProError(f"beta = {self.beta}: give a positive, finite number")
        object.__setattr__(self, "enumeration", replace(self.enumeration, seed=self.seed))
        object.__setattr__(self, "training", replace(self.training, seed=self.seed))


QUICK = DemoSettings(
    prompts=3,
    enumeration=EnumerationSettings(rewrites=8, responses=12, response_tokens=24),
    training=TreeSettings(iterations=4),
)
"""A small run: the same code on smaller sets."""


# --- one policy against the optimum -----------------------------------------------------------------------


class Judge:
    """Exact quantities of any prompter on one instance, at fixed β and λ."""

    def __init__(self, instance: Instance, beta: float, lam: float) -> None:
        self.beta, self.lam = beta, lam
        self.solve: Callable[[np.ndarray], Solution] = jax.jit(lambda rho: solution(instance, beta, lam, rho))
        prior = np.asarray(instance.prior)
        s = self.solve(prior)
        self.start = float(s.average(s.shortfall))
        self.reference = self.facts(prior)

    def facts(self, rho: np.ndarray) -> dict[str, float]:
        """J(ρ), the KLs of ρ in nats, F(ρ), F(ρ*) − F(ρ), and the share of F(ρ*) − F(ρ_sft) that ρ closes."""
        s = self.solve(rho)
        shortfall = float(s.average(s.shortfall))
        return {
            "reward": float(s.j_rho),
            "kl_to_star": float(s.average(s.kl_to_star)) / self.lam,
            "kl_to_sft": float(s.average(s.kl_to_reference)) / self.lam,
            "objective": float(s.average(s.value)) - shortfall,
            "shortfall": shortfall,
            "closed": 1 - shortfall / self.start if self.start > 0 else 1.0,
            "gap": float(s.average(s.gap)),
        }


# --- stages -----------------------------------------------------------------------------------------------


def run(
    out: str | Path,
    settings: DemoSettings,
    *,
    resume: bool = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Enumerate, train, analyse and write the report into `out`; the report's content.

    Raises:
        AlignProError: `out` holds another run, or cannot be written; a bad setting; no network at first use.
    """
    out = writable_folder(out)
    try:
        return _run(out, settings, resume, command)
    except KeyboardInterrupt:
        _say(f"\nwhat is done is kept in {out}; the same command with --resume continues")
        raise


def _run(out: Path, settings: DemoSettings, resume: bool, command: str | None) -> dict[str, Any]:
    started = time.monotonic()
    state = _open_run(out, settings, resume)
    timings: dict[str, float] = state["seconds"]

    def done(stage: str, since: float) -> None:
        timings[stage] = round(timings.get(stage, 0.0) + time.monotonic() - since, 1)
        write_json(out / RUN_FILE, state)

    # Names first: a slip in one should cost no download.
    catalogue.check_name(settings.model)
    opening.read_spec(settings.reward)
    since = time.monotonic()
    prompts = user_prompts(settings)
    reward = load_reward(settings.reward)
    model, tokenizer = load_model(
        settings.model, chat_template_kwargs=parse_options(settings.chat_template_kwargs)
    )
    _say(_cost(model, settings, skip_enumeration=(out / "texts.json").exists()))
    done("load", since)

    since = time.monotonic()
    enumeration = enumerated(out, settings, prompts, model, tokenizer, reward)
    done("enumerate", since)

    judge = Judge(enumeration.instance, settings.beta, settings.training.lam)
    since = time.monotonic()
    trained = fit(
        enumeration,
        judge,
        settings.training,
        model,
        tokenizer,
        out / "training",
        exact_rewards=settings.exact_rewards,
        resume=resume,
    )
    done("train", since)

    since = time.monotonic()
    content = analyse(enumeration, judge, settings, trained.policy)
    content |= {
        "title": "Align-Pro on an enumerated language model",
        "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "settings": asdict(settings),
        "reward_model": reward.describe(),
        "curve": trained.metrics,
        "seconds": dict(timings),
    }
    write_json(out / "report.json", content)
    from alignpro.commands.demo_report import render

    render(content, out)
    done("report", since)
    gaps = [f"{content['policies'][name]['gap']:.3f}" for name in ("sft", "theta", "star")]
    bound = content["bounds"]["theorem1"]["star"]
    _say(
        f"training closed {content['policies']['theta']['closed']:.1%} of F(ρ*) − F(ρ_sft); "
        f"gap to RLHF {gaps[0]} → {gaps[1]}, at ρ* {gaps[2]}\n"
        f"Theorem 1 {bound['verdict']}: gap {bound['gap']:.3f}, right side {bound['rhs']:.3f}"
        f"{' (vacuous)' if bound['vacuous'] else ''}\n"
        f"wrote {out / 'report.html'} ({time.monotonic() - started:.0f} s in all)"
    )
    return content


def user_prompts(settings: DemoSettings) -> list[str]:
    """The user prompts that the settings name."""
    if settings.prompts_file:
        return own_prompts(settings.prompts_file, settings.prompts)
    return instructions(settings.prompts, seed=settings.seed, max_words=settings.prompt_words)


def enumerated(
    out: Path, settings: DemoSettings, prompts: Sequence[str], model: Any, tokenizer: Any, reward: Reward
) -> Enumeration:
    """The enumeration saved in `out`, made first if it is not there."""
    if (out / "texts.json").exists():
        return Enumeration.load(out)
    with _bars() as stage:
        made = enumerate_models(
            model, tokenizer, model, tokenizer, prompts, reward, settings.enumeration, progress=stage
        )
    made.save(out)
    return made


def fit(
    enumeration: Enumeration,
    judge: Judge,
    training: TreeSettings,
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    exact_rewards: bool,
    resume: bool,
) -> TrainedTree:
    """Train on the enumeration into `folder`, with a progress bar that shows how near ρ* is."""
    with tqdm(
        total=training.iterations * training.epochs,
        desc=f"{training.algorithm} steps, seed {training.seed}",
        unit="step",
        dynamic_ncols=True,
    ) as bar:

        def show(step: int, _total: int, exact: Mapping[str, float]) -> None:
            said = f"closed {exact['closed']:.1%}, KL(ρ_θ‖ρ*) {exact['kl_to_star']:.3f}"
            bar.set_postfix_str(said, refresh=False)
            bar.update(step - bar.n)

        return train(
            model,
            tokenizer,
            enumeration.task(exact_rewards=exact_rewards),
            training,
            folder,
            evaluate=lambda policy: judge.facts(enumeration.prompter(policy)),
            resume=resume,
            progress=show,
        )


def own_prompts(path: str, most: int) -> list[str]:
    """The first `most` distinct, non-empty lines of a UTF-8 text file.

    Raises:
        AlignProError: it cannot be read or holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise AlignProError(f"prompts_file {path}: cannot be read ({reason}); name a text file") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise AlignProError(f"prompts_file {path}: holds no prompt; write one per line")
    return found[:most]


def _open_run(out: Path, settings: DemoSettings, resume: bool) -> dict[str, Any]:
    path = out / RUN_FILE
    wanted = asdict(settings)
    if not path.exists():
        clash = [
            name
            for name in ("texts.json", "instance.npz", "report.json", "training")
            if (out / name).exists()
        ]
        if clash:
            raise AlignProError(f"--out {out}: {clash[0]} is there but no {RUN_FILE}; choose an empty folder")
        return {"settings": wanted, "seconds": {}}
    if not resume:
        raise AlignProError(
            f"--out {out}: holds a run already; add --resume to continue it, or choose another folder"
        )
    state = read_json(path)
    refuse_other_settings(out, state.get("settings"), wanted)
    return state


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A progress bar with time left per stage; the previous one is closed when the next begins."""
    open_bars: list[tqdm] = []

    def stage(name: str, total: int) -> Callable[[int], None]:
        for bar in open_bars:
            bar.close()
        open_bars.append(tqdm(total=total, desc=name, dynamic_ncols=True))

        def tick(n: int) -> None:
            bar = open_bars[-1]
            bar.total = max(bar.total, bar.n + n)  # repeated candidates are drawn again
            bar.update(n)

        return tick

    try:
        yield stage
    finally:
        for bar in open_bars:
            bar.close()


@torch.no_grad()
def _cost(model: Any, settings: DemoSettings, skip_enumeration: bool) -> str:
    """An estimate of the time ahead, from the speed of one short forward pass on this machine."""
    ids = torch.arange(1, 513, device=model.device).view(4, 128) % text_config(model).vocab_size
    model.base_model(input_ids=ids)
    since = time.monotonic()
    model.base_model(input_ids=ids)
    token = (time.monotonic() - since) / ids.numel()
    e, t, x = settings.enumeration, settings.training, settings.prompts
    template, chat = 170, 50  # tokens around a rewrite and around a question
    # A decoding step costs about six times a scored token, a training pass about twice a forward one.
    enumeration = x * e.rewrites * 1.3 * (template + 6 * e.rewrite_tokens) + x * e.responses * (
        chat + 6 * e.response_tokens
    ) + x * e.rewrites * (chat + e.responses)  # fmt: skip
    training = t.iterations * x * template * (2 * t.epochs + 1)
    minutes = (0 if skip_enumeration else enumeration) * token / 60 + training * token / 60
    return (
        f"{x} prompts × {e.rewrites} rewrites × {e.responses} responses, then {t.iterations * t.epochs} "
        f"{t.algorithm} steps: about {max(1, round(minutes))} min on this machine "
        f"({1 / token:.0f} tokens/s scored, {torch.get_num_threads()} threads)"
    )


# --- what the report says ---------------------------------------------------------------------------------


FORMS = ("theorem1", "span", "tight", "trained")
"""What the report shows of `BOUNDS`; `alignpro solve` has the rest, on the instance that is saved."""


def analyse(
    enumeration: Enumeration, judge: Judge, settings: DemoSettings, policy: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Theorem 1 and its forms for ρ_sft, ρ_θ and ρ* beside the true gaps, as plain JSON content."""
    instance, beta, lam = enumeration.instance, judge.beta, judge.lam
    theta = enumeration.prompter(policy)
    s = judge.solve(theta)
    star = np.asarray(s.rho_star)
    prior = np.asarray(instance.prior)
    policies = {"sft": prior, "theta": theta, "star": star}
    facts = {name: judge.facts(rho) for name, rho in policies.items()}
    bounds: dict[str, dict[str, Any]] = {}
    for name in FORMS:
        bounds[name] = {"star": _plain(check(instance, beta, lam, name))}
        if name == "trained":
            bounds[name] |= {
                k: _plain(check(instance, beta, lam, name, prompter=policies[k])) for k in ("sft", "theta")
            }
    return {
        "beta": beta,
        "lam": lam,
        "r_max": float(paper_r_max(s)),
        "span": float(s.average(s.span)),
        "sizes": {
            "prompts": len(enumeration.prompts),
            "rewrites": [len(r) for r in enumeration.rewrites],
            "responses": [len(r) for r in enumeration.responses],
        },
        "rewards": {
            "no_prompter": float(s.average(s.original)),
            "sft": float(s.average(s.reference)),
            "theta": float(s.j_rho),
            "star": facts["star"]["reward"],
            "ceiling": _ceiling(enumeration, np.asarray(s.rewrite_reward)),
            "rlhf": float(s.j_star),
        },
        "policies": facts,
        "bounds": bounds,
        "prompts": [
            _prompt(enumeration, x, s, policies, settings.enumeration.response_tokens)
            for x in range(len(enumeration.prompts))
        ],
    }


def _ceiling(enumeration: Enumeration, rewrite_reward: np.ndarray) -> float:
    """E_x max_x′ R(x, x′) over the support of ρ_sft: no prompter does better."""
    reachable = np.where(np.asarray(enumeration.instance.prior) > 0, rewrite_reward, -np.inf)
    return float(np.asarray(enumeration.instance.p) @ reachable.max(1))


def _plain(report: BoundReport) -> dict[str, Any]:
    values = {f.name: getattr(report, f.name) for f in fields(report)}
    return values | {"terms": dict(report.terms), "assumptions": dict(report.assumptions)}


def _prompt(
    enumeration: Enumeration, x: int, s: Solution, policies: Mapping[str, np.ndarray], limit: int
) -> dict[str, Any]:
    instance = enumeration.instance
    rows, columns = enumeration.rows(x), enumeration.columns(x)
    frozen = np.asarray(instance.frozen)[rows, columns]
    reward = np.asarray(instance.reward)[x, columns]
    expected = np.asarray(s.rewrite_reward)[x, rows]

    def answers(weights: np.ndarray, most: int = 3) -> list[dict[str, Any]]:
        top = np.argsort(-weights, kind="stable")[:most]
        return [
            {
                "text": enumeration.responses[x][i],
                "probability": float(weights[i]),
                "reward": float(reward[i]),
                "cut": len(enumeration.response_ids[x][i]) >= limit,
            }
            for i in top
            if weights[i] > 0
        ]

    best = int(np.argmax(policies["theta"][x, rows]))
    return {
        "prompt": enumeration.prompts[x],
        "gap": float(s.gap[x]),
        "rewards": {
            "no_prompter": float(s.original[x]),
            "sft": float(s.reference[x]),
            "theta": float(s.achieved[x]),
            "star": float(np.sum(np.asarray(s.rho_star)[x] * np.asarray(s.rewrite_reward)[x])),
            "rlhf": float(s.optimum[x]),
        },
        "rewrites": [
            {"text": text, "reward": float(expected[k])}
            | {name: float(rho[x, rows][k]) for name, rho in policies.items()}
            for k, text in enumerate(enumeration.rewrites[x])
        ],
        "answers": {
            "no_prompter": answers(frozen[0]),
            "theta": {"rewrite": enumeration.rewrites[x][best], "answers": answers(frozen[best])},
            "rlhf": answers(np.asarray(s.pi_star)[x, columns]),
        },
    }


def environment() -> dict[str, Any]:
    """Machine and library versions, for the record. No user name, host name or path."""
    packages = ("alignpro", "torch", "transformers", "trl", "peft", "jax", "numpy")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }


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
        preset = QUICK if self.quick else DemoSettings()

        def given(*names: str) -> dict[str, Any]:
            return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

        settings = replace(
            preset,
            **given("model", "reward", "prompts_file", "prompts", "beta", "seed", "chat_template_kwargs"),
            exact_rewards=not self.sampled_rewards,
            enumeration=replace(preset.enumeration, **given("rewrites", "responses")),
            training=replace(preset.training, **given("lam", "algorithm", "iterations")),
        )
        run(self.out, settings, resume=self.resume)
        return 0
