"""Looking for the worst case of a statement."""
