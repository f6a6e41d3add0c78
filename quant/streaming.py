"""Filling a model of 4-bit placeholders from a checkpoint, one tensor at a time: the full-precision model never exists."""

import torch
from torch import Tensor, nn

from .files import missing_keys, nf4_from_tensors
from .linear import NF4Linear


class WeightStream:
    """Takes a checkpoint's tensors in any order; each weight becomes 4-bit as it comes, or is taken over if it is already.

    Make the model on the meta device, `quantize_linears_` it there, then::

        stream = WeightStream(model, device="cuda")
        for name, tensor in tensors:
            if not stream.take(name, tensor):
                ...  # norms, embeddings, kept layers: the caller's
        stream.finish()

    Holds no more than one weight in full precision, and the few small tensors of a 4-bit weight whose keys are not
    complete yet.
    """

    def __init__(self, model: nn.Module, *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.layers = {path: module for path, module in model.named_modules() if isinstance(module, NF4Linear)}
        self.waiting = set(self.layers)  # paths without a weight yet
        self.parts: dict[str, dict[str, Tensor]] = {}  # of weights that arrive in bitsandbytes' keys, by path

    def take(self, name: str, tensor: Tensor) -> bool:
        """Use the tensor if it belongs to a 4-bit layer; False leaves it to the caller.

        Raises ValueError, by the tensor's name, for what can't be quantized or does not fit.
        """
        path, kind = self._owner(name)
        if path is None:
            return False
        layer = self.layers[path]
        if kind == "bias":
            if layer.bias is None:
                raise ValueError(f"{name} is in the file, but the layer was built without a bias")
            layer.bias = nn.Parameter(tensor.to(self.device), requires_grad=False)
        elif kind == "weight" and tensor.dtype != torch.uint8:  # packed codes are bytes
            try:
                layer.set_weight_(tensor.to(self.device))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            self.waiting.discard(path)
        else:
            self._collect(path, name, tensor)
        return True

    def finish(self) -> None:
        """Raise ValueError that names each layer whose weight has not come, or not completely."""
        lacking = []
        for path in sorted(self.waiting):
            weight = f"{path}.weight"
            parts = self.parts.get(path)
            lacking += missing_keys(weight, parts) if parts else [weight]
        if lacking:
            more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
            raise ValueError(
                f"the checkpoint lacks {', '.join(lacking[:5])}{more}; it is incomplete or of another model, copy it again"
            )

    def _owner(self, name: str) -> tuple[str | None, str]:
        """The 4-bit layer's path that the key belongs to, and the rest of the key."""
        parts = name.split(".")
        for i in range(len(parts) - 1, -1, -1):
            path, rest = ".".join(parts[:i]), ".".join(parts[i:])
            if path in self.layers and (rest in ("weight", "bias") or rest.startswith("weight.")):
                return path, rest
        return None, name

    def _collect(self, path: str, name: str, tensor: Tensor) -> None:
        weight = f"{path}.weight"
        parts = self.parts.setdefault(path, {})
        # the JSON is read on the host, the rest moves on at once
        parts[name] = tensor if ".quant_state." in name else tensor.to(self.device)
        if missing_keys(weight, parts):
            return
        try:
            self.layers[path].set_packed_(*nf4_from_tensors(weight, parts))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        del self.parts[path]
        self.waiting.discard(path)
