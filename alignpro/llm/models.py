"""One resolver from a model's name to a folder of safetensors, and one loader that makes it trainable.

A name is looked up in `MODELS` (weights shipped inside a package), then as a local folder or GGUF file, then
as a hub id. Weights are read from safetensors, GGUF or (packaged) ONNX only: unpickling runs code, so it is
never done.

The loader removes what silently moves the optimum of the prompter's objective, eq. (9), away from ρ* of
Lemma 1: a shipped sampling temperature (which rescales λ), top-k or nucleus truncation, a repetition
penalty, dropout, and a pad token equal to the end token (which hides the end of every answer).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
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

from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm import chat, packages
from alignpro.llm.check import check_model
from alignpro.llm.libraries import quiet

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "4bit": torch.bfloat16,
}
"""Types of weights by name, and what is computed in. 4bit: NF4 by bitsandbytes (arXiv 2305.14314)."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


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
    model: str | Path,
    dtype: str = "float32",
    device: str = "auto",
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to sample from, score with and train (see `prepare`).

    `config._name_or_path` is the resolved folder, from which trainers reload the reference.

    Args:
        model: see `resolve`; or the folder of an adapter that PEFT saved, which is merged into its base in
            memory.
        dtype: a row of `DTYPES`.
        device: `auto` (CUDA if there is one: that of this process's LOCAL_RANK), or a torch device such as
            `cpu` or `cuda:1`.
        chat_template_kwargs: further arguments of the chat template, such as {"enable_thinking": False}.

    Raises:
        AlignProError: an unknown dtype or device, a model that lacks weights, a folder that transformers
            cannot read; or a failure of `resolve` or `prepare`.
    """
    where = device_of(device)
    check_dtype(dtype)
    folder = resolve(model)
    if is_adapter(folder):
        return _load_adapter(folder, str(model), dtype, device, chat_template_kwargs)
    loaded, tokenizer = _load(folder, str(model), dtype, where)
    prepare(loaded, tokenizer, str(model), chat_template_kwargs=chat_template_kwargs)
    return loaded, tokenizer


def check_dtype(dtype: str) -> None:
    """Refuse a type of weights that is not in `DTYPES`, and 4bit without bitsandbytes.

    Raises:
        AlignProError: so.
    """
    if dtype not in DTYPES:
        raise AlignProError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if dtype == "4bit" and find_spec("bitsandbytes") is None:
        raise AlignProError(
            "dtype '4bit': the package bitsandbytes is missing; run pip install bitsandbytes, or choose "
            "bfloat16"
        )


def _load(folder: Path, name: str, dtype: str, where: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer of a folder as they are saved, on their device."""
    more: dict[str, Any] = {}
    if dtype == "4bit" and not drawn_at_random(folder):
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        more = {"quantization_config": config, "device_map": {"": where}}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loaded, report = read_weights(AutoModelForCausalLM, folder, DTYPES[dtype], where, **more)
    except Exception as error:
        raise AlignProError(
            f"model {name!r}: cannot load {folder} ({_one_line(error)}); check that it is a complete "
            "causal language model saved as safetensors"
        ) from error
    wrong = sorted(report["missing_keys"]) or sorted(map(str, report.get("mismatched_keys", ())))
    if wrong:
        raise AlignProError(
            f"model {name!r}: {folder} has no weights that fit {wrong[0]} ({len(wrong)} in all), which would "
            "be drawn at random; save the whole model again"
        )
    loaded.name_or_path = loaded.config._name_or_path = str(folder.resolve())  # an adapter's base, to PEFT
    if dtype == "4bit":
        loaded.requires_grad_(False)  # what computes on the quantised weights takes no others
    else:
        loaded.to(where)
    return loaded, tokenizer


RANDOM_FILE = "random_weights.json"
"""Marks a folder for rehearsals: a configuration and a tokenizer, whose weights are drawn at loading."""
REHEARSAL = "ALIGNPRO_REHEARSAL"
"""The environment variable without which such a folder is refused; 1 in a rehearsal."""


def drawn_at_random(folder: Path) -> bool:
    """Whether the folder is one for rehearsals.

    Raises:
        AlignProError: it is, and this is no rehearsal.
    """
    if not (folder / RANDOM_FILE).is_file():
        return False
    if os.environ.get(REHEARSAL) != "1":
        raise AlignProError(
            f"model folder {folder} has no weights: it was made for a rehearsal (experiments/paper.py "
            "--rehearse); name a trained model"
        )
    return True


def read_weights(
    auto: Any, folder: Path, dtype: torch.dtype, where: torch.device, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of one of transformers' auto classes from safetensors, without its code, and what was amiss.

    In a folder for rehearsals the weights are drawn, on the device at once.
    """
    if drawn_at_random(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device(where), torch.random.fork_rng():
            torch.manual_seed(int(read_json(folder / RANDOM_FILE)["seed"]))
            made = auto.from_config(config, dtype=dtype, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            made.generation_config = GenerationConfig.from_pretrained(folder)
        return made, {"missing_keys": []}
    return auto.from_pretrained(
        folder,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )


# --- adapters --------------------------------------------------------------------------------------------


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter that PEFT saved, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """The name of the model that an adapter's folder rests on, found from any working folder.

    Raises:
        AlignProError: the folder does not say, or what it names is not there.
    """
    said: Any = {}
    for file, key in (("prompter.json", "base"), (ADAPTER_CONFIG, "base_model_name_or_path")):
        if (folder / file).is_file():
            said = read_json(folder / file)
            if isinstance(said, dict) and isinstance(said.get(key), str) and said[key]:
                return find_base(said[key], folder)
    raise AlignProError(f"adapter {folder}: does not name the model that it belongs to; save it again")


def find_base(base: str, folder: Path) -> str:
    """`base` as a name that can be opened now: a relative path is looked for from the working folder, then
    from `folder` and each folder above it.

    Raises:
        AlignProError: it is a path, and nothing is there.
    """
    path = Path(base).expanduser()
    if base in MODELS or path.exists():
        return base
    if not path.is_absolute():
        home = folder.expanduser().resolve()
        for parent in (home, *home.parents):
            if (parent / path).exists():
                return str(parent / path)
        if _HUB_ID.fullmatch(base):
            return base
    raise AlignProError(
        f"{folder}: its base model {base!r} is not there; put it back, or write where it is into base in its "
        "prompter.json (base_model_name_or_path in adapter_config.json)"
    )


def attach_adapter(model: Any, folder: Path, name: str) -> Any:
    """`model` with the adapter that PEFT saved in `folder`, every tensor of it in place.

    Raises:
        AlignProError: the adapter cannot be read, or does not fit the model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise AlignProError(f"adapter {name!r}: {ADAPTER_WEIGHTS} is missing; save it again as safetensors")
    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    except Exception as error:
        raise AlignProError(
            f"adapter {name!r}: cannot be put on its model ({_one_line(error)}); save it again"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))  # True would ask the hub
    if odd := sorted(wanted ^ stored):
        raise AlignProError(
            f"adapter {name!r}: {'lacks' if odd[0] in wanted else 'has no place for'} {odd[0]} ({len(odd)} "
            "such tensors); it belongs to another model, or is damaged: save it again"
        )
    return adapted.eval()


def _load_adapter(
    folder: Path, name: str, dtype: str, device: str, options: Mapping[str, Any] | None
) -> tuple[Any, Any]:
    if dtype == "4bit":
        raise AlignProError(
            f"dtype '4bit': {name!r} is an adapter, which cannot be merged into 4 bits; run "
            "alignpro merge first"
        )
    base, tokenizer = load_model(adapter_base(folder), dtype, device, chat_template_kwargs=options)
    with quiet():
        merged = attach_adapter(base, folder, name).merge_and_unload()
    merged.name_or_path = merged.config._name_or_path = str(folder.resolve())
    return merged.eval(), tokenizer


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
    prepare(model, tokenizer, "tiny")
    return model, tokenizer


def prepare(
    model: Any, tokenizer: Any, name: str = "model", *, chat_template_kwargs: Mapping[str, Any] | None = None
) -> Any:
    """Make a causal language model and its tokenizer, already in memory, ready to use, in place.

    The model is in evaluation mode with every dropout probability 0 (so that `train()` is harmless too) and
    samples its own distribution: temperature 1, top_p 1, top_k 0, no repetition penalty. It stops at every
    token that ends a turn: those of its generation_config, the tokenizer's, and the one that its chat
    template writes. The tokenizer pads on the left. The way to read the model is found and checked
    (`check.check_model`).

    Args:
        chat_template_kwargs: further arguments of the chat template.

    Returns:
        the model.

    Raises:
        AlignProError: no chat template or one that fails, no end token, no usable pad token; a model whose
            scores are not those of a plain forward pass.
    """
    configure_model(model, tokenizer, name, chat_template_kwargs)
    check_model(model, tokenizer, name)
    return model


def configure_model(
    model: Any, tokenizer: Any, name: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """All of `prepare` but the check of its numbers."""
    if not tokenizer.chat_template:
        raise AlignProError(
            f"model {name!r} has no chat template; choose an instruction-tuned model or add "
            "chat_template.jinja to its folder"
        )
    try:
        format_ = chat.configure(tokenizer, chat_template_kwargs)
        end = format_.end
    except AlignProError as error:
        raise AlignProError(f"model {name!r} {error}") from error
    shipped = model.generation_config.eos_token_id  # may list several tokens that end a turn
    listed = shipped if isinstance(shipped, list) else [shipped]
    ends = [int(i) for i in dict.fromkeys([*listed, tokenizer.eos_token_id]) if i is not None]
    if end not in ends:
        if ends:
            packages.note(
                f"model {name!r}: its chat ends a turn with {tokenizer.convert_ids_to_tokens(end)}, which "
                "its configuration does not list among the ends; it stops there, too"
            )
        ends.append(end)
    if format_.opens_thought:
        packages.note(
            f"model {name!r}: its chat template opens a thought before every answer; a prompter's is closed "
            "at once, others' are taken off their answers. They may be turned off by "
            "--chat-template-kwargs '{\"enable_thinking\": false}'"
        )
    pad = _pad_token(tokenizer, ends, name)
    if tokenizer.pad_token != pad:
        tokenizer.pad_token = pad
    tokenizer.padding_side = "left"  # generation continues from the right-hand end
    pad_id = int(tokenizer.pad_token_id)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = pad_id
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
    for config in (model.config, model.config.get_text_config()):
        for key, value in list(vars(config).items()):
            if re.search(r"dropout|_pdrop$", key) and isinstance(value, float):
                setattr(config, key, 0.0)
    if not getattr(model, "is_loaded_in_4bit", False):
        _forget_quantizer(model)
    model.eval()


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
    if is_adapter(folder) or drawn_at_random(folder):
        return folder
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


def device_of(device: str) -> torch.device:
    """The torch device that `device` names; of several processes on one machine each has its own by `auto`.

    Raises:
        AlignProError: it is no device, or CUDA is not to be had.
    """
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank >= torch.cuda.device_count():
            raise AlignProError(
                f"LOCAL_RANK {rank}: this machine has {torch.cuda.device_count()} CUDA devices; start no "
                "more processes than that"
            )
        torch.cuda.set_device(rank)  # what asks for CUDA without a number means this one
        return torch.device("cuda", rank)
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
