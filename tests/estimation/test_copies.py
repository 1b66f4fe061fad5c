"""Copies among answers: found where they are, and not where texts are short or likely."""

from dataclasses import replace

import numpy as np
import pytest
from estimate_oracle import instance
from mutants import kills

from alignpro.estimation import compare, copies, headroom
from alignpro.estimation.simulate import Size, simulate, simulated_rows
from alignpro.rollouts import collect


def drawn(length=400, known=False, copied=1.0, prompts=10):
    """Rollouts whose answers are texts of their own, but for a share of copies within draws."""
    rng = np.random.default_rng(0)
    i = instance(0, shape=(10, 4, 2))
    i.reward = np.tile([0.0, 1.0], (10, 1))
    found = simulate(i, rng, Size(prompts, 8, 8, 4))
    n = np.arange(len(found))
    copy = (found.answer > 0) & (rng.random(len(n)) < copied)
    of = np.maximum.accumulate(np.where(copy, 0, n))
    logp = np.full(len(n), -60.0 if known else np.nan)
    return replace(
        found,
        reward=found.reward[of],
        texts=np.stack([of, np.full(len(n), length)], 1),
        logps={**dict.fromkeys(found.logps, np.full(len(n), np.nan)), "logp_frozen_rewrite": logp},
    )


def copied():
    return drawn()


def index(rollouts, arm="sft"):
    return np.flatnonzero(rollouts.rows(arm))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_copies_are_found(known, share):
    rollouts = drawn(known=known, copied=share)
    found = copies.copies(rollouts, "sft", index(rollouts))
    assert found.certain
    assert found.same == pytest.approx(share * found.pairs, rel=0.35)


def test_answers_that_are_likely_to_agree_are_no_copies():
    """12 files of answers that are one of three texts: an alarm in any with probability 0.12% at most.

    The mutant forgets that a text may be likely.
    """
    i = instance(1, shape=(4, 3, 3))

    def alarms(chance):
        count = 0
        for seed in range(12):
            rng = np.random.default_rng(seed)
            rollouts = collect(simulated_rows(i, rng, Size(4, 4, 3, 4)))
            logps = rollouts.logps["logp_frozen_rewrite"]
            rollouts = replace(rollouts, logps={**rollouts.logps, "logp_frozen_rewrite": chance(logps)})
            found = copies.copies(rollouts, "sft", index(rollouts))
            assert found.pairs >= 36  # and those of different draws of x itself
            count += found.certain
        assert count == 0  # allowed: 12 times 1e-4

    alarms(lambda logps: logps)
    kills(alarms, lambda logps: np.minimum(logps, -20.0))


def test_short_texts_say_nothing_without_probabilities():
    rollouts = drawn(length=2)
    assert not copies.copies(rollouts, "sft", index(rollouts)).certain


def test_the_bet_gains_nothing_on_average():
    for p in (0.01, 0.3, 0.9):
        for share in copies._SHARES:
            assert p * (1 + share * (1 - p) / p) + (1 - p) * (1 - share) == pytest.approx(1.0)


def test_copies_are_named_and_never_a_yes():
    """Without texts (the mutant) luck that is seen twice is taken for a gain."""
    few = drawn(copied=0.1)
    (warning,) = [w for w in compare(few, ["none", "sft"]).warnings if "copies" in w]
    assert warning.startswith("answers of arm sft are copies: ")
    blind = headroom(replace(drawn(prompts=40), texts=None, strategy=None), (0.1,))
    assert blind.decision == "yes"
