"""Small models on one thread: two threads on models this small only wait for each other."""

import base64
from dataclasses import replace

import pytest
import small_recipe
import torch
import zoo

from alignpro.llm.models import catalogue, packages


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DRAWN = ("test_demo", "test_task")
"""Where pages are looked at, figures included."""
PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def _pages_with_one_small_picture(request, monkeypatch):
    """Figures have tests of their own (tests/commands); drawing them here took a third of the time."""
    if request.module.__name__ not in DRAWN:
        monkeypatch.setattr("alignpro.report.figures.png", lambda drawing: PICTURE)


@pytest.fixture(scope="session")
def animals(tmp_path_factory):
    """Name of a family -> its folder, built when it is asked for."""
    folder, built = tmp_path_factory.mktemp("zoo"), {}

    def get(name):
        if name not in built:
            make = zoo.build_classifier if name in zoo.CLASSIFIERS else zoo.build
            built[name] = make(name, folder)
        return built[name]

    return get


@pytest.fixture
def tiny_recipe(animals, tmp_path, monkeypatch):
    """The packaged recipe on a tiny model, in a cache of its own that has the data."""
    name = small_recipe.NAME
    base, settings = str(animals("qwen2_5")), small_recipe.TINY
    row = replace(catalogue.RECIPES[name], base=base, settings=settings, options={"n": 20, "each": 1})
    monkeypatch.setitem(catalogue.RECIPES, name, row)
    data = packages.cache_folder() / "packages"
    monkeypatch.setenv("ALIGNPRO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "packages").symlink_to(data)
    return row


@pytest.fixture
def made_recipe(tiny_recipe, monkeypatch):
    """The same, trained on a few pairs without a process of its own."""
    from alignpro.llm.data import pairs
    from alignpro.llm.models import recipes
    from alignpro.llm.training import recipe

    with monkeypatch.context() as patch:
        patch.setitem(pairs.PAIRS, tiny_recipe.pairs, small_recipe.few_pairs)
        recipe.make(small_recipe.NAME, recipes.home(small_recipe.NAME), tiny_recipe)
    return tiny_recipe
