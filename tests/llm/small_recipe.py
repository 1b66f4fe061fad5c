"""The packaged recipe on a tiny model, with a few pairs."""

from alignpro.llm.data.bank import INSTRUCTIONS
from alignpro.llm.data.own import Rewrite
from alignpro.llm.data.split import SPLITS, split_of

NAME = "instructions-sft"
TINY = {
    "learning_rate": 1e-2,
    "epochs": 1,
    "batch_size": 8,
    "lora_layers": 0.5,
    "max_tokens": 60,
    "save_every": 2,
}


def few_pairs(**_):
    """Thirty of the bank's instructions on ten prompts."""
    found = [
        Rewrite(f"Tell me of {i}.", f"Tell me of {i}. {INSTRUCTIONS[3 * i + j]}")
        for i in range(10)
        for j in range(3)
    ]
    assert {split_of(pair.prompt) for pair in found} == {*SPLITS}
    return found
