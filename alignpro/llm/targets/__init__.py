"""Frozen models that answer, and the ledger of their answers."""
