"""A sequence-classification model as reward."""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification

from alignpro.errors import AlignProError
from alignpro.files import read_json, real
from alignpro.llm.models import catalogue, configure, devices, packages, resolve
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.forward import check_tokens, room, text_config
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.load import loading, read_tokenizer, read_weights
from alignpro.llm.models.prompt import Message, Prompt, context_of, messages_of, transcript
from alignpro.llm.rewards.bounds import Bounded, Bounds, parse_bounds
from alignpro.llm.rewards.reward import PLAIN, Array, at_least, batches, check_template, check_texts, fill

REWARD_FILE = "reward.json"
"""The file in which `train_reward` records its facts beside the weights."""


class SequenceReward:
    """A reward that a sequence classifier gives: it reads prompt and response and answers with one number.

    The sample is written by the tokenizer's own chat template (the prompt's conversation and an assistant's
    turn), by a `template` with {prompt}, the conversation as one text, and {response}, or, where there is
    neither, as `PLAIN`. A chat template writes its own special tokens, so the tokenizer adds none: exactly
    one BOS.

    Special tokens spelled out in a prompt or response are taken out: they could forge the end of a turn.
    Samples longer than `max_tokens` lose the oldest turns, then a system message, then the beginning of the
    prompt; only a response that is too long by itself is cut, at its end. Decoder classifiers read the score
    at the last token that is not padding, as their configuration names it; where it names none, a token that
    ends nothing is chosen. Padding is on the right, so a score does not depend on its batch (up to rounding:
    1e-6 in float32, 1e-2 in bfloat16).

    Args:
        model: a transformers model with a sequence-classification head.
        tokenizer: the model's own.
        bounds: see `parse_bounds`.
        name: what `describe` calls it.
        template: how a sample is written: None for the tokenizer's chat template; `chat` to insist on it;
            `pair` for encoders trained on (prompt, response) as two segments; or a text with {prompt} and
            {response}.
        output: the output that is the reward, by its label or its number; needed where the head has several.
        probability: whether the reward is the label's probability, in [0, 1], and not the output itself: by a
            softmax over the outputs, or by a sigmoid where the model is one for several labels at once.
        max_tokens: most tokens of a sample, template included; what the model can take if None.
        batch_size: samples per forward pass.
        facts: what `train_reward` recorded, for `describe`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        bounds: Bounds | str,
        *,
        name: str = "model",
        template: str | None = None,
        output: int | str | None = None,
        probability: bool = False,
        max_tokens: int | None = None,
        batch_size: int = 16,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.bounded = Bounded(parse_bounds(bounds))
        self.low, self.high = self.bounded.bounds.low, self.bounded.bounds.high
        at_least(1, batch_size=batch_size)
        self.name, self.model, self.tokenizer, self.batch_size = name, model, tokenizer, batch_size
        self.facts = dict(facts or {})
        self.template = self._choose_template(template)
        self.output = choose_output(model.config, output, self.name)
        self.probability = probability
        if probability and model.config.num_labels == 1:
            raise AlignProError(
                f"output: reward model {name!r} has one output, and no probability of a label"
            )
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
        output: int | str | None = None,
        probability: bool = False,
        max_tokens: int | None = None,
        batch_size: int = 16,
        dtype: str = "float32",
        device: str = "auto",
    ) -> "SequenceReward":
        """Load the reward model in a folder or under a hub id: safetensors only, and none of its code is run.

        Args:
            model: a folder that `train_reward` or `save_pretrained` wrote, or a hub id `owner/name`.
            bounds: needed unless `train_reward` recorded them in the folder.
            dtype: `float32`, `bfloat16` or `float16`.
            device: `auto` (CUDA if there is one), or a torch device.

        Raises:
            AlignProError: unknown names or no bounds, before any download; a model without a trained head,
                a folder that transformers cannot read, or a failure of `models.resolve`.
        """
        if dtype not in devices.DTYPES:
            raise AlignProError(f"dtype {dtype!r}: choose from {', '.join(devices.DTYPES)}")
        where = devices.device_of(device)
        if template is not None:
            check_template(template)
        catalogue.check_name(model)
        saved = saved_facts(model)
        chosen = parse_bounds(bounds if bounds is not None else saved.get("bounds"))
        folder = resolve.resolve(model)
        what, kind = f"reward model {str(model)!r}", "sequence classifier"
        with loading(what, folder, kind):
            tokenizer = read_tokenizer(folder)
        auto = AutoModelForSequenceClassification
        loaded, lacking = read_weights(auto, folder, what, devices.DTYPES[dtype], where, kind)
        if lacking:
            raise AlignProError(
                f"{what} has no weights for {lacking[0]}, which "
                "would be drawn at random; name a trained reward model, or train one with alignpro "
                "reward-model (train_reward)"
            )
        made = cls(
            loaded.to(where),
            tokenizer,
            chosen,
            name=public_name(model),
            template=template if template is not None else saved.get("template"),
            output=output,
            probability=probability,
            max_tokens=max_tokens if max_tokens is not None else saved.get("max_tokens"),
            batch_size=batch_size,
            facts=saved,
        )
        with loading(what, folder, kind):  # a tokenizer may fail, or make nothing of a text, only when used
            tried = made.logits(["?"], ["?"])
        if not np.isfinite(tried).all():
            raise AlignProError(f"{what}: its scores are not finite; its weights are damaged: save it again")
        return made

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response to its prompt: [n] float64 in [low, high]."""
        logits = self.logits(prompts, responses)
        return self.bounded(prompts, responses, expit(logits) if self.probability else logits)

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Compute the head's output, or the log-odds of a `probability`, unbounded: [n] float64.

        Identical samples are computed once.
        """
        check_texts(prompts, responses)
        samples = list(dict.fromkeys(zip(prompts, responses, strict=True)))
        found: dict[tuple[str, str], float] = {}
        with quiet(), torch.inference_mode():
            rows = [self.encode(x, y) for x, y in samples]
            check_tokens(self.model, [row["input_ids"] for row in rows])
            # Similar lengths together: little padding. The longest first: memory runs out at once or never.
            order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
            parts = batches(len(order), self.batch_size)
            for part in tqdm(parts, desc="scoring", unit="batch", disable=len(parts) < 16 or None):
                batch = [order[i] for i in part]
                padded = self.tokenizer.pad([rows[i] for i in batch], padding=True, return_tensors="pt")
                logits = self.model(**padded.to(self.model.device)).logits.double()
                values = self._read(logits).tolist()
                found.update(zip((samples[i] for i in batch), values, strict=True))
        return np.array([found[sample] for sample in zip(prompts, responses, strict=True)])

    def encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        """Write one sample as at most `max_tokens` tokens; what was taken out is added to `counts`."""
        clean, response = self._without_special, self._without_special(response)
        context = [{**turn, "content": clean(turn["content"])} for turn in context_of(prompt)]
        text = clean(str(prompt))
        left = [Prompt(text, turns) for turns in _shorter(context)]
        row = self._tokens(left[0], response)
        if len(row["input_ids"]) <= self.max_tokens:
            return row
        self.counts["prompts_truncated"] += 1
        cut = _least(len(left) - 1, lambda k: self._fits(left[k], response))
        if cut is not None:
            return self._tokens(left[cut], response)
        cut = _least(len(text), lambda k: self._fits(text[k:], response))
        if cut is not None:
            return self._tokens(text[cut:], response)
        self.counts["responses_truncated"] += 1
        size = len(response)
        cut = _least(size, lambda k: self._fits("", response[: size - k]))
        if cut is None:
            raise AlignProError(f"max_tokens {self.max_tokens}: the template alone is longer; raise it")
        return self._tokens("", response[: size - cut])

    def describe(self) -> dict[str, Any]:
        """Say which model it is, how samples are written, what the bounds did, and the facts of training."""
        return json.loads(
            json.dumps(
                {
                    "name": self.name,
                    "kind": "sequence classifier",
                    "architecture": type(self.model).__name__,
                    "dtype": str(self.model.dtype).removeprefix("torch."),
                    "template": self.template,
                    "output": self.output,
                    "label": label_names(self.model.config)[self.output],
                    "read_as": "probability" if self.probability else "output",
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
            return dict(self.tokenizer(transcript(prompt), response))
        if self.template != "chat":
            return dict(self.tokenizer(fill(self.template, transcript(prompt), response)))
        turns = [*messages_of(prompt), {"role": "assistant", "content": response}]
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

    def _read(self, logits: torch.Tensor) -> torch.Tensor:
        """Take from outputs [n, labels] the chosen one, or its log-odds."""
        chosen = logits[:, self.output]
        if not self.probability or self.model.config.problem_type == "multi_label_classification":
            return chosen
        others = [i for i in range(logits.shape[1]) if i != self.output]
        return chosen - logits[:, others].logsumexp(1)

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
            self.tokenizer.pad_token = configure.choose_pad_token(self.tokenizer, ends or [-1], self.name)
            config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.padding_side = "right"


def label_names(config: Any) -> list[str]:
    """List the labels of a classifier's outputs, as its configuration names them."""
    return [str(config.id2label.get(i, i)) for i in range(int(config.num_labels))]


def choose_output(config: Any, output: int | str | None, name: str) -> int:
    """Find an output by its label (in any case, if one alone fits) or its number; the only one if None.

    Raises:
        AlignProError: there is no such output, or several and none is chosen; lists the labels.
    """
    labels = label_names(config)
    if output is None and len(labels) == 1:
        return 0
    alike = [i for i, label in enumerate(labels) if label.casefold() == str(output).casefold()]
    if isinstance(output, str) and output in labels:
        return labels.index(output)
    if isinstance(output, str) and len(alike) == 1:
        return alike[0]
    if str(output).isdecimal() and int(str(output)) < len(labels):
        return int(str(output))
    listed = ", ".join(f"{i} {label}" for i, label in enumerate(labels[:10]))
    listed += ", …" * (len(labels) > 10)
    field, problem = f"output {output!r}", "has no such output"
    if output is None:
        field, problem = "output", f"has {len(labels)} outputs"
    raise AlignProError(
        f"{field}: reward model {name!r} {problem} ({listed}); name one by its label or number, as in "
        "FOLDER#LABEL@0,1"
    )


def _shorter(context: Sequence[Message]) -> list[list[Message]]:
    """The turns before a prompt, and what is left of them as the oldest go; a system message goes last."""
    head = [turn for turn in context[:1] if turn["role"] == "system"]
    turns = list(context[len(head) :])
    # What is left begins with a user's turn, as chat templates want it.
    starts = [k for k in range(1, len(turns)) if turns[k]["role"] == "user"]
    found = [head + turns, *(head + turns[k:] for k in starts), head, []]
    return [left for i, left in enumerate(found) if left not in found[:i]]


def _least(n: int, fits: Callable[[int], bool]) -> int | None:
    """Find the least k in 0..n with fits(k), by bisection; None if not even fits(n)."""
    if not fits(n):
        return None
    low, high = -1, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def longest(model: Any, tokenizer: Any) -> int:
    """Count the tokens that the model can take."""
    return min(int(tokenizer.model_max_length or sys.maxsize), room(model) or sys.maxsize)


def public_name(model: str | Path) -> str:
    """Name a model by its hub id, or by the last part of its folder: where that lies is nobody's business."""
    path = Path(model).expanduser()
    return real(path).name if path.exists() else str(model)


def saved_facts(model: str | Path) -> dict[str, Any]:
    """Read what `train_reward` recorded in a folder; nothing of another folder or a hub id."""
    path = Path(model).expanduser() / REWARD_FILE
    if not path.is_file():
        return {}
    facts = read_json(path, dict)
    kinds = {"bounds": str, "template": str, "max_tokens": int}
    if not all(type(facts.get(k)) is t for k, t in kinds.items()):
        raise AlignProError(f"{path}: not what train_reward wrote; remove it and give bounds")
    return facts
