"""Linear layers with float8 products in the place of a model's own, for training on GPUs that have them."""

from torch import Tensor, nn

from ...kernels.float8_linear import MULTIPLE, float8_linear
from .init import HIDDEN, parameter_roles


class Float8Linear(nn.Module):
    """A linear layer with the weight and bias of another, which it shares: names on disk stay as they are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """In evaluation too, so that a loss is of what trains."""
        return float8_linear(x, self.weight, self.bias)


def use_float8_(model: nn.Module) -> int:
    """Replace the linears between hidden states whose sides are multiples of 16; returns how many.

    Not the embedding, the head, routers and norms, which are sensitive or small, nor experts' stacked weights. The weights
    themselves stay float32. Raises ValueError for a model that has no such linear.
    """
    roles = parameter_roles(model)
    chosen = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and roles.get(f"{path}.weight") in HIDDEN
        and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0
    ]
    if not chosen:
        raise ValueError(f"float8=true: no linear has sides that are multiples of {MULTIPLE}; change d_model and d_ff")
    for path, module in chosen:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Float8Linear(module))
    return len(chosen)
