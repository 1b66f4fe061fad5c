"""A language model as a policy over token sequences: sampling, and log-probabilities without repetition.

Rollouts repeat themselves: all prompts of a prompter begin with its template, and each is continued many
times. `sample` reads each distinct prompt once. `log_probs` scores all continuations of all prompts on their
prefix tree: a shared prefix goes through the model once, under a mask that shows each token its own past
only, and gradients are those of the plain computation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from alignpro.errors import AlignProError
from alignpro.llm.frozen import Sampling, digest
from alignpro.llm.local import _processors as processors
from alignpro.llm.local import _until_end as until_end
from alignpro.llm.tree import unwrap

Ids = Sequence[int]


# --- sampling ------------------------------------------------------------------------------------------


def sample_key(*parts: Any) -> int:
    """128 bits that determine one draw, from JSON values such as a seed, a step, a text and an index."""
    return int.from_bytes(digest("policy", *parts)[:16])


@torch.no_grad()
def sample_and_score(
    model: Any,
    pad: int,
    prompts: Sequence[Ids],
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 64,
) -> list[list[tuple[list[int], list[float]]]]:
    """Continuations of each prompt, up to and including an end token or `max_tokens`, as drawn.

    Args:
        model: a causal language model, adapter included; its `generation_config` names the end tokens.
        pad: id of the pad token.
        prompts: token ids, none empty.
        keys: for each prompt, one key per continuation (see `sample_key`). A draw depends on its key, the
            model and the prompt alone, up to the floating-point noise of batching.
        batch_size: sequences at once.

    Returns:
        [prompts][keys of the prompt]: tokens, and the log-probability in nats of each under the model itself
        (temperature 1, nothing truncated).
    """
    model = unwrap(model)
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, list) else [ends]
    out: list[list[Any]] = [[None for _ in row] for row in keys]
    jobs = [
        (p, i)
        for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
        for i in range(len(keys[p]))
    ]
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        rows = list(dict.fromkeys(p for p, _ in batch))
        counts = [sum(p == row for p, _ in batch) for row in rows]
        ids, mask = _left_padded([prompts[p] for p in rows], pad, model.device)
        cache = _read(model, ids, mask)
        repeats = torch.tensor(counts, device=ids.device)
        if cache is not None:
            for layer in cache.layers:
                layer.keys = layer.keys.repeat_interleave(repeats, 0)
                layer.values = layer.values.repeat_interleave(repeats, 0)
        ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=pad,
        )
        recorder = _Recorder()
        draw = processors([keys[p][i] for p, i in batch], sampling, ids.shape[1])
        chain = LogitsProcessorList([recorder.before, *draw, recorder.after])
        more = {} if cache is None else {"past_key_values": cache}
        with torch.inference_mode():
            new = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=chain, **more
            )
        values = torch.stack(recorder.values, 1).tolist()
        for (p, i), row, scores in zip(batch, new[:, ids.shape[1] :].tolist(), values, strict=True):
            kept = until_end(row, ends)
            out[p][i] = (kept, scores[: len(kept)])
    return out


def sample(*positional: Any, **named: Any) -> list[list[list[int]]]:
    """The tokens of `sample_and_score` alone."""
    return [[ids for ids, _ in row] for row in sample_and_score(*positional, **named)]


class _Recorder:
    """Keeps the log-probability of each token drawn: `before` sees the model's scores, `after` the draw."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def before(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._scores = scores.float()
        return scores

    def after(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = scores.argmax(-1, keepdim=True)
        total = torch.logsumexp(self._scores, -1)
        self.values.append(self._scores.gather(1, token)[:, 0] - total)
        return scores


def _read(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """The keys and values of all but the last token of each distinct prompt."""
    if ids.shape[1] < 2:
        return None
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        model.base_model(
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
    return cache


def _left_padded(rows: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = np.full((len(rows), width), pad), np.zeros((len(rows), width), int)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return torch.as_tensor(ids, device=device), torch.as_tensor(mask, device=device)


# --- scoring -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """Sequences on their prefix tree, as one row for the model.

    Attributes:
        rows: which sequences.
        tokens, parents: [N] of the tree's nodes; parents come first, −1 is the root.
        states: [S] nodes after which some continuation goes on.
        edges: for each sequence, (index into `states`, token) of each token of its continuation.
    """

    rows: tuple[int, ...]
    tokens: np.ndarray
    parents: np.ndarray
    states: np.ndarray
    edges: tuple[tuple[tuple[int, int], ...], ...]

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions [N] and who sees whom [N, N]."""
        n = len(self.tokens)
        positions, sees = np.zeros(n, int), np.zeros((n, n), bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                positions[i] = positions[parent] + 1
                sees[i, :i] = sees[parent, :i]
            sees[i, i] = True
        return positions, sees

    def table(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[rows, steps]: `edges` as two arrays, and 1.0 where there is one."""
        at, token = np.zeros((2, len(self.rows), steps), int)
        inside = np.zeros((len(self.rows), steps), np.float32)
        for i, edges in enumerate(self.edges):
            n = len(edges)
            at[i, :n], token[i, :n] = zip(*edges, strict=True)
            inside[i, :n] = 1.0
        return at, token, inside


def packs(prompts: Sequence[Ids], continuations: Sequence[Ids], most: int = 2048) -> list[Pack]:
    """Sequences gathered into prefix trees of about `most` nodes, those that share a prefix together.

    Raises:
        AlignProError: an empty prompt.
    """
    order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i]))
    found: list[Pack] = []
    start = 0
    while start < len(order):
        index: dict[tuple[int, int], int] = {}
        tokens: list[int] = []
        parents: list[int] = []
        state: dict[int, int] = {}
        rows: list[int] = []
        edges: list[tuple[tuple[int, int], ...]] = []
        while start < len(order) and (not rows or len(tokens) < most):
            i = order[start]
            prompt, said = prompts[i], continuations[i]
            if not len(prompt):
                raise AlignProError(f"prompts[{i}] has no tokens; a policy needs something to continue")
            node, steps = -1, []
            for place, token in enumerate((*prompt, *said)):
                if place >= len(prompt):
                    steps.append((state.setdefault(node, len(state)), int(token)))
                if place == len(prompt) + len(said) - 1 and len(said):
                    break  # what follows the last token is nobody's concern
                if (node, token) not in index:
                    index[node, token] = len(tokens)
                    tokens.append(int(token))
                    parents.append(node)
                node = index[node, token]
            rows.append(i)
            edges.append(tuple(steps))
            start += 1
        found.append(
            Pack(tuple(rows), np.array(tokens), np.array(parents), np.array([*state], int), tuple(edges))
        )
    return found


@dataclass(frozen=True)
class Scores:
    """What `log_probs` finds of B continuations of at most T tokens.

    Attributes:
        log_probs: [B, T] of each token, in nats; 0 past the end.
        entropies: [B, T] of the distribution each token was drawn from, in nats; 0 past the end. No gradient.
        hidden: [B, T, H] final hidden state before each token, or None; 0 past the end. No gradient.
    """

    log_probs: Tensor
    entropies: Tensor
    hidden: Tensor | None


def log_probs(
    model: Any,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    *,
    steps: int | None = None,
    hidden: bool = False,
    most: int = 2048,
) -> Scores:
    """Token log-probabilities of continuations, in nats, differentiable in the model.

    Args:
        model: called as it is (a DDP or PEFT wrapper included), so that its hooks run.
        prompts, continuations: B pairs of token ids.
        steps: T; the longest continuation's length when None.
        hidden: whether to return the hidden states too.
        most: tokens in one forward pass, about.
    """
    steps = max(map(len, continuations)) if steps is None else steps
    first = next(model.parameters())
    device, dtype = first.device, first.dtype
    order: list[int] = []
    parts: list[list[Tensor]] = []
    for pack in packs(prompts, continuations, most):
        positions, sees = pack.arrays()
        # Additive form: understood by every attention implementation that takes a 4-d mask.
        mask = torch.zeros(sees.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~sees), torch.finfo(dtype).min)
        states = torch.as_tensor(pack.states, device=device)
        out = model(
            input_ids=torch.as_tensor(pack.tokens, device=device)[None],
            position_ids=torch.as_tensor(positions, device=device)[None],
            attention_mask=mask.to(device)[None, None],
            logits_to_keep=states,
            output_hidden_states=hidden,
            use_cache=False,
        )
        logits = out.logits[0].float()
        total = torch.logsumexp(logits, -1)
        at, token, inside = (torch.as_tensor(a, device=device) for a in pack.table(steps))
        with torch.no_grad():
            entropy = total - (torch.exp(logits - total[:, None]) * logits).sum(-1)
            values = [entropy[at] * inside]
            if hidden:
                values.append(out.hidden_states[-1][0, states].float()[at] * inside[..., None])
        parts.append([(logits[at, token] - total[at]) * inside, *values])
        order += pack.rows
    back = torch.argsort(torch.tensor(order, device=device))
    found = [torch.cat(column)[back] for column in zip(*parts, strict=True)]
    return Scores(found[0], found[1], found[2] if hidden else None)
