"""`alignpro verify`: check claims of the theory on many random instances."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from alignpro.commands.shared import save
from alignpro.errors import AlignProError
from alignpro.files import writable_folder
from alignpro.report.numbers import columns, number
from alignpro.report.page import Dot, Dots, Page, Table
from alignpro.runs import owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.theory.search.verification import Summary, Verification

SHOWN_BY_FAMILY = 3
"""Up to so many claims are shown family by family."""


def _cells(claim: "Summary", count: Callable[[int], str]) -> tuple[str, ...]:
    counts = map(count, (claim.checked, claim.violations, claim.inconclusive))
    values = (number(v, ".2g") for v in (claim.least_slack, *claim.tightness[1:]))
    return (*counts, *values, number(claim.vacuous, ".0%"), number(claim.identity_error, ".2g"))


def _by_family(result: "Verification") -> list[str]:
    blocks = []
    for claim in result.by_statement:
        identity = claim.identity_error is not None
        spread = ("slack/span min", "5%", "50%", "lhs/rhs 50%", "95%", "max", "vacuous")
        rest = ("worst error",) if identity else spread
        rows = [("family", "checked", "violated", "unclear", "worst violation", *rest, "seconds")]
        for tally in result.of(claim.name):
            row = tally.row()
            cells = [tally.family, str(tally.judged), str(tally.violations), str(tally.inconclusive)]
            cells.append(number(tally.largest_violation if tally.violations else None, ".2g"))
            if identity:
                cells.append(number(tally.largest_error, ".2g"))
            else:
                slack, ratio = row["slack_over_span_quantiles"], row["lhs_over_rhs_quantiles"]
                cells += [number(v, ".2g") for v in (*slack[:3], *ratio[2:])]
                cells.append(number(row.get("vacuous_share"), ".0%"))
            rows.append((*cells, f"{result.family_seconds[tally.family]:.1f}"))
        blocks.append(f"{claim.name} ({claim.kind})\n{columns(rows, 'w' + 'n' * (len(rows[0]) - 1), '')}")
    return blocks


def _by_statement(result: "Verification") -> str:
    head = "statement|kind|checked|violated|unclear|least slack/span|lhs/rhs 50%|95%|vacuous|identity error"
    rows = [(claim.name, claim.kind, *_cells(claim, str)) for claim in result.by_statement]
    note = "\n(lhs/rhs: median over the families; by family with --bounds NAME, or in verify.json)"
    return columns([head.split("|"), *rows], "w" + "n" * 9, "") + note


def _certified(result: "Verification") -> str:
    head = "certified|proved|of them ties|violated|inconclusive|bits|settled|unexamined"
    rows = []
    for claim in result.by_statement:
        p = claim.proofs
        counts = (p.holds, p.ties, p.violated, p.inconclusive, p.bits, p.settled, p.unexamined)
        rows.append((claim.name, *map(str, counts)))
    note = f"\n(ball arithmetic on the {result.certify} most doubtful of each family; "
    note += "settled: float64 violations that are none)"
    return columns([head.split("|"), *rows], "w" + "n" * 7, "") + note


def text(result: "Verification") -> str:
    few = len(result.statements) <= SHOWN_BY_FAMILY
    blocks = _by_family(result) if few else [_by_statement(result)]
    if result.certify:
        blocks.append(_certified(result))
    lines = []
    for claim in result.by_statement:
        if claim.verdict == "REFUTED":
            worst = result.refuted[claim.name]
            lines.append(
                f"{claim.name}: REFUTED by {claim.refutations} of {claim.checked} instances; e.g. "
                f"{worst.family}, beta {worst.beta:.3g}, lam {worst.lam:.3g}, "
                f"off by {worst.relative:.2g} of the span"
            )
        elif claim.verdict == "violated":
            lines.append(
                f"{claim.name}: {claim.violations} float64 violations of {claim.checked}, none of them proved"
            )
        elif few:
            lines.append(f"{claim.name}: no violation in {claim.checked} instances")
    if not result.findings:
        lines.append(f"no violation of {len(result.statements)} statements")
    lines.append(
        f"{result.seconds:.1f} s, of which {result.compile_seconds:.1f} s compiling; seed {result.seed}"
    )
    return "\n\n".join([*blocks, "\n".join(lines)])


def page(result: "Verification") -> Page:
    claims, refuted = result.by_statement, list(result.refuted)
    page = Page("verify", "The theory on random instances", result.finding, result.settings())
    page.key("Random instances", number(result.instances), f"families: {len(result.families)}")
    page.key("Statements", number(len(claims)), f"{len(refuted)} refuted")
    page.key("Violations", number(result.violations), "in float64, beyond rounding")
    page.key("Time", f"{result.seconds:.1f} s", f"{result.compile_seconds:.1f} s to compile")

    rows, dots = [], []
    for claim in claims:
        low, half, high = claim.tightness
        if claim.identity_error is None:
            dots.append(Dot(claim.name, half, low, high))
        rows.append((claim.name, claim.verdict, *_cells(claim, number)))
    head = "statement | verdict | checked | violated | unclear | least slack / span"
    head += " | left / right, median | 95% | vacuous | identity error"
    known = [claim.name for claim in claims if claim.kind == "known wrong"]
    false = f" Known to be false, and so a test of the tester: {', '.join(known)}." if known else ""
    axis = "left side over right side: median, and 5% to 95% of the instances"
    page.add(
        "Statements",
        "Over all families: the slack over the span of the rewards, and the left side over the right side "
        f"(medians over the families).{false}",
        Table(head, rows, "ww" + "n" * 8),
        Dots("How tight each statement is", axis, dots, [(1.0, "equality")], -1.0) if dots else None,
    )

    if result.certify:
        rows = []
        for claim in claims:
            p = claim.proofs
            proved = (p.holds, p.violated, p.inconclusive, p.ties, p.settled, p.unexamined)
            rows.append((claim.name, *map(number, proved)))
        head = "statement | proved | refuted | inconclusive | ties | settled | unexamined"
        page.add(
            "Certified",
            f"In ball arithmetic, the {result.certify} most doubtful instances of each statement and family; "
            "settled are float64 violations that are none.",
            Table(head, rows, "w" + "n" * 6),
        )
    if refuted:
        rows = []
        for name, worst in result.refuted.items():
            numbers = (number(v) for v in (worst.beta, worst.lam, worst.relative))
            rows.append((name, worst.family, *numbers, f"refuted-{name}.npz"))
        page.add(
            "Counterexamples",
            "One instance for each refuted statement: of the smallest shape, the worst.",
            Table("statement | family | β | λ | off by, of the span | file", rows, "wwnnnw"),
        )
    rows = []
    for f in result.by_family:
        counts = map(number, (f.checked, f.violations, f.inconclusive, f.inapplicable))
        rows.append((f.name, *counts, number(f.seconds, ".1f")))
    page.add(
        "Families",
        "Each over all statements; verify.json has them by family and statement.",
        Table("family | checked | violated | unclear | not applicable | seconds", rows, "w" + "n" * 5),
    )
    return page


@dataclass(frozen=True)
class Verify:
    """Check Theorem 1, its sharper forms, lower bounds, identities and lemmas on random instances.

    Exit status 1 when a statement is violated (with --certify: when that is proved). Known-wrong ones, such
    as signed_max_abs and never_outperforms, test the tester: they must be refuted.
    """

    bounds: tuple[str, ...] = ()
    """Statements to check, by name: theorem1, trained, ceiling, exact_gap, ... or a known-wrong one; an
    unknown name lists them all. Left out: every true statement. Up to three are shown family by family."""
    instances: int = 1_000_000
    """How many random instances (prompts, rewrites, answers, rewards, and the parameters beta and lambda) to
    check in all, shared evenly among the families. More find rarer violations; 100000 take seconds."""
    seed: int = 0
    """Number that determines every random draw: the same seed checks the same instances."""
    family: tuple[str, ...] = ()
    """Kinds of random instances, each made to be awkward in its own way (signed rewards, zero probabilities,
    extreme scales, ...); an unknown name lists them. Left out: all of them."""
    certify: tuple[int, ...] = (0,)
    """Prove verdicts in exact arithmetic on this many instances of each statement and family, those where
    rounding could decide, and on what floating point calls violated. --certify alone: 8; 0 proves none.
    Needs pip install 'alignpro[certify]'."""
    out: str | None = None
    """Folder for verify.json, report.html and, as .npz files, the instances that refute a statement. Left
    out: the result is only printed."""

    renamed: ClassVar = {"bound": "bounds"}
    examples = (
        ("every statement, in seconds", "alignpro verify --instances 100000"),
        (
            "Theorem 1, with proofs where rounding could decide",
            "alignpro verify --bounds theorem1 --certify --out runs/verify",
        ),
    )

    @owning("verify")
    def run(self) -> int:
        from alignpro.theory.families import FAMILIES
        from alignpro.theory.search.verification import TRUE, validate, verify

        if len(self.certify) > 1:
            raise AlignProError(f"--certify {' '.join(map(str, self.certify))}: give one number, or none")
        certify = self.certify[0] if self.certify else 8
        statements, families = self.bounds or TRUE, self.family or tuple(FAMILIES)
        validate(statements, self.instances, self.seed, families, certify)
        folder = None if self.out is None else writable_folder(self.out)
        result = verify(statements, self.instances, self.seed, families, certify=certify)
        say(text(result))
        if folder is not None:
            save(result, "verify", page(result), folder)
        return 1 if result.findings else 0
