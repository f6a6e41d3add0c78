"""How busy a step kept the experts, and the bias that evens it out without a loss (Wang et al. 2024, arXiv:2408.15664, alg. 1)."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ...kernels.checks import has_values
from ..model.experts import MixtureOfExperts, Router
from ..parallel.sharding import is_dtensor


def start_counting(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures whose routers train; from now on each counts the tokens that chose each expert (`load`)."""
    mixtures = [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]
    mixtures = [layer for layer in mixtures if layer.gate.weight.requires_grad]
    for layer in mixtures:
        if layer.load is None or layer.load.device != layer.gate.weight.device:
            layer.load = torch.zeros(layer.config.n_experts, device=layer.gate.weight.device)
        layer.load.zero_()
    return mixtures


@torch.no_grad()
def balance(
    mixtures: Sequence[MixtureOfExperts],
    total: Callable[..., Iterable[float]],  # numbers of this rank -> their sums over ranks
    *,
    updated: bool,  # whether the step's update was taken; the biases move only then
) -> dict[str, float]:
    """After a step: move each router's bias by its bias_rate towards equal loads; return the step's figures.

    expert_load_max, expert_load_mean: the busiest expert's tokens over the average expert's, of the least balanced layer and on
    average over layers, 1 where all are equally busy; experts_idle: experts that read no token. No token is ever dropped. A layer
    that is recomputed counts each token twice, which changes none of this. Without a mixture: {}.
    """
    if not mixtures:
        return {}
    own = torch.stack([layer.load for layer in mixtures if layer.load is not None]).cpu()  # (L, E)
    if not has_values(own):  # memory is predicted
        return {}
    loads = torch.tensor([*total(*own.flatten().tolist())]).view_as(own)
    mean = loads.mean(-1, keepdim=True)
    if updated:
        for layer, below in zip(mixtures, (mean - loads).sign(), strict=True):
            if layer.config.bias_rate:
                move_bias_(layer.gate, layer.config.bias_rate * below)
    ratio = loads.amax(-1) / mean[:, 0].clamp(min=1)
    return {
        "expert_load_max": float(ratio.max()),
        "expert_load_mean": float(ratio.mean()),
        "experts_idle": int((loads == 0).sum()),
    }


def move_bias_(router: Router, change: Tensor) -> None:
    """Add `change` (E,) to the router's bias, in place; of a bias that is divided over ranks each adds its own part."""
    bias = router.e_score_correction_bias
    change = change.to(bias.device, bias.dtype)
    if is_dtensor(bias):
        from torch.distributed.tensor import distribute_tensor

        change = distribute_tensor(change, bias.device_mesh, bias.placements, src_data_rank=None)
    bias.add_(change)
