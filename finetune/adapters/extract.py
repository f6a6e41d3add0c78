"""The difference of two bases as a low-rank adapter: what full fine-tuning changed, kept in a few percent of the bytes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...base.checkpoint import write_json
from ...base.model.huggingface import fingerprint
from ...base.tokenizer.tokenizer import Tokenizer
from ..folders import replaced_folder
from ..loading import load_model
from .combine import Layers, drift_between, held_out, write_adapter
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
    text: Path | str | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write `tuned` - `base` as an adapter of `base`; returns the report: `kept` (share of the squared norm), `kl`, `equal_tokens`.

    Weights that an adapter of linears can't hold (norms, the embedding) are named in `left_out` where they differ; kl and
    equal_tokens compare base + adapter with `tuned` itself. Raises ValueError for models of other shapes and a rank above a
    layer's smaller side, FileExistsError for an `out` that is not empty.
    """
    out = Path(out)
    if rank < 1:
        raise ValueError(f"rank={rank} must be >= 1; start from 16")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
    model, other = load_model(base), load_model(tuned)
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
    rows = held_out(Tokenizer.load(base), text, model.config.max_seq_len)
    kl, equal = drift_between(model, layers, other, rows)
    report = {
        "rank": rank,
        "kept": sum(kept.values()) / len(kept),
        "least_kept": min(kept, key=lambda path: kept[path]),
        "left_out": left_out,
        "kl": kl,
        "equal_tokens": equal,
    }
    with replaced_folder(out) as folder:
        write_adapter(
            model, layers, folder, base=base, graft={"base_fingerprint": fingerprint(model), "extracted": str(tuned)}
        )
        write_json(folder / REPORT, report)
    return report
