"""Hunting claims by both routes, ascent and the search for the smallest: what `alignpro hunt` runs."""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from tqdm import tqdm

import alignpro
from alignpro.errors import AlignProError
from alignpro.theory.bounds import STATEMENTS
from alignpro.theory.families import Shape
from alignpro.theory.search.ascend import Ascent, ascend
from alignpro.theory.search.found import Found, Target, certificate, target
from alignpro.theory.search.shrink import Smallest, smallest

if TYPE_CHECKING:  # python-flint is optional
    from alignpro.theory.proof.certify import Certificate

LARGEST = 64
"""Sizes beyond are refused: a counterexample of that size teaches nothing."""

ROLES = {
    "smallest": "smallest counterexample",
    "worst": "worst counterexample",
    "tightest": "tightest instance",
}
"""Names of what a hunt finds: by the search for the smallest, and twice by ascent."""


@dataclass(frozen=True)
class Budget:
    """Limits of a hunt: on which instances and for how long it looks."""

    shape: Shape = (2, 3, 3)
    """(X, K, Y) of ascent's instances, and the largest of the small ones."""
    restarts: int = 256
    """Ascents, side by side."""
    steps: int = 500
    """Steps of each ascent."""
    tries: int = 2000
    """Random instances in the search for the smallest, before it gives up."""
    seed: int = 0
    """Determines the search, where no clock stops it."""
    seconds: float | None = None
    """Time for each claim, half for each route; no limit when None."""


@dataclass(frozen=True)
class Hunted:
    """The finds about one claim."""

    target: Target
    ascent: Ascent
    smallest: Smallest | None
    """None when interrupted before."""
    certificates: "dict[str, Certificate | None]" = field(default_factory=dict)
    """The proof about each of `finds`; None without python-flint."""

    @property
    def kind(self) -> str:
        """The claim's kind; "conjecture" for one that is not registered."""
        claim = STATEMENTS.get(self.target.name)
        return "conjecture" if claim is None else claim.kind

    @property
    def finds(self) -> dict[str, Found]:
        """The instances found, by role, as far as there are any."""
        smallest = self.smallest.found if self.smallest else None
        every = zip(ROLES, (smallest, self.ascent.worst, self.ascent.tightest), strict=True)
        return {role: found for role, found in every if found is not None}

    @property
    def shown(self) -> list[str]:
        """Roles worth showing in full: a counterexample says more than an instance that is merely tight."""
        roles = [role for role in self.finds if role != "tightest"]
        return roles or ([] if self.target.equality else list(self.finds))

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C came before both routes had ended."""
        return self.ascent.interrupted or self.smallest is None or self.smallest.interrupted

    @property
    def tried(self) -> int:
        """How many instances the search for the smallest evaluated."""
        return self.smallest.tried if self.smallest else 0

    @property
    def refuted(self) -> bool:
        """Whether there is a counterexample: proved where that can be, else beyond rounding."""
        return any(self.verdict(role) == "violated" for role in self.finds)

    @property
    def finding(self) -> str:
        return "REFUTED" if self.refuted else "no counterexample"

    def verdict(self, role: str) -> str:
        """The certified verdict, or the float64 one without python-flint."""
        proof = self.certificates.get(role)
        return self.finds[role].verdict if proof is None else proof.verdict

    def json(self) -> dict[str, Any]:
        """The finds, for hunt.json; numbers may be infinite."""
        return {
            "refuted": self.refuted,
            "steps": self.ascent.steps,
            "start_ratio": self.ascent.start,
            "tried": self.tried,
            "interrupted": self.interrupted,
            **{role: self._row(role) for role in self.finds},
        }

    def file(self, role: str) -> str:
        """The name of the file that keeps a find."""
        return f"{self.target.name}-{role}.npz"

    def _row(self, role: str) -> dict[str, Any]:
        found, proof = self.finds[role], self.certificates.get(role)
        return {
            "instance": self.file(role),
            "shape": list(found.instance.shape),
            "beta": found.beta,
            "lam": found.lam,
            **{key: getattr(found, key) for key in ("prompter", "lhs", "rhs", "ratio")},
            "slack_over_span": -found.excess,
            "error": found.error,
            "verdict": self.verdict(role),
            "float64_verdict": found.verdict,
            "certificate": None
            if proof is None
            else {"slack": proof.slack, "bits": proof.precision, "within": proof.within},
        }


@dataclass(frozen=True)
class Hunting:
    """The result of a run: every claim hunted so far, and the budget of each."""

    budget: Budget
    hunted: list[Hunted] = field(default_factory=list)

    @property
    def refuted(self) -> list[str]:
        """Names of the claims that have a counterexample."""
        return [one.target.name for one in self.hunted if one.refuted]

    @property
    def finding(self) -> str:
        """The result in one sentence."""
        return f"Refuted: {', '.join(self.refuted)}." if self.refuted else "No counterexample was found."

    def json(self) -> dict[str, Any]:
        """All that was found, for hunt.json; numbers may be infinite."""
        return {
            "alignpro": alignpro.__version__,
            "python": sys.version.split()[0],
            "jax": jax.__version__,
            **asdict(self.budget),
            "statements": {one.target.name: one.json() for one in self.hunted},
        }

    def save_instances(self, folder: Path) -> None:
        """Write every find as NAME-ROLE.npz, atomically."""
        for one in self.hunted:
            for role, found in one.finds.items():
                found.instance.save(folder / one.file(role))


def validate(bounds: Sequence[str], budget: Budget) -> list[Target]:
    """The claims asked for; an AlignProError for what cannot be run, before anything is computed."""
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
    """Hunt one claim by both routes; what is found is certified where python-flint is installed.

    Ctrl-C ends the search and keeps what it has found.
    """
    seconds = None if budget.seconds is None else budget.seconds / 2
    with tqdm(total=budget.steps + budget.tries, disable=quiet or None, file=sys.stderr, leave=False) as bar:
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
    result = Hunted(wanted, ascent, small)
    result.certificates.update({role: certificate(found) for role, found in result.finds.items()})
    return result
