"""One resolver from a model's name to a folder of safetensors, and one loader that makes it trainable.

A name is looked up in `MODELS` (weights shipped inside a package), then as a local folder or GGUF file, then
as a hub id. Weights are read from safetensors, GGUF or (packaged) ONNX only: unpickling runs code, so it is
never done.

The loader removes what silently moves the optimum of the prompter's objective, eq. (9), away from ρ* of
Lemma 1: a shipped sampling temperature (which rescales λ), top-k or nucleus truncation, a repetition
penalty, dropout, and a pad token equal to the end token (which hides the end of every answer).
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from alignpro.errors import AlignProError
from alignpro.llm import packages

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF or ONNX inside a package: the row of `PACKAGES` and the file's name there."""

    package: str
    file: str


MODELS: dict[str, PackagedModel] = {
    "smollm2-135m-instruct": PackagedModel("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minimind2-small": PackagedModel("minimind2", "model_quantized.onnx"),
}

# A pad token must be one that no answer contains. In order of preference, where the tokenizer has them.
_PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)
# Part of the cache folder's name: raise it when `_convert` writes something else.
_CONVERSION = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def check_name(model: str | Path) -> None:
    """Refuse what names no packaged model, folder, GGUF file or hub id, without reaching for the hub.

    Raises:
        AlignProError: so.
    """
    path = Path(model).expanduser()
    if str(model) in MODELS or (str(model) and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return
    if path.is_absolute() or str(model).startswith((".", "~")) or not _HUB_ID.fullmatch(str(model)):
        raise AlignProError(
            f"model {str(model)!r}: no such folder, GGUF file or packaged model; name one of "
            f"{', '.join(MODELS)}, a folder of safetensors, or a hub id owner/name"
        )


def resolve(model: str | Path) -> Path:
    """The local folder of safetensors, configuration and tokenizer that `model` names.

    Args:
        model: a key of `MODELS` (fetched and converted at first use), a folder, a `.gguf` file (converted
            once into the cache), or a hub id `owner/name` (safetensors only).

    Raises:
        AlignProError: nothing has that name, a folder without safetensors, a hub out of reach; or a failure
            of `packages.fetch`.
    """
    check_name(model)
    if str(model) in MODELS:
        shipped = MODELS[str(model)]
        archive = packages.PACKAGES[shipped.package].sha256
        folder = _converted_folder(str(model), archive)
        if _ready(folder):
            return folder
        return _convert(packages.fetch(shipped.package) / shipped.file, folder)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        folder = _converted_folder(path.stem, packages.sha256(path))
        return folder if _ready(folder) else _convert(path, folder)
    if str(model) and path.is_dir():  # an empty name would mean the current folder
        return _checked_folder(path)
    return _checked_folder(_from_hub(str(model)))


def load_model(
    model: str | Path, dtype: str = "float32", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to sample from, score with and train.

    The model is in evaluation mode with every dropout probability 0 (so that `train()` is harmless too) and
    samples its own distribution: temperature 1, top_p 1, top_k 0, no repetition penalty. The tokenizer pads
    on the left with a token that ends nothing, and has a chat template. `config._name_or_path` is the
    resolved folder, from which trainers reload the reference.

    Args:
        model: see `resolve`.
        dtype: `float32`, `bfloat16` or `float16`.
        device: `auto` (CUDA if there is one), or a torch device such as `cpu` or `cuda:1`.

    Raises:
        AlignProError: an unknown dtype or device, a model without a chat template or a usable pad token, a
            folder that transformers cannot read; or a failure of `resolve`.
    """
    if dtype not in DTYPES:
        raise AlignProError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    where = _device(device)
    folder = resolve(model)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], use_safetensors=True, trust_remote_code=False
            )
    except AlignProError:
        raise
    except Exception as error:
        raise AlignProError(
            f"model {str(model)!r}: cannot load {folder} ({_one_line(error)}); check that it is a complete "
            "causal language model saved as safetensors"
        ) from error
    _prepare(loaded, tokenizer, str(model))
    loaded.config._name_or_path = str(folder)
    loaded.to(where)  # type: ignore[arg-type]
    return loaded, tokenizer


def tiny_model(
    seed: int = 0, vocab: str = "abcdefgh", *, hidden: int = 32, layers: int = 2
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised Llama over single characters: a real model for tests without downloads.

    The tokens are `<pad>`, `<eos>`, `<unk>` (any other character) and one per character of `vocab`, with ids
    in that order. The initial scale makes next-token distributions clearly non-uniform and dependent on
    the context; they are identical for equal arguments and leave torch's global random state alone.

    Args:
        seed: of the weights.
        vocab: distinct characters.
        hidden: width, a multiple of 8.
        layers: number of transformer blocks.

    Raises:
        AlignProError: an empty vocabulary, repeated characters, or a bad width.
    """
    if not vocab or len(set(vocab)) != len(vocab):
        raise AlignProError(f"vocab {vocab!r}: name at least one character, each once")
    if hidden < 8 or hidden % 8 or layers < 1:
        raise AlignProError(f"hidden {hidden}, layers {layers}: hidden is a multiple of 8, layers at least 1")
    specials = ("<pad>", "<eos>", "<unk>")
    ids = {token: i for i, token in enumerate((*specials, *vocab))}
    backend = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # The final norm gives unit-variance features, so logits have standard deviation 2 whatever the width.
        initializer_range=2.0 / hidden**0.5,
        tie_word_embeddings=False,
        pad_token_id=ids["<pad>"],
        eos_token_id=ids["<eos>"],
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    _prepare(model, tokenizer, "tiny")
    return model, tokenizer


def _prepare(model: Any, tokenizer: Any, name: str) -> Any:
    """Everything `load_model` promises about a model and tokenizer that are already in memory, in place."""
    if not tokenizer.chat_template:
        raise AlignProError(
            f"model {name!r} has no chat template; choose an instruction-tuned model or add "
            "chat_template.jinja to its folder"
        )
    shipped = model.generation_config.eos_token_id  # may list several tokens that end a turn
    ends = shipped if isinstance(shipped, list) else [shipped]
    ends = [int(i) for i in dict.fromkeys([*ends, tokenizer.eos_token_id]) if i is not None]
    if not ends:
        raise AlignProError(
            f"model {name!r} has no end-of-sequence token; set eos_token in its tokenizer_config.json"
        )
    pad = _pad_token(tokenizer, ends, name)
    if tokenizer.pad_token != pad:
        tokenizer.pad_token = pad
    tokenizer.padding_side = "left"  # generation continues from the right-hand end
    pad_id = int(tokenizer.pad_token_id)
    # Qwen and Phi list their pad token among the ends; a token cannot be both.
    ends = [i for i in ends if i != pad_id]
    model.config.pad_token_id = pad_id
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=pad_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for key, value in list(vars(module).items()):
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, 0.0)
    for key, value in list(vars(model.config).items()):
        if re.search(r"dropout|_pdrop$", key) and isinstance(value, float):
            setattr(model.config, key, 0.0)
    _forget_quantizer(model)
    return model.eval()


def _pad_token(tokenizer: Any, ends: list[int], name: str) -> str:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else ends[0]
    if tokenizer.pad_token is not None and tokenizer.pad_token_id != end:
        return tokenizer.pad_token
    vocabulary = tokenizer.get_vocab()
    spare = [token for token in _PAD_CANDIDATES if vocabulary.get(token, end) != end]
    for token in (*(t for t in spare if vocabulary[t] not in ends), *spare):
        return token
    raise AlignProError(
        f"model {name!r}: its pad token is its end token and no spare token was found; set pad_token in its "
        "tokenizer_config.json to a token that no answer uses"
    )


def _forget_quantizer(model: Any) -> None:
    # A model read from GGUF holds plain floating-point weights, yet refuses to be saved while this is set.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):  # the GGUF's title, which is no path
        del model.config._model_name_or_path


def _converted_folder(name: str, sha256: str) -> Path:
    return packages.cache_folder() / "models" / f"{name}-{sha256[:12]}-v{_CONVERSION}"


def _convert(source: Path, folder: Path) -> Path:
    """Dequantise a GGUF or ONNX once into safetensors; atomic, checked against a manifest afterwards."""
    read = _read_onnx if source.suffix == ".onnx" else _read_gguf
    with packages.staging(folder) as partial:
        content = partial / "content"
        content.mkdir()
        packages.note(f"converting {source.name} into {folder} (once, about 15 s)")
        with quiet():
            model, tokenizer = read(source)
        _prepare(model, tokenizer, source.name)
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
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:
        raise AlignProError(
            f"cannot read {gguf} ({_one_line(error)}); transformers reads GGUF files of the common "
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
            f"cannot read {path} ({_one_line(error)}); only an 8-bit export with the module names of its "
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
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


def _ready(folder: Path) -> bool:
    if not (folder / packages.MANIFEST).is_file():
        return False
    packages.verify_folder(folder)
    return True


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise AlignProError(
            f"model folder {folder} has no config.json; name the folder that save_pretrained wrote"
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
        if pickles:
            raise AlignProError(
                f"model folder {folder} has only pickled weights ({pickles[0]}), and unpickling can run "
                "code; convert it with save_pretrained(..., safe_serialization=True) where you trust it"
            )
        raise AlignProError(
            f"model folder {folder} has no *.safetensors; save the model with save_pretrained"
        )
    return folder


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
    except GatedRepoError as error:
        raise AlignProError(
            f"model {model!r}: the hub asks for a login; accept its licence and run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise AlignProError(
            f"model {model!r}: the hub has no such model, or it is private; check the spelling or run "
            "`hf auth login`"
        ) from error
    except (OSError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise AlignProError(
            f"model {model!r}: the hub cannot be reached and no copy is cached; use one of "
            f"{', '.join(MODELS)}, or a local folder of safetensors"
        ) from error
    except Exception as error:  # httpx raises its own errors, which derive from neither of the above
        raise AlignProError(
            f"model {model!r}: the hub failed ({packages.scrub(_one_line(error))}); retry, or use one of "
            f"{', '.join(MODELS)}"
        ) from error


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise AlignProError(f"device {device!r}: use auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise AlignProError(f"device {device!r}: this machine or this torch has no CUDA; use cpu or auto")
    return chosen


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No weight-loading bars for work of a few seconds; the user's own settings come back afterwards."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
