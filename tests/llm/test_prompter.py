"""The two ways of making x′ from a prompter's tokens, rewriting and appending, and back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignpro.errors import AlignProError
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.policies.prompter import TEMPLATES, Prompter, Template

BARE = Template(system="", examples=(), request="", opening=">", space="")
APPEND = replace(BARE, append=True)
MODEL, TOKENIZER = tiny_model(seed=3, vocab="abc >")
WORDS = st.text("abc", min_size=1, max_size=5)


@given(x=WORDS, said=WORDS | st.just(""))
def test_what_is_said_and_what_it_makes_of_x_are_inverse(x, said):
    for template, rewrite in ((BARE, said or "a"), (APPEND, f"{x} {said}".strip())):
        ids = template.rewrite_ids(TOKENIZER, x, rewrite)
        assert ids[-1] == TOKENIZER.eos_token_id
        assert template.rewrite(TOKENIZER, x, ids) == rewrite
    if said:
        # Mutant: x itself said again by a prompter that appends.
        assert APPEND.rewrite(TOKENIZER, x, BARE.rewrite_ids(TOKENIZER, x, f"{x} {said}")) != f"{x} {said}"
    assert APPEND.rewrite(TOKENIZER, x, (TOKENIZER.eos_token_id,)) == x


def test_probabilities_are_of_what_is_said():
    """log ρ(x b | x) of a prompter that appends is that of saying b: here from the model, token by token."""
    prompter = Prompter(MODEL, TOKENIZER, APPEND)
    got = prompter.log_probs(["ab", "ab"], ["ab", "ab ca"])
    start = list(APPEND.prompt_ids(TOKENIZER, "ab"))
    for value, said in zip(got, ("", "ca"), strict=True):
        ids = [*TOKENIZER(said, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
        with torch.no_grad():
            logits = MODEL(torch.tensor([start + ids])).logits[0].double().log_softmax(-1)
        want = sum(float(logits[len(start) - 1 + i, t]) for i, t in enumerate(ids))
        assert value == pytest.approx(want, rel=1e-5)
    assert not np.isclose(*Prompter(MODEL, TOKENIZER, BARE).log_probs(["ab"], ["ab ca"]), got[1])


def test_rewrites_keep_x():
    rows = Prompter(MODEL, TOKENIZER, APPEND, max_tokens=3).rewrites(["ab", "c"], 8, seed=1)
    assert all(y == x or y.startswith(x + " ") for x, row in zip(("ab", "c"), rows, strict=True) for y in row)
    assert len(set(rows[0])) > 1


def test_mistakes_are_named(tmp_path):
    with pytest.raises(
        AlignProError, match=r"^rewrite 'cab': must begin with 'ab', since the template appends"
    ):
        APPEND.rewrite_ids(TOKENIZER, "ab", "cab")
    with pytest.raises(AlignProError, match=r"^template shout: choose from rewrite, append"):
        Prompter.from_pretrained("smollm2-135m-instruct", template="shout")
    assert {name for name, template in TEMPLATES.items() if template.append} == {"append"}
