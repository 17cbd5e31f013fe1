"""Speed beside other packages: the cost of a step, and the time until robust accuracy is known."""
