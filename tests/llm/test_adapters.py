"""Adapters: where they go in any layout, that they are whole, and that they are found from anywhere."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
import zoo
from mutants import kills, mutated
from safetensors.torch import load_file, save_file
from torch import nn

from alignpro.commands import main
from alignpro.errors import AlignProError
from alignpro.llm.models import catalogue, devices, load
from alignpro.llm.models.adapters import adapter_config, blocks_of
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.targets.local import LocalTarget

TEXTS = ["How do plants grow?", "Name a painter."]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the models `llama3_2`, `gpt2` and `gemma3_vision`, and prompts."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("llama3_2", "gpt2", "gemma3_vision"):
        zoo.build(name, folder)
    zoo.write_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture
def trained(home, tmp_path, monkeypatch):
    """A prompter trained in one folder, its base named by a relative path."""
    monkeypatch.syspath_prepend(str(zoo.Path(zoo.__file__).parent))
    work = tmp_path / "work"
    shutil.copytree(home / "llama3_2", work / "models" / "base")
    monkeypatch.chdir(work)
    arguments = ["train", "--out", "runs/a", "--prompter", "models/base", "--target", "models/base"]
    arguments += ["--reward", "zoo:letters@0,1", "--prompts-file", str(home / "prompts.jsonl")]
    arguments += ["--iterations", "2", "--prompts-per-round", "2", "--draws", "2", "--rewrite-tokens", "5"]
    arguments += ["--answer-tokens", "5", "--learning-rate", "0.05"]
    assert main.main(arguments) == 0
    return work / "runs" / "a"


def test_adapters_are_on_the_top_layers_of_the_language_model(home):
    gpt2, _ = load.load_model(home / "gpt2", device="cpu")
    name, blocks = blocks_of(gpt2)
    assert (name, len(blocks)) == ("transformer.h", 4)
    found = adapter_config(gpt2, 4, 0.5)
    assert {target.split(".")[2] for target in found.target_modules} == {"2", "3"}
    assert found.fan_in_fan_out
    vision, _ = load.load_model(home / "gemma3_vision", device="cpu")
    found = adapter_config(vision, 4, 1.0)
    assert len(found.target_modules) == 4 * 7
    assert all("language_model.layers." in target for target in found.target_modules)
    linear = {n for n, m in vision.named_modules() if isinstance(m, nn.Linear)}
    assert any("vision" in n for n in linear)  # which are left alone


def test_a_layout_without_layers_is_one_line(home):
    model, _ = load.load_model(home / "llama3_2", device="cpu")
    model.config.num_hidden_layers = 7
    with pytest.raises(AlignProError, match=r"^model LlamaForCausalLM: no list of its 7 layers was found"):
        adapter_config(model, 4, 1.0)


def test_a_relative_base_is_found_from_anywhere(trained, tmp_path, monkeypatch):
    expected = Prompter.from_pretrained(trained / "prompter", device="cpu").log_probs(TEXTS, TEXTS)
    monkeypatch.chdir(tmp_path)
    again = Prompter.from_pretrained(trained / "prompter", device="cpu")
    np.testing.assert_array_equal(again.log_probs(TEXTS, TEXTS), expected)
    named = json.loads((trained / "prompter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == again.base == str(tmp_path / "work" / "models" / "base")
    assert main.main(["rewrite", str(trained), *TEXTS]) == 0  # the folder of the run does as well
    # Written by an earlier version: a path relative to where it was trained.
    path = trained / "prompter" / "prompter.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"base": "models/base"}))
    again = Prompter.from_pretrained(trained / "prompter", device="cpu")
    np.testing.assert_array_equal(again.log_probs(TEXTS, TEXTS), expected)
    shutil.move(tmp_path / "work" / "models", tmp_path / "elsewhere")
    path.write_text(json.dumps(said | {"base": "./models/base"}))
    with pytest.raises(AlignProError, match=r"its base model './models/base' is not there; put it back"):
        Prompter.from_pretrained(trained / "prompter", device="cpu")


def test_an_adapter_is_a_model_wherever_one_is_named(home, trained, tmp_path):
    """As target and as prompter it is merged in memory; `merge` writes the same model whole."""
    adapted = Prompter.from_pretrained(trained / "prompter", device="cpu")
    expected = adapted.log_probs(TEXTS, TEXTS)
    merged = Prompter.from_pretrained(trained / "prompter", device="cpu", merged=True)
    assert not hasattr(merged.model, "peft_config")
    np.testing.assert_allclose(merged.log_probs(TEXTS, TEXTS), expected, rtol=1e-5)
    base = Prompter.from_pretrained(adapted.base, device="cpu").log_probs(TEXTS, TEXTS)
    assert np.abs(base - expected).max() > 1e-3  # training did change it
    target = LocalTarget(trained / "prompter", device="cpu", dtype="float32")
    plain = LocalTarget(adapted.base, device="cpu", dtype="float32")
    assert np.abs(target.log_probs(TEXTS, TEXTS) - plain.log_probs(TEXTS, TEXTS)).max() > 1e-3
    assert target.revision != plain.revision
    assert main.main(["merge", str(trained), "--out", str(tmp_path / "whole")]) == 0
    whole = Prompter.from_pretrained(tmp_path / "whole", device="cpu")
    np.testing.assert_allclose(whole.log_probs(TEXTS, TEXTS), expected, rtol=1e-5)
    assert whole.template == adapted.template
    assert not [*(tmp_path / "whole").glob("*.bin")]
    assert main.main(["merge", str(trained), "--out", str(tmp_path / "whole")]) == 2  # it is there
    # As ρ_sft it is trained on from there.
    arguments = [
        "train",
        "--out",
        str(tmp_path / "again"),
        "--prompter",
        str(trained),
        "--target",
        adapted.base,
    ]
    arguments += [
        "--reward",
        "zoo:letters@0,1",
        "--prompts-file",
        str(home / "prompts.jsonl"),
        "--lam",
        "0.1",
    ]
    arguments += ["--iterations", "1", "--prompts-per-round", "2", "--draws", "2", "--rewrite-tokens", "5"]
    assert main.main([*arguments, "--answer-tokens", "5"]) == 0
    again = Prompter.from_pretrained(tmp_path / "again" / "prompter", device="cpu")
    with again.model.disable_adapter():
        np.testing.assert_allclose(again.log_probs(TEXTS, TEXTS), expected, rtol=1e-5)


@pytest.mark.parametrize("change", ["lost", "renamed", "gone"])
def test_an_adapter_that_is_not_whole_is_refused(change, trained, tmp_path):
    """Otherwise arm `trained` would be arm `sft`, without a word."""
    folder = tmp_path / "damaged"
    shutil.copytree(trained / "prompter", folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = sorted(tensors)[0]
    if change == "lost":
        del tensors[first]
    elif change == "renamed":
        tensors = {name.replace("base_model.model", "other"): t for name, t in tensors.items()}
    else:
        tensors = {}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AlignProError, match=r"^adapter .*(lacks|has no place for) .*save it again"):
        Prompter.from_pretrained(folder, device="cpu")
    with pytest.raises(AlignProError, match=r"^adapter .*save it again"):
        load.load_model(folder, device="cpu")


def test_a_model_that_lacks_a_tensor_is_refused(home, tmp_path):
    """transformers would draw it at random, anew at every run."""
    shutil.copytree(home / "llama3_2", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AlignProError, match=r"no weights that fit model\.layers\.1\.mlp\.up_proj\.weight"):
        load.load_model(tmp_path / "m", device="cpu")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.full((64, 32), float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        AlignProError, match=r"numbers in model\.layers\.1\.mlp\.up_proj\.weight that are not finite"
    ):
        load.load_model(tmp_path / "m", device="cpu")


def test_every_process_has_a_device_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert devices.device_of("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert devices.device_of("auto") == torch.device("cuda", 3)
    assert chosen == [0, 3]
    assert devices.device_of("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(AlignProError, match=r"^LOCAL_RANK 4: this machine has 4 CUDA devices"):
        devices.device_of("auto")


def test_four_bits_need_their_package(home, monkeypatch, capsys):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(AlignProError, match=r"^dtype '4bit': the package bitsandbytes is missing; run pip"):
        load.load_model(home / "llama3_2", "4bit")
    arguments = ["train", "--out", str(home / "none"), "--prompter", str(home / "llama3_2")]
    arguments += ["--prompts-file", str(home / "prompts.jsonl"), "--policy-dtype", "4bit"]
    assert main.main(arguments) == 2
    assert "the package bitsandbytes is missing" in capsys.readouterr().err


def test_a_folder_for_rehearsals_is_no_model(home, tmp_path, monkeypatch):
    shutil.copytree(home / "llama3_2", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / catalogue.RANDOM_FILE).write_text('{"seed": 0}')
    monkeypatch.delenv(catalogue.REHEARSAL, raising=False)
    with pytest.raises(AlignProError, match=r"has no weights: it was made for a rehearsal"):
        load.load_model(tmp_path / "m", device="cpu")
    monkeypatch.setenv(catalogue.REHEARSAL, "1")
    one, two = (load.load_model(tmp_path / "m", device="cpu")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(("text", "match"), [("thinking", "is no JSON object"), ("[1]", "is no JSON object")])
def test_chat_options_are_an_object(text, match, home, capsys):
    arguments = ["rewrite", str(home / "llama3_2"), "x", "--chat-template-kwargs", text]
    assert main.main(arguments) == 2
    assert match in capsys.readouterr().err


def test_models_of_one_base_share_its_weights(trained, home):
    """A reference, a prompter on its base and one that is merged: two have one base in memory, and each says
    what it says alone."""
    base, template = (
        trained.parents[1] / "models" / "base",
        Prompter.from_pretrained(trained / "prompter").template,
    )
    names = {"reference": base, "trained": trained / "prompter", "again": trained / "prompter"}

    def scores(prompter):
        return prompter.log_probs(TEXTS, ["abc", "cab"])

    alone = {name: scores(Prompter.from_pretrained(folder)) for name, folder in names.items()}
    assert not np.allclose(alone["trained"], alone["reference"])

    def check(module):
        with module.sharing():
            opened = {name: module.load_model(folder, device="cpu") for name, folder in names.items()}
            plain, merged = opened["reference"][0], opened["trained"][0]
            other = module.load_model(base, device="cpu")[0]
            assert other is not plain
            pairs = zip(plain.parameters(), other.parameters(), strict=True)
            assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)
            # An adapter on one of them, and one that was merged into its base, change no other.
            adapted = module.attach_adapter(other, trained / "prompter", "trained")
            found = {
                "reference": Prompter(plain, opened["reference"][1], template),
                "trained": Prompter(adapted, opened["reference"][1], template),
                "again": Prompter(merged, opened["trained"][1], template),
            }
            for name in ("trained", "again"):
                np.testing.assert_allclose(scores(found[name]), alone[name], rtol=1e-4)
            np.testing.assert_array_equal(scores(found["reference"]), scores_of_base)

    scores_of_base = scores(
        Prompter(
            *load.load_model(base, device="cpu"), Prompter.from_pretrained(trained / "prompter").template
        )
    )
    check(load)
    kills(check, mutated(load, "{id(p): p for p in self.model.parameters()}", "{}"))
    kills(check, mutated(load, "return kept.copy(), kept.tokenizer", "return kept.model, kept.tokenizer"))
    with load.sharing():
        gone = weakref.ref(load.load_model(base, device="cpu")[0]._alignpro_whole)
        gc.collect()
        assert gone() is None
