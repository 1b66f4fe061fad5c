"""Verdicts proved in ball arithmetic: numbers known with an enclosure, so that rounding forges nothing."""
