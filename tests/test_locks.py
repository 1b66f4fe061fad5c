"""Leases: one holder at a time, whoever is killed, whatever the file system locks."""

import errno
import json
import os
import subprocess
import sys

import pytest
from mutants import kills, mutated

from alignpro import locks

RACE = """
import errno, json, os, signal, sys, time
from pathlib import Path
from alignpro import locks
source = Path(locks.__file__).read_text()
how, right, wrong = sys.argv[1:]
assert not right or source.count(right) == 1
exec(compile(source.replace(right, wrong) if right else source, locks.__file__, "exec"), vars(locks))
locks.BEAT_S, locks.STALE_S, locks.UNSAID_S, locks.POLL_S = 0.02, 0.4, 0.4, 0.001
if how != "flock":
    def unsupported(*_):
        raise OSError(getattr(errno, how), "no locks here")
    locks.fcntl.flock = unsupported
folder, look = Path("."), locks._look

def slowly(path):
    found = look(path)
    time.sleep(0.002)  # several have seen that it is free
    return found

locks._look = slowly

def inside():
    # Exclusive by another way: a second one who comes in finds the file there.
    with locks.waited(folder, "x") as held:
        try:
            os.close(os.open("inside", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            os.write(log, b"!")
        if held.number % 4 == 1:
            os.unlink("inside")
            os.kill(os.getpid(), signal.SIGKILL)  # with the lease
        time.sleep(0.002)
        os.unlink("inside")
        os.write(log, b".")

log = os.open("log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
def child():
    pid = os.fork()
    if not pid:
        try:
            for _ in range(2):
                inside()
        finally:
            os._exit(0)
    return pid

pids = [child() for _ in range(6)]
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
with locks.waited(folder, "x") as held:
    out = [codes.count(-9), held.deaths, held.number, open("log").read().count("!")]
files = sorted(p.name for p in folder.iterdir() if p.name.startswith(".x-"))
print(json.dumps([*out, files]))
"""


def race(folder, how, right="", wrong=""):
    run = subprocess.run(
        [sys.executable, "-c", RACE, how, right, wrong],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    killed, deaths, number, twice, files = json.loads(run.stdout)
    assert killed > 1
    assert not twice  # nobody came in while another was
    assert deaths == killed
    assert files == [f".x-{number}"]  # the older ones are tidied away


@pytest.mark.parametrize("how", ["flock", "ENOLCK", "ENOSYS"])
def test_one_holder_at_a_time_though_some_are_killed(tmp_path, how):
    race(tmp_path, how)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("os.O_CREAT | os.O_EXCL | os.O_RDWR", "os.O_CREAT | os.O_RDWR"),
        ("return age(path) > (STALE_S if said else UNSAID_S), said", "return True, said"),
        ('(not before.get("free", False))', "0"),
    ],
)
def test_mutants_of_the_lease(tmp_path, right, wrong):
    """Each loses nearly every race; on a busy machine processes may miss each other, hardly four times."""

    def check(wrong):
        for i in range(4):
            (tmp_path / str(i)).mkdir()
            race(tmp_path / str(i), "ENOLCK", right, wrong)

    kills(check, wrong)


def on_another_machine(module, folder):
    """A lock says nothing of a holder elsewhere: some file systems lock on each machine for itself."""
    folder.mkdir()
    held = folder / ".x-1"
    held.write_text('{"machine": "another", "host": "h", "deaths": 2}')
    with module.lease(folder, "x") as mine:
        assert mine is None
    assert module.holder(folder, "x")["host"] == "h"
    old = held.stat().st_mtime - module.STALE_S - 5
    os.utime(held, (old, old))
    assert module.holder(folder, "x") is None
    with module.lease(folder, "x") as mine:
        assert (mine.number, mine.deaths) == (2, 3)
        assert not mine.lost()
        (folder / ".x-3").touch()
        assert mine.lost()


def test_a_holder_on_another_machine(tmp_path):
    on_another_machine(locks, tmp_path / "right")
    local = mutated(locks, 'here = said.get("machine") == _machine()', "here = True")
    kills(lambda module: on_another_machine(module, tmp_path / "wrong"), local)


def says_nothing(module, folder):
    """Emptied, cut or damaged: its holder may be writing it, and after half a minute is dead."""
    folder.mkdir()
    held = folder / ".x-1"
    for text in (b"", b'{"machine": ', b'{"mach\xffne": 1}', b"[1]", b'{"deaths": 1e}'):
        held.write_bytes(text)
        with module.lease(folder, "x") as mine:
            assert mine is None, text
        old = held.stat().st_mtime - module.UNSAID_S - 5
        os.utime(held, (old, old))
        with module.lease(folder, "x", leave=False) as mine:
            assert mine is not None, text
            assert mine.number == 2, text


def test_a_lease_that_says_nothing_is_soon_free(tmp_path):
    says_nothing(locks, tmp_path / "right")
    long = mutated(locks, "(STALE_S if said else UNSAID_S)", "STALE_S")
    kills(lambda module: says_nothing(module, tmp_path / "wrong"), long)


def test_who_holds_it(tmp_path):
    assert locks.holder(tmp_path / "none", "x") is None
    with locks.lease(tmp_path, "x") as mine:
        assert mine
        assert (mine.number, mine.deaths) == (1, 0)
        assert locks.holder(tmp_path, "x")["process"] == os.getpid()
        with locks.lease(tmp_path, "x") as again, locks.lease(tmp_path, "y") as other:
            assert again is None
            assert other
    assert locks.holder(tmp_path, "x") is None
    with locks.lease(tmp_path, "x") as mine:
        assert (mine.number, mine.deaths) == (2, 0)


def test_what_a_file_system_can_do(tmp_path, monkeypatch):
    assert locks.record_locks(tmp_path)

    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "lockf", unsupported)
    assert not locks.record_locks(tmp_path)
    monkeypatch.setattr(locks, "fcntl", None)
    assert locks.record_locks(tmp_path)
    with locks.lease(tmp_path, "x") as mine, locks.lease(tmp_path, "x") as other:
        assert mine
        assert other is None


def mounted(module, folder):
    lines = [
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
        f"30 22 0:50 / {folder} rw shared:9 - nfs4 server:/home rw,vers=4.2",
        f"31 30 0:51 / {folder}/scratch rw - lustre a@tcp:/scratch rw",
        f"32 30 8:2 / {folder}/disk rw - xfs /dev/sdb rw",
        f"33 30 8:3 / {folder}/with\\040space rw - fuse.sshfs x rw",
    ]
    table = folder / "mountinfo"
    table.write_text("\n".join(lines))
    found = {}
    for name in ("", "scratch/a/b", "disk", "diskette", "with space"):
        found[name] = module.several_machines(folder / name, str(table))
    assert found == {"": True, "scratch/a/b": True, "disk": False, "diskette": True, "with space": True}
    assert not module.several_machines(folder.parent, str(table))
    assert not module.several_machines(folder, str(folder / "none"))


def test_file_systems_that_several_machines_share(tmp_path):
    mounted(locks, tmp_path.resolve())
    shallow = mutated(locks, "len(point.parts) >= found", "len(point.parts) <= max(found, 1)")
    kills(lambda module: mounted(module, tmp_path.resolve()), shallow)
