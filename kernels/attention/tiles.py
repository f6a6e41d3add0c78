"""Tile sizes: how many queries and keys a program holds, by head size, dtype and the GPU's shared memory.

No GPU was at hand when these were chosen: none is measured here yet. They start from FlexAttention's tuned defaults for
H100 and A100 (torch/_inductor/template_heuristics/triton.py) and were cut until they fit the shared memory and spill little:
halves at most 400 bytes a thread with Triton 3.7 (528 with 3.6), loop invariants that are read back once a block;
float32 up to 600. `python -m graft.kernels.attention.bench --tune` times the neighbours.
"""

from typing import Literal, NamedTuple

Kind = Literal["forward", "dq", "dkdv"]
LARGE, MEDIUM = 227 * 1024, 163 * 1024  # bytes of shared memory a program may take on sm_90 and on sm_80


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int  # buffers of the software pipeline over the inner loop's loads


def tile_for(kind: Kind, d_head: int, itemsize: int, shared: int) -> Tile:
    """The shipped tile: `itemsize` bytes a value, `shared` bytes of shared memory that one program may take."""
    size = next(limit for limit in (16, 32, 64, 128, 256) if d_head <= limit)
    gpu = "large" if shared >= LARGE else "medium" if shared >= MEDIUM else "small"
    table = FLOAT32 if itemsize == 4 else HALF
    return table[kind, gpu][max(size, 64)]


# float16 and bfloat16, by head size
HALF: dict[tuple[str, str], dict[int, Tile]] = {
    ("forward", "large"): {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2)},
    ("forward", "medium"): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    ("forward", "small"): {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
    ("dq", "large"): {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    ("dq", "medium"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("dq", "small"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 4, 1)},
    ("dkdv", "large"): {64: Tile(64, 128, 8, 3), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
    ("dkdv", "medium"): {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    ("dkdv", "small"): {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 2)},
}

# float32: three tf32 products stand for one, and values are twice as wide
FLOAT32: dict[tuple[str, str], dict[int, Tile]] = {
    ("forward", "large"): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    ("forward", "medium"): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    ("forward", "small"): {64: Tile(64, 32, 4, 2), 128: Tile(32, 16, 4, 2), 256: Tile(16, 16, 4, 1)},
    ("dq", "large"): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    ("dq", "medium"): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(16, 16, 4, 2)},
    ("dq", "small"): {64: Tile(32, 32, 4, 2), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)},
    ("dkdv", "large"): {64: Tile(32, 64, 8, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    ("dkdv", "medium"): {64: Tile(32, 64, 8, 2), 128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
    ("dkdv", "small"): {64: Tile(32, 32, 4, 2), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
