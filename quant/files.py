"""bitsandbytes' keys for a 4-bit weight, both ways: what we write loads there, and what it wrote loads here.

`X.weight` (packed), `X.weight.absmax` (uint8 if double-quantized, else float32), `X.weight.quant_map`,
`X.weight.nested_absmax` and `X.weight.nested_quant_map` (the second level), and
`X.weight.quant_state.bitsandbytes__nf4`: JSON as uint8 with type, block sizes, dtype, shape and the second level's mean.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.dispatch import name_of
from ..kernels.nf4 import NESTED_BLOCK_SIZE, DoubleQuantized
from .blockwise import BLOCK_SIZES, QuantState

FILE_TYPES = ("nf4", "fp4")  # the quant_types that bitsandbytes knows
STATE_KEY = "quant_state.bitsandbytes__"
NESTED_KEYS = ("nested_absmax", "nested_quant_map")
PARTS = ("absmax", "quant_map", *NESTED_KEYS, *(STATE_KEY + quant_type for quant_type in FILE_TYPES))
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Packed(Protocol):
    """An NF4Linear, or anything that holds a packed weight and its state."""

    @property
    def packed(self) -> Tensor: ...
    @property
    def state(self) -> QuantState: ...


def nf4_to_tensors(name: str, layer: Packed | tuple[Tensor, QuantState]) -> dict[str, Tensor]:
    """The tensors of the weight `name` (such as `model.layers.0.mlp.up_proj.weight`) by bitsandbytes' keys, not copied.

    Raises ValueError for int4, which bitsandbytes does not read.
    """
    packed, state = layer if isinstance(layer, tuple) else (layer.packed, layer.state)
    if state.quant_type not in FILE_TYPES:
        raise ValueError(f"{name}: {state.quant_type} has no file format; store nf4 or fp4")
    about: dict[str, Any] = {
        "quant_type": state.quant_type,
        "blocksize": state.block_size,
        "dtype": name_of(state.dtype),
        "shape": list(state.shape),
    }
    tensors = {name: packed}
    if state.double is None:
        tensors |= {f"{name}.absmax": state.absmax, f"{name}.quant_map": state.codebook}
    else:
        tensors |= {
            f"{name}.absmax": state.double.absmax_q,
            f"{name}.quant_map": state.codebook,
            f"{name}.nested_absmax": state.double.absmax_scale,
            f"{name}.nested_quant_map": state.double.codebook,
        }
        about |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": state.double.absmax_mean.item(),
        }
    tensors[f"{name}.{STATE_KEY}{state.quant_type}"] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    return tensors


def nf4_from_tensors(name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, QuantState]:
    """(packed, state) of the weight `name` out of a file's tensors; the codebooks are the file's own.

    Raises ValueError that names the missing keys, or the key whose size or value does not fit.
    """
    missing = missing_keys(name, tensors)
    if missing:
        raise ValueError(
            f"4-bit weight {name} lacks {', '.join(missing)}; the file is incomplete, write or copy it again"
        )
    state_key = next(key for key in state_keys(name) if key in tensors)
    about = read_state(state_key, tensors[state_key])
    shape = tuple(about["shape"])
    packed = tensors[name].reshape(-1, 1).view(torch.uint8).reshape(-1, 1)  # quant_storage may be another dtype
    n_blocks = -(-prod(shape) // about["blocksize"])
    expect_size(name, packed, (prod(shape) + 1) // 2)
    absmax, codebook = tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
    expect_size(f"{name}.absmax", absmax, n_blocks)
    expect_size(f"{name}.quant_map", codebook, 16)
    scales = absmax
    if "nested_blocksize" in about:
        scale, nested_codebook = (tensors[f"{name}.{key}"] for key in NESTED_KEYS)
        expect_size(f"{name}.nested_absmax", scale, -(-n_blocks // NESTED_BLOCK_SIZE))
        expect_size(f"{name}.nested_quant_map", nested_codebook, 256)
        mean = torch.tensor(about["nested_offset"], dtype=torch.float32, device=absmax.device)
        scales = DoubleQuantized(absmax, scale, mean, nested_codebook)
    dtype = FLOATS[about["dtype"]]
    return packed, QuantState(shape, dtype, about["quant_type"], about["blocksize"], codebook, scales)


def read_state(key: str, packed_json: Tensor) -> dict[str, Any]:
    """The JSON of a quant_state tensor. Raises ValueError when it is no JSON, or holds what is not supported here."""
    try:
        about = json.loads(bytes(packed_json.cpu().tolist()))
        dtype, nested = about["dtype"], about.get("nested_blocksize", NESTED_BLOCK_SIZE)
        _ = about["quant_type"], about["blocksize"], list(about["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{key} is not bitsandbytes' JSON ({error}); the file is damaged, copy it again") from None
    if dtype not in FLOATS:
        raise ValueError(f"{key}: dtype {dtype!r} is not supported; {', '.join(FLOATS)} are")
    if about["blocksize"] not in BLOCK_SIZES:
        raise ValueError(f"{key}: blocksize {about['blocksize']!r} is not one of {', '.join(map(str, BLOCK_SIZES))}")
    if nested != NESTED_BLOCK_SIZE:
        raise ValueError(f"{key}: nested_blocksize {nested} is not supported; bitsandbytes writes {NESTED_BLOCK_SIZE}")
    return about


def expect_size(key: str, tensor: Tensor, size: int) -> None:
    """Raise ValueError unless the tensor has that many elements."""
    if tensor.numel() != size:
        raise ValueError(f"{key} has {tensor.numel()} elements, its weight's shape needs {size}; the file is damaged")


def state_keys(name: str) -> list[str]:
    """The keys one of which holds the JSON."""
    return [f"{name}.{STATE_KEY}{quant_type}" for quant_type in FILE_TYPES]


def missing_keys(name: str, tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys that the weight `name` still needs; what the JSON asks for is known once the JSON is there."""
    required = [name, f"{name}.absmax", f"{name}.quant_map"]
    found = [key for key in state_keys(name) if key in tensors]
    absmax = tensors.get(f"{name}.absmax")
    nested = any(f"{name}.{key}" in tensors for key in NESTED_KEYS) or (
        absmax is not None and absmax.dtype == torch.uint8
    )
    if nested or (found and "nested_blocksize" in read_state(found[0], tensors[found[0]])):
        required += [f"{name}.{key}" for key in NESTED_KEYS]
    missing = [key for key in required if key not in tensors]
    return missing if found else [*missing, state_keys(name)[0]]


def quantized_names(keys: Iterable[str]) -> list[str]:
    """The modules whose weight is in 4 bits, from a file's keys: `X` for each `X.weight.quant_state...` or `X.weight.quant_map`."""
    suffixes = [f".weight.{STATE_KEY}{quant_type}" for quant_type in FILE_TYPES] + [".weight.quant_map"]
    found = {key.removesuffix(suffix) for key in keys for suffix in suffixes if key.endswith(suffix)}
    return sorted(found)


def quantization_config(
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    keep: Sequence[str] = ("lm_head",),  # modules left in full precision
) -> dict[str, Any]:
    """config.json's `quantization_config`, as transformers writes it for bitsandbytes in 4 bits."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_8bit": False,
        "_load_in_4bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": list(keep),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": name_of(compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "load_in_4bit": True,
        "load_in_8bit": False,
    }


def read_quantization_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """`quantize_linears_`'s arguments out of a config.json's content; None for a model that is not quantized.

    Raises ValueError for a quantization that is not bitsandbytes in 4 bits.
    """
    about = config.get("quantization_config")
    if not about:
        return None
    if about.get("quant_method", "bitsandbytes") != "bitsandbytes" or not about.get("load_in_4bit"):
        method = about.get("quant_method")
        raise ValueError(
            f"quantization_config: method {method!r} with load_in_4bit={about.get('load_in_4bit')} is not supported; "
            "bitsandbytes in 4 bits is, or a model that is not quantized"
        )
    compute = about.get("bnb_4bit_compute_dtype")
    if compute is not None and compute not in FLOATS:
        raise ValueError(f"quantization_config: bnb_4bit_compute_dtype {compute!r} is none of {', '.join(FLOATS)}")
    skipped = about.get("llm_int8_skip_modules")
    return {
        "keep": ("lm_head",) if skipped is None else tuple(skipped),
        "double_quant": bool(about.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": None if compute is None else FLOATS[compute],
        "quant_type": about.get("bnb_4bit_quant_type", "fp4"),
    }
