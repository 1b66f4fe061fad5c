"""A model, an adapter and a reward model that are not whole are told in one line: never another's numbers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from mutants import kills, mutated
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from alignpro.errors import AlignProError
from alignpro.llm.models import adapters, chat, load, policy
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import PROMPTER_FILE, Prompter
from alignpro.llm.targets.store import Store
from alignpro.llm.targets.target import Answer


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model, and a prompter upon it."""
    folder = tmp_path_factory.mktemp("loading")
    model, tokenizer = tiny_model(0, hidden=8)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    adapted = get_peft_model(model, adapters.adapter_config(model, 2, 0.5))
    Prompter(adapted, tokenizer, base="../model").save(folder / "prompter")
    return folder


def edit(path: Path, **values):
    """Set keys of a JSON file; those of `...` are taken out."""
    said = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not ...}))


def change(path: Path, act):
    """Change the tensors of a file."""
    tensors = load_file(path)
    act(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"
MODELS = {
    "a tensor is missing": (lambda t: t.pop(Q), rf"no weights that fit {Q}"),
    "a tensor of another shape": (
        lambda t: t.update({Q: t[Q][:-1].clone()}),
        r"(cannot load|no weights that fit)",
    ),
    "one layer more": (
        lambda t: t.update({Q.replace("1", "2"): t[Q].clone()}),
        r"no place for, model\.layers\.2\.",
    ),
    "a bias": (
        lambda t: t.update({Q.replace("weight", "bias"): t[Q][0].clone()}),
        r"no place for, .*q_proj\.bias",
    ),
    "not a number": (
        lambda t: t["model.embed_tokens.weight"][1].fill_(torch.nan),
        r"embed_tokens.*not finite",
    ),
    "whole numbers": (lambda t: t.update({Q: t[Q].int()}), r"whole numbers in .*q_proj"),
}
CONFIGS = {
    "3,000 layers": ("config.json", {"num_hidden_layers": 3000}, r"num_hidden_layers 3000, more than"),
    "10^9 layers": ("config.json", {"num_hidden_layers": 10**9}, r"num_hidden_layers 1000000000, more than"),
    "10^9 labels": ("config.json", {"num_labels": 10**9}, r"num_labels 1000000000, more than"),
    "one layer": ("config.json", {"num_hidden_layers": 1}, r"no place for, model\.layers\.1"),
    "no layers": ("config.json", {"num_hidden_layers": ...}, r"no weights that fit"),
    "width": ("config.json", {"hidden_size": 10**9}, r"hidden_size 1000000000, more than"),
    "no number": ("config.json", {"rms_norm_eps": float("inf")}, r"rms_norm_eps inf, which is no finite"),
    "no such end": ("generation_config.json", {"eos_token_id": 10**9}, r"not among the"),
    "an end beyond all": ("generation_config.json", {"eos_token_id": 10**20}, r"not among the"),
    "a token of its own": ("tokenizer_config.json", {"unk_token": ""}, r"cannot load"),
    "an end that is none": (
        "generation_config.json",
        {"eos_token_id": ["a"]},
        r"'a' is no token's",
    ),
    "length": (
        "tokenizer_config.json",
        {"model_max_length": []},
        r"(cannot load|model_max_length is no number)",
    ),
}
TEMPLATES = {
    "null": "leaves the prompt out",
    "{{ 1/0 }}": "fails",
    "{{ messages[0].role }}": "leaves the prompt",
}


def copied(home, tmp_path, part="model"):
    shutil.copytree(home, tmp_path / "all", dirs_exist_ok=True)
    return tmp_path / "all" / part


def test_weights_that_are_not_the_models_are_refused(home, tmp_path):
    def check(module):
        for name, (act, message) in MODELS.items():
            folder = copied(home, tmp_path)
            change(folder / "model.safetensors", act)
            try:
                module.load_model(folder, device="cpu")
            except AlignProError as error:
                assert re.search(message, str(error)), name  # noqa: PT017 - a mutant must fail the assertion
            else:
                raise AssertionError(name)

    check(load)
    for right, wrong in (
        ("if _LAYER.search(name)", "if False"),
        ("and not bool(torch.isfinite(value.sum(dtype=torch.float32)))", "and False"),
        ('in "IU" and not quantised', 'in "IU" and False'),
        ('*report["missing_keys"], ', ""),
    ):
        kills(check, mutated(load, right, wrong))


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_are_not_the_models_are_refused(name, home, tmp_path):
    file, values, message = CONFIGS[name]
    folder = copied(home, tmp_path)
    edit(folder / file, **values)
    with pytest.raises(AlignProError, match=message):
        load.load_model(folder, device="cpu")


def test_a_configuration_that_says_a_thing_twice_is_refused(home, tmp_path):
    """transformers takes the last, and makes that many layers before it reads the weights."""
    folder = copied(home, tmp_path)
    said = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(said[:-1] + ', "num_hidden_layers": 1000000000}')
    with pytest.raises(AlignProError, match=r"config\.json cannot be relied on: .*num_hidden_layers"):
        load.load_model(folder, device="cpu")


def test_a_token_that_the_model_does_not_know_is_told(home, tmp_path):
    """A tokenizer of a larger vocabulary: its other texts are read."""
    folder = copied(home, tmp_path)
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["vocab"]["h"] = 3000
    (folder / "tokenizer.json").write_text(json.dumps(said))
    model, tokenizer = load.load_model(folder, device="cpu")

    def check(module):
        def act(text):
            ids = [tokenizer(text).input_ids]
            module.draw(model, 0, ids, [7], Sampling(max_tokens=2))

        act("abc")
        try:
            act("abh")
        except AlignProError as error:
            assert "the token 3000, and the model knows 11" in str(error)  # noqa: PT017
        except IndexError as error:
            raise AssertionError from error

    check(policy)
    kills(check, mutated(policy, "    check_tokens(model, rows)\n", ""))
    with pytest.raises(AlignProError, match="the token 3000"):
        policy.log_probs(model, [(4, 5)], [tokenizer("h").input_ids])


def test_a_template_that_leaves_the_prompt_out_is_refused(home, tmp_path):
    folder = copied(home, tmp_path)
    for text, message in TEMPLATES.items():
        (folder / "chat_template.jinja").write_text(text)
        for opened in (load.load_model, load.load_tokenizer):
            with pytest.raises(AlignProError, match=f"chat template that {message}"):
                opened(folder)
    found = load.load_tokenizer(home / "model")[0]

    def check(module):
        found.chat_template = "null"
        try:
            module.configure(found, None)
        except AlignProError:
            return
        raise AssertionError

    check(chat)
    kills(check, mutated(chat, "if mark not in found.render", "if False and found.render"))


ADAPTERS = {
    "no alpha": (
        lambda at: edit(at / "adapter_config.json", lora_alpha=...),
        r"has no lora_alpha that is one",
    ),
    "a switch that is none": (
        lambda at: edit(at / "adapter_config.json", use_rslora="x"),
        r"use_rslora 'x', neither true nor false",
    ),
    "after certain words": (
        lambda at: edit(at / "adapter_config.json", alora_invocation_tokens=[3]),
        r"after certain words only",
    ),
    "no rank": (lambda at: edit(at / "adapter_config.json", r="2"), r"has no r that is one"),
    "another rank": (lambda at: edit(at / "adapter_config.json", r=3), r"cannot load|lacks"),
    "a tensor gone": (
        lambda at: change(at / "adapter_model.safetensors", lambda t: t.pop(sorted(t)[0])),
        r"lacks base_model",
    ),
    "another prefix": (
        lambda at: change(
            at / "adapter_model.safetensors", lambda t: t.update({"x" + k: t.pop(k) for k in [*t]})
        ),
        r"lacks base_model",
    ),
    "not a number": (
        lambda at: change(at / "adapter_model.safetensors", lambda t: t[sorted(t)[0]].fill_(torch.inf)),
        r"not finite",
    ),
    "a template's words": (
        lambda at: edit(at / PROMPTER_FILE, template={"system": 3}),
        r"prompter\.json is not one that Prompter\.save wrote \(.*system.*3 must be a text",
    ),
    "no tokens": (lambda at: edit(at / PROMPTER_FILE, max_tokens=0), r"max_tokens 0: give at least 1"),
    "a folder in its place": (
        lambda at: ((at / PROMPTER_FILE).unlink(), (at / PROMPTER_FILE).mkdir()),
        r"prompter\.json is not one",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_prompters_that_are_not_whole_are_refused(name, home, tmp_path):
    damage, message = ADAPTERS[name]
    folder = copied(home, tmp_path, "prompter")
    damage(folder)
    with pytest.raises(AlignProError, match=message):
        Prompter.from_pretrained(folder, device="cpu")


def test_half_a_character_in_an_answer_ends_nothing(tmp_path):
    answer = Answer("a\ud800b \ud83c\udf3b é", "stop", 1, 2)
    assert answer.text == "a\ufffdb 🌻 é"
    assert Answer("\ufeffé", "stop", 1, 2).text == "\ufeffé"
    store, key = Store(tmp_path), "0" * 64
    line = {"key": key, "answer": {**vars(answer), "text": "a\ud800b"}, "model": "m", "revision": "r"}
    store.add("o", {"calls": 1}, {**line, "calls": 1, "retries": 0, "seconds": 0.5})
    assert store.get([key])[key].text == "a\ufffdb"
