"""One file per table or figure of a paper that is no run."""
