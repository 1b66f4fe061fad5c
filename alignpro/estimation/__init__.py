"""What rollouts say about the theory, with intervals: NumPy only, so it runs anywhere."""

from alignpro.estimation.compare import Comparison, compare
from alignpro.estimation.headroom import Headroom, headroom
from alignpro.estimation.intervals import Estimate
from alignpro.estimation.statements import BoundEstimate, EstimateReport, estimate

__all__ = [
    "BoundEstimate",
    "Comparison",
    "Estimate",
    "EstimateReport",
    "Headroom",
    "compare",
    "estimate",
    "headroom",
]
