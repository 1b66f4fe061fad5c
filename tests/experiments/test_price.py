"""Tasks on which reading the prompt pays: what is chosen on some prompts is judged on others."""

import numpy as np
import price
import pytest
from mutants import kills, mutated
from task_grid import table

from alignpro.estimation import routing


def rewards_of(seed=0, prompts=40, strategies=5, answers=4):
    return np.random.default_rng(seed).uniform(size=(prompts, strategies, answers))


def test_what_is_judged_had_no_part_in_the_choice():
    values, kind = rewards_of().mean(2), np.arange(40) % 2

    def check(left_out, by_kind) -> None:
        found = left_out(values, by_kind(values, kind))
        fold = np.random.default_rng([0, 40]).permutation(40) % routing.FOLDS
        for x in range(40):
            others = [i for i in range(40) if fold[i] != fold[x] and kind[i] == kind[x]]
            best = max(range(5), key=lambda s: np.mean([values[i, s] for i in others]))
            assert found[x] == values[x, best]

    check(routing.left_out, price.by_kind)
    leaking = mutated(routing, "choose(~held)[held]", "choose(held)[held]")
    kills(lambda module: check(module.left_out, price.by_kind), leaking)
    blind = mutated(price, "values[known & (kind == k)]", "values[known]")
    kills(lambda module: check(routing.left_out, module.by_kind), blind)


def test_the_best_of_each_prompt_is_judged_by_other_answers():
    rewards = rewards_of(1)

    def check(module) -> None:
        found = module.crossed(rewards)
        for x, cells in enumerate(rewards):
            halves = cells[:, :2].mean(1), cells[:, 2:].mean(1)
            both = [judge[choose.argmax()] for choose, judge in (halves, halves[::-1])]
            assert found[x] == pytest.approx(np.mean(both), rel=1e-12)

    check(price)
    kills(check, mutated(price, "first[rows, second.argmax(1)]", "first[rows, first.argmax(1)]"))


def tasks(effect, noise, prompts=64, seed=0):
    """A task of two kinds: one strategy is worth `effect` on the one, another on the other."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.arange(prompts) % 2)
    means = np.full((prompts, 6), 0.4)
    means[kind == 0, 1] += effect
    means[kind == 1, 2] += effect
    rewards = np.clip(means[..., None] + noise * rng.standard_normal((prompts, 6, 4)), 0, 1)
    names = [f"Tell me of {i}." for i in range(prompts)]
    texts = ("", "Be brief.", "Be kind.", "Be bold.", "Be slow.", "Be odd.")
    states = np.stack([kind == 0, kind == 1], 1).astype(float)
    return price.Tasks(
        names, texts, {"two": rewards}, {"two": kind}, states, rng.standard_normal((prompts, 3))
    )


def test_a_price_is_found_where_there_is_one():
    """Half of the prompts gain 0.3 by one strategy, the others by another: reading is worth 0.15."""

    def check(module) -> None:
        found = module.measured(tasks(0.3, 0.05), "two")
        gain = found["by kind over fixed"]
        assert gain["lo"] < 0.15 < gain["hi"]
        assert gain["hi"] - gain["lo"] < 0.1
        assert found["instructions"] == ["Be kind.", "Be brief."]
        assert found["by kind"]["value"] == pytest.approx(0.7, abs=0.02)
        assert found["none"]["value"] == pytest.approx(0.4, abs=0.02)
        assert found["price"]["lo"] > 0
        assert found["router"]["value"] == pytest.approx(0.7, abs=0.02)
        assert found["router over fixed"]["lo"] > 0.1 > found["router by MiniLM over fixed"]["hi"]

    check(price)
    kills(check, mutated(price, "kinds - fixed,", "kinds - none,"))
    # Where all prompts want the same, it is not worth anything; the seed is one of 20 at this level.
    flat = tasks(0.0, 0.05)
    flat.reward["two"][:, 3] += 0.2
    found = price.measured(flat, "two")
    assert found["by kind over fixed"]["value"] == pytest.approx(0, abs=0.01)
    assert found["by kind over fixed"]["lo"] <= 0 <= found["by kind over fixed"]["hi"]
    assert found["price"]["lo"] <= 0.01


def test_the_table_as_rollouts():
    given = tasks(0.3, 0.05, prompts=8)
    found = table.as_rollouts(table.Table(given.prompts, given.strategies, given.reward["two"], "two"))
    none, sft = (found.arm == found.arms.index(name) for name in ("none", "sft"))
    assert len(found) == 8 * 4 * (6 + 1)
    of = found.reward[none].reshape(8, 4)
    np.testing.assert_array_equal(of, given.reward["two"][:, 0])
    assert set(found.logps["logp_reference"][sft]) == {-np.log(6)}
