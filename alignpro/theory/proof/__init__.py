"""Verdicts proved in ball arithmetic."""
