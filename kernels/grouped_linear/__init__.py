"""Products of groups of rows with one matrix each: the experts of a mixture, without a loop over them."""

from torch import Tensor

from ..checks import check_floats, check_integers
from ..dispatch import Backend, choose_backend, name_of
from .reference import grouped_linear_reference
from .torch_grouped_linear import grouped_linear_torch, takes

MAX_GROUPS = 1024  # of the Triton form: a program holds every group's end


def grouped_linear(
    x: Tensor,  # (N, in), sorted by group
    weight: Tensor,  # (G, out, in)
    ends: Tensor,  # (G,) int32: one past each group's last row; the last one is N
    *,
    backend: Backend = "auto",
) -> Tensor:  # (N, out)
    """x_n W_g^T for the rows n of group g, ends[g - 1] <= n < ends[g]; a group may be empty.

    Differentiable in x and weight (MegaBlocks, Gale et al. 2022, arXiv:2211.15841, section 4, without its blocks). Raises
    ValueError for shapes and dtypes that don't fit. Values of `ends` are not looked at, since on a GPU that would wait for it.
    """
    check_floats("grouped_linear", x=x, weight=weight)
    check_integers("grouped_linear", "ends", ends, x.device)
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} don't fit; they are (N, in) and (G, out, in)"
        )
    if ends.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_linear: ends has shape {tuple(ends.shape)}; it holds one end for each of {len(weight)} groups"
        )
    if x.dtype != weight.dtype:
        raise ValueError(
            f"grouped_linear: x is {name_of(x.dtype)} but weight is {name_of(weight.dtype)}; cast one to the other"
        )
    unsupported = f"it takes at most {MAX_GROUPS} groups, got {len(weight)}" if len(weight) > MAX_GROUPS else None
    chosen = choose_backend("grouped_linear", backend, [x, weight], unsupported=unsupported)
    if chosen == "reference":
        return grouped_linear_reference(x, weight, ends)
    if chosen == "torch" or (
        backend == "auto" and takes(x, weight)
    ):  # where PyTorch's own kernel runs, it is the default
        return grouped_linear_torch(x, weight, ends)
    from .triton_grouped_linear import grouped_linear_triton

    return grouped_linear_triton(x, weight, ends)
