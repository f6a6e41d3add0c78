"""What the attention kernels share. Every mask here is an interval: query t sees the keys lo(t) <= s < hi(t).

    causal        hi = p + 1        p = t + length - T, the query's place among the keys (bottom right)
    window w      lo = p + 1 - w
    key length    hi = length
    document      lo = its first token, hi = one past its last (starts[t], ends[t]; T = S)

Each is the tightest of those that apply, and both ends only grow with t. So the first and the last row of a query tile
tell which key blocks it meets, and which of these it sees whole: only the others are masked.
"""

# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl


@triton.jit
def keys_of(rows, length, T, window, starts, ends, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """lo, hi of the queries `rows` (each < T). hi <= lo, also below 0, where a row sees nothing."""
    lo = rows * 0
    hi = rows * 0 + length
    if starts is not None:
        lo = tl.load(starts + rows)
        hi = tl.load(ends + rows)
    if CAUSAL:
        position = rows + (length - T)
        hi = tl.minimum(hi, position + 1)
        if WINDOW:
            lo = tl.maximum(lo, position + 1 - window)
    return lo, hi


@triton.jit
def key_range(
    first, last, length, T, window, starts, ends, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, N: tl.constexpr
):
    """For the query rows first..last: begin, whole, rest, end, multiples of N but for the end.

    Key blocks in [begin, whole) and [rest, end) need the mask, those in [whole, rest) don't.
    """
    lo_first, hi_first = keys_of(first, length, T, window, starts, ends, CAUSAL, WINDOW)
    lo_last, hi_last = keys_of(last, length, T, window, starts, ends, CAUSAL, WINDOW)
    begin = tl.maximum(lo_first, 0) // N * N
    end = tl.maximum(hi_last, 0)
    whole = (tl.maximum(lo_last, 0) + N - 1) // N * N
    rest = tl.maximum(hi_first, 0) // N * N
    whole = tl.maximum(tl.minimum(whole, (end + N - 1) // N * N), begin)
    rest = tl.maximum(rest, whole)
    return begin, whole, rest, end


@triton.jit
def query_range(
    first, last, length, T, window, starts, ends, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, M: tl.constexpr
):
    """key_range the other way round: for the keys first..last (both < length), the query blocks of M rows that meet them."""
    begin, end = first * 0, first * 0 + T
    whole, rest = begin, end
    if starts is not None:
        begin, end = tl.load(starts + first), tl.load(ends + last)
        whole, rest = tl.load(starts + last), tl.load(ends + first)
    if CAUSAL:
        shift = length - T
        begin = tl.maximum(begin, first - shift)
        whole = tl.maximum(whole, last - shift)
        if WINDOW:
            end = tl.minimum(end, last - shift + window)
            rest = tl.minimum(rest, first - shift + window)
    begin = tl.maximum(begin, 0) // M * M
    end = tl.maximum(end, 0)
    whole = (tl.maximum(whole, 0) + M - 1) // M * M
    if WINDOW or starts is not None:  # else the last block's rows past T are zeros, and need no mask
        rest = tl.maximum(rest, 0) // M * M
    whole = tl.maximum(tl.minimum(whole, (end + M - 1) // M * M), begin)
    rest = tl.maximum(rest, whole)
    return begin, whole, rest, end


@triton.jit
def load_tile(pointers, row_keep, col_keep, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A (rows, Dh) tile, zero outside; the checks that aren't needed are left out, so that loads stay plain."""
    if ROWS and COLS:
        return tl.load(pointers, mask=row_keep[:, None] & col_keep[None, :], other=0.0)
    elif ROWS:
        return tl.load(pointers, mask=row_keep[:, None], other=0.0)
    elif COLS:
        return tl.load(pointers, mask=col_keep[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2 |x|): can't overflow."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # 2 log2(e)
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)
