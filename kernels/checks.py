"""What every kernel refuses, in one wording: other dtypes, tensors on two devices, shapes that don't fit."""

import torch
from torch import Tensor

from .dispatch import FLOATS, name_of

SUPPORTED = (*FLOATS, torch.float64)  # float64 runs in the reference and torch backends, for gradient checks


def check_floats(kernel: str, **tensors: Tensor) -> None:
    """Each tensor is floating point and all are on one device."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.dtype not in SUPPORTED:
            takes = ", ".join(name_of(d) for d in SUPPORTED)
            raise ValueError(f"{kernel}: {name} has dtype {name_of(tensor.dtype)}; it takes {takes}")
        if tensor.device != tensors[first].device:
            raise ValueError(
                f"{kernel}: {name} is on {tensor.device} but {first} is on {tensors[first].device}; move them to one device"
            )


def check_integers(kernel: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """`tensor` holds int32 or int64 on `device`."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{kernel}: {name} has dtype {name_of(tensor.dtype)}; it takes int64 or int32")
    if tensor.device != device:
        raise ValueError(f"{kernel}: {name} is on {tensor.device}, the other inputs are on {device}; move it there")


def check_shape(kernel: str, name: str, tensor: Tensor, want: tuple[int, ...], why: str) -> None:
    """`tensor` has shape `want`; `why` names what asks for it."""
    if tuple(tensor.shape) != want:
        raise ValueError(f"{kernel}: {name} has shape {tuple(tensor.shape)}, not {want}; {why}")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, the dtype itself for float32 and float64."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def readable(tensor: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation: a real CPU tensor, outside torch.compile."""
    return has_values(tensor) and tensor.device.type == "cpu"


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor's values may be looked at: not for a tensor without memory, nor while torch.compile traces."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
