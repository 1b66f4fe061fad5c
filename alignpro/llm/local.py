"""A frozen transformers model in this process: batches, a KV cache, and one random stream per answer."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from alignpro.errors import AlignProError
from alignpro.llm.frozen import (
    Answer,
    Answers,
    OnAnswer,
    Sampling,
    Stopped,
    arrange,
    digest,
    is_int,
    jobs,
    stream_key,
)
from alignpro.llm.models import load_model, quiet
from alignpro.llm.prompter import target_ids

S = TypeVar("S")
T = TypeVar("T")


class LocalTarget:
    """A frozen transformers model in this process: batched, with a KV cache.

    A batch's shape moves its rounding, and a rounding can change a token and all that follow. In float32
    that is rare (at least 31 of 32 answers of 32 tokens agreed between batch sizes 32 and 5, SmolLM2-135M);
    in bfloat16 most such answers differed: there, keep `batch_size` and the calls, or a cache.

    Args:
        model: what `models.load_model` takes, or the (model, tokenizer) that it returned. The weights must
            not change while this exists.
        dtype, device: of a model named; bfloat16 halves memory and, on most machines, time.
        batch_size: sequences at once; halved for good when CUDA runs out of memory.
        name: instead of the model's own, in caches and tables.

    Raises:
        AlignProError: a bad batch size; or a failure of `load_model`.
    """

    remote: ClassVar[bool] = False

    def __init__(
        self,
        model: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase],
        *,
        dtype: str = "bfloat16",
        device: str = "auto",
        batch_size: int = 32,
        name: str = "",
    ) -> None:
        if not is_int(batch_size) or batch_size < 1:
            raise AlignProError(f"batch_size {batch_size!r}: choose a whole number of at least 1")
        pair = model if isinstance(model, tuple) else load_model(model, dtype, device)
        self.model: Any = pair[0]
        self.tokenizer: Any = pair[1]
        self.batch_size = batch_size
        if isinstance(model, tuple):
            model = type(self.model).__name__.removesuffix("ForCausalLM")
        self.name = name or str(model)
        self.calls = 0
        self.retried = 0
        self._stopping = False
        ends = self.model.generation_config.eos_token_id
        self._ends: list[int] = list(ends) if isinstance(ends, list) else [ends]

    @cached_property
    def revision(self) -> str:
        """SHA-256, shortened, of the weights as loaded (so of the dtype too), tokens and chat template."""
        hashed = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            hashed.update(digest(name, str(tensor.dtype), list(tensor.shape)))
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        hashed.update(digest(vocabulary, str(self.tokenizer.chat_template), self._ends))
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
        """See `Target.respond`. Also refuses prompts that leave no room for `max_tokens`."""
        asked = jobs(prompts, first, samples, seed)
        ids = [target_ids(self.tokenizer, prompt) for prompt in prompts]
        self._check_room(ids, [sampling.max_tokens] * len(ids))
        answers: Answers = {}
        self._stopping = False

        def run(batch: Sequence[tuple[int, int]]) -> list[list[int]]:
            keys = [stream_key(seed, sampling, prompts[p], i) for p, i in batch]
            return self._generate([ids[p] for p, _ in batch], keys, sampling)

        # Similar lengths together: little padding.
        order = sorted(asked, key=lambda job: len(ids[job[0]]))
        try:
            for batch, generated in self._batches(order, run):
                for (position, index), new in zip(batch, generated, strict=True):
                    answer = Answer(
                        text=self._text(new),
                        finish="stop" if new and new[-1] in self._ends else "length",
                        prompt_tokens=len(ids[position]),
                        tokens=len(new),
                    )
                    self.calls += 1
                    answers[position, index] = answer
                    if on_answer:
                        on_answer(position, index, answer)
                if self._stopping:
                    break
        except torch.OutOfMemoryError:
            message = "one sequence alone exceeds the GPU's memory; use a smaller model, dtype or max_tokens"
            reason = "failed"
        else:
            if len(answers) == len(asked):
                return arrange(asked, answers, len(prompts))
            message, reason = "stopped", "stopped"
        raise Stopped(f"model {self.name!r}: {message}", reason, answers)

    def stop(self) -> None:
        """See `Target.stop`; the batch at work is finished first."""
        self._stopping = True

    def log_probs(self, prompts: Sequence[str], responses: Sequence[str | Answer]) -> np.ndarray:
        """[n] float64: log π_F(responses[i] | prompts[i]) in nats, at temperature 1 and untruncated.

        A string is taken as a finished answer, so that ending after it counts; so is an `Answer` unless
        it was cut off. Text is cut into tokens afresh, which for rare texts are not those sampled.

        Raises:
            AlignProError: as many prompts as responses are needed, strings; no room for a pair.
        """
        if len(prompts) != len(responses):
            raise AlignProError(
                f"{len(prompts)} prompts and {len(responses)} responses: give one response per prompt"
            )
        pairs: list[tuple[tuple[int, ...], list[int], bool]] = []
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            text = response.text if isinstance(response, Answer) else response
            for kind, value in (("prompts", prompt), ("responses", text)):
                if not isinstance(value, str):
                    raise AlignProError(f"{kind}[{i}] is {type(value).__name__}: give a string")
            said = self.tokenizer(text, add_special_tokens=False).input_ids
            ended = not isinstance(response, Answer) or response.finish == "stop"
            pairs.append((target_ids(self.tokenizer, prompt), list(said), ended))
        self._check_room([p for p, _, _ in pairs], [len(y) + ended for _, y, ended in pairs])
        out = np.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        try:
            for batch, values in self._batches(order, lambda rows: self._score([pairs[i] for i in rows])):
                out[list(batch)] = values
        except torch.OutOfMemoryError:
            raise AlignProError(
                f"model {self.name!r}: one pair alone exceeds the GPU's memory; use a smaller model or dtype"
            ) from None
        return out

    def count_tokens(self, prompt: str) -> int:
        """Tokens of `prompt` as the user's turn, the chat template's included."""
        return len(target_ids(self.tokenizer, prompt))

    def _check_room(self, ids: Sequence[Sequence[int]], new: Sequence[int]) -> None:
        room = getattr(self.model.config, "max_position_embeddings", None)
        for i, (row, extra) in enumerate(zip(ids, new, strict=True)):
            if not row:
                raise AlignProError(f"prompts[{i}] has no tokens; give a prompt that is not empty")
            if room is not None and len(row) + extra > room:
                raise AlignProError(
                    f"prompts[{i}] has {len(row)} tokens, with {extra} more to come beyond the {room} that "
                    f"model {self.name!r} reads; shorten it or lower max_tokens"
                )

    def _batches(self, rows: Sequence[T], run: Callable[[Sequence[T]], S]) -> Iterator[tuple[Sequence[T], S]]:
        """`run` on consecutive batches; out of memory halves the batch and tries again."""
        start = 0
        while start < len(rows):
            batch = rows[start : start + self.batch_size]
            result = None
            try:
                result = run(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            if result is None:  # outside the handler, whose traceback holds the tensors
                self.batch_size = max(1, len(batch) // 2)
                torch.cuda.empty_cache()
                continue
            start += len(batch)
            yield batch, result

    def _text(self, ids: Sequence[int]) -> str:
        # Without the "clean-up" that some tokenizers ship, which moves spaces before punctuation.
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, L] ids and mask, padded on the left."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), int(self.tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = 1
        return ids.to(self.model.device), mask.to(self.model.device)

    @torch.inference_mode()
    def _generate(
        self, rows: Sequence[Sequence[int]], keys: Sequence[int], sampling: Sampling
    ) -> list[list[int]]:
        """New token ids of each row, up to its end token."""
        ids, mask = self._padded(rows)
        # What a model ships must not leak in. Greedy decoding ignores temperature, top_k and top_p.
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=self._ends,
            pad_token_id=int(self.tokenizer.pad_token_id),
        )
        processors = _processors(keys, sampling, ids.shape[1])
        with quiet():  # no advice on settings that greedy decoding ignores
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
            )
        return [_until_end(row, self._ends) for row in out[:, ids.shape[1] :].tolist()]

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[tuple[int, ...], list[int], bool]]) -> np.ndarray:
        ids, mask = self._padded([(*prompt, *said) for prompt, said, _ in pairs])
        keep = max(len(said) for _, said, _ in pairs) + 1
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            logits_to_keep=keep,
            use_cache=False,
        ).logits
        out = np.zeros(len(pairs))
        for i, (_, said, ended) in enumerate(pairs):
            # Row t predicts token t of the answer; the last row predicts what follows it.
            steps = torch.log_softmax(logits[i, -(len(said) + 1) :].double(), -1)
            total = steps[torch.arange(len(said)), torch.tensor(said, dtype=torch.long)].sum()
            if ended:
                total = total + torch.logsumexp(steps[-1, self._ends], 0)
            out[i] = float(total)
        return out


def _processors(keys: Sequence[int], sampling: Sampling, width: int) -> LogitsProcessorList:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    # Philox is counter-based: a key is a stream of its own.
    uniforms = [np.random.Generator(np.random.Philox(key=key)).random(sampling.max_tokens) for key in keys]
    return LogitsProcessorList([_Draw(torch.from_numpy(np.stack(uniforms)), width, sampling)])


class _Draw(LogitsProcessor):
    """Draws each row's next token by inverse CDF from the row's own uniforms, and leaves only that token.

    Greedy decoding then takes it. `torch.multinomial` would share one stream among the rows of a batch.
    """

    def __init__(self, uniforms: torch.Tensor, width: int, sampling: Sampling) -> None:
        self.uniforms = uniforms  # [B, max_tokens] float64
        self.width = width  # of the prompts
        # In transformers' own order.
        self.temperature = TemperatureLogitsWarper(sampling.temperature)
        self.top_k = TopKLogitsWarper(sampling.top_k) if sampling.top_k else None
        self.top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        warped, tokens = self.temperature(input_ids, scores), None
        if self.top_k:
            warped = self.top_k(input_ids, warped)
            # The nucleus needs a sort: of the few that are left, which is three times faster in all.
            left = int((warped > -math.inf).sum(-1).max())
            warped, tokens = warped.topk(left)  # type: ignore[assignment]
        if self.top_p:
            warped = self.top_p(input_ids, warped)
        cdf = torch.softmax(warped.double(), -1).cumsum(-1)
        u = self.uniforms[:, input_ids.shape[1] - self.width].to(scores.device)
        # Strictly below the total, whatever it rounds to. A token of probability 0 is never the first above.
        threshold = (u * (1 - 2.0**-40))[:, None] * cdf[:, -1:]
        drawn = torch.searchsorted(cdf, threshold, right=True)
        token = drawn if tokens is None else tokens.gather(1, drawn)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)  # type: ignore[return-value]


def _until_end(row: list[int], ends: Sequence[int]) -> list[int]:
    for i, token in enumerate(row):
        if token in ends:
            return row[: i + 1]
    return row
