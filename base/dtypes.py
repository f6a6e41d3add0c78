"""The names of the floating-point types that a config may hold."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """'bfloat16' -> torch.bfloat16. Raises ValueError that lists the known names."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose {', '.join(DTYPES)}")
    return DTYPES[name]
