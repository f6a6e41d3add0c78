"""NF4Linear: a frozen linear layer that keeps its weight in 4 bits, and the walk that puts it into a model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.nf4 import NESTED_BLOCK_SIZE, DoubleQuantized, PackedWeight, autocast_is_on, linear_4bit
from .blockwise import QuantState, check_weight, dequantize_nf4, quantize_4bit
from .codebooks import codebook, dynamic8
from .files import PARTS, nf4_from_tensors, nf4_to_tensors
from .files import missing_keys as keys_missing

KEEP = ("lm_head",)  # stays in full precision unless told otherwise, as in transformers' default


class NF4Linear(nn.Module):
    """y = x W^T + bias with W in 4 bits: frozen, dequantized for each product and never kept (QLoRA, eq. 5 and 6).

    The backward pass dequantizes again, and the input's gradient needs the weight alone: autograd holds no activation.
    W has no gradient; the bias is a frozen parameter or None. Quantization state keeps its dtypes: `.to(torch.bfloat16)`
    casts the bias alone. (fp4 and int4 serve comparisons.)
    """

    packed: Tensor  # (ceil(out * in / 2), 1) uint8
    codebook: Tensor  # (16,) float32
    absmax: Tensor  # (n_blocks,) float32, only without double quantization
    absmax_q: Tensor  # (n_blocks,) uint8, this and the next three only with it
    absmax_scale: Tensor  # (ceil(n_blocks / 256),) float32
    absmax_mean: Tensor  # () float32
    nested_codebook: Tensor  # (256,) float32

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        dtype: torch.dtype = torch.float32,  # of the weight before, and of the bias
        compute_dtype: torch.dtype | None = None,  # of the product; None: the input's, or autocast's
        device: torch.device | str | None = None,  # "meta" for a placeholder that takes no memory
    ) -> None:
        """A layer whose weight is yet to come: `set_weight_`, or a state dict."""
        super().__init__()
        n = in_features * out_features
        n_blocks = -(-n // block_size)
        empty = {"device": device, "dtype": torch.float32}
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), False) if bias else None
        scales = torch.empty(n_blocks, **empty)
        if double_quant:
            scales = DoubleQuantized(
                torch.empty(n_blocks, dtype=torch.uint8, device=device),
                torch.empty(-(-n_blocks // NESTED_BLOCK_SIZE), **empty),
                torch.empty((), **empty),
                torch.tensor(dynamic8(), **empty),
            )
        values = torch.tensor(codebook(quant_type), **empty)
        state = QuantState((out_features, in_features), dtype, quant_type, block_size, values, scales)
        self.set_packed_(torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=device), state)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """The same layer in 4 bits, on the same device; keeps (and freezes) the bias. `linear` itself is not changed."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            quant_type=quant_type,
            block_size=block_size,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            device="meta",
        )
        layer.set_weight_(linear.weight)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return layer.train(linear.training)

    @property
    def scales(self) -> Tensor | DoubleQuantized:
        """absmax, or the same in 8 bits; the tensors are the layer's own."""
        if self.double_quant:
            return DoubleQuantized(self.absmax_q, self.absmax_scale, self.absmax_mean, self.nested_codebook)
        return self.absmax

    @property
    def state(self) -> QuantState:
        """What `dequantize_nf4(self.packed, self.state)` needs; the tensors are the layer's own."""
        shape = (self.out_features, self.in_features)
        return QuantState(shape, self.dtype, self.quant_type, self.block_size, self.codebook, self.scales)

    def set_weight_(self, weight: Tensor) -> None:
        """Quantize a weight (out, in) into this layer, on the weight's device. Raises as `quantize_nf4` does."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"weight is {tuple(weight.shape)}, this layer takes {(self.out_features, self.in_features)}"
            )
        block_size, double_quant = self.block_size, self.double_quant
        self.set_packed_(*quantize_4bit(weight, self.quant_type, block_size=block_size, double_quant=double_quant))

    def set_packed_(self, packed: Tensor, state: QuantState) -> None:
        """Take over a packed weight and its state, with their block size, second level and dtype."""
        if state.shape != (self.out_features, self.in_features):
            raise ValueError(f"weight is {state.shape}, this layer takes {(self.out_features, self.in_features)}")
        self.quant_type, self.block_size, self.dtype = state.quant_type, state.block_size, state.dtype
        self.double_quant = state.double is not None
        self._buffers.clear()
        self.register_buffer("packed", packed)
        self.register_buffer("codebook", state.codebook)
        if state.double is None:
            self.register_buffer("absmax", state.absmax)
        else:
            self.register_buffer("absmax_q", state.double.absmax_q)
            self.register_buffer("absmax_scale", state.double.absmax_scale)
            self.register_buffer("absmax_mean", state.double.absmax_mean)
            self.register_buffer("nested_codebook", state.double.codebook)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # (out, in)
        """The weight in full, in its dtype before quantization or the requested one."""
        return dequantize_nf4(self.packed, self.state, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        """The product in compute_dtype, else under autocast in its dtype, else in x's; returned in x's or autocast's."""
        dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) and x.dtype != torch.float64 else x.dtype
        compute = self.compute_dtype or dtype
        shape = (self.out_features, self.in_features)
        weight = PackedWeight(self.packed, self.codebook, self.scales, self.block_size, shape)
        bias = None if self.bias is None else self.bias.to(compute)
        return linear_4bit(x.to(compute), weight, bias).to(dtype)

    def extra_repr(self) -> str:
        """As nn.Linear prints itself, and the format."""
        levels = ", double_quant" if self.double_quant else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self.quant_type}, block_size={self.block_size}{levels}"

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """State dicts hold bitsandbytes' keys, so that a saved model is a file that it reads."""
        destination.update(nf4_to_tensors(f"{prefix}weight", self))
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take bitsandbytes' keys, or a weight in full precision, which is quantized; a placeholder takes their device."""
        del local_metadata, strict
        name = f"{prefix}weight"
        device = None if self.packed.is_meta else self.packed.device
        own = {key: tensor for key, tensor in state_dict.items() if key == name or key.startswith(f"{name}.")}
        expected = [name, *(f"{name}.{part}" for part in PARTS), f"{prefix}bias"]
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in expected]
        try:
            if name in own and own[name].is_floating_point():
                self.set_weight_(own[name].to(device))
            elif lacking := keys_missing(name, own):
                missing_keys += lacking
            else:
                self.set_packed_(*nf4_from_tensors(name, {key: tensor.to(device) for key, tensor in own.items()}))
        except ValueError as error:
            error_msgs.append(f"{name}: {error}")
        if self.bias is not None:
            if f"{prefix}bias" in state_dict:
                self.bias = nn.Parameter(state_dict[f"{prefix}bias"].to(device, self.bias.dtype), requires_grad=False)
            else:
                missing_keys.append(f"{prefix}bias")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        """Move the quantization state, never cast it: absmax in bfloat16 would be another weight."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def quantize_linears_(
    model: nn.Module,
    keep: Sequence[str] = KEEP,
    double_quant: bool = True,
    block_size: int = 64,
    compute_dtype: torch.dtype | None = None,
    *,
    quant_type: str = "nf4",
    backend: str = "graft",  # or "bitsandbytes": its Linear4bit in place of NF4Linear, to compare
) -> list[str]:
    """Replace every nn.Linear of a model by an NF4Linear, in place and one at a time; returns the names it changed.

    A name in `keep` spares the module of that path or of that last part, and all below it. Subclasses of nn.Linear are
    left alone, since their owners use them in other ways; a layer that appears twice stays shared. Works on meta and fake
    tensors. Raises ValueError, before anything is changed, for a model that is quantized already or has nothing to quantize,
    for a weight that cannot be, by its name, and for a name in `keep` (other than the default) that no module has.
    """
    if backend not in ("graft", "bitsandbytes"):
        raise ValueError(f"unknown quantization backend {backend!r}; choose graft or bitsandbytes")
    if isinstance(model, nn.Linear):
        raise ValueError("the model is itself a linear layer and can't be replaced in place; use NF4Linear.from_linear")
    already = [name for name, module in model.named_modules() if is_quantized(module)]
    if already:
        raise ValueError(
            f"the model is already quantized ({already[0]} and {len(already) - 1} more); use it as it is, or load its "
            "full-precision base"
        )
    _check_keep(model, keep)
    chosen: list[tuple[str, nn.Module, str, nn.Linear]] = []
    for path, parent in model.named_modules():
        for child_name, child in parent._modules.items():
            name = f"{path}.{child_name}" if path else child_name
            if type(child) is nn.Linear and not is_kept(name, keep):
                chosen.append((name, parent, child_name, child))
    if not chosen:
        raise ValueError(f"no linear layer to quantize in {type(model).__name__} beside those kept: {', '.join(keep)}")
    for name, _, _, linear in chosen:
        try:
            check_weight(linear.weight)
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from error
    make = NF4Linear.from_linear
    if backend == "bitsandbytes":
        from .peer import bitsandbytes_linear

        make = bitsandbytes_linear
    options: dict[str, Any] = {
        "quant_type": quant_type,
        "block_size": block_size,
        "double_quant": double_quant,
        "compute_dtype": compute_dtype,
    }
    replaced: dict[nn.Module, nn.Module] = {}
    for _, parent, child_name, linear in chosen:
        if linear not in replaced:
            replaced[linear] = make(linear, **options)
        setattr(parent, child_name, replaced[linear])
    return [name for name, *_ in chosen]


def _check_keep(model: nn.Module, keep: Sequence[str]) -> None:
    """Raise ValueError for names that spare nothing: most likely a slip, and the layer meant would be quantized."""
    if isinstance(keep, str):
        raise ValueError(f"keep={keep!r} is one string; give a sequence of names, such as ({keep!r},)")
    known = module_names(model).union(KEEP)
    unknown = [name for name in keep if name not in known]
    if unknown:
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        raise ValueError(
            f"keep names {unknown[0]!r}, but no module has that name; linear layers: {', '.join(linears[:8])}"
        )


def module_names(model: nn.Module) -> set[str]:
    """What `keep` can name: each module's path and its parts."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    return {name for path in paths for name in (path, *path.split("."))}


def is_kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a module's path, or that of one above it, is named in `keep` in full or by its last part."""
    parts = name.split(".")
    above = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path == kept or path.endswith(f".{kept}") for path in above for kept in keep)


def is_quantized(module: nn.Module) -> bool:
    """An NF4Linear, or another library's linear layer that holds integers (bitsandbytes' Linear4bit)."""
    weight = getattr(module, "weight", None) if isinstance(module, nn.Linear) else None
    return isinstance(module, NF4Linear) or (weight is not None and getattr(weight, "quant_state", None) is not None)
