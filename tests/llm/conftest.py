"""Small models on one thread: two threads on models this small only wait for each other."""

import pytest
import torch
import zoo


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
