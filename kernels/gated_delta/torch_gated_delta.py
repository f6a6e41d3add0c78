"""The gated delta rule in chunks of tokens: matrix products within a chunk, one step of the state from chunk to chunk.

Within a chunk of C tokens (Yang et al. 2024, arXiv:2406.06484, section 3.2, with the decays of arXiv:2412.06464, section 3.3):

    A    = tril(diag(beta) (K K^T * G), -1)          (C, C), G[i, j] = decay from j to i
    U, W = (I + A)^-1 diag(beta) [V, K * g]          one triangular solve; g[i] = decay from the chunk's start to i
    V'   = U - W S                                   what each token writes; S (Dk, Dv) is the state before the chunk
    O    = (Q * g) S + (Q K^T * G) V'
    S   <- a S + (K * h)^T V'                        h[i] = decay from i to the chunk's end, a = decay of the whole chunk

Only the last line and V' go from chunk to chunk. Packed documents: decays between two documents are 0.

Forward + backward of B 8, H 6, T 256, Dk = Dv = 64, float32, processor time on one busy core: C = 16 115 ms, 32 91, 64 97,
128 125; transformers 5.23's chunks of 64 take 127.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulator

CHUNK = 64  # tokens


def gated_delta_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same function as `gated_delta_reference`."""
    given, dtype = v.dtype, accumulator(q.dtype)
    if state is None:
        state = q.new_zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=dtype)
    with torch.autocast(q.device.type, enabled=False):  # the solve amplifies rounding
        q, k, v, log_decay, beta, state = (t.to(dtype) for t in (q, k, v, log_decay, beta, state))
        if q.shape[2] == 1:
            out, state = _one_token(q, k, v, log_decay, beta, state)
        else:
            out, state = _chunked(q, k, v, log_decay, beta, state, cu_seqlens)
    return out.to(given), state


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, T = 1."""
    state = state * log_decay.exp()[..., None]  # (B, H, 1) -> (B, H, 1, 1)
    written = beta[..., None] * (v - k @ state)  # (B, H, 1, Dv)
    state = state + k.transpose(-1, -2) @ written
    return q @ state, state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, H, T, Dv = v.shape
    C = min(CHUNK, T)
    n = -(-T // C)
    if padding := n * C - T:  # tokens that write nothing and decay nothing
        q, k, v = (F.pad(t, (0, 0, 0, padding)) for t in (q, k, v))
        log_decay, beta = (F.pad(t, (0, padding)) for t in (log_decay, beta))
    q, k, v = (t.reshape(B, H, n, C, t.shape[-1]) for t in (q, k, v))
    log_decay, beta = log_decay.reshape(B, H, n, C), beta.reshape(B, H, n, C, 1)
    between, since_start, to_end, whole = _decays(log_decay, _documents(cu_seqlens, n, C))
    keys = k * beta
    lower = (keys @ k.transpose(-1, -2)) * between  # its diagonal is not read: it is taken for ones
    solved = torch.linalg.solve_triangular(
        lower, torch.cat([v * beta, keys * since_start], -1), upper=False, unitriangular=True
    )
    u, w = solved.split([Dv, k.shape[-1]], -1)  # (B, H, n, C, Dv), (B, H, n, C, Dk)
    ends = (k * to_end).transpose(-1, -2)  # (B, H, n, Dk, C)
    states, written = [], []
    for u_i, w_i, ends_i, whole_i in zip(u.unbind(2), w.unbind(2), ends.unbind(2), whole.unbind(2), strict=True):
        states.append(state)
        written.append(u_i - w_i @ state)
        state = whole_i * state + ends_i @ written[-1]
    scores = (q @ k.transpose(-1, -2)) * between
    out = (q * since_start) @ torch.stack(states, 2) + scores @ torch.stack(written, 2)
    return out.reshape(B, H, n * C, Dv)[:, :, :T], state


def _decays(log_decay: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of log_decay (B, H, n, C): from j to i (B, H, n, C, C), 0 for j > i; from the chunk's start to i and from i to its end
    (B, H, n, C, 1); of the whole chunk (B, H, n, 1, 1)."""
    total = log_decay.cumsum(-1)
    tokens = torch.arange(total.shape[-1], device=total.device)
    later = tokens[:, None] < tokens  # (C, C)
    hidden = later if documents is None else later | (documents[:, :, None] != documents[:, None])  # (n, C, C)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    last = total[..., -1:]
    since_start, to_end, whole = total.exp(), (last - total).exp(), last.exp()
    if documents is not None:
        before = torch.cat([documents[:1, 0], documents[:-1, -1]])  # the document that the state comes from
        since_start = since_start * (documents == before[:, None])
        to_end = to_end * (documents == documents[:, -1:])
        whole = whole * (documents[:, -1] == before)[:, None]
    return between, since_start[..., None], to_end[..., None], whole[..., None]


def _documents(cu_seqlens: Tensor | None, n: int, C: int) -> Tensor | None:
    """The number of each token's document, (n, C); padding is the last one's."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(n * C, device=cu_seqlens.device)
    return torch.bucketize(tokens, cu_seqlens[1:-1], right=True).view(n, C)
