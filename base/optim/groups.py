"""Learning rate and decay of each parameter, and its state read back: what every optimizer here needs."""

from collections.abc import Callable, Mapping

from torch import Tensor

Choice = Callable[[str, Tensor], float]  # of a parameter by its name and itself
"""A factor: of the learning rate, or of the weight decay (0 or False: none)."""


def decays(name: str, parameter: Tensor) -> float:
    """The choice for parameters whose roles nobody tells: weight decay acts on matrices, not on norms and biases.

    A model's own parameters are told apart by their roles (base/run.py: decayed_roles).
    """
    del name
    return parameter.ndim >= 2


def same_rate(name: str, parameter: Tensor) -> float:
    """One learning rate for all."""
    del name, parameter
    return 1.0


def put_back(target: Tensor, state: Mapping[str, Tensor], key: str) -> None:
    """Copy a saved tensor of an optimizer's state into its place. Raises ValueError when it is missing or of another shape."""
    saved = state.get(key)
    if saved is None or saved.shape != target.shape:
        found = "nothing" if saved is None else tuple(saved.shape)
        raise ValueError(
            f"optimizer state {key}: {found} saved, {tuple(target.shape)} due; "
            "resume with the config that the run was started with"
        )
    target.copy_(saved)
