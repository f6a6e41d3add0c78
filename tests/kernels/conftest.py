"""What every kernel's tests share: the error bar, the interpreter's device, and compilation to PTX without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[..., Outputs]  # run(backend, *tensors) -> outputs

USABLE_SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # bytes a program may take, by compute capability


@pytest.fixture
def interpreter() -> torch.device:
    """The CPU, with kernels run by Triton's interpreter. Skips where Triton is absent or compiles for a GPU."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here; set TRITON_INTERPRET=1 to interpret them")
    return torch.device("cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU; mark the test `gpu`. Skips while Triton interprets, which it can't do on a GPU's tensors."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set; unset it to compile kernels for the GPU")
    return torch.device("cuda")


@pytest.fixture
def within_bar() -> Callable[..., None]:
    """`within_bar(run, inputs, dtype)`: STYLE.md's bar on the outputs and on every input's gradient."""
    return check_within_bar


def check_within_bar(
    run: Run,  # run(backend, *inputs) -> a tensor or a tuple of tensors; called with reference, `plain` and `tested`
    inputs: Sequence[Tensor],  # float tensors; each gets a gradient unless its requires_grad_ is impossible
    dtype: torch.dtype,
    *,
    tested: str = "triton",
    plain: str = "torch",
    seed: int = 0,
) -> None:
    """Max error against the float32 truth at most twice plain torch's in the same dtype, + 1e-5 (STYLE.md section 4).

    The truth is the reference backend in float32 on the same rounded inputs, with the same rounded output gradients.
    """
    rounded = [x.detach().to(dtype) for x in inputs]
    truth = _with_gradients(run, "reference", [x.float() for x in rounded], dtype, seed)
    rough = _with_gradients(run, plain, rounded, dtype, seed)
    got = _with_gradients(run, tested, rounded, dtype, seed)
    for name, want, torchs, ours in zip(truth, truth.values(), rough.values(), got.values(), strict=True):
        assert ours.shape == want.shape, f"{name}: {tuple(ours.shape)}, not {tuple(want.shape)}"
        error, allowed = _max_error(ours, want), 2 * _max_error(torchs, want) + 1e-5
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"  # NaN fails too


def _with_gradients(run: Run, backend: str, inputs: list[Tensor], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Each output and each input's gradient under random output gradients, the same for every backend."""
    leaves = [_like(x).requires_grad_() for x in inputs]
    outputs = run(backend, *leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(y.shape, generator=generator).to(dtype).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return found | {f"gradient of input {i}": g for i, g in enumerate(gradients)}


def _like(x: Tensor) -> Tensor:
    """A copy with x's own strides, so that a strided input stays strided."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _max_error(got: Tensor, want: Tensor) -> float:
    return (got.double() - want.double()).abs().max().item() if got.numel() else 0.0


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one architecture."""

    ptx: str
    shared: int  # bytes of shared memory
    registers: int  # a thread
    spill_bytes: int  # of local memory a thread: what registers could not hold

    @property
    def tensor_cores(self) -> bool:
        return "wgmma.mma_async" in self.ptx or "mma.sync" in self.ptx


@pytest.fixture(scope="session")
def compile_kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], list[Compiled]]:
    """`compile_kernels([job, ...])`: each job compiled without a GPU, all in one new process with an empty cache.

    A job is a dict:
        module: "graft.kernels.rope.triton_rope", kernel: the @triton.jit function's name there,
        args: {parameter: type or value} in any order. A str is a type: "*fp16", "*bf16", "*fp32", "*i32", "*u8" (pointers,
              16-byte aligned), "i32", "fp32"; "i32:16" is an int known to be a multiple of 16, as Triton finds strides to
              be. Anything else is a constexpr's value (also 1 for a stride that is 1, None for an absent pointer, other strings).
        arch: 80, 86 or 90; num_warps, num_stages (4 and 2 when left out).
    """

    def compile_all(jobs: list[dict[str, Any]]) -> list[Compiled]:
        folder = tmp_path_factory.mktemp("ptx")
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(folder / "cache")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        script = Path(__file__).with_name("ptx.py")
        done = subprocess.run([sys.executable, str(script), str(folder)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return [Compiled(**row) for row in json.loads((folder / "compiled.json").read_text())]

    pytest.importorskip("triton")
    return compile_all


@pytest.fixture(scope="session")
def usable_shared() -> dict[int, int]:
    """Bytes of shared memory one program may take, by architecture."""
    return USABLE_SHARED
