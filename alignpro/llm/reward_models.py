"""Rewards r(x, y) of the user's own: a reward model, a Python function, an endpoint.

Theorem 1 asks for bounded rewards, so each is made with its bounds (`parse_bounds`): a declared range, which
a score may not leave, or a clipping or squashing, which `describe` reports with what it did. A score that is
not finite is refused with its sample before any of that, since clipping would make a number of it.

Prompts and responses are data throughout: they are filled in literally, cannot spell a model's special
tokens, and are shortened and escaped where an error shows them.
"""

import asyncio
import contextlib
import importlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm import http, models, packages, rewards
from alignpro.llm.chat import chat_of
from alignpro.llm.forward import room, text_config
from alignpro.llm.frozen import Answer, OnAnswer, Sampling, Stopped, digest
from alignpro.llm.ledger import Cached, Ledger
from alignpro.llm.libraries import quiet
from alignpro.llm.rewards import check_scores, check_texts, sample_shown, shown

Array = np.ndarray

PLAIN = "Human: {prompt}\n\nAssistant: {response}"
"""How a sample is written for a model whose tokenizer has no chat template."""

REWARD_FILE = "reward.json"
"""What `reward_training.train_reward` records beside the weights."""

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
        raise AlignProError(f"bounds {shown(str(bounds))}: give {_SYNTAX}") from None
    return make(first, second)


@dataclass
class Bounded:
    """Bounds at work: checks and bounds scores, and keeps count of what it did to them."""

    bounds: Bounds
    scored: int = 0
    clipped: int = 0
    least: float = math.inf
    greatest: float = -math.inf

    @property
    def limits(self) -> tuple[float, float]:
        """Between which a raw score must lie."""
        b = self.bounds
        return (b.low, b.high) if isinstance(b, Declared) else (-math.inf, math.inf)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], raw: Any) -> Array:
        """[n] float64 in [low, high].

        Raises:
            AlignProError: see `check_scores`.
        """
        b = self.bounds
        scores = check_scores(prompts, responses, raw, *self.limits)
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
            f"template {shown(template)}: write {{prompt}} and {{response}} once each, or chat or pair"
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
        most = longest(model, tokenizer)
        if max_tokens is not None and not 1 <= max_tokens <= most:
            raise AlignProError(f"max_tokens {max_tokens}: reward model {name!r} takes 1 to {most}")
        self.max_tokens = max_tokens or most
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
        where = models.device_of(device)
        if template is not None:
            check_template(template)
        models.check_name(model)
        saved = _saved_facts(model)
        chosen = parse_bounds(bounds if bounds is not None else saved.get("bounds"))
        folder = models.resolve(model)
        with loading(model, folder, "sequence classifier"):
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            auto = AutoModelForSequenceClassification
            loaded, report = models.read_weights(auto, folder, models.DTYPES[dtype], where)
        if report["missing_keys"]:
            raise AlignProError(
                f"reward model {str(model)!r} has no weights for {sorted(report['missing_keys'])[0]}, which "
                "would be drawn at random; name a trained reward model, or train one with alignpro "
                "reward-model (train_reward)"
            )
        return cls(
            loaded.to(where),
            tokenizer,
            chosen,
            name=public_name(model),
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
        with quiet(), torch.inference_mode():
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
            text = chat_of(self.tokenizer).render(turns, generate=False)
        except AlignProError as error:
            raise AlignProError(f"reward model {self.name!r} {error}, or give template=") from error
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
        config = text_config(self.model)
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


def longest(model: Any, tokenizer: Any) -> int:
    """How many tokens the model can take."""
    return min(int(tokenizer.model_max_length or sys.maxsize), room(model) or sys.maxsize)


def public_name(model: str | Path) -> str:
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
def loading(model: str | Path, folder: Path, what: str) -> Iterator[None]:
    try:
        with quiet():
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
            scores = http.finish(self._score_all(prompts, responses, parts))
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
            where = sample_shown(part[0], prompts[part[0]], responses[part[0]])
            if len(part) > 1:
                where = f"samples {part[0]} to {part[-1]}, the first being {where}"
            said = packages.scrub(models._one_line(error))
            raise AlignProError(
                f"function {self.name} raised {type(error).__name__} ({shown(said, 200)}) on {where}"
            ) from error


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

_WORDS = {
    "address": "url",
    "timeout": "timeout",
    "found": "url and model",
    "request": "style, model or template",
}


@dataclass
class EndpointReward:
    """A reward that a server gives: JSON is posted, JSON comes back (see `STYLES`).

    The key is read from the environment for each `score`; it is in no field, and in no error even if the
    server repeats it. Redirects are not followed, since they would take it along.

    Args:
        url: http or https, without user name; a query is sent and never shown.
        bounds: see `parse_bounds`.
        style: a row of `STYLES`.
        model: sent as "model", where the server needs one.
        key_env: NAME of the environment variable with the key, sent as `Authorization: Bearer`.
        template: for `classify`, a text with {prompt} and {response}.
        timeout: seconds for a whole request.
        retries: further tries after a failed connection, a timeout, or a status that may pass (429, 503, …).
        backoff: seconds before the first of them, give or take half, doubled each time; a server's
            Retry-After counts, up to a minute.
        concurrency: requests under way at once.
        batch_size: samples per request.
        requests_per_minute: at most; None for no limit.
        max_calls: budget of requests, retries included, over this object's life; None for no limit.

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
    requests_per_minute: float | None = None
    max_calls: int | None = None
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
        if self.max_calls is not None:
            _at_least(1, max_calls=self.max_calls)
        for name in ("timeout", "backoff", "requests_per_minute"):
            value = getattr(self, name)
            optional = name == "requests_per_minute" and value is None
            if not optional and not (math.isfinite(value) and value >= 0 and (value or name == "backoff")):
                raise AlignProError(f"{name} {value}: give a positive number")
        http.check_key_env(self.key_env)
        http.read_key(self.key_env)
        http.client_library()
        self._http = http.Transport(
            url=self.url,
            shown=self.shown,
            name=f"endpoint {self.shown}",
            words=_WORDS,
            key_env=self.key_env,
            concurrency=self.concurrency,
            timeout_s=self.timeout,
            retries=self.retries,
            backoff_s=self.backoff,
            patient=True,
            requests_per_minute=self.requests_per_minute,
            max_calls=self.max_calls,
        )

    @property
    def calls(self) -> int:
        """Requests so far, retries included."""
        return self._http.calls

    @property
    def retried(self) -> int:
        """How many of them repeated a failed one."""
        return self._http.retried

    @property
    def revision(self) -> str:
        """Changes with whatever determines the raw scores; a digest, since the address may hold a key."""
        return digest(self.url, self.style, self.model, self.template).hex()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64 in [low, high]. The first failure stops; what was asked meanwhile is waited for.

        Raises:
            AlignProError: the server answers something else than one finite number per sample.
            Stopped: it cannot be reached or refuses, or the budget is spent; says why in `reason`.
        """
        return self.bounded(prompts, responses, self.raw(prompts, responses))

    def raw(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        on_score: Callable[[int, float], None] = lambda i, score: None,
    ) -> Array:
        """[n] float64: what the server says, not yet clipped or squashed.

        Args:
            on_score: called with (sample, raw score) as each arrives.

        Raises:
            AlignProError: see `score`.
        """
        check_texts(prompts, responses)
        scores = np.full(len(prompts), np.nan)
        secret = http.read_key(self.key_env, self.url)

        def call(part: range) -> http.Call[Array]:
            some = [prompts[i] for i in part], [responses[i] for i in part]

            def keep(found: Array) -> None:
                scores[part[0] : part[-1] + 1] = found
                for i in part:
                    on_score(i, float(scores[i]))

            content = STYLES[self.style][0](*some, self.template)
            content |= {"model": self.model} if self.model else {}
            body = json.dumps(content).encode()
            return http.Call(body, lambda body: self._read(body, *some, part[0], secret), keep)

        failure = self._http.post(_parts(len(prompts), self.batch_size), call, secret)
        if failure is None:
            return scores
        done = np.isfinite(scores).sum()
        raise Stopped(f"{failure.text} ({done} of {len(prompts)} scored)", failure.reason, {})

    def stop(self) -> None:
        """End a `score` that runs in another thread, soon; it raises Stopped."""
        self._http.stop()

    def describe(self) -> dict[str, Any]:
        """Where and how the server is asked, and the bounds with what they did; not the key."""
        facts = {"kind": "endpoint", "url": self.shown, "style": self.style, "model": self.model}
        return {"name": self.model or self.shown, **facts, "bounds": self.bounded.describe()}

    def _read(
        self, body: bytes, prompts: Sequence[str], responses: Sequence[str], start: int, secret: http.Secret
    ) -> tuple[Array, int] | http.Problem:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            text = secret.said(body.decode(errors="replace"))
            return http.Problem(f"response {text!r} is not JSON; check the url and the server", True)
        try:
            scores = STYLES[self.style][1](content)
            if not isinstance(scores, list):
                raise TypeError
        except Exception:
            return http.Problem(
                f"answered {secret.said(json.dumps(content))}, which is not of style {self.style}; choose "
                f"from {', '.join(STYLES)}, or mend the server",
                False,
            )
        return check_scores(prompts, responses, scores, *self.bounded.limits, start=start), 0


def check_url(url: str) -> str:
    """`url` without its query, to be shown.

    Raises:
        AlignProError: it is not http or https, has no host, or has a user name or password in it.
    """
    return http.check_address("url", url, "https://HOST/PATH", query=True)


_ONCE = Sampling(temperature=0.0, max_tokens=1)


class CachedReward:
    """An endpoint's reward that asks only for the scores its folder does not hold.

    A raw score is on file as soon as it arrives, in the file of `ledger.Cached`: what killed a run, or
    changed the bounds, asks for no sample again.

    Args:
        reward: whose bounds apply; its `revision` and the texts are the key.
        folder: created if need be; holds `answers.jsonl`, of which an answer is a score in decimal.

    Raises:
        AlignProError: the folder cannot be written to, or its file not read.
    """

    def __init__(self, reward: EndpointReward, folder: str | Path) -> None:
        self.reward = reward
        self.low, self.high = reward.low, reward.high
        self._cached = Cached(_AsTarget(reward), folder, note=None)

    @property
    def ledger(self) -> Ledger:
        """Of this object: `answers` are scores."""
        return self._cached.ledger

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """[n] float64 in [low, high].

        Raises:
            Stopped: see `EndpointReward.score`; also where the disk is full. What arrived before is on file.
            AlignProError: as many prompts as responses are needed, all strings; a score on file that is none.
        """
        check_texts(prompts, responses)
        asked = [json.dumps(sample) for sample in zip(prompts, responses, strict=True)]
        rows = self._cached.respond(asked, _ONCE)
        return self.reward.bounded(prompts, responses, [_number(row[0].text) for row in rows])

    def describe(self) -> dict[str, Any]:
        """See `EndpointReward.describe`."""
        return self.reward.describe()

    def line(self) -> str:
        """One line of text: what was asked for."""
        spent = self.ledger
        return (
            f"{spent.answers} scores in {spent.calls} requests ({spent.retries} retries), {spent.hits} more "
            "from the file"
        )


def keep_scores(reward: rewards.Reward, folder: str | Path) -> rewards.Reward:
    """`reward`, behind a `CachedReward` in `folder` where its scores are paid for."""
    return CachedReward(reward, folder) if isinstance(reward, EndpointReward) else reward


class _AsTarget:
    """A reward as a `Target`: a question is a sample, as JSON, and its answer the raw score."""

    remote = True

    def __init__(self, reward: EndpointReward) -> None:
        self.reward = reward
        self.name = str(reward.describe()["name"])
        self.revision = reward.revision

    @property
    def calls(self) -> int:
        return self.reward.calls

    @property
    def retried(self) -> int:
        return self.reward.retried

    def stop(self) -> None:
        self.reward.stop()

    def respond(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
    ) -> list[list[Answer]]:
        found: list[list[Answer]] = [[] for _ in prompts]

        def keep(i: int, score: float) -> None:
            found[i] = [Answer(repr(score), "stop", 0, 0)]  # repr: to the bit
            if on_answer:
                on_answer(i, 0, found[i][0])

        pairs = [json.loads(prompt) for prompt in prompts]
        self.reward.raw([x for x, _ in pairs], [y for _, y in pairs], keep)
        return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # of an edited file; told with its sample


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


def shown_name(name: str) -> str:
    """`name`, to be written down: an address without its query, in which there may be a key."""
    target, bounds = split_name(name)
    if not re.match(r"https?://", target):
        return name
    return check_url(target) + ("" if bounds is None else f"@{bounds}")


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
    raise AlignProError(f"reward {shown(target)}: choose from {', '.join(rewards.REWARDS)}, or name {_NAMES}")


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
            f"{shown(packages.scrub(models._one_line(error)), 200)}); put its folder on PYTHONPATH"
        ) from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            raise AlignProError(f"reward {name}: {module} has no {attributes}; check the spelling")
        found = getattr(found, attribute)
    if not callable(found) and not _is_reward(found):
        raise AlignProError(f"reward {name}: it is {type(found).__name__}; name a function or a reward")
    return found
