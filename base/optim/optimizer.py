"""What every optimizer has: AdamW, Muon, SOAP, the 8-bit AdamW, and what is put around them (averages, pieces of ranks)."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Optimizer(Protocol):
    """What the loop asks of an optimizer; base/optim/adamw.py and quant/adamw8bit.py keep it."""

    @property
    def named(self) -> list[tuple[str, Tensor]]: ...
    def step(self, learning_rate: float | None = None) -> None: ...
    def zero_grad(self) -> None: ...
    def state_tensors(self) -> dict[str, Tensor]: ...
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None: ...
