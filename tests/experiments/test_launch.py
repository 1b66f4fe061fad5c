"""Launchers: workers under a scheduler, others for those that died, what failed and why, the hours left."""

import argparse
import os
import re
import sys
from pathlib import Path

import paper
import pytest
from mutants import kills, mutated
from paper_grid import cost, launch, plan, work
from paper_grid.plan import Job

from alignpro.commands import main
from alignpro.errors import AlignProError

EXPERIMENTS = Path(paper.__file__).parent

JOBS = [
    Job("a", "prompts", {}),
    Job("kills-its-worker-once", "prompts", {}),
    Job("fails", "prompts", {}),
    Job("needs-what-fails", "prompts", {}, ("fails",)),
    Job("b", "prompts", {}, ("a",)),
]

GRID = """
import os, signal, sys
from pathlib import Path
from paper_grid import launch, plan, work
from alignpro.errors import AlignProError
from test_launch import JOBS, arguments

def act(job, out):
    with open(out / job.name / "tries", "a") as file:
        print(repr(os.environ.get("CUDA_VISIBLE_DEVICES")), file=file)
    if job.name == "fails":
        raise AlignProError("--dataset nonesuch: is no data set")
    if job.name == "kills-its-worker-once" and len((out / job.name / "tries").read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)

plan.select_prompts = act
try:
    launch.do_all(arguments(), sys.argv, JOBS, Path(sys.argv[1]))
except AlignProError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""

SBATCH = """#!{python}
import os, re, subprocess, sys
from pathlib import Path
here = Path(__file__).parent
script = Path(sys.argv[-1])
(count,) = [a for a in sys.argv if a.startswith("--array=0-")]
with open(here / "submitted", "a") as file:
    print(count, file=file)
for task in range(int(count.split("-")[-1]) + 1):
    log = re.search("#SBATCH --output=(.*)", script.read_text())[1]
    log = log.replace("%A", "7").replace("%a", str(task))
    told = dict(os.environ, SLURM_JOB_GPUS="3,4")
    told.pop("CUDA_VISIBLE_DEVICES", None)
    with open(log, "ab") as file:
        child = subprocess.Popen(["bash", script], env=told, stdout=file, stderr=file, start_new_session=True)
    with open(here / "pids", "a") as file:
        print(child.pid, file=file)
print("7")
"""

SQUEUE = """#!{python}
import sys
from pathlib import Path
here = Path(__file__).parent
assert any(a.startswith("--name=grid-") for a in sys.argv)
for pid in (here / "pids").read_text().split() if (here / "pids").exists() else ():
    try:
        if Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            print("RUNNING")
    except OSError:
        pass
"""


def arguments(*given):
    parser = argparse.ArgumentParser()
    launch.add_arguments(parser)
    return parser.parse_args(given)


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """A grid's command, and its folder."""
    (tmp_path / "grid.py").write_text(GRID)
    here = Path(__file__).parent
    folders = [EXPERIMENTS, here, here.parent, *sys.path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launch, "WAIT_S", dict.fromkeys(launch.WAIT_S, 0.1))
    out = tmp_path / "out"
    out.mkdir()
    return [str(tmp_path / "grid.py"), str(out)], out


def all_done(command, out, *launching):
    with pytest.raises(AlignProError) as error:
        launch.do_all(arguments(*launching), command, JOBS, out)
    assert str(error.value) == (
        "fails: --dataset nonesuch: is no data set; run the same command again once that is mended"
    )
    tries = {
        job.name: len((out / job.name / "tries").read_text().split()) for job in JOBS if job.name[0] != "n"
    }
    assert tries == {"a": 1, "kills-its-worker-once": 2, "fails": 1, "b": 1}
    assert not (out / "needs-what-fails").exists()
    said = launch.status(JOBS, out)
    assert "jobs: 3 done, 1 failed, 1 waiting for one that failed; 5 in all" in said
    assert "failed: fails: --dataset nonesuch: is no data set" in said


def test_slurm(grid, tmp_path, monkeypatch):
    """sbatch and squeue are stand-ins; the worker of one job dies, and another is started for it."""
    command, out = grid
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text.format(python=sys.executable))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    options = "--partition=gpu --time=1:00:00"
    all_done(command, out, "--launch", "slurm", "--processes", "1", "--sbatch", options)
    script = (out / "worker.sh").read_text()
    for line in ("--gres=gpu:1", "--requeue", "--partition=gpu", "--time=1:00:00"):
        assert f"#SBATCH {line}\n" in script
    assert (programs / "submitted").read_text().split() == ["--array=0-0"] * 2
    assert (out / "a" / "tries").read_text() == "'3'\n"  # the first of the task's GPUs


def test_a_script_for_where_slurm_is(grid, monkeypatch, capsys):
    command, out = grid
    monkeypatch.setenv("PATH", str(out))
    assert not launch.do_all(arguments("--launch", "slurm", "--processes", "4"), command, JOBS, out)
    assert f"sbatch --array=0-3 {out / 'worker.sh'}" in capsys.readouterr().out
    for options in ("--gpus-per-task=2", "--gres=gpu:a100:1", "--no-gpu"):
        text = launch.job_script(command, out, "n", options)
        assert "--gres=gpu:1\n" not in text
        assert ("--no-gpu" in text) is False
    assert launch.job_script(command, out, "n", "").endswith(f"exec {sys.executable} {command[0]} {out}\n")


def test_local(grid):
    command, out = grid
    all_done(command, out, "--launch", "local", "--processes", "2")


def test_ray(grid):
    pytest.importorskip("ray", reason="an optional extra: pip install ray")
    command, out = grid
    all_done(command, out, "--launch", "ray", "--processes", "1")


class Instant:
    """Workers that do one job at once, or die at it."""

    def __init__(self, out, deaths):
        self.out, self.deaths, self.started = out, deaths, 0

    def alive(self):
        return 0

    def start(self, count):
        for job in work.ready(JOBS[:2], self.out)[:count]:
            self.started += 1
            assert self.started < 20
            if self.started not in self.deaths:
                (self.out / job.name).mkdir(parents=True)
                (self.out / job.name / work.FINISHED).write_text('{"seconds": 1}')


def check_restarts(module, folder):
    pool, useless = Instant(folder, {1, 2}), Instant(folder / "other", range(100))
    try:
        module.keep_running(pool, 2, JOBS[:2], folder, 0.0)
    except AlignProError as error:
        raise AssertionError from error
    assert pool.started == 4
    with pytest.raises(AlignProError, match="workers end without doing a job"):
        module.keep_running(useless, 2, JOBS[:2], folder / "other", 0.0)
    assert useless.started == 6


def test_those_that_died_are_started_again_but_not_for_ever(tmp_path):
    check_restarts(launch, tmp_path / "right")
    for i, (right, wrong) in enumerate(
        [
            ("                pool.start(more)", "                started > more or pool.start(more)"),
            ("if started > 2 * workers:", "if False:"),
        ]
    ):
        kills(lambda module, i=i: check_restarts(module, tmp_path / str(i)), mutated(launch, right, wrong))


def test_the_hours_left_are_judged_by_what_is_done(tmp_path):
    """Twice what was thought, so that the rest is too: 2 × (1 + 1 + 1 + 1) hours, one of them under way."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / work.FINISHED).write_text('{"seconds": 7200}')
    with work.claim(tmp_path / "b"):
        cells = {"one": JOBS[:1], "two": JOBS[:2], "three": [JOBS[4]]}
        said = launch.status(JOBS, tmp_path, lambda _: 3600.0, cells)
    assert "cells: 1 done, 1 running, 1 waiting; 3 in all" in said
    assert "running: b on " in said
    assert "hours left: 8.0 of one worker, 8.0 with the 1 that run (judged by the 1 " in said


def outcome(module, job, out):
    """Whether the job was tried, or why not."""
    did = []
    try:
        module.work([job], out, lambda job, out: did.append(job))
    except AlignProError as error:
        return str(error)
    return did == [job]


def check_given_up(module, out):
    job = Job("x", "prompts", {})
    (out / "x").mkdir(parents=True)
    (out / "x" / ".claim-3").write_text('{"machine": "gone", "deaths": 2}')
    os.utime(out / "x" / ".claim-3", (0, 0))
    assert "x: 3 workers died at it without a word" in str(outcome(module, job, out))
    module.again([job], out)  # the user's wish
    assert outcome(module, job, out) is True


def test_a_job_that_kills_its_workers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setenv(work.WORKER, "60")
    check_given_up(work, tmp_path / "right")
    for i, (right, wrong) in enumerate(
        [("held.deaths - before", "0 * held.deaths - before"), ('- before["deaths"] >=', ">=")]
    ):
        kills(lambda module, i=i: check_given_up(module, tmp_path / str(i)), mutated(work, right, wrong))


def test_a_bug_is_on_file_too(tmp_path):
    job = Job("x", "prompts", {})
    with pytest.raises(ZeroDivisionError):
        work.work([job], tmp_path, lambda job, out: 1 // 0)
    assert "ZeroDivisionError" in work.failure(job, tmp_path)
    with pytest.raises(AlignProError, match="x: ZeroDivisionError"):  # left alone, and told
        work.work([job], tmp_path, lambda job, out: pytest.fail("tried again"))


def test_the_preset_of_the_page(tmp_path):
    """A frozen model at an address has no oracle, one ledger, and options that the verbs take."""
    page = (EXPERIMENTS.parent / "docs" / "howto" / "cluster.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(text)
    preset = plan.load(str(tmp_path / "mine.yaml"))
    assert "rlhf" not in {cell.configuration for cell in plan.cells(preset)}
    assert set(cost.models(preset)) == {"Qwen/Qwen2.5-1.5B-Instruct", "weqweasdas/RM-Gemma-2B"}
    jobs = plan.jobs(preset)
    assert {job.name.split("/")[-1] for job in jobs} == {
        "ultrafeedback",
        *(f"align-pro-{seed}" for seed in preset.seeds),
        "rloo-0",
        "rollout",
    }
    for job in [jobs[1], jobs[-1]]:
        parsed = main._parse([job.verb, "--config", str(plan.write_config(job, tmp_path))])
        assert parsed.environment.answers_folder == str(tmp_path / "answers")
        assert parsed.environment.target_endpoint.max_calls == 500_000
        assert cost.of_job(job, preset).memory < cost.MACHINES["h100"].memory


def test_mistakes():
    for given, words in (
        (["--processes", "0"], "give at least 1"),
        (["--sbatch=--time=1"], "is for --launch slurm"),
    ):
        with pytest.raises(AlignProError, match=words):
            launch.check(arguments(*given))
