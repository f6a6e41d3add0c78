"""Pure functions of tensors, each with a reference, a fused and a Triton form."""
