"""Fine-tuning the prompter on pairs: it learns the rewrites alone, resumes exactly, and is a reference."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mutants import kills, mutated
from trl import SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from alignpro.errors import AlignProError
from alignpro.llm.data.own import Rewrite, read_rewrites
from alignpro.llm.data.split import split_of
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.load import load_model
from alignpro.llm.policies.prompter import Prompter, Template
from alignpro.llm.training import sft as module
from alignpro.llm.training.environment import Environment
from alignpro.llm.training.open_ended import train
from alignpro.llm.training.pair_settings import SFTSettings
from alignpro.llm.training.settings import TrainSettings
from alignpro.llm.training.sft import encode, nats_per_token, sft

TEMPLATE = Template(system="", examples=(), request="", opening=">", space="")
PAIRS = [Rewrite("".join(x), "".join(x[::-1])) for x in itertools.product("abcd", repeat=4)]
SETTINGS = SFTSettings(learning_rate=1e-2, epochs=4, batch_size=16, max_tokens=8, lora_rank=8, save_every=4)
SHORT = replace(SETTINGS, epochs=1)
LETTERS = 0.8 * np.log(4)
"""Nats per token of who knows that a rewrite is four of "abcd" and an end, but nothing of the prompt."""


@pytest.fixture
def prompter(tmp_path):
    """A tiny model in a folder, as every model of a user's is."""
    model, tokenizer = tiny_model(seed=1, vocab="abcd>")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return Prompter(*load_model(tmp_path / "base"), TEMPLATE, base=str(tmp_path / "base"))


def test_learns_the_rewrites_of_prompts_never_seen(prompter, tmp_path):
    before = {n: p.clone() for n, p in prompter.model.state_dict().items()}
    settings = replace(SETTINGS, epochs=12, lora_rank=16)
    result = sft(prompter, PAIRS, settings, tmp_path / "out")
    tuned = result.prompter
    found = tuned.facts["sft"]
    assert set(found["nats_per_token"]) == {"validation", "test"}
    assert all(part["before"] > 3 for part in found["nats_per_token"].values())
    assert all(part["after"] < 0.75 * LETTERS for part in found["nats_per_token"].values())
    # The number is that of the prompter's own scores, tokens of the end included.
    pairs = [p for p in PAIRS if split_of(p.prompt) == "test"]
    scores = tuned.log_probs([p.prompt for p in pairs], [p.rewrite for p in pairs])
    assert found["nats_per_token"]["test"]["after"] == pytest.approx(
        -scores.sum() / (5 * len(pairs)), rel=1e-5
    )
    # The first logged loss is the same quantity of the untrained prompter: of the rewrite alone.
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    train_ids = [encode(prompter, p) for p in PAIRS if split_of(p.prompt) == "train"]
    assert lines[0]["loss"] == pytest.approx(nats_per_token(prompter, train_ids), rel=0.1)
    assert lines == result.metrics
    assert len(lines) == 12 * -(-len(train_ids) // 16) == lines[-1]["step"]
    # The prompter given is as it was.
    assert all(torch.equal(before[n], p) for n, p in prompter.model.state_dict().items())
    assert not hasattr(prompter.model, "peft_config")
    assert "forward" not in vars(prompter.model)
    # Safetensors only, and the folder gives what was returned.
    assert (tmp_path / "out" / "prompter" / "model.safetensors").exists()
    assert not [p for kind in ("*.bin", "*.pt", "*.pth") for p in (tmp_path / "out" / "prompter").rglob(kind)]
    again = Prompter.from_pretrained(tmp_path / "out" / "prompter")
    assert (again.template, again.max_tokens, again.facts) == (
        TEMPLATE,
        8,
        json.loads(json.dumps(tuned.facts)),
    )
    assert again.rewrites(["abcd"], 4) == tuned.rewrites(["abcd"], 4)
    assert "pairs of a prompt and its rewrite" in (tmp_path / "out" / "prompter" / "README.md").read_text()


# The reversal is its own inverse, so that swapped pairs are pairs too; this is not.
PREFIXED = [Rewrite(p.prompt, "a" + p.prompt) for p in PAIRS]


def learned(prompter, pairs, folder):
    return sft(prompter, pairs, SETTINGS, folder).held_out["test"].after


MUTANTS = {
    "prompt and rewrite swapped": lambda p, s: {"input_ids": [*s, *p], "labels": [-100] * len(s) + [*p]},
    "loss on the prompt's tokens": lambda p, s: {"input_ids": [*p, *s], "labels": [*p] + [-100] * len(s)},
    "no loss on the end": lambda p, s: {
        "input_ids": [*p, *s],
        "labels": [-100] * len(p) + [*s[:-1], -100],
    },
}


def test_the_loss_as_it_is_learns(prompter, tmp_path):
    assert learned(prompter, PREFIXED, tmp_path / "out") < 0.75 * LETTERS


@pytest.mark.parametrize("mutant", MUTANTS)
def test_other_losses_do_not(mutant, prompter, tmp_path, monkeypatch):
    def columns(ids):
        rows = [MUTANTS[mutant](*pair) for pair in ids]
        return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}

    monkeypatch.setattr(module, "columns", columns)
    assert learned(prompter, PREFIXED, tmp_path / "out") > 0.95 * LETTERS


def test_the_loss_spares_the_prompt_and_includes_the_end(prompter):
    ids = encode(prompter, Rewrite("ab", "ba"))
    row = {name: column[0] for name, column in module.columns([ids]).items()}
    assert tuple(row["input_ids"]) == TEMPLATE.prompt_ids(prompter.tokenizer, "ab") + ids[1]
    assert [t for t in row["labels"] if t != -100] == [*ids[1]]
    assert ids[1][-1] == prompter.tokenizer.eos_token_id
    assert row["labels"][: len(ids[0])] == [-100] * len(ids[0])


def test_pads_cost_nothing(prompter, tmp_path):
    """Rewrites of other lengths in one batch: the loss is still the mean over their tokens."""
    pairs = [Rewrite(p.prompt, p.rewrite[: 1 + i % 4]) for i, p in enumerate(PAIRS)]
    ids = [encode(prompter, p) for p in pairs if split_of(p.prompt) == "train"]
    sft(prompter, pairs, replace(SHORT, batch_size=len(ids)), tmp_path / "out")
    line = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(nats_per_token(prompter, ids), rel=1e-5)


def check_loss(loss_of, prompter, folder):
    """The loss and its gradients are those of a plain forward pass over every row, its template included."""
    pairs = [Rewrite(x, y) for x, y in (("ab", "ba"), ("abcd", "d"), ("ab", "bacd"), ("dd", "ddab"))]
    metrics = module.PairMetrics(folder / "metrics.jsonl")
    trainer = module._trainer(prompter, [encode(prompter, p) for p in pairs], SHORT, folder, (), metrics)
    model = trainer.model
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for i, p in enumerate(weights.values()):  # a fresh adapter would give most of them no gradient
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
    read = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, ids, _o: read.append(ids[0]))
    for total in (None, torch.tensor(40)):  # of one process alone, and of several
        found = torch.autograd.grad(loss_of(trainer, model, dict(batch), total), [*weights.values()])
        tokens = sum(ids.numel() for ids in read)
        handle.remove()
        value = loss_of(trainer, model, dict(batch), total)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        wanted = batch["labels"][:, 1:].flatten()
        plain = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).double(), wanted, reduction="sum", ignore_index=-100
        ) / (total or (wanted != -100).sum())
        assert value.item() == pytest.approx(plain.item(), rel=1e-5)
        expected = torch.autograd.grad(plain, [*weights.values()])
        for name, one, other in zip(weights, found, expected, strict=True):
            scale = other.abs().max()
            assert scale > 1e-4, name
            assert (one - other).abs().max() < 1e-4 * scale, name
    assert tokens < 0.7 * int(batch["attention_mask"].sum())


def test_the_loss_reads_the_template_once_and_is_that_of_a_plain_pass(prompter, tmp_path):
    prompter = replace(prompter, template=replace(TEMPLATE, examples=(("abcd", "dcba"),)))

    def by(module):
        return lambda trainer, model, batch, total: module._Trainer.compute_loss(
            trainer, model, batch, num_items_in_batch=total
        )

    check_loss(by(module), prompter, tmp_path)

    def slow(trainer, model, batch, total):
        return SFTTrainer.compute_loss(trainer, model, batch, num_items_in_batch=total)

    for right, wrong in {
        "-scores.log_probs.sum() / tokens": "-(scores.log_probs.sum(1) / 3).mean()",
        "tokens = here if num_items_in_batch is None else num_items_in_batch": "tokens = here",
        "log_probs(model, [prompt for prompt, _ in pairs]": "log_probs(model, [pairs[0][0] for _ in pairs]",
    }.items():
        mutant = by(mutated(module, right, wrong))
        kills(lambda loss: check_loss(loss, prompter, tmp_path), mutant)
    kills(lambda loss: check_loss(loss, prompter, tmp_path), slow)


def test_pairs_of_one_prompt_together(prompter, tmp_path, monkeypatch):
    """All are learned from, each prompt's in one batch, in an order that the seed gives."""
    pairs = [
        Rewrite(x, y) for y in ("a", "b", "c", "d") for x in ("ab", "cd", "aa", "bd", "dd", "ca", "ba", "da")
    ]
    ids = [encode(prompter, p) for p in pairs if split_of(p.prompt) == "train"]
    in_a_row = module.gathered(ids, 0)
    assert sorted(in_a_row) == sorted(ids)
    assert in_a_row != module.gathered(ids, 1)
    seen, step = [], module._Trainer.compute_loss

    def looked_at(self, model, inputs, **named):
        seen.append(
            [p for p, _ in module.uncolumned(*(inputs[n] for n in ("input_ids", "labels", "attention_mask")))]
        )
        return step(self, model, inputs, **named)

    monkeypatch.setattr(module._Trainer, "compute_loss", looked_at)

    def prompts_of_a_batch(together):
        seen.clear()
        settings = replace(SHORT, batch_size=4, together=together)
        sft(prompter, pairs, settings, tmp_path / str(together))
        assert sorted(p for batch in seen for p in batch) == sorted(p for p, _ in ids)
        return max(len(set(batch)) for batch in seen)

    assert prompts_of_a_batch(True) == 1
    assert prompts_of_a_batch(False) > 1


def test_less_memory_is_the_same_training(prompter, tmp_path):
    """Parts of a step add up to the step, whose last one of an epoch has parts of unequal length; what is
    computed again is what was computed; bfloat16 under the adapter learns too."""

    def check(module, parts):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return [x["loss"] for x in module.sft(prompter, PAIRS, replace(SHORT, **parts), out).metrics]

    whole = check(module, {})
    for parts in ({"microbatches": 4}, {"gradient_checkpointing": True}):
        np.testing.assert_allclose(check(module, parts), whole, rtol=1e-4)
    half = Prompter(*load_model(prompter.base, "bfloat16"), TEMPLATE, base=prompter.base)
    lines = sft(half, PAIRS, replace(SETTINGS, policy_dtype="bfloat16"), tmp_path / "half").metrics
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    with pytest.raises(AlignProError, match="microbatches 3: does not divide batch_size 16"):
        replace(SHORT, microbatches=3)

    def alike(mutant):
        np.testing.assert_allclose(check(mutant, {"microbatches": 2}), whole, rtol=1e-4)

    kills(
        alike,
        mutated(
            module, "tokens = here if num_items_in_batch is None else num_items_in_batch", "tokens = here"
        ),
    )


def test_seeds_are_honoured(prompter, tmp_path):
    a, b, c = (
        sft(prompter, PAIRS, replace(SHORT, seed=seed), tmp_path / name).prompter.model.state_dict()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], c[n]) for n in a)


def test_interrupted_and_resumed_equals_uninterrupted(prompter, tmp_path, monkeypatch):
    """To the bit, metrics too; a checkpoint cut short while being written is not used."""
    whole = sft(prompter, PAIRS, SHORT, tmp_path / "whole")
    step = module._Trainer.training_step

    def cut(self, *positional, **named):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return step(self, *positional, **named)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(module._Trainer, "training_step", cut)
        with pytest.raises(KeyboardInterrupt):
            sft(prompter, PAIRS, SHORT, out)
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-4"]
    (out / "checkpoint-5").mkdir()
    # Mutants: beginning again, which ends in the same result; checkpoints that are never complete.
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(
            module._Trainer, "training_step", lambda self, *a, **k: steps.append(1) or step(self, *a, **k)
        )
        resumed = sft(prompter, PAIRS, SHORT, out, resume=True)
        total = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        assert len(steps) == total - 4
    a, b = whole.prompter.model.state_dict(), resumed.prompter.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert resumed.prompter.facts == whole.prompter.facts
    assert (resumed.metrics, resumed.held_out) == (whole.metrics, whole.held_out)
    # Resuming what is finished changes nothing.
    again = sft(prompter, PAIRS, SHORT, out, resume=True).prompter.model.state_dict()
    assert all(torch.equal(a[n], again[n]) for n in a)
    with pytest.raises(AlignProError, match=r"cut: holds a run"):
        sft(prompter, PAIRS, SHORT, out)
    with pytest.raises(AlignProError, match=r"was started with settings\.seed = 0, not 1"):
        sft(prompter, PAIRS, replace(SHORT, seed=1), out, resume=True)
    with pytest.raises(AlignProError, match=r"was started with pairs\.train = "):
        sft(prompter, PAIRS[:-20], SHORT, out, resume=True)


class Constant:
    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array([0.1 * len(set(y)) for y in responses])

    def describe(self):
        return {}


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_the_result_is_a_reference_to_train_from(algorithm, prompter, tmp_path):
    """Before the first update the policy is the reference: KL 0, though both are far from the base."""
    tuned = sft(prompter, PAIRS, SHORT, tmp_path / "sft").prompter
    settings = TrainSettings(
        algorithm=algorithm, iterations=1, prompts=2, samples=16, epochs=1, max_tokens=8, learning_rate=1e-3
    )
    prompts = ["abcd", "bbca"]
    trained = train(tuned, Environment(Constant(), None), prompts, settings, tmp_path / "rl", progress=False)
    kl = {"ppo": "ppo/kl_k1", "rloo": "kl"}[algorithm]
    assert abs(trained.metrics[0][kl]) < 1e-5
    # Mutant: the base as the reference.
    rewrites = tuned.rewrites(prompts, 16)
    flat = [(x, y) for x, row in zip(prompts, rewrites, strict=True) for y in row]
    xs, ys = [x for x, _ in flat], [y for _, y in flat]
    with trained.prompter.model.disable_adapter():
        reference = trained.prompter.log_probs(xs, ys)
    assert np.mean(reference - prompter.log_probs(xs, ys)) > 0.3
    assert tuned.model.config._name_or_path == str(tmp_path / "sft" / "prompter")
    # Its adapter is found again on top of the merged model.
    again = Prompter.from_pretrained(tmp_path / "rl" / "prompter")
    np.testing.assert_allclose(again.log_probs(xs, ys), trained.prompter.log_probs(xs, ys), rtol=1e-4)


def test_an_adapter_alone(prompter, tmp_path):
    """Unmerged it is the same policy up to rounding, in a folder of the adapter."""
    whole = sft(prompter, PAIRS, SHORT, tmp_path / "whole").prompter
    # Even of a model that a trainer has patched: mutant, the copy's forward remains the original's.
    add_fused_lm_head(prompter.model)
    part = sft(prompter, PAIRS, SHORT, tmp_path / "part", merge=False).prompter
    assert "forward" not in vars(part.model.get_base_model())
    assert not part.model.training
    xs, ys = [p.prompt for p in PAIRS], [p.rewrite for p in PAIRS]
    np.testing.assert_allclose(part.log_probs(xs, ys), whole.log_probs(xs, ys), rtol=1e-4)
    folder = tmp_path / "part" / "prompter"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    again = Prompter.from_pretrained(folder)
    np.testing.assert_allclose(again.log_probs(xs, ys), part.log_probs(xs, ys), rtol=1e-4)
    with pytest.raises(AlignProError, match=r"^prompter: it has an adapter already"):
        sft(part, PAIRS, SHORT, tmp_path / "more")
    with pytest.raises(AlignProError, match=r"^Prompter.save: whole is for a model without an adapter"):
        part.save(tmp_path / "x", whole=True)


def test_long_pairs_are_left_out_and_counted(prompter, tmp_path):
    long = [Rewrite(p.prompt, p.rewrite * 2) for p in PAIRS[:40]]
    deep = [Rewrite(p.prompt * 200, p.rewrite) for p in PAIRS[:10]]  # beyond what the model reads
    tuned = sft(prompter, [*PAIRS, *long, *deep], SHORT, tmp_path / "out")
    assert tuned.record["left_out"] == 50
    with pytest.raises(AlignProError, match=r"^pairs: of 40, 0 fit to learn from and 0 to measure on; give"):
        sft(prompter, long, SHORT, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_lost_loss_ends_training(prompter, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module._Trainer,
        "compute_loss",
        lambda self, model, inputs, **_: (
            sum(p.sum() for p in model.parameters() if p.requires_grad) * float("nan")
        ),
    )
    with pytest.raises(
        AlignProError, match=r"^training diverged at step 1: the loss is nan; lower learning_rate"
    ):
        sft(prompter, PAIRS, SHORT, tmp_path / "out")


def test_pairs_are_read_from_files(tmp_path):
    rows = [{"prompt": "a", "optimized_prompt": " b\n", "more": 1}, {"prompt": "c", "optimized_prompt": "d"}]
    want = [Rewrite("a", "b"), Rewrite("c", "d")]
    lines, whole = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    whole.write_text(json.dumps(rows, indent=1))
    assert read_rewrites(lines, rewrite="optimized_prompt") == read_rewrites(lines) == want
    assert read_rewrites(whole, rewrite="optimized_prompt") == read_rewrites(whole) == want
    with pytest.raises(AlignProError, match=r"field .rewrite. is missing .*it has .prompt., .opt"):
        read_rewrites(lines, rewrite="rewrite")
    for text, message in (
        (
            '{"prompt": "a", "improved": "b"}',
            r"^p\.jsonl, line 1: field 'rewrite' is missing or no text; .*it has 'prompt', 'imp",
        ),
        (
            '{"prompt": "a", "rewrite": "b"}\n{"prompt": 3, "rewrite": "b"}',
            r"^p\.jsonl, line 2: no text or conversation in column 'prompt'",
        ),
        ('{"prompt": " ", "rewrite": "b"}', r"line 1: field 'prompt' is missing or no text"),
        ('{"prompt": "a", "rewrite": " "}', r"line 1: field 'rewrite' is missing or no text"),
        ('{"prompt": "a"', r"line 1: is no JSON object .*; mend or remove it$"),
        ("3", r"line 1: is no JSON object"),
        ('[{"prompt": "a", "rewrite": "b"}, 3]', r"item 2: is no JSON object"),
        ("[3", r"no JSON list"),
        ("\n", r"^rewrites .*: it is empty"),
    ):
        lines.write_text(text)
        with pytest.raises(AlignProError, match=message):
            read_rewrites(lines)
    with pytest.raises(AlignProError, match=r"^rewrites .*none: cannot read it"):
        read_rewrites(tmp_path / "none")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": 0.0}, r"^learning_rate 0.0: give a positive, finite number$"),
        ({"lora_layers": 1.5}, r"^lora_layers 1.5: give a share of the layers, at most 1$"),
        ({"epochs": 0}, r"^epochs 0: give a whole number of at least 1$"),
        ({"epochs": 0.5}, r"^epochs 0.5: give a whole number of at least 1$"),
        ({"seed": -1}, r"^seed -1: give a whole number of at least 0$"),
        ({"batch_size": True}, r"^batch_size True: give a whole number"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(AlignProError, match=message):
        replace(SFTSettings(), **wrong)
