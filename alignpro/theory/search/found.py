"""Targets of a hunt, and instances found: evaluated again with the rounding bound of their statement."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignpro.claims import Verdict
from alignpro.errors import AlignProError
from alignpro.theory.bounds import STATEMENTS, Statement, judge
from alignpro.theory.families import Shape
from alignpro.theory.instance import Instance, padded, replaced
from alignpro.theory.scale.routes import quick_options
from alignpro.theory.solution import Solution, solution

FLOOR = 1e-3
"""A ratio lhs/rhs counts where rhs is at least this share of the reward span: 0/0 is not tight."""
TEMPERATURES = (1e-3, 1e3)
"""The least and the largest β and λ that are tried."""


class Target(NamedTuple):
    """A claim to hunt: a row of `bounds.STATEMENTS`, or a conjecture of your own."""

    name: str
    statement: Callable[[Solution], Statement]
    any_prompter: bool = False
    """Whether it is about any ρ, so to be evaluated on others than ρ*."""
    equality: bool = False
    """Whether it claims lhs = rhs, rather than lhs ≤ rhs."""


ALIASES = {"q2": "never_outperforms", "outperform": "never_outperforms"}
"""The paper's question Q2 is settled by what refutes its denial."""


def target(name: str) -> Target:
    """The statement called `name`, or its alias; an AlignProError where it is unknown."""
    key = ALIASES.get(name, name)
    if key not in STATEMENTS:
        raise AlignProError(f"BOUND {name}: is unknown; give one of {', '.join([*STATEMENTS, *ALIASES])}")
    claim = STATEMENTS[key]
    return Target(key, claim, claim.any_prompter, claim.relation == "=")


@dataclass(frozen=True)
class Found:
    """An instance on which a statement is tight or false, in reward units."""

    target: Target
    instance: Instance
    beta: float
    lam: float
    prompter: np.ndarray | None
    """ρ(x′|x) [X, K] that was asked about; None for ρ*."""
    lhs: float
    rhs: float
    error: float
    """Bound on the rounding of rhs − lhs."""
    span: float
    """E_x span(x) in reward units, the scale of both sides; 1 for statements about probabilities."""
    verdict: Verdict
    """holds | violated | inconclusive | inapplicable, in float64 with its rounding bound."""
    rho_star: np.ndarray
    """ρ*(x′|x) [X, K]."""
    pi_star: np.ndarray
    """π*(y|x) [X, Y]."""
    rewrite_reward: np.ndarray
    """R(x,x′) [X, K]."""

    @property
    def ratio(self) -> float:
        """lhs/rhs; infinite where rhs ≤ 0 < lhs, NaN where neither is positive."""
        if self.rhs > 0:
            return self.lhs / self.rhs
        return math.inf if self.lhs > 0 else math.nan

    @property
    def slack(self) -> float:
        """rhs − lhs; for an identity −|rhs − lhs|."""
        return -abs(self.rhs - self.lhs) if self.target.equality else self.rhs - self.lhs

    @property
    def violated(self) -> bool:
        """Whether it is broken beyond rounding, with both sides finite."""
        return self.verdict == "violated" and math.isfinite(self.slack)

    @property
    def tightness(self) -> float:
        """lhs/rhs where rhs is at least `FLOOR` of the span, else −∞. For an identity, |rhs − lhs|/span."""
        if self.verdict == "inapplicable" or not (self.span > 0 and math.isfinite(self.slack)):
            return -math.inf
        if self.target.equality:
            return -self.slack / self.span
        return self.ratio if self.rhs >= FLOOR * self.span else -math.inf

    @property
    def excess(self) -> float:
        """−slack/span: by how much it is broken, as a share of the reward span (of 1 where that is 0)."""
        return -self.slack / (self.span if self.span > 0 else 1.0)


@functools.lru_cache(maxsize=64)
def _evaluator(statement: Callable[[Solution], Statement], any_prompter: bool) -> Callable[..., Any]:
    def one(instance: Instance, beta, lam, prompter):
        s = solution(instance, beta, lam, prompter if any_prompter else None)
        found = statement(s)
        applies = functools.reduce(jnp.logical_and, found.assumptions.values(), jnp.asarray(True))
        # One array: of several, each costs as much to bring back as all of this.
        parts = (*found[:4], applies, s.rho_star, s.pi_star, s.rewrite_reward)
        return jnp.concatenate([jnp.ravel(part).astype(s.span.dtype) for part in parts])

    # Compiling is nearly all the time a hunt takes.
    return jax.jit(one, compiler_options=quick_options())


def evaluate(
    wanted: Target,
    instance: Instance,
    beta: float,
    lam: float,
    prompter: np.ndarray | None = None,
    shape: Shape | None = None,
) -> Found:
    """The statement on one instance, padded to `shape` so that one compilation serves all smaller ones.

    A statement about any prompter uses `prompter`, and ρ_sft where that is None.
    """
    x, k, y = instance.shape
    to = instance.shape if shape is None else shape
    rho = np.asarray(instance.prior if prompter is None else prompter)
    wide_rho = padded(replaced(instance, prior=rho), to).prior
    numbers = np.asarray(
        _evaluator(wanted.statement, wanted.any_prompter)(padded(instance, to), beta, lam, wide_rho)
    )
    lhs, rhs, error, span, applies = numbers[:5].tolist()
    rewrites, responses = to[0] * to[1], to[0] * to[2]
    rho_star, pi_star, rewrite_reward = (
        part.reshape(to[0], -1) for part in np.split(numbers[5:], [rewrites, rewrites + responses])
    )
    return Found(
        target=wanted,
        instance=instance,
        beta=float(beta),
        lam=float(lam),
        prompter=rho if wanted.any_prompter else None,
        lhs=lhs,
        rhs=rhs,
        error=error,
        span=span,
        verdict=judge(rhs - lhs, error, bool(applies), wanted.equality, max(abs(lhs), abs(rhs))),
        rho_star=rho_star[:x, :k],
        pi_star=pi_star[:x, :y],
        rewrite_reward=rewrite_reward[:x, :k],
    )


def certificate(found: Found) -> Any:
    """A find proved in ball arithmetic (`certify.Certificate`); None where python-flint is not installed."""
    try:
        from alignpro.theory.proof.certify import certify
    except AlignProError:
        return None
    wanted = found.target
    return certify(
        found.instance,
        found.beta,
        found.lam,
        wanted.name if wanted.name in STATEMENTS else wanted.statement,
        found.prompter,
        equality=wanted.equality,
    )
