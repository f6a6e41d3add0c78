"""LoRA (Hu et al. 2021, arXiv:2106.09685, section 4.1): h = W x + (alpha / rank) B A x, with W frozen."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the output head


@dataclass(frozen=True)
class LoraConfig:
    """What is attached where. The defaults follow "LoRA Without Regret" (Schulman et al. 2025): every linear, alpha 32."""

    rank: int = 16  # of the update's two factors
    alpha: float = 32.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # on the adapter's input, while training
    targets: tuple[str, ...] = (ALL_LINEAR,)  # last parts of module paths, or whole paths, or all-linear
    rank_stabilized: bool = False  # scale = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732, eq. 4)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be >= 1; start from 16")
        if not self.alpha > 0:
            raise ValueError(f"alpha={self.alpha} must be > 0; start from 32")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear of any kind (anything with in_features and out_features) plus a trained low-rank update."""

    def __init__(self, base: nn.Module, config: LoraConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = width(base, "in_features"), width(base, "out_features")
        limit = min(self.in_features, self.out_features)
        if config.rank > limit:
            raise ValueError(f"rank={config.rank} is more than the layer's smaller side {limit}; use rank <= {limit}")
        self.scale, self.dropout = config.scale, config.dropout
        device = next((t.device for t in [*base.parameters(), *base.buffers()]), torch.device("cpu"))
        # A ~ U(-1/sqrt(in), 1/sqrt(in)) as PEFT draws it (kaiming_uniform with a = sqrt(5)), B = 0: the base at first.
        bound = 1 / math.sqrt(self.in_features)
        a = torch.empty(config.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(device))  # (R, in) float32
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))  # (out, R) float32

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        inner = F.linear(dropped, self.lora_a.to(x.dtype))  # (..., R)
        return self.base(x) + F.linear(inner, self.lora_b.to(x.dtype)) * self.scale

    def delta(self) -> Tensor:
        """What merging adds to W: scale * B A, (out, in) float32."""
        return self.scale * (self.lora_b.detach().float() @ self.lora_a.detach().float())


def width(module: nn.Module, name: str) -> int:
    """A linear's in_features or out_features, whatever its kind."""
    width = getattr(module, name)
    assert isinstance(width, int)
    return width


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every linear of any kind that isn't wrapped yet; the insides of a wrapper are not visited."""
    for name, child in model.named_children():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            if not hasattr(child, "base"):
                yield name, child
        else:
            for path, module in linears(child):
                yield f"{name}.{path}", module


def matching(paths: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The paths that the targets name. Raises ValueError that lists the model's linears when a target names none."""
    found = set()
    unmatched = []
    for target in targets:
        if target == ALL_LINEAR:
            hits = [path for path in paths if path != "lm_head"]
        else:
            hits = [path for path in paths if path == target or path.endswith(f".{target}")]
        if not hits:
            unmatched.append(target)
        found.update(hits)
    if unmatched:
        known = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        raise ValueError(f"lora targets {set(unmatched)} match no linear; this model has {known}")
    return [path for path in paths if path in found]


def attach_lora(model: nn.Module, config: LoraConfig, *, seed: int = 0) -> list[str]:
    """Freeze the model and wrap the target linears in place; returns their paths. Only lora_a and lora_b train."""
    chosen = matching([path for path, _ in linears(model)], config.targets)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for path in chosen:
        replace_module(model, path, LoRALinear(model.get_submodule(path), config, generator=generator))
    return chosen


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(path in the base, wrapper) of every attached layer."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def detach_lora(model: nn.Module) -> None:
    """Put the bare linears back in place."""
    for path, layer in list(lora_layers(model)):
        replace_module(model, path, layer.base)


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """model.<path> = module."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
