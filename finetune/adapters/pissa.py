"""PiSSA (Meng et al. 2024, arXiv:2404.02948, section 3): A and B start as W's largest singular vectors.

The paper trains B A beside the residual W - s B0 A0. Here the base stays as it is and the update is s (B A - B0 A0): the same
function, zero at the start, and on disk a plain LoRA of twice the rank, [A; A0] and [B, -B0], which is how PEFT converts PiSSA.
On a 4-bit base, W is what the codes mean: the paper's gain from quantizing the residual instead is not taken.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .low_rank import apply_update

EXACT_UP_TO = (
    2048  # smaller side of a matrix above which the randomized method is used (an exact one takes minutes at 8192)
)
N_ITERATIONS = 16  # of the randomized method, PEFT's advice


class Pissa(nn.Module):
    """One adapter's update of one linear: s (B A - B0 A0), of which A and B train."""

    ROLES: ClassVar = {"lora_a": "adapter", "lora_b": "adapter"}
    stacks: ClassVar[bool] = False
    start_a: Tensor  # (R, in)
    start_b: Tensor  # (out, R)

    def __init__(self, a: Tensor, b: Tensor, scale: float, *, dropout: float = 0.0) -> None:  # from `principal`
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.register_buffer("start_a", a, persistent=False)
        self.register_buffer("start_b", b, persistent=False)
        self.lora_a, self.lora_b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (2 R, in) and B (out, 2 R) of the plain LoRA that this is."""
        return torch.cat([self.lora_a, self.start_a]), torch.cat([self.lora_b, -self.start_b], dim=1)

    def apply_to(self, base: nn.Module, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return apply_update(base, x, dropped, *self.factors(), self.scale)


def principal(weight: Tensor, rank: int, scale: float, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(out, in) -> A (R, in) and B (out, R) with scale B A = the best approximation of that rank, shared evenly."""
    weight = weight.float()
    if min(weight.shape) <= EXACT_UP_TO:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vt[:rank].T
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, min(weight.shape)), niter=N_ITERATIONS)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    root = (s / scale).sqrt()
    return (v * root).T.contiguous(), (u * root).contiguous()
