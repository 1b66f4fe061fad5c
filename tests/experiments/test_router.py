"""The router of the tasks' grid: against plain least squares, and what it picks where it pays to read."""

import numpy as np
from mutants import kills, mutated
from task_grid import router


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
        rows = np.concatenate([known, np.sqrt(0.7) * np.eye(12)])
        plain, *_ = np.linalg.lstsq(rows, np.concatenate([both, np.zeros((12, 5))]), rcond=None)
        np.testing.assert_allclose(found, rewards.mean(0) + new @ plain, rtol=0, atol=1e-12)
        lifted = rewards + np.arange(60)[:, None]
        assert (module.taught(known, lifted, 0.7).pick(new) == found.argmax(1)).all()

    check(router)
    kills(check, mutated(router, "kernel + ridge *", "kernel + 2 * ridge *"))
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
        found = module.fit(embeddings, rewards)
        assert np.isfinite(found.ridge)
        assert (found.pick(new) == np.where(kind, 1, 2)).mean() > 0.8

    check(router)
    kills(check, mutated(router, "embeddings @ self.known.T @ self.weights", "0 * embeddings[:, :1]"))


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
    fixed = router.fit(embeddings, rewards, (np.inf,))
    assert fixed.pick(embeddings[:5]).tolist() == [int(rewards.mean(0).argmax())] * 5
