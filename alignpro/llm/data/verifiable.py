"""The packaged prompts whose instructions code can check, written for this project and under its licence."""

from pathlib import Path

import numpy as np

from alignpro.files import read_json_lines
from alignpro.llm.models.prompt import Prompt


def verifiable(seed: int = 0) -> list[str]:
    """Read 64 prompts with one to three instructions each, in an order fixed by `seed`.

    They come with the columns of IFEval: `instruction_id_list` and `kwargs`, which the reward of the same
    name reads.
    """
    rows = read_json_lines(Path(__file__).with_suffix(".jsonl"))
    order = np.random.default_rng(seed).permutation(len(rows))
    names = ("instruction_id_list", "kwargs")
    return [Prompt(rows[i]["prompt"], columns={name: rows[i][name] for name in names}) for i in order]
