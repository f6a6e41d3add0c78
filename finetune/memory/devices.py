"""What a device's memory holds that operators' results don't show: its allocator's granule, its libraries' workspace, and
what operators take and give back within themselves. The GPU's figures are read from source; bench/gpu_memory.py checks them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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
