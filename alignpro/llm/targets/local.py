"""A frozen transformers model in this process: batches, a KV cache, and one random stream per answer."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignpro.errors import AlignProError
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.forward import room
from alignpro.llm.models.load import load_model
from alignpro.llm.models.policy import draw, end_tokens, in_batches, log_probs
from alignpro.llm.models.sampling import Sampling, digest, is_int, stream_key
from alignpro.llm.targets.target import Answer, Answers, OnAnswer, Stopped, arrange, jobs
from alignpro.llm.targets.tokens import answer_of, ids_of, prompt_ids, to_score

S = TypeVar("S")
T = TypeVar("T")


class LocalTarget:
    """A frozen transformers model in this process.

    A batch's shape moves its rounding, and a rounding can change a token and all that follow. In float32
    that is rare (at least 31 of 32 answers of 32 tokens agreed between batch sizes 32 and 5, SmolLM2-135M);
    in bfloat16 most such answers differed: there, keep `batch_size` and the calls, or a cache.

    Args:
        model: a name or folder (`models.load_model`), or a (model, tokenizer) that it returned or that
            `models.prepare` made ready. The weights must not change while this exists.
        dtype, device: those of a model that is named here (`models.load_model`); bfloat16, which `auto` is
            where the device computes with it, halves memory and, mostly, time.
        batch_size: sequences at once; halved for good when CUDA runs out of memory.
        name: instead of the model's own, in caches and tables.
        chat_template_kwargs: further arguments of the chat template of a model that is named here.
    """

    remote: ClassVar[bool] = False

    def __init__(
        self,
        model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase],
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int = 32,
        name: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not is_int(batch_size) or batch_size < 1:
            raise AlignProError(f"batch_size {batch_size!r}: choose a whole number of at least 1")
        self.model: Any
        self.tokenizer: Any
        if isinstance(model, tuple):
            self.model, self.tokenizer = model
            model = type(self.model).__name__.removesuffix("ForCausalLM")
        else:
            options = {"chat_template_kwargs": chat_template_kwargs}
            self.model, self.tokenizer = load_model(model, dtype, device, **options)
        self.batch_size = batch_size
        self.name = name or str(model)
        self.calls = 0
        self.retried = 0
        self._ends = end_tokens(self.model)

    @cached_property
    def revision(self) -> str:
        """SHA-256, shortened, of the weights as loaded (so of the dtype too), tokens and chat format."""
        hashed = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            hashed.update(digest(name, str(tensor.dtype), list(tensor.shape)))
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        chat = chat_of(self.tokenizer)
        # The format as it comes out, beside the template: its date and its options are in there.
        hashed.update(digest(vocabulary, str(chat.template), dict(chat.options), chat.sample(), self._ends))
        return hashed.hexdigest()[:16]

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
        """See `Target.respond`. The answer to a prompt that leaves no room for `max_tokens` is a refusal."""
        asked = jobs(prompts, first, samples, seed)
        ids = ids_of(self.tokenizer, prompts)
        too_long = [self.too_long(len(row), sampling.max_tokens) for row in ids]
        answers: Answers = {}

        def keep(position: int, index: int, answer: Answer) -> None:
            answers[position, index] = answer
            if on_answer:
                on_answer(position, index, answer)

        for position, index in asked:
            if (reason := too_long[position]) is not None:
                keep(position, index, Answer(reason, "refused", len(ids[position]), 0))

        def run(batch: Sequence[tuple[int, int]]) -> list[list[int]]:
            keys = [stream_key(seed, sampling, prompts[p], i) for p, i in batch]
            return self._generate([ids[p] for p, _ in batch], keys, sampling)

        # Similar lengths together: little padding. Equal prompts together: each is read once.
        fitting = [job for job in asked if too_long[job[0]] is None]
        order = sorted(fitting, key=lambda job: (len(ids[job[0]]), ids[job[0]]))
        try:
            for batch, generated in self._batches(order, run):
                for (position, index), new in zip(batch, generated, strict=True):
                    ended = bool(new) and new[-1] in self._ends
                    finish: Literal["stop", "length"] = "stop" if ended else "length"
                    answer = answer_of(self.tokenizer, len(ids[position]), new, finish, None)
                    self.calls += 1
                    keep(position, index, answer)
        except torch.OutOfMemoryError:
            message = "one sequence alone exceeds the GPU's memory; use a smaller model, dtype or max_tokens"
            raise Stopped(f"model {self.name!r}: {message}", "failed", answers) from None
        return arrange(asked, answers, len(prompts))

    def log_probs(
        self,
        prompts: Sequence[str],
        responses: Sequence[str | Answer],
        sampling: Sampling | None = None,
        *,
        drawn: bool = False,
    ) -> np.ndarray:
        """[n] float64: log π_F(responses[i] | prompts[i]) in nats, −inf where `sampling` excludes it and NaN
        of a refusal.

        An `Answer` is the tokens it was, its end token among them unless it was cut off. A string is a
        finished answer, whichever token ends it, cut afresh: rare texts into other tokens than were drawn.

        Args:
            sampling: makes the distribution; None is temperature 1 with nothing truncated.
            drawn: the responses are answers to these prompts under `sampling`, so that none is impossible:
                a token on the edge of what is kept stays in, though another batch rounds it out.

        Raises:
            AlignProError: not as many prompts as responses; an answer without token ids; no room for a pair.
        """
        found = to_score(self.tokenizer, self._ends, prompts, responses, self.too_long)
        order = sorted(found.rows, key=lambda row: (len(row[1]), row[1], row[2]))

        def run(batch: Sequence[tuple[int, tuple[int, ...], tuple[int, ...]]]) -> np.ndarray:
            with torch.inference_mode():
                scores = log_probs(
                    self.model,
                    [ids for _, ids, _ in batch],
                    [said for _, _, said in batch],
                    sampling=sampling,
                    drawn=drawn,
                )
            return scores.log_probs.double().sum(1).cpu().numpy()

        try:
            for batch, values in self._batches(order, run):
                for row, value in zip(batch, values, strict=True):
                    found.add(row, float(value))
        except torch.OutOfMemoryError:
            raise AlignProError(
                f"model {self.name!r}: one pair alone exceeds the GPU's memory; use a smaller model or dtype"
            ) from None
        return found.values

    def count_tokens(self, prompt: str) -> int:
        """Tokens of `prompt` as the user's turn, the chat template's included."""
        return len(prompt_ids(self.tokenizer, prompt))

    def too_long(self, tokens: int, more: int) -> str | None:
        """Say why a prompt of so many tokens leaves no room for so many more; None where it does."""
        most = room(self.model)
        if most is None or tokens + more <= most:
            return None
        return (
            f"{tokens} tokens, with {more} more to come, are beyond the {most} that model {self.name!r} reads"
        )

    def _batches(self, rows: Sequence[T], run: Callable[[Sequence[T]], S]) -> Iterator[tuple[Sequence[T], S]]:
        """`run` on consecutive batches (see `policy.in_batches`)."""
        for batch, result, size in in_batches(rows, self.batch_size, run):
            self.batch_size = size
            yield batch, result

    def _generate(
        self, rows: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """New token ids of each row, up to its end token."""
        drawn = draw(self.model, int(self.tokenizer.pad_token_id), rows, keys, sampling)
        return [ids for ids, _ in drawn]
