"""Rewards r(x, y) of the user's own: a reward model, a Python function, an endpoint; and eq. (1) by TRL.

Theorem 1 asks for bounded rewards, so each is made with its bounds (`parse_bounds`): a declared range, which
a score may not leave, or a clipping or squashing, which `describe` reports with what it did. A score that is
not finite is refused with its sample before any of that, since clipping would make a number of it.

Prompts and responses are data throughout: they are filled in literally, cannot spell a model's special
tokens, and are shortened and escaped where an error shows them.
"""

import asyncio
import contextlib
import hashlib
import importlib
import inspect
import json
import math
import numbers
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import read_json, writable_folder, write_json
from alignpro.llm import data, models, packages, rewards

Array = np.ndarray

PLAIN = "Human: {prompt}\n\nAssistant: {response}"
"""How a sample is written for a model whose tokenizer has no chat template."""

REWARD_FILE = "reward.json"
"""What `train_reward` records beside the weights."""

_SQUASH_PAIRS = 1000  # training pairs from which the squash is chosen; more would not move it


# --- bounds ---


@dataclass(frozen=True)
class Declared:
    """The reward lies in [low, high] by construction; a score outside is an error."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_interval("bounds", self.low, self.high)

    def apply(self, raw: Array) -> Array:
        """[n] float64: `raw`, which the caller has checked (`check_scores`)."""
        return raw

    def describe(self) -> dict[str, Any]:
        return {"kind": "declared", "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.low!r},{self.high!r}"


@dataclass(frozen=True)
class Clip:
    """Scores beyond [low, high] are moved to its ends."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_interval("bounds clip", self.low, self.high)

    def apply(self, raw: Array) -> Array:
        """[n] float64 in [low, high]."""
        return np.clip(raw, self.low, self.high)

    def describe(self) -> dict[str, Any]:
        return {"kind": "clip", "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"clip:{self.low!r},{self.high!r}"


@dataclass(frozen=True)
class Squash:
    """σ((score − centre) / scale) ∈ [0, 1]: keeps the order of answers, and no score is out of reach.

    Args:
        centre: the score that becomes ½.
        scale: > 0, in units of the score; centre ± scale become 0.27 and 0.73.
    """

    centre: float
    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.centre) and math.isfinite(self.scale) and self.scale > 0):
            raise AlignProError(
                f"bounds squash:{self.centre},{self.scale}: give a finite centre and a positive scale"
            )

    @property
    def low(self) -> float:
        return 0.0

    @property
    def high(self) -> float:
        return 1.0

    def apply(self, raw: Array) -> Array:
        """[n] float64 in [0, 1]."""
        return 0.5 * (1.0 + np.tanh(0.5 * (raw - self.centre) / self.scale))

    def describe(self) -> dict[str, Any]:
        return {"kind": "squash", "centre": self.centre, "scale": self.scale, "low": 0.0, "high": 1.0}

    def __str__(self) -> str:
        return f"squash:{self.centre!r},{self.scale!r}"


Bounds = Declared | Clip | Squash
_KINDS: dict[str, Callable[[float, float], Bounds]] = {"": Declared, "clip": Clip, "squash": Squash}
_SYNTAX = "LOW,HIGH (declared), clip:LOW,HIGH or squash:CENTRE,SCALE"


def parse_bounds(bounds: "Bounds | str | None") -> Bounds:
    """The bounds that a user wrote: `0,1`, `clip:-5,5` or `squash:0,2`; bounds already made pass.

    Raises:
        AlignProError: none given, or not of that form.
    """
    if isinstance(bounds, Declared | Clip | Squash):
        return bounds
    if bounds is None or not str(bounds).strip():
        raise AlignProError(f"bounds: Theorem 1 needs a bounded reward; give {_SYNTAX}")
    kind, _, pair = str(bounds).strip().rpartition(":")
    try:
        first, second = (float(number) for number in pair.split(","))
        make = _KINDS[kind]
    except (ValueError, KeyError):
        raise AlignProError(f"bounds {_shown(str(bounds))}: give {_SYNTAX}") from None
    return make(first, second)


@dataclass
class Bounded:
    """Bounds at work: checks and bounds scores, and keeps count of what it did to them."""

    bounds: Bounds
    scored: int = 0
    clipped: int = 0
    least: float = math.inf
    greatest: float = -math.inf

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], raw: Any) -> Array:
        """[n] float64 in [low, high].

        Raises:
            AlignProError: see `check_scores`.
        """
        b = self.bounds
        limits = (b.low, b.high) if isinstance(b, Declared) else (-math.inf, math.inf)
        scores = check_scores(prompts, responses, raw, *limits)
        if len(scores):
            self.scored += len(scores)
            self.least = min(self.least, float(scores.min()))
            self.greatest = max(self.greatest, float(scores.max()))
            if isinstance(b, Clip):
                self.clipped += int(((scores < b.low) | (scores > b.high)).sum())
        return b.apply(scores)

    def describe(self) -> dict[str, Any]:
        """The bounds, how many scores they saw, between which, and the share clipped."""
        facts = {**self.bounds.describe(), "scored": self.scored}
        if self.scored:
            facts |= {"raw_least": self.least, "raw_greatest": self.greatest}
        if isinstance(self.bounds, Clip):
            facts |= {"clipped": self.clipped, "clipped_share": self.clipped / max(1, self.scored)}
        return facts


# --- checks that every reward shares ---


def check_texts(prompts: Sequence[str], responses: Sequence[str]) -> None:
    """Raise AlignProError unless there is one response per prompt, all strings."""
    if len(prompts) != len(responses):
        raise AlignProError(
            f"{len(prompts)} prompts and {len(responses)} responses: give one response per prompt"
        )
    for kind, texts in (("prompts", prompts), ("responses", responses)):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise AlignProError(f"{kind}[{i}] is {type(text).__name__}: give a string")


def check_scores(
    prompts: Sequence[str],
    responses: Sequence[str],
    scores: Any,
    low: float = -math.inf,
    high: float = math.inf,
    start: int = 0,
) -> Array:
    """`scores` as [n] float64: one finite number in [low, high] per sample, or an error that shows the first
    sample without.

    Args:
        scores: a sequence, array or tensor of n numbers.
        start: number of the first sample, where the samples are part of a batch.

    Raises:
        AlignProError: so; the sample is shortened and escaped.
    """
    if isinstance(scores, torch.Tensor):
        scores = scores.detach().float().cpu().numpy()
    if (
        isinstance(scores, str | bytes | Mapping)
        or not hasattr(scores, "__len__")
        or getattr(scores, "shape", 1) == ()
    ):
        raise AlignProError(
            f"the reward returned {type(scores).__name__} for {len(prompts)} samples: "
            "return a sequence of one number per sample"
        )
    if len(scores) != len(prompts):
        raise AlignProError(
            f"the reward returned {len(scores)} scores for {len(prompts)} samples: return one per sample"
        )
    found = np.zeros(len(prompts))
    for i, score in enumerate(scores):
        if not isinstance(score, numbers.Real | np.bool_):
            where = _sample(start + i, prompts[i], responses[i])
            raise AlignProError(f"the reward of {where} is of type {type(score).__name__}: return a number")
        found[i] = float(score)
        if not math.isfinite(found[i]):
            where = _sample(start + i, prompts[i], responses[i])
            raise AlignProError(
                f"the reward of {where} is {found[i]}: every reward must be finite; "
                "mend the reward on this sample"
            )
        if not low <= found[i] <= high:
            where = _sample(start + i, prompts[i], responses[i])
            raise AlignProError(
                f"the reward of {where} is {found[i]:g}, outside the declared [{low:g}, {high:g}]: "
                "declare a wider range, or clip or squash"
            )
    return found


def _sample(i: int, prompt: str, response: str) -> str:
    return f"sample {i} (prompt {_shown(prompt)}, response {_shown(response)})"


def _shown(text: str, length: int = 80) -> str:
    """One line of `text`: shortened, and escaped so that it cannot drive a terminal or forge a log line."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def _check_interval(name: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise AlignProError(f"{name} {low},{high}: give two finite numbers, the lower first")


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise AlignProError(f"{name} {value}: give at least {least}")


def _parts(n: int, size: int) -> list[range]:
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


# --- templates ---


def check_template(template: str) -> None:
    """Refuse a template that is neither `chat` nor `pair` nor a text with {prompt} and {response}.

    Raises:
        AlignProError: so.
    """
    if template in ("chat", "pair"):
        return
    if template.count("{prompt}") != 1 or template.count("{response}") != 1:
        raise AlignProError(
            f"template {_shown(template)}: write {{prompt}} and {{response}} once each, or chat or pair"
        )


def fill(template: str, prompt: str, response: str) -> str:
    """`template` with {prompt} and {response} replaced literally.

    One pass, so a placeholder inside a text stays text; and no format language, which could reach attributes.
    """
    texts = {"{prompt}": prompt, "{response}": response}
    return re.sub(r"\{(?:prompt|response)\}", lambda match: texts[match[0]], template)


# --- a sequence-classification reward model ---


class SequenceReward:
    """A sequence classifier that reads prompt and response and gives one number.

    The sample is written by the tokenizer's own chat template (a user's and an assistant's turn), by a
    `template` with {prompt} and {response}, or, where there is neither, as `PLAIN`. A chat template writes
    its own special tokens, so the tokenizer adds none: exactly one BOS, as for `weqweasdas/RM-Gemma-2B`,
    whose recipe takes the template's BOS out and lets the tokenizer put it back. (That model ships
    safetensors and Gemma's template; its scores have no range: give `squash:CENTRE,SCALE`.)

    Special tokens spelled out in a prompt or response are taken out: they could forge the end of a turn.
    Samples longer than `max_tokens` lose the beginning of the prompt; only a response that is too long by
    itself is cut, at its end. Decoder classifiers read the score at the last token that is not padding, as
    their configuration names it; where it names none, a token that ends nothing is chosen. Padding is on the
    right, so a score does not depend on its batch (up to rounding: 1e-6 in float32, 1e-2 in bfloat16).

    Args:
        model: a transformers model with a sequence-classification head.
        tokenizer: its own.
        bounds: see `parse_bounds`.
        name: shown by `describe`.
        template: None for the tokenizer's chat template; `chat` to insist on it; `pair` for encoders trained
            on (prompt, response) as two segments; or a text with {prompt} and {response}.
        output: which output of the head is the reward; needed where it has several.
        max_tokens: of a sample, template included; what the model can take if None.
        batch_size: samples per forward pass.
        facts: what `train_reward` recorded.

    Raises:
        AlignProError: bounds, template or output that do not fit; no usable pad token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bounds: Bounds | str,
        *,
        name: str = "model",
        template: str | None = None,
        output: int | None = None,
        max_tokens: int | None = None,
        batch_size: int = 16,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.bounded = Bounded(parse_bounds(bounds))
        self.low, self.high = self.bounded.bounds.low, self.bounded.bounds.high
        _at_least(1, batch_size=batch_size)
        self.name, self.model, self.tokenizer, self.batch_size = name, model, tokenizer, batch_size
        self.facts = dict(facts or {})
        self.template = self._choose_template(template)
        self.output = self._choose_output(output)
        longest = _longest(model, tokenizer)
        if max_tokens is not None and not 1 <= max_tokens <= longest:
            raise AlignProError(f"max_tokens {max_tokens}: reward model {name!r} takes 1 to {longest}")
        self.max_tokens = max_tokens or longest
        self._fix_padding()
        special = {*tokenizer.all_special_tokens}
        special |= {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special}
        longest_first = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.counts = {"prompts_truncated": 0, "responses_truncated": 0, "special_tokens_removed": 0}
        model.config.use_cache = False
        model.eval()

    @classmethod
    def load(
        cls,
        model: str | Path,
        bounds: Bounds | str | None = None,
        *,
        template: str | None = None,
        output: int | None = None,
        max_tokens: int | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
        device: str = "auto",
    ) -> "SequenceReward":
        """The reward model in a folder or under a hub id: safetensors only, and none of its code is run.

        Args:
            model: a folder that `train_reward` or `save_pretrained` wrote, or a hub id `owner/name`.
            bounds: needed unless `train_reward` recorded them in the folder.
            dtype: `float32`, `bfloat16` or `float16`.
            device: `auto` (CUDA if there is one), or a torch device.

        Raises:
            AlignProError: unknown names or no bounds, before any download; a model without a trained head,
                a folder that transformers cannot read, or a failure of `models.resolve`.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if dtype not in models.DTYPES:
            raise AlignProError(f"dtype {dtype!r}: choose from {', '.join(models.DTYPES)}")
        where = models._device(device)
        if template is not None:
            check_template(template)
        models.check_name(model)
        saved = _saved_facts(model)
        chosen = parse_bounds(bounds if bounds is not None else saved.get("bounds"))
        folder = models.resolve(model)
        with _loading(model, folder, "sequence classifier"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            loaded, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=models.DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        if report["missing_keys"]:
            raise AlignProError(
                f"reward model {str(model)!r} has no weights for {sorted(report['missing_keys'])[0]}, which "
                "would be drawn at random; name a trained reward model, or train one with train_reward"
            )
        return cls(
            loaded.to(where),
            tokenizer,
            chosen,
            name=_public_name(model),
            template=template if template is not None else saved.get("template"),
            output=output,
            max_tokens=max_tokens if max_tokens is not None else saved.get("max_tokens"),
            batch_size=batch_size,
            facts=saved,
        )

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64 in [low, high].

        Raises:
            AlignProError: as many prompts as responses are needed, all strings; a score that is not finite or
                leaves a declared range, with the sample.
        """
        return self.bounded(prompts, responses, self.logits(prompts, responses))

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64: the head's output, unbounded. Identical samples are computed once."""
        check_texts(prompts, responses)
        samples = list(dict.fromkeys(zip(prompts, responses, strict=True)))
        found: dict[tuple[str, str], float] = {}
        with models.quiet(), torch.inference_mode():
            rows = [self.encode(x, y) for x, y in samples]
            # Similar lengths together: little padding. The longest first: memory runs out at once or never.
            order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
            parts = _parts(len(order), self.batch_size)
            for part in tqdm(parts, desc="scoring", unit="batch", disable=len(parts) < 16 or None):
                batch = [order[i] for i in part]
                padded = self.tokenizer.pad([rows[i] for i in batch], padding=True, return_tensors="pt")
                logits = self.model(**padded.to(self.model.device)).logits[:, self.output]
                found.update(zip((samples[i] for i in batch), logits.double().tolist(), strict=True))
        return np.array([found[sample] for sample in zip(prompts, responses, strict=True)])

    def encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        """The tokens of one sample, at most `max_tokens`; what was taken out is added to `counts`.

        Raises:
            AlignProError: the template alone is longer than that.
        """
        prompt, response = self._without_special(prompt), self._without_special(response)
        row = self._tokens(prompt, response)
        if len(row["input_ids"]) <= self.max_tokens:
            return row
        self.counts["prompts_truncated"] += 1
        cut = _least(len(prompt), lambda k: self._fits(prompt[k:], response))
        if cut is not None:
            return self._tokens(prompt[cut:], response)
        self.counts["responses_truncated"] += 1
        size = len(response)
        cut = _least(size, lambda k: self._fits("", response[: size - k]))
        if cut is None:
            raise AlignProError(f"max_tokens {self.max_tokens}: the template alone is longer; raise it")
        return self._tokens("", response[: size - cut])

    def describe(self) -> dict[str, Any]:
        """The model, how samples are written, the bounds with what they did, and the facts of training."""
        return json.loads(
            json.dumps(
                {
                    "name": self.name,
                    "kind": "sequence classifier",
                    "architecture": type(self.model).__name__,
                    "dtype": str(self.model.dtype).removeprefix("torch."),
                    "template": self.template,
                    "output": self.output,
                    "max_tokens": self.max_tokens,
                    "pad_token": self.tokenizer.pad_token,
                    "bounds": self.bounded.describe(),
                    **self.counts,
                    **({"training": self.facts} if self.facts else {}),
                }
            )
        )

    def _fits(self, prompt: str, response: str) -> bool:
        return len(self._tokens(prompt, response)["input_ids"]) <= self.max_tokens

    def _tokens(self, prompt: str, response: str) -> dict[str, list[int]]:
        if self.template == "pair":
            return dict(self.tokenizer(prompt, response))
        if self.template != "chat":
            return dict(self.tokenizer(fill(self.template, prompt, response)))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        except Exception as error:  # a template raises what it likes
            raise AlignProError(
                f"reward model {self.name!r}: its chat template fails ({models._one_line(error)}); give "
                "template="
            ) from error
        return dict(self.tokenizer(text, add_special_tokens=False))

    def _without_special(self, text: str) -> str:
        while True:  # what closes over a gap may spell another
            text, n = self._special.subn("", text)
            if not n:
                return text
            self.counts["special_tokens_removed"] += n

    def _choose_template(self, template: str | None) -> str:
        if template is not None:
            check_template(template)
        if template in (None, "chat"):
            if self.tokenizer.chat_template:
                return "chat"
            if template == "chat":
                raise AlignProError(
                    f"template chat: the tokenizer of reward model {self.name!r} has no chat template; "
                    "give a text with {prompt} and {response}"
                )
            packages.note(
                f"reward model {self.name!r} has no chat template: samples are written {PLAIN!r}; if it was "
                "trained otherwise, its scores mean nothing: give template="
            )
        return template or PLAIN

    def _choose_output(self, output: int | None) -> int:
        n = int(self.model.config.num_labels)
        if output is None and n > 1:
            labels = ", ".join(f"{i} {label}" for i, label in list(self.model.config.id2label.items())[:10])
            raise AlignProError(
                f"output: reward model {self.name!r} has {n} outputs ({labels}); choose one as the reward"
            )
        if not 0 <= (output or 0) < n:
            raise AlignProError(f"output {output}: reward model {self.name!r} has outputs 0 to {n - 1}")
        return output or 0

    def _fix_padding(self) -> None:
        """One pad token in tokenizer and configuration, since the score is read before the padding.

        A configured one stays, even if it equals the end token: training read the score where it says.
        """
        config = _text_config(self.model)
        pad = config.pad_token_id
        if pad is not None and 0 <= pad < len(self.tokenizer):
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(pad)
        else:
            listed = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            ends = [i for i in (self.tokenizer.eos_token_id, *listed) if i is not None]
            self.tokenizer.pad_token = models._pad_token(self.tokenizer, ends or [-1], self.name)
            config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"


def _least(n: int, fits: Callable[[int], bool]) -> int | None:
    """The least k in 0..n with fits(k), by bisection; None if not even fits(n)."""
    if not fits(n):
        return None
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def _longest(model: Any, tokenizer: Any) -> int:
    """How many tokens the model can take."""
    positions = getattr(_text_config(model), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length or sys.maxsize), int(positions or sys.maxsize))


def _public_name(model: str | Path) -> str:
    """A hub id, or the last part of a folder: where it lies on this machine is nobody else's business."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def _saved_facts(model: str | Path) -> dict[str, Any]:
    path = Path(model).expanduser() / REWARD_FILE
    if not path.is_file():
        return {}
    facts = read_json(path)
    kinds = {"bounds": str, "template": str, "max_tokens": int}
    if not isinstance(facts, dict) or not all(isinstance(facts.get(k), t) for k, t in kinds.items()):
        raise AlignProError(f"{path}: not what train_reward wrote; remove it and give bounds")
    return facts


@contextlib.contextmanager
def _loading(model: str | Path, folder: Path, what: str) -> Iterator[None]:
    try:
        with models.quiet():
            yield
    except AlignProError:
        raise
    except Exception as error:
        raise AlignProError(
            f"reward model {str(model)!r}: cannot load {folder} ({models._one_line(error)}); check that it "
            f"is a complete {what} saved as safetensors"
        ) from error


# --- a Python function ---


@dataclass
class CallableReward:
    """A Python function as reward.

    Args:
        function: of (prompts, responses), lists of strings, giving one number per sample; or, with `each`, of
            one prompt and one response, giving a number.
        bounds: see `parse_bounds`.
        each: the function takes one sample.
        is_async: the function is `async def`. Every `score` runs its calls in an event loop of its own, so
            nothing that belongs to a loop may outlive a call.
        concurrency: how many asynchronous calls are under way at once.
        batch_size: samples per call, without `each`.
        context: further keyword arguments of every call.
        name: shown by `describe`; the function's own if empty.

    Raises:
        AlignProError: bounds or numbers that do not fit.
    """

    function: Callable[..., Any]
    bounds: Bounds | str
    each: bool = False
    is_async: bool = False
    concurrency: int = 8
    batch_size: int = 64
    context: Mapping[str, Any] = field(default_factory=dict, repr=False)
    name: str = ""
    bounded: Bounded = field(init=False, repr=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise AlignProError(f"function: {type(self.function).__name__} cannot be called; give a function")
        _at_least(1, concurrency=self.concurrency, batch_size=self.batch_size)
        self.bounds = parse_bounds(self.bounds)
        self.bounded = Bounded(self.bounds)
        self.low, self.high = self.bounds.low, self.bounds.high
        self.name = self.name or getattr(self.function, "__name__", type(self.function).__name__)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64 in [low, high].

        Raises:
            AlignProError: the function raised (its exception is the cause), or returned something else than
                one finite number per sample; the sample is shown.
        """
        check_texts(prompts, responses)
        parts = _parts(len(prompts), 1 if self.each else self.batch_size)
        if self.is_async:
            scores = _run(self._score_all(prompts, responses, parts))
        else:
            scores = []
            for part in parts:
                with self._blamed(prompts, responses, part):
                    result = self._call(prompts, responses, part)
                if inspect.isawaitable(result):
                    if inspect.iscoroutine(result):
                        result.close()
                    raise AlignProError(f"function {self.name}: it is asynchronous; set is_async=True")
                scores.append(self._checked(prompts, responses, part, result))
        return self.bounded(prompts, responses, np.concatenate([np.zeros(0), *scores]))

    def describe(self) -> dict[str, Any]:
        """The function's name and the bounds with what they did."""
        return {"name": self.name, "kind": "Python function", "bounds": self.bounded.describe()}

    async def _score_all(
        self, prompts: Sequence[str], responses: Sequence[str], parts: Sequence[range]
    ) -> list[Array]:
        gate = asyncio.Semaphore(self.concurrency)

        async def one(part: range) -> Array:
            async with gate:
                with self._blamed(prompts, responses, part):
                    result = self._call(prompts, responses, part)
                    awaited = inspect.isawaitable(result)
                    result = await result if awaited else result
                if not awaited:
                    raise AlignProError(f"function {self.name}: it is not asynchronous; set is_async=False")
                return self._checked(prompts, responses, part, result)

        # The first failure ends the loop, which cancels the other calls.
        return list(await asyncio.gather(*map(one, parts)))

    def _call(self, prompts: Sequence[str], responses: Sequence[str], part: range) -> Any:
        if self.each:
            return self.function(prompts[part[0]], responses[part[0]], **self.context)
        return self.function([prompts[i] for i in part], [responses[i] for i in part], **self.context)

    def _checked(self, prompts: Sequence[str], responses: Sequence[str], part: range, result: Any) -> Array:
        if self.each:
            result = [result.item() if isinstance(result, torch.Tensor | np.ndarray) else result]
        return check_scores([prompts[i] for i in part], [responses[i] for i in part], result, start=part[0])

    @contextlib.contextmanager
    def _blamed(self, prompts: Sequence[str], responses: Sequence[str], part: range) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            where = _sample(part[0], prompts[part[0]], responses[part[0]])
            if len(part) > 1:
                where = f"samples {part[0]} to {part[-1]}, the first being {where}"
            said = packages.scrub(models._one_line(error))
            raise AlignProError(
                f"function {self.name} raised {type(error).__name__} ({_shown(said, 200)}) on {where}"
            ) from error


def _run(work: Coroutine[Any, Any, list[Array]]) -> list[Array]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    # Called from a notebook or a server, whose loop must not be entered twice.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


# --- an endpoint ---


def _ask_rewards(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"prompts": prompts, "responses": responses}


def _ask_score(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"text_1": prompts, "text_2": responses}


def _ask_classify(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"input": [fill(template, x, y) for x, y in zip(prompts, responses, strict=True)]}


def _only(values: list[Any]) -> Any:
    (value,) = values
    return value


def _in_order(body: Any) -> list[dict[str, Any]]:
    return sorted(body["data"], key=lambda row: row["index"])


STYLES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Any], Any]]] = {
    "rewards": (_ask_rewards, lambda body: body["rewards"]),
    "score": (_ask_score, lambda body: [row["score"] for row in _in_order(body)]),
    "classify": (_ask_classify, lambda body: [_only(row["probs"]) for row in _in_order(body)]),
}
"""How an endpoint is asked and answers. `rewards`: {"prompts", "responses"} for {"rewards"}. `score` and
`classify`: vLLM's /score, of (prompt, response) as two texts, and /classify, of a filled template, for a
model with one output; that server applies a sigmoid unless told otherwise."""

_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LONGEST_PAUSE = 60.0  # seconds


@dataclass
class EndpointReward:
    """A reward that a server gives: JSON is posted, JSON comes back (see `STYLES`).

    The key is read from the environment for each request; it is in no field, and in no error even if the
    server repeats it. Redirects are not followed, since they would take it along.

    Args:
        url: http or https, without user name; a query is sent and never shown.
        bounds: see `parse_bounds`.
        style: a row of `STYLES`.
        model: sent as "model", where the server needs one.
        key_env: NAME of the environment variable with the key, sent as `Authorization: Bearer`.
        template: for `classify`, a text with {prompt} and {response}.
        timeout: seconds for a request.
        retries: further tries after a failed connection, a timeout, or a status that may pass (429, 503, …).
        backoff: seconds before the first of them, doubled each time; a server's Retry-After (seconds) counts.
        concurrency: requests under way at once.
        batch_size: samples per request.

    Raises:
        AlignProError: values that do not fit, the variable is not set, or httpx2 is not installed.
    """

    url: str = field(repr=False)
    bounds: Bounds | str
    style: str = "rewards"
    model: str | None = None
    key_env: str | None = None
    template: str = PLAIN
    timeout: float = 60.0
    retries: int = 4
    backoff: float = 0.5
    concurrency: int = 4
    batch_size: int = 32
    shown: str = field(init=False)
    bounded: Bounded = field(init=False, repr=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        self.shown = check_url(self.url)
        self.bounds = parse_bounds(self.bounds)
        self.bounded = Bounded(self.bounds)
        self.low, self.high = self.bounds.low, self.bounds.high
        if self.style not in STYLES:
            raise AlignProError(f"style {self.style!r}: choose from {', '.join(STYLES)}")
        check_template(self.template)
        if self.template in ("chat", "pair"):
            raise AlignProError(
                f"template {self.template}: an endpoint needs a text with {{prompt}} and {{response}}"
            )
        _at_least(1, concurrency=self.concurrency, batch_size=self.batch_size)
        _at_least(0, retries=self.retries)
        for name in ("timeout", "backoff"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0 and (value or name == "backoff")):
                raise AlignProError(f"{name} {value}: give a positive number of seconds")
        self._key()
        _client_library()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64 in [low, high]. The first failure stops; what was asked meanwhile is waited for.

        Raises:
            AlignProError: the server cannot be reached, refuses, or answers something else than one finite
                number per sample.
        """
        check_texts(prompts, responses)
        parts = _parts(len(prompts), self.batch_size)
        with (
            _client_library().Client(timeout=self.timeout) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            waiting = [pool.submit(self._ask, client, prompts, responses, part) for part in parts]
            try:
                scores = [answer.result() for answer in waiting]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return self.bounded(prompts, responses, np.concatenate([np.zeros(0), *scores]))

    def describe(self) -> dict[str, Any]:
        """Where and how the server is asked, and the bounds with what they did; not the key."""
        facts = {"kind": "endpoint", "url": self.shown, "style": self.style, "model": self.model}
        return {"name": self.model or self.shown, **facts, "bounds": self.bounded.describe()}

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):
            # Not repeated: somebody may have given the key itself.
            raise AlignProError("key_env: give the NAME of an environment variable (capitals), not the key")
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise AlignProError(f"key_env {self.key_env}: this environment variable is not set; export it")
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise AlignProError(
                f"key_env {self.key_env}: its value is no key (white space or non-ASCII in it)"
            )
        return key

    def _ask(self, client: Any, prompts: Sequence[str], responses: Sequence[str], part: range) -> Array:
        ask, read = STYLES[self.style]
        some_prompts, some_responses = [prompts[i] for i in part], [responses[i] for i in part]
        content = ask(some_prompts, some_responses, self.template)
        body = self._post(client, content | ({"model": self.model} if self.model else {}))
        try:
            scores = read(body)
            if not isinstance(scores, list):
                raise TypeError
        except Exception:
            raise AlignProError(
                f"endpoint {self.shown}: answered {self._safe(json.dumps(body))}, which is not of style "
                f"{self.style}; choose from {', '.join(STYLES)}, or mend the server"
            ) from None
        return check_scores(some_prompts, some_responses, scores, start=part[0])

    def _post(self, client: Any, content: dict[str, Any]) -> Any:
        key = self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        pause = self.backoff
        for left in range(self.retries, -1, -1):
            answer, asked = None, 0.0
            try:
                answer = client.post(self.url, json=content, headers=headers)
            except Exception as error:  # httpx2's many, and a text that is no Unicode
                failure = f"{type(error).__name__} {self._safe(str(error))}"
                if not isinstance(error, _client_library().TransportError):
                    left = 0
            else:
                if answer.status_code == 200:
                    with contextlib.suppress(ValueError):
                        return answer.json()
                failure = f"status {answer.status_code}, {self._safe(answer.text)}"
                if answer.status_code not in _AGAIN:
                    left = 0
                with contextlib.suppress(ValueError):
                    asked = float(answer.headers.get("Retry-After", ""))
            if not left:
                break
            wait = max(pause, asked)
            time.sleep(min(wait, _LONGEST_PAUSE) if wait == wait else pause)
            pause *= 2
        # Not from httpx2's exception, which holds the request, and that the key.
        raise AlignProError(
            f"endpoint {self.shown}: {failure}; check the address, the key "
            f"({'in ' + self.key_env if self.key_env else 'none is sent'}) and the server"
        )

    def _safe(self, text: str) -> str:
        """`text`, which a server chose, on one short line and without the key or the address's query."""
        query = urlsplit(self.url).query
        for secret in filter(None, (self._key(), query, *(v for _, v in parse_qsl(query) if len(v) > 3))):
            text = text.replace(json.dumps(secret)[1:-1], "<secret>").replace(secret, "<secret>")
        return _shown(packages.scrub(" ".join(text.split())), 160)


def check_url(url: str) -> str:
    """`url` without its query, to be shown.

    Raises:
        AlignProError: it is not http or https, has no host, or has a user name or password in it.
    """
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
        known = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    except ValueError:
        known = False
    if not known or re.search(r"[\x00-\x20\x7f]", url):
        # Not repeated: a user name or a query may hold a secret.
        raise AlignProError(
            "url: give http://HOST/PATH or https://HOST/PATH without a user name; a key goes into an "
            "environment variable that key_env names"
        )
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path}"


def _client_library() -> Any:
    try:
        import httpx2
    except ImportError:
        raise AlignProError(
            "an endpoint needs httpx2; install it with: pip install 'alignpro[http]'"
        ) from None
    return httpx2


# --- names, for the command line and YAML ---

KEY_ENV = "ALIGNPRO_REWARD_KEY"
"""The environment variable whose key goes to an endpoint that is given by its address, if it is set."""

_NAMES = (
    "a folder of a saved reward, or, with @BOUNDS at the end, a hub id owner/name, module:function or the "
    f"address of an endpoint; BOUNDS is {_SYNTAX}"
)
_IMPORT = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def split_name(name: str) -> tuple[str, Bounds | None]:
    """What `NAME` or `NAME@BOUNDS` names, and the bounds. An @ inside NAME is left alone.

    Raises:
        AlignProError: the bounds are not of `parse_bounds`'s form.
    """
    target, at, bounds = name.rpartition("@")
    if at and target and re.match(r"clip\b|squash\b|[-+.\d]+[^/]*,", bounds):
        return target, parse_bounds(bounds)
    return name, None


def check_name(name: str) -> None:
    """Refuse what `open_reward` would refuse, without a download or a request. A module is imported.

    Raises:
        AlignProError: so.
    """
    _kind(name)


def open_reward(name: str, **options: Any) -> rewards.Reward:
    """The reward that `name` names.

    Args:
        name: a folder that `train_reward` wrote; `FOLDER@BOUNDS`, `owner/name@BOUNDS` of a reward model;
            `module:function@BOUNDS`; `module:object` of a reward made in Python, with its own bounds; or
            `http(s)://…@BOUNDS`, which is sent the key in `ALIGNPRO_REWARD_KEY` if that is set.
        options: of `SequenceReward.load`, `CallableReward` or `EndpointReward`.

    Raises:
        AlignProError: nothing has that name, or bounds are missing; or from making the reward.
    """
    kind, target, bounds = _kind(name)
    if kind == "endpoint":
        key = {"key_env": KEY_ENV} if os.environ.get(KEY_ENV) else {}
        return EndpointReward(target, parse_bounds(bounds), **(key | options))
    if kind == "sequence":
        return SequenceReward.load(target, bounds, **options)
    found = _imported(target)
    if _is_reward(found):
        return found
    return CallableReward(found, parse_bounds(bounds), **({"name": target} | options))


def _kind(name: str) -> tuple[str, str, Bounds | None]:
    target, bounds = (name, None) if Path(name).expanduser().is_dir() else split_name(name)
    if re.match(r"https?://", target):
        check_url(target)
        parse_bounds(bounds)
        return "endpoint", target, bounds
    folder = Path(target).expanduser()
    if target and folder.is_dir():
        models._checked_folder(folder)
        if bounds is None:
            parse_bounds(_saved_facts(folder).get("bounds"))
        return "sequence", target, bounds
    if _IMPORT.fullmatch(target):
        found = _imported(target)
        if _is_reward(found):
            if bounds is not None:
                raise AlignProError(f"reward {target}: it has bounds of its own; leave out @{bounds}")
        else:
            parse_bounds(bounds)
        return "function", target, bounds
    if models._HUB_ID.fullmatch(target):
        parse_bounds(bounds)
        return "sequence", target, bounds
    raise AlignProError(
        f"reward {_shown(target)}: choose from {', '.join(rewards.REWARDS)}, or name {_NAMES}"
    )


def _is_reward(found: Any) -> bool:
    return all(hasattr(found, name) for name in ("score", "describe", "low", "high")) and not inspect.isclass(
        found
    )


def _imported(name: str) -> Any:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise AlignProError(
            f"reward {name}: importing {module} failed ({type(error).__name__}: "
            f"{_shown(packages.scrub(models._one_line(error)), 200)}); put its folder on PYTHONPATH"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise AlignProError(f"reward {name}: {module} has no {attributes}; check the spelling")
        found = getattr(found, attribute)
    if not callable(found) and not _is_reward(found):
        raise AlignProError(f"reward {name}: it is {type(found).__name__}; name a function or a reward")
    return found


# --- eq. (1) with TRL's trainer ---


@dataclass(frozen=True)
class RewardSettings:
    """How a reward model is trained."""

    learning_rate: float = 1e-4
    """AdamW's step, decaying along a cosine. About 1e-5 where all weights are trained."""
    epochs: float = 1.0
    """Passes over the training pairs. Reward models overfit after few."""
    batch_size: int = 16
    """Pairs per optimizer step."""
    max_tokens: int = 1024
    """Of a sample, template included; longer ones lose the beginning of the prompt."""
    lora_rank: int = 16
    """Rank of the adapter, which is merged before saving; 0 trains all weights."""
    centre: float = 0.01
    """Weight of the mean of (r(x,y_u) + r(x,y_v))² (arXiv 2312.09244): eq. (1) leaves a term in x free."""
    seed: int = 0
    """Of the head's initial weights, the adapter's, and the order of the pairs."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise AlignProError(f"{name} {value}: give a positive, finite number")
        if not (math.isfinite(self.centre) and self.centre >= 0):
            raise AlignProError(f"centre {self.centre}: give a finite number, at least 0")
        _at_least(1, batch_size=self.batch_size, max_tokens=self.max_tokens)
        _at_least(0, lora_rank=self.lora_rank, seed=self.seed)


def read_pairs(path: str | Path) -> list[data.PreferencePair]:
    """Preference pairs from JSON lines with the strings "prompt", "chosen" and "rejected"; more is ignored.

    Raises:
        AlignProError: the file cannot be read, has no pair, or a line that is none, by its number.
    """
    path = Path(path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise AlignProError(
            f"pairs {path}: cannot read it ({models._one_line(error)}); name a JSONL file"
        ) from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = [row[name] for name in ("prompt", "chosen", "rejected")]
        except (ValueError, KeyError, TypeError):
            texts = []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise AlignProError(
                f"{path.name}, line {number}: need a JSON object with the non-empty strings "
                "prompt, chosen and rejected"
            )
        prompt, chosen, rejected = texts
        if chosen == rejected:
            raise AlignProError(f"{path.name}, line {number}: chosen equals rejected; remove the line")
        pairs.append(data.PreferencePair(prompt, chosen, rejected, path.stem, data.split_of(prompt)))
    if not pairs:
        raise AlignProError(f"pairs {path}: it is empty; give JSON lines with prompt, chosen and rejected")
    return pairs


def train_reward(
    pairs: Sequence[data.PreferencePair] | str | Path,
    model: str | Path,
    out: str | Path,
    settings: RewardSettings | None = None,
    *,
    template: str | None = None,
    device: str = "auto",
) -> SequenceReward:
    """Learn r(x, y) by eq. (1), −E log σ(r(x, y_u) − r(x, y_v)), with TRL's RewardTrainer; save it.

    Pairs of the split `train` are learned from; `validation` (tune on it) and `test` are only measured.
    Training and scoring write a sample in the same way. The reward that comes back is squashed so that the
    training scores use the range: centre at their median, scale their standard deviation.

    Args:
        pairs: or a file for `read_pairs`.
        model: a causal language model (see `models.resolve`) or a reward model with one output.
        out: a new or empty folder, for safetensors, tokenizer and reward.json; see `SequenceReward.load`.
        template: see `SequenceReward`; not `pair`.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        AlignProError: before any long work: pairs that cannot be read or split, values that do not fit, a
            folder that is not empty; later: a base that cannot be loaded, or training that diverges.
    """
    settings = settings or RewardSettings()
    pairs = read_pairs(pairs) if isinstance(pairs, str | Path) else list(pairs)
    split = _split(pairs)
    if template is not None:
        check_template(template)
        if template == "pair":
            raise AlignProError(
                "template pair: TRL's trainer has no segments; give a text with {prompt} and {response}"
            )
    where = models._device(device)
    models.check_name(model)
    out = writable_folder(out, "out")
    if any(out.iterdir()):
        raise AlignProError(f"out {out}: it is not empty; name a new folder")
    with torch.random.fork_rng():  # TRL seeds the process
        base, tokenizer = _base(model, settings.seed)
        reward = SequenceReward(
            base,
            tokenizer,
            Squash(0.0, 1.0),
            name=_public_name(model),
            template=template,
            max_tokens=min(settings.max_tokens, _longest(base, tokenizer)),
        )
        reward.model, train_loss = _fit(reward, split["train"], settings, where)
    reward.model.eval()
    train = split["train"]
    some = np.random.default_rng(settings.seed).permutation(len(train))[:_SQUASH_PAIRS]
    seen = [train[i] for i in sorted(some)]
    raw = np.concatenate(_pair_logits(reward, seen))
    scale = float(raw.std())
    bounds = Squash(float(np.median(raw)), scale if scale > 0 else 1.0)
    measured = {part: found for part, found in (split | {"train": seen}).items() if found}
    counts = Counter((p.source, p.split) for p in pairs)
    texts = json.dumps([[p.prompt, p.chosen, p.rejected, p.split] for p in pairs])
    reward.facts = {
        "base": _public_name(model),
        "loss": "Bradley–Terry, eq. (1), by TRL's RewardTrainer; plus centre · (r(x,y_u) + r(x,y_v))²",
        "settings": asdict(settings),
        "pairs": {f"{source} {part}": n for (source, part), n in sorted(counts.items())},
        "prompts": {part: len({p.prompt for p in found}) for part, found in split.items()},
        "pairs_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        "truncated": dict(reward.counts),
        "optimizer_loss": train_loss,
        **{f"{part}_loss": _loss(reward, found) for part, found in measured.items()},
        **{
            f"{part}_accuracy": rewards.accuracy(cast(Any, reward), found) for part, found in measured.items()
        },
        "test_accuracy_of_longer_wins": rewards.longer_wins(split["test"]),
        "bounds": str(bounds),
        "template": reward.template,
        "max_tokens": reward.max_tokens,
    }
    reward.bounded = Bounded(bounds)
    reward.counts = dict.fromkeys(reward.counts, 0)
    with models.quiet():
        reward.model.save_pretrained(out)
        reward.tokenizer.save_pretrained(out)
    write_json(out / REWARD_FILE, reward.facts)  # last: without it the folder is not taken for a reward
    return reward


def _split(pairs: Sequence[data.PreferencePair]) -> dict[data.Split, list[data.PreferencePair]]:
    """The pairs of each split; refuses a prompt in two, and a split that is needed and empty."""
    home: dict[str, str] = {}
    for pair in pairs:
        if home.setdefault(data._normalised(pair.prompt), pair.split) != pair.split:
            raise AlignProError(
                f"pairs: prompt {_shown(pair.prompt)} is in the split {pair.split} and in another; "
                f"give each prompt one, such as data.split_of(prompt)"
            )
    split: dict[data.Split, list[data.PreferencePair]] = {
        part: [pair for pair in pairs if pair.split == part] for part in data.SPLITS
    }
    for part in ("train", "test"):
        if not split[part]:
            raise AlignProError(
                f"pairs: none of {len(pairs)} is in the split {part}; give pairs of more prompts"
            )
    return split


def _base(model: str | Path, seed: int) -> tuple[Any, Any]:
    """A sequence classifier with one output and the tokenizer; the head is new if `model` has none."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = models.resolve(model)
    torch.manual_seed(seed)
    with _loading(model, folder, "language model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        base, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    body = sorted(key for key in report["missing_keys"] if key.startswith(f"{base.base_model_prefix}."))
    if body:
        raise AlignProError(f"model {str(model)!r} has no weights for {body[0]}; give a complete model")
    models._forget_quantizer(base)
    if report["missing_keys"]:
        _text_config(base).pad_token_id = None  # a new head may choose one that ends nothing
    return base, tokenizer


def _fit(
    reward: SequenceReward,
    pairs: Sequence[data.PreferencePair],
    settings: RewardSettings,
    where: torch.device,
) -> tuple[Any, float]:
    """The trained model, adapter merged, and the trainer's mean loss."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class StopWhenLost(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not math.isfinite((logs or {}).get("loss", 0.0)):
                raise AlignProError(
                    f"training diverged at step {state.global_step}: the loss is {logs['loss']}; "
                    f"lower learning_rate (it is {settings.learning_rate:g})"
                )

    # Written and cut as for scoring, so TRL is left nothing to tokenize or to drop.
    with models.quiet():
        columns = {
            f"{kind}_ids": [reward.encode(p.prompt, getattr(p, kind))["input_ids"] for p in pairs]
            for kind in ("chosen", "rejected")
        }
    adapter = None
    if settings.lora_rank:
        adapter = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="SEQ_CLS",  # trains the head besides
        )
    cuda = where.type == "cuda"
    with tempfile.TemporaryDirectory() as scratch, models.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' advice on other set-ups
        config = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            center_rewards_coefficient=settings.centre or None,
            max_length=None,
            seed=settings.seed,
            use_cpu=not cuda,
            bf16=cuda and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=False,
            logging_nan_inf_filter=False,
            dataloader_pin_memory=cuda,
            save_strategy="no",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        trainer = RewardTrainer(
            model=reward.model,
            args=config,
            train_dataset=Dataset.from_dict(columns),
            processing_class=reward.tokenizer,
            peft_config=adapter,
            callbacks=[StopWhenLost()],
        )
        trainer.remove_callback(PrinterCallback)
        loss = float(trainer.train().training_loss)
        model = trainer.accelerator.unwrap_model(trainer.model)
        return (model.merge_and_unload() if adapter else model), loss


def _pair_logits(reward: SequenceReward, pairs: Sequence[data.PreferencePair]) -> tuple[Array, Array]:
    """([n], [n]): the unbounded scores of the chosen and of the rejected answers, all finite."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = ([getattr(pair, kind) for pair in pairs] for kind in ("chosen", "rejected"))
    return (
        check_scores(prompts, chosen, reward.logits(prompts, chosen)),
        check_scores(prompts, rejected, reward.logits(prompts, rejected)),
    )


def _loss(reward: SequenceReward, pairs: Sequence[data.PreferencePair]) -> float:
    """Eq. (1) over the pairs, in nats; log 2 is that of a constant reward."""
    chosen, rejected = _pair_logits(reward, pairs)
    return float(np.mean(np.logaddexp(0.0, rejected - chosen)))
