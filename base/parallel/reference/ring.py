"""All-reduce round a ring (Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms", section 3).

With n ranks a tensor is cut into n pieces. In n - 1 steps each rank passes one piece to its right neighbour and adds the one
that comes from the left: then each rank has the sum of one piece. In n - 1 more steps the sums go round. Each rank sends
2 (n - 1) / n of the tensor, however many ranks there are.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def ring_all_reduce_(tensor: Tensor) -> int:
    """Sum a tensor over all ranks, in place on each. Returns the bytes that this rank sent.

    Every rank adds the pieces in the same order, so that all end with the same bits.
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    right, left = (rank + 1) % n, (rank - 1) % n
    flat = tensor.detach().reshape(-1)  # a copy where the tensor is not contiguous
    pieces = list(flat.tensor_split(n))
    sent = 0
    for step in range(2 * (n - 1)):
        adding = step < n - 1
        # Adding, rank r starts with its own piece r; passing on, with the piece r + 1, whose sum it then has.
        outgoing = (rank - step) % n if adding else (rank + 1 - (step - (n - 1))) % n
        incoming = (outgoing - 1) % n
        buffer = torch.empty_like(pieces[incoming])
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, pieces[outgoing].clone(), right), dist.P2POp(dist.irecv, buffer, left)]
        )
        for work in works:
            work.wait()
        sent += pieces[outgoing].numel() * flat.element_size()
        if adding:
            pieces[incoming].add_(buffer)
        else:
            pieces[incoming].copy_(buffer)
    tensor.detach().copy_(flat.view_as(tensor))
    return sent
