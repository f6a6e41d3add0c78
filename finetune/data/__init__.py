"""Records to masked token batches."""
