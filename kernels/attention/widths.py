"""Values narrower than keys, as in latent attention: kernels know one head size, so zeros fill them up."""

import torch
from torch import Tensor


def widened(v: Tensor, width: int) -> Tensor:
    """(B, K, S, Dv) -> (B, K, S, width) with zeros behind, v itself where it has that width. Differentiable."""
    missing = width - v.shape[-1]
    return torch.cat([v, v.new_zeros(*v.shape[:-1], missing)], -1) if missing else v
