"""The mathematics of PPO against NumPy loops written from the formulas."""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import kills, mutated

from alignpro.llm.training import ppo
from alignpro.llm.training.ppo import (
    Critic,
    clipped_surrogate,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    leave_one_out,
    shaped_rewards,
    standard_error,
)

EPS = float(torch.finfo(torch.float64).eps)


@st.composite
def batches(draw):
    """(seed, mask [B, T]) with right-padded rows of at least one token."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    steps = max(lengths) + draw(st.integers(0, 2))
    mask = torch.tensor([[1.0] * n + [0.0] * (steps - n) for n in lengths], dtype=torch.float64)
    return draw(st.integers(0, 2**31)), mask


def normal(seed, mask, k):
    rng = np.random.default_rng([seed, k])
    return torch.tensor(rng.normal(size=mask.shape))


@settings(max_examples=50, deadline=None)
@given(batch=batches(), lam=st.floats(1e-3, 10))
def test_rewards_add_up_to_score_minus_lambda_log_ratio(batch, lam):
    seed, mask = batch
    logp, ref = normal(seed, mask, 0), normal(seed, mask, 1)
    score = normal(seed, mask, 2)[:, 0]
    rewards = shaped_rewards(score, logp, ref, mask, lam)
    log_ratio = ((logp - ref) * mask).sum(1)
    magnitude = (score.abs() + lam * ((logp.abs() + ref.abs()) * mask).sum(1)).max()
    assert torch.allclose(rewards.sum(1), score - lam * log_ratio, rtol=0, atol=float(20 * EPS * magnitude))
    assert ((rewards == 0) | (mask == 1)).all()
    # Mutant: the k3 estimate, which moves the optimum, gives other totals.
    k3 = ((ref - logp).exp() - (ref - logp) - 1) * mask
    assert not torch.allclose(score - lam * k3.sum(1), rewards.sum(1), rtol=0, atol=1e-9 * lam)


def gae_by_definition(rewards, values, lengths, gamma, lam):
    """A_t = Σ_l (γλ)^l (r_{t+l} + γ V_{t+l+1} − V_{t+l}), V = 0 after the last token."""
    out = np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        delta = [
            rewards[b, t] + gamma * (values[b, t + 1] if t + 1 < n else 0.0) - values[b, t] for t in range(n)
        ]
        for t in range(n):
            out[b, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
    return out


@settings(max_examples=50, deadline=None)
@given(batch=batches(), gamma=st.floats(0.5, 1), lam=st.floats(0, 1))
def test_generalized_advantages(batch, gamma, lam):
    seed, mask = batch
    rewards, values = normal(seed, mask, 0) * mask, normal(seed, mask, 1)
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    lengths = mask.sum(1).int().tolist()
    expected = gae_by_definition(rewards.numpy(), values.numpy(), lengths, gamma, lam)
    tolerance = 100 * EPS * float(1 + rewards.abs().sum() + values.abs().sum())
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(returns.numpy(), expected + (values * mask).numpy(), rtol=0, atol=tolerance)


def test_generalized_advantages_tell_gamma_from_lambda():
    """Mutants: γ and λ swapped; the value after the end not zero."""
    rewards = torch.tensor([[1.0, 2.0, 3.0]])
    values = torch.tensor([[0.5, -1.0, 2.0]])
    mask = torch.ones(1, 3)
    right, _ = generalized_advantages(rewards, values, mask, 0.9, 0.5)
    swapped, _ = generalized_advantages(rewards, values, mask, 0.5, 0.9)
    assert not torch.allclose(right, swapped)
    # γ = λ = 1: reward to go minus value.
    plain, _ = generalized_advantages(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(plain, torch.tensor([[6.0, 5.0, 3.0]]) - values)
    longer, _ = generalized_advantages(
        torch.cat([rewards, torch.full((1, 1), 9.0)], 1),
        torch.cat([values, torch.full((1, 1), 7.0)], 1),
        torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        0.9,
        0.5,
    )
    assert torch.allclose(longer[:, :3], right)
    assert longer[0, 3] == 0


@settings(max_examples=50, deadline=None)
@given(batch=batches(), clip=st.floats(0.05, 0.5))
def test_clipped_surrogate(batch, clip):
    seed, mask = batch
    old, advantages = normal(seed, mask, 0), normal(seed, mask, 1)
    new = (old + 0.5 * normal(seed, mask, 2)).requires_grad_()
    loss, share = clipped_surrogate(new, old, advantages, mask, clip)
    (gradient,) = torch.autograd.grad(loss, new)

    ratio = np.exp((new - old).detach().numpy())
    a, m = advantages.numpy(), mask.numpy()
    objective = np.minimum(ratio * a, np.clip(ratio, 1 - clip, 1 + clip) * a)
    tolerance = 50 * EPS * float((ratio * np.abs(a)).sum() + 1)
    assert float(loss) == pytest.approx(-(objective * m).sum() / len(m), abs=tolerance)
    dead = ((ratio > 1 + clip) & (a > 0)) | ((ratio < 1 - clip) & (a < 0))
    assert float(share) == pytest.approx((dead * m).sum() / m.sum(), abs=10 * EPS)
    expected = np.where(dead, 0.0, -ratio * a) * m / len(m)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=tolerance)


def test_surrogate_at_the_old_policy_is_the_policy_gradient_per_sequence():
    """Mutant: a mean over tokens weighs a long sequence's tokens less than a short one's."""
    logp = torch.zeros(2, 4, requires_grad=True)
    mask = torch.tensor([[1.0, 1, 1, 1], [1.0, 0, 0, 0]])
    loss, _ = clipped_surrogate(logp, torch.zeros(2, 4), torch.ones(2, 4), mask, 0.2)
    loss.backward()
    assert torch.equal(logp.grad, -mask / 2)  # not −mask/5


def test_value_loss():
    values, old = torch.tensor([[1.0, 5.0]]), torch.tensor([[0.0, 0.0]])
    returns, mask = torch.tensor([[2.0, 9.0]]), torch.tensor([[1.0, 0.0]])
    assert clipped_value_loss(values, old, returns, mask, None) == pytest.approx(0.5)
    # Clipped to 0.2: (0.2 − 2)² = 3.24 is the larger error.
    assert clipped_value_loss(values, old, returns, mask, 0.2) == pytest.approx(1.62)


def test_explained_variance():
    returns = torch.tensor([[1.0, 3.0, 5.0, 100.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)  # Var(2G) = 4 Var(G)


def test_critic_starts_at_the_mean_return_in_its_units():
    torch.manual_seed(0)
    critic = Critic(hidden_size=8, width=4)
    critic.calibrate(torch.tensor([100.0, 104.0]))
    critic.calibrate(torch.tensor([0.0, 1.0]))  # only the first batch counts
    assert torch.equal(critic(torch.randn(5, 3, 8)), torch.full((5, 3), 102.0))
    assert critic.scale == 2


def test_the_critic_learns_alike_in_any_unit_of_the_reward():
    """Mutant: a value loss that is not divided by the square of the critic's scale."""
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(4, 3, 8)), dtype=torch.float32)
    totals, mask = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.ones(4, 3)

    def gradients(unit, loss):
        torch.manual_seed(0)
        critic = Critic(hidden_size=8, width=4)
        torch.nn.init.normal_(critic.body[-1].weight)
        critic.calibrate(unit * totals)
        values = critic(features)
        returns = (unit * totals)[:, None].expand(4, 3)
        loss(critic, values, values.detach(), returns, mask, None).backward()
        return torch.cat([p.grad.flatten() for p in critic.parameters()])

    def check(loss):
        torch.testing.assert_close(gradients(1000.0, loss), gradients(1.0, loss), rtol=1e-3, atol=1e-5)

    check(Critic.loss)
    kills(check, lambda critic, *arguments: clipped_value_loss(*arguments))
    kills(check, lambda critic, *arguments: clipped_value_loss(*arguments) / critic.scale)


def test_the_mean_of_the_others_moves_no_gradient():
    """Over all groups of three rewrites out of four, with what their prompt adds: the gradient of E[reward].

    Mutants: the mean of all three, the rewrite itself among them, which takes a third off the gradient; the
    others' mean with two groups mixed up, which leaves what the prompts add.
    """
    logits = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64, requires_grad=True)
    p, reward = logits.softmax(0), torch.tensor([1.0, 0.0, 0.5, 0.2], dtype=torch.float64)
    exact = torch.autograd.grad((p * reward).sum(), logits, retain_graph=True)[0]

    def check(baseline):
        groups = torch.cartesian_prod(*[torch.arange(4)] * 3)  # [64, 3]
        chance = p[groups].prod(1).detach()
        hard = 7.0 * torch.arange(64.0, dtype=torch.float64)[:, None]
        totals = reward[groups] + hard
        advantages = (totals.flatten() - baseline(totals.flatten(), 3)).view(64, 3)
        assert float(advantages.abs().max()) <= 1 + 1e-12
        surrogate = (chance[:, None] * advantages * p.log()[groups]).sum() / 3
        found = torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
        assert torch.allclose(found, exact, rtol=0, atol=1e3 * EPS)

    check(leave_one_out)
    kills(check, lambda totals, group: totals.view(-1, group).mean(1).repeat_interleave(group))
    kills(check, lambda totals, group: leave_one_out(totals.roll(1), group))


def test_the_standard_error_is_that_of_the_mean_given_the_prompts():
    """Five standard errors of a variance from 20,000 batches of 3 prompts with 4 rewrites each."""
    batches, prompts, group = 20_000, 3, 4
    rng = np.random.default_rng(0)
    means, spreads = np.array([0.0, 5.0, -3.0])[:, None], np.array([1.0, 2.0, 0.5])[:, None]
    drawn = torch.tensor(means + spreads * rng.normal(size=(batches, prompts, group)))
    true = float(drawn.mean((1, 2)).var())

    def check(error):
        claimed = np.mean([float(error(batch.flatten(), group)) ** 2 for batch in drawn[:2000]])
        assert claimed == pytest.approx(true, rel=5 * math.sqrt(2 / batches) + 0.1)

    def within(values, group):
        return values.view(-1, group).var(1).mean()

    check(standard_error)
    kills(check, lambda values, group: (within(values, group) / group).sqrt())
    kills(check, lambda values, group: (within(values, group) / (len(values) * group)).sqrt())
    kills(check, lambda values, group: (within(values, group) / (len(values) * group**0.5)).sqrt())
    kills(check, lambda values, group: (within(values, group) / len(values) * group).sqrt())
    kills(check, lambda values, group: (within(values, group) / len(values) * group**0.5).sqrt())
    kills(check, lambda values, group: (values.var() / len(values)).sqrt())


def check_controller(module):
    """Ziegler et al.: the relative error, clipped to ±0.2, times sequences/horizon."""
    kl = module.AdaptiveKL(0.2, 6.0, 10_000)
    kl.update(12.0, 256)
    assert kl.value == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000))
    kl.update(6.6, 100)
    assert kl.value == pytest.approx(0.2 * (1 + 0.2 * 256 / 10_000) * (1 + 0.1 * 100 / 10_000))
    kl.update(0.0, 10_000)
    assert kl.value == pytest.approx(0.8 * 0.2 * (1 + 0.2 * 256 / 10_000) * (1 + 0.1 * 100 / 10_000))


def test_the_controller_of_lambda():
    check_controller(ppo)
    for right, wrong in {
        "error * sequences": "error / sequences",
        "kl / self.target": "kl * self.target",
        "1.0, -0.2), 0.2)": "1.0, -0.4), 0.2)",
        "sequences / self.horizon": "self.horizon / sequences",
    }.items():
        kills(check_controller, mutated(ppo, right, wrong))


def check_means(module):
    """Over the masked tokens, be it one; over none, 0 and no NaN."""
    values = torch.tensor([[3.0, 9.0], [6.0, 50.0]])
    of_processes = types.SimpleNamespace(accelerator=Accelerator(cpu=True))
    for mean in (module.masked_mean, lambda *a: module.PPOTrainer.mean(of_processes, *a)):
        for mask, expected in (([[1, 1], [1, 0]], 6.0), ([[0, 1], [0, 0]], 9.0), ([[0, 0], [0, 0]], 0.0)):
            assert mean(values, torch.tensor(mask, dtype=torch.float32)) == expected


def test_means_are_over_the_tokens_of_the_mask():
    check_means(ppo)
    for right, wrong in {
        "total / count.clamp(min=1)": "total / count.clamp(min=2)",
        "[(values * mask).sum(), mask.sum()]": "[values.sum(), mask.sum()]",
        "(values * mask).sum() / mask.sum().clamp(min=1)": "(values * mask).mean()",
    }.items():
        kills(check_means, mutated(ppo, right, wrong))


# --- what generalized advantages make of the optimum -------------------------------------------------------

TOKENS, LAM = 10, 0.1


def fixed_point(gae_lambda, critic):
    """P(first token is 1) where the expected update of PPO vanishes, over all 2^10 rewrites of two tokens.

    The first token alone earns a score, 0.3. The policy is a free probability after every prefix.
    """
    words = torch.tensor(list(itertools.product([0, 1], repeat=TOKENS)))
    prefix = torch.zeros(len(words), TOKENS, dtype=torch.long)
    for t in range(1, TOKENS):
        prefix[:, t] = 2 * prefix[:, t - 1] + words[:, t - 1]
    prefix += 2 ** torch.arange(TOKENS) - 1
    mask = torch.ones(len(words), TOKENS, dtype=torch.float64)
    start = torch.tensor(np.random.default_rng(0).normal(0, 0.3, 2**TOKENS - 1))
    start[0] = math.log(0.5)  # the first token is 1 with probability 1/3

    def log_probs(logits):
        signs = 2.0 * words - 1
        return torch.nn.functional.logsigmoid(signs * logits[prefix])

    reference, score = log_probs(start), 0.3 * words[:, 0].double()
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 500)
        new = log_probs(logits)
        p = new.detach().sum(1).exp()
        rewards = shaped_rewards(score, new.detach(), reference, mask, LAM)
        to_go = rewards.flip(1).cumsum(1).flip(1)
        if critic == "constant":
            values = torch.full_like(to_go, float((p * to_go[:, 0]).sum()))
        else:  # E[what is still to come | prefix]
            sums, weights = (
                torch.zeros(2**TOKENS - 1, dtype=torch.float64).index_add(0, prefix.flatten(), v.flatten())
                for v in (p[:, None] * to_go, p[:, None].expand_as(to_go))
            )
            values = (sums / weights)[prefix]
        advantages, _ = generalized_advantages(rewards, values, mask, 1.0, gae_lambda)
        optimizer.zero_grad()
        (-(p[:, None] * advantages * new).sum()).backward()
        optimizer.step()
    return float((log_probs(logits.detach()).sum(1).exp() * words[:, 0]).sum())


def test_the_optimum_is_that_of_the_objective_whatever_the_critic_knows():
    """ρ*: odds of the first token e^{0.3/0.1} times those of ρ_sft. Mutant: λ of 0.95, as in TRL's PPO."""
    odds = 0.5 * math.exp(0.3 / LAM)
    optimum = odds / (1 + odds)
    for critic in ("exact", "constant"):
        assert fixed_point(1.0, critic) == pytest.approx(optimum, abs=2e-3)
    assert fixed_point(0.95, "exact") == pytest.approx(optimum, abs=2e-3)
    assert fixed_point(0.95, "constant") < optimum - 0.1
