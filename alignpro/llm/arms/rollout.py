"""Rollouts of real models: what each arm rewrote, what π_F answered, its reward, and every log-probability.

All that needs a GPU ends here: `rollouts.jsonl` holds one `alignpro.rollouts.Rollout` a line, and everything
after runs anywhere. A row of `ARMS` is how an arm draws its rewrites.

Log-probabilities are of token sequences, end tokens included, under the sampler that drew them: the model's
own distribution at temperature 1 with nothing truncated, the processed one otherwise, where what the sampler
cannot give has −inf. Both of log π_F(y|x) and log π_F(y|x′) come from one scorer at one dtype, so that their
ratio carries no more than that dtype's noise. Where the backend has none they are null.
"""

import gc
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import atomic_write, read_json, writable_folder, write_json
from alignpro.llm.arms.resample import Array, appraise, best_of_n, choose, star
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.targets.target import Answer, Target
from alignpro.rollouts import Rollout
from alignpro.runs import refuse_other_settings

if TYPE_CHECKING:
    from alignpro.llm.policies.prompter import Prompter
    from alignpro.llm.rewards.reward import Reward

T = TypeVar("T")
Scorer = Callable[..., Array]
"""`LocalTarget.log_probs`."""

FILE = "rollouts.jsonl"
PARTIAL = "rollouts.partial.jsonl"
"""What there is so far, whole blocks of prompts; it becomes `FILE` when all arms are done."""
SETTINGS_FILE = "settings.json"
BLOCK = 32
"""Prompts that are rolled out together: what an interruption costs at most, answers apart."""


@dataclass(frozen=True)
class Arm:
    """One arm and seed of an experiment.

    Args:
        name: a row of `ARMS`, rlhf, or any other name of a trained prompter's.
        seed: of its draws, its answers, and its rows.
        folder: of the trained prompter or policy.
    """

    name: str
    seed: int = 0
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.name} (seed {self.seed})"


@dataclass(frozen=True)
class Draw:
    """One x′, and its log-probabilities in nats under the arm's prompter and ρ_sft, where they are known."""

    rewrite: str | None
    prompter: float | None = None
    reference: float | None = None


def arms_of(settings: RolloutSettings) -> list[Arm]:
    """The arms that the settings name, in order.

    Raises:
        AlignProError: an unknown arm, one named twice, or none.
    """
    named = list(settings.arms)
    for name in named:
        if name not in ARMS:
            given = "; name its folder in trained" if name == "trained" else ""
            given = "; name its folder in rlhf" if name == "rlhf" else given
            raise AlignProError(f"arms {name!r}: choose from {', '.join(ARMS)}{given}")
    if len(set(named)) != len(named):
        raise AlignProError(f"arms {' '.join(named)}: name each once")
    found = [Arm(name, settings.seed) for name in named]
    for given in settings.trained:
        name, _, folder = given.rpartition("=") if not Path(given).expanduser().exists() else ("", "", given)
        if name in ARMS or name == "rlhf":
            raise AlignProError(f"trained {given!r}: {name} is an arm of its own; choose another name")
        name = name or "trained"
        found.append(Arm(name, settings.seed + sum(arm.name == name for arm in found), folder))
    found += [Arm("rlhf", settings.seed + i, folder) for i, folder in enumerate(settings.rlhf)]
    if not found:
        raise AlignProError(f"arms: none given; choose from {', '.join(ARMS)}, or give trained or rlhf")
    return found


@dataclass
class Work:
    """What rollouts need, opened when it is.

    Args:
        settings: draws, answers and the rest.
        reward: r(x, y).
        target: π_F, behind a cache.
        scorer: π_F's `log_probs`, or None where it has none.
        sampling: how π_F, and a tuned policy in its place, decode.
        open_prompter: from "" (ρ_sft) or a trained prompter's folder.
        open_policy: from the folder of an rlhf policy: the policy behind a cache, and its scorer.
        batch_size: rewrites drawn at once.
    """

    settings: RolloutSettings
    reward: "Reward"
    target: Target
    scorer: Scorer | None
    sampling: Sampling
    open_prompter: "Callable[[str], Prompter]"
    open_policy: Callable[[str], tuple[Target, Scorer]]
    batch_size: int = 64

    def __post_init__(self) -> None:
        self.prompter = _keeping_last(self._trained)
        self.policy = _keeping_last(self.open_policy)

    @cached_property
    def reference(self) -> "Prompter":
        """ρ_sft."""
        return self._open("")

    def _trained(self, folder: str) -> "Prompter":
        found = self._open(folder)
        if found.template != self.reference.template:
            raise AlignProError(
                f"trained {folder}: its template is not that of ρ_sft; name the prompter it was trained from"
            )
        return found

    def _open(self, folder: str) -> "Prompter":
        opened, tokens = self.open_prompter(folder), self.settings.rewrite_tokens
        return opened if tokens is None else replace(opened, max_tokens=tokens)


def _keeping_last(open_one: Callable[[str], T]) -> Callable[[str], T]:
    """What was opened last is kept, and freed before the next."""
    kept: dict[str, T] = {}

    def get(name: str) -> T:
        if name not in kept:
            kept.clear()
            gc.collect()
            kept[name] = open_one(name)
        return kept[name]

    return get


# --- arms: how each draws its rewrites -------------------------------------------------------------------

Rewrites = list[list[tuple[tuple[int, ...], float]]]


def _sample(prompter: "Prompter", prompts: Sequence[str], keys: list[list[int]], batch_size: int) -> Rewrites:
    """[prompts][keys] token ids x′ ~ ρ(·|x) and log ρ(x′|x), kept from sampling."""
    from alignpro.llm.models.policy import sample_and_score

    ids = prompter.prompt_ids(prompts)
    sampling = Sampling(max_tokens=prompter.max_tokens)
    pad = prompter.tokenizer.pad_token_id
    drawn = sample_and_score(prompter.model, pad, ids, keys, sampling, batch_size=batch_size)
    return [[(tuple(said), math.fsum(values)) for said, values in row] for row in drawn]


def _keys(kind: str, seed: int, prompts: Sequence[str], n: int) -> list[list[int]]:
    from alignpro.llm.models.policy import sample_key

    return [[sample_key(kind, seed, x, i) for i in range(n)] for x in prompts]


def _text(prompter: "Prompter", x: str, ids: tuple[int, ...]) -> str:
    return prompter.template.rewrite(prompter.tokenizer, x, ids)


def _none(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """x itself."""
    return [[Draw(x)] * work.settings.draws for x in prompts]


def _sft(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """x′ ~ ρ_sft."""
    keys = _keys("rollout", arm.seed, prompts, work.settings.draws)
    rows = _sample(work.reference, prompts, keys, work.batch_size)
    return [
        [Draw(_text(work.reference, x, ids), value, value) for ids, value in row]
        for x, row in zip(prompts, rows, strict=True)
    ]


def _trained(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
    """x′ ~ ρ_θ, scored by ρ_sft too."""
    import torch

    from alignpro.llm.models.policy import log_probs

    prompter, reference = work.prompter(arm.folder), work.reference
    keys = _keys("rollout", arm.seed, prompts, work.settings.draws)
    rows = _sample(prompter, prompts, keys, work.batch_size)
    given = reference.prompt_ids(prompts)
    pairs = [(start, ids) for start, row in zip(given, rows, strict=True) for ids, _ in row]
    with torch.inference_mode():
        scores = log_probs(reference.model, [start for start, _ in pairs], [ids for _, ids in pairs])
    values = iter(scores.log_probs.double().sum(1).tolist())
    return [
        [Draw(_text(prompter, x, ids), value, next(values)) for ids, value in row]
        for x, row in zip(prompts, rows, strict=True)
    ]


def _resampled(weigh: Callable[..., Array]) -> Callable[..., list[list[Draw]]]:
    """Draws by weights over proposals from ρ_sft, whose answers are asked for again: those that chose count
    no more. The density of what results is known up to the error of R̂ only, so none is given."""

    def arm_draws(work: Work, arm: Arm, prompts: Sequence[str]) -> list[list[Draw]]:
        from alignpro.llm.training.open_ended import Environment

        settings, reference = work.settings, work.reference
        keys = _keys("proposals", arm.seed, prompts, settings.proposals)
        rows = _sample(reference, prompts, keys, work.batch_size)
        texts = [[_text(reference, x, ids) for ids, _ in row] for x, row in zip(prompts, rows, strict=True)]
        environment = Environment(
            work.reward, work.target, work.sampling, seed=_stream("proposals", arm.seed)
        )
        found = appraise(environment, prompts, texts, responses=settings.proposal_answers)
        out = []
        for p, row in zip(found, rows, strict=True):
            chosen = choose(weigh(settings, p), settings.draws, "rollout", arm.name, arm.seed, p.prompt)
            out.append([Draw(p.rewrites[i], None, row[i][1]) for i in chosen])
        return out

    return arm_draws


ARMS: dict[str, Callable[[Work, Arm, Sequence[str]], list[list[Draw]]]] = {
    "none": _none,
    "sft": _sft,
    "star": _resampled(lambda s, p: star(p, s.lam).weights),
    "best_of_n": _resampled(lambda s, p: best_of_n(p, s.best_of).weights),
}
"""Arms without training: the draws [prompts][draws] of each."""


def prompt_id(x: str) -> str:
    """A name for x that is the same in every file."""
    return digest("prompt", x).hex()[:16]


def _stream(kind: str, seed: int) -> int:
    """Seed of π_F's answers. Training's own seeds are small: what was trained on is not met again."""
    return int.from_bytes(digest("rollout", kind, seed)[:7])


# --- rows ------------------------------------------------------------------------------------------------


def block_rows(
    work: Work,
    arm: Arm,
    prompts: Sequence[str],
    parties: dict[str, str],
    on_answer: Callable[[], Any] = lambda: None,
) -> list[Rollout]:
    """The rows of one arm and some prompts, by prompt, draw and answer.

    Args:
        parties: the row's frozen, prompter, reward_model and sampling.
        on_answer: called as each answer arrives.

    Raises:
        AlignProError: from the prompter, π_F or the reward; `Stopped` where a budget is spent.
    """
    from alignpro.llm.rewards.reward import check_scores

    settings, n = work.settings, work.settings.answers
    rlhf = arm.name == "rlhf"
    target, policy_scorer = work.policy(arm.folder) if rlhf else (work.target, None)
    if rlhf:
        draws = [[Draw(None)] * settings.draws for _ in prompts]
    else:
        draws = ARMS.get(arm.name, _trained)(work, arm, prompts)
    flat = [(x, d, draw) for x, row in zip(prompts, draws, strict=True) for d, draw in enumerate(row)]
    # Something, even where the rewrite is empty: as in training.
    said = [x if draw.rewrite is None else draw.rewrite for x, _, draw in flat]
    asked = [text if text.strip() else " " for text in said]
    answered = target.respond(
        asked,
        work.sampling,
        first=[d * n for _, d, _ in flat],
        samples=n,
        seed=_stream("answers", arm.seed),
        on_answer=lambda *_: on_answer(),
    )
    answers = [answer for row in answered for answer in row]
    xs = [x for x, _, _ in flat for _ in range(n)]
    rewrites = [text for text in asked for _ in range(n)]
    texts = [answer.text for answer in answers]
    low, high = work.reward.low, work.reward.high
    rewards = check_scores(xs, texts, work.reward.score(xs, texts), low, high)
    of_x, of_rewrite = _frozen_scores(work, xs, rewrites, answers, rlhf)
    of_policy = policy_scorer(xs, answers, work.sampling, drawn=True) if policy_scorer else None

    def at(values: Array | None, i: int) -> float | None:
        return None if values is None else float(values[i])

    out = []
    for i, (answer, reward) in enumerate(zip(answers, rewards, strict=True)):
        x, d, draw = flat[i // n]
        out.append(
            Rollout(
                prompt_id=prompt_id(x),
                x=x,
                arm=arm.name,
                seed=arm.seed,
                draw=d,
                answer=i % n,
                rewrite=draw.rewrite,
                response=answer.text,
                reward=float(reward),
                logp_frozen_x=at(of_x, i),
                logp_frozen_rewrite=at(of_rewrite, i),
                logp_prompter=draw.prompter,
                logp_reference=draw.reference,
                logp_policy=at(of_policy, i),
                reward_low=float(low),
                reward_high=float(high),
                **parties,
            )
        )
    return out


def _frozen_scores(
    work: Work, xs: list[str], rewrites: list[str], answers: list[Answer], rlhf: bool
) -> tuple[Array | None, Array | None]:
    """log π_F(y|x) and log π_F(y|x′). Where x′ is x they are one number, computed once."""
    if work.scorer is None:
        return None, None
    if rlhf:  # drawn from the policy: π_F may exclude it
        return work.scorer(xs, answers, work.sampling), None
    of_rewrite = work.scorer(rewrites, answers, work.sampling, drawn=True)
    of_x = of_rewrite.copy()
    other = [i for i, (x, rewrite) in enumerate(zip(xs, rewrites, strict=True)) if x != rewrite]
    if other:
        of_x[other] = work.scorer([xs[i] for i in other], [answers[i] for i in other], work.sampling)
    return of_x, of_rewrite


# --- the run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is to be rolled out into a folder, and what of it is there.

    Attributes:
        todo: arms and blocks of prompts, in order.
        kept: lines that are done, whole blocks only.
    """

    folder: Path
    prompts: tuple[str, ...]
    arms: tuple[Arm, ...]
    settings: RolloutSettings
    todo: tuple[tuple[Arm, tuple[str, ...]], ...]
    kept: tuple[bytes, ...]

    @property
    def rows(self) -> int:
        """How many are still to come."""
        return sum(len(block) for _, block in self.todo) * self.settings.draws * self.settings.answers

    def asks(self) -> tuple[int, int, int]:
        """At most: rewrites drawn, answers of the frozen model, answers of tuned policies."""
        s = self.settings
        rewrites = frozen = policies = 0
        for arm, block in self.todo:
            n, answers = len(block), len(block) * s.draws * s.answers
            if arm.name == "rlhf":
                policies += answers
                continue
            frozen += answers
            if arm.name in ("star", "best_of_n"):
                rewrites += n * s.proposals
                frozen += n * s.proposals * s.proposal_answers
            elif arm.name != "none":
                rewrites += n * s.draws
        return rewrites, frozen, policies

    def line(self, sampling: Sampling) -> str:
        """What is still to come, at most, as one line."""
        rewrites, frozen, policies = self.asks()
        done = f" ({len(self.kept)} rollouts kept)" if self.kept else ""
        line = f"{len(self.prompts)} prompts; {', '.join(map(str, self.arms))}{done}: {rewrites} rewrites"
        if rewrites and self.settings.rewrite_tokens:
            line += f" of at most {self.settings.rewrite_tokens} tokens"
        return f"{line}, {frozen + policies} answers of at most {sampling.max_tokens} tokens"


def plan(
    folder: str | Path, prompts: Sequence[str], settings: RolloutSettings, record: dict[str, Any]
) -> Plan:
    """Compare with what the folder holds, and write down what is to be done.

    Args:
        record: what the rows depend on, as JSON values; its "arms" may grow from run to run.

    Raises:
        AlignProError: the folder was begun with other settings, or cannot be written to.
    """
    folder = writable_folder(folder)
    arms = arms_of(settings)
    record = json.loads(json.dumps(record))
    begun = folder / SETTINGS_FILE
    before = read_json(begun) if begun.exists() else {**record, "arms": {}}
    met = {name: how for name, how in record["arms"].items() if name in before["arms"]}
    refuse_other_settings(folder, before, {**record, "arms": met}, "--out")
    blocks = [tuple(prompts[i : i + BLOCK]) for i in range(0, len(prompts), BLOCK)]
    lines, counts = _lines(folder)
    whole = settings.draws * settings.answers
    # A block that was cut short is done again as a whole: in bfloat16 its answers depend on their batch.
    complete: set[Key] = set()
    for name, seed in {key[:2] for key in counts}:  # other arms of an earlier run, too
        for block in blocks:
            keys = [(name, seed, prompt_id(x)) for x in block]
            if all(counts.get(key) == whole for key in keys):
                complete.update(keys)
    kept = tuple(line for key, line in lines if key in complete)
    todo = tuple(
        (arm, block)
        for arm in arms
        for block in blocks
        if (arm.name, arm.seed, prompt_id(block[0])) not in complete
    )
    write_json(begun, {**record, "arms": {**before["arms"], **record["arms"]}})
    return Plan(folder, tuple(prompts), tuple(arms), settings, todo, kept)


def roll_out(
    plan: Plan, work: Work, parties: Callable[[Arm], dict[str, str]], *, progress: bool = True
) -> Path:
    """Do what is planned; the path of `rollouts.jsonl`.

    Each block of prompts is on file before the next begins, so the same call after an interruption goes on
    from there; answers within a block are the target's cache's. In float32 on a CPU the file is that of an
    uninterrupted run to the byte.

    Raises:
        AlignProError: from the prompters, the target or the reward, or a full disk; all before it is kept.
    """
    final, partial = plan.folder / FILE, plan.folder / PARTIAL
    if not plan.todo and final.exists() and not partial.exists():
        return final
    shared = ("frozen", "reward_model", "sampling")
    before = json.loads(plan.kept[0]) if plan.kept else {}
    for arm in {arm for arm, _ in plan.todo}:
        for name in shared:
            if before.get(name, (now := parties(arm)[name])) != now:
                raise AlignProError(
                    f"--out {plan.folder}: holds rollouts of {name} {before[name]!r}, not {now!r}; choose "
                    "another folder"
                )
    with atomic_write(partial) as file:
        file.writelines(plan.kept)
    with tqdm(
        total=plan.rows + len(plan.kept),
        initial=len(plan.kept),
        unit="rollout",
        disable=None if progress else True,
    ) as bar:
        for arm, block in plan.todo:
            bar.set_postfix_str(str(arm))
            rows = block_rows(work, arm, block, parties(arm), bar.update)
            _append(partial, "".join(row.line() for row in rows).encode("utf-8", "surrogatepass"))
    os.replace(partial, final)
    return final


def _append(path: Path, data: bytes) -> None:
    size = path.stat().st_size
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        os.truncate(path, size)
        raise AlignProError(
            f"cannot write {path}: {error.strerror}; free space and run again: what it holds is kept"
        ) from None


Key = tuple[str, int, str]


def _lines(folder: Path) -> tuple[list[tuple[Key, bytes]], dict[Key, int]]:
    """The lines on file by (arm, seed, prompt_id), and how many there are of each. A torn one is left out."""
    path = folder / PARTIAL
    path = path if path.exists() else folder / FILE
    found: list[tuple[Key, bytes]] = []
    counts: dict[Key, int] = {}
    if path.exists():
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    key = row["arm"], row["seed"], row["prompt_id"]
                except (ValueError, KeyError, TypeError):
                    continue
                found.append((key, line))
                counts[key] = counts.get(key, 0) + 1
    return found, counts


def sha256(path: Path) -> str:
    """SHA-256 of a file, shortened."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
