"""What reading x is worth, on an instance of a tiny model, against plain NumPy from the formulas."""

from dataclasses import replace

import numpy as np
import pytest
import reading
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.arms import demo
from alignpro.llm.arms.enumerate import Enumeration
from alignpro.llm.data.bank import BANK, INSTRUCTIONS
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.training.settings import TreeSettings
from alignpro.theory import Instance

PROMPTS = ["Make a cake.", "Name a bee.", "What is a day?", "Write of ice.", "Create joy.", "Say no."]
LAMS = (0.02, 0.3)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Four prompts and four strategies, on a model of two layers that says letters."""
    folder = tmp_path_factory.mktemp("reading")
    letters = " .,?'" + "".join(sorted({*"".join([*PROMPTS, *INSTRUCTIONS])} - {*" .,?'"}))
    model, tokenizer = tiny_model(1, letters)
    model.config.max_position_embeddings = 4096  # one character a token
    model.save_pretrained(str(folder / "model"), safe_serialization=True)
    tokenizer.save_pretrained(str(folder / "model"))
    return reading.Experiment(
        out=folder / "out", model=str(folder / "model"), prompter=str(folder / "model"), prompts=4,
        instructions=3, responses=6, response_tokens=6, lams=LAMS, seeds=(1,),
        training=TreeSettings(iterations=1, epochs=2, samples=4, lora_layers=1.0, lam=0.3),
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(experiment):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "instructions", lambda **_: PROMPTS)
        yield reading.run(experiment)


@pytest.fixture(scope="module")
def instance(experiment, found):
    return Enumeration.load(experiment.out).instance


KINDS = np.array([0, 0, 1, 1])


def oracle(instance: Instance, kinds, beta, lam, uniform=False):
    """Every number from its definition, in plain NumPy."""
    p, frozen, reward = (np.asarray(getattr(instance, name)) for name in ("p", "frozen", "reward"))
    prompts, size = len(p), len(frozen) // len(p)
    table = np.array([[reward[x] @ frozen[x * size + s] for s in range(size)] for x in range(prompts)])
    prior = np.array([np.asarray(instance.prior)[x, x * size : (x + 1) * size] for x in range(prompts)])
    prior = np.full_like(prior, 1 / size) if uniform else prior

    def objective(rho):
        return p @ (rho * (table - lam * np.log(rho / prior))).sum(1)

    def shared(weights):
        q = np.exp((weights @ (table / lam + np.log(prior))) / weights.sum())
        return q / q.sum()

    star = prior * np.exp(table / lam)
    star /= star.sum(1, keepdims=True)
    q = np.tile(shared(p), (prompts, 1))
    router = np.array([shared(p * (kinds == kind)) for kind in kinds])
    best = (p @ table).argmax()
    rows = {"sft": prior, "shared": q, "router": router, "star": star}
    out = {f"rewards {name}": p @ (rho * table).sum(1) for name, rho in rows.items()}
    out |= {f"objectives {name}": objective(rho) for name, rho in rows.items()}
    for name, s in (("none", 0), ("fixed", best)):
        out |= {f"rewards {name}": p @ table[:, s]}
        out |= {f"objectives {name}": p @ (table[:, s] + lam * np.log(prior[:, s]))}
    out["price"] = lam * p @ (q * np.log(q / star)).sum(1)
    out["explained"] = objective(router) - objective(q)
    out["rest"] = lam * p @ (router * np.log(router / star)).sum(1)
    fixed = np.exp(p @ np.log(prior))
    out["alone"] = -lam * np.log(fixed.sum())
    u = table / lam + np.log(prior) - p @ (table / lam + np.log(prior))
    u -= (q * u).sum(1, keepdims=True)
    v = (q * u * u).sum(1)
    for name, m in (("lower", u.min(1)), ("upper", u.max(1))):
        out[name] = lam * p @ np.log((v * np.exp(m) + m * m * np.exp(-v / m)) / (m * m + v))
    answers = frozen[np.arange(prompts) * size] * np.exp(reward / beta)
    out["rlhf"] = p @ ((answers * reward).sum(1) / answers.sum(1))
    return out, star, q


def flat(row):
    return {
        key if inner is None else f"{key} {inner}": value
        for key in ("rewards", "objectives", "price", "explained", "rest", "alone", "lower", "upper")
        for inner, value in (row[key].items() if isinstance(row[key], dict) else [(None, row[key])])
    }


def test_numbers_are_those_of_the_formulas(experiment, found, instance):
    def check(module):
        table = module.Table.of(instance, KINDS)
        for uniform, each in ((False, table), (True, table.uniform())):
            for lam in LAMS:
                truth = oracle(instance, KINDS, experiment.beta, lam, uniform)[0]
                row = flat(module.priced(each, lam))
                assert row.keys() == truth.keys() - {"rlhf"}
                for key, value in row.items():
                    np.testing.assert_allclose(value, truth[key], rtol=1e-10, atol=1e-10, err_msg=key)
                assert 0 < row["lower"] <= row["price"] <= row["upper"]

    check(reading)
    for right, wrong in (
        (".reshape(prompts, -1)", ".reshape(prompts, -1)[:, ::-1]"),
        ("p, labels=kinds)", "p, labels=np.roll(kinds, 1))"),
        ("float(found.price), float", "-float(found.price), float"),
        ('"rest": price - explained', '"rest": price'),
        ('"router": float(share @', '"router": float(share[::-1] ** 2 @'),
        ('"shared": float(found.achieved)', '"shared": float(found.value)'),
        ("reward + lam * np.log(prior))", "reward + np.log(prior))"),
    ):
        kills(check, mutated(reading, right, wrong))


def test_what_was_written_is_that(experiment, found, instance):
    kept = read_json(experiment.out / "results.json")
    for name, uniform in (("prompter", False), ("uniform", True)):
        for lam, row in zip(LAMS, kept["prices"][name], strict=True):
            truth = oracle(instance, KINDS, experiment.beta, lam, uniform)[0]
            for key, value in flat(row).items():
                np.testing.assert_allclose(value, truth[key], rtol=1e-10, atol=1e-10, err_msg=key)
            np.testing.assert_allclose(kept["rlhf"], truth["rlhf"], rtol=1e-10)
            assert [each["verdict"] for each in row["certificates"]] == ["holds", "holds"]
    assert kept["gaps"] == {name: [["holds"] * 4] * len(LAMS) for name in reading.GAPS}
    assert [row["kind"] for row in kept["prompts"]] == ["make", "make", "tell", "tell"]
    (run,) = kept["trained"].values()
    assert [line["step"] for line in run["curve"]] == [0, 2]
    assert (experiment.out / "reading.png").stat().st_size > 10_000


def test_certificates_are_of_what_each_prompt_can_reach(experiment, found):
    enumeration = Enumeration.load(experiment.out)

    def check(module):
        parts = module.blocks(enumeration)
        table = module.Table.of(enumeration.instance, KINDS)
        for x, part in enumerate(parts):
            assert np.asarray(part.prior).sum() == pytest.approx(1, abs=1e-12)
            np.testing.assert_allclose(part.frozen @ part.reward[0], table.reward[x], rtol=1e-12)
        assert len(parts) == 4

    check(reading)
    kills(check, mutated(reading, "reward[[x], y]", "reward[[0], y]"))


def test_nothing_of_the_price_is_collected_at_q_and_all_at_rho_star(experiment, instance):
    def check(module):
        table = module.Table.of(instance, KINDS)
        measures = module.Collected(instance, experiment.beta, 0.3, table)
        _, star, q = oracle(instance, KINDS, experiment.beta, 0.3)

        def of(rho):
            blocks = np.zeros(instance.prior.shape)
            for x, row in enumerate(rho):
                blocks[x, x * rho.shape[1] : (x + 1) * rho.shape[1]] = row
            return measures.of(blocks)

        at_q, at_star, between = of(q), of(star), of((q + star) / 2)
        np.testing.assert_allclose([at_q["collected"], at_star["collected"]], [0, 1], atol=1e-9)
        np.testing.assert_allclose([at_q["kl_to_shared"], at_star["kl_to_star"]], 0, atol=1e-9)
        middle = (q + star) / 2
        away = (middle * np.log(middle / q)).sum(1).mean()
        np.testing.assert_allclose(between["kl_to_shared"], away, rtol=1e-9)
        assert 0 < between["collected"] < 1

    check(reading)
    kills(check, mutated(reading, "return 1 - shortfall / price", "return shortfall / price"))
    kills(check, mutated(reading, "rel_entr(np.asarray(rho), self.shared)", "rel_entr(self.shared, rho)"))
    alike = replace(reading.Table.of(instance, KINDS).uniform(), reward=np.tile(np.arange(4.0), (4, 1)))
    with pytest.raises(AlignProError, match=r"^lam 0\.3: here the best prompter ignores x"):
        reading.Collected(instance, experiment.beta, 0.3, alike)


def test_the_same_command_goes_on(experiment, found, monkeypatch):
    monkeypatch.setattr(demo, "enumerate_models", None)  # what was drawn is not drawn again
    again = reading.run(replace(experiment, seeds=(1, 1)))
    same = ("prices", "rlhf", "strategies", "prompts", "reward")
    assert {key: again[key] for key in same} == {key: found[key] for key in same}
    assert again["trained"][1]["curve"] == found["trained"][1]["curve"]
    with pytest.raises(AlignProError, match=r"was started with settings\.responses = 6, not 7"):
        reading.run(replace(experiment, responses=7))
    monkeypatch.setattr(reading, "instructions", lambda **_: PROMPTS[::-1])
    with pytest.raises(AlignProError, match="holds other prompts or instructions"):
        reading.run(replace(experiment, train=False))


def test_the_kind_of_a_prompt_is_a_position_among_the_kinds():
    assert [reading.KINDS[reading.kind_of(x)] for x in ("Write a poem.", "Name a poem.")] == ["make", "tell"]


def test_strategies_are_of_all_groups():
    added = reading.strategies(16)
    assert added[0] == ""
    assert added[1:10] == [texts[0] for texts in BANK.values()]
    assert added[10:] == [texts[1] for texts in BANK.values()][:7]
    assert {*reading.strategies(102)[1:]} == {*INSTRUCTIONS}
    for wrong, named in (({"prompts": 5}, "prompts 5"), ({"instructions": 103}, "instructions 103")):
        with pytest.raises(AlignProError, match=named):
            reading.Experiment(out=".", **wrong)
