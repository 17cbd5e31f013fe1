"""What a word of a command line or of a specification stands for: models, data, attacks, defences."""
