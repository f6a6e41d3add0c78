"""FlashAttention-2's forward pass (Dao 2023, arXiv:2307.08691, algorithm 1).

    for a tile of BLOCK_M queries of one head:          keys ->   0    64   128   192
        m = -inf, l = 0, acc = 0                        queries   [whole][whole][diag]   .
        for each block of BLOCK_N keys it may see:         |      [whole][whole][whole][diag]
            s = q k^T * scale                              v
            m' = max(m, rowmax s),  p = exp(s - m')      `diag` blocks are masked, `.` is never read
            l = l exp(m - m') + rowsum p
            acc = acc exp(m - m') + p v
        out = acc / l,  lse = m + log l

Exponentials are powers of 2 (log2(e) is folded into the scale), and lse is kept in base 2: (B, H, T) float32, +inf for a
row that sees nothing, so that the backward pass finds p = 0 there. s, m, l and acc are float32; p is rounded to v's dtype
for the second product, as every flash kernel does. A kv head is read in place by its H / K query heads.
Bytes: q, k, v once from device memory (k and v again from L2 for each query tile), out and lse once; no (T, S) array.
"""

import triton
import triton.language as tl

from .triton_mask import key_range, keys_of, load_tile, tanh


@triton.jit
def attend(
    acc, m, l, q_tile, k_tile, v_tile, stride_ks, stride_vs, begin, end, lo, hi, length, cols, d_keep, qk_scale, cap,
    SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc, m, l after the key blocks that start in [begin, end)."""
    for start in range(begin, end, BLOCK_N):
        offset = tl.cast(start, tl.int64)
        keys = start + cols
        k = load_tile(k_tile + offset * stride_ks, keys < length, d_keep, MASKED, PAD)
        s = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        if SOFTCAP:
            s = tanh(s * qk_scale) * cap
        if MASKED:
            s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
        top = tl.max(s, 1)
        m_new = tl.maximum(m, top if SOFTCAP else top * qk_scale)  # scale > 0: as if scaled first, for less
        m_used = m_new
        if MASKED:
            m_used = tl.where(m_new == float("-inf"), 0.0, m_new)  # nothing seen yet: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2((s if SOFTCAP else s * qk_scale) - m_used[:, None])
        shrink = tl.exp2(m - m_used)
        l = l * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        v = load_tile(v_tile + offset * stride_vs, keys < length, d_keep, MASKED, PAD)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m = m_new
    return acc, m, l


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_forward(
    q, k, v, out, lse, starts, ends, key_lengths,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    T, S, H, G, window, qk_scale, cap,
    Dh: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head. G = H / K. qk_scale holds log2(e), or with SOFTCAP cap does."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles  # causal: the longest rows first
    b = (tl.program_id(0) // (n_tiles * H)).to(tl.int64)
    h = (tl.program_id(0) // n_tiles % H).to(tl.int64)
    PAD: tl.constexpr = Dh != BLOCK_D

    first, last = tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, T) - 1
    rows = first + tl.arange(0, BLOCK_M)
    cols, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    row_keep, d_keep = rows < T, d < Dh
    length = S
    if key_lengths is not None:
        length = tl.load(key_lengths + b).to(tl.int32)
    lo, hi = keys_of(tl.minimum(rows, T - 1), length, T, window, starts, ends, CAUSAL, WINDOW)
    begin, whole, rest, end = key_range(first, last, length, T, window, starts, ends, CAUSAL, WINDOW, BLOCK_N)

    at = rows.to(tl.int64)
    q_tile = load_tile(
        q + b * stride_qb + h * stride_qh + at[:, None] * stride_qt + d[None, :] * stride_qd,
        row_keep,
        d_keep,
        True,
        PAD,
    )
    k_tile = k + b * stride_kb + (h // G) * stride_kh + cols[:, None] * stride_ks + d[None, :] * stride_kd
    v_tile = v + b * stride_vb + (h // G) * stride_vh + cols[:, None] * stride_vs + d[None, :] * stride_vd
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW or starts is not None:
        acc, m, l = attend(
            acc, m, l, q_tile, k_tile, v_tile, stride_ks, stride_vs, begin, whole, lo, hi, length, cols, d_keep,
            qk_scale, cap, SOFTCAP, True, PAD, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k_tile, v_tile, stride_ks, stride_vs, whole, rest, lo, hi, length, cols, d_keep,
        qk_scale, cap, SOFTCAP, False, PAD, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, m, l = attend(
        acc, m, l, q_tile, k_tile, v_tile, stride_ks, stride_vs, rest, end, lo, hi, length, cols, d_keep,
        qk_scale, cap, SOFTCAP, True, PAD, BLOCK_N, PRECISION,
    )  # fmt: skip

    nothing = l == 0.0
    l = tl.where(nothing, 1.0, l)
    tl.store(lse + (b * H + h) * T + at, tl.where(nothing, float("inf"), m + tl.log2(l)), mask=row_keep)
    out_tile = out + b * stride_ob + h * stride_oh + at[:, None] * stride_ot + d[None, :] * stride_od
    tl.store(out_tile, (acc / l[:, None]).to(out.dtype.element_ty), mask=row_keep[:, None] & d_keep[None, :])
