"""Paged attention in Triton: flash-decoding whose key blocks are pages, found through the row's table.

    T * H / K queries of a kv head form one tile     pages of the row   3 | 1 | 5 | 8 | 2
    paged_decode       program (row, kv head, split): online softmax    split 0   | split 1
                       over its share of the row's pages                out_0       out_1     each a softmax of its own
    attention_combine  (kernels/attention) sums the parts by exp(lse)        out

Query t of a row with n tokens sees the keys [n - T + t + 1 - window, n - T + t]. One page is one key block, so each load is a
plain tile, whatever the order of the pages in memory. Accumulators are float32. Bytes: the row's k and v once; the parts add
(Dh + 1) * 4 for each query and split, written and read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.triton_attention import scales
from ..attention.triton_decode import attention_combine
from ..attention.triton_mask import load_tile, tanh
from ..launch import cdiv, launch, multiprocessors, next_power_of_2

MIN_SHARE = 256  # tokens a split: kernels/attention's, a guess that no GPU has measured yet


@triton.jit(do_not_specialize=["n", "window", "n_splits"])
def paged_decode(
    q, keys, values, table, lengths, parts, part_lse,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kp, stride_kh, stride_ks, stride_kd,
    stride_vp, stride_vh, stride_vs, stride_vd,
    n, H, G, T, window, n_splits, qk_scale, cap,
    Dh: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts (B, H * T, n_splits, Dh) and part_lse (B, H * T, n_splits), base 2, -inf for an empty share.

    qk_scale holds log2(e), or with SOFTCAP cap does."""
    split = tl.program_id(0) % n_splits
    K = H // G
    b = (tl.program_id(0) // (n_splits * K)).to(tl.int64)
    kv_head = (tl.program_id(0) // n_splits % K).to(tl.int64)
    PAD: tl.constexpr = Dh != BLOCK_D

    length = tl.load(lengths + b).to(tl.int32)
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - T + 1 - window, 0)  # the first query's first key
    begin_page, end_page = first // PAGE, tl.cdiv(length, PAGE)
    share = tl.cdiv(end_page - begin_page, n_splits)
    begin = begin_page + split * share
    end = tl.minimum(begin + share, end_page)

    row, cols, d = tl.arange(0, BLOCK_Q), tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    heads, t = kv_head * G + row // T, row % T
    keep, d_keep = row < G * T, d < Dh
    last = length - T + t  # each query's own token
    q_tile = load_tile(
        q + b * stride_qb + heads[:, None] * stride_qh + t[:, None] * stride_qt + d[None, :] * stride_qd,
        keep, d_keep, True, PAD,
    )  # fmt: skip
    k_tile = keys + kv_head * stride_kh + cols[:, None] * stride_ks + d[None, :] * stride_kd
    v_tile = values + kv_head * stride_vh + cols[:, None] * stride_vs + d[None, :] * stride_vd
    m = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for j in range(begin, end):
        page = tl.load(table + b * n + j).to(tl.int64)
        places = j * PAGE + cols
        k_block = load_tile(k_tile + page * stride_kp, places < length, d_keep, True, PAD)
        s = tl.dot(q_tile, tl.trans(k_block), input_precision=PRECISION) * qk_scale  # (BLOCK_Q, PAGE)
        if SOFTCAP:
            s = cap * tanh(s)
        seen = places[None, :] <= last[:, None]
        if WINDOW:
            seen = seen & (places[None, :] > last[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a query that has seen nothing yet
        p = tl.exp2(s - m_safe[:, None])
        shrink = tl.exp2(m - m_safe)
        l = l * shrink + tl.sum(p, 1)
        v_block = load_tile(v_tile + page * stride_vp, places < length, d_keep, True, PAD)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    nothing = l == 0.0
    l = tl.where(nothing, 1.0, l)
    at = ((b * H + heads) * T + t) * n_splits + split
    tl.store(part_lse + at, tl.where(nothing, float("-inf"), m + tl.log2(l)), mask=keep)
    tl.store(parts + at[:, None] * Dh + d[None, :], acc / l[:, None], mask=keep[:, None] & d_keep[None, :])


def paged_attention_triton(
    q: Tensor,  # (B, H, T, Dh)
    keys: Tensor,  # (n_pages, K, PAGE, Dh)
    values: Tensor,
    table: Tensor,  # (B, n) int32
    lengths: Tensor,  # (B,) int32
    *,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:  # (B, H, T, Dh)
    """The same function as `paged_attention_reference`: two launches."""
    B, H, T, Dh = q.shape
    K, page = keys.shape[1:3]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    table, lengths = table.contiguous(), lengths.contiguous()
    seen = table.shape[1] * page if window is None else min(window + T, table.shape[1] * page)
    n_splits = max(1, min(cdiv(2 * multiprocessors(q.device), B * K), cdiv(seen, MIN_SHARE)))
    parts = torch.empty(B, H * T, n_splits, Dh, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(B, H * T, n_splits, dtype=torch.float32, device=q.device)
    block_d = max(16, next_power_of_2(Dh))
    launch(
        paged_decode,
        (B * K * n_splits,),
        *(q, keys, values, table, lengths, parts, part_lse),
        *(*q.stride(), *keys.stride(), *values.stride()),
        *(table.shape[1], H, H // K, T, window or 0, n_splits, *scales(scale, softcap)),
        Dh=Dh, WINDOW=window is not None, SOFTCAP=softcap is not None, PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32",
        PAGE=page, BLOCK_Q=max(16, next_power_of_2(T * (H // K))), BLOCK_D=block_d,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    flat = out.view(B, H * T, Dh)
    launch(
        attention_combine,
        (B * H * T,),
        *(parts, part_lse, flat, *flat.stride(), H * T, n_splits),
        Dh=Dh, BLOCK_S=next_power_of_2(n_splits), BLOCK_D=block_d,
    )  # fmt: skip
    return out
