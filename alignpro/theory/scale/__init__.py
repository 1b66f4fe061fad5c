"""Large instances, large batches, and files of instances."""

from alignpro.theory.scale.routes import prompt_shift, route, solve_batch, solve_large

__all__ = ["prompt_shift", "route", "solve_batch", "solve_large"]
