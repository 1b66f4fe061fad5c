"""A prompter made on this machine: its pairs, its key, one training for all who ask, its name everywhere."""

import json
import re
import threading
import time
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from mutants import kills, mutated
from small_recipe import NAME, TINY, few_pairs

from alignpro import locks
from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.data import packaged, pairs
from alignpro.llm.data.bank import INSTRUCTIONS
from alignpro.llm.data.split import SPLITS, split_of
from alignpro.llm.models import catalogue, packages, recipes
from alignpro.llm.models.resolve import resolve
from alignpro.llm.policies.prompter import TEMPLATES, Prompter
from alignpro.llm.training import recipe, sft
from alignpro.llm.training.pair_settings import SFTSettings

NEEDED = catalogue.RECIPES[NAME].data
needs_data = pytest.mark.skipif(not all(map(packages.cached, NEEDED)), reason="packages are not cached")


def check_pairs(module):
    made = module.instruction_pairs(each=3, held_out=2, alone=0.1, seed=1)
    assert made == module.instruction_pairs(each=3, held_out=2, alone=0.1, seed=1)
    assert made != module.instruction_pairs(each=3, held_out=2, alone=0.1, seed=2)
    of_each = Counter((split_of(pair.prompt) == "train", pair.prompt) for pair in made)
    assert {(train, n) for (train, _), n in of_each.items()} == {(True, 3), (False, 2)}
    added = [pair.rewrite.removeprefix(pair.prompt) for pair in made]
    assert {*added} == {"", *(f" {text}" for text in INSTRUCTIONS)}
    assert added.count("") / len(added) == pytest.approx(0.1, abs=0.03)
    for part in SPLITS:
        inside = [a for a, pair in zip(added, made, strict=True) if a and split_of(pair.prompt) == part]
        counts = Counter(inside)
        mean = len(inside) / len(INSTRUCTIONS)
        assert all(abs(counts[f" {text}"] - mean) <= max(4, 4 * mean**0.5 * 0.5) for text in INSTRUCTIONS)
        if part == "train":  # far from what independent draws would give
            assert np.var([*counts.values()]) < 0.4 * mean


@needs_data
def test_pairs_are_balanced_and_some_say_nothing():
    check_pairs(pairs)
    for right, wrong in {
        "rng.permutation(len(INSTRUCTIONS))": "rng.integers(len(INSTRUCTIONS), size=len(INSTRUCTIONS))",
        "x if nothing else": "",
        "rng.random(len(rows)) < alone": "rng.random(len(rows)) < 3 * alone",
        "default_rng(seed)": "default_rng(0)",
        "if split_of(x) == part": "if part == 'train'",
    }.items():
        code = (right, wrong) if wrong else (f"{right} with_instruction", "with_instruction")
        kills(check_pairs, mutated(pairs, *code))
    with pytest.raises(AlignProError, match=r"^each 0, held_out 1: give at least 1$"):
        pairs.instruction_pairs(each=0)
    with pytest.raises(AlignProError, match=r"^alone 2: give a share"):
        pairs.instruction_pairs(alone=2)


def test_an_interrupted_training_goes_on_and_the_end_is_the_same(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(pairs.PAIRS, "instructions", few_pairs)
    tiny = replace(tiny_recipe, settings=TINY | {"epochs": 2, "batch_size": 4})
    whole, cut = tmp_path / "whole" / f"{NAME}-1", tmp_path / "cut" / f"{NAME}-1"
    recipe.make(NAME, whole, tiny)
    lease = f".{whole.name}.lock-"  # and how often it was taken
    assert {re.sub(f"{lease}[0-9]+$", lease, path.name) for path in whole.parent.iterdir()} == {
        whole.name,
        lease,
    }
    step, steps = sft._Trainer.training_step, []

    def interrupted(self, *positional, **named):
        steps.append(self.state.global_step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *positional, **named)

    monkeypatch.setattr(sft._Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.make(NAME, cut, tiny)
    assert not cut.exists()
    recipe.make(NAME, cut, tiny)
    assert steps[6] == 4  # from the checkpoint, not from the beginning
    for file in ("adapter_model.safetensors", "prompter.json"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes()
    # One cut short before it had begun is begun again.
    again = tmp_path / "again" / f"{NAME}-1"
    (again.parent / f".making-{again.name}" / "checkpoint-2").mkdir(parents=True)
    recipe.make(NAME, again, tiny)
    assert (again / "prompter.json").read_bytes() == (whole / "prompter.json").read_bytes()


def check_waits(module, tiny, folder):
    """Who comes second waits, and finds what the first has made."""
    folder.parent.mkdir(exist_ok=True)
    with locks.waited(folder.parent, f"{folder.name}.lock"):
        waiting = threading.Thread(target=module.make, args=(NAME, folder, tiny), daemon=True)
        waiting.start()
        time.sleep(0.3)
        assert waiting.is_alive()
        folder.mkdir()
        packages.write_manifest(folder, source="the first")
    waiting.join(20)
    assert not waiting.is_alive()
    assert json.loads((folder / packages.MANIFEST).read_text())["source"] == "the first"


def test_one_of_several_processes_trains(tiny_recipe, tmp_path, monkeypatch):
    trained = []
    mutants = {
        "right": recipe,
        "no lock": mutated(recipe, 'with locks.waited(folder.parent, f"{folder.name}.lock"):', "if True:"),
        "does not look again": mutated(recipe, "if (folder / packages.MANIFEST).is_file():", "if False:"),
    }
    for name, module in mutants.items():

        def train(*positional, **named):
            trained.append(name)  # noqa: B023
            (positional[3] / "prompter").mkdir(parents=True)

        monkeypatch.setattr(module, "sft", train)

        def check(module):
            trained.clear()
            check_waits(module, tiny_recipe, tmp_path / name)  # noqa: B023
            assert not trained

        folder = tmp_path / name
        (check(module) if name == "right" else kills(check, module))
        assert folder.exists() or trained


def test_the_key_follows_settings_data_and_code(tiny_recipe, monkeypatch):
    key, source = recipes.cache_key(NAME), recipes._source
    assert recipes.cache_key(NAME) == key
    for change in (
        {"settings": TINY | {"seed": 1}},
        {"base": "other"},
        {"template": "rewrite"},
        {"pairs": "other"},
        {"options": {}},
    ):
        with monkeypatch.context() as patch:
            patch.setitem(catalogue.RECIPES, NAME, replace(tiny_recipe, **change))
            assert recipes.cache_key(NAME) != key, change
    with monkeypatch.context() as patch:
        patch.setitem(catalogue.RECIPES, NAME, replace(tiny_recipe, cost="an age"))
        assert recipes.cache_key(NAME) == key
    for name in recipes.MADE_BY:
        for more, same in (("\nx = 1\n", False), ("\n# a comment\n", True)):
            with monkeypatch.context() as patch:
                patch.setattr(recipes, "_source", lambda m, n=name, c=more: source(m) + c * (m == n))
                assert (recipes.cache_key(NAME) == key) == same, name
    other = replace(catalogue.PACKAGES["mtbench"], sha256="0" * 64)
    monkeypatch.setitem(catalogue.PACKAGES, "mtbench", other)
    assert recipes.cache_key(NAME) != key


def test_the_recipe_says_every_setting():
    row = catalogue.RECIPES[NAME]
    assert {*row.settings} == {field.name for field in fields(SFTSettings)}
    assert row.base in catalogue.MODELS
    assert row.template in TEMPLATES
    assert row.pairs in pairs.PAIRS


@needs_data
def test_it_is_a_prompter_wherever_one_is_named(tiny_recipe, tmp_path, monkeypatch, capfd):
    """Made by a process of its own, then opened and merged by its name; `test_task` trains from it."""
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher of several processes sets it
    monkeypatch.setenv("RANK", "1")
    folder = recipes.made(NAME)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert f"training the prompter {NAME} into {folder} (once, " in capfd.readouterr().err
    assert folder == recipes.home(NAME) == resolve(NAME)
    assert not capfd.readouterr().err  # once
    plain, merged = (Prompter.from_pretrained(NAME, merged=merged) for merged in (False, True))
    assert plain.template == merged.template == TEMPLATES["append"]
    assert merged.base == NAME
    assert not hasattr(merged.model, "peft_config")
    assert merged.facts["recipe"] == {
        "name": NAME,
        "version": recipes.cache_key(NAME),
        "pairs": "instructions",
    }
    assert {*merged.facts["sft"]["nats_per_token"]} == {"validation", "test"}
    xs = packaged.instructions(4)
    ys = [f"{x} Be brief." for x in xs]
    base = Prompter.from_pretrained(tiny_recipe.base, template="append")
    found = plain.log_probs(xs, ys)
    np.testing.assert_allclose(found, merged.log_probs(xs, ys), rtol=1e-4)
    assert np.all(found > base.log_probs(xs, ys))
    with pytest.raises(AlignProError, match=r"^template append: instructions-sft has its own; leave it out$"):
        Prompter.from_pretrained(NAME, template="append")

    def run(line):
        assert main.main(line.split()) == 0, capfd.readouterr().err

    run(f"rewrite {NAME} Hello --rewrite-tokens 4")
    run(f"merge {NAME} --out {tmp_path / 'whole'}")
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    run("doctor --json")
    assert f'"prompter": "{NAME}", "cached": true' in " ".join(capfd.readouterr().out.split())


def test_a_failure_is_one_line(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(catalogue.RECIPES, NAME, replace(tiny_recipe, base=str(tmp_path / "gone")))
    monkeypatch.setattr(recipes, "TRAINER", "this")  # any module that trains nothing
    with pytest.raises(
        AlignProError, match=rf"^prompter {NAME}: training it failed \(.*\); run the command again$"
    ):
        recipes.made(NAME)
