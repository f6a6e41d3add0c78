"""bitsandbytes' keys for a 4-bit weight, both ways: what we write loads there, and what it wrote loads here.

`X.weight` (packed), `X.weight.absmax` (uint8 if double-quantized, else float32), `X.weight.quant_map`,
`X.weight.nested_absmax` and `X.weight.nested_quant_map` (the second level), and
`X.weight.quant_state.bitsandbytes__nf4`: JSON as uint8 with type, block sizes, dtype, shape and the second level's mean.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.checks import readable
from ..kernels.dispatch import name_of
from ..kernels.nf4 import NESTED_BLOCK_SIZE, DoubleQuantized
from ..kernels.nf4.reference import not_finite
from .blockwise import BLOCK_SIZES, QuantState

FILE_TYPES = ("nf4", "fp4")  # the quant_types that bitsandbytes knows
STATE_KEY = "quant_state.bitsandbytes__"
NESTED_KEYS = ("nested_absmax", "nested_quant_map")
PARTS = ("absmax", "quant_map", *NESTED_KEYS, *(STATE_KEY + quant_type for quant_type in FILE_TYPES))
STATE_BYTES = 2**16  # of a quant_state's JSON, which has about 200
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
    metadata: dict[str, Any] = {
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
        metadata |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": state.double.absmax_mean.item(),
        }
    tensors[f"{name}.{STATE_KEY}{state.quant_type}"] = torch.tensor(
        list(json.dumps(metadata).encode()), dtype=torch.uint8
    )
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
    metadata = read_state(state_key, tensors[state_key])
    shape = tuple(metadata["shape"])
    n_blocks = -(-prod(shape) // metadata["blocksize"])
    packed = tensors[name].reshape(-1, 1).view(torch.uint8).reshape(-1, 1)  # quant_storage may be another dtype
    absmax, codebook = tensors[f"{name}.absmax"], tensors[f"{name}.quant_map"]
    expect(name, packed, torch.uint8, (prod(shape) + 1) // 2)
    expect(f"{name}.quant_map", codebook, torch.float32, 16)
    if "nested_blocksize" not in metadata:
        expect(f"{name}.absmax", absmax, torch.float32, n_blocks)
        scales = absmax
    else:
        scale, nested_codebook = (tensors[f"{name}.{key}"] for key in NESTED_KEYS)
        expect(f"{name}.absmax", absmax, torch.uint8, n_blocks)
        expect(f"{name}.nested_absmax", scale, torch.float32, -(-n_blocks // NESTED_BLOCK_SIZE))
        expect(f"{name}.nested_quant_map", nested_codebook, torch.float32, 256)
        mean = torch.tensor(metadata["nested_offset"], dtype=torch.float32, device=absmax.device)
        scales = DoubleQuantized(absmax, scale, mean, nested_codebook)
    dtype = FLOATS[metadata["dtype"]]
    return packed, QuantState(shape, dtype, metadata["quant_type"], metadata["blocksize"], codebook, scales)


def read_state(key: str, packed_json: Tensor) -> dict[str, Any]:
    """The JSON of a quant_state tensor. Raises ValueError that names the key where it isn't what bitsandbytes writes."""
    not_json = f"{key} is not bitsandbytes' JSON"
    if packed_json.dtype != torch.uint8 or packed_json.numel() > STATE_BYTES:
        raise ValueError(
            f"{not_json}: expected at most {STATE_BYTES} uint8, got {packed_json.numel()} {name_of(packed_json.dtype)}"
        )
    try:
        metadata = json.loads(bytes(packed_json.reshape(-1).cpu().tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{not_json} ({error}); the file is damaged, copy it again") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{not_json}: expected an object, got {type(metadata).__name__}; the file is damaged")
    fields = STATE_FIELDS | (NESTED_FIELDS if "nested_blocksize" in metadata else {})
    for field, (fits, expected) in fields.items():
        if field not in metadata:
            raise ValueError(f"{not_json} ({field!r} is missing); the file is damaged, copy it again")
        if not fits(metadata[field]):
            raise ValueError(f"{not_json}: {field} {shown(metadata[field])} is not supported; {expected}")
    if not key.endswith(STATE_KEY + metadata["quant_type"]):
        raise ValueError(f"{key} holds quant_type {metadata['quant_type']!r}; the file is damaged, copy it again")
    return metadata


def is_count(value: object) -> bool:
    """A whole number above zero; True and False are none."""
    return type(value) is int and value > 0


def is_shape(value: object) -> bool:
    """A list of sizes whose product a tensor can have."""
    return isinstance(value, list) and 0 < len(value) < 9 and all(map(is_count, value)) and prod(value) < 2**62


def is_finite(value: object) -> bool:
    """A float32 that is finite."""
    return type(value) in (int, float) and abs(value) < 3e38  # pyright: ignore[reportArgumentType]


def shown(value: object) -> str:
    """A value in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


Fits = Callable[[object], bool]
STATE_FIELDS: dict[str, tuple[Fits, str]] = {  # of the JSON: what fits, and the words for it
    "dtype": (lambda value: isinstance(value, str) and value in FLOATS, f"{', '.join(FLOATS)} are"),
    "quant_type": (lambda value: isinstance(value, str) and value in FILE_TYPES, f"{', '.join(FILE_TYPES)} are"),
    "blocksize": (lambda value: is_count(value) and value in BLOCK_SIZES, f"{', '.join(map(str, BLOCK_SIZES))} are"),
    "shape": (is_shape, "a list of sizes above 0 is"),
}
NESTED_FIELDS: dict[str, tuple[Fits, str]] = {
    "nested_blocksize": (lambda value: is_count(value) and value == NESTED_BLOCK_SIZE, "bitsandbytes writes 256"),
    "nested_dtype": (lambda value: value == "float32", "float32 is"),
    "nested_offset": (is_finite, "a finite number is"),
}


def expect(key: str, tensor: Tensor, dtype: torch.dtype, size: int) -> None:
    """Raise ValueError unless the tensor has that dtype and that many elements, all finite."""
    if tensor.numel() != size:
        raise ValueError(f"{key} has {tensor.numel()} elements, its weight's shape needs {size}; the file is damaged")
    if tensor.dtype != dtype:
        raise ValueError(f"{key}: expected {name_of(dtype)}, got {name_of(tensor.dtype)}; the file is damaged")
    if dtype == torch.float32 and readable(tensor) and not tensor.isfinite().all():
        raise ValueError(f"{key}: {not_finite(tensor)}")


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
    settings = config.get("quantization_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise ValueError(f"quantization_config: expected an object, got {shown(settings)}")
    method = settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or settings.get("load_in_4bit") is not True:
        raise ValueError(
            f"quantization_config: method {shown(settings.get('quant_method'))} with "
            f"load_in_4bit={shown(settings.get('load_in_4bit'))} is not supported; "
            "bitsandbytes in 4 bits is, or a model that is not quantized"
        )
    compute = settings.get("bnb_4bit_compute_dtype")
    if compute is not None and not (isinstance(compute, str) and compute in FLOATS):
        raise ValueError(f"quantization_config: bnb_4bit_compute_dtype {shown(compute)} is none of {', '.join(FLOATS)}")
    quant_type = settings.get("bnb_4bit_quant_type", "fp4")
    if not (isinstance(quant_type, str) and quant_type in FILE_TYPES):
        raise ValueError(
            f"quantization_config: bnb_4bit_quant_type {shown(quant_type)} is none of {', '.join(FILE_TYPES)}"
        )
    skipped = settings.get("llm_int8_skip_modules")
    if skipped is not None and not (isinstance(skipped, list) and all(isinstance(name, str) for name in skipped)):
        raise ValueError(f"quantization_config: llm_int8_skip_modules {shown(skipped)} is no list of names")
    return {
        "keep": ("lm_head",) if skipped is None else tuple(skipped),
        "double_quant": bool(settings.get("bnb_4bit_use_double_quant", False)),
        "compute_dtype": None if compute is None else FLOATS[compute],
        "quant_type": quant_type,
    }
