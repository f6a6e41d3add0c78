"""Products of float8 tensors with one scale each, spelled out in float32 (Micikevicius et al. 2022, arXiv:2209.05433)."""

import torch
from torch import Tensor

FORWARD, BACKWARD = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)  # more digits for activations and weights, more range for gradients


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as float8 and the () float32 that it has to be multiplied by: the largest value becomes the largest of the dtype."""
    largest = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as float8 keeps it, in float32."""
    codes, scale = quantize(x, dtype)
    return codes.float() * scale


def float8_linear_reference(
    x: Tensor,  # (N, in)
    weight: Tensor,  # (out, in)
    gradient: Tensor,  # (N, out) of the output
) -> tuple[Tensor, Tensor, Tensor]:
    """The output x W^T, and the gradients of x and of W, float32."""
    x8, w8, g8 = rounded(x, FORWARD), rounded(weight, FORWARD), rounded(gradient, BACKWARD)
    return x8 @ w8.T, g8 @ w8, g8.T @ x8
