"""Theory and a real PPO run meet on a real language model: the work of `alignpro demo`.

Three stages, each of which leaves its result in the output folder, so that an interrupted run continues:
enumerate (texts.json, instance.npz), train (training/), analyse (report.json).
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import flaw, listed, read_json, write_json
from alignpro.llm.arms.enumerate import Enumeration, enumerate_models, refuse_chats
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.data import own
from alignpro.llm.data.packaged import instructions
from alignpro.llm.models import catalogue, contents
from alignpro.llm.models.chat import parse_options
from alignpro.llm.models.forward import token_seconds
from alignpro.llm.models.load import load_model
from alignpro.llm.models.sampling import digest
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards import opening
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.rewards.reward import Reward
from alignpro.llm.training import tree
from alignpro.llm.training.settings import TreeSettings
from alignpro.report.numbers import Json, plain
from alignpro.runs import DEMO_FILE, claim, environment, here, owning
from alignpro.terminal import say
from alignpro.theory import Instance, Solution, check, solution
from alignpro.theory.bounds import paper_r_max

FILES = ("instance.npz", "texts.json")
"""The enumeration, in the order in which its files are written."""
MADE_FILE = "enumeration.json"
"""Sizes and hashes of `FILES`, and what the reward said of itself when they were made."""
OWN = (*FILES, MADE_FILE, "report.json", "training")
"""Further names that the demo writes in its folder."""


@dataclass(frozen=True)
class DemoSettings:
    """The sets to enumerate and the training on them, which with the seed determine the run.

    The fields are the options of `alignpro demo`, where they are explained.
    """

    model: str = "smollm2-135m-instruct"
    reward: str = "minilm-bt"
    chat_template_kwargs: str | None = None
    prompts: int = 8
    prompt_words: int = 12
    """Longest user prompt, in words."""
    prompts_file: str | None = None
    beta: float = 0.1
    exact_rewards: bool = True
    """Reward a rewrite with R(x, x′); otherwise with r(x, y) of one sampled response."""
    enumeration: EnumerationSettings = field(default_factory=EnumerationSettings)
    training: TreeSettings = field(default_factory=TreeSettings)
    seed: int = 0

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


class Measures:
    """Exact measures of any prompter on one instance, at fixed β and λ."""

    def __init__(self, instance: Instance, beta: float, lam: float) -> None:
        self.beta, self.lam = beta, lam
        self.solve: Callable[[np.ndarray], Solution] = jax.jit(lambda rho: solution(instance, beta, lam, rho))
        prior = np.asarray(instance.prior)
        s = self.solve(prior)
        self.start = float(s.average(s.shortfall))
        self.reference = self.of(prior)

    def of(self, rho: np.ndarray) -> dict[str, float]:
        """J(ρ), F(ρ), F(ρ*) − F(ρ) and the gap in reward units, the KLs of ρ in nats, and the share of
        F(ρ*) − F(ρ_sft) that ρ closes."""
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


@dataclass(frozen=True)
class DemoResult:
    """The demo's finding, which report.json holds: Theorem 1 before and after a real training, exactly.

    Rewards, gaps and bounds are in reward units, KLs in nats, times in seconds. Prompters are named sft
    (ρ_sft, before training), theta (ρ_θ, after it) and star (ρ*, the optimum).
    """

    beta: float
    lam: float
    r_max: float
    """Theorem 1's factor of total variation: the largest reward."""
    span: float
    """Largest less smallest reward of a prompt, averaged: a right side from here on is vacuous."""
    sizes: Json
    """Numbers of prompts, and of rewrites and responses of each."""
    rewards: Mapping[str, float]
    """Expected reward without a prompter, of the three prompters, of the best of all prompters (`ceiling`)
    and of the RLHF optimum."""
    policies: Mapping[str, Mapping[str, float]]
    """`Measures.of` each prompter."""
    bounds: Mapping[str, Mapping[str, Json]]
    """Reports of `FORMS`, by name and prompter."""
    prompts: Sequence[Json]
    """For each prompt: rewards, rewrites with their probabilities, the most probable answers."""
    title: str
    command: str | None
    created: str
    environment: Json
    settings: Json
    reward_model: Json
    """How the reward describes itself."""
    curve: Sequence[Json]
    """`Measures.of` the prompter, and what was sampled, after so many optimizer steps."""
    seconds: Mapping[str, float]


@owning("demo", file=DEMO_FILE)
def run(
    out: str | Path, settings: DemoSettings, *, resume: bool = False, command: str | None = None
) -> DemoResult:
    """Enumerate, train and analyse in `out`, with report.json at the end."""
    out = Path(out)
    try:
        return _run(out, settings, resume, command)
    except KeyboardInterrupt:
        _say(f"\nwhat is done is kept in {out}; the same command with --resume continues")
        raise


def _run(out: Path, settings: DemoSettings, resume: bool, command: str | None) -> DemoResult:
    # Names first: a slip in one should cost no download.
    catalogue.check_name(settings.model)
    spec = opening.read_spec(settings.reward)
    held = here(out)
    held.contents |= {
        "model": lambda: contents.of_model(settings.model),
        "reward": spec.content,
        "prompts": lambda: digest(*user_prompts(settings)).hex()[:16] if settings.prompts_file else None,
    }
    held.begin({"settings": asdict(settings)}, resume=resume, names=OWN)
    timings: dict[str, float] = dict((held.before() or {}).get("seconds", {}))

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        since = time.monotonic()
        yield
        timings[name] = round(timings.get(name, 0.0) + time.monotonic() - since, 1)
        if held.claimed:
            held.write(seconds=timings)

    with stage("load"):
        prompts = user_prompts(settings)
        reward = load_reward(settings.reward)
        options = parse_options(settings.chat_template_kwargs)
        model, tokenizer = load_model(settings.model, chat_template_kwargs=options)
        _say(_cost(model, settings, skip_enumeration=made(out)))
    with stage("enumerate"):
        enumeration, judged = enumerated(out, settings, prompts, model, tokenizer, reward)
        claim(out)
    measures = Measures(enumeration.instance, settings.beta, settings.training.lam)
    with stage("train"):
        how: dict[str, Any] = {"exact_rewards": settings.exact_rewards, "resume": resume}
        trained = fit(enumeration, measures, settings.training, model, tokenizer, out / "training", **how)
    result = DemoResult(
        **analyse(enumeration, measures, settings, trained.policy),
        title="Align-Pro on an enumerated language model",
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment(),
        settings=asdict(settings),
        reward_model=judged,
        curve=trained.metrics,
        seconds=dict(timings),
    )
    write_json(out / "report.json", plain(result))
    return result


def user_prompts(settings: DemoSettings) -> list[str]:
    """The user prompts that the settings name."""
    if settings.prompts_file:
        found = own.read_prompts(settings.prompts_file)[: settings.prompts]
        refuse_chats(found)
        return found
    return instructions(settings.prompts, seed=settings.seed, max_words=settings.prompt_words)


def made(out: Path) -> bool:
    """Whether the enumeration is in `out`, whole."""
    if (out / MADE_FILE).exists() or not (out / FILES[-1]).exists():
        return (out / MADE_FILE).exists()
    # An earlier version kept no list of the files, and wrote the last of them last.
    return "verb" not in (read_json(out / DEMO_FILE) if (out / DEMO_FILE).exists() else {})


def enumerated(
    out: Path,
    settings: DemoSettings,
    prompts: Sequence[str],
    model: Any,
    tokenizer: Any,
    reward: Reward,
    *,
    prompter: Prompter | None = None,
    rewrites: Sequence[Sequence[str]] | None = None,
) -> tuple[Enumeration, Json]:
    """The enumeration saved in `out`, made first if it is not there, and what the reward said of itself then.

    Args:
        model: the frozen model, with its tokenizer.
        prompter: the prompter; `model` behind the rewriting template when None.
        rewrites: the rewrites of each prompt, itself first; drawn from the prompter when None.

    Raises:
        AlignProError: what is there is not what was saved.
    """
    if made(out):
        said = read_json(out / MADE_FILE) if (out / MADE_FILE).exists() else {}
        if (wrong := flaw(out, said.get("files", {}))) is not None:
            raise AlignProError(
                f"--out {out}: {wrong}; put it back, or remove {MADE_FILE} to have all drawn anew"
            )
        if "reward" not in said:  # an earlier version's, which is taken as it is
            said = _made(out, reward)
        return Enumeration.load(out), said["reward"]
    prompter = prompter or Prompter(model, tokenizer)
    models = (prompter.model, prompter.tokenizer, model, tokenizer)
    how: dict[str, Any] = {"template": prompter.template, "rewrites": rewrites}
    with _bars() as stage:
        found = enumerate_models(*models, prompts, reward, settings.enumeration, **how, progress=stage)
    claim(out)
    found.save(out)
    return found, _made(out, reward)["reward"]


def _made(out: Path, reward: Reward) -> Json:
    """Write down what the enumeration is, and what the reward says of itself."""
    said = {"files": listed(out, FILES), "reward": plain(reward.describe())}
    write_json(out / MADE_FILE, said)
    return said


def fit(
    enumeration: Enumeration,
    measures: Measures,
    training: TreeSettings,
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    exact_rewards: bool,
    resume: bool,
) -> tree.TrainedTree:
    """Train on the enumeration into `folder`; a bar (in a file, lines) shows how near ρ* is."""
    total, title = training.iterations * training.epochs, f"{training.algorithm} steps, seed {training.seed}"
    with tqdm(total=total, desc=title, unit="step", dynamic_ncols=True, disable=None) as bar:

        def show(step: int, _total: int, exact: Mapping[str, float]) -> None:
            said = f"closed {exact['closed']:.1%}, KL(ρ_θ‖ρ*) {exact['kl_to_star']:.3f}"
            bar.set_postfix_str(said, refresh=False)
            bar.update(step - bar.n)
            if bar.disable and step * 8 % total < 8 * training.epochs:
                _say(f"{title}: {step} of {total}, {said}")

        return tree.train(
            model,
            tokenizer,
            enumeration.task(exact_rewards=exact_rewards),
            training,
            folder,
            evaluate=lambda policy: measures.of(enumeration.prompter(policy)),
            resume=resume,
            progress=show,
        )


def _say(text: str) -> None:
    say(text, error=True)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """A progress bar with time left per stage; the previous one is closed when the next begins."""
    with contextlib.ExitStack() as last:

        def stage(name: str, total: int) -> Callable[[int], None]:
            last.close()
            bar = last.enter_context(tqdm(total=total, desc=name, dynamic_ncols=True, disable=None))
            if bar.disable:  # a file, in which no bar belongs
                _say(name)

            def tick(n: int) -> None:
                bar.total = max(bar.total, bar.n + n)  # repeated candidates are drawn again
                bar.update(n)

            return tick

        yield stage


def _cost(model: Any, settings: DemoSettings, skip_enumeration: bool) -> str:
    """An estimate of the time ahead, from the speed of one short forward pass on this machine."""
    token = token_seconds(model)
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


FORMS = ("theorem1", "span", "tight", "law", "trained")
"""The bounds that are checked; `alignpro solve` has the rest, on the instance that is saved."""


def analyse(
    enumeration: Enumeration, measures: Measures, settings: DemoSettings, policy: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Theorem 1 and its forms for ρ_sft, ρ_θ and ρ* beside the true gaps: fields of `DemoResult`."""
    instance, beta, lam = enumeration.instance, measures.beta, measures.lam
    theta = enumeration.prompter(policy)
    s = measures.solve(theta)
    star = np.asarray(s.rho_star)
    prior = np.asarray(instance.prior)
    policies = {"sft": prior, "theta": theta, "star": star}
    facts = {name: measures.of(rho) for name, rho in policies.items()}
    bounds = {name: {"star": plain(check(instance, beta, lam, name))} for name in FORMS}
    for who in ("sft", "theta"):
        bounds["trained"][who] = plain(check(instance, beta, lam, "trained", prompter=policies[who]))
    limit = settings.enumeration.response_tokens
    # The best of all prompters is E_x max_x′ R(x, x′) over the support of ρ_sft.
    reachable = np.where(prior > 0, np.asarray(s.rewrite_reward), -np.inf)
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
            "ceiling": float(np.asarray(instance.p) @ reachable.max(1)),
            "rlhf": float(s.j_star),
        },
        "policies": facts,
        "bounds": bounds,
        "prompts": [_prompt(enumeration, x, s, policies, limit) for x in range(len(enumeration.prompts))],
    }


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
