"""The loop's optimizers by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..model.init import DECAYED, HIDDEN, Role
from ..optim.adamw import AdamW
from ..optim.muon import Muon
from ..run import TrainConfig


class Optimizer(Protocol):
    """What the loop asks of an optimizer; base/optim/adamw.py and quant/adamw8bit.py keep it."""

    @property
    def named(self) -> list[tuple[str, Tensor]]: ...
    def step(self, learning_rate: float | None = None) -> None: ...
    def zero_grad(self) -> None: ...
    def state_tensors(self) -> dict[str, Tensor]: ...
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...


OptimizerMaker = Callable[..., Optimizer]
OPTIMIZERS: dict[str, OptimizerMaker] = {"adamw": AdamW, "muon": Muon}


def make_optimizer(
    parameters: Iterable[tuple[str, Tensor]],
    config: TrainConfig,
    makers: Mapping[str, OptimizerMaker] = OPTIMIZERS,
    *,
    roles: Mapping[str, Role]
    | None = None,  # of the parameters by name (base/model/init.py); None: told by their shapes
) -> Optimizer:
    """The config's optimizer over named parameters. Raises ValueError for a name that `makers` doesn't have."""
    check_optimizer(config.optimizer, makers)
    options: dict[str, Any] = {}
    if roles is not None:
        options["decay"] = lambda name, _: roles[name] in DECAYED
        if config.optimizer == "muon":
            options["hidden"] = lambda name, _: roles[name] in HIDDEN
    return makers[config.optimizer](
        parameters,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **options,
    )


def check_optimizer(name: str, makers: Mapping[str, OptimizerMaker] = OPTIMIZERS) -> None:
    """Raise ValueError for a name that `makers` doesn't have."""
    if name not in makers:
        raise ValueError(f"unknown optimizer {name!r}; choose {', '.join(makers)}")
