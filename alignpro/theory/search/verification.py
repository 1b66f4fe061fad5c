"""Claims checked on very many random instances, in bounded memory: what `alignpro verify` runs."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import alignpro
from alignpro.claims import Claim, Kind
from alignpro.errors import AlignProError
from alignpro.shown import Shown
from alignpro.theory.bounds import STATEMENTS, Statement
from alignpro.theory.families import FAMILIES, random_prompters
from alignpro.theory.instance import Instance
from alignpro.theory.scale.routes import solve_batch
from alignpro.theory.search.tally import QUANTILES, Sample, Tally, Worst
from alignpro.theory.solution import Solution

TRUE = tuple(name for name, claim in STATEMENTS.items() if claim.kind != "known wrong")
"""Names of the claims that are theorems."""

# Few shapes, since each is compiled once: fewer, as many and more rewrites than prompts.
_SHAPES = ((1, 2, 2), (2, 4, 3), (5, 3, 8))
_CHUNK = 1000
_TEMPERATURES = (1e-4, 1e4)


@dataclass(frozen=True)
class Proofs:
    """Certificates of one claim over all families, counted."""

    holds: int
    violated: int
    inconclusive: int
    ties: int
    """Cases proved with a slack of exactly 0."""
    bits: int
    """The highest precision that was needed."""
    settled: int
    """Float64 violations that a proof refutes."""
    unexamined: int
    """Float64 violations that were not certified."""


@dataclass(frozen=True)
class Summary:
    """The outcome of one claim over all families."""

    name: str
    kind: Kind
    verdict: str
    """REFUTED, violated (in float64, not proved) or no violation."""
    checked: int
    """How many instances it applies to."""
    violations: int
    inconclusive: int
    least_slack: float | None
    """Least slack over the reward span; None for identities, as the next."""
    tightness: tuple[float | None, float | None, float | None]
    """Left side over right side at 5%, 50% and 95%: medians over the families, which have equal shares."""
    vacuous: float | None
    """Share of the instances on which an upper bound says nothing; None for other kinds."""
    identity_error: float | None
    """Largest distance of an identity's sides, as a share of the span; None for other kinds."""
    refutations: int
    """Violations that refute it: those of float64, or of the proofs where float64 saw none."""
    proofs: Proofs


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.median(known)) if known else None


def _summary(mine: Sequence[Tally], refuted: bool) -> Summary:
    claim = mine[0].claim
    identity = claim.relation == "="
    slacks = [] if identity else [t.slack.quantiles()[0] for t in mine]
    ratios = [] if identity else [t.tightness.quantiles() for t in mine]
    low, half, high = (_median([r[i] for r in ratios]) for i in (1, 2, 3))
    violations, checked = sum(t.violations for t in mine), sum(t.judged for t in mine)
    certificates = [one for t in mine for one in t.certificates]
    verdicts = Counter(one.verdict for one in certificates)
    return Summary(
        name=mine[0].statement,
        kind=claim.kind,
        verdict="REFUTED" if refuted else "violated" if violations else "no violation",
        checked=checked,
        violations=violations,
        inconclusive=sum(t.inconclusive for t in mine),
        least_slack=min((v for v in slacks if v is not None), default=None),
        tightness=(low, half, high),
        vacuous=sum(t.vacuous for t in mine) / max(checked, 1) if claim.kind == "upper bound" else None,
        identity_error=max(t.largest_error for t in mine) if identity else None,
        refutations=violations or sum(t.proved for t in mine),
        proofs=Proofs(
            verdicts["holds"],
            verdicts["violated"],
            verdicts["inconclusive"],
            ties=sum(one.slack == "0" for one in certificates),
            bits=max((one.precision for one in certificates), default=0),
            settled=sum(t.settled for t in mine),
            unexamined=sum(t.unexamined for t in mine),
        ),
    )


@dataclass(frozen=True)
class FamilySummary:
    """The outcome of one family over all claims."""

    name: str
    checked: int
    violations: int
    inconclusive: int
    inapplicable: int
    seconds: float


@dataclass(repr=False)
class Verification(Shown):
    """The result of a run of `verify`."""

    instances: int
    seed: int
    statements: tuple[str, ...]
    families: tuple[str, ...]
    tallies: list[Tally] = field(default_factory=list)
    """The counts, one `Tally` for each family and claim."""
    family_seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0
    seconds: float = 0.0
    """Wall-clock time, compilation included."""
    refuted: dict[str, Worst] = field(default_factory=dict)
    """The counterexample of each refuted claim."""
    certify: int = 0
    """How many instances of each claim and family were certified; 0 for none."""

    @property
    def violations(self) -> int:
        return sum(tally.violations for tally in self.tallies)

    @property
    def findings(self) -> int:
        """Violations; under certification those proved, and what float64 claims but nothing has examined."""
        if not self.certify:
            return self.violations
        return sum(tally.proved + tally.unexamined for tally in self.tallies)

    @property
    def finding(self) -> str:
        """The result in one sentence."""
        if self.refuted:
            return f"Refuted: {', '.join(self.refuted)}."
        if self.violations:
            return "Floating point claims violations, none of them proved."
        return f"No violation of {len(self.statements)} statements in {self.instances:,} random instances."

    def of(self, statement: str) -> list[Tally]:
        """The tallies of one claim, by family."""
        return [tally for tally in self.tallies if tally.statement == statement]

    @property
    def by_statement(self) -> list[Summary]:
        return [_summary(self.of(name), name in self.refuted) for name in self.statements]

    @property
    def by_family(self) -> list[FamilySummary]:
        def summary(name: str) -> FamilySummary:
            mine = [tally for tally in self.tallies if tally.family == name]
            counts = ("checked", "violations", "inconclusive", "inapplicable")
            totals: Any = {count: sum(getattr(tally, count) for tally in mine) for count in counts}
            return FamilySummary(name, seconds=self.family_seconds[name], **totals)

        return [summary(name) for name in self.families]

    def settings(self) -> dict[str, Any]:
        """The draws that were asked for."""
        return {
            "seed": self.seed,
            "instances": self.instances,
            "families": list(self.families),
            "shapes": [list(shape) for shape in _SHAPES],
            "beta_and_lam_log_uniform_over": list(_TEMPERATURES),
            "quantile_levels": list(QUANTILES),
        }

    def json(self) -> dict[str, Any]:
        """All that was found, for verify.json; numbers may be infinite."""
        return {
            "alignpro": alignpro.__version__,
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            "numpy": np.__version__,
            "instances": self.instances,
            "seed": self.seed,
            "statements": list(self.statements),
            **self.settings(),
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
                    "prompter": worst.prompter,
                }
                for name, worst in self.refuted.items()
            },
        }

    def save_instances(self, folder: Path) -> None:
        """Write the counterexample of each refuted claim as refuted-NAME.npz, atomically."""
        for name, worst in self.refuted.items():
            worst.instance.save(folder / f"refuted-{name}.npz")


@lru_cache(maxsize=16)
def _together(claims: tuple[tuple[str, Claim], ...]) -> Callable[[Solution], dict[str, Statement]]:
    """The claims as one function, since most of what they need they share."""
    return lambda s: {name: claim(s) for name, claim in claims}


def _evaluate(
    names: Sequence[str], batch: Instance, beta: np.ndarray, lam: np.ndarray, prompter: np.ndarray
) -> dict[str, Statement]:
    """Every claim on every instance: those about any prompter on `prompter`, the others on ρ*."""
    found: dict[str, Statement] = {}
    for rho in (None, prompter):
        claims = [(n, STATEMENTS[n]) for n in names if STATEMENTS[n].any_prompter == (rho is not None)]
        if claims:
            found |= solve_batch(batch, beta, lam, _together(tuple(claims)), prompter=rho, quick=True)
    return found


def validate(
    statements: Sequence[str], instances: int, seed: int, families: Sequence[str], certify: int = 0
) -> None:
    """Refuse what `verify` cannot run, before anything is written or computed."""
    for name in statements:
        if name not in STATEMENTS:
            raise AlignProError(f"--bounds {name}: is unknown; give one of {', '.join(STATEMENTS)}")
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
    statements: Sequence[str] = TRUE,
    instances: int = 1_000_000,
    seed: int = 0,
    families: Sequence[str] = tuple(FAMILIES),
    quiet: bool = False,
    certify: int = 0,
) -> Verification:
    """Check claims on random instances of every family, in bounded memory.

    β and λ are log-uniform over 1e-4 to 1e4, independently. Claims about any prompter get one at random
    distance from ρ_sft, the others ρ*. A violation is a slack below minus its rounding bound; an identity is
    violated when its sides differ by more than theirs.

    Args:
        statements: keys of `STATEMENTS`.
        instances: how many in all, shared evenly among the families.
        seed: determines every draw.
        families: keys of `FAMILIES`.
        quiet: no progress bar.
        certify: how many instances to certify, of each claim and family: those of least slack beside its
            rounding error bound; of what float64 called violated, up to `certify.EXAMINED`.

    Raises:
        AlignProError: an unknown claim or family, too few instances, or python-flint is needed and missing.
    """
    validate(statements, instances, seed, families, certify)
    names, families = tuple(dict.fromkeys(statements)), tuple(dict.fromkeys(families))
    began = time.perf_counter()
    result = Verification(instances, seed, names, families, certify=certify)
    if certify:
        from alignpro.theory.proof.certify import Doubtful
    shares = np.full(len(families), instances // len(families))
    shares[: instances % len(families)] += 1
    chunk = min(_CHUNK, -(-int(shares[0]) // len(_SHAPES)))  # even a short run meets every shape
    # A bar of its own: compiling is most of a short run, and what starts should say so.
    for shape in tqdm(
        _SHAPES, "compiling", unit="shape", disable=quiet or None, file=sys.stderr, leave=False
    ):
        batch = FAMILIES[families[0]](np.random.default_rng(seed), chunk, shape)
        _evaluate(names, batch, np.ones(chunk), np.ones(chunk), np.asarray(batch.prior))
    result.compile_seconds = time.perf_counter() - began
    with tqdm(total=instances, unit="instance", disable=quiet or None, file=sys.stderr, leave=False) as bar:
        for family, share in zip(families, shares, strict=True):
            start = time.perf_counter()
            # Keyed by the family's name: its instances do not depend on which others are asked for.
            rng = np.random.default_rng([seed, *family.encode()])
            keep = np.random.default_rng(seed)
            tallies = {name: Tally(name, family, Sample(keep), Sample(keep)) for name in names}
            for tally in tallies.values():
                tally.doubtful = Doubtful(certify) if certify else None
            bar.set_description(family)
            done = turn = 0
            while done < share:
                count = min(chunk, int(share) - done)
                batch = FAMILIES[family](rng, chunk, _SHAPES[turn % len(_SHAPES)])
                low, high = np.log10(_TEMPERATURES)
                beta, lam = 10.0 ** rng.uniform(low, high, (2, chunk))
                prompter = random_prompters(rng, np.asarray(batch.prior))
                found = _evaluate(names, batch, beta, lam, prompter)
                for name, tally in tallies.items():
                    statement = jax.tree.map(lambda leaf, count=count: leaf[:count], found[name])
                    tally.record(statement, batch, beta, lam, prompter)
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


def _certify(result: Verification, quiet: bool) -> None:
    """Certify what the tallies keep; only a violation that is proved refutes then."""
    from alignpro.theory.proof.certify import Case, certify_many

    kept = [(tally, case) for tally in result.tallies if tally.doubtful for _, case in tally.doubtful.kept]
    cases = [Case(instance, beta, lam, t.statement, rho) for t, (instance, beta, lam, rho) in kept]
    for tally in result.tallies:
        tally.worst = None
    certificates = certify_many(cases, quiet=quiet)
    for (tally, (instance, beta, lam, rho)), found in zip(kept, certificates, strict=True):
        tally.certificates.append(found)
        worst = Worst(instance, beta, lam, rho, found.within, tally.family)
        if found.verdict == "violated" and worst.better_than(tally.worst):
            tally.worst = worst
