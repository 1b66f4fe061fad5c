"""A configuration file may be a stranger's: it runs nothing that is not beside it, and sends no key away."""

import pytest
from mutants import kills, mutated

from alignpro.commands import main, trusted
from alignpro.errors import AlignProError

KEY = "sk-planted-7f3a9c2e51d84b06"


def refused(module, file, options, given=()):
    try:
        module.checked(str(file), options, given)
    except AlignProError as error:
        return str(error)
    return ""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A working folder with a configuration file and a function in a folder below it."""
    monkeypatch.chdir(tmp_path)
    for name in ("conf/c.yaml", "conf/mine.py", "conf/deeper/mine.py", "mine.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "conf" / "link.py").symlink_to(tmp_path / "mine.py")
    return tmp_path


def test_functions_are_beside_the_file_or_on_the_command_line(home):
    """Mutants: any function is; any file is; a link that leads away is."""

    def check(module):
        for word in (
            "pty:spawn@0,1",
            "0.5 * os.path:join@0,1",
            "./../mine.py:score@0,1",
            "./deeper/mine.py:score@0,1",
            "./link.py:score@0,1",
            str(home / "mine.py") + ":score",
            "./absent.py:score@0,1",
            "my.module:score@clip:0,1",
            "x*https://mine.py:score@0,1",
        ):
            for words in (word, ["minilm-bt", word], ["mean", word, "ease"]):
                assert "functions of files beside it alone" in refused(
                    module, "conf/c.yaml", {"reward": words}
                )
            assert refused(module, "conf/c.yaml", {"reward": word}, ["reward"]) == ""

    check(trusted)
    kills(check, mutated(trusted, 'place.suffix != ".py" or path.parent != home or ', ""))
    kills(check, mutated(trusted, "path.parent != home", "False"))
    kills(check, mutated(trusted, "path = real(home / place)", "path = home / place"))


def test_a_function_beside_the_file_is_named_from_the_working_folder(home, monkeypatch):
    words = ["0.7*./mine.py:score@squash:0,1", "minilm-bt", "list:5", "owner/name@squash:0,2", "ease"]
    found = trusted.checked("conf/c.yaml", {"reward": words, "seed": 3}, [])
    assert found == {"reward": ["0.7*conf/mine.py:score@squash:0,1", *words[1:]], "seed": 3}
    monkeypatch.chdir(home / "conf")
    assert trusted.checked("c.yaml", {"reward": words}, [])["reward"] == words
    assert trusted.checked("c.yaml", {"reward": "ease"}, []) == {"reward": "ease"}


def test_a_file_sends_no_key_away(home, monkeypatch):
    """Mutants: any variable may be named; the reward's key goes to any address."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("ALIGNPRO_REWARD_KEY", KEY)
    address = "https://evil.example.org/v1"

    def check(module):
        for name in ("target-key-env", "judge-key-env", "reward-key-env"):
            options = {"target": address, name: "AWS_SECRET_ACCESS_KEY"}
            said = refused(module, "c.yaml", options)
            assert f"give --{name} AWS_SECRET_ACCESS_KEY on the command line" in said
            assert refused(module, "c.yaml", options, [name]) == ""
            assert KEY not in refused(module, "c.yaml", {name: KEY}) != ""  # pasted
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_SECRET_ACCESS_KEY_HOST", "api.example.org")  # held by `read_key`
                assert refused(module, "c.yaml", options) == ""
        for options in (
            {"reward": f"{address}@0,1"},
            {"reward": ["ease", f"0.5*{address}@0,1"]},
            {"reward": "judge", "reward-judge": address},
        ):
            assert "ALIGNPRO_REWARD_KEY would go to evil.example.org" in refused(module, "c.yaml", options)
            assert refused(module, "c.yaml", options, ["reward-key-env"]) == ""
            assert refused(module, "c.yaml", options, ["reward", "reward-judge"]) == ""
            with pytest.MonkeyPatch.context() as patch:
                patch.delenv("ALIGNPRO_REWARD_KEY")
                assert refused(module, "c.yaml", options) == ""

    check(trusted)
    kills(check, mutated(trusted, "and not _bound(own[name])", "and False"))
    kills(check, mutated(trusted, "and not _bound(_REWARD_KEY)", "and False"))


def test_the_engine_is_given_no_code(home):
    """vLLM imports what `worker_cls` and others name. Mutant: texts pass."""

    def check(module):
        for engine in ('{"worker_cls": "pty.spawn"}', '{"hf_overrides": {"a": 1}}', '{"a": ["b:c"]}'):
            assert "texts may name code" in refused(module, "c.yaml", {"target-engine": engine})
        good = '{"tensor_parallel_size": 2, "gpu_memory_utilization": 0.8, "enforce_eager": true}'
        assert refused(module, "c.yaml", {"target-engine": good}) == ""

    check(trusted)
    kills(check, mutated(trusted, "isinstance(value, int | float | None)", "value"))


def test_the_command_line_asks(home, capsys):
    """No program of a stranger's file runs, and what does run is said first."""
    mark = home / "MARK"
    (home / "conf" / "c.yaml").write_text("reward: pty:spawn@0,1\n")
    (home / "p.txt").write_text(f"touch\n{mark}\n")
    words = ["rollout", "--out", "x", "--config", "conf/c.yaml", "--prompts-file", "p.txt"]
    assert main.main(words) == 2
    assert "functions of files beside it alone" in capsys.readouterr().err
    assert not mark.exists()
    assert not (home / "x").exists()
