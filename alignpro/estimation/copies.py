"""Answers that are copies of one another, as a caching server or a fixed seed gives them.

Everything here takes a prompt's answers, given their rewrites, for independent draws of the model. Of such,
one has the text of the one before it with the probability p of that text. A bet that a share κ of the answers
are copies then multiplies its capital by 1 + κ(1 − p)/p where texts agree and by 1 − κ elsewhere: on average
by 1, so that it exceeds 1/α with probability at most α (Markov), also averaged over κ.
"""

from typing import NamedTuple

import numpy as np

from alignpro.rollouts import Rollouts

ALARM = 1e-4
"""Probability, at most, that independent answers are called copies."""
CHARACTERS_PER_BIT = 16.0
"""Without log-probabilities a text of L characters is taken to have probability 2^(−L/16)."""
_SHARES = (0.02, 0.1, 0.5, 0.98)


class Copies(NamedTuple):
    """Answers of one arm that have the text of the one before it, to the same rewrite."""

    same: int
    pairs: int
    expected: float
    """How many were to be expected of independent answers."""
    certain: bool
    """Whether independent answers are ruled out."""

    def warning(self, arm: str) -> str:
        return (
            f"answers of arm {arm} are copies: {self.same} of {self.pairs} have the text of the answer "
            f"before them to the same rewrite, where about {self.expected:.3g} would if answers were "
            "independent, as all intervals assume; turn off the server's cache, or give each answer a "
            "seed of its own"
        )


def copies(rollouts: Rollouts, arm: str, index: np.ndarray) -> Copies:
    """Count copies among the rows `index` of an arm, in their order; none where texts are not known."""
    if rollouts.texts is None or len(index) < 2:
        return Copies(0, 0, 0.0, False)
    text, length = rollouts.texts[index].T
    logp = rollouts.logps["logp_policy" if arm in rollouts.direct else "logp_frozen_rewrite"][index]
    # Rewrites are the same where their strategies are texts added to the prompt, and the same.
    does = -2 - rollouts.draw[index]
    if arm in rollouts.direct:
        does = np.zeros(len(index), int)
    elif rollouts.strategy is not None and rollouts.added is not None:
        does = np.where(rollouts.added[index], rollouts.strategy[index], does)
    keys = (rollouts.prompt[index], rollouts.seed[index], does)
    order = np.lexsort(keys[::-1])
    given = length[order] >= 0
    follows = np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys]) & given[1:] & given[:-1]
    same = (np.diff(text[order]) == 0)[follows]
    bits = np.where(np.isnan(logp), -np.log(2.0) * np.maximum(length, 0) / CHARACTERS_PER_BIT, logp)
    chance = np.exp(np.clip(bits[order][:-1][follows], -700.0, 0.0))
    capital = [
        np.where(same, np.log1p(share * (1.0 - chance) / chance), np.log1p(-share)).sum() for share in _SHARES
    ]
    worth = np.logaddexp.reduce(capital) - np.log(len(_SHARES))
    return Copies(int(same.sum()), len(same), float(chance.sum()), bool(worth > -np.log(ALARM)))
