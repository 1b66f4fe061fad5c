"""Results beside the bounds: what prompting can reach, at what cost, under what errors.

The public functions and records of `reach`, `cost`, `derivatives` and `readings` are here by name.

All logarithms are natural; TV is half the L1 distance; "reward units" are those of the rewards. β and λ are
positive and finite, in reward units; any other is an `AlignProError`. Functions are pure, and safe under jit
and vmap, but for `lam_for_kl`. Results are per prompt [X] unless said otherwise. Proofs: `docs/limits.md`.
"""

# ruff: noqa: F401
from alignpro.theory.results.cost import (
    BestOfN,
    Frontier,
    KLBudget,
    KLPrice,
    best_of_n,
    best_of_n_rewrites,
    frontier,
    kl_budget,
    kl_price,
    lam_for_kl,
)
from alignpro.theory.results.derivatives import (
    Headroom,
    Sensitivity,
    VarianceSplit,
    headroom,
    sensitivity,
    variance_split,
)
from alignpro.theory.results.reach import (
    Ceiling,
    Projection,
    ResponseValue,
    information_projection,
    prompting_ceiling,
    response_value,
)
from alignpro.theory.results.readings import (
    Critical,
    LimitReadings,
    critical_beta,
    critical_lam,
    limit_readings,
)
