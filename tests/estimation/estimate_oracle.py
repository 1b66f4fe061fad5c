"""The exact value of everything that is estimated, from the formulas, in plain NumPy; and small helpers."""

import itertools
from types import SimpleNamespace

import numpy as np


def instance(seed, shape=(20, 6, 12), spread=1.5, noise=1.0):
    """A random problem on finite spaces, rewards in (0, 1)."""
    rng = np.random.default_rng(seed)
    x, k, y = shape
    logits = rng.standard_normal((1, y)) + spread * rng.standard_normal((k, y))
    frozen = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return SimpleNamespace(
        p=rng.dirichlet(np.full(x, 5.0)),
        prior=rng.dirichlet(np.ones(k), x),
        frozen=frozen,
        own=rng.integers(k, size=x),
        reward=1.0 / (1.0 + np.exp(-noise * rng.standard_normal((x, y)))),
    )


def truth(i, beta, lam, prompter):
    """Averages over P by the names of `EstimateReport.quantities`, for rewards declared in [0, 1]."""
    kl = lambda a, b: float((a * np.log(a / b)).sum())  # noqa: E731
    out = {}

    def add(name, weight, value):
        out[name] = out.get(name, 0.0) + weight * value

    for x, w in enumerate(i.p):
        own, r = i.frozen[i.own[x]], i.reward[x]
        big_r = i.frozen @ r
        pi = own * np.exp(r / beta)
        z_star, pi = pi.sum(), pi / pi.sum()
        rho = i.prior[x] * np.exp(big_r / lam)
        z, rho = rho.sum(), rho / rho.sum()
        mine = prompter[x]
        add("J(none)", w, own @ r)
        add("J(sft)", w, i.prior[x] @ big_r)
        add("J(trained)", w, mine @ big_r)
        add("J(pi*)", w, pi @ r)
        add("beta log Z*", w, beta * np.log(z_star))
        add("TV(pi*, pi_F)", w, 0.5 * np.abs(pi - own).sum())
        add("beta KL(pi*||pi_F)", w, beta * kl(pi, own))
        tvs = 0.5 * np.abs(i.frozen - own).sum(-1)
        add("TV(pi_F(.|x), pi_F(.|x'))", w, i.prior[x] @ tvs)
        add("J(rho*)", w, rho @ big_r)
        add("lambda log Z", w, lam * np.log(z))
        add("lambda KL(rho*||rho_sft)", w, lam * kl(rho, i.prior[x]))
        add("lambda KL(trained||rho_sft)", w, lam * kl(mine, i.prior[x]))
        add("lambda KL(trained||rho*)", w, lam * kl(mine, rho))
        mean, total = i.prior[x] @ big_r, i.prior[x] @ (i.frozen @ r**2)
        add("between", w, i.prior[x] @ (big_r - mean) ** 2)
        add("within", w, total - i.prior[x] @ big_r**2)
    out["gap"] = out["J(pi*)"] - out["J(rho*)"]
    out["rhs"] = out["TV(pi*, pi_F)"] + out["TV(pi_F(.|x), pi_F(.|x'))"] - out["lambda KL(rho*||rho_sft)"]
    out["slack"] = out["rhs"] - out["gap"]
    return out


def halfway(i, lam):
    """A prompter half-way from ρ_sft to ρ*, as training would leave it."""
    rho = i.prior * np.exp(i.reward @ i.frozen.T / lam)
    return 0.5 * i.prior + 0.5 * rho / rho.sum(-1, keepdims=True)


def expectation(statistic, outcomes, probs, size):
    """E statistic(sample) over all samples of `size` independent outcomes: exact."""
    total = 0.0
    for at in itertools.product(range(len(outcomes)), repeat=size):
        total = total + np.prod([probs[j] for j in at]) * statistic(np.array([outcomes[j] for j in at]))
    return total
