"""The paper's experiments: prompters × frozen models × data sets × {no fine-tuning, Align-Pro, RLHF}.

    python experiments/paper.py --preset small --out runs/small --processes 2   # an hour on two CPU cores
    python experiments/paper.py --preset paper --dry-run                        # what it would take
    python experiments/paper.py --preset paper --rehearse --out runs/paper      # measured, on random weights
    python experiments/paper.py --preset paper --out runs/paper                 # hub models, one large GPU
    python experiments/paper.py --preset paper --out runs/paper --launch slurm  # or ray, local: workers
    python experiments/paper.py --preset paper --out runs/paper --status        # done, running, failed; hours

Interrupt at any time; the same command goes on, and finished jobs are not done again. Several processes, on
one machine or many, may work on one folder: by --launch, or start the same command in each. Each job's
options are in its folder, for `alignpro <verb> --config`.
"""

import argparse
import sys
from pathlib import Path

from paper_grid import cost, launch, plan, rehearse, work
from paper_grid import page as grid_page

from alignpro.errors import AlignProError
from alignpro.files import writable_folder, write_json
from alignpro.llm.models import packages
from alignpro.report import keep


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", required=True, help="small, paper, or a YAML file like experiments/paper_grid/presets"
    )
    parser.add_argument("--out", type=Path, help="folder of the grid")
    parser.add_argument(
        "--dry-run", action="store_true", help="print every cell and what it costs; check the hub"
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="run one round of each kind of job on random weights of the models' configurations, without a "
        "hub, and write what it took to rehearsal.json in --out, from which --dry-run then reckons",
    )
    parser.add_argument(
        "--scale", default="real", help="of a rehearsal: real, or tiny (small widths and lengths, for a test)"
    )
    parser.add_argument("--only", default="", help="jobs whose name holds this, and what they need")
    launch.add_arguments(parser)
    parser.add_argument("--summary-only", action="store_true", help="results of what is finished")
    parser.add_argument("--publish", type=Path, help="copy results, figures and tables into this folder")
    args = parser.parse_args(arguments)
    return launch.ended("paper.py", lambda: _run(args))


def _run(args) -> int:
    launch.check(args)
    preset = plan.load(args.preset)
    cost.machine_of(preset)
    jobs = plan.chosen(plan.jobs(preset), args.only)
    plan.check(jobs)
    if args.dry_run:
        return _dry_run(preset, jobs, args.out)
    if args.out is None:
        raise AlignProError("--out: name the grid's folder (or give --dry-run)")
    out = writable_folder(args.out)
    if args.rehearse:
        record = rehearse.rehearse(preset, writable_folder(out / "rehearsal"), args.scale, args.only)
        write_json(out / rehearse.FILE, record)
        print(rehearse.table(record))
        print(f"wrote {out / rehearse.FILE}")
        return int(any("failed" in row for row in record["jobs"].values()))
    if args.status:
        return _status(preset, jobs, out)
    work.check_settings(jobs, out)
    todo = [job for job in jobs if not work.finished(job, out)]
    if todo and not args.summary_only:
        hours = sum((cost.of_job(job, preset) for job in todo), cost.Cost()).seconds / 3600
        machine = cost.machine_of(preset).words
        packages.note(f"{len(todo)} of {len(jobs)} jobs to do, about {hours:.1f} hours of {machine}")
        if problems := cost.reachable(preset):
            raise AlignProError(problems[0])
        command = [str(Path(__file__)), "--preset", args.preset, "--out", str(out), "--only", args.only]
        if not launch.do_all(args, command, jobs, out):
            return 0
    if args.only and not args.summary_only:
        return 0
    with work.claim(out) as mine:
        if mine:
            _summarise(preset, jobs, out, args.publish)
    return 0


def _status(preset, jobs, out) -> int:
    rows = rehearse.load(out, preset)

    def seconds(job) -> float:
        return rehearse.measured(job, cost.of_job(job, preset), rows).seconds

    names = {job.name for job in jobs}
    cells = {str(cell): plan.jobs_of(preset, cell) for cell in plan.cells(preset)}
    cells = {cell: of for cell, of in cells.items() if names.issuperset(job.name for job in of)}
    print(launch.status(jobs, out, seconds, cells))
    return 0


def _summarise(preset, jobs, out, publish) -> None:
    from paper_grid import figures, summary

    results = summary.summarise(preset, out)
    write_json(out / "results.json", results)
    write_json(out / "times.json", work.times(jobs, out))
    written = figures.write(results, out)
    if page := keep.keep(grid_page.report_of_grid(results), out / "results.html"):
        written.append(page)
    print(summary.table(results))
    print(f"wrote {out / 'results.json'}, {', '.join(path.name for path in written)}")
    if publish is not None:
        for path in (out / "results.json", out / "times.json", *written):
            target = writable_folder(publish, "--publish") / path.name
            target.write_bytes(path.read_bytes())


def _whence(jobs, rows, machine) -> str:
    """What hours and memory rest on."""
    known = [job for job in jobs if job.verb != "prompts"]
    ours = [rows[rehearse.kind_of(job)] for job in known if rehearse.kind_of(job) in rows]
    if not ours:
        return "Estimated, not measured; --rehearse measures."
    share = "."
    if len(ours) < len(known):
        share = f" for {len(ours)} of {len(known)} jobs, the rest estimated."
    return f"Measured by rehearsal on {ours[0]['device']}{share}"


def _dry_run(preset, jobs, out) -> int:
    machine, rows = cost.machine_of(preset), rehearse.load(out, preset)
    print(f"{preset.name}: {len(plan.cells(preset))} cells, {len(jobs)} jobs, on {machine.words}\n")
    for name, role in cost.models(preset).items():
        size = cost.size(name)
        print(f"  {role:<17} {name}  {size.parameters / 1e9:.3g}B parameters")
    for name, options in preset.datasets.items():
        print(f"  {'prompts':<17} {name}: {options['dataset']}")
    print(f"\n{'job':<66} {'memory':>7} {'tokens':>12} {'hours':>7}")
    total = cost.Cost()
    for job in jobs:
        each = rehearse.measured(job, cost.of_job(job, preset), rows)
        total += each
        if job.verb != "prompts":
            tokens = f"{(each.generated + each.read + each.trained) / 1e6:.2f}M"
            print(f"{job.name:<66} {each.memory / 1e9:>5.1f}GB {tokens:>12} {each.seconds / 3600:>7.2f}")
    print(f"\n{'cell':<66} jobs")
    names = {job.name for job in jobs}
    for cell in plan.cells(preset):
        own = [job.name for job in plan.jobs_of(preset, cell) if job.name in names]
        print(f"{cell!s:<66} {len(own)}")
    print(
        f"\nin all: {total.generated / 1e6:.1f}M tokens written, {total.read / 1e6:.1f}M read, "
        f"{total.trained / 1e6:.1f}M trained on; {total.seconds / 3600:.1f} hours of {machine.words}, "
        f"at most {total.memory / 1e9:.0f} of {machine.memory / 1e9:.0f} GB at once. "
        + _whence(jobs, rows, machine)
    )
    for name, why in rehearse.failures(jobs, rows).items():
        raise AlignProError(f"{name}: its rehearsal failed ({why}); lower prompts, or raise microbatches")
    if total.memory > machine.memory:
        raise AlignProError(
            f"machine {preset.machine}: {total.memory / 1e9:.0f} GB do not fit; lower batch_size, or raise "
            "microbatches or set gradient_checkpointing"
        )
    if preset.judge is None:
        print("No judge is named, so there will be no win rates; experiments/README.md says how to name one.")
    problems = cost.reachable(preset)
    for problem in problems[1:]:
        print(f"paper.py: {problem}", file=sys.stderr)
    if problems:
        raise AlignProError(f"{problems[0]}; with that, run the same command again")
    print("Every model and data set can be had from here.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
