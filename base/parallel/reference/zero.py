"""ZeRO stage 1 by hand (Rajbhandari et al. 2020, arXiv:1910.02054, section 5.1): the optimizer's state is spread over ranks.

AdamW keeps 8 bytes a parameter beside weight and gradient. Here each rank keeps them for its share alone, updates that share,
and sends it to the others: 8 / n bytes a parameter on each of n ranks, for one broadcast of the weights a step.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ShardedOptimizer(torch.optim.Optimizer):
    """An optimizer of `optimizer_class` on each rank, for that rank's parameters; `step` makes all ranks' weights equal again.

    Gradients must be the same on all ranks (ddp.py). Parameters are dealt to the rank that has fewest numbers so far, in the same
    order everywhere. A learning rate that is set in `param_groups` counts.
    """

    def __init__(
        self,
        parameters: Iterable[Any],  # tensors or groups, as every torch optimizer takes them
        optimizer_class: type[torch.optim.Optimizer],
        **kwargs: Any,  # the optimizer's own
    ) -> None:
        self.optimizer_class, self.kwargs = optimizer_class, kwargs
        self.rank = dist.get_rank()
        self.loads = [0] * dist.get_world_size()  # numbers that each rank updates
        self.owners: list[tuple[Tensor, int]] = []
        self.local: torch.optim.Optimizer | None = None  # None on a rank without a share
        self.local_groups: list[
            tuple[dict[str, Any], dict[str, Any]]
        ] = []  # (the group of all ranks, this rank's part)
        # The class's own defaults, which only an instance tells: schedules read a group's `lr` also where it wasn't given.
        super().__init__(parameters, optimizer_class([nn.Parameter(torch.empty(1, 1))], **kwargs).defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Deal a group's parameters to the ranks."""
        super().add_param_group(param_group)
        whole = self.param_groups[-1]
        mine = []
        for parameter in whole["params"]:
            owner = self.loads.index(min(self.loads))
            self.loads[owner] += parameter.numel()
            self.owners.append((parameter, owner))
            if owner == self.rank:
                mine.append(parameter)
        if not mine:
            return
        part = {**_settings(whole), "params": mine}
        if self.local is None:
            self.local = self.optimizer_class([part], **self.kwargs)
        else:
            self.local.add_param_group(part)
        self.local_groups.append((whole, self.local.param_groups[-1]))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update this rank's share, then give and take the others'."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._pass_on_settings()
        if self.local is not None:
            self.local.step()
        works = [dist.broadcast(parameter.detach(), src=owner, async_op=True) for parameter, owner in self.owners]
        for work in works:
            if work is not None:
                work.wait()
        return loss

    def _pass_on_settings(self) -> None:
        """Rates that a schedule has set, to this rank's part of each group."""
        for whole, part in self.local_groups:
            part.update(_settings(whole))

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """This rank's share of the state: every rank saves its own, and loads it on as many ranks as wrote it."""
        self._pass_on_settings()
        return {} if self.local is None else self.local.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Put back what `state_dict` gave on this rank, the groups' settings too."""
        if self.local is not None:
            self.local.load_state_dict(state_dict)
            self.local_groups = [
                (whole, part) for (whole, _), part in zip(self.local_groups, self.local.param_groups, strict=True)
            ]
            for whole, part in self.local_groups:
                whole.update(_settings(part))

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that this rank keeps."""
        states = self.local.state.values() if self.local is not None else ()
        return sum(t.numel() * t.element_size() for state in states for t in state.values() if isinstance(t, Tensor))


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group without its tensors."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}
