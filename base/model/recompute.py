"""Activation checkpointing: a layer's activations are computed again in the backward pass instead of being kept."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states


def recompute(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), keeping only args for the backward pass, which runs it again (Chen et al. 2016, arXiv:1604.06174).

    The same gradients and the same memory as torch.utils.checkpoint(use_reentrant=False), which imports torch._dynamo at its first
    call: as long as importing torch. Gradients flow to parameters also when no argument needs one, as with LoRA on a frozen base.
    Dropout draws the same numbers again, autocast is as it was. While torch.compile traces, torch's own is called. Not covered:
    a second backward pass through the inner graph's own gradients.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)  # pyright: ignore[reportReturnType]
    if not torch.is_grad_enabled():
        return function(*args)
    again = _Again(function, args)
    with saved_tensors_hooks(again.pack, again.unpack):
        return function(*args)


class _Slot:
    """Stands in the graph for a tensor that autograd would have kept."""

    value: Tensor | None = None


class _Enough(Exception):
    """Every tensor that is needed has been computed."""


class _Again:
    """How to run the function as it ran first: its arguments, the random state and autocast's settings."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
        self.function, self.args = function, args
        self.slots: list[weakref.ref[_Slot]] = []  # in the order in which the function saves its tensors
        self.random = torch.get_rng_state()
        self.devices, self.device_random = get_device_states(*args) if torch.cuda.is_initialized() else ([], [])
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self.autocast = [
            {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
            for kind in kinds
        ]

    def pack(self, tensor: Tensor) -> _Slot:
        del tensor
        slot = _Slot()
        self.slots.append(weakref.ref(slot))
        return slot

    def unpack(self, slot: _Slot) -> Tensor:
        if slot.value is None:
            self.run()
        assert slot.value is not None, "the function saved other tensors the second time"
        value, slot.value = slot.value, None
        return value

    def run(self) -> None:
        """Fill the slots that are still in the graph, and stop as soon as the last is."""
        n = 0

        def store(tensor: Tensor) -> Tensor:
            nonlocal n
            slot, kept = self.slots[n](), tensor.detach()
            n += 1
            if slot is not None:
                slot.value = kept
            if n == len(self.slots):
                raise _Enough
            return kept

        with torch.random.fork_rng(devices=self.devices), ExitStack() as stack:
            torch.set_rng_state(self.random)
            set_device_states(self.devices, self.device_random)
            for settings in self.autocast:
                stack.enter_context(torch.autocast(**settings, cache_enabled=torch.is_autocast_cache_enabled()))
            try:
                with torch.enable_grad(), saved_tensors_hooks(store, _same):
                    self.function(*self.args)
            except _Enough:
                pass


def _same(tensor: Tensor) -> Tensor:
    return tensor
