"""What a GPU's memory has that shapes alone don't tell: its kernels, its allocator's granule, its library's workspace."""

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor

from ... import kernels
from ...kernels import dispatch
from ...kernels.nf4 import linear as nf4_linear


def workspace_bytes(*, backward: bool) -> int:
    """cuBLAS's workspace, which PyTorch takes from its own allocator: one for each thread that multiplies matrices, and the
    backward pass has its own. 32 MiB from Hopper on (assumed where there is no GPU to ask), 8.125 MiB before
    (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    one = 32 * 2**20 if hopper else 2 * 4096 * 1024 + 8 * 16 * 1024
    return 2 * one if backward else one


@contextmanager
def kernels_as_on_gpu() -> Iterator[None]:
    """Within the block `backend="auto"` chooses as for CUDA tensors, whatever the device, and 4-bit products are not tiled.

    For fake tensors, where Triton's operators only say what they would return; without Triton its kernels' torch forms run.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(nf4_linear, "TILE", 2**62))  # tiles are the CPU's
        for found in pkgutil.iter_modules(kernels.__path__) if find_spec("triton") else ():
            package = f"{kernels.__name__}.{found.name}"
            if found.ispkg and find_spec(f"{package}.triton_{found.name}"):
                stack.enter_context(patch.object(import_module(package), "choose_backend", _choose_for_gpu))
        yield


def _choose_for_gpu(
    kernel: str,
    backend: dispatch.Backend,
    tensors: Sequence[Tensor],
    *,
    dtypes: Sequence[torch.dtype] = dispatch.FLOATS,
    unsupported: str | None = None,
) -> dispatch.Chosen:
    if backend != "auto":
        return dispatch.choose_backend(kernel, backend, tensors, dtypes=dtypes, unsupported=unsupported)
    return "triton" if unsupported is None and all(t.dtype in dtypes for t in tensors) else "torch"
