"""Raw text to memory-mapped token shards to batches."""
