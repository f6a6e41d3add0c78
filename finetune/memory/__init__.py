"""Memory: predicted before the run, measured after it."""
