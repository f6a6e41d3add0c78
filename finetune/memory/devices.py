"""What a device's memory holds that operators' results don't show: its allocator's granule, its libraries' workspace, and
what operators take and give back within themselves. The GPU's figures are read from source; bench/gpu_memory.py checks them."""

import pkgutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ... import kernels
from ...kernels import dispatch
from ...kernels.cross_entropy import torch_cross_entropy
from ...kernels.nf4 import linear as nf4_linear

CUDA_GRANULE = 512  # bytes that a tensor takes at least a multiple of: c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize


def cpu_bytes_within(func: Any, args: Sequence[Any]) -> int:
    """Copies that TensorIterator makes on the CPU within an elementwise operator whose operands have different dtypes."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if len(tensors) < 2 or torch.Tag.pointwise not in func.tags or len({tensor.dtype for tensor in tensors}) == 1:
        return 0
    common = torch.result_type(tensors[0], tensors[1])
    casts = [tensor for tensor in tensors if tensor.dtype != common and tensor.ndim]
    if func._schema.is_mutable and tensors[0].dtype != common:
        casts.append(tensors[0])  # the result, too, is computed aside
    return sum(tensor.numel() * common.itemsize for tensor in casts)


def cuda_bytes_within(func: Any, args: Sequence[Any]) -> int:
    """What graft's own operators take within themselves on a GPU: only those whose share can matter."""
    name = func.name().partition(".")[0]
    if name == "graft::linear_cross_entropy":
        from ...kernels.cross_entropy.triton_cross_entropy import chunk_rows

        hidden, weight = args[:2]
        N, V = hidden.shape[0], weight.shape[0]
        return min(N, chunk_rows(N, V, hidden.element_size())) * V * hidden.element_size()  # the chunk of logits
    if name == "graft::attention_backward":
        return args[5].numel() * 4  # delta, of the log-sum-exp's shape
    if name in ("graft::linear_4bit", "graft::linear_4bit_gradient"):
        packed, codebook, scales, *nested = (
            args[2] if name == "graft::linear_4bit" else args[1]
        )  # a PackedWeight's tensors
        del packed, codebook
        return scales.numel() * 4 if nested else 0  # absmax decoded
    return 0


def workspace_bytes(*, backward: bool) -> int:
    """cuBLAS's workspace, which PyTorch takes from its own allocator: one for each thread that multiplies matrices, and the
    backward pass has its own. 32 MiB from Hopper on (assumed where there is no GPU to ask), 8.125 MiB before
    (aten/src/ATen/cuda/CublasHandlePool.cpp)."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    one = 32 * 2**20 if hopper else 2 * 4096 * 1024 + 8 * 16 * 1024
    return 2 * one if backward else one


@contextmanager
def few_chunks() -> Iterator[None]:
    """Within the block the loss on the CPU looks at its first two chunks of tokens and its last one, for fake tensors: those
    between take the same memory, and a batch of 4,096 sequences has hundreds."""

    def ends(kept: Tensor, block: int) -> Sequence[Tensor]:
        chunks = kept.split(block)
        return chunks if len(chunks) < 4 else (*chunks[:2], chunks[-1])

    with patch.object(torch_cross_entropy, "in_chunks", ends):
        yield


@contextmanager
def kernels_as_on_gpu() -> Iterator[None]:
    """Within the block `backend="auto"` chooses as for CUDA tensors, whatever the device, and 4-bit products are not tiled.

    For fake tensors, where Triton's operators only say what they would return; without Triton its kernels' torch forms run.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(nf4_linear, "TILE", 2**62))  # tiles are the CPU's
        for found in pkgutil.iter_modules(kernels.__path__) if find_spec("triton") else ():
            if not found.ispkg:
                continue
            package = import_module(f"{kernels.__name__}.{found.name}")
            if not any(part.name.startswith("triton_") for part in pkgutil.iter_modules(package.__path__)):
                continue
            for name, module in list(sys.modules.items()):
                if f"{name}.".startswith(f"{package.__name__}.") and hasattr(module, "choose_backend"):
                    stack.enter_context(patch.object(module, "choose_backend", _choose_for_gpu))
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
