"""Strategies that prompts share: a gain that is there is found, one that is not is not, and limits hold.

Seeds are fixed, so the outcome is; the rates at which other seeds would fail are stated.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.commands.headroom import page, text
from alignpro.commands.main import main
from alignpro.estimation import components, headroom, pooled
from alignpro.estimation.paired import Arm
from alignpro.estimation.pooled import _Draws
from alignpro.estimation.simulate import Instructions, simulate_instructions
from alignpro.report.numbers import plain
from alignpro.rollouts import Rollout, collect

GAIN = Instructions(best=0.25)
FLAT = Instructions(effect=0.0, own=0.0)


def rewarded(rollouts, rate, rng):
    """The rollouts with rewards of 0 and 1 that nothing changes the rate of."""
    return replace(rollouts, reward=(rng.random(len(rollouts)) < rate).astype(float))


def judged(module, size, runs, rate=None):
    """Lower limits (one-sided 97.5%) of the pooled prompter's gain over none, one for each run."""
    found = []
    for seed in range(runs):
        rng = np.random.default_rng([seed, 7])
        rollouts = simulate_instructions(rng, size)
        if rate is not None:
            rollouts = rewarded(rollouts, rate, rng)
        sft, none = Arm(rollouts, "sft"), Arm(rollouts, "none")
        d = module._Draws(rollouts, sft, none)
        base = d.average(d.mean) - none.mean(none.reward)[d.order]
        ways = [module.judge(d, exact, base, base) for exact in (False, True)]
        gain, _, trust = (np.mean(of, 0) for of in zip(*ways, strict=True))
        rows = base + gain * trust / trust.mean()
        found.append(module.estimate_of(rows, 0.95, 1, -1.0, 1.0, "").lo)
    return np.array(found)


def test_a_shared_gain_is_found():
    """In more than a half of the runs (measured: 0.75 of 500; 100 runs would fail with probability 1e-7)."""
    assert np.mean(judged(pooled, GAIN, 100) > 0) > 0.5


@pytest.mark.parametrize(
    ("size", "rate"),
    [
        (FLAT, None),
        (FLAT._replace(instructions=2), None),
        (FLAT._replace(prompts=20), None),
        (FLAT, 0.02),
        (FLAT._replace(prompts=20), 0.2),
        (FLAT, 0.98),
    ],
    ids=["flat", "two instructions", "20 prompts", "rare", "20 prompts, rare", "common"],
)
def test_no_gain_is_not_found(size, rate):
    """At most 7 of 100 runs where 2.5 are allowed: at that rate others would fail with probability 0.4%."""
    assert np.sum(judged(pooled, size, 100, rate) > 0) <= 7


def test_what_a_prompter_is_judged_on_has_not_taught_it():
    """The mutant learns from all prompts, those that it is judged on too: it finds gains in noise."""

    def false_alarms(module):
        assert np.sum(judged(module, FLAT, 40) > 0) <= 5

    false_alarms(pooled)
    right = "learned = None if start == 0 else _learn(d, d.of(before))"
    kills(false_alarms, mutated(pooled, right, "learned = _learn(d, slice(None))"))


def test_rows_are_unbiased():
    """Their mean is the gain of a prompter, here a known one: rewards differ by the instruction alone.

    Within 4.5 standard errors, false alarm 7e-6 each.
    """
    size = Instructions(prompts=6000, instructions=5, effect=0.1, interaction=0.0, prompt=0.0, own=-0.1)
    rollouts = simulate_instructions(np.random.default_rng(0), size)
    sft, none = Arm(rollouts, "sft"), Arm(rollouts, "none")

    def unbiased(module):
        d = module._Draws(rollouts, sft, none)
        seen, rest = slice(0, 1000), slice(1000, 6000)
        learned = module._learn(d, d.of(seen))
        at = d.strategy[d.of(rest)]
        mean = np.bincount(d.strategy, d.mean) / np.bincount(d.strategy)
        g = np.exp(2.0 * learned.value / learned.scale)
        kept = np.array([[g[s] / (g[s] + g[t]) for t in range(5)] for s in range(5)])
        chosen = kept * mean[:, None] + (1 - kept) * mean
        q = learned.share * g / (learned.share @ g)
        for exact, true in ((False, chosen.mean() - mean.mean()), (True, q @ mean - mean.mean())):
            (w,) = module._weights(d, exact, learned, np.array([2.0]), rest)
            rows = d.average((w - 1.0) * (d.contrast if exact else d.mean)[d.of(rest)], rest)
            assert abs(rows.mean() - true) <= 4.5 * rows.std() / np.sqrt(len(rows))
            assert w.min() >= 0.0
            assert d.average(w, rest).mean() <= 1.0 + 4.5 * w.std() / np.sqrt(len(at))

    unbiased(pooled)
    kills(unbiased, mutated(pooled, "np.exp(-d.logp[at]), most)", "np.exp(-1.2 * d.logp[at]), most)"))
    kills(unbiased, mutated(pooled, "return own * scale[", "return 1.2 * own * scale["))
    # Its own answers among those that it is compared with: the gain shrinks.
    kills(unbiased, mutated(pooled, "(sums[self.prompt] - total)", "sums[self.prompt]"))


def test_the_limit_is_below_what_the_best_instruction_earns():
    """In 100 runs, 2.5 of which may err: 7 or fewer (false alarm 0.4%)."""
    lower = judged(pooled, GAIN, 100)
    assert np.sum(lower > 0.25 + 0.026) <= 7
    assert np.median(lower) > 0


def test_components_are_unbiased():
    """Means of 300 runs within 4.5 standard errors, false alarm 7e-6 each."""
    size = Instructions(prompts=40, instructions=20, effect=0.1, interaction=0.08, prompt=0.05, noise=0.1)
    runs = [simulate_instructions(np.random.default_rng([seed, 3]), size) for seed in range(300)]

    def unbiased(module):
        rows = []
        for rollouts in runs:
            arm = Arm(rollouts, "sft")
            shared = _Draws(rollouts, arm, None)
            cells = module._Cells(rollouts, arm, shared.names[np.unique(shared.strategy[shared.shared])])
            rows.append(cells.moments(np.ones(cells.n, bool)))
        rows = np.array(rows)
        error = rows.std(0, ddof=1) / np.sqrt(len(rows))
        # Effects add up to 0; a prompt's mean over 20 interactions is its own; what is left, the rest.
        each = size.interaction**2 / 20
        true = np.array([size.prompt**2 + each, size.effect**2 * 19 / 20, 19 * each])
        assert (np.abs(rows.mean(0) - true) <= 4.5 * error).all()

    unbiased(components)
    forgotten = mutated(components, "(total**2 - square) / (answers * (answers - 1))", "self.mean**2")
    kills(unbiased, forgotten)  # the noise of answers
    kills(unbiased, mutated(components, "np.square(a) - np.bincount(self.of, b * b)", "np.square(a)"))
    kills(unbiased, mutated(components, "strategies - mean, whole", "strategies - mean, prompts"))


def test_components_are_covered():
    """In 33 runs of 40 or more, where 38 are due (false alarm 7e-4)."""
    size = Instructions(prompts=40, instructions=8, interaction=0.08, noise=0.1)
    covered = 0
    for seed in range(40):
        rollouts = simulate_instructions(np.random.default_rng([seed, 4]), size)
        split, _ = components.components(rollouts, Arm(rollouts, "sft"), np.arange(9), (0.1,), 0.95)
        covered += split.interaction.lo <= size.interaction**2 * 7 / 8 <= split.interaction.hi
    assert covered >= 33


def test_values_of_normal_effects():
    """σ²/(2λ) for large λ, the mean of the largest effect for small; to the Monte Carlo's own error."""

    def limits(module):
        shares = np.full(30, 1 / 30)
        none, large = module.normal_value((0.0, 0.01), shares, 10.0)
        assert none == 0.0
        assert large == pytest.approx(0.01 * (1 - 1 / 30) / 20, rel=0.03)
        curve = module.normal_value(np.linspace(0.0, 0.2, 30), shares, 0.05)
        assert (np.diff(curve) > 0).all()
        assert (np.diff(curve, 2) < 0).all()
        (small,) = module.normal_value((0.01,), shares, 1e-4)
        assert small == pytest.approx(0.1 * 2.0428, rel=0.01)  # E max of 30 standard normals

    limits(components)
    kills(limits, mutated(components, "np.sqrt(v) / lam", "np.sqrt(v) / lam**2"))


def test_findings():
    """A gain without interaction, a strong interaction, nothing at all; and too little to tell."""
    plenty = Instructions(prompts=400, draws=8, answers=4, own_answers=8, instructions=10, noise=0.1)
    for size, supports in (
        (plenty._replace(best=0.25, interaction=0.0), "one instruction"),
        (plenty._replace(effect=0.0, interaction=0.15), "a prompter that reads"),
        (plenty._replace(effect=0.0, interaction=0.0, own=0.02, noise=0.02), "leave it"),
        (FLAT, "not decided"),
    ):
        found = headroom(simulate_instructions(np.random.default_rng(2), size), (0.1,))
        assert found.pooled.supports == supports, found.pooled.finding


def test_the_answer_rests_on_what_is_shared():
    rollouts = simulate_instructions(np.random.default_rng(1), GAIN._replace(prompts=120))
    found, apart = headroom(rollouts), headroom(replace(rollouts, strategy=None))
    assert found.answer.startswith("Yes: a prompter that pools strategies over prompts")
    assert apart.pooled is None
    assert apart.decision == "undecided"
    assert found.at == apart.at
    best = max(found.pooled.favoured, key=lambda item: item[1])
    assert best == found.pooled.favoured[0]
    assert best[0].startswith("instruction ")
    json.dumps(plain(found), allow_nan=False)
    for shown in (text(found), "\n".join(str(section) for section in page(found).sections)):
        assert "price of not reading" in shown
        assert found.pooled.finding in shown
    assert "shared among prompts" not in text(apart)


def test_order_of_prompts_and_units_do_not_matter_to_validity():
    """Rewards of twice the unit give limits of twice the unit."""
    rollouts = simulate_instructions(np.random.default_rng(2), GAIN)
    twice = replace(rollouts, reward=2 * rollouts.reward - 1, low=-1.0, high=1.0)
    one, two = (headroom(r, (lam,)).pooled for r, lam in ((rollouts, 0.1), (twice, 0.2)))
    for name in ("over_none", "over_reference", "deciding"):
        a, b = getattr(one, name), getattr(two, name)
        assert (b.value, b.lo, b.hi) == pytest.approx((2 * a.value, 2 * a.lo, 2 * a.hi))
    assert two.at[0].price.value == pytest.approx(2 * one.at[0].price.value)


def row(prompt_id, x, rewrite, draw=0, answer=0, arm="sft", reward=0.5):
    return Rollout(
        prompt_id, x, arm, 0, draw, answer, rewrite, "y", reward, None, None, None, None if arm == "none" else
        -1.0, None, "f", arm, "r", "s", 0.0, 1.0,
    )  # fmt: skip


def test_what_is_added_is_numbered():
    rows = [
        row("a", "Why?", "Why? Be brief."),
        row("a", "Why?", "Why? As a poem.", draw=1),
        row("b", "How? ", "How? Be brief."),
        row("b", "How? ", "Please tell me how.", draw=1),
        row("c", "Who?", "please Tell me who.", draw=0),
        row("c", "Who?", "In short: Who? Be brief.", draw=1),
        row("c", "Who?", "Who?", draw=2),
        row("a", "Why?", "Why?", arm="none"),
        row("b", "How? ", "How? ", arm="none"),
        row("d", "What?", None, arm="rlhf"),
    ]
    found = collect(rows)
    at = {(found.prompt_ids[p], found.arms[a], int(k)): i
          for i, (p, a, k) in enumerate(zip(found.prompt, found.arm, found.draw, strict=True))}  # fmt: skip
    number = {key: int(found.strategy[i]) for key, i in at.items()}
    assert number["a", "sft", 0] == number["b", "sft", 0] != number["c", "sft", 1]
    assert number["b", "sft", 1] == number["c", "sft", 0] != number["a", "sft", 1]
    assert number["c", "sft", 2] == number["a", "none", 0]
    assert number["d", "rlhf", 0] == -1
    assert not found.added[at["b", "sft", 1]]
    assert found.added[at["c", "sft", 1]]
    # Only what several prompts share keeps its text.
    assert found.strategies == {
        number["a", "sft", 0]: "Be brief.",
        number["b", "sft", 1]: "please tell me …",
        number["a", "none", 0]: "",
    }


def test_draws_are_in_the_order_of_judging():
    rollouts = simulate_instructions(np.random.default_rng(0), GAIN)
    sft = Arm(rollouts, "sft")
    d = _Draws(rollouts, sft, None)
    assert d.average(d.mean) == pytest.approx(sft.mean(sft.reward)[d.order])
    assert sorted(d.order) == list(range(60))


def test_a_file_of_texts_is_pooled_too(tmp_path, capsys):
    """From the text of each rewrite the same numbers come as from the instructions that were drawn."""
    rollouts = simulate_instructions(np.random.default_rng(3), GAIN)
    columns = ("prompt", "arm", "draw", "answer", "strategy", "reward")
    values = zip(*(getattr(rollouts, name).tolist() for name in columns), strict=True)
    logps = rollouts.logps["logp_reference"]
    path = tmp_path / "rollouts.jsonl"
    with open(path, "w") as file:
        for i, (prompt, arm, draw, answer, strategy, reward) in enumerate(values):
            x = f"Question {prompt}?"
            text = f"{x} Answer in way {strategy}." if strategy else x
            made = row(str(prompt), x, text, draw, answer, rollouts.arms[arm], reward)
            file.write(replace(made, logp_reference=float(logps[i]) if arm else None).line())
    assert main(["headroom", str(path), "--lam", "0.05", "--json"]) == 0
    found, known = json.loads(capsys.readouterr().out), headroom(rollouts, (0.05,))
    assert found["answer"] == known.answer
    for name in ("over_none", "kl"):
        assert found["pooled"][name]["lo"] == pytest.approx(getattr(known.pooled, name).lo)
    assert found["pooled"]["favoured"][0][0].startswith("Answer in way ")
