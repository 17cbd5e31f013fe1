"""Standardised evaluations: models x attacks x radii x seeds x examples, in cells that are kept on disk."""
