"""Tasks for a prompter: what `headroom` foresees, what PPO earns, and what a fixed instruction would.

    python experiments/tasks.py --out runs/tasks --processes 2     # two CPU cores, nothing but packages
    python experiments/tasks.py --out runs/tasks --dry-run         # every job, and what it asks for
    python experiments/tasks.py --out runs/reading --preset reading --processes 2

Reading ease, sentiment, brevity, format, preference (`minilm-bt`), and four tasks that want another answer of
one kind of requests than of the others. Of each: rollouts of the reference prompter, from which `headroom`
says whether to train; a race of instructions; a router, which picks one for the prompt; PPO with three seeds,
RLOO and the RLHF oracle; and all arms on held-out prompts, with equal numbers of answers.

The preset `reading` is four of them, two where one instruction does for all and two where reading the prompt
pays; in these PPO also begins from a prompter that learned what the router picks. Interrupt at any time; the
same command goes on. Each job's options are in its folder, for `alignpro <verb> --config`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paper_grid import launch, work
from task_grid import page, plan, results

from alignpro.errors import AlignProError
from alignpro.files import writable_folder, write_json
from alignpro.llm.models import packages

SECONDS = {"instruct": 0.5, "route": 0.3, "rollout": 1.0, "train": 1.2}
"""Of one core for an answer, by who asks for it: about what it took on two busy cores of an AMD EPYC without
AMX. A rollout scores its answers, and training learns from them."""


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of all jobs")
    presets = plan.presets()
    parser.add_argument("--preset", choices=presets, default="all", help="which tasks, and how large")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help=f"some of: {', '.join(map(repr, plan.TASKS))}"
    )
    parser.add_argument("--only", default="", help="jobs whose name holds this, and what they need")
    launch.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--summary-only", action="store_true", help="results of what is finished")
    parser.add_argument("--publish", type=Path, help="copy the results into this folder")
    args = parser.parse_args(arguments)
    return launch.ended("tasks.py", lambda: run(args, chosen(presets[args.preset], args.tasks)))


def chosen(size: plan.Size, names: Sequence[str] | None) -> plan.Size:
    """Of these tasks alone, in the given order; of all without names."""
    if names is None:
        return size
    for name in names:
        if name not in size.tasks:
            raise AlignProError(f"--tasks {name!r}: choose from {', '.join(map(repr, size.tasks))}")
    return replace(size, tasks={name: size.tasks[name] for name in names})


def seconds(job: plan.Job) -> float:
    """About how long a job keeps one core, at most; of one that asks for no answers, nothing is said."""
    return plan.asks(job) * SECONDS.get(job.verb, 0.0)


def run(args, size: plan.Size) -> int:
    """Do what is not done, and write the results."""
    launch.check(args)
    out = writable_folder(args.out.resolve())
    jobs = work.plan.chosen(plan.jobs(size, out), args.only)
    if args.status:
        print(launch.status(jobs, out, seconds))
        return 0
    work.check_settings(jobs, out)
    if not args.dry_run:
        plan.write_asked(size, out)
    todo = [job for job in jobs if not work.finished(job, out)]
    if args.dry_run:
        print("\n".join(map(plan.words, todo)))
    asked = sum(map(plan.asks, todo))
    hours = sum(map(seconds, todo)) / 3600
    said = f"{len(todo)} of {len(jobs)} jobs to do, at most {asked:,} answers"
    packages.note(f"{said}, about {hours:.1f} hours of a core")
    if args.dry_run:
        return 0
    if todo and not args.summary_only:
        command = [str(Path(__file__)), "--out", str(out), "--only", args.only, "--preset", args.preset]
        command += ["--tasks", *size.tasks] if args.tasks else []
        if not launch.do_all(args, command, jobs, out):
            return 0
    if args.only and not args.summary_only:
        return 0
    with work.claim(out) as mine:
        if mine:
            found = results.summarise(size, out)
            write_json(out / "results.json", found)
            write_json(out / "times.json", work.times(jobs, out))
            written = [out / "results.json", out / "times.json", *page.write(found, out)]
            print(page.means(found), page.gains(found), page.calibration(found), sep="\n\n")
            print("wrote", ", ".join(map(str, written)))
            if args.publish is not None:
                folder = writable_folder(args.publish, "--publish")
                for path in written:
                    (folder / path.name).write_bytes(path.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
