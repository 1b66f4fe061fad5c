"""On which tasks would a prompter that reads the prompt earn more than one instruction for all?

    python experiments/price.py --out runs/price      # half an hour of one core, nothing but packages
    python experiments/price.py --out runs/who --who  # and of requests that say who asks

Every prompt is asked with every one of some instructions of the bank, several times; the answers are kept, so
that the same command goes on. Tasks are the packaged rewards, and pairs of them: one for requests of a kind,
another for all others. For each: the best fixed instruction, the best one of each kind, and a router by the
frozen model's states, and by MiniLM's embedding (all learned from other prompts than they are judged on), the
best of each prompt (chosen by half of its answers, judged by the other half), and the price F(ρ*) − F(q*) of
not reading the prompt, by the components of the variance of R(x, s).
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from paper_grid import launch, summary
from task_grid import table
from task_grid.kinds import FROM_A_CHILD, KINDS, Kind, asked
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.estimation import routing
from alignpro.estimation.means import limits
from alignpro.estimation.routing import left_out
from alignpro.files import writable_folder, write_json
from alignpro.llm.arms import route
from alignpro.llm.arms.route import candidates_of
from alignpro.llm.data import public
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.features import Embedder
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.local import LocalTarget
from alignpro.runs import environment

MODEL = "smollm2-135m-instruct"
REWARDS = ("ease", "sentiment", "brevity", "list", "minilm-bt")
LEVEL, LAM = 0.95, 0.02


@dataclass(frozen=True)
class Tasks:
    """Rewards [prompts, strategies, answers] by the name of a task."""

    prompts: Sequence[str]
    strategies: Sequence[str]
    reward: Mapping[str, np.ndarray]
    kind: Mapping[str, np.ndarray]
    """Kinds of the prompts, 0 or 1, of tasks that have two."""
    states: np.ndarray
    """Of the frozen model's middle layer [prompts, size], by which a router reads them."""
    minilm: np.ndarray
    """The packaged MiniLM's embeddings [prompts, 384], by which another does."""


def answered(
    out: Path, prompts: Sequence[str], texts: Sequence[str], answers: int, tokens: int
) -> list[list[list[str]]]:
    """Answers [prompts][strategies][answers] of the frozen model, from `out` where they are on file."""
    target = Cached(LocalTarget(MODEL, batch_size=len(texts) * answers), out)
    found = []
    for x in tqdm(prompts, unit="prompt", disable=None):
        asked = [with_instruction(x, text) for text in texts]
        given = target.respond(asked, Sampling(max_tokens=tokens), samples=answers)
        found.append([[answer.text for answer in row] for row in given])
    return found


def rewarded(
    prompts: Sequence[str],
    texts: Sequence[str],
    found: list[list[list[str]]],
    kinds: Sequence[Kind] = KINDS,
) -> Tasks:
    """Score the answers for every task."""
    shape = len(prompts), len(texts), len(found[0][0])
    flat = [text for row in found for cell in row for text in cell]
    of = [x for x in prompts for _ in range(shape[1] * shape[2])]
    alone = {name: np.asarray(load_reward(name).score(of, flat), float).reshape(shape) for name in REWARDS}
    reward, kind = dict(alone), {}
    for each in kinds:
        is_of = each.of(prompts)
        for a, b in permutations(REWARDS, 2):
            task = f"{a} where it {each.name}, else {b}"
            reward[task] = np.where(is_of[:, None, None], alone[a], alone[b])
            kind[task] = is_of
    return Tasks(
        prompts,
        texts,
        reward,
        kind,
        route.Reader(MODEL, "float32").read()(prompts),
        Embedder().embed(prompts),
    )


def by_kind(values: np.ndarray, kind: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Choose for each kind of prompts the strategy that earns most on it."""

    def choose(known: np.ndarray) -> np.ndarray:
        best = {k: values[known & (kind == k)].mean(0).argmax() for k in np.unique(kind)}
        return np.array([best[k] for k in kind])

    return choose


def crossed(rewards: np.ndarray) -> np.ndarray:
    """What prompts earn [X] by the best strategy of each: half of the answers choose it, the others judge."""
    half = rewards.shape[2] // 2
    first, second = rewards[..., :half].mean(2), rewards[..., half:].mean(2)
    rows = np.arange(len(rewards))
    return (first[rows, second.argmax(1)] + second[rows, first.argmax(1)]) / 2


def measured(tasks: Tasks, name: str) -> dict[str, Any]:
    """One task's row of the table."""
    rewards = tasks.reward[name]
    values = rewards.mean(2)
    kind = tasks.kind.get(name, np.zeros(len(rewards), int))
    none = values[:, list(tasks.strategies).index("")]
    fixed = left_out(values, routing.fixed(values))
    kinds = left_out(values, by_kind(values, kind))
    routed = left_out(values, routing.routed(tasks.states, values))
    embedded = left_out(values, routing.routed(tasks.minilm, values))
    named = {
        "none": none,
        "fixed": fixed,
        "by kind": kinds,
        "router": routed,
        "by prompt": crossed(rewards),
        "fixed over none": fixed - none,
        "by kind over fixed": kinds - fixed,
        "router over fixed": routed - fixed,
        "router by MiniLM over fixed": embedded - fixed,
    }
    low = np.array([-1.0 if "over" in key else 0.0 for key in named])
    rows = np.stack(list(named.values()))
    at = limits(rows, low, np.ones(len(rows)), LEVEL)
    found: dict[str, Any] = {
        key: {"value": float(v), "lo": float(lo), "hi": float(hi)}
        for key, v, lo, hi in zip(named, rows.mean(1), at.lo, at.hi, strict=True)
    }
    best = {k: tasks.strategies[values[kind == k].mean(0).argmax()] for k in np.unique(kind)}
    found["instructions"] = [best[k] or "(none)" for k in sorted(best, reverse=True)]
    pooled = table.pooled(table.Table(tasks.prompts, tasks.strategies, rewards, name), LAM, LEVEL)
    if pooled is not None and pooled.components is not None:
        parts = pooled.components
        found["sd of strategies"] = float(np.sqrt(max(parts.strategies.value, 0.0)))
        found["sd of interaction"] = float(np.sqrt(max(parts.interaction.value, 0.0)))
        found["price"] = summary.shown(pooled.at[0].price)
        found["finding"] = pooled.finding
    return found


def shown(results: Mapping[str, Any], most: int) -> str:
    """The single rewards, and the pairs whose kinds gain most, as Markdown."""
    rows = results["tasks"]
    pairs = [name for name in rows if name not in REWARDS]
    pairs.sort(key=lambda name: -rows[name]["by kind over fixed"]["value"])
    heads = (
        "none",
        "fixed",
        "by kind",
        "router",
        "by prompt",
        "by kind over fixed",
        "router over fixed",
        "router by MiniLM over fixed",
        "price",
    )
    lines = [f"| task | {' | '.join(heads)} | best |", "|---" * (len(heads) + 2) + "|"]
    for name in [*(name for name in REWARDS if name in rows), *pairs[:most]]:
        row = rows[name]
        cells = []
        for key in heads:
            e = row.get(key)
            interval = e and ("over" in key or key == "price")
            value = f"{e['value']:.3f}" if e else ""
            cells.append(f"{value} [{e['lo']:.3f}, {e['hi']:.3f}]" if interval else value)
        lines.append(f"| {name} | {' | '.join(cells)} | {' / '.join(row['instructions'])} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the answers and the results")
    parser.add_argument("--prompts", type=int, default=64, help="how many prompts, from the first")
    parser.add_argument("--split", default="train", choices=("train", "validation", "test"))
    parser.add_argument("--answers", type=int, default=2, help="answers to each prompt with each instruction")
    parser.add_argument("--answer-tokens", type=int, default=40)
    parser.add_argument("--who", action="store_true", help="prompts that say who asks, and kinds by that")
    parser.add_argument("--most", type=int, default=10, help="pairs of rewards to print")
    args = parser.parse_args()
    return launch.ended("price.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Do what is not done, and write the results."""
    for name, given, least in (("answers", args.answers, 2), ("prompts", args.prompts, routing.FOLDS)):
        if given < least:
            raise AlignProError(f"--{name} {given}: give at least {least}")
    out, texts = writable_folder(args.out.resolve()), candidates_of(None)
    prompts, kinds = public.prompts("instructions", args.split)[: args.prompts], KINDS
    if args.who:
        prompts, kinds = asked(prompts), (FROM_A_CHILD,)
    calls = len(prompts) * len(texts) * args.answers
    print(f"{len(prompts)} prompts with {len(texts)} instructions, {calls:,} answers", file=sys.stderr)
    answers = answered(out, prompts, texts, args.answers, args.answer_tokens)
    tasks = rewarded(prompts, texts, answers, kinds)
    results = {
        "prompts": len(prompts),
        "split": args.split,
        "instructions": list(texts),
        "answers": args.answers,
        "who": args.who,
        "kinds": {kind.name: float(kind.of(prompts).mean()) for kind in kinds},
        "lam": LAM,
        "level": LEVEL,
        "environment": environment(),
        "tasks": {name: measured(tasks, name) for name in tqdm(tasks.reward, unit="task", disable=None)},
    }
    write_json(out / "results.json", results)
    print(shown(results, args.most))
    return 0


if __name__ == "__main__":
    sys.exit(main())
