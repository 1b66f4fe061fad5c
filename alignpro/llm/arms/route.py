"""A router over a list of instructions (`estimation.routing`): taught by a table, measured on other prompts.

It reads a prompt by the states of a causal model, the frozen one itself where that is at hand: they say what
a request asks for. Each reward is on file as soon as it is known, so the same call after an interruption goes
on from there.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from alignpro import typed
from alignpro.errors import AlignProError
from alignpro.estimation.race import BLOCK, Gain, gain_over
from alignpro.estimation.routing import FOLDS, Router, fit, fixed, left_out, routed
from alignpro.files import atomic_write, encoded, read_json, write_json
from alignpro.llm.arms.instruct import Cells, read_instructions
from alignpro.llm.arms.settings import RouteSettings
from alignpro.llm.data.bank import BANK
from alignpro.llm.models import contents
from alignpro.llm.models.load import load_model
from alignpro.llm.models.prompt import said, with_instruction
from alignpro.llm.targets.tokens import prompt_ids
from alignpro.shown import Shown

FACTS, ARRAYS = "router.json", "router.safetensors"
"""A saved router: its words, and its numbers."""
REWRITES = "rewrites.jsonl"
"""The held-out prompts with the instructions that are picked, as `rollout --rewrites-file` takes them."""
EACH = 3
"""Instructions of every group of the packaged bank that are candidates where no file is given."""
_NUMBERS = ("mean", "centre", "scale", "weights")
Read = Callable[[Sequence[str]], np.ndarray]
"""Embeddings [n, D] of prompts."""


def candidates_of(path: str | None, single: str | None = None) -> tuple[str, ...]:
    """The candidates: "" for none at all, the distinct lines of a file or some of the packaged bank, and the
    instruction to compare with, where it is not among them."""
    some = (text for group in BANK.values() for text in group[:EACH])
    found = ("", *some) if path is None else read_instructions(path)
    return found if single is None or single in found else (*found, single)


def states(model: Any, tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Read prompts, each the user's turn of a chat, by a causal model: [n, 2H] float64.

    The hidden states after half of the layers: of the last token, and the mean over tokens.

    Raises:
        AlignProError: the model tells no hidden states.
    """
    found = []
    with torch.inference_mode():
        for x in prompts:
            ids = torch.tensor([prompt_ids(tokenizer, x)], device=model.device)
            layers = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            if not layers:
                raise AlignProError("reader: the model tells no hidden states; name another")
            middle = layers[len(layers) // 2][0].double()
            found.append(torch.cat([middle[-1], middle.mean(0)]).cpu().numpy())
    return np.array(found)


@dataclass(frozen=True)
class Reader:
    """A causal model whose states read prompts."""

    model: str
    """A packaged name or hub id, or the whole path of a folder."""
    dtype: str = "auto"
    """Number format of its weights, as `load_model` takes it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of its chat template."""

    def read(self, opened: Callable[[], Any] = lambda: None) -> Read:
        """Reads prompts by the model, which is loaded when the first are read.

        Args:
            opened: gives a target that may have this very model loaded already, or None.
        """

        def loaded() -> tuple[Any, Any]:
            target = opened()
            # A folder's name may be relative in the one and whole in the other.
            names = {self.model, str(Path(self.model).expanduser().resolve())}
            name = getattr(target, "name", "")
            if {name, str(Path(name).expanduser().resolve())} & names and hasattr(target, "tokenizer"):
                return target.model, target.tokenizer
            return load_model(self.model, self.dtype, chat_template_kwargs=self.chat_template_kwargs)

        both = functools.cache(loaded)
        return lambda prompts: states(*both(), prompts)


@dataclass(frozen=True, repr=False)
class Routed(Shown):
    """A router's gains over one instruction for all, and over none at all."""

    single: str
    """The instruction to compare with: the one that was given, or that earned most on average in the table;
    empty for none at all."""
    picks: tuple[tuple[str, int], ...]
    """Instructions that the router picks for held-out prompts, and for how many, the most frequent first."""
    over_single: Gain | None
    """The router against `single` on held-out prompts; None where it picks that for all of them."""
    over_none: Gain | None
    """The router against no instruction there; None where it picks none for all of them."""
    single_over_none: Gain | None
    """`single` against no instruction there; None where it is that."""
    foreseen: Gain
    """The router against the best instruction on the table's own prompts, each judged without it."""
    ridge: float | None
    """Ridge of the regression; None where one instruction for all did best, and is picked."""
    rank: int | None
    """How many independent ways of differing it reads in prompts, at most."""
    reader: str
    """The model whose states read the prompts."""
    instructions: tuple[str, ...]
    """The candidates."""
    prompts: int
    """How many prompts the table has."""
    answers: int
    """Answers to each of them with each candidate."""
    held_out: int
    """How many held-out prompts."""
    calls: int
    """Answers of the table."""
    refused: int
    """Answers that the service would not give; each counts with its declared reward."""
    level: float
    """How often an interval covers the truth, each by itself."""
    low: float
    """Declared range of the reward."""
    high: float


@dataclass(frozen=True)
class Saved:
    """A router and what it needs to rewrite prompts."""

    router: Router
    instructions: tuple[str, ...]
    """By the router's strategies; empty for none at all."""
    reader: Reader
    read: Read

    def picks(self, prompts: Sequence[str]) -> list[str]:
        """The instruction that each prompt gets."""
        if not prompts:
            return []
        if not self.router.weights.any():  # one for all
            return [self.instructions[int(self.router.mean.argmax())]] * len(prompts)
        return [self.instructions[s] for s in self.router.pick(self.read(prompts))]

    def rewrites(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt with its instruction at the end."""
        return [with_instruction(x, text) for x, text in zip(prompts, self.picks(prompts), strict=True)]

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `router.json` into a folder."""
        arrays = {name: np.ascontiguousarray(getattr(self.router, name), np.float64) for name in _NUMBERS}
        with atomic_write(folder / ARRAYS) as file:
            file.write(save(arrays))
        facts = {
            "instructions": list(self.instructions),
            "reader": vars(self.reader),
            "weights": contents.of_model(self.reader.model),
            "ridge": _ridge(self.router),
            "rank": self.router.rank,
        }
        write_json(folder / FACTS, facts)


@dataclass(frozen=True)
class _Facts:
    """The content of `FACTS`."""

    instructions: tuple[str, ...]
    reader: Reader
    weights: str | None
    """Digest of the reader's weights."""
    ridge: float | None
    rank: int | None = None


def _ridge(router: Router) -> float | None:
    return None if np.isinf(router.ridge) else router.ridge


def is_router(folder: str | Path) -> bool:
    """Whether a router was saved in this folder."""
    return (Path(folder).expanduser() / FACTS).is_file()


def load(folder: str | Path) -> Saved:
    """A router that `Saved.save` wrote; the model that reads is loaded when it is first needed.

    Raises:
        AlignProError: there is none, its files do not fit, or its reader has other weights now.
    """
    folder = Path(folder).expanduser()
    facts = typed.made(_Facts, read_json(folder / FACTS), f"router {folder / FACTS}")
    try:
        arrays = load_file(folder / ARRAYS)
        found = mean, centre, scale, weights = tuple(arrays[name] for name in _NUMBERS)
    except (OSError, KeyError, SafetensorError, ValueError) as error:
        raise AlignProError(
            f"router {folder / ARRAYS}: cannot be read ({type(error).__name__}); make it again with route"
        ) from None
    shapes = (len(facts.instructions),), centre.shape, centre.shape, (centre.size, len(facts.instructions))
    fits = all(a.shape == shape for a, shape in zip(found, shapes, strict=True)) and centre.ndim == 1
    fits = fits and all(a.dtype == np.float64 and np.isfinite(a).all() for a in found)
    if not fits or not facts.instructions or (facts.ridge is None and weights.any()):
        raise AlignProError(
            f"router {folder / ARRAYS}: its numbers do not fit {FACTS}; make it again with route"
        )
    if contents.of_model(facts.reader.model) not in (facts.weights, None):
        raise AlignProError(
            f"router {folder / FACTS}: its reader {facts.reader.model!r} has other weights than those that "
            "it was taught by; make it again with route"
        )
    ridge = np.inf if facts.ridge is None else facts.ridge
    router = Router(mean, centre, scale, weights, ridge, facts.rank)
    return Saved(router, facts.instructions, facts.reader, facts.reader.read())


def check_sizes(table: Sequence[str]) -> None:
    """Refuse fewer prompts than a router can learn from. Raises AlignProError."""
    if len(table) < FOLDS:
        raise AlignProError(f"prompts: {len(table)} are for training; give at least {FOLDS}")


def find(
    cells: Cells,
    table: Sequence[str],
    held: Sequence[str],
    settings: RouteSettings,
    reader: Reader,
    read: Read,
    *,
    progress: bool = True,
) -> tuple[Routed, Saved, list[str]]:
    """Ask for the table, teach the router, and judge it on the prompts `held`.

    Args:
        cells: asks the candidates.
        table: the prompts of the table.
        reader, read: reads prompts, and reads them as `Reader.read` does.

    Returns:
        the result, the router, and the instruction that it picks for each prompt of `held`.
    """
    reward, names, each = cells.reward, cells.candidates, settings.held_out_answers
    arms = range(len(names))
    calls = len(names) * len(table) * settings.answers
    step = max(1, BLOCK // (len(names) * settings.answers))
    parts = []
    with tqdm(total=calls, unit="answer", desc="table", disable=None if progress else True) as bar:
        cells.on_answer = bar.update
        for i in range(0, len(table), step):
            parts.append(cells.ask("table", arms, table[i : i + step], settings.answers))
    rewards = np.concatenate(parts, 1)
    values = rewards.mean(2).T
    embeddings = read(table)
    router, alike = (
        left_out(values, choose)[:, None] for choose in (routed(embeddings, values), fixed(values))
    )
    foreseen = gain_over(router, alike, reward.low, reward.high, settings.level)
    saved = Saved(fit(embeddings, values), tuple(names), reader, read)
    picks, single = saved.picks(held), settings.single
    if single is None:
        single = names[int(values.mean(0).argmax())]

    wanted = {text: [x for x, pick in zip(held, picks, strict=True) if text in ("", single, pick)]
              for text in dict.fromkeys(("", single, *picks))}  # fmt: skip
    earned: dict[tuple[str, str], np.ndarray] = {}
    total = sum(map(len, wanted.values())) * each
    with tqdm(total=total, unit="answer", desc="held out", disable=None if progress else True) as bar:
        cells.on_answer = bar.update
        step = max(1, BLOCK // each)
        for text, some in wanted.items():
            for i in range(0, len(some), step):
                block = some[i : i + step]
                (found,) = cells.ask("held out", [names.index(text)], block, each)
                earned |= {(text, x): row for x, row in zip(block, found, strict=True)}

    def over(one: Sequence[str], other: Sequence[str]) -> Gain | None:
        if list(one) == list(other):
            return None
        ours, theirs = (
            np.array([earned[text, x] for text, x in zip(of, held, strict=True)]) for of in (one, other)
        )
        return gain_over(ours, theirs, reward.low, reward.high, settings.level)

    alone, none = [single] * len(held), [""] * len(held)
    result = Routed(
        single=single,
        picks=tuple(Counter(picks).most_common()),
        over_single=over(picks, alone),
        over_none=over(picks, none),
        single_over_none=over(alone, none),
        foreseen=foreseen,
        ridge=_ridge(saved.router),
        rank=saved.router.rank,
        reader=reader.model,
        instructions=tuple(names),
        prompts=len(table),
        answers=settings.answers,
        held_out=len(held),
        calls=calls,
        refused=cells.refused,
        level=settings.level,
        low=reward.low,
        high=reward.high,
    )
    return result, saved, picks


def write_rewrites(path: Path, prompts: Sequence[str], picks: Sequence[str]) -> None:
    """Write the prompts with their instructions, a line each, for `rollout --rewrites-file`."""
    with atomic_write(path, private=True) as file:
        for x, text in zip(prompts, picks, strict=True):
            row = {**said(x), "rewrite": with_instruction(x, text)}
            file.write(encoded(json.dumps(row, ensure_ascii=False) + "\n"))
