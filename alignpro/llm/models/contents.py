"""Digests of what names stand for: the weights of a model, and code, so that a run knows its own.

A large file is hashed once for as long as it is not written to: its hash is kept in the cache, by its path,
size and times.
"""

import contextlib
import hashlib
import inspect
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import cache_folder, read_json, real, sha256, write_json
from alignpro.llm.models import adapters, catalogue, packages, recipes, resolve

_LARGE = 1 << 20
"""Bytes from which a hash is kept."""
_FRESH_S = 2.0
"""Seconds after a write in which another may leave a file's times as they are."""
_KEPT = "hashes.json"
_PARTS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.gguf", "*.onnx")
_ABOUT = frozenset(
    ("facts", "base", "base_model_name_or_path", "_name_or_path", "transformers_version", "source")
)
"""Keys of JSON files that say where something came from, or where it lies, and change no answer."""


def of_model(name: str | Path) -> str | None:
    """Digest the model of that name: its weights, configuration, tokenizer, and those of an adapter's base.

    None where it is not on this machine yet.
    """
    if str(name) in catalogue.RECIPES:
        return recipes.cache_key(str(name))
    if str(name) in catalogue.MODELS:
        return catalogue.PACKAGES[catalogue.MODELS[str(name)].package].sha256[:16]
    path = Path(name).expanduser()
    if path.is_file():
        return file_hash(path)[:16]
    if not path.is_dir():
        return _on_hub(str(name))
    hashed = hashlib.sha256()
    for file in sorted({each for part in _PARTS for each in path.glob(part) if each.is_file()}):
        hashed.update(json.dumps([file.name, _part(file)]).encode())
    if catalogue.is_adapter(path):
        with contextlib.suppress(AlignProError):  # told when it is opened
            hashed.update(str(of_model(adapters.adapter_base(path))).encode())
    return hashed.hexdigest()[:16]


def of_code(function: Any) -> str | None:
    """Digest the module that a function, or an object's class, is defined in: not what that imports."""
    found = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    try:
        source = Path(str(inspect.getsourcefile(found))).read_text(encoding="utf-8")
        return packages.code_digest(source)[:16]
    except (OSError, TypeError, SyntaxError, ValueError):  # of C, or typed in by hand
        return None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal; that of a large one is kept until the file is written to."""
    status = path.stat()
    if status.st_size < _LARGE:
        return sha256(path)
    key = str(real(path))
    state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    book = cache_folder() / _KEPT
    known = _book(book).get(key)
    if isinstance(known, list) and known[:-1] == state:
        return str(known[-1])
    found = sha256(path)
    if time.time() - max(status.st_mtime, status.st_ctime) > _FRESH_S:
        with contextlib.suppress(AlignProError, OSError):  # no cache: it is hashed again
            book.parent.mkdir(parents=True, exist_ok=True)
            write_json(book, {**_book(book), key: [*state, found]})
    return found


def _book(path: Path) -> dict[str, Any]:
    with contextlib.suppress(AlignProError):
        found = read_json(path) if path.exists() else {}
        return found if isinstance(found, dict) else {}
    return {}


def _part(file: Path) -> str:
    if file.suffix == ".json" and file.stat().st_size < _LARGE:
        with contextlib.suppress(AlignProError):
            return json.dumps(_without(read_json(file)), sort_keys=True)
    return file_hash(file)


def _without(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(each) for key, each in value.items() if key not in _ABOUT}
    return value


def _on_hub(name: str) -> str | None:
    """The commit of a hub's model that is in the hub's cache; None where it is not."""
    from huggingface_hub import snapshot_download

    if not catalogue.HUB_ID.fullmatch(name):
        return None
    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=resolve.HUB_FILES)).name[
            :16
        ]
    except Exception:  # of the hub's own kinds, and httpx's
        return None
