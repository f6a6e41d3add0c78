"""The model that pretrains: tokenizer, data, Transformer, optimizers, the one training loop, generation."""
