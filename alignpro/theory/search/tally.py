"""Counting one claim on one family of instances, in bounded memory, and keeping what refutes it."""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from alignpro.claims import Claim
from alignpro.theory.bounds import STATEMENTS, Statement
from alignpro.theory.families import take
from alignpro.theory.instance import Instance

if TYPE_CHECKING:  # python-flint is optional
    from alignpro.theory.proof.certify import Certificate, Doubtful

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
_KEPT = 50_000


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
            number = self._seen + 1 + np.arange(late.size)
            hit = self._rng.random(late.size) * number < _KEPT
            self._seen += late.size
            self._kept[self._rng.integers(_KEPT, size=np.count_nonzero(hit))] = late[hit]

    def quantiles(self) -> list[float | None]:
        """The least value, 5%, 50%, 95% and the largest; None of an empty stream."""
        if not self._kept.size:
            return [None] * len(QUANTILES)
        return [float(v) for v in np.quantile(self._kept, QUANTILES)]


@dataclass
class Worst:
    """The counterexample kept: of the smallest shape, the largest relative violation."""

    instance: Instance
    beta: float
    lam: float
    prompter: np.ndarray | None
    relative: float
    """The violation, as a share of the reward span."""
    family: str

    def better_than(self, other: "Worst | None") -> bool:
        if other is None:
            return True
        size, known = math.prod(self.instance.shape), math.prod(other.instance.shape)
        return (size, -self.relative) < (known, -other.relative)


@dataclass
class Tally:
    """Counts of one claim on one family."""

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
    """Cases to certify; None without certification."""
    certificates: "list[Certificate]" = field(default_factory=list)
    """The certificate of each of `doubtful.kept`, in that order."""

    @property
    def claim(self) -> Claim:
        return STATEMENTS[self.statement]

    @property
    def judged(self) -> int:
        """How many instances the claim applies to."""
        return self.checked - self.inapplicable

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
        """The outcome of certification, for JSON."""
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
        """The counts and quantiles, for JSON."""
        row: dict[str, Any] = {
            "statement": self.statement,
            "family": self.family,
            "checked": self.checked,
            "violations": self.violations,
            "inconclusive": self.inconclusive,
            "inapplicable": self.inapplicable,
            "largest_relative_violation": self.largest_violation,
        }
        if self.claim.relation == "=":
            return {**row, "largest_relative_error": self.largest_error}
        row["slack_over_span_quantiles"] = self.slack.quantiles()
        row["lhs_over_rhs_quantiles"] = self.tightness.quantiles()
        if self.claim.kind == "upper bound":
            row["vacuous_share"] = self.vacuous / max(self.judged, 1)
        return row

    def record(
        self, found: Statement, batch: Instance, beta: np.ndarray, lam: np.ndarray, prompter: np.ndarray
    ) -> None:
        """Count a batch of evaluated statements, and keep what refutes or is doubtful."""
        lhs, rhs, error, ceiling = (np.asarray(v) for v in found[:4])
        slack, equality = rhs - lhs, self.claim.relation == "="
        applicable = np.ones(slack.shape, dtype=bool)
        for assumption in found.assumptions.values():
            applicable &= assumption
        known = ~(np.isnan(slack) | np.isnan(error))
        if equality:
            violated = applicable & known & (np.abs(slack) > error)
            lost = (error > 0) & (np.maximum(np.abs(lhs), np.abs(rhs)) <= error)
            unclear = applicable & (~known | (lost & ~violated))
        else:
            violated = applicable & known & (slack < -error)
            unclear = applicable & (~known | ((np.abs(slack) <= error) & (error > 0)))
        self.checked += slack.size
        self.violations += int(violated.sum())
        self.inconclusive += int(unclear.sum())
        self.inapplicable += int((~applicable).sum())
        self.vacuous += int((applicable & (rhs >= ceiling)).sum())

        scale = np.where(ceiling > 0, ceiling, 1.0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            relative = slack / scale
            if equality:
                # λ KL of a far prompter can exceed the span by orders of magnitude, and sets the rounding.
                size = np.maximum(scale, np.maximum(np.abs(lhs), np.abs(rhs)))
                relative = -np.abs(slack) / size
                off = float(-np.min(relative[applicable & known], initial=0))
                self.largest_error = max(self.largest_error, off)
            else:
                self.slack.add(relative[applicable])
                # A right side of nothing but rounding has no meaningful ratio.
                self.tightness.add((lhs / rhs)[applicable & (rhs > error)])

        def case(index: int) -> "tuple[Instance, float, float, np.ndarray | None]":
            rho = prompter[index] if self.claim.any_prompter else None
            return take(batch, index), float(beta[index]), float(lam[index]), rho

        if self.doubtful is not None:
            self.doubtful.add(np.where(applicable, slack, np.inf), error, case, equality)
        if violated.any():
            index = int(np.argmin(np.where(violated, relative, np.inf)))
            amount = float(-relative[index])
            self.largest_violation = max(self.largest_violation, amount)
            candidate = Worst(*case(index), amount, self.family)
            if candidate.better_than(self.worst):
                self.worst = candidate
