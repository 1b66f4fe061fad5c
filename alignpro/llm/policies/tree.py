"""Language models restricted to a prefix tree: exactly enumerable policies.

A finite, prefix-free set of token sequences is a tree. Renormalising the model's next-token distribution over
the children of each node gives a true policy: the probabilities of the leaves sum to one. A node with one
child is *forced*: its step has probability one. Tokens after a path's last decision never reach the model.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignpro.errors import AlignProError
from alignpro.llm.models.forward import Forest, Head, passes, states
from alignpro.llm.models.policy import Ids


@dataclass(frozen=True)
class PrefixTree:
    """The tree of Y distinct token sequences, none empty or a prefix of another, in the leaves' order."""

    sequences: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequences", tuple(tuple(int(t) for t in s) for s in self.sequences))
        if not self.sequences:
            raise AlignProError("prefix tree: no sequences; give at least one")
        ordered = sorted(range(len(self.sequences)), key=lambda i: self.sequences[i])
        if not self.sequences[ordered[0]]:
            raise AlignProError(
                f"prefix tree: sequence {ordered[0]} is empty; every sequence needs at least one token"
            )
        for i, j in itertools.pairwise(ordered):  # a prefix sorts right before its extensions
            if self.sequences[j][: len(self.sequences[i])] == self.sequences[i]:
                raise AlignProError(
                    f"prefix tree: sequence {i} is a prefix of sequence {j}; end each with an end token"
                )

    @cached_property
    def layout(self) -> "TreeLayout":
        """The tree as arrays, for one forward pass."""
        token, parent, index = [-1], [-1], {}  # node 0 is the root, parents precede children
        paths = []
        for sequence in self.sequences:
            node, path = 0, []
            for t in sequence:
                if (node, t) not in index:
                    index[node, t] = len(token)
                    token.append(t)
                    parent.append(node)
                node = index[node, t]
                path.append(node)
            paths.append(path)
        children: list[list[int]] = [[] for _ in token]
        for node in range(1, len(token)):
            children[parent[node]].append(node)
        kept = np.zeros(len(token), bool)
        for node in range(len(token) - 1, 0, -1):
            kept[node] = len(children[node]) > 1 or any(kept[c] for c in children[node])
        nodes = [n for n in range(1, len(token)) if kept[n]]
        slot = {0: -1} | {n: i for i, n in enumerate(nodes)}  # -1 is the last token of the prompt

        groups = [n for n in range(len(token)) if len(children[n]) > 1]
        taken = [(g, node, child) for g, node in enumerate(groups) for child in children[node]]
        edge_of = {child: e for e, (_, _, child) in enumerate(taken)}
        edges = [[edge_of.get(n, -1) for n in path] for path in paths]
        # The last decision settles the leaf: at least one token is kept, so that no action is empty.
        lengths = [max((t + 1 for t, e in enumerate(row) if e >= 0), default=1) for row in edges]
        width = max(lengths)
        leaf_edges = np.full((len(paths), width), -1)
        leaf_states = np.full((len(paths), width), -1)
        for i, (row, n) in enumerate(zip(edges, lengths, strict=True)):
            leaf_edges[i, :n] = row[:n]
            leaf_states[i, 1:n] = [slot[node] for node in paths[i][: n - 1]]
        return TreeLayout(
            tokens=np.array([token[n] for n in nodes], int),
            parents=np.array([slot[parent[n]] for n in nodes], int),
            edge_state=np.array([slot[node] for _, node, _ in taken], int),
            edge_token=np.array([token[child] for _, _, child in taken], int),
            edge_group=np.array([g for g, _, _ in taken], int),
            leaf_edges=leaf_edges,
            leaf_states=leaf_states,
            actions=tuple(s[:n] for s, n in zip(self.sequences, lengths, strict=True)),
        )


@dataclass(frozen=True)
class TreeLayout:
    """A prefix tree as arrays.

    A *state* is the prompt's last token (index −1) or one of the S kept nodes; an *edge* is a choice at a
    state with two children or more.

    Attributes:
        tokens: [S] token of each kept node (an ancestor of a decision, or one itself).
        parents: [S] index of its parent state; −1 is the end of the prompt. Parents come first.
        edge_state: [E] the state that an edge leaves.
        edge_token: [E] its token.
        edge_group: [E] its decision: edges with one group are renormalised together.
        leaf_edges: [Y, T] the edge taken by leaf y at step t; −1 where the step is forced or past the end.
        leaf_states: [Y, T] the state before step t; −1 is the end of the prompt (also past the end).
        actions: for each leaf, its tokens up to and including its last decision.
    """

    tokens: np.ndarray
    parents: np.ndarray
    edge_state: np.ndarray
    edge_token: np.ndarray
    edge_group: np.ndarray
    leaf_edges: np.ndarray
    leaf_states: np.ndarray
    actions: tuple[tuple[int, ...], ...]

    @staticmethod
    def fit(table: np.ndarray, steps: int) -> np.ndarray:
        """Cut a table [Y, T] to [Y, steps], or fill it with −1."""
        missing = max(0, steps - table.shape[1])
        return np.pad(table[:, :steps], ((0, 0), (0, missing)), constant_values=-1)


@dataclass(frozen=True)
class TreeScores:
    """The exact policy of a language model on one prefix tree.

    Attributes:
        edge_log_probs: [E] log-probabilities of the edges, in nats.
        leaf_log_probs: [Y] log-probabilities of the leaves, in nats.
        entropies: [G] entropy of each decision, in nats.
    """

    layout: TreeLayout
    edge_log_probs: Tensor
    leaf_log_probs: Tensor
    entropies: Tensor

    def step_log_probs(self, leaves: Tensor, steps: int) -> Tensor:
        """[B, steps] log-probability of each token of the leaves' actions; 0 where forced or past the end."""
        return self._per_step(self.edge_log_probs, self.layout.leaf_edges, leaves, steps)

    def step_entropies(self, leaves: Tensor, steps: int) -> Tensor:
        """[B, steps] entropy of the decision before each token, in nats; 0 where forced or past the end."""
        group = np.append(self.layout.edge_group, -1)[self.layout.leaf_edges]
        return self._per_step(self.entropies, group, leaves, steps)

    def probabilities(self) -> np.ndarray:
        """[Y] float64 leaf probabilities that sum to one."""
        p = np.exp(self.leaf_log_probs.double().cpu().numpy())
        return p / p.sum()  # removes the float32 rounding of the log-softmax, 1e-7 at most

    @staticmethod
    def _per_step(values: Tensor, index: np.ndarray, leaves: Tensor, steps: int) -> Tensor:
        table = torch.cat([values, values.new_zeros(1)])  # index −1 reads the zero
        return table[torch.as_tensor(TreeLayout.fit(index, steps), device=values.device)[leaves]]


def tree_states(model: Any, prompts: Sequence[Ids], layouts: Sequence[TreeLayout]) -> list[Tensor]:
    """Final hidden states at each tree's states, in one forward pass.

    Args:
        prompts: B prompts as token ids, none empty.

    Returns:
        B tensors [1 + S, H]: row 0 is the end of the prompt (state −1), row 1 + s is state s.
    """
    forests, wanted = [], []
    for prompt, layout in zip(prompts, layouts, strict=True):
        n, s = len(prompt), len(layout.tokens)
        parents = np.concatenate([np.arange(n) - 1, layout.parents + n])  # −1: the prompt's last token
        forests.append(Forest(np.concatenate([np.array(prompt, int), layout.tokens]), parents))
        wanted.append(np.arange(n - 1, n + s))
    return states(model, forests, wanted)


def tree_scores(model: Any, prompts: Sequence[Ids], trees: Sequence[PrefixTree]) -> list[TreeScores]:
    """The model's exact policies on B prefix trees, in one differentiable forward pass."""
    layouts = [tree.layout for tree in trees]
    head = Head.of(model)
    scores = []
    for hidden, layout in zip(tree_states(model, prompts, layouts), layouts, strict=True):
        if len(layout.edge_state) == 0:  # a single leaf: probability one
            zero = hidden.new_zeros(0, dtype=torch.float32)
            scores.append(TreeScores(layout, zero, zero.new_zeros(len(layout.leaf_edges)), zero))
            continue
        device = hidden.device
        group = torch.as_tensor(layout.edge_group, device=device)
        count = int(layout.edge_group[-1]) + 1
        state_of_group = torch.zeros(count, dtype=torch.long, device=device)
        state_of_group[group] = torch.as_tensor(layout.edge_state + 1, device=device)
        token = torch.as_tensor(layout.edge_token, device=device)
        logits = head.finish(head.module(hidden[state_of_group])[group, token].float())
        top = torch.full((count,), -torch.inf, device=device).scatter_reduce(
            0, group, logits.detach(), "amax"
        )
        total = torch.zeros(count, device=device).index_add(0, group, torch.exp(logits - top[group]))
        edge = logits - top[group] - torch.log(total)[group]
        entropies = torch.zeros(count, device=device).index_add(0, group, -edge.exp() * edge)
        table = torch.cat([edge, edge.new_zeros(1)])
        leaf = table[torch.as_tensor(layout.leaf_edges, device=device)].sum(1)
        scores.append(TreeScores(layout, edge, leaf, entropies))
    return scores


@torch.no_grad()
def leaf_probabilities(
    model: Any,
    prompts: Sequence[Ids],
    trees: Sequence[PrefixTree],
    *,
    tokens_per_pass: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """The exact leaf probabilities of B prefix trees, as float64 rows that sum to one.

    Args:
        tokens_per_pass: most padded tokens of one forward pass.
        progress: called with the number of rows just scored.
    """
    sizes = [len(p) + len(t.layout.tokens) for p, t in zip(prompts, trees, strict=True)]
    out: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for rows in passes(sizes, tokens_per_pass):
        scores = tree_scores(model, [prompts[i] for i in rows], [trees[i] for i in rows])
        for i, score in zip(rows, scores, strict=True):
            out[i] = score.probabilities()
        if progress:
            progress(len(rows))
    return out


@dataclass(frozen=True)
class TreeTask:
    """A prompter's environment on prefix trees.

    Attributes:
        prompts: X distinct texts, the rows' keys.
        prompt_ids: for each prompt, token ids that the prompter continues; no two are equal.
        trees: for each prompt, the prefix tree of its rewrites.
        reward: called with the number x of a prompt and some of its leaves, gives their rewards. Exact,
            R(x, x′), or a fresh draw r(x, y) with y ~ π_F(·|x′) from torch's global generator.
    """

    prompts: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    trees: tuple[PrefixTree, ...]
    reward: Callable[[int, Sequence[int]], Sequence[float]]

    def __post_init__(self) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for prompt, ids in zip(self.prompts, self.prompt_ids, strict=True):
            if ids in seen:
                raise AlignProError(
                    f"prompts {seen[ids]!r} and {prompt!r} are the same tokens to this prompter; drop one"
                )
            seen[ids] = prompt
