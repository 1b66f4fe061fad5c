"""Exact quantities and bounds of saved instances: what `alignpro solve` prints."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.errors import AlignProError
from alignpro.report import keep

if TYPE_CHECKING:
    pass

import functools
from collections import defaultdict
from collections.abc import Callable

import jax
import numpy as np

from alignpro.errors import check_temperature
from alignpro.report.numbers import number
from alignpro.report.page import Dot, Dots, Json, Page, Table, some
from alignpro.theory.bounds import BOUNDS, LOWER_BOUNDS, Statement, paper_r_max, report, theorem1
from alignpro.theory.instance import Instance, load, unchecked
from alignpro.theory.solution import solution

# A new shape costs a second of compilation, so sizes are rounded up to these; beyond them, kept as is.
_SIZES = (32, 128, 512)
_SMALL = 8
_BATCH = 64
_BATCH_ELEMENTS = 2**21

CHOICES = {**BOUNDS, **LOWER_BOUNDS}

SIGNED_CONVENTION = "max r - min r, after shifting the least reward to 0"
PAPER_CONVENTION = "max r, the least reward being at least 0"
GIVEN_CONVENTION = "given"


def load_all(files: Sequence[str | os.PathLike[str]]) -> list[Instance]:
    """Every file, or an AlignProError whose message has one line per bad file."""
    instances, wrong = [], []
    for file in files:
        try:
            instances.append(load(file))
        except AlignProError as error:
            wrong.append(str(error))
    if wrong:
        raise AlignProError("\n".join(wrong))
    return instances


def solve_files(
    files: Sequence[str | os.PathLike[str]],
    beta: float,
    lam: float,
    bounds: Sequence[str] = ("theorem1",),
    r_max: float | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[dict[str, Any]]:
    """One strict-JSON object per file, in order; every file is validated before any is computed.

    Args:
        files: .npz instances.
        beta: β > 0, in reward units.
        lam: λ > 0, in reward units.
        bounds: keys of `CHOICES`, or "all".
        r_max: override of Theorem 1's r_max.
        progress: called with the number of instances just finished.

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
    instances = load_all(files)
    quantities = solve_instances(instances, beta, lam, names, r_max, progress)
    return [{"file": str(file), **result} for file, result in zip(files, quantities, strict=True)]


def solve_instances(
    instances: Sequence[Instance],
    beta: float,
    lam: float,
    bounds: Sequence[str] = ("theorem1",),
    r_max: float | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[dict[str, Any]]:
    """As `solve_files`, for instances in memory: padded to few shapes and batched."""
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for index, instance in enumerate(instances):
        groups[_padded_shape(instance.shape)].append(index)
    results: list[dict[str, Any]] = [{}] * len(instances)
    evaluate = _evaluator(tuple(bounds), r_max)
    for shape, members in groups.items():
        x, k, y = shape
        room = max(1, _BATCH_ELEMENTS // (x * y + x * k + k * y))
        batch = min(_BATCH, 1 << (room.bit_length() - 1)) if len(members) > 1 else 1
        for start in range(0, len(members), batch):
            chunk = members[start : start + batch]
            # A short last chunk repeats its first member: one compilation serves all chunks.
            padded = [_pad(instances[i], shape) for i in chunk]
            padded += [padded[0]] * (batch - len(chunk))
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *padded)
            values = jax.tree.map(np.asarray, evaluate(stacked, beta, lam))
            for row, index in enumerate(chunk):
                one = jax.tree.map(lambda leaf, row=row: leaf[row], values)
                results[index] = _result(bounds, instances[index], beta, lam, one, r_max)
            progress(len(chunk))
    return results


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
    if max(shape) <= _SMALL:
        return (_SMALL,) * 3
    if max(shape) <= _SIZES[0]:
        return (_SIZES[0],) * 3
    if max(shape) > _SIZES[-1]:
        return shape
    x, k, y = (next(size for size in _SIZES if n <= size) for n in shape)
    return x, k, y


def _pad(instance: Instance, shape: tuple[int, int, int]) -> Instance:
    """The same problem with prompts, rewrites and responses of probability 0 added."""
    x, k, y = instance.shape
    to_x, to_k, to_y = shape
    p = np.zeros(to_x)
    p[:x] = instance.p
    prior = np.zeros((to_x, to_k))
    prior[:x, :k] = instance.prior
    prior[x:, 0] = 1.0
    frozen = np.zeros((to_k, to_y))
    frozen[:k, :y] = instance.frozen
    frozen[k:, 0] = 1.0
    own = np.zeros(to_x, dtype=np.int64)
    own[:x] = instance.own
    reward = np.full((to_x, to_y), np.min(np.asarray(instance.reward)))
    reward[:x, :y] = instance.reward
    return unchecked(p, prior, frozen, own, reward)


def _strict(value: Any) -> float | None:
    """None where a quantity overflows: JSON has no infinity."""
    number = float(value)
    return number if math.isfinite(number) else None


def _result(
    order: Sequence[str],
    instance: Instance,
    beta: float,
    lam: float,
    values: tuple[dict, dict[str, Statement]],
    r_max: float | None,
) -> dict[str, Any]:
    parts, checks = values
    prompts = instance.shape[0]
    convention = PAPER_CONVENTION if parts["reward_min"] >= 0 else SIGNED_CONVENTION
    result: dict[str, Any] = {
        "beta": beta,
        "lam": lam,
        "r_max": _strict(parts["r_max"]) if r_max is None else r_max,
        "r_max_convention": convention if r_max is None else GIVEN_CONVENTION,
    }
    for key in ("j_star", "j_rho", "gap", "exact_gap"):
        result[key] = _strict(parts[key])
    for key in ("log_z", "log_z_star"):
        result[key] = [_strict(v) for v in parts[key][:prompts]]
    for key in ("delta1", "delta2"):
        result[key] = _strict(parts[key])
    result["bounds"] = {}
    for name in order:
        said = report(name, checks[name])
        result["bounds"][name] = {
            "relation": said.relation,
            "rhs": _strict(said.rhs),
            "slack": _strict(said.slack),
            "terms": {key: _strict(value) for key, value in said.terms.items()},
            "verdict": said.verdict,
            "vacuous": said.vacuous,
            "error": _strict(said.error),
            "assumptions": dict(said.assumptions),
        }
    return result


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results for reading, in reward units."""

    def show(value: float | None) -> str:
        return "overflow" if value is None else f"{value:.6g}"

    blocks = []
    for result in results:
        lines = [
            f"{result['file']}  (beta {result['beta']:g}, lam {result['lam']:g})",
            f"  J(pi*) {show(result['j_star'])}   J(pi_rho*) {show(result['j_rho'])}   "
            f"gap {show(result['gap'])}   exact identity {show(result['exact_gap'])}",
            f"  Delta1 {show(result['delta1'])}   Delta2 {show(result['delta2'])}   "
            f"r_max {show(result['r_max'])} ({result['r_max_convention']})",
        ]
        rows = [("bound on the gap", "", "rhs", "slack", "verdict", "rests on", "terms")]
        for name, bound in result["bounds"].items():
            terms = ", ".join(f"{key} {show(value)}" for key, value in bound["terms"].items())
            assumed = [key if true else f"NOT SO: {key}" for key, true in bound["assumptions"].items()]
            verdict = bound["verdict"] + (", vacuous" if bound["vacuous"] else "")
            sides = (bound["relation"], show(bound["rhs"]), show(bound["slack"]))
            rows.append((name, *sides, verdict, "; ".join(assumed) or "nothing", terms))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if any(bound["vacuous"] for bound in result["bounds"].values()):
            lines.append("  vacuous: at or beyond plus or minus the reward span, so true of any policies")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


MOST_FILES = 12
"""Of solve's, that get a section of their own."""


def report_of_solve(results: Sequence[Json]) -> Page:
    """Of solve's objects, one for each file."""
    checks = [bound for one in results for bound in one["bounds"].values()]
    bad = sum(bound["verdict"] == "violated" for bound in checks)
    first = results[0]
    page = Page(
        "solve",
        "Exact optima, gap and bounds",
        f"{bad or 'None'} of {len(checks)} bounds {'are' if bad > 1 else 'is'} violated.",
        {**some(first, "beta lam"), "bounds": list(first["bounds"]), "seed": "none: nothing is random"},
    )
    largest = max((one["gap"] for one in results if one["gap"] is not None), default=None)
    page.key("Instances", number(len(results)))
    page.key("Largest gap", number(largest), "reward units")
    page.key("Bounds that hold", number(sum(b["verdict"] == "holds" for b in checks)), f"of {len(checks)}")
    page.key("Vacuous", number(sum(b["vacuous"] for b in checks)), "true of any policies")

    optima = ("j_star", "j_rho", "gap", "delta1", "delta2", "r_max")
    rows = [(one["file"], *(number(one[key]) for key in optima)) for one in results]
    page.add(
        "Optima",
        "The exact RLHF and prompting optima, and the gap between them, in reward units.",
        Table("instance | J(π*) | J(ρ*) | gap | Δ1 | Δ2 | r_max", rows, "w" + "n" * 6),
    )
    for one in results[:MOST_FILES]:
        rows, dots = [], []
        for name, b in one["bounds"].items():
            upper = b["relation"] == "<="
            terms = ", ".join(f"{key} {number(value)}" for key, value in b["terms"].items())
            rests = "; ".join(key if so else f"NOT SO: {key}" for key, so in b["assumptions"].items())
            cells = (
                "≤" if upper else "≥",
                number(b["rhs"]),
                number(b["slack"]),
                b["verdict"] + ", vacuous" * bool(b["vacuous"]),
            )
            rows.append((name, *cells, terms or "–", rests or "nothing"))
            dots.append(Dot(name, b["rhs"], group="upper bound" if upper else "lower bound"))
        gap = one["gap"]
        page.add(
            one["file"],
            f"The bounds on its gap; r_max is {one['r_max_convention']}.",
            Table("bound | gap is | right side | slack | verdict | terms | rests on", rows, "wwnnwww"),
            Dots(
                "Each bound beside the gap",
                "reward units",
                dots,
                [] if gap is None else [(gap, f"gap {number(gap)}")],
            ),
        )
    if len(results) > MOST_FILES:
        page.add(f"{len(results) - MOST_FILES} more files", "Their bounds are in what the verb prints.")
    return page


@dataclass(frozen=True)
class Solve:
    """Print the exact optima, the gap and its bounds for saved instances.

    Every file is validated before anything is computed.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """Instances: .npz files with the arrays p, prior, frozen, own, reward."""
    beta: float
    """RLHF tuning parameter, positive, in reward units."""
    lam: float
    """Prompt tuning parameter (lambda), positive, in reward units."""
    bounds: tuple[str, ...] = ("theorem1",)
    """Upper and lower bounds on the gap by name (theorem1, span, tight, barycentre, trained, ceiling, ...; an
    unknown name lists them), or all."""
    r_max: float | None = None
    """Theorem 1's r_max, when it is known a priori. Default: the largest reward, measured from the least one
    if that is negative."""
    json: bool = False
    """One JSON object per file and line, instead of a table."""
    report: str | None = None
    """File for a page of the results, .html."""

    def run(self) -> int:
        from tqdm import tqdm

        if self.report is not None:
            keep.check_file(self.report)
        with tqdm(total=len(self.files), unit="file", disable=len(self.files) < 100, leave=False) as bar:
            results = solve_files(
                self.files, self.beta, self.lam, self.bounds, self.r_max, progress=bar.update
            )
        if self.json:
            for result in results:
                print(json.dumps(result, ensure_ascii=False, allow_nan=False))
        else:
            print(table(results))
        if self.report is not None:
            keep.keep(report_of_solve(results), self.report)
        return 0
