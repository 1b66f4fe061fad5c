"""Hunted statements of the theory for near-equality and counterexamples: what `alignpro hunt` runs."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import tyro

import alignpro
from alignpro.errors import AlignProError
from alignpro.report import keep

if TYPE_CHECKING:
    pass

from fractions import Fraction
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from alignpro.files import writable_folder, write_json
from alignpro.report.numbers import number
from alignpro.report.page import Dot, Dots, Json, Page, Table, some
from alignpro.theory.bounds import STATEMENTS, WRONG_BOUNDS
from alignpro.theory.families import Shape
from alignpro.theory.search.ascend import Ascent, ascend
from alignpro.theory.search.found import Found, Target, certificate, target
from alignpro.theory.search.shrink import Smallest, smallest

LARGEST = 64
"""Sizes beyond are refused: a counterexample of that size teaches nothing."""


@dataclass(frozen=True)
class Hunted:
    """What was found for one statement."""

    target: Target
    ascent: Ascent
    smallest: Smallest | None
    """None when interrupted before."""
    verdicts: dict[str, Any]
    """The certificate (None without python-flint) of each of `finds`."""

    @property
    def finds(self) -> dict[str, Found]:
        """By role: smallest and worst counterexample, and tightest instance, as far as there are any."""
        roles = {
            "smallest": self.smallest.found if self.smallest else None,
            "worst": self.ascent.worst,
            "tightest": self.ascent.tightest,
        }
        return {role: found for role, found in roles.items() if found is not None}

    @property
    def interrupted(self) -> bool:
        """By Ctrl-C, before both routes had ended."""
        return self.ascent.interrupted or self.smallest is None or self.smallest.interrupted

    @property
    def refuted(self) -> bool:
        """Whether there is a counterexample: proved where that can be, else beyond rounding."""
        return any(self.verdict(role) == "violated" for role in self.finds)

    def verdict(self, role: str) -> str:
        """The certified verdict, or the float64 one without python-flint."""
        proof = self.verdicts.get(role)
        return self.finds[role].verdict if proof is None else proof.verdict

    def row(self, role: str) -> dict[str, Any]:
        """A find as JSON."""
        found, proof = self.finds[role], self.verdicts.get(role)
        return {
            "instance": f"{self.target.name}-{role}.npz",
            "shape": list(found.instance.shape),
            "beta": found.beta,
            "lam": found.lam,
            "prompter": None if found.prompter is None else found.prompter.tolist(),
            "lhs": _finite(found.lhs),
            "rhs": _finite(found.rhs),
            "ratio": _finite(found.ratio),
            "slack_over_span": _finite(-found.excess),
            "error": _finite(found.error),
            "verdict": self.verdict(role),
            "float64_verdict": found.verdict,
            "certificate": None
            if proof is None
            else {"slack": proof.slack, "bits": proof.precision, "within": _finite(proof.within)},
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Budget:
    """Where and how long to look."""

    shape: Shape = (2, 3, 3)
    """(X, K, Y) of ascent's instances, and the largest of the small ones."""
    restarts: int = 256
    steps: int = 500
    tries: int = 2000
    """Random instances in the search for the smallest, before it gives up."""
    seed: int = 0
    seconds: float | None = None
    """Per statement, half for each route."""


def validate(bounds: Sequence[str], budget: Budget) -> list[Target]:
    """The statements asked for; refuses what cannot be run, before anything is written or computed.

    Raises:
        AlignProError: no or an unknown statement, a size, count or time that is not positive, a negative
            seed, or Hypothesis is not installed.
    """
    if not bounds:
        raise AlignProError(f"BOUND: none given; name at least one of {', '.join(STATEMENTS)}")
    wanted = list(dict.fromkeys(target(name) for name in bounds))
    if not 1 <= min(budget.shape) <= max(budget.shape) <= LARGEST:
        sizes = " ".join(map(str, budget.shape))
        raise AlignProError(f"--shape {sizes}: give the sizes X K Y, each from 1 to {LARGEST}")
    for flag in ("restarts", "steps", "tries"):
        if getattr(budget, flag) < 1:
            raise AlignProError(f"--{flag} {getattr(budget, flag)}: must be positive; give at least 1")
    if budget.seed < 0:
        raise AlignProError(f"--seed {budget.seed}: must not be negative; give 0 or more")
    if budget.seconds is not None and not 0 < budget.seconds < math.inf:
        raise AlignProError(
            f"--seconds {budget.seconds}: must be positive and finite; give some or leave it out"
        )
    import alignpro.theory.testing  # noqa: F401 - complains in one line where Hypothesis is missing

    return wanted


def hunt(wanted: Target, budget: Budget = Budget(), quiet: bool = False) -> Hunted:
    """One statement by both routes; what is found is certified where python-flint is installed.

    Ctrl-C ends the search and keeps what it has found.
    """
    seconds = None if budget.seconds is None else budget.seconds / 2
    with tqdm(total=budget.steps + budget.tries, disable=quiet, file=sys.stderr, leave=False) as bar:
        bar.set_description(f"{wanted.name}: ascent")

        def climbed(done: int, best: float) -> None:
            bar.update(done - bar.n)
            bar.set_postfix_str(f"best {best:.6g}")

        ascent = ascend(
            wanted,
            budget.shape,
            restarts=budget.restarts,
            steps=budget.steps,
            seed=budget.seed,
            seconds=seconds,
            progress=climbed,
        )
        small = None
        if not ascent.interrupted:
            bar.set_description(f"{wanted.name}: smallest")
            small = smallest(
                wanted,
                budget.shape,
                seed=budget.seed,
                tries=budget.tries,
                seconds=seconds,
                progress=lambda _: bar.update(),
            )
    result = Hunted(wanted, ascent, small, {})
    for role, found in result.finds.items():
        result.verdicts[role] = certificate(found)
    return result


def _show(value: float) -> str:
    """A short decimal or fraction if the number is one to rounding, else four digits."""
    if not math.isfinite(value) or value == int(value):
        return f"{value:.6g}"
    short = f"{value:.3g}"
    if abs(float(short) - value) <= 4e-16 * abs(value):
        return short
    fraction = Fraction(value).limit_denominator(99)
    if abs(float(fraction) - value) <= 4e-16 * abs(value):
        return str(fraction)
    return f"{value:.4g}"


def tables(found: Found) -> str:
    """An instance for reading: per prompt one row per rewrite, then the rewards and π*.

    Columns: ρ_sft, ρ*, the prompter asked about where it is not ρ*, R(x,x′), and π_F(y|x′) for every y.
    """
    instance = found.instance
    x, k, y = instance.shape
    p, prior, frozen, own, reward = (
        np.asarray(getattr(instance, key)) for key in ("p", "prior", "frozen", "own", "reward")
    )
    blocks = [f"beta {found.beta:g}   lam {found.lam:g}   {x} x {k} x {y} (prompts, rewrites, responses)"]
    for i in range(x):
        columns = {"rho_sft": prior[i], "rho*": found.rho_star[i]}
        if found.prompter is not None:
            columns["rho"] = found.prompter[i]
        columns["R"] = found.rewrite_reward[i]
        lines = [[f"prompt {i}, P = {_show(p[i])}", *columns, *(f"y{j}" for j in range(y))]]
        for row in range(k):
            name = f"  pi_F, rewrite {row}" + (" = the prompt" if row == own[i] else "")
            lines.append([name, *(_show(c[row]) for c in columns.values()), *map(_show, frozen[row])])
        blank = [""] * (len(columns) - 1)
        star = found.pi_star[i]
        lines.append(["  pi*", *blank, _show(float(star @ reward[i])), *map(_show, star)])
        lines.append(["  reward", *blank, "", *map(_show, reward[i])])
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        blocks.append(
            "\n".join(
                "  ".join(
                    cell.ljust(w) if j == 0 else cell.rjust(w)
                    for j, (cell, w) in enumerate(zip(line, widths, strict=True))
                ).rstrip()
                for line in lines
            )
        )
    return "\n".join(blocks)


_ROLES = {
    "smallest": "smallest counterexample",
    "worst": "worst counterexample (ascent)",
    "tightest": "tightest instance (ascent)",
}


def text(result: Hunted) -> str:
    """A hunt for reading: the finding, then the instances that show it."""
    name, ascent, small = result.target.name, result.ascent, result.smallest
    kind = "known to be false" if name in WRONG_BOUNDS else "identity" if result.target.equality else "claim"
    relation = "=" if result.target.equality else "<="
    lines = [f"{name} (lhs {relation} rhs, {kind}): {'REFUTED' if result.refuted else 'no counterexample'}"]
    measure = "|lhs - rhs|/span" if result.target.equality else "lhs/rhs"
    if ascent.tightest is not None:
        start = f", from {ascent.start:.4g} at the start" if ascent.start > -math.inf else ""
        lines.append(
            f"ascent: largest {measure} {ascent.tightest.tightness:.6g}{start} ({ascent.steps} steps)"
        )
    if small is not None and small.found is None:
        lines.append(f"smallest: no counterexample among {small.tried} instances")
    if result.interrupted:
        lines.append("interrupted: this is what was found so far")
    # A counterexample says more than an instance that is merely tight, or nearly identical.
    roles = [role for role in result.finds if role != "tightest"] or (
        [] if result.target.equality else list(result.finds)
    )
    for role in roles:
        found, proof = result.finds[role], result.verdicts.get(role)
        how = "float64" if proof is None else f"certified with {proof.precision} bits"
        lines += [
            "",
            f"{_ROLES[role]}: lhs {found.lhs:.6g}, rhs {found.rhs:.6g}"
            + (f", lhs/rhs {found.ratio:.6g}" if math.isfinite(found.ratio) else "")
            + f", slack {-found.excess:.3g} of the span; {result.verdict(role)} ({how})",
            tables(found),
        ]
    return "\n".join(lines)


def save(results: Sequence[Hunted], folder: Path, budget: Budget) -> None:
    """Write json and the instance of every find, atomically."""
    for result in results:
        for role, found in result.finds.items():
            found.instance.save(folder / f"{result.target.name}-{role}.npz")
    content = {
        "alignpro": alignpro.__version__,
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        **asdict(budget),
        "statements": {
            result.target.name: {
                "refuted": result.refuted,
                "steps": result.ascent.steps,
                "start_ratio": _finite(result.ascent.start),
                "tried": result.smallest.tried if result.smallest else 0,
                "interrupted": result.interrupted,
                **{role: result.row(role) for role in result.finds},
            }
            for result in results
        },
    }
    write_json(folder / "json", content)
    keep.keep(report_of_hunt(content), folder)


def main(bounds: Sequence[str], budget: Budget, out: str | None) -> int:
    """Run, print and save; the process's exit status: 1 when a statement is refuted, else 0.

    Raises:
        AlignProError: as `validate`, or the folder cannot be written to.
        KeyboardInterrupt: after Ctrl-C, once what was found so far is printed and saved.
    """
    wanted = validate(bounds, budget)
    folder = None if out is None else writable_folder(out)
    results: list[Hunted] = []
    try:
        for one in wanted:
            results.append(hunt(one, budget))
            print(("\n\n" if len(results) > 1 else "") + text(results[-1]), flush=True)
            if results[-1].interrupted:
                raise KeyboardInterrupt
    finally:
        if folder is not None and results:
            save(results, folder, budget)
            print(f"\nwrote {folder / 'json'}")
    return 1 if any(result.refuted for result in results) else 0


_PAGE_ROLES = {
    "smallest": "smallest counterexample",
    "worst": "worst counterexample",
    "tightest": "tightest instance",
}


def report_of_hunt(result: Json) -> Page:
    """Of json."""
    from alignpro.theory.search.found import target

    every = result["statements"]
    refuted = [name for name, of in every.items() if of["refuted"]]
    page = Page(
        "hunt",
        "Worst cases and counterexamples",
        f"Refuted: {', '.join(refuted)}." if refuted else "No counterexample was found.",
        some(result, "seed shape restarts steps tries seconds"),
    )
    page.key("Statements", number(len(every)), ", ".join(every))
    page.key("Refuted", number(len(refuted)))
    page.key("Ascents", number(result["restarts"]), f"of {result['steps']} steps, for each statement")

    rows, dots, finds = [], [], []
    for name, of in every.items():
        ratio = of["tightest"]["ratio"] if "tightest" in of else None
        if target(name).equality:  # what is measured is |left − right| over the span of the rewards
            ratio = abs(of["tightest"]["slack_over_span"]) if "tightest" in of else None
        else:
            dots += [
                Dot(name, of["start_ratio"], group="best start"),
                Dot(name, ratio, group="tightest found"),
            ]
        said = ("REFUTED" if of["refuted"] else "no counterexample") + ", interrupted" * of["interrupted"]
        rows.append((name, said, *map(number, (of["start_ratio"], ratio, of["steps"], of["tried"]))))
        for role, words in _PAGE_ROLES.items():
            if (find := of.get(role)) is None:
                continue
            proof = find["certificate"]
            shape = " × ".join(map(str, find["shape"]))
            numbers = [number(find[key], ".6g") for key in ("beta", "lam", "lhs", "rhs", "ratio")]
            numbers.append(number(find["slack_over_span"], ".3g"))
            by = "float64" if proof is None else f"{proof['bits']} bits"
            finds.append((find["instance"], words, find["verdict"], by, shape, *numbers))
    page.add(
        "Statements",
        "The left side over the right (identities: their distance over the span of the rewards): of the best "
        "random start, and after gradient ascent.",
        Table("statement | finding | best start | tightest | steps | instances tried", rows, "wwnnnn"),
        Dots("How far ascent got", "left side over right side", dots, [(1.0, "equality")]) if dots else None,
    )
    head = "file | what | verdict | by | shape | β | λ | left side | right side | ratio | slack / span"
    page.add(
        "Instances found",
        "Each is saved in the file named; shapes are prompts × rewrites × responses.",
        Table(head, finds, "wwww" + "n" * 7),
    )
    return page


@dataclass(frozen=True)
class Hunt:
    """Look for the worst case of a statement: by gradient ascent, and for the smallest counterexample.

    Exit status 1 when one is refuted. Statements: those of verify, and q2, whether the optimal prompter can
    outperform the RLHF optimum. Ctrl-C keeps what was found so far.
    """

    bounds: tyro.conf.Positional[tuple[str, ...]]
    """What to hunt, e.g. theorem1, tight, signed_max_abs, q2."""
    shape: tuple[int, int, int] = (2, 3, 3)
    """Prompts, rewrites and responses of the instances; counterexamples may be smaller."""
    restarts: int = 256
    """How many ascents, side by side."""
    steps: int = 500
    """Steps of each ascent."""
    tries: int = 2000
    """Random instances in search of a small counterexample."""
    seed: int = 0
    """Determines the search."""
    seconds: float | None = None
    """Time for each statement, compilation aside. Default: no limit."""
    out: str | None = None
    """Folder for json, report.html and the instances found (.npz)."""

    def run(self) -> int:

        budget = Budget(self.shape, self.restarts, self.steps, self.tries, self.seed, self.seconds)
        return main(self.bounds, budget, self.out)
