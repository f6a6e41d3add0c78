"""Where a run happens and what its memory costs there."""

import os
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def resolve_device(name: str = "auto") -> str:
    """'auto' -> 'cuda' where there is one, else 'cpu'. Raises ValueError for a device that isn't here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} requested, but torch {torch.__version__} sees no CUDA device; use cpu")
    if kind == "mps":
        raise ValueError(
            f"device {name!r} is not supported: no kernel and no memory prediction of graft's is tested there; use cpu"
        )
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported; choose auto, cpu or cuda")
    return name


def explain_device(requested: str, chosen: str) -> str:
    """One line on where a run happens, and why when it was left to `auto`."""
    name = f" ({torch.cuda.get_device_name(chosen)})" if torch.device(chosen).type == "cuda" else ""
    if requested != "auto":
        return f"device: {chosen}{name}"
    if chosen != "cpu":
        return f"device: {chosen}{name}, chosen by auto"
    has_mps = torch.backends.mps.is_available()
    why = "mps is here, but graft does not support it" if has_mps else "torch sees no CUDA device"
    return f"device: cpu, chosen by auto ({why})"


def memory_bytes(device: str) -> int | None:
    """The device's whole memory; None where the system doesn't tell (Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def reset_peak(device: str) -> None:
    """Start counting the device's peak memory anew (a process's peak on CPU can't be reset)."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> dict[str, int]:
    """CUDA: the most tensor memory allocated since `reset_peak`. CPU: the process's largest resident size so far, which
    holds Python and its libraries too; `graft vram measure` counts tensors there. Empty where the system doesn't tell."""
    if torch.device(device).type == "cuda":
        return {"measured_peak_bytes": torch.cuda.max_memory_allocated(device)}
    if resource is None:
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return {"process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
