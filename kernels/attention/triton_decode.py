"""One query against many keys: flash-decoding (Dao et al. 2023), the keys split among programs and the parts combined.

    T = 1, so the H / K query heads of a kv head form one small tile      keys  0 ......... length
    attention_decode   program (row, kv head, split): online softmax        split 0 | split 1 | split 2
                       over its share of the keys it may see,               out_0     out_1     out_2    each a softmax
                       writes that softmax's mean and lse                      \\        |        /       of its own
    attention_combine  program (row, head): sum of the parts by exp(lse)            out

A row's own length is cut into even shares, so rows of different lengths keep all splits busy. Parts are float32.
Bytes: k and v once; the parts add (Dh + 1) * 4 bytes for each head and split, written and read.
"""

import triton
import triton.language as tl

from .triton_mask import load_tile, tanh


@triton.jit(do_not_specialize=["S", "window", "n_splits"])
def attention_decode(
    q, k, v, parts, part_lse, key_lengths,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd,
    S, H, G, window, n_splits, qk_scale, cap,
    Dh: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts (B, H, n_splits, Dh) and part_lse (B, H, n_splits), base 2, -inf for an empty share."""
    split = tl.program_id(0) % n_splits
    K = H // G
    b = (tl.program_id(0) // (n_splits * K)).to(tl.int64)
    kv_head = (tl.program_id(0) // n_splits % K).to(tl.int64)
    PAD: tl.constexpr = Dh != BLOCK_D

    hi = S
    if key_lengths is not None:
        hi = tl.load(key_lengths + b).to(tl.int32)
    lo = hi * 0
    if WINDOW:
        lo = tl.maximum(hi - window, 0)
    share = tl.cdiv(tl.cdiv(hi - lo, n_splits), BLOCK_N) * BLOCK_N
    begin = lo + split * share
    end = tl.minimum(begin + share, hi)

    group, cols, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    heads = kv_head * G + group
    head_keep, d_keep = group < G, d < Dh
    q_tile = load_tile(
        q + b * stride_qb + heads[:, None] * stride_qh + d[None, :] * stride_qd, head_keep, d_keep, True, PAD
    )
    k_tile = k + b * stride_kb + kv_head * stride_kh + cols[:, None] * stride_ks + d[None, :] * stride_kd
    v_tile = v + b * stride_vb + kv_head * stride_vh + cols[:, None] * stride_vs + d[None, :] * stride_vd
    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        offset = tl.cast(start, tl.int64)
        keys = start + cols
        k_block = load_tile(k_tile + offset * stride_ks, keys < end, d_keep, True, PAD)
        s = tl.dot(q_tile, tl.trans(k_block), input_precision=PRECISION) * qk_scale  # (BLOCK_G, BLOCK_N)
        if SOFTCAP:
            s = tanh(s) * cap
        s = tl.where((keys < end)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))  # finite: the block's first key is seen
        p = tl.exp2(s - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)
        v_block = load_tile(v_tile + offset * stride_vs, keys < end, d_keep, True, PAD)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * shrink[:, None], input_precision=PRECISION)
        m = m_new
    nothing = l == 0.0
    l = tl.where(nothing, 1.0, l)
    at = (b * H + heads) * n_splits + split
    tl.store(part_lse + at, tl.where(nothing, float("-inf"), m + tl.log2(l)), mask=head_keep)
    tl.store(parts + at[:, None] * Dh + d[None, :], acc / l[:, None], mask=head_keep[:, None] & d_keep[None, :])


@triton.jit(do_not_specialize=["n_splits"])
def attention_combine(
    parts, part_lse, out, stride_ob, stride_oh, stride_od, H, n_splits,
    Dh: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, h] = sum_i w_i parts_i / sum_i w_i with w_i = 2^(lse_i - max lse); zero where every share is empty."""
    b = (tl.program_id(0) // H).to(tl.int64)
    h = (tl.program_id(0) % H).to(tl.int64)
    splits, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = (b * H + h) * n_splits + splits
    lse = tl.load(part_lse + at, mask=splits < n_splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    keep = (splits < n_splits)[:, None] & (d < Dh)[None, :]
    part = tl.load(parts + at[:, None] * Dh + d[None, :], mask=keep, other=0.0)
    total = tl.sum(weight, 0)
    mean = tl.sum(part * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + b * stride_ob + h * stride_oh + d * stride_od, mean.to(out.dtype.element_ty), mask=d < Dh)
