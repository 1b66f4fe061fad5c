"""Rollouts of real models: what each arm rewrote, what π_F answered, its reward, and every log-probability.

All that needs a GPU ends here: `rollouts.jsonl` holds one `alignpro.rollouts.Rollout` a line, and everything
after runs anywhere. How an arm draws its rewrites is in `draws`.

Log-probabilities are of token sequences, end tokens included, under the sampler that drew them, and −inf for
what it cannot give. Both of log π_F(y|x) and log π_F(y|x′) come from one scorer at one dtype, so that their
ratio carries no more than that dtype's noise. Where the backend has none they are null.
"""

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alignpro import rollouts
from alignpro.errors import AlignProError
from alignpro.estimation.paired import estimates
from alignpro.estimation.terms import Terms
from alignpro.files import (
    atomic_write,
    byte_lines,
    encoded,
    make_private,
    parse_json,
    read_json_lines,
    sync,
    why,
)
from alignpro.llm.arms.draws import RESAMPLED, Arm, Array, Work, arms_of, draws_of, stream
from alignpro.llm.arms.resample import Mean
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.llm.models.prompt import columns_of, context_of, said_in
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.rewards.scores import judged, ranges_of
from alignpro.llm.targets.target import Answer
from alignpro.rollouts import Rollout
from alignpro.runs import Run, here

FILE = "rollouts.jsonl"
PARTIAL = "rollouts.partial.jsonl"
"""The rollouts so far, in whole blocks of prompts; it becomes `FILE` when all arms are done."""
BLOCK = 32
"""Prompts that are rolled out together: what an interruption costs at most, answers apart."""


def prompt_id(x: str) -> str:
    """Name of the prompt x, the same in every file."""
    return digest("prompt", x).hex()[:16]


def block_rows(
    work: Work,
    arm: Arm,
    prompts: Sequence[str],
    parties: dict[str, str],
    on_answer: Callable[[], Any] = lambda: None,
) -> list[Rollout]:
    """The rows of one arm and some prompts, by prompt, draw and answer.

    `parties` are the rows' frozen, prompter, reward_model and sampling.
    """
    n = work.settings.answers
    rlhf = arm.name == "rlhf"
    target, policy_scorer = work.policy(arm.folder) if rlhf else (work.target, None)
    draws = draws_of(work, arm, prompts)
    flat = [(x, d, draw) for x, row in zip(prompts, draws, strict=True) for d, draw in enumerate(row)]
    # Something, even where the rewrite is empty: as in training.
    said = [x if draw.rewrite is None else draw.rewrite for x, _, draw in flat]
    asked = [said_in(x, text if text.strip() else " ") for (x, _, _), text in zip(flat, said, strict=True)]
    first, seed = [d * n for _, d, _ in flat], stream("answers", arm.seed)
    answered = target.respond(
        asked, work.sampling, first=first, samples=n, seed=seed, on_answer=lambda *_: on_answer()
    )
    answers = [answer for row in answered for answer in row]
    xs = [x for x, _, _ in flat for _ in range(n)]
    rewrites = [text for text in asked for _ in range(n)]
    low, high, ranges = work.reward.low, work.reward.high, ranges_of(work.reward)
    found = judged(work.reward, xs, answers, work.refusals)
    plain = [said_in(x, x) for x in xs]
    of_x, of_rewrite = _frozen_scores(work, plain, rewrites, answers, rlhf)
    of_policy = policy_scorer(plain, answers, work.sampling, drawn=True) if policy_scorer else None

    def at(values: Array | None, i: int) -> float | None:
        # Not a number: of an answer that was refused.
        return None if values is None or math.isnan(values[i]) else float(values[i])

    out = []
    for i, (answer, reward) in enumerate(zip(answers, found.total, strict=True)):
        x, d, draw = flat[i // n]
        out.append(
            Rollout(
                prompt_id=prompt_id(x),
                x=str(x),
                arm=arm.name,
                seed=arm.seed,
                draw=d,
                answer=i % n,
                rewrite=draw.rewrite,
                response=None if answer.finish == "refused" else answer.text,
                reward=float(reward),
                logp_frozen_x=at(of_x, i),
                logp_frozen_rewrite=at(of_rewrite, i),
                logp_prompter=draw.prompter,
                logp_reference=draw.reference,
                logp_policy=at(of_policy, i),
                reward_low=float(low),
                reward_high=float(high),
                context=list(context_of(x)) or None,
                columns=columns_of(x) or None,
                reward_parts={name: [float(v[i]), *ranges[name]] for name, v in found.parts.items()} or None,
                reward_spread=at(found.spread, i),
                **parties,
            )
        )
    return out


def _frozen_scores(
    work: Work, xs: list[str], rewrites: list[str], answers: list[Answer], rlhf: bool
) -> tuple[Array | None, Array | None]:
    """log π_F(y|x) and log π_F(y|x′), in nats; where x′ is x they are one number, computed once."""
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


@dataclass(frozen=True)
class Plan:
    """The rollouts that a folder is to hold, and those that it holds already."""

    folder: Path
    prompts: tuple[str, ...]
    arms: tuple[Arm, ...]
    settings: RolloutSettings
    todo: tuple[tuple[Arm, tuple[str, ...]], ...]
    """Arms and blocks of prompts, in order."""
    kept: tuple[bytes, ...]
    """Lines that are done, whole blocks only."""
    run: Run
    """The run of the folder, which is claimed once a block is done."""

    @property
    def rows(self) -> int:
        """Rollouts that are still to come."""
        return sum(len(block) for _, block in self.todo) * self.settings.draws * self.settings.answers

    def asks(self) -> tuple[int, int, int]:
        """Upper limits of what is still to come: rewrites, answers of the frozen model, of tuned policies."""
        s = self.settings
        rewrites = frozen = policies = 0
        for arm, block in self.todo:
            n, answers = len(block), len(block) * s.draws * s.answers
            if arm.name == "rlhf":
                policies += answers
                continue
            frozen += answers
            if arm.name in RESAMPLED:
                rewrites += n * s.proposals
                frozen += n * s.proposals * s.proposal_answers
            elif arm.name != "none" and not (arm.text or arm.file):
                rewrites += n * s.draws
        return rewrites, frozen, policies

    def line(self, sampling: Sampling) -> str:
        """One line that says how much is still to come, at most."""
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

    `record` is all that the rows depend on, as JSON values; its "arms" may grow from run to run.
    """
    folder = Path(folder)
    arms = arms_of(settings)
    record = json.loads(json.dumps(record))
    run = here(folder, "rollout")
    before = (run.check(names=(FILE, PARTIAL)) or {}).get("arms", {})
    if not isinstance(before, dict):
        raise AlignProError(f"--out {folder}: its settings are damaged; choose another folder")
    run.begin({**record, "arms": {name: how for name, how in record["arms"].items() if name in before}})
    run.record = {**(run.record or {}), "arms": {**before, **record["arms"]}}
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
    return Plan(folder, tuple(prompts), tuple(arms), settings, todo, kept, run)


def roll_out(
    plan: Plan, work: Work, parties: Callable[[Arm], dict[str, str]], *, progress: bool = True
) -> Path:
    """Do what is planned; the path of `rollouts.jsonl`.

    Each block of prompts is on file before the next begins, so the same call after an interruption goes on
    from there; answers within a block are the target's cache's. In float32 on a CPU the file is that of an
    uninterrupted run to the byte.
    """
    final, partial = plan.folder / FILE, plan.folder / PARTIAL
    if not plan.todo and final.exists() and not partial.exists():
        return final
    before = json.loads(plan.kept[0]) if plan.kept else {}
    for arm in {arm for arm, _ in plan.todo}:
        for name in ("frozen", "reward_model", "sampling"):
            if before.get(name, (now := parties(arm)[name])) != now:
                raise AlignProError(
                    f"--out {plan.folder}: holds rollouts of {name} {before[name]!r}, not {now!r}; choose "
                    "another folder"
                )
    if plan.kept:
        plan.run.claim()
        with atomic_write(partial, private=True) as file:
            file.writelines(plan.kept)
    else:
        partial.unlink(missing_ok=True)  # a part of a block, which is done again as a whole
    done, hidden = len(plan.kept), None if progress else True
    with tqdm(total=plan.rows + done, initial=done, unit="rollout", disable=hidden) as bar:
        for arm, block in plan.todo:
            bar.set_postfix_str(str(arm))
            rows = block_rows(work, arm, block, parties(arm), bar.update)
            plan.run.claim()
            append(partial, encoded("".join(row.line() for row in rows)))
    os.replace(partial, final)
    sync(plan.folder)
    return final


def append(path: Path, data: bytes) -> None:
    """Add `data` to a file for good; a failed write leaves the file as it was, and raises AlignProError."""
    size = path.stat().st_size if path.exists() else 0
    make_private(path)
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):  # it has gone
            os.truncate(path, size)
        said = why(error, "free space and run again: what it holds is kept")
        raise AlignProError(f"cannot write {path}: {said}") from None


Key = tuple[str, int, str]


def _lines(folder: Path) -> tuple[list[tuple[Key, bytes]], Counter[Key]]:
    """The lines on file by (arm, seed, prompt_id), and how many there are of each. A torn one is left out."""
    path = folder / PARTIAL
    path = path if path.exists() else folder / FILE
    found: list[tuple[Key, bytes]] = []
    for line in byte_lines(path):
        try:
            row = parse_json(line)
            key = row["arm"], row["seed"], row["prompt_id"]
        except (ValueError, KeyError, TypeError):
            continue
        if tuple(map(type, key)) == (str, int, str):
            found.append((key, line))
    return found, Counter(key for key, _ in found)


@dataclass(frozen=True)
class ArmSummary:
    """One arm's rollouts."""

    name: str
    mean: Mean
    """Mean reward, in reward units."""
    rollouts: int
    seeds: int
    prompter: str
    """Names of its prompters or policies, with what making the rewrites of a file took."""
    parts: Mapping[str, Mean]
    """Mean of each part of the reward, by name; they add up to the mean reward."""
    refused: int
    """Answers that the service would not give; each counts with its declared reward."""
    spread: float | None
    """Mean standard deviation between the members of a reward that is an ensemble; None without one."""


@dataclass(frozen=True)
class RolloutSummary:
    """A file of rollouts at a glance."""

    path: Path
    rollouts: int
    prompts: int
    low: float
    """Declared range of the reward."""
    high: float
    part_ranges: Mapping[str, tuple[float, float]]
    """Declared range of each part of the reward."""
    arms: tuple[ArmSummary, ...]
    texts: tuple[Rollout, ...]
    """The first draw and answer of each arm to some of the prompts, by prompt."""


def summarise(path: Path, texts: int = 0) -> RolloutSummary:
    """Read rollouts: the mean reward of each arm, and the texts of the first `texts` prompts."""
    found = rollouts.read(path)
    terms = Terms(found, 1.0, 1.0)
    arms = []
    for name in found.arms:
        mine = found.rows(name)
        try:
            wanted = {"": terms.j(name)} | {part: terms.part(name, part) for part in found.parts}
            means = {k: Mean(e.value, e.lo, e.hi) for k, e in estimates(wanted, found, 0.95).items()}
        except AlignProError:  # too few prompts, or one that the arm lacks: no interval
            columns = {"": found.reward, **found.parts}
            means = {key: Mean(float(values[mine].mean())) for key, values in columns.items()}
        arms.append(
            ArmSummary(
                name,
                means.pop(""),
                rollouts=int(mine.sum()),
                seeds=len(set(found.seed[mine].tolist())),
                prompter=found.prompter(name),
                parts=means,
                refused=int(found.refused[mine].sum()),
                spread=None if found.spread is None else float(np.nanmean(found.spread[mine])),
            )
        )
    first: dict[str, dict[str, Rollout]] = {}
    for row in read_json_lines(path) if texts else ():
        if row["draw"] == row["answer"] == 0 and (row["prompt_id"] in first or len(first) < texts):
            row = Rollout(**{name: row.get(name) for name in rollouts.FIELDS + rollouts.OPTIONAL})
            first.setdefault(row.prompt_id, {}).setdefault(row.arm, row)
    shown = tuple(row for rows in first.values() for row in rows.values())
    size = len(found), len(found.prompt_ids)
    return RolloutSummary(path, *size, found.low, found.high, found.part_ranges, tuple(arms), shown)
