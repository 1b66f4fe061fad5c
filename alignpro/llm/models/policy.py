"""A language model as a policy over token sequences: sampling, and log-probabilities without repetition.

`draw` reads each distinct prompt once, and what all prompts of a batch begin with once. `log_probs` scores
all continuations on their prefix tree, where the model can be read so (`forward`): a shared prefix goes
through it once, with the gradients of the plain computation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignpro.errors import AlignProError
from alignpro.llm.models import shards
from alignpro.llm.models.forward import (
    Forest,
    Head,
    How,
    check_tokens,
    count_passes,
    edge_log_probs,
    how_of,
    states,
    unwrap,
    windows,
)
from alignpro.llm.models.libraries import CACHE, quiet
from alignpro.llm.models.sampling import Sampling, digest

S = TypeVar("S")
T = TypeVar("T")
Ids = Sequence[int]
Drawn = tuple[list[int], list[float]]
"""A continuation's tokens, and the log-probability of each, in nats."""


# --- the sampler ---------------------------------------------------------------------------------------


class Warper:
    """Turns a model's next-token scores into those of `sampling`, in transformers' own order. Not called at
    temperature 0, which takes the likeliest token."""

    def __init__(self, sampling: Sampling) -> None:
        self.scale = sampling.temperature
        self.top_k = TopKLogitsWarper(sampling.top_k) if sampling.top_k else None
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """[N, K] processed scores of float32 [N, V], −inf if excluded, and their tokens [N, K]; None: all."""
        ids, tokens = torch.empty(0, dtype=torch.long), None  # no warper looks at what was said
        if self.scale != 1:
            scores = scores / self.scale
        if self.top_k:
            scores = self.top_k(ids, scores)  # type: ignore[arg-type]
            # The nucleus needs a sort: of the few that are left, which is three times faster in all.
            left = int((scores > -math.inf).sum(-1).max())
            scores, tokens = scores.topk(left)
        if self.top_p:
            scores = self.top_p(ids, scores)  # type: ignore[arg-type]
        return scores, tokens

    def log_probs(self, scores: Tensor, at: Tensor, token: Tensor, *, drawn: bool = False) -> Tensor:
        """Log-probability of `token` under the processed row `at` of scores [N, V]; −inf where excluded.

        Args:
            at, token: rows and tokens, of one shape, which is the result's.
            drawn: the tokens were drawn from this very sampler, so that none is excluded: one on the edge
                that rounding puts outside is taken back in.
        """
        own = scores[at, token]
        if self.scale == 0:
            return torch.where((own == scores.amax(-1)[at]) | drawn, 0.0, -math.inf)
        warped, tokens = self(scores)
        if tokens is not None:
            warped = torch.full_like(scores, -math.inf).scatter(1, tokens, warped)
        value, total = warped[at, token], torch.logsumexp(warped, -1)[at]
        if drawn:
            own = own / self.scale
            return torch.where(value > -math.inf, value - total, own - torch.logaddexp(total, own))
        return value - total


class Draws:
    """A logits processor that draws each row's next token by inverse CDF from the row's own uniforms, and
    leaves only that token to greedy decoding. `torch.multinomial` would share one stream among the rows.

    Attributes:
        log_probs: of the tokens drawn, one [B] for each step, where they are kept.
    """

    def __init__(self, keys: Sequence[int], sampling: Sampling, width: int, keep: bool) -> None:
        # Philox is counter-based: a key is a stream of its own.
        streams = (np.random.Generator(np.random.Philox(key=key)) for key in keys)
        self.uniforms = torch.from_numpy(np.stack([s.random(sampling.max_tokens) for s in streams]))
        self.width = width  # of the prompts
        self.warper = Warper(sampling)
        self.keep = keep
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.warper.scale == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            warped, tokens = self.warper(scores)
            cdf = torch.softmax(warped.double(), -1).cumsum(-1)
            u = self.uniforms[:, input_ids.shape[1] - self.width].to(scores.device)
            # Strictly below the total, whatever it rounds to. A token of probability 0 is never the first
            # above.
            threshold = (u * (1 - 2.0**-40))[:, None] * cdf[:, -1:]
            drawn = torch.searchsorted(cdf, threshold, right=True)
            token = drawn if tokens is None else tokens.gather(1, drawn)
        if self.keep:
            self.log_probs.append(scores.gather(1, token)[:, 0] - torch.logsumexp(scores, -1))
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


def sample_key(*parts: Any) -> int:
    """128 bits that determine one draw, from JSON values such as a seed, a step, a text and an index."""
    return int.from_bytes(digest("policy", *parts)[:16])


def end_tokens(model: Any) -> list[int]:
    """Ids of the tokens that end a turn."""
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


@torch.inference_mode()
def draw(
    model: Any,
    pad: int,
    rows: Sequence[Ids],
    keys: Sequence[int],
    sampling: Sampling,
    *,
    score: bool = False,
    how: How | None = None,
) -> list[Drawn]:
    """One batch of continuations, each up to and including an end token or `max_tokens`.

    Args:
        model: a causal language model, adapter included; its `generation_config` names the end tokens.
        rows: [B] prompts as token ids, none empty; equal ones that follow each other are read once, and so
            are the tokens that all of them begin with.
        keys: [B], see `sample_key`. A draw depends on its key, the model and the prompt alone, up to the
            floating-point noise of batching.
        score: whether to keep log-probabilities, under the model itself (temperature 1, nothing truncated).
    """
    how = how or how_of(model)
    check_tokens(model, rows)
    lengths = [len(row) for row in rows]
    if not how.padded and len(set(lengths)) > 1:
        out: list[Drawn] = [([], [])] * len(rows)
        for length in sorted(set(lengths)):
            some = [i for i, n in enumerate(lengths) if n == length]
            part = [rows[i] for i in some], [keys[i] for i in some]
            found = draw(model, pad, *part, sampling, score=score, how=how)
            for i, drawn in zip(some, found, strict=True):
                out[i] = drawn
        return out
    model = unwrap(model)
    distinct = [row for i, row in enumerate(rows) if not i or row != rows[i - 1]]
    opening = _opening(model, distinct, sampling.max_tokens) if how.shared and how.opening else 0
    ids, mask = left_padded([row[opening:] for row in distinct], pad, model.device)
    if opening:
        same = torch.as_tensor(distinct[0][:opening], device=ids.device).expand(len(distinct), -1)
        ids, mask = torch.cat([same, ids], 1), torch.cat([torch.ones_like(same), mask], 1)
    more = {}
    if len(distinct) < len(rows) or opening:
        # Whose prompt each row is: a cache repeats its rows as it does for a beam search.
        own = torch.tensor([row == rows[i - 1] for i, row in enumerate(rows)][1:]).logical_not().cumsum(0)
        own = torch.cat([own.new_zeros(1), own]).to(ids.device)
        cache = _read(model, ids, mask, opening) if how.shared else None
        if cache is not None:
            cache.reorder_cache(own)
            more = {CACHE: cache}
        ids, mask = ids[own], mask[own]
    ends = end_tokens(model)
    # What a model ships must not leak in. Greedy decoding ignores temperature, top_k and top_p.
    config = GenerationConfig(
        max_new_tokens=sampling.max_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    draws = Draws(keys, sampling, ids.shape[1], score)
    chain = LogitsProcessorList([draws])
    with quiet():  # no advice on settings that greedy decoding ignores
        new = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=chain, **more
        )
    values = torch.stack(draws.log_probs, 1).tolist() if score else [[]] * len(rows)
    out = []
    for row, scores in zip(new[:, ids.shape[1] :].tolist(), values, strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        out.append((row[:length], scores[:length]))
    return out


def sample_and_score(
    model: Any,
    pad: int,
    prompts: Sequence[Ids],
    keys: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    batch_size: int = 64,
    score: bool = True,
) -> list[list[Drawn]]:
    """[prompts][keys of the prompt] continuations, as `draw` gives them `in_batches` of `batch_size`."""
    out: list[list[Any]] = [[None for _ in row] for row in keys]
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
    jobs = [(p, i) for p in order for i in range(len(keys[p]))]

    def run(batch: Sequence[tuple[int, int]]) -> list[Drawn]:
        each = [keys[p][i] for p, i in batch]
        return draw(model, pad, [prompts[p] for p, _ in batch], each, sampling, score=score)

    for batch, found, _ in in_batches(jobs, batch_size, run):
        for (p, i), drawn in zip(batch, found, strict=True):
            out[p][i] = drawn
    return out


def in_batches(
    rows: Sequence[T], size: int, run: Callable[[Sequence[T]], S]
) -> Iterator[tuple[Sequence[T], S, int]]:
    """Call `run` on consecutive batches of `size` rows; a GPU that is out of memory halves the size for good.

    Yields:
        a batch, what `run` gave for it, and the size that it fitted in.

    Raises:
        torch.OutOfMemoryError: one row alone does not fit.
    """
    start = 0
    while start < len(rows):
        batch = rows[start : start + size]
        try:
            result: S | None = run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            result = None
        if result is None:  # outside the handler, whose traceback holds the tensors
            size = max(1, len(batch) // 2)
            torch.cuda.empty_cache()
            continue
        start += len(batch)
        yield batch, result, size


def _opening(model: Any, rows: Sequence[Ids], more: int) -> int:
    """How many tokens all rows begin with and can be read once; each row keeps one for itself at least.

    Padding then stands between them and the rest of a shorter row. A window counts it as it counts tokens,
    so that rows of different lengths must fit into the window with what is drawn.
    """
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    window = min((w for w in windows(model).values() if w is not None), default=None)
    if len(rows) < 2 or (window is not None and shortest < longest and longest + more > window):
        return 0
    alike = (i for i in range(shortest - 1) if any(row[i] != rows[0][i] for row in rows))
    return next(alike, shortest - 1)


def _read(model: Any, ids: Tensor, mask: Tensor, opening: int) -> Any:
    """The keys and values of all but the last token of each distinct prompt.

    The first `opening` tokens are the same in all rows.
    """
    width = ids.shape[1] - 1
    if width < 1:
        return None
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for rows, start, stop in ((1, 0, opening), (len(ids), opening, width)):
        if start < stop:
            inputs = {"input_ids": ids[:rows, start:stop], "attention_mask": mask[:rows, :stop]}
            inputs["position_ids"] = positions[:rows, start:stop]
            model.base_model(**inputs, **{CACHE: cache}, use_cache=True)
        if rows < len(ids) and opening:
            cache.reorder_cache(torch.zeros_like(ids[:, 0]))  # type: ignore[arg-type]
    return cache


def left_padded(rows: Sequence[Ids], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] of rows that end together, and the mask of what is no padding."""
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
        forest: the tree's nodes.
        states: [S] nodes after which some continuation goes on.
        edges: for each sequence, (index into `states`, token) of each token of its continuation.
    """

    rows: tuple[int, ...]
    forest: Forest
    states: np.ndarray
    edges: tuple[tuple[tuple[int, int], ...], ...]

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
    """Sequences gathered into prefix trees of about `most` nodes, those that share a prefix together."""
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
        forest = Forest(np.array(tokens), np.array(parents))
        found.append(Pack(tuple(rows), forest, np.array([*state], int), tuple(edges)))
    return found


@dataclass(frozen=True)
class Scores:
    """Scores of B continuations of at most T tokens; 0 past the end.

    Attributes:
        log_probs: [B, T] of each token, in nats.
        entropies: [B, T] of the model's own distribution before each token, in nats. No gradient.
        hidden: [B, T, H] final hidden state before each token, or None. No gradient.
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
    sampling: Sampling | None = None,
    drawn: bool = False,
    how: How | None = None,
) -> Scores:
    """Token log-probabilities of continuations, in nats, differentiable in the model.

    Args:
        model: called as it is (a DDP or PEFT wrapper included), so that its hooks run.
        prompts, continuations: B pairs of token ids.
        steps: T; the longest continuation's length when None.
        hidden: whether to return the hidden states too.
        most: tokens in one forward pass, about. Processes with shards of one model make equally many passes.
        sampling: makes another distribution than the model's own; −inf where it excludes a token. No
            gradient then.
        drawn: the continuations were drawn from it (see `Warper.log_probs`).

    Raises:
        AlignProError: an empty prompt, or a model that was never checked.
    """
    how, head = how or how_of(model), Head.of(model)
    check_tokens(model, continuations)
    choose = None
    if sampling is not None and not sampling.natural:
        choose = partial(Warper(sampling).log_probs, drawn=drawn)
    steps = max(map(len, continuations)) if steps is None else steps
    order: list[int] = []
    parts: list[list[Tensor]] = []
    every = packs(prompts, continuations, most)
    spare = 0
    if shards.is_sharded(model):
        own = sum(count_passes(pack.forest, pack.states, how) for pack in every)
        spare = shards.most(model, own) - own
    for pack in every:
        (found,) = states(model, [pack.forest], [pack.states], how)
        at, token, inside = (torch.as_tensor(a, device=found.device) for a in pack.table(steps))
        with torch.set_grad_enabled(torch.is_grad_enabled() and choose is None):
            values, entropies = edge_log_probs(head, found, at.flatten(), token.flatten(), choose)
        columns = [values.view(at.shape).masked_fill(inside == 0, 0.0), entropies[at] * inside]
        if hidden:
            columns.append(found.detach().float()[at] * inside[..., None])
        parts.append(columns)
        order += pack.rows
    back = torch.argsort(torch.tensor(order, device=parts[0][0].device))
    joined = [torch.cat(column)[back] for column in zip(*parts, strict=True)]
    for _ in range(spare):  # in step with the other processes, forward and backward
        (found,) = states(model, [Forest(np.zeros(1, int), np.array([-1]))], [np.zeros(1, int)], how)
        joined[0] = joined[0] + 0.0 * found.float().sum()
    return Scores(joined[0], joined[1], joined[2] if hidden else None)
