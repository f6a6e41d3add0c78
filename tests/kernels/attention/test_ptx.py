"""Law: the shipped tiles compile to tensor-core instructions, fit the shared memory and keep their registers, with no GPU."""

from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton")

from graft.kernels.attention.tiles import FLOAT32, HALF, Tile, tile_for

ARCH = {"large": 90, "medium": 80, "small": 86}
MODULE = {"forward": "triton_forward", "dq": "triton_backward", "dkdv": "triton_backward", "decode": "triton_decode"}
TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SHARED = {"large": 227 * 1024, "medium": 163 * 1024, "small": 99 * 1024}


def strides(**axes):
    """Strides of a dense tensor whose head size is a multiple of 16: stride_qb=..., the last one 1."""
    names = [f"stride_{tensor}{axis}" for tensor, seq in axes.items() for axis in f"bh{seq}d"]
    return {name: 1 if name.endswith("d") else "i32:16" for name in names}


def job(kind, gpu, d_head, dtype, **options):
    """One kernel of shipped tile, as `compile_kernels` takes it. `options`: docs, lengths, window, softcap, causal."""
    tile = tile_for(kind, d_head, dtype.itemsize, SHARED[gpu])
    x, f = f"*{TYPE[dtype]}", "*fp32"
    names = {"q": "t", "k": "s", "v": "s"}
    args = {"q": x, "k": x, "v": x, "lse": f, "key_lengths": "*i32" if options.get("lengths") else None}
    args |= dict.fromkeys(("starts", "ends"), "*i32" if options.get("docs") else None)
    args |= dict.fromkeys(("T", "S", "H", "G", "window"), "i32") | {"qk_scale": "fp32", "cap": "fp32"}
    if kind == "forward":
        args |= {"out": x}
        names |= {"o": "t"}
    elif kind == "dq":
        args |= {"out": x, "d_out": x, "delta_out": f, "dq": x, "scale": "fp32"}
        names |= {"o": "t", "g": "t", "dq": "t"}
    else:
        args |= {"d_out": x, "delta": f, "dk": x, "dv": x, "scale": "fp32"}
        names |= {"g": "t", "dk": "s", "dv": "s"}
    args |= strides(**names)
    args |= {"Dh": d_head, "CAUSAL": options.get("causal", True), "WINDOW": "window" in options}
    args |= {"SOFTCAP": "softcap" in options, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}
    args |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": max(16, 1 << (d_head - 1).bit_length())}
    module = f"graft.kernels.attention.{MODULE[kind]}"
    warps = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return {"module": module, "kernel": f"attention_{kind}", "args": args, "arch": ARCH[gpu], **warps}


def decode_job(gpu, d_head, dtype):
    from graft.kernels.attention.triton_attention import decode_keys

    x, f = f"*{TYPE[dtype]}", "*fp32"
    args = {"q": x, "k": x, "v": x, "parts": f, "part_lse": f, "key_lengths": "*i32"} | strides(q="", k="s", v="s")
    args |= dict.fromkeys(("S", "H", "G", "window", "n_splits"), "i32") | {"qk_scale": "fp32", "cap": "fp32"}
    args |= {"Dh": d_head, "WINDOW": False, "SOFTCAP": False, "PRECISION": "tf32x3" if dtype.itemsize == 4 else "tf32"}
    args |= {"BLOCK_G": 16, "BLOCK_N": decode_keys(d_head, torch.empty(0, dtype=dtype)), "BLOCK_D": d_head}
    module = "graft.kernels.attention.triton_decode"
    return {
        "module": module,
        "kernel": "attention_decode",
        "args": args,
        "arch": ARCH[gpu],
        "num_warps": 4,
        "num_stages": 2,
    }


NEWER_TRITON = tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
JOBS = {  # name: (job, bytes a thread may spill); dkdv large: 304 with Triton 3.7, 528 with 3.6
    **{
        f"{kind} {gpu}": (job(kind, gpu, 128, torch.bfloat16), 400)
        for kind in ("forward", "dq", "dkdv")
        for gpu in ARCH
    },
    "dkdv large": (job("dkdv", "large", 128, torch.bfloat16), 400 if NEWER_TRITON else 600),
    "documents": (job("forward", "large", 128, torch.bfloat16, docs=True), 0),
    "softcap, window, lengths": (job("dq", "large", 64, torch.float16, softcap=1, window=1, lengths=True), 400),
    "head 96, full": (job("forward", "medium", 96, torch.float16, causal=False), 64),
    "float32": (job("forward", "small", 64, torch.float32), 64),
}


@pytest.mark.slow
def test_shipped_tiles(compile_kernels, usable_shared):
    jobs = JOBS | {
        "decode": (decode_job("large", 128, torch.bfloat16), 0),
        "decode, float32": (decode_job("small", 256, torch.float32), 256),
    }
    compiled = compile_kernels([one for one, _ in jobs.values()])
    for (name, (one, may_spill)), made in zip(jobs.items(), compiled, strict=True):
        assert made.tensor_cores, name
        if one["arch"] == 90 and one["kernel"] != "attention_decode":  # 16 heads are too few rows for wgmma's 64
            assert "wgmma.mma_async" in made.ptx, name
        assert made.shared <= usable_shared[one["arch"]], f"{name}: {made.shared} bytes of shared memory"
        assert made.spill_bytes <= may_spill, f"{name}: {made.spill_bytes} bytes spilled"


def test_every_head_size_has_a_tile():
    for table in (HALF, FLOAT32):
        assert len(table) == 9
        assert all(set(row) == {64, 128, 256} for row in table.values())
    assert tile_for("forward", 16, 2, SHARED["large"]) == tile_for("forward", 64, 2, 300 * 1024)
    assert tile_for("forward", 65, 2, SHARED["small"]) == Tile(128, 32, 8, 3)
    assert tile_for("forward", 64, 4, SHARED["small"]).num_warps == 4
