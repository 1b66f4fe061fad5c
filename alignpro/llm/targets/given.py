"""A model in this process that is asked how likely given replies are, instead of being let speak."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.targets.target import Answer, Answers, OnAnswer, Stopped, arrange, jobs

if TYPE_CHECKING:
    from alignpro.llm.targets.local import LocalTarget


class GivenReplies:
    """The log-probabilities of given replies as a `Target`: an answer is JSON, [[reply, log π(reply)], …].

    A reply's log-probability, in nats, is that of the whole reply, its end included. Nothing is drawn, and
    every sample is the same.

    Args:
        target: the model. In low precision the shape of a batch can move a log-probability.
        replies: at least one.
    """

    remote: ClassVar[bool] = False

    def __init__(self, target: "LocalTarget", replies: Sequence[str]) -> None:
        self.target = target
        self.replies = tuple(replies)
        self.tokenizer = target.tokenizer
        self.name = target.name
        self.calls = 0
        """How many prompts were answered."""
        self.retried = 0
        self._stopping = False

    @cached_property
    def revision(self) -> str:
        """A digest of the model and of the replies; see `Target.revision`."""
        return digest("given replies", self.target.revision, self.replies).hex()[:16]

    def log_probs(self, prompts: Sequence[str]) -> np.ndarray:
        """[prompts, replies] float64 log π(reply | prompt) in nats."""
        each = [text for text in prompts for _ in self.replies]
        return self.target.log_probs(each, self.replies * len(prompts)).reshape(-1, len(self.replies))

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Answer each prompt."""
        found = self.log_probs(prompts).tolist()
        return [json.dumps(list(zip(self.replies, row, strict=True))) for row in found]

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
        """Answer each prompt, as `Target.respond` does; `sampling` and `seed` change nothing."""
        asked = jobs(prompts, first, samples, seed)
        counts = [self.count_tokens(prompt) for prompt in prompts]
        answers: Answers = {}
        self._stopping = False
        longest = max(len(chat_of(self.tokenizer).text_ids(text)) for text in self.replies) + 1
        for position, index in asked:
            if (refusal := self.target.too_long(counts[position], longest)) is not None:
                answers[position, index] = Answer(refusal, "refused", counts[position], 0)
                if on_answer:
                    on_answer(position, index, answers[position, index])
        # The longest first: what is too long for memory fails before anything else is answered.
        order = sorted((job for job in asked if job not in answers), key=lambda job: -counts[job[0]])
        size = self.target.batch_size
        message, reason = "stopped", "stopped"
        for batch in (order[i : i + size] for i in range(0, len(order), size)):
            if self._stopping:
                break
            try:
                texts = self.texts([prompts[p] for p, _ in batch])
            except AlignProError as error:
                message, reason = str(error), "failed"
                break
            for (position, index), text in zip(batch, texts, strict=True):
                # No tokens: none was generated.
                answers[position, index] = Answer(text, "stop", counts[position], 0)
                self.calls += 1
                if on_answer:
                    on_answer(position, index, answers[position, index])
        if len(answers) == len(asked):
            return arrange(asked, answers, len(prompts))
        raise Stopped(f"{self.name}: {message}", reason, answers)

    def stop(self) -> None:
        """End a `respond` in another thread, once the batch at work is finished."""
        self._stopping = True

    def count_tokens(self, prompt: str) -> int:
        """How many tokens `prompt` has for the model, its chat template included."""
        return self.target.count_tokens(prompt)
