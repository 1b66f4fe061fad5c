"""Training prompters, policies and rewards."""
