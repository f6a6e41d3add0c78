"""Fold an adapter into its base's weights: W' = W + scale * B A, in float32, so that nothing is left to add at run time."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.checkpoint import write_json
from ...base.json_fields import read_json
from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ...quant.linear import NF4Linear
from ...quant.merge import requantize
from ..folders import carry_over
from ..loading import load_model, save_any
from .files import GRAFT, Adapter, check_fits, read_adapter


@dataclass(frozen=True)
class MergeReport:
    """What merging did; the error is 0 unless the base is in 4 bits."""

    n_layers: int
    relative_error: float  # worst layer: rms of (requantized - exact) over rms of the update


def merge(model: Transformer, adapter: Adapter) -> MergeReport:
    """Merge in place. A 4-bit layer is dequantized, added to and quantized again, and the error of that is measured.

    Raises ValueError when the adapter was made for another base.
    """
    check_fits(adapter, model, fingerprint=fingerprint(model))
    worst = 0.0
    for path, (a, b, scale) in adapter.layers.items():
        module = model.get_submodule(path)
        delta = scale * (b.float() @ a.float())  # (out, in)
        if isinstance(module, NF4Linear):
            packed, state, error = requantize(module, delta)
            module.set_packed_(packed, state)
            worst = max(worst, error.of_update)
        else:
            assert isinstance(module, nn.Linear)
            if path == "lm_head" and model.config.tie_embeddings:
                untie(model)
            with torch.no_grad():
                merged = module.weight.float() + delta.to(module.weight.device)
                module.weight.copy_(merged.to(module.weight.dtype))
    return MergeReport(len(adapter.layers), worst)


def untie(model: Transformer) -> Tensor:
    """Give lm_head its own copy of the embedding: merging into a shared weight would change the input side too."""
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.config = replace(model.config, tie_embeddings=False)
    return model.lm_head.weight


def run_merge(base: Path | str, adapter: Path | str, out: Path | str, *, force: bool = False) -> MergeReport:
    """Merge an adapter folder into its base folder and write a model folder: `graft adapter merge`.

    A base in 4 bits stays in 4 bits. Raises FileExistsError for an `out` that is not empty.
    """
    out = Path(out)
    if out.resolve() in (Path(base).resolve(), Path(adapter).resolve()):
        raise ValueError(f"--out {out} is the base or the adapter itself; choose another folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
    found = read_adapter(adapter)
    model, tokenizer = load_model(base, dtype=None), Tokenizer.load(base)
    report = merge(model, found)
    if found.chat_template is not None:
        tokenizer.chat_template = found.chat_template
    tokenizer.save(out)
    if found.graft:
        write_json(out / GRAFT, {key: value for key, value in found.graft.items() if key != "base_fingerprint"})
    save_any(model, out, stored=read_json(Path(base) / "config.json").get("quantization_config"))
    carry_over(base, out)
    return report
