"""Evaluations on held-out prompts keep the best prompter, stop by patience, and leave training alone."""

import contextlib
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mutants import kills, mutated
from safetensors.torch import load_file
from test_train import BARE, PROMPTS, SHORT, TableReward

from alignpro.commands import opening
from alignpro.commands import train as verb
from alignpro.commands.options import PromptSettings
from alignpro.errors import AlignProError
from alignpro.llm.arms import found as found_module
from alignpro.llm.arms.found import found, resampling, used
from alignpro.llm.data.split import split_of
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.policy import log_probs, sample_and_score, sample_key
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.training import evaluation, open_ended, rewrites
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.open_ended import train
from alignpro.llm.training.settings import EvaluationSettings

HELD = ["ba", "dc", "bb", "ca", "ad"]
EVERY = EvaluationSettings(eval_every=1, eval_proposals=3)
LITTLE = replace(SHORT, iterations=4, samples=8, epochs=1, minibatches=1)
FILES = ("metrics.jsonl", "evaluations.jsonl", "rewrites.jsonl", "settings.json")


class Opposite(TableReward):
    """Pays for "a" on prompts that are learned from, and elsewhere for its absence: learning does harm."""

    def __init__(self, cut=None):
        self.calls, self.cut = 0, cut

    def score(self, prompts, responses):
        self.calls += 1
        if self.calls == self.cut:
            raise KeyboardInterrupt
        return super().score(prompts, responses)

    @staticmethod
    def one(x, y):
        share = y.count("a") / 2
        return share if x in PROMPTS else 1 - share


def fit(folder, reward, settings=LITTLE, how=EVERY, **options):
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    options = {"progress": False, "held_out": HELD} | options
    environment = reward if isinstance(reward, Environment) else Environment(reward, None)
    prompter = Prompter(model, tokenizer, BARE)
    return train(prompter, environment, PROMPTS, settings, folder, evaluation=how, **options)


def contents(folder):
    out = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}
    weights = load_file(folder / "prompter" / "adapter_model.safetensors")
    return out | {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


class Noisy(TableReward):
    """Rewards with noise from the random state that everything shares."""

    def score(self, prompts, responses):
        noise = np.random.uniform(0, 0.1, len(prompts))  # noqa: NPY002
        return np.minimum(1.5, super().score(prompts, responses) + noise)


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_evaluating_leaves_training_as_it_is(algorithm, monkeypatch, tmp_path):
    """Equal to the bit with and without. Mutant: an evaluation that goes on with training's random state."""
    settings = replace(LITTLE, algorithm=algorithm, iterations=2)

    class Reported(evaluation.Evaluations):
        """Told to services as well, none of which is here."""

        def evaluate(self, done):
            self.trainer.args.report_to = ["a service"]
            super().evaluate(done)

    monkeypatch.setattr(open_ended, "Evaluations", Reported)

    def ran(name, how):
        np.random.seed(3)  # noqa: NPY002
        result = fit(tmp_path / name, Noisy(), settings, how)
        step = settings.iterations * settings.steps_per_round
        last = load_file(tmp_path / name / f"checkpoint-{step}" / "adapter_model.safetensors")
        return result.metrics, {key: tensor.numpy().tobytes() for key, tensor in last.items()}

    without = ran("without", None)

    def check(context):
        monkeypatch.setattr(evaluation, "undisturbed", context)
        assert ran(context.__name__, EVERY) == without

    check(evaluation.undisturbed)
    kills(check, contextlib.nullcontext)


def test_the_prompter_kept_is_that_of_the_best_evaluation(monkeypatch, tmp_path):
    """Evaluated anew, it gives the numbers of the best evaluation, and no other's.

    Mutants: the last one is kept; the evaluations are on training prompts.
    """
    settings = replace(LITTLE, lam=0.06, learning_rate=2e-2, samples=32, epochs=2)

    class Turning(TableReward):
        """Pays for "a" always on held-out prompts, and for two rounds on those that are learned from."""

        rounds = 0

        def score(self, prompts, responses):
            self.rounds += prompts[0] in PROMPTS
            return super().score(prompts, responses)

        def one(self, x, y):
            share = y.count("a") / 2
            return 1 - share if x in PROMPTS and self.rounds > 2 else share

    def check(kind):
        monkeypatch.setattr(open_ended, "Evaluations", kind)
        result = fit(tmp_path / kind.__name__, Turning(), settings, replace(EVERY, eval_draws=4))
        lines = result.evaluations
        assert [line["round"] for line in lines] == [0, 1, 2, 3, 4]
        best = max(lines, key=lambda line: line["objective"])
        assert 0 < best["round"] < 4
        model, tokenizer = result.prompter.model, result.prompter.tokenizer
        ids = [tuple(tokenizer(x).input_ids) for x in HELD]
        keys = [[sample_key("evaluation", 0, list(row), i) for i in range(4)] for row in ids]
        drawn = sample_and_score(model, 0, ids, keys, Sampling(max_tokens=settings.max_tokens))
        flat = [(row, said) for row, each in zip(ids, drawn, strict=True) for said, _ in each]
        with torch.no_grad():
            after = log_probs(model, *zip(*flat, strict=True)).log_probs.sum(1)
            with model.disable_adapter():
                before = log_probs(model, *zip(*flat, strict=True)).log_probs.sum(1)
        said = [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in flat]
        rewards = Turning().score([x for x in HELD for _ in range(4)], said)
        worth = (rewards - settings.lam * (after - before).numpy()).reshape(-1, 4).mean(1)
        np.testing.assert_allclose(worth, best["objectives"], atol=1e-5)
        assert best["objective"] == pytest.approx(worth.mean(), abs=1e-5)
        assert best["objective_stderr"] == pytest.approx(worth.std(ddof=1) / math.sqrt(5), abs=1e-5)
        record = json.loads((tmp_path / kind.__name__ / "settings.json").read_text())
        kept = {"round": best["round"], "rounds": 4, "by": "held-out objective"}
        assert record["kept"] == result.prompter.facts["kept"] == kept
        assert "held-out objective" in (tmp_path / kind.__name__ / "prompter" / "README.md").read_text()

    class Last(evaluation.Evaluations):
        def restore(self, model):
            pass

    class Learned(evaluation.Evaluations):
        def __init__(self, prompts, *more):
            super().__init__(PROMPTS, *more)

    check(evaluation.Evaluations)
    kills(check, Last)
    kills(check, Learned)


def test_a_later_evaluation_must_be_better(monkeypatch):
    """Ties leave the earlier one, and the gain is over the best so far. Mutant: ties take the later."""

    def check(module):
        how = EvaluationSettings(eval_every=1, eval_draws=1, eval_proposals=0)
        made = module.Evaluations(
            ["u", "v"], how, LITTLE, SimpleNamespace(target=None), None, None, "unused", False
        )
        for number, rewards in enumerate([(0.2, 0.4), (0.5, 0.1), (0.4, 0.4), (0.4, 0.4), (0.3, 0.4)]):
            rows = [
                {"prompt": i, "rewards": [r], "ratios": [0.0], "again": [r], "text": "", "answer": ""}
                for i, r in enumerate(rewards)
            ]
            made.lines.append(made._line(number, rows))
        assert [line["best"] for line in made.lines] == [0, 0, 2, 2, 2]
        assert made.lines[4]["gain"] == pytest.approx(-0.05)
        assert made.lines[4]["gain_stderr"] == pytest.approx(0.05)

    check(evaluation)
    kills(check, mutated(evaluation, 'if line["gain"] > 0', 'if line["gain"] >= 0'))


def test_patience_ends_training_and_a_resumed_run_is_finished(tmp_path):
    """What is learned is bad for held-out prompts: two rounds of patience end it after round 2 of 4."""
    how = replace(EVERY, patience=2, eval_draws=16)
    settings = replace(LITTLE, learning_rate=2e-2, samples=16)
    result = fit(tmp_path / "o", Opposite(), settings, how)
    assert [line["best"] for line in result.evaluations] == [0, 0, 0]
    assert [line["round"] for line in result.evaluations] == [0, 1, 2]
    assert len(result.metrics) == 2
    kept = {"round": 0, "rounds": 4, "by": "held-out objective", "stopped_after": 2}
    assert result.record["kept"] == kept
    assert "stopped after round 2 of 4: 2 evaluations in a row were no better" in verb.text(result)
    # ρ_sft is kept: an adapter that changes nothing.
    weights = load_file(tmp_path / "o" / "prompter" / "adapter_model.safetensors")
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    before, reward = contents(tmp_path / "o"), Opposite()
    again = fit(tmp_path / "o", reward, settings, how, resume=True)
    assert reward.calls == 0
    assert contents(tmp_path / "o") == before
    assert (again.metrics, again.evaluations) == (result.metrics, result.evaluations)
    # Patience enough for all rounds stops nothing.
    whole = fit(tmp_path / "p", Opposite(), settings, replace(how, patience=4))
    assert len(whole.metrics) == 4
    assert "stopped" not in verb.text(whole)


def test_interrupted_anywhere_ends_in_the_same_files(tmp_path):
    """Evaluations, the best prompter and the rewrites too: cut in a round, and in an evaluation."""
    settings = replace(LITTLE, save_every=2)
    fit(tmp_path / "whole", TableReward(), settings)
    want = contents(tmp_path / "whole")

    class Cut(Opposite):
        one = staticmethod(TableReward.one)

    for at in (6, 9):
        folder = tmp_path / f"cut-{at}"
        with pytest.raises(KeyboardInterrupt):
            fit(folder, Cut(at), settings)
        fit(folder, TableReward(), settings, resume=True)
        assert contents(folder) == want
    with pytest.raises(AlignProError, match=r"was started with evaluation\.patience = None, not 3"):
        fit(tmp_path / "cut-6", TableReward(), settings, replace(EVERY, patience=3), resume=True)


def test_rewrites_are_kept_as_they_were_drawn(tmp_path):
    """Of a prompter: its rewrites, their first answers and rewards, and log-probabilities in nats."""
    model, tokenizer = tiny_model(seed=1, vocab="abcd")
    target = LocalTarget((model, tokenizer), batch_size=64)
    environment = Environment(TableReward(), target, Sampling(max_tokens=2), responses=2)
    settings = replace(LITTLE, task="prompter", iterations=2)
    result = fit(tmp_path / "o", environment, settings, replace(EVERY, eval_every=2))
    lines = [json.loads(line) for line in (tmp_path / "o" / "rewrites.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1] * 24 + [2] * 24
    for number, each in enumerate(result.metrics):
        rewards = [line["reward"] for line in lines if line["round"] == number + 1]
        assert np.mean(rewards) == pytest.approx(each["score"], abs=1e-6)
        ratios = [line["logp"] - line["logp_reference"] for line in lines if line["round"] == number + 1]
        assert np.mean(ratios) == pytest.approx(each["ppo/kl_k1"], abs=1e-5)
    assert {line["prompt"] for line in lines} == set(PROMPTS)
    # Two answers to each of two draws, and twice as many to each of three proposals.
    assert EVERY.answers(5, 2, 2, False) == 5 * 2 * (3 * 2 + 2 * 2)
    first = result.evaluations[0]["proposals"]
    assert np.array(first["rewards"]).shape == np.array(first["again"]).shape == (5, 3)
    assert first["rewards"] != first["again"]
    shown = verb.page(found(result))
    headings = [section.heading for section in shown.sections]
    assert {"Held-out prompts", "What it found", "What it adds, over time"} <= set(headings)
    assert "tokens of a rewrite" in shown.sections[0].tables[0].head


def test_a_file_of_rewrites_is_cut_after_a_round(tmp_path):
    """Mutant: the checkpoint's own round is cut off too."""
    rows = [json.dumps({"round": r, "n": n}) + "\n" for r in (1, 2, 3) for n in range(2)]

    def check(module):
        path = tmp_path / "r.jsonl"
        for torn in ("", '{"round": 4', '{"round": 2, "n": 7}'):
            path.write_text("".join(rows) + torn)
            module.cut(path, 2)
            assert path.read_text() == "".join(rows[:4])
            module.cut(path, 0)
            assert path.read_text() == ""

    check(rewrites)
    kills(check, mutated(rewrites, '["round"] <= rounds', '["round"] < rounds'))
    with pytest.raises(AlignProError, match=": Is a directory; move what is there elsewhere, and resume"):
        rewrites.cut(tmp_path, 2)


def test_resampling_is_not_judged_by_what_it_was_chosen_by():
    """Rewards of noise alone: no prompter earns more than ρ_sft. Mutant: one set of answers does both."""
    rng = np.random.default_rng(0)
    names = ("rewards", "again")
    lines = [{"proposals": {name: rng.uniform(size=(400, 6)).tolist() for name in names}}]
    every = np.mean([lines[0]["proposals"][name] for name in names])

    def check(module):
        got = module.resampling(lines, 0.1)
        assert abs(got.reward[0] - every) < 4 * got.reward[1]

    check(found_module)
    kills(check, mutated(found_module, "np.array(judging)", "np.array(weighing)"))
    # Exact rewards: the objective is λ log of the mean of exp(R/λ), and its KL at most log 6.
    exact = [{"proposals": dict.fromkeys(names, lines[0]["proposals"]["again"])}]
    got, r = resampling(exact, 0.1), np.array(lines[0]["proposals"]["again"])
    assert got.objective[0] == pytest.approx(float(np.mean(0.1 * np.log(np.exp(r / 0.1).mean(1)))))
    assert 0 < got.kl[0] < got.most_kl == pytest.approx(math.log(6))
    assert resampling([], 0.1) is None


def test_shares_of_what_is_added():
    """Of what prompts share. Mutant: what one prompt's rewrites do alone."""
    lines = [
        {"round": r, "prompt": x, "rewrite": f"{x} {text}", "answer": "", "reward": reward}
        for r in range(1, 21)
        for x in ("u", "v")
        for text, reward in ((("Be brief.", 1.0),) if r > 10 else (("Be long.", 0.0), (f"only {x}", 0.5)))
    ]
    bands, top, rest = used(lines)
    assert (bands[0], bands[-1], len(bands)) == ((1, 3), (19, 20), 8)
    assert {(s.text, s.added, s.draws) for s in top[:2]} == {("Be brief.", True, 20), ("Be long.", True, 20)}
    brief = next(s for s in top if s.text == "Be brief.")
    assert (brief.shares[0], brief.shares[-1], brief.reward, brief.share) == (0, 1, 1.0, 20 / 60)
    assert rest.draws == 20

    def check(module):
        assert len(module.used(lines)[1]) == 2

    check(found_module)
    kills(check, mutated(found_module, "if prompts[strategy] > 1", ""))
    for i in range(8):
        assert sum(s.shares[i] for s in (*top, rest)) == pytest.approx(1)
    assert used([line | {"rewrite": None} for line in lines]) == ((), (), None)


# --- which prompts ---


def test_a_file_is_divided_and_what_is_evaluated_on_is_not_learned_from(tmp_path):
    texts = [f"prompt number {i}" for i in range(60)]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    source = PromptSettings(prompts_file=str(tmp_path / "p.txt"))

    def check(module):
        learned, held = module.divided_prompts(source, "", None, 4)
        assert len(held) == 4
        assert {split_of(x) for x in held} == {"validation"}
        assert learned == [x for x in texts if split_of(x) == "train"]
        assert module.divided_prompts(source, "", 3, 99)[0] == learned[:3]

    check(opening)
    kills(check, mutated(opening, 'parts["validation"][:held_out]', 'parts["train"][:held_out]'))
    with pytest.raises(AlignProError, match=r"^train_prompts 99: 4. of the file's 60 prompts are to"):
        opening.divided_prompts(source, "", 99, 4)
    data = PromptSettings(dataset="verifiable")  # few enough that fewer must do
    learned, held = opening.divided_prompts(data, "", None, 99)
    assert 0 < len(held) < 99
    assert not set(learned) & set(held)


def test_bad_evaluations_are_named(tmp_path):
    for wrong, message in (
        ({"patience": 2}, r"^patience 2: counts evaluations on held-out prompts; give eval_every too$"),
        ({"eval_every": 0}, r"^eval_every 0: give a whole number of at least 1$"),
        ({"eval_prompts": 1}, r"^eval_prompts 1: give a whole number of at least 2$"),
        ({"eval_every": 1, "patience": 0}, r"^patience 0: give a whole number of at least 1$"),
    ):
        with pytest.raises(AlignProError, match=message):
            EvaluationSettings(**wrong)
    with pytest.raises(AlignProError, match=r"^eval_every: 1 held-out prompts are there"):
        fit(tmp_path / "a", TableReward(), held_out=["ba"])
    with pytest.raises(AlignProError, match=r"^held_out 'AB\.': is learned from too; hold out"):
        fit(tmp_path / "a", TableReward(), held_out=["ba", "AB."])
    assert not (tmp_path / "a").exists()


def test_the_oracle_s_page_speaks_of_answers(tmp_path):
    shown = verb.page(found(fit(tmp_path / "o", TableReward(), replace(LITTLE, iterations=1))))
    assert "tokens of an answer" in shown.sections[0].tables[0].head
    assert "tokens of a rewrite" not in shown.sections[0].tables[0].head
    assert "What it adds, over time" not in [section.heading for section in shown.sections]
