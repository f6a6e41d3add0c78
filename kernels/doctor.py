"""What `graft doctor` prints: for each kernel the backend that `auto` takes on this machine, and why."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .dispatch import FLOATS, name_of, shared_memory, triton_problem


@dataclass(frozen=True)
class Kernel:
    """One folder of this package."""

    name: str
    on_cpu: str  # what runs without a GPU
    limits: str = ""  # what Triton's form doesn't take; PyTorch's form runs there


class Row(NamedTuple):
    kernel: str
    backend: str  # triton or torch
    why: str


KERNELS = (
    Kernel("attention", "PyTorch's scaled_dot_product_attention", "head sizes outside 16 to 256, scale <= 0"),
    Kernel(
        "paged_attention",
        "pages side by side, then PyTorch's scaled_dot_product_attention",
        "head sizes outside 16 to 256, pages of no power of two, T * H / K > 256",
    ),
    Kernel("rms_norm", "PyTorch operators"),
    Kernel("rope", "PyTorch operators"),
    Kernel("swiglu", "PyTorch operators"),
    Kernel("cross_entropy", "chunks of logits in PyTorch, never all of them"),
    Kernel("nf4", "compiled loops for decoding, PyTorch's matrix product for training"),
    Kernel("grouped_linear", "PyTorch's grouped product", "more than 1,024 experts, and for aligned bfloat16"),
    Kernel("grouped_lora", "PyTorch operators, adapter by adapter"),
    Kernel("gated_delta", "chunks of PyTorch's matrix products"),
    Kernel("causal_conv", "shifted products in PyTorch"),
    Kernel("float8_linear", "PyTorch's scaled product, far slower than bfloat16's"),
    Kernel("adamw", "PyTorch's fused update"),
    Kernel("decode", "compiled loops for one new token a row in float32"),
)
TORCH_ONLY = {
    "gated_delta": "chunks of 64 tokens in PyTorch's matrix products, on every device; it has no Triton form yet",
    "causal_conv": "shifted products in PyTorch, on every device; it has no Triton form yet",
    "float8_linear": "torch._scaled_mm, which is cuBLAS on a GPU from Hopper on; it has no Triton form",
    "adamw": "PyTorch's fused update, one pass over the tensors, on every device; it has no Triton form",
    "decode": "compiled loops on the CPU for one new token a row in float32; elsewhere the other kernels' own forms",
}


def report() -> list[Row]:
    """One row for each kernel, for tensors on the device that graft would use here."""
    gpu = torch.cuda.is_available()
    probe = torch.empty(0, device="cuda" if gpu else "cpu")
    problem = triton_problem([probe]) if gpu else _without_gpu()
    return [_row(kernel, problem, probe.device) for kernel in KERNELS]


def _without_gpu() -> str:
    built = torch.version.cuda
    return (
        "no GPU is visible" if built else f"no GPU is visible; this torch ({torch.__version__}) is built without CUDA"
    )


def _row(kernel: Kernel, problem: str | None, device: torch.device) -> Row:
    if kernel.name in TORCH_ONLY:
        return Row(kernel.name, "torch", TORCH_ONLY[kernel.name])
    if problem is not None:
        where = kernel.on_cpu if device.type == "cpu" else "PyTorch operators"
        return Row(kernel.name, "torch", f"{problem}: {where}")
    takes = ", ".join(map(name_of, FLOATS))
    major, minor = torch.cuda.get_device_capability(device)
    why = (
        f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, {shared_memory(device) // 1024} KB of shared memory"
    )
    return Row(kernel.name, "triton", f"{why}; {takes}" + (f"; torch for {kernel.limits}" if kernel.limits else ""))
