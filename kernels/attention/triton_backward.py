"""FlashAttention-2's backward pass (Dao 2023, arXiv:2307.08691, algorithm 2), in two kernels and without atomics.

    p = exp(s - lse)                     scores and weights are computed again, tile by tile, from q, k and lse
    delta = rowsum(d_out * out)
    ds = p * (d_out v^T - delta)         times 1 - tanh^2 where scores are soft-capped
    attention_dq    one program per query tile, loops over keys:     dq = scale * sum ds k     (also writes delta)
    attention_dkdv  one program per key tile, loops over the queries
                    of all H / K heads that read it:                 dk = scale * sum ds^T q,  dv = sum p^T d_out

FlashAttention-2 forms s once and adds dq with atomics, whose order and so whose last bits change from run to run. Here each
sum has one owner and one order, so gradients repeat bit for bit, for 7 products instead of 5. Accumulators, s, p and ds
are float32; p and ds are rounded to the inputs' dtype as operands. Nothing that was saved is written to.
"""

import triton
import triton.language as tl

from .triton_mask import key_range, keys_of, load_tile, query_range, tanh


@triton.jit
def dq_over(
    dq, q_tile, do_tile, row_lse, delta, k_tile, v_tile, stride_ks, stride_vs, begin, end, lo, hi, length, cols, d_keep,
    qk_scale, cap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq after the key blocks that start in [begin, end)."""
    for start in range(begin, end, BLOCK_N):
        offset = tl.cast(start, tl.int64)
        keys = start + cols
        k = load_tile(k_tile + offset * stride_ks, keys < length, d_keep, MASKED, PAD)
        v = load_tile(v_tile + offset * stride_vs, keys < length, d_keep, MASKED, PAD)
        s = tl.dot(q_tile, tl.trans(k), input_precision=PRECISION) * qk_scale  # (BLOCK_M, BLOCK_N)
        t = s
        if SOFTCAP:
            t = tanh(s)
            s = t * cap
        if MASKED:
            s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None]), s, float("-inf"))
        p = tl.exp2(s - row_lse[:, None])
        dp = tl.dot(do_tile, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_dq(
    q, k, v, out, d_out, lse, delta_out, dq, starts, ends, key_lengths,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot, stride_od,
    stride_gb, stride_gh, stride_gt, stride_gd, stride_dqb, stride_dqh, stride_dqt, stride_dqd,
    T, S, H, G, window, scale, qk_scale, cap,
    Dh: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dq and delta of BLOCK_M queries of one head."""
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
    o_tile = load_tile(
        out + b * stride_ob + h * stride_oh + at[:, None] * stride_ot + d[None, :] * stride_od,
        row_keep,
        d_keep,
        True,
        PAD,
    )
    do_tile = load_tile(
        d_out + b * stride_gb + h * stride_gh + at[:, None] * stride_gt + d[None, :] * stride_gd,
        row_keep, d_keep, True, PAD,
    )  # fmt: skip
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta_out + (b * H + h) * T + at, delta, mask=row_keep)
    row_lse = tl.load(lse + (b * H + h) * T + at, mask=row_keep, other=float("inf"))
    q_tile = load_tile(
        q + b * stride_qb + h * stride_qh + at[:, None] * stride_qt + d[None, :] * stride_qd,
        row_keep,
        d_keep,
        True,
        PAD,
    )
    k_tile = k + b * stride_kb + (h // G) * stride_kh + cols[:, None] * stride_ks + d[None, :] * stride_kd
    v_tile = v + b * stride_vb + (h // G) * stride_vh + cols[:, None] * stride_vs + d[None, :] * stride_vd
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW or starts is not None:
        acc = dq_over(
            acc, q_tile, do_tile, row_lse, delta, k_tile, v_tile, stride_ks, stride_vs, begin, whole, lo, hi, length,
            cols, d_keep, qk_scale, cap, SOFTCAP, True, PAD, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc = dq_over(
        acc, q_tile, do_tile, row_lse, delta, k_tile, v_tile, stride_ks, stride_vs, whole, rest, lo, hi, length,
        cols, d_keep, qk_scale, cap, SOFTCAP, False, PAD, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc = dq_over(
        acc, q_tile, do_tile, row_lse, delta, k_tile, v_tile, stride_ks, stride_vs, rest, end, lo, hi, length,
        cols, d_keep, qk_scale, cap, SOFTCAP, True, PAD, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_tile = dq + b * stride_dqb + h * stride_dqh + at[:, None] * stride_dqt + d[None, :] * stride_dqd
    tl.store(dq_tile, (acc * scale).to(dq.dtype.element_ty), mask=row_keep[:, None] & d_keep[None, :])


@triton.jit
def dkdv_over(
    dk, dv, k_tile, v_tile, q_tile, do_tile, lse, delta, stride_qt, stride_gt, begin, end, keys, length, T, window,
    starts, ends, rows_0, d_keep, qk_scale, cap, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, PAD: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv after one head's query blocks that start in [begin, end). Scores stand transposed: (BLOCK_N, BLOCK_M)."""
    for start in range(begin, end, BLOCK_M):
        offset = tl.cast(start, tl.int64)
        rows = start + rows_0
        row_keep = rows < T
        q = load_tile(q_tile + offset * stride_qt, row_keep, d_keep, True, PAD)
        do = load_tile(do_tile + offset * stride_gt, row_keep, d_keep, True, PAD)
        row_lse = tl.load(lse + rows, mask=row_keep, other=float("inf"))  # rows past T: p = 0
        row_delta = tl.load(delta + rows, mask=row_keep, other=0.0)
        s = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION) * qk_scale
        t = s
        if SOFTCAP:
            t = tanh(s)
            s = t * cap
        if MASKED:
            lo, hi = keys_of(tl.minimum(rows, T - 1), length, T, window, starts, ends, CAUSAL, WINDOW)
            s = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :]), s, float("-inf"))
        p = tl.exp2(s - row_lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - row_delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "window"])
def attention_dkdv(
    q, k, v, d_out, lse, delta, dk, dv, starts, ends, key_lengths,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_gb, stride_gh, stride_gt, stride_gd,
    stride_dkb, stride_dkh, stride_dks, stride_dkd, stride_dvb, stride_dvh, stride_dvs, stride_dvd,
    T, S, H, G, window, scale, qk_scale, cap,
    Dh: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one kv head, over its G query heads."""
    n_tiles = tl.cdiv(S, BLOCK_N)
    tile = tl.program_id(0) % n_tiles  # causal: the first keys are seen most, and come first
    K = H // G
    b = (tl.program_id(0) // (n_tiles * K)).to(tl.int64)
    kv_head = (tl.program_id(0) // n_tiles % K).to(tl.int64)
    PAD: tl.constexpr = Dh != BLOCK_D

    length = S
    if key_lengths is not None:
        length = tl.load(key_lengths + b).to(tl.int32)
    first, last = tile * BLOCK_N, tl.minimum(tile * BLOCK_N + BLOCK_N, length) - 1
    keys = first + tl.arange(0, BLOCK_N)
    rows_0, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    key_keep, d_keep = keys < length, d < Dh
    at = keys.to(tl.int64)
    k_tile = load_tile(
        k + b * stride_kb + kv_head * stride_kh + at[:, None] * stride_ks + d[None, :] * stride_kd,
        key_keep, d_keep, True, PAD,
    )  # fmt: skip
    v_tile = load_tile(
        v + b * stride_vb + kv_head * stride_vh + at[:, None] * stride_vs + d[None, :] * stride_vd,
        key_keep, d_keep, True, PAD,
    )  # fmt: skip
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if last >= first:
        begin, whole, rest, end = query_range(first, last, length, T, window, starts, ends, CAUSAL, WINDOW, BLOCK_M)
        for g in range(0, G):
            h = kv_head * G + g
            q_head = q + b * stride_qb + h * stride_qh + rows_0[:, None] * stride_qt + d[None, :] * stride_qd
            do_head = d_out + b * stride_gb + h * stride_gh + rows_0[:, None] * stride_gt + d[None, :] * stride_gd
            lse_head, delta_head = lse + (b * H + h) * T, delta + (b * H + h) * T
            if CAUSAL or starts is not None:
                dk_acc, dv_acc = dkdv_over(
                    dk_acc, dv_acc, k_tile, v_tile, q_head, do_head, lse_head, delta_head, stride_qt, stride_gt,
                    begin, whole, keys, length, T, window, starts, ends, rows_0, d_keep, qk_scale, cap,
                    CAUSAL, WINDOW, SOFTCAP, True, PAD, BLOCK_M, PRECISION,
                )  # fmt: skip
            dk_acc, dv_acc = dkdv_over(
                dk_acc, dv_acc, k_tile, v_tile, q_head, do_head, lse_head, delta_head, stride_qt, stride_gt,
                whole, rest, keys, length, T, window, starts, ends, rows_0, d_keep, qk_scale, cap,
                CAUSAL, WINDOW, SOFTCAP, False, PAD, BLOCK_M, PRECISION,
            )  # fmt: skip
            if WINDOW or starts is not None:
                dk_acc, dv_acc = dkdv_over(
                    dk_acc, dv_acc, k_tile, v_tile, q_head, do_head, lse_head, delta_head, stride_qt, stride_gt,
                    rest, end, keys, length, T, window, starts, ends, rows_0, d_keep, qk_scale, cap,
                    CAUSAL, WINDOW, SOFTCAP, True, PAD, BLOCK_M, PRECISION,
                )  # fmt: skip
    dk_acc = tl.where(key_keep[:, None], dk_acc, 0.0)  # keys past the length were read as zeros, and count for nothing
    dv_acc = tl.where(key_keep[:, None], dv_acc, 0.0)
    store = (keys < S)[:, None] & d_keep[None, :]
    dk_tile = dk + b * stride_dkb + kv_head * stride_dkh + at[:, None] * stride_dks + d[None, :] * stride_dkd
    dv_tile = dv + b * stride_dvb + kv_head * stride_dvh + at[:, None] * stride_dvs + d[None, :] * stride_dvd
    tl.store(dk_tile, (dk_acc * scale).to(dk.dtype.element_ty), mask=store)
    tl.store(dv_tile, dv_acc.to(dv.dtype.element_ty), mask=store)
