"""The statements about the gap, one file a kind; `alignpro.theory.bounds` has them all by name."""
