"""The attention kernels as PyTorch operators: launched, differentiated, and known to torch.compile and FakeTensorMode."""

import math

import torch
from torch import Tensor

from ..dispatch import shared_memory
from ..launch import cdiv, launch, multiprocessors, next_power_of_2
from .tiles import Tile, tile_for
from .triton_backward import attention_dkdv, attention_dq
from .triton_decode import attention_combine, attention_decode
from .triton_forward import attention_forward

LOG2_E = 1 / math.log(2)
DECODE_KEYS = 64  # keys a block while decoding; FlexAttention's default too, not measured here yet
MIN_SHARE = (
    256  # keys a split: below this the combination costs more than the wait it saves (a guess, not measured yet)
)


def attention_triton(
    q: Tensor,  # (B, H, T, Dh)
    k: Tensor,  # (B, K, S, Dh)
    v: Tensor,  # (B, K, S, Dh)
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
) -> Tensor:  # (B, H, T, Dh)
    """The same function as `attention_reference`. Saves q, k, v, the output and the log-sum-exp for the backward pass."""
    if window is not None and window >= k.shape[2]:
        window = None
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.shape[2] == 1 and not wants_grad and cu_seqlens is None:
        return decode_op(q, k, v, key_lengths, scale, window, softcap)  # the newest query: causal or not is the same
    return attention_op(q, k, v, cu_seqlens, key_lengths, causal, scale, window, softcap)[0]


@torch.library.custom_op("graft::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """out like q, and the log-sum-exp (B, H, T) float32 in base 2."""
    return forward(q, k, v, cu_seqlens, key_lengths, causal, scale, window, softcap)


@torch.library.custom_op("graft::attention_backward", mutates_args=())
def attention_backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, each like its tensor."""
    return backward(d_out, q, k, v, out, lse, cu_seqlens, key_lengths, causal, scale, window, softcap)


@torch.library.custom_op("graft::attention_decode", mutates_args=())
def decode_op(
    q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """T = 1, no gradient."""
    return decode(q, k, v, key_lengths, scale, window, softcap)


@attention_op.register_fake
def _(q, k, v, cu_seqlens, key_lengths, causal, scale, window, softcap):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@attention_backward_op.register_fake
def _(d_out, q, k, v, out, lse, cu_seqlens, key_lengths, causal, scale, window, softcap):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@decode_op.register_fake
def _(q, k, v, key_lengths, scale, window, softcap):
    return torch.empty_like(q)


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, key_lengths, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, key_lengths)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out: Tensor, _) -> tuple[Tensor | None, ...]:
    grads = attention_backward_op(d_out, *ctx.saved_tensors, *ctx.options)
    return (*grads, *[None] * 6)


attention_op.register_autograd(_backward, setup_context=_save)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    tile: Tile | None = None,  # another than the shipped one, for tuning
) -> tuple[Tensor, Tensor]:
    """One launch. out has q's own strides, so heads that were split by a view merge by a view."""
    B, H, T, Dh = q.shape
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = tile or tile_for("forward", Dh, q.element_size(), shared_memory(q.device))
    launch(
        attention_forward,
        (cdiv(T, tile.block_m) * B * H,),
        *(q, k, v, out, lse, *borders(cu_seqlens, T), key_lengths),
        *(*q.stride(), *k.stride(), *v.stride(), *out.stride()),
        *(T, k.shape[2], H, H // k.shape[1], window or 0, *scales(scale, softcap)),
        **flags(q, causal, window, softcap, tile),
    )
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    tiles: tuple[Tile, Tile] | None = None,  # of dq and of dk, dv, for tuning
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches: dq with delta, then dk and dv, which read delta."""
    B, H, T, Dh = q.shape
    K, S = k.shape[1:3]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = torch.empty_like(lse)
    marks = (*borders(cu_seqlens, T), key_lengths)
    sizes = (T, S, H, H // K, window or 0, scale, *scales(scale, softcap))
    shared = shared_memory(q.device)
    of_dq, of_dkdv = tiles or tuple(tile_for(kind, Dh, q.element_size(), shared) for kind in ("dq", "dkdv"))
    if dq.numel():
        launch(
            attention_dq,
            (cdiv(T, of_dq.block_m) * B * H,),
            *(q, k, v, out, d_out, lse, delta, dq, *marks),
            *(*q.stride(), *k.stride(), *v.stride(), *out.stride(), *d_out.stride(), *dq.stride()),
            *sizes,
            **flags(q, causal, window, softcap, of_dq),
        )
    if dk.numel():
        launch(
            attention_dkdv,
            (cdiv(S, of_dkdv.block_n) * B * K,),
            *(q, k, v, d_out, lse, delta, dk, dv, *marks),
            *(*q.stride(), *k.stride(), *v.stride(), *d_out.stride(), *dk.stride(), *dv.stride()),
            *sizes,
            **flags(q, causal, window, softcap, of_dkdv),
        )
    return dq, dk, dv


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    *,
    n_splits: int | None = None,
) -> Tensor:
    """Two launches: the parts, and their combination. As many splits as give every multiprocessor two programs."""
    B, H, _, Dh = q.shape
    K, S = k.shape[1:3]
    out = torch.empty_like(q)
    if out.numel() == 0:
        return out
    most = cdiv(min(S, window or S), MIN_SHARE)
    n_splits = n_splits or max(1, min(most, cdiv(2 * multiprocessors(q.device), B * K), 128))
    parts = q.new_empty(B, H, n_splits, Dh, dtype=torch.float32)
    part_lse = q.new_empty(B, H, n_splits, dtype=torch.float32)
    group = H // K
    strides = (q.stride(0), q.stride(1), q.stride(3), *k.stride(), *v.stride())
    block_d = max(16, next_power_of_2(Dh))
    launch(
        attention_decode,
        (n_splits * B * K,),
        *(q, k, v, parts, part_lse, key_lengths, *strides),
        *(S, H, group, window or 0, n_splits, *scales(scale, softcap)),
        **{"Dh": Dh, "WINDOW": window is not None, "SOFTCAP": softcap is not None, "PRECISION": precision(q)},
        **{"BLOCK_G": max(16, next_power_of_2(group)), "BLOCK_N": decode_keys(block_d, q), "BLOCK_D": block_d},
        num_warps=4,
        num_stages=2,
    )
    launch(
        attention_combine,
        (B * H,),
        *(parts, part_lse, out, out.stride(0), out.stride(1), out.stride(3), H, n_splits),
        **{"Dh": Dh, "BLOCK_S": next_power_of_2(n_splits), "BLOCK_D": block_d},
        num_warps=4,
    )
    return out


def decode_keys(block_d: int, q: Tensor) -> int:
    """Keys a block: a quarter where a key takes more than 512 bytes (float32, head 256), so that two stages fit 99 KB."""
    return DECODE_KEYS if block_d * q.element_size() <= 512 else DECODE_KEYS // 4


def borders(cu_seqlens: Tensor | None, T: int) -> tuple[Tensor | None, Tensor | None]:
    """Each token's document as (its first token, one past its last), both (T,) int32; empty past the last border."""
    if cu_seqlens is None:
        return None, None
    edges = cu_seqlens.to(torch.int32)
    tokens = torch.arange(T, device=edges.device, dtype=torch.int32)
    after = torch.searchsorted(edges, tokens, right=True)  # the first border past the token
    return edges[after - 1], edges[after.clamp(max=edges.numel() - 1)]


def scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """(qk_scale, cap): base-2 scores are q k * qk_scale, or tanh(q k * qk_scale) * cap."""
    return (scale * LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2_E)


def precision(q: Tensor) -> str:
    """float32 products as three tf32 ones: float32's accuracy from tensor cores. Halves are exact in either."""
    return "tf32x3" if q.dtype == torch.float32 else "tf32"


def flags(q: Tensor, causal: bool, window: int | None, softcap: float | None, tile: Tile) -> dict[str, object]:
    """The kernels' compile-time arguments."""
    Dh = q.shape[3]
    return {
        "Dh": Dh,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "SOFTCAP": softcap is not None,
        "PRECISION": precision(q),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": max(16, next_power_of_2(Dh)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
