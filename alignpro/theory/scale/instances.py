"""Exact quantities and bounds of saved instances of any sizes: what `alignpro solve` prints."""

import functools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from alignpro.claims import of_kind
from alignpro.errors import AlignProError, check_temperature
from alignpro.shown import Shown
from alignpro.theory.bounds import STATEMENTS, BoundReport, paper_r_max, report, theorem1
from alignpro.theory.instance import Instance, load, padded
from alignpro.theory.solution import solution

# A new shape costs a second of compilation, so sizes are rounded up to these; beyond them, kept as is.
_SIZES = (32, 128, 512)
_SMALL = 8
_BATCH = 64
_BATCH_ELEMENTS = 2**21

CHOICES = of_kind(STATEMENTS, "upper bound", "lower bound")
"""Bounds on the gap, by name."""

SIGNED_CONVENTION = "max r - min r, after shifting the least reward to 0"
PAPER_CONVENTION = "max r, the least reward being at least 0"
GIVEN_CONVENTION = "given"


@dataclass(frozen=True)
class Solved:
    """The optima of one instance, the gap and its bounds, in reward units; infinite where one overflows."""

    file: str
    """Its file; empty for an instance in memory."""
    beta: float
    lam: float
    r_max: float
    r_max_convention: str
    j_star: float
    j_rho: float
    gap: float
    exact_gap: float
    """The right side of the exact identity, equal to `gap`."""
    log_z: list[float]
    """log Z(x) in nats, for each prompt."""
    log_z_star: list[float]
    """log Z*(x) in nats, for each prompt."""
    delta1: float
    delta2: float
    bounds: dict[str, BoundReport]

    def json(self) -> dict[str, Any]:
        """The fields, for JSON; a bound without its name and the gap, which stand above."""
        keys = ("relation", "rhs", "slack", "terms", "verdict", "vacuous", "error", "assumptions")
        bounds = {name: {key: getattr(b, key) for key in keys} for name, b in self.bounds.items()}
        return {**vars(self), "bounds": bounds}


@dataclass(frozen=True, repr=False)
class Solutions(Shown):
    """The result of a run: every file's optima, and the verdicts counted."""

    files: Sequence[Solved]

    @property
    def checks(self) -> list[BoundReport]:
        """Every bound on every file."""
        return [bound for one in self.files for bound in one.bounds.values()]

    def count(self, verdict: str) -> int:
        return sum(bound.verdict == verdict for bound in self.checks)

    @property
    def vacuous(self) -> int:
        return sum(bound.vacuous for bound in self.checks)

    @property
    def largest_gap(self) -> float | None:
        """The largest finite gap."""
        return max((one.gap for one in self.files if math.isfinite(one.gap)), default=None)

    @property
    def finding(self) -> str:
        """The result in one sentence."""
        bad = self.count("violated")
        return f"{bad or 'None'} of {len(self.checks)} bounds {'are' if bad > 1 else 'is'} violated."


def solve_files(
    files: Sequence[str | os.PathLike[str]],
    beta: float,
    lam: float,
    bounds: Sequence[str] = ("theorem1",),
    r_max: float | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Solutions:
    """Solve every file, in order; all are validated before any is computed.

    `bounds` are keys of `CHOICES`, or "all"; `r_max` overrides that of Theorem 1; `progress` is called with
    the number of instances just finished.

    Raises:
        AlignProError: a bad parameter, or bad files (one line each).
    """
    if not files:
        raise AlignProError("FILES: no file given; name at least one .npz instance")
    beta, lam = check_temperature("--beta", beta), check_temperature("--lam", lam)
    if r_max is not None and not (math.isfinite(r_max) and r_max >= 0):
        raise AlignProError(
            f"--r-max {r_max}: must be a finite number of at least 0; give one or leave it out"
        )
    names = tuple(CHOICES) if "all" in bounds else tuple(dict.fromkeys(bounds))
    for name in names:
        if name not in CHOICES:
            raise AlignProError(f"--bounds {name}: is unknown; give one of {', '.join(CHOICES)} or all")
    instances, wrong = [], []
    for file in files:
        try:
            instances.append(load(file))
        except AlignProError as error:
            wrong.append(str(error))
    if wrong:
        raise AlignProError("\n".join(wrong))
    solved = solve_instances(instances, beta, lam, names, r_max, progress)
    return Solutions([replace(one, file=str(file)) for file, one in zip(files, solved, strict=True)])


def solve_instances(
    instances: Sequence[Instance],
    beta: float,
    lam: float,
    bounds: Sequence[str] = ("theorem1",),
    r_max: float | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Solved]:
    """Solve instances in memory, padded to few shapes and batched; arguments as of `solve_files`."""
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, instance in enumerate(instances):
        groups[_padded_shape(instance.shape)].append(index)
    results: dict[int, Solved] = {}
    evaluate = _evaluator(tuple(bounds), r_max)
    for shape, members in groups.items():
        x, k, y = shape
        room = max(1, _BATCH_ELEMENTS // (x * y + x * k + k * y))
        batch = min(_BATCH, 1 << (room.bit_length() - 1)) if len(members) > 1 else 1
        for start in range(0, len(members), batch):
            chunk = members[start : start + batch]
            # A short last chunk repeats its first member: one compilation serves all chunks.
            filled = [padded(instances[i], shape) for i in chunk]
            filled += [filled[0]] * (batch - len(chunk))
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
            values = jax.tree.map(np.asarray, evaluate(stacked, beta, lam))
            for row, index in enumerate(chunk):
                parts, checks = jax.tree.map(lambda leaf, row=row: leaf[row], values)
                least, own_r_max = parts.pop("reward_min"), parts.pop("r_max")
                prompts = instances[index].shape[0]
                more: dict[str, Any] = {
                    key: value[:prompts].tolist() if np.ndim(value) else float(value)
                    for key, value in parts.items()
                }
                convention = PAPER_CONVENTION if least >= 0 else SIGNED_CONVENTION
                results[index] = Solved(
                    file="",
                    beta=beta,
                    lam=lam,
                    r_max=float(own_r_max) if r_max is None else r_max,
                    r_max_convention=convention if r_max is None else GIVEN_CONVENTION,
                    # In the order that was asked for, which jit forgets.
                    bounds={name: report(name, checks[name]) for name in bounds},
                    **more,
                )
            progress(len(chunk))
    return [results[index] for index in range(len(instances))]


@functools.lru_cache(maxsize=32)
def _evaluator(bounds: tuple[str, ...], r_max: float | None) -> Callable[..., Any]:
    def one(instance: Instance, beta, lam):
        s = solution(instance, beta, lam)
        parts = {
            "r_max": paper_r_max(s),
            "reward_min": s.reward_min,
            "j_star": s.j_star,
            "j_rho": s.j_rho,
            "gap": s.average(s.gap),
            "exact_gap": s.average(s.model_jeffreys + s.shift - s.prompter_jeffreys),
            "log_z": s.log_z,
            "log_z_star": s.log_z_star,
            "delta1": s.average(s.delta1),
            "delta2": s.average(s.delta2),
        }
        checks = {
            name: theorem1(s, r_max) if name == "theorem1" and r_max is not None else CHOICES[name](s)
            for name in bounds
        }
        return parts, checks

    return jax.jit(jax.vmap(one, in_axes=(0, None, None)))


def _padded_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    for size in (_SMALL, _SIZES[0]):
        if max(shape) <= size:
            return (size,) * 3
    if max(shape) > _SIZES[-1]:
        return shape
    x, k, y = (next(size for size in _SIZES if n <= size) for n in shape)
    return x, k, y
