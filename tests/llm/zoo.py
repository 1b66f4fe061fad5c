"""Tiny random models of the architectures that users have, under their real chat templates.

The templates are those that TRL's wheel ships. Weights are random and large, so that a wrong mask, position
or end shows in the first digits of every probability. What is particular to each family is in its row of
`FAMILIES`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, GenerationConfig, PreTrainedTokenizerFast

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEXT = [
    "Rewrite the request so that its answer will be more helpful. Keep its meaning. Request: Rewritten:",
    "How do plants grow? Explain step by step, in simple words, how plants grow from a seed.",
    "Name a famous painter and say what made their work important. Add one short instruction. Added:",
    "What are some practical tips for sleeping better at night? Give a detailed overview with examples.",
    "system user assistant model Cutting Knowledge Date: December 2023 Today Date: 26 Jul 2024",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant. Human: Assistant: VERDICT: A B",
]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.35,
}
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
LLAMA = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|finetune_right_pad_id|>",
)
PHI = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """One architecture with its conventions.

    Attributes:
        model: of transformers, its name.
        config: the name of its configuration, and further values of it.
        specials: the special tokens, in the order of their ids.
        roles: which of them are bos, eos, pad and unk.
        template: a file of TRL's, or a template.
        ends: tokens that generation_config lists as ends.
        end: the token that ends a turn of the chat.
        plain: added tokens that are not special.
        room: tokens that the model reads.
        masks: how it is expected to be read (`forward.How.masks`).
    """

    model: str
    config: str
    specials: tuple[str, ...]
    roles: dict[str, str]
    template: str
    ends: tuple[str, ...]
    end: str
    masks: str = "one"
    values: dict[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    room: int = 1024


_GEMMA_ROLES = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}
_QWEN_ROLES = {"eos": "<|im_end|>", "pad": "<|endoftext|>"}
_QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
_WINDOWED = {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8}
_ALTERNATING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]

FAMILIES: dict[str, Family] = {
    "llama3_2": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        "llama3_2.jinja",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    # The end of its turns is neither the tokenizer's end nor among the stops.
    "llama3_base": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"},
        "llama3.jinja",
        ("<|end_of_text|>",),
        "<|eot_id|>",
    ),
    "phi3_5": Family(
        "Phi3ForCausalLM",
        "Phi3Config",
        PHI,
        {"bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "unk": "<unk>"},
        "phi3_5.jinja",
        ("<|end|>", "<|assistant|>", "<|endoftext|>"),
        "<|end|>",
        values={"sliding_window": 2**18},
    ),
    "qwen2_5": Family(
        "Qwen2ForCausalLM", "Qwen2Config", QWEN, _QWEN_ROLES, "qwen2_5.jinja", _QWEN_ENDS, "<|im_end|>"
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "Qwen3Config",
        QWEN,
        _QWEN_ROLES,
        "qwen3.jinja",
        _QWEN_ENDS,
        "<|im_end|>",
        values={"head_dim": 8},
        plain=("<think>", "</think>"),
    ),
    "qwen3_5": Family(
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        QWEN,
        _QWEN_ROLES,
        "qwen3_5_think.jinja",
        _QWEN_ENDS,
        "<|im_end|>",
        masks="none",
        values={
            "head_dim": 8,
            "initializer_range": 0.2,  # its recurrence amplifies rounding
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        plain=("<think>", "</think>"),
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GEMMA,
        _GEMMA_ROLES,
        "gemma.jinja",
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        masks="by_type",
        values=_WINDOWED,
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GEMMA,
        _GEMMA_ROLES,
        "gemma3.jinja",
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        masks="by_type",
        values=_WINDOWED | {"layer_types": _ALTERNATING},
    ),
    "gemma3_vision": Family(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        GEMMA,
        _GEMMA_ROLES,
        "gemma3.jinja",
        ("<eos>", "<end_of_turn>"),
        "<end_of_turn>",
        masks="by_type",
        values=_WINDOWED | {"layer_types": _ALTERNATING},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        "MistralConfig",
        MISTRAL,
        {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
        _MISTRAL_TEMPLATE,
        ("</s>",),
        "</s>",
        values={"sliding_window": 16, "head_dim": 8},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", "GPT2Config", QWEN, _QWEN_ROLES, "qwen2_5.jinja", _QWEN_ENDS, "<|im_end|>"
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        QWEN,
        _QWEN_ROLES,
        "qwen2_5.jinja",
        _QWEN_ENDS,
        "<|im_end|>",
        masks="none",
        values={"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    ),
}


def tokenizer_of(
    specials: tuple[str, ...], roles: dict[str, str], template: str | None, plain: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 pieces, trained on `TEXT`."""
    backend = Tokenizer(models.BPE(unk_token=roles.get("unk")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 4, trainer)
    named = {f"{role}_token": token for role, token in roles.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=4096, **named)
    others = [AddedToken(t, special=True) for t in specials if t not in roles.values()]
    tokenizer.add_tokens(others, special_tokens=True)
    tokenizer.add_tokens(list(plain))
    if template is not None:
        file = TEMPLATES / template if template.endswith(".jinja") else None
        tokenizer.chat_template = template if file is None else file.read_text()
    return tokenizer


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Save the family's model and tokenizer, as its makers would, into `folder`/`name`."""
    row = FAMILIES[name]
    tokenizer = tokenizer_of(row.specials, row.roles, row.template, row.plain)
    common: dict[str, Any] = {"vocab_size": len(tokenizer)}
    for role in ("bos", "eos", "pad"):
        token = row.roles.get(role)
        common[f"{role}_token_id"] = token and tokenizer.convert_tokens_to_ids(token)
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": row.room, "initializer_range": 0.35}
    else:
        sizes = SMALL | {"max_position_embeddings": row.room}
    values = {**sizes, **common, **row.values}
    config = getattr(transformers, row.config)
    if name == "gemma3_vision":
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = transformers.Gemma3TextConfig(**values)
        made = config(
            text_config=text,
            vision_config={**tower, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        )
    else:
        made = config(**values)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, row.model)(made)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in row.ends]
    model.generation_config = GenerationConfig(
        eos_token_id=ends if len(ends) > 1 else ends[0], pad_token_id=common["pad_token_id"]
    )
    out = folder / name
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return out


def build_classifier(kind: str, folder: Path) -> Path:
    """A reward model of Gemma's kind (as RM-Gemma-2B) or BERT's, one output each."""
    if kind == "gemma_classifier":
        tokenizer = tokenizer_of(GEMMA, _GEMMA_ROLES, "gemma.jinja")
        tokenizer.padding_side = "right"
        config = transformers.GemmaConfig(
            **SMALL, head_dim=8, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2
        )
        config.num_labels = 1
        made: Any = transformers.GemmaForSequenceClassification
    else:
        specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        tokenizer = tokenizer_of(specials, {"pad": "[PAD]", "unk": "[UNK]"}, None)
        values = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
        config = transformers.BertConfig(
            **values, vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=512, pad_token_id=0
        )
        made = transformers.BertForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = made(config)
    out = folder / kind
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return out


CLASSIFIERS = ("gemma_classifier", "bert_classifier")


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward without a model: the share of vowels in the answer."""
    return [sum(c in "aeiou" for c in y) / max(1, len(y)) for y in responses]


def write_prompts(path: Path, n: int = 8) -> Path:
    """A file of prompts, one of which spells control tokens of every family."""
    texts = [f"How do plants grow, part {i}?" for i in range(n - 1)]
    texts.append("Say <|im_end|> and <end_of_turn> and <|eot_id|> and <|end|> and </s>.")
    path.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in texts))
    return path
