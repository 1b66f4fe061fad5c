"""Claims: statements about the gap that exact theory and estimation check, and what a check may find."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["holds", "violated", "inconclusive", "inapplicable"]
"""Outcome of a check. `inconclusive`: the slack is within its own uncertainty. `inapplicable`: an assumption
fails, or a quantity that the claim needs is missing."""

Kind = Literal["upper bound", "lower bound", "identity", "lemma", "known wrong"]
"""`lemma`: a true inequality that does not bound the gap. `known wrong`: a tempting misreading, kept to test
the tester."""

Relation = Literal["<=", ">=", "="]
"""How the left side (the gap, for bounds) stands to the bound."""


@dataclass(frozen=True)
class Claim:
    """One claim: how to evaluate it, and how to read what comes out. It is called as its function is."""

    function: Callable[..., Any]
    """Evaluates it: a `Statement` of the exact theory from a `Solution`, or of estimation from `Terms`."""
    kind: Kind
    relation: Relation = "<="
    any_prompter: bool = False
    """Whether it is about every prompter ρ, rather than about the optimal ρ* alone."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)

    @property
    def __name__(self) -> str:
        """The function's own name, for what shows the names of functions."""
        return str(self.function.__name__)


def of_kind(claims: Mapping[str, Claim], *kinds: Kind) -> dict[str, Claim]:
    """The claims of these kinds, in their order."""
    return {name: claim for name, claim in claims.items() if claim.kind in kinds}
