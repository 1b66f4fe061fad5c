"""What the finished jobs say: what each arm earns, Theorem 1, and whether `headroom` foresaw it.

Everything is computed from the jobs' files. Intervals are over prompts, with all seeds of a prompt together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from paper_grid.summary import LEVEL, minus, shown
from paper_grid.work import FINISHED

from alignpro import rollouts
from alignpro.estimation import headroom
from alignpro.estimation.compare import Comparison, compare
from alignpro.estimation.estimate import estimate
from alignpro.estimation.headroom import Headroom
from alignpro.estimation.intervals import NEGLIGIBLE, Estimate
from alignpro.estimation.paired import Arm, Term, estimates
from alignpro.files import read_json, read_json_lines
from alignpro.llm.arms.rollout import FILE
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.training.checkpoints import METRICS_FILE
from alignpro.rollouts import Rollout, Rollouts
from alignpro.runs import SETTINGS_FILE, environment
from task_grid.plan import FIXED, ROUTER, TOLD, Size, place, recorded, slug

LAMS = (0.02, 0.05, 0.1, 0.2)
"""Shares of the reward's width at which foresight is tried."""
RIVALS = ("sft", FIXED, ROUTER, TOLD, "star", "best_of_n", "rloo", "rlhf")


@cache
def rewarded(file: Path, name: str) -> Rollouts:
    """The rollouts on file with another reward of the same texts."""
    reward = load_reward(name)
    rows = [Rollout(**row) for row in read_json_lines(file)]
    values = reward.score([row.x for row in rows], [row.response or "" for row in rows])
    named = {"reward_model": name, "reward_low": reward.low, "reward_high": reward.high, "reward_parts": None}
    return rollouts.collect(
        replace(row, reward=float(value), **named) for row, value in zip(rows, values, strict=True)
    )


def summarise(size: Size, out: Path) -> dict[str, Any]:
    """Results of what is finished; the rest is named in "missing"."""
    done = {task: reward for task, reward in size.tasks.items()
            if (out / slug(task) / "rollout" / FINISHED).is_file()}  # fmt: skip
    missing = [f"{task}: not rolled out yet" for task in size.tasks if task not in done]
    taught = {task: _taught(out / slug(task), len(size.seeds)) for task in size.taught if task in done}
    missing += [f"{task}: taught prompters not rolled out yet" for task, of in taught.items() if of is None]
    return {
        "size": recorded(size),
        "answers": {"training": size.calls, "proposals": size.proposals},
        "level": LEVEL,
        "environment": environment(),
        "dtypes": sorted({read_json(out / slug(task) / "rollout" / SETTINGS_FILE)["dtype"] for task in done}),
        "tasks": {task: _task(size, out, task, reward) for task, reward in done.items()},
        "taught": {task: of for task, of in taught.items() if of is not None},
        "foresight": list(_foresight(size, out, done)),
        "missing": missing,
    }


def _task(size: Size, out: Path, task: str, reward: str) -> dict[str, Any]:
    here = out / slug(task)
    found = rollouts.read(here / "rollout" / FILE)
    lam = size.lam * (found.high - found.low)
    arms = ["none", *(arm for arm in (*RIVALS, "trained") if arm in found.arms)]
    every = compare(found, arms, LEVEL)
    # Others' gains over the trained prompter, with the sign turned: what it gains over each.
    trained = compare(found, ["trained", *(arm for arm in arms if arm != "trained")], LEVEL)
    alone = compare(found, ["none", "trained"], LEVEL).against["trained"]
    race = read_json(here / "instruct" / "instruct.json")
    report = estimate(found, lam, lam, LEVEL)
    seen = rewarded(out / "foreseen" / place(task) / next(iter(size.prompters)) / FILE, reward)
    foreseen = headroom(seen, (lam,), LEVEL, beta=lam)
    return {
        "reward": reward,
        "instruction": race["winner"],
        "instruct": race["held_out"],
        "race": {name: race[name] for name in ("calls", "budget", "contenders")},
        "foreseen": foreseen.answer,
        "pooled": None if foreseen.pooled is None else foreseen.pooled.finding,
        "numbers": _numbers(foreseen, every, trained),
        "reading": _reading(here, found),
        "mean": {arm: shown(e) for arm, e in every.mean.items()},
        "over none": {arm: shown(of.mean) for arm, of in every.against.items()},
        "trained over": {arm: minus(of.mean) for arm, of in trained.against.items()},
        "trained and none": {
            "mean": shown(alone.mean),
            "variance": shown(alone.variance),
            "win rate": shown(alone.win_rate),
        },
        "by seed": [shown(e) for e in _by_seed(here / "rollout" / FILE, "none", len(size.seeds))],
        "curves": {str(seed): _curve(here / f"ppo-{seed}" / METRICS_FILE) for seed in size.seeds},
        "bounds": [
            {
                "name": bound.name,
                "prompter": bound.prompter,
                "gap": shown(bound.gap),
                "rhs": shown(bound.rhs),
                "slack": shown(bound.slack),
                "finding": bound.finding,
                "why": bound.why,
            }
            for bound in report.bounds
            if bound.prompter in ("rho*", "star", "trained")
            and bound.name in ("theorem1", "trained", "trained_rewards_only")
        ],
        "examples": _examples(here / "rollout" / FILE),
    }


def _numbers(foreseen: Headroom, every: Comparison, trained: Comparison) -> dict[str, dict[str, Any]]:
    """What one instruction brings, what reading the prompt adds to it, and what fine-tuning adds to that:
    foreseen from the reference's rollouts, and realised on held-out prompts.

    Realised are the best fixed instruction over no prompter, PPO over it, and RLHF over PPO.
    """
    pooled = foreseen.pooled
    over, beyond = every.against.get(FIXED), trained.against.get("rlhf")
    return {
        "one instruction": {
            "foreseen": shown(None if pooled is None else pooled.over_none),
            "realised": shown(None if over is None else over.mean),
        },
        "reading the prompt": {
            "foreseen": shown(pooled.at[0].price if pooled is not None and pooled.at else None),
            "realised": minus(trained.against[FIXED].mean) if over is not None else None,
        },
        "fine-tuning": {
            "foreseen": shown(foreseen.at[0].tuned),
            "realised": shown(None if beyond is None else beyond.mean),
        },
    }


def _reading(here: Path, found: Rollouts) -> dict[str, Any]:
    """What the router learned, and what it, PPO and the best of each kind earn over the best fixed
    instruction, if there is one."""
    learned = read_json(here / "route" / "route.json")
    over = {}
    if FIXED in found.arms:
        told = [TOLD] if TOLD in found.arms else []
        over = compare(found, [FIXED, ROUTER, "trained", *told], LEVEL).against
    return {
        "router": {name: learned[name] for name in ("calls", "ridge", "rank", "single", "picks")},
        "router over one instruction, on the table": _on_file(learned["foreseen"]["gain"]),
        "over the best fixed instruction": {arm: shown(of.mean) for arm, of in over.items()},
        "over half of reading": {arm: shown(_over_half(found, arm)) for arm in (ROUTER, "trained")},
    }


def _taught(here: Path, seeds: int) -> dict[str, Any] | None:
    """What a prompter that learned a router's picks earns, and PPO from there; None while that is not known.

    Gains are over the best fixed instruction, where there is one, else over no prompter.
    """
    folder = here / "rollout-taught"
    if not (folder / FINISHED).is_file():
        return None
    found = rollouts.read(folder / FILE)
    base = FIXED if FIXED in found.arms else "none"
    told = [TOLD] if TOLD in found.arms else []
    every = compare(found, [base, ROUTER, "sft", "trained", *told], LEVEL)
    return {
        "over": base,
        "over half of reading": {arm: shown(_over_half(found, arm)) for arm in (ROUTER, "sft", "trained")},
        "mean": {arm: shown(e) for arm, e in every.mean.items()},
        "gain": {arm: shown(of.mean) for arm, of in every.against.items()},
        "by seed": [shown(e) for e in _by_seed(folder / FILE, base, seeds)],
    }


def _over_half(found: Rollouts, arm: str) -> Estimate | None:
    """What an arm earns beyond half of the way from the best fixed instruction to the best of each kind; None
    where one of these is missing."""
    if not {FIXED, TOLD} <= set(found.arms):
        return None
    each = [Arm(found, name) for name in (arm, FIXED, TOLD)]
    own, fixed, told = (of.mean(of.reward) for of in each)
    width = found.high - found.low
    names = frozenset({arm, FIXED, TOLD})
    term = Term(own - (fixed + told) / 2, -width, width, names, "none", "means of a prompt", bounded=True)
    return estimates({arm: term}, found, LEVEL)[arm]


def _on_file(of: Mapping[str, Any]) -> dict[str, Any]:
    """An estimate of a verb's file, as `shown` has one."""
    return {"value": of["value"], "lo": of["lo"], "hi": of["hi"], "prompts": of["n_clusters"]}


def _curve(file: Path) -> list[dict[str, Any]]:
    names = ("step", "score", "ppo/kl_k1", "ppo/objective", "ppo/explained_variance")
    return [{name: line.get(name) for name in names} for line in read_json_lines(file)]


def _examples(file: Path) -> list[dict[str, Any]]:
    """The first three held-out prompts, with the first draw of no prompter and of the first trained one."""
    found: dict[str, dict[str, Any]] = {}
    for row in read_json_lines(file):
        first = row["seed"] == row["draw"] == row["answer"] == 0
        if first and row["arm"] in ("none", "trained"):
            of = found.setdefault(row["prompt_id"], {"x": row["x"]})
            of[row["arm"]] = {name: row[name] for name in ("rewrite", "response", "reward")}
    return list(found.values())[:3]


@cache
def _by_seed(file: Path, base: str, seeds: int) -> list[Estimate]:
    """Gain over the arm `base` of each training."""
    rows = [Rollout(**row) for row in read_json_lines(file)]
    found = []
    for seed in range(seeds):
        kept = [r for r in rows if r.arm == base or (r.arm == "trained" and r.seed == seed)]
        found.append(compare(rollouts.collect(kept), [base, "trained"], LEVEL).against["trained"].mean)
    return found


def _foresight(size: Size, out: Path, done: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What was foreseen on training prompts, and what came of it on held-out prompts."""
    for turn, prompter in enumerate(size.prompters):
        for task, reward in size.tasks.items():
            before, after = (out / kind / place(task) / prompter for kind in ("foreseen", "resampled"))
            if not (before / FINISHED).is_file():
                continue
            seen = rewarded(before / FILE, reward)
            width = seen.high - seen.low
            for share in LAMS:
                lam = share * width
                point = {"prompter": prompter, "task": task, "lam": lam, **_foreseen(seen, lam)}
                if (after / FINISHED).is_file():
                    realised = resampled(rewarded(after / FILE, reward), lam)
                    yield point | {"by": "resampling", **_judged(point, realised, width)}
                if turn == 0 and task in done and share == size.lam:
                    file = out / slug(task) / "rollout" / FILE
                    for seed, e in enumerate(_by_seed(file, "none", len(size.seeds))):
                        yield point | {"by": f"PPO, seed {seed}", **_judged(point, e, width)}


def _foreseen(seen: Rollouts, lam: float) -> dict[str, Any]:
    found = headroom(seen, (lam,), LEVEL)
    pooled = found.pooled
    return {
        "decision": found.decision,
        "foreseen": shown(found.at[0].over_none),
        "pooled": None if pooled is None else shown(pooled.over_none),
    }


def resampled(table: Rollouts, lam: float) -> Estimate:
    """Gain over no prompter of drawing among a prompt's rewrites with chances in proportion to e^{R/λ}.

    R is one answer's reward; another answer to the same rewrite values the choice. Every answer has both
    parts in turn.
    """
    sft, none = Arm(table, "sft"), Arm(table, "none")
    (chosen,) = sft.per_prompt(lambda r: crossed(r, lam)[None])
    values = chosen - none.mean(none.reward)
    width = table.high - table.low
    term = Term(
        values, -width, width, frozenset({"sft", "none"}), "none", "choice and value by other answers"
    )
    return estimates({"gain": term}, table, LEVEL)["gain"]


def crossed(rewards: np.ndarray, lam: float) -> np.ndarray:
    """Mean reward [...] of a draw chosen by one answer and valued by the others; `rewards` are [..., draws,
    answers]."""
    answers = rewards.shape[-1]
    weights = np.exp((rewards - rewards.max(-2, keepdims=True)) / lam)
    weights = weights / weights.sum(-2, keepdims=True)
    others = (rewards.sum(-1, keepdims=True) - rewards) / (answers - 1)
    return (weights * others).sum(-2).mean(-1)


def _judged(point: Mapping[str, Any], realised: Estimate, width: float) -> dict[str, Any]:
    """Whether the foreseen interval holds the realised gain, and whether the decision was right."""
    gained = "yes" if realised.lo > 0 else "no" if realised.hi < NEGLIGIBLE * width else "open"
    foreseen = point["foreseen"]
    return {
        "realised": shown(realised),
        # Two intervals of independent prompts: they are apart where no number is in both.
        "covers": foreseen["lo"] <= realised.value <= foreseen["hi"],
        "apart": realised.hi < foreseen["lo"] or realised.lo > foreseen["hi"],
        "gained": gained,
    }


def tally(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How often foresight was right, over points."""
    counts = {
        f"{decision}, {gained}": sum(p["decision"] == decision and p["gained"] == gained for p in points)
        for decision in ("yes", "undecided", "no")
        for gained in ("yes", "open", "no")
    }
    return {
        "points": len(points),
        "covers": sum(p["covers"] for p in points),
        "apart": sum(p["apart"] for p in points),
        "width": float(np.median([p["foreseen"]["hi"] - p["foreseen"]["lo"] for p in points])),
        **counts,
    }
