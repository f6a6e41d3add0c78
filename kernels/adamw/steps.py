"""How many updates each parameter has had, out of a saved state."""

import torch
from torch import Tensor


def read_steps(saved: Tensor | None, n_parameters: int) -> list[int]:
    """`n_steps` of an optimizer's state on disk -> the count of each parameter, in the optimizer's order.

    A single number is an older checkpoint's, which counted the optimizer's steps: every parameter gets it, as it had then.
    Raises ValueError for what is neither that nor one count for each parameter.
    """
    if saved is None:
        raise ValueError("optimizer state n_steps: nothing saved; resume from a checkpoint that graft wrote")
    if saved.dtype != torch.int64 or saved.shape not in ((), (n_parameters,)):
        raise ValueError(
            f"optimizer state n_steps: expected ({n_parameters},) torch.int64, got {tuple(saved.shape)} {saved.dtype}; "
            "resume with the config that the run was started with"
        )
    if bool((saved < 0).any()):
        raise ValueError(f"optimizer state n_steps: {int(saved.min())} is negative; the checkpoint is damaged")
    return saved.expand(n_parameters).tolist()
