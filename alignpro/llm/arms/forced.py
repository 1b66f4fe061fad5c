"""A judge in this process that is too small to write a verdict, made to choose one."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from alignpro.llm.arms.question import question
from alignpro.llm.models.sampling import digest
from alignpro.llm.targets.given import GivenReplies
from alignpro.llm.targets.quoting import control_tokens

if TYPE_CHECKING:
    from alignpro.llm.targets.local import LocalTarget

CANDIDATES = ("VERDICT: A", "VERDICT: B")
"""The replies that are compared."""
CONTENT_FREE = ("N/A", "[MASK]", "")
"""Texts that stand for question and both answers where there is nothing to judge (arXiv 2102.09690)."""


class ForcedChoice(GivenReplies):
    """A model in this process made to choose: its reply is the likelier of `CANDIDATES`, calibrated.

    A candidate's probability is that of the whole reply. Nothing is drawn, and one choice is every sample's.
    To calibrate (arXiv 2102.09690), the log-odds of A over B with nothing to judge are subtracted: those of
    the mean probability over `CONTENT_FREE` questions, the preference for a letter or a place. TIE is no
    candidate: a tie is two orders that disagree. Only where the log-odds are exactly 0 is the reply
    `VERDICT: TIE`, which favours neither answer.

    Args:
        target: the model. In low precision the shape of a batch can turn a close choice.
    """

    def __init__(self, target: "LocalTarget") -> None:
        super().__init__(target, CANDIDATES)
        self.name = f"forced choice of {target.name}"
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
        scores = self.log_probs(questions)
        return scores[:, 0] - scores[:, 1]

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The verdict on each question."""
        odds = self.log_odds(prompts) - self.prior
        return ["VERDICT: TIE" if value == 0 else CANDIDATES[int(value < 0)] for value in odds]
