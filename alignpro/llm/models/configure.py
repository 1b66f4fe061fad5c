"""Sets up a loaded model and its tokenizer alike for every architecture, and checks its numbers.

The fastest way to read the model (`forward.How`) that gives the numbers of a plain forward pass is recorded
on it; where none does, the model is refused. It costs eight passes over a handful of tokens.

Removed is what would silently move the optimum away from ρ* of Lemma 1: a shipped temperature (which rescales
λ), truncation, a repetition penalty, dropout, and a pad token equal to the end token (which hides the ends).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from alignpro.errors import AlignProError
from alignpro.llm.models import chat, packages
from alignpro.llm.models.forward import How, masks_of, remember, room, text_config, unwrap, windows
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.policy import draw, end_tokens, log_probs, sample_key
from alignpro.llm.models.sampling import Sampling

_LONGEST = 16_384
"""A window beyond this many tokens is not gone beyond: no prompt here comes near it."""

T = TypeVar("T")
Pair = tuple[list[int], list[int]]


class _Plain(NamedTuple):
    """Log-probabilities by plain forward passes, and what rounding may add to one of them."""

    values: list[np.ndarray]
    tolerance: float


_WAYS_TO_DRAW = (
    (True, True, True),
    (True, True, False),
    (False, True, False),
    (True, False, False),
    (False, False, False),
)
"""Fields shared, padded and opening of `How`, the fastest first."""


def check_model(model: Any, tokenizer: Any, name: str = "model") -> How:
    """Find the fastest way to read and sample the model that gives a plain forward pass's numbers; record it.

    Raises AlignProError where no way agrees with a plain forward pass, or numbers are not finite.
    """
    with quiet(), torch.inference_mode():
        pairs = _pairs(model, tokenizer)
        plain = _plain(model, pairs, name)
        found = How()
        for masks in masks_of(model):
            found = replace(found, masks=masks)
            off = _off(_tried(partial(_scored, model, pairs, found)), plain)
            if off <= plain.tolerance:
                break
        else:
            raise _refused(name, "the scores of sequences", off)
        for shared, padded, opening in _WAYS_TO_DRAW:
            found = replace(found, shared=shared, padded=padded, opening=opening)
            off = _drawn_off(model, tokenizer, pairs, found, name)
            if off <= 1.0:
                break
        else:
            raise _refused(name, "the probabilities of sampled tokens", off * plain.tolerance)
    remember(model, found)
    return found


def _refused(name: str, what: str, off: float) -> AlignProError:
    return AlignProError(
        f"model {name!r}: {what} differ from those of a plain forward pass by {off:.2g} nats a token, "
        "whichever way it is read; alignpro cannot use it: choose another, or report its architecture"
    )


def _pairs(model: Any, tokenizer: Any) -> list[Pair]:
    """Prompts and continuations of ordinary tokens: two prompts of different lengths, one with two branches;
    and one prompt half as long again as the window, with two more."""
    rng = np.random.default_rng(0)
    special = {*tokenizer.all_special_ids, *end_tokens(model), tokenizer.pad_token_id}
    size = min(len(tokenizer), int(text_config(model).vocab_size))
    ordinary = np.array([i for i in range(size) if i not in special] or [0])
    most = room(model) or 1 << 30

    def tokens(n: int) -> list[int]:
        return rng.choice(ordinary, n).tolist()

    start, branch = tokens(max(1, min(6, most - 6))), tokens(2)
    pairs = [
        (start, [*branch, *tokens(3)]),
        (start, [*branch, *tokens(3)]),
        (start[:-2] or start, tokens(7)),
    ]
    window = min((w for w in windows(model).values() if w is not None), default=None)
    length = 0 if window is None else window + max(4, window // 2)
    if window is not None and window <= _LONGEST and length + 8 < most:
        long = tokens(length)
        pairs += [(long, [*branch, *tokens(3)]), (long, [*branch, *tokens(3)])]
    return pairs


def _plain(model: Any, pairs: Sequence[Pair], name: str) -> _Plain:
    """Each sequence by itself, by the model's own logits: sequences of one length go through it together.

    Rounding: the type's relative precision times the logits' spread, 8 times over; 1e-4 nats at least.
    """
    causal, spread = unwrap(model), 0.0
    values: list[np.ndarray] = [np.empty(0)] * len(pairs)
    lengths = [len(prompt) + len(said) for prompt, said in pairs]
    for length in sorted(set(lengths)):  # as many at once as need no padding
        some = [i for i, n in enumerate(lengths) if n == length]
        ids = torch.tensor([[*pairs[i][0], *pairs[i][1]] for i in some], device=causal.device)
        try:
            every = causal(input_ids=ids, use_cache=False).logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of transformers, or of a library that computes on quantised weights
            why = " ".join(str(error).split())[:160] or type(error).__name__
            raise AlignProError(
                f"model {name!r}: a plain forward pass fails ({why}); choose another dtype, device or model"
            ) from error
        for row, i in enumerate(some):
            start = len(pairs[i][0])
            logits = every[row, start - 1 : -1].float()
            if not bool(torch.isfinite(logits).all()):
                raise AlignProError(
                    f"model {name!r}: its logits are not finite; its weights are damaged, or overflow in "
                    "this dtype: save it again, or choose another dtype"
                )
            spread = max(spread, float(logits.std()))
            each = torch.log_softmax(logits, -1).gather(1, ids[row, start:, None])[:, 0]
            values[i] = each.double().cpu().numpy()
    return _Plain(values, max(1e-4, 8 * torch.finfo(causal.dtype).eps * spread))


def _scored(model: Any, pairs: Sequence[Pair], how: How) -> list[np.ndarray]:
    found = log_probs(model, [p for p, _ in pairs], [said for _, said in pairs], how=how).log_probs
    rows = found.double().cpu().numpy()
    return [row[: len(said)] for row, (_, said) in zip(rows, pairs, strict=True)]


def _tried(way: Callable[[], T]) -> T | None:
    """The result of calling `way`; None where it raises, as an architecture does that cannot be read so."""
    try:
        return way()
    except (AlignProError, torch.OutOfMemoryError):
        raise
    except Exception:
        return None


def _off(found: list[np.ndarray] | None, plain: _Plain) -> float:
    """Largest mean difference of a sequence's tokens, in nats; infinite where nothing was found."""
    if found is None:
        return np.inf
    differences = [np.abs(a - b).mean() for a, b in zip(found, plain.values, strict=True)]
    return float(np.nan_to_num(max(differences), nan=np.inf))


def _drawn_off(model: Any, tokenizer: Any, pairs: Sequence[Pair], how: How, name: str) -> float:
    """The error of log-probabilities kept from sampling, two draws a prompt, in units of the tolerance."""
    prompts = [p for p, _ in pairs[1:]][:: -2 if len(pairs) > 3 else 1]
    rows = [p for p in sorted(prompts, key=len) for _ in range(2)]
    keys = [sample_key("check", i) for i in range(len(rows))]
    pad, sampling = int(tokenizer.pad_token_id), Sampling(max_tokens=2)
    drawn = _tried(lambda: draw(model, pad, rows, keys, sampling, score=True, how=how))
    if drawn is None:
        return np.inf
    plain = _plain(model, [(row, ids) for row, (ids, _) in zip(rows, drawn, strict=True)], name)
    return _off([np.array(values) for _, values in drawn], plain) / plain.tolerance


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
    (`check_model`).

    Raises:
        AlignProError: no chat template or one that fails, no end token, no usable pad token; a model whose
            scores are not those of a plain forward pass.
    """
    configure_model(model, tokenizer, name, chat_template_kwargs)
    check_model(model, tokenizer, name)
    return model


def configure_tokenizer(
    tokenizer: Any, shipped: Any, name: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """Do what `prepare` does to a tokenizer; the ids of the tokens that end a turn.

    Args:
        shipped: the end tokens of the model's generation_config: an id, several, or None.
    """
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
    listed = shipped if isinstance(shipped, list) else [shipped]  # several tokens may end a turn
    for i in listed:
        if i is not None and (type(i) is not int or i < 0):
            raise AlignProError(
                f"model {name!r}: its end token {i!r:.40} is no token's id; mend eos_token_id"
            )
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(
        tokenizer.model_max_length, int | float
    ):
        raise AlignProError(f"model {name!r}: its tokenizer's model_max_length is no number; mend it")
    ends = [i for i in dict.fromkeys([*listed, tokenizer.eos_token_id]) if i is not None]
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
    return ends


def configure_model(
    model: Any, tokenizer: Any, name: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """All of `prepare` but the check of its numbers."""
    shipped = model.generation_config.eos_token_id
    ends = configure_tokenizer(tokenizer, shipped, name, chat_template_kwargs)
    pad_id, size = int(tokenizer.pad_token_id), int(text_config(model).vocab_size)
    if odd := [i for i in (*ends, pad_id) if not 0 <= i < size]:
        raise AlignProError(
            f"model {name!r}: the token {odd[0]}, which ends or pads its texts, is not among the {size:,} "
            "that the model knows; mend its tokenizer_config.json or generation_config.json"
        )
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
