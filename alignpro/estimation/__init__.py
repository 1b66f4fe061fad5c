"""The theory estimated from rollouts, with intervals: no model and no JAX needed, so it runs anywhere."""

from alignpro.estimation.compare import Comparison, compare
from alignpro.estimation.estimate import BoundEstimate, EstimateReport, estimate
from alignpro.estimation.headroom import Headroom, headroom
from alignpro.estimation.intervals import Estimate
from alignpro.estimation.pooled import Pooled

__all__ = [
    "BoundEstimate",
    "Comparison",
    "Estimate",
    "EstimateReport",
    "Headroom",
    "Pooled",
    "compare",
    "estimate",
    "headroom",
]
