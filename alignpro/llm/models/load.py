"""Loads a model by name, folder, file or hub id, ready to sample from, score with and train.

Weights are read from safetensors, GGUF or (packaged) ONNX only. Nothing is unpickled, no folder's code run.
"""

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.models.adapters import adapter_base, check_patterns
from alignpro.llm.models.catalogue import ADAPTER_WEIGHTS, RANDOM_FILE, drawn_at_random, is_adapter
from alignpro.llm.models.configure import DTYPES, check_dtype, configure_tokenizer, device_of, prepare
from alignpro.llm.models.libraries import one_line, quiet
from alignpro.llm.models.resolve import resolve, resolve_tokenizer


def load_model(
    model: str | Path,
    dtype: str = "float32",
    device: str = "auto",
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, ready to sample from, score with and train (see `prepare`).

    Args:
        model: a name, folder, file or hub id (`resolve`), or the folder of an adapter that PEFT saved, which
            is merged into its base in memory.
        dtype: a row of `DTYPES`.
        device: `auto` (CUDA if there is one: that of this process's LOCAL_RANK), or a torch device such as
            `cpu` or `cuda:1`.
        chat_template_kwargs: further arguments of the chat template, such as {"enable_thinking": False}.

    Raises:
        AlignProError: unknown dtype or device, a model without weights or unreadable; see `prepare`.
    """
    where = device_of(device)
    check_dtype(dtype)
    folder = resolve(model)
    if (pool := _SHARED.get()) is not None:
        options = json.dumps(chat_template_kwargs, sort_keys=True, default=str)
        key = f"{folder.resolve()} {dtype} {where} {options}"
        if (kept := pool.get(key)) is None:
            with _unshared():
                loaded = load_model(model, dtype, device, chat_template_kwargs=chat_template_kwargs)
            pool[key] = kept = _Whole(*loaded)
        return kept.copy(), kept.tokenizer
    if is_adapter(folder):
        if dtype == "4bit":
            raise AlignProError(
                f"dtype '4bit': {str(model)!r} is an adapter, which cannot be merged into 4 bits; run "
                "alignpro merge first"
            )
        base, tokenizer = load_model(
            adapter_base(folder), dtype, device, chat_template_kwargs=chat_template_kwargs
        )
        with quiet():
            merged = attach_adapter(base, folder, str(model)).merge_and_unload()
        merged.name_or_path = merged.config._name_or_path = str(folder.resolve())
        return merged.eval(), tokenizer
    loaded, tokenizer = _load(folder, str(model), dtype, where)
    prepare(loaded, tokenizer, str(model), chat_template_kwargs=chat_template_kwargs)
    return loaded, tokenizer


_SHARED: ContextVar[WeakValueDictionary[str, "_Whole"] | None] = ContextVar("_SHARED", default=None)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Have models that are loaded more than once in the block share their weights in memory.

    Each is a model of its own, on which an adapter can be put; what must not be changed in the block are the
    weights themselves. They are let go with the last model that has them.
    """
    token = _SHARED.set(WeakValueDictionary())
    try:
        yield
    finally:
        _SHARED.reset(token)


@contextlib.contextmanager
def _unshared() -> Iterator[None]:
    token = _SHARED.set(None)  # what is loaded to be merged is changed
    try:
        yield
    finally:
        _SHARED.reset(token)


class _Whole:
    """A loaded model that nobody changes, and copies of it with the same weights, which keep it alive."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def copy(self) -> PreTrainedModel:
        """Modules of its own around the same parameters."""
        made = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
        vars(made)["_alignpro_whole"] = self
        return made


def load_tokenizer(
    model: str | Path, *, chat_template_kwargs: Mapping[str, Any] | None = None
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The tokenizer of a model, without its weights, and the ids of the tokens that end a turn: both as
    `load_model` has them.

    Raises:
        AlignProError: there is none, or none that can be read; see `configure.configure_tokenizer`.
    """
    folder = resolve_tokenizer(model)
    while is_adapter(folder):  # which has none of its own
        folder = resolve_tokenizer(adapter_base(folder))
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            if (folder / "generation_config.json").is_file():
                shipped = GenerationConfig.from_pretrained(folder)
            else:
                shipped = GenerationConfig.from_model_config(config)
    except Exception as error:
        raise AlignProError(
            f"model {str(model)!r}: cannot read its tokenizer and configuration ({one_line(error)}); save "
            "them with save_pretrained"
        ) from error
    return tokenizer, configure_tokenizer(tokenizer, shipped.eos_token_id, str(model), chat_template_kwargs)


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
            f"model {name!r}: cannot load {folder} ({one_line(error)}); check that it is a complete "
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


def attach_adapter(model: Any, folder: Path, name: str) -> Any:
    """`model` with the adapter that PEFT saved in `folder`, every tensor of it in place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise AlignProError(f"adapter {name!r}: {ADAPTER_WEIGHTS} is missing; save it again as safetensors")
    check_patterns(model, folder)
    try:
        with quiet():
            adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    except Exception as error:
        raise AlignProError(
            f"adapter {name!r}: cannot be put on its model ({one_line(error)}); save it again"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))  # True would ask the hub
    if odd := sorted(wanted ^ stored):
        raise AlignProError(
            f"adapter {name!r}: {'lacks' if odd[0] in wanted else 'has no place for'} {odd[0]} ({len(odd)} "
            "such tensors); it belongs to another model, or is damaged: save it again"
        )
    return adapted.eval()
