"""The gated delta rule: linear attention whose state forgets and overwrites."""

from torch import Tensor

from ..checks import check_floats, check_integers, check_shape
from ..dispatch import Backend, choose_backend
from .reference import gated_delta_reference
from .torch_gated_delta import gated_delta_torch


def gated_delta(
    q: Tensor,  # (B, H, T, Dk), normalized and scaled
    k: Tensor,  # (B, H, T, Dk), of length 1: the state then stays bounded
    v: Tensor,  # (B, H, T, Dv)
    log_decay: Tensor,  # (B, H, T), <= 0 and finite: log of what the state keeps at each token
    beta: Tensor,  # (B, H, T) in [0, 1]: how much of what the state has under k_t is replaced
    *,
    state: Tensor | None = None,  # (B, H, Dk, Dv), what earlier tokens left; None: zeros
    cu_seqlens: Tensor | None = None,  # (n_docs + 1,) with B = 1: documents packed in one row, each from an empty state
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:  # (B, H, T, Dv) in v's dtype, and the state after the last token in float32
    """o_t = S_t^T q_t, S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T (Yang et al. 2024, arXiv:2412.06464, eq. 10).

    Differentiable in everything but cu_seqlens. A token with log_decay 0 and beta 0 leaves the state as it is. Raises ValueError
    for shapes that don't fit, and for cu_seqlens with a state or with B > 1.
    """
    check_floats("gated_delta", q=q, k=k, v=v, log_decay=log_decay, beta=beta)
    if q.ndim != 4 or q.shape[2] == 0:
        raise ValueError(f"gated_delta: q has shape {tuple(q.shape)}; it takes (B, H, T, Dk) with T >= 1")
    B, H, T, Dk = q.shape
    check_shape("gated_delta", "k", k, (B, H, T, Dk), f"q is {tuple(q.shape)}")
    check_shape("gated_delta", "v", v, (B, H, T, v.shape[-1]), f"q is {tuple(q.shape)}")
    for name, tensor in (("log_decay", log_decay), ("beta", beta)):
        check_shape("gated_delta", name, tensor, (B, H, T), f"q is {tuple(q.shape)}")
    if state is not None:
        check_shape("gated_delta", "state", state, (B, H, Dk, v.shape[-1]), f"v is {tuple(v.shape)}")
    if cu_seqlens is not None:
        check_integers("gated_delta", "cu_seqlens", cu_seqlens, q.device)
        if B != 1 or state is not None:
            raise ValueError(f"gated_delta: cu_seqlens needs B = 1 and no state, got B = {B}; give rows or documents")
    chosen = choose_backend("gated_delta", backend, [q, k, v], unsupported="no Triton form is written")
    if chosen == "reference":
        return gated_delta_reference(q, k, v, log_decay, beta, state, cu_seqlens)
    return gated_delta_torch(q, k, v, log_decay, beta, state, cu_seqlens)
