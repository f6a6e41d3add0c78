"""The loops of kernels/decode. They take tensors by address (making numpy arrays of them costs more than the work); every
tensor is checked for dtype, contiguity and length where its address is taken."""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..numba_jit import compiled
from ..numba_memory import pointer


def add_rms_norm_(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual (B, D) += x (B, D) in place (None: nothing); returns RMSNorm(residual) * weight (D,), a new (B, D) tensor
    (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4). The mean of squares is summed in float32 by eight partial sums.

    Raises ValueError for tensors that are not contiguous float32 of these shapes on the CPU.
    """
    B, D = residual.shape
    normed = torch.empty_like(residual)
    n = B * D
    added = 0 if x is None else _address(x, n)
    _add_rms_norm(added, _address(residual, n), _address(weight, D), normed.data_ptr(), B, D, eps)
    return normed


def place_token_(
    q: Tensor,  # (B, H * Dh), is turned in place
    k: Tensor,  # (B, K * Dh)
    v: Tensor,  # (B, K * Dh)
    cos: Tensor,  # (B or 1, Dh/2) of each row's position
    sin: Tensor,
    keys: Tensor,  # (>= B, K, capacity, Dh)
    values: Tensor,
    column: int,  # where the token's key and value go
    *,
    q_weight: Tensor | None = None,  # (Dh,), QK-norm's weights; None: no QK-norm
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """QK-norm, RoPE (arXiv:2104.09864, eq. 34, half-split pairs) and the cache's write for one new token a row, in place.

    Raises ValueError for tensors that are not contiguous float32 of these shapes on the CPU, and a column outside.
    """
    B = q.shape[0]
    rows, K, capacity, Dh = keys.shape
    H = q.shape[1] // Dh
    if not (0 <= column < capacity and rows >= B and q.shape[1] == H * Dh and Dh % 2 == 0):
        raise ValueError(
            f"q {tuple(q.shape)} and column {column} don't fit a cache of shape {tuple(keys.shape)}; "
            "give (B, H * Dh) with B <= rows and a column below the capacity"
        )
    n_angles = cos.numel()
    if n_angles not in (Dh // 2, B * Dh // 2):
        raise ValueError(
            f"cos has {n_angles} values, expected {Dh // 2} or {B * Dh // 2}: one row of angles, or one each"
        )
    _place_token(
        _address(q, B * H * Dh), _address(k, B * K * Dh), _address(v, B * K * Dh),
        _address(cos, n_angles), _address(sin, n_angles), 0 if n_angles == Dh // 2 else Dh // 2,
        _address(keys, rows * K * capacity * Dh), _address(values, rows * K * capacity * Dh),
        0 if q_weight is None else _address(q_weight, Dh), 0 if k_weight is None else _address(k_weight, Dh),
        B, H, K, Dh, capacity, column, eps,
    )  # fmt: skip


def _address(tensor: Tensor, n: int) -> int:
    """Where a contiguous float32 CPU tensor of n values lies. Raises ValueError for any other."""
    if not (tensor.dtype is torch.float32 and tensor.is_contiguous() and tensor.is_cpu and tensor.numel() == n):
        raise ValueError(
            f"expected a contiguous float32 CPU tensor of {n} values, got {tuple(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device} with strides {tensor.stride()}"
        )
    return tensor.data_ptr()


@compiled(nogil=True)
def _add_rms_norm(x, residual, weight, out, B, D, eps):
    w = carray(pointer(weight), D, np.float32)
    for b in range(B):
        r = carray(pointer(residual + b * D * 4), D, np.float32)
        o = carray(pointer(out + b * D * 4), D, np.float32)
        if x != 0:
            a = carray(pointer(x + b * D * 4), D, np.float32)
            for i in range(D):
                r[i] += a[i]
        scale = _root_mean_square(r, D, eps)
        for i in range(D):
            o[i] = r[i] * scale * w[i]


@compiled(nogil=True)
def _root_mean_square(values, n, eps):
    """1 / sqrt(mean(values^2) + eps)."""
    sums = np.zeros(8, np.float32)
    whole = n // 8 * 8
    for i in range(0, whole, 8):
        for j in range(8):
            sums[j] += values[i + j] * values[i + j]
    total = np.float32(0)
    for j in range(8):
        total += sums[j]
    for i in range(whole, n):
        total += values[i] * values[i]
    return np.float32(1) / np.sqrt(total / np.float32(n) + np.float32(eps))


@compiled(nogil=True)
def _place_token(q, k, v, cos, sin, angle_stride, keys, values, q_weight, k_weight, B, H, K, Dh, capacity, column, eps):
    for b in range(B):
        c = carray(pointer(cos + b * angle_stride * 4), Dh // 2, np.float32)
        s = carray(pointer(sin + b * angle_stride * 4), Dh // 2, np.float32)
        for h in range(H):
            head = carray(pointer(q + (b * H + h) * Dh * 4), Dh, np.float32)
            _norm_and_turn(head, head, q_weight, c, s, Dh, eps)
        for h in range(K):
            source = carray(pointer(k + (b * K + h) * Dh * 4), Dh, np.float32)
            place = ((b * K + h) * capacity + column) * Dh * 4
            _norm_and_turn(source, carray(pointer(keys + place), Dh, np.float32), k_weight, c, s, Dh, eps)
            value = carray(pointer(v + (b * K + h) * Dh * 4), Dh, np.float32)
            target = carray(pointer(values + place), Dh, np.float32)
            for i in range(Dh):
                target[i] = value[i]


@compiled(nogil=True)
def _norm_and_turn(source, target, weight, cos, sin, Dh, eps):
    """target = RoPE(RMSNorm(source) * weight); a weight at address 0 is no norm. source and target may be one."""
    half = Dh // 2
    if weight != 0:
        w = carray(pointer(weight), Dh, np.float32)
        scale = _root_mean_square(source, Dh, eps)
        for i in range(half):
            low, high = source[i] * scale * w[i], source[i + half] * scale * w[i + half]
            target[i] = low * cos[i] - high * sin[i]
            target[i + half] = high * cos[i] + low * sin[i]
    else:
        for i in range(half):
            low, high = source[i], source[i + half]
            target[i] = low * cos[i] - high * sin[i]
            target[i + half] = high * cos[i] + low * sin[i]
