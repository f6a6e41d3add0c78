"""Many adapters trained at once on one base: jobs, their common step, sweeps, and what they will need before they run."""
