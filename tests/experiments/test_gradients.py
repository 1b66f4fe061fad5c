"""What an adapter's gradients see of the prompt: by steps that are taken, and means that are known."""

import gradients
import numpy as np
import pytest
import torch
from mutants import kills, mutated
from peft import get_peft_model
from task_grid.kinds import WHO

from alignpro.errors import AlignProError
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.policies.prompter import Prompter

SAID = "Be brief."
PROMPTS = ("Name a bee.", "Make a cake.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers that says letters."""
    folder = tmp_path_factory.mktemp("gradients")
    model, tokenizer = tiny_model(1, " .,?'" + "".join(sorted({*"".join([*PROMPTS, SAID])} - {*" ."})))
    model.config.max_position_embeddings = 4096  # one character a token
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def test_a_step_changes_what_the_products_of_gradients_say(folder):
    """log ρ after a step along g(x), on x and on another prompt, against g(x)·g(x′) to first order."""
    found = gradients.gradients(Prompter.from_pretrained(folder, template="append"), PROMPTS, SAID)
    prompter, step = Prompter.from_pretrained(folder, template="append"), 1e-3
    torch.manual_seed(0)
    model = prompter.model = get_peft_model(
        prompter.model, adapter_config(prompter.model, gradients.RANK, 1.0)
    )
    assert found[0].keys() == {name for name, _ in model.named_parameters() if "lora_B" in name}

    def moved(by):
        for name, weight in model.named_parameters():
            if name in found[0]:
                weight.data += by * found[0][name]
        return prompter.log_probs(PROMPTS, [with_instruction(x, SAID) for x in PROMPTS])

    size = sum(float((g**2).sum()) for g in found[0].values())
    above = moved(step / size**0.5)
    below = moved(-2 * step / size**0.5)
    slopes = (above - below) / 2 / step * size**0.5
    products = [sum(float((found[0][k] * other[k]).sum()) for k in other) for other in found]
    # Central differences: the cubic term and float32's rounding, both far below a hundredth here.
    np.testing.assert_allclose(slopes, products, rtol=1e-2)


def drawn(rng, count):
    """Gradients of prompts of two kinds, whose means are a shared 1 and a kind's ±0.1, in 40 dimensions."""
    kinds = np.repeat([0, 1], count)
    rows = rng.normal(size=(2 * count, 40)) * 0.5
    rows[:, 0] += 1.0
    rows[:, 1] += np.where(kinds == 1, 0.1, -0.1)
    return rows @ rows.T, kinds


def test_the_energy_of_a_kind_is_not_that_of_the_draw():
    """Means of 400 draws of 6 prompts a kind, against the truth, 4 standard errors either way: a false alarm
    in 16,000 for each of two. Not taking out the draw is caught."""

    def unbiased(module):
        rng = np.random.default_rng(0)
        found = [module.energies(*drawn(rng, 6), False) for _ in range(400)]
        for key, truth in {"shared": 4.0, "kind": 0.04}.items():
            values = np.array([one[key] for one in found])
            assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / 20

    unbiased(gradients)
    kills(unbiased, mutated(gradients, "drawn += (np.trace", "drawn += 0 * (np.trace"))


def test_pairs_of_one_request_need_no_correction():
    """Where every request is of both kinds, the draw moves both means alike, and the difference is exact."""
    rng = np.random.default_rng(1)
    each = rng.normal(size=(5, 40))
    rows = np.concatenate([each, each])
    rows[:5, 1] -= 0.1
    rows[5:, 1] += 0.1
    kinds = np.repeat([0, 1], 5)
    assert gradients.energies(rows @ rows.T, kinds, True)["kind"] == pytest.approx(0.04, rel=1e-9)


def test_prompts_of_each_kind():
    prompts, kinds, kind = gradients.chosen(3, True)
    assert [x.startswith(WHO[0]) for x in prompts] == [k == 1 for k in kinds] == [True, False] * 3
    prompts, kinds, kind = gradients.chosen(4, False)
    assert list(np.bincount(kinds)) == [4, 4]
    assert all(bool(kind.holds(x)) == bool(k) for x, k in zip(prompts, kinds, strict=True))
    with pytest.raises(AlignProError, match=r"--prompts 9999: there are \d+ of a kind"):
        gradients.chosen(9999, False)
