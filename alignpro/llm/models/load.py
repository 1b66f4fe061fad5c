"""Loads a model by name, folder, file or hub id, ready to sample from, score with and train.

Weights are read from safetensors, GGUF or (packaged) ONNX only. Nothing is unpickled, no folder's code run.
"""

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignpro.errors import AlignProError
from alignpro.files import read_json, real
from alignpro.llm.models import packages
from alignpro.llm.models.adapters import adapter_base, check_adapter, check_patterns
from alignpro.llm.models.catalogue import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RANDOM_FILE,
    drawn_at_random,
    is_adapter,
    stored,
)
from alignpro.llm.models.configure import configure_tokenizer, prepare
from alignpro.llm.models.devices import DTYPES, check_dtype, device_of, dtype_of
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
        dtype: a row of `DTYPES`, or `auto`: bfloat16 on a device that computes with it, otherwise float32.
        device: `auto` (CUDA if there is one: that of this process's LOCAL_RANK), or a torch device such as
            `cpu` or `cuda:1`.
        chat_template_kwargs: further arguments of the chat template, such as {"enable_thinking": False}.

    Raises:
        AlignProError: unknown dtype or device, a model without weights or unreadable; see `prepare`.
    """
    where = device_of(device)
    check_dtype(dtype)
    dtype = dtype_of(dtype, device)
    folder = resolve(model)
    if (pool := _SHARED.get()) is not None:
        options = json.dumps(chat_template_kwargs, sort_keys=True, default=str)
        key = f"{real(folder)} {dtype} {where} {options}"
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
        merged.name_or_path = merged.config._name_or_path = str(real(folder))
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
    with loading(f"model {str(model)!r}", folder, "tokenizer and configuration, with the model"):
        tokenizer = read_tokenizer(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if (folder / "generation_config.json").is_file():
            shipped = GenerationConfig.from_pretrained(folder)
        else:
            shipped = GenerationConfig.from_model_config(config)
    return tokenizer, configure_tokenizer(tokenizer, shipped.eos_token_id, str(model), chat_template_kwargs)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder as it is saved, or whatever reading it or its special tokens raises."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    _ = tokenizer.all_special_ids  # of tokens that it does not have, only this fails
    return tokenizer


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
    what = f"model {name!r}"
    with loading(what, folder, "causal language model"):
        tokenizer = read_tokenizer(folder)
    loaded, lacking = read_weights(AutoModelForCausalLM, folder, what, DTYPES[dtype], where, **more)
    if lacking:
        raise AlignProError(
            f"{what}: {folder} has no weights that fit {lacking[0]} ({len(lacking)} in all), which would be "
            "drawn at random; save the whole model again"
        )
    loaded.name_or_path = loaded.config._name_or_path = str(real(folder))  # an adapter's base, to PEFT
    if dtype == "4bit":
        loaded.requires_grad_(False)  # what computes on the quantised weights takes no others
    else:
        loaded.to(where)
    return loaded, tokenizer


@contextlib.contextmanager
def loading(what: str, folder: Path, kind: str) -> Iterator[None]:
    """Load quietly, and say in one line what went wrong: an AlignProError with its cause.

    Args:
        what: words for what is loaded, which the line begins with.
        kind: words for what the folder should be.
    """
    try:
        with quiet():
            yield
    except (AlignProError, KeyboardInterrupt, SystemExit, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # a panic of the Rust libraries is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise AlignProError(
            f"{what}: cannot load {folder} ({one_line(error)}); check that it is a complete {kind} saved as "
            "safetensors"
        ) from error


def read_weights(
    auto: Any,
    folder: Path,
    what: str,
    dtype: torch.dtype,
    where: torch.device,
    kind: str = "causal language model",
    **options: Any,
) -> tuple[Any, list[str]]:
    """A model of one of transformers' auto classes from safetensors, without its code, and the names of its
    weights that the folder has nothing for.

    In a folder for rehearsals the weights are drawn, on the device at once.

    Raises:
        AlignProError: the folder cannot be read, has weights of another shape, more layers than the model or
            numbers that are not finite.
    """
    with loading(what, folder, kind):
        if drawn_at_random(folder):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            with torch.device(where), torch.random.fork_rng():
                torch.manual_seed(int(read_json(folder / RANDOM_FILE)["seed"]))
                made = auto.from_config(config, dtype=dtype, trust_remote_code=False)
            if (folder / "generation_config.json").is_file():
                made.generation_config = GenerationConfig.from_pretrained(folder)
            return made, []
        kinds = {name: kind for name, kind, _ in stored(folder)}
        loaded, report = auto.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    # Its own classes know what a model may well leave aside, such as layers that predict further tokens.
    if odd := sorted(name for name in report["unexpected_keys"] if _LAYER.search(name)):
        raise AlignProError(
            f"{what}: {folder} has weights that its config.json has no place for, {odd[0]} the first of "
            f"{len(odd)}; save the whole model again"
        )
    if odd := sorted(name for name in report["unexpected_keys"] if not name.startswith("lm_head.")):
        packages.note(
            f"{what}: left aside are weights that such a model has no place for, {odd[0]} the first"
        )
    quantised = getattr(loaded.config, "quantization_config", None) is not None
    for name, value in loaded.named_parameters():
        if value.is_floating_point() and kinds.get(name, "F")[0] in "IU" and not quantised:
            raise AlignProError(f"{what}: {folder} has whole numbers in {name}; save the model again")
        if value.is_floating_point() and not bool(torch.isfinite(value.sum(dtype=torch.float32))):
            raise AlignProError(
                f"{what}: {folder} has numbers in {name} that are not finite; its weights are damaged: save "
                "it again"
            )
    return loaded, sorted({*report["missing_keys"], *(map(str, report.get("mismatched_keys", ())))})


_LAYER = re.compile(r"\.\d+\.(?!.*(rotary_emb|attn\.(masked_)?bias$|attention\.(masked_)?bias$))")
"""A weight of a layer. Masks and frequencies of rotations, which old versions saved, are none."""


def attach_adapter(model: Any, folder: Path, name: str) -> Any:
    """`model` with the adapter that PEFT saved in `folder`, every tensor of it in place."""
    from peft import PeftModel, get_peft_model_state_dict

    weights, what = folder / ADAPTER_WEIGHTS, f"adapter {name!r}"
    if not weights.is_file():
        raise AlignProError(f"{what}: {ADAPTER_WEIGHTS} is missing; save it again as safetensors")
    check_adapter(folder, what)
    _check_switches(folder, what)
    check_patterns(model, folder)
    with loading(what, folder, "adapter"):
        sound = {
            key: value.is_floating_point() and bool(torch.isfinite(value).all())
            for key, value in load_file(weights).items()
        }
        adapted = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
        # Embedding layers, if True, would ask the hub.
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        with torch.inference_mode():  # its configuration may make maps that fail only when they are used
            adapted(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device))
    if odd := sorted(wanted ^ set(sound)):
        raise AlignProError(
            f"{what}: {'lacks' if odd[0] in wanted else 'has no place for'} {odd[0]} ({len(odd)} such "
            "tensors); it belongs to another model, or is damaged: save it again"
        )
    if odd := sorted(key for key, well in sound.items() if not well):
        raise AlignProError(f"{what}: {odd[0]} has numbers that are not finite; train or save it again")
    return adapted.eval()


def _check_switches(folder: Path, what: str) -> None:
    """Refuse an adapter whose switches are neither on nor off, which PEFT takes as on, or which works after
    certain words only."""
    from peft import LoraConfig

    said = read_json(folder / ADAPTER_CONFIG, dict)
    switches = [field.name for field in dataclasses.fields(LoraConfig) if field.type in (bool, "bool")]
    for name in switches:
        if name in said and not isinstance(said[name], bool | None):
            raise AlignProError(
                f"{what}: its {ADAPTER_CONFIG} says {name} {str(said[name])[:40]!r}, neither true nor false; "
                "save it again"
            )
    if said.get("alora_invocation_tokens") is not None:
        raise AlignProError(
            f"{what}: it changes the model after certain words only (alora_invocation_tokens), which cannot "
            "be read here; train it without them"
        )
