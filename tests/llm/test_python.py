"""Training from Python: `alignpro.train` in ten lines, and a prompter that an exception leaves as it was."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mutants import kills, mutated

import alignpro
from alignpro import llm, shown
from alignpro.commands import showing
from alignpro.errors import AlignProError
from alignpro.llm.models import adapters
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.training import open_ended

DOCS = Path(__file__).parents[2] / "docs"
PROMPTS = ["abc", "def", "gab"]
SMALL = {"iterations": 2, "samples": 2, "epochs": 1, "max_tokens": 4, "progress": False}


def shares(prompts, answers):
    """How much of each answer is one character: in [0, 1]."""
    return [y.count("a") / max(1, len(y)) for y in answers]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny, tokenizer = tiny_model(seed=1)
    tiny.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def how(model, tmp_path_factory):
    """Arguments of a small run."""
    out = tmp_path_factory.mktemp("runs") / "fresh"
    return {"target": model, "prompter": model, "out": out, "answers": llm.Sampling(max_tokens=4)} | SMALL


@pytest.fixture(scope="module")
def trained(how):
    return alignpro.train(PROMPTS, reward=shares, **how)


def test_the_example_of_the_page_runs(model, tmp_path, monkeypatch, capsys):
    """On a small model of the tests' own: the page's takes minutes."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(
        r"^```\{code-block\} python\n(.*?)^```$", (DOCS / "python.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(example.strip().splitlines()) <= 20
    small = ", ".join(f"{name}={value!r}" for name, value in {"prompter": model, **SMALL}.items())
    example, changed = re.subn(r"iterations=\d+,", f"{small},", example)
    assert changed == 1
    assert example.count('target="smollm2-135m-instruct"') == 1
    exec(example.replace("smollm2-135m-instruct", model), {"__name__": "example"})
    assert "mean reward of a round" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert (tmp_path / "runs/train/prompter/adapter_model.safetensors").is_file()


def test_what_it_returns_shows_itself(trained):
    frame = trained.to_frame()
    assert len(frame) == SMALL["iterations"]
    assert frame["score"].tolist() == [line["score"] for line in trained.metrics]
    assert "mean reward of a round" in str(trained)
    assert len(repr(trained)) < 300
    assert "<table>" in trained._repr_html_()
    assert trained.record["settings"]["prompts"] == 3  # as many as there are, not the 8 of the default


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lamda": 0.1}, "lamda: is no setting of training; choose from .*lam"),
        ({"reward": 3}, "reward: int is none"),
        ({"target": "https://host/v1"}, "give an Endpoint"),
        ({"gae_lambda": 0.5}, "gae_lambda"),
    ],
)
def test_wrong_arguments(how, wrong, said):
    with pytest.raises(AlignProError, match=said):
        alignpro.train(PROMPTS, **({"reward": shares} | how | wrong))
    with pytest.raises(AlignProError, match="give a list"):
        alignpro.train("abc", **({"reward": shares} | how))


def test_an_exception_leaves_the_prompter_as_it_was(trained, how, model, tmp_path):
    """In the second round, when the adapter has learned: it trains again as a fresh one does."""

    class Stop(Exception):
        """A fault of the user's own."""

    def failing(prompts, answers, calls=[]):  # noqa: B006 - counts over calls
        calls.append(1)
        if len(calls) % 2 == 0:
            raise Stop
        return shares(prompts, answers)

    def check(module) -> None:
        prompter = llm.Prompter.from_pretrained(model)
        before = prompter.log_probs(PROMPTS, ["x", "y", "z"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(open_ended, "left_as_it_was", module.left_as_it_was)
            with pytest.raises(AlignProError, match="Stop"):
                alignpro.train(PROMPTS, reward=failing, **how | {"prompter": prompter, "out": tmp_path / "a"})
        np.testing.assert_array_equal(prompter.log_probs(PROMPTS, ["x", "y", "z"]), before)
        out = tmp_path / f"again-{module.__name__}"
        try:
            again = alignpro.train(PROMPTS, reward=shares, **how | {"prompter": prompter, "out": out})
        except AlignProError as error:
            raise AssertionError(error) from error
        assert [line["score"] for line in again.metrics] == [line["score"] for line in trained.metrics]

    check(adapters)
    kills(check, mutated(adapters, "            del model.peft_config", "            pass"))
    kills(check, mutated(adapters, "setattr(module, name, child.get_base_layer())", "pass"))


def test_names_of_the_package():
    """Each is there with a docstring; importing the package loads neither torch nor JAX."""
    for name in llm.__all__:
        assert getattr(llm, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llm.nothing
    script = "import sys, alignpro, alignpro.llm; print({'torch', 'jax', 'numpy'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


def test_tutorials_take_names_from_the_package():
    """Nobody who follows a tutorial or the page on Python needs to know where in it a name lives."""

    def check(text: str) -> None:
        assert not re.findall(r"from alignpro\.llm\.\S+ import", text)

    tutorials = DOCS / "tutorials"  # notebooks are made of these, and may be of an earlier build
    for page in (*tutorials.glob("*.md"), *tutorials.glob("*.py"), DOCS / "python.md"):
        check(page.read_text())
    kills(check, "from alignpro.llm.policies.prompter import Prompter")


def test_every_result_that_shows_itself_has_a_layout():
    """Also those of the language models, which are found by their classes alone."""
    for module in (
        *("estimation.winrate", "llm.arms.instruct", "llm.arms.resample", "llm.training.reward"),
        *(
            "llm.training.sft",
            "llm.training.tree",
            "theory.search.verification",
            "theory.scale.instances",
            "estimation",
        ),
    ):
        importlib.import_module(f"alignpro.{module}")

    def kinds(of: type) -> set[str]:
        return {of.__name__}.union(*map(kinds, of.__subclasses__()))

    assert kinds(shown.Shown) - {"Shown", "Trained"} == set(showing.LAYOUTS) - {"Frontier"}
