"""A short causal convolution as PyTorch defines it."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator


def causal_conv_reference(
    x: Tensor,  # (B, T, C)
    weight: Tensor,  # (C, K)
    before: Tensor | None = None,  # (B, K - 1, C)
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) with B = 1
) -> Tensor:  # (B, T, C)
    """See causal_conv."""
    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        pieces = [causal_conv_reference(x[:, a:b], weight) for a, b in pairwise(bounds) if b > a]
        return torch.cat(pieces, 1)
    C, K = weight.shape
    padded = F.pad(x, (0, 0, K - 1, 0)) if before is None else torch.cat([before.to(x.dtype), x], 1)
    dtype = accumulator(x.dtype)
    return F.conv1d(padded.mT.to(dtype), weight[:, None].to(dtype), groups=C).mT.to(x.dtype)
