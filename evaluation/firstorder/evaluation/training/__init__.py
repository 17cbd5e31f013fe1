"""Adversarial training from a configuration, and what can be read off a run."""
