"""The difference of two bases as a low-rank adapter: what full fine-tuning changed, kept in a few percent of the bytes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.checkpoint import write_json
from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..folders import replaced_folder
from ..loading import load_model
from .combine import LARGEST_KL, Layers, logp_with, write_adapter
from .drift import check_drift, check_out, drift_of, held_out_rows, next_token_logp
from .files import read_adapter
from .lora import ALL_LINEAR, linears, matching

REPORT = "extract.json"


def low_rank(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:  # (out, in)
    """The best B (out, rank) A (rank, in) in the 2-norm and the Frobenius norm (Eckart & Young 1936), as (A, B, share).

    share is that of the squared norm that it keeps; 1 where the difference is zero.
    """
    u, s, vt = torch.linalg.svd(difference.float(), full_matrices=False)
    root = s[:rank].sqrt()
    whole = float(s.square().sum())
    return root[:, None] * vt[:rank], u[:, :rank] * root, float(s[:rank].square().sum()) / whole if whole else 1.0


@torch.no_grad()
def run_extract(
    *,
    base: Path | str,
    tuned: Path | str,  # a model folder of the same shape
    out: Path | str,
    rank: int = 16,
    targets: tuple[str, ...] = (ALL_LINEAR,),
    text: Path | str | None = None,  # held-out text or records to compare predictions on; None: a few prompts
    allow_drift: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write `tuned` - `base` as an adapter of `base`; returns the report: `kept` (share of the squared norm), `kl`, `equal_tokens`.

    Weights that an adapter of linears can't hold (norms, the embedding) are named in `left_out` where they differ; kl and
    equal_tokens compare base + adapter, as written, with `tuned` itself. Raises ValueError for models of other shapes, a rank
    above a layer's smaller side and, unless `allow_drift`, a kl above LARGEST_KL; FileExistsError for an `out` that is not empty.
    """
    base, tuned, out = Path(base), Path(tuned), Path(out)
    if rank < 1:
        raise ValueError(f"rank={rank} must be >= 1; start from 16")
    check_out(out, {"the base": base, "the tuned model": tuned}, force=force)
    model, other = load_model(base), load_model(tuned)
    layers, kept, left_out = differences(model, other, rank, targets, where=(base, tuned))
    rows = held_out_rows(Tokenizer.load(base), model.config, text)
    expected = next_token_logp(other, rows)
    del other
    report = {
        "rank": rank,
        "kept": sum(kept.values()) / len(kept),
        "least_kept": min(kept, key=lambda path: kept[path]),
        "left_out": left_out,
    }
    graft = {"base_fingerprint": fingerprint(model), "extracted": str(tuned)}
    with replaced_folder(out) as folder:
        write_adapter(model, layers, folder, base=base, graft=graft)
        drift = drift_of(logp_with(model, read_adapter(folder).layers, rows), expected)
        check_drift(
            drift,
            LARGEST_KL,
            what=f"base + adapter predict otherwise than {tuned}",
            way_out="raise the rank",
            allow=allow_drift,
        )
        write_json(folder / REPORT, report | drift.figures(text))
    return report | drift.figures(text)


def differences(
    model: Transformer, other: Transformer, rank: int, targets: tuple[str, ...], *, where: tuple[Path, Path]
) -> tuple[Layers, dict[str, float], list[str]]:
    """The layers of `other` - `model` at that rank, the share of each that they keep, and weights that differ and aren't in."""
    base, tuned = where
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(one[name].shape) if name in one else None for one in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{tuned} is no fine-tuned {base}: {name} is {shapes[0]} in the base and {shapes[1]} there; "
                "give two models of one architecture, both in full precision"
            )
    layers: Layers = {}
    kept: dict[str, float] = {}
    for path in matching([path for path, _ in linears(model)], targets):
        difference = theirs[f"{path}.weight"].float() - ours[f"{path}.weight"].float()
        if rank > min(difference.shape):
            raise ValueError(
                f"rank={rank} is more than the smaller side {min(difference.shape)} of {path}; use a smaller rank"
            )
        a, b, kept[path] = low_rank(difference, rank)
        layers[path] = a, b, 1.0
    covered = {f"{path}.weight" for path in layers}
    left_out = [name for name in ours if name not in covered and not torch.equal(ours[name], theirs[name])]
    return layers, kept, left_out
