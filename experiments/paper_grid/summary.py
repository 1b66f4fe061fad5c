"""What the finished jobs say: means, variances, win rates, Theorem 1, and a verdict on each of the paper's
claims.

Everything is computed from the files of the jobs, so a grid that was interrupted gives the same results as
one that was not; clocks are kept apart. Intervals are over held-out prompts, with all seeds of a prompt
together.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignpro import rollouts
from alignpro.errors import AlignProError
from alignpro.estimation import winrate
from alignpro.estimation.compare import compare
from alignpro.estimation.estimate import estimate
from alignpro.estimation.intervals import LEAST_PROMPTS, Estimate
from alignpro.estimation.paired import Arm, Term, estimates
from alignpro.files import read_json, read_json_lines
from alignpro.llm.arms.judge import FILE as JUDGEMENTS
from alignpro.llm.arms.rollout import FILE as ROLLOUTS
from alignpro.llm.targets.ledger import spent
from alignpro.llm.training.open_ended import METRICS_FILE
from alignpro.runs import environment
from paper_grid import plan
from paper_grid.plan import Preset
from paper_grid.work import FINISHED

LEVEL = 0.95
PAPER_TABLE_1 = {
    ("Phi-3.5-Instruct", "Llama-3.1-8B-Instruct"): ((60, 24), (46, 37), (63, 26)),
    ("Qwen-2.5-1.5B-Instruct", "Llama-3.1-8B-Instruct"): ((65, 23), (67, 23), (63, 30)),
    ("Phi-3.5-Instruct", "Qwen-2.5-7B-Instruct"): ((59, 27), (58, 27), (46, 46)),
    ("Qwen-2.5-1.5B-Instruct", "Qwen-2.5-7B-Instruct"): ((56, 30), (59, 25), (59, 27)),
}
"""Percent of 100 samples that Align-Pro won : lost against no fine-tuning on the three data sets."""
PAPER_DATASETS = ("UltraFeedback", "HelpSteer", "Orca")

Interval = dict[str, Any]


def summarise(preset: Preset, out: Path) -> dict[str, Any]:
    """results.json. What is not finished is left out, and named in "missing"."""
    found, missing = [], []
    for frozen in preset.frozen:
        for prompter in preset.prompters:
            for dataset in preset.datasets:
                here = out / plan.combination(prompter, frozen, dataset)
                if not (here / "rollout" / FINISHED).is_file():
                    missing.append(f"{prompter}, {frozen}, {dataset}: not rolled out yet")
                    continue
                names = {"prompter": prompter, "frozen": frozen, "dataset": dataset}
                found.append(
                    names | _combination(preset, here, out / "prompts" / plan.slug(dataset), missing)
                )
    return {
        "preset": json.loads(json.dumps(asdict(preset))),
        "environment": {**environment(), "git": _commit()},
        "level": LEVEL,
        "combinations": found,
        "claims": [_claim(claim, found) for claim in CLAIMS],
        "calls": _calls(preset, out),
        "missing": missing,
    }


def _commit() -> str | None:
    """The code's commit, with a plus where it was changed since."""
    here = Path(__file__).parent
    try:
        run = [["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain", "--", "../../alignpro", ".."]]
        said = [
            subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in run
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + "+" * bool(said[1])


def shown(e: Estimate | None) -> Interval | None:
    """Value, ends and number of prompts of an estimate, as they go on file."""
    return None if e is None else {"value": e.value, "lo": e.lo, "hi": e.hi, "prompts": e.n_clusters}


def minus(e: Estimate) -> Interval:
    """The estimate of the opposite difference."""
    return {"value": -e.value, "lo": -e.hi, "hi": -e.lo, "prompts": e.n_clusters}


def _combination(preset: Preset, here: Path, data: Path, missing: list[str]) -> dict[str, Any]:
    file = here / "rollout" / ROLLOUTS
    table = rollouts.read(file)
    lam = float(preset.align_pro["lam"])
    beta = float(preset.rlhf.get("lam", lam))
    arms = [
        arm for arm in ("none", "sft", "trained", "rlhf", "star", "best_of_n", "rloo") if arm in table.arms
    ]
    every = compare(table, arms, LEVEL)
    baselines = [arm for arm in ("sft", "star", "best_of_n", "rloo") if arm in arms]
    others = compare(table, ["trained", *baselines], LEVEL).against
    report = estimate(table, beta, lam, LEVEL)
    found: dict[str, Any] = {
        "prompts": read_json(data / "counts.json"),
        "reward": {"model": table.reward_model, "low": table.low, "high": table.high},
        "mean": {arm: shown(every.mean[arm]) for arm in arms},
        "variance": {arm: shown(every.variance[arm]) for arm in arms},
        "contrasts": _contrasts(table, LEVEL),
        "corrected": _contrasts(table, _corrected(preset)),
        "baselines": {arm: minus(others[arm].mean) for arm in baselines},
        "wins_by_reward": shown(compare(table, ["none", "trained"], LEVEL).against["trained"].win_rate),
        "theorem1": [
            {
                "name": bound.name,
                "about": bound.prompter,
                "gap": shown(bound.gap),
                "rhs": shown(bound.rhs),
                "slack": shown(bound.slack),
                "verdict": bound.verdict,
                "vacuous": bound.vacuous,
                "why": bound.why,
            }
            for bound in report.bounds
            if bound.name in ("theorem1", "trained", "trained_rewards_only")
            and bound.prompter in ("rho*", "star", "trained")
        ],
        "transfer": {},
        "win_rate": None,
        "examples": _examples(file),
    }
    for name in dict.fromkeys((*preset.frozen, *preset.unseen)):
        path = here / "transfer" / plan.slug(name) / ROLLOUTS
        if path.is_file():
            moved = rollouts.read(path)
            of = compare(moved, ["none", "sft", "trained"], LEVEL)
            against_sft = compare(moved, ["sft", "trained"], LEVEL).against["trained"].mean
            found["transfer"][name] = {
                "mean": {arm: shown(e) for arm, e in of.mean.items()},
                "trained - none": shown(of.against["trained"].mean),
                "trained - sft": shown(against_sft),
            }
    judged = here / "judge" / JUDGEMENTS
    if judged.is_file():
        verdicts = winrate.read(judged)
        rates = winrate.win_rates(verdicts, LEVEL)
        found["win_rate"] = {
            "judge": rates.judge,
            **{name: getattr(rates, name) for name in ("pairs", "wins", "ties", "losses", "failed", "kappa")},
            "failures": dict(rates.failures),
            **{
                name: shown(getattr(rates, name))
                for name in ("win_rate", "length_controlled", "agreement", "first_shown")
            },
        }
        corrected = winrate.win_rates(verdicts, _corrected(preset))
        found["contrasts"]["win_rate"] = [_above_half(rates.win_rate)]
        found["corrected"]["win_rate"] = [_above_half(corrected.win_rate)]
    elif preset.judge is not None:
        missing.append(f"{here.relative_to(here.parents[2])}: not judged yet")
    return found


def _corrected(preset: Preset) -> float:
    """Bonferroni's level, for all combinations at once."""
    return 1 - (1 - LEVEL) / (len(preset.prompters) * len(preset.frozen) * len(preset.datasets))


def _above_half(e: Estimate | None) -> Interval | None:
    if e is None:
        return None
    return {"value": e.value - 0.5, "lo": e.lo - 0.5, "hi": e.hi - 0.5, "prompts": e.n_clusters}


def _contrasts(table: rollouts.Rollouts, level: float) -> dict[str, list[Interval | None]]:
    """By claim: what the claim says is positive, all parts of a claim jointly."""
    if len(table.prompt_ids) < LEAST_PROMPTS:
        return {}
    above_none = {"mean_above": [minus(compare(table, ["trained", "none"], level).against["none"].mean)]}
    if "rlhf" not in table.arms:  # the frozen model's weights are out of reach
        return above_none
    against = compare(table, ["trained", "none", "rlhf"], level).against
    mean = {name: Arm(table, name).mean(Arm(table, name).reward) for name in ("none", "trained", "rlhf")}
    halfway = Term(
        mean["trained"] - 0.5 * (mean["none"] + mean["rlhf"]),
        table.low - table.high,
        table.high - table.low,
        frozenset(mean),
        "none",
        "per-prompt values",
    )
    above = compare(table, ["none", "rlhf"], level).against["rlhf"].mean
    return {
        **above_none,
        "near_oracle": [shown(estimates({"near": halfway}, table, level)["near"]), shown(above)],
        "oracle_above": [shown(compare(table, ["trained", "rlhf"], level).against["rlhf"].mean)],
        "lowest_variance": [shown(against[name].variance) for name in ("none", "rlhf")],
    }


# --- claims ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One of the paper's, and which contrast is positive where it is true."""

    name: str
    words: str
    where: str


CLAIMS = (
    Claim("mean_above", "Align-Pro's mean reward is above no fine-tuning's", "Figure 2"),
    Claim("near_oracle", "it is nearer to RLHF's than to no fine-tuning's, and RLHF's is above", "Figure 2"),
    Claim("oracle_above", "RLHF's mean reward is above Align-Pro's", "Figure 2"),
    Claim(
        "lowest_variance",
        "Align-Pro's rewards vary less than no fine-tuning's, and less than RLHF's",
        "Figure 3",
    ),
    Claim("win_rate", "a judge prefers Align-Pro's answers to no fine-tuning's", "Table 1"),
    Claim("theorem1", "the gap to the RLHF optimum is within Theorem 1", "Theorem 1"),
)


def verdict(parts: Sequence[Interval | None], corrected: Sequence[Interval | None] | None = None) -> str:
    """reproduced: every part is above 0 with its whole interval; not reproduced: some part is below it,
    with its whole `corrected` interval; undecided otherwise."""
    if not parts or any(part is None for part in parts):
        return "undecided"
    if all(part["lo"] > 0 for part in parts if part):
        return "reproduced"
    wrong = any(part is not None and part["hi"] < 0 for part in (parts if corrected is None else corrected))
    return "not reproduced" if wrong else "undecided"


_OF_BOUND = {"holds": "reproduced", "violated": "not reproduced"}


def _claim(claim: Claim, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """In each combination, and in all: the paper claims each everywhere, so it is reproduced if it is so in
    every one, and not if it is not so in some one, at a level that is right for all of them at once
    (Bonferroni)."""
    cells, wrong = [], False
    for each in found:
        if claim.name == "theorem1":
            of = [b for b in each["theorem1"] if b["about"] == "trained" and b["name"] == "trained"]
            said = _OF_BOUND.get(of[0]["verdict"], "undecided") if of else "undecided"
            parts = [of[0]["slack"]] if of else []
            wrong |= said == "not reproduced"
        else:
            parts = each["contrasts"].get(claim.name, [])
            said = verdict(parts)
            wrong |= verdict(parts, each["corrected"].get(claim.name, [])) == "not reproduced"
        names = {name: each[name] for name in ("prompter", "frozen", "dataset")}
        cells.append(names | {"positive": parts, "verdict": said})
    all_so = bool(cells) and all(cell["verdict"] == "reproduced" for cell in cells)
    overall = "reproduced" if all_so else "not reproduced" if wrong else "undecided"
    return {
        "name": claim.name,
        "claim": claim.words,
        "where": claim.where,
        "verdict": overall,
        "cells": cells,
    }


# --- examples and calls -----------------------------------------------------------------------------------


def _examples(file: Path) -> list[dict[str, Any]]:
    """The first prompt, and those where training gained and lost the most on average over all seeds, so
    that no one picks; of each the first draws."""
    rows = read_json_lines(file)
    rewards: dict[str, dict[str, list[float]]] = {}
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        rewards.setdefault(row["prompt_id"], {}).setdefault(row["arm"], []).append(row["reward"])
        if row["draw"] == row["answer"] == 0 and (row["arm"] not in ("trained", "rlhf") or row["seed"] == 0):
            first.setdefault((row["prompt_id"], row["arm"]), row)
    gain = {p: float(np.mean(of["trained"]) - np.mean(of["none"])) for p, of in rewards.items()}
    order = list(rewards)
    chosen = {"the first prompt": order[0], "the largest gain": max(order, key=lambda p: gain[p])}
    chosen["the largest loss"] = min(order, key=lambda p: gain[p])
    return [
        {
            "why": why,
            "x": first[p, "none"]["x"],
            "gain": gain[p],
            "arms": {
                arm: {name: first[p, arm][name] for name in ("rewrite", "response", "reward")}
                for arm in ("none", "trained", "rlhf")
                if (p, arm) in first
            },
        }
        for why, p in chosen.items()
    ]


_COUNTED = ("jobs", "answers", "prompt_tokens", "tokens")


def _calls(preset: Preset, out: Path) -> dict[str, dict[str, int]]:
    """By kind of job: jobs done, answers of targets that their results rest on, and the tokens of those; what
    a folder holds that jobs share is `shared`."""
    found: dict[str, dict[str, int]] = {}
    folders: dict[Path, str] = {}
    for job in plan.jobs(preset):
        if job.verb == "prompts" or not (out / job.name / FINISHED).is_file():
            continue
        last = [part.split("-")[0] for part in job.name.split("/")]
        kind = "transfer" if "transfer" in last else job.name.split("/")[-1].rstrip("0123456789").rstrip("-")
        row = found.setdefault(kind, dict.fromkeys(_COUNTED, 0))
        row["jobs"] += 1
        if job.options.get("task") == "rlhf":  # its answers are the policy's own samples
            batch = job.options["prompts"] * job.options["samples"]
            lines = read_json_lines(out / job.name / METRICS_FILE)
            row["answers"] += batch * len(lines)
            row["tokens"] += sum(round(batch * x["completions/mean_length"]) for x in lines)
        shared = job.resolved(out).get("answers_folder")
        own = out / job.name / "answers"
        folders[own if shared is None else Path(shared)] = kind if shared is None else "shared"
    for folder, kind in folders.items():
        if folder.is_dir():
            row = found.setdefault(kind, dict.fromkeys(_COUNTED, 0))
            for paid in spent(folder).values():
                for name in _COUNTED[1:]:
                    row[name] += getattr(paid, name)
    return found


def interval(e: Interval | None, digits: int = 3, sign: bool = True) -> str:
    """For reading."""
    if e is None:
        return "–"
    plus = "+" if sign else ""
    return f"{e['value']:{plus}.{digits}f} [{e['lo']:{plus}.{digits}f}, {e['hi']:{plus}.{digits}f}]"


def table(results: Mapping[str, Any]) -> str:
    """The verdicts, as lines of text.

    Raises:
        AlignProError: nothing is finished.
    """
    if not results["combinations"]:
        raise AlignProError("--summary-only: no combination is rolled out yet; run without it")
    lines = []
    for claim in results["claims"]:
        lines.append(f"{claim['verdict']:<15} {claim['claim']} ({claim['where']})")
        for cell in claim["cells"]:
            name = f"{cell['prompter']} before {cell['frozen']}, {cell['dataset']}"
            parts = "; ".join(interval(part) for part in cell["positive"])
            lines.append(f"    {cell['verdict']:<15} {name}: {parts}")
    return "\n".join([*lines, *(f"missing: {what}" for what in results["missing"])])
