"""Prompters that are fine-tuned once, on this machine, into the cache: where they lie and how they are made.

The training is a process of its own (`alignpro.llm.training.recipe`): it starts from the same state whoever
asks, and changes nothing of who does.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import alignpro
from alignpro.errors import AlignProError
from alignpro.llm.models import packages
from alignpro.llm.models.catalogue import MODELS, PACKAGES, RECIPES

TRAINER = "alignpro.llm.training.recipe"
MADE_BY = (
    *(f"alignpro.llm.data.{name}" for name in ("bank", "packaged", "pairs", "split")),
    *(f"alignpro.llm.models.{name}" for name in ("adapters", "chat", "prompt")),
    "alignpro.llm.policies.prompter",
    "alignpro.llm.training.sft",
    TRAINER,
)
"""The modules whose code decides what is learned from which tokens. Those that load models and compute what
they say, always the same up to rounding, are left out."""
_OF_PROCESSES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def cache_key(name: str) -> str:
    """Name what is made now: by the recipe, the model and the data by their checksums, and the code."""
    recipe = RECIPES[name]
    needed = (*recipe.data, *([MODELS[recipe.base].package] if recipe.base in MODELS else []))
    facts = {
        "recipe": {k: v for k, v in asdict(recipe).items() if k != "cost"},
        "packages": {package: PACKAGES[package].sha256 for package in needed},
        "code": {module: packages.code_digest(_source(module)) for module in MADE_BY},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _source(module: str) -> str:
    """The source of a module, which is not imported."""
    spec = find_spec(module)
    return Path(str(spec and spec.origin)).read_text()


def home(name: str) -> Path:
    """The folder in the cache of what the recipe makes: an adapter with prompter.json."""
    return packages.cache_folder() / "prompters" / f"{name}-{cache_key(name)}"


def cached(name: str) -> bool:
    """Whether the recipe was made here (the content is not checked)."""
    return (home(name) / packages.MANIFEST).is_file()


def made(name: str) -> Path:
    """The folder of the prompter, which is trained at the first call.

    An interrupted training goes on at the next call. Of several processes that ask at once one trains, and
    the others wait.

    Raises:
        AlignProError: the training failed, or the folder differs from its manifest.
    """
    folder = home(name)
    if not (folder / packages.MANIFEST).is_file():
        recipe = RECIPES[name]
        packages.note(f"training the prompter {name} into {folder} (once, {recipe.cost})")
        environment = {k: v for k, v in os.environ.items() if k not in _OF_PROCESSES}
        roots = [str(Path(alignpro.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
        done = subprocess.run(
            [sys.executable, "-P", "-m", TRAINER, name, folder.name, json.dumps(asdict(recipe))],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not (folder / packages.MANIFEST).is_file():
            why = (done.stdout.strip().splitlines() or [f"its process ended with status {done.returncode}"])[
                -1
            ]
            raise AlignProError(f"prompter {name}: training it failed ({why}); run the command again")
    packages.verify_folder(folder)
    return folder
