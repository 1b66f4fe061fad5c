"""Sets up a loaded model and its tokenizer alike for every architecture: padding, ends, dtype, device.

Removed is what would silently move the optimum away from ρ* of Lemma 1: a shipped temperature (which rescales
λ), truncation, a repetition penalty, dropout, and a pad token equal to the end token (which hides the ends).
"""

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignpro.errors import AlignProError
from alignpro.llm.models import chat, packages
from alignpro.llm.models.check import check_model

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
DTYPES["4bit"] = torch.bfloat16
"""Types of weights by name, and what is computed in. 4bit: NF4 by bitsandbytes (arXiv 2305.14314)."""

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


def check_dtype(dtype: str) -> None:
    """Refuse a type of weights that is not in `DTYPES`, and 4bit without bitsandbytes."""
    if dtype not in DTYPES:
        raise AlignProError(f"dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if dtype == "4bit" and find_spec("bitsandbytes") is None:
        raise AlignProError(
            "dtype '4bit': the package bitsandbytes is missing; run pip install bitsandbytes, or choose "
            "bfloat16"
        )


def tiny_model(
    seed: int = 0, vocab: str = "abcdefgh", *, hidden: int = 32, layers: int = 2
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised Llama over single characters: a real model for tests without downloads.

    The tokens are `<pad>`, `<eos>`, `<unk>` (any other character) and one per character of `vocab`, with ids
    in that order. Next-token distributions are clearly non-uniform and depend on the context. Equal arguments
    give equal weights, and torch's global random state is left alone.

    Args:
        hidden: width, a multiple of 8.
        layers: number of transformer blocks.
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
    pad = choose_pad_token(tokenizer, ends, name)
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
    for owner in (*model.modules(), model.config, model.config.get_text_config()):
        if isinstance(owner, torch.nn.Dropout):
            owner.p = 0.0
        for key, value in list(vars(owner).items()):
            if re.search(r"dropout|_pdrop$", key) and isinstance(value, float):
                setattr(owner, key, 0.0)
    if not getattr(model, "is_loaded_in_4bit", False):
        forget_quantizer(model)
    model.eval()


def choose_pad_token(tokenizer: Any, ends: list[int], name: str) -> str:
    """A token to pad with that no text contains: the tokenizer's own, or a spare one if that is its end."""
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


def forget_quantizer(model: Any) -> None:
    """Let a model that was read from GGUF, which holds plain weights, be saved."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_model_name_or_path"):  # the GGUF's title, which is no path
        del model.config._model_name_or_path


def device_of(device: str) -> torch.device:
    """The torch device that `device` names; by `auto`, each process on a machine has its own."""
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
