"""Which settings of PPO find the most with equal numbers of answers: λ, learning rate, prompts × rewrites.

    python experiments/ppo_settings.py --out runs/ppo_settings --processes 2
    python experiments/ppo_settings.py --out runs/ppo_settings --summary-only    # of what is finished

From `instructions-sft`, on reading ease and on format (a list or not, which is rare), each setting beside
the others changed alone. Every training asks for 640 answers, and its last prompter is measured on 48
validation prompts, the same for all, with the same keys. Interrupt at any time; the same command goes on,
and another machine does with `--known results.json` what is not in that file.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paper_grid import launch, work
from paper_grid.plan import Job, chosen

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines, writable_folder, write_json
from alignpro.llm.models import packages
from alignpro.llm.training.evaluation import EVALUATIONS_FILE
from alignpro.runs import environment

TASKS = {"reading ease": "ease", "format": "list"}
SEEDS = (0, 1, 2)
ANSWERS = 640
"""As many as `tasks.py` spends on a training."""
CENTRE: dict[str, Any] = {
    "lam": 0.02,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "prompts": 8,
    "samples": 4,
    "epochs": 2,
    "minibatches": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "centre": {},
    "λ 0.01": {"lam": 0.01},
    "λ 0.05": {"lam": 0.05},
    "learning rate 5e-4": {"learning_rate": 5e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "learning rate falling from 1e-3": {"schedule": "cosine_with_min_lr"},
    "8 × 8, half the rounds": {"samples": 8},
    "16 × 2": {"prompts": 16, "samples": 2},
    "4 epochs": {"epochs": 4},
    "critic 3e-4": {"critic_learning_rate": 3e-4},
    "group baseline": {"group_baseline": True},
    "group baseline, 8 × 8, half the rounds": {"group_baseline": True, "samples": 8},
    "RLOO, without a critic": {"algorithm": "rloo"},
    "learning rate 2e-3, group baseline": {"learning_rate": 2e-3, "group_baseline": True},
    "learning rate 2e-3, 16 × 2": {"learning_rate": 2e-3, "prompts": 16, "samples": 2},
    "32 × 1": {"prompts": 32, "samples": 1},
}
"""By name: what differs from `CENTRE`."""


@dataclass
class Training:
    """What one training found."""

    options: dict[str, Any]
    before: float
    reward: float
    kl: float
    environment: dict[str, Any]


@dataclass
class Known:
    """The content of results.json."""

    answers: int
    trainings: dict[str, Training]
    settings: dict[str, Any]


def jobs(out: Path) -> list[Job]:
    """Every training, all settings of a seed before the next seed."""
    found = []
    for seed in SEEDS:
        for reward in TASKS.values():
            for place, changed in enumerate(SETTINGS.values()):
                options = CENTRE | changed
                rounds = ANSWERS // (options["prompts"] * options["samples"])
                options |= {
                    "prompter": "instructions-sft",
                    "reward": reward,
                    "iterations": rounds,
                    "max_tokens": 16,
                    "answer_tokens": 40,
                    "lora_layers": 0.34,
                    "policy_dtype": "auto",
                    "dtype": "auto",
                    "eval_every": rounds,
                    "eval_prompts": 48,
                    "eval_draws": 2,
                    "eval_proposals": 1,
                    "answers_folder": str(out / "answers"),
                    "resume": True,
                    "seed": seed,
                }
                found.append(Job(f"{reward}/{place}-seed-{seed}", "train", options))
    return found


def varied(job: Job) -> dict[str, Any]:
    """The options of a training that the sweep varies."""
    names = {*CENTRE}.union(*SETTINGS.values())
    return {name: value for name, value in job.options.items() if name in names}


def trainings(out: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What each finished training found, in `out` or elsewhere: its reward before, after, and KL."""
    found = dict(known)
    for job in jobs(out):
        if work.finished(job, out):
            lines = read_json_lines(out / job.name / EVALUATIONS_FILE)
            first, last = lines[0], lines[-1]
            found[job.name] = {
                "options": varied(job),
                "before": first["reward"],
                "reward": last["reward"],
                "kl": last["kl"],
                "environment": environment(),
            }
    return found


def read_known(path: Path | None) -> dict[str, Any]:
    """The trainings in another run's results.json, of the same settings.

    Raises:
        AlignProError: they are of other settings, or of another number of answers.
    """
    if path is None:
        return {}
    results = typed.made(Known, read_json(path), f"--known {path}")
    if results.answers != ANSWERS:
        raise AlignProError(f"--known {path}: of {results.answers} answers each, not {ANSWERS}")
    options = {job.name: varied(job) for job in jobs(Path())}
    for name, one in results.trainings.items():
        if one.options != options.get(name):
            raise AlignProError(f"--known {path}: {name} has other settings here; leave that file out")
    return {name: vars(one) for name, one in results.trainings.items()}


def summarise(found: Mapping[str, Any]) -> dict[str, Any]:
    """By task and setting: the last prompter's reward and KL, and its reward over the centre's, seed by seed.

    Means over seeds with their standard error, None of one seed.
    """
    rows = {}
    for task, reward in TASKS.items():
        for place, name in enumerate(SETTINGS):
            mine = {seed: found.get(f"{reward}/{place}-seed-{seed}") for seed in SEEDS}
            some = {seed: one for seed, one in mine.items() if one}
            if not some:
                continue
            centre = {seed: found.get(f"{reward}/0-seed-{seed}") for seed in some}
            over = [one["reward"] - centre[seed]["reward"] for seed, one in some.items() if centre[seed]]
            rows[f"{task}, {name}"] = {
                "seeds": len(some),
                "before": float(np.mean([one["before"] for one in some.values()])),
                **{key: mean([one[key] for one in some.values()]) for key in ("reward", "kl")},
                "over the centre": mean(over) if over and place else None,
            }
    return {"answers": ANSWERS, "trainings": found, "settings": rows}


def mean(values: Sequence[float]) -> dict[str, float | None]:
    """Their mean and its standard error."""
    error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(np.mean(values)), "error": error}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    keys = ("reward", "over the centre", "kl")
    lines = ["| task, setting | seeds | reward before | reward after | over the centre | KL, nats |"]
    lines.append("|---" * 6 + "|")
    for name, row in results["settings"].items():
        shown = []
        for key in keys:
            one = row[key]
            sign = "+" if key == "over the centre" else ""
            error = "" if one is None or one["error"] is None else f" ± {one['error']:.3f}"
            shown.append("" if one is None else f"{one['value']:{sign}.3f}{error}")
        lines.append(f"| {name} | {row['seeds']} | {row['before']:.3f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all trainings")
    parser.add_argument("--only", default="", help="trainings whose name holds this: list/0-, or seed-1")
    parser.add_argument("--known", type=Path, help="results.json of trainings that need not be done again")
    launch.add_arguments(parser)
    parser.add_argument("--summary-only", action="store_true", help="results of what is finished")
    args = parser.parse_args()
    return launch.ended("ppo_settings.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Do what is not done, and write the results."""
    out = writable_folder(args.out.resolve())
    known = read_known(args.known)
    if not any(args.only in job.name for job in jobs(out)):
        chosen(jobs(out), args.only)  # which says what there is
    planned = [job for job in jobs(out) if args.only in job.name and job.name not in known]
    if args.status:
        print(launch.status(planned, out))
        return 0
    work.check_settings(planned, out)
    todo = [job for job in planned if not work.finished(job, out)]
    if not args.summary_only:
        packages.note(f"{len(todo)} of {len(planned)} trainings to do, of {ANSWERS} answers each")
        command = [str(Path(__file__)), "--out", str(out), "--only", args.only]
        command += [] if args.known is None else ["--known", str(args.known.resolve())]
        if not launch.do_all(args, command, planned, out):
            return 0
    results = summarise(trainings(out, known))
    write_json(out / "results.json", results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
