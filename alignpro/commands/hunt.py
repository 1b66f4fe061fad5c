"""`alignpro hunt`: look for the worst case and the smallest counterexample of a claim."""

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import tyro

from alignpro.commands.shared import save
from alignpro.files import writable_folder
from alignpro.report.numbers import columns, number
from alignpro.report.page import Dot, Dots, Page, Table
from alignpro.runs import owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.theory.search.found import Found
    from alignpro.theory.search.hunting import Hunted, Hunting


def short(value: float) -> str:
    """A short decimal or fraction if the number is one to rounding, else four digits."""
    if not math.isfinite(value) or value == int(value):
        return f"{value:.6g}"
    decimal = f"{value:.3g}"
    if abs(float(decimal) - value) <= 4e-16 * abs(value):
        return decimal
    fraction = Fraction(value).limit_denominator(99)
    if abs(float(fraction) - value) <= 4e-16 * abs(value):
        return str(fraction)
    return f"{value:.4g}"


def tables(found: "Found") -> str:
    """An instance for reading: per prompt one row per rewrite, then the rewards and π*.

    Columns: ρ_sft, ρ*, the prompter asked about where it is not ρ*, R(x,x′), and π_F(y|x′) for every y.
    """
    instance, (x, k, y) = found.instance, found.instance.shape
    blocks = [f"beta {found.beta:g}   lam {found.lam:g}   {x} x {k} x {y} (prompts, rewrites, responses)"]
    for i in range(x):
        shown = {"rho_sft": instance.prior[i], "rho*": found.rho_star[i]}
        if found.prompter is not None:
            shown["rho"] = found.prompter[i]
        shown["R"] = found.rewrite_reward[i]
        rows = [[f"prompt {i}, P = {short(float(instance.p[i]))}", *shown, *(f"y{j}" for j in range(y))]]
        for row in range(k):
            name = f"  pi_F, rewrite {row}" + (" = the prompt" if row == instance.own[i] else "")
            rows.append([name, *(short(c[row]) for c in shown.values()), *map(short, instance.frozen[row])])
        blank = [""] * (len(shown) - 1)
        star = found.pi_star[i]
        rows.append(["  pi*", *blank, short(float(star @ instance.reward[i])), *map(short, star)])
        rows.append(["  reward", *blank, "", *map(short, instance.reward[i])])
        blocks.append(columns(rows, "w" + "n" * (len(shown) + y), ""))
    return "\n".join(blocks)


def text(result: "Hunted") -> str:
    from alignpro.theory.search.hunting import ROLES

    ascent, equality = result.ascent, result.target.equality
    relation, measure = ("=", "|lhs - rhs|/span") if equality else ("<=", "lhs/rhs")
    lines = [f"{result.target.name} (lhs {relation} rhs, {result.kind}): {result.finding}"]
    if ascent.tightest is not None:
        start = f", from {number(ascent.start)} at the start" if math.isfinite(ascent.start) else ""
        largest = number(ascent.tightest.tightness, ".6g")
        lines.append(f"ascent: largest {measure} {largest}{start} ({ascent.steps} steps)")
    if "smallest" not in result.finds and result.smallest is not None:
        lines.append(f"smallest: no counterexample among {result.tried} instances")
    if result.interrupted:
        lines.append("interrupted: this is what was found so far")
    for role in result.shown:
        found, proof = result.finds[role], result.certificates.get(role)
        how = "float64" if proof is None else f"certified with {proof.precision} bits"
        ratio = f", lhs/rhs {found.ratio:.6g}" if math.isfinite(found.ratio) else ""
        lines += [
            "",
            f"{ROLES[role]}: lhs {found.lhs:.6g}, rhs {found.rhs:.6g}{ratio}, "
            f"slack {-found.excess:.3g} of the span; {result.verdict(role)} ({how})",
            tables(found),
        ]
    return "\n".join(lines)


def page(result: "Hunting") -> Page:
    from alignpro.theory.search.hunting import ROLES

    names = [one.target.name for one in result.hunted]
    page = Page("hunt", "Worst cases and counterexamples", result.finding, asdict(result.budget))
    page.key("Statements", number(len(names)), ", ".join(names))
    page.key("Refuted", number(len(result.refuted)))
    page.key("Ascents", number(result.budget.restarts), f"of {result.budget.steps} steps, for each statement")

    rows, dots, finds = [], [], []
    for one in result.hunted:
        name, tight = one.target.name, one.ascent.tightest
        start = one.ascent.start if math.isfinite(one.ascent.start) else None
        tightest = None if tight is None else tight.tightness
        if not one.target.equality:
            dots += [Dot(name, start, group="best start"), Dot(name, tightest, group="tightest found")]
        said = one.finding + ", interrupted" * one.interrupted
        rows.append((name, said, *map(number, (start, tightest, one.ascent.steps, one.tried))))
        for role, found in one.finds.items():
            proof = one.certificates.get(role)
            shape = " × ".join(map(str, found.instance.shape))
            numbers = [number(v, ".6g") for v in (found.beta, found.lam, found.lhs, found.rhs, found.ratio)]
            numbers.append(number(-found.excess, ".3g"))
            by = "float64" if proof is None else f"{proof.precision} bits"
            finds.append((one.file(role), ROLES[role], one.verdict(role), by, shape, *numbers))
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
    """Statements to hunt, by name, e.g. theorem1, tight, signed_max_abs, q2; an unknown name lists them."""
    shape: tuple[int, int, int] = (2, 3, 3)
    """How many prompts, rewrites and responses the instances have; counterexamples may be smaller. 1 to 64
    each; larger ones take longer and are harder to read."""
    restarts: int = 256
    """How many ascents, from random instances side by side. More find worse cases."""
    steps: int = 500
    """Steps of each ascent. More come closer to the worst case."""
    tries: int = 2000
    """How many random instances to try in search of a small counterexample, before giving up."""
    seed: int = 0
    """Number that determines the random draws: the same seed finds the same instances."""
    seconds: float | None = None
    """Most seconds to spend on each statement, compilation aside. Left out: no limit."""
    out: str | None = None
    """Folder for hunt.json, report.html and the instances found (.npz). Left out: they are only printed."""

    examples = (
        ("how tight Theorem 1 can be", "alignpro hunt theorem1 --out runs/hunt"),
        (
            "the smallest counterexample of a claim that is wrong",
            "alignpro hunt signed_max_abs --shape 1 2 2 --restarts 64",
        ),
    )

    @owning("hunt")
    def run(self) -> int:
        """Hunt one statement after another; KeyboardInterrupt after Ctrl-C, once all so far is kept."""
        from alignpro.theory.search.hunting import Budget, Hunting, hunt, validate

        budget = Budget(self.shape, self.restarts, self.steps, self.tries, self.seed, self.seconds)
        wanted = validate(self.bounds, budget)
        folder = None if self.out is None else writable_folder(self.out)
        result = Hunting(budget)
        try:
            for one in wanted:
                result.hunted.append(hunt(one, budget))
                say(("\n\n" if len(result.hunted) > 1 else "") + text(result.hunted[-1]))
                if result.hunted[-1].interrupted:
                    raise KeyboardInterrupt
        finally:
            if folder is not None and result.hunted:
                say()
                save(result, "hunt", page(result), folder)
        return 1 if result.refuted else 0
