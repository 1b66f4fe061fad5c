"""A run's folder: held by one process, claimed by its first piece of work, compared by content."""

import contextlib
import os
import shutil
import threading

import pytest
from mutants import kills, mutated

from alignpro import files, locks, runs
from alignpro.commands import shared
from alignpro.errors import AlignProError

RECORD = {"target": "m", "settings": {"lam": 0.05}}


def a_failed_start_leaves_nothing(module, folder):
    """Neither its folder, nor what it had not filled yet, nor a claim on another's settings."""
    folder.mkdir()
    place = folder / "a" / "b"
    with contextlib.suppress(KeyError), module.own(place, "train") as run:
        run.begin(RECORD, resume=False)
        (place / "answers").mkdir()
        raise KeyError
    assert [*folder.iterdir()] == []
    place.mkdir(parents=True)
    (place / "mine").touch()
    (place / "empty").mkdir()
    with contextlib.suppress(KeyError), module.own(place, "train") as run:
        run.begin(RECORD)
        (place / "paid").mkdir()
        (place / "paid" / "answer").touch()
        raise KeyError
    assert {path.name for path in place.iterdir()} == {"mine", "empty", "paid"}
    with module.own(place, "train") as run:
        run.begin({"target": "another"}, resume=False, names=("checkpoint-*",))
        module.claim(place / "checkpoint-1")
    assert files.read_json(place / "settings.json")["target"] == "another"


def test_a_failed_start_leaves_nothing(tmp_path):
    a_failed_start_leaves_nothing(runs, tmp_path / "right")
    wrong = mutated(runs, "                if not run.claimed and _first():", "                if False:")
    kills(lambda module: a_failed_start_leaves_nothing(module, tmp_path / "wrong"), wrong)


def test_a_loop_of_links_is_told_of(tmp_path):
    """As a run's folder, and as a file that its work replaces. Mutant: a strict `resolve`, which raises."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    def check(module):
        with module.own(tmp_path / "run", "train") as run:
            run.begin({}, resume=False)
            try:
                module.claim(tmp_path / "loop")
            except (OSError, RuntimeError):
                raise AssertionError("a loop") from None
            assert not run.claimed

    check(runs)
    kills(check, mutated(runs, "home = real(path)", "home = Path(path).resolve(strict=True)"))
    with pytest.raises(AlignProError, match=r"loop: cannot write there \(a file is in the way\)"):
        runs.owning("train")(lambda out: None)(out=tmp_path / "loop")


@pytest.fixture
def begun(tmp_path):
    with runs.own(tmp_path, "train") as run:
        run.contents["target"] = lambda: "ab12"
        run.begin(RECORD, resume=False)
        runs.claim(tmp_path)
    return tmp_path


def test_another_run_is_told_of(begun):
    """By its verb, its settings, and how it goes on."""
    with runs.own(begun, "rollout") as run, pytest.raises(AlignProError) as told:
        run.begin(RECORD)
    assert str(told.value) == (
        f"--out {begun}: holds a run of train (target m, lam 0.05); continue it with alignpro train --out "
        f"{begun} --resume, and its settings, or choose another folder"
    )
    for file in (runs.DEMO_FILE, runs.TASK_FILE):
        with runs.own(begun, "demo", file=file) as run, pytest.raises(AlignProError, match="a run of train"):
            run.check(True)
    with runs.own(begun, "train") as run, pytest.raises(AlignProError, match="holds a run of train"):
        run.check(False)


def another_content(module, folder):
    with module.own(folder, "train") as run:
        run.contents |= {"target": lambda: "cd34", "reward": lambda: "ef"}
        with pytest.raises(
            AlignProError, match=r"another content of target \(ab12, now cd34\); put that back"
        ):
            run.begin(RECORD, resume=True)
    return True


def test_what_a_setting_names_is_compared(begun):
    assert another_content(runs, begun)

    def check(module):
        try:
            another_content(module, begun)
        except BaseException as error:  # pytest.raises fails by an exception of its own kind
            raise AssertionError from error

    kills(check, mutated(runs, "if old_contents[name] != contents[name]:", "if False:"))
    with (
        runs.own(begun, "train") as run,
        pytest.raises(AlignProError, match=r"settings\.lam = 0\.05, not 0\.5"),
    ):
        run.begin({**RECORD, "settings": {"lam": 0.5}}, resume=True)
    # A setting that an earlier version did not have was off.
    with runs.own(begun, "train") as run:
        run.begin({**RECORD, "further": False}, resume=True)
        with pytest.raises(AlignProError, match="further = None, not 1"):
            run.begin({**RECORD, "further": 1}, resume=True)
    # A name that no content of this verb has: a bit of the file was flipped.
    with runs.own(begun, "train") as run:
        run.contents["prompter"] = lambda: None
        with pytest.raises(AlignProError, match="is damaged, as contents has 'target'"):
            run.begin(RECORD, resume=True)
    # One of an earlier version has no contents, and gets those of now; so does what was not there at first.
    old = files.read_json(begun / "settings.json")
    files.write_json(begun / "settings.json", {k: v for k, v in old.items() if k not in ("contents", "verb")})
    there = iter([None, "ef"])
    with runs.own(begun, "train") as run:
        run.contents |= {"target": lambda: "cd34", "reward": lambda: next(there)}
        run.begin(RECORD, resume=True)
        runs.claim(begun)
    assert files.read_json(begun / "settings.json") == old | {"contents": {"target": "cd34", "reward": "ef"}}


def files_without_settings(module, folder):
    (folder / "checkpoint-best").mkdir(parents=True)
    with module.own(folder, "train") as run:
        told = ""
        try:
            run.begin(RECORD, resume=True, names=("metrics.jsonl", "checkpoint-*"))
        except AlignProError as error:
            told = str(error)
    assert "holds checkpoint-best and no settings.json" in told


def test_files_without_settings_are_nobodys(tmp_path):
    files_without_settings(runs, tmp_path / "right")
    blind = mutated(runs, "        for name in names:\n", "        for name in ():\n")
    kills(lambda module: files_without_settings(module, tmp_path / "wrong"), blind)
    (tmp_path / "checkpoint-best").mkdir()
    for resume in (False, None):
        with (
            runs.own(tmp_path, "train") as run,
            pytest.raises(AlignProError, match="holds checkpoint-best and no"),
        ):
            run.begin(RECORD, resume=resume, names=("metrics.jsonl", "checkpoint-*"))
    with runs.own(tmp_path / "new", "sft") as run:
        run.check(False, ("*",))  # the lease is no file of anybody's
    with runs.own(tmp_path, "sft") as run, pytest.raises(AlignProError, match="it is not empty"):
        run.check(False, ("*",))


def a_killed_process_leaves_nothing(module, folder):
    """A file that was being written when its process was killed is in nobody's way, and goes."""
    (folder / "prompter").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "other" / "settings.json").touch()
    for name in (".settings.json.ab_1cd2e.part", "prompter/.prompter.json.abcd1234.part"):
        (folder / name).touch()
    stays = ("other/.a.json.abcd1234.part", "prompter/a.part", "prompter/.film.part")
    for name in stays:
        (folder / name).touch()
    with module.own(folder, "train"):
        left = {path.relative_to(folder).as_posix() for path in folder.rglob("*.part")}
    assert left == {*stays}


def test_a_killed_process_leaves_nothing(tmp_path):
    a_killed_process_leaves_nothing(runs, tmp_path / "right")
    (tmp_path / "new").mkdir()
    with contextlib.suppress(KeyboardInterrupt), files.atomic_write(tmp_path / "new" / "settings.json"):
        (part,) = (tmp_path / "new").iterdir()
        raise KeyboardInterrupt
    part.touch()  # as a kill leaves it
    (tmp_path / "new" / "checkpoints").mkdir()
    with runs.own(tmp_path / "new", "train") as run:
        run.begin(RECORD, resume=True, names=("*",))
    for right, wrong in (
        ("                _tidy(run)\n", ""),
        (" and not (folder / SETTINGS_FILE).exists()", " and True"),
    ):
        where = tmp_path / f"wrong {len(wrong)}"
        kills(
            lambda module, at=where: a_killed_process_leaves_nothing(module, at), mutated(runs, right, wrong)
        )


def the_second_is_told(module, tmp_path):
    """In a thread, which has a context of its own and so no part in what this one holds."""
    tmp_path.mkdir()
    said = []

    def second():
        try:
            with module.own(tmp_path, "judge"):
                said.append("came in")
        except AlignProError as error:
            said.append(str(error))

    def try_it():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return said.pop()

    with module.own(tmp_path, "train") as run:
        with module.own(tmp_path, "rollout") as again:
            assert again is run
        told = try_it()
        assert told.startswith(f"--out {tmp_path}: train is at work there since ")
        assert f"(process {os.getpid()} on " in told
    assert try_it() == "came in"
    assert [*tmp_path.iterdir()] == []


def test_the_second_process_is_told_who_is_there(tmp_path):
    the_second_is_told(runs, tmp_path / "right")
    open_door = mutated(runs, "        if lease is not None:\n", "        if True:\n")
    kills(lambda module: the_second_is_told(module, tmp_path / "wrong"), open_door)


def test_owning(tmp_path):
    @runs.owning("merge")
    def work(x, out=None):
        """Says who holds the folder."""
        return out and runs.here(out).verb, x

    assert work(1) == (None, 1)
    assert work(2, tmp_path / "a") == ("merge", 2)
    assert not (tmp_path / "a").exists()
    assert work.__doc__ == "Says who holds the folder."


def a_lease_that_was_given_back(module, folder, monkeypatch):
    """Whoever looks at a lease while it goes, and whoever comes from before that, is told no."""
    folder.mkdir()
    with module.lease(folder, "x", leave=False):
        assert [path.name for path in folder.iterdir()] == [".x-1"]
    assert [*folder.iterdir()] == []
    mine = folder / ".x-1"
    mine.write_text('{"machine": "m", "free": true}')
    lock = module._lock

    def begun_anew(file, exclusive):
        mine.unlink()
        (folder / "other").touch()
        mine.touch()
        return lock(file, exclusive)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_lock", begun_anew)
        assert not module._look(mine)[0]
    mine.unlink()
    (folder / ".x-5").write_text('{"free": true}')
    look = module._look

    def another_begins(path):
        found = look(path)
        mine.touch()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "_look", another_begins)
        with module.lease(folder, "x") as got:
            assert got is None
    assert sorted(path.name for path in folder.iterdir()) == [".x-1", ".x-5", "other"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if os.fstat(file.fileno()).st_ino != path.stat().st_ino:", "if False:"),
        ("if set(numbers) - {*seen, last + 1}:", "if max(numbers) > last + 1:"),
    ],
)
def test_a_lease_that_was_given_back(tmp_path, monkeypatch, right, wrong):
    a_lease_that_was_given_back(locks, tmp_path / "right", monkeypatch)
    mutant = mutated(locks, right, wrong)
    kills(lambda module: a_lease_that_was_given_back(module, tmp_path / "wrong", monkeypatch), mutant)


def test_a_list_of_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("abc")
    (tmp_path / "b").write_text("d")
    found = files.listed(tmp_path)
    assert {*found} == {"in/a", "b"}
    assert files.flaw(tmp_path, found) is None
    (tmp_path / "more").touch()
    assert files.flaw(tmp_path, found) is None
    for text, says in (("abx", "has sha256"), ("ab", "has 2 bytes, expected 3")):
        (tmp_path / "in" / "a").write_text(text)
        assert says in files.flaw(tmp_path, found)
    (tmp_path / "in" / "a").unlink()
    assert files.flaw(tmp_path, found) == f"{tmp_path / 'in/a'} is missing"


class Hunted:
    """A result of the theory that found an instance of that name."""

    def __init__(self, name):
        self.name = name

    def save_instances(self, folder):
        (folder / self.name).touch()

    def json(self):
        return {"statements": {"theorem1": {"worst": {"instance": self.name}}}}


def hunted_twice(module, folder):
    folder.mkdir()
    (folder / "mine.npz").touch()
    for name in ("a-worst.npz", "b-worst.npz"):
        module.keep = lambda page, folder: None
        module.save(Hunted(name), "hunt", None, folder)
    assert {path.name for path in folder.iterdir()} == {"mine.npz", "b-worst.npz", "hunt.json"}


def test_instances_of_an_earlier_result_go_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "keep", None)
    hunted_twice(shared, tmp_path / "right")
    for i, wrong in enumerate(("for name in ():", "for name in {p.name for p in folder.glob('*.npz')}:")):
        mutant = mutated(shared, "for name in before - _instances(values):", wrong)
        kills(lambda module, i=i: hunted_twice(module, tmp_path / f"wrong {i}"), mutant)


def test_a_folder_that_is_removed_meanwhile_is_told(tmp_path):
    """Also where what wrote there last made it again. Mutant: nothing is looked at."""

    def check(module):
        for again in (False, True):
            folder = tmp_path / f"{again}"

            def work(folder=folder, again=again):
                with module.own(folder, "train"):
                    shutil.rmtree(folder)
                    if again:
                        folder.mkdir(parents=True)
                        (folder / "result.json").write_text("{}")

            try:
                work()
            except AlignProError as error:
                assert "was removed while train was at work there; run again" in str(error)  # noqa: PT017
            else:
                raise AssertionError(again)
            shutil.rmtree(folder, ignore_errors=True)

    check(runs)
    kills(check, mutated(runs, "if _place(path) != place:", "if False:"))
    with (
        pytest.raises(AlignProError, match="its folder was removed meanwhile"),
        runs.own(tmp_path / "b", "x"),
        files.atomic_write(tmp_path / "b" / "f"),
    ):
        shutil.rmtree(tmp_path / "b")
