"""The router: against plain least squares, and what it picks where it pays to read."""

import numpy as np
import pytest
from mutants import kills, mutated

from alignpro.errors import AlignProError
from alignpro.estimation import routing


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

    check(routing)
    kills(check, mutated(routing, "+ ridge * np.eye", "+ 2 * ridge * np.eye"))
    kills(check, mutated(routing, "_unit((embeddings - self.centre) / self.scale)", "_unit(embeddings)"))
    kills(check, mutated(routing, " - rewards.mean(1, keepdims=True) + mean.mean()", ""))


def test_its_rank_is_reduced_by_projection_on_what_it_predicts():
    """Against the eigenvectors of the predictions' second moments; of full rank nothing is lost."""
    known, rewards = teach()
    new, _ = teach(seed=1)
    whole = routing.taught(known, rewards, 0.7)

    def check(module) -> None:
        fitted = whole.predict(known) - whole.mean
        _, vectors = np.linalg.eigh(fitted.T @ fitted)  # the largest last
        for rank in (1, 2):
            axes = vectors[:, -rank:]
            found = module.taught(known, rewards, 0.7, rank)
            expected = whole.mean + (whole.predict(new) - whole.mean) @ axes @ axes.T
            np.testing.assert_allclose(found.predict(new), expected, rtol=0, atol=1e-12)
            assert np.linalg.matrix_rank(found.weights) == found.rank == rank
        full = module.taught(known, rewards, 0.7, 5)
        np.testing.assert_allclose(full.weights, whole.weights, rtol=0, atol=1e-12)

    check(routing)
    kills(check, mutated(routing, "np.linalg.svd(known @ weights,", "np.linalg.svd(both,"))
    kills(check, mutated(routing, "[2][:rank]", "[2][: rank + 1]"))


def test_one_way_of_differing_is_read_through_the_noise_of_many_strategies():
    """Of 20 tables of 28 strategies, all of which want more or less of one direction: reduced rank loses less
    in 16 or more than full rank does (by chance: 0.6%), with the ridge that each of them earns most with."""

    def lost(seed: int, rank: int | None) -> float:
        rng = np.random.default_rng(seed)
        known, new = rng.standard_normal((2, 60, 40))
        wants = 0.1 * rng.standard_normal(28)
        rewards = np.outer(known[:, 0], wants) + 0.2 * rng.standard_normal((60, 28))
        truth = np.outer(new[:, 0], wants)
        rows = np.arange(60)
        picks = [routing.taught(known, rewards, ridge, rank).pick(new) for ridge in routing.RIDGES]
        return min(float((truth.max(1) - truth[rows, pick]).mean()) for pick in picks)

    assert sum(lost(seed, 1) < lost(seed, None) for seed in range(20)) >= 16


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

    check(routing)
    kills(check, mutated(routing, " @ self.weights", " @ (0 * self.weights)"))
    kills(check, mutated(routing, "best = next(iter(rows)), max(", "best = next(iter(rows)), min("))


def test_what_it_earns_is_on_prompts_that_did_not_teach_it():
    """Noise alone, in many dimensions: on prompts left out a router earns what any instruction does, within
    4.5 standard errors (a false alarm of 7e-6)."""
    embeddings, _ = teach(800, width=300)
    rewards = 0.4 + 0.2 * np.random.default_rng(2).standard_normal((800, 5))

    def check(module) -> None:
        found = module.earned(embeddings, rewards, 0.3) - 0.4
        assert abs(found.mean()) < 4.5 * found.std() / np.sqrt(len(found))

    check(routing)
    kills(
        check,
        mutated(
            routing,
            "taught(embeddings[known], rewards[known], ridge, rank)",
            "taught(embeddings, rewards, ridge, rank)",
        ),
    )
    fixed = routing.fit(embeddings, rewards, (np.inf,))
    assert fixed.pick(embeddings[:5]).tolist() == [int(rewards.mean(0).argmax())] * 5


def test_noise_is_seldom_read():
    """One strategy is best for all by a quarter of the noise: of tables 30% are read, of which the best ridge
    and rank alone would read 49% (of 100 each; of these 50, 19 and 29). Mutant: that."""

    def check(module) -> None:
        read = 0
        for seed in range(50):
            embeddings, _ = teach(40, seed=seed)
            rewards = 0.5 + 0.2 * np.random.default_rng([seed, 9]).standard_normal((40, 5))
            rewards[:, 1] += 0.05
            read += np.isfinite(module.fit(embeddings, rewards).ridge)
        assert read <= 24

    check(routing)
    kills(check, mutated(routing, "if gain.mean() <= gain.std(ddof=1) / np.sqrt(len(gain)):", "if False:"))


def test_choices_for_prompts_left_out_know_nothing_of_them():
    """A strategy that is best on one prompt alone is not chosen for it. Mutant: all prompts are known."""
    rewards = np.full((20, 3), 0.5)
    rewards[:, 1] = 0.6
    rewards[np.arange(20), 2] = 0.55
    rewards[4, 2] = 1.0 + 20 * 0.05  # alone it makes the third the best on average
    embeddings, _ = teach(20)

    def check(module) -> None:
        for choose in (module.fixed(rewards), module.routed(np.zeros_like(embeddings), rewards)):
            assert module.left_out(rewards, choose)[4] == 0.6

    check(routing)
    kills(check, mutated(routing, "rewards[known].mean(0).argmax()", "rewards.mean(0).argmax()"))
    kills(
        check,
        mutated(routing, "fit(embeddings[known], rewards[known]).pick", "fit(embeddings, rewards).pick"),
    )


@pytest.mark.parametrize(
    ("embeddings", "rewards", "said"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), r"embeddings \[3, 2\] and rewards \[4, 2\]"),
        (np.zeros(3), np.zeros((3, 2)), "give"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "give"),
        (np.full((3, 2), np.nan), np.zeros((3, 2)), "not finite"),
    ],
)
def test_tables_that_do_not_do(embeddings, rewards, said):
    with pytest.raises(AlignProError, match=said):
        routing.fit(embeddings, rewards)


def test_embeddings_of_another_model_are_refused():
    found = routing.taught(*teach(), 1.0)
    for other in (np.zeros((3, 11)), np.zeros(12)):
        with pytest.raises(AlignProError, match=r"the router reads \[N, 12\]"):
            found.pick(other)
