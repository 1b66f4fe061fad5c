"""Check statements of the theory on many random instances: what `alignpro verify` runs."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import alignpro
from alignpro.errors import AlignProError

if TYPE_CHECKING:
    pass

import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from tqdm import tqdm

from alignpro.files import writable_folder, write_json
from alignpro.report import keep as pages_keep
from alignpro.report.numbers import number
from alignpro.report.page import Dot, Dots, Json, Page, Table, some
from alignpro.theory.bounds import (
    BOUNDS,
    IDENTITIES,
    LEMMAS,
    LOWER_BOUNDS,
    STATEMENTS,
    WRONG_BOUNDS,
    Statement,
)
from alignpro.theory.families import FAMILIES, random_prompters, take
from alignpro.theory.instance import Instance
from alignpro.theory.solution import solution

if TYPE_CHECKING:  # python-flint is optional
    from alignpro.theory.proof.certify import Certificate, Doubtful

DEFAULT = (*BOUNDS, *LOWER_BOUNDS, *IDENTITIES, *LEMMAS)

# Few shapes, since each is compiled once: fewer, as many and more rewrites than prompts.
_SHAPES = ((1, 2, 2), (2, 4, 3), (5, 3, 8))
_CHUNK = 1000
_KEPT = 50_000
_TEMPERATURES = (1e-4, 1e4)
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


class Sample:
    """A uniform sample of a stream in bounded memory: the whole stream up to `_KEPT` values."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng, self._seen, self._kept = rng, 0, np.empty(0)

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        room = _KEPT - self._kept.size
        self._kept = np.concatenate([self._kept, values[:room]])
        self._seen += min(room, values.size)
        late = values[room:]
        if late.size:
            # Reservoir sampling: the n-th value replaces a random kept one with probability _KEPT/n.
            slot = self._rng.integers(self._seen + 1 + np.arange(late.size))
            self._seen += late.size
            hit = slot < _KEPT
            self._kept[slot[hit]] = late[hit]

    def quantiles(self) -> list[float | None]:
        if not self._kept.size:
            return [None] * len(_QUANTILES)
        return [float(v) for v in np.quantile(self._kept, _QUANTILES)]


@dataclass
class Worst:
    """The refutation kept: of the smallest shape, the largest relative violation."""

    instance: Instance
    beta: float
    lam: float
    prompter: np.ndarray | None
    relative: float
    family: str

    def better_than(self, other: "Worst | None") -> bool:
        if other is None:
            return True
        size, known = math.prod(self.instance.shape), math.prod(other.instance.shape)
        return (size, -self.relative) < (known, -other.relative)


@dataclass
class Tally:
    """One statement on one family."""

    statement: str
    family: str
    slack: Sample
    tightness: Sample
    checked: int = 0
    violations: int = 0
    inconclusive: int = 0
    inapplicable: int = 0
    vacuous: int = 0
    largest_violation: float = 0.0
    """Largest −slack/(reward span) among violations."""
    largest_error: float = 0.0
    """Identities: largest |rhs − lhs|/(largest of the sides' rounding scale), as a fraction of the span."""
    worst: Worst | None = None
    doubtful: "Doubtful | None" = None
    """What to certify; None without certification."""
    certificates: "list[Certificate]" = field(default_factory=list)
    """One for each of `doubtful.kept`, in that order."""

    @property
    def unexamined(self) -> int:
        """Float64 violations that were not certified."""
        return self.violations - (self.doubtful.claimed if self.doubtful else 0)

    @property
    def proved(self) -> int:
        """Certified violations."""
        return sum(one.verdict == "violated" for one in self.certificates)

    @property
    def settled(self) -> int:
        """Float64 violations that a proof refutes."""
        kept = self.doubtful.kept if self.doubtful else []
        pairs = zip(kept, self.certificates, strict=False)
        return sum(score < -1 and one.verdict in ("holds", "inapplicable") for (score, _), one in pairs)

    def certified_row(self) -> dict[str, Any]:
        """What certification found, as JSON."""
        verdicts = Counter(one.verdict for one in self.certificates)
        bits = Counter(one.precision for one in self.certificates)
        return {
            "statement": self.statement,
            "family": self.family,
            "verdicts": dict(verdicts),
            "ties": sum(one.slack == "0" for one in self.certificates),
            "precisions": {str(key): bits[key] for key in sorted(bits)},
            "float64_violations_settled": self.settled,
            "float64_violations_unexamined": self.unexamined,
            "most_doubtful": asdict(self.certificates[0]) if self.certificates else None,
        }

    def row(self) -> dict[str, Any]:
        """As JSON."""
        judged = max(self.checked - self.inapplicable, 1)
        row: dict[str, Any] = {
            "statement": self.statement,
            "family": self.family,
            "checked": self.checked,
            "violations": self.violations,
            "inconclusive": self.inconclusive,
            "inapplicable": self.inapplicable,
            "largest_relative_violation": self.largest_violation,
        }
        if self.statement in IDENTITIES:
            return {**row, "largest_relative_error": self.largest_error}
        row["slack_over_span_quantiles"] = self.slack.quantiles()
        row["lhs_over_rhs_quantiles"] = self.tightness.quantiles()
        if self.statement in BOUNDS:
            row["vacuous_share"] = self.vacuous / judged
        return row


@dataclass
class Verification:
    """What a run found."""

    instances: int
    seed: int
    statements: tuple[str, ...]
    families: tuple[str, ...]
    tallies: list[Tally]
    family_seconds: dict[str, float]
    compile_seconds: float = 0.0
    seconds: float = 0.0
    """Compilation included."""
    refuted: dict[str, Worst] = field(default_factory=dict)
    certify: int = 0
    """How many instances of each statement and family were certified; 0 for none."""

    @property
    def violations(self) -> int:
        return sum(tally.violations for tally in self.tallies)

    @property
    def findings(self) -> int:
        """Violations; under certification those proved, and what float64 claims but nothing has examined."""
        if not self.certify:
            return self.violations
        return sum(tally.proved + tally.unexamined for tally in self.tallies)

    def json(self) -> dict[str, Any]:
        """As strict JSON."""
        return {
            "alignpro": alignpro.__version__,
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "numpy": np.__version__,
            "instances": self.instances,
            "seed": self.seed,
            "statements": list(self.statements),
            "families": list(self.families),
            "shapes": [list(shape) for shape in _SHAPES],
            "beta_and_lam_log_uniform_over": list(_TEMPERATURES),
            "quantile_levels": list(_QUANTILES),
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            "family_seconds": self.family_seconds,
            "violations": self.violations,
            "results": [tally.row() for tally in self.tallies],
            "certified": {
                "most_doubtful_per_statement_and_family": self.certify,
                "violations": sum(tally.proved for tally in self.tallies),
                "results": [tally.certified_row() for tally in self.tallies],
            }
            if self.certify
            else None,
            "refuted": {
                name: {
                    "family": worst.family,
                    "beta": worst.beta,
                    "lam": worst.lam,
                    "relative_violation": worst.relative,
                    "instance": f"refuted-{name}.npz",
                    "prompter": None if worst.prompter is None else worst.prompter.tolist(),
                }
                for name, worst in self.refuted.items()
            },
        }


def _evaluate(names: tuple[str, ...], instance: Instance, beta, lam, prompter) -> dict[str, Statement]:
    about_any = [name for name in names if STATEMENTS[name].any_prompter]
    about_star = [name for name in names if not STATEMENTS[name].any_prompter]
    found: dict[str, Statement] = {}
    if about_star:
        s = solution(instance, beta, lam)
        found |= {name: STATEMENTS[name](s) for name in about_star}
    if about_any:
        s = solution(instance, beta, lam, prompter)
        found |= {name: STATEMENTS[name](s) for name in about_any}
    return found


@lru_cache(maxsize=8)
def _evaluator(names: tuple[str, ...]) -> Callable[..., dict[str, Statement]]:
    return jax.jit(jax.vmap(partial(_evaluate, names)))


def validate(
    statements: Sequence[str], instances: int, seed: int, families: Sequence[str], certify: int = 0
) -> None:
    """Refuse what `verify` cannot run, before anything is written or computed.

    Raises:
        AlignProError: as `verify`.
    """
    for name in statements:
        if name not in STATEMENTS:
            raise AlignProError(f"--bound {name}: is unknown; give one of {', '.join(STATEMENTS)}")
    for name in families:
        if name not in FAMILIES:
            raise AlignProError(f"--family {name}: is unknown; give one of {', '.join(FAMILIES)}")
    if instances < len(set(families)):
        raise AlignProError(
            f"--instances {instances}: is below one for each of {len(set(families))} families; give more"
        )
    if certify < 0:
        raise AlignProError(f"--certify {certify}: must not be negative; give how many instances, 0 for none")
    if certify:
        import alignpro.theory.proof.certify  # noqa: F401 - or the one-line error that names the missing package
    if seed < 0:
        raise AlignProError(f"--seed {seed}: must not be negative; give 0 or more")


def verify(
    statements: Sequence[str] = DEFAULT,
    instances: int = 1_000_000,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    quiet: bool = False,
    certify: int = 0,
) -> Verification:
    """Check statements on random instances of every family, in bounded memory.

    β and λ are log-uniform over 1e-4 to 1e4, independently. Statements about any prompter get one at random
    distance from ρ_sft, the others ρ*. A violation is a slack below minus its rounding bound; an identity is
    violated when its sides differ by more than theirs.

    Args:
        statements: keys of `STATEMENTS`.
        instances: how many in all, shared evenly among the families.
        seed: determines every draw.
        families: keys of `FAMILIES`.
        quiet: no progress bar.
        certify: how many instances to certify, of each statement and family: those of least slack beside its
            rounding error bound; of what float64 calls violated, up to `certify.EXAMINED`.

    Raises:
        AlignProError: an unknown statement or family, fewer than one instance per family, or python-flint
            is needed and missing.
    """
    validate(statements, instances, seed, families, certify)
    names, families = tuple(dict.fromkeys(statements)), tuple(dict.fromkeys(families))
    began = time.perf_counter()
    result = Verification(instances, seed, names, families, [], {}, certify=certify)
    evaluate = _evaluator(names)
    shares = np.full(len(families), instances // len(families))
    shares[: instances % len(families)] += 1
    chunk = min(_CHUNK, -(-int(shares[0]) // len(_SHAPES)))  # even a short run meets every shape
    # A bar of its own: compiling is most of a short run, and what starts should say so.
    bar = tqdm(_SHAPES, "compiling", unit="shape", disable=quiet, file=sys.stderr, leave=False)
    for shape in bar:
        rng = np.random.default_rng(seed)
        batch = FAMILIES[families[0]](rng, chunk, shape)
        ones = np.ones(chunk)
        jax.block_until_ready(evaluate(batch, ones, ones, batch.prior))
    result.compile_seconds = time.perf_counter() - began
    with tqdm(total=instances, unit="instance", disable=quiet, file=sys.stderr, leave=False) as bar:
        for family, share in zip(families, shares, strict=True):
            start = time.perf_counter()
            # Keyed by the family's name: its instances do not depend on which others are asked for.
            rng = np.random.default_rng([seed, *family.encode()])
            keep = np.random.default_rng(seed)
            tallies = {
                name: Tally(name, family, Sample(keep), Sample(keep), doubtful=_doubtful(certify))
                for name in names
            }
            bar.set_description(family)
            done = turn = 0
            while done < share:
                count = min(chunk, int(share) - done)
                batch = FAMILIES[family](rng, chunk, _SHAPES[turn % len(_SHAPES)])
                low, high = np.log10(_TEMPERATURES)
                beta, lam = 10.0 ** rng.uniform(low, high, (2, chunk))
                prompter = random_prompters(rng, np.asarray(batch.prior))
                found = jax.tree.map(np.asarray, evaluate(batch, beta, lam, prompter))
                for name, tally in tallies.items():
                    statement = jax.tree.map(lambda leaf, count=count: leaf[:count], found[name])
                    _record(tally, statement, batch, beta, lam, prompter)
                done, turn = done + count, turn + 1
                bar.update(count)
            result.tallies += tallies.values()
            result.family_seconds[family] = time.perf_counter() - start
    if certify:
        _certify(result, quiet)
    for tally in result.tallies:
        if tally.worst is not None and tally.worst.better_than(result.refuted.get(tally.statement)):
            result.refuted[tally.statement] = tally.worst
    result.seconds = time.perf_counter() - began
    return result


def _doubtful(certify: int) -> "Doubtful | None":
    if not certify:
        return None
    from alignpro.theory.proof.certify import Doubtful

    return Doubtful(certify)


def _certify(result: Verification, quiet: bool) -> None:
    """Certify what the tallies keep; a refutation is then one that is proved."""
    from alignpro.theory.proof.certify import Case, certify_many

    kept = [(tally, case) for tally in result.tallies if tally.doubtful for _, case in tally.doubtful.kept]
    cases = [Case(instance, beta, lam, t.statement, rho) for t, (instance, beta, lam, rho) in kept]
    for tally in result.tallies:
        tally.worst = None
    for (tally, (instance, beta, lam, rho)), found in zip(
        kept, certify_many(cases, quiet=quiet), strict=True
    ):
        tally.certificates.append(found)
        worst = Worst(instance, beta, lam, rho, found.within, tally.family)
        if found.verdict == "violated" and worst.better_than(tally.worst):
            tally.worst = worst


def _record(
    tally: Tally, found: Statement, batch: Instance, beta: np.ndarray, lam: np.ndarray, prompter: np.ndarray
) -> None:
    lhs, rhs, error = np.asarray(found.lhs), np.asarray(found.rhs), np.asarray(found.error)
    ceiling, slack = np.asarray(found.ceiling), rhs - lhs
    applicable = np.ones(slack.shape, dtype=bool)
    for assumption in found.assumptions.values():
        applicable &= assumption
    known = ~(np.isnan(slack) | np.isnan(error))
    if tally.statement in IDENTITIES:
        violated = applicable & known & (np.abs(slack) > error)
        unclear = applicable & ~known
    else:
        violated = applicable & known & (slack < -error)
        unclear = applicable & (~known | ((np.abs(slack) <= error) & (error > 0)))
    tally.checked += slack.size
    tally.violations += int(violated.sum())
    tally.inconclusive += int(unclear.sum())
    tally.inapplicable += int((~applicable).sum())
    tally.vacuous += int((applicable & (rhs >= ceiling)).sum())

    scale = np.where(ceiling > 0, ceiling, 1.0)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        relative = slack / scale
        if tally.statement in IDENTITIES:
            # λ KL of a far prompter can exceed the span by orders of magnitude: it sets the rounding then.
            size = np.maximum(scale, np.maximum(np.abs(lhs), np.abs(rhs)))
            relative = -np.abs(slack) / size
            tally.largest_error = max(
                tally.largest_error, float(-np.min(relative[applicable & known], initial=0))
            )
        else:
            tally.slack.add(relative[applicable])
            # A right side of nothing but rounding has no meaningful ratio.
            tally.tightness.add((lhs / rhs)[applicable & (rhs > error)])

    def case(index: int) -> "tuple[Instance, float, float, np.ndarray | None]":
        rho = prompter[index] if STATEMENTS[tally.statement].any_prompter else None
        return take(batch, index), float(beta[index]), float(lam[index]), rho

    if tally.doubtful is not None:
        tally.doubtful.add(np.where(applicable, slack, np.inf), error, case, tally.statement in IDENTITIES)
    if violated.any():
        index = int(np.argmin(np.where(violated, relative, np.inf)))
        amount = float(-relative[index])
        tally.largest_violation = max(tally.largest_violation, amount)
        candidate = Worst(*case(index), amount, tally.family)
        if candidate.better_than(tally.worst):
            tally.worst = candidate


def save(result: Verification, folder: Path) -> None:
    """Write json, and the instance that refutes each refuted statement, atomically."""
    for name, worst in result.refuted.items():
        worst.instance.save(folder / f"refuted-{name}.npz")
    write_json(folder / "json", _finite(result.json()))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None, form: str = ".2g") -> str:
    return "-" if value is None else format(value, form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns: the first to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _kind(name: str) -> str:
    if name in WRONG_BOUNDS:
        return "known to be false"
    if name in IDENTITIES:
        return "identity"
    return "upper bound" if name in BOUNDS else "lower bound" if name in LOWER_BOUNDS else "lemma"


_COUNTS = ("checked", "violated", "unclear", "worst violation")
_SPREAD = ("slack/span min", "5%", "50%", "lhs/rhs 50%", "95%", "max", "vacuous")


def _cells(tally: Tally) -> list[str]:
    row = tally.row()
    cells = [
        str(tally.checked - tally.inapplicable),
        str(tally.violations),
        str(tally.inconclusive),
        _number(tally.largest_violation) if tally.violations else "-",
    ]
    if tally.statement in IDENTITIES:
        return [*cells, _number(tally.largest_error)]
    slack, tight = row["slack_over_span_quantiles"], row["lhs_over_rhs_quantiles"]
    cells += [_number(v) for v in (*slack[:3], *tight[2:])]
    return [*cells, _number(row.get("vacuous_share"), ".0%")]


def _by_family(result: Verification) -> list[str]:
    """One block per statement, one line per family."""
    blocks = []
    for name in result.statements:
        rest = ("worst error",) if name in IDENTITIES else _SPREAD
        rows: list[Sequence[str]] = [("family", *_COUNTS, *rest, "seconds")]
        for tally in result.tallies:
            if tally.statement == name:
                seconds = f"{result.family_seconds[tally.family]:.1f}"
                rows.append([tally.family, *_cells(tally), seconds])
        blocks.append(f"{name} ({_kind(name)})\n{_aligned(rows)}")
    return blocks


def _by_statement(result: Verification) -> list[str]:
    """One line per statement, over all families."""
    counted = ("statement", "kind", "checked", "violated", "unclear")
    spread = ("least slack/span", "lhs/rhs 50%", "95%", "vacuous", "identity error")
    rows: list[Sequence[str]] = [(*counted, *spread)]
    for name in result.statements:
        mine = [tally for tally in result.tallies if tally.statement == name]
        values = [tally.row() for tally in mine]
        counts = [sum(t.checked - t.inapplicable for t in mine)]
        counts += [sum(t.violations for t in mine), sum(t.inconclusive for t in mine)]
        cells = ["-", "-", "-", "-", "-"]
        if name in IDENTITIES:
            cells[4] = _number(max(t.largest_error for t in mine))
        else:
            least = [v["slack_over_span_quantiles"][0] for v in values]
            ratios = [v["lhs_over_rhs_quantiles"] for v in values]
            # Families have equal shares, so quantiles of the mixture are near the median of theirs.
            middle = [np.median([r[i] for r in ratios if r[i] is not None] or [np.nan]) for i in (2, 3)]
            cells[0] = _number(min((v for v in least if v is not None), default=None))
            cells[1:3] = [_number(float(v)) for v in middle]
            if name in BOUNDS:
                share = sum(t.vacuous for t in mine) / max(counts[0], 1)
                cells[3] = _number(share, ".0%")
        rows.append([name, _kind(name), *map(str, counts), *cells])
    return [_aligned(rows) + "\n(lhs/rhs: median over the families; by family with --bound NAME, or in json)"]


def _certified(result: Verification) -> str:
    """What is proved: one line per statement."""
    rows: list[Sequence[str]] = [
        ("certified", "proved", "of them ties", "violated", "inconclusive", "bits", "settled", "unexamined")
    ]
    for name in result.statements:
        mine = [tally for tally in result.tallies if tally.statement == name]
        found = [one for tally in mine for one in tally.certificates]
        verdicts = Counter(one.verdict for one in found)
        counts = [verdicts["holds"], sum(one.slack == "0" for one in found)]
        counts += [verdicts["violated"], verdicts["inconclusive"]]
        counts += [max((one.precision for one in found), default=0)]
        counts += [sum(tally.settled for tally in mine), sum(tally.unexamined for tally in mine)]
        rows.append([name, *map(str, counts)])
    return (
        _aligned(rows) + f"\n(ball arithmetic on the {result.certify} most doubtful of each family; "
        "settled: float64 violations that are none)"
    )


def table(result: Verification) -> str:
    """The result for reading: by family for up to three statements, else one line per statement."""
    blocks = _by_family(result) if len(result.statements) <= 3 else _by_statement(result)
    if result.certify:
        blocks.append(_certified(result))
    verdicts = []
    for name in result.statements:
        count = sum(t.violations for t in result.tallies if t.statement == name)
        checked = sum(t.checked - t.inapplicable for t in result.tallies if t.statement == name)
        if name in result.refuted:
            worst = result.refuted[name]
            count = count or sum(t.proved for t in result.tallies if t.statement == name)
            verdicts.append(
                f"{name}: REFUTED by {count} of {checked} instances; e.g. {worst.family}, "
                f"beta {worst.beta:.3g}, lam {worst.lam:.3g}, off by {worst.relative:.2g} of the span"
            )
        elif count:
            verdicts.append(f"{name}: {count} float64 violations of {checked}, none of them proved")
        elif len(result.statements) <= 3:
            verdicts.append(f"{name}: no violation in {checked} instances")
    if not result.findings:
        verdicts.append(f"no violation of {len(result.statements)} statements")
    blocks.append(
        "\n".join(verdicts)
        + f"\n{result.seconds:.1f} s, of which {result.compile_seconds:.1f} s compiling; seed {result.seed}"
    )
    return "\n\n".join(blocks)


def main(
    bound: Sequence[str],
    instances: int,
    seed: int,
    family: Sequence[str],
    out: str | None,
    certify: int = 0,
) -> int:
    """Run, print and save; the process's exit status: 1 when anything is violated, else 0."""
    statements, families = tuple(bound) or DEFAULT, tuple(family) or tuple(FAMILIES)
    validate(statements, instances, seed, families, certify)
    folder = None if out is None else writable_folder(out)
    result = verify(statements, instances, seed, families, certify=certify)
    print(table(result))
    if folder is not None:
        save(result, folder)
        print(f"wrote {folder / 'json'}")
        pages_keep.keep(report_of_verify(_finite(result.json())), folder)
    return 1 if result.findings else 0


def report_of_verify(result: Json) -> Page:
    """Of json."""
    from alignpro.theory.bounds import WRONG_BOUNDS

    names, bad = result["statements"], list(result["refuted"])
    lead = f"No violation of {len(names)} statements in {result['instances']:,} random instances."
    if result["violations"]:
        lead = "Floating point claims violations, none of them proved."
    settings = "seed instances families shapes beta_and_lam_log_uniform_over quantile_levels"
    page = Page(
        "verify",
        "The theory on random instances",
        f"Refuted: {', '.join(bad)}." if bad else lead,
        some(result, settings),
    )
    page.key("Random instances", number(result["instances"]), f"families: {len(result['families'])}")
    page.key("Statements", number(len(names)), f"{len(bad)} refuted")
    page.key("Violations", number(result["violations"]), "in float64, beyond rounding")
    seconds, compiling = (number(result[key], ".1f") for key in ("seconds", "compile_seconds"))
    page.key("Time", f"{seconds} s", f"{compiling} s to compile")

    rows, dots = [], []
    places = [result["quantile_levels"].index(q) for q in (0.05, 0.5, 0.95)]
    for name in names:
        mine = [row for row in result["results"] if row["statement"] == name]
        checked, violated, unclear, apart = (
            sum(row[key] for row in mine) for key in ("checked", "violations", "inconclusive", "inapplicable")
        )
        said = "REFUTED" if name in bad else "violated" if violated else "no violation"
        cells = ["–"] * 5
        if "slack_over_span_quantiles" in mine[0]:
            least = [row["slack_over_span_quantiles"][0] for row in mine]
            ratios = [row["lhs_over_rhs_quantiles"] for row in mine]
            # Families have equal shares, so quantiles of the mixture are near the median of theirs.
            of = [[r[i] for r in ratios if r[i] is not None] for i in places]
            low, half, high = (median(values) if values else None for values in of)
            dots.append(Dot(name, half, low, high))
            cells[0] = number(min((v for v in least if v is not None), default=None), ".2g")
            cells[1:3] = [number(half, ".2g"), number(high, ".2g")]
        else:
            cells[4] = number(max(row["largest_relative_error"] for row in mine), ".2g")
        if "vacuous_share" in mine[0]:
            cells[3] = f"{fmean(row['vacuous_share'] for row in mine):.0%}"
        rows.append((name, said, *map(number, (checked - apart, violated, unclear)), *cells))
    head = "statement | verdict | checked | violated | unclear | least slack / span"
    head += " | left / right, median | 95% | vacuous | identity error"
    known = [name for name in names if name in WRONG_BOUNDS]
    false = f" Known to be false, and so a test of the tester: {', '.join(known)}." if known else ""
    axis = "left side over right side: median, and 5% to 95% of the instances"
    page.add(
        "Statements",
        "Over all families: the slack over the span of the rewards, and the left side over the right side "
        f"(medians over the families).{false}",
        Table(head, rows, "ww" + "n" * 8),
        Dots("How tight each statement is", axis, dots, [(1.0, "equality")], -1.0) if dots else None,
    )

    if proof := result["certified"]:
        rows = []
        for name in names:
            mine = [row for row in proof["results"] if row["statement"] == name]
            counts = [
                sum(row["verdicts"].get(v, 0) for row in mine) for v in ("holds", "violated", "inconclusive")
            ]
            keys = ("ties", "float64_violations_settled", "float64_violations_unexamined")
            counts += [sum(row[key] for row in mine) for key in keys]
            rows.append((name, *map(number, counts)))
        page.add(
            "Certified",
            f"In ball arithmetic, the {proof['most_doubtful_per_statement_and_family']} most doubtful "
            "instances of each statement and family; settled are float64 violations that are none.",
            Table(
                "statement | proved | refuted | inconclusive | ties | settled | unexamined",
                rows,
                "w" + "n" * 6,
            ),
        )
    if bad:
        rows = []
        for name, worst in result["refuted"].items():
            numbers = (number(worst[key]) for key in ("beta", "lam", "relative_violation"))
            rows.append((name, worst["family"], *numbers, worst["instance"]))
        page.add(
            "Counterexamples",
            "One instance for each refuted statement: of the smallest shape, the worst.",
            Table("statement | family | β | λ | off by, of the span | file", rows, "wwnnnw"),
        )
    rows = []
    for name in result["families"]:
        mine = [row for row in result["results"] if row["family"] == name]
        counts = [
            sum(row[key] for row in mine) for key in ("checked", "violations", "inconclusive", "inapplicable")
        ]
        rows.append((name, *map(number, counts), number(result["family_seconds"][name], ".1f")))
    page.add(
        "Families",
        "Each over all statements; json has them by family and statement.",
        Table("family | checked | violated | unclear | not applicable | seconds", rows, "w" + "n" * 5),
    )
    return page


@dataclass(frozen=True)
class Verify:
    """Check Theorem 1, its sharper forms, lower bounds, identities and lemmas on random instances.

    Exit status 1 when a statement is violated (with --certify: when that is proved). Known-wrong ones
    (signed_max_abs, quarter_l1, beta_eighth, never_outperforms, pinsker_l1, l1_at_most_one,
    suboptimality_reversed, trained_reversed) test the tester: they must be refuted.
    """

    bound: tuple[str, ...] = ()
    """What to check, by name: theorem1, trained, ceiling, exact_gap, ... or a known-wrong statement; an
    unknown name lists them all. Default: every true statement. Up to three are shown family by family."""
    instances: int = 1_000_000
    """How many random instances, shared among the families."""
    seed: int = 0
    """Determines every draw."""
    family: tuple[str, ...] = ()
    """Families of instances to draw from. Default: all."""
    certify: tuple[int, ...] = (0,)
    """Prove, in ball arithmetic, the verdicts on this many most doubtful instances of each statement and
    family, and on what floating point calls violated. --certify alone: 8."""
    out: str | None = None
    """Folder for json, report.html and the instances that refute a statement."""

    def run(self) -> int:

        if len(self.certify) > 1:
            raise AlignProError(f"--certify {' '.join(map(str, self.certify))}: give one number, or none")
        certify = self.certify[0] if self.certify else 8
        return main(self.bound, self.instances, self.seed, self.family, self.out, certify)
