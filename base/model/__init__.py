"""The decoder whose module paths are the keys on disk."""
