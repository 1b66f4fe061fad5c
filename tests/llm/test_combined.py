"""Several rewards at once: sums and means in Python, by name, and through training and rollouts."""

import json
import math
import shlex
from dataclasses import dataclass

import numpy as np
import pytest
from mutants import kills, mutated
from test_reward_models import server  # noqa: F401 - a fixture

from alignpro.commands import main
from alignpro.commands.opening import World
from alignpro.commands.options import EnvironmentSettings
from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.prompt import Prompt
from alignpro.llm.rewards import combined
from alignpro.llm.rewards.combined import Mean, Sum
from alignpro.llm.rewards.function import CallableReward
from alignpro.llm.rewards.opening import load_reward, read_plan
from alignpro.llm.rewards.scores import judged
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.target import Answer

X, Y = ["p", "q", "r"], ["a", "bb", "ccc"]


@dataclass
class Given:
    """A reward that is told its scores."""

    name: str
    low: float
    high: float
    scores_of: tuple[float, ...]

    def score(self, prompts, responses):
        return np.array(self.scores_of[: len(prompts)])

    def describe(self):
        return {"name": self.name}


A = Given("a", -1.0, 3.0, (3.0, 0.0, -1.0))
B = Given("b", 0.0, 1.0, (0.25, 1.0, 0.5))
C = Given("c", 2.0, 4.0, (2.0, 3.0, 4.0))
POINT = Given("point", 1, 1, (1.0,) * 3)


def test_a_sum_is_its_weighted_parts():
    """Ranges by the ends of every part: a negative weight turns its range round."""

    def check(module):
        reward = module.Sum([A, B], weights=[0.5, -2.0])
        found = reward.scores(X, Y)
        np.testing.assert_array_equal(found.parts["a"], [1.5, 0.0, -0.5])
        np.testing.assert_array_equal(found.parts["b"], [-0.5, -2.0, -1.0])
        np.testing.assert_array_equal(found.total, [1.0, -2.0, -1.5])
        np.testing.assert_array_equal(reward.score(X, Y), found.total)
        assert reward.ranges == {"a": (-0.5, 1.5), "b": (-2.0, 0.0)}
        assert (reward.low, reward.high) == (-2.5, 1.5)
        assert found.spread is None

    check(combined)
    for right, wrong in (
        (
            "sorted((weight * reward.low, weight * reward.high))",
            "(weight * reward.low, weight * reward.high)",
        ),
        ("name: weight * part.total", "name: part.total"),
        ("sum(parts.values(), np.zeros(len(prompts)))", "sum(parts.values()) / len(parts)"),
    ):
        kills(check, mutated(combined, right, wrong))
    facts = Sum([A, B], weights=[0.5, -2.0]).describe()
    assert facts["name"] == "0.5*a - 2.0*b"
    assert facts["parts"]["b"] == {"weight": -2.0, "name": "b"}
    assert Sum([A, B]).describe()["name"] == "a + b"


def test_a_mean_has_the_spread_of_its_members():
    def check(module):
        reward = module.Mean([A, B, C])
        found = reward.scores(X, Y)
        rows = np.array([A.scores_of, B.scores_of, C.scores_of])
        np.testing.assert_allclose(found.total, rows.mean(0), rtol=1e-15)
        np.testing.assert_allclose(found.spread, np.sqrt(((rows - rows.mean(0)) ** 2).sum(0) / 2), rtol=1e-15)
        np.testing.assert_allclose(sum(found.parts.values()), found.total, rtol=1e-15)
        assert (reward.low, reward.high) == pytest.approx((1 / 3, 8 / 3))

    check(combined)
    kills(check, mutated(combined, "ddof=1", "ddof=0"))
    kills(check, mutated(combined, "[1 / len(rewards)] * len(rewards)", "[1.0] * len(rewards)"))
    assert Mean([A, B]).describe()["name"] == "mean(a, b)"


def test_ensembles_within_a_sum_keep_their_spread():
    """A part that is a mean is one part; the spreads of two add up as those of independent errors."""

    def check(module):
        first, second = Mean([A, B], names=["u", "v"]), Mean([B, C])
        reward = module.Sum([first, second, A], weights=[-2, 3, 1], names=["one", "two", "three"])
        found = reward.scores(X, Y)
        assert [*found.parts] == ["one", "two", "three"]
        s, t = first.scores(X, Y).spread, second.scores(X, Y).spread
        np.testing.assert_allclose(found.spread, np.sqrt(4 * s**2 + 9 * t**2), rtol=1e-14)

    check(combined)
    kills(check, mutated(combined, "weight * part.spread for", "part.spread for"))
    json.dumps(Sum([Mean([A, B]), C]).describe())


def test_rounding_takes_no_total_out_of_the_range():
    """Scores at the ends: contributions and ends are added in one order, so that they round alike."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(1, 9))
        low = rng.normal(size=n)
        high = low + rng.exponential(size=n)
        weights = rng.normal(size=n)
        parts = [
            Given(str(i), float(low[i]), float(high[i]), tuple(map(float, (low[i], high[i]))))
            for i in range(n)
        ]
        turned = [
            Given(p.name, p.low, p.high, p.scores_of[:: 1 if w > 0 else -1])
            for p, w in zip(parts, weights, strict=True)
        ]
        reward = Sum(turned, weights.tolist())
        found = reward.scores(X[:2], Y[:2])
        assert found.total.tolist() == [reward.low, reward.high]
        assert np.cumsum([high for _, high in reward.ranges.values()])[-1] == reward.high


def test_refused_answers_have_parts_that_add_up():
    reward = Sum([A, B], weights=[0.5, -2.0])
    answers = [Answer("a", "stop", 1, 1), Answer("no", "refused", 0, 0)]
    found = judged(reward, X[:2], answers, Refusals(reward=-1.0, most=1.0))
    assert found.total.tolist() == [1.0, -1.0]
    assert sum(values[1] for values in found.parts.values()) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sum([]), "give at least one"),
        (lambda: Sum([A, A]), "reward a: is there twice"),
        (lambda: Sum([A, B], [1, 0]), "reward b: its weight is 0"),
        (lambda: Sum([A, B], [1, math.inf]), "its weight is inf"),
        (lambda: Sum([A, B], [1]), "2, with 1 weights and 2 names"),
        (lambda: Mean([A]), "give at least two"),
        (lambda: Sum([A, Given("d", 0, 1, (2.0,) * 3)]).score(X, Y), "outside the declared"),
        (lambda: read_plan([]), "give at least one"),
        (lambda: read_plan(["ease", "0.5*ease"]), "reward ease: is there twice"),
        (lambda: read_plan(["0*ease", "clean"]), "its weight is 0"),
        (lambda: read_plan(["nan*ease"]), "its weight is nan"),
        (lambda: read_plan(["mean", "ease"]), "reward mean: give at least two"),
        (lambda: read_plan(["mean", "ease", "2*clean"]), "without weights"),
        (lambda: read_plan(["mean", "ease", "nope"]), "reward 'nope': choose from"),
        (lambda: read_plan("list:0"), "a whole number of items"),
        (lambda: read_plan("ease:3"), "choose from"),
        (lambda: read_plan("brevity:x"), "give a number after brevity:"),
        (lambda: read_plan("#POSITIVE@0,1"), "reward '#POSITIVE': choose from"),
        (lambda: read_plan(f"{__name__}:POINT"), r"its range is \[1, 1\]"),
    ],
)
def test_what_cannot_be_put_together_is_named(make, message):
    with pytest.raises(AlignProError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_names_with_weights_are_a_sum():
    answers = ["Go now.", "An unfortunate impossibility."]
    ease, brief, clean = (load_reward(n).score(["", ""], answers) for n in ("ease", "brevity", "clean"))
    for names, expected, shown in (
        (["0.7*ease", "-0.3 * brevity"], 0.7 * ease + -0.3 * brief, "0.7*ease - 0.3*brevity"),
        (["ease", "2e-1*clean"], ease + 0.2 * clean, "ease + 0.2*clean"),
        (["mean", "ease", "brevity", "clean"], (ease + brief + clean) / 3, "mean(ease, brevity, clean)"),
        (["-1*ease"], -ease, "-1.0*ease"),
        ("ease", ease, "ease"),
        (["1*ease"], ease, "ease"),
    ):
        np.testing.assert_allclose(load_reward(names).score(["", ""], answers), expected, rtol=1e-14)
        assert read_plan(names).shown == shown
    assert not hasattr(load_reward("ease"), "ranges")
    assert load_reward(["0.7*ease", "-0.3*brevity"]).ranges == {"ease": (0, 0.7), "brevity": (-0.3, 0)}


def test_parts_say_which_columns_they_read():
    def needs(prompts, responses, answer, hint=None):
        return [0.5 for _ in answer]

    part = CallableReward(needs, "0,1")
    both = Sum([Mean([part, B]), load_reward("verifiable")])
    assert both.reads.needed == ("answer", "instruction_id_list", "kwargs")
    assert both.reads.optional == ("hint",)
    with pytest.raises(AlignProError, match="column answer: reward needs needs it"):
        both.check_prompts(["x"])
    Sum([part, A]).check_prompts([Prompt("x", columns={"answer": 1})])


# --- on the command line ---


def environment(**options):
    return EnvironmentSettings(target="smollm2-135m-instruct", **options)


def test_one_key_goes_to_one_host(monkeypatch):
    from alignpro.llm.rewards.opening import KEY_ENV
    from alignpro.llm.targets.settings import EndpointSettings

    monkeypatch.delenv(KEY_ENV, raising=False)
    names = ("http://127.0.0.1:9/x@0,1", "http://localhost:9/x@0,1")
    World(environment(reward=names))
    keyed = environment(reward=names, reward_endpoint=EndpointSettings(key_env="MY_KEY"))
    with pytest.raises(AlignProError, match=r"reward_key_env: would go to 127\.0\.0\.1:9 and localhost:9"):
        World(keyed)
    World(environment(reward=(names[0], "http://127.0.0.1:9/y@0,1"), reward_endpoint=keyed.reward_endpoint))
    monkeypatch.setenv(KEY_ENV, "k")
    with pytest.raises(AlignProError, match="reward_key_env: would go to"):
        World(environment(reward=names))
    with pytest.raises(AlignProError) as error:
        read_plan("HTTPS://127.0.0.1/x?key=secret@0;1")
    assert "secret" not in str(error.value)


def test_flags_of_a_reward_model_are_for_one():
    from alignpro.commands.options import RewardModelSettings
    from alignpro.llm.targets.settings import EndpointSettings

    for options in ({"dtype": "bfloat16"}, {"batch_size": 2}, {"sample_tokens": 9}):
        (name,) = options
        with pytest.raises(AlignProError, match=f"reward_{name}: is for a reward model in this process"):
            World(environment(reward=("ease", "clean"), reward_model=RewardModelSettings(**options)))
        World(environment(reward=("ease", "o/n@0,1"), reward_model=RewardModelSettings(**options)))
    budget = EndpointSettings(max_tokens=9)
    with pytest.raises(AlignProError, match="reward_max_tokens: is for an endpoint"):
        World(environment(reward=("ease", "o/n@0,1"), reward_endpoint=budget))
    World(environment(reward=("ease", "http://127.0.0.1:9/x@0,1"), reward_endpoint=budget))


def test_a_plain_string_is_one_reward(tmp_path):
    assert World(environment(reward="ease")).reward_name == "ease"
    (tmp_path / "one.yaml").write_text("reward: ease\n")
    (tmp_path / "two.yaml").write_text("reward: [0.5*ease, -1*clean]\n")
    for name, expected in (("one", ("ease",)), ("two", ("0.5*ease", "-1*clean"))):
        verb = main._parse(["train", "--out", "o", "--config", str(tmp_path / f"{name}.yaml")])
        assert verb.environment.reward == expected


def letters(prompts, responses):
    return [y.count("e") / max(1, len(y)) for y in responses]


async def lengths(prompts, responses):
    return [min(1.0, len(y) / 10) for y in responses]


def test_parts_add_up_through_training_rollouts_and_the_record(tmp_path, capsys):
    """Three rewards: in metrics.jsonl, rollouts.jsonl and the facts of the run."""
    model, tokenizer = tiny_model(seed=1)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("abc\ndef\ngab\n")
    world = (
        f"--target {tmp_path}/base --prompts-file {tmp_path}/prompts.txt --answer-tokens 4 "
        f"--reward 0.5*{__name__}:letters@0,1 -0.25*{__name__}:lengths@0,1 2*brevity"
    )
    names = [f"{__name__}:letters@0,1", f"{__name__}:lengths@0,1", "brevity"]
    train = (
        f"train --out {tmp_path}/t --prompter {tmp_path}/base --iterations 2 --prompts-per-round 2 --draws 2"
    )
    assert main.main(shlex.split(f"{train} --epochs 1 --rewrite-tokens 4 {world}")) == 0, (
        capsys.readouterr().err
    )
    for line in (tmp_path / "t" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        parts = [row[f"reward/{name}"] for name in names]
        assert sum(parts) == pytest.approx(row["score"], abs=1e-6)  # which TRL keeps in float32
        assert parts[1] < 0
    roll = f"rollout --out {tmp_path}/r --prompter {tmp_path}/base --arms none sft --draws 1 --answers 2"
    assert main.main(shlex.split(f"{roll} {world}")) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "r" / "rollouts.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert [*row["reward_parts"]] == names
        assert sum(value for value, _, _ in row["reward_parts"].values()) == row["reward"]
        assert [ends for _, *ends in row["reward_parts"].values()] == [[0, 0.5], [-0.25, 0], [0, 2]]
    said = json.loads((tmp_path / "t" / "settings.json").read_text())
    assert f"0.5*{names[0]} - 0.25*{names[1]} + 2.0*brevity" in json.dumps(said)


def test_endpoints_in_a_sum_share_a_store_and_pay_once(server, tmp_path):  # noqa: F811
    """Two addresses of one service: their scores are told apart in one folder, and asked for once."""
    server.answer = lambda path, body: (200, {}, {"rewards": [path.count("x") / 4] * len(body["prompts"])})
    names = (f"0.5*{server.url}/x@0,1", f"-1*{server.url}/xx@0,1", "ease")

    def run():
        world = World(environment(reward=names))
        assert world.endpoints == 2
        reward = world.reward(tmp_path)
        found = reward.scores(X, Y)
        assert [found.parts[name].tolist() for name in reward.names[:2]] == [[0.125] * 3, [-0.5] * 3]
        return reward.line().splitlines()

    first = run()
    asked = len(server.asked)
    assert asked == 2
    assert [line.split(": ")[1] for line in first] == [
        "3 scores in 1 requests (0 retries), 0 more from the file",
    ] * 2
    again = run()
    assert len(server.asked) == asked
    assert all("3 more from the file" in line for line in again)


def test_what_a_part_does_not_score_lies_where_refused_answers_do(server, tmp_path):  # noqa: F811
    """By default at the low end of the sum: at the high end of a part with a negative weight."""
    names = (f"0.5*{server.url}/x@0,4", f"-1*{server.url}/xx@0,1")
    for refused, expected in ((None, (0.0, 1.0)), (-0.25, (1.0, 0.75)), (2.0, (4.0, 0.0))):
        world = World(environment(reward=names, refused_reward=refused))
        parts = [kept.reward for kept in world.reward(tmp_path).rewards]
        assert tuple(part.refusals.reward for part in parts) == pytest.approx(expected)
        contributions = 0.5 * parts[0].refusals.reward - parts[1].refusals.reward
        assert contributions == pytest.approx(-1.0 if refused is None else refused)
