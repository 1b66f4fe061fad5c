"""One forward pass over sequences that share prefixes, whatever the architecture, and its head's numbers.

An attention model reads a whole forest of them as one row, under masks that show each token its ancestors,
and in a layer with a window the nearest of them. Recurrent and convolutional layers have no such mask, and
are read sequence by sequence. `configure.check_model` finds out which (`How`), and records it on the model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alignpro.errors import AlignProError

_HOW = "_alignpro_how"
_ONE_PASS = 4096
"""Padded tokens of one forward pass over whole sequences, about."""


@dataclass(frozen=True)
class How:
    """The way in which a model is read, as found by comparing the ways with a plain forward pass."""

    masks: str = "one"
    """Form in which a forest is shown to it: `one` mask for all layers, one `by_type` of layer, or not at
    all, `none`, so that each sequence is read alone."""
    shared: bool = True
    """Whether a prompt that is continued several times is read once, its cache repeated."""
    padded: bool = True
    """Whether prompts of different lengths are continued in one batch, padded on the left."""
    opening: bool = True
    """Whether the tokens that all prompts of a batch begin with are read once, with padding behind them."""

    def describe(self) -> dict[str, Any]:
        """The fields, as JSON values."""
        return asdict(self)


def unwrap(model: Any) -> Any:
    """The causal language model under wrappers for processes and for adapters, which stay in place."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def how_of(model: Any) -> How:
    """The way found by `configure.check_model`; refuses a model that was never checked."""
    found = getattr(unwrap(model), _HOW, None)
    if found is None:
        raise AlignProError(
            f"model {type(unwrap(model)).__name__}: it was not checked, so that its scores could be wrong "
            "without a word; load it with models.load_model, or call models.prepare(model, tokenizer) once"
        )
    return found


def remember(model: Any, how: How) -> None:
    """Record `how` on the model."""
    setattr(unwrap(model), _HOW, how)


def text_config(model: Any) -> Any:
    """The configuration of the language model, which models with a vision tower hold inside their own."""
    return unwrap(model).config.get_text_config()


def room(model: Any) -> int | None:
    """Most tokens of a sequence, prompt and continuation together; None where nothing limits them."""
    config = text_config(model)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(found) if found else None


@torch.no_grad()
def token_seconds(model: Any) -> float:
    """Seconds that this machine takes to score a token now: those of one short forward pass."""
    ids = torch.arange(1, 513, device=model.device).view(4, 128) % text_config(model).vocab_size
    model.base_model(input_ids=ids)
    since = time.monotonic()
    model.base_model(input_ids=ids)
    return (time.monotonic() - since) / ids.numel()


def check_tokens(model: Any, rows: Sequence[Sequence[int] | np.ndarray]) -> None:
    """Refuse ids of tokens that the model has no embedding for: a tokenizer may have more than its model.

    Raises:
        AlignProError: there is one; it says which.
    """
    known = unwrap(model).get_input_embeddings().weight.shape[0]
    if (last := max((int(np.max(row)) for row in rows if len(row)), default=0)) >= known:
        raise AlignProError(
            f"model {unwrap(model).name_or_path!r}: its tokenizer made the token {last}, and the model knows "
            f"{known:,}; save both together again, or leave out the text with that token"
        )


def has_experts(model: Any) -> bool:
    """Whether its layers are mixtures of experts, of which a token goes through some."""
    config = text_config(model)
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) for name in names)


def windows(model: Any) -> dict[str, int | None]:
    """The window of attention of each type of layer; None sees everything before."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    types = sorted(set(getattr(config, "layer_types", None) or ()))
    if not types:
        return {"": window}
    return {t: window if t == "sliding_attention" else None for t in types}


def masks_of(model: Any) -> list[str]:
    """Ways to show a forest that the configuration does not rule out, the likeliest to be right first."""
    found = windows(model)
    if not set(found) <= {"", "full_attention", "sliding_attention"}:
        return ["none"]  # recurrence, convolution, chunks: masks do not reach them
    return ["one", "none"] if len(found) == 1 else ["by_type", "none"]


@dataclass(frozen=True)
class Forest:
    """Sequences on their prefix trees.

    Attributes:
        tokens: [N] token of each node.
        parents: [N] index of the node before it, which comes earlier; −1 for the first token of a sequence.
    """

    tokens: np.ndarray
    parents: np.ndarray

    def sees(self) -> np.ndarray:
        """[N, N] whether node i has node j before it in its sequence, or is it."""
        found = np.eye(len(self.tokens), dtype=bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                found[i] |= found[parent]
        return found

    def path(self, node: int) -> list[int]:
        """Nodes from the first token of a sequence to `node`."""
        out = []
        while node >= 0:
            out.append(node)
            node = int(self.parents[node])
        return out[::-1]


def states(
    model: Any, forests: Sequence[Forest], wanted: Sequence[np.ndarray], how: How | None = None
) -> list[Tensor]:
    """Final hidden states at nodes of each forest, differentiable in the model.

    Args:
        model: called as it is (a DDP or PEFT wrapper included), so that its hooks run.
        wanted: for each forest, S indices of nodes.

    Returns:
        for each forest, [S, H].
    """
    how = how or how_of(model)
    check_tokens(model, [forest.tokens for forest in forests])
    if how.masks == "none":
        return _alone(model, forests, wanted)
    size = max(len(f.tokens) for f in forests)
    ids, positions = np.zeros((2, len(forests), size), np.int64)
    sees = np.zeros((len(forests), size, size), bool)
    sees[:, np.arange(size), np.arange(size)] = True  # padding sees itself, so that no row is empty
    for b, forest in enumerate(forests):
        n, seen = len(forest.tokens), forest.sees()
        ids[b, :n], positions[b, :n], sees[b, :n, :n] = forest.tokens, seen.sum(1) - 1, seen
    first = next(unwrap(model).parameters())
    device, dtype = first.device, unwrap(model).dtype

    def additive(window: int | None) -> Tensor:
        """The form that every attention implementation with a mask of its own understands."""
        seen = sees
        if window is not None and window < size:
            seen = sees & (positions[:, :, None] - positions[:, None, :] < window)
        mask = torch.zeros(seen.shape, dtype=dtype)
        return mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(dtype).min).to(device)[:, None]

    each = {name: additive(window) for name, window in windows(model).items()}
    mask = each if how.masks == "by_type" else next(iter(each.values()))
    hidden = _hidden(
        model,
        input_ids=torch.as_tensor(ids, device=device),
        position_ids=torch.as_tensor(positions, device=device),
        attention_mask=mask,
    )
    return [hidden[b, torch.as_tensor(at, device=device)] for b, at in enumerate(wanted)]


def passes(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, in passes of `most` padded tokens at most, or of one."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while order:
        n = max(1, most // sizes[order[0]])
        yield order[:n]
        order = order[n:]


def count_passes(forest: Forest, wanted: np.ndarray, how: How) -> int:
    """How many forward passes `states` makes of one forest."""
    if how.masks != "none":
        return 1
    rows, _ = _paths([forest], [wanted])
    return sum(1 for _ in passes([len(path) for _, path in rows], _ONE_PASS))


def _paths(
    forests: Sequence[Forest], wanted: Sequence[np.ndarray]
) -> tuple[list[tuple[int, list[int]]], list[dict[int, tuple[int, int]]]]:
    """Sequences that hold all wanted nodes, each as its forest and a path that no other goes on from; and for
    each forest, by node, its sequence and its place there."""
    rows: list[tuple[int, list[int]]] = []
    home: list[dict[int, tuple[int, int]]] = [{} for _ in forests]
    for b, (forest, at) in enumerate(zip(forests, wanted, strict=True)):
        for node in sorted({int(node) for node in at}, key=lambda n: -len(forest.path(n))):
            if node in home[b]:
                continue
            path = forest.path(node)
            for place, passed in enumerate(path):
                home[b].setdefault(passed, (len(rows), place))
            rows.append((b, path))
    return rows, home


def _alone(model: Any, forests: Sequence[Forest], wanted: Sequence[np.ndarray]) -> list[Tensor]:
    """Hidden states as `states` gives them, each sequence read by itself and padded on the right."""
    device = next(unwrap(model).parameters()).device
    rows, home = _paths(forests, wanted)
    found: dict[int, Tensor] = {}
    for some in passes([len(path) for _, path in rows], _ONE_PASS):
        ids, mask = np.zeros((2, len(some), len(rows[some[0]][1])), np.int64)
        for k, i in enumerate(some):
            b, path = rows[i]
            ids[k, : len(path)], mask[k, : len(path)] = forests[b].tokens[path], 1
        hidden = _hidden(
            model,
            input_ids=torch.as_tensor(ids, device=device),
            attention_mask=torch.as_tensor(mask, device=device),
        )
        found.update({i: hidden[k] for k, i in enumerate(some)})
    places = [[home[b][int(node)] for node in at] for b, at in enumerate(wanted)]
    return [torch.stack([found[i][place] for i, place in row]) for row in places]


def _hidden(model: Any, **inputs: Any) -> Tensor:
    """[B, L, H] the decoder's last hidden states, its head applied to one position only."""
    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0])

    handle = unwrap(model).base_model.register_forward_hook(keep)
    try:
        model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    return kept[-1]


# --- the head --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """From final hidden states to logits: a linear map, then the scale and soft cap that some models have."""

    module: Any
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a causal language model; refuses one without."""
        causal, config = unwrap(model), text_config(model)
        module = causal.get_output_embeddings()
        if module is None:
            raise AlignProError(f"model {type(causal).__name__}: it has no language-model head; name another")
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        return cls(module, scale, getattr(config, "final_logit_softcapping", None) or None)  # Gemma 2

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and cap, which act on each logit by itself."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[S, V] float32 logits of hidden states [S, H]."""
        return self.finish(self.module(hidden).float())


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """States whose logits are held at once: 64 MiB of them on a CPU, 512 MiB on a GPU."""
    return max(1, 2 ** (27 if device.type == "cuda" else 24) // vocabulary)


def edge_log_probs(
    head: Head, hidden: Tensor, at: Tensor, token: Tensor, choose: Callable[..., Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens after states, and the states' entropies, one chunk of logits at a time.

    What a gradient needs of the logits, E_p[W], is taken while a chunk is there.

    Args:
        hidden: [S, H].
        at, token: [E] state before each token, and the token.
        choose: called as `choose(logits, at, token)` for another distribution than the model's own; no
            gradient then.

    Returns:
        [E] log-probabilities in nats, differentiable in `hidden`, and [S] entropies in nats, which are not.
    """
    module = head.module
    if choose is None and type(module) is nn.Linear and not module.weight.requires_grad:
        return _EdgeLogProbs.apply(hidden, at, token, module.weight, module.bias, head.scale, head.cap)

    def one(some: Tensor, at: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(some)
        total = torch.logsumexp(logits, -1)
        with torch.no_grad():
            entropy = total - (torch.exp(logits - total[:, None]) * logits).sum(-1)
        return logits[at, token] - total[at] if choose is None else choose(logits, at, token), entropy

    values = hidden.new_zeros(len(at), dtype=torch.float32)
    entropies = []
    for start, here in _chunks(hidden, at, _vocabulary(module)):
        part = hidden[start : start + chunk_rows(hidden.device, _vocabulary(module))]
        arguments = part, at[here] - start, token[here]
        if torch.is_grad_enabled():
            found, entropy = checkpoint(one, *arguments, use_reentrant=False)
        else:
            found, entropy = one(*arguments)
        values = values.index_put((here,), found)
        entropies.append(entropy)
    return values, torch.cat(entropies)


def _vocabulary(module: Any) -> int:
    return int(getattr(module, "out_features", None) or module.weight.shape[0])


def _chunks(hidden: Tensor, at: Tensor, vocabulary: int) -> list[tuple[int, Tensor]]:
    """(first state, indices of its edges) of each chunk."""
    rows = chunk_rows(hidden.device, vocabulary)
    which = torch.div(at, rows, rounding_mode="floor")
    starts = range(0, len(hidden), rows)
    return [(start, (which == i).nonzero()[:, 0]) for i, start in enumerate(starts)]


class _EdgeLogProbs(torch.autograd.Function):
    """`edge_log_probs` of a linear head that is not trained.

    With logits l = c(s·Wh + b), c the cap: ∂ log p(t|h)/∂h = s (c′(l_t) W_t − Σ_v p_v c′(l_v) W_v). The sum
    belongs to the state alone and costs one product with W, as the backward pass of a softmax does.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        at, token, weight, bias, scale, cap = rest
        values = torch.empty(len(at), dtype=torch.float32, device=hidden.device)
        slopes = torch.ones_like(values)  # c′ at each edge's own logit
        entropies = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        wants = ctx.needs_input_grad[0]
        expected = torch.empty_like(hidden) if wants else None
        rows = chunk_rows(hidden.device, len(weight))
        for start, here in _chunks(hidden, at, len(weight)):
            part = slice(start, start + rows)
            logits = nn.functional.linear(hidden[part], weight, bias).float()
            if scale != 1.0:
                logits *= scale
            if cap is not None:
                logits.div_(cap).tanh_().mul_(cap)
            total = torch.logsumexp(logits, -1)
            own = logits[at[here] - start, token[here]]
            values[here] = own - total[at[here] - start]
            p = torch.exp(logits - total[:, None])
            entropies[part] = total - torch.einsum("sv,sv->s", p, logits)
            if expected is not None:
                if cap is not None:
                    p *= 1 - (logits / cap).square()
                    slopes[here] = 1 - (own / cap).square()
                expected[part] = p.to(weight.dtype) @ weight
        if expected is not None:
            ctx.save_for_backward(expected, slopes, at, token, weight)
            ctx.scale = scale
        ctx.mark_non_differentiable(entropies)
        return values, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropies: Tensor) -> tuple[Tensor | None, ...]:
        expected, slopes, at, token, weight = ctx.saved_tensors
        found = torch.zeros(expected.shape, dtype=torch.float32, device=expected.device)
        found.index_add_(0, at, (grad * slopes)[:, None] * weight[token].float())
        sums = torch.zeros(len(expected), device=expected.device).index_add_(0, at, grad)
        found -= sums[:, None] * expected.float()
        return (found * ctx.scale).to(expected.dtype), None, None, None, None, None, None
