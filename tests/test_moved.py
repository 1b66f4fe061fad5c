"""Old public paths still give their names, for one release, each with a warning that says where it is now."""

import importlib
import warnings

import pytest

OLD = {
    "alignpro.testing": ("instances", "alignpro.theory.testing"),
    "alignpro.winrate": ("wilson", "alignpro.estimation.winrate"),
    "alignpro.theory.limits": ("kl_budget", "alignpro.theory.results"),
    "alignpro.theory.hunt": ("ascend", "alignpro.theory.search.ascend"),
    "alignpro.theory.certify": ("certify", "alignpro.theory.proof.certify"),
    "alignpro.theory.robustness": ("perturbation", "alignpro.theory.results.robustness"),
    "alignpro.theory.preferences": ("fit_rewards", "alignpro.theory.results.preferences"),
    "alignpro.theory.chains": ("solve_chain", "alignpro.theory.results.chains"),
    "alignpro.llm.prompter": ("Prompter", "alignpro.llm.policies.prompter"),
    "alignpro.llm.datasets": ("prompts", "alignpro.llm.data.public"),
    "alignpro.llm.models": ("load_model", "alignpro.llm.models.load"),
    "alignpro.llm.rewards": ("load_reward", "alignpro.llm.rewards.opening"),
    "alignpro.llm.data": ("split_of", "alignpro.llm.data.split"),
}
"""By old path, a name that it held and where that now lives."""


def taken(module, name):
    """The object, and the warnings that taking it gave."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        value = getattr(importlib.import_module(module), name)
    return value, [w for w in said if issubclass(w.category, DeprecationWarning) and module in str(w.message)]


@pytest.mark.parametrize("module", OLD)
def test_an_old_path_warns_and_gives_what_has_moved(module):
    if module.startswith("alignpro.llm"):
        pytest.importorskip("torch")
    name, home = OLD[module]
    value, said = taken(module, name)
    assert [str(w.message) for w in said] == [
        f"{module}.{name} has moved to {home}.{name}; the old path goes with the next release"
    ]
    assert value is getattr(importlib.import_module(home), name)
    assert value.__module__.startswith(".".join(home.split(".")[:3]))
    assert said[0].filename == __file__  # the user's line, not the shim's
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nonesuch'"):
        taken(module, "nonesuch")


def test_instructions_and_the_old_command_line():
    pytest.importorskip("torch")
    value, said = taken("alignpro.llm.data", "instructions")
    assert value.__module__ == "alignpro.llm.data.packaged"
    assert len(said) == 1
    from alignpro import cli
    from alignpro.commands import main

    assert cli.main is main.main  # without a warning: installed scripts of the last release call it
    assert taken("alignpro.cli", "VERBS")[0] is main.VERBS
