"""What each parameter is for, declared by the module that owns it, and what follows from it: initial values, decay, optimizer.

A module class lists its own parameters in `ROLES`, {name below the module: role}; a linear's role is declared by the layer
that uses it, since only that layer knows where its output goes.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..optim import mup

Role = Literal[
    "embedding", "head", "hidden", "residual", "router", "conv", "gain", "offset", "bias", "balance", "log_rate", "time_step",
    "adapter",
]  # fmt: skip
"""embedding (V, D); head (V, D); hidden: a matrix between hidden states; residual: such a matrix whose output is added to the
residual stream; router (E, D): scores of experts, gates; conv: a short convolution; gain: a norm's weight; offset: one that is
added to 1; bias; balance: a router's, moved by the experts' load; log_rate, time_step: a state's decay (Gated DeltaNet's A_log
and dt_bias); adapter: a low-rank factor."""

HIDDEN: frozenset[Role] = frozenset({"hidden", "residual"})  # Muon's matrices


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of each parameter by its name. Raises ValueError for a parameter whose module declares none."""
    roles: dict[str, Role] = {}
    for path, module in model.named_modules():
        for name, role in getattr(module, "ROLES", {}).items():
            full = f"{path}.{name}" if path else name
            roles[full] = role
    found = {}
    for name, _ in model.named_parameters():
        # A wrapper around a linear (LoRA, 4 bits) keeps the linear below `.base`.
        role = roles.get(name) or roles.get(name.replace(".base.", "."))
        if role is None:
            raise ValueError(f"parameter {name} has no role; declare it in its module's ROLES")
        found[name] = role
    return found


def named_roles(model: nn.Module) -> Iterator[tuple[str, Tensor, Role]]:
    """(name, parameter, role) of every parameter."""
    roles = parameter_roles(model)
    for name, parameter in model.named_parameters():
        yield name, parameter, roles[name]


def initialize_(model: nn.Module, *, seed: int, std: float, n_layers: int, width_ratio: float = 1.0) -> None:
    """Fill the weights in place, by role; depends on the seed only. width_ratio: muP's r (base/optim/mup.py), 1 without it.

    embedding, head, hidden, router   N(0, std^2)
    residual                          N(0, std^2 / (2 n_layers)) (Radford et al. 2019, GPT-2, section 2.3)
    gain, offset, bias, balance       1, 0, 0, 0
    conv (C, 1, K)                    U(-1, 1) / sqrt(K), PyTorch's for convolutions
    log_rate                          log U(1, 16)                                       } Mamba-2's (Dao & Gu 2024,
    time_step                         softplus^-1 of e^U(log 0.001, log 0.1)             } arXiv:2405.21060)
    """
    generator = torch.Generator().manual_seed(seed)
    scales = {"embedding": std, "head": std, "hidden": std, "router": std, "residual": std / (2 * n_layers) ** 0.5}
    constants = {"gain": 1.0, "offset": 0.0, "bias": 0.0, "balance": 0.0}
    with torch.no_grad():
        for name, parameter, role in named_roles(model):
            if role in constants:
                parameter.fill_(mup.constant_at(name, role, constants[role], ratio=width_ratio))
            elif role in DRAWN:
                parameter.copy_(DRAWN[role](torch.empty(parameter.shape).uniform_(generator=generator)))
            else:
                scale = scales[role] * mup.std_factor(role, ratio=width_ratio)
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))


def _conv(u: Tensor) -> Tensor:
    return (2 * u - 1) * u.shape[-1] ** -0.5


def _log_rate(u: Tensor) -> Tensor:
    return (1 + 15 * u).log()


def _time_step(u: Tensor) -> Tensor:
    step = (math.log(0.001) + u * math.log(0.1 / 0.001)).exp()
    return step.expm1().log()  # softplus^-1


DRAWN = {"conv": _conv, "log_rate": _log_rate, "time_step": _time_step}  # role -> its weights from u in [0, 1)
