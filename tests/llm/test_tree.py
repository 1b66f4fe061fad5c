"""Prefix trees: one masked pass against token-by-token scoring of every leaf."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignpro.errors import AlignProError
from alignpro.llm.models import forward
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.policies.tree import PrefixTree, TreeTask, leaf_probabilities, tree_scores, tree_states

END = 1
MODEL, TOKENIZER = tiny_model(seed=3, vocab="abcdef")
EPS = float(torch.finfo(torch.float32).eps)


def letters(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text).input_ids)


ended = st.lists(st.integers(3, 6), max_size=5).map(lambda s: (*s, END))
trees = st.lists(ended, min_size=1, max_size=12, unique=True).map(lambda s: PrefixTree(tuple(s)))
prompts = st.lists(st.integers(3, 8), min_size=1, max_size=7).map(tuple)


def brute_force(prompt, sequences):
    """log-probability of each leaf: one forward pass per prefix, renormalised over the prefix's children."""
    children: dict[tuple, set] = {}
    for s in sequences:
        for t in range(len(s)):
            children.setdefault(s[:t], set()).add(s[t])
    out = []
    for s in sequences:
        total = torch.zeros(())
        for t in range(len(s)):
            logits = MODEL(torch.tensor([[*prompt, *s[:t]]])).logits[0, -1]
            total = total + logits[s[t]] - torch.logsumexp(logits[sorted(children[s[:t]])], 0)
        out.append(total)
    return torch.stack(out)


def tolerance(log_probs) -> float:
    """Float32 rounding of logits of size ~10 over at most 6 steps."""
    return 6 * 100 * EPS * (1 + float(log_probs.abs().max()))


@settings(max_examples=25, deadline=None)
@given(tree=trees, prompt=prompts)
def test_leaves_are_the_models_own_renormalised_conditionals(tree, prompt):
    with torch.no_grad():
        expected = brute_force(prompt, tree.sequences)
        got = tree_scores(MODEL, [prompt], [tree])[0].leaf_log_probs
    assert torch.allclose(got, expected, rtol=0, atol=tolerance(expected))
    assert float(got.double().exp().sum()) == pytest.approx(1, abs=len(expected) * tolerance(expected))


def test_the_tree_mask_matters(monkeypatch):
    """Mutant: let every node see all before it, as an ordinary causal mask would."""
    tree = PrefixTree(tuple((*s, END) for s in itertools.product((3, 4), repeat=3)))
    with torch.no_grad():
        expected = brute_force((5, 6), tree.sequences)
        monkeypatch.setattr(forward.Forest, "sees", lambda f: np.tri(len(f.tokens), dtype=bool))
        mutant = tree_scores(MODEL, [(5, 6)], [tree])[0].leaf_log_probs
    assert (mutant - expected).abs().max() > 100 * tolerance(expected)


@settings(max_examples=10, deadline=None)
@given(rows=st.lists(st.tuples(prompts, trees), min_size=2, max_size=4))
def test_batching_and_padding_change_nothing(rows):
    together = leaf_probabilities(MODEL, [p for p, _ in rows], [t for _, t in rows])
    apart = leaf_probabilities(MODEL, [p for p, _ in rows], [t for _, t in rows], tokens_per_pass=1)
    for a, b in zip(together, apart, strict=True):
        assert a.sum() == pytest.approx(1, abs=1e-15 * len(a))
        np.testing.assert_allclose(a, b, rtol=2000 * EPS)


def test_gradients_agree_with_token_by_token_scoring():
    tree = PrefixTree(((3, END), (3, 4, END), (4, 4, END), (4, 5, END), (END,)))
    weights = torch.tensor([0.3, -1.0, 0.5, 2.0, -0.7])
    parameter = MODEL.model.layers[0].self_attn.q_proj.weight
    grads = []
    for scores in (
        brute_force((5, 3), tree.sequences),
        tree_scores(MODEL, [(5, 3)], [tree])[0].leaf_log_probs,
    ):
        MODEL.zero_grad()
        (weights * scores).sum().backward()
        grads.append(parameter.grad.clone())
    scale = grads[0].abs().max()
    assert scale > 1e-4
    assert torch.allclose(*grads, rtol=0, atol=float(1000 * EPS * scale))


@settings(max_examples=50, deadline=None)
@given(tree=trees)
def test_layout(tree):
    layout = tree.layout
    assert len(set(layout.actions)) == len(tree.sequences)  # an action determines its leaf
    for action, sequence, edges in zip(layout.actions, tree.sequences, layout.leaf_edges, strict=True):
        assert sequence[: len(action)] == action
        assert all(layout.edge_token[e] == t for t, e in zip(action, edges, strict=False) if e >= 0)
        if len(tree.sequences) > 1:
            assert edges[len(action) - 1] >= 0  # it ends with a decision
    assert (layout.parents < np.arange(len(layout.parents))).all()
    # Each decision has two children or more, so E edges in G groups settle exactly E − G + 1 leaves.
    groups = len(set(layout.edge_group.tolist()))
    assert len(layout.edge_state) - groups + 1 == len(tree.sequences)


def test_steps_add_up_to_leaves_and_entropies_to_those_of_the_policy():
    tree = PrefixTree(((3, END), (3, 4, END), (4, 4, END), (4, 5, 5, END), (4, 5, 6, END)))
    with torch.no_grad():
        scores = tree_scores(MODEL, [(4, 4)], [tree])[0]
    leaves = torch.arange(5)
    steps = scores.step_log_probs(leaves, 6)
    assert torch.allclose(steps.sum(1), scores.leaf_log_probs, atol=10 * EPS)
    # Chain rule: H(leaf) = E Σ_t H(decision t).
    p = scores.leaf_log_probs.exp()
    chain = (p[:, None] * scores.step_entropies(leaves, 6)).sum()
    assert float(chain) == pytest.approx(float(-(p * scores.leaf_log_probs).sum()), rel=50 * EPS)


def test_states_are_the_models_hidden_states():
    tree = PrefixTree(((3, 4, END), (3, 5, END), (6, END)))
    with torch.no_grad():
        states = tree_states(MODEL, [(5, 6)], [tree.layout])[0]
        plain = MODEL.model(torch.tensor([[5, 6, 3]])).last_hidden_state[0]
    assert torch.allclose(states, plain[1:], atol=100 * EPS * float(plain.abs().max()))


@pytest.mark.parametrize(
    ("sequences", "words"),
    [((), "no sequences"), (((3,), ()), "empty"), (((3,), (3, 4)), "prefix"), (((3, 4), (3, 4)), "prefix")],
)
def test_bad_sequences_are_named(sequences, words):
    with pytest.raises(AlignProError, match=words):
        PrefixTree(sequences)


def test_caps_and_scales_of_logits_are_the_models_own():
    """As Gemma 2 caps its logits and Cohere scales them."""
    model, _ = tiny_model(seed=0)
    with torch.no_grad():
        plain = model(torch.tensor([[3]])).logits[0, -1, 3:5]
    model.config.final_logit_softcapping, model.config.logit_scale = 1.5, 0.5
    scored = tree_scores(model, [(3,)], [PrefixTree(((3,), (4,)))])[0].leaf_log_probs
    capped = torch.log_softmax(1.5 * torch.tanh(0.5 * plain / 1.5), 0)
    assert torch.allclose(scored, capped, rtol=0, atol=1e-5)
    assert (torch.log_softmax(plain, 0) - capped).abs().max() > 0.01


def test_prompts_that_are_the_same_tokens_are_refused():
    tree = PrefixTree(((3, END), (4, END)))
    same = letters("ax"), letters("ay")  # x and y are both unknown to the vocabulary
    with pytest.raises(AlignProError, match="'ax' and 'ay'"):
        TreeTask(("ax", "ay"), same, (tree, tree), lambda x, leaves: [0.0] * len(leaves))
