"""The frozen reference's log-probabilities of a run's answers: they never change, so they are computed once and kept on disk."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...base.checkpoint import load_tensors, save_tensors
from ...base.model.transformer import Transformer
from ...base.precision import autocast
from ...base.run import Run
from ...base.training.objective import Batch
from .logprobs import response_logprobs
from .preferences import Pair, PreferenceBatches, answer_sums
from .setup import Policy


def answer_logps(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """(P, 2) log-probabilities of each pair's two answers, summed over their tokens, and how many tokens they have."""
    positions, cu_seqlens = batch.get("positions"), batch.get("cu_seqlens")
    logp = response_logprobs(model, batch["ids"], batch["mask"], positions=positions, cu_seqlens=cu_seqlens)
    assert isinstance(logp, Tensor)
    lengths = answer_sums(batch["mask"].to(logp.dtype), batch["lengths"])
    return answer_sums(logp, batch["lengths"]).view(-1, 2), lengths.view(-1, 2)


def content_hash(pairs: Sequence[Pair]) -> str:
    """Of all ids and masks in order: what reference log-probabilities on disk belong to."""
    digest = hashlib.sha256()
    for pair in pairs:
        for one in (pair.chosen, pair.rejected):
            digest.update(len(one.ids).to_bytes(8, "little"))
            digest.update(one.ids.astype("<i4").tobytes() + np.packbits(one.loss_mask).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def reference_logps(
    policy: Policy, batches: PreferenceBatches, indices: Sequence[int], config: Run, folder: Path, device: str
) -> Tensor:
    """(n_pairs, 2) log-probabilities under the reference, NaN for pairs that `indices` doesn't name.

    Read from `folder` where a run with the same rows, base and adapter has left them (resuming); else computed and written.
    """
    digest = hashlib.sha256(content_hash(batches.pairs).encode())
    digest.update(repr(sorted(indices)).encode() + config.train.dtype.encode() + config.method.encode())
    for name in ("base", "adapter"):
        digest.update(config.inputs[name].sha256.encode() if name in config.inputs else b"none")
    file = folder / f"reference-{digest.hexdigest()[:16]}.safetensors"
    if file.exists():
        return load_tensors(file)["ref_logp"]
    values = torch.full((len(batches.pairs), 2), math.nan)
    with policy.before_training():
        for batch in batches.micro_batches(sorted(indices)):
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            with autocast(config.train.dtype, device):
                values[batch["index"]] = answer_logps(policy.model, moved)[0].float().cpu()
    save_tensors(file, {"ref_logp": values})
    return values
