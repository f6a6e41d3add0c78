"""Layouts of a run over many GPUs, and how long a step takes in each: pure functions, no tensor is made."""
