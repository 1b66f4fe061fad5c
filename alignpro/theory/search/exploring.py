"""One instance while β and λ move: the numbers that the page of `alignpro explore` draws."""

import functools
import itertools
import math
from typing import Any

import jax
import numpy as np

from alignpro.claims import of_kind
from alignpro.errors import AlignProError
from alignpro.theory.bounds import STATEMENTS, paper_r_max, report
from alignpro.theory.families import draw
from alignpro.theory.instance import Instance, bare
from alignpro.theory.results import cost, reach
from alignpro.theory.solution import solution

BOUNDS_ON_THE_GAP = of_kind(STATEMENTS, "upper bound", "lower bound")
"""Claims evaluated at ρ*."""
SHOWN = 12
"""Rewrites, or responses, drawn one by one."""
MOST = 2**20
"""X·K·Y of an instance asked for on the page: a slip of the hand must not cost minutes."""
WIDEST = 2**12
"""X, K or Y of an instance asked for on the page, at most: as many prompts are named in a list there."""
SWEPT = ("theorem1", "barycentre", "ceiling")
"""Claims drawn over λ."""
PARTS, POINTS = 20, 2
"""A sweep is asked for in parts, so that none holds up a move for long, each of so many values of λ."""
_LABEL = 300  # characters of a name
_DECADES = (-3, 2)  # of the sliders, about the rewards' scale

# Compiled once for each shape; `solution` as in `check`, so that its numbers are the same to the last bit.
_ceiling = jax.jit(reach.prompting_ceiling)
_frontier = jax.jit(cost.frontier)


class Explored:
    """An instance to explore: what does not depend on β and λ, and the numbers at any β and λ."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.arrays = bare(instance)
        s = solution(self.arrays, 1.0, 1.0)
        self.span = float(s.average(s.span))
        # Of rewards: sliders and defaults are in units of it.
        self.scale = 10.0 ** min(max(round(math.log10(self.span)), -14), 15) if self.span > 0 else 1.0

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """Sizes, labels of the prompts, defaults and ranges of β and λ, the axis of J, the frontier."""
        s = solution(self.arrays, 1.0, 1.0)
        f = _frontier(self.arrays, self.scale * np.logspace(-4, 3, 141))
        prompts = range(self.instance.shape[0])
        ends = (s.original, s.reference, s.optimum - s.ceiling, s.original + s.own_rise)
        values = [float(s.average(end)) for end in ends]
        return {
            "shape": self.instance.shape,
            "prompts": [self._label("prompts", "x", x) for x in prompts],
            "p": self.instance.p,
            "span": self.span,
            "beta": 0.1 * self.scale,
            "lam": 0.05 * self.scale,
            "low": 10.0 ** _DECADES[0] * self.scale,
            "high": 10.0 ** _DECADES[1] * self.scale,
            "parts": PARTS,
            "axis": [min(values), max(values)],
            "frontier": {"lam": f.lam, "kl": f.mean_kl, "reward": f.mean_reward},
        }

    def solve(self, beta: float, lam: float, prompt: int = 0) -> dict[str, Any]:
        """Every number of the page: means over P, in reward units, KL in nats; policies of one prompt."""
        s, ceiling = solution(self.arrays, beta, lam), _ceiling(self.arrays, beta)
        own = self.instance.frozen[int(self.instance.own[prompt])]
        x, mean = prompt, s.average
        return {
            "beta": beta,
            "lam": lam,
            "prompt": prompt,
            "rewards": {
                "none": mean(s.original),
                "sft": mean(s.reference),
                "star": s.j_rho,
                "best": mean(s.optimum - s.ceiling),
                "rlhf": s.j_star,
            },
            "gap": mean(s.gap),
            "delta1": mean(s.delta1),
            "delta2": mean(s.delta2),
            "identity": {
                "model": mean(s.model_jeffreys),
                "shift": mean(s.shift),
                "prompter": mean(s.prompter_jeffreys),
            },
            "ceiling": {"supported": mean(s.ceiling), "anywhere": mean(ceiling.anywhere)},
            "kl": cost.kl_budget(s).mean_spent,
            "model_kl": mean(s.model_kl / s.beta),
            "span": mean(s.span),
            "r_max": paper_r_max(s),
            "bounds": [report(name, claim(s)) for name, claim in BOUNDS_ON_THE_GAP.items()],
            "prompt_gap": s.gap[x],
            "rewrites": self._bars(
                "rewrites", "x′", self.instance.prior[x], s.rho_star[x], s.rewrite_reward[x], x
            ),
            "responses": self._bars("responses", "y", own, s.pi_star[x], self.instance.reward[x]),
        }

    def sweep(self, beta: float, part: int) -> list[dict[str, float]]:
        """Evaluate one of the `PARTS` of a sweep: `POINTS` values of λ, spread over the slider's range.

        Each row: λ, the gap, J(ρ*), the bounds `SWEPT` (reward units), KL(ρ*‖ρ_sft) (nats): means over P.
        """
        grid = self.scale * np.logspace(*_DECADES, PARTS * POINTS)[part::PARTS]
        found = []
        for lam in map(float, grid):
            s = solution(self.arrays, beta, lam)
            of_lam = {
                "lam": lam,
                "gap": s.average(s.gap),
                "star": s.j_rho,
                "kl": s.average(s.prompter_kl) / lam,
            }
            bounds = {name: report(name, STATEMENTS[name](s)).rhs for name in SWEPT}
            found.append({name: float(value) for name, value in (of_lam | bounds).items()})
        return found

    def _label(self, axis: str, letter: str, index: int) -> str:
        names = getattr(self.instance.names, axis, ())
        text = names[index] if names else f"{letter}{index}"
        return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"

    def _bars(self, axis: str, letter: str, base: Any, tilted: Any, reward: Any, x: int | None = None) -> Any:
        base, tilted, reward = (np.asarray(a) for a in (base, tilted, reward))
        kept = chosen(base, reward)
        rest = np.ones(len(base), dtype=bool)
        rest[kept] = False
        return {
            "rows": [
                {
                    "label": self._label(axis, letter, k),
                    "own": x is not None and k == self.instance.own[x],
                    "reward": reward[k],
                    "base": base[k],
                    "tilted": tilted[k],
                }
                for k in kept
            ],
            "more": {
                "count": int(np.sum(rest & (base > 0))),
                "base": base[rest].sum(),
                "tilted": tilted[rest].sum(),
            },
        }


def chosen(base: np.ndarray, reward: np.ndarray) -> list[int]:
    """The at most `SHOWN` outcomes to draw, best reward first: of most weight and of most reward, in turn.

    Not by the tilt, so that no row comes or goes as a temperature moves.
    """
    inside = np.flatnonzero(base > 0)
    by_weight, by_reward = (inside[np.argsort(-v[inside], kind="stable")] for v in (base, reward))
    in_turn = dict.fromkeys(np.stack([by_weight, by_reward], 1).ravel().tolist())
    return sorted(itertools.islice(in_turn, SHOWN), key=lambda k: -reward[k])


def check_shape(x: int, k: int, y: int) -> None:
    """Raise AlignProError for a shape that the page cannot answer about while someone waits."""
    if x * k * y > MOST:
        raise AlignProError(f"shape {x} {k} {y}: has {x * k * y} entries; keep X times K times Y to {MOST}")
    if max(x, k, y) > WIDEST:
        raise AlignProError(f"shape {x} {k} {y}: is too long on one axis; keep X, K and Y each to {WIDEST}")


def forget() -> None:
    """Give back the memory of all compiled code: each new shape's is some 20 MB, kept otherwise for good."""
    jax.clear_caches()


def drawn(family: str, x: int, k: int, y: int, seed: int) -> Instance:
    """The random instance of a family, a shape that `check_shape` accepts and a seed."""
    check_shape(x, k, y)
    if seed < 0:
        raise AlignProError(f"seed {seed}: is negative; give a whole number of at least 0")
    return draw(family, seed, (x, k, y))[0]
