"""`graft quantize`: a full-precision base folder -> the same base in NF4, in bitsandbytes' layout."""

from codecs import getincrementaldecoder
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..base.hub import model_folder
from ..base.json_fields import read_json
from ..base.model.huggingface import load_config
from ..base.model.transformer import Transformer
from ..base.tokenizer.tokenizer import Tokenizer
from ..quant.blockwise import check_weight
from ..quant.calibrate import calibrate_
from ..quant.files import quantization_config
from ..quant.linear import KEEP, NF4Linear
from .folders import carry_over, replaced_folder
from .loading import check_token_ids, load_model, save_any, weight_bytes, weight_reader

CALIBRATION_ROWS, CALIBRATION_LENGTH = (
    128,
    512,
)  # at most: rows of text and tokens in each (GPTQ's paper takes 128 of 2,048)
CALIBRATION_BYTES = 2**24  # of the text that are read at most


def run_quantize(
    base: Path | str,
    out: Path | str,
    *,
    calibrate: Path | str | None = None,  # UTF-8 text like that which the model will see; None: the nearest codes
    calibration_rows: int | None = None,  # of that text, at most; None: CALIBRATION_ROWS
    double_quant: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Quantize each linear but lm_head as it streams in; returns named figures.

    With `calibrate` the codes are then chosen again, block by block, so that the layers' outputs on that text change least
    (quant/calibrate.py); format and size stay the same.

    Embeddings, norms, the head and a mixture's experts keep the file's dtype (the experts' weights are counted); the base's
    generation settings come along. `force` replaces what `out` holds once the new files are whole. Raises ValueError for a base
    that is in 4 bits already, whose weights are not finite or whose tokens have no row in the embedding; FileExistsError for an
    `out` that is not empty.
    """
    base, out = model_folder(base), Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
    if out.resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself; choose another folder")
    if (base / "config.json").exists() and read_json(base / "config.json").get("quantization_config"):
        raise ValueError(f"{base} is quantized already; quantize the base in full precision")
    tokenizer = Tokenizer.load(base)
    config = load_config(base)
    check_token_ids(tokenizer, config, where=base)
    rows = None
    if calibrate is not None:
        rows = rows_of_text(tokenizer, Path(calibrate), config.max_seq_len, calibration_rows or CALIBRATION_ROWS)
    model = load_model(base, dtype=None, quantize="nf4", double_quant=double_quant)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
    for name, tensor in model.named_parameters():
        try:
            check_weight(tensor)
        except ValueError as error:
            raise ValueError(f"{base}: {name}: {error}") from None
    if rows is not None:
        calibrate_model_(model, base, rows)
    keep = (*KEEP, "shared_expert_gate") if config.d_shared_expert and config.gate_shared_expert else KEEP
    settings = quantization_config(double_quant=double_quant, compute_dtype=torch.bfloat16, keep=keep)
    with replaced_folder(out) as folder:
        tokenizer.save(folder)
        save_any(model, folder, stored=settings)
        carry_over(base, folder)
    n_weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored = sum(stored_bytes(layer) for layer in layers.values())
    experts = [tensor for name, tensor in model.named_parameters() if ".experts." in name]  # stacked, not linears
    left = {"n_expert_weights_left_as_they_are": sum(tensor.numel() for tensor in experts)} if experts else {}
    return left | {
        "n_quantized_layers": len(layers),
        "n_quantized_weights": n_weights,
        "n_calibration_tokens": 0 if rows is None else rows.numel(),
        "bits_per_weight": 8 * stored / n_weights,
        "model_bytes": weight_bytes(model),
        "file_bytes": (out / "model.safetensors").stat().st_size if (out / "model.safetensors").exists() else None,
    }


quantize = run_quantize  # the public name: graft.quantize


def calibrate_model_(model: Transformer, base: Path | str, rows: Tensor) -> None:
    """Choose the codes of a model in 4 bits again by its full-precision folder and rows of text, in place."""
    blocks = [(f"model.layers.{i}", block) for i, block in enumerate(model.model.layers)]
    device = model.model.embed_tokens.weight.device
    calibrate_(model, blocks, [row[None].to(device) for row in rows], weight_reader(base))


def rows_of_text(
    tokenizer: Tokenizer, path: Path, max_seq_len: int, most: int = CALIBRATION_ROWS
) -> Tensor:  # (rows, length) int64
    """Rows of tokens from all over the text (its first 16 MiB), without overlap where there is enough of it."""
    length = min(max_seq_len, CALIBRATION_LENGTH)
    try:
        with path.open("rb") as file:
            text = getincrementaldecoder("utf-8")().decode(file.read(CALIBRATION_BYTES))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; give plain text for calibration") from None
    ids = torch.from_numpy(np.asarray(tokenizer.encode(text)).astype(np.int64))
    n_rows = min(most, len(ids) // length)
    if n_rows < 2:
        raise ValueError(
            f"{path} has {len(ids)} tokens; calibration needs at least {2 * length} (two rows of {length}), and "
            f"{CALIBRATION_ROWS * length} are best"
        )
    starts = torch.linspace(0, len(ids) - length, n_rows).long()
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def stored_bytes(layer: NF4Linear) -> int:
    """Bytes that grow with the weight: packed codes and quantization constants, not the two constant code tables."""
    tables = ("codebook", "nested_codebook")
    return sum(t.numel() * t.element_size() for name, t in layer.named_buffers() if name not in tables)
