"""Results beside the bounds: what prompting can reach, at what cost, under what errors.

The public functions and records of these modules are here by name, but for `chains`, `preferences` and
`robustness`. They are pure, and safe under jit and vmap, but for `lam_for_kl`, `universal`,
`calls_needed` and `robust_lam`, which work on the host; per prompt [X] unless said otherwise. A β or λ
that is not positive and finite is an `AlignProError`. Proofs are in `docs/limits.md`.
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
from alignpro.theory.results.guarantees import Floor, RobustLam, floor, robust_lam
from alignpro.theory.results.mixtures import FewRewrites, few_rewrites
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
    Headroom,
    LimitReadings,
    Sensitivity,
    VarianceSplit,
    critical_beta,
    critical_lam,
    headroom,
    limit_readings,
    sensitivity,
    variance_split,
)
from alignpro.theory.results.resampling import (
    Answered,
    Resampled,
    answered,
    calls_needed,
    resample_law,
    resampled,
    worst_share,
)
from alignpro.theory.results.shared import Universal, strategy_table, universal
