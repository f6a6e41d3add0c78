"""Whether an adapter that was read fits a model: made for it, complete, and nothing in it that would be passed over."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import EMBEDDING, HEAD, Adapter
from .bottleneck import AFTER, PARTS
from .own_weights import own_places
from .peft_config import CONFIG, is_target, saved_names
from .peft_keys import WEIGHTS
from .targets import linears


def check_fits(adapter: Adapter, model: nn.Module, *, fingerprint: str | None = None) -> None:
    """Raise ValueError when the adapter was made for another base or is incomplete.

    That is: unknown layers, other shapes, another fingerprint, weights that target_modules or modules_to_save don't name (PEFT
    would ignore them) or that they name and the file lacks, and a copy of the base's weight that isn't equal to it.
    """
    for path, (a, b, _) in adapter.layers.items():
        module = _module(adapter, model, path)
        expected = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if expected != (b.shape[0], a.shape[1]):
            raise ValueError(
                f"adapter {adapter.where} is for another base: {path} is {expected[0]} x {expected[1]} here, "
                f"{b.shape[0]} x {a.shape[1]} there"
            )
    made_for = adapter.graft.get("base_fingerprint")
    if made_for and fingerprint and made_for != fingerprint:
        raise ValueError(
            f"adapter {adapter.where} was trained on another base of the same shape "
            f"(fingerprint {made_for}, this base has {fingerprint}); load the base that it was made for"
        )
    if adapter.config["peft_type"] == "LORA":
        _check_named(adapter, "target_modules", adapter.layers, {
            path for path, _ in linears(model) if is_target(adapter.config, path)
        })  # fmt: skip
        _check_own(adapter, model)
    elif adapter.prefix is not None:
        _check_prefix(adapter, model)
    else:
        _check_bottlenecks(adapter, model)
    for path, copy in adapter.copies.items():
        _check_copy(adapter, model, path, copy)


def _module(adapter: Adapter, model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"adapter {adapter.where} is for another base: this one has no {path}") from None


def _check_named(adapter: Adapter, option: str, present: Iterable[str], named: set[str]) -> None:
    """What the file holds is what an option of the config names."""
    if surplus := sorted(set(present) - named):
        raise ValueError(
            f"adapter {adapter.where} holds weights for {surplus[0]}, which its {option} doesn't name, so PEFT would "
            f"ignore them; correct {option} in {CONFIG}"
        )
    if missing := sorted(named - set(present)):
        raise ValueError(
            f"adapter {adapter.where} is incomplete: its {option} names {missing[0]}, for which {WEIGHTS} has no "
            f"weights; get the whole file, or correct {option} in {CONFIG}"
        )


def _check_own(adapter: Adapter, model: Any) -> None:
    """Modules that train in full, and rows of the embedding."""
    bare, names = dict(own_places(model)), saved_names(adapter.config)
    named = {path for path in bare if any(path.endswith(name) for name in names)}
    if adapter.config.get("ensure_weight_tying") and EMBEDDING in adapter.modules:
        named |= {HEAD} & {*adapter.modules}  # PEFT writes the tied head too and doesn't name it
    tied = model.config.tie_embeddings if adapter.modules or adapter.token_rows else False
    also = {HEAD} if (tied and {*adapter.token_rows} == {EMBEDDING}) or adapter.shares_head(tied) else set()
    for path in [*adapter.modules, *adapter.token_rows, *also]:
        _module(adapter, model, path)
        if path in adapter.layers or (path in adapter.modules and path in adapter.token_rows):
            raise ValueError(
                f"adapter {adapter.where} changes {path} in two ways, which is not covered; merge it in PEFT first"
            )
    if (
        tied
        and adapter.config.get("ensure_weight_tying")
        and HEAD in adapter.modules
        and EMBEDDING not in adapter.modules
    ):
        raise ValueError(
            f"adapter {adapter.where} ties lm_head without embed_tokens, which is not covered; merge it in PEFT first"
        )
    _check_named(adapter, "modules_to_save", adapter.modules, named)
    for path, tensors in adapter.modules.items():
        own = dict(bare[path].named_parameters(recurse=False))
        if {*own} != {*tensors} or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
            found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            expected = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in own.items()) or "4-bit weights"
            raise ValueError(f"adapter {adapter.where} is for another base: {path} has {expected} here, {found} there")
    for path, (ids, rows) in adapter.token_rows.items():
        weight = getattr(bare.get(path), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
            raise ValueError(f"adapter {adapter.where} has rows of {path}, which is no embedding of this base")
        if rows.shape[1] != weight.shape[1] or max(ids) >= weight.shape[0]:
            raise ValueError(
                f"adapter {adapter.where} is for another base: {path} is {weight.shape[0]} x {weight.shape[1]} here, the rows "
                f"there are {rows.shape[1]} wide, with ids up to {max(ids)}"
            )


def _check_prefix(adapter: Adapter, model: nn.Module) -> None:
    config: Any = model.config
    assert adapter.prefix is not None
    expected = config.n_layers * 2 * config.n_kv_heads * config.d_head
    stated = (adapter.config["num_layers"], adapter.config["num_attention_heads"])
    if adapter.prefix.shape[1] != expected or stated != (config.n_layers, config.n_kv_heads):
        raise ValueError(
            f"adapter {adapter.where} is for another base: its prefix is {adapter.prefix.shape[1]} wide for {stated[0]} layers of "
            f"{stated[1]} heads; here it would be {expected}, {config.n_layers} and {config.n_kv_heads}"
        )
    if any(config.layer(i).window is not None for i in range(config.n_layers)):
        raise ValueError(f"adapter {adapter.where} is a prefix, which is not covered for layers with a sliding window")
    if config.n_linear_layers:
        raise ValueError(f"adapter {adapter.where} is a prefix, which is not covered for linear attention layers")
    if config.d_latent is not None:
        raise ValueError(f"adapter {adapter.where} is a prefix, which is not covered for latent attention")


def _check_bottlenecks(adapter: Adapter, model: nn.Module) -> None:
    named = {path: module for path, module in linears(model) if path.rpartition(".")[2] in AFTER}
    _check_named(adapter, "peft_type", adapter.bottlenecks, {*named})
    size = adapter.config["bottleneck_size"]
    for path, tensors in adapter.bottlenecks.items():
        d_model = named[path].out_features
        shapes = dict(zip(PARTS, ((size, d_model), (size,), (d_model, size), (d_model,)), strict=True))
        for part, shape in shapes.items():
            if part not in tensors or tuple(tensors[part].shape) != shape:
                found = tuple(tensors[part].shape) if part in tensors else "missing"
                raise ValueError(
                    f"adapter {adapter.where} is for another base: {path}'s {part} is {found}; expected {shape}"
                )


def _check_copy(adapter: Adapter, model: nn.Module, path: str, copy: Tensor) -> None:
    """PEFT saves the base's own weight beside an adapted head or embedding: it must be this base's."""
    module = _module(adapter, model, path)
    weight = getattr(getattr(module, "base", module), "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"adapter {adapter.where} holds a copy of {path}'s weight, which can't be compared with this base's, since "
            "that is quantized; use the base in full precision, or save the adapter with save_embedding_layers=False"
        )
    dtype = min(weight.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)  # the base may have been loaded in less
    if weight.shape != copy.shape or not torch.equal(weight.detach().to(dtype).cpu(), copy.to(dtype)):
        raise ValueError(
            f"adapter {adapter.where} brings a {path} of its own ({' x '.join(map(str, copy.shape))}), which differs from this "
            "base's; load the base that it was made for, or, if it was trained too, merge that adapter in PEFT first"
        )
