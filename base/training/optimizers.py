"""The loop's optimizers by name."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..model.init import HIDDEN, Role
from ..optim.adamw import AdamW
from ..optim.average import Averaged
from ..optim.muon import Muon
from ..optim.mup import rate_factor
from ..optim.optimizer import Optimizer
from ..optim.soap import SOAP
from ..run import VECTORS, TrainConfig

OptimizerMaker = Callable[..., Optimizer]
OPTIMIZERS: dict[str, OptimizerMaker] = {"adamw": AdamW, "muon": Muon, "soap": SOAP}


def make_optimizer(
    parameters: Iterable[tuple[str, Tensor]],
    config: TrainConfig,
    makers: Mapping[str, OptimizerMaker] = OPTIMIZERS,
    *,
    roles: Mapping[str, Role]
    | None = None,  # of the parameters by name (base/model/init.py); None: told by their shapes
    width_ratio: float = 1.0,  # muP's r (base/optim/mup.py); needs roles
) -> Optimizer:
    """The config's optimizer over named parameters. Raises ValueError for a name that `makers` doesn't have."""
    check_optimizer(config.optimizer, makers)
    optimizer = makers[config.optimizer](
        parameters,
        learning_rate=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **_own_options(config),
        **({} if roles is None else _role_options(config, roles, width_ratio)),
    )
    return Averaged(optimizer, decay=config.ema_decay) if config.ema_decay else optimizer


def _own_options(config: TrainConfig) -> dict[str, Any]:
    """The settings that one optimizer alone has."""
    if config.optimizer == "muon":
        return {
            "momentum": config.muon_momentum,
            "polynomial": config.muon_polynomial,
            "iterations": config.muon_iterations,
            "normalize_rows": config.muon_normalize_rows,
        }
    if config.optimizer == "soap":
        return {"every": config.soap_every, "largest": config.soap_largest}
    return {}


def _role_options(config: TrainConfig, roles: Mapping[str, Role], width_ratio: float) -> dict[str, Any]:
    """What follows from each parameter's role: its rate and decay, and whether Muon or SOAP has it."""
    rates, decayed = config.role_rates, frozenset(config.decayed_roles)

    def mup_factor(name: str) -> float:
        return rate_factor(name, roles[name], ratio=width_ratio, optimizer=config.optimizer)

    options: dict[str, Any] = {
        "rate": lambda name, _: rates[roles[name]] * mup_factor(name),
        "decay": lambda name, _: (roles[name] in decayed) / mup_factor(name),
    }
    if config.optimizer == "muon":
        options["hidden"] = lambda name, _: roles[name] in HIDDEN
    if config.optimizer == "soap":
        options["sides"] = lambda name, parameter: _soap_sides(roles[name], parameter)
    return options


def _soap_sides(role: Role, parameter: Tensor) -> tuple[bool, bool]:
    """Whether SOAP rotates a parameter's rows, and its columns.

    Not a vocabulary's side, which is long and sparse; of a low-rank factor the rank's side alone.
    """
    if role in (*VECTORS, "conv"):
        return False, False
    if role in ("embedding", "head"):
        return False, True
    if role == "adapter":
        rows, columns = parameter.shape[-2:]
        return rows <= columns, columns <= rows
    return True, True


def check_optimizer(name: str, makers: Mapping[str, OptimizerMaker] = OPTIMIZERS) -> None:
    """Raise ValueError for a name that `makers` doesn't have."""
    if name not in makers:
        raise ValueError(f"unknown optimizer {name!r}; choose {', '.join(makers)}")
