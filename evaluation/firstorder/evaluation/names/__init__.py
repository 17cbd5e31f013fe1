"""What a word of a command line or of a specification means: models, data, attacks, defences."""
