"""Softmax, loss and gradient of a block of logits on the CPU: three passes over a row while it stays in the cache.

PyTorch's operators take six passes over the whole block: max, subtract, exp, sum, scale, and the label's entry.
"""

import numpy as np
from numba import carray
from torch import Tensor

from ..cpu_loops import in_parts
from ..numba_exp import bits_of, exp32, from_bits, ordered
from ..numba_jit import compiled
from ..numba_memory import pointer

ZERO, ONE = np.float32(0), np.float32(1)


@compiled(nogil=True, error_model="numpy", fastmath=("reassoc", "contract"))
def _rows(logits_at, label_at, scale_at, weigh_at, losses_at, n, V, z_loss):
    label, scale = carray(pointer(label_at), n, np.int64), carray(pointer(scale_at), n, np.float32)
    weigh, losses = carray(pointer(weigh_at), n, np.float32), carray(pointer(losses_at), n, np.float32)
    z = np.float32(z_loss)
    for row in range(n):
        p = carray(pointer(logits_at + 4 * row * V), V, np.float32)
        label_logit, largest = p[label[row]], ordered(bits_of(p[0]))
        for i in range(V):
            largest = max(largest, ordered(bits_of(p[i])))
        top = from_bits(ordered(largest))
        total = ZERO
        for i in range(V):
            e = exp32(p[i] - top)
            p[i] = e
            total += e
        lse = np.float32(top + np.log(total))
        losses[row] = (lse - label_logit + z * lse * lse) * weigh[row]
        factor = scale[row] * (ONE + np.float32(2) * z * lse) / total
        for i in range(V):
            p[i] *= factor
        p[label[row]] -= scale[row]


def softmax_and_gradient_(
    logits: Tensor,  # (C, V) float32, contiguous; becomes its own gradient
    label: Tensor,  # (C,) int64 in [0, V)
    scale: Tensor,  # (C,) d result / d loss of each row, 0 where ignored
    weigh: Tensor,  # (C,) 1, or 0 where ignored
    losses: Tensor,  # (C,) is overwritten
    *,
    z_loss: float,
) -> None:
    """For each row: its loss, and scale * (softmax(logits) * (1 + 2 z_loss lse) - onehot(label)) in place of the logits."""
    V = logits.shape[1]
    label, scale, weigh = label.contiguous(), scale.contiguous(), weigh.contiguous()
    small = [(t.data_ptr(), t.element_size()) for t in (label, scale, weigh, losses)]

    def part(first: int, last: int) -> None:
        addresses = [at + first * size for at, size in small]
        _rows(logits.data_ptr() + 4 * first * V, *addresses, last - first, V, z_loss)

    in_parts(part, logits.shape[0], V)
