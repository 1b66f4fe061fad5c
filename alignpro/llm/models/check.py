"""A check of every model before it is used: sampled and scored log-probabilities are the model's own.

The fastest way to read the model (`forward.How`) that gives the numbers of a plain forward pass is recorded
on it; where none does, the model is refused. It costs eight passes over a handful of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from alignpro.errors import AlignProError
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
        for shared, padded in ((True, True), (False, True), (True, False), (False, False)):
            found = replace(found, shared=shared, padded=padded)
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
