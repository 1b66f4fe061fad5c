"""The tutorials that train: run as notebooks on tiny models, they leave their pictures and print the tables
of their pages."""

import re

import pytest
import tutorials
from matplotlib import image

from alignpro import rollouts
from alignpro.files import read_json_lines


def test_training_and_then_the_bound(made_recipe, tmp_path, monkeypatch):
    """The second one finds what the first one trained."""
    monkeypatch.chdir(tmp_path)
    model = {'"smollm2-135m-instruct"': repr(made_recipe.base)}
    small = model | {"ROUNDS = 40": "ROUNDS = 2", "max_tokens=40": "max_tokens=6"}
    printed = tutorials.played("train_a_prompter", small)
    assert len(read_json_lines("runs/plain/metrics.jsonl")) == 2
    page = tutorials.page_of("train_a_prompter")
    for x in ("How do I keep my bread from going stale?", "My bicycle chain squeaks."):
        (rewrite,) = [line for line in printed.splitlines() if line.startswith(x)]  # which says more than x
        page, shown = re.subn(rf"^{re.escape(x)} .+$", rewrite, page, flags=re.MULTILINE)
        assert shown == 1
    tutorials.shows(page, printed)

    small = model | {"HELD_OUT = 40": "HELD_OUT = 6", '"--answer-tokens", "40"': '"--answer-tokens", "6"'}
    printed = tutorials.played("check_the_bound", small)
    assert rollouts.read("runs/rolled/rollouts.jsonl").arms == ("none", "sft", "trained")
    page = tutorials.page_of("check_the_bound")
    tutorials.shows_rows(page, printed)
    with pytest.raises(AssertionError, match=r"not printed in this order: J\(nobody\)"):
        tutorials.shows_rows(page.replace("J(trained)", "J(nobody)", 1), printed)
    for name in ("curves", "compared", "bounds"):
        assert image.imread(f"{name}.png").std() > 0.01
