"""Where a run happens and what its memory costs there."""

import resource
import sys

import torch


def resolve_device(name: str = "auto") -> str:
    """'auto' -> 'cuda' where there is one, else 'cpu'. Raises ValueError for a device that isn't here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but torch {torch.__version__} sees no CUDA device; use cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu or cuda")
    return name


def reset_peak(device: str) -> None:
    """Start counting the device's peak memory anew (a process's peak on CPU can't be reset)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> dict[str, int]:
    """CUDA: the most tensor memory allocated since `reset_peak`. CPU: the process's largest resident size so far, which
    holds Python and its libraries too; `graft vram measure` counts tensors there."""
    if torch.device(device).type == "cuda":
        return {"measured_peak_bytes": torch.cuda.max_memory_allocated(device)}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return {"process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
