"""Fine-tunes a recipe's prompter into the cache: the process that `alignpro.llm.models.recipes` starts."""

import json
import shutil
import sys
from pathlib import Path

from alignpro import locks
from alignpro.errors import AlignProError
from alignpro.llm.data.pairs import PAIRS
from alignpro.llm.models import packages
from alignpro.llm.models.catalogue import Recipe
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.training.checkpoints import PROMPTER_FOLDER, SETTINGS_FILE
from alignpro.llm.training.pair_settings import SFTSettings
from alignpro.llm.training.sft import sft


def make(name: str, folder: Path, recipe: Recipe) -> None:
    """Train what is not in `folder` yet, or go on where a training was interrupted.

    Args:
        name: of the recipe, which goes into the prompter's facts with the folder's name.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.waited(folder.parent, f"{folder.name}.lock"):
        if (folder / packages.MANIFEST).is_file():  # by another process, which was waited for
            return
        work = folder.parent / f".making-{folder.name}"
        if not (work / SETTINGS_FILE).is_file():
            shutil.rmtree(work, ignore_errors=True)
        base = Prompter.from_pretrained(recipe.base, template=recipe.template)
        version = folder.name.removeprefix(f"{name}-")
        base.facts = {"recipe": {"name": name, "version": version, "pairs": recipe.pairs}}
        pairs = PAIRS[recipe.pairs](**recipe.options)
        sft(base, pairs, SFTSettings(**recipe.settings), work, resume=True, merge=False)
        content = work / PROMPTER_FOLDER
        packages.write_manifest(content, source=name)
        packages.publish(content, folder)
        shutil.rmtree(work)


def main() -> int:
    """Make the recipe that the command line holds; what went wrong is one line on standard output."""
    name, folder, recipe = sys.argv[1:]
    try:
        make(name, packages.cache_folder() / "prompters" / folder, Recipe(**json.loads(recipe)))
    except AlignProError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
