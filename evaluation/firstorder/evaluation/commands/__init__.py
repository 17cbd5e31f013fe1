"""The commands of `firstorder` that are more than a few lines, a module each."""
