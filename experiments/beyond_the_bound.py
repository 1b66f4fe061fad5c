"""Every inequality and identity of limits, robustness and chains on many instances of every family.

    python experiments/beyond_the_bound.py [--instances 20000] [--seed 0]

`alignpro verify` does this for Theorem 1 and its relatives. Here each row is a statement `lhs <= rhs` (or
`lhs = rhs`), and the table shows by how much the worst instance of all families breaks it, in units of what
is summed (0: by nothing). Up to about 1e-10 that is rounding: no statement here carries an error bound of its
own. beta and lambda are log-uniform over 1e-3 to 1e3 times the reward's scale. Exit status 1 beyond 1e-9.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from alignpro.theory import FAMILIES, solution
from alignpro.theory.families import random_prompters
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import unchecked
from alignpro.theory.results import cost, reach, readings, robustness
from alignpro.theory.results.chains import _solve  # `solve_chain` without its checks, to be vmapped

SHAPE, CHUNK = (2, 4, 5), 1000
DRAWS = (2, 7, 1000)


def beyond(lhs, rhs, size):
    """By how much lhs <= rhs fails, relative to the sides and `size`."""
    return jnp.where(lhs <= rhs, 0.0, (lhs - rhs) / (jnp.abs(lhs) + jnp.abs(rhs) + size))


def apart(lhs, rhs, size):
    return jnp.where(lhs == rhs, 0.0, jnp.abs(lhs - rhs) / (jnp.abs(lhs) + jnp.abs(rhs) + size))


@jax.jit
@jax.vmap
def of_limits(instance, beta, lam, rho):
    s, other = solution(instance, beta, lam), solution(instance, beta, lam, rho)
    span = jnp.maximum(s.span, 1e-300)
    head, read = readings.headroom(instance, lam), readings.limit_readings(instance, beta, lam)
    value, ceiling = reach.response_value(instance, lam), reach.prompting_ceiling(instance, beta)
    critical, budget = readings.critical_lam(instance, beta, per_prompt=True), cost.kl_budget(s)
    projected, price = reach.information_projection(instance, beta), cost.kl_price(instance, beta, rho)
    split = readings.variance_split(instance, rho)
    finite = jnp.isfinite(price.policy)
    paid = jnp.where(finite, beta * (price.star + price.between - price.policy), price.gap)
    found = {
        "headroom: lower <= lift": beyond(head.lower, head.lift, span),
        "headroom: lift <= upper": beyond(head.lift, head.upper, span),
        "headroom: lift = covariance": apart(head.lift, head.covariance, span),
        "TV(pi*, pi_F) <= tanh(span/4beta)": beyond(read.tv_model, read.tv_model_bound, 1.0),
        "TV(rho*, rho_sft) <= tanh(span_R/4lam)": beyond(read.tv_prompter, read.tv_prompter_bound, 1.0),
        "mass off the best rewrites": beyond(read.off_best, read.off_best_bound, 1.0),
        "max R - E R <= lam(log 1/m - KL)": beyond(read.shortfall, read.shortfall_bound, span),
        "tilting responses gains": beyond(value.prompting, value.joint, jnp.abs(s.reward_max) + span),
        "ceiling <= gap of any prompter": beyond(ceiling.supported, other.gap, span),
        "critical lam in its enclosure": jnp.maximum(
            beyond(critical.lower, critical.value, 0.0), beyond(critical.value, critical.upper, 0.0)
        ),
        "an overspent budget means gap < 0": jnp.where(
            budget.within, 0.0, beyond(s.average(s.gap), 0.0, span)
        ),
        "projection <= any prompter's loss": jnp.where(
            jnp.isfinite(other.induced_to_star),
            beyond(projected.loss - beta * projected.gap, other.induced_to_star, span + beta),
            0.0,
        ),
        "projection not converged": 1.0 - projected.converged,
        "gap = beta(KL + KL - KL)": apart(
            price.gap, paid, span + beta * jnp.where(finite, price.policy, 0.0)
        ),
        "variance split": apart(split.total, split.within + split.between, span**2),
    }
    for n in DRAWS:
        best = cost.best_of_n_rewrites(instance, n)
        found[f"best of {n}: KL <= log n - (n-1)/n"] = beyond(best.kl, best.kl_bound, 1.0)
        found[f"best of {n}: below the frontier"] = beyond(best.lift, best.frontier_lift, span)
    return {name: jnp.max(v) for name, v in found.items()}


@jax.jit
@jax.vmap
def of_robustness(instance, estimate, lam, beta):
    top = jnp.max(instance.reward, -1, keepdims=True)
    energy, wrong = (instance.reward - top) @ instance.frozen.T, (estimate - top) @ instance.frozen.T
    own = instance.frozen[instance.own]
    found = {}
    for side, p in (
        ("rho", robustness.perturbation(instance.prior, energy, wrong, lam)),
        ("pi", robustness.perturbation(own, instance.reward - top, estimate - top, beta)),
    ):
        size = jnp.max(jnp.abs(estimate - instance.reward), -1) + jnp.ptp(instance.reward, -1)
        found[f"{side}: loss <= worst loss"] = beyond(p.loss, p.loss_sharp, size)
        found[f"{side}: loss <= span^2/8t"] = beyond(p.loss_sharp, p.loss_span, size)
        found[f"{side}: loss <= eps^2/2t"] = beyond(p.loss_span, p.loss_sup, size)
        found[f"{side}: reward loss <= bound"] = beyond(jnp.abs(p.reward_loss), p.reward_bound, size)
        found[f"{side}: TV <= tanh(s/4t)"] = beyond(p.tv, p.tv_bound, 1.0)
    return {name: jnp.max(v) for name, v in found.items()}


@jax.jit
@jax.vmap
def of_chains(instance, first, second, beta, lams, rhos):
    """Two stages in front of one instance, its own ρ_sft replaced by theirs, composed."""
    composed = unchecked(instance.p, first @ second, instance.frozen, instance.own, instance.reward)
    single = solution(composed, beta, lams[1])
    star = _solve(composed, single, (first, second), lams, None)
    other = _solve(composed, single, (first, second), lams, rhos)
    size = single.span + jnp.max(jnp.abs(instance.reward)) + other.stage_cost.sum(0)

    def one_stage(lam):
        lam = jnp.broadcast_to(lam, single.span.shape)
        return tilt(composed.prior, single.rewrite_reward, lam).free_energy

    low, high = one_stage(lams.max()), one_stage(lams.min())
    found = {
        "chain: suboptimality": apart(other.shortfall, other.stage_shortfall.sum(0), size),
        "chain: gap <= trained bound": beyond(other.gap, other.trained_bound, size),
        "chain: gap = exact gap": apart(star.gap, star.exact_gap, size),
        "chain: gap <= span bound": beyond(star.gap, star.span_bound, size),
        "chain: gap <= tight bound": beyond(star.gap, star.tight_bound, size),
        "chain: one-stage bracket": jnp.maximum(
            beyond(low, star.value, size), beyond(star.value, high, size)
        ),
    }
    return {name: jnp.max(v) for name, v in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=20_000, help="per family")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    worst: dict[str, tuple[float, str]] = {}

    def note(name: str, amount: float, family: str) -> None:
        if not amount <= worst.get(name, (-1.0, ""))[0]:
            worst[name] = (amount, family)

    with tqdm(total=len(FAMILIES) * options.instances, unit="instance") as bar:
        for family, draw in FAMILIES.items():
            rng = np.random.default_rng([options.seed, *family.encode()])
            for done in range(0, options.instances, CHUNK):
                count = min(CHUNK, options.instances - done)
                batch = draw(rng, count, SHAPE)
                scale = np.maximum(np.ptp(batch.reward, axis=(1, 2)), 1e-12)
                beta, lam = scale * 10.0 ** rng.uniform(-3, 3, (2, count))
                rho = random_prompters(rng, batch.prior)
                wide = (scale * 10.0 ** rng.uniform(-3, 1, count))[:, None, None]
                estimate = batch.reward + wide * rng.standard_normal(batch.reward.shape)
                found = of_limits(batch, beta, lam, rho) | of_robustness(batch, estimate, lam, beta)
                x, k, _ = SHAPE
                first = rng.dirichlet(np.ones(k), (count, x))
                second = np.take_along_axis(batch.prior, rng.integers(x, size=(count, k, 1)), 1)
                lams = scale[:, None] * 10.0 ** rng.uniform(-2, 2, (count, 2))
                rhos = random_prompters(rng, first)[:, :, None], random_prompters(rng, second)[:, None]
                rhos = rhos[0], np.broadcast_to(rhos[1], (count, x, k, k))
                found |= of_chains(batch, first, second, beta, lams, rhos)
                for name, amounts in found.items():
                    note(name, float(np.max(amounts)), family)
                bar.update(count)
    each = f"{options.instances} instances of each of {len(FAMILIES)} families"
    print(f"{each}, seed {options.seed}\n")
    print("| statement | worst | family |\n|---|---|---|")
    for name, (amount, family) in worst.items():
        print(f"| {name} | {amount:.1e} | {family if amount else '-'} |")
    return 1 if any(not amount <= 1e-9 for amount, _ in worst.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
