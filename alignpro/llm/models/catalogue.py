"""The packaged models, and what the name of a model may be."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from alignpro.errors import AlignProError


class PackagedModel(NamedTuple):
    """A GGUF or ONNX inside a package: the row of `PACKAGES` and the file's name there."""

    package: str
    file: str


MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minimind2-small": PackagedModel("minimind2", "model_quantized.onnx"),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The form of a hub id, owner/name."""


def check_name(model: str | Path) -> None:
    """Refuse what names no packaged model, folder, GGUF file or hub id, without reaching for the hub."""
    path = Path(model).expanduser()
    if str(model) in MODELS or (str(model) and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return
    if path.is_absolute() or str(model).startswith((".", "~")) or not HUB_ID.fullmatch(str(model)):
        raise AlignProError(
            f"model {str(model)!r}: no such folder, GGUF file or packaged model; name one of "
            f"{', '.join(MODELS)}, a folder of safetensors, or a hub id owner/name"
        )


def checked_folder(folder: Path) -> Path:
    """`folder`, if it holds a configuration and safetensors, an adapter, or what a rehearsal draws."""
    if is_adapter(folder) or drawn_at_random(folder):
        return folder
    if not (folder / "config.json").is_file():
        raise AlignProError(
            f"model folder {folder} has no config.json; name the folder that save_pretrained wrote"
        )
    if any(folder.glob("*.safetensors")):
        return folder
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        raise AlignProError(
            f"model folder {folder} has only pickled weights ({pickles[0]}), and unpickling can run "
            "code; convert it with save_pretrained(..., safe_serialization=True) where you trust it"
        )
    raise AlignProError(f"model folder {folder} has no *.safetensors; save the model with save_pretrained")


RANDOM_FILE = "random_weights.json"
"""Marks a folder for rehearsals: a configuration and a tokenizer, whose weights are drawn at loading."""
REHEARSAL = "ALIGNPRO_REHEARSAL"
"""The environment variable without which such a folder is refused; 1 in a rehearsal."""


def drawn_at_random(folder: Path) -> bool:
    """Whether the folder is one for rehearsals; refuse it where this is none."""
    if not (folder / RANDOM_FILE).is_file():
        return False
    if os.environ.get(REHEARSAL) != "1":
        raise AlignProError(
            f"model folder {folder} has no weights: it was made for a rehearsal (experiments/paper.py "
            "--rehearse); name a trained model"
        )
    return True


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter that PEFT saved, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
