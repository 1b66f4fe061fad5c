"""Which settings of PPO find the most with equal numbers of answers: λ, learning rate, prompts × rewrites.

    python experiments/ppo_settings.py --out runs/ppo_settings --processes 2
    python experiments/ppo_settings.py --out runs/ppo_settings --summary-only    # of what is finished

From `instructions-sft`, on reading ease and on format (a list or not, which is rare), each setting beside
the others changed alone. Every training asks for 640 answers, and its last prompter is measured on 48
validation prompts, the same for all, with the same keys. Interrupt at any time; the same command goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from paper_grid import launch, work
from paper_grid.plan import Job, chosen

from alignpro.errors import AlignProError
from alignpro.files import read_json_lines, writable_folder, write_json
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


def summarise(out: Path) -> dict[str, Any]:
    """By task and setting: reward and KL of the last prompter, means over seeds with their error."""
    rows = {}
    for task, reward in TASKS.items():
        for place, name in enumerate(SETTINGS):
            homes = [out / reward / f"{place}-seed-{seed}" for seed in SEEDS]
            files = [home / EVALUATIONS_FILE for home in homes if (home / work.FINISHED).is_file()]
            ends = [(lines[0], lines[-1]) for lines in map(read_json_lines, files)]
            if not ends:
                continue
            row: dict[str, Any] = {"seeds": len(ends)}
            for key in ("reward", "kl"):
                values = np.array([last[key] for _, last in ends])
                error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
                row[key] = {"value": float(values.mean()), "error": None if error is None else float(error)}
            row["before"] = float(np.mean([first["reward"] for first, _ in ends]))
            rows[f"{task}, {name}"] = row
    return {"answers": ANSWERS, "environment": environment(), "settings": rows}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| task, setting | seeds | reward before | reward after | KL, nats |", "|---|---|---|---|---|"]
    for name, row in results["settings"].items():
        shown = [
            f"{row[key]['value']:.3f}" + ("" if row[key]["error"] is None else f" ± {row[key]['error']:.3f}")
            for key in ("reward", "kl")
        ]
        lines.append(f"| {name} | {row['seeds']} | {row['before']:.3f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all trainings")
    parser.add_argument("--only", default="", help="trainings whose name holds this: list/0, or seed-1")
    launch.add_arguments(parser)
    parser.add_argument("--summary-only", action="store_true", help="results of what is finished")
    args = parser.parse_args()
    try:
        out = writable_folder(args.out.resolve())
        planned = [job for job in jobs(out) if args.only in job.name]
        if not planned:
            chosen(jobs(out), args.only)
        if args.status:
            print(launch.status(planned, out))
            return 0
        work.check_settings(planned, out)
        todo = [job for job in planned if not work.finished(job, out)]
        if not args.summary_only:
            packages.note(f"{len(todo)} of {len(planned)} trainings to do, of {ANSWERS} answers each")
            command = [str(Path(__file__)), "--out", str(out), "--only", args.only]
            if not launch.do_all(args, command, planned, out):
                return 0
        results = summarise(out)
        write_json(out / "results.json", results)
        print(table(results))
    except AlignProError as error:
        print(f"ppo_settings.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ppo_settings.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
