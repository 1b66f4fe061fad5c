"""Estimates by part of a reward, and answers that were refused: as for a reward of its own, and adding up."""

import json
from dataclasses import replace

import numpy as np
import pytest
from estimate_oracle import halfway, instance
from mutants import kills

from alignpro.commands import compare as compare_verb
from alignpro.commands import estimate as estimate_verb
from alignpro.commands import main
from alignpro.estimation import compare, estimate, headroom
from alignpro.estimation.simulate import Size, simulated_rows
from alignpro.report.numbers import interval, plain
from alignpro.rollouts import collect

ARMS = ("none", "sft", "trained")
RANGES = {"luck": (0.0, 0.5), "worth": (0.0, 0.7), "cost": (-0.2, 0.0)}


@pytest.fixture(scope="module")
def rows():
    """Rewards in [−0.2, 1.2] of three parts: one of the answer, one noise, one that is mostly at its end."""
    i, rng = instance(3), np.random.default_rng(5)
    made = []
    for row in simulated_rows(
        i, rng, Size(40, 4, 4, 2), prompters={"trained": halfway(i, 0.2)}, reward_range=(0.0, 1.0)
    ):
        values = {"luck": 0.5 * rng.random(), "worth": 0.7 * row.reward, "cost": -0.2 * (rng.random() < 0.02)}
        made.append(
            replace(
                row,
                reward=sum(values.values()),
                reward_low=-0.2,
                reward_high=1.2,
                reward_parts={name: [value, *RANGES[name]] for name, value in values.items()},
            )
        )
    return made


def alone(rows, part):
    """The same rollouts as if the part were the reward."""
    low, high = RANGES[part]
    of = [replace(row, reward=row.reward_parts[part][0], reward_low=low, reward_high=high) for row in rows]
    return collect([replace(row, reward_parts=None) for row in of])


@pytest.mark.parametrize("limits", ["bootstrap", "guaranteed"])
def test_a_part_is_estimated_as_a_reward_of_its_own(limits, rows):
    found = estimate(collect(rows), 0.3, 0.3, interval=limits)
    whole = {}

    def check(part, of):
        own = estimate(alone(rows, of), 0.3, 0.3, interval=limits)
        for arm in ARMS:
            e, expected = found.parts[arm][part], own.quantities[f"J({arm})"]
            assert (e.value, e.lo, e.hi) == pytest.approx(
                (expected.value, expected.lo, expected.hi), abs=1e-12
            )
            assert (e.n, e.n_clusters, e.bias) == (expected.n, expected.n_clusters, expected.bias)
            whole.setdefault(arm, []).append(e.value)

    for part in RANGES:
        check(part, part)
    for arm in ARMS:
        assert sum(whole[arm]) == pytest.approx(found.quantities[f"J({arm})"].value, abs=1e-12)
    kills(lambda of: check("luck", of), "worth")
    assert found.part_ranges == RANGES
    assert found.parts["sft"]["cost"].hi <= 0  # in the part's own range, not the reward's


def test_differences_of_parts_add_up_and_cover_jointly(rows):
    rollouts = collect(rows)
    found = compare(rollouts, ARMS)
    for arm in ARMS[1:]:
        against = found.against[arm]
        assert sum(e.value for e in against.parts.values()) == pytest.approx(against.mean.value, abs=1e-12)
        for part, e in against.parts.items():
            own = compare(alone(rows, part), ["none", arm]).against[arm].mean  # by itself
            assert e.value == pytest.approx(own.value, abs=1e-12)
            assert e.hi - e.lo > own.hi - own.lo
            assert "joint" in e.method
            assert found.parts[arm][part].value - found.parts["none"][part].value == pytest.approx(e.value)
    assert found.prompters == {arm: arm for arm in ARMS}
    plain_ = compare(alone(rows, "worth"), ARMS)
    assert (plain_.parts, plain_.against["sft"].parts, plain_.warnings) == ({}, {}, ())


def cells(page, heading):
    [section] = [section for section in page.sections if section.heading == heading]
    return section.tables[0].rows


def test_tables_add_up_in_text_and_page(rows):
    rollouts = collect(rows)
    result, compared = estimate(rollouts, 0.3, 0.3), compare(rollouts, ARMS)
    for verb, found, means in (
        (estimate_verb, result, {arm: result.quantities[f"J({arm})"] for arm in ARMS}),
        (compare_verb, compared, compared.mean),
    ):
        table = cells(verb.page(found), "Parts of the reward")
        shown = {(row[0], row[1]): row[2] for row in table}
        text = [line.split("  ") for line in verb.text(found).splitlines()]
        told = {
            (c[0], c[1]): c[2]
            for c in ([cell.strip() for cell in line if cell.strip()] for line in text)
            if len(c) > 2
        }
        for arm in ARMS:
            every = {**found.parts[arm], "reward, their sum": means[arm]}
            for part, e in every.items():
                assert shown[arm, part] == told[arm, part] == interval(e)
            numbers = [float(told[arm, part].split(" ")[0]) for part in every]
            assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=2e-4)  # four digits each
    without = estimate(alone(rows, "worth"), 0.3, 0.3)
    assert without.parts == {}
    assert "parts of the reward" not in estimate_verb.text(without)
    assert "Parts of the reward" not in [section.heading for section in estimate_verb.page(without).sections]


# --- refused answers --------------------------------------------------------------------------------------


def refusing(rows, arm, most):
    """The first `most` answers of an arm refused, at the reward's lower end."""
    left = iter([True] * most)
    out = []
    for row in rows:
        if row.arm == arm and next(left, False):
            parts = {name: [low, low, high] for name, (low, high) in RANGES.items()}
            row = replace(row, response=None, reward=row.reward_low, reward_parts=parts)
        out.append(row)
    return out


def test_refused_answers_are_told_where_their_rewards_are_used(rows, tmp_path, capsys):
    given = refusing(rows, "sft", 16)  # of 320
    rollouts = collect(given)
    result = estimate(rollouts, 0.3, 0.3)
    assert result.quantities["refused(sft)"].value == pytest.approx(16 / 320)
    assert 0 == result.quantities["refused(none)"].value < result.quantities["refused(none)"].hi
    assert 0 <= result.quantities["refused(sft)"].lo < 0.05 < result.quantities["refused(sft)"].hi <= 1
    said = "answers were refused, 16 of 320 in arm sft: each counts with the reward declared for a refusal"
    for found in (result, compare(rollouts, ARMS), headroom(rollouts, (0.3,))):
        assert said in found.warnings
    assert f"warning: {said}" in estimate_verb.text(result)
    assert f"warning: {said}" in compare_verb.text(compare(rollouts, ARMS))
    assert ("1", said) in cells(compare_verb.page(compare(rollouts, ARMS)), "Warnings")
    assert "refused(sft)" in [row[0] for row in cells(estimate_verb.page(result), "Quantities")]
    # Without any, nothing of it is said.
    none = estimate(collect(rows), 0.3, 0.3)
    assert not [name for name in none.quantities if name.startswith("refused")]
    assert not [warning for warning in none.warnings if "refused" in warning]
    # In strict JSON, as the verb prints it.
    path = tmp_path / "r.jsonl"
    path.write_text("".join(row.line() for row in given))
    assert main.main(["estimate", str(path), "--beta", "0.3", "--lam", "0.3", "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert found["parts"] == json.loads(json.dumps(plain(result.parts)))
    assert found["quantities"]["refused(sft)"]["value"] == pytest.approx(0.05)


def test_a_refused_answer_has_no_log_probability_and_is_blamed_for_it(rows):
    lost = [
        replace(row, logp_frozen_x=None, logp_frozen_rewrite=None) if row.response is None else row
        for row in refusing(rows, "sft", 16)
    ]
    said = "logp_frozen_rewrite is not known of the 16 refused answers of arm sft; leave their prompts out"
    found = estimate(collect(lost), 0.3, 0.3)
    assert found.missing["TV(pi_F(.|x), pi_F(.|x'))"].startswith(said)
    assert "J(sft)" in found.quantities
    i = next(i for i, row in enumerate(lost) if row.arm == "sft" and row.response is not None)
    lost[i] = replace(lost[i], logp_frozen_rewrite=None)
    found = estimate(collect(lost), 0.3, 0.3)
    assert "a backend that gives log-probabilities" in found.missing["TV(pi_F(.|x), pi_F(.|x'))"]


def test_an_arm_without_a_density_says_so(rows):
    other = [
        replace(row, arm="bpo", prompter="bpo", logp_prompter=None, logp_reference=None)
        for row in rows
        if row.arm == "sft"
    ]
    found = estimate(collect(rows + other), 0.3, 0.3)
    assert (
        found.missing["lambda KL(bpo||rho_sft)"]
        == "arm bpo has rewrites without a density (logp_prompter is null)"
    )
    assert {bound.name for bound in found.bounds if bound.prompter == "bpo"} == {
        "trained",
        "trained_rewards_only",
    }
    assert found.gaps["bpo"].value == pytest.approx(found.gaps["sft"].value)
