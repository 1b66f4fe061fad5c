"""Reward learning (equation 1) on finite spaces: Bradley–Terry maximum likelihood from counted preferences.

P(u ≻ v | x) = σ(r(x,u) − r(x,v)), one convex problem per prompt; rewards in nats. `docs/preferences.md`.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from alignpro.errors import AlignProError, as_number, check_temperature
from alignpro.theory.gibbs import tilt
from alignpro.theory.instance import Instance, rectangular
from alignpro.theory.results.rewards import reachable
from alignpro.theory.results.robustness import worst_loss

_STEPS = 500
_worst_loss = jax.jit(worst_loss)


class Fit(NamedTuple):
    """Rewards learned from preferences, with their certificate and their uncertainty. Per prompt [X, …]."""

    reward: Float[np.ndarray, "X Y"]
    """r̂(x,y): mean zero in every connected component, since the data see differences only."""
    covariance: Float[np.ndarray, "X Y Y"]
    """Covariance of `reward`: H⁺, H the Fisher information; with ridge κ, (H+κ)⁺ H (H+κ)⁺ about its mean."""
    component: Int[np.ndarray, "X Y"]
    """Component of the comparison graph; differences between components are not identified."""
    separated: Bool[np.ndarray, " X"]
    """Whether some responses never lost to others they met: without ridge there is no maximum."""
    loss: float
    """L_R(r̂) of equation 1: −mean of log σ over the comparisons (nats)."""
    gradient: Float[np.ndarray, " X"]
    """Largest entry of the gradient of the penalised negative log-likelihood (comparisons)."""
    step: Float[np.ndarray, " X"]
    """Span of the last Newton step (reward units)."""
    distance: Float[np.ndarray, " X"]
    """Certified bound on the span of r̂ − the exact optimum (reward units); inf where nothing is certified."""
    iterations: int
    """Newton steps taken."""
    ridge: float
    """κ, comparisons per squared reward unit; 0: maximum likelihood."""

    def difference_se(self) -> Float[np.ndarray, "X Y Y"]:
        """Standard error of r̂(x,u) − r̂(x,v); inf between components (reward units)."""
        variance = np.diagonal(self.covariance, axis1=1, axis2=2)
        square = variance[:, :, None] + variance[:, None, :] - 2 * self.covariance
        apart = self.component[:, :, None] != self.component[:, None, :]
        return np.where(apart, np.inf, np.sqrt(np.maximum(square, 0.0)))


def _counts(wins: Any) -> np.ndarray:
    try:
        array = np.asarray(wins, dtype=float)
    except (TypeError, ValueError) as error:
        raise AlignProError("wins: is no array of numbers; give counts [X, Y, Y]") from error
    if array.ndim != 3 or array.shape[1] != array.shape[2] or 0 in array.shape:
        raise AlignProError(
            f"wins: has shape {array.shape}; give counts [X, Y, Y], wins[x, u, v] of u over v"
        )
    for bad, why in (
        (~np.isfinite(array), "is not finite; give counts"),
        (array < 0, "is negative; counts are at least 0"),
        ((array > 0) & np.eye(array.shape[1], dtype=bool), "compares a response with itself; set it to 0"),
    ):
        if bad.any():
            x, u, v = (int(i) for i in np.argwhere(bad)[0])
            raise AlignProError(f"wins[{x}, {u}, {v}] = {array[x, u, v]:g} {why}")
    return array


def _components(wins: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Components of one prompt's comparison graph, and responses that never lost to the rest (or None)."""
    from scipy.sparse.csgraph import connected_components

    labels = connected_components(wins > 0, connection="weak")[1].astype(np.int64)
    strong = connected_components(wins > 0, connection="strong")[1]
    if len(set(zip(labels.tolist(), strong.tolist(), strict=True))) == labels.max() + 1:
        return labels, None
    for group in range(strong.max() + 1):
        inside = strong == group
        lost, won = wins[np.ix_(~inside, inside)].any(), wins[np.ix_(inside, ~inside)].any()
        if won and not lost:
            return labels, np.flatnonzero(inside)
    raise AssertionError("a component that is not strongly connected has a source")


def fit_rewards(wins: Any, ridge: float = 0.0, tolerance: float = 1e-10) -> Fit:
    """Bradley–Terry maximum likelihood: minimises −Σ wins[x,u,v] log σ(r(x,u) − r(x,v)) + (ridge/2) Σ r².

    Without ridge the maximum exists, and is unique up to one shift per connected component of the comparison
    graph, exactly when every component is strongly connected by wins (Ford 1957). Ridge κ > 0 is a Gaussian
    prior of variance 1/κ: always one answer, of mean zero in each component.

    Method: Newton steps Δ of length log(1+b)/b, b = span(Δ), never increase the loss. `distance` certifies
    the result, gradient rounding included.

    Args:
        wins: counts or weights ≥ 0 [X, Y, Y], wins[x, u, v] of u preferred to v; the diagonal 0.
        ridge: κ ≥ 0, in comparisons per squared reward unit.
        tolerance: largest span of the last step (reward units), unless rounding ends progress before.

    Raises:
        AlignProError: no such array, a negative or infinite count, a response compared with itself, a ridge
            that is negative, or rewards without a maximum (which names the responses and the remedy).
    """
    from scipy.special import expit, log_expit

    counts = _counts(wins)
    if not (isinstance(ridge, int | float | np.number) and 0 <= ridge < np.inf):
        raise AlignProError(
            f"ridge {ridge}: must be a finite number of at least 0; give one such as ridge 0.1"
        )
    x, y = counts.shape[:2]
    component, separated = np.zeros((x, y), int), np.zeros(x, bool)
    for i in range(x):
        component[i], unbeaten = _components(counts[i])
        separated[i] = unbeaten is not None
        if unbeaten is not None and ridge == 0:
            raise AlignProError(
                f"wins[{i}]: responses {unbeaten.tolist()} never lost to others they met, so their "
                "maximum-likelihood rewards are infinite; give ridge > 0 (such as 0.1) or more comparisons"
            )
    # In units of each prompt's comparisons, so that counts of any size are alike.
    size = counts.sum((1, 2))
    size = np.where(size > 0, size, 1.0)
    share = counts / size[:, None, None]
    kappa = ridge / size
    met = share + share.transpose(0, 2, 1)
    same = (component[:, :, None] == component[:, None, :]).astype(float)
    mean = same / same.sum(-1, keepdims=True)

    def curvature(r: np.ndarray) -> np.ndarray:
        d = r[:, :, None] - r[:, None, :]
        weights = met * expit(d) * expit(-d)
        return np.eye(y) * weights.sum(-1)[:, :, None] - weights

    def slope(r: np.ndarray) -> np.ndarray:
        d = r[:, None, :] - r[:, :, None]
        lost = share * expit(d)  # of u's wins over v, what the model did not expect
        return lost.sum(1) - lost.sum(2) + kappa[:, None] * r

    def centred(r: np.ndarray) -> np.ndarray:
        return r - np.einsum("xuv,xv->xu", mean, r)

    reward, step, moving = np.zeros((x, y)), np.full(x, np.inf), np.ones(x, bool)
    iterations = 0
    identity = np.eye(y)
    while iterations < _STEPS and moving.any():
        hessian, gradient = curvature(reward), slope(reward)
        # On shifts the likelihood is flat: any positive curvature there keeps them out of the step.
        scale = np.maximum(np.trace(hessian, axis1=1, axis2=2) / y, np.finfo(float).tiny)[:, None, None]
        full = hessian + kappa[:, None, None] * identity + scale * mean
        direction = -centred(np.linalg.solve(full, gradient[:, :, None])[:, :, 0])
        before, step = step, np.ptp(direction, axis=1)
        b = np.maximum(step, 1e-300)
        reward = centred(reward + np.where(step > 1e-8, np.log1p(b) / b, 1.0)[:, None] * direction)
        iterations += 1
        # Newton steps shrink quadratically; small ones that do not are rounding.
        moving = (step > tolerance) & ((step > 1e-3) | (step < 0.5 * before))
    if moving.any():
        i = int(np.argmax(moving))
        raise AlignProError(
            f"wins[{i}]: no convergence in {_STEPS} steps (the last {step[i]:.3g}, tolerance {tolerance:g}); "
            "the comparisons are nearly separated: give a larger ridge"
        )
    hessian, gradient = curvature(reward), slope(reward)
    penalised = hessian + kappa[:, None, None] * identity
    inverse, least = _pinv(penalised, mean)
    # The gradient itself is known to rounding of what is summed in it.
    noise = 4 * (y + 4) * np.finfo(float).eps * met.sum(-1).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = (np.linalg.norm(gradient, axis=1) + noise * np.sqrt(y)) * np.sqrt(2.0) / least
        distance = np.where(bound < 1, -np.log1p(-np.minimum(bound, 1 - 1e-16)), np.inf)
    covariance = inverse @ hessian @ inverse / size[:, None, None]
    d = reward[:, :, None] - reward[:, None, :]
    loss = float(-(counts * log_expit(d)).sum() / max(counts.sum(), np.finfo(float).tiny))
    return Fit(
        reward=reward,
        covariance=(covariance + covariance.transpose(0, 2, 1)) / 2,
        component=component,
        separated=separated,
        loss=loss,
        gradient=np.abs(gradient).max(-1) * size,
        step=step,
        distance=np.where(least == np.inf, 0.0, distance),
        iterations=iterations,
        ridge=float(ridge),
    )


def _pinv(curvature: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse on what the data identify (zero on shifts); the least curvature there (inf if nothing is)."""
    y = curvature.shape[-1]
    project = np.eye(y) - mean
    scale = np.maximum(np.trace(curvature, axis1=1, axis2=2), np.finfo(float).tiny)[:, None, None]
    # Shifts are given a curvature above all others, then projected out.
    lifted = project @ curvature @ project + scale * mean
    inverse = project @ np.linalg.inv(lifted) @ project
    eigenvalues = np.linalg.eigvalsh(lifted)
    shifts = np.rint(np.trace(mean, axis1=1, axis2=2)).astype(int)
    return inverse, np.where(shifts < y, eigenvalues[:, 0], np.inf)


def _pairs(instance: Instance, pairs: Any, n: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checked pairs [M, 2] and comparisons per prompt and pair [X, M]."""
    prompts, _, responses = instance.shape
    if pairs is None:
        pairs = np.argwhere(np.triu(np.ones((responses, responses), bool), 1)).reshape(-1, 2)
    array = rectangular("pairs", pairs)
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise AlignProError(f"pairs: has shape {array.shape} and dtype {array.dtype}; give integers [M, 2]")
    bad = ((array < 0) | (array >= responses)).any(1) | (array[:, 0] == array[:, 1])
    if bad.any():
        i = int(np.argmax(bad))
        raise AlignProError(
            f"pairs[{i}] = {array[i].tolist()}: give two different responses, 0 to {responses - 1}"
        )
    number = rectangular("n", n)
    if number.dtype.kind not in "iuf" or number.shape not in ((), (prompts,)) or not (number >= 0).all():
        raise AlignProError(f"n {n}: give one number of comparisons of at least 0, or one for each prompt")
    return array, np.broadcast_to(number.reshape(-1, 1), (prompts, len(array)))


def _win_probability(instance: Instance, pairs: np.ndarray) -> np.ndarray:
    from scipy.special import expit

    reward = np.asarray(instance.reward)
    return expit(reward[:, pairs[:, 0]] - reward[:, pairs[:, 1]])


def _scattered(instance: Instance, pairs: np.ndarray, won: np.ndarray, lost: np.ndarray) -> np.ndarray:
    prompts, _, responses = instance.shape
    wins = np.zeros((prompts, responses, responses))
    rows = np.arange(prompts)[:, None]
    np.add.at(wins, (rows, pairs[None, :, 0], pairs[None, :, 1]), won)
    np.add.at(wins, (rows, pairs[None, :, 1], pairs[None, :, 0]), lost)
    return wins


def expected_preferences(instance: Instance, pairs: Any = None, n: Any = 1.0) -> Float[np.ndarray, "X Y Y"]:
    """The counts of infinite data, n σ(r*(x,u) − r*(x,v)) for each pair: fitted, they give r* up to shifts.

    Args:
        instance: its `reward` is r*.
        pairs: responses compared [M, 2]; all pairs when None.
        n: comparisons per pair, one number or one per prompt [X]; need not be whole.

    Raises:
        AlignProError: a pair that is not two different responses, or a negative n.
    """
    checked, number = _pairs(instance, pairs, n)
    won, lost = (number * _win_probability(instance, both) for both in (checked, checked[:, ::-1]))
    return _scattered(instance, checked, won, lost)


def sample_preferences(
    rng: np.random.Generator, instance: Instance, pairs: Any = None, n: Any = 1
) -> Float[np.ndarray, "X Y Y"]:
    """Counted preferences of n independent comparisons per pair and prompt, under Bradley–Terry with r*.

    Arguments and errors as `expected_preferences`, with whole n.
    """
    checked, number = _pairs(instance, pairs, n)
    if not (number == np.floor(number)).all():
        raise AlignProError(f"n {n}: sampled comparisons are whole numbers; round it")
    won = rng.binomial(number.astype(np.int64), _win_probability(instance, checked))
    return _scattered(instance, checked, won, number - won)


class Propagated(NamedTuple):
    """The consequences of the uncertainty of learned rewards, per prompt; never NaN."""

    identified: Bool[np.ndarray, " X"]
    """Whether all reachable responses lie in one component; elsewhere every error and bound is inf."""
    rewrite_reward: Float[np.ndarray, "X K"]
    """R̂(x,x′), from the learned rewards."""
    rewrite_se: Float[np.ndarray, "X K K"]
    """Standard error of R̂(x,x′) − R̂(x,x″), by the delta method (exact: R̂ is linear in r̂)."""
    rho: Float[np.ndarray, "X K"]
    """ρ̂ built from r̂ (probabilities)."""
    rho_se: Float[np.ndarray, "X K"]
    """Standard error of ρ̂ (probability), dρ/dR = (diag ρ − ρρᵀ)/λ."""
    pi: Float[np.ndarray, "X Y"]
    """π̂ built from r̂ (probabilities)."""
    pi_se: Float[np.ndarray, "X Y"]
    """Standard error of π̂ (probability)."""
    predicted_loss: Float[np.ndarray, " X"]
    """E λ KL(ρ̂‖ρ*) ≈ tr[(diag ρ̂ − ρ̂ρ̂ᵀ) Cov R̂]/(2λ), to second order (reward units)."""
    predicted_model_loss: Float[np.ndarray, " X"]
    """E β KL(π̂‖π*), to second order (reward units)."""
    span: Float[np.ndarray, " X"]
    """Asymptotic bound on span(R̂ − R) over the support of ρ_sft, at the level asked for (reward units)."""
    loss_bound: Float[np.ndarray, " X"]
    """Bound on λ KL(ρ̂‖ρ*) at that level: `robustness.worst_loss` of `span`, at most span²/(8λ)."""


def propagate(instance: Instance, fit: Fit, beta: float, lam: float, level: float = 0.95) -> Propagated:
    """Carry the errors of learned rewards to those of R, ρ* and π*, and to the loss of ρ̂.

    By the delta method with r̂ ≈ N(r*, C); the span holds for all pairs of rewrites at once (Scheffé), as the
    counts grow. With ridge, its bias is not counted.

    Args:
        instance: P, ρ_sft, π_F and own are used; its `reward` is not.
        fit: of the same prompts and responses.
        beta: β > 0.
        lam: λ > 0.
        level: confidence, in (0, 1), per prompt.

    Raises:
        AlignProError: β, λ or the level is out of range, or the fit is about other prompts or responses.
    """
    from scipy.special import chdtri

    beta, lam = check_temperature("beta", beta), check_temperature("lam", lam)
    if not 0 < as_number("level", level) < 1:
        raise AlignProError(f"level {level}: must lie between 0 and 1; give one such as 0.95")
    prompts, _, responses = instance.shape
    if fit.reward.shape != (prompts, responses):
        raise AlignProError(
            f"fit: is about {fit.reward.shape[0]} prompts and {fit.reward.shape[1]} responses but the "
            f"instance has {prompts} and {responses}; fit wins [{prompts}, {responses}, {responses}]"
        )
    prior, frozen = np.asarray(instance.prior), np.asarray(instance.frozen)
    reach = np.asarray(reachable(instance))
    first = fit.component[np.arange(prompts), reach.argmax(-1)]
    identified = (~reach | (fit.component == first[:, None])).all(-1)
    r = fit.reward @ frozen.T
    cov = frozen @ fit.covariance @ frozen.T
    rho, pi = (
        np.asarray(tilt(base, energy, np.full(prompts, t)).probs)
        for base, energy, t in ((prior, r, lam), (frozen[np.asarray(instance.own)], fit.reward, beta))
    )

    def downstream(probs: np.ndarray, covariance: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
        jacobian = (np.eye(probs.shape[1]) * probs[:, :, None] - probs[:, :, None] * probs[:, None, :]) / t
        variance = np.einsum("xij,xjk,xik->xi", jacobian, covariance, jacobian)
        predicted = np.einsum("xij,xji->x", jacobian, covariance) / 2
        return np.sqrt(np.maximum(variance, 0.0)), np.maximum(predicted, 0.0)

    rho_se, predicted = downstream(rho, cov, lam)
    pi_se, predicted_model = downstream(pi, fit.covariance, beta)
    variance = np.diagonal(cov, axis1=1, axis2=2)
    se = np.sqrt(np.maximum(variance[:, :, None] + variance[:, None, :] - 2 * cov, 0.0))
    support = prior > 0
    widest = np.where(support[:, :, None] & support[:, None, :], se, 0.0).max((1, 2))
    freedom = np.minimum(support.sum(-1), reach.sum(-1)) - 1
    span = np.sqrt(chdtri(np.maximum(freedom, 1), 1 - level)) * widest
    bound = np.asarray(_worst_loss(span, np.full(prompts, lam)))

    def known(values: np.ndarray) -> np.ndarray:
        return np.where(identified.reshape(-1, *(1,) * (values.ndim - 1)), values, np.inf)

    return Propagated(
        identified=identified,
        rewrite_reward=r,
        rewrite_se=known(se),
        rho=rho,
        rho_se=known(rho_se),
        pi=pi,
        pi_se=known(pi_se),
        predicted_loss=known(predicted),
        predicted_model_loss=known(predicted_model),
        span=known(span),
        loss_bound=known(bound),
    )
