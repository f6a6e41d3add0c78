"""Text from a model: cache, sampling, the decoding loop."""
