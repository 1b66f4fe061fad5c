"""Uploading the folder of a model to the hub: what a model is made of and its card, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.models import packages
from alignpro.llm.models.libraries import one_line
from alignpro.llm.models.resolve import HUB_FILES

CARD = "README.md"
REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


def check_repository(repository: str) -> None:
    """Raise AlignProError unless `repository` is owner/name."""
    if not REPOSITORY.fullmatch(repository) or ".." in repository or "--" in repository:
        raise AlignProError(
            f"repository {repository!r}: give owner/name, of letters, digits, '.', '_' and '-'"
        )


def shared_files(folder: Path) -> dict[str, Path | bytes]:
    """By name: the files of a model's folder that others need, weights in safetensors alone.

    JSON files are given as they read elsewhere: where something lies on this machine is its own business, so
    that an absolute path becomes its last part.

    Raises:
        AlignProError: the folder holds no safetensors, or no model card.
    """
    found = sorted({path for kind in (*HUB_FILES, CARD) for path in folder.glob(kind) if path.is_file()})
    names = {path.name for path in found}
    if not any(name.endswith(".safetensors") for name in names) or CARD not in names:
        lacks = "weights in safetensors" if CARD in names else f"model card ({CARD})"
        raise AlignProError(
            f"folder {str(folder)!r}: holds no {lacks}; name the folder of a trained prompter, or one that "
            "`alignpro merge` made of it"
        )
    return {
        path.name: json.dumps(elsewhere(read_json(path)), ensure_ascii=False, indent=2).encode()
        if path.suffix == ".json" and not path.name.startswith("tokenizer")
        else path
        for path in found
    }


def elsewhere(value: Any) -> Any:
    """A JSON value with the last part of each absolute path in the path's place."""
    if isinstance(value, dict):
        return {key: elsewhere(each) for key, each in value.items()}
    if isinstance(value, list):
        return [elsewhere(each) for each in value]
    if isinstance(value, str) and re.match(r"(/|~/|[A-Za-z]:\\)", value) and "\n" not in value:
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a model's folder to `repository` on the hub, which is made if need be, and return its address.

    The login is the hub's own: `hf auth login`, or the environment variable HF_TOKEN.

    Args:
        folder: a trained prompter's, or one with a whole model: safetensors, configuration, card.
        repository: owner/name.
        private: whether a repository that is made here can be seen by its owner alone.

    Raises:
        AlignProError: a name or folder that will not do, no login, or whatever the hub refused, in a line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repository(repository)
    files = shared_files(Path(folder))
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message="Upload with alignpro")
    except LocalTokenNotFoundError as error:
        raise AlignProError(_refused(repository, "the hub asks for a login; run `hf auth login`")) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            why = "the hub refuses this login; run `hf auth login` with a token that may write there"
        else:
            why = f"the hub failed ({packages.scrub(one_line(error))}); retry"
        raise AlignProError(_refused(repository, why)) from error
    except Exception as error:  # httpx raises its own errors, which have no class in common with the hub's
        why = f"the hub cannot be reached ({packages.scrub(one_line(error))}); check the network and retry"
        raise AlignProError(_refused(repository, why)) from error
    return str(url)


def _refused(repository: str, why: str) -> str:
    return f"repository {repository!r}: {why}; nothing in the folder was changed"
