"""Experts on disk, one matrix a key, and in memory, where all of a layer's are stacked."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from .config import ModelConfig

# Keys of an expert's gate, up and down projection, below `model.layers.N.`; Mixtral's as it was published.
QWEN = ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight", "mlp.experts.{}.down_proj.weight")
MIXTRAL = tuple(f"block_sparse_moe.experts.{{}}.{name}.weight" for name in ("w1", "w3", "w2"))
LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")
EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
PART = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


def stack_experts(weights: Iterator[tuple[str, Tensor]], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights of a file by the model's own names: experts' matrices are put together as they come.

    Each stacked tensor follows its last part; one that misses a part never comes. Raises ValueError for an expert beyond
    n_experts, one that comes twice, and a matrix of another shape.
    """
    E, D, Fe = config.n_experts, config.d_model, config.expert_width
    shapes = {"gate_up_proj": (E, 2 * Fe, D), "down_proj": (E, D, Fe)}
    begun: dict[str, tuple[Tensor, set[tuple[int, int]]]] = {}  # name -> the stack and which (expert, part) it has
    for name, tensor in weights:
        layer = LAYER.fullmatch(name)
        expert = EXPERT.fullmatch(layer[2]) if layer and E else None
        if layer is None or expert is None:
            yield _router_name(name), tensor
            continue
        index, part = int(expert[1]), PART[expert[2]]
        kind = "down_proj" if part == 2 else "gate_up_proj"
        stacked_name = f"{layer[1]}mlp.experts.{kind}"
        stacked, parts = begun.setdefault(stacked_name, (tensor.new_empty(shapes[kind]), set()))
        if index >= E:
            raise ValueError(f"weight {name} is of expert {index}; config.json has {E} experts, 0 to {E - 1}")
        place = stacked[index] if part == 2 else stacked[index, part * Fe : (part + 1) * Fe]
        if place.shape != tensor.shape or (index, part) in parts or tensor.dtype != stacked.dtype:
            raise ValueError(
                f"weight {name} has shape {tuple(tensor.shape)} in {tensor.dtype}; expected once, with shape "
                f"{tuple(place.shape)} in {stacked.dtype}"
            )
        place.copy_(tensor)
        parts.add((index, part))
        if len(parts) == E * (1 if part == 2 else 2):
            yield stacked_name, begun.pop(stacked_name)[0]


def unstack_experts(tensors: Mapping[str, Tensor], config: ModelConfig, *, mixtral: bool) -> dict[str, Tensor]:
    """The same the other way round: a state dict -> a file's keys. Slices share the stack's memory."""
    found: dict[str, Tensor] = {}
    keys, Fe = (MIXTRAL if mixtral else QWEN), config.expert_width
    for name, tensor in tensors.items():
        head, dot, kind = name.rpartition("mlp.experts.")
        if not dot:
            found[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if mixtral else name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if kind == "down_proj":
                found[head + keys[2].format(expert)] = matrix
            else:
                found[head + keys[0].format(expert)] = matrix[:Fe]
                found[head + keys[1].format(expert)] = matrix[Fe:]
    return found


def _router_name(name: str) -> str:
    return name.replace(".block_sparse_moe.gate.", ".mlp.gate.")
