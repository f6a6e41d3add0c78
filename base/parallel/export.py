"""A sharded run's result as one Hugging Face folder, read from its checkpoint file by file: no rank holds the whole model."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..model.config import ModelConfig
from ..model.huggingface import SHARD_BYTES, as_on_disk, write_config, write_shards
from .checkpoint import Pieces


def export_model(
    checkpoint: Path, config: ModelConfig, names: Sequence[str], folder: Path, *, limit: int = SHARD_BYTES
) -> None:
    """Write the weights `names` of a checkpoint as files of at most `limit` bytes, and config.json, in float32."""
    pieces = Pieces(checkpoint, "weights")
    sizes = {name: 4 * torch.Size(pieces.shape(name) or ()).numel() for name in names}

    def read(shard: Sequence[str]) -> dict[str, Tensor]:
        return as_on_disk({name: pieces.read(name).float() for name in shard}, config)

    write_shards(folder, sizes, read, limit=limit)
    write_config(config, folder, dtype=torch.float32)
