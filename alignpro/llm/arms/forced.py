"""A judge in this process that is too small to write a verdict, made to choose one."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.arms.question import control_tokens, question
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.targets.target import Answer, Answers, OnAnswer, Stopped, arrange, jobs

if TYPE_CHECKING:
    from alignpro.llm.targets.local import LocalTarget

CANDIDATES = ("VERDICT: A", "VERDICT: B")
"""The replies that are compared."""
CONTENT_FREE = ("N/A", "[MASK]", "")
"""Texts that stand for question and both answers where there is nothing to judge (arXiv 2102.09690)."""


class ForcedChoice:
    """A model in this process made to choose: its reply is the likelier of `CANDIDATES`, calibrated.

    A candidate's probability is that of the whole reply. Nothing is drawn, and one choice is every sample's.
    To calibrate (arXiv 2102.09690), the log-odds of A over B with nothing to judge are subtracted: those of
    the mean probability over `CONTENT_FREE` questions, the preference for a letter or a place. TIE is no
    candidate: a tie is two orders that disagree. Only where the log-odds are exactly 0 is the reply
    `VERDICT: TIE`, which favours neither answer.

    Args:
        target: the model. In low precision the shape of a batch can turn a close choice.
    """

    remote: ClassVar[bool] = False

    def __init__(self, target: "LocalTarget") -> None:
        self.target = target
        self.tokenizer = target.tokenizer
        self.name = f"forced choice of {target.name}"
        self.calls = 0
        """How many questions were answered; the content-free ones, asked once, are not counted."""
        self.retried = 0
        self._stopping = False
        control = control_tokens(target)
        self._blank = [question(text, text, text, control) for text in CONTENT_FREE]

    @cached_property
    def revision(self) -> str:
        """A digest of the model and of all that it is asked beside the question; see `Target.revision`."""
        return digest("forced choice", self.target.revision, CANDIDATES, self._blank).hex()[:16]

    @cached_property
    def prior(self) -> float:
        """Log-odds of A over B with nothing to judge, in nats."""
        odds = self.log_odds(self._blank)
        of_a, of_b = (np.logaddexp.reduce(-np.logaddexp(0.0, -each)) for each in (odds, -odds))
        return float(of_a - of_b)

    def log_odds(self, questions: Sequence[str]) -> np.ndarray:
        """[n] log π(A | question) − log π(B | question) in nats, as the model has it, not calibrated."""
        each = [text for text in questions for _ in CANDIDATES]
        scores = self.target.log_probs(each, CANDIDATES * len(questions))
        return scores[::2] - scores[1::2]

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
        """Choose for each prompt, as `Target.respond` does; `sampling` and `seed` change nothing."""
        asked = jobs(prompts, first, samples, seed)
        counts = [self.count_tokens(prompt) for prompt in prompts]
        answers: Answers = {}
        self._stopping = False
        longest = max(len(chat_of(self.tokenizer).text_ids(text)) for text in CANDIDATES) + 1
        for position, index in asked:
            if (reason := self.target.too_long(counts[position], longest)) is not None:
                answers[position, index] = Answer(reason, "refused", counts[position], 0)
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
                odds = self.log_odds([prompts[p] for p, _ in batch]) - self.prior
            except AlignProError as error:
                message, reason = str(error), "failed"
                break
            for (position, index), value in zip(batch, odds, strict=True):
                text = "VERDICT: TIE" if value == 0 else CANDIDATES[int(value < 0)]
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
