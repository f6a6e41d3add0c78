"""Counting the bytes of tensors that are alive, real or fake, as operators make them and the last reference drops them."""

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .shapes import run_on_shapes

DISPATCH_FILES = (
    "_compile.py",
    "eval_frame.py",
    "_python_dispatch.py",
)  # Python frames between an operator and its caller
Place = tuple[str, int | str]  # (phase, layer number or the name of what is not a layer), where the step stands


@dataclass
class Peak:
    """The most bytes alive while the step stood at one place, and what they were."""

    n_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)  # kind -> bytes; they add up to n_bytes


class LiveBytes(TorchDispatchMode):
    """Counts every storage once, from the operator that made it until its memory is given back.

    What autograd saves stays alive, so it is counted; a view is not counted again. Memory that an operator takes and gives
    back within itself is not seen; `within` may tell it. With `shapes` every tensor made from nothing or from a ShapeTensor is a
    ShapeTensor, which has no memory, and autograd sums gradients in place, as it does with real tensors and no mode on.
    """

    def __init__(
        self,
        *,
        shapes: bool = False,  # operators make ShapeTensors instead of tensors
        granule: int = 1,  # bytes that the device's allocator hands out multiples of
        within: Callable[[Any, Sequence[Any]], int] | None = None,  # (operator, arguments) -> bytes it holds meanwhile
    ) -> None:
        super().__init__()
        self.shapes, self.granule, self.within = shapes, granule, within
        self.total = 0
        self.kinds: Counter[str] = Counter()
        self.layers: Counter[int] = Counter()  # bytes of kind "activations" by the layer that made them
        self.place: Place = ("start", "")
        self.kind = "temporaries"  # of what the next operators make
        self.peaks: dict[Place, Peak] = {}
        self.kept: Counter[int] = Counter()  # `layers` when the backward pass began: what autograd holds
        self._alive: dict[int, _Storage] = {}

    def enter(self, phase: str, where: int | str, kind: str) -> None:
        """From here on the step stands at (phase, where), and new tensors are of this kind."""
        if phase == "backward" and self.place[0] != "backward":
            self.kept = Counter(self.layers)
        self.place, self.kind = (phase, where), kind
        self._note_peak()

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count tensors that exist already, or say of what kind counted ones are."""
        for tensor in tensors:
            known = self._alive.get(tensor.untyped_storage()._cdata)
            if known is None:
                self._count(tensor, kind)
            else:
                self.kinds[known.kind] -= known.n_bytes
                if known.layer is not None:
                    self.layers[known.layer] -= known.n_bytes
                known.kind, known.layer = kind, None
                self.kinds[kind] += known.n_bytes
        self._note_peak()

    def rounded(self, n_bytes: int) -> int:
        """What a tensor of so many bytes takes."""
        return -(-n_bytes // self.granule) * self.granule

    def peak(self) -> tuple[Place, Peak]:
        """Where the most bytes were alive, and what they were."""
        place = max(self.peaks, key=lambda at: self.peaks[at].n_bytes)
        return place, self.peaks[place]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operator imports torch._dynamo, a second's work, to switch off what is not on

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self.shapes and func is torch.ops.aten.add.Tensor and _called_by_autograd():
            func = torch.ops.aten.add_.Tensor
        within = self.within(func, args) if self.within else 0
        # Among real tensors alone (a batch's mask, whose true places are counted) values are known: they are computed.
        by_shape = self.shapes and (bool(types) or not any(isinstance(value, Tensor) for value in args))
        out = run_on_shapes(func, args, kwargs or {}) if by_shape else func(*args, **(kwargs or {}))
        kind = self.kind
        if func is torch.ops.aten._to_copy.default and self._kind_of(args[0]) in ("weights", "adapters"):
            kind = "casts"  # autocast's copy of a weight, kept until the backward pass has used it
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._alive:
                self._count(leaf, kind)
        self._note_peak(within)
        return out

    def _kind_of(self, tensor: Tensor) -> str | None:
        known = self._alive.get(tensor.untyped_storage()._cdata)
        return None if known is None else known.kind

    def _count(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        n_bytes = self.rounded(storage.nbytes())
        layer = self.place[1] if kind == "activations" and isinstance(self.place[1], int) else None
        key = storage._cdata
        watch = weakref.ref(storage, lambda _: self._forget(key))
        self._alive[key] = _Storage(n_bytes, kind, layer, watch)
        self.total += n_bytes
        self.kinds[kind] += n_bytes
        if layer is not None:
            self.layers[layer] += n_bytes

    def _forget(self, key: int) -> None:
        gone = self._alive.pop(key)
        self.total -= gone.n_bytes
        self.kinds[gone.kind] -= gone.n_bytes
        if gone.layer is not None:
            self.layers[gone.layer] -= gone.n_bytes

    def _note_peak(self, within: int = 0) -> None:
        """Remember this moment if it is its place's highest; `within`: bytes that the last operator held meanwhile."""
        peak = self.peaks.setdefault(self.place, Peak())
        if self.total + within > peak.n_bytes:
            peak.n_bytes = self.total + within
            peak.kinds = Counter({kind: n for kind, n in self.kinds.items() if n})
            peak.kinds[self.kind] += within


@dataclass
class _Storage:
    n_bytes: int
    kind: str
    layer: int | None
    watch: weakref.ref[torch.UntypedStorage]


def _called_by_autograd() -> bool:
    """Whether the engine itself called the operator at hand, to add two gradients of one tensor; else a function did."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(DISPATCH_FILES):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"
