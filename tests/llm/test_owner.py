"""What a run finds in its folder when it goes on: damaged checkpoints, lost files, other contents."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from mutants import kills, mutated
from test_train import BARE, SETTINGS, TableReward

from alignpro.errors import AlignProError
from alignpro.llm.arms import demo
from alignpro.llm.models import contents
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.prompt import Prompt
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training import checkpoints
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.open_ended import train

SHORT = replace(SETTINGS, iterations=4, prompts=2, samples=4, epochs=1)
PROMPTS = ["ab", "cd", "ef"]


class Failing(TableReward):
    """A reward that fails in one of its rounds."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error = at, error

    def score(self, prompts, responses):
        self.at -= 1
        if not self.at:
            raise self.error
        return super().score(prompts, responses)


def fit(folder, settings=SHORT, *, reward=None, prompts=PROMPTS, **options):
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    worth = Environment(reward or TableReward(), None)
    return train(
        Prompter(model, tokenizer, BARE), worth, prompts, settings, folder, progress=False, **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("owner") / "whole")


@pytest.fixture(scope="module")
def cut(whole):
    """A run that was interrupted in its last round: checkpoints 2 and 3 are there."""
    folder = whole.folder.with_name("cut")
    with pytest.raises(KeyboardInterrupt):
        fit(folder, reward=Failing(4))
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-3", "checkpoint-2"]
    return folder


@pytest.fixture
def again(cut, tmp_path):
    return shutil.copytree(cut, tmp_path / "again")


FILES = ("metrics.jsonl", "rewrites.jsonl", "prompter/adapter_model.safetensors")


def same(folder, whole):
    return [
        name for name in FILES if (folder / name).read_bytes() != (whole.folder / name).read_bytes()
    ] == []


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 64
    path.write_bytes(data)


DAMAGES = {
    "optimizer.pt": ("optimizer.pt is missing", lambda at: (at / "optimizer.pt").unlink()),
    "rng_state.pth": ("rng_state.pth is missing", lambda at: (at / "rng_state.pth").unlink()),
    "adapter": ("adapter_model.safetensors has sha256", lambda at: flip(at / "adapter_model.safetensors")),
    "kl.json": ("kl.json has", lambda at: (at / "kl.json").write_text('{"lambda": 0.5}')),
    "card": ("README.md has", lambda at: (at / "README.md").write_bytes(b"\xff" * 9)),
    "empty": ("is empty", lambda at: [path.write_bytes(b"") for path in at.iterdir()]),
    "zeros": ("complete is damaged", lambda at: [path.write_bytes(bytes(99)) for path in at.iterdir()]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, again, whole, capfd):
    """With a word, and the run ends as if nothing had been."""
    says, act = DAMAGES[damage]
    act(again / "checkpoint-3")
    # Besides, none of these is a checkpoint of the run, and all stay.
    (again / "checkpoint-best").mkdir()
    (again / "checkpoint-500").mkdir()
    (again / "checkpoint-500" / "theirs").touch()
    (again / "checkpoint-9").touch()
    (again / "checkpoint-2" / "theirs").touch()
    fit(again, resume=True)
    said = capfd.readouterr().err
    assert says in said
    assert "so that checkpoint-3 is passed over; going on from checkpoint-2 instead" in said
    assert same(again, whole)
    left = {path.relative_to(again).as_posix() for path in again.rglob("checkpoint*/**/*")}
    left |= {path.name for path in again.glob("checkpoint*")}
    own = {name for name in left if name.startswith(("checkpoint-3/", "checkpoint-4/"))}
    theirs = {"checkpoint-best", "checkpoint-500", "checkpoint-500/theirs", "checkpoint-9"}
    assert left - own == {"checkpoint-3", "checkpoint-4", "checkpoint-2", "checkpoint-2/theirs", *theirs}


def test_a_checkpoint_that_is_believed_is_another_training(again, whole, monkeypatch):
    def check(wrong):
        monkeypatch.setattr(checkpoints, "_wrong", wrong)
        fit(again, resume=True)
        assert same(again, whole)

    (again / "checkpoint-3" / "optimizer.pt").unlink()
    kills(check, lambda path: None)


def test_a_run_removes_its_own_checkpoints_alone(again, monkeypatch):
    def check(remove):
        monkeypatch.setattr(checkpoints, "remove", remove)
        (again / "checkpoint-2" / "theirs").touch()
        fit(again, resume=True)
        assert (again / "checkpoint-2" / "theirs").exists()

    kills(check, shutil.rmtree)


def test_no_checkpoint_is_whole(again, whole, capfd):
    for path in checkpoints.checkpoints(again):
        (path / "scheduler.pt").unlink()
    fit(again, resume=True)
    assert (
        "scheduler.pt is missing, so that checkpoint-2 is passed over; no other is there"
        in capfd.readouterr().err
    )
    assert same(again, whole)


def metrics_come_back(again, whole):
    lines = (again / "metrics.jsonl").read_bytes()
    for text in (None, lines[:-20], lines.split(b"\n", 1)[1]):
        if text is None:
            (again / "metrics.jsonl").unlink()
        else:
            (again / "metrics.jsonl").write_bytes(text)
        fit(again, resume=True)
        assert same(again, whole)


def test_metrics_come_back(again, whole, cut, monkeypatch):
    metrics_come_back(again, whole)
    shutil.rmtree(again)
    shutil.copytree(cut, again)
    monkeypatch.setattr(checkpoints.Metrics, "load", lambda self, folder: None)
    kills(lambda _: metrics_come_back(again, whole), None)


def test_rewrites_that_were_lost_are_told_of(again, whole, capfd):
    text = (again / "rewrites.jsonl").read_bytes()
    (again / "rewrites.jsonl").write_bytes(text.split(b"\n", 1)[1])
    fit(again, resume=True)
    assert "rewrites.jsonl: is not what was written of earlier rounds" in capfd.readouterr().err
    assert (again / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_a_run_of_an_earlier_version_goes_on(again, whole):
    """Its settings name no verb and no contents, and its checkpoints have no list and no metrics."""
    record = json.loads((again / "settings.json").read_text())
    assert record.pop("verb") == "train"
    assert record.pop("contents") == {}
    (again / "settings.json").write_text(json.dumps(record))
    for path in checkpoints.checkpoints(again):
        (path / "complete").write_bytes(b"")
        for name in ("metrics.jsonl", "rewrites.json"):
            (path / name).unlink()
    fit(again, resume=True)
    assert same(again, whole)
    assert json.loads((again / "settings.json").read_text())["verb"] == "train"


def test_what_is_refused(again, tmp_path):
    with pytest.raises(AlignProError, match=r"holds a run of train \(task rlhf, lam 0\.35, seed 0\)"):
        fit(again)
    talk = [Prompt("ab", [{"role": "user", "content": "hi"}]), *PROMPTS[1:]]
    with pytest.raises(AlignProError, match="prompts_digest = "):
        fit(again, prompts=talk, resume=True)
    (again / "settings.json").unlink()
    for resume in (True, False):
        with pytest.raises(AlignProError, match=r"checkpoint-\d and no settings.json"):
            fit(again, replace(SHORT, lam=0.5), resume=resume)
    # A start that failed in its first round: another may have the folder.
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "new", reward=Failing(1, ZeroDivisionError))
    assert not (tmp_path / "new").exists()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "new", reward=Failing(2, ZeroDivisionError))
    with pytest.raises(AlignProError, match=r"settings\.lam = 0\.35, not 0\.5"):
        fit(tmp_path / "new", replace(SHORT, lam=0.5), resume=True)


def in_order(module, whole, tmp_path, monkeypatch):
    at = shutil.copytree(whole.folder / "checkpoint-4", tmp_path / "checkpoint-4")
    (at / "complete").unlink()
    order = []
    monkeypatch.setattr(module, "sync", lambda path: order.append((path, (at / "complete").exists())))
    module.complete(at)
    *every, listing, folder, above = order
    assert {path for path, _ in every} == {path for path in at.iterdir() if path.name != "complete"}
    assert not any(there for _, there in every)
    assert [path for path, _ in (listing, folder, above)] == [at / "complete", at, at.parent]
    assert all(there for _, there in (listing, folder, above))


def test_files_go_to_the_disk_before_their_list(whole, tmp_path, monkeypatch):
    """And names after it: a list that is there has whole files."""
    in_order(checkpoints, whole, tmp_path / "right", monkeypatch)
    wrong = mutated(checkpoints, "for name in files if lasting else ():", "for name in ():")
    kills(lambda module: in_order(module, whole, tmp_path / "wrong", monkeypatch), wrong)


def test_models_and_code_by_content(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    model, _ = tiny_model(seed=1, vocab="abcd")
    home = tmp_path / "model"
    model.save_pretrained(home)
    first = contents.of_model(home)
    (home / "README.md").write_text("a card")
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert contents.of_model(str(home)) == first
    (home / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert contents.of_model(home) != first
    (home / "config.json").write_text(json.dumps(config))
    assert contents.of_model(home) == first
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(home)
    assert contents.of_model(home) != first
    assert contents.of_model("no/such-model") is None
    # A large file is hashed once, until it is written to.
    large = tmp_path / "large"
    large.write_bytes(bytes(contents._LARGE))
    os.utime(large, (1.0, 1.0))
    monkeypatch.setattr(contents, "_FRESH_S", -1.0)
    found = contents.file_hash(large)
    with monkeypatch.context() as patch:
        patch.setattr(contents, "sha256", lambda path: pytest.fail("hashed again"))
        assert contents.file_hash(large) == found
    large.write_bytes(b"1" * contents._LARGE)
    os.utime(large, (1.0, 1.0))
    assert contents.file_hash(large) != found
    # Code is what it does.
    (tmp_path / "mine.py").write_text("def score(xs, ys):\n    return [0.5] * len(ys)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine

    now = contents.of_code(mine.score)
    (tmp_path / "mine.py").write_text('"""Mine."""\ndef score(xs, ys):\n    return [0.5] * len(ys)  # half\n')
    assert contents.of_code(mine.score) == now
    (tmp_path / "mine.py").write_text("def score(xs, ys):\n    return [0.7] * len(ys)\n")
    assert contents.of_code(mine.score) != now
    assert contents.of_code(len) is None


class Drawn:
    """An enumeration's files, and nothing else."""

    def save(self, folder):
        for name in demo.FILES:
            (folder / name).write_text("drawn")


def test_the_demos_enumeration_is_what_was_drawn(tmp_path, monkeypatch):
    """Its texts are those of its numbers, and what the reward said of itself is kept with it."""
    counts = iter(range(9))
    reward = type("Counting", (), {"describe": lambda self: {"scored": next(counts)}})()
    monkeypatch.setattr(demo, "enumerate_models", lambda *_, **__: Drawn())
    monkeypatch.setattr(demo.Enumeration, "load", lambda folder: Drawn())

    def enumerated():
        return demo.enumerated(tmp_path, demo.QUICK, [], None, None, reward)[1]

    assert enumerated() == enumerated() == {"scored": 0}
    (tmp_path / "texts.json").write_text("edits")
    with pytest.raises(
        AlignProError, match=r"texts.json has sha256 .* put it back, or remove enumeration.json"
    ):
        enumerated()
    (tmp_path / "enumeration.json").unlink()
    (tmp_path / "run.json").write_text('{"verb": "demo"}')
    assert enumerated() == {"scored": 1}  # cut short while it was saved: drawn anew
    (tmp_path / "enumeration.json").unlink()
    (tmp_path / "run.json").write_text("{}")
    assert enumerated() == enumerated() == {"scored": 2}  # an earlier version's, which is taken as it is
