"""Enumeration: a real prompter and a real frozen model as an exact `Instance`.

For each user prompt x, rewrites are sampled from the prompter (or given, as strategies that are the same for
every x), and responses from the frozen model under every rewrite. Both models are then restricted to the
prefix trees of these (`alignpro.llm.policies.tree`), which makes them true policies on finite sets, exact for
all of the theory. Restriction is the only approximation. In the instance the rewrites and responses of each
prompt are the diagonal blocks of `prior` and `frozen`; the rewards are real on every pair (x, y), reachable
or not.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import block_diag
from transformers import PreTrainedTokenizerBase

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json
from alignpro.llm.arms.settings import EnumerationSettings
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.forward import how_of
from alignpro.llm.models.policy import end_tokens, left_padded
from alignpro.llm.models.prompt import columns_of, context_of
from alignpro.llm.policies.prompter import Template, check_room, target_ids
from alignpro.llm.policies.tree import PrefixTree, TreeTask, leaf_probabilities
from alignpro.llm.rewards.reward import Reward, check_scores
from alignpro.theory import Instance, Names, load

Tokens = tuple[int, ...]
Progress = Callable[[int], None]


def _silent(_: int) -> None:
    pass


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    batch: int = 64,
    progress: Progress = _silent,
) -> list[Tokens]:
    """One continuation of each prompt, up to and including its end token (or cut at `max_new_tokens`).

    The global random state is left alone; `progress` is called with the number just finished.
    """
    stop = {*end_tokens(model)}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out: list[Tokens] = [()] * len(prompts)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        while order:
            rows = order[:batch]
            if not how_of(model).padded:
                rows = [i for i in rows if len(prompts[i]) == len(prompts[rows[0]])]
            order = order[len(rows) :]
            ids, mask = left_padded([prompts[i] for i in rows], tokenizer.pad_token_id, model.device)
            done = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
            )
            for i, row in zip(rows, done[:, ids.shape[1] :].tolist(), strict=True):
                end = next((t for t, token in enumerate(row) if token in stop), len(row) - 1)
                out[i] = tuple(row[: end + 1])
            progress(len(rows))
    return out


def sample_rewrites(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    template: Template,
    settings: EnumerationSettings,
    progress: Progress = _silent,
) -> list[list[Tokens]]:
    """Draw token sequences of distinct rewrites for each prompt; the first is the prompt itself."""
    found: list[dict[str, Tokens]] = [{x: template.rewrite_ids(tokenizer, x, x)} for x in prompts]
    ends = {*end_tokens(model)}
    drawn_of = {x: [0, 0] for x in prompts}
    for attempt in range(4):
        short = [i for i, have in enumerate(found) if len(have) < settings.rewrites]
        if not short:
            break
        # Some candidates repeat or run on; a quarter more than is missing usually suffices.
        counts = {i: max(4, (settings.rewrites - len(found[i])) * 5 // 4 + 2) for i in short}
        rows = [i for i in short for _ in range(counts[i])]
        drawn = sample(
            model,
            tokenizer,
            [template.prompt_ids(tokenizer, prompts[i]) for i in rows],
            max_new_tokens=settings.rewrite_tokens,
            seed=settings.seed + 1_000_003 * attempt,
            temperature=settings.candidate_temperature,
            progress=progress,
        )
        for i, tokens in zip(rows, drawn, strict=True):
            text = template.rewrite(tokenizer, prompts[i], tokens)
            ended = tokens[-1] in ends
            drawn_of[prompts[i]][0] += 1
            drawn_of[prompts[i]][1] += not ended
            # One token sequence per text: the frozen model sees the text only.
            if ended and len(tokens) > 1 and text and len(found[i]) < settings.rewrites:
                found[i].setdefault(text, tokens)
    for x, have in zip(prompts, found, strict=True):
        if len(have) < 2:
            raise AlignProError(
                f"prompt {x!r}: of {drawn_of[x][0]} rewrites drawn, {drawn_of[x][1]} did not end within "
                f"{settings.rewrite_tokens} tokens, the others repeat the prompt or are empty; raise "
                "rewrite_tokens or drop the prompt"
            )
    return [list(have.values()) for have in found]


def given_rewrites(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    rewrites: Sequence[Sequence[str]],
    template: Template,
) -> list[list[Tokens]]:
    """Token sequences with which the prompter says given rewrites of each prompt, and ends its turn.

    Args:
        rewrites: at least two distinct ones of each prompt, of which the first is the prompt itself.

    Raises:
        AlignProError: they are not so, or hold a text that the prompter cannot say.
    """
    if len(rewrites) != len(prompts):
        raise AlignProError(f"rewrites: are of {len(rewrites)} prompts; give those of all {len(prompts)}")
    for x, row in zip(prompts, rewrites, strict=True):
        if not row or row[0] != x or len({*row}) < max(2, len(row)):
            raise AlignProError(f"rewrites of {x!r}: give the prompt itself first, then others, each once")
    out = [
        [template.rewrite_ids(tokenizer, x, text) for text in row]
        for x, row in zip(prompts, rewrites, strict=True)
    ]
    for x, row, ids in zip(prompts, rewrites, out, strict=True):
        for text, tokens in zip(row[1:], ids[1:], strict=True):
            if (said := template.rewrite(tokenizer, x, tokens)) != text:
                raise AlignProError(f"rewrite {text!r}: this prompter says {said!r} for it; leave it out")
    return out


def sample_responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rewrites: Sequence[Sequence[str]],
    settings: EnumerationSettings,
    progress: Progress = _silent,
) -> list[list[Tokens]]:
    """Draw token sequences of distinct responses for each prompt, evenly under all of its rewrites."""
    found: list[dict[Tokens, None]] = [{} for _ in rewrites]
    for attempt in range(4):
        missing = [settings.responses - len(have) for have in found]
        rows = [(i, k % len(texts)) for i, texts in enumerate(rewrites) for k in range(missing[i])]
        if not rows:
            break
        drawn = sample(
            model,
            tokenizer,
            [target_ids(tokenizer, rewrites[i][k]) for i, k in rows],
            max_new_tokens=settings.response_tokens,
            seed=settings.seed + 1_000_003 * attempt + 1,
            progress=progress,
        )
        for (i, _), tokens in zip(rows, drawn, strict=True):
            found[i].setdefault(tokens)
    return [list(have) for have in found]


@dataclass(frozen=True)
class _Texts:
    """Prompts, rewrites and responses as texts and as tokens."""

    prompts: tuple[str, ...]
    prompt_ids: tuple[Tokens, ...]
    """For each prompt, the tokens that the prompter continues."""
    rewrite_ids: tuple[tuple[Tokens, ...], ...]
    """For each prompt, the leaves of its tree of rewrites, as tokens."""
    response_ids: tuple[tuple[Tokens, ...], ...]
    rewrites: tuple[tuple[str, ...], ...]
    responses: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Enumeration(_Texts):
    """A prompter and a frozen model on finite sets, and the exact instance they form."""

    instance: Instance
    """Rewrites and responses are in it prompt by prompt."""

    def rows(self, x: int) -> slice:
        """The rewrites of prompt x among the K of the instance."""
        return _block(self.rewrites, x)

    def columns(self, x: int) -> slice:
        """The responses of prompt x among the Y of the instance."""
        return _block(self.responses, x)

    def prompter(self, policy: Sequence[np.ndarray]) -> np.ndarray:
        """Leaf probabilities per prompt as ρ(x′|x), [X, K]."""
        return block_diag(*policy)

    def task(self, *, exact_rewards: bool = True) -> TreeTask:
        """The prompter's environment on its trees; rewarded by R(x, x′), or by r(x, y) of one response."""
        reward, frozen = np.asarray(self.instance.reward), np.asarray(self.instance.frozen)
        expected = reward @ frozen.T
        starts = [self.rows(x).start for x in range(len(self.prompts))]

        def exact(x: int, leaves: Sequence[int]) -> Sequence[float]:
            return expected[x, starts[x] + np.asarray(leaves)].tolist()

        def sampled(x: int, leaves: Sequence[int]) -> Sequence[float]:
            rows = torch.as_tensor(frozen[starts[x] + np.asarray(leaves)])
            return reward[x, torch.multinomial(rows, 1)[:, 0].numpy()].tolist()

        trees = tuple(PrefixTree(leaves) for leaves in self.rewrite_ids)
        return TreeTask(self.prompts, self.prompt_ids, trees, exact if exact_rewards else sampled)

    def save(self, folder: str | Path) -> None:
        """Write `instance.npz` (numbers) and `texts.json` (texts and tokens) into `folder`."""
        folder = Path(folder)
        self.instance.save(folder / "instance.npz")
        texts = {each.name: getattr(self, each.name) for each in fields(_Texts)}
        write_json(folder / "texts.json", texts, private=True)

    @classmethod
    def load(cls, folder: str | Path) -> "Enumeration":
        """Read what `save` wrote."""
        path, instance = Path(folder) / "texts.json", load(Path(folder) / "instance.npz")
        try:
            texts = typed.made(_Texts, read_json(path), "texts")
            lists = texts.prompt_ids, texts.rewrite_ids, texts.rewrites, texts.response_ids, texts.responses
            rows = [tuple(map(len, each)) for each in lists[1:]]
            if {*map(len, lists)} != {len(texts.prompts)} or rows[::2] != rows[1::2]:
                raise AlignProError("its lists differ in length")
            if instance.shape != (len(texts.prompts), sum(rows[0]), sum(rows[2])):
                raise AlignProError("instance.npz is of others")
        except AlignProError as error:
            raise AlignProError(f"{path}: missing or damaged; run the enumeration again") from error
        return cls(**vars(texts), instance=instance)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _block(rows: Sequence[Sequence[Any]], x: int) -> slice:
    start = sum(map(len, rows[:x]))
    return slice(start, start + len(rows[x]))


def refuse_chats(prompts: Sequence[str]) -> None:
    """Refuse conversations and columns, which an instance has no place for."""
    if x := next((x for x in prompts if context_of(x) or columns_of(x)), None):
        raise AlignProError(
            f"prompt {x[:60]!r}: ends a conversation; enumerate plain prompts, or train on it"
        )


def enumerate_models(
    prompter: Any,
    prompter_tokenizer: PreTrainedTokenizerBase,
    frozen: Any,
    frozen_tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    reward: Reward,
    settings: EnumerationSettings,
    *,
    template: Template | None = None,
    rewrites: Sequence[Sequence[str]] | None = None,
    progress: Callable[[str, int], Progress] | None = None,
) -> Enumeration:
    """Sample the finite sets, score them exactly, and assemble the instance; prompts are equally likely.

    Args:
        rewrites: those of each prompt, which are then not sampled (see `given_rewrites`).
        progress: called with a stage's name and its number of units; returns what reports finished ones.
    """
    if len(set(prompts)) != len(prompts):
        raise AlignProError("prompts: some are repeated; give each once")
    refuse_chats(prompts)
    template = template or Template()
    stage = progress or (lambda _name, _total: _silent)
    count = len(prompts)
    for model in (prompter, frozen):
        model.eval()
    rewrite_ids: list[list[Tokens]] = []
    longest = settings.rewrite_tokens
    if rewrites is not None:
        rewrite_ids = given_rewrites(prompter_tokenizer, prompts, rewrites, template)
        longest = max(len(ids) for row in rewrite_ids for ids in row)
    prompt_ids = [template.prompt_ids(prompter_tokenizer, x) for x in prompts]
    check_room(prompter, prompts, prompt_ids, longest, "the prompter")
    plain = [target_ids(frozen_tokenizer, x) for x in prompts]
    check_room(frozen, prompts, plain, settings.response_tokens, "the frozen model")

    if rewrites is None:
        drawing = stage("sampling rewrites", count * (settings.rewrites * 5 // 4 + 1))
        rewrite_ids = sample_rewrites(prompter, prompter_tokenizer, prompts, template, settings, drawing)
    rewrites = [
        [x, *(template.rewrite(prompter_tokenizer, x, t) for t in ids[1:])]
        for x, ids in zip(prompts, rewrite_ids, strict=True)
    ]
    response_ids = sample_responses(
        frozen, frozen_tokenizer, rewrites, settings, stage("sampling responses", count * settings.responses)
    )
    frozen_chat = chat_of(frozen_tokenizer)
    responses = [[frozen_chat.said(ids).text.strip() for ids in row] for row in response_ids]

    trees = [PrefixTree(tuple(ids)) for ids in rewrite_ids]
    prior_rows = leaf_probabilities(prompter, prompt_ids, trees, progress=stage("scoring rewrites", count))
    response_trees = [PrefixTree(tuple(ids)) for ids in response_ids]
    pairs = [(x, text) for x, row in enumerate(rewrites) for text in row]
    frozen_rows = leaf_probabilities(
        frozen,
        [target_ids(frozen_tokenizer, text) for _, text in pairs],
        [response_trees[x] for x, _ in pairs],
        progress=stage("scoring responses", len(pairs)),
    )

    all_responses = [text for row in responses for text in row]
    tick = stage("rewarding", count)
    scores = np.empty((count, len(all_responses)))
    for x, prompt in enumerate(prompts):
        asked = [prompt] * len(all_responses)
        given = reward.score(asked, all_responses)
        scores[x] = check_scores(asked, all_responses, given, reward.low, reward.high)
        tick(1)

    instance = assemble(prior_rows, frozen_rows, scores, prompts, rewrites, responses)
    texts = ([*prompts], prompt_ids, rewrite_ids, response_ids, rewrites, responses)
    named = dict(zip((each.name for each in fields(_Texts)), map(_tuples, texts), strict=True))
    return Enumeration(**named, instance=instance)


def assemble(
    prior_rows: Sequence[np.ndarray],
    frozen_rows: Sequence[np.ndarray],
    scores: np.ndarray,
    prompts: Sequence[str],
    rewrites: Sequence[Sequence[str]],
    responses: Sequence[Sequence[str]],
) -> Instance:
    """The block-diagonal instance: one block of rewrites and responses per prompt, prompts equally likely.

    Args:
        prior_rows: X arrays, ρ_sft over each prompt's rewrites; the first is the original prompt.
        frozen_rows: one array per rewrite of every prompt in turn, π_F over that prompt's responses.
        scores: [X, Y] rewards of all responses for all prompts.
    """
    ends = np.cumsum([0, *map(len, rewrites)])
    return Instance(
        p=np.full(len(prompts), 1 / len(prompts)),
        prior=block_diag(*prior_rows),
        frozen=block_diag(*(np.stack(frozen_rows[a:b]) for a, b in itertools.pairwise(ends))),
        own=ends[:-1],
        reward=scores,
        names=Names(
            prompts=tuple(prompts),
            rewrites=tuple(text for row in rewrites for text in row),
            responses=tuple(text for row in responses for text in row),
        ),
    )
