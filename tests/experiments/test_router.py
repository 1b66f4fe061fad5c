"""The router of the tasks' grid: against plain least squares, and what it picks where it pays to read."""

from types import SimpleNamespace

import numpy as np
import torch
from mutants import kills, mutated
from task_grid import router

from alignpro.llm.models.configure import tiny_model
from alignpro.llm.targets.tokens import prompt_ids


def teach(prompts=60, strategies=5, width=12, seed=0):
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((prompts, width))
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), rng.uniform(
        size=(prompts, strategies)
    )


def test_it_is_ridge_regression_of_what_both_make():
    """Against least squares on augmented rows, strategy by strategy; what is of x alone changes nothing."""
    known, rewards = teach()
    new, _ = teach(seed=1)

    def check(module) -> None:
        found = module.taught(known, rewards, 0.7).predict(new)
        both = rewards - rewards.mean(0) - rewards.mean(1)[:, None] + rewards.mean()
        standard = [(of - known.mean(0)) / known.std(0) for of in (known, new)]
        seen, asked = (of / np.sqrt((of**2).sum(1))[:, None] for of in standard)
        rows = np.concatenate([seen, np.sqrt(0.7) * np.eye(12)])
        plain, *_ = np.linalg.lstsq(rows, np.concatenate([both, np.zeros((12, 5))]), rcond=None)
        np.testing.assert_allclose(found, rewards.mean(0) + asked @ plain, rtol=0, atol=1e-12)
        lifted = rewards + np.arange(60)[:, None]
        assert (module.taught(known, lifted, 0.7).pick(new) == found.argmax(1)).all()

    check(router)
    kills(check, mutated(router, "+ ridge * np.eye", "+ 2 * ridge * np.eye"))
    kills(check, mutated(router, "_unit((embeddings - self.centre) / self.scale)", "_unit(embeddings)"))
    kills(check, mutated(router, " - rewards.mean(1, keepdims=True) + mean.mean()", ""))


def two_kinds(prompts=120, noise=0.2, gain=0.3, seed=0):
    """Half of the prompts want strategy 1, the others strategy 2, and the embedding tells which."""
    embeddings, rewards = teach(prompts, seed=seed)
    kind = embeddings[:, 0] > 0
    rng = np.random.default_rng([seed, 1])
    rewards = 0.4 + noise * rng.standard_normal(rewards.shape)
    rewards[:, 1] += gain * kind
    rewards[:, 2] += gain * ~kind
    return embeddings, rewards, kind


def test_it_reads_where_there_is_something_to_read():
    embeddings, rewards, _ = two_kinds()
    new, _, kind = two_kinds(seed=5)

    def check(module) -> None:
        other = np.random.default_rng(3).standard_normal(embeddings.shape)  # says nothing of the kind
        name, found = module.fit({"other": other, "own": embeddings}, rewards)
        assert name == "own"
        assert np.isfinite(found.ridge)
        assert (found.pick(new) == np.where(kind, 1, 2)).mean() > 0.8

    check(router)
    kills(check, mutated(router, "read @ self.known.T @ self.weights", "0 * read[:, :1]"))
    kills(check, mutated(router, "earned(embeddings[one[0]]", "earned(embeddings['other']"))


def test_what_it_earns_is_on_prompts_that_did_not_teach_it():
    """Noise alone, in many dimensions: on prompts left out a router earns what any instruction does, within
    4.5 standard errors (a false alarm of 7e-6)."""
    embeddings, _ = teach(800, width=300)
    rewards = 0.4 + 0.2 * np.random.default_rng(2).standard_normal((800, 5))

    def check(module) -> None:
        found = module.earned(embeddings, rewards, 0.3) - 0.4
        assert abs(found.mean()) < 4.5 * found.std() / np.sqrt(len(found))

    check(router)
    kills(
        check,
        mutated(
            router, "taught(embeddings[known], rewards[known], ridge)", "taught(embeddings, rewards, ridge)"
        ),
    )
    _, fixed = router.fit({"own": embeddings}, rewards, (np.inf,))
    assert fixed.pick(embeddings[:5]).tolist() == [int(rewards.mean(0).argmax())] * 5


def test_what_prompts_are_read_by():
    """Against a plain forward pass. Mutant: the first token's state, which is the same for all."""
    model, tokenizer = tiny_model(seed=0)
    prompts = ["abc", "a", "hed"]

    def check(module) -> None:
        module.load_model = lambda name: (model, tokenizer)
        module.Embedder = lambda: SimpleNamespace(embed=lambda texts: np.ones((len(texts), 3)))
        found = module.embeddings(prompts, "tiny")
        assert found["MiniLM"].shape == (3, 3)
        for x, row in zip(prompts, found["tiny's middle layer"], strict=True):
            states = model(torch.tensor([prompt_ids(tokenizer, x)]), output_hidden_states=True).hidden_states
            middle = states[1][0].detach().double().numpy()  # of three: embeddings and two layers
            np.testing.assert_allclose(
                row, np.concatenate([middle[-1], middle.mean(0)]), rtol=1e-5, atol=1e-6
            )

    check(mutated(router, "middle[-1], middle.mean(0)", "middle[-1], middle.mean(0)"))
    kills(check, mutated(router, "middle[-1]", "middle[0]"))
