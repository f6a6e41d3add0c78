"""bitsandbytes' own 4-bit linear layer, quantized by it: a second opinion on ours. Optional: pip install graftlm[bitsandbytes]."""

from typing import Any

import torch
from torch import nn

from .blockwise import quantize_4bit


def bitsandbytes_linear(
    linear: nn.Linear,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """`linear` as a bitsandbytes Linear4bit, frozen, on the same device.

    In eval mode without gradients its CPU path repacks the weight and multiplies in bfloat16, where the processor can; in
    train mode it gives NF4Linear's results. Raises ValueError without the library, for a type or block size that the
    layer does not take, and for a weight that can't be quantized.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"backend 'bitsandbytes' can't run here: {error}; pip install graftlm[bitsandbytes]") from None
    if quant_type not in ("nf4", "fp4") or block_size != 64:
        raise ValueError(
            f"bitsandbytes' layer takes nf4 or fp4 in blocks of 64, not {quant_type} in {block_size}; use backend 'graft'"
        )
    quantize_4bit(linear.weight, quant_type, double_quant=False)  # for its errors: bitsandbytes takes NaN silently
    bits4: Any = bitsandbytes.nn
    layer = bits4.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=quant_type,
        device="meta",
    )
    weight = linear.weight.detach().clone()
    layer.weight = bits4.Params4bit(weight, compress_statistics=double_quant, quant_type=quant_type, module=layer)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer.to(weight.device).train(linear.training)
