"""`graft quantize`: a full-precision base folder -> the same base in NF4, in bitsandbytes' layout."""

from pathlib import Path
from typing import Any

import torch

from ..base.checkpoint import read_json
from ..base.tokenizer.tokenizer import Tokenizer
from ..quant.blockwise import check_weight
from ..quant.files import quantization_config
from ..quant.linear import KEEP, NF4Linear
from .data.stop import carry_generation_config
from .loading import load_model, save_any, weight_bytes


def run_quantize(
    base: Path | str, out: Path | str, *, double_quant: bool = True, force: bool = False
) -> dict[str, Any]:
    """Quantize each linear but lm_head as it streams in; returns named figures.

    Embeddings, norms and the head keep the file's dtype. Raises ValueError for a base that is in 4 bits already,
    FileExistsError for an `out` that is not empty.
    """
    base, out = Path(base), Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
    if out.resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    if (base / "config.json").exists() and read_json(base / "config.json").get("quantization_config"):
        raise ValueError(f"{base} is quantized already; quantize the base in full precision")
    model = load_model(base, dtype=None, quantize="nf4", double_quant=double_quant)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    for name, tensor in model.named_parameters():
        try:
            check_weight(tensor)
        except ValueError as error:
            raise ValueError(f"{base}: {name}: {error}") from None
    about = quantization_config(double_quant=double_quant, compute_dtype=torch.bfloat16, keep=KEEP)
    tokenizer = Tokenizer.load(base)
    tokenizer.save(out)
    save_any(model, out, stored=about)
    carry_generation_config(base, out)
    n_weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored = sum(stored_bytes(layer) for layer in layers.values())
    return {
        "n_quantized_layers": len(layers),
        "n_quantized_weights": n_weights,
        "bits_per_weight": 8 * stored / n_weights,
        "model_bytes": weight_bytes(model),
        "file_bytes": (out / "model.safetensors").stat().st_size if (out / "model.safetensors").exists() else None,
    }


def stored_bytes(layer: NF4Linear) -> int:
    """Bytes that grow with the weight: packed codes and quantization constants, not the two constant code tables."""
    tables = ("codebook", "nested_codebook")
    return sum(t.numel() * t.element_size() for name, t in layer.named_buffers() if name not in tables)
