"""One linear layer, float8 beside bfloat16: python -m graft.kernels.float8_linear.bench (a GPU from Hopper on)."""

import torch
from torch.nn import functional as F

from . import float8_linear, float8_problem

SIZES = ((8192, 1024, 4096), (8192, 2048, 8192), (8192, 4096, 16_384))  # tokens, in, out


def seconds(run: "object", n: int = 20) -> float:
    """Median seconds of a call on the GPU."""
    assert callable(run)
    times = []
    for _ in range(n):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[n // 2]


def main() -> None:
    """Print milliseconds and TFLOP/s of both."""
    if problem := float8_problem("cuda" if torch.cuda.is_available() else "cpu"):
        print(problem)
        return
    print(torch.cuda.get_device_name(), torch.__version__)
    for n, d_in, d_out in SIZES:
        x = torch.randn(n, d_in, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        w = torch.randn(d_out, d_in, device="cuda", requires_grad=True)
        g = torch.randn(n, d_out, device="cuda", dtype=torch.bfloat16)
        forms = {
            "bfloat16": lambda x=x, w=w, g=g: F.linear(x, w.to(torch.bfloat16)).backward(g),
            "float8": lambda x=x, w=w, g=g: float8_linear(x, w).backward(g),
        }
        for name, run in forms.items():
            took = seconds(run)
            print(
                f"{n} x {d_in} -> {d_out}  {name:8}  {1000 * took:7.3f} ms  {6 * n * d_in * d_out / took / 1e12:6.0f} TFLOP/s"
            )


if __name__ == "__main__":
    main()
